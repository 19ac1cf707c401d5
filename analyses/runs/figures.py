"""Drawing every figure that the tables of a run allow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerprobe.analyses.figures import (
    PAPER_WIDTHS,
    changed_style,
    cka_heatmap,
    confirmation_curves,
    knowledge_curves,
    layer_quality_curves,
    metric_panels,
    paper_cka,
    paper_confirmation,
    paper_curves,
    paper_heatmap,
    quality_heatmap,
    save_figure,
    token_maps,
)
from layerprobe.analyses.measures import pca_rgb
from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.tables import MODEL, headlines, probed_column
from layerprobe.extraction import FeatureStore
from layerprobe.files import holding, write_text
from layerprobe.messages import did_you_mean, unknown


@holding("run")
def draw_figures(
    run: str | Path,
    *,
    formats: Sequence[str] = ("png", "svg"),
    only: Sequence[str] = (),
    title: bool = True,
    width: str | None = None,
    context: str = "paper",
    style: str | Path | None = None,
) -> list[Path]:
    """Draws the figures that the run's tables allow into `figures/`.

    For a paper (`width`) a figure has one panel, or two below each other, no title, and its name ends in the width.

    Args:
        run: Run folder.
        formats: Formats of the files: png, svg, pdf.
        only: Names of the figures to draw; all of them if empty.
        title: Whether the figures have their titles; papers say it in the caption.
        width: "column" (3.3 in) or "full" (7 in) for the figures of a paper; None for those of a screen.
        context: "paper", or "talk" for larger text and lines in the figures of a `width`.
        style: A matplotlib style sheet, applied over the theme; None for no such file.

    Returns:
        The paths of the files.

    Raises:
        ValueError: If a format, width or context is unknown, the style sheet is wrong, or the run has no figure of a
            name.
    """
    if width not in (None, *PAPER_WIDTHS):
        raise ValueError(unknown("width of a figure", width, PAPER_WIDTHS))
    if width is None and context != "paper":
        raise ValueError(f"--context {context} is for figures of one panel; pass --width full or column too")
    with changed_style(context=context if width else None, sheet=style):
        figures = _for_papers(run, PAPER_WIDTHS[width]) if width else _for_screens(run)
        for name in only:
            if name not in figures:
                kind = f"figure {name!r} of --width {width}" if width else f"figure {name!r}"
                hint = did_you_mean(name, figures)
                raise ValueError(f"this run has no {kind}; it has {', '.join(figures)}{hint}")
        paths: list[Path] = []
        for name in only or figures:
            if not title:
                figures[name].suptitle("")
            file = f"{name}-{width}" if width else name
            paths += save_figure(figures[name], RunFolder(run).figures, file, formats=formats)
    return paths


def _for_papers(run: str | Path, width_in: float) -> dict[str, Any]:
    folder = RunFolder(run)
    quality, selection = folder.quality(), folder.selection()
    figures = {}
    for metric in headlines(list(dict.fromkeys(quality["metric"]))):
        name = _file_name(metric)
        figures[f"{name}-curves"] = paper_curves(quality, metric, width_in=width_in, selection=selection)
        figures[f"{name}-heatmap"] = paper_heatmap(quality, metric, width_in=width_in)
    figures["cka"] = paper_cka(folder.similarity(), width_in=width_in, selection=selection)
    if confirmed := folder.verdict():
        figures["confirmation"] = paper_confirmation(*confirmed, width_in=width_in)
    return figures


def _for_screens(run: str | Path) -> dict[str, Any]:
    folder = RunFolder(run)
    quality, selection = folder.quality(), folder.selection()
    figures = {}
    metrics = list(dict.fromkeys(quality["metric"]))
    shown = headlines(metrics)
    if any(map(probed_column, metrics)):
        figures["what-each-layer-knows"] = knowledge_curves(quality)
    for metric in shown:
        name = _file_name(metric)
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
    return figures


def _file_name(metric: str) -> str:
    return re.sub(r"[^\w.]+", "-", metric)


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
        name = _file_name(str(metric))
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
