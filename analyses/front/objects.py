"""Arrays that users hold, as samples and splits."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.data import Samples, Splits, TensorSamples, for_probing, numbered_labels, split

LARGEST = 50.0  # beyond every latent; pixels that were not scaled reach 255


def as_samples(x: Any, labels: Any = None, *, ids: Any = None, num_classes: int = 0) -> Samples:
    """Returns arrays as samples.

    Args:
        x: Samples, shape (n, C, *grid): a tensor, an array or a list of them; floating point in about [-1, 1], latents
            as the network takes them, or uint8 that represents [-1, 1]. `Samples` are returned as they are.
        labels: One label per sample: integers or strings, or None. Integers from 0 are classes as they are; others are
            numbered in sorted order.
        ids: One integer per sample, to which the noise is keyed; the positions 0 to n - 1 if None.
        num_classes: Number of classes of the model; integers below it are never numbered anew.

    Raises:
        ValueError: If the arrays do not fit together, or values are far outside of [-1, 1].
    """
    if isinstance(x, Samples):
        if labels is not None or ids is not None:
            raise ValueError("samples carry their labels and ids; pass these with arrays only")
        return x
    tensor = _tensor(x)
    if tensor.ndim < 3:
        raise ValueError(f"the samples have shape {tuple(tensor.shape)}; pass (n, channels, *grid)")
    _check_range(tensor)
    numbers, names = (None, ()) if labels is None else numbered_labels(labels, num_classes)
    return TensorSamples(tensor, numbers, ids=None if ids is None else _tensor(ids), class_names=names)


def as_splits(data: Any, labels: Any = None, *, num_classes: int = 0) -> Splits:
    """Returns arrays, samples or splits as the splits of a probing run, see `layerprobe.data.for_probing`.

    Args:
        data: `Splits`, or what `as_samples` takes.
        labels: Labels as for `as_samples`.
        num_classes: Number of classes of the model, as for `as_samples`.

    Raises:
        ValueError: If the samples cannot be divided.
    """
    if isinstance(data, Splits):
        if labels is not None:
            raise ValueError("splits carry their labels; pass labels with arrays only")
        return for_probing(data, given={})
    return for_probing(split(as_samples(data, labels, num_classes=num_classes)), given={})


def _tensor(values: Any) -> Tensor:
    if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor):
        return torch.stack([value.detach().cpu() for value in values])
    return values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


def _check_range(x: Tensor) -> None:
    if not x.is_floating_point() or not x.numel() or not bool(x.isfinite().all()):
        return  # refused or accepted by `TensorSamples`, which names the reason
    low, high = float(x.min()), float(x.max())
    if max(-low, high) > LARGEST:
        raise ValueError(
            f"the samples have values from {low:g} to {high:g}; pass pixels as uint8 or scaled to [-1, 1], and latents "
            "with the scale that the network takes"
        )
    if low >= 0 and high <= 1 and high > 0:
        warnings.warn(
            f"the samples have values from {low:g} to {high:g}, none below 0; pixels are expected in [-1, 1], which is "
            "2 * x - 1",
            stacklevel=4,
        )
