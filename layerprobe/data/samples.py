"""What a data set is to layerprobe.

Tensors are float32 with the channel first, (C, *grid), in about [-1, 1]. A sample's id is stable: noise is keyed by it,
so it must not depend on the order or the size of the subset that is read.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Attributes:
        x: Shape (B, C, *grid), float32.
        labels: Shape (B,), int64, or None for unlabeled data.
        ids: Shape (B,), int64.
        mask: Shape (B, *grid), bool: where a sample is real, and not padding up to the common shape, which is 0 in x.
            None where every sample fills its grid.
    """

    x: Tensor
    labels: Tensor | None
    ids: Tensor
    mask: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """The mask, all True where there is none."""
        return torch.ones(len(self.x), *self.x.shape[2:], dtype=torch.bool) if self.mask is None else self.mask


MISSING = -1  # the label of a row that has none


@dataclass(frozen=True, eq=False)
class LabelColumn:
    """What else is known of samples than the class that a model is conditioned on: their speaker, style, direction.

    Attributes:
        name: Of the column.
        labels: Shape (n,), int64, in [0, len(class_names)), or `MISSING`; or (n, frames) with a label for every step
            along the axis of time.
        class_names: One per class.
        axis: Of the grid (not of the channels), along which labels of steps run.

    Raises:
        ValueError: If a label is no class.
    """

    name: str
    labels: Tensor
    class_names: tuple[str, ...]
    axis: int = 0

    def __post_init__(self) -> None:
        bad = self.labels[(self.labels < MISSING) | (self.labels >= len(self.class_names))]
        if len(bad):
            seen = f"{self.name!r} holds label {int(bad[0])} but names {len(self.class_names)} classes"
            raise ValueError(f"{seen}; pass 0 to {len(self.class_names) - 1}, or {MISSING} where there is none")

    def at(self, index: Tensor) -> LabelColumn:
        """The rows at these positions."""
        return replace(self, labels=self.labels[index])


class Samples(ABC):
    """A map-style data set that may be larger than memory.

    Attributes:
        shape: Shape (C, *grid) of one sample.
        modality: "image", "audio", "motion" or "video".
        num_classes: 0 for unlabeled data.
        class_names: One name per class, or empty.
        fingerprint: Changes whenever the content does; further label columns, which no model sees, do not count.
        labels: Shape (n,), int64, in [0, num_classes), or None for unlabeled data. In memory, unlike the samples.
        ids: Shape (n,), int64; in memory too.
        columns: Further labels, for probes.
    """

    shape: tuple[int, ...]
    modality: str
    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str
    labels: Tensor | None
    ids: Tensor
    columns: tuple[LabelColumn, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at these positions, in this order."""


class TensorSamples(Samples):
    """Samples held in memory.

    Args:
        x: Shape (n, C, *grid), floating point, or uint8 that stands for [-1, 1].
        labels: Shape (n,), integers in [0, num_classes), or None.
        ids: Shape (n,); positions where not given.
        mask: Shape (n, *grid), bool, see `Batch`; padding becomes 0.
        fingerprint: A hash of the content where not given.
        columns: Further labels, one row per sample.

    Raises:
        ValueError: If the numbers of samples, labels, ids and rows of a column differ, a label is no class, a sample is
            not finite, or one is nothing but padding.
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
                rows = len(column.labels)
                raise ValueError(f"{len(x)} samples but {rows} labels in {column.name!r}; pass one label per sample")
        self.columns = columns
        self.mask = None if mask is None else _some_real(mask, x)
        if self.mask is not None:
            x = torch.where(self.mask.unsqueeze(1), x, torch.zeros((), dtype=x.dtype))
        self.x = x if x.dtype == torch.uint8 else _finite(x)
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

    def batch(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices, dtype=torch.long)
        x = self.x[index]
        if x.dtype == torch.uint8:
            x = pixels_to_float(x)
        labels, mask = (None if column is None else column[index] for column in (self.labels, self.mask))
        return Batch(x, labels, self.ids[index], mask)


class Subset(Samples):
    """Some positions of other samples, in a given order; ids are kept."""

    def __init__(self, samples: Samples, indices: Sequence[int] | Tensor, *, name: str) -> None:
        self.samples, self.indices = samples, torch.as_tensor(indices, dtype=torch.long)
        self.shape, self.modality = samples.shape, samples.modality
        self.num_classes, self.class_names = samples.num_classes, samples.class_names
        self.labels = None if samples.labels is None else samples.labels[self.indices]
        self.ids = samples.ids[self.indices]
        self.columns = tuple(column.at(self.indices) for column in samples.columns)
        self.fingerprint = f"{samples.fingerprint}/{name}-{content_hash(self.indices)[:8]}"

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Sequence[int]) -> Batch:
        return self.samples.batch(self.indices[torch.as_tensor(indices, dtype=torch.long)].tolist())


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches of one kind of samples as one."""
    labels = [batch.labels for batch in batches if batch.labels is not None]
    x = torch.cat([batch.x for batch in batches])
    padded = any(batch.mask is not None for batch in batches)
    mask = torch.cat([batch.real for batch in batches]) if padded else None
    return Batch(x, torch.cat(labels) if labels else None, torch.cat([batch.ids for batch in batches]), mask)


@dataclass(frozen=True)
class Splits:
    """Disjoint samples: to fit probes, to choose penalties and layers, and to report the numbers that are shown."""

    train: Samples
    validation: Samples
    test: Samples

    def items(self) -> list[tuple[str, Samples]]:
        """The three splits with their names, in this order."""
        return [("train", self.train), ("validation", self.validation), ("test", self.test)]


def pixels_to_float(pixels: Tensor) -> Tensor:
    """Values 0 ... 255 as float32 in [-1, 1], any shape."""
    return pixels.float() / 127.5 - 1


def content_hash(*parts: object) -> str:
    """32 hexadecimal digits that change with any part: tensors by type, shape and values, all else by its repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)};".encode())
            digest.update(part.contiguous().numpy().data)
        else:
            digest.update(f"{part!r};".encode())
    return digest.hexdigest()[:32]


def _finite(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(
            f"samples have type {x.dtype}; pass floating point in about [-1, 1], or uint8 that stands for it"
        )
    bad = (~x.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(x)} samples have NaN or infinite values (first: {bad[0].item()}); remove them"
        )
    return x.float()


def _some_real(mask: Tensor, x: Tensor) -> Tensor:
    if mask.shape != (len(x), *x.shape[2:]) or mask.dtype != torch.bool:
        raise ValueError(
            f"the mask has type {mask.dtype} and shape {tuple(mask.shape)}; pass bool of shape "
            f"{(len(x), *x.shape[2:])}, True where a sample is real"
        )
    if x.dtype == torch.uint8:
        raise ValueError("uint8 has no value that stands for padding; pass floating point with a mask")
    empty = (~mask.flatten(1).any(1)).nonzero()
    if len(empty):
        raise ValueError(f"{len(empty)} of {len(x)} samples are all padding (first: {empty[0].item()}); remove them")
    return mask


def _num_classes(labels: Tensor, class_names: tuple[str, ...]) -> int:
    if len(labels) == 0:
        return len(class_names)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (class_names and high >= len(class_names)):
        allowed = f"0 to {len(class_names) - 1}" if class_names else "0 and up"
        raise ValueError(f"labels run from {low} to {high}; pass {allowed}, and None for unlabeled data")
    return len(class_names) or high + 1
