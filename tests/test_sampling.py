"""The sampler is exact where the answer is known: data that are Gaussian."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SHAPE, tiny_sit
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.noise import DDPM, EDM, LinearPath, NoiseKey, NoiseSchedule
from layerprobe.sampling import SamplingPlan, guided, integrate, sample, straightened

MEAN, STD = 0.7, 0.3
SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": LinearPath(),
    "ddpm": DDPM.from_name("linear"),
    "edm": EDM(),
}


def marginal(schedule: NoiseSchedule, level: float | Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_t for x_0 ~ N(MEAN, STD^2)."""
    level = torch.as_tensor(level, dtype=torch.float64)
    alpha, sigma = schedule.alpha(level), schedule.sigma(level)
    return alpha * MEAN, torch.sqrt(alpha**2 * STD**2 + sigma**2)


def expectations(schedule: NoiseSchedule, x_t: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """E[x_0 | x_t] and E[eps | x_t]: the regression of two jointly Gaussian variables."""
    mean, std = marginal(schedule, level)
    alpha, sigma = schedule.alpha(level), schedule.sigma(level)
    from_mean = (x_t - mean.view(-1, 1)) / std.view(-1, 1) ** 2
    return MEAN + (alpha * STD**2).view(-1, 1) * from_mean, sigma.view(-1, 1) * from_mean


def velocity_of(schedule: NoiseSchedule) -> Any:
    def velocity(x_t: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        x_0, eps = expectations(schedule, x_t, level)
        return schedule.alpha_rate(level).view(-1, 1) * x_0 + schedule.sigma_rate(level).view(-1, 1) * eps

    return velocity


def error(schedule: NoiseSchedule, solver: Any, steps: int) -> float:
    """Distance to the exact flow, which keeps (x_t - mean_t) / std_t; below the lowest level, to E[x_0 | x_t]."""
    low, high = schedule.level_range
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1)
    start, exact = (mean + std * z for mean, std in (marginal(schedule, high), marginal(schedule, low)))
    at = torch.tensor(high, dtype=torch.float64)
    start = start / (schedule.alpha(at) + schedule.sigma(at) / schedule.scale)
    velocity = straightened(velocity_of(schedule), schedule)
    y = integrate(velocity, start, None, (low, high), SamplingPlan(solver, steps))
    if low > 0:
        exact = expectations(schedule, exact, torch.full((9,), low, dtype=torch.float64))[0]
    return float((y - exact).abs().max())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_solver(name: str, solver: str, order: int) -> None:
    schedule = SCHEDULES[name]
    last = schedule.level_range[0] > 0  # then one step leads from the lowest level to 0
    coarse, fine = (error(schedule, solver, steps + last) for steps in (200, 400))
    # The next term of the error is a few per cent of the first at this many steps.
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_dozen_steps_are_near_in_every_family(name: str) -> None:
    assert error(SCHEDULES[name], "heun", 12) < 0.03  # a tenth of the data's standard deviation


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_straightened_path_is_the_linear_path(name: str) -> None:
    schedule = SCHEDULES[name]
    level = torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)
    x, eps = torch.randn(2, 3, 4, dtype=torch.float64)

    def velocity(x_t: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        torch.testing.assert_close(x_t, schedule.corrupt(x, eps, level))
        return schedule.alpha_rate(level).view(-1, 1) * x + schedule.sigma_rate(level).view(-1, 1) * eps

    y = (1 - level).view(-1, 1) * x + level.view(-1, 1) * schedule.scale * eps
    torch.testing.assert_close(straightened(velocity, schedule)(y, level, None), schedule.scale * eps - x)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_go_down_to_the_lowest_and_then_to_zero(name: str) -> None:
    schedule = SCHEDULES[name]
    low, high = schedule.level_range
    start = torch.full((1, 1), 0.4, dtype=torch.float64)
    levels: list[float] = []

    def velocity(x_t: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        levels.append(level.item())
        return torch.ones_like(x_t)

    end = integrate(velocity, start, None, (low, high), SamplingPlan("heun", 4))
    assert end.item() == pytest.approx(0.4 - high)  # the whole way down to 0
    assert levels[0] == pytest.approx(high)
    assert levels[-1] == pytest.approx(low if low > 0 else high / 4)
    assert len(levels) == 3 * 2 + 1  # Heun evaluates twice, but for the last step
    assert levels[1::2] == levels[2::2]


def gaussian_backbone(schedule: NoiseSchedule, prediction: Any) -> Backbone:
    """The perfect network for data from N(MEAN, STD^2), told the family's own time."""

    def forward(module: nn.Module, x_t: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        level = schedule.noise_level(time.double())
        x_0, eps = expectations(schedule, x_t.double().flatten(1), level)
        rates = schedule.alpha_rate(level).view(-1, 1), schedule.sigma_rate(level).view(-1, 1)
        out = {"x0": x_0, "eps": eps, "velocity": rates[0] * x_0 + rates[1] * eps}[prediction]
        sign = -1 if prediction == "velocity" and schedule.time_direction < 0 else 1  # in the family's own time
        return (sign * out).view_as(x_t).to(x_t.dtype)

    module = nn.Sequential(nn.Identity())
    return wrap(module, layers="0", schedule=schedule, prediction=prediction, shape=SHAPE, forward=forward)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (LinearPath(1, 0), "velocity"),
        (LinearPath(0, 1), "velocity"),
        (LinearPath(0, 1000), "velocity"),
        (LinearPath(1, 0), "x0"),
        (EDM(), "x0"),
        (EDM(), "eps"),
        (EDM(), "velocity"),
    ],
)
def test_samples_follow_the_exact_flow_in_every_convention(schedule: NoiseSchedule, prediction: str) -> None:
    x = sample(gaussian_backbone(schedule, prediction), range(50), plan=SamplingPlan("heun", 300, seed=4))
    noise = NoiseKey(4, "sampling").normal(torch.arange(50), SHAPE).double()
    high = torch.tensor(schedule.level_range[1], dtype=torch.float64)
    mean, std = marginal(schedule, high)
    expected = MEAN + STD * (schedule.sigma(high) * noise - mean) / std
    # Second-order error, the Euler step below the lowest level of EDM (0.4 %), and float32.
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=2e-3)
    # The data's own mean and spread, within four standard errors of 800 numbers.
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(800))
    assert x.std().item() == pytest.approx(STD, rel=4 / math.sqrt(1600))


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_samples_of_a_ddpm_with_integer_times(prediction: str) -> None:
    x = sample(gaussian_backbone(DDPM.from_name("linear"), prediction), range(200), plan=SamplingPlan("heun", 60))
    # Times are rounded to one of 1000, so the flow is followed to a per cent or so.
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02 + 4 * STD / math.sqrt(3200))
    assert x.std().item() == pytest.approx(STD, rel=0.05 + 4 / math.sqrt(6400))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_depends_on_its_number_and_label_only(guidance: float) -> None:
    backbone, plan = tiny_sit(), SamplingPlan(steps=3, guidance=guidance, seed=2)
    labels = torch.arange(10) % 3
    whole = sample(backbone, range(10), labels=labels, plan=plan)
    assert whole.shape == (10, *SHAPE)
    assert whole.dtype == torch.float32
    one_by_one = sample(backbone, range(10), labels=labels, plan=plan, batch_size=1)
    # Matrix products of other sizes round otherwise.
    torch.testing.assert_close(one_by_one, whole, rtol=1e-5, atol=1e-5)
    some = [7, 2, 9]
    torch.testing.assert_close(
        sample(backbone, some, labels=labels[some], plan=plan), whole[some], rtol=1e-5, atol=1e-5
    )
    other = sample(backbone, range(10), labels=labels, plan=SamplingPlan(steps=3, guidance=guidance, seed=3))
    assert (other - whole).abs().min() > 0


