"""Heatmap of a pair sweep: students as rows, teachers as columns, and the benefit of each pair as color."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerprobe.analyses.experiments import FRECHET, HELD_OUT, benefits
from layerprobe.analyses.figures.heatmap import draw_heatmap, mark_cell, symmetric_range
from layerprobe.analyses.figures.labels import capital, label_layers, num_decimals, short_names, wrap_title
from layerprobe.analyses.figures.style import BACKGROUND, WIDTH_IN, styled
from layerprobe.layersync import LayerPair


@styled()
def pair_sweep_heatmap(
    sweep: pd.DataFrame,
    layers: Sequence[str],
    *,
    metrics: Sequence[str] = (FRECHET, HELD_OUT),
    pick: LayerPair | None = None,
) -> Figure:
    """Draws how much better than the baseline every pair was at the end of its training, in percent, for each metric.

    Purple is worse than the baseline, which is training without alignment, and orange is better. A thick frame marks
    the best pair and a thin one the pick. Teachers are deeper than their students, so the lower left stays empty.

    Args:
        sweep: Table of a pair sweep; benefits are averaged over its seeds.
        layers: Layer names in execution order.
        metrics: Metrics to show, one panel each; lower is better in all of them.
        pick: Layer pair to mark, or None.

    Raises:
        ValueError: If a metric has no benefit, or a pair is not of these layers.
    """
    panels = {metric: 100 * benefits(sweep, metric=metric) for metric in metrics}
    names = [name for series in panels.values() for pair in series.index.tolist() for name in pair]
    names += [pick.student, pick.teacher] if pick else []
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise ValueError(
            f"{unknown[0]} is not among the layers {', '.join(layers)}; pass the layers of the model of the pair sweep"
        )
    width = WIDTH_IN * max(1.0, len(panels) / 2)
    figure = Figure(figsize=(width, 2.2 + 0.45 * (len(layers) - 1)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (metric, series) in zip(all_axes, panels.items(), strict=True):
        _draw_benefits(axes, metric, series, layers, pick, width / len(panels) - 1.4)
    figure.suptitle(wrap_title(_title(panels[metrics[0]], metrics[0], sweep)), x=0.008, ha="left")
    return figure


def _draw_benefits(
    axes: Axes, metric: str, series: pd.Series, layers: Sequence[str], pick: LayerPair | None, width_in: float
) -> None:
    students, teachers = list(layers)[:-1], list(layers)[1:]
    values = np.full((len(students), len(teachers)), np.nan)
    for (student, teacher), benefit in zip(series.index.tolist(), series.tolist(), strict=True):
        values[students.index(student), teachers.index(teacher)] = benefit
    limits = symmetric_range(values)
    draw_heatmap(
        axes,
        values,
        limits=limits,
        colormap="PuOr_r",
        width_in=width_in,
        text=f"{{:+.{num_decimals(limits[1], 2)}f}}".format,
        colorbar={"pad": 0.01, "label": "better than the baseline by (%)"},
    )
    # The page shows through where no teacher is deeper than its student.
    size = len(students)
    axes.stairs(np.arange(1, size + 1), np.arange(size + 1), baseline=size, fill=True, color=BACKGROUND, zorder=2)
    student, teacher = series.index[0]
    mark_cell(axes, students.index(student), teachers.index(teacher), thin=False)
    notes = []
    if pick is not None:
        mark_cell(axes, students.index(pick.student), teachers.index(pick.teacher))
        notes.append("thin frame: the pick")
    if np.isnan(values[np.triu_indices(size)]).any():
        notes.append("hatched: not trained")
    title = f"{capital(metric)}: best {student} from {teacher}"
    axes.set_title("\n".join([title, *["; ".join(notes)] * bool(notes)]))
    label_layers(axes, teachers, width_in, first=0.5)
    label_layers(axes, students, 0.35 * size + 1, first=0.5, vertical=True)
    axes.set(xlabel=short_names(teachers)[1].replace("layer", "teacher", 1), ylabel="student")


def _title(series: pd.Series, metric: str, sweep: pd.DataFrame) -> str:
    num_better, (student, teacher) = int((series > 0).sum()), series.index[0]
    num_seeds = sweep["seed"].nunique()
    note = "one seed: benefit and noise cannot be separated" if num_seeds == 1 else f"mean of {num_seeds} seeds"
    if not num_better:
        return f"None of {len(series)} pairs beats the baseline in {metric} ({note})"
    best = f"{student} from {teacher} by {series.iloc[0]:.1f} %"
    return f"{num_better} of {len(series)} pairs beat the baseline in {metric}; {best} ({note})"
