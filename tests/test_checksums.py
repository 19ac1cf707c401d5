"""Damage to a file of a run is noticed when the file is read, and an interrupted write is no damage."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from layerprobe import __version__, checksums
from layerprobe.checksums import CHECKSUMS, Damaged, check, is_damaged, recorded_version, write_recorded_text


def written(folder: Path, *names: str) -> list[Path]:
    for name in names:
        write_recorded_text(folder / name, f"content of {name}\n")
    return [folder / name for name in names]


def test_every_kind_of_damage_is_noticed(tmp_path: Path) -> None:
    a, b = written(tmp_path, "a", "b")
    check(a, "make it again")
    content = a.read_bytes()
    for damage in (b"", content[:-1], bytes(len(content)), bytes([content[0] ^ 1]) + content[1:], b.read_bytes()):
        a.write_bytes(damage)
        with pytest.raises(
            Damaged, match=r"a is damaged \(its content is not what was written there\); make it again$"
        ):
            check(a, "make it again")
    a.write_bytes(content)
    assert not is_damaged(a) and not is_damaged(b) and not is_damaged(tmp_path / "missing")
    assert recorded_version(tmp_path) == __version__ and recorded_version(tmp_path / "elsewhere") == ""


@pytest.mark.parametrize("killed_at", ["record", "rename"])
def test_a_write_that_is_killed_leaves_an_undamaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    (a,) = written(tmp_path, "a")
    replace, calls = os.replace, []

    def kill(source: Path, target: Path) -> None:
        calls.append(Path(target).name)
        if calls[-1] == (CHECKSUMS if killed_at == "record" else "a"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            write_recorded_text(a, "new\n")
    assert a.read_text() == "content of a\n" and not is_damaged(a)
    write_recorded_text(a, "new\n")
    assert not is_damaged(a)
    a.write_text("content of a\n")
    assert is_damaged(a)  # The old content counts only until the new one is there.


def test_files_without_checksums_are_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_told", [])
    (tmp_path / "a").write_text("old")
    with caplog.at_level(logging.WARNING):
        check(tmp_path / "a", "")
        check(tmp_path / "a", "")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} has files without a checksum, so damage to them may go unnoticed"
    ]


@pytest.mark.parametrize("content", ["{", "[]", "{}", "[" * 100_000])
def test_damaged_checksums_are_told_from_damaged_files(tmp_path: Path, content: str) -> None:
    (a,) = written(tmp_path, "a")
    record = json.loads((tmp_path / CHECKSUMS).read_text())
    record["files"]["a"] = ["0"]
    for text in (content, json.dumps(record)):
        (tmp_path / CHECKSUMS).write_text(text)
        with pytest.raises(Damaged, match=r"checksums.json is damaged \(.*\); delete it to go on"):
            check(a, "")
