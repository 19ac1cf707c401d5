"""The loss of a prediction, its weighting over noise levels, and the loss on held-out samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerprobe.backbones import Backbone
from layerprobe.capture import evaluating
from layerprobe.data import Batch, Samples
from layerprobe.noise import END, RandomStream, error_weight, target
from layerprobe.training.batches import TrainingBatch
from layerprobe.training.plan import LossWeighting

HELD_OUT_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def prediction_loss(backbone: Backbone, batch: TrainingBatch) -> Tensor:
    """Mean squared error of each sample in what the model predicts (velocity on the linear path), shape (B,).

    Of a padded sample, only what is real counts. The error of a score is counted in units of 1 / sigma, as published.
    """
    batch = batch.mapped(lambda tensor: tensor.to(backbone.device))
    x, eps, level = batch.x, batch.eps, batch.level
    x_t = backbone.schedule.corrupt(x, eps, level)
    wanted = target(backbone.prediction, backbone.schedule, x=x, eps=eps, level=level)
    output = backbone.masked(batch.mask).predict(x_t, level.to(x.dtype), condition_of(backbone, batch))
    error = (output.float() - wanted) ** 2
    if batch.mask is not None:
        real = batch.mask.unsqueeze(1).expand_as(error).flatten(1)
        loss = error.flatten(1).masked_fill(~real, 0.0).sum(1) / real.sum(1)
    else:
        loss = error.flatten(1).mean(1)
    return loss * error_weight(backbone.prediction, backbone.schedule, level).to(loss.dtype)


def loss_weights(backbone: Backbone, level: Tensor, *, weighting: LossWeighting, snr_gamma: float = 5.0) -> Tensor:
    """The factor of each sample's prediction loss, shape (B,), float64.

    A weighting is defined for one kind of prediction; at a given x_t the errors of all kinds are proportional, which
    turns it into the factor for what this network predicts.

    - "none": 1.
    - "min-snr": min(snr, gamma) on the error of x_0 (Hang et al. 2023, arXiv:2303.09556).
    - "velocity": 1 on the error of the velocity, so that a network of any kind is trained as one of velocities.
    - "likelihood": (Song et al. 2021, arXiv:2101.09258) as SiT has it (arXiv:2401.08740): g / sigma^2 on the error of
      eps, where g is the drift's variance, and the velocity's error is g / sigma times that of eps.

    The factors are those at 1e-3 and 1 - 1e-3 beyond these levels, where some are infinite.
    """
    if weighting == "none":
        return torch.ones_like(level)
    schedule, at = backbone.schedule, level.double().clamp(END, 1 - END)
    alpha, sigma = schedule.alpha(at), schedule.sigma(at)
    # x_t stays where it is while eps moves by alpha and x_0 by -sigma; so far do predictions move then.
    own, velocity = (
        target(kind, schedule, x=-sigma, eps=alpha, level=at) for kind in (backbone.prediction, "velocity")
    )
    if weighting == "min-snr":
        wanted = schedule.log_snr(at).exp().clamp(max=snr_gamma) * sigma**2
    elif weighting == "velocity":
        wanted = velocity**2
    else:
        wanted = velocity * alpha / sigma
    return wanted / (own**2 * error_weight(backbone.prediction, schedule, at))


@torch.inference_mode()
def held_out_loss(
    backbone: Backbone,
    samples: Samples,
    *,
    levels: Sequence[float] = HELD_OUT_LEVELS,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[float, float]:
    """Mean prediction loss on unseen samples, by noise level, with the null label; noise is keyed by (seed, id)."""
    sums = dict.fromkeys(levels, 0.0)
    with evaluating(backbone.module):
        for start in range(0, len(samples), batch_size):
            batch: Batch = samples.batch(range(start, min(start + batch_size, len(samples))))
            eps = RandomStream(seed).normal(batch.ids, samples.shape)
            for level in levels:
                at = torch.full((len(batch.x),), level, dtype=torch.float64)
                noised = TrainingBatch(batch.x, eps, at, None, batch.mask)
                sums[level] += float(prediction_loss(backbone, noised).sum())
    return {level: total / len(samples) for level, total in sums.items()}


def condition_of(backbone: Backbone, batch: TrainingBatch) -> Tensor | None:
    return batch.condition if backbone.num_classes else None
