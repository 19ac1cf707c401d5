"""Values of options that are written as text."""

from __future__ import annotations

from collections.abc import Iterable


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Parses "0.1,0.5" as (0.1, 0.5)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text} is not a list of numbers; write them as 0.1,0.5,0.9") from None


def integers(text: str, option: str) -> tuple[int, ...]:
    """Parses "3,32,32" as (3, 32, 32)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text} is not a list of whole numbers; write them as 3,32,32") from None


def names(text: str) -> list[str]:
    """Parses "a, b" as ["a", "b"]."""
    return [part.strip() for part in text.split(",")]


def layer_pairs(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Parses "2:5" or "blocks.2:blocks.5" (student, then teacher, counted from 0) as ("blocks.2", "blocks.5")."""
    pairs = []
    for text in texts:
        parts = text.split(":")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"--pair {text} is not student:teacher; write it as 2:5 or blocks.2:blocks.5")
        student, teacher = (f"blocks.{part}" if part.isdigit() else part for part in parts)
        pairs.append((student, teacher))
    return tuple(pairs)


def blocks(text: str) -> tuple[str, ...]:
    """Parses "2" as ("blocks.0", "blocks.1"), and "double:2,single:1" as ("double.0", "double.1", "single.0")."""
    parts = [part.rpartition(":") for part in names(text)]
    counted = all(count.isdigit() and int(count) for _, _, count in parts)
    if not counted or (len(parts) > 1 and not all(name for name, _, _ in parts)):
        raise ValueError(f"--blocks {text} is not a number of blocks; write 28, or double_blocks:8,single_blocks:48")
    return tuple(f"{name or 'blocks'}.{index}" for name, _, count in parts for index in range(int(count)))
