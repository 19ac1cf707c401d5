"""The figure of a pair atlas: students as rows, teachers as columns, color for what the pair was worth."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from layerprobe.analyses.experiments import FRECHET, HELD_OUT, benefits
from layerprobe.analyses.figures.style import (
    WIDTH_IN,
    annotate_cells,
    capital,
    cell_box,
    draw_matrix,
    label_layers,
    num_decimals,
    short_names,
    styled,
    wrap_title,
)
from layerprobe.layersync import LayerPair


@styled()
def pair_sweep_heatmap(
    atlas: pd.DataFrame,
    layers: Sequence[str],
    *,
    metrics: Sequence[str] = (FRECHET, HELD_OUT),
    pick: LayerPair | None = None,
) -> Figure:
    """What every pair was worth beside no alignment at the end of its branch, in per cent, one panel a metric.

    Purple is worse than no alignment, orange is better; the thick frame marks the best pair, the thin one a pick.

    Args:
        atlas: The table of `chart` or `read_atlas`; benefits are averaged over its seeds.
        layers: Names in execution order.
        metrics: Which, lower is better in each.
        pick: A pair to mark.

    Raises:
        ValueError: If a metric has no benefit, or a pair is not of these layers.
    """
    found = {metric: 100 * benefits(atlas, metric=metric) for metric in metrics}
    shown = [name for series in found.values() for names in series.index.tolist() for name in names]
    shown += [pick.student, pick.teacher] if pick else []
    unknown = [name for name in shown if name not in layers]
    if unknown:
        raise ValueError(f"{unknown[0]} is not among the layers {', '.join(layers)}; pass those of the atlas's model")
    rows, columns = list(layers)[:-1], list(layers)[1:]
    width = WIDTH_IN * max(1.0, len(found) / 2)
    figure = Figure(figsize=(width, 2.2 + 0.45 * len(rows)), layout="constrained")
    all_axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (metric, series) in zip(all_axes, found.items(), strict=True):
        values = np.full((len(rows), len(columns)), np.nan)
        for (student, teacher), benefit in zip(series.index.tolist(), series.tolist(), strict=True):
            values[rows.index(student), columns.index(teacher)] = benefit
        limit = max(float(np.nanmax(np.abs(values))), 1e-9)
        text = f"{{:+.{num_decimals(limit, 2)}f}}".format
        image = draw_matrix(axes, values, mpl.colormaps["PuOr_r"], Normalize(-limit, limit))
        if len(rows) <= 16:
            annotate_cells(axes, values, image, text, size=min(8.5, 60 / len(rows)))
        best = series.index[0]
        axes.add_patch(cell_box(columns.index(best[1]), rows.index(best[0]), "#000000", width=3.0))
        if pick is not None:
            x, y = columns.index(pick.teacher), rows.index(pick.student)
            axes.add_patch(cell_box(x, y, "#000000", width=2.6))
            axes.add_patch(cell_box(x, y, "#ffffff", width=1.2))
        label_layers(axes, columns, width / len(found) - 1.4)
        label_layers(axes, rows, 0.35 * len(rows) + 1, vertical=True)
        framed = "" if pick is None else "; thin frame: the pick"
        axes.set_title(f"{capital(metric)}: best {best[0]} from {best[1]}{framed}")
        axes.set(xlabel=short_names(columns)[1].replace("layer", "teacher", 1), ylabel="student")
        figure.colorbar(image, ax=axes, pad=0.01, label="better than no alignment by (%)")
    figure.suptitle(wrap_title(_title(found[metrics[0]], metrics[0], atlas)), x=0.008, ha="left")
    return figure


def _title(series: pd.Series, metric: str, atlas: pd.DataFrame) -> str:
    helpful, best = int((series > 0).sum()), series.index[0]
    seeds = atlas["seed"].nunique()
    noise = "one seed, so noise is not told from benefit" if seeds == 1 else f"mean of {seeds} seeds"
    if not helpful:
        return f"No pair of {len(series)} beats no alignment in {metric} ({noise})"
    by = f"{series.iloc[0]:.1f} %"
    return f"{helpful} of {len(series)} pairs beat no alignment in {metric}; {best[0]} from {best[1]} by {by} ({noise})"
