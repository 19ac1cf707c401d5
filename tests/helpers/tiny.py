"""The smallest model and data that the engine's tests run on."""

from __future__ import annotations

import torch

from layerprobe.backbones.base import Backbone
from layerprobe.backbones.sit import SiTConfig, new_sit
from layerprobe.data.samples import Splits, Subset, TensorSamples
from layerprobe.noise.predictions import Prediction
from layerprobe.noise.schedules import NoiseSchedule

SHAPE = (1, 4, 4)


def tiny_sit(
    *,
    depth: int = 3,
    shape: tuple[int, ...] = SHAPE,
    num_classes: int = 3,
    seed: int = 0,
    schedule: NoiseSchedule | None = None,
    prediction: Prediction = "velocity",
) -> Backbone:
    """A SiT 16 wide whose layers differ: a fresh one would be an identity from block to block."""
    config = SiTConfig(shape, 2, 16, depth, 2, num_classes)
    backbone = new_sit(config, seed=seed, schedule=schedule, prediction=prediction)
    generator = torch.Generator().manual_seed(seed)
    for parameter in backbone.module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    backbone.module.eval()
    return backbone


def tiny_samples(
    n: int = 12, *, shape: tuple[int, ...] = SHAPE, labeled: bool = True, first_id: int = 0, seed: int = 0
) -> TensorSamples:
    """n samples in [-1, 1] of three classes that differ in their mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = torch.rand(n, *shape, generator=generator) - 0.5 + (labels.view(-1, *[1] * len(shape)) - 1) / 2
    ids = torch.arange(first_id, first_id + n)
    return TensorSamples(x, labels if labeled else None, ids=ids)


def tiny_splits(n: int = 20, **options: object) -> Splits:
    """Half of n samples to fit, a quarter to choose, the rest to report."""
    samples = tiny_samples(n, **options)
    half, most = n // 2, 3 * n // 4
    parts = (range(half), range(half, most), range(most, n))
    return Splits(
        *(Subset(samples, rows, name=name) for name, rows in zip(("train", "validation", "test"), parts, strict=True))
    )
