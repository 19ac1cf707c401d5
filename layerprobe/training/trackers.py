"""TensorBoard, Weights & Biases and trackio behind one call: `trackers(step, row)`.

The trainer's own `log.jsonl` and `log.csv` are complete without them. A run keeps its identity in `trackers.json`, so
that a training that goes on after an interruption goes on in the same curves, and steps that a tracker has are not
sent to it again. Nothing is opened before the first row: a training that is refused leaves no trace anywhere.
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
from typing import Any

from layerprobe.files import write_text

PROJECT = "layerprobe"
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}

Row = Mapping[str, float]


@dataclass(frozen=True)
class _Tracker:
    log: Callable[[int, Row], None]
    close: Callable[[], None]


class Trackers:
    """The trackers of one training; made by `open_trackers`."""

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
        self._record: dict[str, Any] = {}  # what trackers.json holds; empty before the first row
        self._before: dict[str, int] = {}  # the last step that each tracker had when this process began

    def __call__(self, step: int, row: Row) -> None:
        """Sends a row; steps that a tracker had before an interruption are left out.

        A tracker that fails is given up with one warning: no training ends because a service is down.
        """
        if not self._names:
            return
        if not self._record:
            self._begin()
        for name, tracker in list(self._open.items()):
            if step > self._before.get(name, -1):
                with self._given_up_where_it_fails(name):
                    tracker.log(step, row)
                    self._record["last"][name] = step
        write_text(self._folder / "trackers.json", json.dumps(self._record, indent=1))

    def close(self) -> None:
        """Waits until everything is written or sent."""
        for name, tracker in list(self._open.items()):
            with self._given_up_where_it_fails(name):
                tracker.close()

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        place = self._folder / "trackers.json"
        new: dict[str, Any] = {"id": secrets.token_hex(4), "last": {}}
        self._record = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else new
        self._before = dict(self._record["last"])
        for name in self._names:
            with self._given_up_where_it_fails(name):
                self._open[name] = self._connect(name)

    def _connect(self, name: str) -> _Tracker:
        module, run_id = importlib.import_module(MODULES[name]), self._record["id"]
        if name == "tensorboard":
            writer = module.SummaryWriter(log_dir=str(self._folder / "tensorboard"))
            writer.add_text("config", f"```\n{json.dumps(self._config, indent=1)}\n```")
            return _Tracker(lambda step, row: _write(writer, step, row), writer.close)
        if name == "wandb":
            # Without `console` it would replace standard output and error, and the progress with them.
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
            # trackio goes on with a run by its name, which folders of one name must not share.
            run = module.init(
                project=PROJECT, name=f"{self._run_name}-{run_id}", resume="allow", config=self._config, embed=False
            )
        return _Tracker(lambda step, row: run.log(dict(row), step=step), module.finish)

    @contextlib.contextmanager
    def _given_up_where_it_fails(self, name: str) -> Iterator[None]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
                yield
        except Exception as error:
            self._open.pop(name, None)
            what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._warn(f"{name} failed and gets no more rows ({what}); {self._folder / 'log.csv'} has them all")


def require(names: Sequence[str]) -> None:
    """Checks that trackers are known and installed.

    Raises:
        ValueError: If a name is unknown.
        ModuleNotFoundError: If the package of a tracker is not installed.
    """
    for name in names:
        if name not in MODULES:
            raise ValueError(f"unknown tracker {name!r}; use {', '.join(MODULES)}")
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            raise ModuleNotFoundError(
                f"the tracker {name} needs a package that is not here ({error}): pip install 'layerprobe[trackers]'"
            ) from error


def open_trackers(
    names: Sequence[str],
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    run_name: str,
    warn: Callable[[str], None],
) -> Trackers:
    """Trackers for a training; call the result with (step, row) and `close` it at the end.

    Args:
        names: Of "tensorboard", "wandb" and "trackio"; those not named cost nothing.
        folder: The training's folder. TensorBoard and Weights & Biases write into it; trackio into its own place.
        config: What the training is, as JSON; shown beside the curves.
        run_name: How the run is called in them; the project is "layerprobe".
        warn: Called with one line when a tracker fails.

    Raises:
        ValueError: If a name is unknown.
        ModuleNotFoundError: If the package of a tracker is not installed.
    """
    require(names)
    return Trackers(names, Path(folder), config=config, run_name=run_name, warn=warn)


def _write(writer: Any, step: int, row: Row) -> None:
    for name, value in row.items():
        writer.add_scalar(name, value, step)
    writer.flush()  # or a run that is killed loses two minutes of rows that count as sent
