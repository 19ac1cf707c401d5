"""Texts of points and cells, and where they lie."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from layerprobe.analyses.figures.hover import MAX_CELLS, spots_of, tell_cells, tell_points


def test_places_are_points_from_the_upper_left_corner() -> None:
    figure = Figure(figsize=(2, 1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 2), ylim=(0, 1))
    tell_points(axes, [0.5, 1.0], np.array([0.75, np.nan]), ["first", "missing"])
    tell_cells(axes, [["cell"]])
    point, cell = spots_of(figure)
    assert (point.text, point.x + point.width / 2, point.y + point.height / 2) == ("first", 36, 18)
    assert (cell.text, cell.x, cell.y, cell.width, cell.height) == ("cell", 0, 0, 72, 72)


def test_too_many_cells_have_no_text() -> None:
    figure = Figure()
    tell_cells(figure.subplots(), [["x"] * MAX_CELLS, ["x"]])
    assert list(spots_of(figure)) == []
