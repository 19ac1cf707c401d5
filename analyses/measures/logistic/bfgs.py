"""Limited-memory BFGS for many samples, preconditioned by a factorized Hessian where that saves time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from layerprobe.analyses.measures.logistic.problem import (
    Patience,
    Point,
    Problem,
    exact_point,
    gap,
    is_optimal,
    line_search,
    with_gradient,
)
from layerprobe.analyses.measures.tensors import product

# Limits of a factorized Hessian, and of the terms of its sum.
_MAX_UNKNOWNS, _MAX_CLASSES = 3000, 25
_TERMS_PER_UNKNOWN, _MIN_TERMS = 20, 10_000
_WEAK_CURVATURE = 0.1  # in penalties; an axis with less needs no factorized Hessian
_MAX_STEPS = 20  # steps that are remembered
_FRESH_RATE = math.log(10)  # decrease of the log gap per iteration with a fresh Hessian
_WINDOW = 3  # iterations over which the present rate is measured


def minimize(
    problem: Problem, point: Point, tolerance: float, max_passes: int, *, curvature: Curvature
) -> tuple[Point, int, bool]:
    """Minimizes by limited-memory BFGS with the preconditioner as first estimate of the inverse Hessian.

    Logits and gradients are stored in float64 and updated by float32 products of what changed, whose rounding errors
    shrink with the steps. They are computed again in float64 before the solver ends.

    Returns:
        Last point, number of products with the features, and whether the point is the optimum.
    """
    passes, is_exact, last_exact_gap, patience = 1, False, math.inf, Patience()
    gaps: list[float] = []  # since the preconditioner was renewed
    curvature.set_penalty(problem.penalty)
    while True:
        gaps.append(gap(problem, point))
        makes_progress = patience.lasts(gaps[-1], point.objective)
        next_point = None
        if not is_optimal(problem, point, tolerance) and makes_progress and passes < max_passes:
            if _needs_renewal(problem, gaps, tolerance):
                curvature.renew(problem, point)
                gaps = gaps[-1:]
            trial = line_search(problem, point, curvature.direction(point.gradient))
            next_point = None if trial is None else with_gradient(problem, point, trial)
        if next_point is not None:
            curvature.add_step(point, next_point)
            point, is_exact = next_point, False
        elif not is_exact:
            point, is_exact = exact_point(problem, point.theta), True
            if not gap(problem, point) < last_exact_gap / 2 or passes >= max_passes:
                break
            last_exact_gap = gap(problem, point)
            patience.reset_gap()
        else:
            break
        passes += 1
    return point, passes, is_optimal(problem, point, tolerance)


class Curvature:
    """An estimate of the Hessian, passed on from penalty to penalty: a preconditioner and the solver's last steps.

    The preconditioner is the Hessian itself on the axes where the curvature of the data is not far below the penalty,
    and its diagonal on the others. With too many classes for that it is a Kronecker product.
    """

    def __init__(self, problem: Problem) -> None:
        self.apply = _diagonal(problem)
        self.penalty = problem.penalty
        # Changes of theta and of the gradient in the last iterations, shape (m, K, r + 1).
        shape = (0, problem.num_classes, len(problem.data.exact))
        self.steps = self.gradient_changes = problem.sample_weights.new_zeros(shape)

    def set_penalty(self, penalty: float) -> None:
        """Adapts the remembered gradient changes to another penalty."""
        changes = self.gradient_changes.clone()
        changes[..., :-1] += (penalty - self.penalty) * self.steps[..., :-1]
        is_convex = (self.steps * changes).sum((1, 2)) > 0  # rounding may have left some without curvature
        self.steps, self.gradient_changes, self.penalty = self.steps[is_convex], changes[is_convex], penalty

    def add_step(self, point: Point, next_point: Point) -> None:
        """Remembers the step between two points, unless it shows no positive curvature."""
        step, change = next_point.theta - point.theta, next_point.gradient - point.gradient
        if (step * change).sum() > 0:
            self.steps = torch.cat([self.steps[1 - _MAX_STEPS :], step[None]])
            self.gradient_changes = torch.cat([self.gradient_changes[1 - _MAX_STEPS :], change[None]])

    def renew(self, problem: Problem, point: Point) -> None:
        """Builds the preconditioner at a point and forgets the steps before it."""
        probabilities = torch.softmax(point.logits.float(), 0)
        build = _block_hessian if problem.num_classes <= _MAX_CLASSES else _kronecker
        self.apply = build(problem, probabilities)
        self.steps, self.gradient_changes = self.steps[:0], self.gradient_changes[:0]

    def direction(self, gradient: Tensor) -> Tensor:
        """Computes the quasi-Newton step, as two triangular solves.

        Source: Byrd, Nocedal and Schnabel 1994, theorem 2.2.
        """
        steps, changes = self.steps.flatten(1), self.gradient_changes.flatten(1)
        q = gradient.flatten()[:, None]
        triangle = (steps @ changes.T).triu()
        coefficients = torch.linalg.solve_triangular(triangle, steps @ q, upper=True)
        q = q - changes.T @ coefficients
        scale = float(q.norm()) or 1.0
        q = scale * self.apply((q / scale).float().view_as(gradient)).double().view(-1, 1)
        coefficients = triangle.diagonal()[:, None] * coefficients - changes @ q
        q = q + steps.T @ torch.linalg.solve_triangular(triangle.T, coefficients, upper=False)
        q = q.view_as(gradient)
        descent: Tensor = q.mean(0) - q  # the same shift of all classes changes no probability
        return descent


def _needs_renewal(problem: Problem, gaps: list[float], tolerance: float) -> bool:
    """Whether a fresh preconditioner would save more iterations than it costs."""
    if len(gaps) <= _WINDOW or gaps[-1] <= tolerance / 10:
        return False
    remaining = math.log(gaps[-1] * 10 / tolerance)
    rate = max(math.log(gaps[-1 - _WINDOW] / gaps[-1]) / _WINDOW, 0.03)
    return remaining / rate - remaining / _FRESH_RATE > _renewal_cost(problem)


def _renewal_cost(problem: Problem) -> float:
    """Half the cost of a fresh preconditioner, in iterations; half, since the next penalty needs it too.

    The unit is flops at the speed of thin products, fitted to one core: a matrix product is twice as fast, an entry
    of the logits costs as much as 350, and calls of small operations as much as the constants.
    """
    (width, n), k = problem.data.single.shape, problem.num_classes
    if k > _MAX_CLASSES:
        build = 2.0 * n * width**2 + 10 * width**3
    else:
        head = _head(problem, 0.3 / k * problem.data.variances)  # a typical uncertainty between the classes
        build = _num_terms(problem, head) * head**2 + ((k - 1) * head) ** 3 / 3 + k**2 * (130 * n + 6e5)
    return build / (n * k * (4 * width + 350) + 1.3e7) / 2


def _head(problem: Problem, curvature: Tensor) -> int:
    """Number of last axes, the bias included, that the factorized Hessian covers."""
    num_needed = int((curvature[:-1] > _WEAK_CURVATURE * problem.penalty).sum()) + 1
    return max(1, min(num_needed, _MAX_UNKNOWNS // (problem.num_classes - 1)))


def _num_terms(problem: Problem, head: int) -> int:
    n, k = len(problem.sample_weights), problem.num_classes
    return min(n * k * (k - 1) // 2, max(_TERMS_PER_UNKNOWN * (k - 1) * head, _MIN_TERMS))


def _diagonal(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Solver of the Hessian where all classes are equally likely, which is diagonal on principal axes."""
    penalties = torch.full_like(problem.data.variances, problem.penalty)
    penalties[-1] = 0
    diagonal = (problem.data.variances / problem.num_classes + penalties).float()
    return lambda residual: residual / diagonal


