"""The noise schedule and the prediction that a diffusers scheduler configuration declares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerprobe.backbones.diffusers.class_table import DiffusersClass
from layerprobe.backbones.diffusers.folders import MAX_STEPS, ModelFolder, exported_class, first_line, read_json
from layerprobe.backbones.diffusers.weights import quiet_libraries
from layerprobe.noise import DDPM, EDM, LinearPath, NoiseSchedule, Prediction, schedule_from_name

PREDICTION_TYPES: dict[str, Prediction] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "velocity",
}
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
)
# What these take where a file does not say it.
_EDM_DEFAULTS = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "prediction_type": "epsilon"}
EDM_SCHEDULERS: dict[str, dict[str, Any]] = {
    "EDMEulerScheduler": _EDM_DEFAULTS,
    "EDMDPMSolverMultistepScheduler": _EDM_DEFAULTS,
    "CosineDPMSolverMultistepScheduler": {
        "sigma_data": 1.0,
        "sigma_min": 0.3,
        "sigma_max": 500.0,
        "prediction_type": "v_prediction",
    },
}


@dataclass(frozen=True)
class Preconditioner:
    """What stands around an EDM network: inputs of unit variance, and outputs that are mostly x_t at low noise.

    Attributes:
        sigma_data: The data's standard deviation.
        sign: Of the network's part of the output: -1 where it predicts v.
        angle: The network is told 2/pi atan(sigma) instead of log(sigma) / 4.

    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 7 and table 1.
    """

    sigma_data: float
    sign: int
    angle: bool

    def input(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        return x_t / (sigma**2 + self.sigma_data**2).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        return sigma.atan() * (2 / math.pi) if self.angle else sigma.log() / 4

    def denoised(self, x_t: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        total = sigma**2 + self.sigma_data**2
        return x_t * self.sigma_data**2 / total + self.sign * output * sigma * self.sigma_data / total.sqrt()


@dataclass(frozen=True)
class SchedulerConvention:
    schedule: NoiseSchedule
    prediction: Prediction
    preconditioner: Preconditioner | None = None


# --- Schedule and prediction


def read_convention(
    place: ModelFolder,
    name: str,
    family: DiffusersClass,
    schedule: str | NoiseSchedule | None,
    prediction: Prediction | None,
) -> SchedulerConvention:
    if schedule is not None and prediction is not None:
        return SchedulerConvention(schedule_from_name(schedule) if isinstance(schedule, str) else schedule, prediction)
    if place.scheduler is not None:
        told = _read_scheduler(place.scheduler, family)
    elif family.trained is not None:
        told = SchedulerConvention(_named(family.trained[0], family), family.trained[1])
    else:
        raise ValueError(
            f"{place.model} has no scheduler_config.json, and {name} was trained in several ways; "
            "pass --schedule and --prediction"
        )
    if told.preconditioner is not None and (schedule is not None or prediction is not None):
        raise ValueError("the scheduler's preconditioning decides both; pass --schedule and --prediction, or neither")
    if schedule is not None:
        told = SchedulerConvention(
            schedule_from_name(schedule) if isinstance(schedule, str) else schedule, told.prediction
        )
    return told if prediction is None else SchedulerConvention(told.schedule, prediction)


def _named(name: str, family: DiffusersClass) -> NoiseSchedule:
    return LinearPath(*family.times) if name == "flow" and family.times else schedule_from_name(name)


def _read_scheduler(path: Path, family: DiffusersClass) -> SchedulerConvention:
    """Schedule and prediction of a scheduler's configuration.

    Raises:
        ValueError: If it is damaged, or of a kind that has no schedule of ours.
    """
    config = read_json(path)
    name = str(config.get("_class_name"))
    steps = config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or not 0 < steps <= MAX_STEPS:
        raise ValueError(f"{path} counts {steps!r} times; pass --schedule, or mend it: at most {MAX_STEPS}")
    if name in EDM_SCHEDULERS:
        return _read_edm(path, {**EDM_SCHEDULERS[name], **config})
    found = exported_class(name, "SchedulerMixin")
    if found is None:
        raise ValueError(f"{path} names {name!r}, no scheduler of diffusers; pass --schedule and --prediction")
    try:
        with quiet_libraries():
            scheduler = found.from_config(config)
    except Exception as error:  # Wrong values fail in any way.
        raise ValueError(f"{path} is no configuration of {name} ({first_line(error)}); pass --schedule") from error
    kind = str(scheduler.config.get("prediction_type"))
    if name in FLOW_SCHEDULERS or scheduler.config.get("use_flow_sigmas") or kind == "flow_prediction":
        if family.times is None:
            raise ValueError(
                "what this class takes as time is not known; pass --schedule flow-1000, flow or sit, whichever its "
                "pipeline does, and --prediction velocity"
            )
        if scheduler.config.num_train_timesteps != 1000:
            raise ValueError(f"{path} counts {scheduler.config.num_train_timesteps} times; pass --schedule")
        return SchedulerConvention(LinearPath(*family.times), "velocity")
    continuous = scheduler.config.get("timestep_type") == "continuous"
    if hasattr(scheduler, "alphas_cumprod") and kind in PREDICTION_TYPES and not continuous:
        if family.times not in (None, (0, 1000)):
            raise ValueError(f"{path} has integer times, which this class does not take; pass --schedule")
        named = scheduler.config.get("beta_schedule", "custom").replace("squaredcos_cap_v2", "cosine")
        return SchedulerConvention(DDPM(_betas(scheduler), name=f"ddpm-{named}"), PREDICTION_TYPES[kind])
    raise ValueError(f"{path}: the noise of {name} is none of layerprobe's schedules; pass --schedule and --prediction")


def _read_edm(path: Path, config: Mapping[str, Any]) -> SchedulerConvention:
    signs = {"epsilon": 1, "v_prediction": -1}
    try:
        sign, data = signs[config["prediction_type"]], float(config["sigma_data"])
        schedule = EDM(data, float(config["sigma_min"]), float(config["sigma_max"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); copy or download it again") from error
    angle = config["_class_name"] == "CosineDPMSolverMultistepScheduler"
    return SchedulerConvention(schedule, "x0", Preconditioner(data, sign, angle))


def _betas(scheduler: Any) -> Tensor:
    """The betas behind the chain that the scheduler really uses, which may be shifted or rescaled."""
    abar: Tensor = scheduler.alphas_cumprod.double()
    betas: Tensor = scheduler.betas.double()
    if bool((betas < 1).all()) and torch.allclose(torch.cumprod(1 - betas, 0), abar, rtol=1e-3, atol=1e-7):
        return betas
    # A chain rescaled to end in pure noise has no finite log-SNR there; diffusers itself stops at 2**-24.
    abar = abar.clamp(min=2.0**-24)
    return 1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
