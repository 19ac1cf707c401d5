"""Linear probes: multinomial logistic regression of labels on features, at its true optimum.

Default solvers stop early on the ill-conditioned features of networks, and a curve over layers then shows
conditioning instead of content. The fits are those of `layerprobe.analyses.measures.logistic.fits`, and every probe
states whether its fit converged. Computation runs on the device of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.analyses.measures.classification import ClassificationScores, classification_scores
from layerprobe.analyses.measures.logistic.fits import ClassWeight, LogisticFit, check_pair
from layerprobe.analyses.measures.logistic.search import SearchEnd, choose_fit
from layerprobe.analyses.measures.tensors import FeatureMatrix


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Result of a linear probe on one representation.

    Attributes:
        validation_accuracy: Fraction correct on the split that chose the penalty (and chooses layers).
        test_accuracy: Fraction correct on the split on which nothing was chosen.
        validation_correct: Whether each validation sample was predicted correctly, shape (n_validation,), bool.
        test_correct: Whether each test sample was predicted correctly, shape (n_test,), bool.
        validation: Per-class and balanced accuracy, top-5 and calibration on the validation split.
        test: The same on the test split.
        inverse_penalty: The C that was best on the validation split, by the search of `choose_fit`.
        search_end: Which end of the search the C lies at, so that one beyond may be better; "" if at none.
        gradient_norm: Gradient norm of the chosen fit.
        converged: Whether the chosen fit converged.
    """

    validation_accuracy: float
    test_accuracy: float
    validation_correct: NDArray[np.bool_]
    test_correct: NDArray[np.bool_]
    validation: ClassificationScores
    test: ClassificationScores
    inverse_penalty: float
    search_end: SearchEnd
    gradient_norm: float
    converged: bool


def linear_probe(
    train_x: FeatureMatrix,
    train_y: NDArray[Any],
    validation_x: FeatureMatrix,
    validation_y: NDArray[Any],
    test_x: FeatureMatrix,
    test_y: NDArray[Any],
    *,
    inverse_penalties: Sequence[float] | None = None,
    standardize: bool = True,
    class_weight: ClassWeight = None,
) -> ProbeResult:
    """Measures how well a linear classifier predicts the labels from features.

    One classifier per penalty is fitted on the training split, and the best on the validation split is chosen. The
    test split is only scored.

    Args:
        train_x: Training features, shape (n_train, D), any float dtype; computed in float64.
        train_y: Training labels, shape (n_train,).
        validation_x: Validation features, shape (n_validation, D).
        validation_y: Validation labels, shape (n_validation,). A label that is missing from the training split counts
            as an error.
        test_x: Test features, shape (n_test, D).
        test_y: Test labels, shape (n_test,).
        inverse_penalties: Values of C to choose from, and no others; None for the search of `choose_fit`.
        standardize: Whether to divide each feature by its standard deviation on the training split (constant features
            are left as they are). Without it the same C is a strong penalty for a layer with small activations and a
            weak one for a layer with large activations.
        class_weight: Weight of the samples of each class, as in `fit_logistic`.

    Raises:
        ValueError: If a split's features and labels disagree, the splits differ in D, features are not finite, the
            training split has one class, or a penalty is not positive.
    """
    splits = {"train": (train_x, train_y), "validation": (validation_x, validation_y), "test": (test_x, test_y)}
    features = {split: check_pair(x, y, split).double() for split, (x, y) in splits.items()}
    for split, x in features.items():
        if x.shape[1] != train_x.shape[1]:
            widths = f"{x.shape[1]} features, the train split {train_x.shape[1]}"
            raise ValueError(f"the {split} split has {widths}; pass the same layer")
    if standardize:
        mean, scale = _standard_scale(features["train"])
        features = {split: (x - mean) / scale for split, x in features.items()}

    def validation_accuracy(fit: LogisticFit) -> float:
        return float((fit.predict(features["validation"]) == validation_y).mean())

    chosen = choose_fit(
        features["train"],
        train_y,
        validation_accuracy,
        inverse_penalties=inverse_penalties,
        class_weight=class_weight,
    )
    fit = chosen.fit
    validation_correct = fit.predict(features["validation"]) == validation_y
    test_correct = fit.predict(features["test"]) == test_y
    return ProbeResult(
        validation_accuracy=float(validation_correct.mean()),
        test_accuracy=float(test_correct.mean()),
        validation_correct=validation_correct,
        test_correct=test_correct,
        validation=classification_scores(fit.log_probabilities(features["validation"]), fit.classes, validation_y),
        test=classification_scores(fit.log_probabilities(features["test"]), fit.classes, test_y),
        inverse_penalty=fit.inverse_penalty,
        search_end=chosen.end,
        gradient_norm=fit.gradient_norm,
        converged=fit.converged,
    )


def _standard_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the mean and the standard deviation of every feature, each of shape (D,), as scikit-learn does.

    A feature without variance beyond rounding gets 1, so that dividing by it leaves the feature as it is.

    Args:
        x: Features, shape (n, D), float64.
    """
    n, mean = len(x), x.mean(0)
    deviation = x - mean
    variance = (deviation.square().sum(0) - deviation.sum(0).square() / n) / n
    rounding = torch.finfo(x.dtype).eps * n
    is_constant = variance <= rounding * variance + (rounding * mean).square()
    return mean, torch.where(is_constant, 1, variance.sqrt())


def control_probe(
    train_x: FeatureMatrix,
    train_y: NDArray[Any],
    validation_x: FeatureMatrix,
    validation_y: NDArray[Any],
    test_x: FeatureMatrix,
    test_y: NDArray[Any],
    *,
    seed: int,
    **options: Any,
) -> ProbeResult:
    """Runs the random-label control: `linear_probe` after all labels were permuted over all samples.

    Selectivity is the accuracy of the probe minus the accuracy of its control: what the features encode, less what a
    probe of this capacity finds in any features.

    Args:
        train_x: Training features, shape (n_train, D).
        train_y: Training labels, shape (n_train,).
        validation_x: Validation features, shape (n_validation, D).
        validation_y: Validation labels, shape (n_validation,).
        test_x: Test features, shape (n_test, D).
        test_y: Test labels, shape (n_test,).
        seed: Seed of the permutation.
        **options: Options of `linear_probe`.

    Raises:
        ValueError: As in `linear_probe`.

    Source: after Hewitt and Liang 2019 (arXiv:1909.03368), whose control gives each word type a random label.
    """
    labels = (train_y, validation_y, test_y)
    permuted = np.random.default_rng(seed).permutation(np.concatenate(labels))
    train, validation, test = np.split(permuted, np.cumsum([len(y) for y in labels])[:-1])
    return linear_probe(train_x, train, validation_x, validation, test_x, test, **options)
