"""How an arm is scored: Frechet distance of its samples and loss on held-out data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from layerprobe.analyses.experiments.arms import FRECHET as FRECHET
from layerprobe.analyses.experiments.arms import HELD_OUT as HELD_OUT
from layerprobe.analyses.generation import Extractor, all_features, frechet_distance, gaussian, sample_features
from layerprobe.backbones import Backbone
from layerprobe.data import Samples, Subset
from layerprobe.sampling import SamplingPlan, sample
from layerprobe.training import held_out_loss

HELD_OUT_SAMPLES = 1000
ScoresByStep = dict[int, dict[str, float]]  # metrics by step


class Scorer:
    """Scores models against samples that no arm has seen.

    Drawn sample i has the class and the length of a real one, always the same.

    Args:
        samples: The unseen ones; the first `HELD_OUT_SAMPLES` for the losses, all for the distance.
        extractor: For the Fréchet distance.
        num_samples: Drawn for each distance.
        sampling: How they are drawn.
    """

    def __init__(self, samples: Samples, extractor: Extractor, *, num_samples: int, sampling: SamplingPlan) -> None:
        self._extractor, self._num_samples, self._sampling = extractor, num_samples, sampling
        self._reference = gaussian(all_features(extractor, samples))
        self._held_out = Subset(samples, range(min(len(samples), HELD_OUT_SAMPLES)), name="held out")
        rows = _rows_like(samples, num_samples)
        self._labels = None if samples.labels is None else samples.labels[rows]
        self._masks = _masks(samples, rows) if _is_padded(samples) else None

    def means(self, model: Backbone) -> dict[str, float]:
        """The Fréchet distance, and the held-out loss averaged over noise levels."""
        losses = self.losses(model)
        return {FRECHET: self.distance(model), HELD_OUT: float(np.mean(list(losses.values())))}

    def losses(self, model: Backbone) -> dict[float, float]:
        """The held-out loss by noise level."""
        return held_out_loss(model, self._held_out)

    def distance(self, model: Backbone) -> float:
        """The Fréchet distance of what the model draws."""
        # Classes as often as among the real samples; without labels the model has learned none in this training.
        labels = self._labels if model.num_classes else None
        x = sample(model, range(self._num_samples), labels=labels, plan=self._sampling, mask=self._masks)
        return frechet_distance(gaussian(sample_features(self._extractor, x)), self._reference)


def _is_padded(samples: Samples) -> bool:
    """Whether these samples are padded to a common shape."""
    return samples.batch(range(1)).mask is not None


def _rows_like(samples: Samples, n: int) -> Tensor:
    """Rows of n samples, shape (n,), with the classes in the proportions of all, whatever their order."""
    if samples.labels is None:
        return torch.arange(n) % len(samples)
    return samples.labels.sort(stable=True).indices[torch.arange(n) * len(samples) // n]


def _masks(samples: Samples, rows: Tensor) -> Tensor:
    """What is no padding in the samples of these rows (n,), shape (n, *grid)."""
    once, place = torch.unique(rows, return_inverse=True)
    return torch.cat([samples.batch(part.tolist()).real for part in torch.split(once, 256)])[place]
