"""Conversion to tensors, and centering without losing digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerprobe.analyses.measures.tensors import (
    as_tensor,
    centered_with_mean,
    feature_statistics,
    num_samples,
    subtract_mean,
)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(np.float16, torch.float32), (np.float32, torch.float32), (np.float64, torch.float64), (np.int32, torch.float64)],
)
def test_dtypes_become_float32_or_float64(dtype: type, expected: torch.dtype) -> None:
    x = np.arange(6).reshape(3, 2).astype(dtype)
    assert as_tensor(x).dtype == expected
    np.testing.assert_array_equal(as_tensor(x).numpy(), x)
    assert as_tensor(torch.from_numpy(x).bfloat16()).dtype == torch.float32


def test_arrays_share_their_memory_and_read_only_ones_are_copied() -> None:
    x = np.zeros((3, 2))
    as_tensor(x)[0, 0] = 1
    assert x[0, 0] == 1
    x.flags.writeable = False
    as_tensor(x)[0, 0] = 2
    assert x[0, 0] == 1


def test_centering_in_float32_keeps_the_digits_of_the_spread() -> None:
    x = torch.from_numpy((np.random.default_rng(0).normal(size=(50, 3)) + 1e4).astype(np.float32))
    exact = x.double() - x.double().mean(0)
    # 1e4 has a resolution of 1e-3 in float32, and so has its mean.
    torch.testing.assert_close(subtract_mean(x, x.double().mean(0), torch.float32).double(), exact, atol=1e-6, rtol=0)


def test_centering_loses_nothing_to_a_large_offset() -> None:
    x = torch.from_numpy(np.random.default_rng(0).integers(-5, 6, size=(1001, 3)).astype(np.float64))
    wide, mean = centered_with_mean(x + 1e10)
    torch.testing.assert_close(wide, x - x.mean(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(mean, x.mean(0) + 1e10)
    statistics = feature_statistics(x + 1e10)
    torch.testing.assert_close(statistics.square_norms, (x - x.mean(0)).square().sum(1))


def test_statistics_say_why_samples_cannot_be_compared() -> None:
    assert feature_statistics(torch.eye(3)).reason == ""
    assert feature_statistics(torch.full((4, 2), 0.1)).reason == "the features are the same for all samples"
    assert feature_statistics(torch.tensor([[1.0, torch.nan]])).reason == "the features hold nan or inf"


def test_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match=r"features of shape \(3,\) cannot be compared; pass samples by channels"):
        as_tensor(np.zeros(3))
    with pytest.raises(ValueError, match="no representation was given"):
        num_samples([], 2, "CKA")
    with pytest.raises(ValueError, match="CKA needs 4 samples or more, got 3"):
        num_samples([np.zeros((3, 2))], 4, "CKA")
