"""Quality of layers over noise levels: curves, panels of several metrics, and heatmaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from layerprobe.analyses.figures.heatmap import draw_heatmap, mark_cell, symmetric_range, value_range
from layerprobe.analyses.figures.hover import tell_cells, tell_points
from layerprobe.analyses.figures.labels import (
    capital,
    in_sentence,
    label_ends,
    label_layers,
    num_decimals,
    short_names,
    wrap_title,
)
from layerprobe.analyses.figures.style import (
    BACKGROUND,
    GRAY,
    INK,
    STUDENT,
    TEACHER,
    WIDTH_IN,
    fit_y_limits,
    level_colors,
    pick_in,
    point_marker,
    require_columns,
    styled,
)
from layerprobe.analyses.measures import Floats
from layerprobe.analyses.tables import MODEL, QUALITY_COLUMNS, RANDOM_WEIGHTS, RAW_INPUT
from layerprobe.analyses.wording import rounded
from layerprobe.extraction import SPLITS

if TYPE_CHECKING:
    from layerprobe.analyses.selection import Selection
    from layerprobe.layersync import LayerPair

PAIR_LINES: dict[str, dict[str, Any]] = {
    "student": {"color": STUDENT, "linestyle": (0, (5, 2)), "linewidth": 1.2},
    "teacher": {"color": TEACHER, "linewidth": 1.2},
}


@dataclass(frozen=True)
class QualityCurves:
    """One metric on one split, with its controls.

    The last axis of the arrays is (value, low, high): the value and its 95 % interval, nan where it was not measured.

    Attributes:
        metric: Name of the metric.
        split: Name of the split.
        layers: Layer names in execution order.
        levels: Noise levels in ascending order.
        model: Values of the trained model, shape (levels, layers, 3).
        random: Values of the same network with random weights, shape (levels, layers, 3).
        raw: Values of the raw input, shape (levels, 1, 3).
    """

    metric: str
    split: str
    layers: tuple[str, ...]
    levels: tuple[float, ...]
    model: Floats
    random: Floats
    raw: Floats

    @property
    def is_fraction(self) -> bool:
        """Whether values lie in [0, 1]."""
        return "accuracy" in self.metric

    def text(self, value: float) -> str:
        """Returns a value as text: two decimals for a fraction, three significant digits otherwise."""
        if np.isnan(value):
            return "nan"
        decimals = 2 if self.is_fraction or value == 0 else num_decimals(value, 3)
        return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")  # no negative zero

    def texts(self, name: str, level: int, values: Floats) -> list[str]:
        """Returns what each point of a line says: its name, layer, noise level, and value with its interval."""
        place = f"at noise level {self.levels[level]:g}"
        return [
            f"{name}, {layer} {place}: {rounded(*of)}" for layer, of in zip(self.layers, values.tolist(), strict=True)
        ]

    @property
    def unit(self) -> str:
        """The unit for axis labels."""
        return f"fraction of the {self.split} split" if self.is_fraction else f"{self.split} split"


@styled()
def layer_quality_curves(
    quality: pd.DataFrame,
    metric: str,
    *,
    split: str | None = None,
    selection: Selection | None = None,
) -> Figure:
    """Draws the quality of every layer at every noise level, beside the two controls.

    The upper panel compares noise levels. Below, one panel per noise level compares the trained model (with its 95 %
    interval) with the same network with random weights (dashed) and with the raw input (dotted).

    Args:
        quality: Quality table, one row per source, layer, noise level, metric and split.
        metric: Name of a metric in the table, for example "probe accuracy".
        split: Split to show; None for "test" where the metric has it, else "validation", else "train".
        selection: Selection whose pick is marked, or None.

    Raises:
        ValueError: If a column, the metric, the split or a layer of the pick is not in the table.
    """
    curves = quality_curves(quality, metric, split)
    pair = pick_in(selection, curves.layers)
    num_levels = len(curves.levels)
    rows = int(np.ceil(num_levels / 4))
    columns = int(np.ceil(num_levels / rows))
    overview = num_levels > 1
    heights = [3.0] * overview + [2.15 if overview else 4.0] * rows
    longest = max(map(len, short_names(curves.layers)[0]))
    names_in = (1 + overview) * 0.08 * max(longest - 4, 0)  # long names stand upright
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + 1.3 + names_in), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    colors = level_colors(num_levels)
    if overview:
        _draw_overview(figure.add_subplot(grid[0, :]), curves, colors, pair)
    panels: list[Axes] = []
    for i in range(num_levels):
        row, column = divmod(i, columns)
        axes = figure.add_subplot(grid[row + overview, column])
        panels.append(axes)
        _draw_level(axes, curves, i, colors[i], pair)
        lowest = i + columns >= num_levels
        label_layers(axes, curves.layers, WIDTH_IN / columns - 0.7)
        if lowest:
            axes.set_xlabel("layer" if overview else short_names(curves.layers)[1])
        axes.tick_params(labelbottom=lowest, labelleft=column == 0)
        if column == 0:
            axes.set_ylabel(capital(metric) if overview else f"{capital(metric)}\n({curves.unit})")
    if not overview:
        _name_pair(panels[0], curves.layers, pair)
    figure.suptitle(wrap_title(_curves_title(quality, curves)), x=0.008, ha="left")
    figure.legend(handles=_level_legend(curves, colors, pair), loc="outside lower left", ncols=8, columnspacing=1.6)
    return figure


@styled()
def metric_panels(quality: pd.DataFrame, metrics: Sequence[str], *, selection: Selection | None = None) -> Figure:
    """Draws several metrics side by side, each over layers with one line per noise level; random weights are dashed.

    Args:
        quality: Quality table.
        metrics: Names of the metrics in the order of the panels; each on the split that `layer_quality_curves` shows.
        selection: Selection whose pick is marked, or None.

    Raises:
        ValueError: If there is no metric, or a column or metric is not in the table.
    """
    if not metrics:
        raise ValueError("there is no metric to draw; pass at least one metric of the table")
    panels = [quality_curves(quality, metric, None) for metric in metrics]
    layers = panels[0].layers
    columns = min(3, len(panels))
    rows = int(np.ceil(len(panels) / columns))
    figure = Figure(figsize=(WIDTH_IN, 2.3 * rows + 1.0), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axes, curves in zip(grid, panels, strict=False):
        x = np.arange(len(curves.layers))
        for i, (level, color) in enumerate(zip(curves.levels, level_colors(len(curves.levels)), strict=True)):
            (handles[f"noise level {level:g}"],) = axes.plot(x, curves.model[i, :, 0], color=color, linewidth=1.6)
            axes.plot(x, curves.random[i, :, 0], color=color, linewidth=0.9, linestyle="--")
            tell_points(axes, x, curves.model[i, :, 0], curves.texts("trained model", i, curves.model[i]))
        axes.set_title(f"{capital(curves.metric)} ({curves.unit})", fontsize=8.5)
        mark_pair(axes, curves.layers, pick_in(selection, curves.layers))
        label_layers(axes, curves.layers, WIDTH_IN / columns - 0.7)
        axes.set_xlabel(short_names(curves.layers)[1])
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles["random weights"] = Line2D([], [], color=INK, linewidth=0.9, linestyle="--")
    if pick_in(selection, layers) is not None:
        handles |= {role: Line2D([], [], **line) for role, line in PAIR_LINES.items()}
    title = f"{len(panels)} more measures of {len(layers)} layers; no single one tells which layer is best"
    figure.suptitle(wrap_title(title), x=0.008, ha="left")
    figure.legend(handles=list(handles.values()), labels=list(handles), loc="outside lower left", ncols=7)
    return figure


@styled()
def quality_heatmap(quality: pd.DataFrame, metric: str, *, split: str | None = None) -> Figure:
    """Draws one metric over layers and noise levels and, below it, the difference from the better control.

    Frames mark the largest value and the largest difference: of accuracies those that are largest on the validation
    split.

    Args:
        quality: Quality table.
        metric: Name of a metric in the table.
        split: Split to show; None for "test" where the metric has it, else "validation", else "train".

    Raises:
        ValueError: If a column, the metric or the split is not in the table.
    """
    curves = quality_curves(quality, metric, split)
    model = curves.model[..., 0]
    control = better_control(quality, curves) if curves.is_fraction else curves.random[..., 0]
    gain = model - control
    framed = (
        "; frames: largest on the validation split" if curves.is_fraction and on_validation(quality, curves) else ""
    )
    panels = [(f"{capital(metric)} ({curves.unit}), trained model{framed}", metric, model)]
    if np.isfinite(gain).any():
        control_name = "the better control at that noise level" if curves.is_fraction else "random weights"
        panels.append((f"Trained model minus {control_name}", "difference", gain))
    best, best_gain = places(quality, curves, gain)
    longest = max(map(len, short_names(curves.layers)[0]))
    height = 1.1 + 0.08 * longest + len(panels) * (0.85 + 0.32 * len(curves.levels))
    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, label, values) in zip(all_axes, panels, strict=True):
        draw_heatmap(
            axes,
            values,
            limits=symmetric_range(values) if values is gain else value_range(values),
            colormap="PuOr_r" if values is gain else "viridis",
            width_in=WIDTH_IN - 1.8,
            text=curves.text,
            colorbar={"pad": 0.01, "aspect": 6 + 2 * len(curves.levels), "label": in_sentence(label)},
        )
        axes.set_title(title if np.isfinite(values).all() else f"{title}; hatched: not measured")
        axes.set_ylabel("noise level")
        axes.set_yticks(np.arange(len(curves.levels)) + 0.5, [f"{level:g}" for level in curves.levels])
        if np.isfinite(values).any():
            mark_cell(axes, *(best_gain if values is gain else best))
        tell_cells(axes, _cell_texts(curves, values))
    label_layers(all_axes[-1], curves.layers, WIDTH_IN - 1.8, first=0.5)
    all_axes[-1].set_xlabel(short_names(curves.layers)[1])
    figure.suptitle(wrap_title(_heatmap_title(curves, gain, best, best_gain)), x=0.008, ha="left")
    return figure


def quality_curves(quality: pd.DataFrame, metric: str, split: str | None) -> QualityCurves:
    """Returns one metric of the quality table as arrays.

    Args:
        quality: Quality table.
        metric: Name of a metric in the table.
        split: Split; None for "test" where the metric has it, else "validation", else "train".

    Raises:
        ValueError: If a column, the metric, the split or the trained model is not in the table.
    """
    require_columns(quality, QUALITY_COLUMNS, "quality table")
    rows = quality[quality["metric"] == metric]
    if rows.empty:
        metrics = ", ".join(sorted(map(str, quality["metric"].unique()))) or "no rows at all"
        raise ValueError(f"metric {metric!r} is not in the quality table, which has {metrics}; pass one of those")
    splits = [name for name in reversed(SPLITS) if (rows["split"] == name).any()]
    if split is not None and split not in splits:
        raise ValueError(f"{metric!r} has no values on split {split!r}, only on {', '.join(splits)}; pass one of those")
    split = split or splits[0]
    rows = rows[rows["split"] == split]
    model = rows[rows["source"] == MODEL]
    if model.empty:
        raise ValueError(f"the quality table has only controls for {metric!r}; analyze the model itself first")
    order = model.sort_values("layer_index", kind="stable")["layer"].astype(str)
    layers, levels = tuple(dict.fromkeys(order)), tuple(sorted(map(float, model["noise_level"].unique())))
    raw = rows[rows["source"] == RAW_INPUT]
    return QualityCurves(
        metric=metric,
        split=split,
        layers=layers,
        levels=levels,
        model=_cube(model, layers, levels),
        random=_cube(rows[rows["source"] == RANDOM_WEIGHTS], layers, levels),
        raw=_cube(raw.assign(layer="input"), ("input",), levels),
    )


def better_control(quality: pd.DataFrame, curves: QualityCurves) -> Floats:
    """Returns the better control at each noise level: the best layer with random weights, or the raw input.

    It is chosen on the validation split where the metric has it, as the single answers of a run choose it.

    Args:
        quality: Quality table.
        curves: A metric of it on one split.

    Returns:
        Values of the controls on the split of the curves, shape (levels, 1); nan without a control.
    """
    chosen = on_validation(quality, curves) or curves
    there, here = (np.concatenate([of.random, of.raw], axis=1)[..., 0] for of in (chosen, curves))
    best = np.where(np.isfinite(there) & np.isfinite(here), there, -np.inf).argmax(axis=1)
    return np.take_along_axis(here, best[:, None], axis=1)


def on_validation(quality: pd.DataFrame, curves: QualityCurves) -> QualityCurves | None:
    """Returns the same metric on the validation split; None if it is not measured there, or at other places."""
    rows = quality[(quality["metric"] == curves.metric) & (quality["source"] == MODEL)]
    if "validation" not in set(rows["split"]):
        return None
    other = quality_curves(quality, curves.metric, "validation")
    return other if (other.layers, other.levels) == (curves.layers, curves.levels) else None


def _cube(rows: pd.DataFrame, layers: Sequence[str], levels: Sequence[float]) -> Floats:
    """Shape (levels, layers, 3); several rows for one cell, such as several random networks, are averaged."""
    mean = rows.groupby(["noise_level", "layer"])[["value", "low", "high"]].mean()
    index = pd.MultiIndex.from_product([levels, layers], names=["noise_level", "layer"])
    return mean.reindex(index).to_numpy(dtype=np.float64).reshape(len(levels), len(layers), 3)


def _argmax(values: Floats) -> tuple[int, int]:
    """Row and column of the largest finite value."""
    row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
    return int(row), int(column)


def places(
    quality: pd.DataFrame, curves: QualityCurves, gain: Floats | None = None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Level and layer of the largest value and of the largest gain; of accuracies those of the validation split.

    The largest of many numbers of the test split would flatter, and contradict the single answers of a run.
    """
    chosen = (on_validation(quality, curves) if curves.is_fraction else None) or curves
    values = chosen.model[..., 0]
    above = values - better_control(quality, chosen) if curves.is_fraction else gain
    measured = np.isfinite(curves.model[..., 0])
    best, best_gain = (
        _argmax(np.where(measured, of, np.nan)) if of is not None and np.isfinite(of[measured]).any() else (0, 0)
        for of in (values, above)
    )
    return best, best_gain


