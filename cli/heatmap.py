"""The numbers of a run on a terminal: layers x noise levels, coloured by value, with the value in every cell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from layerprobe.analyses.runs import LevelGrid

# From little to much, in steps of equal lightness, told apart without hue too. Each has its own colour of the text, so
# it can be read whatever the terminal's background is.
_COLORS = ("#15304f", "#1f4e79", "#2f6f8f", "#4a9096", "#74b08f", "#a9cb84", "#dfe27f")
_FIRST_BRIGHT = 3
_CELL, _LONGEST_NAME, _MOST_ROWS = 7, 24, 36  # a cell is five digits and two marks


def heatmap(grid: LevelGrid, width: int) -> Text:
    """Returns the grid as text of at most this width; levels and layers that have no room are left out, and counted.

    Args:
        grid: Numbers to show.
        width: Width in characters.
    """
    from rich.text import Text

    marks = {grid.richest: "*"} | ({grid.added_most: "+"} if grid.added_most else {})
    if grid.added_most == grid.richest:
        marks = {grid.richest: "*+"}
    names = [_short(name) for name, _ in (*grid.rows, *grid.controls)]
    name_width = max(map(len, (*names, "noise level"))) + 1
    kept_levels = _kept(len(grid.levels), max((width - name_width) // _CELL, 1), _positions(grid.levels, marks, 1))
    layers = [name for name, _ in grid.rows]
    kept_rows = _kept(len(layers), _MOST_ROWS, _positions(layers, marks, 0))
    known = [value for _, values in (*grid.rows, *grid.controls) for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    decimals = 3 if high < 10 else max(0, 3 - len(str(int(high))))  # five characters at most
    text = Text()
    text.append("noise level".ljust(name_width), "bold")
    text.append("".join(f"{grid.levels[v]:>5g}".ljust(_CELL) for v in kept_levels).rstrip(), "bold")
    rows = [grid.rows[i] for i in kept_rows]
    for name, values in chain(rows, grid.controls):
        text.append(f"\n{_short(name).ljust(name_width)}", style="italic" if (name, values) in grid.controls else "")
        for v in kept_levels:
            text.append(
                _cell(values[v], decimals, marks.get((name, grid.levels[v]), "")), cell_style(values[v], low, high)
            )
    left_out = [
        f"{len(kept)} of {total} {what}"
        for kept, total, what in ((kept_rows, len(layers), "layers"), (kept_levels, len(grid.levels), "noise levels"))
        if len(kept) < total
    ]
    if left_out:
        text.append(f"\n{' and '.join(left_out)} are shown; all are in quality.csv")
    return text


def _cell(value: float | None, decimals: int, mark: str) -> str:
    digits = "-" if value is None else f"{value:.{decimals}f}"
    return f"{digits:>5}{mark:<2}"


def cell_style(value: float | None, low: float, high: float) -> str:
    """Returns colours of the text and of the cell."""
    if value is None:
        return ""
    place = int((value - low) / (high - low) * len(_COLORS)) if high > low else 0
    place = min(place, len(_COLORS) - 1)
    return f"{'#000000' if place >= _FIRST_BRIGHT else '#ffffff'} on {_COLORS[place]}"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _positions(names: Sequence[object], marks: dict[tuple[str, float | None], str], part: int) -> list[int]:
    """Positions of the marked layers (part 0) or levels (part 1)."""
    return [names.index(mark[part]) for mark in marks if mark[part] in names]


def _kept(num: int, most: int, needed: Sequence[int]) -> list[int]:
    """Evenly spaced positions, at most `most` of them, those that are needed in place of their neighbors."""
    if num <= most:
        return list(range(num))
    kept = {round(i * (num - 1) / max(most - 1, 1)) for i in range(most)}
    for position in needed:
        if position not in kept:
            kept.remove(min(kept - set(needed), key=lambda other: abs(other - position), default=next(iter(kept))))
            kept.add(position)
    return sorted(kept)
