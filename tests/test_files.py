"""Files appear whole or not at all, and a folder belongs to one run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerprobe.files import (
    DiskFull,
    atomic_write,
    check_same,
    claim,
    differences,
    error_place,
    import_optional,
    locked,
    one_line,
    os_error_line,
    reserve,
    write_text,
)

RECORD = {"plan": {"steps": 3, "levels": (0.1, 0.5)}, "data": "abc"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_result_is_replaced_by_the_same_one_only(tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    check_same(path, RECORD, what="samples")
    write_text(path, json.dumps(RECORD | {"scores": [1, 2]}))
    check_same(path, RECORD, what="samples")
    other = RECORD | {"plan": {"steps": 4, "levels": (0.1, 0.5)}}
    with pytest.raises(ValueError, match=r"holds samples of another command \(different: plan.steps\); choose another"):
        check_same(path, other, what="samples")


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    for text in ("first, Fréchet", "second"):
        write_text(place, text)
        assert place.read_text(encoding="utf-8") == text
    assert list(contents(tmp_path)) == ["a.json"]


def test_a_file_has_the_permissions_of_its_neighbors(tmp_path: Path) -> None:
    (tmp_path / "neighbor").touch()
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("x")
        partial.chmod(0o600)  # as safetensors does
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "neighbor").stat().st_mode


def test_two_processes_may_write_one_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a") as one, atomic_write(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"  # which finished last
    assert list(contents(tmp_path)) == ["a"]


@pytest.mark.parametrize("broken", ["write_text", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    place = tmp_path / "a.json"
    write_text(place, "old")

    def interrupted(path: Path, text: str, **options: Any) -> int:
        with path.open("w") as file:
            file.write(text[:2])
        raise KeyboardInterrupt

    def refused(*paths: object) -> None:
        raise KeyboardInterrupt

    if broken == "write_text":
        monkeypatch.setattr(Path, "write_text", interrupted)
    else:
        monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(KeyboardInterrupt):
        write_text(place, "new")
    assert list(contents(tmp_path).items()) == [("a.json", b"old")]


def test_a_folder_is_claimed_once_and_again_by_the_same_run(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    claim(folder, "plan.json", RECORD, what="features")
    before = contents(folder)
    assert json.loads(before["plan.json"]) == {"plan": {"steps": 3, "levels": [0.1, 0.5]}, "data": "abc"}
    (folder / "shard").write_text("work")
    stamp = (folder / "plan.json").stat().st_mtime_ns
    claim(folder, "plan.json", RECORD, what="features")
    assert (folder / "plan.json").stat().st_mtime_ns == stamp
    assert contents(folder) == before | {"shard": b"work"}


def test_another_run_is_refused_with_the_differences(tmp_path: Path) -> None:
    claim(tmp_path / "run", "plan.json", RECORD, what="features")
    before = contents(tmp_path)
    other = {"plan": {"steps": 4, "levels": (0.1, 0.5), "seed": 1}, "data": "abd"}
    with pytest.raises(ValueError, match=r"holds features of another run \(different: data, plan.seed, plan.steps\)"):
        claim(tmp_path / "run", "plan.json", other, what="features")
    assert contents(tmp_path) == before


def test_at_most_four_differences_are_named(tmp_path: Path) -> None:
    claim(tmp_path, "plan.json", dict.fromkeys("abcdef", 1), what="features")
    with pytest.raises(ValueError, match=r"\(different: a, b, c, d\); choose another --out$"):
        claim(tmp_path, "plan.json", dict.fromkeys("abcdef", 2), what="features")


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "sub/file"])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=rf"is not empty and contains other files \({name.split('/')[0]}\); choose another"
    ):
        claim(tmp_path, "plan.json", RECORD, what="features")
    assert contents(tmp_path) == before


def test_the_remains_of_an_interrupted_claim_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "plan.json.partial").write_text("{")
    claim(tmp_path, "plan.json", RECORD, what="features")
    assert json.loads((tmp_path / "plan.json").read_text())["data"] == "abc"


def test_two_processes_may_claim_a_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Path.iterdir

    def slowly(folder: Path) -> list[Path]:
        entries = list(listed(folder))
        write_text(folder / "plan.json", json.dumps(RECORD))
        return entries

    monkeypatch.setattr(Path, "iterdir", slowly)
    claim(tmp_path, "plan.json", RECORD, what="features")
    with pytest.raises(ValueError, match="of another run"):
        claim(tmp_path, "plan.json", {"data": "other"}, what="features")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="run is a file, not a folder; choose another --out"):
        claim(tmp_path / "run", "plan.json", RECORD, what="features")
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(("content", "message"), [("{", "plan.json is damaged"), ("[1]", "different: everything")])
def test_an_invalid_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        claim(tmp_path, "plan.json", RECORD, what="features")
    assert "\n" not in str(refused.value)
    assert (tmp_path / "plan.json").read_text() == content


@pytest.mark.parametrize(
    ("message", "line"), [("one\ntwo", "one"), ("  one  \n", "one"), ("x" * 200, "x" * 160), ("", "ValueError")]
)
def test_one_line_is_the_start_of_the_message_or_the_type(message: str, line: str) -> None:
    assert one_line(ValueError(message)) == line


def test_a_missing_optional_module_is_reported_with_its_extra() -> None:
    assert import_optional("json", "audio") is json
    with pytest.raises(ModuleNotFoundError, match=r"^nonsense is not installed; install layerprobe\[audio\]$"):
        import_optional("nonsense", "audio")


def test_differences_are_dotted_keys() -> None:
    before = {"a": {"b": [1, 2], "c": 1}, "d": None}
    assert differences(before, {"a": {"b": [1, 2], "c": 1}, "d": None}) == []
    assert differences(before, {"a": {"b": [2, 1], "c": 1}, "e": 0}) == ["a.b", "e"]
    assert differences(before, {"a": 5}) == ["a"]


# Writes the same file over and over, slowly, as one of two processes that share a folder.
WRITER = """
import sys, time
from pathlib import Path
from layerprobe.files import atomic_write

