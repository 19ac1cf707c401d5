"""Common parts of audio, motion and video: items of different lengths, decoded one by one, as samples of one shape.

An item becomes (C, *grid) with one time axis. Longer samples are cropped to their middle, shorter ones are padded at
their end and masked. Values are normalized by the statistics of the training part. The samples keep these statistics,
so that generated samples can be converted back.
"""

from __future__ import annotations

import copy
import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerprobe.data import tables
from layerprobe.data.contents import with_content
from layerprobe.data.labels import (
    further_columns,
    holds_lists,
    read_columns,
    read_frame_labels,
    read_labels,
    reading_of,
)
from layerprobe.data.listing import Listing
from layerprobe.data.reading import Reading
from layerprobe.data.samples import (
    MEMORY_BUDGET_BYTES,
    MISSING,
    Batch,
    LabelColumn,
    Samples,
    content_hash,
    digest_of,
)
from layerprobe.files import one_line
from layerprobe.memory import pass_on

if TYPE_CHECKING:
    from datasets import Dataset


MAX_VALUES = 2**29  # of one item: 2 GiB in float32


class Decoder(ABC):
    """Conversion of an item of a column to a tensor; its `repr` is part of the fingerprint of the samples.

    Attributes:
        modality: Modality: "audio", "motion" or "video".
        time_axis: Axis of (C, *grid) whose length may differ between items.
        normalized: Whether values are normalized to mean 0 and standard deviation 1 per channel.
        row_format: Format in which `datasets` returns items: None for Python objects, "numpy" for arrays.
    """

    modality: str
    time_axis: int = 1
    normalized: bool = True
    row_format: str | None = None

    @abstractmethod
    def __call__(self, item: Any) -> Tensor:
        """Decodes an item, shape (C, *grid), float32.

        Raises:
            Exception: Any exception if the item cannot be decoded; the first line of its message is reported.
        """


