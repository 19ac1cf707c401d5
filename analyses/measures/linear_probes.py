"""Linear probes: multinomial logistic regression at its true optimum.

The objective is scikit-learn's, per sample: `mean cross-entropy + ||W||^2 / (2 C n)`, with the bias unpenalized.
Default solvers stop early on the ill-conditioned features of networks, and a curve over layers then shows
conditioning instead of content. So every fit comes with its gradient norm, and says so when it did not converge.

The solver is limited-memory BFGS, or Newton's method by conjugate gradients for up to a thousand samples and where
the first gets stuck. A damped Newton's method in float64 has the last word on problems of few unknowns.
Penalties are solved from the strongest to the weakest, each from where the last ones point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.analyses.measures.arrays import Features, Floats, centered, checked
from layerprobe.analyses.measures.classification import ClassificationScores, classification_scores
from layerprobe.analyses.measures.logistic.bfgs import Curvature, minimize
from layerprobe.analyses.measures.logistic.newton import damped_newton, newton_cg
from layerprobe.analyses.measures.logistic.problem import (
    Decomposition,
    Point,
    Problem,
    advanced,
    decomposed,
    exact_point,
    gap,
    original_norm,
    tried,
    undecomposed,
)
from layerprobe.analyses.measures.parallel import in_parallel, torch_threads

INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)

ClassWeight = Literal["balanced"] | Mapping[Any, float] | None
Solver = Callable[[Problem, Point, float, int], tuple[Point, int, bool]]

_FEW_SAMPLES = 1000  # up to which Newton's method by conjugate gradients is the fastest
_FEW_UNKNOWNS = 300  # for which the Hessian may be factorized, where samples lie awkwardly
_SMALL = 1_000_000  # entries of features; below it several threads only get in each other's way


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """A multinomial logistic regression: `logits = x @ weights.T + bias`.

    Attributes:
        weights: Shape (K, D), for the features as they were passed.
        bias: Shape (K,).
        classes: The K labels in ascending order, shape (K,).
        inverse_penalty: C; smaller is stronger.
        objective: Mean cross-entropy plus penalty, in nats.
        gradient_norm: Of the objective in (weights, bias) of the centered features, without preconditioning, in
            float64: the certificate.
        gap: At most this fraction of the objective lies above the minimum, by the curvature that the penalty gives the
            weights: the squared gradient norm times `C n / (2 objective)`, with the features in units of their root
            mean square, so that the bias weighs as much as a feature.
        passes: Products with the features and their transpose that it took.
        converged: Whether gradient norm and gap met the tolerance.
    """

    weights: Floats
    bias: Floats
    classes: NDArray[Any]
    inverse_penalty: float
    objective: float
    gradient_norm: float
    gap: float
    passes: int
    converged: bool

    def logits(self, x: Features) -> Floats:
        """One number per sample and class, shape (n, K)."""
        logits: Floats = x.astype(np.float64) @ self.weights.T + self.bias
        return logits

    def predict(self, x: Features) -> NDArray[Any]:
        """The most likely label of each sample, shape (n,)."""
        classes: NDArray[Any] = self.classes[self.logits(x).argmax(axis=1)]
        return classes

    def log_probabilities(self, x: Features) -> Floats:
        """Of each class, in nats, shape (n, K)."""
        logits = self.logits(x)
        logits -= logits.max(axis=1, keepdims=True)
        normalized: Floats = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return normalized


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a linear probe finds in one representation.

    Attributes:
        validation_accuracy: Fraction correct on the split that chose the penalty (and chooses layers).
        test_accuracy: Fraction correct on the split that nothing was chosen on.
        validation_correct: Per sample, shape (n_validation,), bool.
        test_correct: Per sample, shape (n_test,), bool.
        validation: Per-class and balanced accuracy, top-5 and calibration on the validation split.
        test: The same on the test split.
        inverse_penalty: The C that was best on the validation split; of equals the smallest, which is the strongest
            penalty.
        gradient_norm: Of the chosen fit.
        converged: Whether the chosen fit converged.
    """

    validation_accuracy: float
    test_accuracy: float
    validation_correct: NDArray[np.bool_]
    test_correct: NDArray[np.bool_]
    validation: ClassificationScores
    test: ClassificationScores
    inverse_penalty: float
    gradient_norm: float
    converged: bool