def _cell_texts(curves: QualityCurves, values: Floats) -> list[list[str]]:
    return [
        [
            f"{layer} at noise level {level:g}: {curves.text(value)}"
            if np.isfinite(value)
            else f"{layer}: not measured"
            for layer, value in zip(curves.layers, row, strict=True)
        ]
        for level, row in zip(curves.levels, values.tolist(), strict=True)
    ]


def _draw_overview(axes: Axes, curves: QualityCurves, colors: Sequence[str], pair: LayerPair | None) -> None:
    x = np.arange(len(curves.layers))
    ends, end_colors = {}, {}
    for i, (level, values, color) in enumerate(zip(curves.levels, curves.model[..., 0], colors, strict=True)):
        axes.plot(x, values, color=color, linewidth=1.5, marker=point_marker(values), markersize=3)
        tell_points(axes, x, values, curves.texts("trained model", i, curves.model[i]))
        ends[f"{level:g}"], end_colors[f"{level:g}"] = line_end(values), color
        if np.isfinite(values).any():
            best = int(np.nanargmax(values))
            axes.plot(x[best], values[best], "o", color=color, markeredgecolor=BACKGROUND, markersize=8)
    fit_y_limits(axes, curves.model[..., 0])
    axes.set_title(
        "Trained model, one line per noise level, named at its end; a large dot marks the highest layer of a level"
    )
    axes.set_xlim(-0.6, len(x) - 0.4)
    mark_pair(axes, curves.layers, pair)
    _name_pair(axes, curves.layers, pair)
    axes.set_ylabel(f"{capital(curves.metric)}\n({curves.unit})")
    label_ends(axes, ends, end_colors)
    label_layers(axes, curves.layers, WIDTH_IN - 1.9)
    axes.set_xlabel(short_names(curves.layers)[1])


