"""Newton's method: by conjugate gradients for few samples, factorized where other solvers get stuck."""

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
    gap,
    gradient_excess,
    is_optimal,
    line_search,
)


def newton_cg(problem: Problem, point: Point, tolerance: float, max_passes: int) -> tuple[Point, int, bool]:
    """Minimizes by Newton's method with steps by conjugate gradients, no more accurate than needed; on the CPU.

    Returns:
        Last point, number of products with the features, and whether the point is the optimum.

    Source: Dembo, Eisenstat and Steihaug 1982, Inexact Newton methods; Nocedal and Wright 2006, ch. 7.
    """
    passes, patience = 1, Patience()
    while passes < max_passes and (excess := gradient_excess(problem, point, tolerance)) > 1:
        if not patience.lasts(gap(problem, point), point.objective):
            break
        # More accuracy would be lost to the error of the Newton model, to the tolerance, or to float32.
        accuracy = min(0.3, max(1e-3, math.sqrt(gap(problem, point)), 0.3 / excess))
        max_products = min(max_passes - passes, 2 * point.theta.numel())
        step, num_products = _newton_step(problem, point, accuracy, max_products)
        passes += num_products + 1
        trial = line_search(problem, point, step)
        if trial is None:
            break
        point = exact_point(problem, trial.theta)
    return point, passes, is_optimal(problem, point, tolerance)


@np.errstate(over="ignore", invalid="ignore")  # almost no curvature: the line search rejects what is not finite
def _newton_step(problem: Problem, point: Point, accuracy: float, max_products: int) -> tuple[Tensor, int]:
    """Solves the Newton equation until the residual has fallen to `accuracy`; returns step and number of products.

    Runs in float32, and in numpy, whose small operations take half the time of torch's.
    """
    features = problem.data.single.numpy(force=True)
    sample_weights = problem.sample_weights.numpy(force=True).astype(np.float32)
    exact_probabilities = torch.softmax(point.logits, 0).numpy(force=True)
    uncertainty = ((1 - exact_probabilities) * exact_probabilities).astype(np.float32)
    probabilities = exact_probabilities.astype(np.float32)
    probabilities[probabilities < 1e-15] = 0  # no subnormal products
    weighted = probabilities * sample_weights
    likeliest, samples = exact_probabilities.argmax(0), np.arange(len(sample_weights))
    penalties = np.full(len(features), problem.penalty, np.float32)
    penalties[-1] = 0
    diagonal = (uncertainty * sample_weights) @ np.square(features).T + penalties
    diagonal += 1e-9 * diagonal.max()
    gradient = point.gradient.numpy(force=True)
    scale = np.abs(gradient).max()
    residual = (gradient / -scale).astype(np.float32)
    step, direction = np.zeros_like(residual), residual / diagonal
    square_norm = float(np.vdot(residual, direction))
    target_norm = accuracy**2 * square_norm
    num_products = 0
    while square_norm > target_norm and num_products < max_products:
        change = direction @ features
        # Relative to the likeliest class: where that is almost certain, the next line would lose all digits.
        change -= change[likeliest, samples]
        change -= np.einsum("kn,kn->n", probabilities, change)
        change *= weighted
        hessian_product = change @ features.T
        hessian_product += penalties * direction
        num_products += 1
        curvature = float(np.vdot(direction, hessian_product))
        if not curvature > 0:
            break
        step += square_norm / curvature * direction
        hessian_product *= square_norm / curvature
        residual -= hessian_product
        preconditioned = residual / diagonal
        previous_norm, square_norm = square_norm, float(np.vdot(residual, preconditioned))
        direction *= square_norm / previous_norm
        direction += preconditioned
    step -= step.mean(0)  # the same shift of all classes changes no probability
    return torch.from_numpy(scale * step.astype(np.float64)).to(point.theta.device), num_products


def damped_newton(problem: Problem, point: Point, tolerance: float, max_passes: int) -> tuple[Point, int, bool]:
    """Minimizes by Newton's method in float64 with Levenberg-Marquardt damping, which is slow but reliable.

    Where nearly all samples are certain and some of them wrong, the objective has a slope but no curvature, and steps
    of the other methods are too short or too long.

    Returns:
        Last point, number of factorizations, and whether the point is the optimum.
    """
    damping, passes = 1e-3, 0
    penalties = torch.full_like(problem.data.variances, problem.penalty)
    penalties[-1] = 0
    while passes < max_passes and damping < 1e12 and not is_optimal(problem, point, tolerance):
        hessian = _full_hessian(problem, torch.softmax(point.logits, 0))
        damped_penalties = penalties + damping * problem.data.variances / problem.num_classes
        hessian.diagonal().add_(damped_penalties.repeat(problem.num_classes))
        factor, info = torch.linalg.cholesky_ex(hessian)
        step = torch.cholesky_solve(point.gradient.reshape(-1, 1), factor).view_as(point.theta)
        passes += 1
        trial = None if info else exact_point(problem, point.theta - step)
        # Near the optimum the objective changes by rounding errors only, so the gradient decides.
        rounding = 1e-14 * (1 + abs(point.objective))
        if trial is not None and (
            trial.objective < point.objective - rounding
            or (trial.objective <= point.objective + rounding and gap(problem, trial) < gap(problem, point))
        ):
            point, damping = trial, damping / 10
        else:
            damping *= 10
    return point, passes, is_optimal(problem, point, tolerance)


def _full_hessian(problem: Problem, probabilities: Tensor) -> Tensor:
    """Hessian of the cross-entropy with respect to all of theta, shape (K * (r + 1), K * (r + 1)).

    1 is added between the biases of all classes: their common shift changes nothing, so its curvature would be 0.
    """
    (k, n), x = probabilities.shape, problem.data.exact
    weights = torch.diag_embed(probabilities.T).permute(1, 2, 0) - probabilities[:, None] * probabilities
    rows = (weights * problem.sample_weights).reshape(k * k, 1, n) * x
    hessian = (rows.reshape(-1, n) @ x.T).view(k, k, len(x), len(x)).permute(0, 2, 1, 3).contiguous()
    hessian[:, -1, :, -1] += 1.0
    return hessian.view(k * len(x), k * len(x))
