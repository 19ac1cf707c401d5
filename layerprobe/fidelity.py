"""How close generated samples are to real ones: Fréchet distance in the features of a stated extractor.

The numbers depend on the extractor, so its name goes with them; they do not compare with published FIDs, which use an
Inception network.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.data.base import Samples
from layerprobe.files import whole
from layerprobe.noise import NoiseKey

FEATURE_WIDTH = 64


@dataclass(frozen=True)
class Extractor:
    """A named function from samples (B, C, *grid) to features (B, D)."""

    name: str
    features: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of features, float64, of n samples."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    n: int


def gaussian(features: NDArray[np.floating]) -> Gaussian:
    """Fits a Gaussian to features of shape (n, D).

    Raises:
        ValueError: If n < 2 or a feature is not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"need features of shape (n, D) with n of at least 2, got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features are not finite; the samples or the extractor have diverged")
    return Gaussian(features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1), len(features))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2), which stays real and keeps its
    digits when the covariances are singular.

    Raises:
        ValueError: If the Gaussians differ in width.

    Source: Dowson & Landau 1982; Heusel et al. 2017 (arXiv:1706.08500).
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of width {len(a.mean)} and {len(b.mean)} do not compare; use one extractor")
    mixed = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * mixed.sum()
    # Not below zero by rounding.
    return float(max(((a.mean - b.mean) ** 2).sum() + trace, 0.0))


@torch.inference_mode()
def sample_features(extractor: Extractor, x: Tensor, *, batch_size: int = 512) -> NDArray[np.float32]:
    """Features of samples (n, C, *grid), shape (n, D)."""
    return torch.cat([extractor.features(part).float().cpu() for part in torch.split(x, batch_size)]).numpy()


def all_features(extractor: Extractor, samples: Samples, *, batch_size: int = 512) -> NDArray[np.float32]:
    """Features of a whole data set, read batch by batch, shape (n, D)."""
    return np.concatenate(
        [sample_features(extractor, samples.batch(rows).x) for rows in _runs(len(samples), batch_size)]
    )


def classifier_extractor(
    samples: Samples, cache: str | Path | None = None, *, steps: int = 300, batch_size: int = 128, seed: int = 0
) -> Extractor:
    """The last hidden layer of a small convolutional classifier trained on the data's own labels.

    Works offline, for any grid of one to three dimensions. Without labels the network keeps its random weights, which
    still separates good samples from bad ones, and says so in its name.

    Args:
        samples: What it is trained on.
        cache: A `.safetensors` file that keeps the weights; read if it is there.
        steps: Training steps.
        batch_size: Samples per step.
        seed: Of weights and order.

    Raises:
        ValueError: If the cache is damaged, or of other data or another training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = _Classifier(samples.shape, max(samples.num_classes, 1))
    cache = None if cache is None else Path(cache)
    origin = f"{samples.fingerprint}, {steps} steps of {batch_size}, seed {seed}"
    if cache is not None and cache.is_file():
        network.load_state_dict(_read_cache(cache, origin))
    else:
        if samples.num_classes:
            _train_classifier(network, samples, steps, batch_size, seed)
        if cache is not None:
            _write_cache(cache, network.state_dict(), origin)
    network.eval()
    kind = (
        f"a classifier trained {steps} steps on the labels" if samples.num_classes else "a random network (no labels)"
    )
    return Extractor(f"{FEATURE_WIDTH} features of {kind}", network.embed)


class _Classifier(nn.Module):
    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(shape) - 1]
        widths = (shape[0], 32, FEATURE_WIDTH, FEATURE_WIDTH)
        self.stages = nn.ModuleList(
            convolution(a, b, 3, stride=1 if i == 0 else 2, padding=1)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.head = nn.Linear(FEATURE_WIDTH, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = F.silu(norm(stage(x)))
        return x.flatten(2).mean(2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.embed(x))
        return output


def _train_classifier(network: _Classifier, samples: Samples, steps: int, batch_size: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    key, per_epoch = NoiseKey(seed, "order"), max(len(samples) // batch_size, 1)
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        order = key.permutation(len(samples), draw=epoch)
        batch = samples.batch(order[place * batch_size : (place + 1) * batch_size].tolist())
        assert batch.labels is not None
        loss = F.cross_entropy(network(batch.x), batch.labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def _write_cache(cache: Path, weights: dict[str, Tensor], origin: str) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with whole(cache) as partial:
        save_file(weights, partial, metadata={"origin": origin})


def _read_cache(cache: Path, origin: str) -> dict[str, Tensor]:
    try:
        with safe_open(cache, framework="pt") as file:
            if (file.metadata() or {}).get("origin") != origin:
                raise ValueError(f"{cache} is an extractor of other data or another training; delete it")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{cache} is damaged ({error}); delete it") from error


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def _runs(n: int, size: int) -> Iterator[range]:
    for start in range(0, n, size):
        yield range(start, min(start + size, n))
