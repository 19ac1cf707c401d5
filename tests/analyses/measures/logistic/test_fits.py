"""Logistic regression against scikit-learn and against an objective written down independently."""

from __future__ import annotations

import warnings
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from gaussian_classes import clouds, digits, sklearn_fit
from hypothesis import example, given, settings
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from layerprobe.analyses.measures.logistic import fits as logistic_fits
from layerprobe.analyses.measures.logistic.fits import (
    LogisticFit,
    fit_logistic,
    fit_logistic_map,
    fit_logistic_path,
    fit_multilabel_path,
    logistic_path,
)

Array = NDArray[Any]


def objective(x: Array, y: Array, weights: Array, bias: Array, inverse_penalty: float) -> float:
    logits = x @ weights.T + bias
    loss = np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(y)), np.searchsorted(np.unique(y), y)])
    return float(loss + np.sum(weights**2) / (2 * inverse_penalty * len(y)))


def assert_same_optimum(fit: LogisticFit, x: Array, y: Array, reference: LogisticRegression) -> None:
    expected = objective(x, y, reference.coef_, reference.intercept_, fit.inverse_penalty)
    # 1e-8: what `fit_logistic` promises is 1e-9, and the reference is itself an iterative solution.
    assert fit.objective == pytest.approx(expected, rel=1e-8)
    assert objective(x, y, fit.weights, fit.bias, fit.inverse_penalty) == pytest.approx(fit.objective, rel=1e-9)
    np.testing.assert_array_equal(fit.predict(x), reference.predict(x))
    assert fit.converged


