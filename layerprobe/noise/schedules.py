"""Noise schedules of every family of diffusion models, on one common noise axis.

Every model here sees `x_t = alpha x_0 + sigma eps`. The noise level is `sigma / (alpha + sigma)`: 0 is clean, 1 is
pure noise, and equal levels mean equal signal-to-noise ratios in every family. `log_snr = 2 log(alpha / sigma)`, so
`noise_level = sigmoid(-log_snr / 2)`.

The velocity is `d x_t / d path_time`. Path time runs from 0 at data to 1 at noise, so the velocity points from data to
noise. On the linear path, in DDPM and in EDM, path time is the noise level itself; on the linear path the velocity is
`eps - x_0`. On SiT's cosine and variance-preserving paths, path time is the time of SiT's formulas, counted from data.
A network trained on these paths therefore predicts this velocity, and its loss is the published one.

Velocity times `path_rate` is `d x_t / d noise_level`, which the sampler integrates in every family. The time and the
sign that a family uses natively appear only in its `NoiseSchedule`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerprobe.messages import unknown

DDPM_BETAS = ("linear", "scaled_linear", "cosine")


class NoiseSchedule(ABC):
    """The noise schedule of a family: how it mixes data and noise, and which native time its networks take.

    All methods are element-wise on tensors of noise levels in [0, 1] and return the dtype of their input.

    Attributes:
        name: Name of the schedule in `to_config` and in messages.
        time_direction: +1 if the native time grows with the noise, -1 if it falls.
        integer_time: Whether the native time is an integer index (0, 1, ..., T-1).
        scale: Standard deviation of the data, the unit in which the noise level counts sigma; 1 except for EDM.
    """

    name: str
    time_direction: int = 1
    integer_time: bool = False
    scale: float = 1.0

    @abstractmethod
    def alpha(self, level: Tensor) -> Tensor:
        """The factor of the data in x_t."""

    @abstractmethod
    def sigma(self, level: Tensor) -> Tensor:
        """The factor of the noise in x_t."""

    @abstractmethod
    def alpha_rate(self, level: Tensor) -> Tensor:
        """The derivative of alpha with respect to the noise level."""

    @abstractmethod
    def sigma_rate(self, level: Tensor) -> Tensor:
        """The derivative of sigma with respect to the noise level."""

    @abstractmethod
    def native_time(self, level: Tensor) -> Tensor:
        """The native time at a noise level, as the network receives it."""

    @abstractmethod
    def noise_level(self, native_time: Tensor) -> Tensor:
        """The noise level at a native time; inverts `native_time` up to rounding.

        Raises:
            ValueError: If the family has integer times and the native time is not one of them.
        """

    def path_time(self, level: Tensor) -> Tensor:
        """The path time of the velocity, 0 at data and 1 at noise; the noise level itself by default."""
        return level

    def level_at(self, path_time: Tensor) -> Tensor:
        """The noise level at a path time; inverts `path_time`."""
        return path_time

    def path_rate(self, level: Tensor) -> Tensor:
        """The derivative of path time with respect to the noise level, positive inside (0, 1)."""
        return torch.ones_like(level)

    @property
    def level_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level of training."""
        return 0.0, 1.0

    def log_snr(self, level: Tensor) -> Tensor:
        """The log-SNR 2 log(alpha scale / sigma) = 2 log((1 - level) / level); infinite at the ends."""
        return 2 * (torch.log1p(-level) - torch.log(level))

    def level_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The noise level with this log signal-to-noise ratio."""
        return torch.sigmoid(-log_snr / 2)

    @property
    def own(self) -> NoiseSchedule:
        """The schedule in the units of the network's own data; only `Rescaled` differs from it."""
        return self

    def network_input(self, x_t: Tensor, level: Tensor) -> Tensor:
        """The noisy samples in the units of the network's own data, for x_t of shape (B, ...) and levels (B,)."""
        return x_t

    def corrupt(self, x: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """The noisy samples x_t = alpha x + sigma eps, for x and eps of shape (B, ...) and levels of shape (B,)."""
        return per_sample(self.alpha(level), x) * x + per_sample(self.sigma(level), x) * eps

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Returns a JSON-compatible configuration from which `schedule_from_config` rebuilds this schedule."""


class LinearPath(NoiseSchedule):
    """The linear path of flow matching and rectified flow: x_t = (1 - level) x_0 + level eps.

    Args:
        data_time: Native time of data: 1 in SiT and LayerSync, 0 in REPA, SRA and diffusers.
        noise_time: Native time of noise: 0 in SiT, 1 in REPA, 1000 in diffusers.

    Raises:
        ValueError: If both times are equal.

    Source: Lipman et al. 2022 (arXiv:2210.02747); Liu et al. 2022 (arXiv:2209.03003).
    """

    name = "linear"

    def __init__(self, data_time: float = 1.0, noise_time: float = 0.0) -> None:
        if data_time == noise_time:
            raise ValueError(f"data and noise are both at time {data_time}; pass two different times")
        self.data_time, self.noise_time = float(data_time), float(noise_time)
        self.time_direction = 1 if noise_time > data_time else -1

    def alpha(self, level: Tensor) -> Tensor:
        return 1 - level

    def sigma(self, level: Tensor) -> Tensor:
        return level

    def alpha_rate(self, level: Tensor) -> Tensor:
        return -torch.ones_like(level)

    def sigma_rate(self, level: Tensor) -> Tensor:
        return torch.ones_like(level)

    def native_time(self, level: Tensor) -> Tensor:
        return self.data_time + (self.noise_time - self.data_time) * level

    def noise_level(self, native_time: Tensor) -> Tensor:
        return (native_time - self.data_time) / (self.noise_time - self.data_time)

    def to_config(self) -> dict[str, Any]:
        return {"schedule": "linear", "data_time": self.data_time, "noise_time": self.noise_time}


class QuarterCircle(NoiseSchedule):
    """The base class of variance-preserving schedules, alpha^2 + sigma^2 = 1: (alpha, sigma) is on a quarter circle.

    `(alpha, sigma) = (1 - level, level) / norm`, so the schedules differ only in the time at which they reach a level.
    """

    def alpha(self, level: Tensor) -> Tensor:
        return (1 - level) / self._norm(level)

    def sigma(self, level: Tensor) -> Tensor:
        return level / self._norm(level)

    def alpha_rate(self, level: Tensor) -> Tensor:
        return -level / self._norm(level) ** 3

    def sigma_rate(self, level: Tensor) -> Tensor:
        return (1 - level) / self._norm(level) ** 3

    @staticmethod
    def _norm(level: Tensor) -> Tensor:
        return torch.sqrt((1 - level) ** 2 + level**2)


class DDPM(QuarterCircle):
    """The discrete variance-preserving process of DDPM: alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), t = 0 ... T-1.

    `native_time` is the step with the nearest log-SNR; noise levels beyond the ends give 0 and T-1.

    Args:
        betas: Variances of the steps, shape (T,), each in (0, 1).
        name: Name of the schedule.

    Raises:
        ValueError: If betas are empty, not one-dimensional, or not all in (0, 1).

    Source: Ho et al. 2020 (arXiv:2006.11239).
    """

    integer_time = True

    def __init__(self, betas: Tensor | Sequence[float], *, name: str = "ddpm-custom") -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not len(betas) or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                "betas must be a non-empty 1-D sequence of numbers strictly between 0 and 1, "
                f"got shape {tuple(betas.shape)}"
                + (f" with values from {float(betas.min()):g} to {float(betas.max()):g}" if betas.numel() else "")
            )
        self.name, self.betas = name, betas
        abar = torch.cumprod(1 - betas, 0)
        self._levels = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())
        # Steps are nearly evenly spaced in log-SNR, so the nearest step is found there; midpoints are the boundaries.
        log_snr = self.log_snr(self._levels)
        self._edges = self.level_of_log_snr((log_snr[1:] + log_snr[:-1]) / 2)

    @classmethod
    def from_name(cls, betas: str, num_steps: int = 1000, start: float | None = None, end: float | None = None) -> DDPM:
        """Creates the schedule with standard betas.

        Args:
            betas: "linear" (1e-4 to 0.02), "scaled_linear" (0.00085 to 0.012) or "cosine".
            num_steps: Number of steps T.
            start: First beta; None uses the standard one. Not for "cosine".
            end: Last beta; None uses the standard one. Not for "cosine".

        Raises:
            ValueError: If the name is unknown, or "cosine" is combined with start or end.

        Source: Ho et al. 2020; Rombach et al. 2022 (arXiv:2112.10752); Nichol & Dhariwal 2021 (arXiv:2102.09672,
            eq. 17).
        """
        if betas == "cosine" and (start, end) != (None, None):
            raise ValueError("cosine betas take no start and no end; leave them out")
        if betas == "linear":
            first, last = 1e-4 if start is None else start, 0.02 if end is None else end
            table = torch.linspace(first, last, num_steps, dtype=torch.float64)
        elif betas == "scaled_linear":
            first, last = 0.00085 if start is None else start, 0.012 if end is None else end
            table = torch.linspace(first**0.5, last**0.5, num_steps, dtype=torch.float64) ** 2
        elif betas == "cosine":
            t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
            abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            table = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        else:
            raise ValueError(unknown("betas", betas, DDPM_BETAS))
        return cls(table, name=f"ddpm-{betas}")

    def native_time(self, level: Tensor) -> Tensor:
        return torch.bucketize(level.double().contiguous(), self._edges.to(level.device))

    def noise_level(self, native_time: Tensor) -> Tensor:
        index, last = native_time.long(), len(self.betas) - 1
        if bool(((index != native_time) | (index < 0) | (index > last)).any()):
            raise ValueError(f"the native times of {self.name} are 0, 1, ..., {last}, got {native_time.tolist()}")
        return self._levels.to(native_time.device)[index]

    @property
    def level_range(self) -> tuple[float, float]:
        return float(self._levels[0]), float(self._levels[-1])

    def to_config(self) -> dict[str, Any]:
        return {"schedule": self.name, "betas": self.betas.tolist()}


class GVP(QuarterCircle):
    """SiT's cosine path: alpha = cos(pi s / 2), sigma = sin(pi s / 2), s from 0 at data to 1 at noise.

    Args:
        data_time: Native time of data: 1 in SiT, 0 in REPA.
        noise_time: Native time of noise: 0 in SiT, 1 in REPA.

    Source: Ma et al. 2024, SiT (arXiv:2401.08740).
    """

    name = "sit-gvp"

    def __init__(self, data_time: float = 1.0, noise_time: float = 0.0) -> None:
        self._native = LinearPath(data_time, noise_time)
        self.time_direction = self._native.time_direction

    def path_time(self, level: Tensor) -> Tensor:
        return torch.atan2(level, 1 - level) * (2 / math.pi)

    def level_at(self, path_time: Tensor) -> Tensor:
        angle = path_time * (math.pi / 2)
        return torch.sin(angle) / (torch.cos(angle) + torch.sin(angle))

    def path_rate(self, level: Tensor) -> Tensor:
        return 2 / math.pi / self._norm(level) ** 2

    def native_time(self, level: Tensor) -> Tensor:
        return self._native.native_time(self.path_time(level))

    def noise_level(self, native_time: Tensor) -> Tensor:
        return self.level_at(self._native.noise_level(native_time))

    def to_config(self) -> dict[str, Any]:
        return self._native.to_config() | {"schedule": self.name}


class VP(QuarterCircle):
    """SiT's variance-preserving path: log alpha = -(beta_max - beta_min) s^2 / 4 - beta_min s / 2, s = 1 - t.

    The native time t is 1 at data. The path ends slightly below pure noise; noise levels beyond its end give t = 0.
    Near data the velocity grows like 1 / sigma, so training starts at s = 1e-5, as in SiT.

    Args:
        beta_min: Noise rate beta at data, s = 0.
        beta_max: Noise rate beta at the end of the path, s = 1.

    Raises:
        ValueError: Unless 0 < beta_min < beta_max.

    Source: Ma et al. 2024, SiT (arXiv:2401.08740); Song et al. 2021 (arXiv:2011.13456, eq. 33).
    """

    name = "sit-vp"
    time_direction = -1
    first_time = 1e-5

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min < beta_max < math.inf:
            raise ValueError(f"need 0 < beta_min < beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def path_time(self, level: Tensor) -> Tensor:
        decay = torch.log1p((level / (1 - level)) ** 2) / 2  # -log alpha
        slope = self.beta_max - self.beta_min
        # The root of slope s^2 / 4 + beta_min s / 2 = decay, in the form without cancellation.
        return 4 * decay / (self.beta_min + torch.sqrt(self.beta_min**2 + 4 * slope * decay))

    def level_at(self, path_time: Tensor) -> Tensor:
        decay = (self.beta_max - self.beta_min) * path_time**2 / 4 + self.beta_min * path_time / 2  # -log alpha
        sigma = torch.sqrt(-torch.expm1(-2 * decay))
        return sigma / (torch.exp(-decay) + sigma)

    def path_rate(self, level: Tensor) -> Tensor:
        beta = self.beta_min + (self.beta_max - self.beta_min) * self.path_time(level)
        return 2 * level / ((1 - level) * self._norm(level) ** 2 * beta)

    def native_time(self, level: Tensor) -> Tensor:
        return 1 - self.path_time(level.clamp(max=self.level_range[1])).clamp(max=1)

    def noise_level(self, native_time: Tensor) -> Tensor:
        return self.level_at(1 - native_time)

    @property
    def level_range(self) -> tuple[float, float]:
        ends = torch.tensor([self.first_time, 1.0], dtype=torch.float64, device="cpu")
        low, high = self.level_at(ends).tolist()
        return low, high

    def to_config(self) -> dict[str, Any]:
        return {"schedule": self.name, "beta_min": self.beta_min, "beta_max": self.beta_max}


class EDM(NoiseSchedule):
    """The schedule of EDM, x_t = x_0 + sigma eps; the native time is sigma itself.

    The noise level counts sigma in units of the data's standard deviation, `sigma / (sigma_data + sigma)`. Level 0.5
    therefore means a signal-to-noise ratio of 1, as in the other families. At level 1 sigma is infinite; sampling must
    start below it.

    Args:
        sigma_data: Standard deviation of the data.
        sigma_min: Lowest sigma of training.
        sigma_max: Highest sigma of training.

    Raises:
        ValueError: Unless 0 < sigma_min < sigma_max and sigma_data > 0.

    Source: Karras et al. 2022 (arXiv:2206.00364).
    """

    name = "edm"

    def __init__(self, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max or sigma_data <= 0:
            raise ValueError(
                f"need 0 < sigma_min < sigma_max and sigma_data > 0, got {sigma_min}, {sigma_max} and {sigma_data}"
            )
        self.scale, self.sigma_min, self.sigma_max = float(sigma_data), float(sigma_min), float(sigma_max)

    def alpha(self, level: Tensor) -> Tensor:
        return torch.ones_like(level)

    def sigma(self, level: Tensor) -> Tensor:
        return self.scale * level / (1 - level)

    def alpha_rate(self, level: Tensor) -> Tensor:
        return torch.zeros_like(level)

    def sigma_rate(self, level: Tensor) -> Tensor:
        return self.scale / (1 - level) ** 2

    def native_time(self, level: Tensor) -> Tensor:
        return self.sigma(level)

    def noise_level(self, native_time: Tensor) -> Tensor:
        return native_time / (self.scale + native_time)

    @property
    def level_range(self) -> tuple[float, float]:
        return self.sigma_min / (self.scale + self.sigma_min), self.sigma_max / (self.scale + self.sigma_max)

    def to_config(self) -> dict[str, Any]:
        return {
            "schedule": "edm",
            "sigma_data": self.scale,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
        }


class Rescaled(NoiseSchedule):
    """The schedule of a network that was trained on `factor x + shift`, in the units of the data x.

    With z = factor x + shift, the network's input z_t = alpha z + sigma eps is `factor x_t + alpha shift`, where
    x_t = alpha x + (sigma / factor) eps. Noise levels and native times are those of the network.

    Args:
        inner: Schedule in the units of the network's own data.
        value_range: What the values -1 and 1 of x become: (low, high) for all channels, or one such pair of numbers
            after another for each channel. All channels get the mean factor, since they share one sigma.

    Raises:
        ValueError: If the numbers are not such pairs, low is not below high, or the factors of two channels differ by
            more than a tenth.
    """

    name = "rescaled"

    def __init__(self, inner: NoiseSchedule, value_range: Sequence[float]) -> None:
        self.inner, self.value_range = inner.own, tuple(map(float, value_range))
        text = ",".join(f"{value:g}" for value in self.value_range)
        pairs = list(zip(self.value_range[::2], self.value_range[1::2], strict=False))
        factors = [(high - low) / 2 for low, high in pairs]
        if not pairs or len(self.value_range) % 2 or not all(map(math.isfinite, self.value_range)) or min(factors) <= 0:
            raise ValueError(f"the value range {text} is not LOW,HIGH, or such a pair for each channel; pass it as 0,1")
        if max(factors) > 1.1 * min(factors):
            raise ValueError(
                f"the value range {text} is {max(factors) / min(factors):.3g} times wider in one channel than in "
                "another; normalize the data itself"
            )
        self.factor = sum(factors) / len(factors)
        self.shift = tuple((high + low) / 2 for low, high in pairs)
        self.time_direction, self.integer_time = self.inner.time_direction, self.inner.integer_time
        self.scale = self.inner.scale / self.factor

    @property
    def own(self) -> NoiseSchedule:
        return self.inner

    def network_input(self, x_t: Tensor, level: Tensor) -> Tensor:
        return self.factor * x_t + per_sample(self.alpha(level), x_t) * self.shift_like(x_t)

    def shift_like(self, x: Tensor) -> Tensor:
        """The shift of each channel, in a shape that broadcasts against x of shape (B, C, *grid)."""
        return torch.tensor(self.shift, dtype=x.dtype, device=x.device).view(1, -1, *[1] * (x.ndim - 2))

    def alpha(self, level: Tensor) -> Tensor:
        return self.inner.alpha(level)

    def sigma(self, level: Tensor) -> Tensor:
        return self.inner.sigma(level) / self.factor

    def alpha_rate(self, level: Tensor) -> Tensor:
        return self.inner.alpha_rate(level)

    def sigma_rate(self, level: Tensor) -> Tensor:
        return self.inner.sigma_rate(level) / self.factor

    def native_time(self, level: Tensor) -> Tensor:
        return self.inner.native_time(level)

    def noise_level(self, native_time: Tensor) -> Tensor:
        return self.inner.noise_level(native_time)

    def path_time(self, level: Tensor) -> Tensor:
        return self.inner.path_time(level)

    def level_at(self, path_time: Tensor) -> Tensor:
        return self.inner.level_at(path_time)

    def path_rate(self, level: Tensor) -> Tensor:
        return self.inner.path_rate(level)

    @property
    def level_range(self) -> tuple[float, float]:
        return self.inner.level_range

    def to_config(self) -> dict[str, Any]:
        return {"schedule": self.name, "inner": self.inner.to_config(), "value_range": list(self.value_range)}


def schedule_from_name(name: str) -> NoiseSchedule:
    """Returns the schedule with this name on the command line.

    "sit" is the linear path with data at time 1, "flow" with data at time 0, "flow-1000" the same with times up to
    1000. "ddpm-linear", "ddpm-scaled_linear" and "ddpm-cosine" have 1000 steps. "edm" has sigma_data 0.5. "sit-gvp"
    and "sit-vp" are the curved paths of SiT.

    Raises:
        ValueError: If the name is unknown.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]()
    raise ValueError(unknown("schedule", name, SCHEDULES))


SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "sit": lambda: LinearPath(data_time=1, noise_time=0),
    "flow": lambda: LinearPath(data_time=0, noise_time=1),
    "flow-1000": lambda: LinearPath(data_time=0, noise_time=1000),
    **{f"ddpm-{betas}": partial(DDPM.from_name, betas) for betas in DDPM_BETAS},
    "edm": EDM,
    "sit-gvp": GVP,
    "sit-vp": VP,
}


def schedule_from_config(config: dict[str, Any]) -> NoiseSchedule:
    """Rebuilds a schedule from the result of its `to_config`.

    Raises:
        ValueError, KeyError or TypeError: If the configuration is not that of a schedule.
    """
    name, arguments = config["schedule"], {key: value for key, value in config.items() if key != "schedule"}
    if name == Rescaled.name:
        return Rescaled(schedule_from_config(arguments["inner"]), arguments["value_range"])
    classes: dict[str, Callable[..., NoiseSchedule]] = {"linear": LinearPath, "edm": EDM, "sit-gvp": GVP, "sit-vp": VP}
    if name in classes:
        return classes[name](**arguments)
    return DDPM(arguments["betas"], name=name)


def per_sample(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshapes one coefficient per sample, shape (B,), to multiply x of shape (B, ...), in the dtype of x."""
    return coefficient.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
