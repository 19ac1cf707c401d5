"""Scores of probabilities against scikit-learn and against hand calculations."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, log_loss, recall_score, top_k_accuracy_score

from layerprobe.analyses.measures.classification import classification_scores


def test_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(8, 0.3), 400) * 0.98 + 0.0025
    classes, y = np.arange(8) * 10, rng.integers(0, 8, 400) * 10
    scores = classification_scores(np.log(probabilities), classes, y)
    predicted = classes[probabilities.argmax(axis=1)]
    assert scores.accuracy == (predicted == y).mean()
    assert scores.balanced_accuracy == pytest.approx(balanced_accuracy_score(y, predicted))
    np.testing.assert_allclose(scores.class_accuracy, recall_score(y, predicted, average=None))
    assert scores.top5_accuracy == pytest.approx(top_k_accuracy_score(y, probabilities, k=5, labels=classes))
    assert scores.negative_log_likelihood == pytest.approx(log_loss(y, probabilities, labels=classes))


def test_calibration_error_by_hand() -> None:
    # Two bins: two samples at 0.9, one of them right; two at 1, both right.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [1.0, 0.0], [0.0, 1.0]])
    y = np.array([0, 1, 0, 1])
    with np.errstate(divide="ignore"):
        scores = classification_scores(np.log(probabilities), np.array([0, 1]), y)
    assert scores.calibration_error == pytest.approx(0.5 * abs(0.5 - 0.9))


def test_labels_drawn_from_the_probabilities_are_calibrated_and_overconfidence_is_not() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(20_000, 4))
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    y = (rng.random((20_000, 1)) > np.exp(log_p).cumsum(axis=1)).sum(axis=1)
    sharp = 3 * logits - np.log(np.exp(3 * logits).sum(axis=1, keepdims=True))
    # 15 bins of about 1300 samples each scatter by about 0.01.
    assert classification_scores(log_p, np.arange(4), y).calibration_error < 0.02
    assert classification_scores(sharp, np.arange(4), y).calibration_error > 0.2


def test_a_class_missing_on_either_side() -> None:
    log_p = np.log(np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]))
    scores = classification_scores(log_p, np.array([0, 1, 2]), np.array([0, 7, 1]))
    np.testing.assert_array_equal(scores.class_accuracy, [1, 1, np.nan])
    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.balanced_accuracy == pytest.approx(2 / 3)  # classes 0, 1 and the unknown 7
    assert scores.top5_accuracy == pytest.approx(2 / 3)
    assert scores.negative_log_likelihood == np.inf


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"3 labels, 2 classes, probabilities of shape \(2, 2\)"):
        classification_scores(np.zeros((2, 2)), np.arange(2), np.zeros(3))
