"""Files appear whole or not at all, and a folder belongs to one run."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import random
import re
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
    error_place,
    holder,
    holding,
    hub_error_line,
    import_optional,
    is_hub_name,
    locked,
    one_line,
    os_error_line,
    similar_path,
    write_text,
)

RECORD = {"plan": {"steps": 3, "levels": (0.1, 0.5)}, "data": "abc"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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


@pytest.mark.parametrize(
    ("message", "line"), [("one\ntwo", "one"), ("  one  \n", "one"), ("x" * 200, "x" * 160), ("", "ValueError")]
)
def test_one_line_is_the_start_of_the_message_or_the_type(message: str, line: str) -> None:
    assert one_line(ValueError(message)) == line


def test_a_missing_optional_module_is_reported_with_its_extra() -> None:
    assert import_optional("json", "audio") is json
    with pytest.raises(ModuleNotFoundError, match=r"^nonsense is not installed; install layerprobe\[audio\]$"):
        import_optional("nonsense", "audio")


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

    seen = r"a could not be written: the disk is full \(.* free; this file of more than 2 MB did not fit\); free some"
    with pytest.raises(DiskFull, match=seen):
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
        with contextlib.suppress(OSError):
            (disk / "filler").write_bytes(bytes(2_000_000))
        with (
            pytest.raises(DiskFull, match=r"\.lock could not be written: the disk is full \(0 MB free\)"),
            locked(disk),
        ):
            pass
        assert (disk / "a").read_bytes() == b"old"


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
        write_text(tmp_path / "a", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    with locked(tmp_path, wait=True):
        pass


def test_a_job_holds_the_folder_that_it_is_given(tmp_path: Path) -> None:
    @holding("run")
    def job(run: str | Path, *, then: str = "") -> tuple[bool, str]:
        # A second process would be told; this one is not its own rival.
        return (Path(run) / ".lock").is_file(), then + holder(Path(run))

    assert job(tmp_path / "new" / "run", then="x") == (True, "x")
    assert not (tmp_path / "new").exists()  # nothing came into it
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        job(run=tmp_path / "file")


WORKER = """
import sys, time
from pathlib import Path
from layerprobe.files import locked

folder = Path(sys.argv[1])
while True:
    with locked(folder, wait=True):
        with (folder / "log").open("a") as log:
            log.write(f"begin {sys.argv[2]}\\n")
            log.flush()
            time.sleep(0.002)
            log.write(f"end {sys.argv[2]}\\n")
"""


def test_processes_that_are_killed_at_random_never_hold_a_folder_together(tmp_path: Path) -> None:
    rng = random.Random(0)
    (tmp_path / "log").touch()
    start = [sys.executable, "-c", WORKER, str(tmp_path)]
    workers = [subprocess.Popen([*start, str(i)]) for i in range(3)]
    for i in range(3, 9):
        time.sleep(0.15 + 0.1 * rng.random())
        victim = workers.pop(0)
        victim.kill()
        victim.wait()
        workers.append(subprocess.Popen([*start, str(i)]))
    for worker in workers:
        worker.kill()
        worker.wait()
    with locked(tmp_path):  # What the dead have left is no lock.
        pass
    inside, turns = None, 0
    for line in (tmp_path / "log").read_text().splitlines():
        verb, who = line.split()
        if verb == "begin":  # Whoever was inside has been killed.
            inside, turns = who, turns + 1
        else:
            assert who == inside
    assert turns > 20


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


def answer(status: int, code: str = "", message: str = "") -> Any:
    """Raises what the Hub's own client raises for an answer of the Hub."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import hf_raise_for_status

    http = importlib.import_module(HTTPError.__module__.partition(".")[0])  # the library that the client asks with
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    request = http.Request("GET", "https://hub.example/api/models/us/tiny")
    hf_raise_for_status(http.Response(status, headers=headers, request=request))


def download(**settings: Any) -> Any:
    """Downloads by the Hub's own client from an address at which nothing answers."""
    import huggingface_hub

    huggingface_hub.snapshot_download("us/tiny", endpoint="http://127.0.0.1:9", etag_timeout=0.2, **settings)


HUB_FAILURES = {
    "gated": (lambda: answer(403, "GatedRepo"), "us/tiny is gated on the Hub; accept its terms on its page there, "),
    "missing": (lambda: answer(404, "RepoNotFound"), "the Hub has no us/tiny, or it is private; check the spelling"),
    "no token": (lambda: answer(401), "the Hub has no us/tiny, or it is private; check the spelling, or run `hf auth"),
    "bad token": (
        lambda: answer(401, message="Invalid credentials in Authorization header"),
        "the Hub does not take your token; run `hf auth login` again, or correct HF_TOKEN",
    ),
    "weak token": (lambda: answer(403), "your token may not read us/tiny; make one with read access"),
    "too many": (lambda: answer(429), "the Hub has had too many requests from you; wait some minutes"),
    "broken": (lambda: answer(503), "the Hub fails at the moment; try again later"),
    "no network": (download, "the Hub cannot be reached for us/tiny; check the connection and the proxy"),
    "cache only": (lambda: download(local_files_only=True), "us/tiny is not in the Hub's cache; download it"),
    "another": (lambda: answer(418), r"the Hub did not give us/tiny \(Client error '418"),
}


@pytest.mark.parametrize(("fail", "line"), HUB_FAILURES.values(), ids=HUB_FAILURES)
def test_a_failure_of_the_hub_is_told_in_own_words(fail: Any, line: str, tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(Exception) as raised:  # noqa: PT011  of many classes without a common one
        fail()
    assert re.match(line, hub_error_line("us/tiny", raised.value))


def test_a_hub_that_is_switched_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        try:
            raise OfflineModeIsEnabled("Cannot reach https://hub.example: offline mode is enabled.")
        except OSError as error:
            raise ValueError("an error of another library") from error
    except ValueError as error:
        line = hub_error_line("us/tiny", error)
    assert line.startswith("the Hub is switched off, and us/tiny is not in its cache; unset HF_HUB_OFFLINE")


def test_a_name_on_the_hub_is_no_mistyped_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    assert is_hub_name("someone/pictures")
    for path in ("images/cats", "pictures", "./someone/pictures", "../a", "/no/such", "a/b/c", "run/model.pt"):
        assert not is_hub_name(path)


def test_what_has_a_similar_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "model_final.safetensors").touch()
    (tmp_path / "hash.py").touch()
    assert similar_path("runs/Model_fnal.safetensors") == "; did you mean runs/model_final.safetensors?"
    assert similar_path("run/model_final.safetensors") == "; did you mean runs?"
    assert similar_path("digts") == "; did you mean digits?"
    assert similar_path("a.npy") == similar_path("runs/digts") == similar_path("/") == ""
