"""A network that was trained on values in another range, in the units of the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, wrap
from layerprobe.noise.predictions import PREDICTIONS, Prediction, error_weight, target, time_range
from layerprobe.noise.schedules import SCHEDULES, Rescaled, schedule_from_config, schedule_from_name

X = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
EPS = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
LEVEL = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
Z = (X + 1) / 2  # the data of a network that was trained on [0, 1]


def network(name: str, prediction: Prediction, seen: list[Tensor] | None = None) -> Backbone:
    """A network on [0, 1] that knows the answer: the target of its own training."""
    own = schedule_from_name(name)

    def forward(module: nn.Module, x_t: Tensor, time: Tensor, condition: Any) -> Tensor:
        if seen is not None:
            seen.extend((x_t, time))
        flip = -1 if prediction == "velocity" and own.time_direction < 0 else 1
        return flip * target(prediction, own, x=Z, eps=EPS, level=LEVEL)

    options: dict[str, Any] = {"layers": "0", "schedule": name, "prediction": prediction, "shape": (2, 4, 4)}
    return wrap(nn.Sequential(nn.Linear(1, 1)), forward=forward, **options).with_value_range((0, 1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_network_sees_its_own_noisy_data_at_its_own_time(name: str) -> None:
    seen: list[Tensor] = []
    backbone, own = network(name, "x0", seen), schedule_from_name(name)
    backbone.predict(backbone.schedule.corrupt(X, EPS, LEVEL), LEVEL)
    torch.testing.assert_close(seen[0], own.corrupt(Z, EPS, LEVEL), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[1].double(), own.native_time(LEVEL).double())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_its_prediction_is_the_target_of_the_data(name: str, prediction: Prediction) -> None:
    backbone = network(name, prediction)
    schedule = backbone.schedule
    got = backbone.predict(schedule.corrupt(X, EPS, LEVEL), LEVEL)
    expected = target(prediction, schedule, x=X, eps=EPS, level=LEVEL)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    velocity = target("velocity", schedule, x=X, eps=EPS, level=LEVEL)
    torch.testing.assert_close(backbone(schedule.corrupt(X, EPS, LEVEL), LEVEL), velocity, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_that_of_the_networks_own_training(prediction: Prediction) -> None:
    own = schedule_from_name("sit")
    schedule = Rescaled(own, (0, 1))
    change = 0.1 * EPS  # of the clean sample, at the same x_t
    per_level = (-schedule.alpha(LEVEL) / schedule.sigma(LEVEL)).view(-1, 1, 1, 1).float()
    error = target(prediction, schedule, x=change, eps=per_level * change, level=LEVEL).square().flatten(1).mean(1)
    per_level = (-own.alpha(LEVEL) / own.sigma(LEVEL)).view(-1, 1, 1, 1).float()
    own_error = (
        target(prediction, own, x=change / 2, eps=per_level * change / 2, level=LEVEL).square().flatten(1).mean(1)
    )
    got = error * error_weight(prediction, schedule, LEVEL)
    torch.testing.assert_close(got, own_error * error_weight(prediction, own, LEVEL), rtol=1e-5, atol=1e-8)


def test_channels_have_their_own_shift_and_one_factor() -> None:
    schedule = Rescaled(schedule_from_name("flow"), (-2.0, 2.0, -1.9, 2.1))
    assert (schedule.factor, schedule.shift) == (2.0, (0.0, pytest.approx(0.1)))
    clean = schedule.network_input(X, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(clean, 2 * X + torch.tensor([0.0, 0.1]).view(1, 2, 1, 1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_rebuilt_from_its_configuration(name: str) -> None:
    schedule = Rescaled(schedule_from_name(name), (0, 1))
    again = schedule_from_config(schedule.to_config())
    assert again.to_config() == schedule.to_config()
    assert time_range("score", again) == time_range("score", schedule.inner)
    assert again.level_range == schedule.inner.level_range


def test_a_range_is_replaced_not_applied_twice() -> None:
    backbone = network("sit", "velocity")
    assert backbone.value_range == (0, 1)
    assert backbone.with_value_range((0, 255)).value_range == (0, 255)
    assert backbone.with_value_range((-1, 1)).schedule is backbone.schedule.own
    assert backbone.with_schedule(schedule_from_name("flow")).value_range == (0, 1)


@pytest.mark.parametrize("bad", [(), (1,), (1, 0), (0, 0), (0, float("inf")), (0, 1, 2)])
def test_what_is_no_range_is_refused(bad: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"^the value range .* is not LOW,HIGH, or such a pair for each channel; pass"):
        Rescaled(schedule_from_name("sit"), bad)


def test_channels_that_differ_much_or_are_too_many_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^the value range 0,1,0,2 is 2 times wider in one channel than in another;"):
        Rescaled(schedule_from_name("sit"), (0, 1, 0, 2))
    with pytest.raises(
        ValueError, match=r"^the value range has 6 numbers, but Sequential takes 2 channels; pass LOW,HIGH"
    ):
        network("sit", "x0").with_value_range((0, 1) * 3)
