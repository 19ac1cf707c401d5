"""Figure of layer quality during a training: layers by steps, and the aligned pairs over the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerprobe.analyses.figures.heatmap import draw_heatmap, mark_cell, value_range
from layerprobe.analyses.figures.labels import capital, label_layers, short_names, wrap_title
from layerprobe.analyses.figures.style import LINE_COLORS, WIDTH_IN, require_columns, styled
from layerprobe.analyses.measures import Floats
from layerprobe.analyses.tables import CKA, COSINE, CURVE_COLUMNS, RANK, START_CKA, CurveFinding

_PER_LAYER = (RANK, START_CKA)
_PER_PAIR = (COSINE, CKA)


@styled()
def layer_step_heatmaps(table: pd.DataFrame, findings: Sequence[CurveFinding] = ()) -> Figure:
    """Draws layer by step: quality at each noise level, CKA with the start and effective rank; pairs as lines.

    A column is a measured step; steps need not be evenly spaced. Frames mark the best layer of a step.

    Args:
        table: Measurements with `CURVE_COLUMNS`.
        findings: What was found, for the title.

    Raises:
        ValueError: If the table has no rows or lacks a column.
    """
    require_columns(table, CURVE_COLUMNS, "table of layer curves")
    if table.empty:
        raise ValueError("no layer was measured yet; train for more steps")
    of_pairs = table[table["metric"].isin(_PER_PAIR)]
    of_layers = table.drop(index=of_pairs.index)
    metric = next(name for name in of_layers["metric"] if name not in _PER_LAYER)
    layers, steps = list(dict.fromkeys(of_layers["layer"])), sorted(set(of_layers["step"]))
    levels = sorted(set(of_layers["noise_level"]))
    panels = [
        (f"{capital(metric)} at noise level {level:g}; frames: best layer of a step", metric, [level])
        for level in levels
    ]
    panels.append(("CKA of each layer with itself at the start, mean over noise levels", START_CKA, levels))
    panels.append(("Effective rank, mean over noise levels", RANK, levels))
    heights = [0.6 + min(0.2 * len(layers), 3.2)] * len(panels) + [2.6] * bool(len(of_pairs))
    figure = Figure(figsize=(WIDTH_IN, 0.8 + sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, name, shown) in zip(all_axes, panels, strict=False):
        values = _matrix(of_layers, name, shown, layers, steps)
        draw_layers_by_step(axes, values, name, layers, steps, framed=name == metric, height_in=heights[0] - 0.6)
        axes.set_title(title if np.isfinite(values).all() else f"{title}; hatched: not measured")
    if len(of_pairs):
        _draw_pairs(all_axes[-1], of_pairs)
    figure.suptitle(wrap_title(_title(metric, layers, steps, findings)), x=0.008, ha="left")
    return figure


def _matrix(
    table: pd.DataFrame, metric: str, levels: Sequence[float], layers: Sequence[str], steps: Sequence[int]
) -> Floats:
    """The mean over levels, shape (layers, steps), the deepest layer first; nan where one is missing."""
    rows = table[(table["metric"] == metric) & table["noise_level"].isin(levels)]
    means = rows.groupby(["layer", "step"])["value"].agg(lambda values: values.mean(skipna=False)).unstack()
    values: Floats = means.reindex(index=list(layers)[::-1], columns=list(steps)).to_numpy(np.float64)
    return values


def draw_layers_by_step(
    axes: Axes,
    values: Floats,
    name: str,
    layers: Sequence[str],
    steps: Sequence[int],
    *,
    framed: bool,
    height_in: float,
) -> None:
    """Draws a table of layers and steps in colors.

    Args:
        axes: Axes.
        values: Values, shape (layers, steps), the deepest layer first.
        name: Name of the metric.
        layers: Layers in execution order.
        steps: Steps.
        framed: Whether to frame the best layer of each step.
        height_in: Height of the table in inches.
    """
    draw_heatmap(
        axes,
        values,
        limits=value_range(values),
        width_in=WIDTH_IN - 1.8,
        text=(lambda value: f"{value:.2f}") if name != RANK else (lambda value: f"{value:.3g}"),
        colorbar={"pad": 0.01, "aspect": 12, "label": name},
    )
    if framed:
        for column in np.flatnonzero(np.isfinite(values).any(axis=0)):
            mark_cell(axes, int(np.nanargmax(values[:, column])), int(column))
    label_layers(axes, list(layers)[::-1], height_in, first=0.5, vertical=True)
    axes.set_ylabel(short_names(layers)[1])
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 12)).round().astype(int))
    axes.set_xticks(shown + 0.5, [f"{steps[i]:,}" for i in shown])
    axes.set_xlabel("training step (measured ones)")


def _draw_pairs(axes: Axes, table: pd.DataFrame) -> None:
    means = table.groupby(["layer", "metric", "step"])["value"].mean()
    pairs = list(dict.fromkeys(table["layer"]))
    for i, pair in enumerate(pairs):
        for metric, line in ((COSINE, "-"), (CKA, "--")):
            values, color = means[pair, metric], LINE_COLORS[i % len(LINE_COLORS)]
            axes.plot(values.index, values, line, color=color, linewidth=1.8, marker=".", label=f"{metric}, {pair}")
    axes.margins(x=0.01)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("student and teacher")
    axes.set_title("Student and its teacher, mean over noise levels (1: alike)")
    axes.legend(loc="best", ncols=2)


def _title(metric: str, layers: Sequence[str], steps: Sequence[int], findings: Sequence[CurveFinding]) -> str:
    richest = [finding for finding in findings if finding.code.startswith("richest")]
    span = f"{len(layers)} layers at {len(steps)} steps, {steps[0]:,} to {steps[-1]:,}"
    if not richest:
        return f"Quality ({metric}) of {span}"
    first, last = richest[0], richest[-1]
    if first is last:
        return f"{last.layers[-1]} was the richest layer ({metric}) from step {first.step:,} on; {span}"
    moved = f"from {first.layers[-1]} to {last.layers[-1]}, the last time at step {last.step:,}"
    return f"The richest layer ({metric}) moved {moved}; {span}"
