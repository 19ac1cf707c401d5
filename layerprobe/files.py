"""Atomic writing of files, folders that one process holds, and small helpers for imports and errors."""

from __future__ import annotations

import errno
import importlib
import inspect
import logging
import os
import re
import shutil
import socket
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache, wraps
from pathlib import Path
from textwrap import shorten
from typing import Any, ParamSpec, TextIO, TypeVar
from uuid import uuid4

from layerprobe.memory import pass_on
from layerprobe.messages import closest, safe

logger = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, the largest file
EMBEDDED = "digits"  # the checkpoint and the data set in the package
PASS_CHECKPOINT = "pass a .safetensors or .pt file, or a folder"
REMOTE = "hf://"  # how a model of the Hub begins that is to be downloaded
# By the class of an error of the Hub's client, or by the status of the answer; what tells more comes first.
_HUB_FAILURES: dict[str | int, str] = {
    "GatedRepoError": "{name} is gated on the Hub; accept its terms on its page there, then run `hf auth login`",
    "OfflineModeIsEnabled": "the Hub is switched off, and {name} is not in its cache; unset HF_HUB_OFFLINE and "
    "HF_DATASETS_OFFLINE, or pass the path of a copy",
    "LocalTokenNotFoundError": "{name} needs a token of the Hub; run `hf auth login`, or set HF_TOKEN",
    "RevisionNotFoundError": "{name} has no such revision on the Hub; pass one that it has",
    **dict.fromkeys(
        ("RepositoryNotFoundError", "DatasetNotFoundError"),
        "the Hub has no {name}, or it is private; check the spelling, or run `hf auth login`",
    ),
    401: "the Hub does not take your token; run `hf auth login` again, or correct HF_TOKEN",
    403: "your token may not read {name}; make one with read access, then run `hf auth login`",
    429: "the Hub has had too many requests from you; wait some minutes, or log in with `hf auth login`",
    **dict.fromkeys((500, 502, 503, 504), "the Hub fails at the moment; try again later, or pass the path of a copy"),
    **dict.fromkeys(
        ("ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError", "Timeout", "ProxyError"),
        "the Hub cannot be reached for {name}; check the connection and the proxy, or pass the path of a copy",
    ),
    "LocalEntryNotFoundError": "{name} is not in the Hub's cache; download it, or pass the path of a copy",
}
_SUFFIXES_OF_WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pkl", ".npz")
_INSTALLED = ("stdlib", "purelib", "platlib")  # Names of folders for `sysconfig`.


class InUse(ValueError):
    """Another process holds a folder."""


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
        pass_on(error)
        if is_disk_full(error) or shutil.disk_usage(path.parent).free < 64 * 1024:
            written = partial.stat().st_size if partial.is_file() else 0
            partial.unlink(missing_ok=True)
            raise _disk_full(path, written) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


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


def _disk_full(path: Path, written: int = 0) -> DiskFull:
    sizes = f"{_megabytes(shutil.disk_usage(path.parent).free)} free"
    if written:  # It was removed again, so that more than its size may be free.
        sizes += f"; this file of more than {_megabytes(written)} did not fit"
    return DiskFull(f"{path} could not be written: the disk is full ({sizes}); free some space and repeat the command")


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
P = ParamSpec("P")
R = TypeVar("R")
_held: set[Path] = set()


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a folder for this process while the block runs, so that no second one works on the same files.

    The lock ends with the process, however it ends. Within a process, an inner block of the same folder does nothing.
    A file system without locks is told of in a warning, and does not keep a second process out.

    Args:
        folder: Folder; created if it does not exist, and removed again if nothing else came into it.
        wait: Whether to wait until another process has finished; otherwise it is an error.

    Raises:
        InUse: If another process holds the folder.
        ValueError: If it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder; choose another --out")
    path = folder.resolve() / LOCK
    if path in _held:
        yield
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with _open_locked(path, folder, wait=wait) as file:
        since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        try:
            text = f"process {os.getpid()} on {socket.gethostname()} since {since} ({_command()})"
            file.truncate(0)
            os.write(file.fileno(), text.encode())  # A buffer would be written again when the file is closed.
        except OSError as error:
            if is_disk_full(error):
                raise _disk_full(folder / LOCK) from error
            raise
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            with suppress(OSError):  # Removed while it is held: who waits for it notices, see `_open_locked`.
                path.unlink()
            with suppress(OSError):  # Not empty.
                for place in made:
                    place.rmdir()


