"""The data side of training: which samples a step sees, with which noise, at which levels.

All of it depends on (seed, sample id, epoch) only, so a step's batch is the same however a run was cut into pieces or
spread over processes. A thread prepares batches ahead, so that the device need not wait for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import TYPE_CHECKING, TypeVar

import torch
from scipy.special import expit, ndtri
from torch import Tensor

from layerprobe.backbones import Backbone
from layerprobe.data import Batch, Samples
from layerprobe.noise import RandomStream, time_range

if TYPE_CHECKING:
    from layerprobe.training.plan import TrainingPlan

Item = TypeVar("Item")
# The teacher's levels draw from the levels' streams, from this draw on: no run has as many epochs.
FIRST_TEACHER_DRAW = 2**32


@dataclass(frozen=True)
class TrainingBatch:
    """What a step, or a part of it, learns from.

    Attributes:
        x: Shape (B, C, *grid).
        eps: The noise, like x.
        level: Noise levels, shape (B,), float64.
        condition: Labels, dropped ones replaced by the null label, shape (B,); None for unlabeled samples.
        mask: As in `Batch`, shape (B, *grid), or None.
        teacher_draw: Uniform numbers for the teacher's noise levels, shape (B,); None without a noise gap.
    """

    x: Tensor
    eps: Tensor
    level: Tensor
    condition: Tensor | None
    mask: Tensor | None = None
    teacher_draw: Tensor | None = None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> TrainingBatch:
        """The batch with the function applied to every tensor."""
        columns = (getattr(self, column.name) for column in fields(self))
        return TrainingBatch(*(None if column is None else function(column) for column in columns))  # type: ignore[arg-type]

    def split(self, parts: int) -> list[TrainingBatch]:
        """Equal parts, in order."""
        size = len(self.x) // parts
        return [self.mapped(itemgetter(slice(i * size, (i + 1) * size))) for i in range(parts)]


def batches(
    backbone: Backbone,
    samples: Samples,
    plan: TrainingPlan,
    *,
    start: int = 0,
    mine: Callable[[range], Sequence[int]] = list,
) -> Iterator[TrainingBatch]:
    """The batches of steps `start` ... `plan.steps - 1`; epochs follow one another without a gap.

    Args:
        backbone: The model, whose schedule and prediction say which noise levels there are.
        samples: What there is to learn from.
        plan: Batch size, seed, label drop and the choice of noise levels.
        start: The first step.
        mine: Which of a step's positions this process takes; all of them where there is one process.
    """
    order, n, permutations = RandomStream(plan.seed, "order"), len(samples), {}
    for step in range(start, plan.steps):
        positions = mine(range(step * plan.batch_size, (step + 1) * plan.batch_size))
        parts = []
        for epoch in sorted({position // n for position in positions}):
            if epoch not in permutations:
                permutations = {epoch: order.permutation(n, draw=epoch)}
            here = [position - epoch * n for position in positions if position // n == epoch]
            batch = samples.batch(permutations[epoch][here].tolist())
            parts.append(_noised(batch, epoch, backbone, samples, plan))
        yield parts[0] if len(parts) == 1 else _concatenate(parts)


def noise_levels(uniform: Tensor, backbone: Backbone, plan: TrainingPlan) -> Tensor:
    """Noise levels as the plan samples them, from uniform numbers in [0, 1); shapes (B,), float64.

    What is sampled is the time of the model's path, 0 at data and 1 at noise, which on most paths is the noise level
    itself. "uniform" takes the numbers as times; "logit-normal" takes the times whose logit is normal with the plan's
    mean and standard deviation, which gives more of the middle. Times that the prediction cannot use are left out.

    Source: Esser et al. 2024 (arXiv:2403.03206), section 3.1.
    """
    time = uniform
    if plan.time_sampling == "logit-normal":
        # scipy gives an element the same bits wherever it stands in the batch; vectorized functions may not.
        time = torch.from_numpy(expit(plan.time_mean + plan.time_std * ndtri(uniform.numpy())))
    low, high = time_range(backbone.prediction, backbone.schedule)
    return backbone.schedule.level_at(low + (high - low) * time)


def prefetched(items: Iterator[Item], *, ahead: int = 2) -> Generator[Item]:
    """The same items, of which a thread prepares the next few while the present one is used.

    An exception is raised where its item would have come. Close the generator, and the thread has ended.

    Args:
        items: Used in the thread only.
        ahead: How many items wait at most.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        try:
            waiting = deque(pool.submit(next, items, end) for _ in range(ahead))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            pool.shutdown(cancel_futures=True)


def _noised(batch: Batch, epoch: int, backbone: Backbone, samples: Samples, plan: TrainingPlan) -> TrainingBatch:
    """Samples of one epoch with their noise, levels and dropped labels."""
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
