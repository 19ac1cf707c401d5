"""Rows of data sets, through Hugging Face `datasets`: files, folders, what `save_to_disk` wrote, and the Hub.

Only rows and class names come from here; encoded items stay encoded. A data set has named parts ("train", "test", ...).
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

if TYPE_CHECKING:
    from datasets import Dataset

_LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "fine_label", "cls")
_PART_NUMBERS = {"train": 0, "validation": 1, "test": 2}
_PART_WORDS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
_ID_STRIDE = 10**9
# Files of rows, and what `datasets` calls their format.
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
# The column of the paths where items are single files, and the one that names them in a metadata.csv.
FILE = "file"
PROBE_LABELS = "--probe-labels"
_FILE_NAME = "file_name"


def read(source: str | Path, *, suffixes: Collection[str], split: str | None = None) -> dict[str, Dataset]:
    """The parts of a data set.

    Nothing is written beside the data; `datasets` keeps what it prepared in its own cache (HF_DATASETS_CACHE).

    Args:
        source: A .parquet, .arrow or .tar (webdataset) file; a folder of them, of single files or from `save_to_disk`;
            or "owner/name" on the Hugging Face Hub, the only case that uses the network.
        suffixes: Of single files that are items, like ".png".
        split: The only part to read.

    Raises:
        ValueError: If there is nothing there, it cannot be read, or a part is empty.
    """
    import datasets  # a second of imports

    load = _loader(source, suffixes)
    with _quiet(), _webdataset_as_bytes():
        try:
            found = load()
        except Exception as error:  # of pyarrow, fsspec, the Hub, ...
            where = "" if Path(source).expanduser().exists() else " (no local path, so sought on the Hub)"
            raise ValueError(
                f"{source}{where} cannot be read: {one_line(_root_cause(error))}; "
                "pass a sound .parquet, .arrow or .tar file, or the folder of one data set"
            ) from error
    parts = {str(found.split or "train"): found} if isinstance(found, datasets.Dataset) else dict(found)
    if split is not None:
        if split not in parts:
            raise ValueError(f"{source} has no split {split!r}; pass one of {', '.join(parts)} as --split")
        parts = {split: parts[split]}
    empty = next((name for name, rows in parts.items() if len(rows) == 0), None)
    if empty is not None:
        raise ValueError(f"{source} has no rows in {empty}; pass data that has some")
    return {name: rows.with_format(None) for name, rows in parts.items()}


def read_items(source: str | Path, *, suffixes: Collection[str], split: str | None = None) -> dict[str, Dataset]:
    """The parts of a data set whose items may be single files that `datasets` does not read by itself.

    A folder with such files has a column "file" with their paths, sorted, and, where each lies in a folder of its
    class, a column "label" with that folder's name. Folders train/, validation/ and test/ at its top are its parts. The
    other columns are those of a `metadata.csv` in the folder or below it, whose column `file_name` holds paths from
    where it lies, as in Hugging Face's folders; it may name the labels too.

    Args:
        source: As in `read`.
        suffixes: Of single files that are items, like ".wav".
        split: The only part to read.

    Raises:
        ValueError: As `read` does.
    """
    from datasets import Dataset

    root = Path(source).expanduser().absolute()
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in suffixes) if root.is_dir() else []
    if not files:
        return read(source, suffixes=suffixes, split=split)
    found: dict[str, list[Path]] = {}
    for file in files:
        top = file.relative_to(root).parts[0]
        found.setdefault(top if top in _PART_WORDS else "train", []).append(file)
    if split is not None and split not in found:
        raise ValueError(f"{source} has no split {split!r}; pass one of {', '.join(found)} as --split")
    parts = {name: found[name] for name in found if split in (None, name)}
    holders = {file.parent for part in parts.values() for file in part}
    classes = holders - {root} - {root / word for word in _PART_WORDS}
    labeled = classes == holders and len({folder.name for folder in classes}) > 1
    known = _metadata(root, set(files))
    columns = dict.fromkeys(column for cells in known.values() for column in cells)
    rows: dict[str, Dataset] = {}
    for name, part in parts.items():
        labels = {"label": [file.parent.name for file in part]} if labeled else {}
        further = {column: [known.get(file, {}).get(column) for file in part] for column in columns}
        rows[name] = Dataset.from_dict({**labels, **further, FILE: [str(file) for file in part]})
    return rows


def _metadata(root: Path, files: Collection[Path]) -> dict[Path, dict[str, str]]:
    """What every metadata.csv says of each file: its cells by column, without its name."""
    known: dict[Path, dict[str, str]] = {}
    for place in sorted(root.rglob("metadata.csv")):
        with place.open(newline="", encoding="utf-8-sig") as text:
            rows = list(csv.DictReader(text))
        for row in rows:
            if None in row or not row.get(_FILE_NAME):
                raise ValueError(f"{place} has a row without {_FILE_NAME} or with too many cells; mend it")
            file = place.parent / row.pop(_FILE_NAME)
            if file not in files:
                raise ValueError(f"{place} names {file.name}, which is not there; mend or remove that row")
            known[file] = known.get(file, {}) | row
    return known


def item_column(
    parts: Mapping[str, Dataset],
    given: str | None,
    *,
    usual: Sequence[str],
    what: str,
    fits: Callable[[Any], bool],
) -> str:
    """The column of the items: the given one, the file's, one with a usual name, or the only one of a fitting type.

    Args:
        parts: The data set.
        given: A column, or None.
        usual: Names that such a column often has.
        what: For people: "audio", "motion" or "video".
        fits: Whether a column of this type may hold items.

    Raises:
        ValueError: If the given column is not there, or none or several could be meant.
    """
    if given is not None:
        check_column(parts, given, "--item-column")
        return given
    features = next(iter(parts.values())).features
    columns = [name for name, feature in features.items() if name == FILE or fits(feature)]
    named = [name for name in (FILE, *usual) if name in columns]
    if not columns:
        raise ValueError(f"no column holds {what} but {', '.join(features)}; pass {what}, or --item-column")
    if not named and len(columns) > 1:
        raise ValueError(f"the columns {', '.join(columns)} may all hold {what}; pass one as --item-column")
    return (named or columns)[0]


def holds_bytes(feature: Any) -> bool:
    """Whether a column's type is encoded bytes, or a record of bytes and a path."""
    from datasets import Audio, Image, Video

    is_bytes = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return isinstance(feature, (Audio, Image, Video)) or is_bytes or (isinstance(feature, dict) and "bytes" in feature)


