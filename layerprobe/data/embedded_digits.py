"""The built-in data set: 1797 scans of handwritten digits, 8 x 8 pixels, as shipped with scikit-learn."""

from __future__ import annotations

import torch

from layerprobe.data.samples import Splits, Subset, TensorSamples
from layerprobe.data.splits import keyed_order

_NUM_TRAIN, _NUM_VALIDATION = 1000, 397  # the other 400 are the test split


def digits() -> Splits:
    """Returns the digits in fixed, stratified splits of 1000 training, 397 validation and 400 test samples.

    Batches have x of shape (B, 1, 8, 8) with ink at 1 and paper at -1. Ids are the rows in scikit-learn.

    Source: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI repository (its test part).
    """
    from sklearn.datasets import load_digits  # imported here because it takes a second

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1
    samples = TensorSamples(x, torch.from_numpy(labels), class_names=tuple("0123456789"))
    order = keyed_order(samples, seed=0)
    return Splits(
        Subset(samples, order[:_NUM_TRAIN], name="train"),
        Subset(samples, order[_NUM_TRAIN : _NUM_TRAIN + _NUM_VALIDATION], name="validation"),
        Subset(samples, order[_NUM_TRAIN + _NUM_VALIDATION :], name="test"),
    )
