"""Samples of a checkpoint, drawn and saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from layerprobe.analyses import plots
from layerprobe.backbones.base import Backbone
from layerprobe.sampling import SamplingPlan, sample


def draw_samples(
    backbone: Backbone, folder: str | Path, *, num: int = 80, plan: SamplingPlan | None = None, keep: bool = False
) -> Path:
    """Draws samples, class after class where the model knows classes, and saves the grid as `samples.png` and `.svg`.

    Args:
        backbone: The model.
        folder: Where the files go.
        num: How many.
        plan: Solver, steps, guidance and seed.
        keep: Also save the samples themselves, shape (num, C, H, W), as `samples.npy`.
    """
    labels = torch.arange(num) % backbone.num_classes if backbone.num_classes else None
    x = sample(backbone, range(num), labels=labels, plan=plan).numpy()
    columns = backbone.num_classes if 1 < backbone.num_classes <= 16 else min(10, num)
    figure = plots.sample_grid(x, None if labels is None else labels.tolist(), columns=columns)
    place = plots.save(figure, folder, "samples")[0]
    if keep:
        np.save(place.with_suffix(".npy"), x)
    return place
