"""The plan of sampling from a backbone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from layerprobe.messages import unknown
from layerprobe.options import SAMPLING_PANEL, check_ranges, option

Solver = Literal["euler", "heun", "dopri5", "euler-maruyama"]
Diffusion = Literal["sigma", "sbdm", "constant", "linear", "decreasing", "increasing-decreasing"]
LastStep = Literal["mean", "tweedie"]


@dataclass(frozen=True)
class SamplingPlan:
    """The solver and the other settings with which samples are drawn.

    Attributes:
        solver: Solver of the ODE: euler (one evaluation per step), heun (two, second order) or dopri5 (six, fifth
            order, with an adaptive step size for each sample); or of the SDE: euler-maruyama (one).
        steps: Number of steps from noise to data; dopri5 chooses its own step sizes after the first step.
        guidance: Scale of classifier-free guidance; 1 for no guidance.
        seed: Seed of the noise. Sample i starts from the noise of (seed, i), whatever the batch; the SDE adds the noise
            of (seed, i, step).
        guidance_interval: Lowest and highest noise level with guidance (Kynkaanniemi et al. 2024, arXiv:2404.07724).
        rtol: Largest error of a step of dopri5, relative to the entries of the sample.
        atol: Largest error of a step of dopri5 in addition to the relative one.
        diffusion: Diffusion coefficient of the SDE, as in SiT: sigma, sbdm, constant, linear, decreasing or
            increasing-decreasing.
        diffusion_scale: Factor of the diffusion coefficient; the diffusion norm of SiT.
        last_step: Last step of the SDE, without new noise: mean for a step like the others, tweedie for the expected
            sample.
        last_step_size: Size of the last step of the SDE, in path time.

    Raises:
        ValueError: If a value is out of its range.
    """

    PANEL: ClassVar[str] = SAMPLING_PANEL

    solver: Solver = field(default="heun", metadata=option())
    steps: int = field(default=25, metadata=option(minimum=1, maximum=10**6))
    guidance: float = field(default=1.0, metadata=option())
    seed: int = 0
    guidance_interval: tuple[float, float] = field(default=(0.0, 1.0), metadata=option())
    rtol: float = field(default=1e-3, metadata=option())
    atol: float = field(default=1e-6, metadata=option())
    diffusion: Diffusion = field(default="sigma", metadata=option())
    diffusion_scale: float = field(default=1.0, metadata=option())
    last_step: LastStep = field(default="mean", metadata=option())
    last_step_size: float = field(default=0.04, metadata=option())

    def __post_init__(self) -> None:
        for name, choices in (("solver", Solver), ("diffusion", Diffusion), ("last_step", LastStep)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(unknown(name.replace("_", " "), getattr(self, name), get_args(choices)))
        check_ranges(self)
        if self.solver == "euler-maruyama" and self.steps < 2:
            raise ValueError("euler-maruyama takes at least 2 steps, the last one without noise; pass more steps")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"the guidance interval needs 0 <= low <= high <= 1 (noise levels), got {low:g} and {high:g}"
            )
        if not (0 < self.rtol < 1 and 0 < self.atol < math.inf):
            raise ValueError(
                f"tolerances must be above 0 and rtol below 1, got rtol {self.rtol:g} and atol {self.atol:g}"
            )
        if not 0 <= self.diffusion_scale < math.inf or not 0 < self.last_step_size < 1:
            raise ValueError(
                f"need diffusion_scale >= 0 and last_step_size in (0, 1), got {self.diffusion_scale:g} and "
                f"{self.last_step_size:g}"
            )
