"""Pairs picked from tables with a planted answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from layerprobe.analyses.selection import ranking as ours
from layerprobe.analyses.selection.ranking import HYPOTHESIS, LABEL_FREE, RULE, Calibration, Rule, Selection
from layerprobe.analyses.tables import evidence as e
from layerprobe.analyses.tables.quality import QUALITY_COLUMNS
from layerprobe.analyses.tables.similarity import SIMILARITY_COLUMNS
from layerprobe.layersync.pair import LayerPair

LEVELS = (0.1, 0.5)
EIGHT = tuple(f"blocks.{i}" for i in range(8))
# Rises to block 5, then decodes; block 6 would be the best of all if the tail could teach.
CURVE = (0.20, 0.25, 0.32, 0.38, 0.44, 0.50, 0.60, 0.30)


# Rules of several criteria and limits that bite, whatever the defaults are.
BY_PROBES = Rule({e.PROBE_GAP: 1.0, e.TEACHER_PROBE: 1.0, e.CKA: -1.0})
BY_LIDAR = Rule({e.LIDAR_GAP: 1.0, e.RECOVERABILITY: 1.0, e.CKA: -1.0})
LIMITS: dict[str, Any] = {"skip_first": 1, "exclude_tail": 0.25, "max_cka": 0.98}


def select(*tables: Any, label_free: bool = False, **changes: Any) -> Selection:
    rule = BY_LIDAR if label_free else BY_PROBES
    return ours.select(*tables, label_free=label_free, **LIMITS | {"rule": rule} | changes)


def rank_pairs(table: pd.DataFrame, *, label_free: bool = False, **changes: Any) -> Selection:
    rule = BY_LIDAR if label_free else BY_PROBES
    return ours.rank_pairs(table, label_free=label_free, **LIMITS | {"rule": rule} | changes)


def quality_table(
    curve: Sequence[float],
    layers: Sequence[str] = EIGHT,
    *,
    half_width: float = 0.01,
    metric: str = "probe accuracy",
    split: str = "validation",
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


NOT_SKIPPED = "Whether the network needs its layers was not measured."


def expected_score(selection: Selection, student: int, teacher: int) -> float:
    """The rule by hand: three criteria as ranks of variance 1, their sum at variance 1."""
    pairs = [(s, t) for s in range(8) for t in range(s + 1, 8)]
    quality = [layer.quality or 0.0 for layer in selection.layers]
    columns = [[quality[t] - quality[s] for s, t in pairs], [quality[t] for _, t in pairs], [t - s for s, t in pairs]]
    ranks = np.array([stats.rankdata(np.round(column, 9)) for column in columns])
    total = ((ranks - ranks.mean(1, keepdims=True)) / ranks.std(1, keepdims=True)).sum(0)
    return float((total / total.std())[pairs.index((student, teacher))])


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
    # Of all 28 pairs the gaps, the teachers and the distances in CKA, as ranks.
    assert first.score == pytest.approx(expected_score(selection, 1, 5))
    assert [part.criterion for part in first.parts] == ["probe accuracy gap", "teacher probe accuracy", "CKA"]
    assert sum(part.adds for part in first.parts) == pytest.approx(first.score)
    assert first.distance == 4
    assert first.teacher_is_best
    assert first.gap_is_certain
    assert not first.ties_with_first
    assert "blocks.5 is the best layer that may teach: probe accuracy 0.500." in first.reasons
    assert not selection.label_free
    assert NOT_SKIPPED in selection.warnings


def test_the_rule_follows_what_went_with_the_gain_and_takes_no_labels() -> None:
    """Planted: every criterion of the rule alone names its pair, and labels, LiDAR and accuracy change nothing."""
    assert not set(RULE.weights) & set(e.NEED_LABELS)
    table = planted()
    rank = table[table["criterion"] == e.LIDAR_GAP].assign(criterion=e.RANK_GAP)
    flat = [
        table[table["criterion"] == name].assign(value=value, low=value, high=value)
        for name, value in ((e.CKA, 0.5), (e.RECOVERABILITY, 0.2), (e.RANK_GAP, 0.1))
        if name != e.RANK_GAP
    ]
    others = table[~table["criterion"].isin([e.CKA, e.RECOVERABILITY])]
    even = pd.concat([others, *flat, rank.assign(value=0.1, low=0.1, high=0.1)])
    for criterion, value in ((e.CKA, 0.3), (e.RECOVERABILITY, 0.4), (e.RANK_GAP, 0.3)):
        here = (even["criterion"] == criterion) & (even["student"] == EIGHT[2]) & (even["teacher"] == EIGHT[4])
        changed = even.assign(**{name: even[name].mask(here, value) for name in ("value", "low", "high")})
        for label_free in (False, True):
            assert ours.rank_pairs(changed, label_free=label_free).pick == names(2, 4)


def test_a_student_is_refused_only_if_it_is_stronger_beyond_the_uncertainty() -> None:
    stronger = {e.PROBE_GAP: {(1, 5): -0.01}, e.TEACHER_PROBE: of_teacher(5, 0.24)}
    table = planted(stronger, width={e.PROBE_GAP: 0.02})
    found = next(p for p in rank_pairs(table).ranked if p.pair == names(1, 5))
    assert found.gap_is_certain is False
    assert "blocks.1 is 0.010 stronger, which is within the uncertainty." in found.reasons
    (reason,) = reasons_against(rank_pairs(planted(stronger)), EIGHT[1], EIGHT[5])
    assert reason.startswith("blocks.1 is not weaker than blocks.5")


def test_all_pairs_are_ranked_or_rejected_with_a_reason() -> None:
    selection = select(quality_table(CURVE), similarity_table(), EIGHT)
    pairs = {(p.student, p.teacher) for p in (*selection.ranked, *selection.rejected)}
    assert pairs == {(a, b) for i, a in enumerate(EIGHT) for b in EIGHT[i + 1 :]}
    assert len(selection.ranked) + len(selection.rejected) == 28
    assert all(p.reasons for p in (*selection.ranked, *selection.rejected))
    scores = [pair.score for pair in selection.ranked]
    assert scores == sorted(scores, reverse=True)


def test_criteria_of_eight_blocks() -> None:
    criteria = ours.select(quality_table(CURVE), similarity_table(), EIGHT).criteria
    assert criteria.tail == ("blocks.7",)
    assert criteria.head == ()
    assert criteria.max_cka == 0.9
    assert criteria.min_distance == 2
    assert criteria.noise_levels == LEVELS
    assert (criteria.metric, criteria.split) == ("probe accuracy", "validation")


def test_criteria_of_twentyeight_blocks_admit_the_published_pair() -> None:
    layers = tuple(f"blocks.{i}" for i in range(28))
    curve = [0.2 + 0.3 * np.sin(np.pi * i / 31) for i in range(28)]
    selection = ours.select(quality_table(curve, layers), similarity_table(layers), layers)
    assert selection.criteria.tail == tuple(f"blocks.{i}" for i in range(23, 28))
    assert selection.criteria.head == ("blocks.0", "blocks.1")
    assert selection.criteria.min_distance == 7
    # LayerSync's 8 <- 16, counted from 1.
    assert ("blocks.7", "blocks.15") in {(p.student, p.teacher) for p in selection.ranked}


@pytest.mark.parametrize(
    ("fraction", "depth", "tail"), [(0.2, 10, 2), (0.2, 8, 1), (0.2, 14, 2), (0.29, 100, 29), (0, 5, 0)]
)
def test_the_tail_is_whole_layers(fraction: float, depth: int, tail: int) -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point.
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
        "blocks.1 is not weaker than blocks.3: probe accuracy 0.250 against 0.100",
    )
    assert reasons_against(selection, "blocks.2", "blocks.5") == (
        "they are aligned already: mean CKA 0.990, above 0.98",
    )
    assert len(reasons_against(selection, "blocks.0", "blocks.6")) == 2


def test_ties_and_uncertain_gaps_are_flagged() -> None:
    curve = (0.2, 0.25, 0.25, 0.26, 0.25, 0.27, 0.2, 0.2)
    selection = select(quality_table(curve, half_width=0.05), similarity_table(), EIGHT)
    assert selection.ranked[0].gap_is_certain is False
    assert any("is within the uncertainty" in warning for warning in selection.warnings)
    ties = sum(p.ties_with_first for p in selection.ranked)
    assert ties >= 2
    assert f"{ties} other pairs cannot be told from the first one; score more samples." in selection.warnings
    certain = select(quality_table(CURVE, half_width=1e-4), similarity_table(), EIGHT)
    assert not any(p.ties_with_first for p in certain.ranked)


def test_only_the_choose_split_and_the_model_decide() -> None:
    others = [
        quality_table(CURVE[::-1], split="test"),
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
    assert selection.warnings[-1] == "blocks.5 does not beat the control 'raw input': 0.500 against 0.550."


def test_probes_that_did_not_converge_are_a_warning() -> None:
    quality = quality_table(CURVE)
    quality.loc[3, "note"] = "C=1, gradient norm 1e-02; 1 of 1 fits did not converge"
    assert select(quality, similarity_table(), EIGHT).warnings[-1] == "1 of 16 probes did not converge."


def test_without_labels_and_noise_draws_the_effective_rank_decides_and_the_result_says_so() -> None:
    ranks = quality_table([10 * q for q in CURVE], metric="effective rank", split="train")
    # Ten times the rank at one level must not make that level count ten times.
    ranks.loc[ranks["noise_level"] == 0.1, "value"] *= 10
    ranks[["low", "high"]] = np.nan
    selection = select(ranks, similarity_table(), EIGHT, label_free=True)
    assert selection.pick == LayerPair("blocks.1", "blocks.5")
    assert selection.label_free
    assert selection.criteria.metric == "effective rank"
    assert selection.warnings[:2] == (
        LABEL_FREE,
        "The effective rank stands in for noise-LiDAR; it also counts the directions of noise.",
    )
    assert "Ranked without recoverability gap (the evidence has no recoverability gap)." in selection.warnings
    # Geometric means of ratios to the first layer.
    by_level = [ranks.loc[ranks["noise_level"] == level, "value"].to_numpy() for level in LEVELS]
    expected = np.sqrt(np.prod([x / x[0] for x in by_level], axis=0))
    assert [layer.quality for layer in selection.layers] == pytest.approx(list(expected))
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


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_very_short_networks_have_no_pair(depth: int) -> None:
    selection = ours.select(quality_table(CURVE), similarity_table(), EIGHT[:depth])
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
    reason = "there is no probe accuracy gap: at noise level 0.5, blocks.5: the features hold nan or inf"
    assert reasons_against(selection, "blocks.1", "blocks.5") == (reason,)
    assert Selection.from_json(selection.to_json()) == selection


def test_a_pair_without_similarity_is_left_out() -> None:
    selection = select(quality_table(CURVE), similarity_table(aligned={(1, 5): np.nan}), EIGHT)
    (reason,) = reasons_against(selection, "blocks.1", "blocks.5")
    assert reason.startswith("there is no CKA: at noise level 0.1, there is no estimate")


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
    with pytest.raises(ValueError, match="no effective rank of the model on the split 'train'"):
        select(quality, similarity, EIGHT, label_free=True)
    with pytest.raises(
        ValueError, match="no probe accuracy of the model on the split 'validation'; select without labels"
    ):
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


# ------------------------------------------------------------------------------------------------- the evidence table


ADMISSIBLE = [(1, 3), (1, 4), (1, 5), (2, 4), (2, 5), (3, 5)]  # of eight layers, whatever the evidence


def planted(
    changes: Mapping[str, Mapping[tuple[int, int], float]] | None = None,
    *,
    width: Mapping[str, float] | None = None,
    labels: bool = True,
) -> pd.DataFrame:
    """Eight layers: gaps grow and CKA falls with the distance; everything known to 0.001, or to `width`."""
    values: dict[str, Any] = {
        e.CKA: lambda s, t: 1 - 0.05 * (t - s),
        e.RECOVERABILITY: lambda s, t: 0.1 * (t - s),
        e.LIDAR_GAP: lambda s, t: 0.2 * (t - s),
        e.TEACHER_LIDAR: lambda _, t: float(np.exp(1 + 0.2 * t)),
        e.TEACHER_NEED: lambda _, t: 0.05,
        e.STUDENT_DEPTH: lambda s, _: s / 7,
        e.TEACHER_DEPTH: lambda _, t: t / 7,
    }
    if labels:
        values |= {e.PROBE_GAP: lambda s, t: 0.05 * (t - s), e.TEACHER_PROBE: lambda _, t: 0.2 + 0.05 * t}
    rows: list[Any] = []
    for s in range(8):
        for t in range(s + 1, 8):
            for criterion, of in values.items():
                value = (changes or {}).get(criterion, {}).get((s, t), of(s, t))
                half = (width or {}).get(criterion, 0.001)
                for level in (0.1, np.nan):
                    needs = criterion in e.NEED_LABELS
                    rows.append((EIGHT[s], EIGHT[t], criterion, level, value, value - half, value + half, needs, ""))
    return pd.DataFrame(rows, columns=list(e.EVIDENCE_COLUMNS))


def of_teacher(t: int, value: float) -> dict[tuple[int, int], float]:
    return {(s, t): value for s in range(t)}


def names(s: int, t: int) -> LayerPair:
    return LayerPair(EIGHT[s], EIGHT[t])


@pytest.mark.parametrize("label_free", [False, True])
def test_the_rule_needs_the_table_alone_and_labels_only_if_told(label_free: bool) -> None:
    table = planted(labels=not label_free)
    selection = rank_pairs(table, label_free=label_free)
    assert selection.pick == names(1, 5)
    assert {p.pair for p in selection.ranked} == {names(s, t) for s, t in ADMISSIBLE}
    assert selection.criteria.layers == EIGHT
    assert selection.criteria.noise_levels == (0.1,)
    assert selection.criteria.metric == ("noise-LiDAR" if label_free else "probe accuracy")
    qualities = [layer.quality for layer in selection.layers]
    expected = [np.exp(1 + 0.2 * i) if label_free else 0.2 + 0.05 * i for i in range(8)]
    assert qualities == pytest.approx(expected)
    assert Selection.from_json(selection.to_json()) == selection


def test_what_needs_labels_changes_nothing_without_them() -> None:
    upside_down = planted({e.PROBE_GAP: {(1, 5): -0.3}, e.TEACHER_PROBE: of_teacher(5, 0.0)})
    assert rank_pairs(upside_down, label_free=True) == rank_pairs(planted(), label_free=True)


@pytest.mark.parametrize("label_free", [False, True])
@pytest.mark.parametrize(("need", "why"), [(0.0, "is 0"), (-0.01, "better off without"), (0.0005, "uncertain")])
def test_a_layer_that_the_network_does_not_need_is_no_teacher(label_free: bool, need: float, why: str) -> None:
    selection = rank_pairs(planted({e.TEACHER_NEED: of_teacher(5, need)}), label_free=label_free)
    assert selection.pick == names(1, 4), why
    assert {p.teacher for p in selection.ranked} == {EIGHT[3], EIGHT[4]}
    (reason,) = reasons_against(selection, EIGHT[1], EIGHT[5])
    assert reason.startswith("the network does not need blocks.5: without it the loss rises by")


def test_where_skipping_was_not_measured_a_warning_says_so() -> None:
    unknown = planted()
    unknown = unknown[unknown["criterion"] != e.TEACHER_NEED]
    assert NOT_SKIPPED in rank_pairs(unknown).warnings
    assert NOT_SKIPPED not in rank_pairs(planted()).warnings


@pytest.mark.parametrize("width", [0.001, 0.1])
def test_what_the_student_could_give_by_itself_is_nothing_to_teach(width: float) -> None:
    """The interval must clear the threshold, not the estimate."""
    selection = rank_pairs(planted({e.RECOVERABILITY: {(1, 5): 0.06}}, width={e.RECOVERABILITY: width}))
    if width < 0.01:
        assert names(1, 5) in {p.pair for p in selection.ranked}
    else:
        (reason,) = reasons_against(selection, EIGHT[1], EIGHT[5])
        assert reason.startswith("what the teacher adds is within the student's linear reach: the gap is 0.060")


def test_of_pairs_that_cannot_be_told_apart_the_surest_is_picked_and_the_others_are_ties() -> None:
    """Planted: two pairs lead with nearly one score, and the first of them is hardly known."""
    table, rule = planted(), Rule({e.COSINE: 1.0})
    extra = table[table["criterion"] == e.CKA].assign(criterion=e.COSINE)
    value = {names(1, 4): 0.91, names(2, 5): 0.90, names(1, 5): 0.5, names(3, 5): 0.2}
    pairs = [LayerPair(*pair) for pair in zip(extra["student"], extra["teacher"], strict=True)]
    known = np.array([value.get(pair, 0.1) for pair in pairs])
    half = np.array([0.6 if pair == names(1, 4) else 0.001 for pair in pairs])
    vague = rank_pairs(pd.concat([table, extra.assign(value=known, low=known - half, high=known + half)]), rule=rule)
    assert vague.pick == names(2, 5)
    assert names(1, 4) in {p.pair for p in vague.ranked if p.ties_with_first}
    assert vague.ranked[1].reasons[-1] == "It cannot be told from the first pair."
    clear = rank_pairs(pd.concat([table, extra.assign(value=known, low=known - 1e-3, high=known + 1e-3)]), rule=rule)
    assert clear.pick == names(1, 4)
    assert not any(p.ties_with_first for p in clear.ranked)


def test_the_interval_of_a_score_is_what_the_rule_says_of_criteria_within_theirs() -> None:
    """By force: redraw every number, then rank and standardize anew."""
    width = {e.CKA: 0.05, e.PROBE_GAP: 0.05}
    found = next(p for p in rank_pairs(planted(width=width)).ranked if p.pair == names(2, 4))
    generator = np.random.default_rng(9)
    pairs = [(s, t) for s in range(8) for t in range(s + 1, 8)]
    distance, scores = np.array([t - s for s, t in pairs]), []
    for _ in range(1000):
        gaps = 0.05 * distance + generator.normal(0, 0.05 / 1.96, 28)
        ckas = 1 - 0.05 * distance + generator.normal(0, 0.05 / 1.96, 28)
        columns = np.stack([gaps, [t for _, t in pairs], -ckas])
        ranks = stats.rankdata(columns, axis=1)
        total = ((ranks - ranks.mean(1, keepdims=True)) / ranks.std(1, keepdims=True)).sum(0)
        scores.append(total[pairs.index((2, 4))] / total.std())
    low, high = np.quantile(scores, [0.025, 0.975])
    # 400 draws know the ends of an interval to about a tenth of its width.
    assert (found.score_low, found.score_high) == pytest.approx((low, high), abs=0.12 * (high - low))


WORTHLESS = Calibration(level=-0.04, slope=0.005, half_width=0.02, error=0.001, source="two atlases")


def test_a_pair_whose_gain_lies_below_nothing_beyond_the_uncertainty_is_not_picked() -> None:
    weights = {e.CKA: -1.0}
    selection = rank_pairs(planted(), rule=Rule(weights, WORTHLESS))
    first = selection.ranked[0]
    assert selection.pick is None
    assert first.gain == pytest.approx(-0.04 + 0.005 * first.score)
    assert (first.gain_low, first.gain_high) == pytest.approx((first.gain - 0.02, first.gain + 0.02))
    assert selection.reason.startswith("No pair is worth it. The best one is blocks.1 <- blocks.5. ")
    assert "The gain to expect is -3." in selection.reason
    record = json.loads(selection.to_json())
    assert (record["pick"], record["calibration"]) == (None, "two atlases")
    assert Selection.from_json(selection.to_json()) == selection
    unsure = Calibration(level=-0.04, slope=0.005, half_width=0.05, error=0.001, source="two atlases")
    assert rank_pairs(planted(), rule=Rule(weights, unsure)).pick == names(1, 5)
    # What was learned of a whole rule does not hold for a part of it.
    absent = Rule({e.CKA: -1.0, e.SPATIAL_GAP: 1.0}, WORTHLESS)
    assert rank_pairs(planted(), rule=absent).pick == names(1, 5)


def test_pairs_that_the_calibration_cannot_tell_apart_are_ties() -> None:
    def ties(error: float) -> int:
        rule = Rule({e.CKA: -1.0}, Calibration(level=0.1, slope=0.01, half_width=0.05, error=error, source="atlases"))
        return sum(p.ties_with_first for p in rank_pairs(planted(), rule=rule).ranked)

    assert (ties(1e-6), ties(0.01), ties(1.0)) == (0, 2, 5)


def test_users_rank_by_criteria_of_their_own() -> None:
    table = planted({e.CKA: {(2, 4): 0.1}, e.RECOVERABILITY: {(1, 3): 0.99}})
    assert rank_pairs(table, criteria=[e.CKA]).pick == names(2, 4)
    assert rank_pairs(table, criteria=[e.RECOVERABILITY]).pick == names(1, 3)
    both = rank_pairs(table, criteria=[e.CKA, e.RECOVERABILITY])
    assert both.criteria.weights == ((e.CKA, -1.0), (e.RECOVERABILITY, 1.0))
    with pytest.raises(ValueError, match="there is no criterion 'CAK'; use some of teacher probe accuracy, "):
        rank_pairs(table, criteria=["CAK"])
    with pytest.raises(ValueError, match="'probe accuracy gap' needs labels; leave it out"):
        rank_pairs(table, criteria=[e.PROBE_GAP], label_free=True)
    with pytest.raises(ValueError, match=r"has no CKNNA \(the evidence has no CKNNA\); name other criteria"):
        rank_pairs(table, criteria=[e.CKNNA])


def test_the_evidence_must_tell_a_weaker_layer() -> None:
    with pytest.raises(ValueError, match="the evidence has no probe accuracy gap; select without labels"):
        rank_pairs(planted(labels=False))


def test_selections_of_earlier_versions_still_read() -> None:
    """They have no weights, no gains and no parts."""
    record = json.loads(rank_pairs(planted()).to_json())
    for name in ("worth_it", "weight", "calibration"):
        del record[name]
    for name in ("weights", "min_gap"):
        del record["criteria"][name]
    for pair in record["ranked"]:
        for name in ("gain", "gain_low", "gain_high", "parts", "score_low", "score_high"):
            del pair[name]
    old = Selection.from_json(json.dumps(record))
    assert old.pick == names(1, 5)
    assert old.criteria.weights == ()
    assert old.ranked[0].gain is None
    assert Selection.from_json(old.to_json()) == old
