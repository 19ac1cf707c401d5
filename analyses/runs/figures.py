"""Drawing every figure that the tables of a run allow."""

from __future__ import annotations

import re
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
from layerprobe.files import holding


@holding("run")
def draw_figures(run: str | Path) -> list[Path]:
    """Draws every figure that the run's tables allow, as PNG and SVG, into `figures/`."""
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
    return [path for name, figure in figures.items() for path in save_figure(figure, folder.figures, name)]


def _token_maps(store: FeatureStore) -> Any:
    """Tokens of the first samples of the test split in colors, for the layers whose tokens lie on a grid."""
    grids = {layer: grid for layer in store.layers if (grid := store.grid(layer)) is not None}
    maps = {
        (layer, level): pca_rgb(store.tokens(layer, level, split="test"))
        for layer in grids
        for level in store.noise_levels
    }
    return token_maps(maps, grids, samples=range(min(3, int((store.token_splits == "test").sum()))))
