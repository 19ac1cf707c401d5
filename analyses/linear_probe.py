"""Linear probes: multinomial logistic regression at its true optimum.

The objective is scikit-learn's, per sample: `mean cross-entropy + ||W||^2 / (2 C n)`, with the bias unpenalised.
Inside the solver everything is class-major: parameters (K, D + 1) with the bias last, features (D + 1, n) with a last
row of ones, logits (K, n).

Default solvers stop early on the ill-conditioned features of networks, and a curve over layers then shows
conditioning instead of content. So every fit comes with its gradient norm, and says so when it did not converge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprobe.analyses.arrays import Features, Floats, centred, checked

INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)

_MEMORY = 20  # pairs of steps that L-BFGS remembers
_MAX_BLOCK_ENTRIES = 30_000_000  # 240 MB of float64: beyond it the per-class Hessian blocks are left out


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """A multinomial logistic regression: `logits = x @ weights.T + bias`.

    Attributes:
        weights: Shape (K, D), for the features as they were passed.
        bias: Shape (K,).
        classes: The K labels in ascending order, shape (K,).
        inverse_penalty: C; smaller is stronger.
        objective: Mean cross-entropy plus penalty, in nats.
        gradient_norm: Of the objective in (weights, bias) of the centred features, without preconditioning: the
            certificate.
        passes: Products with the features and their transpose that it took.
        converged: Whether the gradient norm met the tolerance.
    """

    weights: Floats
    bias: Floats
    classes: NDArray[Any]
    inverse_penalty: float
    objective: float
    gradient_norm: float
    passes: int
    converged: bool

    def predict(self, x: Features) -> NDArray[Any]:
        """The most likely label of each sample, shape (n,)."""
        classes: NDArray[Any] = self.classes[(x.astype(np.float64) @ self.weights.T + self.bias).argmax(axis=1)]
        return classes


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a linear probe finds in one representation.

    Attributes:
        choose_accuracy: Fraction correct on the split that chose the penalty (and chooses layers).
        report_accuracy: Fraction correct on the split that nothing was chosen on.
        choose_correct: Per sample, shape (n_choose,), bool.
        report_correct: Per sample, shape (n_report,), bool.
        inverse_penalty: The C that was best on the choose split; of equals the smallest, which is the strongest
            penalty.
        gradient_norm: Of the chosen fit.
        converged: Whether the chosen fit converged.
    """

    choose_accuracy: float
    report_accuracy: float
    choose_correct: NDArray[np.bool_]
    report_correct: NDArray[np.bool_]
    inverse_penalty: float
    gradient_norm: float
    converged: bool


def linear_probe(
    fit_x: Features,
    fit_y: NDArray[Any],
    choose_x: Features,
    choose_y: NDArray[Any],
    report_x: Features,
    report_y: NDArray[Any],
    *,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
) -> ProbeResult:
    """How well a linear classifier reads the labels from features.

    One classifier per penalty is fitted on the fit split, the best on the choose split is kept, and the report split
    is only scored. Each feature is divided by its standard deviation on the fit split (constant ones are left alone):
    without that the same C would be a strong penalty for a layer with small activations and a weak one for a layer
    with large activations.

    Args:
        fit_x: Features, shape (n_fit, D), any float dtype; computed in float64.
        fit_y: Labels, shape (n_fit,).
        choose_x: Shape (n_choose, D).
        choose_y: Shape (n_choose,). A label that the fit split has not counts as an error.
        report_x: Shape (n_report, D).
        report_y: Shape (n_report,).
        inverse_penalties: Values of C to choose from.

    Raises:
        ValueError: If a split's features and labels disagree, the splits differ in D, features are not finite, the
            fit split has one class, or a penalty is not positive.
    """
    splits = {"fit": (fit_x, fit_y), "choose": (choose_x, choose_y), "report": (report_x, report_y)}
    for split, (x, y) in splits.items():
        _check_pair(x, y, split)
        if x.shape[1] != fit_x.shape[1]:
            widths = f"{x.shape[1]} features, the fit split {fit_x.shape[1]}"
            raise ValueError(f"the {split} split has {widths}; pass the same layer")
    mean, scale = _standardisation(fit_x)
    scaled = {split: (x - mean) / scale for split, (x, _) in splits.items()}
    fits = fit_logistic_path(scaled["fit"], fit_y, sorted(inverse_penalties))
    correct = [fit.predict(scaled["choose"]) == choose_y for fit in fits]
    best = int(np.argmax([c.mean() for c in correct]))
    report_correct = fits[best].predict(scaled["report"]) == report_y
    return ProbeResult(
        choose_accuracy=float(correct[best].mean()),
        report_accuracy=float(report_correct.mean()),
        choose_correct=correct[best],
        report_correct=report_correct,
        inverse_penalty=fits[best].inverse_penalty,
        gradient_norm=fits[best].gradient_norm,
        converged=fits[best].converged,
    )


