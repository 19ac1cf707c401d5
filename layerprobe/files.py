"""Atomic writing of files, folders that belong to one run, and small helpers for imports and errors."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import socket
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from layerprobe.messages import safe

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, the largest file
_INSTALLED = ("stdlib", "purelib", "platlib")  # Names of folders for `sysconfig`.


class MissingWeights(FileNotFoundError):
    """A weight file that another file refers to is missing."""


def import_optional(module: str, extra: str) -> Any:
    """Imports a module of an optional dependency.

    Args:
        module: Name of the module.
        extra: Extra of layerprobe that installs it, for the error message.

    Raises:
        ModuleNotFoundError: If the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{module} is not installed; install layerprobe[{extra}]", name=module) from error


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 160 safe characters; its type if there is no message."""
    return safe((str(error).strip() or type(error).__name__).splitlines()[0])[:160]


def os_error_line(error: OSError) -> str:
    """Returns what the system refused as one line: the file, the reason and what to do; its own text if it has one."""
    if error.errno is None or error.strerror is None:
        return str(error)
    remedies = dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "make it accessible, or choose another folder as --out"
    )
    remedies |= dict.fromkeys(_FULL, "free some space and repeat the command")
    remedy = remedies.get(error.errno, "check the path and its disk")
    return f"{error.filename or 'a file'}: {error.strerror}; {remedy}"


class DiskFull(OSError):
    """A file could not be written because its disk is full."""


def error_place(error: BaseException) -> str:
    """Returns "file:line" of the innermost frame in a user's own file; "" if there is none.

    An installed package stands in for it, but never torch, layerprobe or the standard library.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename)}:{error.lineno}"
    standard, *packages = (f"{Path(sysconfig.get_path(name)).resolve()}{os.sep}" for name in _INSTALLED)
    never = (f"{Path(__file__).resolve().parent}{os.sep}", *(f"{folder}torch{os.sep}" for folder in packages))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    frames = [frame for frame in frames if not frame.filename.startswith(never)]
    own = [frame for frame in frames if not frame.filename.startswith((standard, *packages))]
    innermost = own or [frame for frame in frames if frame.filename.startswith(tuple(packages))]
    return f"{_short(innermost[-1].filename)}:{innermost[-1].lineno}" if innermost else ""


def _short(path: str) -> str:
    """Returns the path from the working directory, if it lies below."""
    relative = os.path.relpath(path) if Path(path).is_absolute() else path
    return path if relative.startswith("..") else relative


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `path` when the block ends without an exception.

    Several processes may write the same file: each has a temporary file of its own, and the last one to finish wins.
    The temporary file is removed after an exception. What killed processes left of them is removed by the next write.

    Args:
        path: Path of the finished file.
        durable: Whether to wait until file and name are on the disk, so that they survive a power cut. It costs
            milliseconds to seconds, so it is for what cannot be made again cheaply.

    Raises:
        DiskFull: If the disk is full.
    """
    _remove_remains(path.parent)
    partial = path.with_name(f"{path.name}.{_process_name()}-{uuid4().hex[:8]}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors creates files that only their owner can read.
        if durable:
            _sync(partial)
        os.replace(partial, path)
        if durable:
            _sync(path.parent)
    except Exception as error:
        if is_disk_full(error) or shutil.disk_usage(path.parent).free < 64 * 1024:
            written = partial.stat().st_size if partial.is_file() else 0
            partial.unlink(missing_ok=True)
            raise _disk_full(path, f"more than {_megabytes(written)}") from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def reserve(path: Path) -> None:
    """Allocates the disk space of a file that has its final length already; removes the file if there is too little.

    Raises:
        DiskFull: If the disk is full.
    """
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # not on this system
        return
    except OSError as error:
        if error.errno not in _FULL:
            return  # A file system that cannot reserve.
        path.unlink()
        raise _disk_full(path, _megabytes(size)) from error


_PARTIAL = re.compile(r".*\.(?P<host>[^.]*)-(?P<pid>\d+)-[0-9a-f]{8}\.partial")


def _process_name() -> str:
    return f"{re.sub('[^A-Za-z0-9_-]', '_', socket.gethostname())}-{os.getpid()}"


@cache
def _remove_remains(folder: Path) -> None:
    """Removes temporary files of dead processes of this machine, once per process and folder."""
    for path in folder.glob("*.partial"):
        name = _PARTIAL.fullmatch(path.name)
        if name and _process_name().startswith(f"{name['host']}-") and not _is_alive(int(name["pid"])):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # A process of another user; a number that is no process's is left alone.
    return True


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written because its disk is full."""
    full = isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in _FULL)
    return full or "No space left" in str(error)  # torch and safetensors raise errors of their own, without the number


