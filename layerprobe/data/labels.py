"""Class labels of rows, and further label columns: which column they are in, and which classes it has."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerprobe.data.listing import PART_OF, Listing
from layerprobe.data.reading import LabelSource, Reading
from layerprobe.data.samples import MISSING, LabelColumn
from layerprobe.data.tables import FILE, FOLDER, check_column, holds_bytes

if TYPE_CHECKING:
    from datasets import Dataset

_LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "fine_label", "cls")
_PART_COLUMNS = {"split", "splits", "part", "set", "subset", "partition", "usage", "Usage"}
NO_LABELS = "none"  # as --label-column
_EMPTY_NAMES = {"nan", "none", "null", "n/a", "na"}  # class names that may stand for a missing label
PROBE_LABELS = "--probe-labels"


@dataclass(frozen=True)
class Labels:
    """Class labels of a data set.

    Attributes:
        column: Column of the labels, or None.
        by_part: Labels by part, shape (n,), int64, or None for a part without labels.
        class_names: Class names; empty if no part has labels.
    """

    column: str | None
    by_part: Mapping[str, Tensor | None]
    class_names: tuple[str, ...]


def label_column(parts: Mapping[str, Dataset], given: str | None) -> str | None:
    """Returns the column of the class labels, or None for unlabeled data.

    This is the given column, else one with a usual name, else the class folders of single files, else the only
    ClassLabel column.

    Args:
        parts: Rows of the data set by part name.
        given: Column set by the user, "none" for no labels, or None.

    Raises:
        ValueError: If the given column does not exist, or several columns fit.
    """
    from datasets import ClassLabel

    features = next(iter(parts.values())).features
    if given == NO_LABELS and NO_LABELS not in features:
        return None
    if given is not None:
        check_column(parts, given, "--label-column")
        return given
    classes = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    # On the Hub, in a folder with train/ and test/ but no folder per class, `datasets` mistakes these two for classes.
    part_columns = {name for name, names in classes.items() if set(names) <= PART_OF.keys()}
    columns = [name for name in features if name not in part_columns]
    # The last word of a column such as "json.label".
    usual = [name for word in _LABEL_COLUMNS for name in columns if name.rpartition(".")[2] == word]
    other = [name for name in classes if name not in part_columns]
    if FOLDER in features and FILE in features and holds_bytes(features[FILE]):
        if usual and not _same_classes(parts, usual[0], FOLDER):
            raise ValueError(
                f"the class folders and the column {usual[0]!r} of the metadata make different classes; pass "
                f"--label-column {FOLDER} or --label-column {usual[0]}"
            )
        return next(iter(usual), FOLDER)
    if not usual and len(other) > 1:
        raise ValueError(f"the columns {', '.join(other)} all contain classes; pass one as --label-column")
    return next(iter(usual + other), None)


def _same_classes(parts: Mapping[str, Dataset], *columns: str) -> bool:
    cells = [_cells(parts, column, "--label-column") for column in columns]
    values = [[value for part in by_part.values() for value in part] for by_part in cells]
    pairs = set(zip(*values, strict=True))
    return all(len(pairs) == len(set(column)) for column in values)


def read_labels(parts: Mapping[str, Dataset], given: str | None) -> Labels:
    """Reads the class labels of every part.

    A ClassLabel column defines the classes. Other integers and strings are numbered in sorted order over all parts, so
    integers 0 to K - 1 do not change, and class folders are numbered as by torchvision.

    Args:
        parts: Rows of the data set by part name.
        given: Column set by the user, as in `label_column`.

    Raises:
        ValueError: If only some rows of a part have a label, values are not classes, or the parts disagree on them.
    """
    column = label_column(parts, given)
    if column is None:
        return Labels(None, dict.fromkeys(parts), ())
    option = "--label-column"
    numbered, class_names = _numbered(parts, column, _cells(parts, column, option), option)
    labels: dict[str, Tensor | None] = {}
    for name, part in numbered.items():
        missing = (part == MISSING).nonzero().flatten().tolist()
        labels[name] = None if len(missing) == len(part) else part
        if 0 < len(missing) < len(part):
            raise ValueError(
                f"{len(missing)} of {len(part)} rows of {name} have no label in {column!r} (empty or negative); "
                f"leave them out (first: {_row_name(parts[name], missing[0])}), or pass a --split in which all rows "
                f"have one, or --label-column {NO_LABELS}"
            )
    return Labels(column, labels, class_names)


def _row_name(rows: Dataset, row: int) -> str:
    if FILE not in rows.features or not holds_bytes(rows.features[FILE]):
        return f"row {row}"
    return Path(rows.select_columns(FILE)[row][FILE]["path"]).name


def reading_of(listing: Listing, parts: Mapping[str, Dataset], labels: Labels, *, given: str | None) -> Reading:
    """Returns what was read.

    Args:
        listing: Files of the data set.
        parts: Rows by part.
        labels: Labels of the rows.
        given: Label column that the user named, or None.
    """
    others = sum(len(files) for name, files in listing.parts.items() if name not in parts)
    return Reading(
        files_read=listing.num_read - others,
        files_left=dict(listing.left) | ({"of other parts": others} if others else {}),
        rows={name: len(rows) for name, rows in parts.items()},
        label=_label_source(listing, labels, given),
        label_column=labels.column,
        annotations=[file.name for file in listing.annotations],
        class_folders=listing.classes_from,
        num_classes=len(labels.class_names),
        empty_folders=list(listing.empty_folders),
        alike=_alike(labels.class_names),
        part_columns=_part_columns(parts),
        out_of_order=_out_of_order(labels.class_names),
    )


def _part_columns(parts: Mapping[str, Dataset]) -> dict[str, list[str]]:
    """Columns named like parts of a data set, whose values in one part name several."""
    found = {}
    for rows in parts.values():
        for name in rows.features.keys() & _PART_COLUMNS:
            values = [value for value in rows.unique(name) if isinstance(value, str)]
            if len({PART_OF.get(value.lower()) for value in values} - {None}) > 1:
                found[name] = sorted(values)
    return found


def _label_source(listing: Listing, labels: Labels, given: str | None) -> LabelSource:
    if labels.column is None:
        if given == NO_LABELS:
            return "refused"
        if listing.form != "items":
            return "no column"
        return "one folder" if listing.classes_from else "no folders"
    if not labels.class_names:
        return "empty column"
    return "folder" if labels.column == FOLDER and listing.form == "items" else "column"


def _alike(names: Sequence[str]) -> list[list[str]]:
    by_letters = defaultdict(list)
    for name in names:
        by_letters["".join(name.lower().split())].append(name)
    return [found for letters, found in by_letters.items() if len(found) > 1 or letters in _EMPTY_NAMES]


def _out_of_order(names: Sequence[str]) -> bool:
    numbers = [int(name) for name in names if name.isdecimal()]
    return len(numbers) == len(names) and numbers != sorted(numbers)


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


def _class(value: Any, column: str, option: str) -> Any:
    """A class: a string or a non-negative integer; None for a missing label."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, float) and math.isnan(value):
        return None
    if not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"column {column!r} contains {value!r:.40}, which is not a class; pass another {option}")
    return int(value) if value >= 0 else None