def fit_logistic(
    x: Features, y: NDArray[Any], *, inverse_penalty: float = 1.0, tolerance: float = 1e-8, max_passes: int = 2000
) -> LogisticFit:
    """Multinomial logistic regression with an L2 penalty, at its optimum.

    Equals `sklearn.linear_model.LogisticRegression(C=inverse_penalty)` run to convergence, for three classes or more.
    Two classes use the same softmax with two weight vectors; scikit-learn's single vector is their difference, and
    its C is twice ours.

    Args:
        x: Features, shape (n, D), any float dtype; computed in float64.
        y: Labels, shape (n,), of two classes or more.
        inverse_penalty: C > 0.
        tolerance: The fit has converged when the gradient norm is below `tolerance` times the root mean square norm
            of the centred samples (1 appended for the bias) *and* small enough that, by the curvature the penalty
            gives the weights, the objective is within a fraction `tolerance / 10` of its minimum. The second matters
            for separable data under a weak penalty.
        max_passes: Where to give up; the fit then says that it did not converge.

    Raises:
        ValueError: If x and y disagree, x is not finite, y has one class, or the penalty is not positive.

    Source: Boehning 1992 for the preconditioner; L-BFGS of Liu and Nocedal 1989.
    """
    return fit_logistic_path(x, y, (inverse_penalty,), tolerance=tolerance, max_passes=max_passes)[0]


def fit_logistic_path(
    x: Features, y: NDArray[Any], inverse_penalties: Sequence[float], *, tolerance: float = 1e-8, max_passes: int = 2000
) -> tuple[LogisticFit, ...]:
    """`fit_logistic` for several penalties, which share the decomposition of the features."""
    _check_pair(x, y, "fit")
    if not inverse_penalties or min(inverse_penalties) <= 0 or not np.isfinite(inverse_penalties).all():
        raise ValueError(f"the inverse penalties C are {tuple(inverse_penalties)}; pass finite numbers above 0")
    classes, targets = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all {len(y)} labels are {classes[0]}; a probe needs two classes or more")
    rotated, basis, variances = _principal_axes(centred(x))
    mean = x.mean(axis=0, dtype=np.float64)
    fits = []
    for inverse_penalty in inverse_penalties:
        penalty = np.append(np.full(len(variances), 1 / (inverse_penalty * len(x))), 0.0)
        problem = _Problem(rotated, targets, len(classes), penalty, np.append(variances, 1.0))
        point, passes, converged = _minimise(problem, tolerance, max_passes)
        weights = point.theta[:, :-1] @ basis.T
        fits.append(
            LogisticFit(
                weights=weights,
                bias=point.theta[:, -1] - weights @ mean,
                classes=classes,
                inverse_penalty=float(inverse_penalty),
                objective=point.objective,
                gradient_norm=float(np.linalg.norm(point.gradient)),
                passes=passes,
                converged=converged,
            )
        )
    return tuple(fits)


