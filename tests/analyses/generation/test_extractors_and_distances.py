"""Fréchet and kernel distance against their formulas, and extractors that are the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import linalg
from tiny import SHAPE, tiny_samples

from layerprobe.analyses.generation import extractors as fidelity_module
from layerprobe.analyses.generation.distances import (
    Gaussian,
    frechet_distance,
    gaussian,
    kernel_distance,
    leave_out_gaussians,
)
from layerprobe.analyses.generation.extractors import (
    FEATURE_WIDTH,
    Extractor,
    all_features,
    classifier_extractor,
    embedded_extractor,
    sample_features,
)
from layerprobe.data.embedded_digits import digits


def normal(n: int, width: int, seed: int) -> NDArray[np.float64]:
    """Correlated features with scales from 0.1 to 10."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, width)) @ rng.normal(size=(width, width))
    return mixed * np.logspace(-1, 1, width) + rng.normal(size=width)


def textbook(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The formula of Heusel et al. 2017 with scipy's matrix square root, and nothing shared with the module."""
    sx, sy = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(sx @ sy)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sx + sy - 2 * np.real(root)))


def by_factors(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """tr (S_x S_y)^(1/2) is the nuclear norm of X Y^T for centered, scaled X and Y: no root of a singular matrix."""
    cx, cy = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    trace = (cx**2).sum() + (cy**2).sum() - 2 * np.linalg.svd(cx @ cy.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + trace)


def distance(x: NDArray[Any], y: NDArray[Any]) -> float:
    return frechet_distance(gaussian(x), gaussian(y))


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_formula(seed: int) -> None:
    x, y = normal(200, 8, seed), normal(150, 8, seed + 10)
    assert distance(x, y) == pytest.approx(textbook(x, y), rel=1e-8)
    assert distance(y, x) == pytest.approx(distance(x, y), rel=1e-8)


def test_equals_the_closed_form_in_one_dimension() -> None:
    a = Gaussian(np.array([1.0]), np.array([[4.0]]), 10)
    b = Gaussian(np.array([-2.0]), np.array([[9.0]]), 10)
    assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 3) ** 2, rel=1e-12)
    x, y = normal(50, 1, 0), normal(60, 1, 1)
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_equals_the_closed_form_of_commuting_covariances() -> None:
    """Diagonal covariances: the squared distance of the standard deviations."""
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 1.0, 0.0])
    x, y = (Gaussian(np.zeros(3), np.diag(variances), 10) for variances in (a, b))
    assert frechet_distance(x, y) == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(5, 40), (5, 7), (2, 2)])
def test_singular_covariances(n: int, m: int) -> None:
    """Fewer samples than features: scipy's root loses half the digits or fails, factors do not."""
    x, y = normal(n, 20, 0), normal(m, 20, 1)
    # The root of an eigenvalue that is 0 up to rounding is 1e-8 of the largest.
    assert distance(x, y) == pytest.approx(by_factors(x, y), rel=1e-6)


@pytest.mark.parametrize("n", [100, 6])
def test_is_zero_for_itself(n: int) -> None:
    x = normal(n, 12, 0)
    # Relative to the trace of the covariance: float64 rounding, not its square root.
    assert 0 <= distance(x, x) < 1e-12 * np.trace(np.cov(x.T))


