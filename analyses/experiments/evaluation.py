"""Scores of an arm: Fréchet distance of its samples and loss on held-out data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from layerprobe.analyses.experiments.arms import FRECHET, HELD_OUT
from layerprobe.analyses.generation import Extractor, all_features, frechet_distance, gaussian, sample_features
from layerprobe.backbones import Backbone
from layerprobe.data import Samples, Subset
from layerprobe.sampling import SamplingPlan, sample
from layerprobe.training import held_out_loss

HELD_OUT_SAMPLES = 1000
ScoresByStep = dict[int, dict[str, float]]  # {step: {metric: value}}


class Scorer:
    """Scores models against samples that no arm was trained on.

    Drawn sample i has the class and the length of a real sample, the same one for every model.

    Args:
        samples: Held-out samples; the first `HELD_OUT_SAMPLES` are used for the loss, all for the distance.
        extractor: Extractor of the Fréchet distance.
        num_samples: Number of samples drawn for each distance.
        sampling: Sampling plan.
    """

    def __init__(self, samples: Samples, extractor: Extractor, *, num_samples: int, sampling: SamplingPlan) -> None:
        self._extractor, self._num_samples, self._sampling = extractor, num_samples, sampling
        self._reference = gaussian(all_features(extractor, samples))
        self._held_out = Subset(samples, range(min(len(samples), HELD_OUT_SAMPLES)), name="held out")
        rows = _rows_like(samples, num_samples)
        self._labels = None if samples.labels is None else samples.labels[rows]
        self._masks = _masks(samples, rows) if _is_padded(samples) else None

    def means(self, model: Backbone) -> dict[str, float]:
        """Returns the Fréchet distance, and the held-out loss averaged over noise levels."""
        losses = self.losses(model)
        return {FRECHET: self.distance(model), HELD_OUT: float(np.mean(list(losses.values())))}

    def losses(self, model: Backbone) -> dict[float, float]:
        """Returns the held-out loss by noise level."""
        return held_out_loss(model, self._held_out)

    def distance(self, model: Backbone) -> float:
        """Returns the Fréchet distance of samples drawn from the model."""
        # Classes have the proportions of the real samples; a model trained without labels is sampled without labels.
        labels = self._labels if model.num_classes else None
        x = sample(model, range(self._num_samples), labels=labels, plan=self._sampling, mask=self._masks)
        return frechet_distance(gaussian(sample_features(self._extractor, x)), self._reference)


def _is_padded(samples: Samples) -> bool:
    """Whether the samples are padded to a common shape."""
    return samples.batch(range(1)).mask is not None


def _rows_like(samples: Samples, n: int) -> Tensor:
    """Rows of n samples, shape (n,), with classes in the proportions of the data set, whatever its order."""
    if samples.labels is None:
        return torch.arange(n) % len(samples)
    return samples.labels.sort(stable=True).indices[torch.arange(n) * len(samples) // n]


def _masks(samples: Samples, rows: Tensor) -> Tensor:
    """Masks of the real, unpadded places in the samples of these rows (n,), shape (n, *grid)."""
    unique_rows, positions = torch.unique(rows, return_inverse=True)
    return torch.cat([samples.batch(part.tolist()).real for part in torch.split(unique_rows, 256)])[positions]
