"""CKA against the formulas of Song et al. and Kornblith et al. written down with full matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from layerprobe.analyses.measures import cka, gram_products
from layerprobe.analyses.measures.cka import CkaSums, cka_matrix, linear_cka

Array = NDArray[Any]


def plain_unbiased(k: Array, other: Array) -> float:
    """Song et al. 2012, eq. 5, in full matrices; not centered, which the formula does not need."""
    n = len(k)
    k, other = (gram - np.diag(np.diag(gram)) for gram in (k, other))
    one = np.ones(n)
    total = np.trace(k @ other) + one @ k @ one * (one @ other @ one) / ((n - 1) * (n - 2))
    return float(total - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3))


def plain_biased(k: Array, other: Array) -> float:
    """Kornblith et al. 2019, eq. 3."""
    h = np.eye(len(k)) - 1 / len(k)
    return float(np.trace(k @ h @ other @ h))


def linear(x: Array) -> Array:
    return x @ x.T


def rbf(x: Array, bandwidth: float = 1.0) -> Array:
    distances = np.linalg.norm(x[:, None] - x, axis=2)
    pairs = np.sort(distances[np.triu_indices(len(x), 1)])
    return np.exp(-(distances**2) / (2 * (bandwidth * pairs[(len(pairs) - 1) // 2]) ** 2))


def plain_cka(x: Array, y: Array, gram: Any = linear, hsic: Any = plain_unbiased) -> float:
    k, other = gram(x), gram(y)
    return float(hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other)))


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
    # The plain formula is not centered and loses some digits on the shifted representation.
    np.testing.assert_allclose(result.values, expected, atol=1e-10)
    assert result.reasons == ("",) * 5


@pytest.mark.parametrize("n", [4, 5, 17])
def test_equals_the_plain_formula_for_few_samples(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 2))
    assert linear_cka(x, 2 * x + 1) == pytest.approx(1.0, abs=1e-9)
    y = x + 0.1 * rng.normal(size=(n, 2))
    assert linear_cka(x, y) == pytest.approx(plain_cka(x, y), abs=1e-9)


@pytest.mark.parametrize("way", ["by Gram matrices", "by features"])
@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_both_ways_and_estimators_equal_the_plain_formula(
    way: str, estimator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cka, "num_multiplications", lambda *sides: (0, 1) if way == "by Gram matrices" else (1, 0))
    xs, hsic = related(6), plain_unbiased if estimator == "debiased" else plain_biased
    expected = np.array([[plain_cka(x, y, hsic=hsic) for y in xs] for x in xs])
    np.testing.assert_allclose(cka_matrix(xs, estimator=estimator).values, expected, atol=1e-10)
    np.testing.assert_allclose(cka_matrix(xs[:2], xs[1:], estimator=estimator).values, expected[:2, 1:], atol=1e-10)


@pytest.mark.parametrize("bandwidth", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_rbf_equals_the_plain_formula(bandwidth: float, estimator: Any) -> None:
    xs, hsic = related(7), plain_unbiased if estimator == "debiased" else plain_biased
    expected = np.array([[plain_cka(x, y, lambda x: rbf(x, bandwidth), hsic) for y in xs] for x in xs])
    for tile_bytes in (1, 20000, 2**29):
        options = {"kernel": "rbf", "bandwidth": bandwidth, "estimator": estimator, "tile_bytes": tile_bytes}
        np.testing.assert_allclose(cka_matrix(xs, **options).values, expected, atol=1e-8)
        np.testing.assert_allclose(cka_matrix(xs[3:], xs[:2], **options).values, expected[3:, :2], atol=1e-8)


def test_rbf_sees_what_linear_cka_does_not() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 1))
    assert abs(linear_cka(x, x**2)) < 0.05
    assert cka_matrix([x], [x**2], kernel="rbf").values[0, 0] > 0.2


def test_rbf_without_a_bandwidth_is_nan_with_a_reason() -> None:
    xs = related(8)
    result = cka_matrix([xs[0], np.eye(40)[:, :4]], kernel="rbf")
    assert np.isnan(result.values[1]).all()
    assert result.reasons == ("", "half of the distances between samples are 0, so the RBF kernel has no bandwidth")
    assert result.values[0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("way", ["by Gram matrices", "by features"])
@pytest.mark.parametrize("tile_bytes", [1, 2000, 30000, 2**29])
def test_tiles_change_nothing(way: str, tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cka, "num_multiplications", lambda *sides: (0, 1) if way == "by Gram matrices" else (1, 0))
    representations = related(1)
    whole = cka_matrix(representations).values
    np.testing.assert_allclose(cka_matrix(representations, tile_bytes=tile_bytes).values, whole, atol=1e-13)


@pytest.mark.parametrize("way", ["by Gram matrices", "by features"])
def test_float32_products_keep_seven_digits_over_long_sums(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cka, "num_multiplications", lambda *sides: (0, 1) if way == "by Gram matrices" else (1, 0))
    monkeypatch.setattr(gram_products, "_FLOAT32_TERMS", 100)
    rng = np.random.default_rng(0)
    # A steep spectrum, a shared offset and two massive channels, as residual streams have them.
    base = rng.normal(size=(700, 40)) * np.geomspace(1, 1e-3, 40) @ np.linalg.qr(rng.normal(size=(40, 40)))[0]
    xs = [base, base + 0.1 * rng.normal(size=base.shape), np.tanh(base), rng.normal(size=(700, 30))]
    xs = [(x * np.where(np.arange(x.shape[1]) < 2, 1000, 1) + 1e4 * m).astype(np.float32) for m, x in enumerate(xs)]
    exact = cka_matrix(xs, precision="float64").values
    assert np.abs(cka_matrix(xs, precision="float32").values - exact).max() < 1e-7
    assert (cka_matrix(xs, precision="float32").values != exact).any()


def test_large_problems_are_in_float32_unless_debiasing_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cka, "_CHEAP_MULTIPLICATIONS", 0)
    rng = np.random.default_rng(0)
    narrow, wide = rng.normal(size=(200, 8)), rng.normal(size=(200, 400))
    outlier = narrow.copy()
    outlier[0] = 1e4
    for xs, same in (([narrow, narrow[:, :4]], False), ([narrow, wide], True), ([narrow, outlier], True)):
        exact = cka_matrix(xs, precision="float64").values
        assert np.array_equal(cka_matrix(xs).values, exact) == same
        assert not np.array_equal(cka_matrix(xs, estimator="biased").values, exact)


def test_two_sets_are_a_part_of_the_whole() -> None:
    xs = related(9)
    whole = cka_matrix(xs)
    part = cka_matrix(xs[:2], [*xs[2:], np.ones((40, 2))])
    np.testing.assert_allclose(part.values[:, :3], whole.values[:2, 2:], atol=1e-12)
    assert np.isnan(part.values[:, 3]).all()
    assert (part.reasons, part.other_reasons[:3]) == (("", ""), ("", "", ""))
    assert part.other_reasons[3] == "the features are the same for all samples"


def test_takes_tensors_and_other_dtypes() -> None:
    xs = [np.round(x / np.abs(x).max() * 100) for x in related(10)]
    expected = cka_matrix(xs).values
    for dtype in (np.float16, np.float32, np.int64):
        np.testing.assert_allclose(cka_matrix([x.astype(dtype) for x in xs]).values, expected, atol=1e-12)
    np.testing.assert_allclose(cka_matrix([torch.from_numpy(x).bfloat16() for x in xs]).values, expected, atol=1e-12)
    frozen = xs[0].copy()
    frozen.flags.writeable = False
    assert linear_cka(frozen[::-1], xs[1][::-1]) == pytest.approx(expected[0, 1], abs=1e-12)


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
    others = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(result.values[np.ix_(others, others)], expected, atol=1e-13)
    assert np.isnan(result.values[2]).all()
    assert np.isnan(result.values[:, 2]).all()
    assert result.reasons[2] == "the features are the same for all samples"
    assert not any(result.reasons[m] for m in others)
    assert np.isnan(linear_cka(representations[0], np.full((40, 3), constant)))


def test_a_representation_that_is_not_finite_is_nan_with_a_reason_and_leaves_the_others_alone() -> None:
    representations = related(5)
    expected = cka_matrix(representations).values
    broken = representations[3].copy()
    broken[7, 7] = np.inf
    result = cka_matrix([*representations[:3], broken, representations[4]])
    others = [0, 1, 2, 4]
    np.testing.assert_array_equal(result.values[np.ix_(others, others)], expected[np.ix_(others, others)])
    assert np.isnan(result.values[3]).all()
    assert result.reasons[3] == "the features hold nan or inf"


def test_a_negative_estimate_of_the_own_similarity_is_nan_with_a_reason() -> None:
    # One sample stands out, the others coincide: the off-diagonal Gram entries say nothing about it.
    x = np.zeros((6, 2))
    x[0] = 1.0
    rng = np.random.default_rng(0)
    result = cka_matrix([x, rng.normal(size=(6, 1))])
    assert plain_unbiased(linear(x - x.mean(axis=0)), linear(x - x.mean(axis=0))) <= 1e-15
    assert np.isnan(result.values[0]).all()
    assert "estimated as 0 or less" in result.reasons[0]


@given(seed=st.integers(0, 10**6), exponent=st.integers(-4, 4), copies=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_order_scale_massive_channels_and_duplicates(seed: int, exponent: int, copies: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(30, 6)), rng.normal(size=(30, 4))
    y[:, :2] += x[:, :2]
    x[:, :2] *= 1000
    x, y = (np.tile(a, (copies, 1)) for a in (x, y))
    order = rng.permutation(len(x))
    value = linear_cka((x[order] * 10.0**exponent).astype(np.float32), y[order])
    # float32 features hold seven digits.
    assert value == pytest.approx(plain_cka(x, y), abs=1e-6)


def batches(xs: list[Array], sizes: list[int]) -> list[list[Array]]:
    ends = np.cumsum(sizes)
    return [[x[end - size : end] for x in xs] for size, end in zip(sizes, ends, strict=True)]


def streamed(xs: list[Array], sizes: list[int]) -> Array:
    sums = CkaSums()
    for batch in batches(xs, sizes):
        sums.update(batch)
    return sums.result().values


def test_streaming_adds_up_unbiased_hsics() -> None:
    xs, sizes = related(11), [10, 20, 4, 6]
    hsic = np.zeros((5, 5))
    for batch in batches(xs, sizes):
        b = len(batch[0])
        hsic += b * (b - 3) * np.array([[plain_unbiased(linear(x), linear(y)) for y in batch] for x in batch])
    expected = hsic / np.sqrt(np.outer(np.diag(hsic), np.diag(hsic)))
    np.testing.assert_allclose(streamed(xs, sizes), expected, atol=1e-9)
    np.testing.assert_allclose(streamed(xs, [40]), cka_matrix(xs).values, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "same_as"),
    [
        ([20, 17, 3], [20, 20]),
        ([1, 2, 17, 20], [20, 20]),
        ([20, 1, 1, 18], [20, 20]),
        ([1] * 40, [4] * 10),
    ],
)
def test_streaming_keeps_the_samples_of_batches_too_small_for_an_estimate(sizes: list[int], same_as: list[int]) -> None:
    xs = related(12)
    np.testing.assert_allclose(streamed(xs, sizes), streamed(xs, same_as), atol=1e-12)


def test_streaming_is_right_on_average_where_batches_of_biased_cka_are_not() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2048, 60))
    xs = [x, x[:, :30] + rng.normal(size=(2048, 30))]
    whole = cka_matrix(xs).values[0, 1]
    biased = np.mean([cka_matrix(batch, estimator="biased").values[0, 1] for batch in batches(xs, [32] * 64)])
    assert abs(streamed(xs, [32] * 64)[0, 1] - whole) < 0.02
    assert biased - whole > 0.3


def test_streaming_may_go_on_after_a_result_and_reuse_the_memory_of_a_batch() -> None:
    xs, sums = related(13), CkaSums()
    room = [np.empty((10, x.shape[1])) for x in xs]
    for batch in batches(xs, [10] * 4):
        for target, part in zip(room, batch, strict=True):
            target[:] = part
        sums.update(room[:2], room[2:])
        sums.result()
    np.testing.assert_allclose(sums.result().values, streamed(xs, [10] * 4)[:2, 2:], atol=1e-12)


def test_streaming_a_broken_or_constant_representation_leaves_the_others_alone() -> None:
    xs = related(14)
    broken = xs[1].copy()
    broken[25, 3] = np.nan
    sums = CkaSums()
    for batch in batches([xs[0], broken, np.ones((40, 2)), xs[2]], [20, 20]):
        sums.update(batch)
    result = sums.result()
    np.testing.assert_allclose(result.values[np.ix_([0, 3], [0, 3])], streamed([xs[0], xs[2]], [20, 20]), atol=1e-12)
    assert np.isnan(result.values[1:3]).all()
    assert result.reasons[1] == "the features hold nan or inf"
    assert "estimated as 0 or less" in result.reasons[2]


def test_streaming_refuses_bad_input() -> None:
    xs, sums = related(15), CkaSums()
    with pytest.raises(ValueError, match="needs 4 samples or more"):
        sums.result()
    with pytest.raises(ValueError, match=r"a batch has representations of \[40, 39\] samples"):
        sums.update([xs[0], xs[1][:39]])
    sums.update([x[:3] for x in xs])
    with pytest.raises(ValueError, match="needs 4 samples or more"):
        sums.result()
    with pytest.raises(
        ValueError, match=r"earlier batches had widths \(\[6, 9, 9, 70, 2\], \[\]\), this one has \[6\]"
    ):
        sums.update(xs[:1])


def test_takes_any_sequence_and_reports_progress() -> None:
    representations = related(4)

    class FromDisk(list[Array]):
        num_reads = 0

        def __getitem__(self, m: Any) -> Any:
            FromDisk.num_reads += 1
            return super().__getitem__(m)

    steps: list[tuple[int, int]] = []
    tile_bytes = 2 * 10 * 8 * 5 * 40  # too small to keep the features
    values = cka_matrix(FromDisk(representations), tile_bytes=tile_bytes, progress=lambda *at: steps.append(at)).values
    np.testing.assert_allclose(values, cka_matrix(representations).values, atol=1e-13)
    assert steps == [(10, 40), (20, 40), (30, 40), (40, 40)]
    # One for n and one for its device, once to know it, once per tile.
    assert FromDisk.num_reads == 2 + 5 + 4 * 5


@pytest.mark.parametrize("way", ["by Gram matrices", "by features", "rbf"])
@pytest.mark.parametrize("num_sets", [1, 2])
def test_pieces_may_be_computed_elsewhere_and_in_any_order(
    way: str, num_sets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cka, "num_multiplications", lambda *sides: (1, 0) if way == "by features" else (0, 1))
    sets = [related(seed) for seed in range(num_sets)]
    options: dict[str, Any] = {"kernel": "rbf" if way == "rbf" else "linear", "tile_bytes": 30000}
    nums = []

    def backwards(function: Any, items: Any) -> list[Any]:
        nums.append(len(items))
        return [function(item) for item in reversed(items)][::-1]

    found = cka_matrix(*sets, **options, share=backwards)
    assert max(nums[num_sets:]) > 1  # after those of the statistics
    assert np.array_equal(found.values, cka_matrix(*sets, **options).values)


def test_refuses_bad_input() -> None:
    x = np.random.default_rng(0).normal(size=(5, 2))
    with pytest.raises(ValueError, match="no representation was given"):
        cka_matrix([])
    with pytest.raises(ValueError, match="needs 4 samples or more, got 3"):
        linear_cka(x[:3], x[:3])
    with pytest.raises(ValueError, match="representation 1 has 4 samples, the first has 5"):
        cka_matrix([x, x[:4]])
    with pytest.raises(ValueError, match="representation 0 of the second set has 4 samples, the first has 5"):
        linear_cka(x, x[:4])
    options: list[tuple[dict[str, Any], str]] = [
        ({"kernel": "cosine"}, "kernel 'cosine' is not known"),
        ({"estimator": "unbiased"}, "estimator 'unbiased' is not known"),
        ({"precision": "bfloat16"}, "precision 'bfloat16' is not known"),
        ({"bandwidth": 0.0}, "the bandwidth is 0.0; pass a positive multiple"),
    ]
    for option, message in options:
        with pytest.raises(ValueError, match=message):
            cka_matrix([x], **option)
