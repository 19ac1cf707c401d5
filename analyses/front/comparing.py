"""Comparing runs in one call."""

from __future__ import annotations

from pathlib import Path

from layerprobe.analyses.front.run import Run
from layerprobe.analyses.runs import Comparison, compare_runs


def compare(*runs: Run | str | Path, out: str | Path) -> Comparison:
    """Compares finished runs with the first of them; see `layerprobe.analyses.runs.compare_runs`.

        lp.compare(run, "runs/other", out="runs/comparison").differences

    Args:
        *runs: Two to eight runs, or their folders.
        out: Folder of the figures and tables.

    Raises:
        ValueError: If the runs have nothing in common that can be compared.
    """
    return compare_runs([run.path if isinstance(run, Run) else run for run in runs], out)
