"""Training batches: the samples of each step, their noise, noise levels and dropped labels.

Everything depends only on (seed, sample id, epoch), so the batch of a step is the same after an interruption and with
any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from scipy.special import expit, ndtri
from torch import Tensor

from layerprobe.backbones import Backbone
from layerprobe.data import Batch, Samples
from layerprobe.noise import RandomStream, time_range

if TYPE_CHECKING:
    from layerprobe.training.plan import TrainingPlan

# The teacher's noise levels use the same streams as the noise levels, with draws that no epoch reaches.
FIRST_TEACHER_DRAW = 2**32


@dataclass(frozen=True)
class TrainingBatch:
    """The batch of a training step, or a part of it.

    Attributes:
        x: Samples, shape (B, C, *grid).
        eps: Noise, shape (B, C, *grid).
        level: Noise levels, shape (B,), float64.
        condition: Labels, with dropped ones replaced by the null label, shape (B,); None for unlabeled samples.
        mask: Positions that are not padding, as in `Batch`, shape (B, *grid), or None.
        teacher_draw: Uniform numbers for the noise levels of the teacher, shape (B,); None without a noise gap.
    """

    x: Tensor
    eps: Tensor
    level: Tensor
    condition: Tensor | None
    mask: Tensor | None = None
    teacher_draw: Tensor | None = None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> TrainingBatch:
        """Returns the batch with a function applied to every tensor."""
        columns = (getattr(self, column.name) for column in fields(self))
        return TrainingBatch(*(None if column is None else function(column) for column in columns))  # type: ignore[arg-type]

    def split(self, parts: int) -> list[TrainingBatch]:
        """Splits the batch into equal parts, in order."""
        size = len(self.x) // parts
        return [self.mapped(itemgetter(slice(i * size, (i + 1) * size))) for i in range(parts)]


def batches(
    backbone: Backbone,
    samples: Samples,
    plan: TrainingPlan,
    *,
    start: int = 0,
    select: Callable[[range], Sequence[int]] = list,
) -> Iterator[TrainingBatch]:
    """Yields the batches of steps `start` ... `plan.steps - 1`; a batch may continue into the next epoch.

    Args:
        backbone: The model; its schedule and prediction determine the range of noise levels.
        samples: Training samples.
        plan: Batch size, seed, label drop and distribution of noise levels.
        start: First step.
        select: Function that selects this process' positions from those of a step; all by default.
    """
    order, n, permutations = RandomStream(plan.seed, "order"), len(samples), {}
    for step in range(start, plan.steps):
        positions = select(range(step * plan.batch_size, (step + 1) * plan.batch_size))
        parts = []
        for epoch in sorted({position // n for position in positions}):
            if epoch not in permutations:
                permutations = {epoch: order.permutation(n, draw=epoch)}
            in_epoch = [position - epoch * n for position in positions if position // n == epoch]
            batch = samples.batch(permutations[epoch][in_epoch].tolist())
            parts.append(_with_noise(batch, epoch, backbone, samples, plan))
        yield parts[0] if len(parts) == 1 else _concatenate(parts)


def noise_levels(uniform: Tensor, backbone: Backbone, plan: TrainingPlan) -> Tensor:
    """Converts uniform numbers in [0, 1) to noise levels with the distribution of the plan.

    The plan defines the distribution of path time, which is 0 at data, 1 at noise, and on most paths the noise level
    itself. "uniform" uses the numbers as times. "logit-normal" gives times whose logit is normal with the plan's mean
    and standard deviation, so that intermediate times are more frequent. Path times that the prediction cannot use are
    excluded, see `time_range`.

    Args:
        uniform: Uniform numbers in [0, 1), shape (B,), float64.
        backbone: The model.
        plan: Distribution of path time.

    Returns:
        Noise levels, shape (B,), float64.

    Source: Esser et al. 2024 (arXiv:2403.03206), section 3.1.
    """
    time = uniform
    if plan.time_sampling == "logit-normal":
        # scipy returns the same bits at every position of the batch; vectorized functions of torch may not.
        time = torch.from_numpy(expit(plan.time_mean + plan.time_std * ndtri(uniform.numpy())))
    low, high = time_range(backbone.prediction, backbone.schedule)
    return backbone.schedule.level_at(low + (high - low) * time)


def _with_noise(batch: Batch, epoch: int, backbone: Backbone, samples: Samples, plan: TrainingPlan) -> TrainingBatch:
    """Adds noise, noise levels and dropped labels to samples of one epoch."""
    levels = RandomStream(plan.seed, "level")
    drop = RandomStream(plan.seed, "label drop").uniform(batch.ids, draw=epoch) < plan.label_drop
    return TrainingBatch(
        batch.x,
        RandomStream(plan.seed, "noise").normal(batch.ids, samples.shape, draw=epoch),
        noise_levels(levels.uniform(batch.ids, draw=epoch), backbone, plan),
        None if batch.labels is None else batch.labels.masked_fill(drop, samples.num_classes),
        batch.mask,
        levels.uniform(batch.ids, draw=FIRST_TEACHER_DRAW + epoch) if plan.sync.noise_gap else None,
    )


def _concatenate(parts: list[TrainingBatch]) -> TrainingBatch:
    columns = ([getattr(part, column.name) for part in parts] for column in fields(TrainingBatch))
    return TrainingBatch(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]
