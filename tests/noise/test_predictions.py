"""Prediction targets and conversions against the formulas of the papers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerprobe.noise.predictions import (
    END,
    PREDICTIONS,
    Prediction,
    convert_prediction,
    error_weight,
    target,
    time_range,
)
from layerprobe.noise.schedules import SCHEDULES, LinearPath, schedule_from_name

LEVELS = torch.tensor([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99], dtype=torch.float64)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def level(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@every_schedule
def test_velocity_is_the_derivative_of_x_t_by_path_time(name: str) -> None:
    schedule, step = schedule_from_name(name), 1e-6
    x, eps = torch.randn(2, len(LEVELS), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ahead, behind = LEVELS + step, LEVELS - step
    passed = (schedule.path_time(ahead) - schedule.path_time(behind)).view(-1, 1, 1)
    difference = (schedule.corrupt(x, eps, ahead) - schedule.corrupt(x, eps, behind)) / passed
    velocity = target("velocity", schedule, x=x, eps=eps, level=LEVELS)
    # 1e-7: the error of a central difference is step^2 times the third derivative, large in EDM near level 1.
    torch.testing.assert_close(velocity, difference, rtol=1e-7, atol=1e-7)


def test_velocity_on_the_linear_path_is_noise_minus_data() -> None:
    x, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for name in ("sit", "flow", "flow-1000"):  # whatever the native time of the family
        velocity = target("velocity", schedule_from_name(name), x=x, eps=eps, level=torch.tensor([0.1, 0.5, 0.9]))
        assert torch.equal(velocity, eps - x)


@every_schedule
def test_targets_equal_their_definitions(name: str) -> None:
    schedule = schedule_from_name(name)
    x, eps = torch.randn(2, len(LEVELS), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha, sigma = schedule.alpha(LEVELS)[:, None], schedule.sigma(LEVELS)[:, None]
    assert torch.equal(target("eps", schedule, x=x, eps=eps, level=LEVELS), eps)
    assert torch.equal(target("x0", schedule, x=x, eps=eps, level=LEVELS), x)
    torch.testing.assert_close(target("v", schedule, x=x, eps=eps, level=LEVELS), alpha * eps - sigma * x)
    torch.testing.assert_close(target("score", schedule, x=x, eps=eps, level=LEVELS), -eps / sigma)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_are_finite_at_all_training_times(name: str, prediction: Prediction) -> None:
    schedule = schedule_from_name(name)
    low, high = time_range(prediction, schedule)
    ends = schedule.level_at(torch.tensor([low, 0.3, high], dtype=torch.float64))
    if name == "edm" or (prediction == "score" and low == 0):
        ends = ends.clamp(*schedule.level_range)  # as everywhere with EDM, whose sigma is infinite at level 1
    x, eps = torch.ones(2, 3, 1, dtype=torch.float64)
    assert bool(target(prediction, schedule, x=x, eps=eps, level=ends).isfinite().all())
    assert 0 <= low <= END and 1 - END <= high <= 1
    if prediction in ("velocity", "x0", "v") and name != "sit-vp":
        assert (low, high) == (0, 1)


def test_weighted_loss_of_a_score_is_the_published_one() -> None:
    """The published loss is (sigma score + eps)^2; the unweighted error is 1 / sigma^2 times as large."""
    x, eps, output = torch.randn(3, len(LEVELS), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name in SCHEDULES:
        schedule = schedule_from_name(name)
        sigma = schedule.sigma(LEVELS)[:, None]
        error = (output - target("score", schedule, x=x, eps=eps, level=LEVELS)) ** 2
        weighted = error_weight("score", schedule, LEVELS)[:, None] * error
        torch.testing.assert_close(weighted, (sigma * output + eps) ** 2, rtol=1e-12, atol=0)
        assert bool((error_weight("velocity", schedule, LEVELS) == 1).all())


@every_schedule
@pytest.mark.parametrize(("source", "to"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_every_prediction_becomes_every_other(name: str, source: Prediction, to: Prediction) -> None:
    schedule = schedule_from_name(name)
    x, eps = torch.randn(2, len(LEVELS), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = schedule.corrupt(x, eps, LEVELS)
    prediction, expected = (target(kind, schedule, x=x, eps=eps, level=LEVELS) for kind in (source, to))
    got = convert_prediction(prediction, x_t, LEVELS, schedule, source=source, to=to)
    # 1e-10: close to the singular ends, at 0.01, the conversion loses digits.
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    back = convert_prediction(got, x_t, LEVELS, schedule, source=to, to=source)
    torch.testing.assert_close(back, prediction, rtol=1e-10, atol=1e-10)


def test_conversions_have_the_forms_of_the_papers() -> None:
    """Against formulas written out by hand: Salimans & Ho 2022, and flow matching on the linear path."""
    output, x_t = torch.randn(2, len(LEVELS), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ddpm, path, at = schedule_from_name("ddpm-linear"), schedule_from_name("sit"), LEVELS[:, None]
    alpha, sigma = ddpm.alpha(LEVELS)[:, None], ddpm.sigma(LEVELS)[:, None]
    for schedule, source, to, expected in (
        (ddpm, "eps", "x0", (x_t - sigma * output) / alpha),
        (ddpm, "x0", "eps", (x_t - alpha * output) / sigma),
        (ddpm, "v", "x0", alpha * x_t - sigma * output),
        (ddpm, "v", "eps", sigma * x_t + alpha * output),
        (path, "velocity", "x0", x_t - at * output),
        (path, "velocity", "eps", x_t + (1 - at) * output),
        (path, "eps", "velocity", (output - x_t) / (1 - at)),
        (path, "x0", "velocity", (x_t - output) / at),
    ):
        got = convert_prediction(output, x_t, LEVELS, schedule, source=source, to=to)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_conversion_keeps_the_type_of_the_output_and_returns_it_if_nothing_changes() -> None:
    output, x_t = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    at, path = torch.tensor([0.2, 0.5, 0.8]), LinearPath()
    assert convert_prediction(output, x_t, at, path, source="eps", to="eps") is output
    assert convert_prediction(output, x_t, at, path, source="eps", to="x0").dtype == torch.float32
    double = convert_prediction(output.double(), x_t.double(), at.double(), path, source="eps", to="velocity")
    torch.testing.assert_close(
        convert_prediction(output, x_t, at, path, source="eps", to="velocity"), double.float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "source", "to", "at"),
    [
        ("sit", "eps", "x0", 1.0),
        ("sit", "x0", "eps", 0.0),
        ("ddpm-linear", "eps", "velocity", 1.0),
        ("ddpm-linear", "x0", "velocity", 0.0),
        ("sit", "v", "x0", math.nan),
        # The sigma of EDM is infinite at level 1, so nothing is determined there.
        ("edm", "eps", "velocity", 1.0),
        ("edm", "x0", "eps", 1.0),
        ("edm", "velocity", "x0", 1.0),
        ("sit", "score", "x0", 0.0),
        ("sit-gvp", "score", "velocity", 1.0),
        ("sit-vp", "velocity", "x0", 0.0),
        ("sit-vp", "velocity", "eps", 1.0),
    ],
)
def test_conversion_refuses_levels_that_do_not_determine_it(
    name: str, source: Prediction, to: Prediction, at: float
) -> None:
    levels = torch.tensor([0.5, at])
    with pytest.raises(ValueError, match=f"{source} at noise level {at:g} does not determine {to}; keep noise levels"):
        convert_prediction(torch.ones(2, 3), torch.ones(2, 3), levels, schedule_from_name(name), source=source, to=to)


def test_conversion_refuses_unknown_predictions() -> None:
    with pytest.raises(ValueError, match="unknown prediction 'flow'; use velocity, eps, x0, v or score"):
        convert_prediction(torch.ones(1, 2), torch.ones(1, 2), level(0.5), LinearPath(), source="flow", to="eps")


@given(st.floats(1e-6, 1 - 1e-6), st.sampled_from(list(SCHEDULES)))
def test_velocity_conversion_is_exact_inside_the_open_interval(at: float, name: str) -> None:
    schedule = schedule_from_name(name)
    x, eps = torch.tensor([[0.3, -1.2]], dtype=torch.float64), torch.tensor([[1.1, 0.4]], dtype=torch.float64)
    x_t, velocity = schedule.corrupt(x, eps, level(at)), target("velocity", schedule, x=x, eps=eps, level=level(at))
    # 1e-8: digits are lost in the division by a determinant between 1 and 1e12.
    for to, expected in (("x0", x), ("eps", eps)):
        got = convert_prediction(velocity, x_t, level(at), schedule, source="velocity", to=to)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
