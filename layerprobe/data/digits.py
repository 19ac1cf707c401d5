"""The embedded data set: 1797 scans of handwritten digits, 8 x 8 pixels, as scikit-learn carries them."""

from __future__ import annotations

import torch

from layerprobe.data.samples import Splits, Subset, TensorSamples
from layerprobe.data.splits import keyed_order

_NUM_TRAIN, _NUM_VALIDATION = 1000, 397  # and 400 for the test split


def digits() -> Splits:
    """1000 samples for training, 397 for validation and 400 for testing; always the same, with every class in proportion.

    x has shape (B, 1, 8, 8), ink is 1 and paper is -1; ids are the rows in scikit-learn.

    Source: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI repository (its test part).
    """
    from sklearn.datasets import load_digits  # a second of imports

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1
    samples = TensorSamples(x, torch.from_numpy(labels), class_names=tuple("0123456789"))
    order = keyed_order(samples, seed=0)
    return Splits(
        Subset(samples, order[:_NUM_TRAIN], name="train"),
        Subset(samples, order[_NUM_TRAIN : _NUM_TRAIN + _NUM_VALIDATION], name="validation"),
        Subset(samples, order[_NUM_TRAIN + _NUM_VALIDATION :], name="test"),
    )
