"""Ridge probes against scikit-learn and against a loop that leaves every sample out."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, RidgeClassifierCV, RidgeCV

from layerprobe.analyses.ridge_probe import fit_ridge, regression_probe, ridge_screen

ALPHAS = (1e-3, 1e-1, 1.0, 30.0, 1e3)


def planted(seed: int, *, n: int = 60, width: int = 8, q: int = 3) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)) * np.arange(1, width + 1) ** -1.0 + 5
    return x, x @ rng.normal(size=(width, q)) + 0.3 * rng.normal(size=(n, q)) - 2


@given(seed=st.integers(0, 2**16), n=st.sampled_from([7, 12, 30]), width=st.sampled_from([1, 8, 20]))
@settings(max_examples=8)
def test_leave_one_out_equals_the_loop(seed: int, n: int, width: int) -> None:
    x, targets = planted(seed, n=n, width=width)
    path = fit_ridge(x, targets, alphas=(0.01, 1.0))
    for index, alpha in enumerate((0.01, 1.0)):
        for i in range(n):
            rest = np.arange(n) != i
            expected = Ridge(alpha=alpha).fit(x[rest], targets[rest]).predict(x[i : i + 1])[0]
            np.testing.assert_allclose(path.left_out[index, i], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(60, 8), (15, 40)])
def test_equals_scikit_learn_at_every_penalty(shape: tuple[int, int]) -> None:
    x, targets = planted(0, n=shape[0], width=shape[1])
    path = fit_ridge(x, targets, alphas=ALPHAS)
    for index, alpha in enumerate(ALPHAS):
        reference = Ridge(alpha=alpha).fit(x, targets)
        np.testing.assert_allclose(path.weights[index], reference.coef_, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(path.bias[index], reference.intercept_, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(path.predict(x, index), reference.predict(x), rtol=1e-6)
    reference = RidgeCV(ALPHAS, store_cv_results=True).fit(x, targets)
    errors = np.square(path.left_out - targets)
    np.testing.assert_allclose(errors, np.moveaxis(reference.cv_results_, 2, 0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_screen_equals_ridge_classifier_cv(num_classes: int) -> None:
    rng = np.random.default_rng(1)
    y = rng.integers(0, num_classes, 150)
    x = rng.normal(size=(150, 10)) + rng.normal(size=(num_classes, 10))[y]
    screen = ridge_screen(x, y, alphas=ALPHAS)
    reference = RidgeClassifierCV(ALPHAS).fit(x, y)
    assert screen.alpha == reference.alpha_
    i = list(ALPHAS).index(screen.alpha)
    assert screen.accuracies[i] == screen.accuracy == screen.correct.mean()
    shuffled = ridge_screen(x, rng.permutation(y), alphas=ALPHAS)
    assert shuffled.accuracy < screen.accuracy - 0.2
    # The samples left out say less than the samples seen.
    assert screen.accuracy <= reference.score(x, y)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_default_penalties_follow_the_scale_and_an_offset_changes_nothing(scale: float) -> None:
    x, targets = planted(2)
    x = np.round(x * 64) / 64  # survives an offset of 1e4 in float32 exactly
    plain, scaled = fit_ridge(x, targets), fit_ridge(x * scale, targets)
    np.testing.assert_allclose(scaled.left_out, plain.left_out, rtol=1e-5, atol=1e-8)
    shifted = fit_ridge((x + 1e4).astype(np.float32), targets)
    np.testing.assert_allclose(shifted.left_out, plain.left_out, rtol=1e-5, atol=1e-8)


def test_constant_features_predict_the_mean_of_the_others() -> None:
    targets = np.array([[0.0], [1.0], [5.0]])
    path = fit_ridge(np.full((3, 2), 0.1), targets)
    np.testing.assert_allclose(path.left_out[0], [[3.0], [2.5], [0.5]])
    np.testing.assert_allclose(path.weights, 0, atol=1e-12)


def test_regression_probe_finds_what_is_there() -> None:
    x, targets = planted(3, n=300)
    targets[:, 2] = np.random.default_rng(0).normal(size=300)  # nothing to find
    parts = (slice(0, 150), slice(150, 200), slice(200, None))
    result = regression_probe(*(array[part] for part in parts for array in (x, targets)), alphas=ALPHAS)
    models = {alpha: Ridge(alpha=alpha).fit(x[:150], targets[:150]) for alpha in ALPHAS}
    best = max(models, key=lambda alpha: models[alpha].score(x[150:200], targets[150:200]))
    assert result.alpha == best
    assert result.choose_r2 == pytest.approx(models[best].score(x[150:200], targets[150:200]))
    assert result.report_r2 == pytest.approx(models[best].score(x[200:], targets[200:]))
    assert result.target_r2[:2].min() > 0.5
    assert result.target_r2[2] < 0.2


def test_a_target_that_is_constant_where_it_is_scored_has_no_share() -> None:
    x, targets = planted(4, q=2)
    constant = targets[40:].copy()
    constant[:, 0] = 1.0
    result = regression_probe(x[:30], targets[:30], x[30:40], targets[30:40], x[40:], constant)
    assert np.isnan(result.target_r2[0])
    assert result.report_r2 == result.target_r2[1]


def test_refuses_bad_input() -> None:
    x, targets = planted(5, n=20)
    with pytest.raises(ValueError, match=r"20 samples but targets of shape \(20,\); pass \(n, q\)"):
        fit_ridge(x, targets[:, 0])
    with pytest.raises(ValueError, match="targets of the fit split hold 1 values that are nan or inf"):
        fit_ridge(x, np.where(np.arange(60).reshape(20, 3) == 4, np.nan, targets))
    with pytest.raises(ValueError, match=r"penalties alpha are \(0.0,\); pass finite numbers above 0"):
        fit_ridge(x, targets, alphas=(0.0,))
    with pytest.raises(ValueError, match="pass two or more"):
        fit_ridge(x[:1], targets[:1])
    with pytest.raises(ValueError, match="all 20 labels are 3; a probe needs two classes"):
        ridge_screen(x, np.full(20, 3))
    with pytest.raises(ValueError, match="choose split are constant"):
        regression_probe(x, targets, x, np.ones((20, 3)), x, targets)
