"""Drawing every figure that the tables of a run allow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerprobe.analyses.figures import (
    cka_heatmap,
    confirmation_curves,
    knowledge_curves,
    layer_quality_curves,
    metric_panels,
    quality_heatmap,
    save_figure,
    token_maps,
)
from layerprobe.analyses.measures import pca_rgb
from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.tables import MODEL, headlines, probed_column
from layerprobe.extraction import FeatureStore
from layerprobe.files import holding, write_text


@holding("run")
def draw_figures(
    run: str | Path, *, formats: Sequence[str] = ("png", "svg"), only: Sequence[str] = (), title: bool = True
) -> list[Path]:
    """Draws the figures that the run's tables allow into `figures/`.

    Args:
        run: Run folder.
        formats: Formats of the files: png, svg, pdf.
        only: Names of the figures to draw; all of them if empty.
        title: Whether the figures have their titles; papers say it in the caption.

    Returns:
        The paths of the files.

    Raises:
        ValueError: If a format is unknown, or the run has no figure of a name.
    """
    folder = RunFolder(run)
    quality, selection = folder.quality(), folder.selection()
    figures = {}
    metrics = list(dict.fromkeys(quality["metric"]))
    shown = headlines(metrics)
    if any(map(probed_column, metrics)):
        figures["what-each-layer-knows"] = knowledge_curves(quality)
    for metric in shown:
        name = re.sub(r"[^\w.]+", "-", metric)
        figures[f"{name}-curves"] = layer_quality_curves(quality, metric, selection=selection)
        figures[f"{name}-heatmap"] = quality_heatmap(quality, metric)
    if more := [metric for metric in metrics if metric not in shown]:
        figures["more-measures"] = metric_panels(quality, more, selection=selection)
    figures["cka"] = cka_heatmap(folder.similarity(), selection=selection)
    store = folder.store(MODEL)
    if len(store.token_rows) and not store.tokens_padded:
        figures["token-maps"] = _token_maps(store)
    if confirmed := folder.verdict():
        figures["confirmation"] = confirmation_curves(*confirmed)
    for name in only:
        if name not in figures:
            raise ValueError(f"this run has no figure {name!r}; it has {', '.join(figures)}")
    paths: list[Path] = []
    for name in only or figures:
        if not title:
            figures[name].suptitle("")
        paths += save_figure(figures[name], folder.figures, name, formats=formats)
    return paths


def write_curves(run: str | Path) -> list[Path]:
    """Writes the curves of every measure into `tables/`, a row per layer and a column per noise level.

    The values are those of the model on the split that is reported, as CSV and as a LaTeX table (for booktabs).
    """
    folder = RunFolder(run)
    quality = folder.quality()
    paths = []
    for metric, rows in quality[quality["source"] == MODEL].groupby("metric", sort=False):
        reported = rows[rows["split"] == ("test" if "test" in set(rows["split"]) else rows["split"].iloc[0])]
        wide = reported.pivot_table(index="layer", columns="noise_level", values="value", sort=False)
        wide = wide[sorted(wide.columns)].rename_axis(columns=None)
        name = re.sub(r"[^\w.]+", "-", str(metric))
        latex = wide.rename(columns="{:g}".format, index=str).reset_index()
        texts = {
            "csv": wide.to_csv(),
            "tex": latex.to_latex(index=False, float_format="%.3f", na_rep="", escape=True),
        }
        for suffix, text in texts.items():
            paths.append(folder.path / "tables" / f"{name}.{suffix}")
            paths[-1].parent.mkdir(exist_ok=True)
            write_text(paths[-1], text)
    return paths


def _token_maps(store: FeatureStore) -> Any:
    """Tokens of the first samples of the test split in colors, for the layers whose tokens lie on a grid."""
    grids = {layer: grid for layer in store.layers if (grid := store.grid(layer)) is not None}
    maps = {
        (layer, level): pca_rgb(store.tokens(layer, level, split="test"))
        for layer in grids
        for level in store.noise_levels
    }
    return token_maps(maps, grids, samples=range(min(3, int((store.token_splits == "test").sum()))))
