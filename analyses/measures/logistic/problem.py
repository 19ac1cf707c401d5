"""Multinomial logistic regression as a problem to be solved: features on their principal axes, points, certificates.

Everything is class-major: parameters (K, r + 1) with the bias last, features (r + 1, n) with a last row of ones,
logits (K, n). Logits and gradients are kept in float64 and moved by float32 products of what changed, whose rounding
errors shrink with the steps: float32 decides the time and float64 the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_PATIENCE = 10


@dataclass(frozen=True, eq=False)
class Decomposition:
    """One representation on r orthogonal axes, on the device that solves; mostly its min(n, D) principal axes."""

    exact: Tensor  # (r + 1, n) float64: coordinates on the axes, principal ones by ascending variance, then 1
    quick: Tensor  # the same in float32
    rows: Tensor  # its transpose, a row per sample
    variances: Tensor  # (r + 1,) mean squares
    axes: Tensor  # (D, r) float64; parameters (K, r + 1) stand for the weights `parameters[:, :-1] @ axes.T`
    mean: Tensor  # (D,) float64
    unit: float  # what the features were divided by: their root mean square


@dataclass(frozen=True, eq=False)
class Problem:
    """One representation, its labels and a penalty."""

    data: Decomposition
    targets: Tensor  # (n,) class indices
    num_classes: int
    share: Tensor  # (n,) float64: weight of each sample in the mean, sum 1
    penalty: float  # 1 / (C * sum of sample weights), for features in units


@dataclass(frozen=True, eq=False)
class Trial:
    """Parameters and what they cost, without the gradient by them."""

    theta: Tensor  # (K, r + 1) float64
    logits: Tensor  # (K, n) float64
    residual: Tensor  # (K, n) float64: derivative of the mean cross-entropy by the logits
    objective: float


@dataclass(frozen=True, eq=False)
class Point(Trial):
    """Parameters that a solver may go on from."""

    slope: Tensor  # (K, r + 1) float64: derivative of the mean cross-entropy by theta
    gradient: Tensor  # the same of the objective


class Patience:
    """Counts the iterations since the gap last halved or the objective fell by a hundredth."""

    def __init__(self) -> None:
        self.forgive()
        self._lowest = math.inf

    def forgive(self) -> None:
        """Waits anew for the gap to halve, whatever it was."""
        self._best, self._idle = math.inf, 0

    def lasts(self, gap: float, objective: float) -> bool:
        """Whether it was at most 10 iterations ago, this one included."""
        if gap < self._best / 2 or objective < 0.99 * self._lowest:
            self._best, self._lowest, self._idle = min(self._best, gap), min(self._lowest, objective), 0
        else:
            self._idle += 1
        return self._idle <= _PATIENCE


def decomposed(x: Tensor) -> Decomposition:
    """Features of shape (n, D), of any float dtype and far from zero maybe, on their principal axes."""
    wide, mean = _centered(x)
    basis = None
    if wide.shape[0] < wide.shape[1]:  # The optimum lies in the span of the samples.
        basis, triangle = torch.linalg.qr(wide.T)
        wide = triangle.T
    variances, axes = torch.linalg.eigh(product(wide.T, wide) / len(wide))
    # A row per axis: thin products are twice as fast with it as with a row per sample.
    return _in_units(product(axes.T, wide.T), variances, axes if basis is None else basis @ axes, mean)


def undecomposed(x: Tensor) -> Decomposition:
    """The same on the features' own axes, which takes less time."""
    wide, mean = _centered(x)
    return _in_units(wide.T, wide.square().mean(0), torch.eye(wide.shape[1], dtype=wide.dtype, device=x.device), mean)


