"""Trackers receive every step once, also after an interruption, and never stop a training run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from layerprobe.training.trackers import open_trackers


class FakeService:
    """A fake of wandb or trackio that keeps the rows of each run and can be made to fail."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.opened: list[dict[str, object]] = []
        self.closed = 0
        self.broken = False

    def Settings(self, **settings: object) -> dict[str, object]:
        return settings

    def init(self, **options: object) -> SimpleNamespace:
        print("chatter on standard output")
        self.opened.append(options)
        rows = self.runs.setdefault(str(options.get("id", options["name"])), [])

        def log(row: dict[str, float], *, step: int) -> None:
            if self.broken:
                raise ConnectionError("the service\nis down")
            rows.append((step, row))

        return SimpleNamespace(log=log)

    def finish(self) -> None:
        self.closed += 1


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeService]:
    fakes = {name: FakeService() for name in ("wandb", "trackio")}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return fakes


def _open(folder: Path, *names: str, warnings: list[str] | None = None):
    warn = pytest.fail if warnings is None else warnings.append
    return open_trackers(names, folder, config={"steps": 9}, run_name="t", warn=warn)


def _log(trackers, *steps: int) -> None:
    for step in steps:
        trackers(step, {"loss": 1 / step})
    trackers.close()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_training_continues_the_same_run_and_sends_no_step_twice(name, services, tmp_path, capsys) -> None:
    _log(_open(tmp_path, name), 10, 20, 30)
    _log(_open(tmp_path, name), 20, 30, 40, 50)  # killed after 30, with a checkpoint at 10
    service = services[name]
    assert [[step for step, _ in rows] for rows in service.runs.values()] == [[10, 20, 30, 40, 50]]
    assert service.runs.popitem()[1][0] == (10, {"loss": 0.1})
    assert [options["resume"] for options in service.opened] == ["allow", "allow"]
    assert service.opened[0]["config"] == {"steps": 9}
    assert service.closed == 2
    assert capsys.readouterr().out == ""  # standard output is for results only


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_folders_with_the_same_name_are_two_runs(name, services, tmp_path) -> None:
    _log(_open(tmp_path / "a" / "t", name), 10)
    _log(_open(tmp_path / "b" / "t", name), 10)
    assert len(services[name].runs) == 2


def test_two_rows_of_one_step_are_both_sent(services, tmp_path) -> None:
    trackers = _open(tmp_path, "wandb")
    trackers(10, {"loss": 1.0})
    trackers(10, {"held-out loss": 2.0})
    assert [row for rows in services["wandb"].runs.values() for row in rows] == [
        (10, {"loss": 1.0}),
        (10, {"held-out loss": 2.0}),
    ]


def test_a_tracker_that_fails_is_dropped_with_one_warning_and_the_others_continue(services, tmp_path) -> None:
    warnings: list[str] = []
    trackers = _open(tmp_path, "wandb", "trackio", warnings=warnings)
    trackers(10, {"loss": 1.0})
    services["wandb"].broken = True
    _log(trackers, 20, 30)
    assert len(warnings) == 1
    assert "wandb failed and gets no more rows (ConnectionError: the service is down)" in warnings[0]
    assert [step for rows in services["trackio"].runs.values() for step, _ in rows] == [10, 20, 30]
    assert (services["wandb"].closed, services["trackio"].closed) == (0, 1)
    # A later process tries again and sends the missing steps.
    services["wandb"].broken = False
    _log(_open(tmp_path, "wandb"), 10, 20, 40)
    assert [step for rows in services["wandb"].runs.values() for step, _ in rows] == [10, 20, 40]


def test_an_interruption_is_not_a_failure_of_the_tracker(services, tmp_path, monkeypatch) -> None:
    def interrupted(**options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(services["wandb"], "init", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _open(tmp_path, "wandb")(10, {"loss": 1.0})


def test_nothing_is_written_or_opened_before_the_first_row(services, tmp_path) -> None:
    _open(tmp_path / "new", "wandb", "trackio").close()
    assert not (tmp_path / "new").exists()
    assert not services["wandb"].opened
    _log(_open(tmp_path / "new"), 10)
    assert not (tmp_path / "new").exists()


def test_bad_names_and_missing_packages(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="unknown tracker 'mlflow'; use tensorboard, wandb or trackio"):
        _open(tmp_path, "mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=r"the tracker wandb needs .*pip install 'layerprobe\[trackers\]'"):
        _open(tmp_path, "wandb")


def test_tensorboard_has_every_step_once_after_an_interruption(tmp_path) -> None:
    pytest.importorskip("tensorboard", reason="the extra layerprobe[trackers] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = _open(tmp_path, "tensorboard")
    for step in (10, 20):
        trackers(step, {"loss": 1 / step, "cosine blocks.1 <- blocks.3": 0.5})
    _log(_open(tmp_path, "tensorboard"), 20, 30)  # the first one was killed and never closed
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in (10, 20, 30)
    ]
    assert [event.step for event in read.Scalars("cosine blocks.1 <- blocks.3")] == [10, 20]
    assert json.loads((tmp_path / "trackers.json").read_text())["last"] == {"tensorboard": 30}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_service_offline(name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name, reason="the extra layerprobe[trackers] is not installed")
    _log(_open(tmp_path, name), 10, 20)
    _log(_open(tmp_path, name), 20, 30)
    assert capsys.readouterr().out == ""
    run_id = json.loads((tmp_path / "trackers.json").read_text())["id"]
    if name == "wandb":
        assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))) == 2
    else:
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs("layerprobe", f"t-{run_id}")
        assert [(row["step"], row["loss"]) for row in rows] == [(10, 0.1), (20, 0.05), (30, 1 / 30)]
