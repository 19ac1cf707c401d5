"""Small extractions of few samples and a few tokens: the evidence of layer pairs, and pairs during a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from layerprobe.backbones import Backbone
from layerprobe.capture import INPUT
from layerprobe.data import Samples, Splits, Subset
from layerprobe.extraction.features import FeatureStore
from layerprobe.extraction.forward import extract
from layerprobe.extraction.plan import ExtractionPlan

EVIDENCE_DRAWS, TOKENS_PER_SAMPLE = 2, 8


def pair_layers(layers: Sequence[str]) -> tuple[str, ...]:
    """Returns the layers that can form pairs, in their order, with each depth of the network once.

    The input of a block is the output of the block before it, and a submodule lies inside its block. Keeping
    `blocks.3:input` or `blocks.3.attn` beside `blocks.3` would count one depth twice and distort layer distances.
    """
    outputs = [name for name in layers if not name.endswith(INPUT)] or list(layers)
    return tuple(name for name in outputs if not any(name.startswith(f"{other}.") for other in outputs))


def extract_evidence(
    backbone: Backbone,
    splits: Splits,
    plan: ExtractionPlan,
    folder: str | Path,
    *,
    num_samples: int = 384,
    batch_size: int = 128,
) -> FeatureStore:
    """Extracts features of few samples with at least two noise draws and a few tokens per sample.

    Args:
        backbone: The model.
        splits: The data; half of the samples are taken from the training split, half from the validation split.
        plan: Plan that supplies the layers, noise levels, condition, precision and seed.
        folder: Folder of the store; created if it does not exist.
        num_samples: Maximum number of samples.
        batch_size: Number of rows per forward pass.

    Raises:
        ValueError: As for `extract`.
    """
    return extract(backbone, *evidence_of(splits, plan, num_samples=num_samples), folder, batch_size=batch_size)


def evidence_of(splits: Splits, plan: ExtractionPlan, *, num_samples: int = 384) -> tuple[Splits, ExtractionPlan]:
    """Returns the data and the plan of `extract_evidence`.

    Args:
        splits: See `extract_evidence`.
        plan: See `extract_evidence`.
        num_samples: See `extract_evidence`.
    """
    half = num_samples // 2
    subsets = Splits(_first(splits.train, half), _first(splits.validation, num_samples - half), _first(splits.test, 0))
    return subsets, replace(
        plan,
        layers=pair_layers(plan.layers),
        draws=max(EVIDENCE_DRAWS, plan.draws),
        pool_cells=1,
        token_samples=num_samples,
        tokens_per_sample=TOKENS_PER_SAMPLE,
    )


def extract_tokens(
    backbone: Backbone,
    splits: Splits,
    layers: Sequence[str],
    noise_levels: Sequence[float],
    folder: str | Path,
    *,
    num_samples: int = 64,
    seed: int = 0,
) -> FeatureStore:
    """Extracts a few tokens of each of few samples of the validation split, to compare layers token by token.

    Args:
        backbone: The model.
        splits: The data.
        layers: Names of the layers.
        noise_levels: Noise levels, ascending.
        folder: Folder of the store; created if it does not exist.
        num_samples: Maximum number of samples.
        seed: Seed of the noise and of the positions of the tokens.

    Raises:
        ValueError: As for `extract`.
    """
    few = _first(splits.validation, num_samples)
    plan = ExtractionPlan(
        tuple(layers), tuple(noise_levels), token_samples=len(few), tokens_per_sample=TOKENS_PER_SAMPLE, seed=seed
    )
    return extract(backbone, Splits(_first(splits.train, 0), few, _first(splits.test, 0)), plan, folder)


def _first(samples: Samples, count: int) -> Subset:
    return Subset(samples, range(min(count, len(samples))), name="evidence")
