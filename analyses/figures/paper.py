"""Figures of quality for papers: one panel or two below each other, which are read at their own size.

Noise levels differ by marker too, so that they are told apart in black and white.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from layerprobe.analyses.figures.heatmap import draw_heatmap, mark_cell, symmetric_range, value_range
from layerprobe.analyses.figures.labels import capital, label_layers, short_names
from layerprobe.analyses.figures.quality import PAIR_LINES, better_control, mark_pair, places, quality_curves
from layerprobe.analyses.figures.style import fit_y_limits, level_colors, pick_in, styled

if TYPE_CHECKING:
    from layerprobe.analyses.selection import Selection

MARKERS = "osD^vPX*<>"


@styled()
def paper_curves(quality: pd.DataFrame, metric: str, *, width_in: float, selection: Selection | None = None) -> Figure:
    """Draws the quality of every layer of the trained model, one line per noise level.

    Args:
        quality: Quality table.
        metric: Name of a metric in the table.
        width_in: Width of the figure in inches.
        selection: Selection whose pick is marked, or None.

    Raises:
        ValueError: If a column, the metric or a layer of the pick is not in the table.
    """
    curves = quality_curves(quality, metric, None)
    pair = pick_in(selection, curves.layers)
    figure = Figure(figsize=(width_in, 1.4 + 0.3 * width_in), layout="constrained")
    axes = figure.subplots()
    x, num_levels = np.arange(len(curves.layers)), len(curves.levels)
    handles: list[Any] = []
    for i, (level, color) in enumerate(zip(curves.levels, level_colors(num_levels), strict=True)):
        every = max(1, len(x) // 8)
        handles += axes.plot(
            x,
            curves.model[i, :, 0],
            color=color,
            marker=MARKERS[i % len(MARKERS)],
            markevery=(i % every, every),
            label=f"{level:g}",
        )
    fit_y_limits(axes, curves.model[..., 0])
    mark_pair(axes, curves.layers, pair)
    axes.set_ylabel(f"{capital(metric)}\n({curves.unit})")
    label_layers(axes, curves.layers, _room(width_in - 0.7))
    axes.set_xlabel(short_names(curves.layers)[1])
    if pair is not None:
        handles += [Line2D([], [], **line, label=role) for role, line in PAIR_LINES.items()]
    columns = int(np.ceil(len(handles) / np.ceil(len(handles) * _scale() / (1.8 * width_in))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, title="noise level", columnspacing=1.2)
    return figure


@styled()
def paper_heatmap(quality: pd.DataFrame, metric: str, *, width_in: float) -> Figure:
    """Draws one metric over layers and noise levels and, below it, the difference from the better control.

    Args:
        quality: Quality table.
        metric: Name of a metric in the table.
        width_in: Width of the figure in inches.

    Raises:
        ValueError: If a column or the metric is not in the table.
    """
    curves = quality_curves(quality, metric, None)
    model = curves.model[..., 0]
    gain = model - (better_control(quality, curves) if curves.is_fraction else curves.random[..., 0])
    best, best_gain = places(quality, curves, gain)
    panels = [(f"{capital(metric)}, trained model", model, best)]
    if np.isfinite(gain).any():
        control = "the better control" if curves.is_fraction else "random weights"
        panels.append((f"Trained model minus {control}", gain, best_gain))
    height = 0.7 + len(panels) * (0.35 + 0.16 * _scale() * len(curves.levels))
    figure = Figure(figsize=(width_in, height), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, values, framed) in zip(all_axes, panels, strict=True):
        draw_heatmap(
            axes,
            values,
            limits=symmetric_range(values) if values is gain else value_range(values),
            colormap="PuOr_r" if values is gain else "viridis",
            width_in=width_in - 0.9,
            text=curves.text,
            colorbar={"pad": 0.02, "aspect": 12},
        )
        axes.set_title(title if np.isfinite(values).all() else f"{title}; hatched: not measured")
        axes.set_ylabel("noise level")
        axes.set_yticks(np.arange(len(curves.levels)) + 0.5, [f"{level:g}" for level in curves.levels])
        if np.isfinite(values).any():
            mark_cell(axes, *framed)
    label_layers(all_axes[-1], curves.layers, _room(width_in - 0.9), first=0.5)
    all_axes[-1].set_xlabel(short_names(curves.layers)[1])
    return figure


def _scale() -> float:
    """How large text is, as a factor of that of a paper."""
    return float(mpl.rcParams["font.size"]) / 7


def _room(length_in: float) -> float:
    """The length of an axis for `label_layers`, which thinks of text of 8.8 points."""
    return length_in * 8.8 / (6.5 * _scale())
