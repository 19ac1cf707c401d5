"""Multinomial logistic regression as an optimization problem: features on principal axes, points, certificates.

All arrays are class-major: parameters (K, r + 1) with the bias last, features (r + 1, n) with a last row of ones,
logits (K, n). Logits and gradients are stored in float64 and updated by float32 products of what changed, whose
rounding errors shrink with the steps. So float32 determines the time and float64 the accuracy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from layerprobe.analyses.measures.tensors import centered_with_mean, product

_PATIENCE = 10  # iterations


@dataclass(frozen=True, eq=False)
class Decomposition:
    """One representation on r orthogonal axes, on the device of the solver.

    The axes are the min(n, D) principal axes, except after `keep_axes`.

    Attributes:
        exact: Coordinates on the axes and a last row of ones, shape (r + 1, n), float64. Principal axes are sorted by
            ascending variance.
        single: The same in float32.
        rows: Transpose of `single`, one row per sample.
        variances: Mean squares of the rows of `exact`, shape (r + 1,).
        axes: Axes, shape (D, r), float64; parameters (K, r + 1) stand for the weights `parameters[:, :-1] @ axes.T`.
        mean: Mean of the features, shape (D,), float64.
        unit: Root mean square of the centered features, by which the coordinates are divided.
    """

    exact: Tensor
    single: Tensor
    rows: Tensor
    variances: Tensor
    axes: Tensor
    mean: Tensor
    unit: float


@dataclass(frozen=True, eq=False)
class Problem:
    """One representation, its labels and a penalty.

    Attributes:
        data: Features on their axes.
        targets: Class indices, shape (n,).
        num_classes: Number of classes K.
        sample_weights: Weight of each sample in the mean, shape (n,), float64; they sum to 1.
        penalty: 1 / (C * sum of unnormalized sample weights), for coordinates in units.
    """

    data: Decomposition
    targets: Tensor
    num_classes: int
    sample_weights: Tensor
    penalty: float


@dataclass(frozen=True, eq=False)
class Trial:
    """Parameters with their objective, without the gradient.

    Attributes:
        theta: Parameters, shape (K, r + 1), float64.
        logits: Logits, shape (K, n), float64.
        residual: Derivative of the mean cross-entropy with respect to the logits, shape (K, n), float64.
        objective: Mean cross-entropy plus penalty, in nats.
    """

    theta: Tensor
    logits: Tensor
    residual: Tensor
    objective: float


@dataclass(frozen=True, eq=False)
class Point(Trial):
    """Parameters from which a solver can continue.

    Attributes:
        slope: Derivative of the mean cross-entropy with respect to theta, shape (K, r + 1), float64.
        gradient: Derivative of the objective with respect to theta, shape (K, r + 1), float64.
    """

    slope: Tensor
    gradient: Tensor


class Patience:
    """Counts the iterations since the gap last halved or the objective last fell by a hundredth."""

    def __init__(self) -> None:
        self.reset_gap()
        self._lowest_objective = math.inf

    def reset_gap(self) -> None:
        """Starts to wait again for the gap to halve, whatever its value."""
        self._best_gap, self._num_idle = math.inf, 0

    def lasts(self, gap: float, objective: float) -> bool:
        """Returns whether the last progress was at most 10 iterations ago, this iteration included."""
        if gap < self._best_gap / 2 or objective < 0.99 * self._lowest_objective:
            self._best_gap, self._num_idle = min(self._best_gap, gap), 0
            self._lowest_objective = min(self._lowest_objective, objective)
        else:
            self._num_idle += 1
        return self._num_idle <= _PATIENCE


def decompose(x: Tensor) -> Decomposition:
    """Returns features (n, D), of any float dtype and any offset, on their principal axes."""
    wide, mean = centered_with_mean(x)
    basis = None
    if wide.shape[0] < wide.shape[1]:  # The optimum lies in the span of the samples.
        basis, triangle = torch.linalg.qr(wide.T)
        wide = triangle.T
    variances, axes = torch.linalg.eigh(product(wide.T, wide) / len(wide))
    # One row per axis: thin products are twice as fast with it as with one row per sample.
    return _in_units(product(axes.T, wide.T), variances, axes if basis is None else basis @ axes, mean)


def keep_axes(x: Tensor) -> Decomposition:
    """Returns features (n, D) on their own axes, which takes less time than principal axes."""
    wide, mean = centered_with_mean(x)
    return _in_units(wide.T, wide.square().mean(0), torch.eye(wide.shape[1], dtype=wide.dtype, device=x.device), mean)


def _in_units(coordinates: Tensor, variances: Tensor, axes: Tensor, mean: Tensor) -> Decomposition:
    """Scales the features to the size of the constant 1 of the bias, as float32 needs."""
    variances = variances.clamp_min(0)
    unit = math.sqrt(float(variances.mean())) or 1.0
    exact = torch.cat([coordinates / unit, coordinates.new_ones(1, coordinates.shape[1])])
    return Decomposition(
        exact=exact,
        single=exact.float(),
        rows=exact.T.float().contiguous(),
        variances=torch.cat([variances / unit**2, variances.new_ones(1)]),
        axes=axes / unit,
        mean=mean,
        unit=unit,
    )


def evaluate(problem: Problem, theta: Tensor, logits: Tensor) -> Trial:
    """Computes the objective of parameters whose logits are given."""
    targets, highest = problem.targets[None], logits.amax(0)
    residual = (logits - highest).exp_()
    total = residual.sum(0)
    loss = float((total.log() + highest - logits.gather(0, targets)[0]) @ problem.sample_weights)
    residual *= problem.sample_weights / total
    # The target's entry is minus the sum of the others: p - 1 would lose its digits where p is near 1.
    residual.scatter_(0, targets, 0)
    residual.scatter_(0, targets, -residual.sum(0, keepdim=True))
    return Trial(theta, logits, residual, loss + problem.penalty / 2 * float(theta[:, :-1].square().sum()))


def _with_slope(problem: Problem, trial: Trial, slope: Tensor) -> Point:
    gradient = slope.clone()
    gradient[:, :-1].add_(trial.theta[:, :-1], alpha=problem.penalty)
    return Point(trial.theta, trial.logits, trial.residual, trial.objective, slope, gradient)


def exact_point(problem: Problem, theta: Tensor) -> Point:
    """Computes logits, objective and gradient of parameters in float64 throughout."""
    trial = evaluate(problem, theta, product(theta, problem.data.exact))
    return _with_slope(problem, trial, product(trial.residual, problem.data.exact.T))


def with_gradient(problem: Problem, point: Point, trial: Trial) -> Point:
    """Adds the gradient to a trial, by a float32 product with the change of the residual since the point."""
    scale = 1 / len(problem.sample_weights)
    change = (trial.residual - point.residual).div_(scale).float()
    change = torch.nn.functional.hardshrink(change, 1e-30)  # subnormal numbers are slow
    return _with_slope(problem, trial, point.slope.add(product(change, problem.data.single.T), alpha=scale))


def line_search(problem: Problem, point: Point, step: Tensor) -> Trial | None:
    """Returns the longest of the steps of length 1, 1/2, 1/4, ... that decreases the objective, or None."""
    slope = float((point.gradient * step).sum())
    if not slope < 0:
        return None
    scale = float(step.abs().max())
    change = product((step / scale).float(), problem.data.single)
    for num_halvings in range(30):
        length = 0.5**num_halvings
        trial = evaluate(problem, point.theta.add(step, alpha=length), point.logits.add(change, alpha=length * scale))
        # The last term is the rounding error of the objective.
        if trial.objective <= point.objective + 1e-4 * length * slope + 1e-13 * (1 + abs(point.objective)):
            return trial
    return None


def gradient_norm(problem: Problem, point: Point) -> float:
    """Computes the gradient's norm with respect to the weights of the original features, and the bias."""
    return math.hypot(problem.data.unit * float(point.gradient[:, :-1].norm()), float(point.gradient[:, -1].norm()))


def is_optimal(problem: Problem, point: Point, tolerance: float) -> bool:
    """Returns whether gradient norm and gap are within the limits documented in `fit_logistic`."""
    return gradient_excess(problem, point, tolerance) <= 1


def gradient_excess(problem: Problem, point: Point, tolerance: float) -> float:
    """Computes the gradient's length relative to the limits of `fit_logistic` on norm and gap, whichever is larger."""
    size = math.hypot(1, problem.data.unit * math.sqrt(len(problem.data.exact) - 1))
    by_norm = gradient_norm(problem, point) / (tolerance * size)
    return max(by_norm, math.sqrt(gap(problem, point) * 10 / tolerance))


def gap(problem: Problem, point: Point) -> float:
    """Computes the squared gradient over twice the least curvature, as a fraction of the objective.

    The gradient is that of the coordinates in units.
    """
    if point.objective == 0:
        return 0.0
    return float(point.gradient.square().sum()) / (2 * problem.penalty * point.objective)
