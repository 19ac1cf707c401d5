"""Rows of data sets, read through Hugging Face `datasets` from files, folders, `save_to_disk` folders and the Hub.

This module reads rows and class names only; encoded items stay encoded. A data set has named parts ("train", "test").
"""

from __future__ import annotations

import glob
import io
import logging
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from layerprobe.data.contents import MAX_ITEM_BYTES, check_whole_arrow
from layerprobe.data.listing import PART_OF, TABLES, Listing
from layerprobe.data.metadata import read_metadata
from layerprobe.files import hub_error_line, one_line
from layerprobe.memory import pass_on
from layerprobe.messages import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

_PART_NUMBERS = {"train": 0, "validation": 1, "test": 2}
_ID_STRIDE = 10**9
_MOST_PADDING = 2**26  # zeros behind the end of an archive, in bytes
# Columns of the items and of their class folders when items are single files.
FILE, FOLDER = "file", "folder"

T = TypeVar("T")


def read(listing: Listing, *, split: str | None = None) -> dict[str, Dataset]:
    """Reads the rows of a data set by part.

    Nothing is written next to the data; `datasets` keeps prepared files in its own cache (HF_DATASETS_CACHE).

    Single files become rows with a column "file" and, if they have classes, a column "folder". Other columns come from
    metadata files in the folder or below. As in Hugging Face folders, their column `file_name` contains paths relative
    to the metadata file; a column may contain the labels. Fields of the .json files in .tar shards are columns such as
    "json.label".

    Args:
        listing: Files of the data set.
        split: Name of the only part to read; None for all parts.

    Raises:
        ValueError: If the files cannot be read, or a part is empty.
    """
    files = _chosen(listing.parts, split, listing.source) if listing.parts else {}
    if listing.form == "items":
        return _items(listing, files)
    for shards in files.values():
        _check_class_names(shards)
        for shard in shards:
            _check_whole(shard)
    with _quiet(), _webdataset_as_bytes():
        try:
            content = {name: _rows(shards) for name, shards in files.items()} or _prepared_rows(listing)
        except Exception as error:  # of pyarrow, fsspec, the Hub, ...
            pass_on(error)
            if listing.form == "hub":
                line = hub_error_line(listing.source, error)
                raise ValueError(f"{listing.source} is not a path here, so it was sought on the Hub: {line}") from error
            raise ValueError(
                f"{listing.source} cannot be read: {one_line(_root_cause(error))}; "
                "pass a valid .parquet, .arrow or .tar file, or the folder of one data set"
            ) from error
    parts = _chosen(content, split, listing.source)
    empty = next((name for name, rows in parts.items() if len(rows) == 0), None)
    if empty is not None:
        raise ValueError(f"{listing.source} has no rows in {empty}; pass data with rows")
    return {name: _with_json_fields(rows.with_format(None)) for name, rows in parts.items()}


def _chosen(parts: Mapping[str, T], split: str | None, source: str) -> dict[str, T]:
    """The parts to read: the one that --split names, or all."""
    if split is None:
        return dict(parts)
    name = split if split in parts else PART_OF.get(split.lower(), split)
    if name not in parts:
        raise ValueError(
            f"{source} has no split {split!r}; pass one of {', '.join(parts)} as --split{did_you_mean(split, parts)}"
        )
    return {name: parts[name]}


def _prepared_rows(listing: Listing) -> dict[str, Dataset]:
    """Rows of a saved data set or of one on the Hub, by part."""
    from datasets import Dataset, load_dataset, load_from_disk  # imported here because it takes a second

    local = str(Path(listing.source).expanduser().absolute())
    content = load_from_disk(local) if listing.form == "saved" else load_dataset(listing.source)
    return {str(content.split or "train"): content} if isinstance(content, Dataset) else dict(content)


def _rows(files: Sequence[Path]) -> Dataset:
    """Rows of the tables of one part."""
    from datasets import load_dataset

    # The parts are read one by one, because `datasets` gives all of them the class names of the first.
    return load_dataset(
        TABLES[files[0].suffix.lower()], data_files=[glob.escape(str(file)) for file in files], split="train"
    )


