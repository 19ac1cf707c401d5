"""What a page tells about the point or cell under the pointer; files of figures do not show it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerprobe.analyses.measures import Floats

MAX_CELLS = 2500  # more would make the page large
_POINT = 4.5  # half the side of the area of a point
_PER_INCH = 72


@dataclass(frozen=True)
class Spot:
    """A rectangle of a figure, in points from its upper left corner, and its text."""

    x: float
    y: float
    width: float
    height: float
    text: str


_Corners = Sequence[tuple[float, float]]
_spots: WeakKeyDictionary[Axes, list[tuple[_Corners, str]]] = WeakKeyDictionary()


def tell_points(axes: Axes, x: Iterable[float], y: Floats, texts: Sequence[str]) -> None:
    """Gives each finite point of a line its text."""
    spots = _spots.setdefault(axes, [])
    spots += [([(float(a), float(b))], text) for a, b, text in zip(x, y, texts, strict=True) if np.isfinite(b)]


def tell_cells(axes: Axes, texts: Sequence[Sequence[str]]) -> None:
    """Gives each cell of a heatmap its text, by row and column; too many cells get none."""
    if sum(map(len, texts)) <= MAX_CELLS:
        spots = _spots.setdefault(axes, [])
        spots += [([(j, i), (j + 1, i + 1)], text) for i, row in enumerate(texts) for j, text in enumerate(row)]


def spots_of(figure: Figure) -> Iterator[Spot]:
    """Yields the texts of a figure whose layout is final, with their places."""
    height = figure.get_size_inches()[1] * _PER_INCH
    for axes in figure.axes:
        for corners, text in _spots.get(axes, []):
            place = axes.transData.transform(corners) * _PER_INCH / figure.dpi
            (left, low), (right, high) = place.min(axis=0), place.max(axis=0)
            pad = _POINT if len(corners) == 1 else 0.0
            width, tall = right - left + 2 * pad, high - low + 2 * pad
            yield Spot(float(left - pad), float(height - high - pad), float(width), float(tall), text)