place, letter = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
while True:
    with atomic_write(place) as partial, partial.open("w") as file:
        for _ in range(64):
            file.write(letter * 1000)
            file.flush()
"""


def test_a_killed_writer_leaves_no_mixed_file_and_its_remains_go(tmp_path: Path) -> None:
    place = tmp_path / "shard"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(place), letter], stdout=subprocess.PIPE, text=True)
        for letter in "ab"
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            time.sleep(0.1)
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            text = place.read_text()
            assert text in ("a" * 64_000, "b" * 64_000)
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    remains = list(tmp_path.glob("*.partial"))
    other = tmp_path / "shard.elsewhere-1-0123abcd.partial"  # of another machine, where the process may live
    other.write_text("x")
    write_text(tmp_path / "another", "x")
    assert not any(path.exists() for path in remains)
    assert other.exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as of safetensors
    ],
)
def test_a_full_disk_is_told_in_one_line_and_the_unfinished_file_is_removed(tmp_path: Path, error: Exception) -> None:
    write_text(tmp_path / "a", "old")

    def failed() -> None:
        with atomic_write(tmp_path / "a") as partial:
            partial.write_bytes(b"x" * 2_000_000)
            raise error

    with pytest.raises(DiskFull, match=r"a could not be written: the disk is full \(.* free, more than 2 MB needed\)"):
        failed()
    assert contents(tmp_path) == {"a": b"old"}


def test_an_error_without_a_number_counts_as_a_full_disk_where_nothing_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed() -> None:
        with atomic_write(tmp_path / "a"):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        failed()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(DiskFull, match="0 MB free"):
        failed()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a disk in memory cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_really_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        write_text(disk / "a", "old")
        with pytest.raises(DiskFull), atomic_write(disk / "a") as partial:
            partial.write_bytes(bytes(2_000_000))
        with (disk / "sparse").open("wb") as file:
            file.truncate(2_000_000)
        with pytest.raises(DiskFull, match=r"sparse could not be written.*2 MB needed"):
            reserve(disk / "sparse")
        assert contents(disk) == {"a": b"old"}


def test_reserving_keeps_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    reserve(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"content"


def test_a_durable_write_is_synced_before_and_after_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    synced, replaced = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("sync"), synced(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), replaced(old, new)))
    write_text(tmp_path / "a", "x")
    assert calls == ["replace"]
    write_text(tmp_path / "a", "x", durable=True)
    assert calls == ["replace", "sync", "replace", "sync"]


HOLDER = """
import sys, time
from pathlib import Path
from layerprobe.files import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_names_its_holder_until_that_process_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=rf"is in use by process {holder.pid} on .* since .*; wait until it ends"),
            locked(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with locked(tmp_path), locked(tmp_path):  # again within the same process
        claim(tmp_path, "plan.json", RECORD, what="features")
    with locked(tmp_path, wait=True):
        pass


def test_the_place_of_an_error_is_in_the_users_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(code: str, file: Path) -> str:
        try:
            exec(compile(code, str(file), "exec"), {})
        except Exception as error:
            error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without this test
            return error_place(error)
        return "nothing was raised"

    own, torch = tmp_path / "net.py", "import torch\n"
    assert place(f"{torch}torch.nn.Linear(2, 2)(torch.ones(3))", own) == f"{own}:2"
    assert place("import json\n\njson.loads('{')", own) == f"{own}:3"
    monkeypatch.chdir(tmp_path)
    assert place("1 / 0", own) == "net.py:1"
    assert place("def f(:", own) == "net.py:1"
    installed = Path(np.__file__)
    assert place("1 / 0", installed).endswith("numpy/__init__.py:1")
    assert place("1 / 0", Path(json.__file__)) == ""


def test_errors_of_the_system_name_the_file_and_a_remedy() -> None:
    line = os_error_line(OSError(errno.EROFS, "Read-only file system", "out/plan.json"))
    assert line == "out/plan.json: Read-only file system; make it accessible, or choose another folder as --out"
    assert os_error_line(OSError(errno.ENOSPC, "No space left on device")).endswith(
        "; free some space and repeat the command"
    )
    assert os_error_line(FileNotFoundError("there is no x; pass y")) == "there is no x; pass y"