def test_no_indices_give_no_samples() -> None:
    assert sample(tiny_sit(), []).shape == (0, *SHAPE)


def test_guidance_is_the_formula() -> None:
    backbone = tiny_sit()
    x_t, level, labels = torch.randn(4, *SHAPE), torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 1, 2, 3])
    of_label, of_null = backbone(x_t, level, labels), backbone(x_t, level, torch.full((4,), 3))
    for guidance in (0.0, 1.0, 2.5):
        expected = of_null + guidance * (of_label - of_null)
        torch.testing.assert_close(guided(backbone, guidance)(x_t, level, labels), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided(backbone, 2.5)(x_t, level, None), of_null)
    # "No label" is a label too, and guidance does nothing to it.
    torch.testing.assert_close(guided(backbone, 2.5)(x_t, level, labels)[3], of_null[3], rtol=1e-4, atol=1e-5)


def test_samples_without_labels_have_the_null_label() -> None:
    backbone, plan = tiny_sit(), SamplingPlan(steps=2)
    torch.testing.assert_close(
        sample(backbone, range(4), plan=plan), sample(backbone, range(4), labels=torch.full((4,), 3), plan=plan)
    )


def test_a_network_left_in_training_mode_samples_in_evaluation_mode() -> None:
    module = nn.Sequential(nn.Dropout(0.5))
    backbone = wrap(
        module, layers="0", schedule="flow", prediction="velocity", shape=SHAPE, forward=lambda net, x, *_: net(x)
    )
    expected = sample(backbone, range(3))
    module.train()
    assert torch.equal(sample(backbone, range(3)), expected)
    assert module.training
    assert module[0].training


@pytest.mark.parametrize(
    ("num_classes", "labels", "guidance", "message"),
    [
        (3, None, 2.0, "guidance needs labels; pass labels, or guidance 1"),
        (3, [0, 1], 1.0, "3 samples but 2 labels; pass one label per sample"),
        (0, [0, 1, 2], 1.0, "knows no classes; sample without labels"),
        (3, [0, 1, 4], 1.0, r"labels lie between 0 and 2 \(or 3 for none\), got \[0, 1, 4\]"),
        (3, [0, 1, -1], 1.0, r"labels lie between 0 and 2"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    num_classes: int, labels: list[int] | None, guidance: float, message: str
) -> None:
    given = None if labels is None else torch.tensor(labels)
    with pytest.raises(ValueError, match=message) as refused:
        sample(tiny_sit(num_classes=num_classes), range(3), labels=given, plan=SamplingPlan(guidance=guidance))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "unknown solver 'rk4'; use euler or heun"),
        ({"steps": 0}, "sampling takes at least 1 step, got 0"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingPlan(**options)


def test_one_step_leads_from_noise_to_data() -> None:
    for schedule in SCHEDULES.values():
        x = torch.ones(1, 1)
        end = integrate(lambda x_t, *_: torch.full_like(x_t, 2.0), x, None, schedule.level_range, SamplingPlan(steps=1))
        np.testing.assert_allclose(end.item(), 1 - 2 * schedule.level_range[1], rtol=1e-6)
