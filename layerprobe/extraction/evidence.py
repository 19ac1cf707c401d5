"""The small extraction that evidence of layer pairs is made of: few samples, several noise draws, a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from layerprobe.backbones import Backbone
from layerprobe.capture import INPUT
from layerprobe.data import Samples, Splits, Subset
from layerprobe.extraction.features import ExtractionPlan, FeatureStore
from layerprobe.extraction.forward import extract

EVIDENCE_DRAWS, TOKENS_PER_SAMPLE = 2, 8


def pair_layers(layers: Sequence[str]) -> tuple[str, ...]:
    """The layers that pairs are made of, in their order: each place in the network once.

    What goes into a block is what the block before it gives, and a part of a block lies inside it: names like
    `blocks.3:input` and `blocks.3.attn` beside `blocks.3` would count one place twice, and every distance with it.
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
    """The small extraction that evidence is made of: few samples, two noise draws, a few tokens of each.

    Args:
        backbone: The model.
        splits: The data; half of the samples are from the training split, half from the validation split.
        plan: Layers, noise levels, condition, precision and seed are taken from it.
        folder: Where the store is, or is to be.
        num_samples: How many, at most.
        batch_size: Rows per forward pass.
    """
    half = num_samples // 2
    few = Splits(_first(splits.train, half), _first(splits.validation, num_samples - half), _first(splits.test, 0))
    small = replace(
        plan,
        layers=pair_layers(plan.layers),
        draws=max(EVIDENCE_DRAWS, plan.draws),
        pool_cells=1,
        token_samples=num_samples,
        tokens_per_sample=TOKENS_PER_SAMPLE,
    )
    return extract(backbone, few, small, folder, batch_size=batch_size)


def _first(samples: Samples, count: int) -> Subset:
    return Subset(samples, range(min(count, len(samples))), name="evidence")
