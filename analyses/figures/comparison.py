"""Figures of several runs: their quality curves, and the likeness of the layers of two networks."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerprobe.analyses.figures.cka import LIMITS
from layerprobe.analyses.figures.heatmap import draw_heatmap, mark_cell
from layerprobe.analyses.figures.labels import capital, label_layers, short_names, wrap_title
from layerprobe.analyses.figures.layer_curves import draw_layers_by_step
from layerprobe.analyses.figures.quality import on_validation, quality_curves
from layerprobe.analyses.figures.style import LINE_COLORS, WIDTH_IN, fit_y_limits, nanmean, styled
from layerprobe.analyses.measures import Floats

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@styled()
def comparison_curves(qualities: Mapping[str, pd.DataFrame], metric: str) -> Figure:
    """Draws one metric of several runs over the depth of their networks: a panel for each noise level, and the mean.

    Depth is the number of a layer over the number of layers, so that networks of different depth share the axis.

    Args:
        qualities: Quality table of each run by its name, at most eight.
        metric: Metric that all runs have.

    Raises:
        ValueError: If there are more than eight runs, a run has no such metric, or they share no noise level.
    """
    if len(qualities) > len(LINE_COLORS):
        raise ValueError(f"a figure shows {len(LINE_COLORS)} runs at most, got {len(qualities)}; compare fewer")
    curves = {name: quality_curves(quality, metric, None) for name, quality in qualities.items()}
    levels = sorted(set.intersection(*(set(one.levels) for one in curves.values())))
    if not levels:
        raise ValueError("the runs have no noise level in common; probe them at the same --noise-levels")
    columns = min(len(levels) + 1, 4)
    rows = -(-(len(levels) + 1) // columns)
    figure = Figure(figsize=(WIDTH_IN, 2.6 * rows + 0.8), layout="constrained")
    panels = list(np.atleast_1d(figure.subplots(rows, columns, sharey=True, squeeze=False)).ravel())
    colors = dict(zip(curves, LINE_COLORS, strict=False))
    means = {name: nanmean(one.model[[one.levels.index(level) for level in levels]]) for name, one in curves.items()}
    _draw(panels[0], {name: values[:, :1] for name, values in means.items()}, colors, "Mean over the levels")
    for axes, level in zip(panels[1:], levels, strict=False):
        at_level = {name: one.model[one.levels.index(level)] for name, one in curves.items()}
        _draw(axes, at_level, colors, f"Noise level {level:g}")
    for axes in panels[len(levels) + 1 :]:
        axes.set_axis_off()
    every = np.concatenate([one.model.ravel() for one in curves.values()])
    fit_y_limits(panels[0], every)
    unit = next(iter(curves.values())).unit
    for row in range(rows):
        panels[row * columns].set_ylabel(f"{capital(metric)}\n({unit})")
    for axes in panels[max(0, len(levels) + 1 - columns) : len(levels) + 1]:
        axes.set_xlabel("depth (share of the layers)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4)
    tops = ", ".join(f"{np.nanmax(values[:, 0]):.3g} ({name})" for name, values in means.items())
    title = (
        f"{capital(metric)} of {len(curves)} runs over the depth of the network; highest mean over the levels: {tops}"
    )
    figure.suptitle(wrap_title(title), x=0.008, ha="left")
    return figure


def _draw(axes: Axes, values: Mapping[str, Floats], colors: Mapping[str, str], title: str) -> None:
    """Lines over depth; values have shape (layers, 3) with an interval, or (layers, 1) without one."""
    for (name, of_run), marker in zip(values.items(), MARKERS, strict=False):
        depth = (np.arange(len(of_run)) + 1) / len(of_run)
        axes.plot(depth, of_run[:, 0], color=colors[name], marker=marker, markersize=3.5, linewidth=1.3, label=name)
        if of_run.shape[1] == 3:
            axes.fill_between(depth, of_run[:, 1], of_run[:, 2], color=colors[name], alpha=0.15, linewidth=0)
    axes.set_title(title)
    axes.set_xlim(0, 1.04)


@styled()
def quality_over_steps(qualities: Mapping[int, pd.DataFrame], metric: str) -> Figure:
    """Draws one metric of runs that are steps of one training: the best layer at each level, and all layers, by step.

    Best layers are chosen on the validation split where the metric has it; values are of the test split where it has.

    Args:
        qualities: Quality table of each run by its training step.
        metric: Metric that all runs have.

    Raises:
        ValueError: If a run has no such metric, or the runs have other layers or no noise level in common.
    """
    steps = sorted(qualities)
    curves = {step: quality_curves(qualities[step], metric, None) for step in steps}
    layers = curves[steps[0]].layers
    if other := next((step for step in steps if curves[step].layers != layers), None):
        raise ValueError(f"the runs at steps {steps[0]} and {other} have other layers; pass steps of one training")
    levels = sorted(set.intersection(*(set(one.levels) for one in curves.values())))
    if not levels:
        raise ValueError("the runs have no noise level in common; probe them at the same --noise-levels")
    values = np.stack([one.model[[one.levels.index(v) for v in levels]] for one in curves.values()])
    choosing = [on_validation(qualities[step], one) or one for step, one in curves.items()]
    chosen = np.stack([one.model[[one.levels.index(v) for v in levels], :, 0] for one in choosing])
    best = np.where(np.isfinite(chosen), chosen, -np.inf).argmax(2)
    height = min(max(1.2, 0.2 * len(layers)), 4.0)
    figure = Figure(figsize=(WIDTH_IN, 4.0 + height), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[2.6, height + 0.6])
    for i, (level, marker) in enumerate(zip(levels, itertools.cycle(MARKERS), strict=False)):
        of_best = values[np.arange(len(steps)), i, best[:, i]]
        color = LINE_COLORS[i % len(LINE_COLORS)]
        top.plot(steps, of_best[:, 0], color=color, marker=marker, linewidth=1.5, label=f"noise level {level:g}")
        top.fill_between(steps, of_best[:, 1], of_best[:, 2], color=color, alpha=0.15, linewidth=0)
    top.set_title("Best layer at each noise level, with its 95 % interval")
    top.set_xlabel("training step")
    top.xaxis.set_major_formatter("{x:,.0f}")
    top.set_ylabel(f"{capital(metric)}\n({next(iter(curves.values())).unit})")
    top.legend(loc="best", ncols=3)
    means = nanmean(values[..., 0].swapaxes(0, 1))  # (steps, layers)
    draw_layers_by_step(bottom, means.T[::-1], metric, layers, steps, framed=True, height_in=height)
    bottom.set_title("All layers, mean over the noise levels; frames: best layer of a step")
    ends = (
        f"{np.nanmax(row):.3g} ({layers[int(np.nanargmax(row))]}) at step {step:,}"
        for step, row in ((steps[0], means[0]), (steps[-1], means[-1]))
    )
    title = f"{capital(metric)} at {len(steps)} steps of one training; highest mean over the levels: {', '.join(ends)}"
    figure.suptitle(wrap_title(title), x=0.008, ha="left")
    return figure


@styled()
def block_map_heatmap(
    cka: Floats, layers_a: Sequence[str], layers_b: Sequence[str], *, names: tuple[str, str]
) -> Figure:
    """Draws the likeness of the layers of two networks; a frame marks the most alike layer of b for each of a.

    Args:
        cka: CKA at equal noise levels, averaged, shape (layers of a, layers of b).
        layers_a: Layers of the first network, in execution order.
        layers_b: Layers of the second network.
        names: Names of the two runs.
    """
    height = min(max(3.0, 0.32 * len(layers_a) + 1.8), 11.0)
    figure = Figure(figsize=(min(WIDTH_IN, max(5.5, 0.45 * len(layers_b) + 2.5)), height), layout="constrained")
    axes = figure.subplots()
    width = figure.get_size_inches()[0] - 2
    label = "debiased linear CKA (1: equal)"
    draw_heatmap(axes, cka, limits=LIMITS, width_in=width, text="{:.2f}".format, colorbar={"label": label})
    for row, values in enumerate(cka):
        if np.isfinite(values).any():
            mark_cell(axes, row, int(np.nanargmax(values)))
    label_layers(axes, layers_b, width, first=0.5)
    label_layers(axes, layers_a, height - 1.5, first=0.5, vertical=True)
    axes.set_xlabel(f"{names[1]}: {short_names(layers_b)[1]}")
    axes.set_ylabel(f"{names[0]}: {short_names(layers_a)[1]}")
    title = f"Framed: the layer of {names[1]} most like each layer of {names[0]}"
    figure.suptitle(textwrap.fill(title, int(9 * width)), x=0.008, ha="left")
    return figure
