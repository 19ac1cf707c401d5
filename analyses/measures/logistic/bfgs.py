"""Limited-memory BFGS for many samples, preconditioned by a factorized Hessian where one pays."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from layerprobe.analyses.measures.logistic.problem import (
    Patience,
    Point,
    Problem,
    advanced,
    exact_point,
    gap,
    is_optimal,
    line_search,
    product,
)

_MAX_UNKNOWNS, _MAX_CLASSES = 3000, 25  # of a factorized Hessian
_SAMPLES_PER_UNKNOWN, _FEW_TERMS = 20, 10_000  # of its sum
_WEAK = 0.1  # an axis of less curvature, in penalties, needs no factorized Hessian
_MEMORY = 20  # steps that are remembered
_FRESH = math.log(10)  # what the gap falls by, per iteration, with a fresh Hessian
_WINDOW = 3  # iterations that tell how fast it falls


def minimize(
    problem: Problem, point: Point, tolerance: float, max_passes: int, *, curvature: Curvature
) -> tuple[Point, int, bool]:
    """Limited-memory BFGS with the preconditioner as its first guess of the inverse Hessian.

    Logits and gradients are kept in float64 and moved by float32 products of what changed, whose rounding errors
    shrink with the steps. They are computed anew in float64 before it ends.
    """
    passes, is_exact, last_exact, patience = 1, False, math.inf, Patience()
    gaps: list[float] = []  # since the preconditioner was renewed
    curvature.move(problem.penalty)
    while True:
        gaps.append(gap(problem, point))
        is_moving = patience.lasts(gaps[-1], point.objective)
        following = None
        if not is_optimal(problem, point, tolerance) and is_moving and passes < max_passes:
            if _is_slow(problem, gaps, tolerance):
                curvature.renew(problem, point)
                gaps = gaps[-1:]
            trial = line_search(problem, point, curvature.direction(point.gradient))
            following = None if trial is None else advanced(problem, point, trial)
        if following is not None:
            curvature.learn(point, following)
            point, is_exact = following, False
        elif not is_exact:
            point, is_exact = exact_point(problem, point.theta), True
            if not gap(problem, point) < last_exact / 2 or passes >= max_passes:
                break
            last_exact = gap(problem, point)
            patience.forgive()
        else:
            break
        passes += 1
    return point, passes, is_optimal(problem, point, tolerance)


class Curvature:
    """What is known of the Hessian, handed on from penalty to penalty: a preconditioner, and steps of the solver.

    The preconditioner is the Hessian itself on the axes that need it, those where the curvature of the data is not
    dwarfed by the penalty, and its diagonal on the others. With too many classes for that it is a Kronecker product.
    """

    def __init__(self, problem: Problem) -> None:
        self.apply = _diagonal(problem)
        self.penalty = problem.penalty
        # Of the last iterations, shape (m, K, r + 1): what changed in theta, and what in the gradient.
        self.steps = self.turns = problem.share.new_zeros(0, problem.num_classes, len(problem.data.exact))

    def move(self, penalty: float) -> None:
        """To another penalty, whose part in the turns of the gradient is known."""
        turns = self.turns.clone()
        turns[..., :-1] += (penalty - self.penalty) * self.steps[..., :-1]
        kept = (self.steps * turns).sum((1, 2)) > 0  # rounding may have left some without curvature
        self.steps, self.turns, self.penalty = self.steps[kept], turns[kept], penalty

    def learn(self, point: Point, following: Point) -> None:
        step, turn = following.theta - point.theta, following.gradient - point.gradient
        if (step * turn).sum() > 0:
            self.steps = torch.cat([self.steps[1 - _MEMORY :], step[None]])
            self.turns = torch.cat([self.turns[1 - _MEMORY :], turn[None]])

    def renew(self, problem: Problem, point: Point) -> None:
        probabilities = torch.softmax(point.logits.float(), 0)
        build = _close if problem.num_classes <= _MAX_CLASSES else _kronecker
        self.apply, self.steps, self.turns = build(problem, probabilities), self.steps[:0], self.turns[:0]

    def direction(self, gradient: Tensor) -> Tensor:
        """Where the quasi-Newton step leads: Byrd, Nocedal and Schnabel 1994, theorem 2.2, as two triangular solves."""
        steps, turns, ahead = self.steps.flatten(1), self.turns.flatten(1), gradient.flatten()[:, None]
        triangle = (steps @ turns.T).triu()
        known = torch.linalg.solve_triangular(triangle, steps @ ahead, upper=True)
        ahead = ahead - turns.T @ known
        size = float(ahead.norm()) or 1.0
        ahead = size * self.apply((ahead / size).float().view_as(gradient)).double().view(-1, 1)
        known = triangle.diagonal()[:, None] * known - turns @ ahead
        ahead = ahead + steps.T @ torch.linalg.solve_triangular(triangle.T, known, upper=False)
        ahead = ahead.view_as(gradient)
        descent: Tensor = ahead.mean(0) - ahead  # a shift of all classes changes no probability
        return descent


def _is_slow(problem: Problem, gaps: list[float], tolerance: float) -> bool:
    """Whether a fresh preconditioner would save more iterations than it costs."""
    if len(gaps) <= _WINDOW or gaps[-1] <= tolerance / 10:
        return False
    left = math.log(gaps[-1] * 10 / tolerance)
    rate = max(math.log(gaps[-1 - _WINDOW] / gaps[-1]) / _WINDOW, 0.03)
    return left / rate - left / _FRESH > _price(problem)


def _price(problem: Problem) -> float:
    """What a fresh preconditioner costs, in iterations; half of it, since the next penalty needs it too.

    Counted in flops at the speed of thin products, fitted to one core: a matrix product is twice as fast, an entry of
    the logits costs as much as 350, and calls of small operations as much as the constants.
    """
    (width, n), k = problem.data.quick.shape, problem.num_classes
    if k > _MAX_CLASSES:
        build = 2.0 * n * width**2 + 10 * width**3
    else:
        head = _head(problem, 0.3 / k * problem.data.variances)  # a typical doubt between the classes
        build = _terms(problem, head) * head**2 + ((k - 1) * head) ** 3 / 3 + k**2 * (130 * n + 6e5)
    return build / (n * k * (4 * width + 350) + 1.3e7) / 2


def _head(problem: Problem, curvature: Tensor) -> int:
    """How many of the last axes, the bias included, the factorized Hessian is for."""
    needed = int((curvature[:-1] > _WEAK * problem.penalty).sum()) + 1
    return max(1, min(needed, _MAX_UNKNOWNS // (problem.num_classes - 1)))


def _terms(problem: Problem, head: int) -> int:
    n, k = len(problem.share), problem.num_classes
    return min(n * k * (k - 1) // 2, max(_SAMPLES_PER_UNKNOWN * (k - 1) * head, _FEW_TERMS))


def _diagonal(problem: Problem) -> Callable[[Tensor], Tensor]:
    """The Hessian where all classes are equally likely; nothing but a diagonal on principal axes."""
    penalties = torch.full_like(problem.data.variances, problem.penalty)
    penalties[-1] = 0
    diagonal = (problem.data.variances / problem.num_classes + penalties).float()
    return lambda residual: residual / diagonal


def _close(problem: Problem, probabilities: Tensor) -> Callable[[Tensor], Tensor]:
    doubt = (probabilities * (1 - probabilities)) @ problem.share.float()
    diagonal = doubt[:, None] * problem.data.variances.float()
    head = _head(problem, diagonal.mean(0))
    ahead = _factorized(_hessian(problem, probabilities, head), problem.penalty)
    tail = diagonal[:, :-head] + problem.penalty

    def apply(residual: Tensor) -> Tensor:
        rest = residual[:, :-head] / tail
        return torch.cat([rest - rest.mean(0), ahead(residual[:, -head:])], 1)

    return apply


def _kronecker(problem: Problem, probabilities: Tensor) -> Callable[[Tensor], Tensor]:
    """(classes x classes) times (features x features), rescaled to the Hessian's diagonal in their eigenbases."""
    features, share = problem.data.quick, problem.share.float()
    spread = (1 - probabilities.square().sum(0)).clamp_min(0) * share
    _, axes = torch.linalg.eigh(((features * spread) @ features.T).double())
    weighted = probabilities * share
    _, contrasts = torch.linalg.eigh((torch.diag(weighted.sum(1)) - weighted @ probabilities.T).double())
    penalized = (problem.penalty * (1 - axes[-1].square())).float()
    axes, contrasts = axes.float(), contrasts.float()
    variances = (contrasts.T.square() @ probabilities - (contrasts.T @ probabilities).square()).clamp_min(0) * share
    diagonal = variances @ (axes.T @ features).square().T + penalized
    diagonal += 1e-9 * diagonal.max()
    return lambda residual: contrasts @ ((contrasts.T @ residual @ axes) / diagonal) @ axes.T


