"""Single answers that people ask for, from tables with a planted answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted_evidence import planted_evidence, quantity

from layerprobe.analyses.selection.answers import Answers, single_answers
from layerprobe.analyses.selection.ranking import rank_pairs
from layerprobe.analyses.selection.records import Objection, Selection
from layerprobe.analyses.tables.evidence import CKA, LIDAR_GAP, NOISE_LIDAR, PROBE, PROBE_GAP
from layerprobe.analyses.tables.quality import QUALITY_COLUMNS
from layerprobe.extraction.ablation import LOSS_INCREASE, VELOCITY_CHANGE

LEVELS = (0.1, 0.5, 0.9)
Table = Mapping[str, Any]  # values by source, shape (layers, levels)


def quality(values: Table, *, metric: str = PROBE, half: float = 0.01, test: float = -0.1) -> pd.DataFrame:
    """Values on the validation split; on the test split larger by `test`."""
    rows: list[Any] = []
    for source, table in values.items():
        for i, of_layer in enumerate(np.atleast_2d(table)):
            name, index = ("input", -1) if source == "raw input" else (f"blocks.{i}", i)
            for level, value in zip(LEVELS, of_layer, strict=False):
                for split, here in (("validation", value), ("test", value + test)):
                    ends = (np.nan, np.nan) if half == 0 else (here - half, here + half)
                    rows.append((source, name, index, level, metric, split, here, *ends, ""))
    return pd.DataFrame(rows, columns=list(QUALITY_COLUMNS))


MODEL = [[0.90, 0.50, 0.2], [0.95, 0.60, 0.2], [0.96, 0.80, 0.2], [0.80, 0.70, 0.2]]
CONTROLS = {"random weights": [[0.9, 0.4, 0.2]] * 4, "raw input": [[0.94, 0.3, 0.1]]}
QUALITY = quality({"model": MODEL} | CONTROLS)


def selected(*, label_free: bool = False, controls: Mapping[str, float] | None = None) -> Selection:
    gaps = {LIDAR_GAP: quantity([[1.0]]), PROBE_GAP: quantity([[1.0]]), CKA: quantity([[0.5]])}
    by_layer = {NOISE_LIDAR: quantity([[1.0, 2.0]]), PROBE: quantity([[0.5, 0.9]])}
    evidence = planted_evidence(by_layer, gaps, layers=("blocks.0", "blocks.1"))
    return rank_pairs(evidence, label_free=label_free, controls=controls or {"majority class": 0.2})


def test_the_richest_features_are_chosen_on_one_split_and_reported_on_another() -> None:
    features = single_answers(QUALITY).features
    assert features is not None and features.over_control is not None
    assert (features.best.layer, features.best.noise_level, features.level_end) == ("blocks.2", 0.1, "lowest")
    assert [cell.layer for cell in features.tied] == ["blocks.1"]
    assert features.over_control.cell.value == pytest.approx(0.86)
    assert features.over_control.cell.low == pytest.approx(0.85)
    assert (features.over_control.control, features.over_control.is_certain) == ("raw input", True)


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
    table = quality({"model": [[0.9 if level == best else 0.5 for level in levels]]})
    table["noise_level"] = table["noise_level"].map(dict(zip(LEVELS, levels, strict=False)))
    features = single_answers(table).features
    assert features is not None
    assert features.level_end == end


def test_training_added_most_where_a_layer_is_furthest_above_the_better_control() -> None:
    """At 0.1 accuracy is highest, but the raw input knows as much; at 0.5 random weights are the better control."""
    gained = single_answers(QUALITY).training
    assert gained is not None
    assert (gained.cell.layer, gained.cell.noise_level, gained.control) == ("blocks.2", 0.5, "random weights")
    assert (gained.cell.value, gained.control_cell.value) == (pytest.approx(0.7), pytest.approx(0.3))
    assert gained.gain.value == pytest.approx(0.4)
    # As of two independent numbers, each known to within 0.01.
    assert gained.gain.value - gained.gain.lower_bound == pytest.approx(0.01 * 2**0.5)
    assert single_answers(quality({"model": MODEL})).training is None


def test_classes_are_separable_up_to_the_level_that_keeps_half_of_the_gain_above_the_controls() -> None:
    separable = single_answers(QUALITY, selection=selected()).separable
    assert separable is not None and separable.best is not None
    cell = separable.best.cell
    assert (cell.layer, cell.noise_level, separable.next_level) == ("blocks.2", 0.5, 0.9)
    assert (separable.best.control, separable.best.gain.value) == ("random weights", pytest.approx(0.4))
    # Half of the gain over guessing, 0.38 + 0.2, lies within the interval of 0.6 +- 0.03.
    weaker = [[0.96, 0.60, 0.2]]
    vague = single_answers(quality({"model": weaker} | CONTROLS, half=0.03), selection=selected()).separable
    assert vague is not None and vague.best is None
    # A control that knows as much leaves nothing that the network separates.
    known = CONTROLS | {"raw input": [[0.97, 0.8, 0.2]]}
    nowhere = single_answers(quality({"model": MODEL} | known), selection=selected()).separable
    assert nowhere is not None and nowhere.best is None
    assert nowhere.levels == (0.1, 0.9)


def deep(num: int, half: float) -> Answers:
    rising = [[0.3 + 0.02 * i] * 3 for i in range(num)]
    return single_answers(quality({"model": rising}, half=half))


def test_an_outside_encoder_is_aligned_where_published_trainings_gained_and_the_layer_knows_least() -> None:
    """Depths 0.25 to 0.43 of 28 blocks keep 0.9 of the published share; within the uncertainty 0.33 is best."""
    vague, sharp = deep(28, 0.2).encoder, deep(28, 0.001).encoder
    assert vague is not None and sharp is not None
    assert vague.published == sharp.published == (pytest.approx(7 / 28), pytest.approx(11 / 28))
    assert (vague.layer, vague.by) == ("blocks.8", "depth")
    assert (sharp.layer, sharp.by) == ("blocks.6", "curve")
    assert sharp.quality is not None and sharp.richest is not None
    assert (sharp.quality.value, sharp.richest.layer) == (pytest.approx(0.42), "blocks.27")
    alike = quality({"model": [[0.25, 0.35, 0.3]] * 4}, metric="CKA with dinov2", half=0)
    measured = single_answers(pd.concat([QUALITY, alike])).encoder
    assert measured is not None
    assert measured.similarity == (("CKA with dinov2", pytest.approx(0.25)),)
    assert deep(1, 0.1).encoder is None


def test_layers_of_several_shapes_are_unlike_the_published_networks() -> None:
    evidence = planted_evidence({}, {}, layers=[f"blocks.{i}" for i in range(4)], pairs=[(0, 1)])
    other, same = single_answers(QUALITY, evidence).encoder, single_answers(QUALITY).encoder
    assert other is not None and same is not None
    assert (other.one_shape, same.one_shape) == (False, True)
    names = [f"blocks.{i}" for i in range(28)]
    rising = quality({"model": [[0.3 + 0.02 * i] * 3 for i in range(28)]}, half=0.001)
    apart = single_answers(rising, planted_evidence({}, {}, layers=names, pairs=[(0, 1)])).encoder
    assert apart is not None
    assert (apart.layer, apart.by) == ("blocks.8", "depth")  # accuracies of unlike layers do not decide


def test_only_layers_that_surely_are_not_needed_can_be_pruned() -> None:
    """A layer that does nothing, one that harms, one that the data say nothing of, and one needed at a single level."""
    rises = [[0.0, 0.0, 0.0], [-0.2, -0.2, -0.2], [0.001, 0.0, 0.0], [0.2, -0.1, -0.1]]
    changes = [[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    table = [
        quality({"model": rises}, metric=LOSS_INCREASE, half=0.005),
        quality({"model": changes}, metric=VELOCITY_CHANGE, half=0.005),
    ]
    pruning = single_answers(pd.concat(table)).pruning
    assert pruning is not None and pruning.least_needed is not None
    assert [cell.layer for cell in pruning.spare] == ["blocks.1", "blocks.0"]
    assert [cell.layer for cell in pruning.undecided] == ["blocks.2"]
    assert (pruning.least_needed.layer, pruning.num_layers) == ("blocks.1", 4)
    # Without its change of the velocity, nothing tells an idle layer from one that was measured badly.
    badly = single_answers(table[0]).pruning
    assert badly is not None
    assert [cell.layer for cell in badly.spare] == ["blocks.1"]
    assert single_answers(QUALITY).pruning is None


def test_without_labels_a_label_free_measure_stands_in_and_the_rest_is_not_measured() -> None:
    found = planted_evidence(
        {NOISE_LIDAR: quantity([[1.0, 5.0, 9.0, 7.0], [np.nan, 5.0, 6.0, 8.0]], 0.1)},
        {},
        layers=[f"blocks.{i}" for i in range(4)],
        noise_levels=(0.1, 0.5),
    )
    answers = single_answers(QUALITY, found, selected(label_free=True))
    features = answers.features
    assert features is not None
    assert (features.metric, features.best.layer, features.best.noise_level) == (NOISE_LIDAR, "blocks.2", 0.1)
    assert (features.best.low, features.over_control, features.tied) == (pytest.approx(8.9), None, ())
    assert (answers.has_labels, answers.training, answers.separable) == (False, None, None)
    assert single_answers(quality({"model": MODEL}, metric="RankMe")).features is None


def test_features_that_mean_nothing_give_no_answer() -> None:
    own = selected()
    against = replace(own.ranked[0]) if own.ranked else None
    assert against is None
    refused = replace(own.rejected[0], objections=(Objection("network does not denoise", value=1.5),))
    answers = single_answers(QUALITY, selection=replace(own, rejected=(refused,)))
    assert answers == Answers(has_labels=True, is_meaningless=True)
