"""What was read of a data set and what was not: files, rows, and where the labels come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

LabelSource = Literal[
    "folder",
    "column",
    "latents",
    "refused",
    "no folders",
    "one folder",
    "no column",
    "empty column",
    "unlabeled latents",
]
_SHOWN = 3  # examples in a line


@dataclass(frozen=True)
class Reading:
    """What was read of a data set.

    Attributes:
        files_read: Number of files that were read; 0 for a data set on the Hub.
        files_left: Number of files that were not read, by ending.
        rows: Number of rows by part.
        unused: Parts that were read and that no split is taken from.
        unlabeled: Parts that were left out because the training part has labels and they have none.
        label: Where the labels come from: "folder", "column" or "latents"; or why there are none: they were "refused",
            there are "no folders" of classes or "one folder" of all files, "no column" of labels, an "empty column", or
            "unlabeled latents".
        label_column: Column of the labels, or None.
        annotations: Files that name the classes of items without a class folder.
        class_folders: Folder of the class folders, relative to the data set; empty for the folder of the data or part.
        num_classes: Number of classes.
        empty_folders: Folders beside those of the classes or parts that hold no item.
        alike: Class names that differ by case or white space only, or may stand for a missing label.
        out_of_order: Whether class names are integers in another order than that of their values.
        min_per_class: Smallest number of samples of a class, or None if classes of every size are kept.
        small_classes: Number of samples of the classes that were left out because they have fewer.
        unreadable: Number of items by part that were left out because they cannot be read.
        part_columns: Columns that seem to name the part of each row, with these names; they are not used.
        several_frames: Number of images of several frames or pages, of which the first is read.
    """

    files_read: int
    files_left: Mapping[str, int]
    rows: Mapping[str, int]
    label: LabelSource
    unused: Sequence[str] = ()
    unlabeled: Sequence[str] = ()
    label_column: str | None = None
    annotations: Sequence[str] = ()
    class_folders: str = ""
    num_classes: int = 0
    empty_folders: Sequence[str] = ()
    alike: Sequence[Sequence[str]] = ()
    out_of_order: bool = False
    min_per_class: int | None = None
    small_classes: Mapping[str, int] = field(default_factory=dict)
    unreadable: Mapping[str, int] = field(default_factory=dict)
    part_columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    several_frames: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Converts the record to JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Reading:
        """Creates a record from the result of `to_dict`."""
        return cls(**record)


def reading_lines(reading: Reading) -> dict[str, str]:
    """Returns the record in words, by subject: "files", "labels" and whatever needs attention."""
    lines = {"files": _file_line(reading), "labels": _label_line(reading)}
    if reading.unused:
        counts = ", ".join(f"{name} ({reading.rows[name]} rows)" for name in reading.unused)
        lines["not used"] = f"{counts}; --split reads one part"
    if reading.unlabeled:
        counts = ", ".join(f"{name} ({reading.rows[name]} rows)" for name in reading.unlabeled)
        lines["left out"] = f"{counts}, which has no labels while train has"
    if reading.small_classes:
        rows = sum(reading.small_classes.values())
        lines["small classes"] = (
            f"{len(reading.small_classes)} with fewer than {reading.min_per_class} samples left out, {rows} samples: "
            f"{_examples(list(reading.small_classes))}"
        )
    if reading.unreadable:
        counts = ", ".join(f"{num} of {reading.rows[name]} in {name}" for name, num in reading.unreadable.items())
        lines["cannot be read"] = f"{counts}, left out as --skip-bad allows"
    if reading.part_columns:
        columns = "; ".join(f"column {name!r} ({', '.join(found)})" for name, found in reading.part_columns.items())
        lines["check parts"] = f"{columns} is not used, so its parts are mixed; write each into a folder of its own"
    if reading.several_frames:
        lines["first frames"] = (
            f"{reading.several_frames} images have several frames or pages, of which the first alone is read"
        )
    if reading.empty_folders:
        lines["no items in"] = _examples(reading.empty_folders)
    if reading.alike:
        names = [" and ".join(map(repr, group)) for group in reading.alike]
        lines["check names"] = f"{_examples(names)}: classes of their own; are they spelled as meant?"
    if reading.out_of_order:
        lines["class order"] = "names in the order of strings, 10 before 2, as torchvision numbers folders"
    return {subject: text for subject, text in lines.items() if text}


def _file_line(reading: Reading) -> str:
    if not reading.files_read:
        return ""
    found = reading.files_read + sum(reading.files_left.values())
    left = ", ".join(f"{count} {ending}" for ending, count in reading.files_left.items())
    return f"{reading.files_read} of {found} read" + (f"; left: {left}" if left else "")


def _label_line(reading: Reading) -> str:
    folders = f"folders in {reading.class_folders}" if reading.class_folders else "top folder"
    count = f"{reading.num_classes} class{'es' * (reading.num_classes != 1)}"
    return {
        "folder": f"{' and '.join([folders, *reading.annotations])}, {count}",
        "column": f"column {reading.label_column!r}, {count}",
        "latents": f"stored with the latents, {count}",
        "unlabeled latents": "none: they are declared unlabeled",
        "refused": "none, as --label-column none asks",
        "no folders": "none: the files are not in one folder per class, and no metadata has a column of labels",
        "one folder": f"none: all files lie in the folder {reading.class_folders}, and one folder is no class",
        "no column": "none: no column is named like labels or has the type of classes; see --label-column",
        "empty column": f"none: column {reading.label_column!r} is empty or negative in every row",
    }[reading.label]


def _examples(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
