"""Writing files so that they appear whole or not at all, and folders that belong to one run."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


class MissingWeights(FileNotFoundError):
    """A weight file that something else refers to is not there."""


def needed(module: str, extra: str) -> Any:
    """A module that only some users need.

    Raises:
        ModuleNotFoundError: If it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{module} is not installed; install layerprobe[{extra}]", name=module) from error


def one_line(error: BaseException) -> str:
    """The first line of an error's message, at most 160 characters; the name of its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


@contextmanager
def whole(path: Path, *, rivals: bool = False) -> Iterator[Path]:
    """A temporary name to write under; the file gets its own name when the block ends without an exception.

    Args:
        path: The file.
        rivals: Whether other processes may write this file at the same time; the last one to end wins. Otherwise the
            temporary name is always the same, so that what a killed process left of a large file is overwritten.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial" if rivals else f"{path.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors makes files that nobody but their owner can read.
        os.replace(partial, path)
    finally:
        if rivals:  # nobody would overwrite it
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that appears whole or not at all."""
    with whole(path, rivals=True) as partial:
        partial.write_text(text, encoding="utf-8")


def claim(folder: Path, name: str, record: Mapping[str, Any], *, what: str) -> None:
    """Makes a folder the place of the run that `record` describes, or checks that it is already.

    Args:
        folder: Made if it is not there.
        name: The file in it that keeps the record.
        record: JSON.
        what: "features" or the like, for the error.

    Raises:
        ValueError: If the folder belongs to another run, or is not empty and belongs to none; nothing is written then.
    """
    place, record = folder / name, json.loads(json.dumps(record))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder; choose another --out")
    # Listed before the record is looked for: another process may put it there in between.
    strangers = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".partial")) if folder.is_dir() else []
    if place.is_file():
        different = differences(_read(place), record)
        if different:
            raise ValueError(
                f"{folder} holds {what} of another run (different: {', '.join(different[:4])}); choose another --out"
            )
        return
    if strangers:
        raise ValueError(f"{folder} is not empty and holds other things ({strangers[0]}); choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(place, json.dumps(record, indent=1))


def differences(before: Any, now: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, as dotted keys."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now))
        return [d for key in keys for d in differences(before.get(key), now.get(key), f"{at}.{key}".strip("."))]
    return [] if before == now else [at or "everything"]


def _read(place: Path) -> Any:
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place} is damaged ({error}); choose another --out") from error
