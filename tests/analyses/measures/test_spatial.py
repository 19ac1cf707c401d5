"""Spatial scores against plain loops over pairs of tokens, and on fields of known structure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from layerprobe.analyses.measures.spatial import far_distance, semantic_similarity, spatial_structure

Array = NDArray[Any]
GRIDS = [(16,), (7,), (8, 8), (7, 12), (3, 3), (3, 4, 5)]


def cosine(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def pairs_by_distance(sample: Array, cells: Sequence[tuple[int, ...]]) -> dict[int, list[float]]:
    result: dict[int, list[float]] = {}
    for i, j in combinations(range(len(cells)), 2):
        distance = sum(abs(p - q) for p, q in zip(cells[i], cells[j], strict=True))
        result.setdefault(distance, []).append(cosine(sample[i], sample[j]))
    return result


def scores_by_loops(sample: Array, cells: Sequence[tuple[int, ...]], far: int) -> tuple[float, float, float]:
    """LDS, CDS and RMSC of one sample, as the paper's code has them."""
    pairs = pairs_by_distance(sample, cells)
    lds = np.mean(pairs[1]) - np.mean([c for d, cosines in pairs.items() if d >= far for c in cosines])
    decay = [d for d in range(1, 9) if d in pairs]
    cds = -np.polyfit(decay, [np.mean(pairs[d]) for d in decay], 1)[0]
    units = sample / np.linalg.norm(sample, axis=1, keepdims=True)
    rmsc = np.sqrt(np.mean(np.sum((units - units.mean(axis=0)) ** 2, axis=1)))
    return float(lds), float(cds), float(rmsc)


def field(grid: tuple[int, ...], *, n: int = 3, width: int = 5, smooth: float = 1.0, seed: int = 0) -> Array:
    """Tokens (n, T, width) that vary smoothly over the grid."""
    x = np.random.default_rng(seed).normal(size=(n, *grid, width))
    x = gaussian_filter(x, sigma=(0, *[smooth] * len(grid), 0), mode="nearest")
    return (x / x.std()).reshape(n, -1, width)


@pytest.mark.parametrize("grid", GRIDS)
def test_scores_equal_the_loops_over_pairs(grid: tuple[int, ...]) -> None:
    tokens = field(grid) + 0.3
    cells = list(product(*map(range, grid)))
    result = spatial_structure(tokens, grid)
    for i, sample in enumerate(tokens):
        lds, cds, rmsc = scores_by_loops(sample, cells, far_distance(grid))
        assert result.lds[i] == pytest.approx(lds, abs=1e-12)
        assert result.cds[i] == pytest.approx(cds, abs=1e-12)
        assert result.rmsc[i] == pytest.approx(rmsc, abs=1e-12)
    assert result.reason == ""
    pairs = pairs_by_distance(tokens[0], cells)
    assert result.pair_counts[1:].tolist() == [len(pairs[d]) for d in range(1, len(result.pair_counts))]


def test_kept_tokens_are_compared_where_they_stand() -> None:
    grid, positions = (6, 6), [0, 1, 7, 13, 20, 34, 35]
    tokens = field(grid)[:, positions]
    cells = [divmod(p, 6) for p in positions]
    result = spatial_structure(tokens, grid, positions=positions)
    for i, sample in enumerate(tokens):
        lds, cds, rmsc = scores_by_loops(sample, cells, far_distance(grid))
        assert (result.lds[i], result.cds[i], result.rmsc[i]) == pytest.approx((lds, cds, rmsc), abs=1e-12)


def test_smoother_fields_have_more_structure_and_shuffled_tokens_none() -> None:
    rough, smooth = (spatial_structure(field((16, 16), n=20, smooth=s), (16, 16)) for s in (0.5, 2.0))
    assert smooth.lds.mean() > rough.lds.mean() + 0.2
    assert smooth.cds.mean() > rough.cds.mean() + 0.02
    shuffled = np.random.default_rng(0).permuted(field((16, 16), n=20, smooth=2.0), axis=1)
    order = np.random.default_rng(0).permutation(256)
    shuffled = field((16, 16), n=20, smooth=2.0)[:, order]
    result = spatial_structure(shuffled, (16, 16))
    assert abs(result.lds.mean()) < 0.02
    assert abs(result.cds.mean()) < 0.005
    # The spread of a set of tokens does not know where they stand.
    np.testing.assert_allclose(result.rmsc, smooth.rmsc, rtol=1e-12)


@pytest.mark.parametrize(
    ("grid", "far"), [((16, 16), 6), ((7, 7), 6), ((4, 4), 3), ((3, 3), 2), ((2, 2), 2), ((8,), 4), ((4, 4, 4), 5)]
)
def test_distant_means_six_cells_or_half_of_a_small_grid(grid: tuple[int, ...], far: int) -> None:
    assert far_distance(grid) == far
    assert spatial_structure(field(grid), grid).far_distance == far


@pytest.mark.parametrize("factor", [1e-30, 1e-4, 1e4, 1e30])
def test_scale_does_not_matter(factor: float) -> None:
    tokens = field((6, 6))
    result, scaled = (spatial_structure(x, (6, 6)) for x in (tokens, tokens * factor))
    for name in ("lds", "cds", "rmsc"):
        np.testing.assert_allclose(getattr(scaled, name), getattr(result, name), rtol=1e-10)


