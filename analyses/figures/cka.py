"""Heatmap of CKA between all layers at all noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from layerprobe.analyses.figures.heatmap import draw_heatmap, mark_cell
from layerprobe.analyses.figures.hover import tell_cells
from layerprobe.analyses.figures.labels import label_layers, short_names, wrap_title
from layerprobe.analyses.figures.style import WIDTH_IN, nanmean, pick_in, require_columns, styled
from layerprobe.analyses.measures import Floats
from layerprobe.analyses.tables import SIMILARITY_COLUMNS

if TYPE_CHECKING:
    from layerprobe.analyses.selection import Selection
    from layerprobe.layersync import LayerPair

LIMITS = (0.0, 1.0)  # the same colors in every run; debiased values may lie a little below 0
_LABEL = "debiased linear CKA on the validation split (1: equal)"


@styled()
def cka_heatmap(
    similarity: pd.DataFrame,
    *,
    selection: Selection | None = None,
    layers: Sequence[str] | None = None,
) -> Figure:
    """Draws the CKA of all representations, and its mean over equal noise levels for every pair of layers.

    A representation is one layer at one noise level.

    Args:
        similarity: Similarity table, one row per pair of representations, in one or both orders.
        selection: Selection whose pick is marked, or None.
        layers: Layer names in execution order; None for the order of the table.

    Raises:
        ValueError: If a column or a layer of the pick is missing, the table is empty, or `layers` leaves a layer out.
    """
    names, levels, matrix = _cka_matrix(similarity, layers)
    pair = pick_in(selection, names)
    blocks = matrix.reshape(len(levels), len(names), len(levels), len(names))
    mean = nanmean(np.stack([blocks[i, :, i, :] for i in range(len(levels))]))
    figure = Figure(figsize=(WIDTH_IN, 6.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
    mesh = draw_heatmap(left, matrix, limits=LIMITS, width_in=5.2, square=True)
    _label_blocks(left, names, levels, 5.2)
    places = [f"{name} at {level:g}" for level in levels for name in names]
    tell_cells(left, _cell_texts(places, matrix))
    hatched = "" if np.isfinite(matrix).all() else "; hatched: not measured"
    left.set_title(f"All {len(matrix)} representations{hatched}", pad=34 if len(levels) > 1 else 6)
    _draw_mean(right, names, levels, mean, pair, width_in=4.2)
    extend = _extend(matrix)
    figure.colorbar(mesh, ax=[left, right], location="bottom", shrink=0.4, aspect=30, label=_LABEL, extend=extend)
    figure.suptitle(wrap_title(_cka_title(names, levels, mean, pair)), x=0.008, ha="left")
    return figure


@styled()
def paper_cka(similarity: pd.DataFrame, *, width_in: float, selection: Selection | None = None) -> Figure:
    """Draws the mean CKA over equal noise levels of every pair of layers, for a paper.

    Args:
        similarity: Similarity table, as for `cka_heatmap`.
        width_in: Width of the figure in inches.
        selection: Selection whose pick is marked, or None.

    Raises:
        ValueError: As `cka_heatmap`.
    """
    names, levels, matrix = _cka_matrix(similarity, None)
    blocks = matrix.reshape(len(levels), len(names), len(levels), len(names))
    mean = nanmean(np.stack([blocks[i, :, i, :] for i in range(len(levels))]))
    figure = Figure(figsize=(width_in, 0.9 * width_in), layout="constrained")
    axes = figure.subplots()
    mesh = _draw_mean(axes, names, levels, mean, pick_in(selection, names), width_in=0.68 * width_in)
    figure.colorbar(mesh, ax=axes, aspect=25, label="debiased linear CKA (1: equal)", extend=_extend(mean))
    return figure


def _draw_mean(
    axes: Axes, names: Sequence[str], levels: Sequence[float], mean: Floats, pair: LayerPair | None, *, width_in: float
) -> QuadMesh:
    mesh = draw_heatmap(axes, mean, limits=LIMITS, width_in=width_in, text="{:.2f}".format, square=True)
    axes.set_title("Mean over equal noise levels" if len(levels) > 1 else f"Noise level {levels[0]:g}")
    label_layers(axes, names, 0.81 * width_in, first=0.5)
    label_layers(axes, names, 0.81 * width_in, first=0.5, vertical=True)
    axes.set(xlabel=short_names(names)[1], ylabel=short_names(names)[1])
    tell_cells(axes, _cell_texts(names, mean))
    if pair is not None:
        student, teacher = names.index(pair.student), names.index(pair.teacher)
        mark_cell(axes, student, teacher)
        mark_cell(axes, teacher, student)
    return mesh


def _extend(values: Floats) -> str:
    """The end of a color bar that stands for values outside of the scale, as matplotlib names it."""
    return "min" if (values[np.isfinite(values)] < LIMITS[0]).any() else "neither"


def _cka_matrix(similarity: pd.DataFrame, layers: Sequence[str] | None) -> tuple[list[str], list[float], Floats]:
    """Layers, noise levels and the level-major matrix, shape (levels * layers, levels * layers), symmetric."""
    require_columns(similarity, SIMILARITY_COLUMNS, "similarity table")
    if similarity.empty:
        raise ValueError("the similarity table has no rows; run the similarity analysis first")
    in_table = list(dict.fromkeys([*similarity["layer_a"].astype(str), *similarity["layer_b"].astype(str)]))
    names = in_table if layers is None else [name for name in layers if name in set(in_table)]
    if left_out := set(in_table) - set(names):
        raise ValueError(f"`layers` does not contain {min(left_out)!r} of the similarity table; pass all its layers")
    levels = sorted({*similarity["noise_level_a"].astype(float), *similarity["noise_level_b"].astype(float)})
    position = {key: i for i, key in enumerate((level, name) for level in levels for name in names)}
    a = [position[key] for key in zip(similarity["noise_level_a"], similarity["layer_a"].astype(str), strict=True)]
    b = [position[key] for key in zip(similarity["noise_level_b"], similarity["layer_b"].astype(str), strict=True)]
    matrix = np.full((len(position), len(position)), np.nan)
    matrix[a, b] = matrix[b, a] = similarity["cka"].to_numpy(dtype=np.float64)
    # A table of distinct pairs has no diagonal; a degenerate representation has nan everywhere and keeps it there.
    valid = np.isfinite(matrix).any(axis=1) & np.isnan(matrix.diagonal())
    matrix[valid, valid] = 1.0
    return names, levels, matrix


def _cell_texts(places: Sequence[str], matrix: Floats) -> list[list[str]]:
    return [
        [
            f"{a} and {b}: {f'{value:.2f}' if np.isfinite(value) else 'not measured'}"
            for b, value in zip(places, row, strict=True)
        ]
        for a, row in zip(places, matrix.tolist(), strict=True)
    ]


def _label_blocks(axes: Axes, names: Sequence[str], levels: Sequence[float], side_in: float) -> None:
    """Layers on the left and below, noise levels above and on the right, white lines between the levels."""
    short, pattern = short_names(names)
    step = max(1, int(np.ceil(len(names) * len(levels) * 0.125 / side_in)))
    rows = [i * len(names) + j for i in range(len(levels)) for j in range(0, max(len(names) - step + 1, 1), step)]
    ticks, labels = [row + 0.5 for row in rows], [short[row % len(names)] for row in rows]
    axes.set_xticks(ticks, labels, rotation=90, fontsize=7)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_xlabel(pattern)
    axes.set_ylabel(pattern)
    if len(levels) == 1:
        return
    for i in range(1, len(levels)):
        axes.axhline(i * len(names), color="#ffffff", linewidth=1.2)
        axes.axvline(i * len(names), color="#ffffff", linewidth=1.2)
    centers = [(i + 0.5) * len(names) for i in range(len(levels))]
    for side in (axes.secondary_xaxis("top"), axes.secondary_yaxis("right")):
        side.tick_params(length=0)
        side.spines[:].set_visible(False)
    side_x, side_y = axes.child_axes
    side_x.set_xticks(centers, [f"{level:g}" for level in levels])
    side_x.set_xlabel("noise level")
    side_y.set_yticks(centers, [f"{level:g}" for level in levels])
    side_y.set_ylabel("noise level")


def _cka_title(names: Sequence[str], levels: Sequence[float], mean: Floats, pair: LayerPair | None) -> str:
    kind, where = ("mean CKA", "") if len(levels) > 1 else ("CKA", f" at noise level {levels[0]:g}")
    where += " on the validation split"
    if pair is not None:
        value = mean[names.index(pair.student), names.index(pair.teacher)]
        return f"Student {pair.student} and teacher {pair.teacher}: {kind} {value:.2f}{where}"
    steps = np.diagonal(mean, offset=1)
    if not np.isfinite(steps).any():
        return "Similarity of the layers"
    sharpest = int(np.nanargmin(steps))
    return f"Sharpest change: {names[sharpest]} to {names[sharpest + 1]}, {kind} {steps[sharpest]:.2f}{where}"
