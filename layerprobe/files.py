"""Atomic writing of files, folders that belong to one run, and small helpers for imports and errors."""

from __future__ import annotations

import importlib
import json
import os
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

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
    """Returns the first line of an error's message, up to 160 characters, or the name of its type if it is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


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
def atomic_write(path: Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `path` when the block ends without an exception.

    Args:
        path: Path of the finished file.
        concurrent: Whether other processes may write the same file at the same time; the last one to finish wins.
            Otherwise the temporary name is always the same, so that the remains of a killed process are overwritten.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial" if concurrent else f"{path.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors creates files that only their owner can read.
        os.replace(partial, path)
    finally:
        if concurrent:  # No later call would overwrite this name.
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: readers see the old content or the new one, never a part."""
    with atomic_write(path, concurrent=True) as partial:
        partial.write_text(text, encoding="utf-8")


def claim(folder: Path, name: str, record: Mapping[str, Any], *, what: str) -> None:
    """Reserves a folder for the run that `record` describes, or checks that it already belongs to this run.

    Args:
        folder: Folder of the run; created if it does not exist.
        name: Name of the file in the folder that stores the record.
        record: Description of the run, JSON-compatible.
        what: Content of the folder, such as "features", for the error message.

    Raises:
        ValueError: If the folder belongs to another run, or contains other files; nothing is written then.
    """
    record_path, record = folder / name, json.loads(json.dumps(record))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder; choose another --out")
    # Listed before looking for the record, since another process may write it in between.
    other_files = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".partial")) if folder.is_dir() else []
    if record_path.is_file():
        different_keys = differences(_read(record_path), record)
        if different_keys:
            raise ValueError(
                f"{folder} holds {what} of another run (different: {', '.join(different_keys[:4])}); "
                "choose another --out"
            )
        return
    if other_files:
        raise ValueError(f"{folder} is not empty and contains other files ({other_files[0]}); choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(record_path, json.dumps(record, indent=1))


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


def absolute_source(source: str) -> str:
    """Returns an existing local path as an absolute path, and other sources ("digits", "owner/name") unchanged."""
    return str(Path(source).resolve()) if source != "digits" and Path(source).exists() else source


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --out") from error
