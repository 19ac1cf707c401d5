"""Single layers that people ask for, from tables with a planted answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from layerprobe.analyses.selection.recommendations import for_encoder, for_features, to_prune
from layerprobe.analyses.tables import evidence as e
from layerprobe.analyses.tables.quality import QUALITY_COLUMNS

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


def evidence(criteria: dict[str, dict[int, tuple[float, float]]]) -> pd.DataFrame:
    """Of each layer a value and a half width: by pairs in which it teaches, or learns for a criterion of students."""
    rows: list[Any] = []
    for criterion, of in criteria.items():
        for i, (value, half) in of.items():
            student, teacher = (i, 3) if criterion.startswith("student") else (0, i)
            for level in (*LEVELS, np.nan):
                names = (LAYERS[student], LAYERS[teacher])
                rows.append((*names, criterion, level, value, value - half, value + half, False, ""))
    return pd.DataFrame(rows, columns=list(e.EVIDENCE_COLUMNS))


NOTHING = pd.DataFrame(columns=list(e.EVIDENCE_COLUMNS))


def test_the_richest_features_are_chosen_on_one_split_and_told_on_another() -> None:
    values = {(1, 0.1): 0.8, (2, 0.1): 0.9, (2, 0.5): 0.895, (3, 0.5): 0.5}
    answer = for_features(quality(values), NOTHING)
    assert answer.layers == ("blocks.2",)
    assert answer.noise_level == 0.1
    assert answer.text == (
        "The richest features are those of blocks.2 at noise level 0.1: probe accuracy 0.900 (0.890 to 0.910), 0.800 "
        "on samples that nothing was chosen on; blocks.2 at 0.5 cannot be told from it."
    )
    vague = for_features(quality(values, half=0.2), NOTHING)
    assert vague.layers == ("blocks.2", "blocks.1")


def test_without_labels_noise_lidar_says_which_features_are_richest() -> None:
    found = evidence({e.TEACHER_LIDAR: {1: (5.0, 0.1), 2: (9.0, 0.1), 3: (7.0, 0.1)}})
    answer = for_features(quality({(1, 0.1): 1.0}), found, label_free=True)
    assert answer.layers == ("blocks.2",)
    assert "noise-LiDAR 9.000 (8.900 to 9.100)" in answer.text


def test_nothing_is_said_of_features_that_were_not_measured() -> None:
    missing = quality({(1, 0.1): np.nan})
    assert for_features(missing, NOTHING).layers == ()
    assert "the run has no noise-LiDAR" in for_features(missing, NOTHING, label_free=True).text


def test_an_outside_encoder_is_aligned_at_repa_s_depth() -> None:
    """Counted from 1: 8 of 28 blocks, as published for SiT-XL/2, and 4 of 12 for SiT-B/2."""
    nothing = quality({})
    for depth, published in ((28, 8), (12, 4)):
        answer = for_encoder(nothing, [f"blocks.{i}" for i in range(depth)])
        assert answer.layers == (f"blocks.{published - 1}",)
    measured = quality({(0, 0.1): 0.25, (0, 0.5): 0.35}, metric="CKA with dinov2")
    measured = measured[measured["split"] == "validation"]
    assert "Its mean CKA with dinov2 is 0.300." in for_encoder(measured, LAYERS).text
    assert for_encoder(nothing, LAYERS[:1]).layers == ()


def test_layers_that_the_network_does_without_are_listed() -> None:
    """The first layer never teaches, so what skipping it costs is known from the pairs in which it learns."""
    taught = {1: (0.5, 0.1), 2: (0.01, 0.02), 3: (-0.2, 0.1)}
    answer = to_prune(evidence({e.TEACHER_NEED: taught, e.STUDENT_NEED: {0: (0.9, 0.1)}}), LAYERS)
    assert answer.layers == ("blocks.3", "blocks.2")
    expected = (
        "The network does as well without blocks.3, blocks.2, each alone; without blocks.3 the loss rises by -0.2000"
    )
    assert answer.text.startswith(expected)
    taught = dict.fromkeys((1, 2, 3), (0.5, 0.1))
    needed = to_prune(evidence({e.TEACHER_NEED: taught, e.STUDENT_NEED: {0: (0.2, 0.1)}}), LAYERS)
    assert needed.layers == ()
    assert needed.text.startswith("No layer can be left out; the one that is needed least is blocks.0: without it the")
    assert to_prune(NOTHING, LAYERS).layers == ()
