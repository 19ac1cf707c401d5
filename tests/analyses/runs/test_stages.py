"""What a job costs: the clock of its stages, and what was forecast of them."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from layerprobe.analyses.runs import stages
from layerprobe.analyses.runs.stages import (
    CONVENTION,
    FIGURES,
    MODEL_FEATURES,
    PROBES,
    Cost,
    StageClock,
    cost_record,
    largest_share,
    shared_out,
)
from layerprobe.cli.costs import cost_lines, emit_forecast, tell_took

COST = Cost({PROBES: 240.0, FIGURES: 1.0}, 2**30, None, 2**21)


def long() -> float:
    return 3600.0


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_clock_adds_up_what_several_calls_took(tmp_path: Path, now: list[float]) -> None:
    assert cost_record(tmp_path) == (None, None)
    for seconds in (2.0, 3.0):
        clock = StageClock(tmp_path, writes=True)
        clock.begin(PROBES)
        now[0] += seconds
        clock.begin(FIGURES)
        now[0] += 1
        clock.end()
        clock.end()
    (tmp_path / "more").write_bytes(bytes(5000))
    clock.begin(FIGURES)
    clock.end()
    (tmp_path / "more").unlink()
    expected, took = cost_record(tmp_path)
    assert expected is None
    assert took is not None
    assert took["seconds"] == {PROBES: 5.0, FIGURES: 2.0}
    assert took["disk_bytes"] >= 5000  # when it was largest
    assert took["memory_bytes"] > 2**20
    lines = cost_lines(COST.to_dict(), took)
    assert lines[0] == "probes             5 s (forecast 4 min)"
    assert lines[2] == "in all             7 s (forecast 4 min)"
    assert lines[-1].startswith("disk ")
    assert lines[-1].endswith("(forecast 2 MiB)")
    # Of an extraction alone: what came after it in the same folder was not forecast.
    extraction = replace(COST, seconds={CONVENTION: 1.0, PROBES: 240.0}).to_dict()
    assert cost_lines(extraction, took)[:4] == [
        "convention check   0 s (forecast 1 s)",
        "probes             5 s (forecast 4 min)",
        "figures and report 2 s",
        "in all             7 s",
    ]


def test_nothing_is_written_before_the_folder_is_the_jobs_own(tmp_path: Path, now: list[float]) -> None:
    clock, told = StageClock(tmp_path), list[Cost]()
    clock.foretell(CONVENTION, long, lambda: COST, told.append)
    clock.begin(CONVENTION)
    now[0] += 1
    clock.begin(PROBES)
    assert (told, [*tmp_path.iterdir()]) == ([COST], [])
    now[0] += 2
    clock.begin_own(FIGURES)
    expected, took = cost_record(tmp_path)
    assert expected == COST.to_dict()
    assert took is not None
    assert took["seconds"] == {CONVENTION: 1.0, PROBES: 2.0}


def test_only_a_long_job_that_has_not_begun_is_forecast(tmp_path: Path) -> None:
    told: list[Cost] = []
    shorter = Cost({PROBES: stages.LONG_S - 1}, 0, None, 0)
    StageClock(tmp_path).foretell(PROBES, long, lambda: shorter, told.append)
    StageClock(tmp_path).foretell(PROBES, lambda: 1.0, lambda: pytest.fail("it was forecast"), told.append)
    clock = StageClock(tmp_path, writes=True)
    clock.begin(PROBES)
    clock.end()
    StageClock(tmp_path).foretell(PROBES, long, lambda: pytest.fail("it was forecast"), told.append)
    assert told == []
    assert cost_record(tmp_path)[0] is None


def test_work_of_its_own_in_the_folder_of_other_work_begins_anew(tmp_path: Path, now: list[float]) -> None:
    for seconds in (5.0, 2.0):
        clock, told = StageClock(tmp_path, writes=True), list[Cost]()
        clock.begin_anew([PROBES, FIGURES])
        clock.foretell(PROBES, long, lambda: COST, told.append)
        assert told == [COST]
        for _ in range(2):
            clock.begin(PROBES)
            now[0] += seconds
        clock.end()
    expected, took = cost_record(tmp_path)
    assert took is not None
    assert (expected, took["seconds"]) == (COST.to_dict(), {PROBES: 4.0})
    # Times of the training or the run that lies there stay.
    for own, kept in (([FIGURES], COST.to_dict()), ([PROBES], None)):
        clock = StageClock(tmp_path, writes=True)
        clock.begin_anew(own)
        clock.begin(PROBES)
        clock.end()
        assert cost_record(tmp_path)[0] == kept


def test_what_an_earlier_job_in_the_folder_took_counts_as_expected(tmp_path: Path, now: list[float]) -> None:
    """`analyze` after an `extract` that was too short to be forecast."""
    clock = StageClock(tmp_path, writes=True)
    clock.begin(MODEL_FEATURES)
    now[0] += 5
    clock.end()
    clock.foretell(PROBES, long, lambda: COST, lambda cost: None)
    clock.begin(PROBES)
    clock.end()
    expected = cost_record(tmp_path)[0]
    assert expected is not None
    assert expected["seconds"] == {MODEL_FEATURES: 5.0} | COST.seconds


def test_times_of_earlier_versions_are_read(tmp_path: Path) -> None:
    record = {"seconds": {PROBES: 1.0}, "memory_bytes": 1, "device_bytes": None}
    (tmp_path / "times.json").write_text(json.dumps(record))
    took = cost_record(tmp_path)[1]
    assert took == Cost({PROBES: 1.0}, 1, None, 0).to_dict()


def test_processes_share_what_can_be_shared() -> None:
    assert shared_out({CONVENTION: 6.0, FIGURES: 6.0}, 3) == {CONVENTION: 2.0, FIGURES: 6.0}
    assert [largest_share(items, 2) for items in (0, 1, 3, 4)] == [0, 1, 2 / 3, 1 / 2]


def test_every_command_prints_the_same_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emit_forecast({"model": "m"}, COST, as_json=False, lines=["a caution"], further={"cautions": ["a caution"]})
    assert capsys.readouterr().out.splitlines() == [
        "model: m",
        "a caution",
        "probes             4 min",
        "figures and report 1 s",
        "in all             4 min",
        "memory             1.0 GiB",
        "disk               2 MiB",
    ]
    emit_forecast({"model": "m"}, COST, as_json=True, further={"cautions": []})
    assert json.loads(capsys.readouterr().out) == {"model": "m", "cautions": []} | COST.to_dict()
    clock = StageClock(tmp_path, writes=True)
    clock.foretell(PROBES, long, lambda: COST, lambda cost: None)
    tell_took(tmp_path)
    assert capsys.readouterr().err == ""
    clock.begin(PROBES)
    clock.end()
    tell_took(tmp_path)
    assert capsys.readouterr().err.startswith("layerprobe: took: probes             0 s (forecast 4 min)")
