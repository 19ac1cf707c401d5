"""Only regular files below the folders of the data are read, within bounds, and headers say what follows."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerprobe.data import contents
from layerprobe.data.contents import (
    check_file,
    check_whole_arrow,
    folders_of,
    load_npy_file,
    npy_array,
    read_text,
    with_content,
)


def npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(shape: object, dtype: str = "<f4", *, body: bytes = bytes(64), version: int = 1) -> bytes:
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + body


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in.bin").write_bytes(b"in")
    (tmp_path / "out.bin").write_bytes(b"out")
    return tmp_path / "data"


def test_files_below_the_folder_are_read_and_no_others(data: Path) -> None:
    folders = folders_of(data)
    assert with_content("in.bin", folders) == {"bytes": b"in", "path": "in.bin"}
    (data / "link").symlink_to("in.bin")
    assert with_content({"bytes": None, "path": str(data / "link")}, folders)["bytes"] == b"in"
    assert with_content([{"bytes": None, "path": "in.bin"}, {"bytes": b"x", "path": "/etc/passwd"}], folders) == [
        {"bytes": b"in", "path": "in.bin"},
        {"bytes": b"x", "path": "/etc/passwd"},
    ]
    assert with_content(b"x", folders) == b"x"
    (data / "away").symlink_to("../out.bin")
    (data / "folder").symlink_to("..")
    for path in ("../out.bin", str(data.parent / "out.bin"), "away", "folder/out.bin", "/dev/zero", "/etc/passwd"):
        with pytest.raises(ValueError, match=r"leads out of the folder of the data; .*--data-root"):
            with_content(path, folders)
        if path.endswith("out.bin") or path == "away":
            assert with_content(path, folders_of(data, data.parent))["bytes"] == b"out"


def test_a_snapshot_of_the_hub_links_to_the_blobs_beside_it(tmp_path: Path) -> None:
    snapshot, blob = tmp_path / "snapshots" / "abc", tmp_path / "blobs" / "0123"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_bytes(b"x")
    (snapshot / "train.parquet").symlink_to("../../blobs/0123")
    assert check_file(snapshot / "train.parquet", folders_of(snapshot / "sub" / "..")) == blob


def test_what_is_no_file_or_too_large_is_refused_before_it_is_read(data: Path) -> None:
    os.mkfifo(data / "pipe")
    for name, message in (("pipe", "pipe is a pipe, not a file; remove it"), (".", "is a folder, not a file")):
        with pytest.raises(ValueError, match=message):
            with_content(name, folders_of(data))
    with pytest.raises(ValueError, match="zero is a device, not a file"):
        check_file(Path("/dev/zero"), (Path("/dev"),))
    with (data / "huge").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"huge has 1\.02e\+03 GiB, more than 2; remove it"):
        with_content("huge", folders_of(data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header((10**12, 3)), "its header says float32 of shape .*, 12000000000000 bytes, but 64 bytes follow"),
        (header((2, 2)), "16 bytes, but 64 bytes follow"),
        (header((-4, -4)), "64 bytes follow"),
        (header((4, 4), version=2)[:-1], "64 bytes, but 63 bytes follow"),
        (header((4, 4), "|O"), "it contains Python objects, which are not read"),
        (header((4.0, 4)), "it is not a .npy file with a valid header"),
        (header((4, 4), "<q77"), "it is not a .npy file with a valid header"),
        (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000, "it is not a .npy file with a valid header"),
        (b"\x93NUMPY\x03\x00", "it is not a .npy file with a valid header"),
        (b"\x93NUMPY", "it is not a .npy file with a valid header"),
        (b"PK\x03\x04", "it is not a complete .npz file"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        npy_array(content)
    (tmp_path / "x.npy").write_bytes(content)
    if content[:2] != b"PK":
        with pytest.raises(ValueError, match=message):
            load_npy_file(tmp_path / "x.npy", mmap=True)


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_those_of_numpy(tmp_path: Path, order: Any) -> None:
    array = np.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), order=order)
    (tmp_path / "x.npy").write_bytes(npy(array))
    for mmap in (False, True):
        assert np.array_equal(load_npy_file(tmp_path / "x.npy", mmap=mmap), array)
    np.savez_compressed(tmp_path / "x.npz", motion=array)
    assert np.array_equal(npy_array((tmp_path / "x.npz").read_bytes()), array)
    (tmp_path / "empty.npy").write_bytes(npy(np.zeros((0, 3))))
    assert load_npy_file(tmp_path / "empty.npy", mmap=True).shape == (0, 3)


def test_an_archive_of_one_bounded_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "two.npz", a=np.ones(3), b=np.ones(3))
    with pytest.raises(ValueError, match=r"it contains 2 arrays \(a, b\); keep one per file"):
        npy_array((tmp_path / "two.npz").read_bytes())
    monkeypatch.setattr(contents, "MAX_ITEM_BYTES", 1000)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy(np.zeros(10**5)))
    with pytest.raises(ValueError, match=r"it would unpack to .* GiB; remove it"):
        npy_array(file.getvalue())


def test_text_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name", encoding="utf-16")
    with pytest.raises(ValueError, match=r"metadata\.csv is not text in UTF-8 \(.* at byte 0\); save it as such"):
        read_text(tmp_path / "metadata.csv")


def test_rows_without_their_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.arrow").write_bytes(b"rows" * 10)
    with pytest.raises(ValueError, match=r"x\.arrow ends before the end of its rows; copy or download it again"):
        check_whole_arrow(tmp_path / "x.arrow")