def first_id(part: str) -> int:
    """The id of a part's row 0: 0 in "train", 10**9 in "validation", 2 * 10**9 in "test", further multiples elsewhere.

    It depends on the name only, so that ids stay what they are when another part is added or left out.
    """
    return _ID_STRIDE * _PART_NUMBERS.get(part, len(_PART_NUMBERS) + zlib.crc32(part.encode()))


def label_column(parts: Mapping[str, Dataset], given: str | None) -> str | None:
    """The column of the labels: the given one, or one with a usual name, or the only ClassLabel column, or None.

    Raises:
        ValueError: If the given column is not there, or several columns could be meant.
    """
    from datasets import ClassLabel

    if given is not None:
        check_column(parts, given, "--label-column")
        return given
    features = next(iter(parts.values())).features
    classes = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    # In a folder with train/ and test/ but no folder per class, `datasets` takes these two for classes.
    fake = {name for name, names in classes.items() if set(names) <= _PART_WORDS}
    usual = [name for name in _LABEL_COLUMNS if name in features and name not in fake]
    other = [name for name in classes if name not in fake]
    if not usual and len(other) > 1:
        raise ValueError(f"the columns {', '.join(other)} all hold classes; pass one as --label-column")
    return next(iter(usual + other), None)


def read_labels(parts: Mapping[str, Dataset], column: str | None) -> tuple[dict[str, Tensor | None], tuple[str, ...]]:
    """Labels of every part, shape (n,), int64, and the class names; None and no names for unlabeled data.

    The classes are those of a ClassLabel column. Other integers and strings are numbered in sorted order over all
    parts, so integers 0 ... K-1 stay as they are.

    Raises:
        ValueError: If only some rows have a label, values are no classes, or the parts disagree on the classes.
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
                "leave them out, or pass a --split where all have one"
            )
    return {**labels}, class_names


def further_columns(names: str, label_column: str | None) -> list[str]:
    """The names in "speaker,style".

    Raises:
        ValueError: If one stands twice, or is the column of the class.
    """
    wanted = [name.strip() for name in names.split(",")] if names.strip() else []
    for position, name in enumerate(wanted):
        if name == label_column or name in wanted[:position]:
            twice = "is the --label-column, which is probed anyway" if name == label_column else "stands twice"
            raise ValueError(f"{name!r} in {PROBE_LABELS} {twice}; name it once")
    return wanted


def read_columns(parts: Mapping[str, Dataset], names: Sequence[str]) -> dict[str, tuple[LabelColumn, ...]]:
    """Further label columns of every part, with classes as in `read_labels`; rows without a label stay.

    Raises:
        ValueError: If a column is not there or has no label at all, or its values are no classes.
    """
    columns: dict[str, tuple[LabelColumn, ...]] = dict.fromkeys(parts, ())
    for name in names:
        labels, class_names = _some_numbered(parts, name, _cells(parts, name, PROBE_LABELS))
        for part in parts:
            columns[part] += (LabelColumn(name, labels[part], class_names),)
    return columns


def holds_lists(parts: Mapping[str, Dataset], column: str) -> bool:
    """Whether a column holds a list for every item: a label for each of its frames."""
    return any(hasattr(rows.features.get(column), "feature") for rows in parts.values())


def read_frame_labels(
    parts: Mapping[str, Dataset], column: str
) -> tuple[dict[str, tuple[Tensor, ...]], tuple[str, ...]]:
    """A label for every frame of every item, shape (frames,) each, and the class names; see `read_columns`."""
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
    """Labels of the cells of every part, `MISSING` where there is none, and the class names; none without any label."""
    values = {name: [_class(value, column, option) for value in part] for name, part in cells.items()}
    present = {value for part in values.values() for value in part if value is not None}
    kinds = [getattr(rows.features[column], "feature", rows.features[column]) for rows in parts.values()]
    names = {tuple(getattr(kind, "names", None) or ()) for kind in kinds}
    if present and (len(names) > 1 or len({type(value) for value in present}) > 1):
        raise ValueError(f"the classes in {column!r} differ between {' and '.join(parts)}; pass one of them as --split")
    class_names = names.pop() if present else ()
    order = range(len(class_names)) if class_names else sorted(present)
    number = {value: i for i, value in enumerate(order)}
    beyond = present - number.keys()
    if beyond:
        raise ValueError(f"{column!r} holds label {max(beyond)} but names {len(class_names)} classes; mend the file")
    labels = {
        name: torch.tensor([MISSING if value is None else number[value] for value in part], dtype=torch.long)
        for name, part in values.items()
    }
    return labels, class_names or tuple(map(str, order))


def check_column(parts: Mapping[str, Dataset], column: str, option: str) -> None:
    """Raises ValueError if a part lacks the column, naming the option that sets it."""
    for name, rows in parts.items():
        if column not in rows.features:
            raise ValueError(f"{name} has no column {column!r}; pass one of {', '.join(rows.features)} as {option}")


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _loader(source: str | Path, suffixes: Collection[str]) -> Callable[[], Any]:
    from datasets import load_dataset, load_from_disk

    path = Path(source).expanduser().absolute()
    if path.is_file():
        if path.suffix not in TABLES:
            raise ValueError(f"{source} is no .parquet, .arrow or .tar file; pass one, or the folder of the items")
        return lambda: load_dataset(TABLES[path.suffix], data_files=str(path))
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return lambda: load_from_disk(str(path))
        readable = {*TABLES, *suffixes}
        if not any(file.suffix.lower() in readable for file in path.rglob("*")):
            seen = ", ".join(sorted(file.name for file in path.iterdir())[:3]) or "nothing"
            raise ValueError(
                f"{source} has no {', '.join(sorted(readable))} file but {seen}; pass the folder of the data"
            )
        return lambda: load_dataset(str(path))
    # "images/cats" with a folder "images" here is a mistyped path, and must not reach the network.
    if re.fullmatch(r"[A-Za-z0-9][\w-]*/[\w.-]+", str(source)) and not Path(source).parent.exists():
        return lambda: load_dataset(str(source))
    raise ValueError(f"there is no file or folder {source}; pass a path, digits, or owner/name on the Hugging Face Hub")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and the log of `datasets`: what matters comes back as an exception."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    # Set in the environment it is the user's own wish, and calling would only warn.
    silence = not are_progress_bars_disabled() and "HF_DATASETS_DISABLE_PROGRESS_BARS" not in os.environ
    levels = {name: logging.getLogger(name).level for name in ("datasets", "huggingface_hub")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if silence:
            disable_progress_bars()
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if silence:
            enable_progress_bars()


@contextmanager
def _webdataset_as_bytes() -> Iterator[None]:
    """Sound and video of .tar files stay bytes: to give them a type, `datasets` needs a package that we do not."""
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    names = [name for name in ("AUDIO_EXTENSIONS", "VIDEO_EXTENSIONS") if hasattr(WebDataset, name)]
    usual = {name: getattr(WebDataset, name) for name in names}
    try:
        for name in names:
            setattr(WebDataset, name, [])
        yield
    finally:
        for name, endings in usual.items():
            setattr(WebDataset, name, endings)


def _class(value: Any, column: str, option: str) -> Any:
    """A string, a non-negative integer, or None where there is no label."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, float) and math.isnan(value):
        return None
    if not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"column {column!r} holds {value!r:.40}, which is no class; pass another {option}")
    return int(value) if value >= 0 else None


def _root_cause(error: BaseException) -> BaseException:
    return _root_cause(error.__cause__) if error.__cause__ is not None else error
