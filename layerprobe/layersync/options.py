"""What may differ from the LayerSync paper: weights, schedule, noise levels, projector, teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class SyncOptions:
    """How the alignment is done; the defaults are the paper's, what differs from them is for comparison.

    SRA (arXiv:2505.02831) is `projector_width`, `teacher_decay=0.9999`, `noise_gap=0.2` and the cosine among its
    losses. Self-Flow (arXiv:2603.06507) has teacher and projector too and mixes two noise levels in one sample, which
    takes a network with a time for every token; a gap of 1 shows its teacher a cleaner sample as well.

    Attributes:
        pair_weights: Factor of each pair, in the order of the pairs; empty is 1 for each.
        warmup_steps: Steps in which the weight rises to its value, linearly.
        decay: How it falls from there to 0 at `stop_step`.
        stop_step: From this step on nothing is aligned.
        noise_range: Noise levels, both ends included, of the samples that are aligned.
        centered: Subtract each channel's mean over batch and tokens before the cosine.
        projector_width: Hidden width of an MLP between the student and the cosine; 0 is none.
        teacher_decay: Of a moving average of the network's weights that gives the teacher's tokens in a second forward
            pass; 0 takes them from the pass that is there.
        noise_gap: By how much less noise the teacher may see, at most, see `teacher_level`; takes a second pass.

    Raises:
        ValueError: If a number is out of its range, or a decay has no step to end at.
    """

    pair_weights: tuple[float, ...] = ()
    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    stop_step: int | None = None
    noise_range: tuple[float, float] = (0.0, 1.0)
    centered: bool = False
    projector_width: int = 0
    teacher_decay: float = 0.0
    noise_gap: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "pair_weights", tuple(self.pair_weights))
        object.__setattr__(self, "noise_range", tuple(self.noise_range))
        if not all(math.isfinite(weight) for weight in self.pair_weights):
            raise ValueError(f"the weights of the pairs must be finite, got {self.pair_weights}")
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"unknown decay {self.decay!r}; use constant, linear or cosine")
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
        """Whether it matters how noisy a sample is."""
        return self.noise_range != (0, 1)

    @property
    def second_pass(self) -> bool:
        """Whether the teacher has a forward pass of its own, see `LayerSync.teaching`."""
        return self.teacher_decay > 0 or self.noise_gap > 0

    def factor(self, step: int) -> float:
        """What the schedule leaves of the weight at a step (from 0), in [0, 1]."""
        if self.stop_step is not None and step >= self.stop_step:
            return 0.0
        if step < self.warmup_steps or self.decay == "constant":
            return min(1.0, (step + 1) / (self.warmup_steps + 1))
        assert self.stop_step is not None
        done = (step - self.warmup_steps) / (self.stop_step - self.warmup_steps)
        return 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2

    def teacher_level(self, noise_level: Tensor, draw: Tensor) -> Tensor:
        """The noise level that the teacher sees: less by up to the gap, and at least 0.

        Args:
            noise_level: The student's, shape (B,).
            draw: Uniform in [0, 1), shape (B,).

        Source: SRA's rule.
        """
        return (noise_level - self.noise_gap * draw).clamp(min=0)
