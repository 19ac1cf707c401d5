"""The figure of several label columns: what each layer knows, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from layerprobe.analyses.figures.quality import QualityCurves, quality_curves
from layerprobe.analyses.figures.style import (
    BACKGROUND,
    INK,
    WIDTH_IN,
    Array,
    capital,
    label_ends,
    label_layers,
    level_colors,
    nanmean,
    short_names,
    styled,
    widen_range,
    wrap_title,
)
from layerprobe.analyses.tables import PROBE, probed_column

CLASS = "class"  # what a model is conditioned on; its column has no name in the tables
# Okabe and Ito 2008, without those that mark student and teacher.
COLUMN_COLORS = ("#0072b2", "#e69f00", "#009e73", "#56b4e9", "#a6761d", "#7a828c")
_ACROSS = 4


@styled()
def knowledge_curves(quality: pd.DataFrame) -> Figure:
    """What each layer knows of every label column: probe accuracy beside both controls, and what the layer adds.

    One panel a column: a line per noise level for the trained model, dashed for random weights, and left of the first
    layer a diamond for the raw input. Below, one line a column: the accuracy above the higher control, mean over noise
    levels, on the split "test".

    Args:
        quality: Quality table with the probe accuracy of one column or more.

    Raises:
        ValueError: If the table lacks columns or has no probe accuracy.
    """
    metrics = [m for m in dict.fromkeys(map(str, quality["metric"])) if m == PROBE or probed_column(m)]
    if not metrics:
        raise ValueError("the quality table has no probe accuracy; probe data with labels, or pass --probe-labels")
    found = {probed_column(metric) or CLASS: quality_curves(quality, metric, None) for metric in metrics}
    rows, across = -(-len(found) // _ACROSS), min(len(found), _ACROSS)
    figure = Figure(figsize=(WIDTH_IN, 2.9 * rows + 3.4), layout="constrained")
    grid = figure.add_gridspec(rows + 1, across)
    first = next(iter(found.values()))
    colors = level_colors(len(first.levels))
    shared: Axes | None = None
    for place, (name, curves) in enumerate(found.items()):
        axes = figure.add_subplot(grid[divmod(place, _ACROSS)], sharey=shared)
        shared = shared or axes
        _draw_column(axes, name, curves, colors, WIDTH_IN / across - 0.7)
        axes.tick_params(labelleft=place % _ACROSS == 0)
        if place % _ACROSS == 0:
            axes.set_ylabel(f"{capital(PROBE)}\n({curves.unit})")
    widen_range(shared, np.concatenate([_all_values(curves) for curves in found.values()]))  # type: ignore[arg-type]
    above = {name: _above_controls(curves) for name, curves in found.items()}
    gains = {name: values[:, 0] for name, values in above.items()}
    _draw_gains(figure.add_subplot(grid[rows, :]), above, first.layers)
    figure.suptitle(wrap_title(_title(gains, first.layers)), x=0.008, ha="left")
    figure.legend(handles=_legend(first, colors), loc="outside lower left", ncols=9, columnspacing=1.6)
    return figure


def _draw_column(axes: Axes, name: str, curves: QualityCurves, colors: Sequence[Any], width_in: float) -> None:
    x = np.arange(len(curves.layers))
    for level, color in enumerate(colors):
        axes.plot(x, curves.random[level, :, 0], color=color, linewidth=0.9, linestyle="--")
        axes.plot(x, curves.model[level, :, 0], color=color, linewidth=1.8, marker=".", markersize=4)
        axes.plot(-1, curves.raw[level, 0, 0], "D", color=color, markersize=4.5)
    title = f"{capital(name)}\n"
    values = curves.model[..., 0]
    if np.isfinite(values).any():
        at, layer = (int(i) for i in np.unravel_index(int(np.nanargmax(values)), values.shape))
        axes.plot(x[layer], values[at, layer], "o", color=colors[at], markeredgecolor=BACKGROUND, markersize=8)
        short = short_names(curves.layers)[0][layer]
        title += f"highest: layer {short} at noise level {curves.levels[at]:g} ({curves.text(values[at, layer])})"
    else:
        title += "nothing measured"
    axes.set_title(title)
    axes.set_xlim(-1.6, len(x) - 0.4)
    label_layers(axes, curves.layers, width_in)
    axes.set_xlabel(short_names(curves.layers)[1])


def _draw_gains(axes: Axes, above: Mapping[str, Array], layers: Sequence[str]) -> None:
    colors = dict(zip(above, COLUMN_COLORS * (1 + len(above)), strict=False))
    axes.axhline(0, color=INK, linewidth=1.2)
    for name, (gain, low, high) in ((name, values.T) for name, values in above.items()):
        axes.fill_between(range(len(layers)), low, high, color=colors[name], alpha=0.15, linewidth=0)
        axes.plot(range(len(layers)), gain, color=colors[name], linewidth=2.0, marker=".", markersize=5)
        if np.isfinite(gain).any():
            best = int(np.nanargmax(gain))
            axes.plot(best, gain[best], "o", color=colors[name], markeredgecolor=BACKGROUND, markersize=9)
    widen_range(axes, np.concatenate([*(values.ravel() for values in above.values()), np.zeros(1)]))
    axes.set_xlim(-0.3, len(layers) - 0.7)
    last = len(layers) - 1.0
    label_ends(axes, {name: (last, float(values[-1, 0])) for name, values in above.items()}, colors)
    band = "band: 95 % interval of the trained model's accuracy"
    axes.set_title(f"Accuracy above the higher control, mean over noise levels ({band}); large dot: the highest layer")
    axes.set_ylabel("accuracy above\nthe higher control")
    label_layers(axes, layers, WIDTH_IN - 2.2)
    axes.set_xlabel(short_names(layers)[1])


def _above_controls(curves: QualityCurves) -> Array:
    """The model's accuracy and its interval above the higher control, mean over noise levels, shape (layers, 3)."""
    controls = np.stack([curves.random[..., 0], np.broadcast_to(curves.raw[..., 0], curves.random.shape[:2])])
    known = np.where(np.isfinite(controls), controls, -np.inf).max(axis=0)
    return nanmean(curves.model - np.where(np.isfinite(known), known, np.nan)[..., None])


def _all_values(curves: QualityCurves) -> Array:
    return np.concatenate([block[..., 0].ravel() for block in (curves.model, curves.random, curves.raw)])


def _legend(curves: QualityCurves, colors: Sequence[Any]) -> list[Any]:
    handles = [
        Line2D([], [], color=color, linewidth=1.8, label=f"noise level {level:g}")
        for level, color in zip(curves.levels, colors, strict=True)
    ]
    handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle="--", label="random weights"))
    return [*handles, Line2D([], [], color=INK, linestyle="", marker="D", markersize=4.5, label="raw input")]


def _title(gains: Mapping[str, Array], layers: Sequence[str]) -> str:
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
