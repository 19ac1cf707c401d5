"""Small jobs of every command that writes, and what of their files must be the same each time."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from outcome import Forked, Outcome

NETWORK = ("--width", "16", "--depth", "2", "--heads", "2", "--batch-size", "16", "--log-every", "1")
COUNTS = ("--num-train", "45", "--num-validation", "30", "--num-test", "30")
PROBE = ("digits", "--data", "digits", *COUNTS, "--noise-levels", "0.3,0.7", "--layers", "blocks.1,blocks.3,blocks.5")
SWEEP = ("--steps", "2", "--batch-size", "16", "--num-samples", "20")
TRIAL = ("--arms", "none,random", "--steps", "2", "--num-seeds", "2", "--num-samples", "20", "--num-evaluations", "1")


@dataclass(frozen=True)
class Job:
    """A command that writes into the folder `out` of its working directory.

    Attributes:
        arguments: Arguments of the command.
        before: Name of the job whose results are in the folder before, or None.
    """

    arguments: tuple[str, ...]
    before: str | None = None


JOBS = {
    "train": Job(("train", "--data", "digits", "--steps", "6", "--checkpoint-every", "2", *NETWORK, "--out", "out")),
    "extract": Job(("extract", *PROBE, "--out", "out")),
    "probe": Job(("probe", *PROBE, "--out", "out")),
    "analyze": Job(("analyze", "out"), "extract"),
    "report": Job(("report", "out"), "probe"),
    "plot": Job(("plot", "out"), "probe"),
    "confirm": Job(("confirm", "out", *TRIAL), "probe"),
    "sample": Job(("sample", "digits", "--num", "8", "--steps", "2", "--out", "out")),
    "sample npz": Job(("sample", "digits", "--num", "24", "--steps", "2", "--format", "npz", "--out", "out")),
    "convert": Job(("convert", "out/model.safetensors", "--out", "out/converted.safetensors"), "train"),
    "inspect": Job(("inspect", "--data", "digits", "--out", "out")),
    "atlas": Job(("atlas", "digits", "--from-scratch", "--data", "digits", "--pair", "1:3", *SWEEP, "--out", "out")),
    "score": Job(("score", "out", "--data", "digits", "--num-test", "30", "--out", "out/scores"), "sample npz"),
    "compare": Job(("compare", "out", "other", "--out", "out/comparison"), "probe"),
    "quickstart": Job(("quickstart", "--out", "out")),
}

# Times, versions and paths.
_NOT_COMPARED = ("environment.json", "times.json", "forecast.json", "report.html", ".lock", "checksums.json")
_SPEED = "samples_per_s"


def start(name: str, folder: Path) -> Forked:
    """Starts a job in a folder, with figures that are written but not drawn, which would take most of the time."""
    drawn = name in ("train", "sample", "inspect")
    return Forked(JOBS[name].arguments, folder, work=None if drawn else _undrawn)


def _undrawn(arguments: Sequence[str]) -> None:
    from matplotlib.figure import Figure

    def blank(figure: Figure, file: IO[bytes], *, format: str, **_: object) -> None:
        file.write(b'<svg viewBox="0 0 1 1"/>' if format == "svg" else b"")

    Figure.savefig, Figure.draw_without_rendering = blank, lambda figure: None
    _APP(auto_envvar_prefix="LAYERPROBE")


class Undisturbed:
    """The folders that undisturbed jobs leave, each made when it is first asked for.

    Args:
        place: Folder for them.
    """

    def __init__(self, place: Path) -> None:
        global _APP
        from layerprobe.cli import main

        _APP = main.app
        self._place = place
        self._contents: dict[str, dict[str, str]] = {}
        self._seconds: dict[str, float] = {}

    def folder(self, name: str) -> Path:
        """Returns the folder of a finished job, in which its `out` is."""
        folder = self._place / name
        if name not in self._contents:
            self.prepare(name, folder)
            began = time.monotonic()
            outcome = start(name, folder).end(300)
            if outcome.kind != "ok":
                raise RuntimeError(f"undisturbed, {name} ended with {outcome}")
            self._seconds[name], self._contents[name] = time.monotonic() - began, contents(folder / "out")
        return folder

    def prepare(self, name: str, folder: Path) -> None:
        """Makes the folder in which a job starts."""
        before = JOBS[name].before
        folder.mkdir(parents=True, exist_ok=True)
        if before is not None:
            for place in ("out", *{"other"} & set(JOBS[name].arguments)):
                shutil.copytree(self.folder(before) / "out", folder / place, dirs_exist_ok=True)

    def seconds(self, name: str) -> float:
        """Returns the time that a job takes."""
        self.folder(name)
        return self._seconds[name]

    def compare(self, name: str, folder: Path, outcome: Outcome) -> Outcome:
        """Returns the outcome of the last of some tries of a job, or what its files differ in."""
        self.folder(name)
        whole, made = self._contents[name], contents(folder / "out")
        different = sorted(key for key in whole.keys() | made.keys() if whole.get(key) != made.get(key))
        if outcome.kind != "ok" or not different:
            return outcome
        return Outcome("CHANGED", outcome.code, f"different: {', '.join(different[:6])}", outcome.seconds)


_APP: Any = None


def contents(folder: Path) -> dict[str, str]:
    """Returns a hash of every file, of what does not depend on the time that it took."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in _NOT_COMPARED)
    return {str(file.relative_to(folder)): hashlib.sha256(_comparable(file)).hexdigest() for file in sorted(files)}


def _comparable(file: Path) -> bytes:
    raw = file.read_bytes()
    if file.name == "log.csv":
        rows = csv.DictReader(io.StringIO(raw.decode()))
        return repr([{key: value for key, value in row.items() if key != _SPEED} for row in rows]).encode()
    if file.name == "log.jsonl":  # A step that was repeated after a signal is there twice.
        steps = {step["step"]: step for step in map(json.loads, raw.splitlines())}
        return repr([{key: value for key, value in step.items() if key != _SPEED} for step in steps.values()]).encode()
    if file.suffix == ".pt":
        import torch

        return repr(_without_speed(torch.load(io.BytesIO(raw), weights_only=True))).encode()
    return raw


def _without_speed(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        data = value.contiguous().view(torch.uint8) if value.ndim else value.reshape(1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), hashlib.sha256(data.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: _without_speed(inner) for key, inner in value.items() if key != _SPEED}
    return [_without_speed(inner) for inner in value] if isinstance(value, (list, tuple)) else value
