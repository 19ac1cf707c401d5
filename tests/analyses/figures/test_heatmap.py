"""Heatmaps: cells against values, missing cells, and numbers that can be read."""

from __future__ import annotations

import numpy as np
import pytest
from figure_tables import cells
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from seaborn.utils import relative_luminance

from layerprobe.analyses.figures.heatmap import draw_heatmap, mark_cell, symmetric_range, value_range
from layerprobe.analyses.figures.style import styled


def heatmap(values: np.ndarray, *, width_in: float = 9.0, colormap: str = "viridis") -> Axes:
    with styled():
        axes = Figure().subplots()
        draw_heatmap(axes, values, limits=(0, 1), width_in=width_in, text="{:.2f}".format, colormap=colormap)
    return axes


def test_cells_and_numbers_are_the_values() -> None:
    values = np.random.default_rng(0).uniform(size=(3, 4))
    axes = heatmap(values)
    np.testing.assert_array_equal(cells(axes), values)
    numbers = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    assert numbers == {(i + 0.5, j + 0.5): f"{value:.2f}" for (i, j), value in np.ndenumerate(values)}
    assert axes.get_ylim() == (3, 0)


def test_missing_cells_are_hatched_and_have_no_number() -> None:
    values = np.array([[0.1, np.nan], [0.3, 0.4]])
    axes = heatmap(values)
    assert axes.patch.get_hatch() is not None
    assert [text.get_text() for text in axes.texts] == ["0.10", "0.30", "0.40"]
    assert heatmap(values[1:]).patch.get_hatch() is None
    assert not heatmap(np.full((2, 2), np.nan)).texts


@pytest.mark.parametrize("colormap", ["viridis", "PuOr_r"])
def test_numbers_have_a_contrast_of_four_and_a_half(colormap: str) -> None:
    values = np.linspace(0, 1, 40).reshape(4, 10)
    axes = heatmap(values, colormap=colormap)
    for text, color in zip(axes.texts, axes.collections[0].get_facecolor(), strict=True):
        dark, light = sorted((relative_luminance(text.get_color()), relative_luminance(color)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_numbers_that_would_be_too_small_or_too_many_are_left_out() -> None:
    assert heatmap(np.zeros((2, 12))).texts
    assert not heatmap(np.zeros((2, 12)), width_in=3).texts
    assert not heatmap(np.zeros((100, 7))).texts


def test_a_mark_surrounds_its_cell() -> None:
    axes = heatmap(np.zeros((2, 3)))
    mark_cell(axes, 1, 2)
    assert {(patch.get_x(), patch.get_y(), patch.get_width()) for patch in axes.patches} == {(2, 1, 1)}


def test_ranges() -> None:
    values = np.array([np.nan, -1.0, 3.0])
    assert value_range(values) == (-1, 3)
    assert value_range(values[:2]) == (-1, 0)
    assert value_range(values[:1]) == (0, 1)
    assert symmetric_range(values) == (-3, 3)
