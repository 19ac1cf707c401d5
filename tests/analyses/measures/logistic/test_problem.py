"""The objective and its gradient against an independent formula, on both kinds of axes."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_classes import clouds
from torch import Tensor

from layerprobe.analyses.measures.logistic.problem import (
    Decomposition,
    Patience,
    Problem,
    decompose,
    evaluate,
    exact_point,
    gap,
    keep_axes,
    line_search,
    with_gradient,
)


def problem_of(data: Decomposition, y: Tensor, penalty: float = 0.01) -> Problem:
    n = len(y)
    return Problem(data, y, int(y.max()) + 1, torch.full((n,), 1 / n, dtype=torch.float64), penalty)


def example(seed: int = 0, n: int = 60) -> tuple[Tensor, Tensor]:
    x, y, _ = clouds(seed, n=n)
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.parametrize("shape", [(60, 12), (8, 30)])
def test_principal_axes_keep_the_features_and_their_products(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    data = decompose(x)
    coordinates = data.exact[:-1].T * data.unit
    centered = x - x.mean(0)
    torch.testing.assert_close(coordinates @ (data.axes * data.unit).T, centered)
    torch.testing.assert_close(data.variances, data.exact.square().mean(1))
    assert (data.variances[:-1].diff() >= -1e-12).all()
    covariance = data.exact[:-1] @ data.exact[:-1].T / len(x)
    torch.testing.assert_close(covariance, torch.diag(data.variances[:-1]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("make", [decompose, keep_axes])
def test_objective_and_gradient_equal_the_plain_formula(make) -> None:
    x, y = example()
    problem = problem_of(make(x), y)
    theta = torch.randn(4, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    logits = theta @ problem.data.exact
    loss = torch.nn.functional.cross_entropy(logits.T, y) + 0.01 / 2 * theta[:, :-1].square().sum()
    loss.backward()
    point = exact_point(problem, theta.detach())
    assert point.objective == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(point.gradient, theta.grad)
    assert gap(problem, point) == pytest.approx(float(theta.grad.square().sum()) / (2 * 0.01 * loss.item()))


def test_a_float32_update_of_the_gradient_is_as_exact_as_the_step_is_small() -> None:
    x, y = example()
    problem = problem_of(decompose(x), y)
    point = exact_point(problem, torch.zeros(4, 13, dtype=torch.float64))
    for size in (1.0, 1e-3, 1e-6):
        theta = size * torch.randn(4, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        exact = exact_point(problem, theta)
        updated = with_gradient(problem, point, evaluate(problem, theta, exact.logits))
        assert float((updated.gradient - exact.gradient).abs().max()) < 1e-6 * size


def test_a_line_search_goes_down_or_nowhere() -> None:
    x, y = example()
    problem = problem_of(decompose(x), y)
    point = exact_point(problem, torch.zeros(4, 13, dtype=torch.float64))
    trial = line_search(problem, point, -1e6 * point.gradient)
    assert trial is not None
    assert trial.objective < point.objective
    assert line_search(problem, point, point.gradient) is None


def test_patience_ends_ten_iterations_after_the_last_progress() -> None:
    patience = Patience()
    assert patience.lasts(1.0, 1.0)
    assert [patience.lasts(0.9, 1.0) for _ in range(11)] == [True] * 10 + [False]
    assert patience.lasts(0.4, 1.0)  # the gap halved
    assert all(patience.lasts(math.inf, 0.5 * 0.98**i) for i in range(20))  # the objective falls


def test_constant_features_have_a_unit() -> None:
    assert keep_axes(torch.full((5, 3), 0.1)).unit == 1.0
