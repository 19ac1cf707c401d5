"""Figure of all label columns: the probe accuracy of every layer, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from layerprobe.analyses.figures.hover import tell_points
from layerprobe.analyses.figures.labels import capital, label_ends, label_layers, short_names, wrap_title
from layerprobe.analyses.figures.quality import QualityCurves, better_control, quality_curves
from layerprobe.analyses.figures.style import (
    BACKGROUND,
    INK,
    LINE_COLORS,
    WIDTH_IN,
    fit_y_limits,
    level_colors,
    nanmean,
    styled,
)
from layerprobe.analyses.measures import Floats
from layerprobe.analyses.tables import PROBE, probed_column
from layerprobe.analyses.wording import rounded

CLASS = "class"  # the label that the model is conditioned on; it has no column name in the tables
MAX_COLUMNS = 4  # panels in a row


@styled()
def knowledge_curves(quality: pd.DataFrame) -> Figure:
    """Draws the probe accuracy of every layer for every label column, beside both controls.

    Each column has one panel: a line per noise level for the trained model, dashed for random weights, and left of the
    first layer a diamond for the raw input. The lowest panel has one line per column: the accuracy above the higher
    control, averaged over noise levels. All values are of the test split where it has them.

    Args:
        quality: Quality table with the probe accuracy of at least one column.

    Raises:
        ValueError: If the table lacks columns or has no probe accuracy.
    """
    metrics = [m for m in dict.fromkeys(map(str, quality["metric"])) if m == PROBE or probed_column(m)]
    if not metrics:
        raise ValueError("the quality table has no probe accuracy; probe data with labels, or pass --probe-labels")
    panels = {probed_column(metric) or CLASS: quality_curves(quality, metric, None) for metric in metrics}
    rows, columns = -(-len(panels) // MAX_COLUMNS), min(len(panels), MAX_COLUMNS)
    figure = Figure(figsize=(WIDTH_IN, 2.9 * rows + 3.4), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns)
    first = next(iter(panels.values()))
    colors = level_colors(len(first.levels))
    values = np.concatenate([_all_values(curves) for curves in panels.values()])
    for i, (name, curves) in enumerate(panels.items()):
        row, column = divmod(i, columns)
        axes = figure.add_subplot(grid[row, column])
        _draw_column(axes, name, curves, colors, WIDTH_IN / columns - 0.7)
        fit_y_limits(axes, values)
        axes.tick_params(labelleft=column == 0)
        if column == 0:
            axes.set_ylabel(f"{capital(PROBE)}\n({curves.unit})")
    differences = {name: _above_controls(quality, curves) for name, curves in panels.items()}
    gains = {name: values[:, 0] for name, values in differences.items()}
    _draw_gains(figure.add_subplot(grid[rows, :]), differences, first.layers)
    figure.suptitle(wrap_title(_title(gains, first.layers)), x=0.008, ha="left")
    figure.legend(handles=_legend(first, colors), loc="outside lower left", ncols=9, columnspacing=1.6)
    return figure


def _draw_column(axes: Axes, name: str, curves: QualityCurves, colors: Sequence[str], width_in: float) -> None:
    x = np.arange(len(curves.layers))
    for i, color in enumerate(colors):
        axes.plot(x, curves.random[i, :, 0], color=color, linewidth=0.9, linestyle="--")
        axes.plot(x, curves.model[i, :, 0], color=color, linewidth=1.8, marker=".", markersize=4)
        tell_points(axes, x, curves.model[i, :, 0], curves.texts("trained model", i, curves.model[i]))
        axes.plot(-1, curves.raw[i, 0, 0], "D", color=color, markersize=4.5)
    title = f"{capital(name)}\n"
    values = curves.model[..., 0]
    if np.isfinite(values).any():
        level, layer = (int(i) for i in np.unravel_index(int(np.nanargmax(values)), values.shape))
        axes.plot(x[layer], values[level, layer], "o", color=colors[level], markeredgecolor=BACKGROUND, markersize=8)
        short = short_names(curves.layers)[0][layer]
        title += f"highest: {short} ({curves.text(values[level, layer])})\nat noise level {curves.levels[level]:g}"
    else:
        title += "nothing measured"
    axes.set_title(title)
    axes.set_xlim(-1.6, len(x) - 0.4)
    label_layers(axes, curves.layers, width_in)
    axes.set_xlabel(short_names(curves.layers)[1])


def _draw_gains(axes: Axes, differences: Mapping[str, Floats], layers: Sequence[str]) -> None:
    colors = dict(zip(differences, LINE_COLORS * (1 + len(differences)), strict=False))
    axes.axhline(0, color=INK, linewidth=1.2)
    for name, values in differences.items():
        gain, low, high = values.T
        axes.fill_between(range(len(layers)), low, high, color=colors[name], alpha=0.15, linewidth=0)
        axes.plot(range(len(layers)), gain, color=colors[name], linewidth=2.0, marker=".", markersize=5)
        texts = [f"{name}, {layer}: {rounded(*of, signed=True)}" for layer, of in zip(layers, values, strict=True)]
        tell_points(axes, range(len(layers)), gain, texts)
        if np.isfinite(gain).any():
            best = int(np.nanargmax(gain))
            axes.plot(best, gain[best], "o", color=colors[name], markeredgecolor=BACKGROUND, markersize=9)
    fit_y_limits(axes, np.concatenate([*(values.ravel() for values in differences.values()), np.zeros(1)]))
    axes.set_xlim(-0.3, len(layers) - 0.7)
    last = len(layers) - 1.0
    label_ends(axes, {name: (last, float(values[-1, 0])) for name, values in differences.items()}, colors)
    band = "band: 95 % interval of the trained model's accuracy"
    axes.set_title(f"Accuracy above the higher control, mean over noise levels ({band}); large dot: highest layer")
    axes.set_ylabel("accuracy above\nthe higher control")
    label_layers(axes, layers, WIDTH_IN - 2.2)
    axes.set_xlabel(short_names(layers)[1])


def _above_controls(quality: pd.DataFrame, curves: QualityCurves) -> Floats:
    """The model's accuracy and its interval minus the higher control, mean over noise levels, shape (layers, 3)."""
    return nanmean(curves.model - better_control(quality, curves)[..., None])


def _all_values(curves: QualityCurves) -> Floats:
    return np.concatenate([block[..., 0].ravel() for block in (curves.model, curves.random, curves.raw)])


def _legend(curves: QualityCurves, colors: Sequence[str]) -> list[Any]:
    handles = [
        Line2D([], [], color=color, linewidth=1.8, label=f"noise level {level:g}")
        for level, color in zip(curves.levels, colors, strict=True)
    ]
    handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle="--", label="random weights"))
    return [*handles, Line2D([], [], color=INK, linestyle="", marker="D", markersize=4.5, label="raw input")]


def _title(gains: Mapping[str, Floats], layers: Sequence[str]) -> str:
    facts = []
    for name, gain in gains.items():
        best = int(np.nanargmax(gain)) if np.isfinite(gain).any() else None
        if best is None:
            facts.append(f"{name} could not be compared")
        elif gain[best] <= 0:
            facts.append(f"{name} nowhere above the controls")
        else:
            facts.append(f"{name} best above the controls at {layers[best]} (+{gain[best]:.2f})")
    return capital("; ".join(facts))
