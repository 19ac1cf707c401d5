"""Debiased CKA against the formula of Song et al. written down with full matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from layerprobe.analyses.similarity import cka_matrix, linear_cka

Array = NDArray[Any]


def plain_hsic(x: Array, y: Array) -> float:
    """Song et al. 2012, eq. 5, in full matrices; not centred, which the formula does not need."""
    n = len(x)
    k, other = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(other, 0)
    one = np.ones(n)
    total = np.trace(k @ other) + one @ k @ one * (one @ other @ one) / ((n - 1) * (n - 2))
    return float(total - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3))


def plain_cka(x: Array, y: Array) -> float:
    return plain_hsic(x, y) / np.sqrt(plain_hsic(x, x) * plain_hsic(y, y))


def related(seed: int, n: int = 40) -> list[Array]:
    """Five representations that share some, all or none of their content, of different widths and scales."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, 6))
    mixed = base @ rng.normal(size=(6, 9)) + rng.normal(size=(n, 9))
    return [base, mixed * 1e-3, np.tanh(mixed), rng.normal(size=(n, 70)) * 1e5, base[:, :2] + 3.0]


def test_equals_the_plain_formula_for_every_pair() -> None:
    representations = related(0)
    result = cka_matrix(representations)
    expected = [[plain_cka(x, y) for y in representations] for x in representations]
    # The plain formula is not centred and loses some digits on the shifted representation.
    np.testing.assert_allclose(result.values, expected, atol=1e-10)
    assert result.reasons == ("",) * 5


@pytest.mark.parametrize("n", [4, 5, 17])
def test_equals_the_plain_formula_for_few_samples(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 2))
    assert linear_cka(x, 2 * x + 1) == pytest.approx(1.0, abs=1e-9)
    y = x + 0.1 * rng.normal(size=(n, 2))
    assert linear_cka(x, y) == pytest.approx(plain_cka(x, y), abs=1e-9)


@pytest.mark.parametrize("rows", [1, 7, 39, 40, 1000])
def test_tiles_change_nothing(rows: int) -> None:
    representations = related(1)
    whole = cka_matrix(representations).values
    tiled = cka_matrix(representations, tile_bytes=rows * 8 * 5 * 40).values
    np.testing.assert_allclose(tiled, whole, atol=1e-13)


def test_matrix_equals_pairs() -> None:
    representations = related(2)
    values = cka_matrix(representations).values
    assert values[1, 2] == pytest.approx(linear_cka(representations[1], representations[2]), abs=1e-13)
    np.testing.assert_array_equal(values, values.T)


@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(1e-6, 1e6),
    offset=st.floats(-1e3, 1e3),
    n=st.integers(8, 30),
)
@settings(max_examples=30, deadline=None)
def test_invariant_to_rotation_scale_and_translation(seed: int, scale: float, offset: float, n: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 5)), rng.normal(size=(n, 3))
    y[:, 0] += x[:, 0]
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    moved = (x @ rotation) * scale + offset * scale
    # The offset costs three of the sixteen digits, and small n makes the ratio sensitive.
    np.testing.assert_allclose(linear_cka(moved, y), linear_cka(x, y), atol=1e-9, equal_nan=True)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_an_offset_of_1e4_in_float32_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Multiples of 1/64 survive an offset of 1e4 in float32 exactly, so any difference is ours.
    x = np.round(rng.normal(size=(30, 8)) * 64) / 64
    y = x[:, :4] + rng.normal(size=(30, 4))
    offset = (x + 1e4).astype(np.float32)
    assert linear_cka(offset, y) == pytest.approx(linear_cka(x, y), abs=1e-10)
    assert linear_cka(offset, offset) == pytest.approx(1.0, abs=1e-12)


def test_unrelated_features_have_none_on_average() -> None:
    rng = np.random.default_rng(0)
    values = [linear_cka(rng.normal(size=(32, 200)), rng.normal(size=(32, 200))) for _ in range(100)]
    biased_would_be = 0.86
    # Standard error of this mean is about 0.01.
    assert abs(np.mean(values)) < 0.05 < biased_would_be
    assert min(values) < 0


def test_permuted_samples_are_unrelated() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 5))
    assert abs(linear_cka(x, x[rng.permutation(300)])) < 0.05


@pytest.mark.parametrize("constant", [0.0, 0.1, 12345.678])
def test_a_constant_representation_is_nan_with_a_reason_and_leaves_the_others_alone(constant: float) -> None:
    representations = related(3)
    expected = cka_matrix(representations).values
    result = cka_matrix([*representations[:2], np.full((40, 3), constant, np.float32), *representations[2:]])
    kept = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(result.values[np.ix_(kept, kept)], expected, atol=1e-13)
    assert np.isnan(result.values[2]).all()
    assert np.isnan(result.values[:, 2]).all()
    assert result.reasons[2] == "the features are the same for all samples"
    assert not any(result.reasons[m] for m in kept)
    assert np.isnan(linear_cka(representations[0], np.full((40, 3), constant)))


def test_a_representation_that_is_not_finite_is_nan_with_a_reason_and_leaves_the_others_alone() -> None:
    representations = related(5)
    expected = cka_matrix(representations).values
    broken = representations[3].copy()
    broken[7, 7] = np.inf
    result = cka_matrix([*representations[:3], broken, representations[4]])
    kept = [0, 1, 2, 4]
    np.testing.assert_array_equal(result.values[np.ix_(kept, kept)], expected[np.ix_(kept, kept)])
    assert np.isnan(result.values[3]).all()
    assert result.reasons[3] == "the features hold nan or inf"


def test_a_negative_estimate_of_the_own_similarity_is_nan_with_a_reason() -> None:
    # One sample stands out, the others coincide: the off-diagonal Gram entries say nothing about it.
    x = np.zeros((6, 2))
    x[0] = 1.0
    rng = np.random.default_rng(0)
    result = cka_matrix([x, rng.normal(size=(6, 1))])
    assert plain_hsic(x - x.mean(axis=0), x - x.mean(axis=0)) <= 1e-15
    assert np.isnan(result.values[0]).all()
    assert "estimated as 0 or less" in result.reasons[0]


def test_takes_any_sequence_and_reports_progress() -> None:
    representations = related(4)

    class FromDisk(list[Array]):
        taken = 0

        def __getitem__(self, m: Any) -> Any:
            FromDisk.taken += 1
            return super().__getitem__(m)

    seen: list[tuple[int, int]] = []
    tile_bytes = 20 * 8 * 5 * 40
    values = cka_matrix(FromDisk(representations), tile_bytes=tile_bytes, progress=lambda *at: seen.append(at)).values
    np.testing.assert_allclose(values, cka_matrix(representations).values, atol=1e-13)
    assert seen == [(1, 2), (2, 2)]
    assert FromDisk.taken <= 4 * 5


def test_refuses_bad_input() -> None:
    x = np.random.default_rng(0).normal(size=(5, 2))
    with pytest.raises(ValueError, match="no representation was given"):
        cka_matrix([])
    with pytest.raises(ValueError, match="needs 4 samples or more, got 3"):
        linear_cka(x[:3], x[:3])
    with pytest.raises(ValueError, match="representation 1 has 4 samples, the first has 5"):
        linear_cka(x, x[:4])
