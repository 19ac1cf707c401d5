"""Jobs on disks that are full, and on folders that cannot be written to; needs root, to mount small disks in memory.

On a full disk a job must end with exit code 1 and one line with path and free space, and leave no partial file. Once
there is space, the same command must end with the same files.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs import JOBS, Undisturbed, start
from outcome import FAULTS, LIMIT_S, Outcome, Result

FREE_KB = (4, 64, 256, 24, 128, 512, 1024)


def run(count: int, seed: int) -> Iterator[Result]:
    """Runs every job on this many small disks, of which there are seven, and on one that is read only."""
    with tempfile.TemporaryDirectory() as place:
        undisturbed = Undisturbed(Path(place, "whole"))
        for name in JOBS:
            for free_kb in FREE_KB[:count]:
                with _disk(name, Path(place, "disk"), undisturbed) as folder:
                    yield Result(
                        "full", f"{name}, {free_kb} KB free", _on_full_disk(name, folder, free_kb, undisturbed)
                    )
            with _disk(name, Path(place, "disk"), undisturbed) as folder:
                _mount(folder, "remount", "ro")
                yield Result("read only", name, _on_readonly_disk(name, folder))


@contextmanager
def _disk(name: str, folder: Path, undisturbed: Undisturbed) -> Iterator[Path]:
    """A disk on which a job can start."""
    folder.mkdir(exist_ok=True)
    _mount(folder, "size=500m")
    try:
        (folder / "out").mkdir()
        undisturbed.prepare(name, folder)
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True)


def _on_full_disk(name: str, folder: Path, free_kb: int, undisturbed: Undisturbed) -> Outcome:
    limit_s = LIMIT_S + undisturbed.seconds(name)
    _mount(folder, "remount", f"size={shutil.disk_usage(folder).used // 1024 + free_kb}k")
    first = start(name, folder).end(limit_s)
    partial = [str(file) for file in folder.rglob("*.partial")]
    if first.kind not in ("ok", "failed"):
        return first if first.kind in FAULTS else _wrong(first, f"{first.kind}: {first.text}")
    if first.kind == "failed" and ("free" not in first.text or "out" not in first.text):
        return _wrong(first, f"no path or remedy: {first.text}")
    if partial:
        return _wrong(first, f"left {partial[0]}")
    _mount(folder, "remount", "size=500m")
    again = undisturbed.compare(name, folder, start(name, folder).end(limit_s))
    if again.kind == "ok":
        return first
    return again if again.kind in FAULTS else _wrong(again, f"again: {again.text}")


def _on_readonly_disk(name: str, folder: Path) -> Outcome:
    outcome = start(name, folder).end(LIMIT_S)
    named = "out" in outcome.text and ";" in outcome.text
    if outcome.kind in FAULTS or (outcome.kind in ("refused", "failed") and named):
        return outcome
    return _wrong(outcome, f"{outcome.kind}: {outcome.text}")


def _wrong(outcome: Outcome, text: str) -> Outcome:
    return Outcome("WRONG", outcome.code, text, outcome.seconds)
