"""Schedules and conversions against closed forms and an independent DDPM; keyed noise against pinned numbers."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
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
from layerprobe.noise.random_stream import PURPOSES, Purpose, RandomStream
from layerprobe.noise.schedules import (
    DDPM,
    EDM,
    GVP,
    SCHEDULES,
    VP,
    LinearPath,
    NoiseSchedule,
    schedule_from_config,
    schedule_from_name,
)

LEVELS = torch.tensor([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99], dtype=torch.float64)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def level(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


# --- schedules


@pytest.mark.parametrize(
    ("name", "native"),
    [
        ("sit", 0.5),
        ("flow", 0.5),
        ("flow-1000", 500.0),
        ("ddpm-linear", 258),
        ("ddpm-scaled_linear", 354),
        ("ddpm-cosine", 495),
        ("edm", 0.5),
        ("sit-gvp", 0.5),
        # Half of the variance is left where 19.9 s^2 / 2 + 0.1 s = log 2.
        ("sit-vp", 1 - (math.sqrt(0.01 + 4 * 9.95 * math.log(2)) - 0.1) / 19.9),
    ],
)
def test_native_time_where_data_and_noise_are_equally_strong(name: str, native: float) -> None:
    schedule = schedule_from_name(name)
    time = schedule.native_time(level(0.5))
    assert time.item() == pytest.approx(native, abs=1e-12)
    assert time.is_floating_point() != schedule.integer_time
    assert schedule.log_snr(level(0.5)).item() == 0


@every_schedule
def test_level_is_noise_over_noise_and_data(name: str) -> None:
    schedule = schedule_from_name(name)
    alpha, sigma = schedule.alpha(LEVELS), schedule.sigma(LEVELS)
    torch.testing.assert_close(sigma / (alpha * schedule.scale + sigma), LEVELS, rtol=1e-12, atol=0)
    # The noise axis is the signal-to-noise ratio, counted in the data's own standard deviation.
    snr = 2 * torch.log(alpha * schedule.scale / sigma)
    torch.testing.assert_close(schedule.log_snr(LEVELS), snr, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(schedule.level_of_log_snr(snr), LEVELS, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "alpha", "sigma"),
    [
        ("sit", lambda t: 1 - t, lambda t: t),
        ("flow", lambda t: 1 - t, lambda t: t),
        ("flow-1000", lambda t: 1 - t, lambda t: t),
        # The quarter circle: cos and sin of the angle whose tangent is sigma / alpha.
        ("ddpm-linear", lambda t: torch.cos(torch.atan2(t, 1 - t)), lambda t: torch.sin(torch.atan2(t, 1 - t))),
        ("ddpm-cosine", lambda t: torch.cos(torch.atan2(t, 1 - t)), lambda t: torch.sin(torch.atan2(t, 1 - t))),
        ("edm", torch.ones_like, lambda t: 0.5 * t / (1 - t)),
        ("sit-gvp", lambda t: torch.cos(torch.atan2(t, 1 - t)), lambda t: torch.sin(torch.atan2(t, 1 - t))),
        ("sit-vp", lambda t: torch.cos(torch.atan2(t, 1 - t)), lambda t: torch.sin(torch.atan2(t, 1 - t))),
    ],
)
def test_alpha_and_sigma_have_their_closed_forms(name: str, alpha: Any, sigma: Any) -> None:
    schedule = schedule_from_name(name)
    torch.testing.assert_close(schedule.alpha(LEVELS), alpha(LEVELS), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(schedule.sigma(LEVELS), sigma(LEVELS), rtol=1e-14, atol=1e-15)


@every_schedule
def test_rates_are_the_derivatives(name: str) -> None:
    schedule = schedule_from_name(name)
    for value, rate in ((schedule.alpha, schedule.alpha_rate), (schedule.sigma, schedule.sigma_rate)):
        at = LEVELS.clone().requires_grad_()
        derivative = torch.autograd.grad(value(at).sum() + 0 * at.sum(), at)[0]
        torch.testing.assert_close(rate(LEVELS), derivative, rtol=1e-12, atol=1e-15)


# SiT's paths as functions of its time t, 1 at data, from the paper's formulas.
SIT_PATHS: dict[str, tuple[Any, Any]] = {
    "sit-gvp": (lambda t: torch.sin(math.pi * t / 2), lambda t: torch.cos(math.pi * t / 2)),
    "sit-vp": (
        lambda t: torch.exp(-19.9 * (1 - t) ** 2 / 4 - 0.1 * (1 - t) / 2),
        lambda t: torch.sqrt(1 - torch.exp(-19.9 * (1 - t) ** 2 / 2 - 0.1 * (1 - t))),
    ),
}
TIMES = torch.tensor([0.001, 0.02, 0.2, 0.5, 0.77, 0.98, 0.999], dtype=torch.float64)


@pytest.mark.parametrize("name", SIT_PATHS)
def test_sits_paths_mix_at_their_own_time_as_the_paper_says(name: str) -> None:
    schedule, (alpha, sigma) = schedule_from_name(name), SIT_PATHS[name]
    levels = schedule.noise_level(TIMES)
    # 1e-11: at t = 0.999 VP's variance is 1e-4 of what it is subtracted from.
    torch.testing.assert_close(schedule.alpha(levels), alpha(TIMES), rtol=1e-11, atol=0)
    torch.testing.assert_close(schedule.sigma(levels), sigma(TIMES), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", SIT_PATHS)
def test_the_velocity_of_sits_paths_is_that_of_their_own_time(name: str) -> None:
    """What an official network is trained to give, d x_t / dt, but for the sign: ours points to the noise."""
    schedule, (alpha, sigma), step = schedule_from_name(name), SIT_PATHS[name], 1e-6
    x, eps = torch.randn(2, len(TIMES), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after, before = (alpha(t)[:, None] * x + sigma(t)[:, None] * eps for t in (TIMES + step, TIMES - step))
    velocity = target("velocity", schedule, x=x, eps=eps, level=schedule.noise_level(TIMES))
    # 1e-5: VP's third derivative near data is large, and its difference loses digits.
    torch.testing.assert_close(-velocity, (after - before) / (2 * step), rtol=1e-5, atol=1e-6)


def test_repas_cosine_path_is_sits_with_time_turned_round() -> None:
    sit, repa = GVP(), GVP(data_time=0, noise_time=1)
    assert repa.time_direction == -sit.time_direction == 1
    torch.testing.assert_close(repa.native_time(LEVELS), 1 - sit.native_time(LEVELS), rtol=0, atol=1e-15)
    times = torch.tensor([0.1, 0.7], dtype=torch.float64)
    torch.testing.assert_close(repa.alpha(repa.noise_level(times)), torch.cos(times * math.pi / 2))


def test_vp_ends_short_of_noise_and_trains_short_of_data() -> None:
    vp = VP()
    low, high = vp.level_range
    assert vp.alpha(level(high)).item() == pytest.approx(math.exp(-19.9 / 4 - 0.05), rel=1e-9)
    assert vp.sigma(level(low)).item() == pytest.approx(math.sqrt(0.1 * 1e-5), rel=1e-3)
    told = vp.native_time(torch.tensor([0.0, low, high, (1 + high) / 2, 1.0], dtype=torch.float64))
    assert told.tolist() == pytest.approx([1, 1 - 1e-5, 0, 0, 0], abs=1e-12)
    assert told.min() >= 0
    for bad in ((0.0, 20.0), (2.0, 1.0), (0.1, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match=r"^need 0 < beta_min < beta_max, got"):
            VP(*bad)


@every_schedule
def test_a_paths_time_goes_from_data_to_noise(name: str) -> None:
    schedule, step = schedule_from_name(name), 1e-7
    times = schedule.path_time(LEVELS)
    torch.testing.assert_close(schedule.level_at(times), LEVELS, rtol=1e-12, atol=0)
    slope = (schedule.path_time(LEVELS + step) - schedule.path_time(LEVELS - step)) / (2 * step)
    torch.testing.assert_close(schedule.path_rate(LEVELS), slope, rtol=1e-6, atol=0)
    if name in SIT_PATHS:
        torch.testing.assert_close(schedule.native_time(LEVELS), 1 - times, rtol=0, atol=1e-12)
        assert schedule.path_time(level(0)).item() == 0
        assert schedule.path_time(level(schedule.level_range[1])).item() == pytest.approx(1, rel=1e-12)
    else:  # the noise level itself, and no rounding
        assert times is LEVELS
        assert schedule.level_at(times) is times
        assert bool((schedule.path_rate(LEVELS) == 1).all())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_are_finite_at_every_time_that_is_trained_at(name: str, prediction: Prediction) -> None:
    schedule = schedule_from_name(name)
    low, high = time_range(prediction, schedule)
    ends = schedule.level_at(torch.tensor([low, 0.3, high], dtype=torch.float64))
    if name == "edm" or (prediction == "score" and low == 0):
        ends = ends.clamp(*schedule.level_range)  # as anywhere with EDM, which is infinitely noisy at level 1
    x, eps = torch.ones(2, 3, 1, dtype=torch.float64)
    assert bool(target(prediction, schedule, x=x, eps=eps, level=ends).isfinite().all())
    assert 0 <= low <= END and 1 - END <= high <= 1
    if prediction in ("velocity", "x0", "v") and name != "sit-vp":
        assert (low, high) == (0, 1)


def test_the_loss_of_a_score_is_the_published_one() -> None:
    """(sigma score + eps)^2, that of eps, which an unweighted error would multiply by 1 / sigma^2."""
    x, eps, output = torch.randn(3, len(LEVELS), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name in SCHEDULES:
        schedule = schedule_from_name(name)
        sigma = schedule.sigma(LEVELS)[:, None]
        error = (output - target("score", schedule, x=x, eps=eps, level=LEVELS)) ** 2
        weighted = error_weight("score", schedule, LEVELS)[:, None] * error
        torch.testing.assert_close(weighted, (sigma * output + eps) ** 2, rtol=1e-12, atol=0)
        assert bool((error_weight("velocity", schedule, LEVELS) == 1).all())


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factors_keep_the_type_of_the_level(name: str, dtype: torch.dtype) -> None:
    schedule, at = schedule_from_name(name), LEVELS.to(dtype)
    for method in (schedule.alpha, schedule.sigma, schedule.alpha_rate, schedule.sigma_rate, schedule.log_snr):
        assert method(at).dtype == dtype


@every_schedule
def test_native_time_and_noise_level_are_inverse(name: str) -> None:
    schedule = schedule_from_name(name)
    if schedule.integer_time:
        times = torch.arange(1000)
        assert torch.equal(schedule.native_time(schedule.noise_level(times)), times)
        # Rounding to a time moves the level by no more than the gap between neighboring times.
        at = LEVELS[(schedule.level_range[0] < LEVELS) & (schedule.level_range[1] > LEVELS)]
        there_and_back = schedule.noise_level(schedule.native_time(at))
        assert float((there_and_back - at).abs().max()) <= float(schedule.noise_level(times).diff().max())
    else:
        torch.testing.assert_close(schedule.noise_level(schedule.native_time(LEVELS)), LEVELS, rtol=1e-12, atol=1e-15)


@every_schedule
def test_native_time_runs_in_the_direction_that_the_schedule_says(name: str) -> None:
    schedule = schedule_from_name(name)
    steps = schedule.native_time(torch.linspace(0.05, 0.93, 40, dtype=torch.float64)).diff()
    assert bool((steps * schedule.time_direction > 0).all())


def test_linear_path_has_data_and_noise_at_the_times_that_were_asked_for() -> None:
    for data_time, noise_time in ((1, 0), (0, 1), (0, 1000), (3.0, -2.0)):
        path = LinearPath(data_time, noise_time)
        assert path.native_time(torch.tensor([0.0, 1.0])).tolist() == [data_time, noise_time]
        assert path.time_direction == (1 if noise_time > data_time else -1)
    assert LinearPath().native_time(torch.tensor([0.25])).item() == 0.75  # official SiT: time 1 is data
    with pytest.raises(ValueError, match=r"data and noise are both at time 1; pass two different times"):
        LinearPath(1, 1)


def ddpm_by_hand(betas: str) -> NDArray[np.float64]:
    """abar_t, written from the papers with numpy: a running product, no shared code."""
    if betas == "linear":
        steps = np.linspace(1e-4, 0.02, 1000)
    elif betas == "scaled_linear":
        steps = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    else:
        bar = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
        steps = np.array([min(1 - bar[t + 1] / bar[t], 0.999) for t in range(1000)])
    return np.array(list(itertools.accumulate(1 - steps, lambda a, b: a * b)))


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_ddpm_equals_a_chain_written_by_hand(betas: str) -> None:
    schedule, abar = DDPM.from_name(betas), ddpm_by_hand(betas)
    levels = schedule.noise_level(torch.arange(1000))
    # 1e-9: the cosine chain ends at abar = 2e-9, and 1 - abar keeps 16 digits of 1.
    np.testing.assert_allclose(schedule.alpha(levels).numpy(), np.sqrt(abar), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(schedule.sigma(levels).numpy(), np.sqrt(1 - abar), rtol=1e-9, atol=1e-12)
    assert schedule.level_range == (float(levels[0]), float(levels[-1]))


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_ddpm_takes_the_nearest_time_by_log_snr(betas: str) -> None:
    schedule, abar = DDPM.from_name(betas), ddpm_by_hand(betas)
    table = np.log(abar) - np.log1p(-abar)
    for value in np.random.default_rng(0).uniform(0.02, 0.98, 200):
        wanted = 2 * math.log((1 - value) / value)
        assert int(schedule.native_time(level(value))) == int(np.abs(table - wanted).argmin())


def test_ddpm_stays_at_its_ends_beyond_them() -> None:
    schedule = schedule_from_name("ddpm-linear")
    low, high = schedule.level_range
    assert low == pytest.approx(0.01, abs=0.001)
    assert high == pytest.approx(0.9936, abs=0.001)
    assert schedule.native_time(torch.tensor([0.0, low / 2, (1 + high) / 2, 1.0])).tolist() == [0, 0, 999, 999]


def test_ddpm_takes_a_level_of_any_precision() -> None:
    schedule = schedule_from_name("ddpm-cosine")
    times = torch.arange(0, 1000, 7)
    assert torch.equal(schedule.native_time(schedule.noise_level(times).float()), times)


def test_ddpm_takes_betas_and_ends_of_its_own() -> None:
    assert len(DDPM([0.1, 0.2, 0.3]).betas) == 3
    assert DDPM([0.1]).level_range[0] == DDPM([0.1]).level_range[1]
    short = DDPM.from_name("linear", 10, start=0.01, end=0.1)
    torch.testing.assert_close(short.betas, torch.linspace(0.01, 0.1, 10, dtype=torch.float64), rtol=1e-14, atol=0)
    scaled = DDPM.from_name("scaled_linear", 10, start=0.01, end=0.09)
    assert scaled.betas.tolist()[0] == pytest.approx(0.01)
    assert scaled.betas.tolist()[-1] == pytest.approx(0.09)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        DDPM.from_name("linear", start=0.0)  # zero is what was asked for, and is no beta
    with pytest.raises(ValueError, match="the cosine betas have no start and no end; leave them out"):
        DDPM.from_name("cosine", start=0.1)


@pytest.mark.parametrize(
    ("betas", "seen"),
    [
        ([], r"shape \(0,\)"),
        ([[0.1, 0.2]], r"shape \(1, 2\) with values from 0.1 to 0.2"),
        ([0.1, 1.0], r"shape \(2,\) with values from 0.1 to 1"),
        ([0.0, 0.5], r"with values from 0 to 0.5"),
        ([0.1, math.nan], "nan"),
    ],
)
def test_betas_that_are_none_are_refused(betas: Any, seen: str) -> None:
    with pytest.raises(ValueError, match=r"betas must be a non-empty row .* got .*" + seen):
        DDPM(torch.tensor(betas))


@pytest.mark.parametrize("time", [-1.0, 1000.0, 3.5])
def test_ddpm_refuses_times_that_it_has_not(time: float) -> None:
    with pytest.raises(ValueError, match=r"the native times of ddpm-linear are 0, 1, ..., 999, got \["):
        schedule_from_name("ddpm-linear").noise_level(torch.tensor([0.0, time]))


def test_edm_counts_sigma_in_standard_deviations_of_the_data() -> None:
    edm = EDM(sigma_data=2.0, sigma_min=0.01, sigma_max=100.0)
    assert edm.sigma(level(0.5)).item() == 2.0
    assert edm.native_time(level(0.5)).item() == 2.0
    low, high = edm.level_range
    assert edm.sigma(level(low)).item() == pytest.approx(0.01, rel=1e-12)
    assert edm.sigma(level(high)).item() == pytest.approx(100.0, rel=1e-12)
    assert edm.sigma(level(1.0)).isinf().all()


@pytest.mark.parametrize("bad", [(0.0, 0.1, 1.0), (0.5, 0.0, 1.0), (0.5, 2.0, 1.0)])
def test_edm_refuses_sigmas_out_of_order(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"need 0 < sigma_min < sigma_max and sigma_data > 0, got"):
        EDM(*bad)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'vp'; use one of sit, flow, flow-1000, ddpm-linear"):
        schedule_from_name("vp")
    with pytest.raises(ValueError, match="unknown betas 'sigmoid'; use one of linear, scaled_linear, cosine"):
        DDPM.from_name("sigmoid")


@pytest.mark.parametrize(
    "schedule",
    [
        *(make() for make in SCHEDULES.values()),
        LinearPath(2.0, -1.0),
        EDM(0.7, 0.01, 50.0),
        DDPM([0.1, 0.5], name="mine"),
        GVP(0.0, 1000.0),
        VP(0.2, 12.0),
    ],
    ids=lambda schedule: schedule.name,
)
def test_a_schedule_survives_its_configuration(schedule: NoiseSchedule) -> None:
    again = schedule_from_config(json.loads(json.dumps(schedule.to_config())))
    assert type(again) is type(schedule)
    assert again.to_config() == schedule.to_config()
    assert (again.name, again.time_direction, again.level_range) == (
        schedule.name,
        schedule.time_direction,
        schedule.level_range,
    )
    assert torch.equal(again.native_time(LEVELS), schedule.native_time(LEVELS))


@every_schedule
def test_corruption_is_per_sample_on_any_grid(name: str) -> None:
    schedule, generator = schedule_from_name(name), torch.Generator().manual_seed(0)
    for shape in ((3,), (2, 5), (1, 4, 4), (2, 3, 4, 5)):
        x, eps = torch.randn(2, 7, *shape, generator=generator)
        x_t = schedule.corrupt(x, eps, LEVELS)
        assert x_t.dtype == torch.float32
        for i, at in enumerate(LEVELS):
            expected = float(schedule.alpha(at)) * x[i] + float(schedule.sigma(at)) * eps[i]
            torch.testing.assert_close(x_t[i], expected, rtol=1e-6, atol=1e-6)


def test_corruption_at_level_0_is_the_data_and_at_level_1_the_noise() -> None:
    x, eps = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    for name in ("sit", "flow-1000", "ddpm-linear", "ddpm-cosine", "sit-gvp", "sit-vp"):
        x_t = schedule_from_name(name).corrupt(x, eps, torch.tensor([0.0, 1.0]))
        assert torch.equal(x_t[0], x[0])
        assert torch.equal(x_t[1], eps[1])


# --- predictions and conversions


@every_schedule
def test_velocity_is_the_derivative_of_x_t_by_the_paths_time(name: str) -> None:
    schedule, step = schedule_from_name(name), 1e-6
    x, eps = torch.randn(2, len(LEVELS), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ahead, behind = LEVELS + step, LEVELS - step
    passed = (schedule.path_time(ahead) - schedule.path_time(behind)).view(-1, 1, 1)
    difference = (schedule.corrupt(x, eps, ahead) - schedule.corrupt(x, eps, behind)) / passed
    velocity = target("velocity", schedule, x=x, eps=eps, level=LEVELS)
    # 1e-7: a central difference errs by step^2 times the third derivative, which EDM has large near level 1.
    torch.testing.assert_close(velocity, difference, rtol=1e-7, atol=1e-7)


def test_velocity_on_the_linear_path_is_noise_minus_data() -> None:
    x, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for name in ("sit", "flow", "flow-1000"):  # whichever way the family counts its time
        velocity = target("velocity", schedule_from_name(name), x=x, eps=eps, level=torch.tensor([0.1, 0.5, 0.9]))
        assert torch.equal(velocity, eps - x)


@every_schedule
def test_targets_are_what_they_are_called(name: str) -> None:
    schedule = schedule_from_name(name)
    x, eps = torch.randn(2, len(LEVELS), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha, sigma = schedule.alpha(LEVELS)[:, None], schedule.sigma(LEVELS)[:, None]
    assert torch.equal(target("eps", schedule, x=x, eps=eps, level=LEVELS), eps)
    assert torch.equal(target("x0", schedule, x=x, eps=eps, level=LEVELS), x)
    torch.testing.assert_close(target("v", schedule, x=x, eps=eps, level=LEVELS), alpha * eps - sigma * x)
    torch.testing.assert_close(target("score", schedule, x=x, eps=eps, level=LEVELS), -eps / sigma)


@every_schedule
@pytest.mark.parametrize(("source", "to"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_every_prediction_becomes_every_other(name: str, source: Prediction, to: Prediction) -> None:
    schedule = schedule_from_name(name)
    x, eps = torch.randn(2, len(LEVELS), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = schedule.corrupt(x, eps, LEVELS)
    given_, wanted = (target(kind, schedule, x=x, eps=eps, level=LEVELS) for kind in (source, to))
    got = convert_prediction(given_, x_t, LEVELS, schedule, source=source, to=to)
    # 1e-10: the levels reach within 0.01 of the singular ends, where eight of sixteen digits would still be left.
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    back = convert_prediction(got, x_t, LEVELS, schedule, source=to, to=source)
    torch.testing.assert_close(back, given_, rtol=1e-10, atol=1e-10)


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


def test_conversion_keeps_the_type_of_the_output_and_returns_it_where_nothing_changes() -> None:
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
        # EDM is infinitely noisy at level 1, so nothing can be told there.
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
    with pytest.raises(ValueError, match="unknown prediction 'flow'; use one of velocity, eps, x0, v, score"):
        convert_prediction(torch.ones(1, 2), torch.ones(1, 2), level(0.5), LinearPath(), source="flow", to="eps")


@given(st.floats(1e-6, 1 - 1e-6), st.sampled_from(list(SCHEDULES)))
def test_velocity_conversion_is_exact_wherever_it_is_defined(at: float, name: str) -> None:
    schedule = schedule_from_name(name)
    x, eps = torch.tensor([[0.3, -1.2]], dtype=torch.float64), torch.tensor([[1.1, 0.4]], dtype=torch.float64)
    x_t, velocity = schedule.corrupt(x, eps, level(at)), target("velocity", schedule, x=x, eps=eps, level=level(at))
    # What is left of sixteen digits after dividing by a determinant that may be as large as 1e12 or as small as 1.
    for to, wanted in (("x0", x), ("eps", eps)):
        got = convert_prediction(velocity, x_t, level(at), schedule, source="velocity", to=to)
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


# --- keyed noise


def test_keyed_numbers_are_these_forever() -> None:
    """Stored features and half-finished trainings rely on these values: another numpy must give them, too."""
    ids = torch.tensor([0, 5])
    normal = [
        [-0.2933390140533447, 1.703830599784851, 1.5391918420791626],
        [0.173655167222023, 0.08959107846021652, 0.7525456547737122],
    ]
    assert RandomStream(7).normal(ids, (3,)).tolist() == normal
    assert RandomStream(7, "level").uniform(ids).tolist() == [0.8325354439343788, 0.5844585136340464]
    assert RandomStream(7, "order").permutation(8).tolist() == [3, 6, 0, 7, 5, 2, 4, 1]
    drawn = RandomStream(7, "sampling").normal(torch.tensor([5]), (2,), draw=3)
    assert drawn.tolist() == [[1.8070327043533325, 1.1463477611541748]]


def test_noise_of_a_sample_is_the_same_bits_in_any_batch() -> None:
    key, ids = RandomStream(3), torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:64]
    together = key.normal(ids, (2, 4, 4), draw=1)
    assert together.shape == (64, 2, 4, 4)
    assert together.dtype == torch.float32
    alone = torch.cat([key.normal(ids[i : i + 1], (2, 4, 4), draw=1) for i in range(64)])
    assert torch.equal(together, alone)
    assert torch.equal(together.flip(0), key.normal(ids.flip(0), (2, 4, 4), draw=1))
    levels = key.uniform(ids)
    assert levels.dtype == torch.float64
    assert torch.equal(levels, torch.cat([key.uniform(ids[i : i + 1]) for i in range(64)]))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6), st.integers(0, 2**63 - 1))
def test_noise_does_not_depend_on_its_neighbors(ids: list[int], seed: int) -> None:
    key, batch = RandomStream(seed), torch.tensor(ids)
    first = key.normal(batch, (4,))
    assert torch.equal(first[-1:], key.normal(batch[-1:], (4,)))
    assert bool(first.isfinite().all())


def test_seeds_purposes_samples_and_draws_have_streams_of_their_own() -> None:
    keys = [RandomStream(seed, purpose) for seed in (0, 1, 2**62) for purpose in PURPOSES]
    ids = torch.tensor([0, 1, 2, 2**40, -1])
    rows = torch.cat([key.normal(ids, (8,), draw=draw) for key in keys for draw in (0, 1, 7)])
    assert len(rows.unique(dim=0)) == len(rows)
    # Not only unequal but unrelated: neighboring keys, ids and draws have no correlation.
    neighbors: list[tuple[int, Purpose, int, int]] = [
        (0, "noise", 0, 0),
        (1, "noise", 0, 0),
        (0, "level", 0, 0),
        (0, "noise", 1, 0),
        (0, "noise", 0, 1),
    ]
    long = [RandomStream(s, purpose).normal(torch.tensor([i]), (20_000,), draw=d)[0] for s, purpose, i, d in neighbors]
    correlation = torch.corrcoef(torch.stack(long)) - torch.eye(5)
    # Five standard errors of a correlation of 20 000 independent pairs.
    assert float(correlation.abs().max()) < 5 / math.sqrt(20_000)


def test_keyed_noise_is_standard_normal_and_uniform() -> None:
    normal = RandomStream(0).normal(torch.arange(400), (500,)).double()
    n = normal.numel()
    # Five standard errors of the moments of n = 200 000 normal numbers.
    assert abs(float(normal.mean())) < 5 / math.sqrt(n)
    assert abs(float(normal.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((normal**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    # Across samples, too, at one place: the ids are what differs there.
    assert float(normal.mean(0).abs().max()) < 5 / math.sqrt(400)
    uniform = RandomStream(0, "level").uniform(torch.arange(4000))
    assert 0 <= float(uniform.min()) <= float(uniform.max()) < 1
    counts = torch.histc(uniform, 10, 0, 1)
    assert float((counts - 400).abs().max()) < 5 * math.sqrt(4000 * 0.1 * 0.9)


def test_orders_are_permutations_that_change_with_the_epoch() -> None:
    key = RandomStream(0, "order")
    first, second = key.permutation(50), key.permutation(50, draw=1)
    assert first.dtype == torch.int64
    assert sorted(first.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()
    assert torch.equal(first, RandomStream(0, "order").permutation(50))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed must be between 0 and 2\*\*63 - 1, got {seed}"):
        RandomStream(seed)
