"""`layerprobe compare` as the shell runs it, on two small runs."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from tiny import tiny_samples, tiny_sit

from layerprobe.analyses.runs.compare import Comparison, training_steps
from layerprobe.analyses.runs.folder import RunFolder, RunPlan
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


def test_two_runs_are_compared(runs: list[Path], tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = cli("compare", *runs, "--out", tmp_path / "out")
    assert code == 0
    assert "at blocks." in out
    assert "paired by sample" in out
    assert "blocks.2 of depth-3 is most like blocks." in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "comparison.html",
        "curves.png",
        "curves.svg",
        "block-map-1.png",
        "block-map-1.svg",
        "differences.csv",
        "block-map.csv",
        "checksums.json",
    }
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    assert "blocks.2 of depth-3 is most like" in page.replace("<wbr>", "")
    monkeypatch.setattr("layerprobe.analyses.runs.compare.save_figure", lambda *_: ())
    code, out, _ = cli("compare", *runs, "--out", tmp_path / "out", "--json")
    assert len(json.loads(out)["block_map"]) == 3


def test_a_comparison_fits_ten_lines(runs: list[Path], tmp_path: Path) -> None:
    comparison = Comparison(pd.DataFrame(), pd.DataFrame(), tuple(f"<b> {i}" for i in range(30)), (tmp_path / "page",))
    assert len(repr(comparison).splitlines()) == 10
    assert repr(comparison).endswith("... and 22 more in .lines")
    html = comparison._repr_html_()
    assert html.count("<li>") == 9 and "&lt;b&gt; 7" in html


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


@pytest.mark.parametrize(
    ("paths", "steps"),
    [
        (("/a/0100000.pt", "/a/0400000.pt"), [100_000, 400_000]),
        (("/a/checkpoint-500/unet", "/a/checkpoint-1500/unet"), [500, 1500]),
        (("/a/step_5.ckpt", "/b/step_9.ckpt"), None),  # of two trainings
        (("/a/model-ema-0.99.pt", "/a/model-ema-0.999.pt"), None),
        (("/a/SiT-XL-2-256.pt", "/a/SiT-XL-2-512.pt"), None),
        (("/a/2024/model.pt", "/a/2025/model.pt"), None),
        (("/a/0100000.pt", "/a/0100000.pt"), None),
    ],
)
def test_steps_of_one_training_are_told_from_other_numbers(paths, steps, tmp_path: Path) -> None:
    runs = [tmp_path / str(i) for i in range(len(paths))]
    for run, path in zip(runs, paths, strict=True):
        RunFolder(run).claim(RunPlan(CheckpointSource(path), DataSource("digits"), ExtractionPlan()))
    assert training_steps(runs) == steps


def test_a_training_of_layerprobe_says_its_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records = {"/a": {"steps": 5, "seed": 1}, "/b": {"steps": 9, "seed": 1}, "/c": {"steps": 7, "seed": 2}}
    monkeypatch.setattr("layerprobe.analyses.runs.compare.training_record", lambda path: records[path])
    for path in records:
        plan = RunPlan(CheckpointSource(path), DataSource("digits"), ExtractionPlan())
        RunFolder(tmp_path / path[1:]).claim(plan)
    assert training_steps([tmp_path / "a", tmp_path / "b"]) == [5, 9]
    assert training_steps([tmp_path / "a", tmp_path / "c"]) is None
