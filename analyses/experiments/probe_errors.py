"""Errors of linear probes on a model's layers, a measure of its representation; lower is better, as for a loss."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from layerprobe.analyses.measures import ProbeResult, linear_probe
from layerprobe.backbones import Backbone
from layerprobe.data import Splits, Subset, without_copies
from layerprobe.extraction import SPLITS, ExtractionPlan, FeatureStore, extract

PROBE_ERROR = "probe error"
BEST_PROBE_ERROR = "probe error of the best layer"
NOISE_LEVELS = (0.1, 0.3, 0.5)
NUM_SAMPLES = (2000, 1000, 2000)  # at most, of the training, validation and test split


def probing_errors(backbone: Backbone, splits: Splits) -> dict[str, float]:
    """Computes the share of test samples that linear probes of single layers misclassify, with the null label.

    `PROBE_ERROR` is the mean over the layers and the noise levels 0.1, 0.3 and 0.5. `BEST_PROBE_ERROR` is the error of
    the layer and level with the best validation accuracy, as one would choose features for use. Only the first samples
    of each split are used, at most 2000, 1000 and 2000.

    Args:
        backbone: Model to probe.
        splits: Data to probe it with.

    Returns:
        Errors by metric; empty if the data has no labels, its training split has a single class, or another split has
        nothing but copies.
    """
    subset = probed_splits(splits)
    if subset is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        plan = ExtractionPlan(layers=backbone.layers, noise_levels=NOISE_LEVELS)
        store = extract(backbone, subset, plan, Path(folder) / "features")
        probes = [_probe(store, layer, level) for layer in store.layers for level in NOISE_LEVELS]
    best = max(probes, key=lambda probe: probe.validation_accuracy)
    return {
        PROBE_ERROR: 1 - float(np.mean([probe.test_accuracy for probe in probes])),
        BEST_PROBE_ERROR: 1 - best.test_accuracy,
    }


def probed_splits(splits: Splits) -> Splits | None:
    """Returns the samples that `probing_errors` probes; None if they allow no probe."""
    parts = zip(splits.items(), NUM_SAMPLES, strict=True)
    first = (Subset(samples, range(min(n, len(samples))), name=name) for (name, samples), n in parts)
    subset = without_copies(Splits(*first))
    if subset.train.labels is None or len(set(subset.train.labels.tolist())) < 2:
        return None
    return subset if all(len(samples) for _, samples in subset.items()) else None


def _probe(store: FeatureStore, layer: str, level: float) -> ProbeResult:
    assert store.labels is not None
    x, y = store[layer, level], store.labels
    return linear_probe(*(part[store.splits == split] for split in SPLITS for part in (x, y)))