def _check_class_names(files: Sequence[Path]) -> None:
    """Checks that the shards of a part name the classes of a column alike, because `datasets` asks only the first."""
    first, *others = files
    names = _class_names(first) if others else {}
    for other in others:
        if _class_names(other) != names:
            raise ValueError(
                f"{other} names the classes of its labels unlike {first.name}, so the numbers do not agree; write both "
                "with the same names"
            )


def _check_whole(file: Path) -> None:
    """Checks that a file of rows has its end, and nothing behind it, because its reader may stop there without a word.

    Raises:
        ValueError: If it ends earlier, goes on behind its end, or is an archive with members that are no plain files.
    """
    if file.suffix.lower() == ".arrow":
        check_whole_arrow(file)
    if file.suffix.lower() != ".tar":
        return
    with file.open("rb") as stream:
        if not any(stream.read(tarfile.BLOCKSIZE)):  # The xz reader would go on to the end of the zeros.
            raise ValueError(f"{file} begins with zeros, so it is no archive; copy or download it again")
    try:
        with tarfile.open(file, "r:*") as archive:
            _check_members(file, archive)
            end = archive.offset
            compressed = not isinstance(archive.fileobj, io.BufferedReader)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, OverflowError) as error:
        pass_on(error)
        raise ValueError(
            f"{file} ends before the end of its archive, or is damaged ({one_line(error)}); copy or download it again"
        ) from error
    if compressed:  # It ends with a checksum, which its reader compares.
        return
    with file.open("rb") as stream:
        stream.seek(end)
        blocks = iter(lambda: stream.read(2**20), b"")
        first = next(blocks, b"")
        rest = file.stat().st_size - end
        if len(first) < tarfile.BLOCKSIZE:
            raise ValueError(f"{file} ends before the end of its archive; copy or download it again")
        if rest > _MOST_PADDING or any(map(any, (first, *blocks))):
            raise ValueError(
                f"{file} goes on behind the end of its archive; if archives were joined, keep each as a file"
            )


def _check_members(file: Path, archive: tarfile.TarFile) -> None:
    names: set[str] = set()
    for member in archive:
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise ValueError(f"{file} has {member.name}, which is a link, a device or sparse; pack the file itself")
        if member.size > MAX_ITEM_BYTES:
            raise ValueError(f"{file} has {member.name} of {member.size / 2**30:.3g} GiB; remove it")
        if member.name in names:
            raise ValueError(f"{file} has two files {member.name}; keep one of them")
        names.add(member.name)


