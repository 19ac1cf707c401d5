"""Networks that map samples to the features in which distances are measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.analyses.generation.distances import row_blocks
from layerprobe.data import Samples, content_hash
from layerprobe.files import atomic_write
from layerprobe.memory import BatchSize
from layerprobe.noise import RandomStream
from layerprobe.precision import Precision, computing
from layerprobe.progress import StepProgress
from layerprobe.ranks import ALONE, Ranks

FEATURE_WIDTH = 64
CLASSIFIER_STEPS = 300  # of the training of an extractor


@dataclass(frozen=True)
class Extractor:
    """A named function from samples to features.

    Attributes:
        name: Name that is recorded with every score.
        features: Function from samples (B, C, *grid) to features (B, D).
        device: Device on which the function expects its samples.
        precision: Precision of its network; None computes as torch is set.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    device: torch.device | str = "cpu"
    precision: Precision | None = None


@torch.inference_mode()
def sample_features(extractor: Extractor, x: Tensor, *, batch_size: int = 512) -> NDArray[np.float32]:
    """Computes features of samples, shape (n, D).

    Args:
        extractor: Extractor of the features.
        x: Samples, shape (n, C, *grid).
        batch_size: Number of samples per call of the extractor.

    Raises:
        ValueError: If the extractor returns anything but a matrix with one row per sample.
    """

    def of(rows: range) -> Tensor:
        part = x[rows.start : rows.stop]
        with computing(extractor.precision, torch.device(extractor.device)):
            features = extractor.features(part.to(extractor.device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(part):
            returned = (
                f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
            )
            raise ValueError(
                f"{extractor.name} returns {returned} for {len(part)} samples; it must return features (B, D)"
            )
        return features.float().cpu()

    return torch.cat([features for _, features in BatchSize(batch_size).batches(len(x), of)]).numpy()


def all_features(
    extractor: Extractor,
    samples: Samples,
    *,
    batch_size: int = 512,
    ranks: Ranks = ALONE,
    progress: StepProgress | None = None,
) -> NDArray[np.float32]:
    """Computes features of a whole data set, read batch by batch, shape (n, D).

    Args:
        extractor: Extractor of the features.
        samples: Data set.
        batch_size: Number of samples per batch.
        ranks: Processes that share the batches and all call this function; all get all features.
        progress: Callback with (samples done, total samples).
    """
    parts = []
    for rows in ranks.mine([*row_blocks(len(samples), batch_size)]):
        ranks.check()
        parts.append(sample_features(extractor, samples.batch(rows).x))
        if progress:
            progress(rows.stop, len(samples))
    return np.concatenate(ranks.whole(parts))


def embedded_extractor(
    samples: Samples, folder: str | Path | None = None, *, seed: int = 0, progress: StepProgress | None = None
) -> Extractor:
    """Returns the extractor that needs no file: `classifier_extractor`, with its weights cached in a folder.

    Args:
        samples: Samples to train it on.
        folder: Folder of the cache, which has one file per training; None for no cache.
        seed: Seed of initial weights and data order.
        progress: Callback with (steps done, total steps) while it is trained.
    """
    cache = None if folder is None else cached_extractor(samples, folder, seed=seed)
    return classifier_extractor(samples, cache, seed=seed, progress=progress)


def cached_extractor(samples: Samples, folder: str | Path, *, seed: int = 0) -> Path:
    """Returns the path of the weights of `embedded_extractor` in the folder of its cache, whether they exist or not."""
    return Path(folder) / f"classifier-{content_hash(samples.fingerprint, seed)[:16]}.safetensors"


def classifier_extractor(
    samples: Samples,
    cache: str | Path | None = None,
    *,
    steps: int = CLASSIFIER_STEPS,
    batch_size: int = 128,
    seed: int = 0,
    progress: StepProgress | None = None,
) -> Extractor:
    """Trains a small convolutional classifier on the data's own labels; its last hidden layer is the extractor.

    It works offline, for grids of one to three dimensions. Without labels the network keeps its random weights, which
    still separate good samples from bad ones (docs/decisions/0007), and its name says so.

    Args:
        samples: Samples to train it on.
        cache: `.safetensors` file of the weights, which is read if it exists and written otherwise.
        steps: Number of training steps.
        batch_size: Number of samples per step.
        seed: Seed of initial weights and data order.
        progress: Callback with (steps done, total steps).

    Raises:
        ValueError: If the cache is damaged, or belongs to other data or another training.
    """
    network = _new_network(samples, max(samples.num_classes, 1), seed)
    origin = f"{samples.fingerprint}, {steps} steps of {batch_size}, seed {seed}"
    if not _load_cached(network, cache, origin):
        if samples.num_classes:
            _train(network, samples, steps, batch_size, seed, progress)
        _save(network, cache, origin)
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
    progress: StepProgress | None,
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    key, per_epoch = RandomStream(seed, "order"), max(len(samples) // batch_size, 1)
    for step in range(steps):
        epoch, index = divmod(step, per_epoch)
        order = key.permutation(len(samples), draw=epoch)
        batch = samples.batch(order[index * batch_size : (index + 1) * batch_size].tolist())
        assert batch.labels is not None
        loss = F.cross_entropy(network(batch.x), batch.labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, steps)


def _load_cached(network: _Classifier, cache: str | Path | None, origin: str) -> bool:
    """Loads the weights if the cache exists, and returns whether it does."""
    if cache is None or not Path(cache).is_file():
        return False
    network.load_state_dict(_read_cache(Path(cache), origin))
    return True


def _save(network: _Classifier, cache: str | Path | None, origin: str) -> None:
    if cache is not None:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(cache)) as partial:
            save_file(network.state_dict(), partial, metadata={"origin": origin})


def _read_cache(cache: Path, origin: str) -> dict[str, Tensor]:
    try:
        with safe_open(cache, framework="pt") as file:
            if (file.metadata() or {}).get("origin") != origin:
                raise ValueError(f"{cache} is an extractor for other data or of another training; delete it")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{cache} is damaged ({error}); delete it") from error