def holding(argument: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a job hold the folder that one of its arguments names while it runs, see `locked`.

    Args:
        argument: Name of the argument.
    """

    def decorate(job: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(job)

        @wraps(job)
        def held(*args: P.args, **kwargs: P.kwargs) -> R:
            with locked(Path(signature.bind(*args, **kwargs).arguments[argument])):
                return job(*args, **kwargs)

        return held

    return decorate


def holder(folder: Path) -> str:
    """Returns which other process holds a folder and since when; "" if none does."""
    path = folder.resolve() / LOCK
    if path in _held or not path.is_file():
        return ""
    with path.open("r", encoding="utf-8", errors="replace") as file:
        return "" if _lock(file, wait=False, shared=True) else _holder(file)


def _open_locked(path: Path, folder: Path, *, wait: bool) -> TextIO:
    """Opens and locks a lock file."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8", errors="replace")
        except FileNotFoundError:  # Its last holder has just removed the folder.
            continue
        try:
            got = _lock(file, wait=wait)
            if got is None:
                logger.warning("%s is on a file system without locks; let no other command write there", folder)
            if got is False:
                raise InUse(
                    f"{folder} is in use by {_holder(file)}; wait until it ends or stop it, or choose another folder"
                )
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # Its last holder has removed it in the meantime.


def _holder(file: TextIO) -> str:
    file.seek(0)
    text = "".join(letter if letter.isprintable() else "?" for letter in file.read(400))
    return text.strip() or "another process"


def _command() -> str:
    """The command line of this process, shortened."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else []
    return shorten(" ".join(words), 120, placeholder=" ...")


def _lock(file: TextIO, *, wait: bool, shared: bool = False) -> bool | None:
    """Locks a file; returns False if another process holds it, None if its file system has no locks."""
    try:
        import fcntl
    except ImportError:  # on Windows, where temporary names of their own still keep files whole
        return None
    try:
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, mode if wait else mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


IN_MEMORY = "in memory: "  # how the source of a model or of data begins that was passed as an object


FEATURES = "features: "  # how the source begins of features without a network or samples


def refuse_memory(source: str, what: str) -> None:
    """Refuses to open again what was passed as an object, or never given.

    Args:
        source: Source of the model or the data, as a plan records it.
        what: What it is, such as "network".

    Raises:
        ValueError: If the source is an object, or features alone.
    """
    if source.startswith(FEATURES):
        raise ValueError(
            f"this run was made from features alone ({source.removeprefix(FEATURES)}), so it has no {what}; probe a "
            "checkpoint for this"
        )
    if source.startswith(IN_MEMORY):
        raise ValueError(
            f"this run's {what} was passed as an object ({source.removeprefix(IN_MEMORY)}), which layerprobe cannot "
            "open again; make a run from files for this"
        )


def is_hub_name(source: str) -> bool:
    """Returns whether a source is "owner/name" on the Hub; "images/cats" beside a folder images is a mistyped path."""
    matches = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None
    return matches and not Path(source).parent.exists() and Path(source).suffix not in _SUFFIXES_OF_WEIGHTS


def hub_error_line(name: str, error: BaseException) -> str:
    """Returns why the Hub did not give a model or a data set, and what to do, in one line.

    Args:
        name: "owner/name".
        error: What its client raised; it may have been raised by, or after, the error that tells the reason.
    """
    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None and earlier not in chain:
        chain.append(earlier)
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    codes = [getattr(getattr(one, "response", None), "status_code", 0) for one in chain]
    for known, line in _HUB_FAILURES.items():
        if known in kinds or known in codes:
            return line.format(name=name)
    return f"the Hub did not give {name} ({one_line(chain[-1])}); try again, or download it and pass its path"


def is_no_path(source: str) -> bool:
    """Returns whether a source is embedded, an object in memory, a name on the Hub, a pattern or an address."""
    return source == EMBEDDED or re.search(r"[*?\[\]{}:,]", source) is not None or is_hub_name(source)


def check_there(path: str | Path, what: str, advice: str) -> None:
    """Checks that there is something at a path.

    Args:
        path: The path.
        what: What it is, such as "checkpoint file".
        advice: What to do if it is not there.

    Raises:
        FileNotFoundError: If there is nothing; the message names what is there under a similar name.
    """
    if not Path(path).expanduser().exists():
        raise FileNotFoundError(f"there is no {what} {path}; {advice}{similar_path(path)}")


def similar_path(path: str | Path) -> str:
    """Returns the end of a message about a missing path: "; did you mean runs/mine?", or "" if nothing is like it."""
    place = Path(path).expanduser()
    while not place.parent.is_dir():
        place = place.parent
    try:
        beside = [entry.name for entry in place.parent.iterdir()]
    except OSError:  # a folder that may not be read
        beside = []
    # Short names with the same ending are alike by the ending alone.
    match = closest(place.name, [*beside, EMBEDDED] if place == Path(place.name) else beside, least=0.7)
    return f"; did you mean {place.with_name(match)}?" if match else ""


def absolute_source(source: str) -> str:
    """Returns an existing local path as an absolute path, and other sources ("digits", "owner/name") unchanged."""
    return str(Path(source).resolve()) if source != EMBEDDED and Path(source).exists() else source
