"""Newton's method: by conjugate gradients for few samples, factorized for what other solvers leave undone."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from layerprobe.analyses.measures.logistic.problem import (
    Patience,
    Point,
    Problem,
    exact_point,
    excess_gradient,
    gap,
    is_optimal,
    line_search,
)


def newton_cg(problem: Problem, point: Point, tolerance: float, max_passes: int) -> tuple[Point, int, bool]:
    """Newton's method with steps by conjugate gradients, no better than they need to be; on the CPU.

    Gives the point, the products with the features it took, and whether it is the optimum.

    Source: Dembo, Eisenstat and Steihaug 1982, Inexact Newton methods; Nocedal and Wright 2006, ch. 7.
    """
    passes, patience = 1, Patience()
    while passes < max_passes and (excess := excess_gradient(problem, point, tolerance)) > 1:
        if not patience.lasts(gap(problem, point), point.objective):
            break
        # A step need be no better than its Newton model, nor than what is left to do, nor than float32 allows.
        accuracy = min(0.3, max(1e-3, math.sqrt(gap(problem, point)), 0.3 / excess))
        step, products = _newton_step(problem, point, accuracy, min(max_passes - passes, 2 * point.theta.numel()))
        passes += products + 1
        trial = line_search(problem, point, step)
        if trial is None:
            break
        point = exact_point(problem, trial.theta)
    return point, passes, is_optimal(problem, point, tolerance)


@np.errstate(over="ignore", invalid="ignore")  # next to no curvature: the line search refuses what is not finite
def _newton_step(problem: Problem, point: Point, accuracy: float, most: int) -> tuple[Tensor, int]:
    """Solves the Hessian's equation until the residual has fallen so far; gives the products it took, too.

    In float32, and in numpy, whose small operations take half of torch's time.
    """
    features, share = problem.data.quick.numpy(force=True), problem.share.numpy(force=True).astype(np.float32)
    certain = torch.softmax(point.logits, 0).numpy(force=True)
    doubt = ((1 - certain) * certain).astype(np.float32)
    probabilities = certain.astype(np.float32)
    probabilities[probabilities < 1e-15] = 0  # no subnormal products
    weighted, likeliest, samples = probabilities * share, certain.argmax(0), np.arange(len(share))
    penalties = np.full(len(features), problem.penalty, np.float32)
    penalties[-1] = 0
    diagonal = (doubt * share) @ np.square(features).T + penalties
    diagonal += 1e-9 * diagonal.max()
    gradient = point.gradient.numpy(force=True)
    size = np.abs(gradient).max()
    residual = (gradient / -size).astype(np.float32)
    step, ahead = np.zeros_like(residual), residual / diagonal
    left = float(np.vdot(residual, ahead))
    enough = accuracy**2 * left
    products = 0
    while left > enough and products < most:
        change = ahead @ features
        change -= change[likeliest, samples]  # what follows would cancel where the likeliest class is all but certain
        change -= np.einsum("kn,kn->n", probabilities, change)
        change *= weighted
        turn = change @ features.T
        turn += penalties * ahead
        products += 1
        curvature = float(np.vdot(ahead, turn))
        if not curvature > 0:
            break
        step += left / curvature * ahead
        turn *= left / curvature
        residual -= turn
        solved = residual / diagonal
        before, left = left, float(np.vdot(residual, solved))
        ahead *= left / before
        ahead += solved
    step -= step.mean(0)  # a shift of all classes changes no probability
    return torch.from_numpy(size * step.astype(np.float64)).to(point.theta.device), products


def damped_newton(problem: Problem, point: Point, tolerance: float, max_passes: int) -> tuple[Point, int, bool]:
    """Newton's method in float64, damped as by Levenberg and Marquardt: slow, and sure where samples are certain.

    Where nearly all are, some of them wrongly, there is a slope and no curvature, and a step of any other method goes
    nowhere or too far.
    """
    damping, passes = 1e-3, 0
    flat = torch.full_like(problem.data.variances, problem.penalty)
    flat[-1] = 0
    while passes < max_passes and damping < 1e12 and not is_optimal(problem, point, tolerance):
        hessian = _whole_hessian(problem, torch.softmax(point.logits, 0))
        damped = flat + damping * problem.data.variances / problem.num_classes
        hessian.diagonal().add_(damped.repeat(problem.num_classes))
        factor, failed = torch.linalg.cholesky_ex(hessian)
        step = torch.cholesky_solve(point.gradient.reshape(-1, 1), factor).view_as(point.theta)
        passes += 1
        trial = None if failed else exact_point(problem, point.theta - step)
        # At the end the objective only shows rounding, and the gradient shows the way.
        rounding = 1e-14 * (1 + abs(point.objective))
        if trial is not None and (
            trial.objective < point.objective - rounding
            or (trial.objective <= point.objective + rounding and gap(problem, trial) < gap(problem, point))
        ):
            point, damping = trial, damping / 10
        else:
            damping *= 10
    return point, passes, is_optimal(problem, point, tolerance)


def _whole_hessian(problem: Problem, probabilities: Tensor) -> Tensor:
    """Of the cross-entropy by all of theta, shape (K * (r + 1), K * (r + 1)), and 1 between the biases of all classes.

    The last makes up for the shift of all biases, which changes nothing.
    """
    (k, n), x = probabilities.shape, problem.data.exact
    weights = torch.diag_embed(probabilities.T).permute(1, 2, 0) - probabilities[:, None] * probabilities
    rows = (weights * problem.share).reshape(k * k, 1, n) * x
    hessian = (rows.reshape(-1, n) @ x.T).view(k, k, len(x), len(x)).permute(0, 2, 1, 3).contiguous()
    hessian[:, -1, :, -1] += 1.0
    return hessian.view(k * len(x), k * len(x))
