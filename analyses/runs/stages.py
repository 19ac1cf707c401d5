"""The stages of a probing run: what each took, and what was forecast of it."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from layerprobe.records import read_record, typed, write_record

CONVENTION, MODEL_FEATURES, CONTROLS, EVIDENCE = "convention check", "reading the model", "controls", "few samples"
PROBES, SIMILARITY, PAIRS, FIGURES = "probes", "CKA", "pairs", "figures and report"
STAGES = (CONVENTION, MODEL_FEATURES, CONTROLS, EVIDENCE, PROBES, SIMILARITY, PAIRS, FIGURES)

TIMES, FORECAST = "times.json", "forecast.json"
_REMEDY = "delete it; it holds nothing but times"


@dataclass(frozen=True)
class Cost:
    """What a run costs, before it or after it.

    Attributes:
        seconds: Seconds of each stage, in order.
        memory_bytes: Peak memory of a process on the host.
        device_bytes: Peak memory of the device; None on a CPU.
        disk_bytes: Size of the run folder.
    """

    seconds: dict[str, float]
    memory_bytes: int
    device_bytes: int | None
    disk_bytes: int

    @property
    def total_s(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        rounded = {stage: round(seconds, 2) for stage, seconds in self.seconds.items()}
        return asdict(self) | {"seconds": rounded}


class _Times(TypedDict):
    seconds: dict[str, float]
    memory_bytes: int
    device_bytes: int | None


class StageClock:
    """Adds up the seconds of each stage in a file of the run, over all calls that worked on it.

    Args:
        path: Path of the record.
        writes: Whether this process writes it; of several processes the first one does.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        self._stage, self._began = "", 0.0

    def begin(self, stage: str, *, since: float | None = None) -> None:
        """Ends the stage before, if there is one, and begins another, now or at an earlier `time.perf_counter()`."""
        self.end()
        self._stage, self._began = stage, time.perf_counter() if since is None else since

    def end(self) -> None:
        """Ends the stage, and records its seconds and the peak memory so far."""
        stage, self._stage = self._stage, ""
        if not (stage and self._writes):
            return
        before: _Times = _read(self._path)
        seconds = before["seconds"] | {
            stage: before["seconds"].get(stage, 0.0) + round(time.perf_counter() - self._began, 3)
        }
        device = [peak for peak in (before["device_bytes"], peak_device_memory()) if peak is not None]
        memory = max(before["memory_bytes"], peak_memory())
        record = {"seconds": seconds, "memory_bytes": memory, "device_bytes": max(device, default=None)}
        write_record(self._path, record)


def cost_record(run: str | Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Returns what a run was expected to cost and what it took, as records of `Cost`; None for what is not recorded."""
    folder = Path(run)
    times, forecast = folder / TIMES, folder / FORECAST
    expected = read_record(forecast, typed(dict), remedy=_REMEDY) if forecast.is_file() else None
    if not times.is_file():
        return expected, None
    took = _read(times)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    seconds = {stage: took["seconds"][stage] for stage in STAGES if stage in took["seconds"]}
    return expected, Cost(seconds, took["memory_bytes"], took["device_bytes"], size).to_dict()


def peak_memory() -> int:
    """Returns the most memory that this process has had, in bytes; 0 where the system does not tell."""
    if os.name != "posix":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_device_memory() -> int | None:
    """Returns the most memory that this process has had on its GPU, in bytes; None without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _read(path: Path) -> _Times:
    nothing = _Times(seconds={}, memory_bytes=0, device_bytes=None)
    return read_record(path, typed(_Times), remedy=_REMEDY) if path.is_file() else nothing
