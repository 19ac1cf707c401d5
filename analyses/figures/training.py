"""Figure of one training: its loss, its held-out loss, and the cosine of the aligned layers."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from layerprobe.analyses.figures.labels import label_ends, wrap_title
from layerprobe.analyses.figures.style import GRAY, INK, LINE_COLORS, WIDTH_IN, level_colors, require_columns, styled

COSINE = "cosine "


@styled()
def training_curves(log: pd.DataFrame, held_out: pd.DataFrame) -> Figure:
    """Draws loss, held-out loss by noise level and, for aligned layers, their cosine over the training steps.

    Args:
        log: Table in the `log.csv` of a training: columns step and loss, and "cosine STUDENT <- TEACHER" for each pair.
        held_out: Table in its `held_out.csv`: column step, and one column per noise level.

    Raises:
        ValueError: If a table has no rows or lacks one of these columns.
    """
    require_columns(log, ("step", "loss"), "log of the training")
    require_columns(held_out, ("step",), "table of held-out losses")
    if log.empty or held_out.empty:
        raise ValueError("the training has not logged anything yet; train for more steps")
    held_out = held_out.sort_values("step").set_index("step")
    cosines = log.set_index("step").filter(regex=f"^{COSINE}")
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _draw_loss(axes, log),
        lambda axes: _draw_levels(axes, held_out),
    ]
    if not cosines.empty:
        panels.append(lambda axes: _draw_cosines(axes, cosines))
    figure = Figure(figsize=(WIDTH_IN, 3.1 * len(panels)), layout="constrained")
    for axes, draw in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False).flat, panels, strict=True):
        draw(axes)
        axes.margins(x=0.01)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.suptitle(wrap_title(_title(held_out, cosines)), x=0.008, ha="left")
    return figure


def _draw_loss(axes: Axes, log: pd.DataFrame) -> None:
    window = max(1, len(log) // 30)
    if window > 1:
        axes.plot(log["step"], log["loss"], color=GRAY, linewidth=0.7, alpha=0.7)
    axes.plot(log["step"], log["loss"].rolling(window, min_periods=1).mean(), color=INK, linewidth=2.2)
    # A log scale, because the first values are far above the rest.
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel("loss (squared error)")
    smoothed = f"; thick: mean of the last {window} rows of the log" if window > 1 else ""
    axes.set_title(f"Training batches, current weights{smoothed}")


def _draw_levels(axes: Axes, held_out: pd.DataFrame) -> None:
    colors = dict(zip(map(str, held_out.columns), level_colors(held_out.shape[1]), strict=True))
    ends = {}
    for level, losses in held_out.items():
        axes.plot(losses.index, losses, color=colors[str(level)], linewidth=1.8, marker=".")
        ends[str(level)] = (float(losses.index[-1]), float(losses.iloc[-1]))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel("loss (squared error)")
    axes.set_title("Held-out samples with the null label, averaged weights, by noise level")
    label_ends(axes, ends, colors)


def _draw_cosines(axes: Axes, cosines: pd.DataFrame) -> None:
    colors = {str(name).removeprefix(COSINE): LINE_COLORS[i % len(LINE_COLORS)] for i, name in enumerate(cosines)}
    ends = {}
    for pair, color in colors.items():
        values = cosines[COSINE + pair].dropna()
        axes.plot(values.index, values, color=color, linewidth=1.8)
        ends[pair] = (float(values.index[-1]), float(values.iloc[-1]))
    axes.set_ylabel("cosine (1: same direction)")
    axes.set_title("Tokens of each student and of its teacher, in the training batches")
    label_ends(axes, ends, colors)


def _title(held_out: pd.DataFrame, cosines: pd.DataFrame) -> str:
    mean = {int(step): float(loss) for step, loss in zip(held_out.index, held_out.mean(axis=1), strict=True)}
    first, last, lowest = min(mean), max(mean), min(mean, key=lambda step: mean[step])
    change = "fell" if mean[last] < mean[first] else "rose"
    text = f"The held-out loss {change} from {mean[first]:.3g} to {mean[last]:.3g} between steps {first:,} and {last:,}"
    text += "" if lowest == last else f", with its lowest value, {mean[lowest]:.3g}, at step {lowest:,}"
    ends = {str(name).removeprefix(COSINE): float(column.dropna().iloc[-1]) for name, column in cosines.items()}
    if len(ends) > 2:
        return f"{text}; {len(ends)} pairs ended at cosines from {min(ends.values()):.2f} to {max(ends.values()):.2f}"
    return "; ".join([text, *(f"{pair} ended at a cosine of {cosine:.2f}" for pair, cosine in ends.items())])
