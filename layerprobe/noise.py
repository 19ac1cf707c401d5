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
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

Prediction = Literal["velocity", "eps", "x0", "v", "score"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
# New purposes go to the end: a stream is known by its place.
Purpose = Literal["noise", "level", "label drop", "order", "sampling", "latent", "length"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

END = 1e-3  # of the path's time, which training and sampling keep off an end that they cannot use
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
        return _per_sample(self.alpha(level), x) * x + _per_sample(self.sigma(level), x) * eps

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
    return _per_sample(a, x) * x + _per_sample(b, x) * eps


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


def convert(
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
    return _per_sample(of_x_t.to(x_t.dtype), x_t) * x_t + _per_sample(of_output.to(output.dtype), output) * output


def _per_sample(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class NoiseKey:
    """Random numbers that depend on (seed, purpose, sample id, draw) and on nothing else.

    Every sample has its own Philox counter stream, so its numbers are the same in any batch, order, process or restart.
    Sample ids are int64, draws count from 0.

    Attributes:
        seed: Non-negative, below 2**63.
        purpose: Streams of different purposes never meet.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """

    seed: int
    purpose: Purpose = "noise"

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")

    def normal(self, ids: Tensor, shape: tuple[int, ...], *, draw: int = 0) -> Tensor:
        """Standard normal numbers, shape (B, *shape), float32, for B sample ids."""
        out = np.empty((len(ids), math.prod(shape)), np.float32)
        for row, sample_id in zip(out, ids.tolist(), strict=True):
            self._stream(sample_id, draw).standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(out).view(len(ids), *shape)

    def uniform(self, ids: Tensor, *, draw: int = 0) -> Tensor:
        """One uniform number in [0, 1) per sample id, shape (B,), float64."""
        return torch.tensor([self._stream(i, draw).random() for i in ids.tolist()], dtype=torch.float64)

    def permutation(self, n: int, *, draw: int = 0) -> Tensor:
        """A permutation of 0 ... n-1, shape (n,), int64."""
        return torch.from_numpy(self._stream(0, draw).permutation(n))

    def _stream(self, sample_id: int, draw: int) -> np.random.Generator:
        purpose = PURPOSES.index(self.purpose)
        bits = np.random.Philox(
            # The mask gives negative ids, such as hashes, streams of their own.
            key=np.array([self.seed, sample_id & (2**64 - 1)], np.uint64),
            counter=np.array([0, 0, draw, purpose], np.uint64),
        )
        return np.random.Generator(cast(np.random.BitGenerator, bits))
