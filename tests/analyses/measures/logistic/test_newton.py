"""Newton's method against scikit-learn, and its Hessian against differences of the gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian_classes import clouds, sklearn_fit

from layerprobe.analyses.measures.logistic.newton import _full_hessian, damped_newton, newton_cg
from layerprobe.analyses.measures.logistic.problem import Problem, decompose, exact_point, gradient_norm


def start(penalty: float = 0.01, n: int = 120):
    x, y, _ = clouds(0, n=n, width=6)
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    problem = Problem(decompose(torch.from_numpy(x)), torch.from_numpy(y), 4, weights, penalty)
    return x, y, problem, exact_point(problem, torch.zeros(4, 7, dtype=torch.float64))


@pytest.mark.parametrize("solver", [newton_cg, damped_newton])
def test_both_methods_reach_the_optimum_of_scikit_learn(solver) -> None:
    x, y, problem, zero = start()
    point, passes, converged = solver(problem, zero, 1e-8, 1000)
    assert converged
    assert 1 < passes < 200
    assert gradient_norm(problem, point) < 1e-7
    reference = sklearn_fit(x, y, 1 / (problem.penalty * len(x) * problem.data.unit**2))
    weights = (point.theta[:, :-1] @ problem.data.axes.T).numpy()
    np.testing.assert_allclose(weights, reference.coef_, atol=1e-4 * np.abs(reference.coef_).max())


@pytest.mark.parametrize("solver", [newton_cg, damped_newton])
def test_too_few_passes_are_reported(solver) -> None:
    _, _, problem, zero = start()
    _, passes, converged = solver(problem, zero, 1e-12, 2)
    assert passes <= 3
    assert not converged


def test_the_hessian_equals_differences_of_the_gradient() -> None:
    _, _, problem, _ = start()
    theta = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    point = exact_point(problem, theta)
    hessian = _full_hessian(problem, torch.softmax(point.logits, 0))
    direction = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction[:, -1] -= direction[:, -1].mean()  # the added 1 between biases does not count
    after, before = (exact_point(problem, theta + sign * 1e-5 * direction).slope for sign in (1, -1))
    torch.testing.assert_close((hessian @ direction.flatten()).view(4, 7), (after - before) / 2e-5, atol=1e-8, rtol=0)
