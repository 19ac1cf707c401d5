"""Figures: tables in, matplotlib figures out.

Layers run from left to right in execution order, noise level 0 is clean and 1 is pure noise, accuracies are fractions.
Titles state what is seen and are computed from the table. Nothing here touches pyplot or the caller's settings: a
figure is a plain `matplotlib.figure.Figure`, drawn in one fixed style, and `save` writes the same bytes for the same
table. The colours `INK` and `PAPER` stand for text and background only, so that a page can exchange them for its own.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure as Figure  # the report names the type, and imports it from here
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray
from scipy import stats

if TYPE_CHECKING:
    from layerprobe.analyses.selection import Selection
    from layerprobe.layersync import LayerPair

INK, PAPER = "#1b1f24", "#fffefd"
MISSING = "#c9ced6"
GREY = "#7a828c"
STUDENT, TEACHER = "#d55e00", "#cc79a7"  # neither is a colour of viridis
WIDTH_IN = 11.0
RASTER_DPI = 150

# Okabe and Ito 2008; the baseline takes the ink, so that it is black on white and white on black.
ARM_COLOURS = {
    "no alignment": INK,
    "pick": "#0072b2",
    "first-ranked pair": "#0072b2",
    "runner-up": "#009e73",
    "depth heuristic": "#e69f00",
    "learning rate": "#8c6d31",
    "bad control": "#d55e00",
}
SPARE_COLOURS = ("#cc79a7", "#56b4e9", "#009e73", "#f0e442")

STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.facecolor": PAPER,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": GREY,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "layerprobe",
    "text.color": INK,
    "text.parse_math": False,  # a layer may be called "$x$"
    "xtick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": INK,
    "ytick.labelsize": 8.5,
}

QUALITY_COLUMNS = ("source", "layer", "layer_index", "noise_level", "metric", "split", "value", "low", "high")
SIMILARITY_COLUMNS = ("layer_a", "noise_level_a", "layer_b", "noise_level_b", "cka")
CONFIRMATION_COLUMNS = ("arm", "seed", "step", "metric", "value")
SPLITS = ("report", "choose", "fit")
SHORT_WORDS = {
    "attentions": "attn",
    "blocks": "b",
    "down_blocks": "down",
    "mid_block": "mid",
    "resnets": "res",
    "single_transformer_blocks": "single",
    "transformer_blocks": "tb",
    "up_blocks": "up",
}

Array = NDArray[np.float64]
Runs = Mapping[str, pd.DataFrame]  # per arm, in the order of the table: one row per step, one column per seed


@contextmanager
def _styled() -> Iterator[None]:
    """Matplotlib's defaults and our style, whatever the caller has set; the caller's settings come back afterwards."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def _decimals(value: float, digits: int) -> int:
    """Decimals that show this many significant digits."""
    return int(np.clip(digits - 1 - np.floor(np.log10(abs(value))), 0, 9))


def capital(text: str) -> str:
    """Text as the beginning of a line; a kNN keeps its small k."""
    named = re.sub(r"^knn\b", "kNN", text)
    return named if named != text else text[:1].upper() + text[1:]


# -------------------------------------------------------------------------------------------------------- layer quality


@dataclass(frozen=True)
class _Curves:
    """One metric on one split; the last axis of the arrays is (value, low, high), nan where nothing was measured."""

    metric: str
    split: str
    layers: tuple[str, ...]
    levels: tuple[float, ...]
    model: Array  # (levels, layers, 3)
    random: Array  # (levels, layers, 3)
    raw: Array  # (levels, 1, 3)

    @property
    def is_fraction(self) -> bool:
        return "accuracy" in self.metric

    def text(self, value: float) -> str:
        if np.isnan(value):
            return "nan"
        return f"{value:.2f}" if self.is_fraction or value == 0 else f"{value:.{_decimals(value, 3)}f}"

    @property
    def unit(self) -> str:
        return f"fraction of the {self.split} split" if self.is_fraction else f"{self.split} split"


@_styled()
def layer_quality_curves(
    quality: pd.DataFrame,
    metric: str,
    *,
    split: str | None = None,
    selection: Selection | None = None,
) -> Figure:
    """What each layer knows at each noise level, beside the two controls.

    The upper panel compares noise levels. Below, one panel per noise level compares the trained model (with its 95 %
    interval) with the same network at random weights (dashed) and with the raw input (dotted).

    Args:
        quality: Quality table, one row per source, layer, noise level, metric and split.
        metric: One of the metrics in the table, for example "probe accuracy".
        split: Split to show; "report" where the metric has it, else "choose", else "fit".
        selection: Whose pick to mark, or None.

    Raises:
        ValueError: If a column, the metric, the split or a layer of the pick is not in the table.
    """
    curves = _curves(quality, metric, split)
    pair = _pick(selection, curves.layers)
    num_levels = len(curves.levels)
    rows = int(np.ceil(num_levels / 4))
    columns = int(np.ceil(num_levels / rows))
    overview = num_levels > 1
    heights = [3.0] * overview + [2.15 if overview else 4.0] * rows
    longest = max(map(len, _short_names(curves.layers)[0]))
    names_in = (1 + overview) * 0.08 * max(longest - 4, 0)  # they stand upright
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + 1.3 + names_in), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    colours = _level_colours(num_levels)
    if overview:
        _draw_overview(figure.add_subplot(grid[0, :]), curves, colours, pair)
    panels: list[Axes] = []
    for i in range(num_levels):
        row, column = divmod(i, columns)
        axes = figure.add_subplot(grid[row + overview, column])
        panels.append(axes)
        _draw_level(axes, curves, i, colours[i], pair)
        lowest = i + columns >= num_levels
        _label_layers(axes, curves.layers, WIDTH_IN / columns - 0.7)
        if lowest:
            axes.set_xlabel("layer" if overview else _short_names(curves.layers)[1])
        axes.tick_params(labelbottom=lowest, labelleft=column == 0)
        if column == 0:
            axes.set_ylabel(capital(metric) if overview else f"{capital(metric)}\n({curves.unit})")
    if not overview:
        _name_pair(panels[0], curves.layers, pair)
    figure.suptitle(_wrap(_curves_title(curves)), x=0.008, ha="left")
    figure.legend(handles=_level_legend(curves, colours, pair), loc="outside lower left", ncols=8, columnspacing=1.6)
    return figure