@dataclass(frozen=True, eq=False)
class _Problem:
    features: Floats  # (D + 1, n): principal axes in rows, then ones
    targets: NDArray[np.intp]  # (n,)
    num_classes: int
    penalty: Floats  # (D + 1,): 1 / (C n), then 0 for the bias
    moments: Floats  # (D + 1,): mean squares of the rows of `features`, whose cross moments are 0


@dataclass(frozen=True, eq=False)
class _Point:
    theta: Floats  # (K, D + 1)
    logits: Floats  # (K, n)
    residual: Floats  # (K, n): (probabilities - one-hot targets) / n
    objective: float
    gradient: Floats  # (K, D + 1)


def _check_pair(x: Features, y: NDArray[Any], split: str) -> None:
    checked(x, f"features of the {split} split")
    if y.shape != x.shape[:1]:
        seen = f"{len(x)} samples but labels of shape {y.shape}"
        raise ValueError(f"the {split} split has {seen}; pass one label per sample")


def _standardisation(x: Features) -> tuple[Floats, Floats]:
    mean = x.mean(axis=0, dtype=np.float64)
    scale = np.sqrt(np.square(centred(x)).mean(axis=0))
    # Not `scale == 0`: the standard deviation of equal numbers is rounding error, and dividing by it would make
    # features of it.
    scale[(x == x[:1]).all(axis=0)] = 1.0
    return mean, scale


def _principal_axes(x: Floats) -> tuple[Floats, Floats, Floats]:
    """Features on their principal axes with a row of ones, the axes (D, r), and the variances (r,), r = min(n, D)."""
    basis = None
    if len(x) < x.shape[1]:  # The optimum lies in the span of the samples.
        basis, triangle = np.linalg.qr(x.T)
        x = triangle.T
    variances, axes = np.linalg.eigh(x.T @ x / len(x))
    rotated = np.ones((len(axes) + 1, len(x)))
    np.matmul(axes.T, x.T, out=rotated[:-1])
    return rotated, axes if basis is None else basis @ axes, np.maximum(variances, 0.0)


