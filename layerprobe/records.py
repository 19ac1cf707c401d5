"""The one reader of the records that a run leaves: JSON files, lines of JSON, and what each must hold.

A record is read only if its size and depth are bounded and its checksum, if it has one, is right. Its values are then
compared with the types of a dataclass or a `TypedDict`. Whatever is wrong is one line: which file, what is wrong, and
what makes it again. A record of a newer version of layerprobe is told from a damaged one.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from layerprobe import __version__
from layerprobe.checksums import (
    CHECKSUMS,
    Damaged,
    check,
    is_damaged,
    recorded_version,
    told_again,
    was_recorded,
    write_recorded_text,
)
from layerprobe.files import LOCK, one_line

T = TypeVar("T")
MAX_BYTES = 2**28  # No record comes near; reading one of this size takes seconds.
MAX_DEPTH = 100
_MAX_NUMBER = 2**63
# What reading a value as something else may raise.
_MISFITS = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)


def write_record(path: Path, record: Mapping[str, Any], *, durable: bool = False) -> None:
    """Writes a record as JSON, whole or not at all, with its checksum.

    Args:
        path: Path of the file.
        record: JSON-compatible values.
        durable: As for `atomic_write`.
    """
    write_recorded_text(path, json.dumps(record, indent=1), durable=durable)


def read_record(path: Path, build: Callable[[Any], T], *, remedy: str) -> T:
    """Reads a JSON file.

    Args:
        path: Path of the file.
        build: Function from its value to what is returned, such as `typed(SomeDataclass)`; whatever it raises about the
            value becomes an error about the file.
        remedy: What to do about a damaged file, such as "run `layerprobe analyze` again".

    Raises:
        FileNotFoundError: If there is no such file.
        Damaged: If the file is damaged, holds something else, or is of a newer version of layerprobe.
    """
    text = read_bounded(path, remedy=remedy)
    return _built(path, text, build, remedy)


def read_lines(path: Path, build: Callable[[Any], T], *, remedy: str) -> list[T]:
    """Reads a file with one JSON value per line, as `read_record` does; returns [] if there is no such file."""
    if not path.is_file():
        return []
    return [_built(path, line, build, remedy) for line in read_bounded(path, remedy=remedy).splitlines()]


def read_bounded(path: Path, *, remedy: str, max_bytes: int = MAX_BYTES) -> str:
    """Reads a text file of a run after its checksum, if its size is bounded.

    Args:
        path: Path of the file.
        remedy: What to do about a damaged file.
        max_bytes: Largest size.

    Raises:
        FileNotFoundError: If there is no such file.
        Damaged: If it is damaged, larger, or no text.
    """
    size = path.stat().st_size
    if not path.is_file() or size > max_bytes:
        raise damaged(path, f"{size / 1e6:.0f} MB are too much for it" if path.is_file() else "it is no file", remedy)
    check(path, remedy)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, "it is no text", remedy) from error


def damaged(path: Path, problem: str, remedy: str, *, version: str = "") -> Damaged:
    """Returns the error about a file of a run, which says if it is of a newer version of layerprobe.

    Args:
        path: Path of the file.
        problem: What is wrong with it.
        remedy: What to do if it is of this version or an older one.
        version: Version of layerprobe that the file names; that of its folder if empty.
    """
    version = version or _version(path.parent)
    if _is_newer(version):
        return Damaged(
            f"{path} is of layerprobe {version}, and this is {__version__} ({problem}); update layerprobe to read it"
        )
    return Damaged(f"{path} is damaged ({problem}); {remedy}")


def typed(kind: Any) -> Callable[[Any], Any]:
    """Returns a function from a JSON value to a value of a type, see `parse`."""
    return lambda value: parse(kind, value)


def parse(kind: Any, value: Any, at: str = "") -> Any:
    """Returns a JSON value as a value of a type: tuples for lists, dataclasses for objects, keys that are numbers.

    Args:
        kind: Type: a dataclass, a `TypedDict`, a simple type, a literal, or a union, tuple, list or dict of these.
        value: JSON value.
        at: Dotted key of the value in the file, for error messages.

    Raises:
        ValueError: If the value does not fit, with the key at which it does not.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _first_fit(args, value, at)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in args):
            raise _misfit(at, value, "one of " + ", ".join(map(str, args)))
        return value
    if dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return _object(kind, value, at)
    if origin in (tuple, list, Sequence):
        return _list(origin, args, value, at)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _misfit(at, value, "an object")
        return {_key(args[0], key, at): parse(args[1], item, f"{at}.{key}".strip(".")) for key, item in value.items()}
    return _simple(kind, value, at)


