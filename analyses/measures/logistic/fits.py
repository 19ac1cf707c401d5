"""Multinomial logistic regression at its true optimum.

The objective is scikit-learn's, per sample: `mean cross-entropy + ||W||^2 / (2 C n)`, with the bias unpenalized.
scikit-learn's solvers stop early on the ill-conditioned features of networks, and do not report how far from the
optimum. Here every fit states its gradient norm and whether it converged, and several penalties, labels or
representations share their work.

The solver is limited-memory BFGS, or Newton's method by conjugate gradients for up to a thousand samples and where
BFGS gets stuck. On problems with few unknowns a damped Newton's method in float64 finishes what these leave undone.
Penalties are solved from the strongest to the weakest, each starting from an extrapolation of the last solutions.

A fit runs on the device of its features, which needs float64; one of few samples runs on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from layerprobe.analyses.measures.arrays import Floats
from layerprobe.analyses.measures.logistic.bfgs import Curvature, minimize
from layerprobe.analyses.measures.logistic.newton import damped_newton, newton_cg
from layerprobe.analyses.measures.logistic.problem import (
    Decomposition,
    Point,
    Problem,
    decompose,
    evaluate,
    exact_point,
    gap,
    gradient_norm,
    keep_axes,
    with_gradient,
)
from layerprobe.analyses.measures.parallel import in_parallel, torch_threads
from layerprobe.analyses.measures.tensors import FeatureMatrix, checked_tensor, product

ClassWeight = Literal["balanced"] | Mapping[Any, float] | None
Solver = Callable[[Problem, Point, float, int], tuple[Point, int, bool]]

FEW_SAMPLES = 1000  # up to this many, Newton's method by conjugate gradients is the fastest, and on a CPU
_FEW_UNKNOWNS = 300  # up to this many, the whole Hessian may be factorized where other solvers get stuck
_SINGLE_THREAD_ENTRIES = 1_000_000  # with fewer entries of the features several threads are slower than one


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """A multinomial logistic regression: `logits = x @ weights.T + bias`.

    Attributes:
        weights: Weights for the features as they were passed, shape (K, D).
        bias: Bias, shape (K,).
        classes: The K labels in ascending order, shape (K,).
        inverse_penalty: Inverse penalty C; smaller is stronger.
        objective: Mean cross-entropy plus penalty, in nats.
        gradient_norm: Norm of the objective's gradient in (weights, bias) of the centered features, without
            preconditioning, in float64. It certifies the optimum.
        gap: Upper bound of the distance from the minimum, as a fraction of the objective. It follows from the
            curvature that the penalty gives the weights: the squared gradient norm times `C n / (2 objective)`, with
            the features in units of their root mean square, so that the bias weighs as much as a feature.
        passes: Number of products with the features and their transpose.
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

    def logits(self, x: FeatureMatrix) -> Floats:
        """Computes the logit of every sample and class, shape (n, K)."""
        return self._logits(x).numpy(force=True)

    def predict(self, x: FeatureMatrix) -> NDArray[Any]:
        """Returns the most likely label of each sample, shape (n,)."""
        labels: NDArray[Any] = self.classes[self.logits(x).argmax(axis=1)]
        return labels

    def log_probabilities(self, x: FeatureMatrix) -> Floats:
        """Computes the log probability of each class in nats, shape (n, K)."""
        return torch.log_softmax(self._logits(x), 1).numpy(force=True)

    def _logits(self, x: FeatureMatrix) -> Tensor:
        wide = torch.as_tensor(x).double()
        weights, bias = (torch.from_numpy(part).to(wide.device) for part in (self.weights, self.bias))
        return product(wide, weights.T) + bias


