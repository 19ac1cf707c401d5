"""Limited-memory BFGS: its two-loop product against the dense formula, and both preconditioners."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from gaussian_classes import clouds, digits, sklearn_fit

from layerprobe.analyses.measures.logistic import bfgs
from layerprobe.analyses.measures.logistic.bfgs import Curvature, minimize
from layerprobe.analyses.measures.logistic.fits import fit_logistic_path
from layerprobe.analyses.measures.logistic.problem import Point, Problem, decompose, exact_point


def start(n: int = 200) -> tuple[Problem, Point]:
    x, y, _ = clouds(0, n=n, width=6)
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    problem = Problem(decompose(torch.from_numpy(x)), torch.from_numpy(y), 4, weights, 0.01)
    return problem, exact_point(problem, torch.zeros(4, 7, dtype=torch.float64))


def test_the_direction_is_that_of_the_dense_bfgs_formula() -> None:
    problem, point = start()
    curvature = Curvature(problem)
    points = [point]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        step = torch.randn(4, 7, generator=generator, dtype=torch.float64)
        points.append(exact_point(problem, points[-1].theta + step - step.mean(0)))
    size = 4 * 7
    inverse = torch.stack([curvature.apply(row.view(4, 7).float()).double().flatten() for row in torch.eye(size)])
    for before, after in pairwise(points):
        curvature.add_step(before, after)
        s, g = (after.theta - before.theta).flatten(), (after.gradient - before.gradient).flatten()
        shift = torch.eye(size, dtype=torch.float64) - torch.outer(s, g) / (s @ g)
        inverse = shift @ inverse @ shift.T + torch.outer(s, s) / (s @ g)
    expected = -(inverse @ points[-1].gradient.flatten()).view(4, 7)
    direction = curvature.direction(points[-1].gradient)
    # The preconditioner is applied in float32.
    torch.testing.assert_close(
        direction, expected - expected.mean(0), rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )


def test_another_penalty_changes_the_gradient_changes_by_its_part() -> None:
    problem, point = start()
    curvature = Curvature(problem)
    theta = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curvature.add_step(point, exact_point(problem, theta))
    curvature.set_penalty(0.5)
    other = Problem(problem.data, problem.targets, 4, problem.sample_weights, 0.5)
    expected = exact_point(other, theta).gradient - exact_point(other, point.theta).gradient
    torch.testing.assert_close(curvature.gradient_changes[0], expected)


def test_it_converges_and_reports_too_few_passes() -> None:
    problem, point = start()
    _, passes, converged = minimize(problem, point, 1e-8, 1000, curvature=Curvature(problem))
    assert converged
    assert passes < 200
    _, passes, converged = minimize(problem, point, 1e-8, 3, curvature=Curvature(problem))
    assert not converged


@pytest.mark.parametrize("preconditioner", ["_block_hessian", "_kronecker"])
def test_both_preconditioners_lead_to_the_same_optimum(preconditioner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("_block_hessian", "_kronecker"):
        original = getattr(bfgs, name)
        monkeypatch.setattr(bfgs, name, lambda *args, f=original, name=name: (calls.append(name), f(*args))[1])
    monkeypatch.setattr(bfgs, "_MAX_CLASSES", 25 if preconditioner == "_block_hessian" else 0)
    x, y = (part[:1200] for part in digits())
    fit = fit_logistic_path(x, y, (1e-3, 1e-2, 0.1, 1.0))[-1]
    assert set(calls) == {preconditioner}
    assert fit.converged
    np.testing.assert_array_equal(fit.predict(x), sklearn_fit(x, y, 1.0).predict(x))
