"""What audio, motion and video have in common: items of unequal length, decoded one by one, as samples of one shape.

An item becomes (C, *grid) with one axis of time. Samples longer than the wanted length are cut to their middle, shorter
ones are padded behind their end and masked. Values are normalized by the statistics of the training part, which the
samples carry, so that what a model makes can be turned back.
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
from layerprobe.data.samples import MISSING, Batch, LabelColumn, Samples, content_hash

if TYPE_CHECKING:
    from datasets import Dataset


MEMORY_BUDGET_BYTES = 2 * 2**30


class Decoder(ABC):
    """How an item of a column becomes a tensor; what it depends on is in its `repr`.

    Attributes:
        modality: "audio", "motion" or "video".
        time_axis: Which axis of (C, *grid) may differ in length.
        normalized: Whether values are brought to mean 0 and standard deviation 1 per channel.
        row_format: How `datasets` gives the items: None as Python objects, "numpy" as arrays.
    """

    modality: str
    time_axis: int = 1
    normalized: bool = True
    row_format: str | None = None

    @abstractmethod
    def __call__(self, item: Any) -> Tensor:
        """The item, shape (C, *grid), float32.

        Raises:
            Exception: Whatever is wrong with the item; its message ends up in one line.
        """


@dataclass(frozen=True, eq=False)
class Normalization:
    """Mean and standard deviation per channel, shape (C,) each: x = (value - mean) / std."""

    mean: Tensor
    std: Tensor

    def apply(self, values: Tensor) -> Tensor:
        """Values (..., C, *grid) of one sample, shape (C, *grid), as the model sees them."""
        return (values - _columns(self.mean, values)) / _columns(self.std, values)

    def invert(self, x: Tensor) -> Tensor:
        """What the model sees, or makes, shape (C, *grid), as values."""
        return x * _columns(self.std, x) + _columns(self.mean, x)

    def to_dict(self) -> dict[str, list[float]]:
        """JSON, kept with a model."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Sequence[float]]) -> Normalization:
        """What `to_dict` gave."""
        return cls(torch.tensor(record["mean"]), torch.tensor(record["std"]))


class MediaSamples(Samples):
    """Items of one part of a data set; see `load_media`."""

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
    ) -> None:
        self.shape, self.modality = shape, items.decoder.modality
        self.columns = columns
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

    def batch(self, indices: Sequence[int]) -> Batch:
        index = torch.arange(len(self))[torch.as_tensor(indices, dtype=torch.long)]
        x = torch.zeros(len(index), *self.shape)
        mask = torch.zeros(len(index), *self.shape[1:], dtype=torch.bool)
        for row, (place, real) in enumerate(zip(x, mask, strict=True)):
            values = _middle(self.items[int(index[row])], self.shape, self.items.decoder.time_axis)
            inside = tuple(slice(edge) for edge in values.shape)
            place[inside] = values if self.normalization is None else self.normalization.apply(values)
            real[inside[1:]] = True
        labels = None if self.labels is None else self.labels[index]
        return Batch(x, labels, self.ids[index], mask if self._padded else None)


