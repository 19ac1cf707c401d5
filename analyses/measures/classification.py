"""What a classifier's probabilities are worth: accuracies per class, top-5, likelihood and calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprobe.analyses.measures.arrays import Floats

CALIBRATION_BINS = 15


@dataclass(frozen=True, eq=False)
class ClassificationScores:
    """How good probabilities are on one split.

    Attributes:
        accuracy: Fraction correct.
        balanced_accuracy: Mean of the class accuracies, over the classes that occur.
        class_accuracy: Of each class, shape (K,); nan where the split has no sample of it.
        top5_accuracy: Fraction whose label is among the five likeliest; 1 where there are no more than five classes
            and the classifier knows them all.
        negative_log_likelihood: Mean, in nats; inf if a label is unknown to the classifier.
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
    """Scores of log probabilities against labels.

    Args:
        log_probabilities: In nats, shape (n, K).
        classes: The K labels in ascending order.
        y: Labels, shape (n,). One that is not in `classes` counts as an error everywhere, and its class, for the
            balanced accuracy, as one of accuracy 0.

    Raises:
        ValueError: If the shapes disagree, or there are no samples.

    Source: ECE of Naeini et al. 2015, with the 15 equal bins of Guo et al. 2017 (arXiv:1706.04599).
    """
    if log_probabilities.shape != (len(y), len(classes)) or not len(y):
        shape = log_probabilities.shape
        raise ValueError(f"{len(y)} labels, {len(classes)} classes, probabilities of shape {shape}; pass (n, K), n > 0")
    known = np.isin(y, classes)
    targets = np.where(known, np.searchsorted(classes, np.where(known, y, classes[0])), -1)
    predicted = log_probabilities.argmax(axis=1)
    correct = predicted == targets
    of_class = [correct[targets == k] for k in range(len(classes))]
    class_accuracy = np.array([c.mean() if len(c) else np.nan for c in of_class])
    unknown = len(np.unique(y[~known]))
    of_target = np.where(known, log_probabilities[np.arange(len(y)), targets], -np.inf)
    # Ranked by how many are likelier, ties towards the lower class as argmax does.
    order = np.argsort(-log_probabilities, axis=1, kind="stable")[:, :5]
    return ClassificationScores(
        accuracy=float(correct.mean()),
        balanced_accuracy=float(np.nansum(class_accuracy) / (np.isfinite(class_accuracy).sum() + unknown)),
        class_accuracy=class_accuracy,
        top5_accuracy=float((order == targets[:, None]).any(axis=1).mean()),
        negative_log_likelihood=float(-of_target.mean()),
        calibration_error=_calibration_error(np.exp(log_probabilities.max(axis=1)), correct),
    )


def _calibration_error(confidence: Floats, correct: NDArray[np.bool_]) -> float:
    # Bins are (low, high], so that a probability of 1 has one.
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.intp) - 1, 0, CALIBRATION_BINS - 1)
    excess = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(excess).sum() / len(correct))