def _class_names(file: Path) -> dict[str, list[str]]:
    """Class names by column, as the header of a table has them; none if it is damaged, which its reader reports."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features

    if file.suffix.lower() == ".tar":
        return {}
    try:
        if file.suffix.lower() == ".parquet":
            schema = pq.read_schema(file)
        else:
            with pa.memory_map(str(file)) as stream:
                schema = pa.ipc.open_stream(stream).schema
    except (pa.ArrowInvalid, OSError) as error:
        pass_on(error)
        return {}
    features = Features.from_arrow_schema(schema)
    return {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _with_json_fields(rows: Dataset) -> Dataset:
    """Rows of a webdataset with the fields of its .json files as columns "json.label"."""
    from datasets import concatenate_datasets

    if not isinstance(rows.features.get("json"), dict):
        return rows
    return concatenate_datasets([rows, rows.select_columns("json").flatten()], axis=1)


def _items(listing: Listing, parts: Mapping[str, Sequence[Path]]) -> dict[str, Dataset]:
    """Rows of single files."""
    from datasets import Dataset

    every_file = {file for part in listing.parts.values() for file in part}
    cells = read_metadata(listing.metadata, every_file)
    columns = dict.fromkeys(column for row in cells.values() for column in row)
    taken = next((column for column in columns if column in (FILE, FOLDER)), None)
    if taken is not None:
        raise ValueError(f"{listing.metadata[0]} has a column {taken}, a name that is taken; rename the column")
    rows = {}
    for name, files in parts.items():
        found: dict[str, list[Any]] = {FOLDER: [listing.classes[file] for file in files]} if listing.classes else {}
        found |= {column: [cells.get(file, {}).get(column) for file in files] for column in columns}
        found[FILE] = [{"bytes": None, "path": str(file)} for file in files]
        try:
            rows[name] = Dataset.from_dict(found)
        except (ValueError, TypeError, OverflowError) as error:  # of pyarrow
            names = " and ".join(path.name for path in listing.metadata)
            raise ValueError(
                f"{names} cannot be read ({one_line(error)}); write one type of value per column"
            ) from error
    return rows


def item_column(
    parts: Mapping[str, Dataset],
    given: str | None,
    *,
    usual: Sequence[str],
    what: str,
    fits: Callable[[Any], bool],
) -> str:
    """Returns the column of the items.

    This is the given column, else the column of files, else one with a usual name, else the only one of a fitting type.

    Args:
        parts: Rows of the data set by part name.
        given: Column set by the user, or None.
        usual: Usual names of such a column.
        what: Modality for error messages: "audio", "motion" or "video".
        fits: Function that tells whether a column of a given type may contain items.

    Raises:
        ValueError: If the given column does not exist, or no column or several columns fit.
    """
    if given is not None:
        check_column(parts, given, "--item-column")
        return given
    features = next(iter(parts.values())).features
    columns = [name for name, feature in features.items() if (name == FILE and holds_bytes(feature)) or fits(feature)]
    named = [name for name in (FILE, *usual) if name in columns]
    if not columns:
        raise ValueError(
            f"none of the columns {', '.join(features)} contains {what}; pass {what} data, or --item-column"
        )
    if not named and len(columns) > 1:
        raise ValueError(f"the columns {', '.join(columns)} may all contain {what}; pass one as --item-column")
    return (named or columns)[0]


def holds_bytes(feature: Any) -> bool:
    """Returns whether a column of this type contains encoded bytes, or records of bytes and a path."""
    from datasets import Audio, Image, Video

    is_bytes = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return isinstance(feature, (Audio, Image, Video)) or is_bytes or (isinstance(feature, dict) and "bytes" in feature)


def first_id(part: str) -> int:
    """Returns the id of the first row of a part: 0 for "train", 10**9 for "validation", 2 * 10**9 for "test".

    Other parts start at other multiples of 10**9, which depend on the name only. So ids do not change when a part is
    added or left out.
    """
    return _ID_STRIDE * _PART_NUMBERS.get(part, len(_PART_NUMBERS) + zlib.crc32(part.encode()))


def check_column(parts: Mapping[str, Dataset], column: str, option: str) -> None:
    """Checks that all parts have a column.

    Args:
        parts: Rows of the data set by part name.
        column: Name of the column.
        option: Command-line option that sets the column, for the error message.

    Raises:
        ValueError: If a part lacks the column.
    """
    for name, rows in parts.items():
        if column not in rows.features:
            raise ValueError(
                f"{name} has no column {column!r}; pass one of {', '.join(rows.features)} as {option}"
                f"{did_you_mean(column, rows.features)}"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the progress bars and the log of `datasets`; errors still arrive as exceptions."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    # If the user has set the environment variable, the functions below only warn.
    hide_bars = not are_progress_bars_disabled() and "HF_DATASETS_DISABLE_PROGRESS_BARS" not in os.environ
    levels = {name: logging.getLogger(name).level for name in ("datasets", "huggingface_hub")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if hide_bars:
            disable_progress_bars()
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if hide_bars:
            enable_progress_bars()


@contextmanager
def _webdataset_as_bytes() -> Iterator[None]:
    """Keeps audio and video of .tar files as bytes, because their `datasets` types need packages that we do not."""
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    names = [name for name in ("AUDIO_EXTENSIONS", "VIDEO_EXTENSIONS") if hasattr(WebDataset, name)]
    extensions = {name: getattr(WebDataset, name) for name in names}
    try:
        for name in names:
            setattr(WebDataset, name, [])
        yield
    finally:
        for name, original in extensions.items():
            setattr(WebDataset, name, original)


def _root_cause(error: BaseException) -> BaseException:
    return _root_cause(error.__cause__) if error.__cause__ is not None else error
