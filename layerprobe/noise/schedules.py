"""One noise axis for every family of diffusion models, and the noise itself.

Every model here sees `x_t = alpha x_0 + sigma eps`. The noise level is `sigma / (alpha + sigma)`: 0 is clean, 1 is
pure noise, and equal levels mean equal signal-to-noise ratios in every family. `log_snr = 2 log(alpha / sigma)`, so
`noise_level = sigmoid(-log_snr / 2)`. On the linear path the noise level is the path's own time.

The velocity is `d x_t / d path_time` with the time of the path, which runs from 0 at data to 1 at noise: the velocity
points from data to noise. On the linear path, in DDPM and in EDM the path's time is the noise level itself, and on the
linear path the velocity is `eps - x_0`. On SiT's cosine and variance-preserving paths it is the time that the network
counts, so that a network trained there predicts this velocity and its loss is the published one; `path_rate` turns it
into `d x_t / d noise_level`, which is what the sampler integrates whatever the family. A family's own time and sign
live in its `NoiseSchedule` only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

DDPM_BETAS = ("linear", "scaled_linear", "cosine")


class NoiseSchedule(ABC):
    """How a family of models mixes data and noise, and what it calls the time.

    All methods are element-wise on tensors of noise levels in [0, 1] and return the tensor's own floating type.

    Attributes:
        name: What configuration files and the command line call the schedule.
        time_direction: +1 where the native time grows with the noise, -1 where time 1 is data.
        integer_time: True where the network indexes its time (0, 1, ..., T-1).
        scale: The data's standard deviation in the units in which the level is counted; 1 except for EDM.
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
        """The derivative of alpha by the noise level."""

    @abstractmethod
    def sigma_rate(self, level: Tensor) -> Tensor:
        """The derivative of sigma by the noise level."""

    @abstractmethod
    def native_time(self, level: Tensor) -> Tensor:
        """What the network is told: the family's own time."""

    @abstractmethod
    def noise_level(self, native_time: Tensor) -> Tensor:
        """The noise level of a native time; the inverse of `native_time` up to its rounding.

        Raises:
            ValueError: If the family has integer times and this is none of them.
        """

    def path_time(self, level: Tensor) -> Tensor:
        """The time that a velocity is counted in, 0 at data and 1 at noise: the level, where a path has no other."""
        return level

    def level_at(self, path_time: Tensor) -> Tensor:
        """The noise level at a time of the path; the inverse of `path_time`."""
        return path_time

    def path_rate(self, level: Tensor) -> Tensor:
        """The derivative of the path's time by the noise level, positive inside (0, 1)."""
        return torch.ones_like(level)

    @property
    def level_range(self) -> tuple[float, float]:
        """The lowest and highest noise level that the model was trained at."""
        return 0.0, 1.0

    def log_snr(self, level: Tensor) -> Tensor:
        """2 log(alpha scale / sigma) = 2 log((1 - level) / level); infinite at the ends."""
        return 2 * (torch.log1p(-level) - torch.log(level))

    def level_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The noise level with this log signal-to-noise ratio."""
        return torch.sigmoid(-log_snr / 2)

    def corrupt(self, x: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """x_t = alpha x + sigma eps for x, eps of shape (B, ...) and one level per sample, shape (B,)."""
        return per_sample(self.alpha(level), x) * x + per_sample(self.sigma(level), x) * eps

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """What `schedule_from_config` rebuilds this schedule from."""


class LinearPath(NoiseSchedule):
    """x_t = (1 - level) x_0 + level eps, the path of flow matching and rectified flow.

    Args:
        data_time: The native time of data: 1 in SiT and LayerSync, 0 in REPA, SRA and diffusers.
        noise_time: The native time of noise: 0 in SiT, 1 in REPA, 1000 in diffusers.
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
    """alpha^2 + sigma^2 = 1, as on every variance-preserving path: `(alpha, sigma) = (1 - level, level) / norm`.

    What tells such paths apart is the time at which they reach a level.
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
    """The variance-preserving chain of DDPM: alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), t = 0 ... T-1.

    `native_time` is the nearest integer by log-SNR, 0 and T-1 beyond the ends.

    Args:
        betas: Shape (T,), each in (0, 1).
        name: The name under which the betas were made.

    Raises:
        ValueError: If betas are not such a row.

    Source: Ho et al. 2020 (arXiv:2006.11239).
    """

    integer_time = True

    def __init__(self, betas: Tensor | Sequence[float], *, name: str = "ddpm-custom") -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not len(betas) or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"betas must be a non-empty row of numbers strictly between 0 and 1, got shape {tuple(betas.shape)}"
                + (f" with values from {float(betas.min()):g} to {float(betas.max()):g}" if betas.numel() else "")
            )
        self.name, self.betas = name, betas
        abar = torch.cumprod(1 - betas, 0)
        self._levels = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())
        # Times are matched by log-SNR, in which the chain is close to even; the midpoints decide.
        log_snr = self.log_snr(self._levels)
        self._edges = self.level_of_log_snr((log_snr[1:] + log_snr[:-1]) / 2)

    @classmethod
    def from_name(cls, betas: str, num_steps: int = 1000, start: float | None = None, end: float | None = None) -> DDPM:
        """The usual betas: "linear" (1e-4 to 0.02), "scaled_linear" (0.00085 to 0.012) or "cosine".

        Args:
            betas: One of these names.
            num_steps: T.
            start: The first beta, where it is not the usual one.
            end: The last beta, likewise. "cosine" has neither.

        Raises:
            ValueError: If the name is unknown, or the cosine is given ends.

        Source: Ho et al. 2020; Rombach et al. 2022 (arXiv:2112.10752); Nichol & Dhariwal 2021 (arXiv:2102.09672,
            eq. 17).
        """
        if betas == "cosine" and (start, end) != (None, None):
            raise ValueError("the cosine betas have no start and no end; leave them out")
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
            raise ValueError(f"unknown betas {betas!r}; use one of {', '.join(DDPM_BETAS)}")
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
        data_time: The native time of data: 1 in SiT, 0 in REPA.
        noise_time: The native time of noise: 0 in SiT, 1 in REPA.

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

    The native time t is 1 at data. The path ends a little short of pure noise; beyond that end the network is told
    t = 0. Near data the velocity grows like 1 / sigma, so training stops at s = 1e-5, as SiT's does.

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
        fall = torch.log1p((level / (1 - level)) ** 2) / 2  # -log alpha
        slope = self.beta_max - self.beta_min
        # The root of slope s^2 / 4 + beta_min s / 2 = fall in the form that cancels nothing.
        return 4 * fall / (self.beta_min + torch.sqrt(self.beta_min**2 + 4 * slope * fall))

    def level_at(self, path_time: Tensor) -> Tensor:
        fall = (self.beta_max - self.beta_min) * path_time**2 / 4 + self.beta_min * path_time / 2
        sigma = torch.sqrt(-torch.expm1(-2 * fall))
        return sigma / (torch.exp(-fall) + sigma)

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
    """x_t = x_0 + sigma eps; the native time is sigma itself.

    The level counts sigma in units of the data's standard deviation, `sigma / (sigma_data + sigma)`, so that level
    0.5 is a signal-to-noise ratio of 1 as in the other families. Level 1 is infinitely noisy; sample from below it.

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


def schedule_from_name(name: str) -> NoiseSchedule:
    """The schedule behind a name of the command line.

    "sit" is the linear path with data at time 1, "flow" with data at time 0, "flow-1000" the same with times up to
    1000; "ddpm-linear", "ddpm-scaled_linear" and "ddpm-cosine" have 1000 steps; "edm" has sigma_data 0.5; "sit-gvp"
    and "sit-vp" are SiT's curved paths.

    Raises:
        ValueError: If there is no such name.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]()
    raise ValueError(f"unknown schedule {name!r}; use one of {', '.join(SCHEDULES)}")


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
    """Rebuilds a schedule from its `to_config`; ValueError, KeyError or TypeError where the configuration is none."""
    kind, rest = config["schedule"], {key: value for key, value in config.items() if key != "schedule"}
    kinds: dict[str, Callable[..., NoiseSchedule]] = {"linear": LinearPath, "edm": EDM, "sit-gvp": GVP, "sit-vp": VP}
    if kind in kinds:
        return kinds[kind](**rest)
    return DDPM(rest["betas"], name=kind)


def per_sample(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
