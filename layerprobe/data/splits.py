"""Division of a data set into training, validation and test splits.

Samples are sorted in a fixed order that depends on their ids, their labels and a seed (`keyed_order`). Each split is a
section of that order, and a count takes the first samples of the section. A sample therefore never changes its split
when a count changes: no run is tested on samples that another run was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.data.duplicates import groups, without_copies
from layerprobe.data.samples import MISSING, Samples, Splits, Subset

# Default maximum for probing: more samples change no conclusion and take proportionally longer.
PROBING_COUNTS = {"train": 8000, "validation": 2000, "test": 5000}
_LEAST = 5  # different samples that can be divided
_TEST_NAMES = ("test", "validation", "valid", "val", "dev", "eval")


def split(
    sources: Samples | Mapping[str, Samples],
    *,
    num_train: int | None = None,
    num_validation: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
) -> Splits:
    """Divides a data set into disjoint training, validation and test splits.

    If the data set has a "train" part and a "test" (or "validation") part, 80 % of the former become the training
    split, 20 % the validation split, and the latter part becomes the test split. A single part, or "train" alone, is
    divided 60/20/20. All splits are stratified by class. Samples that are known to be equal, see `groups`, stay in one
    split, the shares being those of different samples, of which there must be at least 5.

    Args:
        sources: Parts of a data set by name, or a single part.
        num_train: Number of training samples, at least one per class; None for all.
        num_validation: Number of validation samples; None for all.
        num_test: Number of test samples; None for all.
        seed: Seed of the assignment of samples to splits.

    Raises:
        ValueError: If a count exceeds its split, the training split lacks a class, a class has fewer than two samples,
            or the parts do not belong together.
    """
    train, held_out = train_and_held_out({"all": sources} if isinstance(sources, Samples) else sources)
    if held_out is not None:
        _check_related(train, held_out)
        _check_classes_of_train(train, held_out)
    _check_class_sizes(train)
    first, second, *third = _sections(train, (0.6, 0.8) if held_out is None else (0.8,), seed=seed)
    splits = Splits(
        Subset(train, first, name="train"),
        Subset(train, second, name="validation"),
        Subset(train, third[0], name="test")
        if held_out is None
        else Subset(held_out, keyed_order(held_out, seed=seed), name="test"),
    )
    if not all(len(samples) for _, samples in splits.items()):
        raise ValueError(f"{len(train)} samples are too few for three splits; pass at least {_LEAST}")
    return take(splits, num_train=num_train, num_validation=num_validation, num_test=num_test)


def _sections(samples: Samples, ends: Sequence[float], *, seed: int) -> list[Tensor]:
    """Positions of the samples in the sections of their order that end at these fractions, and in the rest.

    Copies come last in the section of the sample that they equal, so without copies the order is `keyed_order`.
    """
    positions = torch.arange(len(samples))
    first = torch.from_numpy(groups(samples))
    if int((first == positions).sum()) < _LEAST:
        first = positions  # Divided all the same, for a description or a training; a probing run finds the copies.
    own = positions[first == positions]
    order = own[keyed_order(Subset(samples, own, name="different"), seed=seed)]
    copies = keyed_order(samples, seed=seed)
    copies = copies[(first != positions)[copies]]
    cuts = [0, *(round(end * len(order)) for end in ends), len(order)]
    sections = [order[start:end] for start, end in pairwise(cuts)]
    return [torch.cat([section, copies[torch.isin(first[copies], section)]]) for section in sections]


def take(
    splits: Splits, *, num_train: int | None = None, num_validation: int | None = None, num_test: int | None = None
) -> Splits:
    """Returns the first samples of each split.

    Args:
        splits: The splits.
        num_train: Number of training samples; None for all.
        num_validation: Number of validation samples; None for all.
        num_test: Number of test samples; None for all.

    Raises:
        ValueError: If a count exceeds its split, the training split then lacks a class, or an id occurs twice.
    """
    counts = {"train": num_train, "validation": num_validation, "test": num_test}
    subsets = splits.mapped(lambda name, samples: _first(samples, counts[name], name))
    train = subsets.train
    if train.labels is not None:
        missing = [c for c, count in enumerate(_class_sizes(train)) if count == 0]
        if missing:
            raise ValueError(
                f"the training split of {len(train)} samples lacks {len(missing)} of {train.num_classes} classes "
                f"(first: {_class_name(train, missing[0])}); pass a larger --num-train"
            )
    ids = torch.cat([samples.ids for _, samples in subsets.items()])
    num_duplicates = len(ids) - len(set(ids.tolist()))
    if num_duplicates:
        raise ValueError(f"{num_duplicates} sample ids occur twice; give every sample a unique id")
    return subsets


def for_probing(splits: Splits, *, given: Mapping[str, Any]) -> Splits:
    """Limits each split to `PROBING_COUNTS` samples, unless the user set its count, and checks the extra label columns.

    Of equal samples among these, validation and test keep none that a split before them has, see `without_copies`.
    Splits are stratified by the class alone, so a class of an extra label column may be missing from a split.

    Args:
        splits: The splits.
        given: Options set by the user; those named num_train, num_validation and num_test exempt their split.

    Raises:
        ValueError: If a split has nothing but copies, there is a single class, or a probe cannot be fitted on an extra
            label column, see `check_probed`.
    """
    if splits.train.num_classes == 1:
        raise ValueError(
            f"all samples are of one class ({_class_name(splits.train, 0)}), and a probe needs two; pass another "
            "--label-column, or --label-column none to measure without labels"
        )
    counts = {
        f"num_{name}": min(len(samples), PROBING_COUNTS[name])
        for name, samples in splits.items()
        if f"num_{name}" not in given
    }
    subsets = without_copies(take(splits, **counts))
    for name, samples in subsets.items():
        if not len(samples):
            raise ValueError(
                f"all {name} samples are copies of samples in other splits; pass data whose samples differ"
            )
    for columns in zip(*(samples.columns for _, samples in subsets.items()), strict=True):
        names = (name for name, _ in subsets.items())
        check_probed(columns[0].name, {name: c.labels.numpy() for name, c in zip(names, columns, strict=True)})
    return subsets


def known_labels(labels: NDArray[np.int64], train_labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns which labels of an extra column a probe can predict: those whose class occurs in the training split.

    Args:
        labels: Labels of any shape.
        train_labels: Labels of the training split.

    Returns:
        Mask of the shape of `labels`; False for missing labels.
    """
    known: NDArray[np.bool_] = (labels != MISSING) & np.isin(labels, train_labels)
    return known