@_styled()
def metric_panels(quality: pd.DataFrame, metrics: Sequence[str], *, selection: Selection | None = None) -> Figure:
    """Several metrics side by side, each over layers with one line per noise level; random weights dashed.

    Args:
        quality: Quality table.
        metrics: Which, in this order; each on the split that `layer_quality_curves` would show.
        selection: Whose pick to mark, or None.

    Raises:
        ValueError: If there is no metric, or a column or metric is not in the table.
    """
    if not metrics:
        raise ValueError("there is no metric to draw; pass at least one of the table's")
    found = [_curves(quality, metric, None) for metric in metrics]
    columns = min(3, len(found))
    rows = int(np.ceil(len(found) / columns))
    figure = Figure(figsize=(WIDTH_IN, 2.3 * rows + 1.0), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axes, curves in zip(grid, found, strict=False):
        x = np.arange(len(curves.layers))
        for i, (level, colour) in enumerate(zip(curves.levels, _level_colours(len(curves.levels)), strict=True)):
            (handles[f"noise level {level:g}"],) = axes.plot(x, curves.model[i, :, 0], color=colour, linewidth=1.6)
            axes.plot(x, curves.random[i, :, 0], color=colour, linewidth=0.9, linestyle="--")
        axes.set_title(f"{capital(curves.metric)} ({curves.unit})", fontsize=8.5)
        _mark_pair(axes, curves.layers, _pick(selection, curves.layers))
        _label_layers(axes, curves.layers, WIDTH_IN / columns - 0.7)
        axes.set_xlabel(_short_names(curves.layers)[1])
    for axes in grid[len(found) :]:
        axes.set_axis_off()
    handles["random weights"] = Line2D([], [], color=INK, linewidth=0.9, linestyle="--")
    if _pick(selection, found[0].layers) is not None:
        handles["student"] = Line2D([], [], color=STUDENT, linestyle=(0, (5, 2)), linewidth=1.2)
        handles["teacher"] = Line2D([], [], color=TEACHER, linewidth=1.2)
    title = (
        f"{len(found)} more measures of {len(found[0].layers)} layers; no one of them alone says which layer is best"
    )
    figure.suptitle(_wrap(title), x=0.008, ha="left")
    figure.legend(handles=list(handles.values()), labels=list(handles), loc="outside lower left", ncols=7)
    return figure


@_styled()
def quality_heatmap(quality: pd.DataFrame, metric: str, *, split: str | None = None) -> Figure:
    """One metric over layers and noise levels; below it, what training added over random weights.

    Args:
        quality: Quality table.
        metric: One of the metrics in the table.
        split: Split to show; "report" where the metric has it, else "choose", else "fit".

    Raises:
        ValueError: If a column, the metric or the split is not in the table.
    """
    curves = _curves(quality, metric, split)
    model = curves.model[..., 0]
    gain = model - curves.random[..., 0]
    panels: list[tuple[str, str, Array, Colormap, Normalize]] = [
        (f"{capital(metric)} ({curves.unit}), trained model", metric, model, mpl.colormaps["viridis"], _span(model))
    ]
    if np.isfinite(gain).any():
        limit = max(float(np.nanmax(np.abs(gain))), 1e-12)
        title = "Trained model minus random weights"
        panels.append((title, "difference", gain, mpl.colormaps["PuOr_r"], Normalize(-limit, limit)))
    height = (
        1.1 + 0.08 * max(map(len, _short_names(curves.layers)[0])) + len(panels) * (0.85 + 0.32 * len(curves.levels))
    )
    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, label, values, colormap, norm) in zip(all_axes, panels, strict=True):
        image = _matrix(axes, values, colormap, norm)
        if len(curves.layers) <= 36 and values.size <= 600:
            _annotate(axes, values, image, curves.text, size=min(8.5, 215 / len(curves.layers)))
        axes.set_title(title)
        axes.set_ylabel("noise level")
        axes.set_yticks(range(len(curves.levels)), [f"{level:g}" for level in curves.levels])
        figure.colorbar(image, ax=axes, pad=0.01, aspect=6 + 2 * len(curves.levels), label=label)
        if np.isfinite(values).any():
            row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
            axes.add_patch(_box(int(column), int(row), "#000000"))
            axes.add_patch(_box(int(column), int(row), "#ffffff", width=0.8))
    _label_layers(all_axes[-1], curves.layers, WIDTH_IN - 1.8)
    all_axes[-1].set_xlabel(_short_names(curves.layers)[1])
    figure.suptitle(_wrap(_heatmap_title(curves, gain)), x=0.008, ha="left")
    return figure


