"""Arrays of users as samples: every form that they have, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerprobe.analyses.front.objects import as_samples, as_splits
from layerprobe.data import TensorSamples

X = torch.linspace(-1, 1, 24).reshape(6, 1, 2, 2)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: x.numpy(), lambda x: list(x), lambda x: x.tolist()])
def test_every_form_of_an_array_gives_the_same_samples(form) -> None:
    samples = as_samples(form(X))
    assert torch.equal(samples.batch(range(6)).x, X)
    assert samples.labels is None


def test_bytes_are_pixels() -> None:
    x = as_samples(np.array([[[[0, 255]]]], np.uint8)).batch(range(1)).x
    assert x.flatten().tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        ([0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2], ()),
        (torch.tensor([0, 2, 2, 0, 2, 2]), [0, 2, 2, 0, 2, 2], ()),
        (np.array(["dog", "cat", "dog", "cat", "cat", "dog"]), [1, 0, 1, 0, 0, 1], ("cat", "dog")),
        ([7, 9, 7, 9, 9, 7], [0, 1, 0, 1, 1, 0], ("7", "9")),
        ([-1, 1, -1, 1, 1, -1], [0, 1, 0, 1, 1, 0], ("-1", "1")),
        ([True, False] * 3, [1, 0] * 3, ("False", "True")),
    ],
)
def test_labels_are_classes_or_are_numbered(labels, numbers, names) -> None:
    samples = as_samples(X, labels)
    assert samples.labels is not None
    assert samples.labels.tolist() == numbers
    assert samples.class_names == names


def test_classes_of_the_model_are_never_numbered_anew() -> None:
    samples = as_samples(X[:2], [3, 7], num_classes=10)
    assert samples.labels is not None
    assert (samples.labels.tolist(), samples.class_names) == ([3, 7], ())
    assert as_samples(X[:2], [3, 70], num_classes=10).class_names == ("3", "70")


def test_samples_and_splits_stay_what_they_are() -> None:
    samples = TensorSamples(X)
    assert as_samples(samples) is samples
    with pytest.raises(ValueError, match="samples carry their labels"):
        as_samples(samples, [0] * 6)
    splits = as_splits(torch.rand(40, 1, 2, 2) - 0.5, [0, 1] * 20)
    assert [len(part) for _, part in as_splits(splits).items()] == [24, 8, 8]
    with pytest.raises(ValueError, match="splits carry their labels"):
        as_splits(splits, [0] * 40)


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (X * 255, None, r"values from -255 to 255; pass pixels as uint8 or scaled to \[-1, 1\]"),
        (X[0, 0], None, r"shape \(2, 2\); pass \(n, channels, \*grid\)"),
        (X.long(), None, "pass floating point in about"),
        (X, [0, 1], "6 samples but 2 labels"),
        (X, np.zeros((6, 2)), r"labels have type float64 and shape \(6, 2\)"),
        (X * float("nan"), None, "NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_refused(x, labels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_samples(x, labels)


def test_values_that_look_unscaled_are_named() -> None:
    with pytest.warns(UserWarning, match="none below 0; pixels are expected in"):
        as_samples(X.abs())