def check_probed(name: str, labels: Mapping[str, NDArray[np.int64]]) -> None:
    """Checks that a probe can be fitted, chosen and scored on an extra label column.

    Args:
        name: Name of the column.
        labels: Labels of the samples by split: "train", "validation" and "test".

    Raises:
        ValueError: If the training split has fewer than two classes, or another split has no known label.
    """
    remedy = f"pass a larger --num-train, or leave {name!r} out of --probe-labels"
    num_classes = len(np.unique(labels["train"][labels["train"] != MISSING]))
    if num_classes < 2:
        content = "one class" if num_classes else "no label"
        raise ValueError(f"{name!r} has {content} in the training split, and a probe needs two classes; {remedy}")
    for split, split_labels in labels.items():
        if not known_labels(split_labels, labels["train"]).any():
            raise ValueError(
                f"no label of {name!r} in the {split} split has a class that occurs in the training split; {remedy}"
            )


def keyed_order(samples: Samples, *, seed: int) -> Tensor:
    """Returns the positions in a pseudo-random order in which every prefix is stratified by class.

    Samples of a class are ranked by a hash of (seed, id). The j-th of n samples is placed at the fraction (j + 1/2) / n
    of the order, and ties are broken by the hash. The result does not depend on the input order.

    Args:
        samples: The n samples.
        seed: Seed of the order, non-negative.

    Returns:
        Positions, shape (n,), int64.
    """
    key = _hash(samples.ids.numpy(), seed)
    labels = np.zeros(len(key), np.int64) if samples.labels is None else samples.labels.numpy()
    by_class = np.lexsort((key, labels))
    sizes = np.bincount(labels)
    rank = np.empty(len(key))
    rank[by_class] = np.arange(len(key)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return torch.from_numpy(np.lexsort((key, (rank + 0.5) / sizes[labels])))


def _hash(ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """64 bits per id, one-to-one for a given seed.

    `RandomStream` would also work, but takes a minute for a million ids.

    Source: SplitMix64, Steele et al. 2014, "Fast splittable pseudorandom number generators".
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2**63 - 1, got {seed}")
    start = _mix(np.array([seed], np.uint64) + _GOLDEN)
    return _mix(start + ids.astype(np.uint64) * _GOLDEN)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def train_and_held_out(sources: Mapping[str, Samples]) -> tuple[Samples, Samples | None]:
    """Returns the training part and the held-out part, or None if a single part serves all splits.

    Args:
        sources: Parts of a data set by name.

    Raises:
        ValueError: If there are several parts and none is named train.
    """
    if len(sources) == 1:
        return next(iter(sources.values())), None
    if "train" not in sources:
        names = ", ".join(sources) or "nothing"
        raise ValueError(f"the data has the parts {names}, but none is named train; pass one of them as --split")
    return sources["train"], next((sources[name] for name in _TEST_NAMES if name in sources), None)


def _check_related(train: Samples, held_out: Samples) -> None:
    if train.shape != held_out.shape:
        raise ValueError(f"train has shape {train.shape} but test has {held_out.shape}; pass parts of one data set")
    if (train.labels is None) != (held_out.labels is None):
        labeled = "test" if train.labels is None else "train"
        raise ValueError(f"only {labeled} has labels; pass --split {labeled} to divide it, or label both")
    if (train.num_classes, train.class_names) != (held_out.num_classes, held_out.class_names):
        raise ValueError(
            f"train has {train.num_classes} classes and test has {held_out.num_classes}, or their names differ; "
            "pass parts of one data set"
        )
    class_names = [{column.name: column.class_names for column in part.columns} for part in (train, held_out)]
    if class_names[0] != class_names[1]:
        raise ValueError("train and test have different extra label columns or classes; pass parts of one data set")


def _check_classes_of_train(train: Samples, held_out: Samples) -> None:
    if train.labels is None:
        return
    absent = [c for c, count in enumerate(_class_sizes(train)) if count == 0]
    held = set() if held_out.labels is None else set(held_out.labels.tolist())
    if alone := [c for c in absent if c in held]:
        raise ValueError(
            f"{len(alone)} of {train.num_classes} classes have samples in the held-out part and none in train (first: "
            f"{_class_name(train, alone[0])}); name classes alike in all parts, or pass --min-per-class 2 to leave "
            "these out"
        )


def _check_class_sizes(samples: Samples) -> None:
    if samples.labels is None:
        return
    small = [c for c, count in enumerate(_class_sizes(samples)) if count < 2]
    if small:
        raise ValueError(
            f"{len(small)} of {samples.num_classes} classes have fewer than 2 samples (first: "
            f"{_class_name(samples, small[0])}); pass --min-per-class 2 to leave them out, or another --label-column"
        )


def _class_sizes(samples: Samples) -> list[int]:
    assert samples.labels is not None
    return torch.bincount(samples.labels, minlength=samples.num_classes).tolist()


def _class_name(samples: Samples, label: int) -> str:
    return samples.class_names[label] if samples.class_names else str(label)


def _first(samples: Samples, num: int | None, name: str) -> Samples:
    if num is None or num == len(samples):
        return samples
    if num < 1:
        raise ValueError(f"--num-{name} is {num}; pass at least 1")
    if num > len(samples):
        raise ValueError(
            f"--num-{name} asks for {num} samples but that split has {len(samples)}; pass at most {len(samples)}"
        )
    return Subset(samples, range(num), name=f"first-{num}")
