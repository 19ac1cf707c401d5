"""The common interface of all data sets: samples, batches, labels and splits.

Tensors are float32 with the channel first, (C, *grid), in about [-1, 1]. Sample ids are stable: noise is keyed by the
id, so it must not depend on the order or the size of the subset that is read.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.data.reading import Reading


@dataclass(frozen=True)
class Batch:
    """A batch of samples.

    Attributes:
        x: Samples, shape (B, C, *grid), float32; 0 where padded.
        labels: Class labels, shape (B,), int64, or None for unlabeled data.
        ids: Sample ids, shape (B,), int64.
        mask: Mask, shape (B, *grid), bool, True for data and False for padding up to the common shape. None if no
            sample is padded.
    """

    x: Tensor
    labels: Tensor | None
    ids: Tensor
    mask: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """The mask; all True if no sample is padded."""
        return torch.ones(len(self.x), *self.x.shape[2:], dtype=torch.bool) if self.mask is None else self.mask


MEMORY_BUDGET_BYTES = 2 * 2**30  # for decoded items that are kept
MISSING = -1  # label of rows without a label


@dataclass(frozen=True, eq=False)
class LabelColumn:
    """Extra labels for probes, besides the class that a model is conditioned on: speaker, style, direction.

    Attributes:
        name: Name of the column.
        labels: Labels, shape (n,), or (n, frames) for labels of frames; int64 in [0, len(class_names)), or `MISSING`.
        class_names: Class names, one per class.
        axis: Grid axis (not counting the channels) that the frames of labels (n, frames) run along.

    Raises:
        ValueError: If a label is out of range.
    """

    name: str
    labels: Tensor
    class_names: tuple[str, ...]
    axis: int = 0

    def __post_init__(self) -> None:
        bad = self.labels[(self.labels < MISSING) | (self.labels >= len(self.class_names))]
        if len(bad):
            raise ValueError(
                f"{self.name!r} has label {int(bad[0])} but names {len(self.class_names)} classes; "
                f"pass 0 to {len(self.class_names) - 1}, or {MISSING} for a missing label"
            )

    def at(self, index: Tensor) -> LabelColumn:
        """Returns the column for the samples at these positions."""
        return replace(self, labels=self.labels[index])


def numbered_labels(labels: Any, num_classes: int = 0) -> tuple[Tensor, tuple[str, ...]]:
    """Returns labels as numbers of classes, and the names of the classes.

    Args:
        labels: Integers, truth values or texts, shape (n,): an array, a tensor or a list. Integers from 0 stay as they
            are, without names; others are numbered in sorted order.
        num_classes: Number of classes of a model; integers below it are never numbered anew.

    Raises:
        ValueError: If they are of another type or shape.
    """
    values = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if values.ndim != 1 or values.dtype.kind not in "iubUSO":
        raise ValueError(
            f"the labels have type {values.dtype} and shape {values.shape}; pass one integer or string per sample"
        )
    if values.dtype.kind in "iu" and len(values) and values.min() >= 0 and values.max() < max(len(values), num_classes):
        return torch.from_numpy(values.astype(np.int64)), ()
    names, numbers = np.unique(values.astype(str) if values.dtype.kind in "SOb" else values, return_inverse=True)
    return torch.from_numpy(numbers.astype(np.int64)), tuple(map(str, names))


class Samples(ABC):
    """A map-style data set that may be larger than memory.

    Attributes:
        shape: Shape (C, *grid) of one sample.
        modality: Modality: "image", "audio", "motion" or "video".
        num_classes: Number of classes; 0 for unlabeled data.
        class_names: Class names, one per class, or empty.
        fingerprint: Hash that changes with the content. Extra label columns are left out, because no model sees them.
        labels: Class labels, shape (n,), int64, in [0, num_classes), or None for unlabeled data; held in memory.
        ids: Sample ids, shape (n,), int64; held in memory.
        columns: Extra label columns, for probes.
        reading: What was read of the data set; None for samples that do not come from files.
    """

    shape: tuple[int, ...]
    modality: str
    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str
    labels: Tensor | None
    ids: Tensor
    columns: tuple[LabelColumn, ...] = ()
    reading: Reading | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Batch:
        """Returns the samples at these positions, in this order."""

    def content(self, indices: Sequence[int]) -> Tensor:
        """Returns what tells the samples at these positions from others, shape (B, ...): equal samples have it equal.

        It is the samples themselves, unless they are drawn at random from what is stored, or the 8-bit pixels that they
        are made of.
        """
        return self.batch(indices).x

    def stored_digests(self) -> list[bytes] | None:
        """Returns bytes for every sample that are equal only for equal samples of this data set; None if unknown.

        They are known where everything is read at the beginning anyway, so they may miss samples that are stored in two
        ways and read as the same.
        """
        return None


class TensorSamples(Samples):
    """Samples held in memory.

    Args:
        x: Samples, shape (n, C, *grid), floating point in about [-1, 1], or uint8 that represents [-1, 1].
        labels: Class labels, shape (n,), integers in [0, num_classes), or None for unlabeled data.
        ids: Sample ids, shape (n,); None for the positions 0 to n - 1.
        mask: Mask as in `Batch`, shape (n, *grid), bool; padding is set to 0.
        modality: Modality of the samples.
        class_names: Class names, one per class, or empty.
        fingerprint: Fingerprint of the content; None computes a hash.
        columns: Extra label columns, one row per sample.

    Raises:
        ValueError: If the numbers of samples, labels, ids and column rows differ, a label is out of range, a sample is
            not finite, or a sample consists of padding only.
    """

    def __init__(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        modality: str = "image",
        class_names: tuple[str, ...] = (),
        fingerprint: str | None = None,
        columns: tuple[LabelColumn, ...] = (),
    ) -> None:
        if labels is not None and len(labels) != len(x):
            raise ValueError(f"{len(x)} samples but {len(labels)} labels; pass one label per sample")
        if ids is not None and len(ids) != len(x):
            raise ValueError(f"{len(x)} samples but {len(ids)} ids; pass one id per sample")
        for column in columns:
            if len(column.labels) != len(x):
                num_labels = len(column.labels)
                raise ValueError(
                    f"{len(x)} samples but {num_labels} labels in {column.name!r}; pass one label per sample"
                )
        self.columns = columns
        self.mask = None if mask is None else _checked_mask(mask, x)
        if self.mask is not None:
            x = torch.where(self.mask.unsqueeze(1), x, torch.zeros((), dtype=x.dtype))
        self.x = x if x.dtype == torch.uint8 else _checked_floats(x)
        self.labels = None if labels is None else labels.long()
        self.ids = torch.arange(len(x)) if ids is None else ids.long()
        self.shape = tuple(x.shape[1:])
        self.modality = modality
        self.num_classes = 0 if self.labels is None else _num_classes(self.labels, class_names)
        self.class_names = class_names
        self.fingerprint = fingerprint or content_hash(
            self.x, self.labels, self.ids, modality, class_names, *([] if self.mask is None else [self.mask])
        )

    def __len__(self) -> int:
        return len(self.x)

    def stored_digests(self) -> list[bytes]:
        return row_digests(self.x)

    def batch(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices, dtype=torch.long)
        x = self.x[index]
        if x.dtype == torch.uint8:
            x = pixels_to_float(x)
        labels, mask = (None if column is None else column[index] for column in (self.labels, self.mask))
        return Batch(x, labels, self.ids[index], mask)


class Subset(Samples):
    """A view of the samples at given positions, in that order; ids are kept.

    Args:
        samples: The samples to select from.
        indices: Positions in `samples`, shape (n,).
        name: Name of the selection, which becomes part of the fingerprint.
    """

    def __init__(self, samples: Samples, indices: Sequence[int] | Tensor, *, name: str) -> None:
        self.samples, self.indices = samples, torch.as_tensor(indices, dtype=torch.long)
        self.shape, self.modality = samples.shape, samples.modality
        self.num_classes, self.class_names = samples.num_classes, samples.class_names
        self.labels = None if samples.labels is None else samples.labels[self.indices]
        self.ids = samples.ids[self.indices]
        self.columns = tuple(column.at(self.indices) for column in samples.columns)
        self.reading = samples.reading
        self.fingerprint = f"{samples.fingerprint}/{name}-{content_hash(self.indices)[:8]}"

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Sequence[int]) -> Batch:
        return self.samples.batch(self._inner(indices))

    def content(self, indices: Sequence[int]) -> Tensor:
        return self.samples.content(self._inner(indices))

    def stored_digests(self) -> list[bytes] | None:
        stored = self.samples.stored_digests()
        return None if stored is None else [stored[index] for index in self.indices.tolist()]

    def _inner(self, indices: Sequence[int]) -> list[int]:
        return self.indices[torch.as_tensor(indices, dtype=torch.long)].tolist()


class ClassSubset(Subset):
    """The samples of some classes, which are numbered anew.

    Args:
        samples: The samples to select from, with labels.
        classes: Classes that are kept, ascending.
    """

    def __init__(self, samples: Samples, classes: Sequence[int]) -> None:
        assert samples.labels is not None
        kept = torch.as_tensor(classes, dtype=torch.long)
        super().__init__(samples, torch.isin(samples.labels, kept).nonzero().flatten(), name="classes")
        number = torch.full((samples.num_classes,), MISSING)
        number[kept] = torch.arange(len(kept))
        self.labels = number[samples.labels[self.indices]]
        self.class_names = tuple(samples.class_names[c] if samples.class_names else str(c) for c in kept.tolist())
        self.num_classes = len(kept)

    def batch(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices, dtype=torch.long)
        assert self.labels is not None
        return replace(super().batch(indices), labels=self.labels[index])


def joined(batches: Sequence[Batch]) -> Batch:
    """Concatenates batches of samples of one shape."""
    labels = [batch.labels for batch in batches if batch.labels is not None]
    x = torch.cat([batch.x for batch in batches])
    padded = any(batch.mask is not None for batch in batches)
    mask = torch.cat([batch.real for batch in batches]) if padded else None
    return Batch(x, torch.cat(labels) if labels else None, torch.cat([batch.ids for batch in batches]), mask)


@dataclass(frozen=True)
class Copies:
    """Samples of a split that equal a sample before them.

    Attributes:
        split: Split that the copies are in.
        of: Split of the samples that they equal.
        num: Number of copies.
        total: Number of samples of their split, the copies included.
        is_left_out: Whether the copies were left out of their split.
        num_contradictions: Number of copies whose class is another than that of the first sample that they equal.
    """

    split: str
    of: str
    num: int
    total: int
    is_left_out: bool
    num_contradictions: int = 0


@dataclass(frozen=True)
class Splits:
    """Disjoint training, validation and test splits.

    Attributes:
        train: Samples that probes are fitted on.
        validation: Samples that penalties and layers are chosen on.
        test: Samples that reported numbers are computed on.
        copies: Equal samples that were found, see `duplicates.without_copies`.
    """

    train: Samples
    validation: Samples
    test: Samples
    copies: tuple[Copies, ...] = field(default=(), kw_only=True)

    def items(self) -> list[tuple[str, Samples]]:
        """Returns the names and samples of the three splits: training, validation, test."""
        return [("train", self.train), ("validation", self.validation), ("test", self.test)]

    def mapped(self, function: Callable[[str, Samples], Samples]) -> Splits:
        """Returns the results of a function of name and samples, called for the three splits in their order."""
        train, validation, test = (function(name, samples) for name, samples in self.items())
        return replace(self, train=train, validation=validation, test=test)


def pixels_to_float(pixels: Tensor) -> Tensor:
    """Converts values 0 to 255 of any shape to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def content_hash(*parts: object) -> str:
    """Returns a hash of all parts, 32 hexadecimal digits: tensors by type, shape and values, other objects by repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)};".encode())
            digest.update(part.contiguous().numpy().data)
        else:
            digest.update(f"{part!r};".encode())
    return digest.hexdigest()[:32]


def row_digests(x: Tensor) -> list[bytes]:
    """Returns a hash of every row of a tensor, 16 bytes; those of equal rows are equal."""
    # Adding 0 turns -0.0, which equals 0.0 but has other bytes, into 0.0.
    return [digest_of(row.numpy().tobytes()) for row in x + 0]


def digest_of(content: bytes) -> bytes:
    """Returns a hash of 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def _checked_floats(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(
            f"samples have type {x.dtype}; pass floating point in about [-1, 1], or uint8 that represents it"
        )
    bad = (~x.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(x)} samples have NaN or infinite values (first: {bad[0].item()}); remove them"
        )
    return x.float()


def _checked_mask(mask: Tensor, x: Tensor) -> Tensor:
    if mask.shape != (len(x), *x.shape[2:]) or mask.dtype != torch.bool:
        raise ValueError(
            f"the mask has type {mask.dtype} and shape {tuple(mask.shape)}; pass bool of shape "
            f"{(len(x), *x.shape[2:])}, True where a sample is not padding"
        )
    if x.dtype == torch.uint8:
        raise ValueError("uint8 has no value for padding; pass floating point with a mask")
    empty = (~mask.flatten(1).any(1)).nonzero()
    if len(empty):
        raise ValueError(
            f"{len(empty)} of {len(x)} samples consist of padding only (first: {empty[0].item()}); remove them"
        )
    return mask


def _num_classes(labels: Tensor, class_names: tuple[str, ...]) -> int:
    if len(labels) == 0:
        return len(class_names)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (class_names and high >= len(class_names)):
        allowed = f"labels from 0 to {len(class_names) - 1}" if class_names else "labels from 0"
        raise ValueError(f"labels range from {low} to {high}; pass {allowed}, or None for unlabeled data")
    return len(class_names) or high + 1
