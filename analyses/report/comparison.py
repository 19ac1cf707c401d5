"""The HTML page of a comparison of runs, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from layerprobe.analyses.report.page import render
from layerprobe.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_comparison(
    out: Path,
    names: Sequence[str],
    lines: Sequence[str],
    figures: Sequence[tuple[Figure, str]],
    differences: pd.DataFrame,
    block_maps: pd.DataFrame,
) -> Path:
    """Writes `comparison.html` into the folder of a comparison.

    Args:
        out: Folder of the comparison.
        names: Names of the runs, the reference first.
        lines: What was found, in sentences.
        figures: Figures that were not saved yet, each with the file of the same figure.
        differences: Result of `quality_differences` for all runs; empty without labels.
        block_maps: Result of `block_map` for all runs; empty if the runs are of different samples.

    Returns:
        The path of the page.
    """
    context = {
        "names": names,
        "lines": lines,
        "figures": figures,
        "differences": list(differences.itertuples(index=False)),
        "block_maps": list(block_maps.itertuples(index=False)),
    }
    path = out / "comparison.html"
    write_text(path, render("comparison.html", context))
    return path
