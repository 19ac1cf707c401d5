from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import all_ids

from layerprobe.data import load
from layerprobe.data.embedded_digits import digits


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    splits = load("digits")
    for _, samples in splits.items():
        batch = samples.batch(range(len(samples)))
        rows = batch.ids.numpy()
        np.testing.assert_array_equal((batch.x.flatten(1).numpy() + 1) * 8, images[rows])  # exact: multiples of 1/8
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels.numpy(), labels[rows])
        assert batch.x.shape[1:] == samples.shape == (1, 8, 8)
        assert batch.x.dtype == torch.float32
        assert samples.class_names == tuple("0123456789")
        assert np.bincount(labels[rows]).min() > 0.9 * len(rows) / 10
    assert [len(samples) for _, samples in splits.items()] == [1000, 397, 400]
    assert set().union(*all_ids(splits).values()) == set(range(1797))


def test_digits_never_change() -> None:
    # Stored features of the digits are recognized by this; a change makes every one of them stale.
    assert digits().train.fingerprint == "26297147c4b7a81af3fe71e722df37d0/train-95a012b0"
    assert digits().test.ids[:5].tolist() == digits().test.ids[:5].tolist()


def test_fewer_digits_are_the_first_of_each_split() -> None:
    few, every = load("digits", num_train=50, num_validation=20, num_test=30), digits()
    assert few.train.ids.tolist() == every.train.ids[:50].tolist()
    assert [len(samples) for _, samples in few.items()] == [50, 20, 30]


def test_digits_take_no_options_for_images() -> None:
    with pytest.raises(
        ValueError, match="embedded digits are 1x8x8 and labeled as they are; leave out --size --label-co"
    ):
        load("digits", size=16, label_column="label")
    with pytest.raises(ValueError, match="8x8 with 1 channel but the model takes 3x32x32; pass other data"):
        load("digits", expect_shape=(3, 32, 32))
    with pytest.raises(
        ValueError, match="--num-train asks for 1001 samples but that split has 1000; pass at most 1000"
    ):
        load("digits", num_train=1001)
    assert load("digits", expect_shape=(1, 8, 8), require_labels=True).train.num_classes == 10
