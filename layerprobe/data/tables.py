"""Rows of data sets, read through Hugging Face `datasets` from files, folders, `save_to_disk` folders and the Hub.

This module reads rows and class names only; encoded items stay encoded. A data set has named parts ("train", "test").
"""

from __future__ import annotations

import csv
import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerprobe.data.samples import MISSING, LabelColumn
from layerprobe.files import one_line

if TYPE_CHECKING:
    from datasets import Dataset

_LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "fine_label", "cls")
_PART_NUMBERS = {"train": 0, "validation": 1, "test": 2}
_PART_WORDS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
_ID_STRIDE = 10**9
# Suffixes of files of rows, with the format names of `datasets`.
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
# Column of the item paths when items are single files.
FILE = "file"
PROBE_LABELS = "--probe-labels"
_FILE_NAME = "file_name"  # column of the paths in a metadata.csv


def read(source: str | Path, *, suffixes: Collection[str], split: str | None = None) -> dict[str, Dataset]:
    """Reads the parts of a data set.

    Nothing is written next to the data; `datasets` keeps prepared files in its own cache (HF_DATASETS_CACHE).

    Args:
        source: A .parquet, .arrow or .tar (webdataset) file; a folder of such files, of single files or written by
            `save_to_disk`; or "owner/name" on the Hugging Face Hub, the only case that uses the network.
        suffixes: Suffixes of single files that are items, such as ".png".
        split: Name of the only part to read; None for all parts.

    Returns:
        Rows by part name.

    Raises:
        ValueError: If the source does not exist or cannot be read, or a part is empty.
    """
    import datasets  # imported here because it takes a second

    load = _loader(source, suffixes)
    with _quiet(), _webdataset_as_bytes():
        try:
            content = load()
        except Exception as error:  # of pyarrow, fsspec, the Hub, ...
            where = "" if Path(source).expanduser().exists() else " (not a local path, so searched on the Hub)"
            raise ValueError(
                f"{source}{where} cannot be read: {one_line(_root_cause(error))}; "
                "pass a valid .parquet, .arrow or .tar file, or the folder of one data set"
            ) from error
    parts = {str(content.split or "train"): content} if isinstance(content, datasets.Dataset) else dict(content)
    if split is not None:
        if split not in parts:
            raise ValueError(f"{source} has no split {split!r}; pass one of {', '.join(parts)} as --split")
        parts = {split: parts[split]}
    empty = next((name for name, rows in parts.items() if len(rows) == 0), None)
    if empty is not None:
        raise ValueError(f"{source} has no rows in {empty}; pass data with rows")
    return {name: rows.with_format(None) for name, rows in parts.items()}


def read_items(source: str | Path, *, suffixes: Collection[str], split: str | None = None) -> dict[str, Dataset]:
    """Reads the parts of a data set whose items may be single files that `datasets` cannot read.

    A folder of such files becomes rows with a column "file" of sorted paths. If every file lies in a folder of its
    class, there is a column "label" with the folder names. Top-level folders train/, validation/ and test/ are the
    parts. Other columns come from `metadata.csv` files in the folder or below. As in Hugging Face folders, their column
    `file_name` contains paths relative to the `metadata.csv`; a column may contain the labels.

    Args:
        source: As in `read`.
        suffixes: Suffixes of single files that are items, such as ".wav".
        split: Name of the only part to read; None for all parts.

    Returns:
        Rows by part name.

    Raises:
        ValueError: As for `read`.
    """
    from datasets import Dataset

    root = Path(source).expanduser().absolute()
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in suffixes) if root.is_dir() else []
    if not files:
        return read(source, suffixes=suffixes, split=split)
    files_by_part: dict[str, list[Path]] = {}
    for file in files:
        top = file.relative_to(root).parts[0]
        files_by_part.setdefault(top if top in _PART_WORDS else "train", []).append(file)
    if split is not None and split not in files_by_part:
        raise ValueError(f"{source} has no split {split!r}; pass one of {', '.join(files_by_part)} as --split")
    parts = {name: part for name, part in files_by_part.items() if split in (None, name)}
    folders = {file.parent for part in parts.values() for file in part}
    class_folders = folders - {root} - {root / word for word in _PART_WORDS}
    labeled = class_folders == folders and len({folder.name for folder in class_folders}) > 1
    cells = _metadata(root, set(files))
    columns = dict.fromkeys(column for row in cells.values() for column in row)
    rows: dict[str, Dataset] = {}
    for name, part in parts.items():
        labels = {"label": [file.parent.name for file in part]} if labeled else {}
        metadata = {column: [cells.get(file, {}).get(column) for file in part] for column in columns}
        rows[name] = Dataset.from_dict({**labels, **metadata, FILE: [str(file) for file in part]})
    return rows