def linear_probe(
    train_x: Features,
    train_y: NDArray[Any],
    validation_x: Features,
    validation_y: NDArray[Any],
    test_x: Features,
    test_y: NDArray[Any],
    *,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
    standardize: bool = True,
    class_weight: ClassWeight = None,
    device: str = "cpu",
) -> ProbeResult:
    """How well a linear classifier reads the labels from features.

    One classifier per penalty is fitted on the training split, the best on the validation split is kept, and the test split
    is only scored.

    Args:
        train_x: Features, shape (n_train, D), any float dtype; computed in float64.
        train_y: Labels, shape (n_train,).
        validation_x: Shape (n_validation, D).
        validation_y: Shape (n_validation,). A label that the training split has not counts as an error.
        test_x: Shape (n_test, D).
        test_y: Shape (n_test,).
        inverse_penalties: Values of C to choose from.
        standardize: Divide each feature by its standard deviation on the training split (constant ones are left alone).
            Without it the same C is a strong penalty for a layer with small activations and a weak one for a layer
            with large activations.
        class_weight: As in `fit_logistic`.
        device: Where the fits are computed.

    Raises:
        ValueError: If a split's features and labels disagree, the splits differ in D, features are not finite, the
            training split has one class, or a penalty is not positive.
    """
    splits = {"train": (train_x, train_y), "validation": (validation_x, validation_y), "test": (test_x, test_y)}
    for split, (x, y) in splits.items():
        _check_pair(x, y, split)
        if x.shape[1] != train_x.shape[1]:
            widths = f"{x.shape[1]} features, the training split {train_x.shape[1]}"
            raise ValueError(f"the {split} split has {widths}; pass the same layer")
    mean, scale = _standardization(train_x) if standardize else (np.zeros(train_x.shape[1]), np.ones(train_x.shape[1]))
    scaled = {split: (x - mean) / scale for split, (x, _) in splits.items()}
    fits = fit_logistic_path(
        scaled["train"], train_y, sorted(inverse_penalties), class_weight=class_weight, device=device
    )
    correct = [fit.predict(scaled["validation"]) == validation_y for fit in fits]
    best = int(np.argmax([c.mean() for c in correct]))
    chosen = fits[best]
    test_correct = chosen.predict(scaled["test"]) == test_y
    return ProbeResult(
        validation_accuracy=float(correct[best].mean()),
        test_accuracy=float(test_correct.mean()),
        validation_correct=correct[best],
        test_correct=test_correct,
        validation=classification_scores(chosen.log_probabilities(scaled["validation"]), chosen.classes, validation_y),
        test=classification_scores(chosen.log_probabilities(scaled["test"]), chosen.classes, test_y),
        inverse_penalty=chosen.inverse_penalty,
        gradient_norm=chosen.gradient_norm,
        converged=chosen.converged,
    )


def fit_logistic(
    x: Features,
    y: NDArray[Any],
    *,
    inverse_penalty: float = 1.0,
    class_weight: ClassWeight = None,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
    device: str = "cpu",
) -> LogisticFit:
    """Multinomial logistic regression with an L2 penalty, at its optimum.

    Equals `sklearn.linear_model.LogisticRegression(C=inverse_penalty)` run to convergence, for three classes or more.
    Two classes use the same softmax with two weight vectors; scikit-learn's single vector is their difference, and
    its C is twice ours.

    Args:
        x: Features, shape (n, D), any float dtype; computed in float64.
        y: Labels, shape (n,), of two classes or more.
        inverse_penalty: C > 0.
        class_weight: What each sample of a class counts: "balanced" for `n / (K n_k)`, or a number per label (1 where
            none is given). The mean in the objective and n in the penalty become weighted, as in scikit-learn.
        tolerance: The fit has converged when the gradient norm is below `tolerance` times the root mean square norm
            of the centered samples (1 appended for the bias) *and* `gap <= tolerance / 10`. The second matters for
            separable data under a weak penalty.
        max_passes: Where to give up; the fit then says that it did not converge.
        device: Where it is computed; a GPU needs float64.

    Raises:
        ValueError: If x and y disagree, x is not finite, y has one class, a class weight is not positive, or the
            penalty is not positive.

    Source: limited-memory BFGS, Nocedal and Wright 2006, ch. 7.
    """
    return fit_logistic_path(
        x,
        y,
        (inverse_penalty,),
        class_weight=class_weight,
        tolerance=tolerance,
        max_passes=max_passes,
        device=device,
    )[0]


def fit_logistic_path(
    x: Features,
    y: NDArray[Any],
    inverse_penalties: Sequence[float],
    *,
    class_weight: ClassWeight = None,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
    device: str = "cpu",
) -> tuple[LogisticFit, ...]:
    """`fit_logistic` for several penalties, in the order given, each started from where the stronger ones point."""
    _check_pair(x, y, "train")
    _check_penalties(inverse_penalties)
    classes, targets = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all {len(y)} labels are {classes[0]}; a probe needs two classes or more")
    weights = _class_weights(class_weight, classes, targets)[targets]
    with torch.inference_mode(), torch_threads(1 if x.size < _SMALL else torch.get_num_threads()):
        data = _data(torch.as_tensor(x, device=device), max(inverse_penalties) * float(weights.sum()))
        return _path(data, targets, classes, weights, inverse_penalties, tolerance, max_passes)


