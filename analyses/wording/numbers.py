"""Numbers as text, rounded to what is known of them."""

from __future__ import annotations

import math

MISSING = "–"


def rounded(value: float | None, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """Returns a number with its 95 % interval, with two significant digits of half the width: "0.935 [0.909, 0.957]".

    An interval that leaves out zero has more digits where its nearer end would read as zero.

    Args:
        value: The number; "–" stands for a missing one.
        low: Lower end of the interval. Without an interval the number has three significant digits.
        high: Upper end of the interval.
        signed: Whether the sign is written for positive numbers too, as of differences.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    ends = [end for end in (low, high) if end is not None and math.isfinite(end)]
    half = (ends[1] - ends[0]) / 2 if len(ends) == 2 else 0.0
    decimals = _decimals(half, 2) if half > 0 else _decimals(value, 3)
    nearer = min(map(abs, ends), default=0.0)
    if half > 0 and ends[0] * ends[1] > 0 and not round(nearer, decimals):
        decimals = _decimals(nearer, 1)
    text, *interval = (_signed(number, decimals, signed) for number in (value, *ends))
    return f"{text} [{interval[0]}, {interval[1]}]" if half > 0 else text


def _signed(number: float, decimals: int, signed: bool) -> str:
    number = round(number, decimals) + 0.0  # no negative zero
    return f"{number:{'+' if signed and number else ''},.{max(decimals, 0)}f}".replace("-", "\N{MINUS SIGN}")


def _decimals(value: float, digits: int) -> int:
    """Number of decimals that show so many significant digits."""
    return min(digits - 1 - math.floor(math.log10(abs(value))), 9) if value else 0