def _metadata(root: Path, files: Collection[Path]) -> dict[Path, dict[str, str]]:
    """The cells of all metadata.csv files below a folder: by file and column."""
    cells: dict[Path, dict[str, str]] = {}
    for path in sorted(root.rglob("metadata.csv")):
        with path.open(newline="", encoding="utf-8-sig") as text:
            rows = list(csv.DictReader(text))
        for row in rows:
            if None in row or not row.get(_FILE_NAME):
                raise ValueError(f"{path} has a row without {_FILE_NAME} or with too many cells; fix it")
            file = path.parent / row.pop(_FILE_NAME)
            if file not in files:
                raise ValueError(f"{path} names {file.name}, which does not exist; fix or remove that row")
            cells[file] = cells.get(file, {}) | row
    return cells


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
    columns = [name for name, feature in features.items() if name == FILE or fits(feature)]
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


def label_column(parts: Mapping[str, Dataset], given: str | None) -> str | None:
    """Returns the column of the class labels, or None for unlabeled data.

    This is the given column, else one with a usual name, else the only ClassLabel column.

    Args:
        parts: Rows of the data set by part name.
        given: Column set by the user, or None.

    Raises:
        ValueError: If the given column does not exist, or several columns fit.
    """
    from datasets import ClassLabel

    if given is not None:
        check_column(parts, given, "--label-column")
        return given
    features = next(iter(parts.values())).features
    classes = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    # In a folder with train/ and test/ but no folder per class, `datasets` mistakes these two for classes.
    part_columns = {name for name, names in classes.items() if set(names) <= _PART_WORDS}
    usual = [name for name in _LABEL_COLUMNS if name in features and name not in part_columns]
    other = [name for name in classes if name not in part_columns]
    if not usual and len(other) > 1:
        raise ValueError(f"the columns {', '.join(other)} all contain classes; pass one as --label-column")
    return next(iter(usual + other), None)


def read_labels(parts: Mapping[str, Dataset], column: str | None) -> tuple[dict[str, Tensor | None], tuple[str, ...]]:
    """Reads the class labels of every part.

    A ClassLabel column defines the classes. Other integers and strings are numbered in sorted order over all parts, so
    integers 0 to K - 1 do not change.

    Args:
        parts: Rows of the data set by part name.
        column: Column of the labels; None for unlabeled data.

    Returns:
        Labels by part name, shape (n,), int64, or None for unlabeled data; and the class names.

    Raises:
        ValueError: If only some rows have a label, values are not classes, or the parts disagree on the classes.
    """
    if column is None:
        return dict.fromkeys(parts), ()
    option = "--label-column"
    labels, class_names = _numbered(parts, column, _cells(parts, column, option), option)
    if not class_names:
        return dict.fromkeys(parts), ()
    for name, part in labels.items():
        num_missing = int((part == MISSING).sum())
        if num_missing:
            raise ValueError(
                f"{num_missing} of {len(part)} rows of {name} have no label in {column!r} (empty or negative); "
                "leave them out, or pass a --split in which all rows have one"
            )
    return {**labels}, class_names


def further_columns(names: str, label_column: str | None) -> list[str]:
    """Splits a comma-separated list of extra label columns, such as "speaker,style".

    Args:
        names: Column names, separated by commas.
        label_column: Column of the class labels, or None.

    Raises:
        ValueError: If a name occurs twice or is the column of the class labels.
    """
    columns = [name.strip() for name in names.split(",")] if names.strip() else []
    for position, name in enumerate(columns):
        if name == label_column or name in columns[:position]:
            problem = "is the --label-column, which is probed anyway" if name == label_column else "occurs twice"
            raise ValueError(f"{name!r} in {PROBE_LABELS} {problem}; name it once")
    return columns


def read_columns(parts: Mapping[str, Dataset], names: Sequence[str]) -> dict[str, tuple[LabelColumn, ...]]:
    """Reads extra label columns of every part; rows without a label are kept.

    Args:
        parts: Rows of the data set by part name.
        names: Names of the columns; their classes are found as in `read_labels`.

    Raises:
        ValueError: If a column does not exist, has no labels, or has values that are not classes.
    """
    columns: dict[str, tuple[LabelColumn, ...]] = dict.fromkeys(parts, ())
    for name in names:
        labels, class_names = _some_numbered(parts, name, _cells(parts, name, PROBE_LABELS))
        for part in parts:
            columns[part] += (LabelColumn(name, labels[part], class_names),)
    return columns