@dataclass(frozen=True, eq=False)
class Normalization:
    """The mean and standard deviation per channel, shape (C,) each: x = (value - mean) / std."""

    mean: Tensor
    std: Tensor

    def apply(self, values: Tensor) -> Tensor:
        """Normalizes the values of a sample, shape (C, *grid)."""
        return (values - _columns(self.mean, values)) / _columns(self.std, values)

    def invert(self, x: Tensor) -> Tensor:
        """Converts normalized or generated values, shape (C, *grid), back to the units of the data."""
        return x * _columns(self.std, x) + _columns(self.mean, x)

    def to_dict(self) -> dict[str, list[float]]:
        """Converts the statistics to JSON, which is saved with a model."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Sequence[float]]) -> Normalization:
        """Creates a normalization from the result of `to_dict`."""
        return cls(torch.tensor(record["mean"]), torch.tensor(record["std"]))


class MediaSamples(Samples):
    """Samples of one part of a data set, see `load_media`.

    Args:
        items: The items.
        shape: Shape (C, *grid) of the samples.
        labels: Class labels, shape (n,), or None for unlabeled data.
        class_names: Class names, one per class.
        normalization: Normalization of the values, or None.
        first_id: Id of row 0.
        columns: Extra label columns.
        reading: What was read of the data set.
    """

    normalization: Normalization | None

    def __init__(
        self,
        items: Items,
        shape: tuple[int, ...],
        *,
        labels: Tensor | None,
        class_names: tuple[str, ...],
        normalization: Normalization | None,
        first_id: int,
        columns: tuple[LabelColumn, ...] = (),
        reading: Reading | None = None,
    ) -> None:
        self.shape, self.modality = shape, items.decoder.modality
        self.columns, self.reading = columns, reading
        self.labels, self.class_names, self.num_classes = labels, class_names, len(class_names)
        self.ids = first_id + items.rows_kept
        self.normalization = normalization
        statistics = None if normalization is None else (normalization.mean, normalization.std)
        self.fingerprint = content_hash(
            "media, version 1", items.content, repr(items.decoder), shape, labels, class_names, first_id, statistics
        )
        self.items = items
        lengths = items.shapes[:, items.decoder.time_axis]
        self._padded = bool((lengths < shape[items.decoder.time_axis]).any())

    def __len__(self) -> int:
        return len(self.ids)

    def stored_digests(self) -> list[bytes]:
        return self.items.digests

    def batch(self, indices: Sequence[int]) -> Batch:
        index = torch.arange(len(self))[torch.as_tensor(indices, dtype=torch.long)]
        x = torch.zeros(len(index), *self.shape)
        mask = torch.zeros(len(index), *self.shape[1:], dtype=torch.bool)
        for row, (sample, sample_mask) in enumerate(zip(x, mask, strict=True)):
            values = _middle(self.items[int(index[row])], self.shape, self.items.decoder.time_axis)
            inside = tuple(slice(edge) for edge in values.shape)
            sample[inside] = values if self.normalization is None else self.normalization.apply(values)
            sample_mask[inside[1:]] = True
        labels = None if self.labels is None else self.labels[index]
        return Batch(x, labels, self.ids[index], mask if self._padded else None)


class Items:
    """A column of items, each decoded once in advance to find its shape; decoded items are kept within a memory budget.

    Args:
        rows: Rows of the data set.
        column: Column of the items.
        decoder: Decoder of the items.
        part: Name of the part, for error messages.
        budget_bytes: Memory budget for decoded items.
        skip_bad: Maximum number of unreadable items, which are left out.
        folders: Folders that files of the items may lie in.

    Attributes:
        shapes: Shape (C, *grid) of each readable item, shape (n, 1 + axes).
        rows_kept: Rows of the readable items, shape (n,).
        content: Hash of the decoded items.
        digests: Hash of each decoded item.
        bad: Errors of the items that were left out, by name of the item.
        column: Column of the items.

    Raises:
        ValueError: If more than `skip_bad` items are unreadable, or all of them.
    """

    def __init__(
        self,
        rows: Dataset,
        column: str,
        decoder: Decoder,
        *,
        part: str,
        budget_bytes: int,
        skip_bad: int,
        folders: Sequence[Path],
    ) -> None:
        self.decoder, self.part, self._folders = decoder, part, folders
        self.bad: dict[str, str] = {}
        self._rows, self.column = undecoded(rows.select_columns(column), column), column
        self._rows = self._rows.with_format(decoder.row_format)
        self._values: dict[int, Tensor] = {}
        digest, shapes, kept = hashlib.sha256(), [], []
        self.digests: list[bytes] = []
        for row, item in read_items(self._rows, column):
            try:
                value = _checked(decoder(with_content(item, folders)))
            except ModuleNotFoundError:  # not caused by the item
                raise
            except Exception as error:  # decoders raise almost any exception on damaged data
                pass_on(error)
                self.bad[self.name(row)] = one_line(error)
                if len(self.bad) > skip_bad:
                    raise ValueError(self._complaint(skip_bad)) from error
                continue
            content = value.numpy().tobytes()
            digest.update(content)
            self.digests.append(digest_of(content))
            shapes.append(value.shape)
            kept.append(row)
            budget_bytes -= value.nbytes
            if budget_bytes >= 0:
                self._values[row] = value
        if not kept:
            first = next(f"{name}: {error}" for name, error in self.bad.items())
            raise ValueError(f"{part} has no readable item; the first is {first}; pass other data")
        self.shapes, self.rows_kept, self.content = torch.tensor(shapes), torch.tensor(kept), digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows_kept)

    @property
    def num_bytes(self) -> int:
        """The size of the decoded items in memory."""
        return sum(value.nbytes for value in self._values.values())

    def __getitem__(self, index: int) -> Tensor:
        row = int(self.rows_kept[index])
        value = self._values.get(row)
        return self.decoder(self.undecoded(index)) if value is None else value

    def undecoded(self, index: int) -> Any:
        """Returns an item as stored in the data set, with its content if it is a file."""
        return with_content(self._rows[int(self.rows_kept[index])][self.column], self._folders)

    def name(self, row: int) -> str:
        """Returns the row and path of an item, for messages."""
        item = self._rows[row][self.column]
        path = item if isinstance(item, str) else item.get("path") if isinstance(item, dict) else None
        return f"item {row} of {self.part}" + (f" ({path})" if path else "")

    def _complaint(self, skip_bad: int) -> str:
        name, error = list(self.bad.items())[-1]
        problem = f"{name} cannot be read: {error}; repair or remove it"
        if skip_bad:
            return f"{len(self.bad)} items cannot be read, --skip-bad allows {skip_bad}; the last: {problem}"
        return f"{problem}, or pass --skip-bad 1 or more"


def load_media(
    listing: Listing,
    parts: Mapping[str, Dataset],
    column: str,
    decoder: Decoder,
    *,
    label_column: str | None = None,
    probe_labels: str = "",
    length: int | None = None,
    skip_bad: int = 0,
    memory_budget_bytes: int = MEMORY_BUDGET_BYTES,
) -> dict[str, Samples]:
    """Converts the parts of a data set to samples of one shape.

    Args:
        listing: Files of the data set.
        parts: Rows of the data set by part name.
        column: Column of the items.
        decoder: Decoder of the items.
        label_column: Column of the class labels; None finds it as in `labels.label_column`.
        probe_labels: Extra label columns, separated by commas; a column of lists labels every frame of its items.
        length: Length along the time axis; None for the longest item.
        skip_bad: Maximum number of unreadable items per part, which are left out.
        memory_budget_bytes: Memory budget for decoded items; other items are decoded at every access.

    Returns:
        Samples by part name.

    Raises:
        ValueError: If items cannot be read, or differ in shape apart from their length.
    """
    if length is not None and length < 1:
        raise ValueError(f"--length is {length}; pass at least 1")
    if skip_bad < 0:
        raise ValueError(f"--skip-bad is {skip_bad}; pass 0 or more")
    labels = read_labels(parts, label_column)
    extra = further_columns(probe_labels, labels.column)
    frame_labels = {name: read_frame_labels(parts, name) for name in extra if holds_lists(parts, name)}
    columns = read_columns(parts, [name for name in extra if name not in frame_labels])
    reading = reading_of(listing, parts, labels, given=label_column)
    items = {}
    for name, rows in parts.items():
        items[name] = Items(
            rows,
            column,
            decoder,
            part=name,
            budget_bytes=memory_budget_bytes,
            skip_bad=skip_bad,
            folders=listing.folders,
        )
        memory_budget_bytes -= items[name].num_bytes
    reading = replace(reading, unreadable={name: len(part.bad) for name, part in items.items() if part.bad})
    shape = _common_shape(items, decoder.time_axis, length)
    statistics = _statistics(items.get("train", next(iter(items.values())))) if decoder.normalized else None
    samples: dict[str, Samples] = {}
    for name, part in items.items():
        part_labels = labels.by_part[name]
        samples[name] = MediaSamples(
            part,
            shape,
            labels=None if part_labels is None else part_labels[part.rows_kept],
            class_names=labels.class_names,
            normalization=statistics,
            first_id=tables.first_id(name),
            reading=reading,
            columns=(
                *(column.at(part.rows_kept) for column in columns[name]),
                *(
                    LabelColumn(
                        column, _frame_labels(part, column, rows[name], shape), class_names, decoder.time_axis - 1
                    )
                    for column, (rows, class_names) in frame_labels.items()
                ),
            ),
        )
    return samples


def read_items(rows: Dataset, column: str) -> Iterator[tuple[int, Any]]:
    """Yields row numbers and items, with only a few items in memory at a time."""
    for start in range(0, len(rows), 64):
        yield from enumerate(rows[start : start + 64][column], start)


def file_bytes(item: Any) -> io.BytesIO:
    """Returns the content of an encoded item.

    Args:
        item: Bytes, or a record of bytes and a path, as `with_content` returns it; no file is opened.

    Raises:
        ValueError: If the item is empty.
    """
    content = item.get("bytes") if isinstance(item, dict) else item
    if not content:
        raise ValueError("it is empty")
    return io.BytesIO(content)


def _checked(value: Tensor) -> Tensor:
    if not value.numel():
        raise ValueError("it has length 0")
    if not bool(value.isfinite().all()):
        raise ValueError("it contains NaN or infinite values")
    return value.float().contiguous()


def undecoded(rows: Dataset, column: str) -> Dataset:
    """Disables the decoding of a column by `datasets`, which needs other packages; items stay bytes and paths."""
    feature = _undecoded(rows.features[column])
    if feature is None:
        return rows
    rows = copy.deepcopy(rows)
    rows.info.features[column] = feature  # a cast does the same, but copies the data of list columns
    return rows


def _undecoded(feature: Any) -> Any:
    """The type of a column, or of its list elements, without decoding; None if the type is never decoded."""
    from datasets import Audio, Image, Video

    if isinstance(feature, (Audio, Image, Video)):
        return type(feature)(decode=False)
    inner = _undecoded(feature.feature) if hasattr(feature, "feature") else None
    return None if inner is None else replace(feature, feature=inner)


def _common_shape(items: Mapping[str, Items], time_axis: int, length: int | None) -> tuple[int, ...]:
    shapes = torch.cat([part.shapes for part in items.values()])
    common = shapes[0].clone()
    common[time_axis] = int(shapes[:, time_axis].max()) if length is None else length
    if common.prod() > MAX_VALUES:
        shape = "x".join(map(str, common.tolist()))
        raise ValueError(
            f"samples of {shape} are too large, {MAX_VALUES:.3g} values are supported; pass a smaller --length"
        )
    for part in items.values():
        with_common_length = part.shapes.clone()
        with_common_length[:, time_axis] = common[time_axis]
        different = (with_common_length != common).any(1).nonzero()
        if len(different):
            shape, first = ("x".join(map(str, s.tolist())) for s in (part.shapes[int(different[0])], shapes[0]))
            name = part.name(int(part.rows_kept[int(different[0])]))
            raise ValueError(f"{name} is {shape} but the first is {first}; pass data of one kind")
    return tuple(common.tolist())


def _middle(values: Tensor, shape: tuple[int, ...], time_axis: int) -> Tensor:
    """Crops the values to at most `shape[time_axis]` steps in the middle."""
    extra = max(values.shape[time_axis] - shape[time_axis], 0)
    return values.narrow(time_axis, extra // 2, values.shape[time_axis] - extra)


def _frame_labels(items: Items, column: str, rows: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Labels of the frames of the samples, shape (n, frames), `MISSING` for frames without a label.

    Args:
        items: The n items.
        column: Column of the labels, for error messages.
        rows: Labels of the frames of every row before the stride; empty for rows without labels.
        shape: Shape of a sample.
    """
    axis = items.decoder.time_axis
    labels = torch.full((len(items), shape[axis]), MISSING)
    for sample_labels, row, steps in zip(labels, items.rows_kept.tolist(), items.shapes[:, axis].tolist(), strict=True):
        row_labels = rows[row][:: getattr(items.decoder, "stride", 1)] if len(rows[row]) != steps else rows[row]
        if len(row_labels) not in (0, steps):
            counts = f"{items.name(row)} has {steps} frames but {len(rows[row])} labels in {column!r}"
            raise ValueError(f"{counts}; pass a label for every frame")
        cropped = _middle(row_labels, shape[axis : axis + 1], 0)
        sample_labels[: len(cropped)] = cropped
    return labels


def _statistics(items: Items) -> Normalization:
    """Mean and standard deviation over all values of a channel; a constant channel gets standard deviation 1."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    # Two passes, because the sum of squares loses the variance of channels with a large mean.
    for index in range(len(items)):
        values = items[index].double().flatten(1)
        count, total = count + values.shape[1], total + values.sum(1)
    mean = total / count
    for index in range(len(items)):
        squares = squares + (items[index].double().flatten(1) - mean.unsqueeze(1)).square().sum(1)
    std = (squares / count).sqrt()
    constant = std <= 1e-6 * mean.abs().clamp(min=1e-12)
    return Normalization(mean.float(), std.masked_fill(constant, 1.0).float())


def _columns(statistic: Tensor, values: Tensor) -> Tensor:
    return statistic.to(values).view(-1, *[1] * (values.ndim - 1))
