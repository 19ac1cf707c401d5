"""Schedules against closed forms, the papers' formulas and an independent DDPM."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.noise.names import ScheduleName
from layerprobe.noise.predictions import target
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
        # alpha = sigma where 19.9 s^2 / 2 + 0.1 s = log 2.
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
def test_sit_paths_have_the_alpha_and_sigma_of_the_paper(name: str) -> None:
    schedule, (alpha, sigma) = schedule_from_name(name), SIT_PATHS[name]
    levels = schedule.noise_level(TIMES)
    # 1e-11: at t = 0.999 the variance of VP is a difference of numbers 1e4 times as large.
    torch.testing.assert_close(schedule.alpha(levels), alpha(TIMES), rtol=1e-11, atol=0)
    torch.testing.assert_close(schedule.sigma(levels), sigma(TIMES), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", SIT_PATHS)
def test_velocity_of_sit_paths_is_the_derivative_by_their_time(name: str) -> None:
    """The target of the official networks is d x_t / dt; ours has the opposite sign, since it points to noise."""
    schedule, (alpha, sigma), step = schedule_from_name(name), SIT_PATHS[name], 1e-6
    x, eps = torch.randn(2, len(TIMES), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after, before = (alpha(t)[:, None] * x + sigma(t)[:, None] * eps for t in (TIMES + step, TIMES - step))
    velocity = target("velocity", schedule, x=x, eps=eps, level=schedule.noise_level(TIMES))
    # 1e-5: the third derivative of VP is large near data, and the difference loses digits there.
    torch.testing.assert_close(-velocity, (after - before) / (2 * step), rtol=1e-5, atol=1e-6)


def test_repa_cosine_path_is_that_of_sit_with_reversed_time() -> None:
    sit, repa = GVP(), GVP(data_time=0, noise_time=1)
    assert repa.time_direction == -sit.time_direction == 1
    torch.testing.assert_close(repa.native_time(LEVELS), 1 - sit.native_time(LEVELS), rtol=0, atol=1e-15)
    times = torch.tensor([0.1, 0.7], dtype=torch.float64)
    torch.testing.assert_close(repa.alpha(repa.noise_level(times)), torch.cos(times * math.pi / 2))


def test_vp_level_range_excludes_pure_noise_and_clean_data() -> None:
    vp = VP()
    low, high = vp.level_range
    assert vp.alpha(level(high)).item() == pytest.approx(math.exp(-19.9 / 4 - 0.05), rel=1e-9)
    assert vp.sigma(level(low)).item() == pytest.approx(math.sqrt(0.1 * 1e-5), rel=1e-3)
    native_times = vp.native_time(torch.tensor([0.0, low, high, (1 + high) / 2, 1.0], dtype=torch.float64))
    assert native_times.tolist() == pytest.approx([1, 1 - 1e-5, 0, 0, 0], abs=1e-12)
    assert native_times.min() >= 0
    for bad in ((0.0, 20.0), (2.0, 1.0), (0.1, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match=r"^need 0 < beta_min < beta_max, got"):
            VP(*bad)


@every_schedule
def test_path_time_runs_from_data_to_noise(name: str) -> None:
    schedule, step = schedule_from_name(name), 1e-7
    times = schedule.path_time(LEVELS)
    torch.testing.assert_close(schedule.level_at(times), LEVELS, rtol=1e-12, atol=0)
    slope = (schedule.path_time(LEVELS + step) - schedule.path_time(LEVELS - step)) / (2 * step)
    torch.testing.assert_close(schedule.path_rate(LEVELS), slope, rtol=1e-6, atol=0)
    if name in SIT_PATHS:
        torch.testing.assert_close(schedule.native_time(LEVELS), 1 - times, rtol=0, atol=1e-12)
        assert schedule.path_time(level(0)).item() == 0
        assert schedule.path_time(level(schedule.level_range[1])).item() == pytest.approx(1, rel=1e-12)
    else:  # path time is the noise level itself, without rounding
        assert times is LEVELS
        assert schedule.level_at(times) is times
        assert bool((schedule.path_rate(LEVELS) == 1).all())


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
def test_native_time_follows_time_direction(name: str) -> None:
    schedule = schedule_from_name(name)
    steps = schedule.native_time(torch.linspace(0.05, 0.93, 40, dtype=torch.float64)).diff()
    assert bool((steps * schedule.time_direction > 0).all())


def test_linear_path_has_data_and_noise_at_the_given_times() -> None:
    for data_time, noise_time in ((1, 0), (0, 1), (0, 1000), (3.0, -2.0)):
        path = LinearPath(data_time, noise_time)
        assert path.native_time(torch.tensor([0.0, 1.0])).tolist() == [data_time, noise_time]
        assert path.time_direction == (1 if noise_time > data_time else -1)
    assert LinearPath().native_time(torch.tensor([0.25])).item() == 0.75  # official SiT: time 1 is data
    with pytest.raises(ValueError, match=r"data and noise are both at time 1; pass two different times"):
        LinearPath(1, 1)


def ddpm_by_hand(betas: str) -> NDArray[np.float64]:
    """Returns abar_t, computed from the formulas of the papers without code of layerprobe."""
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
    # 1e-9: the cosine betas end at abar = 2e-9, and 1 - abar keeps 16 digits of 1.
    np.testing.assert_allclose(schedule.alpha(levels).numpy(), np.sqrt(abar), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(schedule.sigma(levels).numpy(), np.sqrt(1 - abar), rtol=1e-9, atol=1e-12)
    assert schedule.level_range == (float(levels[0]), float(levels[-1]))


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_ddpm_takes_the_nearest_time_by_log_snr(betas: str) -> None:
    schedule, abar = DDPM.from_name(betas), ddpm_by_hand(betas)
    table = np.log(abar) - np.log1p(-abar)
    for value in np.random.default_rng(0).uniform(0.02, 0.98, 200):
        log_snr = 2 * math.log((1 - value) / value)
        assert int(schedule.native_time(level(value))) == int(np.abs(table - log_snr).argmin())


def test_ddpm_clamps_levels_beyond_its_ends() -> None:
    schedule = schedule_from_name("ddpm-linear")
    low, high = schedule.level_range
    assert low == pytest.approx(0.01, abs=0.001)
    assert high == pytest.approx(0.9936, abs=0.001)
    assert schedule.native_time(torch.tensor([0.0, low / 2, (1 + high) / 2, 1.0])).tolist() == [0, 0, 999, 999]


def test_ddpm_takes_a_level_of_any_precision() -> None:
    schedule = schedule_from_name("ddpm-cosine")
    times = torch.arange(0, 1000, 7)
    assert torch.equal(schedule.native_time(schedule.noise_level(times).float()), times)


def test_ddpm_takes_custom_betas_and_ends() -> None:
    assert len(DDPM([0.1, 0.2, 0.3]).betas) == 3
    assert DDPM([0.1]).level_range[0] == DDPM([0.1]).level_range[1]
    short = DDPM.from_name("linear", 10, start=0.01, end=0.1)
    torch.testing.assert_close(short.betas, torch.linspace(0.01, 0.1, 10, dtype=torch.float64), rtol=1e-14, atol=0)
    scaled = DDPM.from_name("scaled_linear", 10, start=0.01, end=0.09)
    assert scaled.betas.tolist()[0] == pytest.approx(0.01)
    assert scaled.betas.tolist()[-1] == pytest.approx(0.09)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        DDPM.from_name("linear", start=0.0)  # zero was passed, and is not a valid beta
    with pytest.raises(ValueError, match="cosine betas take no start and no end; leave them out"):
        DDPM.from_name("cosine", start=0.1)


@pytest.mark.parametrize(
    ("betas", "shape_or_values"),
    [
        ([], r"shape \(0,\)"),
        ([[0.1, 0.2]], r"shape \(1, 2\) with values from 0.1 to 0.2"),
        ([0.1, 1.0], r"shape \(2,\) with values from 0.1 to 1"),
        ([0.0, 0.5], r"with values from 0 to 0.5"),
        ([0.1, math.nan], "nan"),
    ],
)
def test_invalid_betas_are_refused(betas: Any, shape_or_values: str) -> None:
    with pytest.raises(ValueError, match=r"betas must be a non-empty 1-D sequence .* got .*" + shape_or_values):
        DDPM(torch.tensor(betas))


@pytest.mark.parametrize("time", [-1.0, 1000.0, 3.5])
def test_ddpm_refuses_times_outside_its_steps(time: float) -> None:
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
    with pytest.raises(ValueError, match="unknown schedule 'vp'; use sit, flow, flow-1000, ddpm-linear"):
        schedule_from_name("vp")
    with pytest.raises(ValueError, match="unknown betas 'sigmoid'; use linear, scaled_linear or cosine"):
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
def test_schedule_is_rebuilt_from_its_configuration(schedule: NoiseSchedule) -> None:
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


def test_every_schedule_is_a_choice_of_the_command_line() -> None:
    assert set(get_args(ScheduleName)) == set(SCHEDULES)
