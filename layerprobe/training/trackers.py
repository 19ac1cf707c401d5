"""Logging to TensorBoard, Weights & Biases and trackio by one call: `trackers(step, row)`.

`log.jsonl` and `log.csv` of the run are complete without them. `trackers.json` stores the identity of the run and the
last step sent to each tracker. A resumed run therefore continues the same curves and sends no step twice. Trackers are
opened at the first row, so that a run that fails before leaves no trace.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from layerprobe.messages import unknown
from layerprobe.records import read_record, typed, write_record

PROJECT = "layerprobe"
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}

Row = Mapping[str, float]


class _Record(TypedDict):
    id: str
    last: dict[str, int]


@dataclass(frozen=True)
class _Tracker:
    log: Callable[[int, Row], None]
    close: Callable[[], None]


class Trackers:
    """The trackers of one training run, created by `open_trackers`."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        config: Mapping[str, Any],
        run_name: str,
        warn: Callable[[str], None],
    ) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._folder, self._config, self._run_name, self._warn = folder, dict(config), run_name, warn
        self._open: dict[str, _Tracker] = {}
        self._record: dict[str, Any] = {}  # content of trackers.json; empty before the first row
        self._sent_before: dict[str, int] = {}  # last step sent to each tracker before this process

    def __call__(self, step: int, row: Row) -> None:
        """Sends a row to all trackers, except for steps that they received before an interruption.

        A tracker that fails is closed with one warning, so that training continues when a service is down.

        Args:
            step: Training step.
            row: Values by name.
        """
        if not self._names:
            return
        if not self._record:
            self._begin()
        for name, tracker in list(self._open.items()):
            if step > self._sent_before.get(name, -1):
                with self._dropped_on_failure(name):
                    tracker.log(step, row)
                    self._record["last"][name] = step
        write_record(self._folder / "trackers.json", self._record)

    def close(self) -> None:
        """Closes the trackers, after everything is written or sent."""
        for name, tracker in list(self._open.items()):
            with self._dropped_on_failure(name):
                tracker.close()

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "trackers.json"
        new: dict[str, Any] = {"id": secrets.token_hex(4), "last": {}}
        remedy = "delete it, and the trackers begin a new run"
        self._record = read_record(path, typed(_Record), remedy=remedy) if path.is_file() else new
        self._sent_before = dict(self._record["last"])
        for name in self._names:
            with self._dropped_on_failure(name):
                self._open[name] = self._connect(name)

    def _connect(self, name: str) -> _Tracker:
        module, run_id = importlib.import_module(MODULES[name]), self._record["id"]
        if name == "tensorboard":
            writer = module.SummaryWriter(log_dir=str(self._folder / "tensorboard"))
            writer.add_text("config", f"```\n{json.dumps(self._config, indent=1)}\n```")
            return _Tracker(lambda step, row: _write(writer, step, row), writer.close)
        if name == "wandb":
            # By default wandb replaces standard output and error, which breaks the progress bars.
            run = module.init(
                project=PROJECT,
                name=self._run_name,
                id=run_id,
                resume="allow",
                dir=str(self._folder),
                config=self._config,
                settings=module.Settings(console="off"),
            )
        else:
            # trackio resumes runs by name, and different folders may have the same name.
            run = module.init(
                project=PROJECT, name=f"{self._run_name}-{run_id}", resume="allow", config=self._config, embed=False
            )
        return _Tracker(lambda step, row: run.log(dict(row), step=step), module.finish)

    @contextlib.contextmanager
    def _dropped_on_failure(self, name: str) -> Iterator[None]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
                yield
        except Exception as error:
            self._open.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._warn(f"{name} failed and gets no more rows ({reason}); {self._folder / 'log.csv'} has them all")


def require(names: Sequence[str]) -> None:
    """Checks that trackers exist and are installed.

    Raises:
        ValueError: If a name is unknown.
        ModuleNotFoundError: If the package of a tracker is not installed.
    """
    for name in names:
        if name not in MODULES:
            raise ValueError(unknown("tracker", name, MODULES))
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            raise ModuleNotFoundError(
                f"the tracker {name} needs a missing package ({error}): pip install 'layerprobe[trackers]'"
            ) from error


def open_trackers(
    names: Sequence[str],
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    run_name: str,
    warn: Callable[[str], None],
) -> Trackers:
    """Creates trackers for a training run; call the result with (step, row) and `close` it at the end.

    Args:
        names: Names of trackers, from "tensorboard", "wandb" and "trackio".
        folder: Folder of the run. TensorBoard and Weights & Biases write into it, trackio into its own folder.
        config: Configuration of the run, JSON-compatible, which the trackers show with the curves.
        run_name: Name of the run in the trackers; the project is "layerprobe".
        warn: Function called with one line when a tracker fails.

    Raises:
        ValueError: If a name is unknown.
        ModuleNotFoundError: If the package of a tracker is not installed.
    """
    require(names)
    return Trackers(names, Path(folder), config=config, run_name=run_name, warn=warn)


def _write(writer: Any, step: int, row: Row) -> None:
    for name, value in row.items():
        writer.add_scalar(name, value, step)
    writer.flush()  # A killed run would otherwise lose two minutes of rows that are recorded as sent.
