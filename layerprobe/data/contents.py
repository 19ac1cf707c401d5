"""The files that a data set names: which of them may be read, and how much.

A data set may come from somebody else, and its tables, links and headers may name anything: other files of this
machine, devices and pipes without an end, arrays larger than memory. So only regular files below the folders of the
data are read, sizes are compared before anything is read, and a file that says more or less than it holds is an error.
"""

from __future__ import annotations

import io
import math
import os
import stat
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from layerprobe.memory import pass_on

MAX_ITEM_BYTES = 2 * 2**30  # of one encoded or decoded item
MAX_TEXT_BYTES = 2**30  # of one table in text
_MAX_HEADER = 10_000  # of a .npy file, as for numpy

Folders = Sequence[Path]


def folders_of(source: str | Path, data_root: str | Path | None = None) -> tuple[Path, ...]:
    """Returns the folders below which files of a data set may lie, without links in their paths.

    Args:
        source: The data set: a folder, or a file, which stands for its folder. In the Hub's cache, the files of a
            snapshot are links to a folder beside it, which is one of these folders too.
        data_root: A further folder that the user allows.
    """
    place = Path(source).expanduser().resolve()
    own = place if place.is_dir() else place.parent
    blobs = [parent.parent / "blobs" for parent in (own, *own.parents) if parent.name == "snapshots"]
    return (own, *blobs[:1], *([] if data_root is None else [Path(data_root).expanduser().resolve()]))


def check_file(path: Path, folders: Folders, *, max_bytes: int | None = None) -> Path:
    """Returns the absolute path of a file of a data set that may be read.

    Args:
        path: Path of the file.
        folders: Folders that the file may lie in, see `folders_of`.
        max_bytes: Largest size of the file.

    Raises:
        ValueError: If it is no regular file, lies elsewhere, or is larger.
        OSError: If it does not exist.
    """
    target = Path(os.path.realpath(path))  # `resolve` raises an error of its own for a link to itself
    if not any(target.is_relative_to(folder) for folder in folders):
        raise ValueError(
            f"{path.name} leads out of the folder of the data; copy it there, or pass its folder as --data-root"
        )
    info = target.stat()
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"{path.name} is a {_kind(info.st_mode)}, not a file; remove it")
    if max_bytes is not None and info.st_size > max_bytes:
        raise ValueError(f"{path.name} has {info.st_size / 2**30:.3g} GiB, more than {max_bytes / 2**30:g}; remove it")
    return target


def read_file(path: Path, folders: Folders, *, max_bytes: int = MAX_ITEM_BYTES) -> bytes:
    """Reads a file of a data set, see `check_file`."""
    return check_file(path, folders, max_bytes=max_bytes).read_bytes()


def read_text(path: Path, folders: Folders | None = None, *, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Reads a file of text beside the items of a data set.

    Raises:
        ValueError: If it may not be read, see `check_file`, or is no text of this encoding.
    """
    content = read_file(path, folders or (path.parent.resolve(),), max_bytes=MAX_TEXT_BYTES)
    try:
        return content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); save it as such"
        ) from error


def with_content(item: Any, folders: Folders) -> Any:
    """Returns an item of a column, or a list of them, with the content of the file that it names.

    Args:
        item: Bytes, a path, a record of both as `datasets` stores it, a list of these, or values, which stay.
        folders: Folders that the file may lie in; a path may be relative to the first.
    """
    if isinstance(item, str):
        item = {"bytes": None, "path": item}
    if isinstance(item, Mapping) and item.get("bytes") is None and item.get("path") is not None:
        return {**item, "bytes": read_file(folders[0] / str(item["path"]), folders)}
    if isinstance(item, list) and item and isinstance(item[0], (str, Mapping)):
        return [with_content(part, folders) for part in item]
    return item


def check_npy(stream: BinaryIO, num_bytes: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Reads the header of a .npy file, up to the values, and compares it with the length of the file.

    Args:
        stream: The file, at its beginning.
        num_bytes: Length of the file.

    Returns:
        Shape, whether the first axis varies fastest, and type.

    Raises:
        ValueError: If it is damaged, holds Python objects, or another number of values than its header says.
    """
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version[0]}.{version[1]}")
        start, width = stream.tell(), 2 * version[0]
        if int.from_bytes(stream.read(width), "little") > _MAX_HEADER:
            raise ValueError("a header of this length")
        stream.seek(start)
        shape, fortran, dtype = readers[version](stream)
    except Exception as error:  # the header is parsed as Python's, which can fail in any way
        pass_on(error)
        raise ValueError("it is not a .npy file with a valid header") from error
    if dtype.hasobject:
        raise ValueError("it contains Python objects, which are not read")
    needed, there = math.prod(shape) * dtype.itemsize, num_bytes - stream.tell()
    if min(shape, default=0) < 0 or needed != there:
        raise ValueError(f"its header says {dtype} of shape {shape}, {needed} bytes, but {there} bytes follow")
    return tuple(shape), bool(fortran), dtype


def npy_array(content: bytes) -> NDArray[Any]:
    """Returns the array in the content of a .npy file, or the only one of an .npz file.

    Raises:
        ValueError: If it is damaged, larger than an item may be, or holds Python objects or several arrays.
    """
    if content.startswith(b"PK"):
        content = _only_member(content)
    stream = io.BytesIO(content)
    shape, fortran, dtype = check_npy(stream, len(content))
    values = np.frombuffer(content, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def load_npy_file(path: Path, folders: Folders | None = None, *, mmap: bool = False) -> NDArray[Any]:
    """Reads a .npy file, or opens it in place.

    Args:
        path: The file.
        folders: Folders that it may lie in; those of the file by default.
        mmap: Whether to leave the values on disk.

    Raises:
        ValueError: As for `check_file` and `check_npy`.
        OSError: If it cannot be read.
    """
    if not mmap:
        return npy_array(read_file(path, folders or folders_of(path)))
    file = check_file(path, folders or folders_of(path))
    with file.open("rb") as stream:
        shape, fortran, dtype = check_npy(stream, os.fstat(stream.fileno()).st_size)
        offset = stream.tell()
    if not math.prod(shape):
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")


def _only_member(content: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if len(members) != 1:
                names = ", ".join(member.filename.removesuffix(".npy") for member in members[:4])
                raise ValueError(f"it contains {len(members)} arrays ({names}); keep one per file")
            if members[0].file_size > MAX_ITEM_BYTES:
                raise ValueError(f"it would unpack to {members[0].file_size / 2**30:.3g} GiB; remove it")
            return archive.read(members[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        pass_on(error)
        raise ValueError("it is not a complete .npz file") from error


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return next((name for test, name in kinds.items() if test(mode)), "device")


def check_whole_arrow(path: Path) -> None:
    """Checks that a file of Arrow has its end, because its reader stops there without a word.

    Raises:
        ValueError: If it ends earlier.
    """
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 8, 0))
        end = file.read()
    # A stream ends with a message of length 0, without the mark before it in versions before 0.15.
    if not end.endswith((b"ARROW1", b"\0\0\0\0")):
        raise ValueError(f"{path} ends before the end of its rows; copy or download it again")