class Items:
    """One column, every item decoded once to learn its shape; what fits the memory is kept.

    Args:
        rows: The data set.
        column: Where the items are.
        decoder: How they are decoded.
        part: Name of the part.
        budget_bytes: Decoded items are kept up to this size.
        skip_bad: So many items that cannot be decoded are left out.

    Attributes:
        shapes: Shape (C, *grid) of each item that is kept in the data, shape (n, 1 + axes).
        rows_kept: Their rows, shape (n,).
        content: A hash of all items.
        bad: What is wrong with the items that were left out, by name.
        column: Where they are.

    Raises:
        ValueError: If an item cannot be decoded and no more may be left out, or none is left.
    """

    def __init__(
        self, rows: Dataset, column: str, decoder: Decoder, *, part: str, budget_bytes: int, skip_bad: int
    ) -> None:
        self.decoder, self.part = decoder, part
        self.bad: dict[str, str] = {}
        self._rows, self.column = undecoded(rows.select_columns(column), column), column
        self._rows = self._rows.with_format(decoder.row_format)
        self._values: dict[int, Tensor] = {}
        digest, shapes, kept = hashlib.sha256(), [], []
        for row, item in read_items(self._rows, column):
            try:
                value = _checked(decoder(item))
            except (MemoryError, ModuleNotFoundError):  # neither is the item's fault
                raise
            except Exception as error:  # decoders meet damaged data with almost any
                self.bad[self.name(row)] = tables.one_line(error)
                if len(self.bad) > skip_bad:
                    raise ValueError(self._complaint(skip_bad)) from error
                continue
            digest.update(value.numpy().tobytes())
            shapes.append(value.shape)
            kept.append(row)
            budget_bytes -= value.nbytes
            if budget_bytes >= 0:
                self._values[row] = value
        if not kept:
            seen = next(f"{name}: {said}" for name, said in self.bad.items())
            raise ValueError(f"{part} has no item that can be read; the first is {seen}; pass other data")
        self.shapes, self.rows_kept, self.content = torch.tensor(shapes), torch.tensor(kept), digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows_kept)

    @property
    def num_bytes(self) -> int:
        """Of the decoded items in memory."""
        return sum(value.nbytes for value in self._values.values())

    def __getitem__(self, index: int) -> Tensor:
        row = int(self.rows_kept[index])
        found = self._values.get(row)
        return self.decoder(self._rows[row][self.column]) if found is None else found

    def undecoded(self, index: int) -> Any:
        """The item as the data holds it."""
        return self._rows[int(self.rows_kept[index])][self.column]

    def name(self, row: int) -> str:
        """For people."""
        item = self._rows[row][self.column]
        path = item if isinstance(item, str) else item.get("path") if isinstance(item, dict) else None
        return f"item {row} of {self.part}" + (f" ({path})" if path else "")

    def _complaint(self, skip_bad: int) -> str:
        name, error = list(self.bad.items())[-1]
        seen = f"{name} cannot be read: {error}; mend or remove it"
        if skip_bad:
            return f"{len(self.bad)} items cannot be read, --skip-bad allows {skip_bad}; the last: {seen}"
        return f"{seen}, or pass --skip-bad 1 or more"