def _minimise(problem: _Problem, tolerance: float, max_passes: int) -> tuple[_Point, int, bool]:
    """Preconditioned L-BFGS.

    Boehning's bound of the Hessian, diagonal on the principal axes, is the first preconditioner. Where probabilities
    approach 0 and 1 the bound is far too large; fits that are not done by then get the per-class blocks of the
    Hessian where they stand.
    """
    steps: list[tuple[Floats, Floats]] = []
    precondition = _boehning(problem)
    period = max(40, len(problem.moments) // 2)  # the blocks cost about as much as these many passes
    has_blocks = problem.num_classes * len(problem.moments) ** 2 <= _MAX_BLOCK_ENTRIES
    point = _evaluate(problem, np.zeros((problem.num_classes, len(problem.moments))))
    passes, next_blocks = 1, period
    while passes < max_passes:
        if _is_optimal(problem, point, tolerance):
            # The logits were summed up along the way; the certificate is computed afresh.
            point, passes = _evaluate(problem, point.theta), passes + 1
            if _is_optimal(problem, point, tolerance):
                return point, passes, True
        if has_blocks and passes >= next_blocks:
            precondition, next_blocks = _hessian_blocks(problem, point), passes + period
        following = _line_search(problem, point, _direction(point.gradient, steps, precondition))
        if following is None:
            if not steps:  # not even downhill along the preconditioned gradient: rounding error is all that is left
                break
            steps.clear()
            continue
        step, change = following.theta - point.theta, following.gradient - point.gradient
        if np.vdot(step, change) > 0:
            steps = [*steps[1 - _MEMORY :], (step, change)]
        point, passes = following, passes + 1
    point = _evaluate(problem, point.theta)
    return point, passes, _is_optimal(problem, point, tolerance)


def _is_optimal(problem: _Problem, point: _Point, tolerance: float) -> bool:
    norm = np.linalg.norm(point.gradient)
    size = np.sqrt(problem.moments.sum())
    # f - min f <= ||gradient||^2 / (2 penalty) for a function with that much curvature.
    gap = norm**2 / (2 * problem.penalty[0])
    return bool(norm <= tolerance * size and gap <= tolerance / 10 * point.objective)


def _evaluate(problem: _Problem, theta: Floats, logits: Floats | None = None) -> _Point:
    logits = theta @ problem.features if logits is None else logits
    loss, residual = _cross_entropy(logits, problem.targets)
    gradient = residual @ problem.features.T + problem.penalty * theta
    return _Point(theta, logits, residual, loss + _penalty(problem, theta), gradient)


def _cross_entropy(logits: Floats, targets: NDArray[np.intp]) -> tuple[float, Floats]:
    n = len(targets)
    highest = logits.max(axis=0)
    residual = np.exp(logits - highest)
    total = residual.sum(axis=0)
    loss = float(np.mean(np.log(total) + highest - logits[targets, np.arange(n)]))
    residual /= total * n
    residual[targets, np.arange(n)] -= 1 / n
    return loss, residual


def _penalty(problem: _Problem, theta: Floats) -> float:
    return float((np.square(theta) @ problem.penalty).sum() / 2)


def _boehning(problem: _Problem) -> Callable[[Floats], Floats]:
    bound = problem.moments / 2 + problem.penalty
    return lambda gradient: gradient / bound


def _hessian_blocks(problem: _Problem, point: _Point) -> Callable[[Floats], Floats]:
    n = len(problem.targets)
    probabilities = point.residual * n
    probabilities[problem.targets, np.arange(n)] += 1
    # A bias has no penalty, and no curvature where its class is certain everywhere.
    ridge = np.diag(problem.penalty + 1e-12 * problem.moments.sum())
    weights = np.maximum(probabilities * (1 - probabilities), 0) / n
    inverses = np.stack([np.linalg.inv((problem.features * w) @ problem.features.T + ridge) for w in weights])
    return lambda gradient: np.matmul(inverses, gradient[:, :, None])[:, :, 0]


def _direction(
    gradient: Floats, steps: list[tuple[Floats, Floats]], precondition: Callable[[Floats], Floats]
) -> Floats:
    """The two-loop recursion of L-BFGS, started from the preconditioner."""
    if not steps:
        return -precondition(gradient)
    rest, factors = gradient.copy(), []
    for step, change in reversed(steps):
        factors.append(np.vdot(step, rest) / np.vdot(step, change))
        rest -= factors[-1] * change
    step, change = steps[-1]
    direction = precondition(rest) * (np.vdot(step, change) / np.vdot(change, precondition(change)))
    for (step, change), factor in zip(steps, reversed(factors), strict=True):
        direction += (factor - np.vdot(change, direction) / np.vdot(step, change)) * step
    return -direction


def _line_search(problem: _Problem, point: _Point, direction: Floats) -> _Point | None:
    """The first step that meets the strong Wolfe conditions, or None.

    Logits are linear in the step, so a trial needs no product with the features.
    """
    along = direction @ problem.features
    slope = float(np.vdot(point.gradient, direction))
    if slope >= 0:
        return None
    low, high, size = 0.0, np.inf, 1.0
    slack = 1e-13 * (1 + abs(point.objective))  # its rounding error, near the optimum more than the decrease
    for _ in range(40):
        theta, logits = point.theta + size * direction, point.logits + size * along
        loss, residual = _cross_entropy(logits, problem.targets)
        new_slope = float(np.vdot(residual, along) + np.vdot(problem.penalty * theta, direction))
        too_high = loss + _penalty(problem, theta) > point.objective + 1e-4 * size * slope + slack
        if not too_high and abs(new_slope) <= 0.9 * abs(slope):
            return _evaluate(problem, theta, logits)
        if too_high or new_slope > 0:
            high = size
        else:
            low = size
        size = 2 * size if np.isinf(high) else (low + high) / 2
    return None
