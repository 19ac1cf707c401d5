"""Linear probes against the same steps in scikit-learn, with planted and shuffled labels."""

from __future__ import annotations

import numpy as np
import pytest
from gaussian_classes import clouds, digits, sklearn_fit

from layerprobe.analyses.measures.linear_probes import control_probe, linear_probe


def test_probe_without_standardizing_equals_scikit_learn_on_raw_features() -> None:
    x, y, _ = clouds(18)
    result = linear_probe(
        x[:200], y[:200], x[200:250], y[200:250], x[250:], y[250:], inverse_penalties=(0.05,), standardize=False
    )
    reference = sklearn_fit(x[:200], y[:200], 0.05)
    np.testing.assert_array_equal(result.test_correct, reference.predict(x[250:]) == y[250:])
    assert result.test.accuracy == result.test_accuracy


def test_selectivity_tells_content_from_capacity() -> None:
    x, y, _ = clouds(19, n=900, distance=3.0)
    splits = (x[:300], y[:300], x[300:600], y[300:600], x[600:], y[600:])
    probe = linear_probe(*splits)
    controls = [control_probe(*splits, seed=seed) for seed in (0, 0, 1)]
    assert controls[0].test_accuracy == controls[1].test_accuracy
    assert not np.array_equal(controls[0].test_correct, controls[2].test_correct)
    for control in controls:
        assert probe.test_accuracy - control.test_accuracy > 0.5
        assert abs(control.test_accuracy - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 300)


def test_probe_finds_planted_labels_and_no_shuffled_ones() -> None:
    x, y, _ = clouds(9, n=600, distance=3.0)
    splits = [x[:300], y[:300], x[300:450], y[300:450], x[450:], y[450:]]
    result = linear_probe(*splits)
    assert result.test_accuracy > 0.9
    assert result.converged
    shuffled = np.random.default_rng(0).permutation(y)
    chance = linear_probe(x[:300], shuffled[:300], x[300:450], shuffled[300:450], x[450:], shuffled[450:])
    # Four classes, 150 samples: three standard errors about one quarter.
    assert abs(chance.test_accuracy - 0.25) < 3 * np.sqrt(0.25 * 0.75 / 150)


def test_probe_equals_the_same_steps_in_scikit_learn() -> None:
    x, y = digits()
    x, y = x[:900], y[:900]
    result = linear_probe(x[:500], y[:500], x[500:700], y[500:700], x[700:], y[700:], inverse_penalties=(0.1, 1e-3))
    spread = x[:500].std(axis=0)
    scaled = (x - x[:500].mean(axis=0)) / np.where(spread == 0, 1, spread)
    references = {c: sklearn_fit(scaled[:500], y[:500], c) for c in (1e-3, 0.1)}
    best = max(references, key=lambda c: references[c].score(scaled[500:700], y[500:700]))
    assert result.inverse_penalty == best
    np.testing.assert_array_equal(result.validation_correct, references[best].predict(scaled[500:700]) == y[500:700])
    np.testing.assert_array_equal(result.test_correct, references[best].predict(scaled[700:]) == y[700:])
    assert result.validation_accuracy == result.validation_correct.mean()
    assert result.test_accuracy == result.test_correct.mean()


def test_probe_does_not_depend_on_the_scale_of_each_feature() -> None:
    x, y, _ = clouds(10, n=300)
    factors = 10.0 ** np.arange(-6, 6)
    plain = linear_probe(x[:200], y[:200], x[200:250], y[200:250], x[250:], y[250:])
    scaled = x * factors
    other = linear_probe(scaled[:200], y[:200], scaled[200:250], y[200:250], scaled[250:], y[250:])
    np.testing.assert_array_equal(plain.test_correct, other.test_correct)
    assert plain.inverse_penalty == other.inverse_penalty


def test_of_equally_good_penalties_the_strongest_is_taken() -> None:
    x, y, _ = clouds(11, n=120, distance=50.0)
    result = linear_probe(x[:60], y[:60], x[60:90], y[60:90], x[90:], y[90:], inverse_penalties=(10.0, 1.0))
    assert result.validation_accuracy == 1.0
    assert result.inverse_penalty == 1.0


def test_a_class_that_is_missing_from_the_training_split_is_an_error() -> None:
    x, y, _ = clouds(12, n=100, distance=50.0)
    unseen = np.full(20, 99)
    result = linear_probe(x[:60], y[:60], x[60:80], unseen, x[80:], y[80:])
    assert result.validation_accuracy == 0.0


def test_refuses_bad_input() -> None:
    x, y, _ = clouds(13, n=30)
    with pytest.raises(ValueError, match=r"the validation split has 30 samples but labels of shape \(29,\)"):
        linear_probe(x, y, x, y[:29], x, y)
    with pytest.raises(ValueError, match="the test split has 11 features, the train split 12"):
        linear_probe(x, y, x, y, x[:, :11], y)
