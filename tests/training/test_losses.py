"""Prediction losses and their weights against the formulas of the papers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SHAPE, tiny_samples, tiny_sit

from layerprobe.noise.predictions import convert_prediction
from layerprobe.noise.schedules import DDPM, LinearPath, schedule_from_name
from layerprobe.training.batches import TrainingBatch, batches
from layerprobe.training.losses import HELD_OUT_LEVELS, held_out_loss, loss_weights, prediction_loss
from layerprobe.training.plan import TrainingPlan

PLAN = TrainingPlan(steps=1, batch_size=5, label_drop=0.25, seed=3)
NUM = 12


@pytest.fixture
def batch() -> TrainingBatch:
    return next(iter(batches(tiny_sit(), tiny_samples(NUM), PLAN)))


@pytest.mark.parametrize("data_time", [1, 0])
def test_the_loss_of_flow_matching(batch: TrainingBatch, data_time: int) -> None:
    """SiT predicts data - noise at a time that is 1 at data; other models predict noise - data at the noise level."""
    backbone = tiny_sit(schedule=LinearPath(data_time, 1 - data_time))
    level = batch.level.float().view(-1, 1, 1, 1)
    x_t = (1 - level) * batch.x + level * batch.eps
    velocity, time = (batch.x - batch.eps, 1 - level) if data_time else (batch.eps - batch.x, level)
    expected = (backbone.module(x_t, time.flatten(), batch.condition) - velocity).square().mean((1, 2, 3))
    # Rounding errors of a float32 network; the squared error is of order 1.
    torch.testing.assert_close(prediction_loss(backbone, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loss_of_ddpm(batch: TrainingBatch, prediction: Any) -> None:
    schedule = DDPM.from_name("linear")
    backbone = tiny_sit(schedule=schedule, prediction=prediction)
    level = batch.level.view(-1, 1, 1, 1)
    norm = torch.sqrt(level**2 + (1 - level) ** 2)
    alpha, sigma = ((1 - level) / norm).float(), (level / norm).float()
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    log_snr = 2 * (torch.log1p(-batch.level) - torch.log(batch.level))
    time = (torch.log(abar / (1 - abar)) - log_snr[:, None]).abs().argmin(1)
    expected_output = {"eps": batch.eps, "x0": batch.x, "v": alpha * batch.eps - sigma * batch.x}[prediction]
    output = backbone.module(alpha * batch.x + sigma * batch.eps, time, batch.condition)
    expected = (output - expected_output).square().mean((1, 2, 3))
    torch.testing.assert_close(prediction_loss(backbone, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "prediction"), [("sit-gvp", "velocity"), ("sit-gvp", "score"), ("sit-vp", "velocity")]
)
def test_the_loss_of_the_curved_paths_of_sit(batch: TrainingBatch, name: str, prediction: Any) -> None:
    """In the time t of SiT, which is 1 at data: velocity d x_t / dt, and (sigma score + eps)^2."""
    backbone = tiny_sit(schedule=schedule_from_name(name), prediction=prediction)
    time = backbone.schedule.native_time(batch.level).requires_grad_()
    if name == "sit-gvp":
        alpha, sigma = torch.sin(time * math.pi / 2), torch.cos(time * math.pi / 2)
    else:
        alpha = torch.exp(-((1 - time) ** 2) * (20 - 0.1) / 4 - (1 - time) * 0.1 / 2)
        sigma = torch.sqrt(1 - alpha**2)
    (alpha_rate,) = torch.autograd.grad(alpha.sum(), time, retain_graph=True)
    (sigma_rate,) = torch.autograd.grad(sigma.sum(), time)
    alpha, sigma, alpha_rate, sigma_rate = (
        c.detach().float().view(-1, 1, 1, 1) for c in (alpha, sigma, alpha_rate, sigma_rate)
    )
    output = backbone.module(alpha * batch.x + sigma * batch.eps, time.detach().float(), batch.condition)
    error = output - (alpha_rate * batch.x + sigma_rate * batch.eps)
    if prediction == "score":
        error = sigma * output + batch.eps
    # The velocity of VP is of order 10; the tolerance is relative to it, for a network in float32.
    torch.testing.assert_close(prediction_loss(backbone, batch), error.square().mean((1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_padding_does_not_affect_the_loss(batch: TrainingBatch) -> None:
    backbone, mask = tiny_sit(), torch.ones(5, 4, 4, dtype=torch.bool)
    mask[:, 2:] = False
    mask[0] = True
    losses = prediction_loss(backbone, replace(batch, mask=mask))
    other = batch.x.masked_fill(~mask.unsqueeze(1), 7.0)
    assert torch.equal(prediction_loss(backbone, replace(batch, x=other, mask=mask)), losses)
    torch.testing.assert_close(losses[:1], prediction_loss(backbone, batch)[:1])
    level = batch.level.float().view(-1, 1, 1, 1)
    x_t = (1 - level) * batch.x + level * batch.eps
    output = backbone.module(x_t, 1 - level.flatten(), batch.condition, mask)
    error = (output - (batch.x - batch.eps)).square()
    torch.testing.assert_close(losses[1:], error[1:, :, :2].mean((1, 2, 3)))


PREDICTED = [
    ("sit", "velocity"),
    ("sit", "x0"),
    ("ddpm-linear", "eps"),
    ("ddpm-linear", "x0"),
    ("ddpm-linear", "v"),
    ("sit-gvp", "velocity"),
    ("sit-gvp", "score"),
    ("sit-vp", "eps"),
]


@pytest.mark.parametrize(("name", "prediction"), PREDICTED)
def test_min_snr_weighs_the_error_of_x0_whatever_is_predicted(batch: TrainingBatch, name: str, prediction: Any) -> None:
    """Hang et al. 2023: min(SNR, gamma) (x0 - predicted x0)^2, with the prediction converted to x0."""
    backbone = tiny_sit(schedule=schedule_from_name(name), prediction=prediction)
    level = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.9], dtype=torch.float64)
    batch, schedule = replace(batch, level=level), backbone.schedule
    x_t = schedule.corrupt(batch.x, batch.eps, level)
    output = backbone.predict(x_t, level.float(), batch.condition)
    x0 = convert_prediction(output, x_t, level, schedule, source=prediction, to="x0")
    snr = (schedule.alpha(level) / schedule.sigma(level)) ** 2
    expected = snr.clamp(max=4.0) * (x0 - batch.x).double().square().mean((1, 2, 3))
    weights = loss_weights(backbone, level, weighting="min-snr", snr_gamma=4.0)
    # The conversion in float32 loses digits if x_t is nearly pure noise.
    torch.testing.assert_close(weights * prediction_loss(backbone, batch).double(), expected, rtol=1e-3, atol=1e-3)


def test_min_snr_weights_equal_those_of_the_paper() -> None:
    level = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    snr = ((1 - level) / level) ** 2
    least = snr.clamp(max=5)
    for prediction, expected in (("x0", least), ("eps", least / snr), ("v", least / (snr + 1))):
        backbone = tiny_sit(schedule=DDPM.from_name("cosine"), prediction=prediction)  # type: ignore[arg-type]
        torch.testing.assert_close(loss_weights(backbone, level, weighting="min-snr"), expected)


@pytest.mark.parametrize("prediction", ["eps", "score"])
def test_velocity_and_likelihood_weights_are_those_of_sit(prediction: Any) -> None:
    """In the time t of SiT on its cosine path: g = alpha' / alpha sigma^2 - sigma sigma', for the error of eps."""
    backbone = tiny_sit(schedule=schedule_from_name("sit-gvp"), prediction=prediction)
    time = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    angle = time * math.pi / 2
    alpha, sigma, rate = torch.sin(angle), torch.cos(angle), math.pi / 2
    g = rate * torch.cos(angle) / alpha * sigma**2 + sigma * rate * torch.sin(angle)
    level = backbone.schedule.noise_level(time)
    for weighting, expected in (("velocity", (g / sigma) ** 2), ("likelihood", g / sigma**2)):
        torch.testing.assert_close(loss_weights(backbone, level, weighting=weighting), expected)  # type: ignore[arg-type]


def test_weights_are_finite_at_the_ends_and_one_without_weighting() -> None:
    ends = torch.tensor([0.0, 1e-3, 1 - 1e-3, 1.0], dtype=torch.float64)
    for name, prediction in PREDICTED:
        backbone = tiny_sit(schedule=schedule_from_name(name), prediction=prediction)  # type: ignore[arg-type]
        assert (loss_weights(backbone, ends, weighting="none") == 1).all()
        for weighting in ("min-snr", "velocity", "likelihood"):
            weights = loss_weights(backbone, ends, weighting=weighting)  # type: ignore[arg-type]
            assert (weights.isfinite() & (weights > 0)).all()
            assert torch.equal(weights[::3], weights[1:3])
    same = loss_weights(tiny_sit(), ends, weighting="velocity")
    torch.testing.assert_close(same, torch.ones_like(same))


def test_a_model_without_classes_ignores_labels(batch: TrainingBatch) -> None:
    backbone = tiny_sit(num_classes=0)
    torch.testing.assert_close(
        prediction_loss(backbone, batch), prediction_loss(backbone, replace(batch, condition=None))
    )


def test_held_out_loss_equals_a_plain_loop() -> None:
    backbone, samples = tiny_sit(), tiny_samples(7, first_id=20)
    expected = dict.fromkeys(HELD_OUT_LEVELS, 0.0)
    for level in HELD_OUT_LEVELS:
        for row in range(7):
            stream = np.random.Philox(key=np.array([9, 20 + row], np.uint64), counter=np.zeros(4, np.uint64))
            eps = torch.from_numpy(np.random.Generator(stream).standard_normal(16, np.float32)).view(SHAPE)
            x_t = (1 - level) * samples.x[row] + level * eps
            with torch.no_grad():
                output = backbone.module(x_t[None], torch.tensor([1 - level]), torch.tensor([3]))
            expected[level] += (output[0] - (samples.x[row] - eps)).square().mean().item() / 7
    for size in (2, 256):
        assert held_out_loss(backbone, samples, seed=9, batch_size=size) == pytest.approx(expected, rel=1e-5)