@pytest.mark.parametrize("n", [200, 6])
def test_is_invariant_to_a_shift_and_a_rotation_of_both(n: int) -> None:
    x, y = normal(n, 12, 0), normal(n, 12, 1)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(12, 12)))[0]
    expected = distance(x, y)
    assert distance(x + 1000, y + 1000) == pytest.approx(expected, rel=1e-6)
    assert distance(x @ turn, y @ turn) == pytest.approx(expected, rel=1e-6)
    shift = np.full(12, 2.0)
    assert distance(x + shift, x) == pytest.approx(48, rel=1e-9)  # a shift of one of them is its squared length


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros(5), r"need features of shape \(n, D\) with n of at least 2, got shape \(5,\)"),
        (np.zeros((1, 5)), r"n of at least 2, got shape \(1, 5\)"),
        (np.array([[1.0], [np.nan]]), "features are not finite; the samples or the extractor have diverged"),
        (np.array([[1.0], [np.inf]]), "features are not finite"),
    ],
)
def test_features_that_are_none_are_refused(features: NDArray[np.float64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian(features)


def test_features_of_two_extractors_are_refused() -> None:
    with pytest.raises(ValueError, match="features of width 3 and 4 cannot be compared; use one extractor"):
        distance(np.eye(3), np.eye(4))


def test_features_come_in_the_order_of_the_samples() -> None:
    samples = tiny_samples(11)
    extractor = Extractor("means", lambda x: x.flatten(2).mean(2))
    expected = samples.x.flatten(1).mean(1, keepdim=True).numpy()
    for size in (3, 512):
        np.testing.assert_array_equal(all_features(extractor, samples, batch_size=size), expected)
        np.testing.assert_array_equal(sample_features(extractor, samples.x, batch_size=size), expected)


def test_gaussians_without_a_group_are_those_of_the_rest() -> None:
    x = normal(90, 6, 0) + 1e4  # a large mean takes half of the digits of raw second moments
    groups = np.random.default_rng(0).permutation(90) % 7
    for group, left in enumerate(leave_out_gaussians(x.astype(np.float64), groups)):
        rest = x[groups != group]
        assert left.n == len(rest)
        np.testing.assert_allclose(left.mean, rest.mean(0), rtol=1e-12)
        np.testing.assert_allclose(left.covariance, np.cov(rest.T), rtol=1e-9, atol=1e-9)


def slow_mmd(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The unbiased estimator pair by pair, as Gretton et al. 2012 write it."""

    def k(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    within = [
        sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    return sum(within) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("rows", [1, 4, 1024])
def test_the_kernel_distance_equals_the_formula(rows: int) -> None:
    x, y = normal(11, 5, 0), normal(8, 5, 1)
    assert kernel_distance(x, y, rows=rows) == pytest.approx(slow_mmd(x, y), rel=1e-10)


def test_the_kernel_distance_is_zero_on_average_at_any_size() -> None:
    rng = np.random.default_rng(0)
    for n, m in ((5, 5), (4, 30)):
        found = np.array([kernel_distance(rng.normal(size=(n, 3)), rng.normal(size=(m, 3))) for _ in range(2000)])
        assert abs(found.mean()) < 4 * found.std() / np.sqrt(2000)
        assert (found < 0).any()  # unbiased, so not bounded by 0


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 3)), r"need features \(n, D\) and \(m, D\) of at least 2 samples, got shapes \(1, 3\)"),
        (np.zeros((4, 2)), r"got shapes \(4, 2\) and \(4, 3\)"),
        (np.full((4, 3), np.nan), "features are not finite"),
    ],
)
def test_features_without_a_kernel_distance_are_refused(x: NDArray[np.float64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_distance(x, np.zeros((4, 3)))


@pytest.mark.parametrize(
    ("function", "seen"),
    [(lambda x: x, r"shape \(4, 1, 4, 4\)"), (lambda x: x.flatten(1)[:2], r"shape \(2, 16\)"), (lambda x: 3, "a int")],
)
def test_what_an_extractor_must_not_give(function: Any, seen: str) -> None:
    with pytest.raises(ValueError, match=rf"^mine returns {seen} for 4 samples; it must return features \(B, D\)$"):
        sample_features(Extractor("mine", function), torch.zeros(4, *SHAPE))


# ------------------------------------------------------------------------------------------------------------ extractor


@pytest.mark.parametrize("shape", [SHAPE, (2, 16), (1, 4, 4, 4)])
def test_the_classifier_takes_any_grid(shape: tuple[int, ...]) -> None:
    samples = tiny_samples(9, shape=shape)
    extractor = classifier_extractor(samples, steps=2, batch_size=4)
    features = all_features(extractor, samples)
    assert features.shape == (9, FEATURE_WIDTH)
    assert np.isfinite(features).all()
    assert extractor.name == "64 features of a classifier trained 2 steps on the labels"


def test_the_classifier_depends_on_its_arguments_only_and_leaves_random_numbers_alone() -> None:
    samples = tiny_samples(20)
    torch.manual_seed(1)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    first = all_features(classifier_extractor(samples, steps=5, batch_size=8), samples)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    torch.manual_seed(2)
    again = all_features(classifier_extractor(samples, steps=5, batch_size=8), samples)
    np.testing.assert_array_equal(again, first)
    other = all_features(classifier_extractor(samples, steps=5, batch_size=8, seed=1), samples)
    assert np.abs(other - first).max() > 1e-3


def test_the_classifier_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, cache = tiny_samples(20), tmp_path / "deep" / "extractor.safetensors"
    first = classifier_extractor(samples, cache, steps=5, batch_size=8)
    stamp = cache.stat().st_mtime_ns
    monkeypatch.setattr(fidelity_module, "_train", None)
    again = classifier_extractor(samples, cache, steps=5, batch_size=8)
    assert again.name == first.name
    np.testing.assert_array_equal(all_features(again, samples), all_features(first, samples))
    assert cache.stat().st_mtime_ns == stamp


def test_the_classifier_of_something_else_is_refused(tmp_path: Path) -> None:
    samples, cache = tiny_samples(20), tmp_path / "extractor.safetensors"
    classifier_extractor(samples, cache, steps=2, batch_size=8)
    others: list[tuple[Any, dict[str, int]]] = [
        (tiny_samples(20, seed=1), {"steps": 2, "batch_size": 8}),
        (samples, {"steps": 3, "batch_size": 8}),
        (samples, {"steps": 2, "batch_size": 9}),
        (samples, {"steps": 2, "batch_size": 8, "seed": 1}),
    ]
    for data, options in others:
        with pytest.raises(ValueError, match=r"is an extractor for other data or of another training; delete it$"):
            classifier_extractor(data, cache, **options)
    cache.write_bytes(cache.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"extractor.safetensors is damaged .*; delete it$") as error:
        classifier_extractor(samples, cache, steps=2, batch_size=8)
    assert "\n" not in str(error.value)


def test_an_interrupted_write_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tensors: object, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(fidelity_module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        classifier_extractor(tiny_samples(20), tmp_path / "extractor.safetensors", steps=1, batch_size=8)
    assert not (tmp_path / "extractor.safetensors").exists()


def test_without_labels_the_name_says_that_the_network_is_random() -> None:
    samples = tiny_samples(400, labeled=False)
    extractor = classifier_extractor(samples)
    assert extractor.name == "64 features of a random network (no labels)"
    generator = torch.Generator().manual_seed(0)
    noise = sample_features(extractor, torch.randn(200, *SHAPE, generator=generator))
    real = all_features(extractor, samples)
    # It still tells samples from noise: halves of the samples are nearer to each other.
    assert distance(real[:200], noise) > 3 * distance(real[:200], real[200:])


def test_the_embedded_extractor_keeps_each_training(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(classifier_extractor.__kwdefaults__, "steps", 2)
        made = [
            embedded_extractor(samples, tmp_path, seed=seed, progress=lambda *at: steps.append(at))
            for samples in (tiny_samples(20), tiny_samples(20, labeled=False))
            for seed in (0, 1)
        ]
        assert len(list(tmp_path.iterdir())) == 4
        assert ["random" in extractor.name for extractor in made] == [False, False, True, True]
        assert steps == [(1, 2), (2, 2)] * 2
        patch.setattr(fidelity_module, "_train", None)
        again = embedded_extractor(tiny_samples(20), tmp_path, seed=1)
    x = tiny_samples(5).x
    np.testing.assert_array_equal(sample_features(again, x), sample_features(made[1], x))


@pytest.fixture(scope="module")
def of_digits() -> tuple[Extractor, NDArray[np.float32], NDArray[np.int64]]:
    splits = digits()
    extractor = classifier_extractor(splits.train)
    assert splits.test.labels is not None
    return extractor, all_features(extractor, splits.test), splits.test.labels.numpy()


@pytest.mark.slow  # 600 steps of training, 5 to 15 s
def test_the_classifier_of_digits_knows_unseen_digits(of_digits: Any) -> None:
    _, features, labels = of_digits
    # Nearest class center in feature space, fitted on one half and read on the other: chance is 0.1.
    centers = np.stack([features[:200][labels[:200] == digit].mean(0) for digit in range(10)])
    nearest = ((features[200:, None] - centers) ** 2).sum(2).argmin(1)
    assert (nearest == labels[200:]).mean() > 0.95


@pytest.mark.slow
def test_the_distance_of_digits_grows_with_their_noise(of_digits: Any) -> None:
    extractor, real, _ = of_digits
    x = digits().validation.batch(range(397)).x
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator)
    distances = [distance(real, sample_features(extractor, x + amount * noise)) for amount in (0.0, 0.2, 0.4, 0.8)]
    assert distances == sorted(distances)
    assert distances[-1] > 5 * distances[0]
