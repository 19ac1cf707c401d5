"""Which samples fit probes, which choose penalties and layers, and which give the numbers that are shown.

Samples are put in one fixed order that depends on their ids, their labels and a seed (`keyed_order`). Each split owns a
zone of that order, and a count takes the beginning of the zone. So a sample never changes sides when a count changes:
what one run fitted no later run reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.data.samples import MISSING, Samples, Splits, Subset

# What probing reads at most unless told otherwise: more changes no conclusion and takes proportionally longer.
PROBING_COUNTS = {"train": 8000, "validation": 2000, "test": 5000}
_REPORT_NAMES = ("test", "validation", "valid", "val", "dev", "eval")


def split(
    sources: Samples | Mapping[str, Samples],
    *,
    num_train: int | None = None,
    num_validation: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
) -> Splits:
    """Divides a data set into disjoint training, validation and test splits.

    With a "train" part and a "test" (else "validation") part, fit and choose own 80 % and 20 % of the former and report
    owns the latter. A single part, or "train" alone, is divided 60/20/20. Classes keep their proportions everywhere.

    Args:
        sources: The parts of a data set by name, or a single part.
        num_train: Samples to take of those that fit owns, at least one per class; None for all of them.
        num_validation: Likewise.
        num_test: Likewise.
        seed: Decides who owns which sample.

    Raises:
        ValueError: If more is asked for than there is, the training split lacks a class, a class has fewer than two samples,
            or the parts do not belong together.
    """
    train, held_out = _parts({"all": sources} if isinstance(sources, Samples) else sources)
    _check_class_sizes(train)
    order = keyed_order(train, seed=seed)
    if held_out is None:
        ends = [round(0.6 * len(train)), round(0.8 * len(train))]
        report = Subset(train, order[ends[1] :], name="test")
    else:
        _check_related(train, held_out)
        ends = [round(0.8 * len(train)), len(train)]
        report = Subset(held_out, keyed_order(held_out, seed=seed), name="test")
    owned = Splits(
        Subset(train, order[: ends[0]], name="train"),
        Subset(train, order[ends[0] : ends[1]], name="validation"),
        report,
    )
    if not all(len(samples) for _, samples in owned.items()):
        raise ValueError(f"{len(train)} samples are too few for three splits; pass at least 5")
    return take(owned, num_train=num_train, num_validation=num_validation, num_test=num_test)


def take(
    splits: Splits, *, num_train: int | None = None, num_validation: int | None = None, num_test: int | None = None
) -> Splits:
    """The first samples of each split; None takes them all.

    Raises:
        ValueError: If more is asked for than there is, or the training split then lacks a class.
    """
    counts = {"train": num_train, "validation": num_validation, "test": num_test}
    taken = Splits(**{name: _first(samples, counts[name], name) for name, samples in splits.items()})
    fit = taken.train
    if fit.labels is not None:
        missing = [c for c, count in enumerate(_class_sizes(fit)) if count == 0]
        if missing:
            raise ValueError(
                f"the training split of {len(fit)} samples lacks {len(missing)} of {fit.num_classes} classes "
                f"(first: {_class_name(fit, missing[0])}); pass a larger --num-train"
            )
    ids = torch.cat([samples.ids for _, samples in taken.items()])
    num_twice = len(ids) - len(set(ids.tolist()))
    if num_twice:
        raise ValueError(f"{num_twice} sample ids stand twice; give every sample an id of its own")
    return taken


def for_probing(splits: Splits, *, given: Mapping[str, Any]) -> Splits:
    """At most `PROBING_COUNTS` samples of each split that `given` does not count (num_train, num_validation, num_test).

    Splits are stratified by the class alone, so a class of a further column may be absent from one.

    Raises:
        ValueError: If a further column does not allow a probe, see `check_probed`.
    """
    counts = {
        f"num_{name}": min(len(samples), PROBING_COUNTS[name])
        for name, samples in splits.items()
        if f"num_{name}" not in given
    }
    taken = take(splits, **counts)
    for columns in zip(*(samples.columns for _, samples in taken.items()), strict=True):
        names = (name for name, _ in taken.items())
        check_probed(columns[0].name, {name: c.labels.numpy() for name, c in zip(names, columns, strict=True)})
    return taken


def known_labels(labels: NDArray[np.int64], train_labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which labels of a further column a probe can get right: those whose class the training split has.

    Args:
        labels: Any shape.
        train_labels: Those of the training split.

    Returns:
        As `labels`.
    """
    known: NDArray[np.bool_] = (labels != MISSING) & np.isin(labels, train_labels)
    return known


def check_probed(name: str, labels: Mapping[str, NDArray[np.int64]]) -> None:
    """Raises ValueError if a probe cannot be fitted, chosen and scored on a further label column.

    Args:
        name: Of the column.
        labels: Of the samples of "train", "validation" and "test".
    """
    remedy = f"pass a larger --num-train, or leave {name!r} out of --probe-labels"
    num_classes = len(np.unique(labels["train"][labels["train"] != MISSING]))
    if num_classes < 2:
        seen = "one class" if num_classes else "no label"
        raise ValueError(f"{name!r} has {seen} in the training split, and a probe needs two classes; {remedy}")
    for split, those in labels.items():
        if not known_labels(those, labels["train"]).any():
            raise ValueError(
                f"no label of {name!r} in the {split} split has a class that the training split has; {remedy}"
            )


def keyed_order(samples: Samples, *, seed: int) -> Tensor:
    """Positions in a pseudo-random order in which every beginning holds the classes in proportion.

    Samples of a class are ranked by a hash of (seed, id); the j-th of n stands at the fraction (j + 1/2) / n of the
    order, and ties go by the hash. The order does not depend on the order in which the samples come.

    Args:
        samples: n samples.
        seed: Non-negative.

    Returns:
        Shape (n,), int64.
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

    NoiseKey would do, but takes a minute for a million ids.

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


def _parts(sources: Mapping[str, Samples]) -> tuple[Samples, Samples | None]:
    """The samples to fit and choose from, and those to report on, or None where one part serves all."""
    if len(sources) == 1:
        return next(iter(sources.values())), None
    if "train" not in sources:
        names = ", ".join(sources) or "nothing"
        raise ValueError(f"the data has the parts {names}, and none is called train; pass one of them as --split")
    return sources["train"], next((sources[name] for name in _REPORT_NAMES if name in sources), None)


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
    kinds = [{column.name: column.class_names for column in part.columns} for part in (train, held_out)]
    if kinds[0] != kinds[1]:
        raise ValueError("train and test have other further label columns or classes; pass parts of one data set")


def _check_class_sizes(samples: Samples) -> None:
    if samples.labels is None:
        return
    small = [c for c, count in enumerate(_class_sizes(samples)) if count < 2]
    if small:
        raise ValueError(
            f"{len(small)} of {samples.num_classes} classes have fewer than 2 samples (first: "
            f"{_class_name(samples, small[0])}); leave them out, or pass another --label-column"
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
            f"--num-{name} asks for {num} samples but that split owns {len(samples)}; pass at most {len(samples)}"
        )
    return Subset(samples, range(num), name=f"first-{num}")
