"""Values of options that are written as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from layerprobe.files import check_there, is_no_path

T = TypeVar("T")
# As torch names them; whether there is one, and whether it computes in float64, is asked later.
_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "npu", "mlu", "mtia", "privateuseone")


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


def check_device(device: str) -> str:
    """Refuses what is the name of no device, before torch is imported to ask it for one."""
    if device.partition(":")[0] not in _DEVICES:
        raise ValueError(f"unknown --device {device!r}; use auto, cpu or cuda, or cuda:1 for the second GPU")
    return device


def existing(what: str, advice: str) -> Callable[[T], T]:
    """Returns a function that refuses a path at which there is nothing, before anything is imported for it.

    Args:
        what: What the path is of, such as "run".
        advice: What to do if there is none.
    """

    def check(value: T) -> T:
        paths: list[Any] = value if isinstance(value, list) else [value]
        for path in paths:
            if path is not None and not (isinstance(path, str) and is_no_path(path)):
                check_there(path, what, advice)
        return value

    return check


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
