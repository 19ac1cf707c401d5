"""Scores of a classifier's probabilities: accuracy in all and by class, top-5, likelihood and calibration.

Accuracies by class are scikit-learn's. Its `top_k_accuracy_score` and `log_loss` refuse labels that the classifier
does not know, which count as errors here, and it has no expected calibration error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import recall_score

from layerprobe.analyses.measures.arrays import Floats

CALIBRATION_BINS = 15


@dataclass(frozen=True, eq=False)
class ClassificationScores:
    """Scores of probabilities on one split.

    Attributes:
        accuracy: Fraction of correct predictions.
        balanced_accuracy: Mean of the class accuracies, over the classes that occur in the split.
        class_accuracy: Accuracy on each class, shape (K,); nan if the split has no sample of the class.
        top5_accuracy: Fraction of samples whose label is among the five likeliest; 1 if there are at most five classes
            and the classifier knows all labels.
        negative_log_likelihood: Mean negative log likelihood in nats; inf if the classifier does not know a label.
        calibration_error: Expected calibration error: over `CALIBRATION_BINS` equal bins of the probability of the
            predicted label, the mean of |accuracy - mean probability| weighted by samples. In [0, 1].
    """

    accuracy: float
    balanced_accuracy: float
    class_accuracy: Floats
    top5_accuracy: float
    negative_log_likelihood: float
    calibration_error: float


def classification_scores(log_probabilities: Floats, classes: NDArray[Any], y: NDArray[Any]) -> ClassificationScores:
    """Computes the scores of log probabilities against labels.

    Args:
        log_probabilities: Log probabilities in nats, shape (n, K).
        classes: The K labels in ascending order.
        y: Labels, shape (n,). A label that is missing from `classes` counts as an error in every score; the balanced
            accuracy counts its class with accuracy 0.

    Raises:
        ValueError: If the shapes disagree, or there are no samples.

    Source: ECE of Naeini et al. 2015, with the 15 equal bins of Guo et al. 2017 (arXiv:1706.04599).
    """
    num_classes = len(classes)
    if log_probabilities.shape != (len(y), num_classes) or not len(y):
        shape = log_probabilities.shape
        raise ValueError(f"{len(y)} labels, {num_classes} classes, probabilities of shape {shape}; pass (n, K), n > 0")
    is_known = np.isin(y, classes)
    targets = np.empty(len(y), np.intp)
    targets[is_known] = np.searchsorted(classes, y[is_known])
    unknown_labels, unknown_codes = np.unique(y[~is_known], return_inverse=True)
    targets[~is_known] = num_classes + unknown_codes
    predicted = log_probabilities.argmax(axis=1)
    correct = predicted == targets
    codes = np.arange(num_classes + len(unknown_labels))
    class_accuracy = recall_score(targets, predicted, labels=codes, average=None, zero_division=np.nan)
    log_likelihood = np.full(len(y), -np.inf)
    log_likelihood[is_known] = log_probabilities[is_known, targets[is_known]]
    # Of equal probabilities the lower class comes first, as in argmax.
    of_label = log_likelihood[:, None]
    is_before = (log_probabilities > of_label) | (
        (log_probabilities == of_label) & (np.arange(num_classes) < targets[:, None])
    )
    return ClassificationScores(
        accuracy=float(correct.mean()),
        balanced_accuracy=float(np.nanmean(class_accuracy)),
        class_accuracy=class_accuracy[:num_classes],
        top5_accuracy=float((is_known & (is_before.sum(axis=1) < 5)).mean()),
        negative_log_likelihood=float(-log_likelihood.mean()),
        calibration_error=_calibration_error(np.exp(log_probabilities.max(axis=1)), correct),
    )


def _calibration_error(confidence: Floats, correct: NDArray[np.bool_]) -> float:
    # Bins are (low, high], so that a probability of 1 falls into the last one.
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.intp) - 1, 0, CALIBRATION_BINS - 1)
    excess = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(excess).sum() / len(correct))
