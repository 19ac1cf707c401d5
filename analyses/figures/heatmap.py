"""Heatmaps, drawn with seaborn; one unit per cell, the first cell from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.patches import Rectangle
from seaborn.utils import relative_luminance

from layerprobe.analyses.figures.style import MISSING
from layerprobe.analyses.measures import Floats

MAX_NUMBERS = 600  # more would make the SVG large
MIN_FONT, MAX_FONT = 6.0, 8.5


def draw_heatmap(
    axes: Axes,
    values: Floats,
    *,
    limits: tuple[float, float],
    width_in: float,
    text: Callable[[float], str] | None = None,
    colormap: str = "viridis",
    colorbar: Mapping[str, Any] | None = None,
    square: bool = False,
) -> QuadMesh:
    """Draws a matrix as colored cells, hatched where a value is missing, with numbers where they fit.

    Args:
        axes: Axes to draw into.
        values: Matrix, shape (rows, columns); nan where a value is missing.
        limits: Values at the two ends of the colormap.
        width_in: Approximate width of the axes in inches.
        text: Formats the number in a cell; None for no numbers.
        colormap: Name of a colormap.
        colorbar: Keyword arguments of `Figure.colorbar`; None for no color bar.
        square: Whether cells are as high as wide.

    Returns:
        The colored cells, for a color bar of several panels.
    """
    finite = np.isfinite(values)
    if not finite.all():
        axes.patch.set(**MISSING)
    numbers = [[text(value) for value in row] for row in values.tolist()] if text else None
    font = 0.0
    if numbers and values.size <= MAX_NUMBERS:
        longest = max((len(number) for number in np.array(numbers)[finite]), default=1)
        font = min(MAX_FONT, 72 * width_in / values.shape[1] / (0.65 * longest + 0.6))
    seaborn.heatmap(
        values,
        ax=axes,
        vmin=limits[0],
        vmax=limits[1],
        cmap=colormap,
        annot=numbers if font >= MIN_FONT else None,
        fmt="",
        annot_kws={"fontsize": font, "in_layout": False},  # hundreds of numbers would slow the layout down
        cbar=colorbar is not None,
        cbar_kws=colorbar,
        square=square,
        xticklabels=False,
        yticklabels=False,
        rasterized=True,
    )
    axes.grid(False)
    mesh = axes.collections[0]
    assert isinstance(mesh, QuadMesh)
    if axes.texts:
        # Seaborn writes in white up to a luminance of 0.41, with a contrast of 2.3:1; black is better from 0.18 on.
        for number, color in zip(axes.texts, mesh.to_rgba(values[finite]), strict=True):
            number.set_color("#000000" if relative_luminance(color) > 0.18 else "#ffffff")
    return mesh


def mark_cell(axes: Axes, row: int, column: int, *, thin: bool = True) -> None:
    """Draws a black frame around a cell; a thin one has a white line inside, so that it is seen on every color."""
    for color, width in (("#000000", 3.0), ("#ffffff", 1.2))[: 1 + thin]:
        frame = Rectangle((column, row), 1, 1, fill=False, edgecolor=color, linewidth=width, zorder=3, clip_on=False)
        axes.add_patch(frame)


def value_range(values: Floats) -> tuple[float, float]:
    """Returns the smallest and the largest finite value; (0, 1) if there are none."""
    if not np.isfinite(values).any():
        return 0.0, 1.0
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return low, high if high > low else low + 1


def symmetric_range(values: Floats) -> tuple[float, float]:
    """Returns a range around 0 that holds every finite value, for diverging colormaps."""
    limit = max(float(np.nanmax(np.abs(values))), 1e-12)
    return -limit, limit
