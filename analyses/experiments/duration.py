"""How long trainings and confirmations will take, from the time of single steps of their own network."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from layerprobe.analyses.experiments.arms import Arm, ConfirmationPlan
from layerprobe.analyses.experiments.evaluation import HELD_OUT_SAMPLES
from layerprobe.backbones import Backbone
from layerprobe.precision import products_of
from layerprobe.sampling import SamplingPlan
from layerprobe.training import HELD_OUT_LEVELS, TrainingBatch, prediction_loss

_CALLS = {"euler": 1, "heun": 2, "dopri5": 6, "euler-maruyama": 1}
_TIMED = 3


def confirmation_seconds(
    backbone: Backbone, arms: Sequence[Arm], plan: ConfirmationPlan, *, num_processes: int = 1
) -> float:
    """Returns about how many seconds the arms take to train and score on the backbone's device.

    A few steps and forward passes of one batch are timed, on constant samples; reading data and fitting the extractor
    are not. The weights of the backbone are not changed.

    Args:
        backbone: Initial model.
        arms: Arms of the confirmation.
        plan: Its plan.
        num_processes: Number of processes that share the arms, on a device each.
    """
    training, sampling = plan.training, plan.sampling
    step_s, forward_s = step_seconds(backbone, training.batch_size)
    second_passes = sum(arm.training(training).sync.second_pass for arm in arms if arm.pair)
    steps = training.steps * (len(arms) * step_s + second_passes * forward_s)
    calls = plan.num_samples * passes_of_a_sample(sampling)
    calls += HELD_OUT_SAMPLES * len(HELD_OUT_LEVELS)
    # The start is scored once for all arms of a seed.
    evaluations = (len(arms) * plan.num_evaluations + 1) * calls / training.batch_size * forward_s
    # The process with the most arms takes the longest. A plan that stops early divides the arms of one seed at a time.
    groups, size = (len(plan.seeds), len(arms)) if plan.stop_early else (1, len(plan.seeds) * len(arms))
    return groups * math.ceil(size / num_processes) / len(arms) * (steps + evaluations)


def passes_of_a_sample(plan: SamplingPlan) -> int:
    """Returns how often the network is called to draw one sample, by dopri5 in its first steps."""
    return plan.steps * _CALLS[plan.solver] * (1 if plan.guidance == 1 else 2)


def step_seconds(backbone: Backbone, batch_size: int) -> tuple[float, float]:
    """Returns the seconds of a training step and of a forward pass of one batch, on the backbone's device.

    The batch is constant, and the weights of the backbone are not changed.

    Args:
        backbone: Model in the precision of the training.
        batch_size: Number of samples.
    """
    live = replace(backbone, module=copy.deepcopy(backbone.module).eval())
    optimizer = torch.optim.AdamW([p for p in live.module.parameters() if p.requires_grad], lr=1e-12)
    batch = _constant_batch(live, batch_size)

    def step() -> None:
        optimizer.zero_grad()
        loss = prediction_loss(live, batch).mean()
        with products_of(live.precision):
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()  # Waits for the device.

    def forward() -> None:
        with torch.no_grad():
            prediction_loss(live, batch).sum().item()

    return _fastest(step), _fastest(forward)


def _constant_batch(backbone: Backbone, size: int) -> TrainingBatch:
    x = torch.ones(size, *backbone.shape)
    labels = torch.zeros(size, dtype=torch.int64) if backbone.num_classes else None
    return TrainingBatch(x, x, torch.full((size,), 0.5, dtype=torch.float64), labels).mapped(
        lambda tensor: tensor.to(backbone.device)
    )


def _fastest(call: Callable[[], None]) -> float:
    """Seconds of the fastest of a few calls, after one that does not count."""
    seconds = []
    for _ in range(1 + _TIMED):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
