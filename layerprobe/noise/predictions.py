"""What a network predicts (velocity, eps, x0, v or score), and conversions between these predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from layerprobe.messages import unknown
from layerprobe.noise.names import PREDICTIONS, Prediction
from layerprobe.noise.schedules import GVP, VP, NoiseSchedule, Rescaled, per_sample

# Margin in path time that training and sampling keep from an end of the path where they cannot use the prediction.
END = 1e-3


def _coefficients(prediction: Prediction, schedule: NoiseSchedule, level: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (a, b) of the prediction a x_0 + b eps."""
    zero, one = torch.zeros_like(level), torch.ones_like(level)
    if prediction == "eps":
        return zero, one
    if prediction == "x0":
        return one, zero
    if prediction == "v":  # Salimans & Ho 2022 (arXiv:2202.00512)
        unit = schedule.scale / schedule.own.scale
        return -schedule.sigma(level) / unit, schedule.alpha(level) * unit
    if prediction == "velocity":
        rate = schedule.path_rate(level)
        return schedule.alpha_rate(level) / rate, schedule.sigma_rate(level) / rate
    if prediction == "score":  # the gradient of log p(x_t), Song et al. 2021 (arXiv:2011.13456)
        return zero, -1 / schedule.sigma(level)
    raise ValueError(unknown("prediction", prediction, PREDICTIONS))


def target(prediction: Prediction, schedule: NoiseSchedule, *, x: Tensor, eps: Tensor, level: Tensor) -> Tensor:
    """The training target of a prediction, shape (B, ...).

    Args:
        prediction: Quantity that the network predicts.
        schedule: Noise schedule.
        x: Data, shape (B, ...).
        eps: Noise, shape (B, ...).
        level: Noise levels, shape (B,).
    """
    a, b = _coefficients(prediction, schedule, level)
    return per_sample(a, x) * x + per_sample(b, x) * eps


def error_weight(prediction: Prediction, schedule: NoiseSchedule, level: Tensor) -> Tensor:
    """The factor of the squared error in the published loss, one per level: sigma^2 for the score, else 1.

    The score grows like 1 / sigma, and its published loss is `(sigma score + eps)^2` (SiT, arXiv:2401.08740). With a
    `Rescaled` schedule, the loss is that in the units of the network's own data.
    """
    if prediction == "score":
        return schedule.sigma(level) ** 2
    return torch.full_like(level, 1.0 if prediction == "eps" else (schedule.own.scale / schedule.scale) ** 2)


def time_range(prediction: Prediction, schedule: NoiseSchedule) -> tuple[float, float]:
    """The lowest and the highest path time of training, without ends where the target is infinite or uninformative.

    Source: training code of SiT (arXiv:2401.08740), which cuts 1e-5 off its VP path and 1e-3 off both ends for scores.
    """
    if isinstance(schedule.own, VP):
        return schedule.own.first_time, 1.0
    cut = prediction == "score" or (prediction == "eps" and isinstance(schedule.own, GVP))
    return (END, 1 - END) if cut else (0.0, 1.0)


def in_data_units(output: Tensor, level: Tensor, schedule: NoiseSchedule, *, prediction: Prediction) -> Tensor:
    """Converts a prediction from the units of the network's own data to those of the data, shape (B, C, ...).

    A prediction a z_0 + b eps of z_0 = factor x_0 + shift becomes (a factor x_0 + b eps) times 1 for eps, times the
    factor for the score, and divided by the factor otherwise.

    Args:
        output: Prediction of the network, shape (B, C, ...); a velocity points from data to noise.
        level: Noise levels, shape (B,).
        schedule: Noise schedule of the data; only a `Rescaled` one changes the prediction.
        prediction: Quantity that the network predicts.
    """
    if not isinstance(schedule, Rescaled) or prediction == "eps":
        return output
    if prediction == "score":
        return schedule.factor * output
    a, _ = _coefficients(prediction, schedule.inner, level)
    return (output - per_sample(a, output) * schedule.shift_like(output)) / schedule.factor


def convert_prediction(
    output: Tensor, x_t: Tensor, level: Tensor, schedule: NoiseSchedule, *, source: Prediction, to: Prediction
) -> Tensor:
    """Converts one kind of prediction into another.

    Both predictions and x_t are linear in (x_0, eps), so that x_t and one prediction determine the other. Coefficients
    are computed in float64, tensors in their own dtype.

    Args:
        output: Prediction of the network, shape (B, ...); a velocity points from data to noise.
        x_t: Noisy input of the network, shape (B, ...).
        level: Noise levels, shape (B,).
        schedule: Noise schedule of `x_t`.
        source: Kind of prediction of `output`.
        to: Kind of prediction to return.

    Raises:
        ValueError: If x_t and the output do not determine the result at a level. Examples are eps at level 1, where
            x_t contains no data, and every prediction at level 1 of EDM, where sigma is infinite.
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
        unsolvable = float(level[~solvable][0])
        raise ValueError(
            f"{source} at noise level {unsolvable:g} does not determine {to}; keep noise levels strictly inside (0, 1)"
        )
    of_x_t, of_output = (to_a * b - to_b * a) / determinant, (to_b * alpha - to_a * sigma) / determinant
    return per_sample(of_x_t.to(x_t.dtype), x_t) * x_t + per_sample(of_output.to(output.dtype), output) * output