def fit_logistic(
    x: FeatureMatrix,
    y: NDArray[Any],
    *,
    inverse_penalty: float = 1.0,
    class_weight: ClassWeight = None,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
) -> LogisticFit:
    """Fits a multinomial logistic regression with an L2 penalty at its optimum.

    Equals `sklearn.linear_model.LogisticRegression(C=inverse_penalty)` run to convergence, for three classes or more.
    Two classes use the same softmax with two weight vectors; scikit-learn's single vector is their difference, and
    its C is twice ours.

    Args:
        x: Features, shape (n, D), any float dtype; computed in float64.
        y: Labels, shape (n,), of two classes or more.
        inverse_penalty: Inverse penalty C > 0.
        class_weight: Weight of the samples of each class: "balanced" for `n / (K n_k)`, or a number per label (1 for
            labels without one). The mean in the objective and n in the penalty become weighted, as in scikit-learn.
        tolerance: Tolerance of convergence: the gradient norm must be below `tolerance` times the root mean square
            norm of the centered samples (with 1 appended for the bias), *and* `gap <= tolerance / 10`. The second
            condition matters for separable data under a weak penalty.
        max_passes: Maximum number of passes; a fit that needs more is returned as not converged.

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
    )[0]


def fit_logistic_path(
    x: FeatureMatrix,
    y: NDArray[Any],
    inverse_penalties: Sequence[float],
    *,
    class_weight: ClassWeight = None,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
) -> tuple[LogisticFit, ...]:
    """Fits `fit_logistic` for several penalties, each starting from the solutions for the stronger ones.

    Args:
        x: Features, shape (n, D), any float dtype.
        y: Labels, shape (n,).
        inverse_penalties: Values of C.
        class_weight: Weight of the samples of each class, as in `fit_logistic`.
        tolerance: Tolerance of convergence, as in `fit_logistic`.
        max_passes: Maximum number of passes per fit.

    Returns:
        Fits in the order of `inverse_penalties`.

    Raises:
        ValueError: As in `fit_logistic`.
    """
    check_penalties(inverse_penalties)
    path = logistic_path(
        x,
        y,
        weakest=max(inverse_penalties),
        class_weight=class_weight,
        tolerance=tolerance,
        max_passes=max_passes,
    )
    return path.fits(inverse_penalties)


def fit_logistic_map(
    representations: Iterable[FeatureMatrix],
    y: NDArray[Any],
    inverse_penalties: Sequence[float],
    *,
    class_weight: ClassWeight = None,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
    workers: int | None = None,
) -> list[tuple[LogisticFit, ...]]:
    """Fits `fit_logistic_path` for every representation of the same samples, one per core at a time.

    The results do not depend on the number of workers.

    Args:
        representations: Features, each of shape (n, D) with its own D; taken one by one as they are needed.
        y: Labels, shape (n,).
        inverse_penalties: Values of C.
        class_weight: Weight of the samples of each class, as in `fit_logistic`.
        tolerance: Tolerance of convergence, as in `fit_logistic`.
        max_passes: Maximum number of passes per fit.
        workers: Number of representations at a time; None for one per thread that torch may use.

    Returns:
        The fits of each representation, in the order of `inverse_penalties`.

    Raises:
        ValueError: As in `fit_logistic`.
    """
    fit_path = partial(
        fit_logistic_path,
        y=y,
        inverse_penalties=inverse_penalties,
        class_weight=class_weight,
        tolerance=tolerance,
        max_passes=max_passes,
    )
    return in_parallel(fit_path, representations, workers=workers)


def fit_multilabel_path(
    x: FeatureMatrix,
    y: NDArray[Any],
    inverse_penalties: Sequence[float],
    *,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
) -> tuple[tuple[LogisticFit, ...], ...]:
    """Fits a binary logistic regression per label; all labels share the decomposition of the features.

    Equals scikit-learn's `OneVsRestClassifier(LogisticRegression(C))`. C is that of its single weight vector, which
    is the difference of our two.

    Args:
        x: Features, shape (n, D).
        y: Labels, shape (n, L): 1 or True where a sample has the label. Each label needs samples of both kinds.
        inverse_penalties: Values of C.
        tolerance: Tolerance of convergence, as in `fit_logistic`.
        max_passes: Maximum number of passes per fit.

    Returns:
        The fits of each label, in the order of `inverse_penalties`; their classes are 0 and 1.

    Raises:
        ValueError: If x and y disagree, y holds anything but 0 and 1, or a label is on all samples or on none.
    """
    check_penalties(inverse_penalties)
    features = checked_tensor(x, "features of the train split")
    y = np.asarray(y)
    if y.ndim != 2 or len(y) != len(x) or not np.isin(y, (0, 1)).all():
        raise ValueError(f"{len(x)} samples but labels of shape {y.shape}; pass 0 or 1 per sample and label, (n, L)")
    for label, share in enumerate(y.mean(axis=0)):
        if share in (0, 1):
            raise ValueError(f"label {label} is on {'all' if share else 'no'} samples; leave it out")
    classes, ones = np.array([0, 1]), np.ones(len(y))
    with torch.inference_mode(), _suitable_threads(features.numel()):
        halves = [c / 2 for c in inverse_penalties]
        data = _on_axes(features, max(halves) * len(x))
        paths = [
            LogisticPath(data, column.astype(np.intp), classes, ones, tolerance=tolerance, max_passes=max_passes)
            for column in y.T
        ]
        fits = [path.fits(halves) for path in paths]
    return tuple(
        tuple(replace(fit, inverse_penalty=float(c)) for fit, c in zip(of_label, inverse_penalties, strict=True))
        for of_label in fits
    )


def logistic_path(
    x: FeatureMatrix,
    y: NDArray[Any],
    *,
    weakest: float,
    class_weight: ClassWeight = None,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
) -> LogisticPath:
    """Prepares the fits of `fit_logistic` for penalties that are not all known beforehand.

    Args:
        x: Features, shape (n, D), any float dtype.
        y: Labels, shape (n,).
        weakest: About the largest C that will be asked for; it decides how the features are prepared.
        class_weight: Weight of the samples of each class, as in `fit_logistic`.
        tolerance: Tolerance of convergence, as in `fit_logistic`.
        max_passes: Maximum number of passes per fit.

    Raises:
        ValueError: As in `fit_logistic`.
    """
    features = check_pair(x, y, "train")
    classes, targets = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all {len(y)} labels are {classes[0]}; a probe needs two classes or more")
    sample_weights = _class_weights(class_weight, classes, y)[targets]
    with torch.inference_mode(), _suitable_threads(features.numel()):
        data = _on_axes(features, weakest * float(sample_weights.sum()))
    return LogisticPath(data, targets, classes, sample_weights, tolerance=tolerance, max_passes=max_passes)


class LogisticPath:
    """The fits of one representation, one penalty after another.

    A penalty starts from the solutions for the last ones if it is weaker than they, which is the order to prefer, and
    afresh otherwise. Memory holds three solutions.

    Args:
        data: Features on their axes.
        targets: Class indices, shape (n,).
        classes: The K labels in ascending order.
        sample_weights: Weight of each sample, shape (n,), positive.
        tolerance: Tolerance of convergence, as in `fit_logistic`.
        max_passes: Maximum number of passes per fit.
    """

    def __init__(
        self,
        data: Decomposition,
        targets: NDArray[np.intp],
        classes: NDArray[Any],
        sample_weights: Floats,
        *,
        tolerance: float,
        max_passes: int,
    ) -> None:
        self._data, self._classes, self._tolerance, self._max_passes = data, classes, tolerance, max_passes
        self._total = float(sample_weights.sum())
        self._targets = torch.as_tensor(targets, device=data.exact.device)
        self._sample_weights = torch.as_tensor(sample_weights / self._total, device=data.exact.device)
        self._curvature: Curvature | None = None
        self._solutions: list[tuple[float, Point]] = []  # log C and optimum of the last penalties

    def fits(self, inverse_penalties: Sequence[float]) -> tuple[LogisticFit, ...]:
        """Fits several penalties, the strongest first; returns them in the order in which they were given."""
        fits = {c: self.fit(c) for c in sorted(set(inverse_penalties))}
        return tuple(fits[c] for c in inverse_penalties)

    @torch.inference_mode()
    def fit(self, inverse_penalty: float) -> LogisticFit:
        """Fits one penalty.

        Args:
            inverse_penalty: Inverse penalty C > 0.
        """
        data, log_c = self._data, math.log(inverse_penalty)
        if self._solutions and log_c <= self._solutions[-1][0]:
            self._curvature, self._solutions = None, []
        penalty = 1 / (inverse_penalty * self._total * data.unit**2)
        problem = Problem(data, self._targets, len(self._classes), self._sample_weights, penalty)
        with _suitable_threads(data.axes.shape[0] * data.exact.shape[1]):
            self._curvature = self._curvature or Curvature(problem)
            start = _start(problem, self._solutions, log_c)
            point, passes, converged = _solve(problem, start, self._curvature, self._tolerance, self._max_passes)
            self._solutions = [*self._solutions[-2:], (log_c, point)]
            weights = point.theta[:, :-1] @ data.axes.T
            return LogisticFit(
                weights=weights.cpu().numpy(),
                bias=(point.theta[:, -1] - weights @ data.mean).cpu().numpy(),
                classes=self._classes,
                inverse_penalty=float(inverse_penalty),
                objective=point.objective,
                gradient_norm=gradient_norm(problem, point),
                gap=gap(problem, point),
                passes=passes,
                converged=converged,
            )


def check_pair(x: FeatureMatrix, y: NDArray[Any], split: str) -> Tensor:
    """Returns the features of a split as a tensor, after checking that features and labels fit together.

    Raises:
        ValueError: If features cannot be analyzed, or there is not one label per sample.
    """
    features = checked_tensor(x, f"features of the {split} split")
    if y.shape != (len(features),):
        shapes = f"{len(x)} samples but labels of shape {y.shape}"
        raise ValueError(f"the {split} split has {shapes}; pass one label per sample")
    return features


def check_penalties(inverse_penalties: Sequence[float]) -> None:
    """Checks that there are inverse penalties, finite and above 0.

    Raises:
        ValueError: If not.
    """
    if not len(inverse_penalties) or min(inverse_penalties) <= 0 or not np.isfinite(inverse_penalties).all():
        raise ValueError(f"the inverse penalties C are {tuple(inverse_penalties)}; pass finite numbers above 0")


def _class_weights(class_weight: ClassWeight, classes: NDArray[Any], y: NDArray[Any]) -> Floats:
    """Weight of the samples of each class, shape (K,)."""
    if isinstance(class_weight, Mapping):  # scikit-learn refuses weights of labels that do not occur
        labels = set(classes.tolist())
        class_weight = {label: weight for label, weight in class_weight.items() if label in labels}
    weights: Floats = compute_class_weight(class_weight, classes=classes, y=y)
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise ValueError(f"the class weights are {weights.tolist()}; pass finite numbers above 0")
    return weights


def _suitable_threads(num_entries: int) -> AbstractContextManager[None]:
    return torch_threads(1 if num_entries < _SINGLE_THREAD_ENTRIES else torch.get_num_threads())


def _on_axes(x: Tensor, inverse_penalty: float) -> Decomposition:
    """Features on axes that suit penalties down to this one, per sample; few samples are solved on the CPU."""
    if len(x) > FEW_SAMPLES:
        return decompose(x)
    x = x.cpu()
    if x.shape[1] <= FEW_SAMPLES:
        data = keep_axes(x)
        if inverse_penalty * data.unit**2 < 10:  # Under a strong penalty principal axes take longer than they save.
            return data
    return decompose(x)


def _solve(
    problem: Problem, point: Point, curvature: Curvature, tolerance: float, max_passes: int
) -> tuple[Point, int, bool]:
    """Tries the solvers in turn until one converges; returns last point, passes and whether it converged."""
    passes, converged = 0, False
    for solver in _solvers(problem, curvature):
        if not converged:
            point, solver_passes, converged = solver(problem, point, tolerance, max_passes - passes)
            passes += solver_passes
    return point, passes, converged


def _solvers(problem: Problem, curvature: Curvature) -> list[Solver]:
    """Solvers for a problem of this size, the fastest first."""
    solvers: list[Solver] = [newton_cg]
    if len(problem.sample_weights) > FEW_SAMPLES:
        solvers.insert(0, partial(minimize, curvature=curvature))
    if problem.num_classes * len(problem.data.exact) <= _FEW_UNKNOWNS:
        solvers.append(damped_newton)
    return solvers


def _start(problem: Problem, solutions: list[tuple[float, Point]], log_c: float) -> Point:
    """The better of the line and the parabola, in log C, through the last solutions."""
    if not solutions:
        zeros = problem.sample_weights.new_zeros(problem.num_classes, len(problem.data.exact))
        return exact_point(problem, zeros)
    trials = []
    for nodes in (solutions[-2:], solutions[-3:])[: max(1, len(solutions) - 1)]:
        factors = [math.prod((log_c - b) / (a - b) for b, _ in nodes if b != a) for a, _ in nodes]
        theta = sum((f * p.theta for f, (_, p) in zip(factors, nodes, strict=True)), torch.zeros(()))
        logits = sum((f * p.logits for f, (_, p) in zip(factors, nodes, strict=True)), torch.zeros(()))
        trials.append(evaluate(problem, theta, logits))
    best = min(trials, key=lambda trial: trial.objective)
    return with_gradient(problem, solutions[-1][1], best)
