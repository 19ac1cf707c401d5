from __future__ import annotations

import pytest
import torch

from layerprobe.data import Subset, TensorSamples
from layerprobe.data.samples import content_hash


def test_uint8_stands_for_minus_one_to_one() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    batch = TensorSamples(x, torch.zeros(256)).batch([0, 255, 51])
    assert batch.x.flatten().tolist() == pytest.approx([-1, 1, -0.6], abs=1e-7)  # float32
    assert batch.ids.tolist() == [0, 255, 51]
    assert batch.x.dtype == torch.float32
    assert batch.labels is not None
    assert batch.labels.dtype == torch.int64


def test_subset_keeps_ids_labels_and_order() -> None:
    samples = TensorSamples(torch.randn(10, 1, 2, 2), torch.arange(10), ids=torch.arange(100, 110))
    subset = Subset(Subset(samples, [9, 3, 5, 1], name="a"), [2, 0], name="b")
    batch = subset.batch([0, 1])
    assert batch.ids.tolist() == subset.ids.tolist() == [105, 109]
    assert torch.equal(batch.x, samples.x[[5, 9]])
    assert batch.labels is not None
    assert subset.labels is not None
    assert batch.labels.tolist() == subset.labels.tolist() == [5, 9]


def test_fingerprint_changes_with_the_content() -> None:
    x, labels = torch.zeros(4, 1, 2, 2), torch.tensor([0, 0, 1, 1])
    other = x.clone()
    other[3, 0, 1, 1] = 1e-6
    samples = TensorSamples(x, labels)
    assert samples.fingerprint == TensorSamples(x.clone(), labels).fingerprint
    different = [
        TensorSamples(other, labels),
        TensorSamples(x, 1 - labels),
        TensorSamples(x),
        TensorSamples(x, labels, ids=torch.arange(1, 5)),
        Subset(samples, [0, 1], name="a"),
        Subset(samples, [0, 2], name="a"),
    ]
    assert len({samples.fingerprint, *(s.fingerprint for s in different)}) == len(different) + 1
    assert content_hash(torch.zeros(2, 3)) != content_hash(torch.zeros(3, 2))


def test_bad_tensors_are_refused() -> None:
    x = torch.zeros(3, 1, 2, 2)
    with pytest.raises(ValueError, match="3 samples but 2 labels; pass one label per sample"):
        TensorSamples(x, torch.zeros(2))
    with pytest.raises(ValueError, match="3 samples but 2 ids; pass one id per sample"):
        TensorSamples(x, ids=torch.zeros(2))
    with pytest.raises(ValueError, match="labels range from -1 to 1; pass labels from 0"):
        TensorSamples(x, torch.tensor([-1, 0, 1]))
    with pytest.raises(ValueError, match="labels range from 0 to 2; pass labels from 0 to 1"):
        TensorSamples(x, torch.tensor([0, 1, 2]), class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"samples have type torch.int64; pass floating point"):
        TensorSamples(x.long())
    for bad in (float("nan"), float("inf")):
        y = x.clone()
        y[1, 0, 0, 0] = bad
        with pytest.raises(ValueError, match=r"1 of 3 samples have NaN or infinite values \(first: 1\); remove them"):
            TensorSamples(y)
