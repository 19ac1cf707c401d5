"""Errors of probes on the way are those of scikit-learn's logistic regression on the same features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gaussian_classes import searched
from sklearn.preprocessing import StandardScaler
from tiny import tiny_sit, tiny_splits

from layerprobe.analyses.experiments import probe_errors as probe_scores
from layerprobe.data.samples import Splits, Subset
from layerprobe.extraction.forward import extract
from layerprobe.extraction.plan import ExtractionPlan


def by_scikit_learn(splits: Splits, folder: Path) -> dict[str, float]:
    backbone = tiny_sit()
    store = extract(backbone, splits, ExtractionPlan(backbone.layers, (0.1, 0.3, 0.5), condition="null"), folder)
    assert store.labels is not None
    y = {split: store.labels[store.splits == split] for split in ("train", "validation", "test")}
    found = []
    for layer in store.layers:
        for level in store.noise_levels:
            scale = StandardScaler().fit(store.features(layer, level, split="train"))
            x = {split: scale.transform(store.features(layer, level, split=split).astype(float)) for split in y}
            chosen, accuracy = searched(x["train"], y["train"], x["validation"], y["validation"])
            found.append((accuracy, chosen.score(x["test"], y["test"])))
    best = max(found, key=lambda pair: pair[0])
    return {
        probe_scores.PROBE_ERROR: 1 - float(np.mean([report for _, report in found])),
        probe_scores.BEST_PROBE_ERROR: 1 - best[1],
    }


def test_they_are_those_of_scikit_learn(tmp_path: Path) -> None:
    splits = tiny_splits(240)
    found, expected = probe_scores.probing_errors(tiny_sit(), splits), by_scikit_learn(splits, tmp_path / "features")
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0 < found[probe_scores.PROBE_ERROR] < 2 / 3


def test_only_the_first_samples_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = tiny_splits(240)
    monkeypatch.setattr(probe_scores, "NUM_SAMPLES", (60, 30, 40))
    counts = {"train": 60, "validation": 30, "test": 40}
    few = Splits(*(Subset(samples, range(counts[name]), name=name) for name, samples in splits.items()))
    assert probe_scores.probing_errors(tiny_sit(), splits) == pytest.approx(
        by_scikit_learn(few, tmp_path / "features"), abs=1e-12
    )


def test_no_labels_no_errors() -> None:
    assert probe_scores.probing_errors(tiny_sit(num_classes=0), tiny_splits(24, labeled=False)) == {}


def test_one_class_has_nothing_to_tell() -> None:
    splits = tiny_splits(24)
    assert splits.train.labels is not None
    splits.train.labels.zero_()
    assert probe_scores.probing_errors(tiny_sit(), splits) == {}