def fit_logistic_map(
    representations: Iterable[Features],
    y: NDArray[Any],
    inverse_penalties: Sequence[float],
    *,
    class_weight: ClassWeight = None,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
    device: str = "cpu",
    workers: int | None = None,
) -> list[tuple[LogisticFit, ...]]:
    """`fit_logistic_path` for every representation of the same samples, one per core at a time.

    The results are those of one at a time, whatever the number of workers.

    Args:
        representations: Features, each of shape (n, D) with its own D; taken as they are needed.
        y: Labels, shape (n,).
        inverse_penalties: Values of C.
        class_weight: As in `fit_logistic`, like the next three.
        tolerance: As there.
        max_passes: As there.
        device: As there.
        workers: Representations at a time; None for one per thread that torch may use.

    Returns:
        Per representation its fits, in the order of `inverse_penalties`.
    """

    def path(x: Features) -> tuple[LogisticFit, ...]:
        return fit_logistic_path(
            x,
            y,
            inverse_penalties,
            class_weight=class_weight,
            tolerance=tolerance,
            max_passes=max_passes,
            device=device,
        )

    return in_parallel(path, representations, workers=workers)


def fit_multilabel_path(
    x: Features,
    y: NDArray[Any],
    inverse_penalties: Sequence[float],
    *,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
    device: str = "cpu",
) -> tuple[tuple[LogisticFit, ...], ...]:
    """A yes-or-no logistic regression per label, which share the decomposition of the features.

    Equals scikit-learn's `OneVsRestClassifier(LogisticRegression(C))`: C is the one of its single weight vector, which
    is the difference of our two.

    Args:
        x: Features, shape (n, D).
        y: Shape (n, L), 1 or True where a sample has the label. Each label needs both.
        inverse_penalties: Values of C.
        tolerance: As in `fit_logistic`, like the next two.
        max_passes: As there.
        device: As there.

    Returns:
        Per label its fits, in the order of `inverse_penalties`; their classes are 0 and 1.

    Raises:
        ValueError: If x and y disagree, y holds anything but 0 and 1, or a label is on all samples or on none.
    """
    _check_penalties(inverse_penalties)
    checked(x, "features of the training split")
    y = np.asarray(y)
    if y.ndim != 2 or len(y) != len(x) or not np.isin(y, (0, 1)).all():
        raise ValueError(f"{len(x)} samples but labels of shape {y.shape}; pass 0 or 1 per sample and label, (n, L)")
    for label, share in enumerate(y.mean(axis=0)):
        if share in (0, 1):
            raise ValueError(f"label {label} is on {'all' if share else 'no'} samples; leave it out")
    classes, ones = np.array([0, 1]), np.ones(len(y))
    with torch.inference_mode(), torch_threads(1 if x.size < _SMALL else torch.get_num_threads()):
        halves = [c / 2 for c in inverse_penalties]
        data = _data(torch.as_tensor(x, device=device), max(halves) * len(x))
        fits = [_path(data, column.astype(np.intp), classes, ones, halves, tolerance, max_passes) for column in y.T]
    return tuple(
        tuple(replace(fit, inverse_penalty=float(c)) for fit, c in zip(path, inverse_penalties, strict=True))
        for path in fits
    )


def control_probe(
    train_x: Features,
    train_y: NDArray[Any],
    validation_x: Features,
    validation_y: NDArray[Any],
    test_x: Features,
    test_y: NDArray[Any],
    *,
    seed: int,
    **options: Any,
) -> ProbeResult:
    """The random-label control: `linear_probe`, its options too, after all labels were permuted over all samples.

    Selectivity is the accuracy of the probe minus the accuracy of its control: what the features say, less what a
    probe of that size finds in anything.

    Source: after Hewitt and Liang 2019 (arXiv:1909.03368), whose control gives each word type a random label.
    """
    labels = (train_y, validation_y, test_y)
    permuted = np.random.default_rng(seed).permutation(np.concatenate(labels))
    train, validation, test = np.split(permuted, np.cumsum([len(y) for y in labels])[:-1])
    return linear_probe(train_x, train, validation_x, validation, test_x, test, **options)


def _check_pair(x: Features, y: NDArray[Any], split: str) -> None:
    checked(x, f"features of the {split} split")
    if y.shape != x.shape[:1]:
        seen = f"{len(x)} samples but labels of shape {y.shape}"
        raise ValueError(f"the {split} split has {seen}; pass one label per sample")