def _block_hessian(problem: Problem, probabilities: Tensor) -> Callable[[Tensor], Tensor]:
    """Solver of the factorized Hessian on the last axes and of its diagonal on the others."""
    uncertainty = (probabilities * (1 - probabilities)) @ problem.sample_weights.float()
    diagonal = uncertainty[:, None] * problem.data.variances.float()
    head = _head(problem, diagonal.mean(0))
    solve_head = _factorized(_hessian(problem, probabilities, head), problem.penalty)
    tail = diagonal[:, :-head] + problem.penalty

    def apply(residual: Tensor) -> Tensor:
        rest = residual[:, :-head] / tail
        return torch.cat([rest - rest.mean(0), solve_head(residual[:, -head:])], 1)

    return apply


def _kronecker(problem: Problem, probabilities: Tensor) -> Callable[[Tensor], Tensor]:
    """(classes x classes) times (features x features), rescaled to the Hessian's diagonal in their eigenbases."""
    features, sample_weights = problem.data.single, problem.sample_weights.float()
    spread = (1 - probabilities.square().sum(0)).clamp_min(0) * sample_weights
    _, axes = torch.linalg.eigh(((features * spread) @ features.T).double())
    weighted = probabilities * sample_weights
    _, contrasts = torch.linalg.eigh((torch.diag(weighted.sum(1)) - weighted @ probabilities.T).double())
    penalties = (problem.penalty * (1 - axes[-1].square())).float()
    axes, contrasts = axes.float(), contrasts.float()
    variances = (contrasts.T.square() @ probabilities - (contrasts.T @ probabilities).square()).clamp_min(0)
    diagonal = (variances * sample_weights) @ (axes.T @ features).square().T + penalties
    diagonal += 1e-9 * diagonal.max()
    return lambda residual: contrasts @ ((contrasts.T @ residual @ axes) / diagonal) @ axes.T


