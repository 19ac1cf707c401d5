"""Parts of a data set before they are divided into splits: those with labels, and the classes that are large enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from layerprobe.data.samples import ClassSubset, Samples
from layerprobe.data.splits import train_and_held_out


def prepare_parts(parts: Mapping[str, Samples], min_per_class: int | None) -> dict[str, Samples]:
    """Returns the parts that splits are taken from, and writes into their reading what was left out.

    If the training part has labels, parts without labels are left out.

    Args:
        parts: Parts of a data set by name.
        min_per_class: Smallest number of samples of a class in the training part; smaller classes are left out. None
            keeps all classes.

    Raises:
        ValueError: If no part is named train, or fewer than two classes are left.
    """
    train, _ = train_and_held_out(parts)
    unlabeled = [name for name, part in parts.items() if train.labels is not None and part.labels is None]
    labeled = {name: part for name, part in parts.items() if name not in unlabeled}
    used = train_and_held_out(labeled)
    unused = [name for name, part in labeled.items() if part not in used]
    chosen = {name: part for name, part in labeled.items() if part in used}
    small: dict[str, int] = {}
    if min_per_class is not None:
        chosen, small = _large_classes(chosen, train, min_per_class)
    for part in chosen.values():
        if part.reading is not None:
            part.reading = replace(
                part.reading, unused=unused, unlabeled=unlabeled, min_per_class=min_per_class, small_classes=small
            )
    return chosen


def _large_classes(
    parts: Mapping[str, Samples], train: Samples, min_per_class: int
) -> tuple[dict[str, Samples], dict[str, int]]:
    """The parts without small classes, and the number of samples in all parts of each class that is left out."""
    if train.labels is None:
        raise ValueError("--min-per-class counts labels, but the data has none; leave it out, or pass --label-column")
    counts = torch.bincount(train.labels, minlength=train.num_classes)
    kept = (counts >= min_per_class).nonzero().flatten().tolist()
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} of {train.num_classes} classes have {min_per_class} samples or more; pass a smaller "
            "--min-per-class"
        )
    labels = torch.cat([part.labels for part in parts.values() if part.labels is not None])
    total = torch.bincount(labels, minlength=train.num_classes)
    small = [c for c in range(train.num_classes) if c not in kept]
    names = train.class_names or tuple(map(str, range(train.num_classes)))
    return {name: ClassSubset(part, kept) for name, part in parts.items()}, {names[c]: int(total[c]) for c in small}
