"""Text from files, made safe to print: a terminal runs control codes, and marks of direction change the order."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches

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


def as_written(name: str, names: Iterable[str]) -> str:
    """Returns a name with the capitals that it has among the names; a name that is not there unchanged."""
    return {each.lower(): each for each in names}.get(name.lower(), name)


def unknown(what: str, name: object, names: Iterable[str]) -> str:
    """Returns a message about an unknown name: "unknown schedule 'flwo'; use sit, flow or edm; did you mean flow?"."""
    known = list(names)
    return f"unknown {what} {name!r}; use {one_of(known)}{did_you_mean(str(name), known)}"


def one_of(names: Iterable[str]) -> str:
    """Returns "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns the end of a message about an unknown name: "; did you mean cka?", or "" if no name is like it."""
    match = closest(name, names)
    return f"; did you mean {match}?" if match else ""


def closest(name: str, names: Iterable[str], *, least: float = 0.6) -> str | None:
    """Returns the name that is most like another, whatever their capitals; None if none is, by a share of `least`."""
    by_small = {each.lower(): each for each in names}
    close = get_close_matches(name.lower(), by_small, n=1, cutoff=least)
    return by_small[close[0]] if close else None


def _escaped(character: str) -> str:
    return ascii(character)[1:-1] if unicodedata.category(character) in _UNSAFE else character
