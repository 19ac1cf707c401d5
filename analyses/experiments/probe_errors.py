"""What a linear probe reads from a model on the way through its training, as errors: lower is better, as in a loss."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from layerprobe.analyses.measures import ProbeResult, linear_probe
from layerprobe.backbones import Backbone
from layerprobe.data import Splits, Subset
from layerprobe.extraction import SPLITS, ExtractionPlan, FeatureStore, extract

PROBE_ERROR = "probe error"
BEST_PROBE_ERROR = "probe error of the best layer"
NOISE_LEVELS = (0.1, 0.3, 0.5)
NUM_SAMPLES = (2000, 1000, 2000)  # of the training, validation and test splits


def probe_errors(backbone: Backbone, splits: Splits) -> dict[str, float]:
    """Share of test samples whose class a linear probe of one layer gets wrong, with the null label.

    `PROBE_ERROR` is the mean over the layers and the noise levels 0.1, 0.3 and 0.5; `BEST_PROBE_ERROR` is that of the
    layer and level that read the validation split best, as one picks features for use. The first samples of each split
    count, at most 2000, 1000 and 2000.

    Args:
        backbone: The model.
        splits: The data.

    Returns:
        Nothing if the data has no labels, or the training samples one class only.
    """
    parts = zip(splits.items(), NUM_SAMPLES, strict=True)
    few = Splits(*(Subset(samples, range(min(n, len(samples))), name=name) for (name, samples), n in parts))
    if few.train.labels is None or len(set(few.train.labels.tolist())) < 2:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        plan = ExtractionPlan(layers=backbone.layers, noise_levels=NOISE_LEVELS)
        store = extract(backbone, few, plan, Path(folder) / "features")
        found = [_probe(store, layer, level) for layer in store.layers for level in NOISE_LEVELS]
    best = max(found, key=lambda probe: probe.validation_accuracy)
    return {
        PROBE_ERROR: 1 - float(np.mean([probe.test_accuracy for probe in found])),
        BEST_PROBE_ERROR: 1 - best.test_accuracy,
    }


def _probe(store: FeatureStore, layer: str, level: float) -> ProbeResult:
    assert store.labels is not None
    x, y = store[layer, level], store.labels
    return linear_probe(*(part[store.splits == split] for split in SPLITS for part in (x, y)))
