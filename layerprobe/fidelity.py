"""How close generated samples are to real ones: Fréchet and kernel distance in the features of a stated extractor.

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

from layerprobe.data.base import Samples, content_hash
from layerprobe.files import whole
from layerprobe.noise import NoiseKey

FEATURE_WIDTH = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Extractor:
    """A named function from samples (B, C, *grid) on a device to features (B, D)."""

    name: str
    features: Callable[[Tensor], Tensor]
    device: torch.device | str = "cpu"


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


def leave_out_gaussians(features: NDArray[np.floating], groups: NDArray[np.integer]) -> list[Gaussian]:
    """The Gaussian of the samples outside of each group 0, 1, ..., in one pass over features (n, D).

    Args:
        features: Shape (n, D).
        groups: The group of each sample, shape (n,); none empty.
    """
    # Centred first: differences of raw second moments lose the digits that a large mean takes.
    centre = features.mean(0, dtype=np.float64)
    parts = (features[groups == group] - centre for group in range(int(groups.max()) + 1))
    counts, sums, moments = (np.stack(z) for z in zip(*((len(p), p.sum(0), p.T @ p) for p in parts), strict=True))
    ns, means = counts.sum() - counts, (sums.sum(0) - sums) / (counts.sum() - counts)[:, None]
    squares = moments.sum(0)
    return [
        Gaussian(centre + mean, (squares - moment - n * np.outer(mean, mean)) / (n - 1), int(n))
        for n, mean, moment in zip(ns, means, moments, strict=True)
    ]


def kernel_distance(x: NDArray[np.floating], y: NDArray[np.floating], *, rows: int = 1024) -> float:
    """Unbiased squared maximum mean discrepancy of features under the kernel (x.y / D + 1)^3: the KID.

    Expected to be 0 for samples of one distribution at any n, so single values below 0 are possible.

    Args:
        x: Shape (n, D), n at least 2.
        y: Shape (m, D), m at least 2.
        rows: Samples at a time; memory grows with rows * max(n, m).

    Raises:
        ValueError: If the shapes do not fit, or a feature is not finite.

    Source: Bińkowski et al. 2018 (arXiv:1801.01401); estimator of Gretton et al. 2012.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"need features (n, D) and (m, D) of at least 2 samples, got shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features are not finite; the samples or the extractor have diverged")
    a, b = x.astype(np.float64), y.astype(np.float64)
    within = sum(
        (_kernel_sum(z, z, rows) - _kernel((z**2).sum(1), z.shape[1]).sum()) / (len(z) * (len(z) - 1)) for z in (a, b)
    )
    return float(within - 2 * _kernel_sum(a, b, rows) / (len(a) * len(b)))


@torch.inference_mode()
def sample_features(extractor: Extractor, x: Tensor, *, batch_size: int = 512) -> NDArray[np.float32]:
    """Features of samples (n, C, *grid), shape (n, D).

    Raises:
        ValueError: If the extractor gives anything else.
    """
    parts = []
    for part in torch.split(x, batch_size):
        features = extractor.features(part.to(extractor.device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(part):
            seen = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise ValueError(f"{extractor.name} gives {seen} for {len(part)} samples; it must give features (B, D)")
        parts.append(features.float().cpu())
    return torch.cat(parts).numpy()


def all_features(
    extractor: Extractor, samples: Samples, *, batch_size: int = 512, progress: Progress | None = None
) -> NDArray[np.float32]:
    """Features of a whole data set, read batch by batch, shape (n, D).

    `progress` is called with (samples done, samples in all).
    """
    parts = []
    for rows in _runs(len(samples), batch_size):
        parts.append(sample_features(extractor, samples.batch(rows).x))
        if progress:
            progress(rows.stop, len(samples))
    return np.concatenate(parts)


def embedded_extractor(
    samples: Samples, folder: str | Path | None = None, *, seed: int = 0, progress: Progress | None = None
) -> Extractor:
    """The extractor that needs no file: `classifier_extractor`, with its weights kept in a folder.

    Args:
        samples: What it is trained on.
        folder: Keeps the weights of each training under a name of its own.
        seed: Of weights and order.
        progress: Called with (steps done, steps in all) while it is trained.
    """
    name = f"classifier-{content_hash(samples.fingerprint, seed)[:16]}.safetensors"
    return classifier_extractor(samples, None if folder is None else Path(folder) / name, seed=seed, progress=progress)


def classifier_extractor(
    samples: Samples,
    cache: str | Path | None = None,
    *,
    steps: int = 300,
    batch_size: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> Extractor:
    """The last hidden layer of a small convolutional classifier trained on the data's own labels.

    Works offline, for any grid of one to three dimensions. Without labels the network keeps its random weights, which
    still separates good samples from bad ones (docs/decisions/0007), and says so in its name.

    Args:
        samples: What it is trained on.
        cache: A `.safetensors` file that keeps the weights; read if it is there.
        steps: Training steps.
        batch_size: Samples per step.
        seed: Of weights and order.
        progress: Called with (steps done, steps in all).

    Raises:
        ValueError: If the cache is damaged, or of other data or another training.
    """
    network = _new_network(samples, max(samples.num_classes, 1), seed)
    origin = f"{samples.fingerprint}, {steps} steps of {batch_size}, seed {seed}"
    if not _is_kept(network, cache, origin):
        if samples.num_classes:
            _train(network, samples, steps, batch_size, seed, progress)
        _keep(network, cache, origin)
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


def _new_network(samples: Samples, num_outputs: int, seed: int) -> _Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _Classifier(samples.shape, num_outputs).eval()


def _train(
    network: _Classifier,
    samples: Samples,
    steps: int,
    batch_size: int,
    seed: int,
    progress: Progress | None,
) -> None:
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
        if progress:
            progress(step + 1, steps)


def _is_kept(network: _Classifier, cache: str | Path | None, origin: str) -> bool:
    """Loads the weights if the cache has them."""
    if cache is None or not Path(cache).is_file():
        return False
    network.load_state_dict(_read_cache(Path(cache), origin))
    return True


def _keep(network: _Classifier, cache: str | Path | None, origin: str) -> None:
    if cache is not None:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        with whole(Path(cache), rivals=True) as partial:  # shards of an atlas
            save_file(network.state_dict(), partial, metadata={"origin": origin})


def _read_cache(cache: Path, origin: str) -> dict[str, Tensor]:
    try:
        with safe_open(cache, framework="pt") as file:
            if (file.metadata() or {}).get("origin") != origin:
                raise ValueError(f"{cache} is an extractor of other data or another training; delete it")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{cache} is damaged ({error}); delete it") from error


def _kernel(products: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    return (products / width + 1) ** 3


def _kernel_sum(x: NDArray[np.float64], y: NDArray[np.float64], rows: int) -> float:
    """Of the kernel over all pairs."""
    return float(sum(_kernel(x[part.start : part.stop] @ y.T, x.shape[1]).sum() for part in _runs(len(x), rows)))


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def _runs(n: int, size: int) -> Iterator[range]:
    for start in range(0, n, size):
        yield range(start, min(start + size, n))