def _hessian(problem: Problem, probabilities: Tensor, head: int) -> Tensor:
    """The data's part of the Hessian on the last axes, shape (K - 1, head, K - 1, head); the last class is held at 0.

    Only the lower half is filled.

    With `A_kl = sum of w p_k p_l x x^T` over samples of weight w, the blocks are `-A_kl` and, on the diagonal, the sum
    of `A_kl` over l. Most samples are certain, and for each sample only few pairs of classes are in question, so few
    products carry most of a sum. The others are drawn with probabilities proportional to their weight, by a fixed
    sequence, as many as the time allows. Each pair has its own draw: pairs that are rarely confused determine the
    flattest directions.
    """
    k, n = probabilities.shape
    first, second = torch.tril_indices(k, k, -1, device=probabilities.device)
    probabilities = torch.threshold(probabilities, 1e-15, 0.0)  # no subnormal products
    weights = probabilities[first] * probabilities[second] * problem.sample_weights.float()
    means = weights.mean(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    sequence = (torch.arange(1, n + 1, device=weights.device).double() * 0.6180339887498949 % 1).float()
    relative = weights / means / sequence
    threshold, max_terms = 1.0, _num_terms(problem, head)
    while 8 * int((relative[:, ::8] > threshold).sum()) > max_terms:
        threshold *= 2
    hessian = probabilities.new_zeros(k - 1, head, k - 1, head)
    for a, b, weight, ratio, mean in zip(first.tolist(), second.tolist(), weights, relative, means, strict=True):
        samples = (ratio > threshold).nonzero()[:, 0]
        rows = problem.data.rows.index_select(0, samples)[:, -head:]
        rows *= torch.maximum(weight[samples], threshold * mean).sqrt_()[:, None]
        block = product(rows.T, rows)
        hessian[b, :, b] += block
        if a < k - 1:
            hessian[a, :, a] += block
            hessian[a, :, b] = -block
    return hessian


def _factorized(hessian: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """Solver of the Hessian, of which the lower half is given and overwritten."""
    k, width = hessian.shape[:2]
    features = torch.arange(width - 1, device=hessian.device)
    # The penalty of weights that sum to zero over classes, in terms of all classes but the last.
    hessian[:, features, :, features] += penalty * (torch.eye(k, device=hessian.device) - 1 / (k + 1))
    matrix = hessian.view(k * width, k * width)
    scale = matrix.diagonal().clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt()
    matrix.mul_(scale).mul_(scale[:, None])
    jitter, failed = 1e-6, True
    while failed and jitter < 1:
        matrix.diagonal().add_(jitter)
        factor, info = torch.linalg.cholesky_ex(matrix)
        failed, jitter = bool(info), 30 * jitter

    def apply(residual: Tensor) -> Tensor:
        scaled = (residual[:-1].reshape(-1) * scale)[:, None]
        half = torch.linalg.solve_triangular(factor, scaled, upper=False)
        solution = (torch.linalg.solve_triangular(factor.T, half, upper=True)[:, 0] * scale).reshape(k, width)
        solution = torch.cat([solution, solution.new_zeros(1, width)])
        return solution - solution.mean(0)

    return apply