def _draw_level(axes: Axes, curves: QualityCurves, level: int, color: str, pair: LayerPair | None) -> None:
    x = np.arange(len(curves.layers))
    model, random, raw = curves.model[level], curves.random[level], curves.raw[level, 0]
    axes.fill_between(x, random[:, 1], random[:, 2], color=GRAY, alpha=0.2, linewidth=0)
    axes.plot(x, random[:, 0], "--", color=GRAY, linewidth=1.3, marker=point_marker(random[:, 0]), markersize=3)
    if np.isfinite(raw[0]):
        axes.axhline(raw[0], color=INK, linestyle=":", linewidth=1.3)
    axes.fill_between(x, model[:, 1], model[:, 2], color=color, alpha=0.25, linewidth=0)
    tell_points(axes, x, random[:, 0], curves.texts(RANDOM_WEIGHTS, level, random))
    tell_points(axes, x, model[:, 0], curves.texts("trained model", level, model))
    axes.plot(x, model[:, 0], color=color, linewidth=1.8, marker=point_marker(model[:, 0]), markersize=3)
    missing = x[np.isnan(model[:, 0])]
    axes.plot(missing, np.full(len(missing), 0.04), "x", color=GRAY, markersize=5, transform=axes.get_xaxis_transform())
    title = f"Noise level {curves.levels[level]:g}\n"
    if np.isfinite(model[:, 0]).any():
        best = int(np.nanargmax(model[:, 0]))
        axes.plot(x[best], model[best, 0], "o", color=color, markeredgecolor=BACKGROUND, markersize=7)
        title += f"highest: {short_names(curves.layers)[0][best]} ({curves.text(model[best, 0])})"
    else:
        title += "nothing measured"
    axes.set_title(title)
    # All levels share their limits.
    fit_y_limits(axes, np.concatenate([block.ravel() for block in (curves.model, curves.random, curves.raw)]))
    axes.set_xlim(-0.6, len(x) - 0.4)
    mark_pair(axes, curves.layers, pair)


