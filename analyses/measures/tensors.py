"""What the comparisons of many representations share: arrays or tensors in, centered tensors out.

A representation is a NumPy array or a torch tensor of shape (n, D). Work happens where a tensor lies, so features on a
GPU are compared there; results are NumPy arrays either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.analyses.measures.arrays import Floats

FeatureMatrix = NDArray[Any] | Tensor


@dataclass(frozen=True, eq=False)
class PairMatrix:
    """One number for every pair of representations.

    Attributes:
        values: Shape (M, M'); nan in the rows and columns of representations that have none.
        reasons: Why a representation of the first set has none, or ""; M strings.
        other_reasons: The same for the second set, M' strings; equal to `reasons` where a set was compared with itself.
    """

    values: Floats
    reasons: tuple[str, ...]
    other_reasons: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Centering:
    """What has to be known about a representation before it is centered in single precision.

    Attributes:
        mean: Over samples, shape (D,), float64.
        square_norms: Of the centered samples, shape (n,), float64.
        reason: Why samples cannot be compared in this representation, or "".
    """

    mean: Tensor
    square_norms: Tensor
    reason: str


def as_tensor(x: FeatureMatrix) -> Tensor:
    """`x` as a tensor that shares its memory where it can; integers and half precision become wider floats.

    Raises:
        ValueError: If `x` is not of shape (n, D) with n, D >= 1.
    """
    if not isinstance(x, Tensor):
        x = torch.from_numpy(np.require(x, requirements=["C", "W"]))
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"features of shape {tuple(x.shape)} cannot be compared; pass samples by channels, (n, D)")
    if not x.is_floating_point():
        return x.double()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def num_samples(representations: Sequence[FeatureMatrix], least: int, why: str) -> int:
    """The number of samples that all representations share.

    Raises:
        ValueError: If there is no representation, or fewer than `least` samples.
    """
    if not len(representations):
        raise ValueError("no representation was given; pass at least one array of shape (n, D)")
    n = len(representations[0])
    if n < least:
        raise ValueError(f"{why} needs {least} samples or more, got {n}")
    return n


def centering(x: Tensor) -> Centering:
    """Mean and spread of a representation, in float64."""
    wide = x.double()
    mean = wide.mean(0)
    wide = wide - mean
    # The first mean is rounded at the size of the offset, the second at the size of the spread.
    rest = wide.mean(0)
    wide -= rest
    return Centering(mean + rest, wide.square_().sum(1), _unusable(x))


def centered(x: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """`x - mean`, shape (n, D), in float32 or float64, right to the last digits whatever the offset.

    Residual streams drift to a large mean. Subtracting its float32 part is exact there, and what float32 could not
    hold of it follows.
    """
    x = x.double() if dtype == torch.float64 else x
    high = mean.to(x.dtype)
    low = (mean - high).to(x.dtype)
    return x.sub(high).sub_(low).to(dtype)


def _unusable(x: Tensor) -> str:
    if not bool(torch.isfinite(x).all()):
        return "the features hold nan or inf"
    return "the features are the same for all samples" if bool((x == x[:1]).all()) else ""
