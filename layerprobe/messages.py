"""Text from files, made safe to print: a terminal runs control codes, and marks of direction change the order."""

from __future__ import annotations

import unicodedata

MAX_MESSAGE = 600
# Controls, marks that are not seen (of direction among them), halves of characters, separators of lines.
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def safe(text: str, length: int | None = None) -> str:
    r"""Returns a text with escapes such as `\x1b` in place of characters that are not printed, tabs and line ends too.

    Args:
        text: The text.
        length: Largest number of characters; what exceeds it is cut out of the middle, since the end of a message says
            what to do.
    """
    if not text.isprintable():
        text = "".join(_escaped(character) for character in text)
    if length is None or len(text) <= length:
        return text
    return f"{text[: length - length // 3 - 5]} ... {text[len(text) - length // 3 :]}"


def safe_lines(text: str) -> str:
    """Returns a text of several lines, each of them safe."""
    return "\n".join(safe(line) for line in text.split("\n"))


def _escaped(character: str) -> str:
    return ascii(character)[1:-1] if unicodedata.category(character) in _UNSAFE else character