def holds_lists(parts: Mapping[str, Dataset], column: str) -> bool:
    """Returns whether a column contains lists: a label for every frame of an item."""
    return any(hasattr(rows.features.get(column), "feature") for rows in parts.values())


def read_frame_labels(
    parts: Mapping[str, Dataset], column: str
) -> tuple[dict[str, tuple[Tensor, ...]], tuple[str, ...]]:
    """Reads a label for every frame of every item.

    Args:
        parts: Rows of the data set by part name.
        column: Column of lists of labels.

    Returns:
        Labels by part name, one tensor of shape (frames,) per item; and the class names.

    Raises:
        ValueError: As for `read_columns`.
    """
    lists = {name: [frames or [] for frames in part] for name, part in _cells(parts, column, PROBE_LABELS).items()}
    flat = {name: [value for frames in part for value in frames] for name, part in lists.items()}
    labels, class_names = _some_numbered(parts, column, flat)
    lengths = {name: [len(frames) for frames in part] for name, part in lists.items()}
    return {name: torch.split(labels[name], lengths[name]) for name in parts}, class_names


def _cells(parts: Mapping[str, Dataset], column: str, option: str) -> dict[str, Any]:
    check_column(parts, column, option)
    return {name: rows.select_columns(column)[:][column] for name, rows in parts.items()}


def _some_numbered(
    parts: Mapping[str, Dataset], column: str, cells: Mapping[str, Any]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    labels, class_names = _numbered(parts, column, cells, PROBE_LABELS)
    if not class_names:
        raise ValueError(f"no row has a label in {column!r} (empty or negative); leave it out of {PROBE_LABELS}")
    return labels, class_names


def _numbered(
    parts: Mapping[str, Dataset], column: str, cells: Mapping[str, Any], option: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Numbered labels of every part, `MISSING` for empty cells, and the class names, which are empty without labels."""
    values = {name: [_class(value, column, option) for value in part] for name, part in cells.items()}
    present = {value for part in values.values() for value in part if value is not None}
    features = [getattr(rows.features[column], "feature", rows.features[column]) for rows in parts.values()]
    names = {tuple(getattr(feature, "names", None) or ()) for feature in features}
    if present and (len(names) > 1 or len({type(value) for value in present}) > 1):
        raise ValueError(f"the classes in {column!r} differ between {' and '.join(parts)}; pass one of them as --split")
    class_names = names.pop() if present else ()
    order = range(len(class_names)) if class_names else sorted(present)
    number = {value: i for i, value in enumerate(order)}
    out_of_range = present - number.keys()
    if out_of_range:
        label = max(out_of_range)
        raise ValueError(f"{column!r} has label {label} but names {len(class_names)} classes; fix the file")
    labels = {
        name: torch.tensor([MISSING if value is None else number[value] for value in part], dtype=torch.long)
        for name, part in values.items()
    }
    return labels, class_names or tuple(map(str, order))


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
            raise ValueError(f"{name} has no column {column!r}; pass one of {', '.join(rows.features)} as {option}")


def _loader(source: str | Path, suffixes: Collection[str]) -> Callable[[], Any]:
    from datasets import load_dataset, load_from_disk

    path = Path(source).expanduser().absolute()
    if path.is_file():
        if path.suffix not in TABLES:
            raise ValueError(
                f"{source} is not a .parquet, .arrow or .tar file; pass such a file, or the folder of the items"
            )
        return lambda: load_dataset(TABLES[path.suffix], data_files=str(path))
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return lambda: load_from_disk(str(path))
        readable = {*TABLES, *suffixes}
        if not any(file.suffix.lower() in readable for file in path.rglob("*")):
            content = ", ".join(sorted(file.name for file in path.iterdir())[:3]) or "nothing"
            raise ValueError(
                f"{source} contains no {', '.join(sorted(readable))} file but {content}; pass the folder of the data"
            )
        return lambda: load_dataset(str(path))
    # "images/cats" beside an existing folder "images" is a mistyped path and must not reach the network.
    if re.fullmatch(r"[A-Za-z0-9][\w-]*/[\w.-]+", str(source)) and not Path(source).parent.exists():
        return lambda: load_dataset(str(source))
    raise ValueError(f"{source} is not a file or folder; pass a path, digits, or owner/name on the Hugging Face Hub")


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


def _class(value: Any, column: str, option: str) -> Any:
    """A class: a string or a non-negative integer; None for a missing label."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, float) and math.isnan(value):
        return None
    if not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"column {column!r} contains {value!r:.40}, which is not a class; pass another {option}")
    return int(value) if value >= 0 else None


def _root_cause(error: BaseException) -> BaseException:
    return _root_cause(error.__cause__) if error.__cause__ is not None else error