@pytest.fixture(params=["newton", "bfgs"])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each solver by itself, whatever the number of samples: no other may finish its work."""
    monkeypatch.setattr(logistic_fits, "FEW_SAMPLES", 10**9 if request.param == "newton" else 0)
    original = logistic_fits._solvers
    monkeypatch.setattr(logistic_fits, "_solvers", lambda *args: original(*args)[:1])


by_each_solver = pytest.mark.usefixtures("solver")


@by_each_solver
@pytest.mark.parametrize("inverse_penalty", [1e-3, 0.1, 10.0])
def test_equals_scikit_learn(inverse_penalty: float) -> None:
    x, y, _ = clouds(0)
    reference = sklearn_fit(x, y, inverse_penalty)
    fit = fit_logistic(x, y, inverse_penalty=inverse_penalty)
    assert_same_optimum(fit, x, y, reference)
    # The weights are only as sure as the gradient allows: error <= gradient / curvature.
    np.testing.assert_allclose(fit.weights, reference.coef_, atol=1e-4 * np.abs(reference.coef_).max())
    np.testing.assert_allclose(fit.bias, reference.intercept_ - reference.intercept_.mean(), atol=1e-5)


@by_each_solver
@pytest.mark.parametrize("inverse_penalty", [1e-3, 1.0])
def test_equals_scikit_learn_on_real_digits(inverse_penalty: float) -> None:
    x, y = (part[:800] for part in digits())
    assert_same_optimum(fit_logistic(x, y, inverse_penalty=inverse_penalty), x, y, sklearn_fit(x, y, inverse_penalty))


@by_each_solver
def test_two_classes_equal_scikit_learn_at_twice_its_penalty() -> None:
    x, y, _ = clouds(1, num_classes=2, distance=0.5)
    fit = fit_logistic(x, y, inverse_penalty=0.5)
    reference = sklearn_fit(x, y, 1.0)
    np.testing.assert_allclose(fit.weights[1] - fit.weights[0], reference.coef_[0], rtol=1e-5)
    np.testing.assert_array_equal(fit.predict(x), reference.predict(x))


@by_each_solver
def test_more_features_than_samples() -> None:
    x, y, _ = clouds(2, n=40, width=90)
    assert_same_optimum(fit_logistic(x, y), x, y, sklearn_fit(x, y, 1.0))


def test_many_more_features_than_samples_need_no_matrix_of_their_size() -> None:
    x, y, _ = clouds(2, n=40, width=50_000)
    assert fit_logistic(x, y, inverse_penalty=1e-6).converged


@by_each_solver
def test_separable_data_under_a_weak_penalty_converges() -> None:
    x, y, _ = clouds(3, distance=20.0)
    fit = fit_logistic(x, y, inverse_penalty=1e4)
    assert fit.converged
    assert (fit.predict(x) == y).all()
    # The optimum is a stationary point of the objective as written down here, by central differences on the scale of
    # the weights.
    step = 1e-4 * np.abs(fit.weights).max()
    for k, d in [(0, 0), (1, 5), (3, 11)]:
        nudge = np.zeros_like(fit.weights)
        nudge[k, d] = step
        for sign in (-1, 1):
            assert objective(x, y, fit.weights + sign * nudge, fit.bias, 1e4) > fit.objective


@by_each_solver
def test_gradient_norm_is_the_one_of_the_plain_formula() -> None:
    x, y, _ = clouds(4)
    fit = fit_logistic(x, y, inverse_penalty=0.1, tolerance=1e-2)
    logits = x @ fit.weights.T + fit.bias
    residual = np.exp(logits - logsumexp(logits, axis=1, keepdims=True)) - np.eye(4)[y]
    of_weights = residual.T @ (x - x.mean(axis=0)) / len(x) + fit.weights / (0.1 * len(x))
    expected = np.sqrt(np.sum(of_weights**2) + np.sum(residual.mean(axis=0) ** 2))
    assert fit.gradient_norm > 1e-5  # stopped early, so that there is a gradient to compare
    assert fit.gradient_norm == pytest.approx(expected, rel=1e-6)


def test_what_one_solver_leaves_the_next_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _ = clouds(5, n=1200)
    monkeypatch.setattr(logistic_fits, "minimize", lambda problem, point, *args, **options: (point, 1, False))
    assert_same_optimum(fit_logistic(x, y), x, y, sklearn_fit(x, y, 1.0))
    monkeypatch.setattr(logistic_fits, "newton_cg", lambda problem, point, *args: (point, 1, False))
    assert_same_optimum(fit_logistic(x, y), x, y, sklearn_fit(x, y, 1.0))
    monkeypatch.setattr(logistic_fits, "_FEW_UNKNOWNS", 10)
    assert not fit_logistic(x, y).converged


def test_few_samples_have_the_same_optimum_on_any_axes() -> None:
    """Strong penalties do without the principal axes, weak ones do not."""
    x, y, _ = clouds(9, n=150)
    x = x * np.linspace(0.1, 10, x.shape[1])
    for inverse_penalty in (1e-4, 1e-3, 1e-2, 0.1, 1.0):
        fit = fit_logistic(x, y, inverse_penalty=inverse_penalty)
        assert_same_optimum(fit, x, y, sklearn_fit(x, y, inverse_penalty))


def test_says_when_it_did_not_converge() -> None:
    x, y, _ = clouds(5)
    fit = fit_logistic(x, y, max_passes=5)
    assert not fit.converged
    assert fit.passes < 10
    assert fit.gradient_norm > 1e-6


def test_an_impossible_tolerance_ends() -> None:
    x, y, _ = clouds(5)
    fit = fit_logistic(x, y, tolerance=1e-30, max_passes=500)
    assert not fit.converged
    assert fit.gradient_norm < 1e-10


@by_each_solver
def test_an_offset_in_float32_changes_nothing() -> None:
    x, y, _ = clouds(6, n=200)
    # Multiples of 1/64 survive an offset of 1e4 in float32 exactly, so any difference is the solver's.
    x = np.round(x * 64) / 64
    plain = fit_logistic(x, y)
    offset = fit_logistic((x + 1e4).astype(np.float32), y)
    assert offset.objective == pytest.approx(plain.objective, rel=1e-10)
    np.testing.assert_array_equal(offset.predict((x + 1e4).astype(np.float32)), plain.predict(x))


@by_each_solver
def test_constant_features_get_no_weight() -> None:
    x, y, _ = clouds(7, n=200)
    with_constants = np.concatenate([np.full((200, 2), 0.1), x], axis=1)
    fit = fit_logistic(with_constants, y)
    np.testing.assert_allclose(fit.weights[:, :2], 0, atol=1e-12)
    assert fit.objective == pytest.approx(fit_logistic(x, y).objective, rel=1e-10)


@by_each_solver
def test_only_constant_features_predict_the_commonest_class() -> None:
    y = np.array([7] * 30 + [9] * 10)
    fit = fit_logistic(np.full((40, 3), 0.1), y)
    assert fit.converged
    assert (fit.predict(np.full((5, 3), 0.1)) == 7).all()
    assert fit.objective == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), rel=1e-9)


@by_each_solver
def test_path_equals_single_fits() -> None:
    x, y, _ = clouds(8)
    for inverse_penalty, fit in zip((1.0, 0.01, 0.1), fit_logistic_path(x, y, (1.0, 0.01, 0.1)), strict=True):
        single = fit_logistic(x, y, inverse_penalty=inverse_penalty)
        assert fit.inverse_penalty == inverse_penalty
        assert fit.objective == pytest.approx(single.objective, rel=1e-9)
        # The weights are only as sure as the gradient allows, and the paths to them differ.
        np.testing.assert_allclose(fit.weights, single.weights, atol=1e-4 * np.abs(single.weights).max())


@by_each_solver
def test_a_path_may_go_on_in_either_direction() -> None:
    """Weaker penalties start from the last ones, a stronger one afresh."""
    x, y, _ = clouds(8)
    path = logistic_path(x, y, weakest=1.0)
    for inverse_penalty in (0.1, 1.0, 100.0, 0.01, 1e-4, 10.0):
        fit, single = path.fit(inverse_penalty), fit_logistic(x, y, inverse_penalty=inverse_penalty)
        assert fit.converged
        assert fit.inverse_penalty == inverse_penalty
        assert fit.objective == pytest.approx(single.objective, rel=1e-9)


def test_map_equals_paths_whatever_the_number_of_workers() -> None:
    _, y, _ = clouds(14)
    layers = [clouds(14, width=width)[0][:, :] for width in (12, 12, 12)]
    layers = [layer * scale for layer, scale in zip(layers, (1.0, 2.0, 3.0), strict=True)]
    maps = [fit_logistic_map(iter(layers), y, (0.01, 1.0), workers=workers) for workers in (1, 2, 5)]
    for paths in maps:
        for layer, path in zip(layers, paths, strict=True):
            for fit, other in zip(path, fit_logistic_path(layer, y, (0.01, 1.0)), strict=True):
                np.testing.assert_allclose(fit.weights, other.weights, rtol=1e-6)
                assert fit.converged


@by_each_solver
@pytest.mark.parametrize("class_weight", ["balanced", {0: 3.0, 2: 0.5}])
def test_class_weights_equal_scikit_learn(class_weight: Any) -> None:
    x, y, _ = clouds(15)
    keep = (y != 1) | (np.arange(len(y)) % 5 == 0)  # one rare class
    x, y = x[keep], y[keep]
    fit = fit_logistic(x, y, inverse_penalty=0.1, class_weight=class_weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = LogisticRegression(
            C=0.1, solver="newton-cg", tol=1e-11, max_iter=5000, class_weight=class_weight
        ).fit(x, y)
    np.testing.assert_allclose(fit.weights, reference.coef_, atol=1e-4 * np.abs(reference.coef_).max())
    np.testing.assert_array_equal(fit.predict(x), reference.predict(x))
    assert not np.array_equal(fit.predict(x), fit_logistic(x, y, inverse_penalty=0.1).predict(x))


@by_each_solver
def test_multilabel_equals_one_scikit_learn_fit_a_label() -> None:
    x, y, _ = clouds(16, distance=0.5)
    labels = np.stack([y == 0, y < 2, x[:, 0] > 0.3], axis=1).astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = OneVsRestClassifier(LogisticRegression(C=0.3, tol=1e-11, max_iter=5000, solver="newton-cg"))
        reference.fit(x, labels)
    for label, (fit,) in enumerate(fit_multilabel_path(x, labels, (0.3,))):
        assert fit.inverse_penalty == 0.3
        assert fit.converged
        expected = reference.estimators_[label].coef_[0]
        np.testing.assert_allclose(
            fit.weights[1] - fit.weights[0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
        )
        np.testing.assert_array_equal(fit.predict(x), reference.predict(x)[:, label])


@given(
    seed=st.integers(0, 2**16),
    offset=st.sampled_from([0.0, 1e4]),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    outliers=st.booleans(),
    constant=st.booleans(),
    duplicates=st.booleans(),
    n=st.sampled_from([5, 40, 120]),
    log_c=st.integers(-4, 3),
)
@example(seed=0, offset=1e4, scale=1.0, outliers=True, constant=True, duplicates=True, n=5, log_c=3)
# Where the classes are certain and a sample is on the wrong side, only Newton's method arrives.
@example(seed=235, offset=0.0, scale=1e-4, outliers=True, constant=False, duplicates=False, n=5, log_c=0)
@example(seed=14927, offset=1e4, scale=1.0, outliers=True, constant=True, duplicates=True, n=5, log_c=3)
@settings(max_examples=25)
def test_the_certificate_holds_on_awkward_features(
    seed: int, offset: float, scale: float, outliers: bool, constant: bool, duplicates: bool, n: int, log_c: int
) -> None:
    x, y, _ = clouds(seed, n=n, width=6)
    y[:2] = 0, 1  # at least two classes
    x = np.round(x * 64) / 64  # survives the offset in float32
    x[:, 2:4] *= 1000.0 if outliers else 1.0
    x[:, 5] = 0.5 if constant else x[:, 5]
    if duplicates:
        x, y = np.concatenate([x, x]), np.concatenate([y, y])
    shifted = (x * scale + offset).astype(np.float32) if scale == 1 else x * scale + offset
    inverse_penalty = 10.0**log_c / scale**2
    fit = fit_logistic(shifted, y, inverse_penalty=inverse_penalty)
    assert fit.converged
    exact = shifted.astype(np.float64) - shifted.astype(np.float64).mean(axis=0)
    logits = exact @ fit.weights.T + fit.bias + fit.weights @ shifted.astype(np.float64).mean(axis=0)
    classes = np.unique(y)
    residual = np.exp(logits - logsumexp(logits, axis=1, keepdims=True)) - (y[:, None] == classes)
    of_weights = residual.T @ exact / len(y) + fit.weights / (inverse_penalty * len(y))
    norm = np.sqrt(np.sum(of_weights**2) + np.sum(residual.mean(axis=0) ** 2))
    # The gradient that the fit reports, and that of the formula within its rounding error (offset times weight).
    size = np.sqrt(1 + np.square(exact).sum(axis=1).mean())
    assert fit.gradient_norm <= 1e-8 * size
    assert norm <= (1e-8 + 1e-15 * (1 + offset * np.abs(fit.weights).max())) * size * 10


@by_each_solver
@pytest.mark.parametrize("inverse_penalty", [1e6, 1e9])
def test_separable_data_and_next_to_no_penalty(inverse_penalty: float) -> None:
    x, y, _ = clouds(3, distance=20.0)
    fit = fit_logistic(x, y, inverse_penalty=inverse_penalty)
    assert fit.passes < 1000
    assert fit.converged
    assert fit.gap <= 1e-9
    assert (fit.predict(x) == y).all()


def test_where_a_solver_ends_it_says_whether_at_the_optimum() -> None:
    x, y, _ = clouds(3, distance=20.0)
    fit = fit_logistic(x, y, inverse_penalty=1e12)
    assert fit.passes < 1000
    assert fit.converged == (fit.gap <= 1e-9)
    assert (fit.predict(x) == y).all()


@by_each_solver
def test_order_of_samples_changes_nothing_that_matters() -> None:
    x, y, _ = clouds(17)
    order = np.random.default_rng(0).permutation(len(y))
    fit, shuffled = fit_logistic(x, y), fit_logistic(x[order], y[order])
    assert shuffled.objective == pytest.approx(fit.objective, rel=1e-9)
    np.testing.assert_array_equal(shuffled.predict(x), fit.predict(x))


def test_refuses_bad_input() -> None:
    x, y, _ = clouds(13, n=30)
    with pytest.raises(ValueError, match=r"30 samples but labels of shape \(29,\)"):
        fit_logistic(x, y[:29])
    with pytest.raises(ValueError, match="all 30 labels are 0; a probe needs two classes"):
        fit_logistic(x, np.zeros(30, int))
    with pytest.raises(ValueError, match=r"inverse penalties C are \(0.0,\); pass finite numbers above 0"):
        fit_logistic(x, y, inverse_penalty=0.0)
    with pytest.raises(ValueError, match="1 values that are nan or inf"):
        fit_logistic(np.where(np.arange(360).reshape(30, 12) == 7, np.nan, x), y)
    with pytest.raises(ValueError, match=r"shape \(30,\) cannot be analyzed"):
        fit_logistic(x[:, 0], y)
    with pytest.raises(ValueError, match=r"class weights are \[0.0, 1.0, 1.0, 1.0\]"):
        fit_logistic(x, y, class_weight={0: 0.0})
    with pytest.raises(ValueError, match=r"pass 0 or 1 per sample and label"):
        fit_multilabel_path(x, y[:, None], (1.0,))
    with pytest.raises(ValueError, match="label 1 is on all samples; leave it out"):
        fit_multilabel_path(x, np.stack([np.arange(30) % 2, np.ones(30)], axis=1), (1.0,))
