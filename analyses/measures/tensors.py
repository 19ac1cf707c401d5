"""Conversion and centering that the comparisons of many representations share.

A representation is a NumPy array or a torch tensor of shape (n, D). Computation runs on the device of the tensor, so
features on a GPU are compared there; results are NumPy arrays in either case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.analyses.measures.arrays import CONSTANT, NOT_FINITE, Floats, check_finite, check_shape

FeatureMatrix = NDArray[Any] | Tensor


@dataclass(frozen=True, eq=False)
class PairMatrix:
    """One number for every pair of representations.

    Attributes:
        values: Values by pair, shape (M, M'); nan in the rows and columns of representations without a value.
        reasons: Why each representation of the first set has no value, or ""; M strings.
        other_reasons: The same for the second set, M' strings; equal to `reasons` if a set was compared with itself.
    """

    values: Floats
    reasons: tuple[str, ...]
    other_reasons: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Statistics of a representation that are needed before it is centered in single precision.

    Attributes:
        mean: Mean over samples, shape (D,), float64.
        square_norms: Square norms of the centered samples, shape (n,), float64.
        reason: Why samples cannot be compared in this representation, or "".
    """

    mean: Tensor
    square_norms: Tensor
    reason: str


def as_tensor(x: FeatureMatrix) -> Tensor:
    """Converts `x` to a tensor of float32 or float64 that shares its memory if possible.

    Integers become float64, half precision becomes float32.

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


def checked_tensor(x: FeatureMatrix, name: str = "features") -> Tensor:
    """Returns `x` as a tensor on its device after checking that it can be analyzed; memory is shared if possible.

    Args:
        x: Features, shape (n, D), any dtype.
        name: Name of the features in the error message.

    Raises:
        ValueError: If `x` is not of shape (n, D) with n, D >= 1, or holds nan or inf.
    """
    check_shape(tuple(x.shape), name)
    if not isinstance(x, Tensor):
        x = torch.from_numpy(np.require(x, requirements=["C", "W"]))
    check_finite(x.numel() - int(x.isfinite().sum()), name)
    return x


def product(a: Tensor, b: Tensor) -> Tensor:
    """Computes `a @ b`; on a CPU by numpy's BLAS, which is up to twice as fast as torch's for `a.T @ a`."""
    product: Tensor = torch.from_numpy(a.numpy() @ b.numpy()) if a.device.type == "cpu" else a @ b
    return product


def num_samples(representations: Sequence[FeatureMatrix], minimum: int, measure: str) -> int:
    """Returns the number of samples of the first representation.

    Args:
        representations: Arrays or tensors of shape (n, D).
        minimum: Smallest number of samples that the measure allows.
        measure: Name of the measure in the error message.

    Raises:
        ValueError: If there is no representation, or fewer than `minimum` samples.
    """
    if not len(representations):
        raise ValueError("no representation was given; pass at least one array of shape (n, D)")
    n = len(representations[0])
    if n < minimum:
        raise ValueError(f"{measure} needs {minimum} samples or more, got {n}")
    return n


def centered_with_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `x` minus its mean over samples, shape (n, D), and that mean, shape (D,), both in float64."""
    wide = x.double()
    mean = wide.mean(0)
    wide = wide - mean
    # The first mean has rounding errors of the size of the offset, the second of the size of the spread.
    correction = wide.mean(0)
    return wide.sub_(correction), mean + correction


def feature_statistics(x: Tensor) -> FeatureStatistics:
    """Computes mean and spread of a representation (n, D) in float64."""
    wide, mean = centered_with_mean(x)
    return FeatureStatistics(mean, wide.square_().sum(1), unusable_tensor(x))


def subtract_mean(x: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `x - mean`, shape (n, D), accurate in float32 or float64 whatever the size of the mean.

    Residual streams drift to a large mean. Subtracting the float32 part of the mean is exact for them; the remainder,
    which float32 cannot represent, is subtracted after it.

    Args:
        x: Features, shape (n, D).
        mean: Mean to subtract, shape (D,), float64.
        dtype: Type of the result, float32 or float64.
    """
    x = x.double() if dtype == torch.float64 else x
    high = mean.to(x.dtype)
    low = (mean - high).to(x.dtype)
    return x.sub(high).sub_(low).to(dtype)


def unusable_tensor(x: Tensor) -> str:
    """Returns why samples cannot be compared by these features, shape (n, D), or "" if they can."""
    if not bool(torch.isfinite(x).all()):
        return NOT_FINITE
    return CONSTANT if bool((x == x[:1]).all()) else ""