def _simple(kind: Any, value: Any, at: str) -> Any:
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, int | float):
        if kind is int and (not isinstance(value, int) or abs(value) >= _MAX_NUMBER):
            raise _misfit(at, value, "a whole number")
        if isinstance(value, int) and abs(value) >= _MAX_NUMBER:
            raise _misfit(at, value, "a number")
        return value
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "an object"}
    if kind in names and kind not in (int, float) and isinstance(value, kind):
        return value
    if kind in (dict, list) and isinstance(value, kind):
        return value
    raise _misfit(at, value, names.get(kind, getattr(kind, "__name__", str(kind))))


def _first_fit(kinds: Sequence[Any], value: Any, at: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return parse(kind, value, at)
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def _object(kind: Any, value: Any, at: str) -> Any:
    if not isinstance(value, dict):
        raise _misfit(at, value, "an object")
    hints = get_type_hints(kind)
    if is_typeddict(kind):  # whose own `__required_keys__` does not see annotations that are strings
        extras = get_type_hints(kind, include_extras=True)
        needed = {name for name, hint in extras.items() if get_origin(hint) is not NotRequired}
    else:
        hints = {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
        missing = dataclasses.MISSING
        needed = {
            field.name
            for field in dataclasses.fields(kind)
            if field.init and field.default is missing and field.default_factory is missing
        }
    place = f" in {at}" if at else ""
    if unknown := sorted(set(value) - set(hints)):
        raise ValueError(f"unknown key {unknown[0][:40]!r}{place}")
    if lacking := sorted(needed - set(value)):
        raise ValueError(f"no key {lacking[0]!r}{place}")
    parts = {name: parse(hints[name], item, f"{at}.{name}".strip(".")) for name, item in value.items()}
    return parts if is_typeddict(kind) else kind(**parts)


def _list(origin: Any, args: Sequence[Any], value: Any, at: str) -> Any:
    if not isinstance(value, list | tuple):  # a record that was not written yet has tuples
        raise _misfit(at, value, "a list")
    if origin is tuple and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise _misfit(at, value, f"a list of {len(args)}")
        return tuple(parse(kind, item, at) for kind, item in zip(args, value, strict=True))
    items = [parse(args[0], item, at) for item in value]
    return tuple(items) if origin is tuple else items


def _key(kind: Any, key: str, at: str) -> Any:
    try:
        return kind(key)
    except ValueError:
        raise _misfit(at, key, "a number as key") from None


def _misfit(at: str, value: Any, wanted: str) -> ValueError:
    try:
        shown = json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        shown = type(value).__name__
    return ValueError(f"{at or 'it'} is {shown[:40]}, not {wanted}")


def _built(path: Path, text: str, build: Callable[[Any], T], remedy: str) -> T:
    version = ""
    try:
        value = json.loads(text)
        if isinstance(value, dict) and isinstance(value.get("layerprobe"), str):
            version = value["layerprobe"]
        _check_depth(value)
        return build(value)
    except _MISFITS as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        if isinstance(error, KeyError):
            problem = f"no key {problem}"
        raise damaged(path, problem, remedy, version=version) from error


def _check_depth(value: Any) -> None:
    """Refuses a value that is nested deeper than any record, which code that follows it could not take."""
    level, depth = [value], 0
    while level := [
        item
        for parent in level
        if isinstance(parent, dict | list)
        for item in (parent.values() if isinstance(parent, dict) else parent)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _version(folder: Path) -> str:
    try:
        if version := recorded_version(folder):
            return version
        return str(json.loads((folder / "environment.json").read_bytes()[:10_000])["layerprobe"])
    except (OSError, *_MISFITS):
        return ""


def _is_newer(version: str) -> bool:
    numbers = [[int(number) for number in re.findall(r"\d{1,9}", text)[:3]] for text in (version, __version__)]
    return numbers[0] > numbers[1]


class OtherRun(ValueError):
    """A folder holds the results of another run.

    Args:
        seen: What the folder holds, and how it differs.
        cure: What to do.
    """

    def __init__(self, seen: str, cure: str) -> None:
        super().__init__(f"{seen}; {cure}")
        self.seen = seen


def claim(folder: Path, name: str, record: Mapping[str, Any], *, what: str, added: Collection[str] = ()) -> None:
    """Reserves a folder for the run that `record` describes, or checks that it already belongs to this run.

    A damaged file with the record is written again, if its checksum says that it held this record.

    Args:
        folder: Folder of the run; created if it does not exist.
        name: Name of the file in the folder that stores the record.
        record: Description of the run, JSON-compatible.
        what: Content of the folder, such as "features", for the error message.
        added: Keys that records of earlier versions lack; what such a record does not tell does not differ.

    Raises:
        OtherRun: If the folder belongs to another run; nothing is written then.
        ValueError: If it is a file or contains other files.
    """
    check_claim(folder, name, record, what=what, added=added)
    record_path = folder / name
    damaged = was_recorded(record_path, json.dumps(record, indent=1)) and is_damaged(record_path)
    if damaged:
        told_again(record_path)
    if damaged or not record_path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_record(record_path, record, durable=True)


def check_claim(folder: Path, name: str, record: Mapping[str, Any], *, what: str, added: Collection[str] = ()) -> None:
    """Checks that `claim` with the same arguments would find the folder free or its own; nothing is written.

    Raises:
        OtherRun: If the folder belongs to another run.
        ValueError: If it is a file or contains other files.
    """
    record_path, record = folder / name, json.loads(json.dumps(record))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder; choose another --out")
    # Listed before looking for the record, since another process may write it in between.
    files = folder.iterdir() if folder.is_dir() else ()
    other_files = sorted(
        file.name for file in files if file.name not in (LOCK, CHECKSUMS) and file.suffix != ".partial"
    )
    if was_recorded(record_path, json.dumps(record, indent=1)):
        return
    if record_path.is_file():
        before = read_record(record_path, typed(dict), remedy="choose another --out")
        known = {key: value for key, value in record.items() if key in before or key not in added}
        different_keys = differences(before, known)
        if different_keys:
            seen = f"{folder} holds {what} of another run (different: {', '.join(different_keys[:4])})"
            raise OtherRun(seen, "choose another --out")
    elif other_files:
        raise ValueError(f"{folder} is not empty and contains other files ({other_files[0]}); choose another --out")


def check_same(path: Path, record: Mapping[str, Any], *, what: str) -> None:
    """Checks that a file with the record of a result describes the same result, so that writing it again loses nothing.

    Args:
        path: File with the record; it need not exist.
        record: Description of the result that will be written, JSON-compatible; other keys of the file do not count.
        what: Name of the result, such as "samples", for the error message.

    Raises:
        ValueError: If the file describes another result, or its folder is a file.
    """
    if path.parent.is_file():
        raise ValueError(f"{path.parent} is a file, not a folder; choose another --out")
    if path.is_file():
        before = read_record(path, typed(dict), remedy="choose another --out")
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
