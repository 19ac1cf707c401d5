"""Reads the noise schedule and the prediction target from the configuration of a diffusers scheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerprobe.backbones.diffusers.diffusers_class import DiffusersClass
from layerprobe.backbones.diffusers.folders import MAX_STEPS, ModelFolder, exported_class, read_json
from layerprobe.backbones.diffusers.weights import quiet_libraries
from layerprobe.files import one_line
from layerprobe.memory import pass_on
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
# Defaults of these schedulers.
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
    """The preconditioning of an EDM network: inputs of unit variance, and outputs that are mostly x_t at low noise.

    Attributes:
        sigma_data: Standard deviation of the data.
        sign: Sign of the network's output in the denoised sample: -1 if the network predicts v, else 1.
        angle: Whether the network's time is 2/pi atan(sigma) instead of log(sigma) / 4.

    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 7 and table 1.
    """

    sigma_data: float
    sign: int
    angle: bool

    def input(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Scales x_t to unit variance."""
        return x_t / (sigma**2 + self.sigma_data**2).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """Converts sigma to the network's time."""
        return sigma.atan() * (2 / math.pi) if self.angle else sigma.log() / 4

    def denoised(self, x_t: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        """Combines x_t and the network's output into the denoised sample."""
        total = sigma**2 + self.sigma_data**2
        return x_t * self.sigma_data**2 / total + self.sign * output * sigma * self.sigma_data / total.sqrt()


@dataclass(frozen=True)
class SchedulerConvention:
    """A schedule and a prediction target, with the preconditioning of an EDM scheduler."""

    schedule: NoiseSchedule
    prediction: Prediction
    preconditioner: Preconditioner | None = None


def read_convention(
    folder: ModelFolder,
    name: str,
    family: DiffusersClass,
    schedule: str | NoiseSchedule | None,
    prediction: Prediction | None,
) -> SchedulerConvention:
    """Returns the caller's convention, else that of the scheduler, else that of the class's published training.

    Args:
        folder: Location of the model.
        name: Name of the class.
        family: Entry of the class in the class table.
        schedule: Schedule or its name, instead of the scheduler's.
        prediction: Prediction target, instead of the scheduler's.

    Raises:
        ValueError: If the scheduler is damaged or unknown, or is missing for a class that was trained in several ways.
    """
    if isinstance(schedule, str):
        schedule = schedule_from_name(schedule)
    if schedule is not None and prediction is not None:
        return SchedulerConvention(schedule, prediction)
    if folder.scheduler is not None:
        convention = _read_scheduler(folder.scheduler, family)
    elif family.trained is not None:
        convention = SchedulerConvention(_named(family.trained[0], family), family.trained[1])
    else:
        raise ValueError(
            f"{folder.model} has no scheduler_config.json, and {name} was trained in several ways; "
            "pass --schedule and --prediction"
        )
    if schedule is None and prediction is None:
        return convention
    if convention.preconditioner is not None:
        raise ValueError(
            "the scheduler's preconditioning determines both; pass --schedule and --prediction, or neither"
        )
    return SchedulerConvention(schedule or convention.schedule, prediction or convention.prediction)


def _named(name: str, family: DiffusersClass) -> NoiseSchedule:
    return LinearPath(*family.times) if name == "flow" and family.times else schedule_from_name(name)


def _read_scheduler(path: Path, family: DiffusersClass) -> SchedulerConvention:
    """Reads a scheduler's configuration.

    Raises:
        ValueError: If it is damaged, or has no corresponding schedule in layerprobe.
    """
    config = read_json(path)
    name = str(config.get("_class_name"))
    steps = config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or not 0 < steps <= MAX_STEPS:
        raise ValueError(
            f"{path} has {steps!r} timesteps, but 1 to {MAX_STEPS} are supported; pass --schedule, or correct it"
        )
    if name in EDM_SCHEDULERS:
        return _read_edm(path, {**EDM_SCHEDULERS[name], **config})
    scheduler_class = exported_class(name, "SchedulerMixin")
    if scheduler_class is None:
        raise ValueError(
            f"{path} names {name!r}, which is not a scheduler of diffusers; pass --schedule and --prediction"
        )
    try:
        with quiet_libraries():
            scheduler = scheduler_class.from_config(config)
    except Exception as error:  # Wrong values can fail in any way.
        pass_on(error)
        raise ValueError(
            f"{path} is not a valid configuration of {name} ({one_line(error)}); pass --schedule"
        ) from error
    kind = str(scheduler.config.get("prediction_type"))
    if name in FLOW_SCHEDULERS or scheduler.config.get("use_flow_sigmas") or kind == "flow_prediction":
        if family.times is None:
            raise ValueError(
                "the native time of this class is unknown; pass --schedule flow-1000, flow or sit, whichever its "
                "pipeline uses, and --prediction velocity"
            )
        if scheduler.config.num_train_timesteps not in (1000, max(family.times)):
            raise ValueError(
                f"{path} has {scheduler.config.num_train_timesteps} timesteps instead of 1000; pass --schedule"
            )
        return SchedulerConvention(LinearPath(*family.times), "velocity")
    continuous = scheduler.config.get("timestep_type") == "continuous"
    if hasattr(scheduler, "alphas_cumprod") and kind in PREDICTION_TYPES and not continuous:
        if family.times not in (None, (0, 1000)):
            raise ValueError(f"{path} has integer times, which this class does not take; pass --schedule")
        if scheduler.betas.ndim != 1:
            raise ValueError(f"{path} is damaged (trained_betas is not a list of numbers); pass --schedule")
        betas = scheduler.config.get("beta_schedule", "custom").replace("squaredcos_cap_v2", "cosine")
        return SchedulerConvention(DDPM(_betas(scheduler), name=f"ddpm-{betas}"), PREDICTION_TYPES[kind])
    raise ValueError(f"{path}: the schedule of {name} is unknown to layerprobe; pass --schedule and --prediction")


def _read_edm(path: Path, config: Mapping[str, Any]) -> SchedulerConvention:
    signs = {"epsilon": 1, "v_prediction": -1}
    try:
        sign, sigma_data = signs[config["prediction_type"]], float(config["sigma_data"])
        schedule = EDM(sigma_data, float(config["sigma_min"]), float(config["sigma_max"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}); copy or download it again") from error
    angle = config["_class_name"] == "CosineDPMSolverMultistepScheduler"
    return SchedulerConvention(schedule, "x0", Preconditioner(sigma_data, sign, angle))


def _betas(scheduler: Any) -> Tensor:
    """Returns the betas of the chain that the scheduler really uses, which may be shifted or rescaled."""
    abar: Tensor = scheduler.alphas_cumprod.double()
    betas: Tensor = scheduler.betas.double()
    if bool((betas < 1).all()) and torch.allclose(torch.cumprod(1 - betas, 0), abar, rtol=1e-3, atol=1e-7):
        return betas
    # A chain rescaled to end in pure noise has no finite log-SNR at the end; diffusers itself stops at 2**-24.
    abar = abar.clamp(min=2.0**-24)
    return 1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