def _disk_full(path: Path, needed: str) -> DiskFull:
    free = _megabytes(shutil.disk_usage(path.parent).free)
    return DiskFull(
        f"{path} could not be written: the disk is full ({free} free, {needed} needed); "
        "free some space and repeat the command"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Writes a text file atomically: readers see the old content or the new one, never a part."""
    with atomic_write(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")


LOCK = ".lock"
_held: set[Path] = set()


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a folder for this process while the block runs, so that no second one works on the same files.

    The lock ends with the process, however it ends. Within a process, an inner block of the same folder does nothing.

    Args:
        folder: Folder; created if it does not exist.
        wait: Whether to wait until another process has finished; otherwise it is an error.

    Raises:
        ValueError: If another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK
    if path in _held:
        yield
        return
    with path.open("a+", encoding="utf-8") as file:
        if not _lock(file, wait=wait):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{folder} is in use by {holder}; wait until it ends, or choose another folder")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
        file.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)


def _lock(file: TextIO, *, wait: bool) -> bool:
    """Locks a file; returns False if another process holds it."""
    try:
        import fcntl
    except ImportError:  # on Windows, where temporary names of their own still keep files whole
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # A network file system without locks.
        return True
    return True


class OtherRun(ValueError):
    """A folder holds the results of another run.

    Args:
        seen: What the folder holds, and how it differs.
        cure: What to do.
    """

    def __init__(self, seen: str, cure: str) -> None:
        super().__init__(f"{seen}; {cure}")
        self.seen = seen


def claim(folder: Path, name: str, record: Mapping[str, Any], *, what: str) -> None:
    """Reserves a folder for the run that `record` describes, or checks that it already belongs to this run.

    Args:
        folder: Folder of the run; created if it does not exist.
        name: Name of the file in the folder that stores the record.
        record: Description of the run, JSON-compatible.
        what: Content of the folder, such as "features", for the error message.

    Raises:
        OtherRun: If the folder belongs to another run; nothing is written then.
        ValueError: If it is a file or contains other files.
    """
    record_path, record = folder / name, json.loads(json.dumps(record))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder; choose another --out")
    # Listed before looking for the record, since another process may write it in between.
    files = folder.iterdir() if folder.is_dir() else ()
    other_files = sorted(file.name for file in files if file.name != LOCK and file.suffix != ".partial")
    if record_path.is_file():
        different_keys = differences(_read(record_path), record)
        if different_keys:
            seen = f"{folder} holds {what} of another run (different: {', '.join(different_keys[:4])})"
            raise OtherRun(seen, "choose another --out")
        return
    if other_files:
        raise ValueError(f"{folder} is not empty and contains other files ({other_files[0]}); choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(record_path, json.dumps(record, indent=1), durable=True)


def check_same(path: Path, record: Mapping[str, Any], *, what: str) -> None:
    """Checks that a file with the record of a result describes the same result, so that writing it again loses nothing.

    Args:
        path: File with the record; it need not exist.
        record: Description of the result that will be written, JSON-compatible; other keys of the file do not count.
        what: Name of the result, such as "samples", for the error message.

    Raises:
        ValueError: If the file describes another result.
    """
    if path.is_file():
        before = _read(path)
        changed = differences({key: before.get(key) for key in record}, json.loads(json.dumps(record)))
        if changed:
            raise ValueError(
                f"{path.parent} holds {what} of another command (different: {', '.join(changed[:4])}); choose another "
                "--out, or delete them first"
            )


def differences(before: Any, now: Any, at: str = "") -> list[str]:
    """Returns the dotted keys at which two JSON values differ.

    Args:
        before: First value.
        now: Second value.
        at: Key of both values in a larger one, which the returned keys start with.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now))
        return [d for key in keys for d in differences(before.get(key), now.get(key), f"{at}.{key}".strip("."))]
    return [] if before == now else [at or "everything"]


IN_MEMORY = "in memory: "  # how the source of a model or of data begins that was passed as an object


def refuse_memory(source: str, what: str) -> None:
    """Refuses to open again what was passed as an object.

    Args:
        source: Source of the model or the data, as a plan records it.
        what: What it is, such as "network".

    Raises:
        ValueError: If the source is an object.
    """
    if source.startswith(IN_MEMORY):
        raise ValueError(
            f"this run's {what} was passed as an object ({source.removeprefix(IN_MEMORY)}), which layerprobe cannot "
            "open again; make a run from files for this"
        )


def absolute_source(source: str) -> str:
    """Returns an existing local path as an absolute path, and other sources ("digits", "owner/name") unchanged."""
    return str(Path(source).resolve()) if source != "digits" and Path(source).exists() else source


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --out") from error
