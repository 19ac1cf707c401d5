"""Prediction loss, its weighting over noise levels, and the loss on held-out samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerprobe.backbones import Backbone
from layerprobe.capture import evaluating
from layerprobe.data import Samples
from layerprobe.memory import BatchSize
from layerprobe.noise import END, RandomStream, error_weight, target
from layerprobe.training.batches import TrainingBatch
from layerprobe.training.plan import LossWeighting

HELD_OUT_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def prediction_loss(backbone: Backbone, batch: TrainingBatch) -> Tensor:
    """Computes the mean squared error of the prediction for each sample, shape (B,).

    Padding does not count. The error of a score is measured in units of 1 / sigma, as published.
    """
    batch = batch.mapped(lambda tensor: tensor.to(backbone.device))
    x, eps, level = batch.x, batch.eps, batch.level
    x_t = backbone.schedule.corrupt(x, eps, level)
    expected = target(backbone.prediction, backbone.schedule, x=x, eps=eps, level=level)
    output = backbone.masked(batch.mask).predict(x_t, level.to(x.dtype), condition_of(backbone, batch))
    error = (output.float() - expected) ** 2
    if batch.mask is not None:
        real = batch.mask.unsqueeze(1).expand_as(error).flatten(1)
        loss = error.flatten(1).masked_fill(~real, 0.0).sum(1) / real.sum(1)
    else:
        loss = error.flatten(1).mean(1)
    return loss * error_weight(backbone.prediction, backbone.schedule, level).to(loss.dtype)


def loss_weights(backbone: Backbone, level: Tensor, *, weighting: LossWeighting, snr_gamma: float = 5.0) -> Tensor:
    """Computes the factor of each sample's prediction loss, shape (B,), float64.

    Each weighting is defined for one kind of prediction. At a given x_t the errors of all kinds are proportional, which
    gives the factor for the prediction of this network.

    - "none": 1.
    - "min-snr": min(snr, gamma) on the error of x_0 (Hang et al. 2023, arXiv:2303.09556).
    - "velocity": 1 on the error of the velocity, whatever the network predicts.
    - "likelihood": likelihood weighting (Song et al. 2021, arXiv:2101.09258) in the form of SiT (arXiv:2401.08740):
      g / sigma^2 on the error of eps, where g is chosen such that the error of the velocity is g / sigma times that
      of eps.

    Some factors are infinite at the ends, so noise levels are clamped to [1e-3, 1 - 1e-3].

    Args:
        backbone: The model.
        level: Noise levels, shape (B,).
        weighting: Name of the weighting.
        snr_gamma: Upper limit gamma of "min-snr".
    """
    if weighting == "none":
        return torch.ones_like(level)
    schedule, at = backbone.schedule.own, level.double().clamp(END, 1 - END)
    alpha, sigma = schedule.alpha(at), schedule.sigma(at)
    # A change of eps by alpha and of x_0 by -sigma leaves x_t unchanged; these are the changes of the predictions.
    prediction, velocity = (
        target(kind, schedule, x=-sigma, eps=alpha, level=at) for kind in (backbone.prediction, "velocity")
    )
    if weighting == "min-snr":
        weighted_error = schedule.log_snr(at).exp().clamp(max=snr_gamma) * sigma**2
    elif weighting == "velocity":
        weighted_error = velocity**2
    else:
        weighted_error = velocity * alpha / sigma
    return weighted_error / (prediction**2 * error_weight(backbone.prediction, schedule, at))


@torch.inference_mode()
def held_out_loss(
    backbone: Backbone,
    samples: Samples,
    *,
    levels: Sequence[float] = HELD_OUT_LEVELS,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[float, float]:
    """Computes the mean prediction loss on held-out samples with the null label.

    Args:
        backbone: The model.
        samples: Held-out samples.
        levels: Noise levels.
        seed: Seed of the noise, which is keyed by (seed, sample id).
        batch_size: Number of samples per forward pass.

    Returns:
        Mean loss by noise level.
    """

    def sums(rows: range) -> Tensor:
        batch = samples.batch(rows)
        eps = RandomStream(seed).normal(batch.ids, samples.shape)
        losses = []
        for level in levels:
            at = torch.full((len(batch.x),), level, dtype=torch.float64)
            losses.append(prediction_loss(backbone, TrainingBatch(batch.x, eps, at, None, batch.mask)).sum())
        return torch.stack(losses).cpu()

    total = torch.zeros(len(levels), dtype=torch.float64)
    with evaluating(backbone.module):
        for _, losses in BatchSize(batch_size).batches(len(samples), sums):
            total += losses
    return dict(zip(levels, (total / len(samples)).tolist(), strict=True))


def condition_of(backbone: Backbone, batch: TrainingBatch) -> Tensor | None:
    """Returns the labels of a batch, shape (B,), or None if the model is not conditioned on classes."""
    return batch.condition if backbone.num_classes else None