def _check_penalties(inverse_penalties: Sequence[float]) -> None:
    if not len(inverse_penalties) or min(inverse_penalties) <= 0 or not np.isfinite(inverse_penalties).all():
        raise ValueError(f"the inverse penalties C are {tuple(inverse_penalties)}; pass finite numbers above 0")


def _class_weights(class_weight: ClassWeight, classes: NDArray[Any], targets: NDArray[np.intp]) -> Floats:
    """What a sample of each class counts, shape (K,)."""
    if class_weight is None:
        return np.ones(len(classes))
    if class_weight == "balanced":
        return len(targets) / (len(classes) * np.bincount(targets).astype(np.float64))
    weights = np.array([float(class_weight.get(label, 1.0)) for label in classes.tolist()])
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise ValueError(f"the class weights are {weights.tolist()}; pass finite numbers above 0")
    return weights


def _standardization(x: Features) -> tuple[Floats, Floats]:
    mean = x.mean(axis=0, dtype=np.float64)
    scale = np.sqrt(np.square(centered(x)).mean(axis=0))
    # Not `scale == 0`: the standard deviation of equal numbers is rounding error, and dividing by it would make
    # features of it.
    scale[(x == x[:1]).all(axis=0)] = 1.0
    return mean, scale


def _data(x: Tensor, inverse_penalty: float) -> Decomposition:
    """The features for penalties down to this one, per sample; few samples are solved on the CPU."""
    if len(x) > _FEW_SAMPLES:
        return decomposed(x)
    x = x.cpu()
    if x.shape[1] <= _FEW_SAMPLES:
        data = undecomposed(x)
        if inverse_penalty * data.unit**2 < 10:  # Under a strong penalty the principal axes take longer than they save.
            return data
    return decomposed(x)


def _path(
    data: Decomposition,
    targets: NDArray[np.intp],
    classes: NDArray[Any],
    weights: Floats,
    inverse_penalties: Sequence[float],
    tolerance: float,
    max_passes: int,
) -> tuple[LogisticFit, ...]:
    device, total = data.exact.device, float(weights.sum())
    indices, share = torch.as_tensor(targets, device=device), torch.as_tensor(weights / total, device=device)
    curvature: Curvature | None = None
    known: list[tuple[float, Point]] = []
    fits = {}
    for c in sorted(set(inverse_penalties)):
        problem = Problem(data, indices, len(classes), share, 1 / (c * total * data.unit**2))
        curvature = curvature or Curvature(problem)
        start = _start(problem, known, math.log(c))
        point, passes, converged = _solved(problem, start, curvature, tolerance, max_passes)
        known = [*known[-2:], (math.log(c), point)]
        train_weights = point.theta[:, :-1] @ data.axes.T
        fits[c] = LogisticFit(
            weights=train_weights.cpu().numpy(),
            bias=(point.theta[:, -1] - train_weights @ data.mean).cpu().numpy(),
            classes=classes,
            inverse_penalty=float(c),
            objective=point.objective,
            gradient_norm=original_norm(problem, point),
            gap=gap(problem, point),
            passes=passes,
            converged=converged,
        )
    return tuple(fits[c] for c in inverse_penalties)


def _solved(
    problem: Problem, point: Point, curvature: Curvature, tolerance: float, max_passes: int
) -> tuple[Point, int, bool]:
    """The optimum by the solver that suits the size, or by the next where that gets stuck; and passes, converged."""
    passes, converged = 0, False
    for solver in _solvers(problem, curvature):
        if not converged:
            point, more, converged = solver(problem, point, tolerance, max_passes - passes)
            passes += more
    return point, passes, converged


def _solvers(problem: Problem, curvature: Curvature) -> list[Solver]:
    solvers: list[Solver] = [newton_cg]
    if len(problem.share) > _FEW_SAMPLES:
        solvers.insert(0, partial(minimize, curvature=curvature))
    if problem.num_classes * len(problem.data.exact) <= _FEW_UNKNOWNS:
        solvers.append(damped_newton)
    return solvers


def _start(problem: Problem, known: list[tuple[float, Point]], log_c: float) -> Point:
    """The better of the line and the parabola, in log C, through the last solutions."""
    if not known:
        return exact_point(problem, problem.share.new_zeros(problem.num_classes, len(problem.data.exact)))
    guesses = []
    for through in (known[-2:], known[-3:])[: max(1, len(known) - 1)]:
        factors = [math.prod((log_c - b) / (a - b) for b, _ in through if b != a) for a, _ in through]
        theta = sum((f * p.theta for f, (_, p) in zip(factors, through, strict=True)), torch.zeros(()))
        logits = sum((f * p.logits for f, (_, p) in zip(factors, through, strict=True)), torch.zeros(()))
        guesses.append(tried(problem, theta, logits))
    best = min(guesses, key=lambda trial: trial.objective)
    return advanced(problem, known[-1][1], best)
