from __future__ import annotations

import pytest
import torch

from layerprobe.data.parts import prepare_parts
from layerprobe.data.reading import Reading
from layerprobe.data.samples import Samples, TensorSamples


def part(counts: list[int] | None, *, first: int = 0) -> TensorSamples:
    """Samples that tell their id, with a number of each class, or eight samples without labels."""
    labels = None if counts is None else torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    n = 8 if labels is None else len(labels)
    ids = torch.arange(first, first + n)
    samples = TensorSamples(
        ids.view(n, 1, 1, 1).float(), labels, ids=ids, class_names=("a", "b", "c") if counts else ()
    )
    samples.reading = Reading(files_read=1, files_left={}, rows={"train": n}, label="column")
    return samples


def read(parts: dict[str, Samples]) -> Reading:
    readings = [samples.reading for samples in parts.values()]
    assert readings[0] is not None
    assert all(reading is not None and reading.unused == readings[0].unused for reading in readings)
    return readings[0]


def test_small_classes_are_left_out_and_the_others_numbered_anew() -> None:
    parts = prepare_parts({"train": part([5, 1, 4]), "test": part([2, 3, 1], first=100)}, 2)
    train, test = parts["train"], parts["test"]
    assert (train.num_classes, train.class_names) == (2, ("a", "c"))
    for samples, ids, labels in (
        (train, [*range(5), *range(6, 10)], [0] * 5 + [1] * 4),
        (test, [100, 101, 105], [0, 0, 1]),
    ):
        batch = samples.batch(range(len(samples)))
        assert batch.labels is not None
        assert samples.labels is not None
        assert batch.labels.tolist() == samples.labels.tolist() == labels
        assert batch.ids.tolist() == batch.x.flatten().tolist() == ids
    assert train.fingerprint != part([5, 1, 4]).fingerprint
    assert read(parts).small_classes == {"b": 4}


def test_parts_without_labels_and_parts_beyond_two_are_told() -> None:
    parts = {"train": part([4, 4, 4]), "validation": part([2, 2, 2]), "test": part(None), "extra": part([1, 1, 1])}
    chosen = prepare_parts(parts, None)
    assert list(chosen) == ["train", "validation"]
    assert (read(chosen).unlabeled, read(chosen).unused) == (["test"], ["extra"])
    unlabeled = prepare_parts({"train": part(None), "test": part(None)}, None)
    assert list(unlabeled) == ["train", "test"]


@pytest.mark.parametrize(
    ("counts", "minimum", "message"),
    [
        (None, 2, "--min-per-class counts labels, but the data has none; leave it out, or pass --label-column"),
        ([5, 1, 1], 2, "1 of 3 classes have 2 samples or more; pass a smaller --min-per-class"),
    ],
)
def test_what_leaves_no_two_classes_is_refused(counts: list[int] | None, minimum: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_parts({"train": part(counts)}, minimum)
