"""Effective rank against spectra that are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from layerprobe.analyses.spectrum import effective_rank, singular_values

Array = NDArray[Any]


def with_spectrum(spectrum: Array, *, n: int, width: int, seed: int = 0) -> Array:
    """Centred features (n, width) with these singular values."""
    rng = np.random.default_rng(seed)
    num = len(spectrum)
    # Orthonormal columns that are orthogonal to the ones vector, so that centring leaves them as they are.
    left = np.linalg.qr(np.concatenate([np.ones((n, 1)), rng.normal(size=(n, num))], axis=1))[0][:, 1:]
    right = np.linalg.qr(rng.normal(size=(width, num)))[0]
    return (left * spectrum) @ right.T


@pytest.mark.parametrize(("n", "width"), [(50, 12), (12, 50)])
def test_equal_singular_values_give_their_number(n: int, width: int) -> None:
    assert effective_rank(with_spectrum(np.full(7, 3.0), n=n, width=width)) == pytest.approx(7.0, rel=1e-9)


def test_equals_the_entropy_of_a_known_spectrum() -> None:
    spectrum = np.array([4.0, 2.0, 1.0, 1.0])
    p = spectrum / 8
    expected = np.exp(-(p * np.log(p)).sum())
    x = with_spectrum(spectrum, n=30, width=6)
    assert effective_rank(x) == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(singular_values(x)[:4] / singular_values(x).sum(), p, rtol=1e-9)


def test_one_direction_has_rank_one() -> None:
    x = np.outer(np.arange(10.0), np.ones(4))
    assert effective_rank(x) == pytest.approx(1.0, abs=1e-9)


def test_small_singular_values_are_exact() -> None:
    spectrum = np.array([1.0, 1e-10])
    measured = singular_values(with_spectrum(spectrum, n=30, width=6))
    assert measured[1] / measured[0] == pytest.approx(1e-10, rel=1e-4)


@given(seed=st.integers(0, 10**6), exponent=st.integers(-150, 150), offset=st.floats(-1e3, 1e3))
@settings(max_examples=30, deadline=None)
def test_invariant_to_rotation_scale_and_translation(seed: int, exponent: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20, 5)) * np.arange(1, 6)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    moved = (x @ rotation + offset) * 10.0**exponent
    assert effective_rank(moved) == pytest.approx(effective_rank(x), rel=1e-10)


def test_an_offset_of_1e4_in_float32_changes_nothing() -> None:
    # Multiples of 1/64 survive an offset of 1e4 in float32 exactly.
    x = np.round(np.random.default_rng(0).normal(size=(100, 8)) * 64) / 64
    assert effective_rank((x + 1e4).astype(np.float32)) == pytest.approx(effective_rank(x), rel=1e-10)


@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678])
def test_constant_features_have_none(value: float) -> None:
    assert np.isnan(effective_rank(np.full((9, 3), value, np.float32)))
    assert np.isnan(effective_rank(np.full((1, 3), value)))


def test_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="1 values that are nan or inf"):
        effective_rank(np.array([[1.0, np.inf], [0.0, 1.0]]))
