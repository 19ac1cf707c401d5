"""The sampler against exact results for Gaussian data."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SHAPE, tiny_sit
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.noise.predictions import target
from layerprobe.noise.random_stream import RandomStream
from layerprobe.noise.schedules import DDPM, EDM, GVP, VP, LinearPath, NoiseSchedule
from layerprobe.sampling.plan import SamplingPlan
from layerprobe.sampling.solvers import (
    diffuse,
    diffusion,
    dopri5_step,
    guided,
    integrate,
    integrate_adaptively,
    sample,
    sampling_range,
    straightened,
)

MEAN, STD = 0.7, 0.3
SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": LinearPath(),
    "ddpm": DDPM.from_name("linear"),
    "edm": EDM(),
    "gvp": GVP(),
    "vp": VP(),
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
        return target("velocity", schedule, x=x_0, eps=eps, level=level)

    return velocity


def error(schedule: NoiseSchedule, solver: Any, steps: int) -> float:
    """Distance to the exact flow, which keeps (x_t - mean_t) / std_t; below the lowest level, to E[x_0 | x_t]."""
    low, high = schedule.level_range
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1)
    start, exact = (mean + std * z for mean, std in (marginal(schedule, high), marginal(schedule, low)))
    at = torch.tensor(high, dtype=torch.float64)
    start = start / (schedule.alpha(at) + schedule.sigma(at) / schedule.scale)
    velocity = straightened(velocity_of(schedule), schedule)
    if isinstance(solver, float):
        y = integrate_adaptively(velocity, start, None, (low, high), SamplingPlan("dopri5", steps, rtol=solver))
    else:
        y = integrate(velocity, start, None, (low, high), SamplingPlan(solver, steps))
    if low > 0:
        exact = expectations(schedule, exact, torch.full((9,), low, dtype=torch.float64))[0]
    return float((y - exact).abs().max())


@pytest.mark.parametrize("name", ["linear", "ddpm", "edm"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_solver(name: str, solver: str, order: int) -> None:
    schedule = SCHEDULES[name]
    last = schedule.level_range[0] > 0  # then one step leads from the lowest level to 0
    coarse, fine = (error(schedule, solver, steps + last) for steps in (200, 400))
    # The next term of the error is a few per cent of the first at this many steps.
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_of_dopri5_is_of_fifth_order_and_estimates_its_error(name: str) -> None:
    schedule = SCHEDULES[name]
    velocity, middle = straightened(velocity_of(schedule), schedule), torch.tensor(0.8, dtype=torch.float64)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1)
    n = {at: schedule.alpha(at) + schedule.sigma(at) / schedule.scale for at in (middle, middle - 0.4)}
    start, exact = ((mean + std * z) / n[at] for at in n for mean, std in [marginal(schedule, at)])
    errors, estimates = [], []
    for steps in (8, 16, 32):
        y, level, step = start, middle.repeat(9), torch.full((9,), 0.4 / steps, dtype=torch.float64)
        for _ in range(steps):
            slope = velocity(y, level, None)
            y, slope_ahead, difference = dopri5_step(velocity, y, level, step, slope, None)
            level = level - step
            torch.testing.assert_close(slope_ahead, velocity(y, level, None))
        errors.append(float((y - exact).abs().max()))
        estimates.append(float(difference.abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(5, abs=0.6)  # 64 steps would reach the precision of float64
    for coarse, fine in itertools.pairwise(estimates):
        assert math.log2(coarse / fine) == pytest.approx(5, abs=0.2)  # the local error of fourth order
    assert estimates[-1] > errors[-1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_dopri5_keeps_its_tolerance(name: str) -> None:
    rough, fine = error(SCHEDULES[name], 1e-3, 10), error(SCHEDULES[name], 1e-6, 10)
    assert 0.02 > rough > 20 * fine  # each of about a dozen steps may err by the tolerance
    assert fine < 1e-4
    assert error(SCHEDULES[name], 1e-6, 1) < 1e-4  # whatever its first step size


def test_dopri5_chooses_step_sizes_for_each_sample_separately() -> None:
    """A sample that needs thousands of steps changes neither the bits nor the number of steps of the others."""
    num_calls: dict[int, int] = {}

    def velocity(y: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        for sample_id in condition.tolist():
            num_calls[sample_id] = num_calls.get(sample_id, 0) + 1
        hard = torch.where(condition == 1, 40.0, 1.0).view(-1, 1)
        return torch.sin(hard * level.view(-1, 1)) * y * hard

    y, plan = torch.ones(3, 4, dtype=torch.float64), SamplingPlan("dopri5", 5, rtol=1e-7, atol=1e-9)
    together = integrate_adaptively(velocity, y, torch.arange(3), (0.0, 1.0), plan)
    for i in range(3):
        before = num_calls.pop(i)
        assert torch.equal(integrate_adaptively(velocity, y[:1], torch.tensor([i]), (0.0, 1.0), plan)[0], together[i])
        assert num_calls.pop(i) == before
    integral = [math.cos(hard) - 1 for hard in (1.0, 40.0, 1.0)]  # of -hard sin(hard level) from 1 to 0, negated twice
    torch.testing.assert_close(together[:, 0].log(), torch.tensor(integral).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_dopri5_fails_if_the_network_is_not_finite(bad: float) -> None:
    def velocity(y: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        return torch.where(level.view(-1, 1) < 0.5, torch.full_like(y, bad), y)

    with pytest.raises(
        ValueError, match=r"^dopri5 does not get past noise level 0\.5: the network is not finite or not"
    ):
        integrate_adaptively(velocity, torch.ones(2, 3), None, (0.0, 1.0), SamplingPlan("dopri5"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_dozen_steps_are_accurate_in_every_family(name: str) -> None:
    assert error(SCHEDULES[name], "heun", 12) < 0.03  # a tenth of the data's standard deviation


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_straightened_path_is_the_linear_path(name: str) -> None:
    schedule = SCHEDULES[name]
    level = torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)
    x, eps = torch.randn(2, 3, 4, dtype=torch.float64)

    def velocity(x_t: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        torch.testing.assert_close(x_t, schedule.corrupt(x, eps, level))
        return target("velocity", schedule, x=x, eps=eps, level=level)

    y = (1 - level).view(-1, 1) * x + level.view(-1, 1) * schedule.scale * eps
    torch.testing.assert_close(straightened(velocity, schedule)(y, level, None), schedule.scale * eps - x)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_fall_to_the_lowest_and_then_to_zero(name: str) -> None:
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
    assert len(levels) == 3 * 2 + 1  # Heun evaluates twice, except in the last step
    assert levels[1::2] == levels[2::2]


def gaussian_backbone(schedule: NoiseSchedule, prediction: Any) -> Backbone:
    """The optimal network for data from N(MEAN, STD^2), which takes the native time of the family."""

    def forward(module: nn.Module, x_t: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        level = schedule.noise_level(time.double())
        x_0, eps = expectations(schedule, x_t.double().flatten(1), level)
        out = target(prediction, schedule, x=x_0, eps=eps, level=level)
        sign = -1 if prediction == "velocity" and schedule.time_direction < 0 else 1  # with respect to native time
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
        (LinearPath(1, 0), "eps"),
        (LinearPath(1, 0), "score"),
        (GVP(), "velocity"),
        (GVP(0, 1), "velocity"),
        (GVP(), "eps"),
        (GVP(), "score"),
        (VP(), "velocity"),
        (VP(), "eps"),
        (VP(), "score"),
    ],
)
@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_samples_follow_the_exact_flow_in_every_convention(
    schedule: NoiseSchedule, prediction: str, solver: Any
) -> None:
    plan = SamplingPlan(solver, {"heun": 120, "dopri5": 20}[solver], seed=4, rtol=1e-4)
    backbone = gaussian_backbone(schedule, prediction)
    x = sample(backbone, range(50), plan=plan)
    noise = RandomStream(4, "sampling").normal(torch.arange(50), SHAPE).double()
    high = torch.tensor(sampling_range(backbone, plan)[1], dtype=torch.float64)
    mean, std = marginal(schedule, high)
    expected = MEAN + STD * (schedule.sigma(high) * noise - mean) / std
    # Second-order error, the Euler step below the lowest level of EDM (0.4 %), and float32.
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=2e-3)
    # Mean and standard deviation of the data, within four standard errors of 800 numbers.
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(800))
    assert x.std().item() == pytest.approx(STD, rel=4 / math.sqrt(1600))


# --- the SDE

COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
CENTER = torch.tensor([0.7, -0.4], dtype=torch.float64)


def correlated_backbone(schedule: NoiseSchedule) -> Backbone:
    """The optimal network for two channels from N(CENTER, COVARIANCE) at every pixel."""

    def forward(module: nn.Module, x_t: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        at = schedule.noise_level(time.double())[0]
        alpha, sigma = schedule.alpha(at), schedule.sigma(at)
        of_x_t = torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64))
        residual = of_x_t @ (x_t.double().flatten(2) - alpha * CENTER[:, None])
        return (CENTER[:, None] + alpha * COVARIANCE @ residual).view_as(x_t).to(x_t.dtype)

    return wrap(
        nn.Sequential(nn.Identity()), layers="0", schedule=schedule, prediction="x0", shape=(2, 8, 8), forward=forward
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in SCHEDULES),
        ("linear", {"diffusion": "constant", "diffusion_scale": 0.2, "last_step_size": 0.05}),
        ("gvp", {"diffusion": "increasing-decreasing", "diffusion_scale": 2.0}),
        ("vp", {"diffusion": "sbdm"}),
    ],
)
def test_the_sde_gives_the_mean_and_covariance_of_the_data(name: str, options: dict[str, Any]) -> None:
    plan = SamplingPlan(
        **{"solver": "euler-maruyama", "steps": 100, "last_step": "tweedie", "last_step_size": 0.01} | options
    )
    x = sample(correlated_backbone(SCHEDULES[name]), range(60), plan=plan).double().permute(1, 0, 2, 3).flatten(1)
    # Four standard errors of 3840 pairs, and a few per cent for 100 steps.
    torch.testing.assert_close(x.mean(1), CENTER, rtol=0, atol=0.03 + 4 * math.sqrt(0.5 / 3840))
    torch.testing.assert_close(torch.cov(x), COVARIANCE, rtol=0, atol=0.02 + 4 * 0.5 * math.sqrt(2 / 3840))


def test_a_step_of_the_sde_equals_the_formula_of_sit() -> None:
    """x + (v + w s) dt + sqrt(2 w dt) z in the time of SiT, and its two kinds of last step, by hand."""
    plan = SamplingPlan("euler-maruyama", 3, seed=5, last_step_size=0.1)
    y, ids = torch.randn(2, 6, dtype=torch.float64), torch.tensor([4, 9])

    def velocity(x: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        return torch.tanh(x) + level.double().view(-1, 1)

    x, stream = y, RandomStream(5, "sampling")
    for i, t in enumerate((0.0, 0.45)):
        sigma, v = 1 - t, -velocity(x, torch.full((2,), 1 - t), None)
        score = -(x - t * v) / sigma  # of eps = x - t v
        x = x + (v + sigma * score) * 0.45 + math.sqrt(2 * sigma * 0.45) * stream.normal(ids, (6,), draw=1 + i).double()
    v = -velocity(x, torch.full((2,), 0.1), None)
    eps = x - 0.9 * v
    for last, end in (("mean", x + (v - eps) * 0.1), ("tweedie", (x - 0.1 * eps) / 0.9)):
        got = diffuse(velocity, y, ids, None, LinearPath(), (0.0, 1.0), replace(plan, last_step=last))
        torch.testing.assert_close(got, end, rtol=1e-6, atol=1e-6)  # the network gets its time in float32


def test_diffusions_equal_those_of_sit() -> None:
    """As functions of the time t of SiT, on the linear path and on VP, where SBDM is beta / 2."""
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    formulas: dict[str, Any] = {
        "sigma": 0.7 * (1 - t),
        "sbdm": 0.7 * ((1 - t) ** 2 / t + (1 - t)),
        "constant": 0.7 * torch.ones(3).double(),
        "linear": 0.7 * (1 - t),
        "decreasing": 0.25 * (0.7 * torch.cos(math.pi * t) + 1) ** 2,
        "increasing-decreasing": 0.7 * torch.sin(math.pi * t) ** 2,
    }
    for name, expected in formulas.items():
        plan = SamplingPlan("euler-maruyama", diffusion=name, diffusion_scale=0.7)  # type: ignore[arg-type]
        torch.testing.assert_close(diffusion(plan, LinearPath(), 1 - t), expected)
    sbdm = SamplingPlan("euler-maruyama", diffusion="sbdm")
    torch.testing.assert_close(diffusion(sbdm, VP(), VP().noise_level(t)), (0.1 + 19.9 * (1 - t)) / 2)
    # For data of twice the scale, the SDE is the same in units of the scale.
    for name in ("sigma", "sbdm", "linear"):
        plan = SamplingPlan("euler-maruyama", diffusion=name)  # type: ignore[arg-type]
        torch.testing.assert_close(diffusion(plan, EDM(1.0), t), 4 * diffusion(plan, EDM(0.5), t))


def test_without_diffusion_the_sde_is_the_ode() -> None:
    backbone = gaussian_backbone(LinearPath(), "velocity")
    sde = SamplingPlan("euler-maruyama", 25, diffusion_scale=0.0, last_step_size=0.04)
    ode = SamplingPlan("euler", 25)
    torch.testing.assert_close(sample(backbone, range(5), plan=sde), sample(backbone, range(5), plan=ode))


# --- indices, labels and guidance


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_samples_of_a_ddpm_with_integer_times(prediction: str) -> None:
    x = sample(gaussian_backbone(DDPM.from_name("linear"), prediction), range(200), plan=SamplingPlan("heun", 60))
    # Times are rounded to one of 1000, which costs an accuracy of about one per cent.
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02 + 4 * STD / math.sqrt(3200))
    assert x.std().item() == pytest.approx(STD, rel=0.05 + 4 / math.sqrt(6400))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("solver", ["heun", "dopri5", "euler-maruyama"])
def test_a_sample_depends_only_on_its_index_and_label(guidance: float, solver: Any) -> None:
    plan = SamplingPlan(solver, steps=3, guidance=guidance, seed=2, guidance_interval=(0.3, 0.7))
    backbone = tiny_sit()
    labels = torch.arange(10) % 3
    whole = sample(backbone, range(10), labels=labels, plan=plan)
    assert whole.shape == (10, *SHAPE)
    assert whole.dtype == torch.float32
    one_by_one = sample(backbone, range(10), labels=labels, plan=plan, batch_size=1)
    # Matrix products of other sizes round differently.
    torch.testing.assert_close(one_by_one, whole, rtol=1e-5, atol=1e-5)
    some = [7, 2, 9]
    torch.testing.assert_close(
        sample(backbone, some, labels=labels[some], plan=plan), whole[some], rtol=1e-5, atol=1e-5
    )
    other = sample(backbone, range(10), labels=labels, plan=replace(plan, seed=3))
    assert (other - whole).abs().min() > 0


def test_no_indices_give_no_samples() -> None:
    assert sample(tiny_sit(), []).shape == (0, *SHAPE)


def test_guidance_equals_its_formula() -> None:
    backbone = tiny_sit()
    x_t, level, labels = torch.randn(4, *SHAPE), torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 1, 2, 3])
    of_label, of_null = backbone(x_t, level, labels), backbone(x_t, level, torch.full((4,), 3))
    for guidance in (0.0, 1.0, 2.5):
        expected = of_null + guidance * (of_label - of_null)
        torch.testing.assert_close(guided(backbone, guidance)(x_t, level, labels), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided(backbone, 2.5)(x_t, level, None), of_null)
    # Guidance does not change the null label.
    torch.testing.assert_close(guided(backbone, 2.5)(x_t, level, labels)[3], of_null[3], rtol=1e-4, atol=1e-5)


def test_guidance_stops_at_the_ends_of_its_interval() -> None:
    backbone, batch_sizes = tiny_sit(), []
    counting = replace(backbone, forward=lambda *args: batch_sizes.append(len(args[1])) or backbone.forward(*args))
    x_t, labels = torch.randn(5, *SHAPE), torch.tensor([0, 1, 2, 0, 1])
    level = torch.tensor([0.6, 0.1, 0.3, 0.9, 0.5])
    plain, full = backbone(x_t, level, labels), guided(backbone, 3.0)(x_t, level, labels)
    inside = torch.tensor([True, False, True, False, True])  # closed at both ends: 0.3 and 0.6 are in it
    mixed = guided(counting, 3.0, (0.3, 0.6))(x_t, level, labels)
    torch.testing.assert_close(mixed[inside], full[inside], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[~inside], plain[~inside], rtol=1e-4, atol=1e-5)
    assert (full - plain).abs().flatten(1).amax(1).min() > 1e-3
    assert sum(batch_sizes) == 3 * 2 + 2  # the null label is evaluated inside the interval only
    assert torch.equal(guided(backbone, 3.0, (0.91, 1.0))(x_t, level, labels), plain)
    assert torch.equal(guided(backbone, 3.0, (0.1, 0.9))(x_t, level, labels), full)


def test_sampling_outside_the_guidance_interval_equals_no_guidance() -> None:
    backbone, labels = tiny_sit(), torch.arange(4) % 3
    none = sample(backbone, range(4), labels=labels, plan=SamplingPlan(steps=4))
    between = SamplingPlan(steps=4, guidance=5.0, guidance_interval=(0.3, 0.45))  # steps are at 1, 3/4, 1/2, 1/4
    assert torch.equal(sample(backbone, range(4), labels=labels, plan=between), none)
    hit = replace(between, guidance_interval=(0.3, 0.5))
    assert (sample(backbone, range(4), labels=labels, plan=hit) - none).abs().max() > 1e-3


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
        (0, [0, 1, 2], 1.0, "is not conditioned on classes; sample without labels"),
        (3, [0, 1, 4], 1.0, r"labels must lie between 0 and 2 \(or 3 for the null label\), got \[0, 1, 4\]"),
        (3, [0, 1, -1], 1.0, r"labels must lie between 0 and 2"),
    ],
)
def test_labels_that_do_not_match_are_refused(
    num_classes: int, labels: list[int] | None, guidance: float, message: str
) -> None:
    label_tensor = None if labels is None else torch.tensor(labels)
    with pytest.raises(ValueError, match=message) as refused:
        sample(tiny_sit(num_classes=num_classes), range(3), labels=label_tensor, plan=SamplingPlan(guidance=guidance))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "unknown solver 'rk4'; use euler, heun, dopri5 or euler-maruyama"),
        (
            {"diffusion": "none"},
            "unknown diffusion 'none'; use sigma, sbdm, constant, linear, decreasing or increasing-",
        ),
        ({"last_step": "euler"}, "unknown last step 'euler'; use mean or tweedie"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"solver": "euler-maruyama", "steps": 1}, "euler-maruyama takes at least 2 steps, the last one without noise"),
        ({"guidance_interval": (0.7, 0.3)}, "guidance interval needs 0 <= low <= high <= 1 .*, got 0.7 and 0.3"),
        ({"guidance_interval": (0.0, 80.0)}, "guidance interval needs .* got 0 and 80"),
        ({"guidance_interval": (math.nan, 1.0)}, "guidance interval needs"),
        ({"rtol": 0.0}, "tolerances must be above 0 and rtol below 1, got rtol 0 and atol 1e-06"),
        ({"atol": math.inf}, "tolerances must be above 0"),
        ({"diffusion_scale": -1.0}, "need diffusion_scale >= 0 and last_step_size in"),
        ({"last_step_size": 1.0}, "need diffusion_scale >= 0 and last_step_size in"),
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