def _hessian(problem: Problem, probabilities: Tensor, head: int) -> Tensor:
    """The data's part of the Hessian on the last axes, shape (K - 1, head, K - 1, head): the last class is held at 0.

    Only the lower half is filled.

    With `A_kl = sum of share p_k p_l x x^T` its blocks are `-A_kl` and, on the diagonal, the sum of `A_kl` over l.
    Most samples are certain and few pairs of classes are in question for a sample, so few products carry a sum; the
    others are drawn in proportion to their weight, from a fixed sequence, as many as there is time for. Each pair
    gets its own draw: pairs that are rarely confused decide the flattest directions.
    """
    k, n = probabilities.shape
    first, second = torch.tril_indices(k, k, -1, device=probabilities.device)
    probabilities = torch.threshold(probabilities, 1e-15, 0.0)  # no subnormal products
    weights = probabilities[first] * probabilities[second] * problem.share.float()
    means = weights.mean(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    sequence = (torch.arange(1, n + 1, device=weights.device).double() * 0.6180339887498949 % 1).float()
    relative = weights / means / sequence
    threshold, most = 1.0, _terms(problem, head)
    while 8 * int((relative[:, ::8] > threshold).sum()) > most:
        threshold *= 2
    hessian = probabilities.new_zeros(k - 1, head, k - 1, head)
    for a, b, weight, ratio, mean in zip(first.tolist(), second.tolist(), weights, relative, means, strict=True):
        kept = (ratio > threshold).nonzero()[:, 0]
        rows = problem.data.rows.index_select(0, kept)[:, -head:]
        rows *= torch.maximum(weight[kept], threshold * mean).sqrt_()[:, None]
        block = product(rows.T, rows)
        hessian[b, :, b] += block
        if a < k - 1:
            hessian[a, :, a] += block
            hessian[a, :, b] = -block
    return hessian


def _factorized(hessian: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """Solves with the Hessian, of which the lower half is given and overwritten."""
    k, width = hessian.shape[:2]
    features = torch.arange(width - 1, device=hessian.device)
    # The penalty of weights that sum to zero over classes, told by all but the last class.
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
        known = (residual[:-1].reshape(-1) * scale)[:, None]
        half = torch.linalg.solve_triangular(factor, known, upper=False)
        solved = (torch.linalg.solve_triangular(factor.T, half, upper=True)[:, 0] * scale).reshape(k, width)
        whole = torch.cat([solved, solved.new_zeros(1, width)])
        return whole - whole.mean(0)

    return apply
