"""The stages of a job: what each took, and what was forecast of it."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from layerprobe.records import read_record, typed, write_record

ENCODING = "encoding images"
CONVENTION, MODEL_FEATURES, CONTROLS, EVIDENCE = "convention check", "reading the model", "controls", "few samples"
PROBES, SIMILARITY, PAIRS = "probes", "CKA", "pairs"
FIGURES = "figures and report"
HELD_OUT, CURVES, CHOICES = "held-out loss", "measuring layers", "choosing pairs"
SAMPLING, DECODING, FEATURES, SCORES = "sampling", "decoding", "features", "scores"

EXTRACTION = (ENCODING, CONVENTION, MODEL_FEATURES, CONTROLS, EVIDENCE)
STAGES = (*EXTRACTION, PROBES, SIMILARITY, PAIRS, FIGURES)  # of a probing run
# The stages that several processes divide evenly; the first process does the others while the rest wait. Whole arms,
# branches, parts of samples and batches of features go to one process each, see `largest_share`.
SHARED = frozenset((*EXTRACTION, PROBES, SIMILARITY, PAIRS))

LONG_S = 60.0  # seconds from which on a job tells before it begins what it will cost
TIMES, FORECAST = "times.json", "forecast.json"
_REMEDY = "delete it; it holds nothing but times"


@dataclass(frozen=True)
class Cost:
    """What a job costs, before it or after it.

    Attributes:
        seconds: Seconds of each stage, in order.
        memory_bytes: Peak memory of a process on the host.
        device_bytes: Peak memory of the device; None on a CPU.
        disk_bytes: Size of the job's folder when it was largest.
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
        """Returns the fields and the total as JSON values."""
        rounded = {stage: round(seconds, 2) for stage, seconds in self.seconds.items()}
        return asdict(self) | {"seconds": rounded, "total_s": round(self.total_s, 1)}


def shared_out(seconds: Mapping[str, float], processes: int) -> dict[str, float]:
    """Returns the seconds of each stage when so many processes share those that can be shared, a device each."""
    return {stage: value / (processes if stage in SHARED else 1) for stage, value in seconds.items()}


def largest_share(items: int, processes: int) -> float:
    """Returns the share of equal items that the process with the most of them has; 0 of none."""
    return math.ceil(items / processes) / items if items else 0.0


class _Times(TypedDict):
    seconds: dict[str, float]
    memory_bytes: int
    device_bytes: int | None
    disk_bytes: NotRequired[int]


class StageClock:
    """Adds up the seconds of each stage in a file of the job's folder, over all calls that worked on it.

    Args:
        folder: Folder of the job.

    Attributes:
        writes: Whether they are written; set once the folder is the job's own, by the process that writes it.
    """

    def __init__(self, folder: str | Path, *, writes: bool = False) -> None:
        self.writes, self._anew = writes, False
        self._folder = Path(folder)
        self._stage, self._began = "", 0.0
        self._seconds: dict[str, float] = {}
        self._forecast: Cost | None = None

    def begin_anew(self, stages: Collection[str]) -> None:
        """Replaces what lies in the folder, of an earlier job of these stages; if it has others too, it is kept."""
        self._anew = set(_read(self._folder / TIMES)["seconds"]) <= set(stages)

    def foretell(
        self, stage: str, rough_s: Callable[[], float], forecast: Callable[[], Cost], tell: Callable[[Cost], None]
    ) -> None:
        """Tells what a job will cost if it has not begun and takes long, and keeps it beside what it will take.

        Args:
            stage: A stage that has taken no time yet if the job has not begun.
            rough_s: Function that quickly returns about the seconds of the longest stage, so that short jobs are spared
                the forecast.
            forecast: Function that returns the cost.
            tell: Called with the cost.
        """
        begun = not self._anew and stage in _read(self._folder / TIMES)["seconds"]
        if begun or rough_s() < LONG_S / 3:
            return
        cost = forecast()
        if cost.total_s >= LONG_S:
            self._forecast = cost
            tell(cost)

    def begin_own(self, stage: str) -> None:
        """Begins a stage of a folder that is the job's own from now on."""
        self.writes = True
        self.begin(stage)

    def begin(self, stage: str) -> None:
        """Ends the stage before, if there is one, and begins another."""
        self.end()
        self._stage, self._began = stage, time.perf_counter()

    def end(self) -> None:
        """Ends the stage; writes its seconds, the peak memory and the size of the folder so far."""
        if self._stage:
            spent = time.perf_counter() - self._began
            self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + spent
        self._stage = ""
        if self.writes and self._seconds:
            self._write()

    def _write(self) -> None:
        if self._anew:
            for name in (TIMES, FORECAST):
                (self._folder / name).unlink(missing_ok=True)
            self._anew = False
        if self._forecast is not None:
            write_record(self._folder / FORECAST, _joined(self._folder, self._forecast).to_dict())
            self._forecast = None
        before = _read(self._folder / TIMES)
        seconds = dict(before["seconds"])
        for stage, spent in self._seconds.items():
            seconds[stage] = round(seconds.get(stage, 0.0) + spent, 3)
        device = [peak for peak in (before["device_bytes"], peak_device_memory()) if peak is not None]
        record = _Times(
            seconds=seconds,
            memory_bytes=max(before["memory_bytes"], peak_memory()),
            device_bytes=max(device, default=None),
            disk_bytes=max(before.get("disk_bytes", 0), _size(self._folder)),
        )
        write_record(self._folder / TIMES, record)
        self._seconds = {}


def cost_record(folder: str | Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Returns what a job was expected to cost and what it took, as records of `Cost`; None for what is not recorded."""
    times, forecast = Path(folder) / TIMES, Path(folder) / FORECAST
    expected = read_record(forecast, typed(dict), remedy=_REMEDY) if forecast.is_file() else None
    return expected, Cost(**{"disk_bytes": 0} | _read(times)).to_dict() if times.is_file() else None


def _joined(folder: Path, forecast: Cost) -> Cost:
    """The forecast with what an earlier job in the folder was expected to cost, or took if it was not forecast."""
    expected, took = cost_record(folder)
    before = expected or took
    if before is None:
        return forecast
    device = [peak for peak in (before["device_bytes"], forecast.device_bytes) if peak is not None]
    return Cost(
        before["seconds"] | forecast.seconds,
        max(before["memory_bytes"], forecast.memory_bytes),
        max(device, default=None),
        max(before["disk_bytes"], forecast.disk_bytes),
    )


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


def _size(folder: Path) -> int:
    # Files of a temporary name vanish between being listed and being asked.
    files = (file for file in folder.rglob("*") if file.suffix != ".partial" and file.is_file())
    return sum(file.stat().st_size for file in files)


def _read(path: Path) -> _Times:
    nothing = _Times(seconds={}, memory_bytes=0, device_bytes=None)
    return read_record(path, typed(_Times), remedy=_REMEDY) if path.is_file() else nothing
