"""Pairs picked from tables with a planted answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from layerprobe.analyses.quality import QUALITY_COLUMNS, SIMILARITY_COLUMNS
from layerprobe.analyses.selection import HYPOTHESIS, LABEL_FREE, Selection, select
from layerprobe.layersync import LayerPair

LEVELS = (0.1, 0.5)
EIGHT = tuple(f"blocks.{i}" for i in range(8))
# Rises to block 5, then decodes; block 6 would be the best of all if the tail could teach.
CURVE = (0.20, 0.25, 0.32, 0.38, 0.44, 0.50, 0.60, 0.30)


def quality_table(
    curve: Sequence[float],
    layers: Sequence[str] = EIGHT,
    *,
    half_width: float = 0.01,
    metric: str = "probe accuracy",
    split: str = "choose",
    source: str = "model",
) -> pd.DataFrame:
    """The curve at both noise levels, lower at the noisier one, which does not change its mean."""
    rows: list[Any] = []
    for index, (layer, value) in enumerate(zip(layers, curve, strict=True)):
        for level, shift in zip(LEVELS, (0.05, -0.05), strict=True):
            here = value + shift
            rows.append((source, layer, index, level, metric, split, here, here - half_width, here + half_width, "C=1"))
    return pd.DataFrame(rows, columns=list(QUALITY_COLUMNS))


def similarity_table(
    layers: Sequence[str] = EIGHT, *, aligned: Mapping[tuple[int, int], float] | None = None
) -> pd.DataFrame:
    """CKA that falls by 0.08 per layer; across noise levels it is a trap."""
    rows: list[Any] = []
    for i, a in enumerate(layers):
        for j, b in enumerate(layers):
            for level_a in LEVELS:
                for level_b in LEVELS:
                    cka = 1 - 0.08 * abs(i - j) if level_a == level_b else -5.0
                    cka = (aligned or {}).get((i, j), cka) if level_a == level_b else cka
                    rows.append((a, level_a, b, level_b, cka, np.nan, np.nan))
    return pd.DataFrame(rows, columns=list(SIMILARITY_COLUMNS))


def reasons_against(selection: Selection, student: str, teacher: str) -> tuple[str, ...]:
    return next(p.reasons for p in selection.rejected if (p.student, p.teacher) == (student, teacher))


def test_picks_the_planted_pair() -> None:
    selection = select(quality_table(CURVE), similarity_table(), EIGHT)
    assert selection.pick == LayerPair("blocks.1", "blocks.5")
    first = selection.ranked[0]
    assert first.teacher_quality == pytest.approx(0.50)
    assert first.student_quality == pytest.approx(0.25)
    assert first.gap == pytest.approx(0.25)
    assert first.mean_cka == pytest.approx(1 - 4 * 0.08)
    assert first.score == pytest.approx(0.25 * 0.32)
    assert first.distance == 4
    assert first.teacher_is_best
    assert first.gap_is_certain
    assert not first.ties_with_first
    assert "blocks.5 is the best layer that may teach: probe accuracy 0.500." in first.reasons
    assert not selection.label_free
    assert not selection.warnings


def test_all_pairs_are_ranked_or_rejected_with_a_reason() -> None:
    selection = select(quality_table(CURVE), similarity_table(), EIGHT)
    pairs = {(p.student, p.teacher) for p in (*selection.ranked, *selection.rejected)}
    assert pairs == {(a, b) for i, a in enumerate(EIGHT) for b in EIGHT[i + 1 :]}
    assert len(selection.ranked) + len(selection.rejected) == 28
    assert all(p.reasons for p in (*selection.ranked, *selection.rejected))
    # Pairs with the best teacher first, each group by falling score.
    keys = [(not p.teacher_is_best, -p.score) for p in selection.ranked]
    assert keys == sorted(keys)


def test_criteria_of_eight_blocks() -> None:
    criteria = select(quality_table(CURVE), similarity_table(), EIGHT).criteria
    assert criteria.tail == ("blocks.6", "blocks.7")
    assert criteria.head == ("blocks.0",)
    assert criteria.min_distance == 2
    assert criteria.noise_levels == LEVELS
    assert (criteria.metric, criteria.split) == ("probe accuracy", "choose")


def test_criteria_of_twentyeight_blocks_admit_the_published_pair() -> None:
    layers = tuple(f"blocks.{i}" for i in range(28))
    curve = [0.2 + 0.3 * np.sin(np.pi * i / 31) for i in range(28)]
    selection = select(quality_table(curve, layers), similarity_table(layers), layers)
    assert selection.criteria.tail == tuple(f"blocks.{i}" for i in range(22, 28))
    assert selection.criteria.min_distance == 7
    # LayerSync's 8 <- 16, counted from 1.
    assert ("blocks.7", "blocks.15") in {(p.student, p.teacher) for p in selection.ranked}


@pytest.mark.parametrize(
    ("fraction", "depth", "tail"), [(0.2, 10, 2), (0.2, 8, 2), (0.2, 12, 3), (0.28, 25, 7), (0, 5, 0)]
)
def test_the_tail_is_rounded_up(fraction: float, depth: int, tail: int) -> None:
    # 0.28 * 25 is 7.000000000000001 in floating point.
    layers = tuple(f"blocks.{i}" for i in range(depth))
    quality = quality_table(np.linspace(0.1, 0.5, depth), layers)
    selection = select(quality, similarity_table(layers), layers, exclude_tail=fraction)
    assert len(selection.criteria.tail) == tail


def test_each_rule_rejects() -> None:
    curve = list(CURVE)
    curve[3] = 0.10
    selection = select(quality_table(curve), similarity_table(aligned={(2, 5): 0.99}), EIGHT)
    assert reasons_against(selection, "blocks.1", "blocks.6") == ("blocks.6 is among the last 2 layers, which decode",)
    assert reasons_against(selection, "blocks.0", "blocks.5") == (
        "blocks.0 is among the first layer, which only take in the input",
    )
    assert reasons_against(selection, "blocks.4", "blocks.5") == ("they are 1 apart, and at least 2 is asked for",)
    assert reasons_against(selection, "blocks.1", "blocks.3") == (
        "blocks.1 is not weaker than blocks.3: 0.250 against 0.100",
    )
    assert reasons_against(selection, "blocks.2", "blocks.5") == (
        "they are aligned already: mean CKA 0.990, above 0.98",
    )
    assert len(reasons_against(selection, "blocks.0", "blocks.6")) == 2


def test_a_less_aligned_student_is_preferred_to_a_slightly_weaker_one() -> None:
    selection = select(quality_table(CURVE), similarity_table(aligned={(1, 5): 0.90}), EIGHT)
    assert selection.pick == LayerPair("blocks.2", "blocks.5")


def test_a_clearly_worse_teacher_never_comes_before_the_best_one() -> None:
    # Block 4 would win by score alone.
    aligned = {(1, 5): 0.9, (2, 5): 0.9, (3, 5): 0.9, (1, 4): 0.0}
    selection = select(quality_table(CURVE), similarity_table(aligned=aligned), EIGHT)
    assert selection.ranked[0].teacher == "blocks.5"
    by_score = max(selection.ranked, key=lambda p: p.score)
    assert by_score.teacher == "blocks.4"
    assert "blocks.4 knows less than blocks.5: probe accuracy 0.440 against 0.500." in by_score.reasons


def test_teachers_within_the_interval_of_the_best_compete_by_score() -> None:
    aligned = {(1, 5): 0.9, (2, 5): 0.9, (3, 5): 0.9, (1, 4): 0.0}
    selection = select(quality_table(CURVE, half_width=0.07), similarity_table(aligned=aligned), EIGHT)
    assert selection.ranked[0].teacher == "blocks.4"
    assert "blocks.4 ties with blocks.5" in selection.ranked[0].reasons[0]
    assert {layer.layer for layer in selection.layers if layer.ties_with_best} == {"blocks.4", "blocks.5"}


def test_ties_and_uncertain_gaps_are_flagged() -> None:
    curve = (0.2, 0.25, 0.25, 0.26, 0.25, 0.27, 0.2, 0.2)
    selection = select(quality_table(curve, half_width=0.05), similarity_table(), EIGHT)
    assert selection.ranked[0].gap_is_certain is False
    assert any("is within the uncertainty" in warning for warning in selection.warnings)
    ties = sum(p.ties_with_first for p in selection.ranked)
    assert ties >= 2
    assert f"{ties} other pairs cannot be told from the first one; score more samples." in selection.warnings
    certain = select(quality_table(CURVE), similarity_table(), EIGHT)
    assert not any(p.ties_with_first for p in certain.ranked)


def test_only_the_choose_split_and_the_model_decide() -> None:
    others = [
        quality_table(CURVE[::-1], split="report"),
        quality_table(CURVE[::-1], source="random weights"),
        quality_table(CURVE[::-1], metric="knn accuracy"),
    ]
    plain = select(quality_table(CURVE), similarity_table(), EIGHT)
    mixed = select(pd.concat([*others, quality_table(CURVE)]), similarity_table(), EIGHT)
    assert mixed.ranked == plain.ranked


def test_a_teacher_that_does_not_beat_a_control_is_a_warning() -> None:
    controls = [
        quality_table([0.3] * 8, source="random weights"),
        quality_table([0.55], ["input"], source="raw input"),
    ]
    selection = select(pd.concat([quality_table(CURVE), *controls]), similarity_table(), EIGHT)
    assert selection.warnings == ("blocks.5 does not beat the control 'raw input': 0.500 against 0.550.",)


def test_probes_that_did_not_converge_are_a_warning() -> None:
    quality = quality_table(CURVE)
    quality.loc[3, "note"] = "C=1, gradient norm 1e-02; 1 of 1 fits did not converge"
    assert select(quality, similarity_table(), EIGHT).warnings == ("1 of 16 probes did not converge.",)


def test_without_labels_the_effective_rank_decides_and_the_result_says_so() -> None:
    ranks = quality_table([10 * q for q in CURVE], metric="effective rank", split="fit")
    # Ten times the rank at one level must not make that level count ten times.
    ranks.loc[ranks["noise_level"] == 0.1, "value"] *= 10
    ranks[["low", "high"]] = np.nan
    selection = select(ranks, similarity_table(), EIGHT, label_free=True)
    assert selection.pick == LayerPair("blocks.1", "blocks.5")
    assert selection.label_free
    assert selection.criteria.metric == "effective rank"
    assert LABEL_FREE in selection.warnings
    best = max(layer.quality or 0 for layer in selection.layers)
    assert best == pytest.approx(1.0)
    assert selection.ranked[0].gap_is_certain is None
    assert Selection.from_json(selection.to_json()) == selection


def test_no_admissible_pair_is_an_answer_with_its_reason() -> None:
    selection = select(quality_table(CURVE[::-1][1:], EIGHT[1:]), similarity_table(), EIGHT[1:])
    assert selection.ranked == ()
    assert selection.pick is None
    assert selection.reason.startswith("No admissible pair. Closest to one:")
    record = json.loads(selection.to_json())
    assert record["pick"] is None
    assert Selection.from_json(selection.to_json()) == selection


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_very_short_networks_have_no_pair(depth: int) -> None:
    selection = select(quality_table(CURVE), similarity_table(), EIGHT[:depth])
    assert selection.pick is None
    assert selection.reason


def test_layers_of_a_unet_need_no_numbers_in_their_names() -> None:
    layers = ("conv_in", "down.0", "down.1", "mid", "up.0", "up.1", "norm", "conv_out")
    selection = select(quality_table(CURVE, layers), similarity_table(layers), layers)
    assert selection.pick == LayerPair("down.0", "up.1")


def test_a_layer_without_quality_is_left_out_with_its_note() -> None:
    quality = quality_table(CURVE)
    broken = (quality["layer"] == "blocks.5") & (quality["noise_level"] == 0.5)
    quality.loc[broken, ["value", "low", "high"]] = np.nan
    quality.loc[broken, "note"] = "the features hold nan or inf"
    selection = select(quality, similarity_table(), EIGHT)
    assert selection.pick == LayerPair("blocks.1", "blocks.4")
    reason = "blocks.5 has no probe accuracy at noise level 0.5: the features hold nan or inf"
    assert reasons_against(selection, "blocks.1", "blocks.5") == (reason,)
    assert Selection.from_json(selection.to_json()) == selection


def test_a_pair_without_similarity_is_left_out() -> None:
    selection = select(quality_table(CURVE), similarity_table(aligned={(1, 5): np.nan}), EIGHT)
    assert reasons_against(selection, "blocks.1", "blocks.5") == ("their CKA is missing at a noise level",)


def test_layers_of_unequal_shape_are_no_pair() -> None:
    shapes = dict.fromkeys(EIGHT, (16, 64)) | {"blocks.5": (4, 64)}
    selection = select(quality_table(CURVE), similarity_table(), EIGHT, shapes=shapes)
    assert selection.pick == LayerPair("blocks.1", "blocks.4")
    against = reasons_against(selection, "blocks.1", "blocks.5")
    assert against == ("their tokens differ in shape: blocks.1 gives 16 x 64, blocks.5 4 x 64",)


def test_num_pairs_keeps_the_best() -> None:
    everything = select(quality_table(CURVE), similarity_table(), EIGHT)
    two = select(quality_table(CURVE), similarity_table(), EIGHT, num_pairs=2)
    assert two.ranked == everything.ranked[:2]
    assert two.warnings == everything.warnings


def test_options_change_the_criteria() -> None:
    selection = select(
        quality_table(CURVE),
        similarity_table(),
        EIGHT,
        exclude_tail=0.1,
        skip_first=3,
        min_distance=1,
        max_cka=0.99,
    )
    assert selection.pick == LayerPair("blocks.3", "blocks.6")
    assert "blocks.5" in {p.student for p in selection.ranked}


def test_json_survives_and_says_that_a_pick_is_a_hypothesis() -> None:
    selection = select(quality_table(CURVE), similarity_table(), EIGHT)
    record = json.loads(selection.to_json())
    assert record["status"] == HYPOTHESIS
    assert record["pick"] == {"student": "blocks.1", "teacher": "blocks.5"}
    assert record["reason"] == selection.reason
    assert record["ranked"][0]["student"] == "blocks.1"
    assert Selection.from_json(selection.to_json()) == selection


def test_rows_in_any_order_give_the_same_selection() -> None:
    shuffled = select(
        quality_table(CURVE).sample(frac=1, random_state=0), similarity_table().sample(frac=1, random_state=0), EIGHT
    )
    plain = select(quality_table(CURVE), similarity_table(), EIGHT)
    assert [p.pair for p in shuffled.ranked] == [p.pair for p in plain.ranked]


def test_refuses_bad_input() -> None:
    quality, similarity = quality_table(CURVE), similarity_table()
    with pytest.raises(ValueError, match="no effective rank of the model on the split 'fit'"):
        select(quality, similarity, EIGHT, label_free=True)
    with pytest.raises(ValueError, match="no probe accuracy of the model on the split 'choose'; select without labels"):
        select(quality[quality["metric"] == "knn accuracy"], similarity, EIGHT)
    with pytest.raises(ValueError, match=r"no probe accuracy of blocks\.9 at noise level 0\.1"):
        select(quality, similarity, (*EIGHT, "blocks.9"))
    with pytest.raises(ValueError, match=r"no CKA between blocks\.0 and blocks\.1 at noise level 0\.1"):
        select(quality, similarity[similarity["layer_b"] != "blocks.1"], EIGHT)
    with pytest.raises(ValueError, match="a layer is named twice"):
        select(quality, similarity, (*EIGHT, "blocks.0"))
    with pytest.raises(ValueError, match=r"exclude_tail is 1\.0; pass a fraction"):
        select(quality, similarity, EIGHT, exclude_tail=1.0)
    with pytest.raises(ValueError, match="num_pairs is 0; pass 1 or more"):
        select(quality, similarity, EIGHT, num_pairs=0)
    with pytest.raises(ValueError, match="min_distance is 0; pass 1 or more"):
        select(quality, similarity, EIGHT, min_distance=0)
    with pytest.raises(ValueError, match="this is not a selection"):
        Selection.from_json("{}")
    with pytest.raises(ValueError, match="this is not a selection"):
        Selection.from_json("no JSON")
