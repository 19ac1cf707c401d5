"""Checksums of the files of a run: recorded when a file is written, checked when it is read.

`checksums.json` lies beside the files. It holds the SHA-256 of each, as `sha256sum` prints it, and the version of
layerprobe that wrote last. The checksum is recorded before the file gets its name, beside that of the file it replaces,
so that a process may be killed at any moment. Each file is read and checked once per process, unless it changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from layerprobe import __version__
from layerprobe.files import atomic_write, one_line, write_text

CHECKSUMS = "checksums.json"
logger = logging.getLogger(__name__)

_Stamp = tuple[int, int, int]
_checked: dict[Path, tuple[_Stamp, str]] = {}  # digests of files that did not change since
_parsed: dict[Path, tuple[_Stamp, dict[str, Any]]] = {}
_MAX_BYTES = 2**26


class Damaged(ValueError):
    """A file of a run does not hold what was written there."""


@contextmanager
def recorded_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Writes a file as `atomic_write` does, and records its checksum.

    Args:
        path: Path of the finished file.
        durable: As for `atomic_write`.

    Raises:
        DiskFull: If the disk is full.
    """
    with atomic_write(path, durable=durable) as partial:
        yield partial
        digest = _digest(partial)
        _record(path, [*_recorded(path), digest], durable=durable)
    _record(path, [digest])


def write_recorded_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Writes a text file as `write_text` does, and records its checksum."""
    with recorded_write(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")


def is_damaged(path: Path) -> bool:
    """Whether a file differs from what was recorded; False without a record, and for a missing file.

    Raises:
        Damaged: If the record itself is damaged.
    """
    digests = _recorded(path)
    return bool(digests) and path.is_file() and _current_digest(path) not in digests


def was_recorded(path: Path, text: str) -> bool:
    """Whether this text is what was recorded of a file."""
    return hashlib.sha256(text.encode()).hexdigest() in _recorded(path)


def check(path: Path, remedy: str) -> None:
    """Checks a file that is about to be read.

    A file of an earlier version, which recorded nothing, is told of once per process.

    Args:
        path: Path of the file.
        remedy: What to do about a damaged one.

    Raises:
        Damaged: If the file differs from what was recorded.
    """
    if is_damaged(path):
        raise Damaged(f"{path} is damaged (its content is not what was written there); {remedy}")
    if not _recorded(path):
        _tell_unrecorded(path.parent)


def recorded_version(folder: Path) -> str:
    """Returns the version of layerprobe that wrote in a folder last; "" if it is not recorded."""
    return str(_read(folder).get("layerprobe", ""))


def recorded_digest(folder: Path) -> str:
    """Returns one checksum of all files that are recorded of a folder; "" if none is."""
    return str(_read(folder).get("checksum", ""))


def told_again(path: Path, how: str = "") -> None:
    """Tells that a damaged file is made again, and how."""
    logger.warning("%s", f"{path} was damaged and is made again {how}".strip())


_told: list[Path] = []


def _tell_unrecorded(folder: Path) -> None:
    if not _told:
        _told.append(folder)
        logger.warning("%s has files without a checksum, so damage to them may go unnoticed", folder)


def _recorded(path: Path) -> Sequence[str]:
    digests: Sequence[str] = _read(path.parent).get("files", {}).get(path.name, ())
    return digests


def _record(path: Path, digests: Sequence[str], *, durable: bool = False) -> None:
    with _one_at_a_time(path.parent):
        files = _read(path.parent).get("files", {}) | {path.name: list(digests)}
        files = dict(sorted(files.items()))  # whatever order the processes wrote in
        record = {"layerprobe": __version__, "files": files, "checksum": _digest_of(files)}
        write_text(path.parent / CHECKSUMS, json.dumps(record, indent=1), durable=durable)


def _read(folder: Path) -> dict[str, Any]:
    """The record of a folder; {} without one."""
    path = folder / CHECKSUMS
    try:
        stamp = _stamp(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    if _parsed.get(path, (None,))[0] != stamp:
        _parsed[path] = stamp, _parse(path)
    return _parsed[path][1]


def _parse(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"{size} bytes")
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["checksum"] != _digest_of(record["files"]):
            raise ValueError("it does not have its own checksum")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(
            f"{path} is damaged ({one_line(error)}); delete it to go on without checking the files beside it"
        ) from error
    return dict(record)


def _digest_of(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _current_digest(path: Path) -> str:
    key, stamp = path.resolve(), _stamp(path)
    if key not in _checked or _checked[key][0] != stamp:
        _checked[key] = stamp, _digest(path)
    return _checked[key][1]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keeps other processes from changing the record of a folder, which several may hold parts of.

    The record itself is locked, since the lock of a folder on a network file system does not reach other machines.
    Before there is a record, the folder is.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        yield
        return
    record = folder / CHECKSUMS
    while True:
        try:  # Network file systems lock only files that may be written.
            descriptor = os.open(record, os.O_RDWR if os.access(record, os.W_OK) else os.O_RDONLY)
        except FileNotFoundError:
            descriptor = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # A file system without locks.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_now(record, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def _is_now(record: Path, descriptor: int) -> bool:
    """Whether an open file is still the record, which every write replaces; or a folder that has no record yet."""
    try:  # Opening asks a network file system anew, which `stat` does not.
        with record.open("rb") as now:
            return os.path.samestat(os.fstat(now.fileno()), os.fstat(descriptor))
    except FileNotFoundError:
        return S_ISDIR(os.fstat(descriptor).st_mode)