def _curves(quality: pd.DataFrame, metric: str, split: str | None) -> _Curves:
    _require(quality, QUALITY_COLUMNS, "quality table")
    rows = quality[quality["metric"] == metric]
    if rows.empty:
        known = ", ".join(sorted(map(str, quality["metric"].unique()))) or "no rows at all"
        raise ValueError(f"metric {metric!r} is not in the quality table, which has {known}; pass one of those")
    present = [name for name in SPLITS if (rows["split"] == name).any()]
    if split is not None and split not in present:
        raise ValueError(
            f"{metric!r} has no values on split {split!r}, only on {', '.join(present)}; pass one of those"
        )
    split = split or present[0]
    rows = rows[rows["split"] == split]
    model = rows[rows["source"] == "model"]
    if model.empty:
        raise ValueError(f"the quality table has only controls for {metric!r}; analyse the model itself first")
    order = model.sort_values("layer_index", kind="stable")["layer"].astype(str)
    layers, levels = tuple(dict.fromkeys(order)), tuple(sorted(map(float, model["noise_level"].unique())))
    raw = rows[rows["source"] == "raw input"]
    return _Curves(
        metric=metric,
        split=split,
        layers=layers,
        levels=levels,
        model=_cube(model, layers, levels),
        random=_cube(rows[rows["source"] == "random weights"], layers, levels),
        raw=_cube(raw.assign(layer="input"), ("input",), levels),
    )


def _cube(rows: pd.DataFrame, layers: Sequence[str], levels: Sequence[float]) -> Array:
    """Shape (levels, layers, 3); several rows for one cell (say, several random networks) are averaged."""
    mean = rows.groupby(["noise_level", "layer"])[["value", "low", "high"]].mean()
    index = pd.MultiIndex.from_product([levels, layers], names=["noise_level", "layer"])
    return mean.reindex(index).to_numpy(dtype=np.float64).reshape(len(levels), len(layers), 3)


