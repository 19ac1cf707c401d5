"""What every test relies on: few threads, no network, no display."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch is imported. One thread a worker: workers that each start a thread per core run ten times slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# No deadline: the first call of a torch function takes many times as long as the second. CI repeats the same examples.
hypothesis.settings.register_profile("layerprobe", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("layerprobe")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets are not beside this checkout (../shared/data)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def shared_checkpoints() -> Path:
    """The folder of trained checkpoints beside the checkout."""
    folder = SHARED_DATA.parent / "checkpoints"
    if not folder.is_dir():
        pytest.skip("the trained checkpoints are not beside this checkout (../shared/checkpoints)")
    return folder


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run no piece of themselves for a forecast: that takes longer than what tests of commands run."""
    from layerprobe.analyses import runs
    from layerprobe.analyses.runs import confirm

    cost = runs.Cost({"training": 280.0, "scoring": 20.0}, 2**30, None, 2**20)
    for name in ("training_cost", "sweep_cost", "sampling_cost", "score_cost", "analysis_forecast"):
        monkeypatch.setattr(runs, name, lambda *_, **__: cost)
    for name in ("rough_seconds", "rough_sampling_seconds", "rough_score_seconds"):
        monkeypatch.setattr(runs, name, lambda *_, **__: 0.0)
    monkeypatch.setattr(confirm, "confirmation_cost", lambda *_, **__: cost)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], untimed: None):
    """Runs a command; gives exit code, standard output and standard error."""
    from layerprobe.cli.main import run

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["layerprobe", *map(str, arguments)])
        code = run()
        out, err = capsys.readouterr()
        return code, out, err

    return call
