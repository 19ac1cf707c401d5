"""Single layers that people ask for, from tables with a planted answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted_evidence import planted_evidence, quantity

from layerprobe.analyses.selection.recommendations import for_encoder, for_features, to_prune
from layerprobe.analyses.tables.evidence import NOISE_LIDAR, PairEvidence
from layerprobe.analyses.tables.quality import QUALITY_COLUMNS
from layerprobe.extraction.ablation import LOSS_INCREASE

LAYERS = tuple(f"blocks.{i}" for i in range(4))
LEVELS = (0.1, 0.5)


def quality(
    values: dict[tuple[int, float], float], *, half: float = 0.01, metric: str = "probe accuracy"
) -> pd.DataFrame:
    """Accuracies on the validation split, 0.1 less on the test split."""
    rows: list[Any] = []
    for (i, level), value in values.items():
        for split, here in (("validation", value), ("test", value - 0.1)):
            rows.append(("model", LAYERS[i], i, level, metric, split, here, here - half, here + half, ""))
    return pd.DataFrame(rows, columns=list(QUALITY_COLUMNS))


def evidence(name: str, value: Any, half: Any) -> PairEvidence:
    return planted_evidence({name: quantity(value, half)}, {}, layers=LAYERS, noise_levels=LEVELS)


NOTHING = planted_evidence({}, {}, layers=LAYERS, noise_levels=LEVELS)


def test_the_richest_features_are_chosen_on_one_split_and_reported_on_another() -> None:
    values = {(1, 0.1): 0.8, (2, 0.1): 0.9, (2, 0.5): 0.895, (3, 0.5): 0.5}
    answer = for_features(quality(values), NOTHING)
    assert answer.layers == ("blocks.2",)
    assert [(c.layer, c.noise_level) for c in answer.candidates] == [("blocks.2", 0.1), ("blocks.2", 0.5)]
    assert answer.test_value == pytest.approx(0.8)
    vague = for_features(quality(values, half=0.2), NOTHING)
    assert vague.layers == ("blocks.2", "blocks.1")


def test_without_labels_noise_lidar_says_which_features_are_richest() -> None:
    found = evidence(NOISE_LIDAR, [[1.0, 5.0, 9.0, 7.0], [np.nan, 5.0, 6.0, 8.0]], 0.1)
    answer = for_features(quality({(1, 0.1): 1.0}), found, label_free=True)
    (best,) = answer.candidates
    assert (best.layer, best.noise_level, best.value, best.low) == ("blocks.2", 0.1, 9.0, 8.9)
    assert answer.test_value is None
    assert answer.level_end == "lowest"


@pytest.mark.parametrize(
    ("best", "levels", "end"),
    [
        (0.1, (0.1, 0.5, 0.9), "lowest"),
        (0.5, (0.1, 0.5, 0.9), ""),
        (0.9, (0.1, 0.5, 0.9), "highest"),
        (0.0, (0.0, 0.5, 1.0), ""),
        (1.0, (0.0, 0.5, 1.0), ""),
        (0.3, (0.3,), ""),
    ],
)
def test_a_best_level_at_the_end_of_those_measured_is_marked(best: float, levels: tuple[float, ...], end: str) -> None:
    values = {(i, level): 0.9 if (i, level) == (2, best) else 0.5 for i in range(4) for level in levels}
    assert for_features(quality(values), NOTHING).level_end == end


def test_nothing_is_said_of_features_that_were_not_measured() -> None:
    missing = quality({(1, 0.1): np.nan})
    assert for_features(missing, NOTHING).layers == ()
    assert for_features(missing, NOTHING, label_free=True).candidates == ()


def test_an_outside_encoder_is_aligned_at_repa_s_depth() -> None:
    """Counted from 1: 8 of 28 blocks, as published for SiT-XL/2, and 4 of 12 for SiT-B/2."""
    nothing = quality({})
    for depth, published in ((28, 8), (12, 4)):
        answer = for_encoder(nothing, [f"blocks.{i}" for i in range(depth)])
        assert answer.layers == (f"blocks.{published - 1}",)
    measured = quality({(0, 0.1): 0.25, (0, 0.5): 0.35}, metric="CKA with dinov2")
    measured = measured[measured["split"] == "validation"]
    assert for_encoder(measured, LAYERS).encoder_similarity == (("CKA with dinov2", pytest.approx(0.3)),)
    assert for_encoder(nothing, LAYERS[:1]).layers == ()


def test_layers_that_the_network_does_without_are_listed() -> None:
    """The least needed one first; one whose interval lies above 0 is needed."""
    answer = to_prune(evidence(LOSS_INCREASE, [[0.9, 0.5, 0.01, -0.2]] * 2, [0.1, 0.1, 0.02, 0.1]))
    assert answer.layers == ("blocks.3", "blocks.2")
    assert [c.layer for c in answer.candidates] == ["blocks.3", "blocks.2", "blocks.1", "blocks.0"]
    needed = to_prune(evidence(LOSS_INCREASE, [[0.2, 0.5, 0.5, np.nan]] * 2, 0.1))
    assert needed.layers == ()
    assert needed.candidates[0].layer == "blocks.0"
    assert len(needed.candidates) == 3
    assert to_prune(NOTHING).candidates == ()