def _draw_overview(axes: Axes, curves: _Curves, colours: Sequence[Any], pair: LayerPair | None) -> None:
    x = np.arange(len(curves.layers))
    for level, values, colour in zip(curves.levels, curves.model[..., 0], colours, strict=True):
        axes.plot(x, values, color=colour, label=f"{level:g}", marker=_point_marker(values), markersize=3)
        if np.isfinite(values).any():
            best = int(np.nanargmax(values))
            axes.plot(x[best], values[best], "o", color=colour, markeredgecolor=PAPER, markersize=8)
    _widen(axes, curves.model[..., 0])
    axes.set_title("Trained model, one line per noise level; a large dot marks the highest layer of a level")
    axes.set_xlim(-0.6, len(x) - 0.4)
    _mark_pair(axes, curves.layers, pair)
    _name_pair(axes, curves.layers, pair)
    axes.set_ylabel(f"{capital(curves.metric)}\n({curves.unit})")
    axes.legend(title="noise level", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _label_layers(axes, curves.layers, WIDTH_IN - 1.9)
    axes.set_xlabel(_short_names(curves.layers)[1])


def _draw_level(axes: Axes, curves: _Curves, level: int, colour: Any, pair: LayerPair | None) -> None:
    x = np.arange(len(curves.layers))
    model, random, raw = curves.model[level], curves.random[level], curves.raw[level, 0]
    axes.fill_between(x, random[:, 1], random[:, 2], color=GREY, alpha=0.2, linewidth=0)
    axes.plot(x, random[:, 0], "--", color=GREY, linewidth=1.3, marker=_point_marker(random[:, 0]), markersize=3)
    if np.isfinite(raw[0]):
        axes.axhline(raw[0], color=INK, linestyle=":", linewidth=1.3)
    axes.fill_between(x, model[:, 1], model[:, 2], color=colour, alpha=0.25, linewidth=0)
    axes.plot(x, model[:, 0], color=colour, linewidth=1.8, marker=_point_marker(model[:, 0]), markersize=3)
    missing = x[np.isnan(model[:, 0])]
    axes.plot(missing, np.full(len(missing), 0.04), "x", color=GREY, markersize=5, transform=axes.get_xaxis_transform())
    title = f"Noise level {curves.levels[level]:g}\n"
    if np.isfinite(model[:, 0]).any():
        best = int(np.nanargmax(model[:, 0]))
        axes.plot(x[best], model[best, 0], "o", color=colour, markeredgecolor=PAPER, markersize=7)
        title += f"highest: {_short_names(curves.layers)[0][best]} ({curves.text(model[best, 0])})"
    else:
        title += "nothing measured"
    axes.set_title(title)
    _widen(axes, np.stack([curves.model.ravel(), curves.random.ravel(), np.resize(curves.raw, curves.model.size)]))
    axes.set_xlim(-0.6, len(x) - 0.4)
    _mark_pair(axes, curves.layers, pair)


def _mark_pair(axes: Axes, layers: Sequence[str], pair: LayerPair | None) -> None:
    if pair is not None:
        axes.axvline(layers.index(pair.student), color=STUDENT, linewidth=1.2, linestyle=(0, (5, 2)), zorder=1)
        axes.axvline(layers.index(pair.teacher), color=TEACHER, linewidth=1.2, zorder=1)


def _name_pair(axes: Axes, layers: Sequence[str], pair: LayerPair | None) -> None:
    """Write the roles above the frame, pointing away from each other so that neighbours do not collide."""
    if pair is None:
        return
    short = _short_names(layers)[0]
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


def _level_legend(curves: _Curves, colours: Sequence[Any], pair: LayerPair | None) -> list[Any]:
    colour = colours[0]
    handles: list[Any] = [Line2D([], [], color=colour, linewidth=1.8, label="trained model")]
    if np.isfinite(curves.model[..., 1:]).any():
        handles.append(Patch(facecolor=colour, alpha=0.25, label="95 % bootstrap interval"))
    if np.isfinite(curves.random[..., 0]).any():
        handles.append(Line2D([], [], color=GREY, linestyle="--", label="random weights"))
    if np.isfinite(curves.raw[..., 0]).any():
        handles.append(Line2D([], [], color=INK, linestyle=":", label="raw input"))
    if np.isnan(curves.model[..., 0]).any():
        handles.append(Line2D([], [], color=GREY, linestyle="", marker="x", label="not measured"))
    if pair is not None:
        handles.append(Line2D([], [], color=STUDENT, linestyle=(0, (5, 2)), linewidth=1.2, label="student"))
        handles.append(Line2D([], [], color=TEACHER, linewidth=1.2, label="teacher"))
    return handles


def _curves_title(curves: _Curves) -> str:
    metric, values = capital(curves.metric), curves.model[..., 0]
    if not np.isfinite(values).any():
        return f"{metric} could not be measured in any layer"
    level, layer = np.unravel_index(int(np.nanargmax(values)), values.shape)
    peak = float(values[level, layer])
    title = f"{metric} peaks at {curves.layers[layer]} ({curves.text(peak)}) at noise level {curves.levels[level]:g}"
    controls = {
        name: float(np.nanmax(block))
        for name, block in (("random weights", curves.random[level, :, 0]), ("raw input", curves.raw[level, :, 0]))
        if np.isfinite(block).any()
    }
    if not controls:
        return title
    name = max(controls, key=lambda key: controls[key])
    if controls[name] >= peak:
        return f"{title}; a control is as high there: {name} ({curves.text(controls[name])})"
    return f"{title}; the highest control there is {name} ({curves.text(controls[name])})"


def _heatmap_title(curves: _Curves, gain: Array) -> str:
    values = curves.model[..., 0]
    if not np.isfinite(values).any():
        return f"{capital(curves.metric)} could not be measured in any layer"
    best = np.unravel_index(int(np.nanargmax(values)), values.shape)
    title = f"Highest {curves.metric}: {curves.layers[best[1]]} at noise level {curves.levels[best[0]]:g}"
    if not np.isfinite(gain).any():
        return title
    most = np.unravel_index(int(np.nanargmax(gain)), gain.shape)
    if gain[most] <= 0:
        return f"{title}; training adds nothing over random weights"
    where = f"{curves.layers[most[1]]} at noise level {curves.levels[most[0]]:g} (+{curves.text(float(gain[most]))})"
    return f"{title}; training adds most at {where}"


# ----------------------------------------------------------------------------------------------------------- similarity


@_styled()
def cka_heatmap(
    similarity: pd.DataFrame,
    *,
    selection: Selection | None = None,
    layers: Sequence[str] | None = None,
) -> Figure:
    """How alike the representations are: every layer at every noise level, and layer by layer at equal noise levels.

    Args:
        similarity: Similarity table, one row per pair of representations, in one or both orders.
        selection: Whose pick to mark, or None.
        layers: Layer names in execution order; the order of the table where not given.

    Raises:
        ValueError: If a column or a layer of the pick is missing, the table is empty, or `layers` leaves a layer out.
    """
    names, levels, matrix = _cka_matrix(similarity, layers)
    pair = _pick(selection, names)
    blocks = matrix.reshape(len(levels), len(names), len(levels), len(names))
    mean = _nanmean(np.stack([blocks[i, :, i, :] for i in range(len(levels))]))
    norm = _span(matrix)
    figure = Figure(figsize=(WIDTH_IN, 6.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
    image = _matrix(left, matrix, mpl.colormaps["viridis"], norm, square=True)
    _label_blocks(left, names, levels, 5.2)
    left.set_title(f"All {len(matrix)} representations", pad=34 if len(levels) > 1 else 6)
    _matrix(right, mean, mpl.colormaps["viridis"], norm, square=True)
    right.set_title("Mean over equal noise levels" if len(levels) > 1 else f"Noise level {levels[0]:g}")
    _label_layers(right, names, 3.4)
    _label_layers(right, names, 3.4, vertical=True)
    right.set(xlabel=_short_names(names)[1], ylabel=_short_names(names)[1])
    if len(names) <= 16:
        _annotate(right, mean, image, "{:.2f}".format, size=min(8.5, 80 / len(names)))
    if pair is not None:
        _mark_cell(right, names.index(pair.student), names.index(pair.teacher))
    label = "debiased linear CKA (1: equal)"
    figure.colorbar(image, ax=[left, right], location="bottom", shrink=0.4, aspect=30, label=label)
    figure.suptitle(_wrap(_cka_title(names, levels, mean, pair)), x=0.008, ha="left")
    return figure


def _cka_matrix(similarity: pd.DataFrame, layers: Sequence[str] | None) -> tuple[list[str], list[float], Array]:
    """Level-major matrix, shape (levels * layers, levels * layers), symmetric."""
    _require(similarity, SIMILARITY_COLUMNS, "similarity table")
    if similarity.empty:
        raise ValueError("the similarity table has no rows; run the similarity analysis first")
    seen = list(dict.fromkeys([*similarity["layer_a"].astype(str), *similarity["layer_b"].astype(str)]))
    names = seen if layers is None else [name for name in layers if name in set(seen)]
    if left_out := set(seen) - set(names):
        raise ValueError(f"the similarity table has layer {min(left_out)!r}, which `layers` has not; pass all layers")
    levels = sorted({*similarity["noise_level_a"].astype(float), *similarity["noise_level_b"].astype(float)})
    position = {key: i for i, key in enumerate((level, name) for level in levels for name in names)}
    a = [position[key] for key in zip(similarity["noise_level_a"], similarity["layer_a"].astype(str), strict=True)]
    b = [position[key] for key in zip(similarity["noise_level_b"], similarity["layer_b"].astype(str), strict=True)]
    matrix = np.full((len(position), len(position)), np.nan)
    matrix[a, b] = matrix[b, a] = similarity["cka"].to_numpy(dtype=np.float64)
    # A table of distinct pairs leaves the diagonal out; a degenerate representation stays nan there too.
    alive = np.isfinite(matrix).any(axis=1) & np.isnan(matrix.diagonal())
    matrix[alive, alive] = 1.0
    return names, levels, matrix


def _label_blocks(axes: Axes, names: Sequence[str], levels: Sequence[float], side_in: float) -> None:
    """Layers on the left and below, noise levels above and on the right, white lines between the levels."""
    short, pattern = _short_names(names)
    step = max(1, int(np.ceil(len(names) * len(levels) * 0.125 / side_in)))
    ticks = [i * len(names) + j for i in range(len(levels)) for j in range(0, max(len(names) - step + 1, 1), step)]
    labels = [short[tick % len(names)] for tick in ticks]
    axes.set_xticks(ticks, labels, rotation=90, fontsize=7)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_xlabel(pattern)
    axes.set_ylabel(pattern)
    if len(levels) == 1:
        return
    for i in range(1, len(levels)):
        axes.axhline(i * len(names) - 0.5, color="#ffffff", linewidth=1.2)
        axes.axvline(i * len(names) - 0.5, color="#ffffff", linewidth=1.2)
    centres = [(i + 0.5) * len(names) - 0.5 for i in range(len(levels))]
    for side in (axes.secondary_xaxis("top"), axes.secondary_yaxis("right")):
        side.tick_params(length=0)
        side.spines[:].set_visible(False)
    side_x, side_y = axes.child_axes
    side_x.set_xticks(centres, [f"{level:g}" for level in levels])
    side_x.set_xlabel("noise level")
    side_y.set_yticks(centres, [f"{level:g}" for level in levels])
    side_y.set_ylabel("noise level")


def _mark_cell(axes: Axes, student: int, teacher: int) -> None:
    for x, y in ((teacher, student), (student, teacher)):
        axes.add_patch(_box(x, y, "#000000", width=3.0))
        axes.add_patch(_box(x, y, "#ffffff", width=1.2))


def _cka_title(names: Sequence[str], levels: Sequence[float], mean: Array, pair: LayerPair | None) -> str:
    kind, where = ("mean CKA", "") if len(levels) > 1 else ("CKA", f" at noise level {levels[0]:g}")
    if pair is not None:
        value = mean[names.index(pair.student), names.index(pair.teacher)]
        return f"Student {pair.student} and teacher {pair.teacher}: {kind} {value:.2f}{where}"
    steps = np.diagonal(mean, offset=1)
    if not np.isfinite(steps).any():
        return "Similarity of the layers"
    sharpest = int(np.nanargmin(steps))
    return f"Sharpest change: {names[sharpest]} to {names[sharpest + 1]}, {kind} {steps[sharpest]:.2f}{where}"


# --------------------------------------------------------------------------------------------------------- confirmation


@dataclass(frozen=True)
class _Final:
    """Paired difference of one arm to no alignment at the last common step: mean, 95 % interval, and every seed."""

    middle: float
    low: float
    high: float
    seeds: Array

    @property
    def text(self) -> str:
        """−0.17 [−0.25, −0.11], with two significant digits of the interval."""
        known = np.isfinite([self.low, self.high]).all()
        size = (self.high - self.low) / 2 if known and self.high > self.low else abs(self.middle) / 10
        decimals = _decimals(size, 2) if size > 0 else 2
        middle, low, high = (f"{value:+.{decimals}f}".replace("-", "−") for value in (self.middle, self.low, self.high))
        return f"{middle} [{low}, {high}]" if known else middle


@_styled()
def confirmation_curves(
    confirmation: pd.DataFrame,
    verdict: Mapping[str, Any] | None = None,
    *,
    metric: str | None = None,
) -> Figure:
    """What aligning the layers did to training: the metric, and the paired difference to training without alignment.

    Args:
        confirmation: Columns arm, seed, step, metric, value. Arms with equal seeds are paired.
        verdict: The verdict; its numbers take precedence for the final difference. None while the runs are under way.
        metric: Metric to show; the verdict's, or the first of the table.

    Raises:
        ValueError: If a column, the metric or the arm "no alignment" is missing.
    """
    _require(confirmation, CONFIRMATION_COLUMNS, "confirmation table")
    verdict = verdict or {}
    known = list(dict.fromkeys(map(str, confirmation["metric"])))
    metric = metric or str(verdict.get("metric") or (known or ["none"])[0])
    if metric not in known:
        has = ", ".join(known) or "no rows"
        raise ValueError(f"metric {metric!r} is not in the confirmation table, which has {has}; pass one of those")
    rows = confirmation[confirmation["metric"] == metric]
    runs = {
        str(arm): part.pivot_table(index="step", columns="seed", values="value")
        for arm, part in rows.dropna(subset="value").groupby("arm", sort=False)
    }
    if "no alignment" not in runs:
        raise ValueError(
            f"the confirmation table has no values of 'no alignment', only {', '.join(runs)}; run that arm"
        )
    figure = Figure(figsize=(WIDTH_IN, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1], width_ratios=[1.35, 1])
    colours = _arm_colours(runs)
    _draw_runs(figure.add_subplot(grid[0, :]), runs, metric, colours, _better(metric, verdict))
    _draw_difference_over_steps(figure.add_subplot(grid[1, 0]), runs, colours)
    told = verdict if metric == verdict.get("metric") else {}
    finals, hidden = _final_differences(runs, told), _too_small_to_find(runs, told)
    _draw_final_differences(figure.add_subplot(grid[1, 1]), runs, finals, metric, colours, hidden)
    figure.suptitle(_wrap(_confirmation_title(runs, finals, metric, verdict)), x=0.008, ha="left")
    return figure


def _arm_colours(arms: Mapping[str, Any]) -> dict[str, str]:
    taken = {ARM_COLOURS[arm] for arm in arms if arm in ARM_COLOURS}
    spare = iter([colour for colour in SPARE_COLOURS if colour not in taken] * (1 + len(arms)))
    return {arm: ARM_COLOURS.get(arm) or next(spare) for arm in arms}


def _draw_runs(axes: Axes, runs: Runs, metric: str, colours: Mapping[str, str], better: str) -> None:
    values = np.concatenate([run.to_numpy(dtype=np.float64).ravel() for run in runs.values()])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 8 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    ends = {}
    for arm, run in runs.items():
        mean = run.mean(axis=1)
        axes.plot(run.index, run.to_numpy(), color=colours[arm], linewidth=0.7, alpha=0.55)
        axes.plot(mean.index, mean.to_numpy(), color=colours[arm], linewidth=2.4)
        ends[arm] = (float(mean.index[-1]), float(mean.iloc[-1]))
    final = runs["no alignment"].mean(axis=1).iloc[-1]
    axes.axhline(final, color=GREY, linestyle=":", linewidth=1.2)
    axes.set_title("Thin lines are seeds, thick lines their mean; dotted: where training without alignment ends")
    axes.set_xlabel("training step")
    axes.set_ylabel(capital(metric) + better)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.01)
    _label_ends(axes, ends, colours)


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Names beside the line ends, moved apart where they would overlap, with a leader to the line."""
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"
    scale = np.log if log else np.asarray
    order = sorted((arm for arm in ends if np.isfinite(ends[arm][1])), key=lambda arm: ends[arm][1])
    at = np.array([float((scale(ends[arm][1]) - scale(low)) / (scale(high) - scale(low))) for arm in order])
    for arm, label_y in zip(order, _spread(at, gap=0.075), strict=True):
        axes.annotate(
            arm,
            ends[arm],
            xytext=(1.03, label_y),
            textcoords="axes fraction",
            va="center",
            color=INK,
            # To the text's left edge, so that no leader runs through a neighbour's name.
            arrowprops={
                "arrowstyle": "-",
                "color": colours[arm],
                "linewidth": 1.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def _draw_difference_over_steps(axes: Axes, runs: Runs, colours: Mapping[str, str]) -> None:
    baseline = runs["no alignment"]
    axes.axhline(0, color=INK, linewidth=1.2)
    seeds = 0
    for arm, run in runs.items():
        if arm == "no alignment":
            continue
        percent = 100 * ((run - baseline) / baseline.abs()).dropna(how="all").dropna(how="all", axis=1)
        if percent.empty:
            continue
        middle, low, high = _t_interval(percent.to_numpy(dtype=np.float64))
        seeds = max(seeds, percent.shape[1])
        axes.fill_between(percent.index, low, high, color=colours[arm], alpha=0.18, linewidth=0)
        axes.plot(percent.index, middle, color=colours[arm], linewidth=2.0)
    band = "band: 95 % t interval" if seeds > 1 else "one seed: no interval"
    axes.set_title(f"Paired difference to no alignment ({band})")
    axes.set_xlabel("training step")
    axes.set_ylabel("difference (% of no alignment)")
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _final_differences(runs: Runs, verdict: Mapping[str, Any]) -> dict[str, _Final]:
    told = {arm.get("name"): arm for arm in verdict.get("arms", ())}
    finals = {}
    for arm, run in runs.items():
        paired = (run - runs["no alignment"]).dropna(how="all").dropna(how="all", axis=1)
        if arm == "no alignment" or paired.empty:
            continue
        last = paired.iloc[-1].to_numpy(dtype=np.float64)
        numbers = [float(value[0]) for value in _t_interval(last[None])]
        for i, key in enumerate(("difference", "low", "high")):
            if told.get(arm, {}).get(key) is not None:
                numbers[i] = float(told[arm][key])
        finals[arm] = _Final(numbers[0], numbers[1], numbers[2], last)
    return finals


def _too_small_to_find(runs: Runs, verdict: Mapping[str, Any]) -> float | None:
    """The size of difference that the verdict's seeds find in four of five cases; None where it does not say."""
    share = (verdict.get("resolution") or {}).get("difference")
    return None if share is None else float(share * runs["no alignment"].mean(axis=1).iloc[-1])


def _draw_final_differences(
    axes: Axes,
    runs: Runs,
    finals: Mapping[str, _Final],
    metric: str,
    colours: Mapping[str, str],
    hidden: float | None,
) -> None:
    axes.axvline(0, color=INK, linewidth=1.2)
    names = []
    for y, (arm, final) in enumerate(finals.items()):
        seeds_y = np.full(len(final.seeds), y - 0.2)
        axes.plot(final.seeds, seeds_y, "o", color=colours[arm], alpha=0.55, markersize=4, markeredgewidth=0)
        axes.plot([final.low, final.high], [y, y], color=colours[arm], linewidth=2.4)
        axes.plot(final.middle, y, "o", color=colours[arm], markersize=8)
        names.append(f"{arm}\n{final.text}")
    axes.set_yticks(range(len(finals)), names)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_ylim(len(finals) - 0.35, -0.6)
    axes.margins(x=0.1)
    axes.grid(False, axis="y")
    last = int(max(run.index.max() for run in runs.values()))
    axes.set_title(f"Final difference after {last:,} steps; small dots: seeds")
    axes.set_xlabel(f"{capital(metric)} minus that of no alignment")
    if hidden is not None:
        shown = axes.get_xlim()  # a band wider than the panel must not shrink what is in it
        axes.axvspan(-hidden, hidden, color=GREY, alpha=0.15, linewidth=0, zorder=0)
        axes.set_xlim(shown)
        axes.set_xlabel(f"{axes.get_xlabel()}\n(grey: smaller than these seeds find in four of five cases)")


def _confirmation_title(
    runs: Runs,
    finals: Mapping[str, _Final],
    metric: str,
    verdict: Mapping[str, Any],
) -> str:
    base = float(runs["no alignment"].mean(axis=1).iloc[-1])
    arm = "pick" if "pick" in finals else next(iter(finals), None)
    if arm is None:
        return f"{capital(metric)} without alignment ends at {base:.3g}"
    end, final = float(runs[arm].mean(axis=1).iloc[-1]), finals[arm]
    count = f"{len(final.seeds)} seed{'s' * (len(final.seeds) > 1)}"
    facts = f"{metric} {end:.3g} against {base:.3g} without alignment; difference {final.text}, {count}"
    answer = verdict.get("answer") if metric == verdict.get("metric") else None
    heads = {"helps": f"{capital(arm)} helps", "hurts": f"{capital(arm)} hurts", None: capital(arm)}
    head = heads.get(answer, capital(str(answer))) + ": "
    return head + facts


def _better(metric: str, verdict: Mapping[str, Any]) -> str:
    if metric != verdict.get("metric") or "lower_is_better" not in verdict:
        return ""
    return "\n(lower is better)" if verdict["lower_is_better"] else "\n(higher is better)"


def _t_interval(values: Array) -> tuple[Array, Array, Array]:
    """Mean over the last axis and its 95 % t interval, nan where fewer than two values are finite."""
    count = np.isfinite(values).sum(axis=-1)
    mean = _nanmean(values, axis=-1)
    squares = np.nansum((values - mean[..., None]) ** 2, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        half = stats.t.ppf(0.975, np.maximum(count - 1, 1)) * np.sqrt(squares / (count - 1) / count)
    half = np.where(count > 1, half, np.nan)
    return mean, mean - half, mean + half


# -------------------------------------------------------------------------------------------------------------- samples


@_styled()
def sample_grid(x: ArrayLike, labels: Sequence[object] | None = None, *, columns: int = 8) -> Figure:
    """Images side by side, enlarged without smoothing.

    Args:
        x: Shape (n, C, H, W) with C 1 (grey) or 3 (RGB), values in [-1, 1]; values outside are clipped.
        labels: One text per image, written above it, or None.
        columns: Images in a row, at least 1.

    Raises:
        ValueError: If x has another shape or nan values, or labels another length, or columns < 1.
    """
    images = np.asarray(x, dtype=np.float32)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.size == 0:
        raise ValueError(f"samples have shape {images.shape}; pass images (n, 1 or 3, height, width), latents decoded")
    if np.isnan(images).any():
        bad = int(np.isnan(images).any(axis=(1, 2, 3)).sum())
        raise ValueError(f"{bad} of {len(images)} samples contain nan; leave them out")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} samples but {len(labels)} labels; pass one label per sample")
    if columns < 1:
        raise ValueError(f"columns is {columns}; pass at least 1")
    columns = min(columns, len(images))
    rows = int(np.ceil(len(images) / columns))
    height, width = images.shape[2:]
    side_in = min(1.25, WIDTH_IN / columns)
    strip_in = 0.17 if labels is not None else 0.04
    size = (max(columns * side_in, 3.2), rows * (side_in * height / width + strip_in) + 0.28)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0))
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in all_axes:
        axes.set_axis_off()
    pixels = (np.clip(images, -1, 1).transpose(0, 2, 3, 1) + 1) / 2
    for i, image in enumerate(np.broadcast_to(pixels, (*pixels.shape[:3], 3))):
        all_axes[i].imshow(image, interpolation="none")
        if labels is not None:
            all_axes[i].set_title(str(labels[i]), loc="center", fontsize=8.5, pad=2)
    noun = "sample" if len(images) == 1 else "samples"
    figure.suptitle(f"{len(images)} {noun}, {width} x {height} pixels", x=0.01, ha="left", fontsize=10)
    return figure


