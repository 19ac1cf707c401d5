"""What a run costs: the clock of its stages, and the forecast of them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tiny import tiny_samples, tiny_sit

from layerprobe.analyses.runs import RunPlan, probe
from layerprobe.analyses.runs.costing import forecast_cost, row_seconds
from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.runs.stages import FIGURES, PROBES, STAGES, Cost, StageClock, cost_record
from layerprobe.checkpoints import CheckpointSource
from layerprobe.cli.costs import cost_lines
from layerprobe.data import DataSource, Splits, Subset
from layerprobe.extraction import ExtractionPlan


def test_the_clock_adds_up_what_several_calls_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert cost_record(tmp_path) == (None, None)
    for seconds in (2.0, 3.0):
        clock = StageClock(tmp_path / "times.json")
        clock.begin(PROBES)
        now[0] += seconds
        clock.begin(FIGURES, since=now[0] - 1)
        clock.end()
        clock.end()
    StageClock(tmp_path / "times.json", writes=False).begin(PROBES)
    (tmp_path / "more").write_bytes(bytes(1000))
    expected, took = cost_record(tmp_path)
    assert expected is None
    assert took is not None
    assert took["seconds"] == {PROBES: 5.0, FIGURES: 2.0}
    assert took["disk_bytes"] >= 1000
    assert took["memory_bytes"] > 2**20
    lines = cost_lines(Cost({PROBES: 240.0, FIGURES: 1.0}, 2**30, None, 2**21).to_dict(), took)
    assert lines[0] == "probes             5 s (forecast 4 min)"
    assert lines[2] == "in all             7 s (forecast 4 min)"
    assert lines[-1].startswith("disk ")
    assert lines[-1].endswith("(forecast 2 MiB)")


def patterned() -> tuple[RunPlan, Splits]:
    samples = tiny_samples(96)
    parts = zip(("train", "validation", "test"), (range(64), range(64, 80), range(80, 96)), strict=True)
    splits = Splits(*(Subset(samples, rows, name=name) for name, rows in parts))
    plan = ExtractionPlan(noise_levels=(0.2, 0.5))
    return RunPlan(CheckpointSource("memory"), DataSource("memory"), plan), splits


def test_a_forecast_has_every_stage_and_the_disk_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run of which it was asked records both; its figures are left out here."""
    backbone, (plan, splits) = tiny_sit().in_precision("auto"), patterned()
    told: list[Cost] = []
    monkeypatch.setattr(probe, "LONG_S", 0.0)
    probe.extract_run(plan, tmp_path / "run", opened=(backbone, splits), trust_convention=True, on_forecast=told.append)
    folder = RunFolder(tmp_path / "run")
    (cost,) = told
    assert tuple(cost.seconds) == STAGES
    assert all(seconds > 0 for stage, seconds in cost.seconds.items() if stage not in ("CKA", "pairs"))
    assert json.loads(folder.forecast.read_text()) == cost.to_dict()
    stores = sum(file.stat().st_size for file in folder.features.rglob("*.safetensors"))
    assert cost.disk_bytes == pytest.approx(stores, rel=0.3)
    _, took = cost_record(folder.path)
    assert took is not None
    assert set(took["seconds"]) == set(STAGES[:4])
    assert cost.memory_bytes >= took["memory_bytes"] / 1.5
    shared = forecast_cost(backbone, splits, plan.extraction_from(backbone), processes=4)
    assert shared.seconds[PROBES] < cost.seconds[PROBES]


def test_a_short_run_is_not_forecast(tmp_path: Path) -> None:
    plan, splits = patterned()
    opened, told = (tiny_sit(), splits), list[Cost]()
    probe.extract_run(plan, tmp_path, opened=opened, trust_convention=True, on_forecast=told.append)
    assert told == []
    assert cost_record(tmp_path)[0] is None


def test_a_row_takes_what_rows_take() -> None:
    backbone, began = tiny_sit(depth=8).in_precision("float32"), time.perf_counter()
    row_s = row_seconds(backbone, ExtractionPlan(backbone.layers), 128)
    assert 0 < row_s < time.perf_counter() - began