def test_a_large_common_part_hides_structure_and_centering_brings_it_back() -> None:
    # Multiples of 1/64 survive an offset of 1e4 in float32 exactly.
    tokens = np.round(field((8, 8), n=40, width=16, smooth=1.5) * 64) / 64
    moved = (tokens + 1e4).astype(np.float32)
    assert 0 < spatial_structure(moved, (8, 8)).lds.mean() < 1e-6
    expected = spatial_structure(tokens, (8, 8), center=True)
    result = spatial_structure(moved, (8, 8), center=True)
    np.testing.assert_allclose(result.lds, expected.lds, rtol=1e-8)
    assert result.lds.mean() > 0.3


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_constant_layer_has_no_scores(value: float) -> None:
    result = spatial_structure(np.full((2, 16, 3), value, np.float32), (4, 4))
    assert result.reason == "all tokens are the same"
    for scores in (result.lds, result.cds, result.rmsc):
        assert np.isnan(scores).all()
        assert scores.shape == (2,)


def test_zero_tokens_spoil_their_own_sample_only() -> None:
    tokens = field((4, 4))
    expected = spatial_structure(tokens, (4, 4)).lds
    tokens[1, 3] = 0
    result = spatial_structure(tokens, (4, 4))
    assert result.reason == "1 of 3 samples have tokens that are zero vectors"
    np.testing.assert_array_equal(result.lds[[0, 2]], expected[[0, 2]])
    assert np.isnan(result.lds[1])
    assert np.isnan(result.rmsc[1])


@pytest.mark.parametrize(("grid", "positions"), [((1,), None), ((2,), None), ((9, 9), [0, 40, 80])])
def test_without_near_and_distant_pairs_there_is_no_lds(grid: tuple[int, ...], positions: list[int] | None) -> None:
    tokens = np.random.default_rng(0).normal(size=(4, len(positions or range(grid[0])), 3))
    assert np.isnan(spatial_structure(tokens, grid, positions=positions).lds).all()


# ------------------------------------------------------------------------------------------------ SRSS


def srss_by_loops(sample: Array, cells: Sequence[tuple[int, ...]], mask: Array, far: int) -> float:
    gains = []
    for i in np.flatnonzero(mask):
        distance = np.array([sum(abs(p - q) for p, q in zip(cells[i], cell, strict=True)) for cell in cells])
        near = [cosine(sample[i], sample[j]) for j in np.flatnonzero((distance == 1) & mask)]
        away = [cosine(sample[i], sample[j]) for j in np.flatnonzero((distance >= far) & ~mask)]
        if near and away:
            gains.append(np.mean(near) - np.mean(away))
    return float(np.mean(gains)) if gains else np.nan


@pytest.mark.parametrize("grid", [(12,), (7, 9), (3, 4, 5)])
def test_semantic_similarity_equals_the_loops(grid: tuple[int, ...]) -> None:
    tokens = field(grid)
    masks = np.random.default_rng(1).random((3, tokens.shape[1])) < 0.4
    cells = list(product(*map(range, grid)))
    expected = [srss_by_loops(x, cells, m, far_distance(grid)) for x, m in zip(tokens, masks, strict=True)]
    np.testing.assert_allclose(semantic_similarity(tokens, grid, masks), expected, atol=1e-12)


def test_an_object_of_its_own_is_seen_and_a_misplaced_mask_is_not() -> None:
    rng = np.random.default_rng(2)
    masks = np.zeros((10, 10, 10), bool)
    masks[:, 1:5, 1:5] = True
    masks = masks.reshape(10, 100)
    tokens = rng.normal(size=(10, 100, 8)) * 0.3 + np.where(masks[..., None], 1.0, -1.0)
    assert semantic_similarity(tokens, (10, 10), masks).mean() > 1.5
    order = rng.permutation(100)
    assert abs(semantic_similarity(tokens[:, order], (10, 10), masks).mean()) < 0.4


def test_samples_without_object_or_background_have_no_answer() -> None:
    tokens, masks = field((8, 8)), np.zeros((3, 64), bool)
    masks[0] = True
    masks[2, :16] = True
    result = semantic_similarity(tokens, (8, 8), masks)
    assert np.isnan(result).tolist() == [True, True, False]


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("shape", "grid", "positions", "message"),
    [
        ((2, 5), (5,), None, r"tokens of shape \(2, 5\) have no place on a grid; pass \(n, T, D\)"),
        ((2, 5, 3), (2, 3), None, r"5 tokens but grid \(2, 3\) has 6 cells"),
        ((2, 2, 3), (2, 3), [0], "2 tokens but 1 positions are given"),
        ((2, 2, 3), (2, 3), [0, 6], r"not different cells of the grid \(2, 3\); pass indices from 0 to 5"),
        ((2, 2, 3), (2, 3), [1, 1], "not different cells"),
    ],
)
def test_what_does_not_fit_is_refused(
    shape: tuple[int, ...], grid: tuple[int, ...], positions: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spatial_structure(np.ones(shape), grid, positions=positions)


def test_masks_must_be_bools_of_every_token() -> None:
    tokens = field((4, 4))
    for masks in (np.zeros((3, 15), bool), np.zeros((3, 16))):
        with pytest.raises(ValueError, match=r"pass one bool per token, \(n, T\)"):
            semantic_similarity(tokens, (4, 4), masks)
    tokens[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="tokens hold 1 values that are nan or inf"):
        spatial_structure(tokens, (4, 4))