# --------------------------------------------------------------------------------------------------------------- saving


def save(figure: Figure, folder: Path | str, name: str) -> tuple[Path, Path]:
    """Write `name.png` (150 dpi) and `name.svg` (text as text, heatmaps as pixels), the same bytes every time.

    Args:
        figure: Figure of this module or any other; its layout is fixed by the first call.
        folder: Created where it does not exist.
        name: File name without a suffix.

    Raises:
        ValueError: If name is not a plain file name.
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{name!r} is not a plain file name; pass the folder and the name apart")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    png.write_bytes(_render(figure, "png"))
    svg.write_bytes(_render(figure, "svg"))
    return png, svg


def to_svg(figure: Figure) -> str:
    """The bytes that `save` writes as SVG, as text."""
    return _render(figure, "svg").decode()


def _render(figure: Figure, file_format: str) -> bytes:
    buffer = io.BytesIO()
    with _styled():
        if figure.get_layout_engine() is not None:
            # The constrained layout starts from where it last stood and text sizes differ by format: settle it once.
            FigureCanvasAgg(figure)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(buffer, format=file_format, dpi=RASTER_DPI, metadata=metadata)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------------- helpers


def _require(table: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        has = ", ".join(map(str, table.columns)) or "none"
        raise ValueError(f"the {what} has no column {missing[0]!r}, only {has}; pass the whole table")


def _pick(selection: Selection | None, layers: Sequence[str]) -> LayerPair | None:
    pair = selection.pick if selection else None
    for layer in (pair.student, pair.teacher) if pair else ():
        if layer not in layers:
            raise ValueError(f"the pick has layer {layer}, the table only {', '.join(layers)}; pass those of one run")
    return pair


def _short_names(layers: Sequence[str]) -> tuple[list[str], str]:
    """Names for ticks and for the axis: (["0", "1"], "layer (blocks.*)") for blocks.0 and blocks.1."""
    parts = [name.split(".") for name in layers]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    rest = [part[shared:] for part in parts]
    pattern = f"layer ({'.'.join([*parts[0][:shared], '*'])})" if shared else "layer"
    for names in (["".join(_shorten(part)) for part in rest], [".".join(part) for part in rest]):
        clipped = [name if len(name) <= 16 else f"{name[:7]}…{name[-8:]}" for name in names]
        for candidate in (clipped, names):
            if len(set(candidate)) == len(layers):
                return candidate, pattern
    return list(layers), "layer"


def _shorten(parts: Sequence[str]) -> Iterator[str]:
    """down_blocks, 0, attentions, 1 -> down, 0, ., attn, 1."""
    for i, part in enumerate(parts):
        if i and not (part.isdigit() and not parts[i - 1].isdigit()):
            yield "."
        yield SHORT_WORDS.get(part, part)


def _label_layers(axes: Axes, layers: Sequence[str], width_in: float, *, vertical: bool = False) -> None:
    """Layer names as ticks: turned where they do not fit upright, only every second or fifth where there are many."""
    names, _ = _short_names(layers)
    longest = max(map(len, names))
    turned = not vertical and longest > 3 and len(names) * (0.075 * longest + 0.1) > width_in
    need_in = 0.15 if turned or vertical else 0.075 * longest + 0.1
    step = next(s for s in (1, 2, 4, 5, 7, 10, 14, 20, 50, len(names)) if len(names) * need_in <= width_in * s)
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_ticks(range(0, len(names), step), names[::step], rotation=90 if turned else 0)
    axis.set_ticks(range(len(names)), minor=True)
    axis.set_tick_params(which="minor", length=1.5)


def _matrix(axes: Axes, values: Array, colormap: Colormap, norm: Normalize, *, square: bool = False) -> ScalarMappable:
    axes.set_facecolor(MISSING)
    edges_x, edges_y = (np.arange(size + 1) - 0.5 for size in values.shape[::-1])
    masked = np.ma.masked_invalid(values)
    image = axes.pcolormesh(edges_x, edges_y, masked, cmap=colormap, norm=norm, rasterized=True)
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if square:
        axes.set_aspect("equal")
    return image


def _annotate(axes: Axes, values: Array, image: ScalarMappable, text: Callable[[float], str], *, size: float) -> None:
    """Write every value into its cell, black or white as the cell's colour asks."""
    colours = image.to_rgba(values)
    dark = colours[..., :3] @ (0.299, 0.587, 0.114) < 0.5
    for (row, column), value in np.ndenumerate(values):
        known = bool(np.isfinite(value))
        colour = "#ffffff" if known and dark[row, column] else "#000000"
        cell = axes.text(column, row, text(float(value)) if known else "–", fontsize=size, color=colour)
        cell.set(ha="center", va="center", in_layout=False)  # hundreds of them would slow the layout down


