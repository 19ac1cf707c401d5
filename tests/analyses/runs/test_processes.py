"""Several processes make the run that one makes, byte for byte, whatever happened before."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from started import Started
from tiny import tiny_sit, tiny_splits

from layerprobe.analyses.runs.folder import RunPlan
from layerprobe.analyses.runs.probe import measure_run
from layerprobe.analyses.selection import Selection
from layerprobe.checkpoints.source import CheckpointSource
from layerprobe.data.sources import DataSource
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.files import IN_MEMORY

# Twelve shards, so that each process has some in every store; two draws and tokens, so that everything is measured.
PLAN = RunPlan(
    CheckpointSource(f"{IN_MEMORY}a SiT"),
    DataSource(f"{IN_MEMORY}samples"),
    ExtractionPlan(noise_levels=(0.2, 0.6), draws=2, shard_size=5, token_samples=4),
)


def measured(folder: Path, seed: int = 0) -> Selection:
    """A run of all stages but the figures; a seed for each process, or one for all."""
    splits = tiny_splits(60, shape=(1, 8, 8), seed=seed)
    return measure_run(PLAN, folder, opened=(tiny_sit(shape=(1, 8, 8)), splits), trust_convention=True, device="cpu")


def measured_with_other_data(folder: Path) -> None:
    measured(folder, seed=int(os.environ["RANK"]))


def killed(folder: Path) -> None:
    """A run in which the second process is killed in its third shard."""
    if os.environ["RANK"] == "1":
        from layerprobe.extraction import forward

        def write(path: Path, tensors: Any, whole: Any = forward.write_tensors) -> None:
            write.calls += 1  # type: ignore[attr-defined]
            if write.calls == 3:  # type: ignore[attr-defined]
                os.kill(os.getpid(), 9)
            whole(path, tensors)

        write.calls = 0  # type: ignore[attr-defined]
        forward.write_tensors = write
    measured(folder)


def contents(folder: Path) -> dict[str, Any]:
    """The files of a run, without what differs between any two: the record of when and where it began."""
    files: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "environment.json"
    }
    record = json.loads(files.pop("checksums.json"))["files"]
    del record["environment.json"]
    return files | {"checksums of files": record}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Selection]:
    folder = tmp_path_factory.mktemp("one") / "run"
    selection = measured(folder)
    return contents(folder), selection


def test_two_processes_make_the_run_of_one(one: tuple[dict[str, Any], Selection], tmp_path: Path) -> None:
    assert Started(tmp_path, measured, tmp_path / "run").results() == [one[1]] * 2
    found = contents(tmp_path / "run")
    assert found.keys() == one[0].keys()
    assert [name for name, content in found.items() if content != one[0][name]] == []


def test_three_processes_continue_what_two_began(one: tuple[dict[str, Any], Selection], tmp_path: Path) -> None:
    started = Started(tmp_path, killed, tmp_path / "run")
    assert started.exit_codes() == [2, -9]
    assert re.fullmatch(
        r"ConnectionError: another process was killed, or its machine is unreachable; repeat the command to continue "
        r"from what is finished\n",
        started.stderr_files[0].read_text().split("layerprobe: ")[-1],
    )
    shards = sorted((tmp_path / "run" / "features" / "model").glob("shard-*"))
    before = {path: path.stat().st_mtime_ns for path in shards}
    assert 2 < len(before) < 12
    assert Started(tmp_path, measured, tmp_path / "run", num=3).results() == [one[1]] * 3
    assert contents(tmp_path / "run") == one[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before  # kept


def test_processes_with_other_data_are_refused(tmp_path: Path) -> None:
    started = Started(tmp_path, measured_with_other_data, tmp_path / "run")
    assert started.exit_codes() == [1, 2]
    assert (
        "ValueError: process 1 has another model or other data than the first one (different: data.test, data.train, "
        "data.validation); give all processes the same files\n"
    ) in started.stderr_files[1].read_text()