def line_end(values: Floats) -> tuple[float, float]:
    """The last point of a line that was measured."""
    finite = np.flatnonzero(np.isfinite(values))
    return (float(finite[-1]), float(values[finite[-1]])) if len(finite) else (0.0, np.nan)


def mark_pair(axes: Axes, layers: Sequence[str], pair: LayerPair | None) -> None:
    """Draws the lines of the student and the teacher of a pick; nothing without one."""
    if pair is not None:
        axes.axvline(layers.index(pair.student), **PAIR_LINES["student"], zorder=1)
        axes.axvline(layers.index(pair.teacher), **PAIR_LINES["teacher"], zorder=1)


def _name_pair(axes: Axes, layers: Sequence[str], pair: LayerPair | None) -> None:
    """Writes the roles above the frame, on opposite sides of their lines so that neighbors do not collide."""
    if pair is None:
        return
    short = short_names(layers)[0]
    student_first = layers.index(pair.student) <= layers.index(pair.teacher)
    for role, layer, is_left in (
        ("student", pair.student, student_first),
        ("teacher", pair.teacher, not student_first),
    ):
        axes.annotate(
            f"{role} {short[layers.index(layer)]}",
            (layers.index(layer), 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-2 if is_left else 2, 2),
            textcoords="offset points",
            ha="right" if is_left else "left",
            va="bottom",
            fontsize=8.5,
        )
    axes.set_title(axes.get_title(loc="left"), pad=18)


