"""`layerprobe compare` as the shell runs it, on two small runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_samples, tiny_sit

from layerprobe.analyses.runs.folder import RunPlan
from layerprobe.analyses.runs.probe import measure_run
from layerprobe.checkpoints import CheckpointSource
from layerprobe.data import DataSource, for_probing, split
from layerprobe.extraction import ExtractionPlan


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, splits = tmp_path_factory.mktemp("runs"), for_probing(split(tiny_samples(60)), given={})
    for depth in (2, 3):
        plan = RunPlan(CheckpointSource(f"in memory: {depth}"), DataSource("in memory: 60"), ExtractionPlan((), (0.2,)))
        opened = tiny_sit(depth=depth, seed=depth), splits
        measure_run(plan, folder / f"depth-{depth}", opened=opened, trust_convention=True)
    return [folder / "depth-2", folder / "depth-3"]


def test_two_runs_are_compared(runs: list[Path], tmp_path: Path, cli) -> None:
    code, out, _ = cli("compare", *runs, "--out", tmp_path / "out")
    assert code == 0
    assert "at blocks." in out
    assert "paired by sample" in out
    assert "blocks.2 is most like blocks." in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "curves.png",
        "curves.svg",
        "block-map-1.png",
        "block-map-1.svg",
        "differences.csv",
        "block-map.csv",
        "checksums.json",
    }
    code, out, _ = cli("compare", *runs, "--out", tmp_path / "out", "--json")
    assert len(json.loads(out)["block_map"]) == 3


def test_what_cannot_be_compared_is_one_line(runs: list[Path], tmp_path: Path, cli) -> None:
    for arguments, message in (
        (runs[:1], "a comparison needs two runs, got 1"),
        ([runs[0], runs[0]], "is named twice"),
        ([runs[0], tmp_path], "holds no run"),
    ):
        code, _, err = cli("compare", *arguments, "--out", tmp_path / "out")
        assert code == 2
        assert message in err


def test_a_damaged_run_is_one_line(runs: list[Path], tmp_path: Path, cli) -> None:
    path = runs[1] / "probe-scores.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, _, err = cli("compare", *runs, "--out", tmp_path / "out")
    path.write_bytes(content)
    assert code == 2
    assert "probe-scores.safetensors is damaged" in err and "layerprobe analyze" in err
    assert not (tmp_path / "out").exists()