def _centered(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.double()
    mean = wide.mean(0)
    wide = wide - mean
    # The first mean is rounded at the size of the offset, the second at the size of the spread.
    rest = wide.mean(0)
    return wide.sub_(rest), mean + rest


def _in_units(coordinates: Tensor, variances: Tensor, axes: Tensor, mean: Tensor) -> Decomposition:
    """Features of the size of the bias' 1, whatever their scale was: float32 needs it."""
    variances = variances.clamp_min(0)
    unit = math.sqrt(float(variances.mean())) or 1.0
    exact = torch.cat([coordinates / unit, coordinates.new_ones(1, coordinates.shape[1])])
    return Decomposition(
        exact=exact,
        quick=exact.float(),
        rows=exact.T.float().contiguous(),
        variances=torch.cat([variances / unit**2, variances.new_ones(1)]),
        axes=axes / unit,
        mean=mean,
        unit=unit,
    )


def tried(problem: Problem, theta: Tensor, logits: Tensor) -> Trial:
    """What parameters cost whose logits are known."""
    own, highest = problem.targets[None], logits.amax(0)
    residual = (logits - highest).exp_()
    total = residual.sum(0)
    loss = float((total.log() + highest - logits.gather(0, own)[0]) @ problem.share)
    residual *= problem.share / total
    # The target's is minus the sum of the others, since p - 1 cancels where p is near 1.
    residual.scatter_(0, own, 0)
    residual.scatter_(0, own, -residual.sum(0, keepdim=True))
    return Trial(theta, logits, residual, loss + problem.penalty / 2 * float(theta[:, :-1].square().sum()))


def _with_slope(problem: Problem, trial: Trial, slope: Tensor) -> Point:
    gradient = slope.clone()
    gradient[:, :-1].add_(trial.theta[:, :-1], alpha=problem.penalty)
    return Point(trial.theta, trial.logits, trial.residual, trial.objective, slope, gradient)


def exact_point(problem: Problem, theta: Tensor) -> Point:
    """A point computed in float64 throughout."""
    trial = tried(problem, theta, product(theta, problem.data.exact))
    return _with_slope(problem, trial, product(trial.residual, problem.data.exact.T))


def advanced(problem: Problem, point: Point, trial: Trial) -> Point:
    """The trial with its gradient, by a float32 product with what changed since the point."""
    size = 1 / len(problem.share)
    change = (trial.residual - point.residual).div_(size).float()
    change = torch.nn.functional.hardshrink(change, 1e-30)  # subnormal numbers are slow
    return _with_slope(problem, trial, point.slope.add(product(change, problem.data.quick.T), alpha=size))


def line_search(problem: Problem, point: Point, step: Tensor) -> Trial | None:
    """The longest of 1, 1/2, 1/4, ... steps that goes down, or None."""
    slope = float((point.gradient * step).sum())
    if not slope < 0:
        return None
    size = float(step.abs().max())
    change = product((step / size).float(), problem.data.quick)
    for halvings in range(30):
        length = 0.5**halvings
        trial = tried(problem, point.theta.add(step, alpha=length), point.logits.add(change, alpha=length * size))
        # The last term is the rounding of the objective.
        if trial.objective <= point.objective + 1e-4 * length * slope + 1e-13 * (1 + abs(point.objective)):
            return trial
    return None


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, on a CPU by numpy's BLAS: faster than torch's on some of them, twice so for `a.T @ a`."""
    product: Tensor = torch.from_numpy(a.numpy() @ b.numpy()) if a.device.type == "cpu" else a @ b
    return product


def original_norm(problem: Problem, point: Point) -> float:
    """The gradient's norm in the weights of the features as they were passed, and the bias."""
    return math.hypot(problem.data.unit * float(point.gradient[:, :-1].norm()), float(point.gradient[:, -1].norm()))


def is_optimal(problem: Problem, point: Point, tolerance: float) -> bool:
    """Whether gradient norm and gap are as small as `fit_logistic` promises."""
    return excess_gradient(problem, point, tolerance) <= 1


def excess_gradient(problem: Problem, point: Point, tolerance: float) -> float:
    """How many times the gradient is as long as `fit_logistic` promises, by its norm or by the gap."""
    size = math.hypot(1, problem.data.unit * math.sqrt(len(problem.data.exact) - 1))
    by_norm = original_norm(problem, point) / (tolerance * size)
    return max(by_norm, math.sqrt(gap(problem, point) * 10 / tolerance))


def gap(problem: Problem, point: Point) -> float:
    """The squared gradient over twice the least curvature, as a fraction of the objective; features in units."""
    if point.objective == 0:
        return 0.0
    return float(point.gradient.square().sum()) / (2 * problem.penalty * point.objective)