def _level_legend(curves: QualityCurves, colors: Sequence[str], pair: LayerPair | None) -> list[Any]:
    color = colors[0]
    handles: list[Any] = [Line2D([], [], color=color, linewidth=1.8, label="trained model")]
    if np.isfinite(curves.model[..., 1:]).any():
        handles.append(Patch(facecolor=color, alpha=0.25, label="95 % bootstrap interval"))
    if np.isfinite(curves.random[..., 0]).any():
        handles.append(Line2D([], [], color=GRAY, linestyle="--", label="random weights"))
    if np.isfinite(curves.raw[..., 0]).any():
        handles.append(Line2D([], [], color=INK, linestyle=":", label="raw input"))
    if np.isnan(curves.model[..., 0]).any():
        handles.append(Line2D([], [], color=GRAY, linestyle="", marker="x", label="not measured"))
    if pair is not None:
        handles += [Line2D([], [], **line, label=role) for role, line in PAIR_LINES.items()]
    return handles


def _curves_title(quality: pd.DataFrame, curves: QualityCurves) -> str:
    metric, values = capital(curves.metric), curves.model[..., 0]
    if not np.isfinite(values).any():
        return f"{metric} could not be measured in any layer"
    (level, layer), _ = places(quality, curves)
    peak = float(values[level, layer])
    title = f"{metric} peaks at {curves.layers[layer]} ({curves.text(peak)}) at noise level {curves.levels[level]:g}"
    title += ", chosen on the validation split" if peak < np.nanmax(values) else ""
    controls = {
        name: float(np.nanmax(block))
        for name, block in ((RANDOM_WEIGHTS, curves.random[level, :, 0]), (RAW_INPUT, curves.raw[level, :, 0]))
        if np.isfinite(block).any()
    }
    if not controls:
        return title
    name = max(controls, key=lambda key: controls[key])
    if controls[name] >= peak:
        return f"{title}; a control is as high there: {name} ({curves.text(controls[name])})"
    return f"{title}; the highest control there is {name} ({curves.text(controls[name])})"


def _heatmap_title(curves: QualityCurves, gain: Floats, best: tuple[int, int], best_gain: tuple[int, int]) -> str:
    values = curves.model[..., 0]
    if not np.isfinite(values).any():
        return f"{capital(curves.metric)} could not be measured in any layer"
    level, layer = best
    title = f"Highest {in_sentence(curves.metric)}: {curves.layers[layer]} at noise level {curves.levels[level]:g}"
    if not np.isfinite(gain).any():
        return title
    level, layer = best_gain
    if gain[level, layer] <= 0:
        nothing = "training adds nothing over the controls" if curves.is_fraction else "nowhere above random weights"
        return f"{title}; {nothing}"
    verb = "training adds most" if curves.is_fraction else "farthest above random weights"
    place = f"{curves.layers[layer]} at noise level {curves.levels[level]:g}"
    return f"{title}; {verb} at {place} (+{curves.text(float(gain[level, layer]))})"