def load_media(
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
    """The parts of a data set as samples of one shape.

    Args:
        parts: Rows by the name of the part.
        column: Where the items are.
        decoder: How they are decoded.
        label_column: As in `tables.label_column`.
        probe_labels: Further label columns, comma-separated; a list in one of them labels every frame of its item.
        length: Along the axis of time; the longest item's where not given.
        skip_bad: So many items of each part may be unreadable and are left out.
        memory_budget_bytes: Decoded items are kept up to this size, the others are decoded at every access.

    Raises:
        ValueError: If items cannot be read, or differ in shape elsewhere than in their length.
    """
    if length is not None and length < 1:
        raise ValueError(f"--length is {length}; pass at least 1")
    if skip_bad < 0:
        raise ValueError(f"--skip-bad is {skip_bad}; pass 0 or more")
    labels_in = tables.label_column(parts, label_column)
    labels, class_names = tables.read_labels(parts, labels_in)
    further = tables.further_columns(probe_labels, labels_in)
    framed = {name: tables.read_frame_labels(parts, name) for name in further if tables.holds_lists(parts, name)}
    columns = tables.read_columns(parts, [name for name in further if name not in framed])
    items = {}
    for name, rows in parts.items():
        items[name] = Items(rows, column, decoder, part=name, budget_bytes=memory_budget_bytes, skip_bad=skip_bad)
        memory_budget_bytes -= items[name].num_bytes
    shape = _common_shape(items, decoder.time_axis, length)
    statistics = _statistics(items.get("train", next(iter(items.values())))) if decoder.normalized else None
    samples: dict[str, Samples] = {}
    for name, part in items.items():
        own = labels[name]
        samples[name] = MediaSamples(
            part,
            shape,
            labels=None if own is None else own[part.rows_kept],
            class_names=class_names,
            normalization=statistics,
            first_id=tables.first_id(name),
            columns=(
                *(column.at(part.rows_kept) for column in columns[name]),
                *(
                    LabelColumn(
                        column, _frame_labels(part, column, rows[name], shape), class_names, decoder.time_axis - 1
                    )
                    for column, (rows, class_names) in framed.items()
                ),
            ),
        )
    return samples


def read_items(rows: Dataset, column: str) -> Iterator[tuple[int, Any]]:
    """Rows and their items, a few in memory at a time."""
    for start in range(0, len(rows), 64):
        yield from enumerate(rows[start : start + 64][column], start)


def file_bytes(item: Any) -> io.BytesIO:
    """The content of an encoded item: bytes, a path, or a record of both as `datasets` keeps them.

    Raises:
        ValueError: If it is empty.
    """
    content, path = (item.get("bytes"), item.get("path")) if isinstance(item, dict) else (item, None)
    if isinstance(content, str):
        content, path = None, content
    if content is None and path is not None:
        content = Path(path).read_bytes()
    if not content:
        raise ValueError("it is empty")
    return io.BytesIO(content)


def _checked(value: Tensor) -> Tensor:
    if not value.numel():
        raise ValueError("it has no length")
    if not bool(value.isfinite().all()):
        raise ValueError("it holds NaN or infinite values")
    return value.float().contiguous()


def undecoded(rows: Dataset, column: str) -> Dataset:
    """The rows with what `datasets` would decode left as bytes and paths: it needs other packages than we do."""
    feature = _undecoded(rows.features[column])
    if feature is None:
        return rows
    rows = copy.deepcopy(rows)
    rows.info.features[column] = feature  # All that a cast does, which would write a copy of the data for lists.
    return rows


def _undecoded(feature: Any) -> Any:
    """The type of a column, or of what its lists hold, without decoding; None where nothing is decoded anyway."""
    from datasets import Audio, Image, Video

    if isinstance(feature, (Audio, Image, Video)):
        return type(feature)(decode=False)
    inner = _undecoded(feature.feature) if hasattr(feature, "feature") else None
    return None if inner is None else replace(feature, feature=inner)


def _common_shape(items: Mapping[str, Items], time_axis: int, length: int | None) -> tuple[int, ...]:
    shapes = torch.cat([part.shapes for part in items.values()])
    wanted = shapes[0].clone()
    wanted[time_axis] = int(shapes[:, time_axis].max()) if length is None else length
    for part in items.values():
        rest = part.shapes.clone()
        rest[:, time_axis] = wanted[time_axis]
        different = (rest != wanted).any(1).nonzero()
        if len(different):
            seen, first = ("x".join(map(str, s.tolist())) for s in (part.shapes[int(different[0])], shapes[0]))
            name = part.name(int(part.rows_kept[int(different[0])]))
            raise ValueError(f"{name} is {seen} but the first is {first}; pass data of one kind")
    return tuple(wanted.tolist())


def _middle(values: Tensor, shape: tuple[int, ...], time_axis: int) -> Tensor:
    """At most `shape[time_axis]` steps, from the middle."""
    extra = max(values.shape[time_axis] - shape[time_axis], 0)
    return values.narrow(time_axis, extra // 2, values.shape[time_axis] - extra)


def _frame_labels(items: Items, column: str, rows: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The labels of the frames that samples keep, shape (n, frames), `MISSING` where there is none.

    Args:
        items: The n items.
        column: Where the labels are, for errors.
        rows: A label per frame of each row of the data, before a stride; empty for a row without labels.
        shape: Of a sample.
    """
    axis = items.decoder.time_axis
    labels = torch.full((len(items), shape[axis]), MISSING)
    for place, row, steps in zip(labels, items.rows_kept.tolist(), items.shapes[:, axis].tolist(), strict=True):
        own = rows[row][:: getattr(items.decoder, "stride", 1)] if len(rows[row]) != steps else rows[row]
        if len(own) not in (0, steps):
            seen = f"{items.name(row)} has {steps} frames but {len(rows[row])} labels in {column!r}"
            raise ValueError(f"{seen}; pass a label for every frame")
        kept = _middle(own, shape[axis : axis + 1], 0)
        place[: len(kept)] = kept
    return labels


def _statistics(items: Items) -> Normalization:
    """Over all values of a channel; a channel that never changes keeps its unit."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    # Two passes: float32 squares lose the variance of channels with a large mean.
    for index in range(len(items)):
        values = items[index].double().flatten(1)
        count, total = count + values.shape[1], total + values.sum(1)
    mean = total / count
    for index in range(len(items)):
        squares = squares + (items[index].double().flatten(1) - mean.unsqueeze(1)).square().sum(1)
    std = (squares / count).sqrt()
    flat = std <= 1e-6 * mean.abs().clamp(min=1e-12)
    return Normalization(mean.float(), std.masked_fill(flat, 1.0).float())


def _columns(statistic: Tensor, values: Tensor) -> Tensor:
    return statistic.to(values).view(-1, *[1] * (values.ndim - 1))
