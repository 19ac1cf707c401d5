"""Options of the LayerSync alignment: weights, schedule, noise levels, projector, teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from layerprobe.messages import unknown
from layerprobe.options import LAYERSYNC_PANEL, option

if TYPE_CHECKING:
    from torch import Tensor

# Default weight of the alignment, used by all pair sweeps in docs/atlas.
# LayerSync uses 0.2 for SiT-XL/2; 0.1 to 0.7 do equally well on SiT-B/2.
WEIGHT = 0.3


@dataclass(frozen=True)
class SyncOptions:
    """Options of the LayerSync alignment. The defaults are the paper's; other values are for comparison.

    SRA (arXiv:2505.02831) corresponds to a projector, `teacher_decay=0.9999` and `noise_gap=0.2`; the cosine is one of
    its losses. Self-Flow (arXiv:2603.06507) also has a projector and a teacher that sees less noise, as with a gap of
    1. It mixes two noise levels in one sample, which is not supported: the network would need a time for every token.

    Attributes:
        pair_weights: Factor of each pair's weight, in the order of the pairs; empty means 1 for each.
        warmup_steps: Number of steps in which the alignment weight rises linearly from 0.
        decay: Course of the alignment weight until the stop step, where it is 0: constant, linear or cosine.
        stop_step: Step from which on nothing is aligned; never if not given.
        noise_range: Noise levels of the samples that are aligned, both ends included.
        centered: Subtract each channel's mean over batch and tokens before the cosine.
        projector_width: Hidden width of an MLP between the student and the cosine; 0 for no MLP.
        teacher_decay: Decay of the moving average of the weights that computes the teacher's tokens in a second forward
            pass; 0 for the tokens of the student's pass.
        noise_gap: Largest difference by which the teacher sees less noise than the student, in a second forward pass.

    Raises:
        ValueError: If a number is out of its range, or a decay has no step to end at.
    """

    pair_weights: tuple[float, ...] = ()
    warmup_steps: int = field(default=0, metadata=option("sync_warmup_steps", panel=LAYERSYNC_PANEL, minimum=0))
    decay: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata=option("sync_decay", panel=LAYERSYNC_PANEL)
    )
    stop_step: int | None = field(default=None, metadata=option("sync_stop_step", panel=LAYERSYNC_PANEL, minimum=1))
    noise_range: tuple[float, float] = field(
        default=(0.0, 1.0), metadata=option("sync_noise_range", panel=LAYERSYNC_PANEL)
    )
    centered: bool = field(default=False, metadata=option("sync_centered", panel=LAYERSYNC_PANEL))
    projector_width: int = field(default=0, metadata=option("sync_projector_width", panel=LAYERSYNC_PANEL, minimum=0))
    teacher_decay: float = field(default=0.0, metadata=option("sync_teacher_decay", panel=LAYERSYNC_PANEL))
    noise_gap: float = field(default=0.0, metadata=option("sync_noise_gap", panel=LAYERSYNC_PANEL))

    def __post_init__(self) -> None:
        object.__setattr__(self, "pair_weights", tuple(self.pair_weights))
        object.__setattr__(self, "noise_range", tuple(self.noise_range))
        if not all(math.isfinite(weight) for weight in self.pair_weights):
            raise ValueError(f"the weights of the pairs must be finite, got {self.pair_weights}")
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(unknown("decay", self.decay, ("constant", "linear", "cosine")))
        if self.decay != "constant" and self.stop_step is None:
            raise ValueError(f"a {self.decay} decay ends at the stop step; pass stop_step")
        if not (self.warmup_steps >= 0 and self.projector_width >= 0):
            raise ValueError(
                f"need warmup_steps and projector_width of at least 0, got {self.warmup_steps}, {self.projector_width}"
            )
        if self.stop_step is not None and self.stop_step <= self.warmup_steps:
            raise ValueError(f"the stop step {self.stop_step} is not after the warm-up of {self.warmup_steps} steps")
        if not (len(self.noise_range) == 2 and 0 <= self.noise_range[0] < self.noise_range[1] <= 1):
            raise ValueError(f"the noise range must be two rising levels in [0, 1], got {self.noise_range}")
        if not (0 <= self.teacher_decay < 1 and 0 <= self.noise_gap <= 1):
            raise ValueError(
                f"need teacher_decay in [0, 1) and noise_gap in [0, 1], got {self.teacher_decay}, {self.noise_gap}"
            )

    @property
    def scheduled(self) -> bool:
        """Whether the weight depends on the step."""
        return self.warmup_steps > 0 or self.stop_step is not None

    @property
    def ranged(self) -> bool:
        """Whether only samples of some noise levels are aligned."""
        return self.noise_range != (0, 1)

    @property
    def second_pass(self) -> bool:
        """Whether the teacher needs a forward pass of its own; see `LayerSync.teaching`."""
        return self.teacher_decay > 0 or self.noise_gap > 0

    def factor(self, step: int) -> float:
        """Returns the factor of the alignment weight at a step, counted from 0; in [0, 1]."""
        if self.stop_step is not None and step >= self.stop_step:
            return 0.0
        if step < self.warmup_steps or self.decay == "constant":
            return min(1.0, (step + 1) / (self.warmup_steps + 1))
        assert self.stop_step is not None
        done = (step - self.warmup_steps) / (self.stop_step - self.warmup_steps)
        return 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2

    def teacher_level(self, noise_level: Tensor, draw: Tensor) -> Tensor:
        """Returns the noise level that the teacher sees: up to `noise_gap` below the student's, and at least 0.

        Args:
            noise_level: Noise levels of the student, shape (B,).
            draw: Uniform random numbers in [0, 1), shape (B,).

        Raises:
            ValueError: If a noise level is outside [0, 1].

        Source: SRA (arXiv:2505.02831).
        """
        check_noise_levels(noise_level)
        return (noise_level - self.noise_gap * draw).clamp(min=0)


def check_noise_levels(levels: Tensor, *, on_any_device: bool = False) -> None:
    """Checks that noise levels are numbers in [0, 1], as the times of a scheduler may not be.

    Args:
        levels: Noise levels, any shape.
        on_any_device: Whether to look at the values on other devices than the CPU, which have to be waited for.

    Raises:
        ValueError: If they are whole numbers or outside [0, 1].
    """
    if not levels.is_floating_point():
        raise ValueError(
            f"the noise levels are of {levels.dtype}, like the times of a scheduler; pass sigma / (alpha + sigma) in "
            "[0, 1], 0 for clean samples"
        )
    if levels.device.type == "cpu" or on_any_device:
        outside = levels[~((levels >= 0) & (levels <= 1))]
        if outside.numel():
            raise ValueError(
                f"a noise level is {float(outside[0]):g}, which is outside [0, 1]; pass sigma / (alpha + sigma), 0 for "
                "clean samples"
            )
