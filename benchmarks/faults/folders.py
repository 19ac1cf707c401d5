"""Damaged run folders, as `run_folders.py` makes them, in the words of the campaign."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import run_folders
from outcome import CODES, Outcome, Result

FAULTS = {"EXIT CODE": "TRACEBACK", "SILENTLY CHANGED": "CHANGED"}


def run(count: int, seed: int) -> Iterator[Result]:
    """Runs this many commands on damaged folders."""
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place, "runs")
        run_folders.make_runs(runs)
        for case in run_folders.cases(runs, seed=seed, count=count):
            result = run_folders.run_case(case, runs)
            kind = result.outcome if result.outcome in run_folders.FAULTS else CODES.get(result.code, "TRACEBACK")
            outcome = Outcome(FAULTS.get(kind, kind), result.code, ascii(result.line)[1:-1][:300], result.seconds)
            yield Result(case.command, f"{case.file}: {case.mutation}", outcome)