def _box(x: int, y: int, colour: str, width: float = 2.4) -> Rectangle:
    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=width, zorder=3, clip_on=False)


def _span(values: Array) -> Normalize:
    if not np.isfinite(values).any():
        return Normalize(0, 1)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return Normalize(low, high if high > low else low + 1)


def _level_colours(count: int) -> list[Any]:
    # The ends of viridis vanish on a black or a white page.
    return [mpl.colormaps["viridis"](x) for x in np.linspace(0.28, 0.86, count)]


def _point_marker(values: Array) -> str:
    """Show points where there are few, or where a gap leaves one without a neighbour to draw a line to."""
    finite = np.isfinite(values)
    alone = finite & ~np.roll(finite, 1) & ~np.roll(finite, -1)
    return "." if len(values) <= 12 or alone.any() else ""


def _widen(axes: Axes, values: Array, headroom: float = 0.06) -> None:
    if np.isfinite(values).any():
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        span = (high - low) or max(abs(high), 1.0) * 0.1
        axes.set_ylim(low - 0.08 * span, high + headroom * span)


def _spread(targets: Array, *, gap: float) -> Array:
    """Ascending positions at least `gap` apart, as near to ascending targets as moving neighbours together allows."""
    placed = targets.copy()
    for _ in range(100):
        for i in range(1, len(placed)):
            overlap = gap - (placed[i] - placed[i - 1])
            if overlap > 1e-9:
                placed[i - 1] -= overlap / 2
                placed[i] += overlap / 2
    return placed


def _nanmean(values: Array, axis: int = 0) -> Array:
    """Mean of the finite values; nan, without a warning, where there are none."""
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    total = np.where(finite, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _wrap(title: str) -> str:
    """Break a long title, where it can at its semicolon, and never between a noise level and its number."""
    title = re.sub(r"noise level (?=\d)", "noise level\N{NO-BREAK SPACE}", title)
    parts = title.replace("; ", ";\n").split("\n") if len(title) > 104 else [title]
    return "\n".join(textwrap.fill(part, 104) for part in parts)
