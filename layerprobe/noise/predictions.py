"""What a network predicts (velocity, eps, x0, v or score) and how one prediction is converted into another."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from layerprobe.noise.schedules import GVP, VP, NoiseSchedule, per_sample

Prediction = Literal["velocity", "eps", "x0", "v", "score"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)

END = 1e-3  # of the path's time, which training and sampling keep off an end that they cannot use


def _coefficients(prediction: Prediction, schedule: NoiseSchedule, level: Tensor) -> tuple[Tensor, Tensor]:
    """What is predicted, as a x_0 + b eps."""
    zero, one = torch.zeros_like(level), torch.ones_like(level)
    if prediction == "eps":
        return zero, one
    if prediction == "x0":
        return one, zero
    if prediction == "v":  # Salimans & Ho 2022 (arXiv:2202.00512)
        return -schedule.sigma(level), schedule.alpha(level)
    if prediction == "velocity":
        rate = schedule.path_rate(level)
        return schedule.alpha_rate(level) / rate, schedule.sigma_rate(level) / rate
    if prediction == "score":  # the gradient of log p(x_t), Song et al. 2021 (arXiv:2011.13456)
        return zero, -1 / schedule.sigma(level)
    raise ValueError(f"unknown prediction {prediction!r}; use one of {', '.join(PREDICTIONS)}")


def target(prediction: Prediction, schedule: NoiseSchedule, *, x: Tensor, eps: Tensor, level: Tensor) -> Tensor:
    """What a perfect network would predict, for x and eps of shape (B, ...) and levels of shape (B,)."""
    a, b = _coefficients(prediction, schedule, level)
    return per_sample(a, x) * x + per_sample(b, x) * eps


def error_weight(prediction: Prediction, schedule: NoiseSchedule, level: Tensor) -> Tensor:
    """Factor of the squared error in the published loss, one per level: sigma^2 for the score, else 1.

    The score grows like 1 / sigma; the published loss is `(sigma score + eps)^2` (SiT, arXiv:2401.08740).
    """
    return schedule.sigma(level) ** 2 if prediction == "score" else torch.ones_like(level)


def time_range(prediction: Prediction, schedule: NoiseSchedule) -> tuple[float, float]:
    """The path's times to train at: all, but for the ends where what is to be predicted is infinite or tells nothing.

    Source: SiT's training code (arXiv:2401.08740), which cuts 1e-5 off its VP path and 1e-3 off both ends for scores.
    """
    if isinstance(schedule, VP):
        return schedule.first_time, 1.0
    cut = prediction == "score" or (prediction == "eps" and isinstance(schedule, GVP))
    return (END, 1 - END) if cut else (0.0, 1.0)


def convert_prediction(
    output: Tensor, x_t: Tensor, level: Tensor, schedule: NoiseSchedule, *, source: Prediction, to: Prediction
) -> Tensor:
    """Turns one kind of prediction into another.

    Both kinds are linear in (x_0, eps), and so is x_t: two equations give the third. The coefficients are computed in
    float64, the tensors in their own type.

    Args:
        output: What the network predicted, shape (B, ...), in the sense of `source` with time from data to noise.
        x_t: What it saw, shape (B, ...).
        level: Noise levels, shape (B,).
        schedule: The schedule of `x_t`.
        source: What `output` is.
        to: What is wanted.

    Raises:
        ValueError: If x_t and the output do not determine the answer at a level (such as eps at level 1, where x_t
            holds no data, or anything where EDM is infinitely noisy).
    """
    if source == to:
        return output
    level = level.double()
    alpha, sigma = schedule.alpha(level), schedule.sigma(level)
    a, b = _coefficients(source, schedule, level)
    to_a, to_b = _coefficients(to, schedule, level)
    determinant = alpha * b - sigma * a
    solvable = determinant.isfinite() & (determinant.abs() > 1e-12)
    if not bool(solvable.all()):
        bad = float(level[~solvable][0])
        raise ValueError(
            f"{source} at noise level {bad:g} does not determine {to}; keep noise levels strictly inside (0, 1)"
        )
    of_x_t, of_output = (to_a * b - to_b * a) / determinant, (to_b * alpha - to_a * sigma) / determinant
    return per_sample(of_x_t.to(x_t.dtype), x_t) * x_t + per_sample(of_output.to(output.dtype), output) * output
