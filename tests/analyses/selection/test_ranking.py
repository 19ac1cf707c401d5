"""Pairs picked from evidence with a planted answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from planted_evidence import EIGHT, of_pairs, planted_evidence, quantity
from scipy import stats

from layerprobe.analyses.selection import ranking
from layerprobe.analyses.selection.limits import PairLimits
from layerprobe.analyses.selection.ranking import equal_weights
from layerprobe.analyses.selection.records import Caution, Objection, Selection
from layerprobe.analyses.tables import evidence as e
from layerprobe.analyses.tables.evidence import PairEvidence
from layerprobe.analyses.tables.measurements import PROBE, RANK
from layerprobe.extraction.ablation import LOSS_INCREASE
from layerprobe.layersync.pair import LayerPair

LEVELS = (0.1, 0.5)
# Rises to block 5, then decodes; block 6 would be the best of all if the tail could teach.
CURVE = (0.20, 0.25, 0.32, 0.38, 0.44, 0.50, 0.60, 0.30)

# Rules of several criteria and limits that bite, whatever the defaults are.
BY_PROBES = {e.PROBE_GAP: 1.0, e.TEACHER_PROBE: 1.0, e.CKA: -1.0}
BY_LIDAR = {e.LIDAR_GAP: 1.0, e.RECOVERABILITY: 1.0, e.CKA: -1.0}
LIMITS = PairLimits(skip_first=1, exclude_tail=0.25, max_cka=0.98)


def rank_pairs(evidence: PairEvidence, *, label_free: bool = False, **changes: Any) -> Selection:
    options = {"rule": BY_LIDAR if label_free else BY_PROBES, "limits": LIMITS} | changes
    return ranking.rank_pairs(evidence, label_free=label_free, **options)


def evidence_of(
    curve: Sequence[float] = CURVE,
    layers: Sequence[str] = EIGHT,
    *,
    half: float = 0.01,
    aligned: Mapping[tuple[int, int], float] | None = None,
    missing: int | None = None,
) -> PairEvidence:
    """A probe curve at two levels whose mean it is, and CKA that falls by 0.08 per layer."""
    values = np.array([np.asarray(curve) + shift for shift in (0.05, -0.05)])
    notes: dict[tuple[int, int], str] = {}
    if missing is not None:
        values[1, missing], notes = np.nan, {(1, missing): "the features hold nan or inf"}
    pairs = list(combinations(range(len(layers)), 2))
    gaps = np.array([[row[t] - row[s] for s, t in pairs] for row in values]).reshape(2, -1)
    of_gap = {
        (1, i): f"{layers[missing]}: the features hold nan or inf"
        for i, pair in enumerate(pairs)
        if missing is not None and missing in pair
    }
    cka = np.array([(aligned or {}).get((s, t), 1 - 0.08 * (t - s)) for s, t in pairs])
    return planted_evidence(
        {PROBE: quantity(values, half, notes)},
        {e.PROBE_GAP: quantity(gaps, np.hypot(half, half), of_gap), e.CKA: quantity([cka, cka])},
        layers=layers,
        noise_levels=LEVELS,
    )


def expected_score(selection: Selection, student: int, teacher: int) -> float:
    """The rule by hand: three criteria as ranks of variance 1, their sum at variance 1."""
    pairs = [(s, t) for s in range(8) for t in range(s + 1, 8)]
    quality = [layer.quality or 0.0 for layer in selection.layers]
    columns = [[quality[t] - quality[s] for s, t in pairs], [quality[t] for _, t in pairs], [t - s for s, t in pairs]]
    ranks = np.array([stats.rankdata(np.round(column, 9)) for column in columns])
    total = ((ranks - ranks.mean(1, keepdims=True)) / ranks.std(1, keepdims=True)).sum(0)
    return float((total / total.std())[pairs.index((student, teacher))])


def against(selection: Selection, student: str, teacher: str) -> tuple[Objection, ...]:
    return next(p.objections for p in selection.rejected if (p.student, p.teacher) == (student, teacher))


def codes(selection: Selection, student: str, teacher: str) -> list[str]:
    return [objection.code for objection in against(selection, student, teacher)]


def test_picks_the_planted_pair() -> None:
    selection = rank_pairs(evidence_of())
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
    assert selection.best_teacher is not None
    assert selection.best_teacher.layer == "blocks.5"
    assert not selection.label_free
    assert Caution("needs not measured") in selection.cautions


def test_every_layer_has_the_quality_and_the_interval_that_were_measured() -> None:
    """The first layer too, which never teaches, and the tail, which must not."""
    selection = rank_pairs(evidence_of())
    assert [layer.quality for layer in selection.layers] == pytest.approx(CURVE)
    ends = [(layer.low, layer.high) for layer in selection.layers]
    assert np.array(ends) == pytest.approx(np.array(CURVE)[:, None] + np.array([-0.01, 0.01]))


@pytest.mark.parametrize("label_free", [False, True])
def test_each_term_of_the_rule_alone_names_its_pair(label_free: bool) -> None:
    """Planted: gaps are equal but for one pair, or all, so that the places decide."""
    gap = e.LIDAR_GAP if label_free else e.PROBE_GAP
    quality = {e.NOISE_LIDAR: dict.fromkeys(range(8), 5.0), PROBE: dict.fromkeys(range(8), 0.5)}
    flat = {gap: dict.fromkeys(combinations(range(8), 2), 0.1)}
    # Of eight blocks 2 <- 6, counted from 1, is the pair nearest to (0.25, 0.70).
    by_place = ranking.rank_pairs(planted(flat | quality, width={gap: 0.0}), label_free=label_free)
    assert by_place.pick == names(1, 5)
    flat[gap] |= {(1, 5): 0.01, (2, 4): 0.3}
    by_gap = ranking.rank_pairs(planted(flat | quality, width={gap: 0.0}), label_free=label_free)
    assert by_gap.pick == names(2, 4)
    assert [part.criterion for part in by_gap.ranked[0].parts] == [gap, e.CAPPED_DISTANCE, e.NEARNESS]


def test_pairs_of_the_richest_teachers_come_first() -> None:
    """Planted: block 4 knows most, and a pair of block 5 has the highest score."""
    rich = {PROBE: {4: 0.80, 5: 0.70}, e.PROBE_GAP: {(1, 5): 0.5, (0, 4): 0.1, (1, 4): 0.1, (2, 4): 0.1}}
    selection = ranking.rank_pairs(planted(rich, width={e.PROBE_GAP: 0.0}))
    teachers = [pair.teacher for pair in selection.ranked]
    count = teachers.count(EIGHT[4])
    assert count > 1
    assert teachers[:count] == [EIGHT[4]] * count
    assert max(pair.score for pair in selection.ranked) == next(
        pair.score for pair in selection.ranked if pair.pair == names(1, 5)
    )
    # Within the uncertainty both are the richest, and the score decides.
    vague = ranking.rank_pairs(planted(rich, width={PROBE: 0.2, e.PROBE_GAP: 0.0}))
    assert vague.pick == names(1, 5)
    # A rule that a user names ranks all pairs alike.
    assert ranking.rank_pairs(planted(rich), rule=equal_weights([e.PROBE_GAP])).pick == names(1, 5)


def test_where_the_richest_layer_cannot_teach_a_caution_names_it() -> None:
    selection = ranking.rank_pairs(planted({PROBE: {5: 0.9}, LOSS_INCREASE: {5: 0.0}}))
    assert selection.pick is not None
    assert selection.pick.teacher != EIGHT[5]
    assert "teacher not the richest" in [caution.code for caution in selection.cautions]


def test_likeness_is_a_caution_and_only_a_network_of_one_kind_has_no_pick() -> None:
    alike = {e.CKA: dict.fromkeys(combinations(range(8), 2), 0.95)}
    none = ranking.rank_pairs(planted(alike))
    assert none.pick is None
    (objection,) = none.refusal[1]
    assert (objection.code, objection.value, objection.limit) == ("all layers alike", pytest.approx(0.95), 0.9)
    assert ranking.rank_pairs(planted(alike), limits=PairLimits(max_cka=1.0)).pick is not None
    alike[e.CKA][0, 7] = 0.5
    some = ranking.rank_pairs(planted(alike))
    assert some.pick is not None
    assert Caution("alike", e.CKA, value=pytest.approx(0.95), limit=0.9) in some.cautions


@pytest.mark.parametrize(("gap", "refused"), [(-0.01, True), (0.0, True), (0.01, False)])
def test_a_student_that_is_not_weaker_is_refused_however_uncertain_that_is(gap: float, refused: bool) -> None:
    evidence = planted({e.PROBE_GAP: {(1, 5): gap}, PROBE: {5: 0.25 + gap}}, width={e.PROBE_GAP: 0.02})
    selection = rank_pairs(evidence)
    if refused:
        (objection,) = against(selection, EIGHT[1], EIGHT[5])
        assert (objection.code, objection.value) == ("student not weaker", pytest.approx(gap))
    else:
        pair = next(pair for pair in selection.ranked if pair.pair == names(1, 5))
        assert pair.gap_is_certain is False
        assert pair.gap == pytest.approx(gap)


def test_all_pairs_are_ranked_or_rejected_with_a_reason() -> None:
    selection = rank_pairs(evidence_of())
    pairs = {(p.student, p.teacher) for p in (*selection.ranked, *selection.rejected)}
    assert pairs == {(a, b) for i, a in enumerate(EIGHT) for b in EIGHT[i + 1 :]}
    assert len(selection.ranked) + len(selection.rejected) == 28
    assert all(p.objections for p in selection.rejected)
    scores = [pair.score for pair in selection.ranked]
    assert scores == sorted(scores, reverse=True)


def test_limits_of_eight_blocks() -> None:
    basis = ranking.rank_pairs(evidence_of(), rule=BY_PROBES).basis
    assert basis.tail == ("blocks.7",)
    assert basis.head == EIGHT[:1]
    assert basis.late == EIGHT[4:]
    assert basis.max_cka == 0.99
    assert basis.min_distance == 2
    assert basis.noise_levels == LEVELS
    assert (basis.metric, basis.split) == ("probe accuracy", "validation")


def test_limits_of_twentyeight_blocks_admit_the_published_pair() -> None:
    layers = tuple(f"blocks.{i}" for i in range(28))
    curve = [0.2 + 0.3 * np.sin(np.pi * i / 31) for i in range(28)]
    selection = ranking.rank_pairs(evidence_of(curve, layers), rule=BY_PROBES)
    assert selection.basis.tail == tuple(f"blocks.{i}" for i in range(23, 28))
    assert selection.basis.head == ("blocks.0", "blocks.1", "blocks.2")
    assert selection.basis.late == tuple(f"blocks.{i}" for i in range(14, 28))
    assert selection.basis.min_distance == 8
    # LayerSync's 8 <- 16, counted from 1.
    assert ("blocks.7", "blocks.15") in {(p.student, p.teacher) for p in selection.ranked}


def test_each_filter_rejects() -> None:
    curve = list(CURVE)
    curve[3] = 0.10
    selection = rank_pairs(evidence_of(curve, aligned={(2, 5): 0.99}))
    assert against(selection, "blocks.1", "blocks.6") == (Objection("teacher in the tail", limit=2),)
    assert against(selection, "blocks.0", "blocks.5") == (Objection("student in the head", limit=1),)
    assert against(selection, "blocks.4", "blocks.5") == (
        Objection("student too deep", value=5, limit=8),
        Objection("too close", value=1, limit=2),
    )
    assert codes(selection, "blocks.1", "blocks.3") == ["student not weaker"]
    (alike,) = against(selection, "blocks.2", "blocks.5")
    assert (alike.code, alike.value, alike.limit) == ("already alike", pytest.approx(0.99), 0.98)
    assert codes(selection, "blocks.0", "blocks.6") == ["teacher in the tail", "student in the head"]


def test_ties_and_uncertain_gaps_are_flagged() -> None:
    curve = (0.2, 0.25, 0.25, 0.26, 0.25, 0.27, 0.2, 0.2)
    selection = rank_pairs(evidence_of(curve, half=0.05))
    assert selection.ranked[0].gap_is_certain is False
    assert Caution("gap within the uncertainty") in selection.cautions
    ties = sum(p.ties_with_first for p in selection.ranked)
    assert ties >= 2
    assert Caution("ties with the pick", value=ties) in selection.cautions
    certain = rank_pairs(evidence_of(half=1e-4))
    assert not any(p.ties_with_first for p in certain.ranked)


@pytest.mark.parametrize(
    ("control", "accuracy", "refused"),
    [
        # The teacher has 0.50, known to 0.01.
        ("random weights", 0.50, True),
        ("random weights", 0.499, False),
        ("raw input", 0.52, True),
        ("raw input", 0.505, False),
        ("majority class", 0.495, True),
        ("majority class", 0.48, False),
    ],
)
def test_a_teacher_that_a_control_refutes_is_no_teacher(control: str, accuracy: float, refused: bool) -> None:
    selection = rank_pairs(evidence_of(), controls={control: accuracy})
    assert selection.basis.controls == ((control, accuracy),)
    if refused:
        (objection,) = against(selection, "blocks.1", "blocks.5")
        assert (objection.code, objection.subject, objection.limit) == ("below a control", control, accuracy)
        assert objection.value == pytest.approx(0.50)
        assert selection.pick is None or selection.pick.teacher != "blocks.5"
    else:
        assert selection.pick == LayerPair("blocks.1", "blocks.5")
    near = [caution for caution in selection.cautions if caution.code == "control knows as much"]
    assert near == [] or near == [Caution("control knows as much", control, value=pytest.approx(0.5), limit=accuracy)]
    assert bool(near) == (not refused and accuracy > 0.49)


def test_without_labels_no_control_is_compared() -> None:
    evidence = planted(labels=False)
    assert rank_pairs(evidence, label_free=True, controls={"raw input": 0.9}) == rank_pairs(evidence, label_free=True)


def test_an_objection_to_the_run_withholds_every_pick_and_is_the_reason() -> None:
    objection = Objection("network does not denoise", value=2.1, note="--schedule sit --prediction velocity")
    selection = rank_pairs(evidence_of(), against_all=[objection])
    assert selection.pick is None
    assert len(selection.rejected) == 28
    assert selection.refusal == (None, (objection,))
    record = selection.to_dict()
    assert record["pick"] is None
    assert [one["code"] for one in record["no_pick"]] == ["network does not denoise"]
    assert Selection.from_dict(json.loads(selection.to_json())) == selection


def test_at_pure_noise_alone_nothing_is_picked() -> None:
    layers, pairs = {PROBE: quantity([CURVE])}, {e.PROBE_GAP: quantity([of_pairs(lambda s, t: CURVE[t] - CURVE[s])])}
    pairs[e.CKA] = quantity([of_pairs(lambda s, t: 1 - 0.08 * (t - s))])
    picks = {levels: rank_pairs(planted_evidence(layers, pairs, noise_levels=levels)) for levels in ((1.0,), (0.99,))}
    assert picks[0.99,].pick == LayerPair("blocks.1", "blocks.5")
    assert picks[1.0,].pick is None
    assert picks[1.0,].refusal == (None, (Objection("nothing but noise", value=1.0),))


def test_the_closest_pair_says_why_there_is_no_pick() -> None:
    selection = rank_pairs(evidence_of(), limits=replace(LIMITS, max_cka=0.5, min_distance=4))
    (closest, objections) = selection.refusal
    assert closest is not None
    assert objections == closest.objections
    assert len(objections) == 1
    assert rank_pairs(evidence_of()).refusal == (None, ())


def test_a_single_admissible_pair_is_no_choice() -> None:
    limits = replace(LIMITS, min_distance=4)
    selection = rank_pairs(evidence_of(), limits=limits)
    assert len(selection.ranked) == 1
    assert Caution("only one pair") in selection.cautions
    # Cutting the list is no lack of choice.
    assert Caution("only one pair") not in rank_pairs(evidence_of(), num_pairs=1).cautions


@pytest.mark.parametrize("depth", [3, 4])
def test_the_last_layer_of_a_short_network_does_not_teach(depth: int) -> None:
    curve = [0.2 + 0.1 * i for i in range(depth)]
    selection = ranking.rank_pairs(evidence_of(curve, EIGHT[:depth]), rule=BY_PROBES)
    assert selection.basis.tail == (EIGHT[depth - 1],)
    assert selection.pick == (None if depth == 3 else LayerPair("blocks.0", "blocks.2"))
    free = ranking.rank_pairs(evidence_of(curve, EIGHT[:depth]), rule=BY_PROBES, limits=PairLimits(exclude_tail=0.0))
    assert free.basis.tail == ()
    assert free.pick is not None


def test_without_labels_and_noise_draws_the_effective_rank_decides_and_the_result_says_so() -> None:
    ranks = np.array([[10 * q for q in CURVE]])
    gaps = [[np.log(ranks[0][t] / ranks[0][s]) for s, t in combinations(range(8), 2)]]
    evidence = planted_evidence(
        {RANK: quantity(ranks, np.nan)},
        {e.RANK_GAP: quantity(gaps, np.nan), e.CKA: quantity([of_pairs(lambda s, t: 1 - 0.08 * (t - s))])},
    )
    selection = rank_pairs(evidence, label_free=True)
    assert selection.pick == LayerPair("blocks.1", "blocks.5")
    assert selection.label_free
    assert selection.basis.metric == "effective rank"
    assert [c.code for c in selection.cautions[:2]] == ["no labels", "effective rank counts noise"]
    missing = Caution("criterion not measured", "recoverability gap", note="the evidence has no recoverability gap")
    assert missing in selection.cautions
    assert [layer.quality for layer in selection.layers] == pytest.approx(list(ranks[0]))
    assert selection.ranked[0].gap_is_certain is None


def test_no_admissible_pair_is_an_answer() -> None:
    selection = rank_pairs(evidence_of(CURVE[::-1][1:], EIGHT[1:]))
    assert selection.ranked == ()
    assert selection.pick is None
    assert selection.best_teacher is not None


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_very_short_networks_have_no_pair(depth: int) -> None:
    selection = ranking.rank_pairs(evidence_of(CURVE[:depth], EIGHT[:depth]), rule=BY_PROBES)
    assert selection.pick is None


def test_layers_of_a_unet_need_no_numbers_in_their_names() -> None:
    layers = ("conv_in", "down.0", "down.1", "mid", "up.0", "up.1", "norm", "conv_out")
    assert rank_pairs(evidence_of(layers=layers)).pick == LayerPair("down.0", "up.1")


def test_a_layer_without_quality_is_left_out_with_its_note() -> None:
    selection = rank_pairs(evidence_of(missing=5))
    assert selection.pick == LayerPair("blocks.1", "blocks.4")
    note = "at noise level 0.5, blocks.5: the features hold nan or inf"
    assert against(selection, "blocks.1", "blocks.5")[0] == Objection("not measured", e.PROBE_GAP, note=note)
    assert selection.layers[5].quality is None
    assert selection.layers[5].note == "blocks.5: at noise level 0.5, the features hold nan or inf"


def test_a_pair_without_similarity_is_left_out() -> None:
    selection = rank_pairs(evidence_of(aligned={(1, 5): np.nan}))
    (objection,) = against(selection, "blocks.1", "blocks.5")
    assert (objection.code, objection.subject) == ("not measured", "CKA")
    assert objection.note.startswith("at noise level 0.1, there is no estimate")


def test_layers_of_unequal_shape_are_no_pair() -> None:
    whole = evidence_of()
    kept = [i for i, pair in enumerate(whole.pairs) if "blocks.5" not in pair]
    by_pair = {
        name: type(of)(
            *(getattr(of, end)[:, kept] for end in ("value", "low", "high")),
            *(getattr(of, end)[kept] for end in ("mean", "mean_low", "mean_high")),
            tuple(tuple(row[i] for i in kept) for row in of.notes),
        )
        for name, of in whole.by_pair.items()
    }
    evidence = replace(whole, students=whole.students[kept], teachers=whole.teachers[kept], by_pair=by_pair)
    shapes = dict.fromkeys(EIGHT, (16, 64)) | {"blocks.5": (4, 64)}
    selection = rank_pairs(evidence, shapes=shapes)
    assert selection.pick == LayerPair("blocks.1", "blocks.4")
    expected = Objection("different shapes", note="blocks.1 gives 16 x 64, blocks.5 4 x 64")
    assert against(selection, "blocks.1", "blocks.5") == (expected,)
    # Its quality is known, but it has nobody to teach.
    assert selection.layers[5].quality == pytest.approx(0.5)
    assert not selection.layers[5].may_teach


def test_num_pairs_keeps_the_best() -> None:
    everything, two = rank_pairs(evidence_of()), rank_pairs(evidence_of(), num_pairs=2)
    assert two.ranked == everything.ranked[:2]
    assert two.cautions == everything.cautions
    with pytest.raises(ValueError, match="num_pairs is 0; pass 1 or more"):
        rank_pairs(evidence_of(), num_pairs=0)


def test_limits_change_the_pick() -> None:
    limits = PairLimits(exclude_tail=0.1, skip_first=3, max_student=1, min_distance=1)
    selection = rank_pairs(evidence_of(), limits=limits)
    assert selection.pick == LayerPair("blocks.3", "blocks.6")
    assert "blocks.5" in {p.student for p in selection.ranked}


# ----------------------------------------------------------------------------------------------- evidence of all kinds


ADMISSIBLE = [(1, 3), (1, 4), (1, 5), (2, 4), (2, 5), (3, 5)]  # of eight layers, whatever the evidence


def planted(
    changes: Mapping[str, Mapping[Any, float]] | None = None,
    *,
    width: Mapping[str, float] | None = None,
    labels: bool = True,
    without: Sequence[str] = (),
) -> PairEvidence:
    """Eight layers: gaps grow and CKA falls with the distance; everything known to 0.001, or to `width`.

    Changes are of pairs (student, teacher) or of layers.
    """
    of_pair: dict[str, Any] = {
        e.CKA: lambda s, t: 1 - 0.05 * (t - s),
        e.RECOVERABILITY: lambda s, t: 0.1 * (t - s),
        e.LIDAR_GAP: lambda s, t: 0.2 * (t - s),
        e.RANK_GAP: lambda s, t: 0.2 * (t - s),
    }
    of_layer: dict[str, Any] = {e.NOISE_LIDAR: lambda i: float(np.exp(1 + 0.2 * i)), LOSS_INCREASE: lambda _: 0.05}
    if labels:
        of_pair |= {e.PROBE_GAP: lambda s, t: 0.05 * (t - s)}
        of_layer |= {PROBE: lambda i: 0.2 + 0.05 * i}
    given = changes or {}
    for name in given:
        if name not in of_pair | of_layer:
            of_pair[name] = lambda *_: 0.1

    def half(name: str) -> float:
        return (width or {}).get(name, 0.001)

    pairs = list(combinations(range(8), 2))
    by_pair = {
        name: quantity([[given.get(name, {}).get(pair, value(*pair)) for pair in pairs]], half(name))
        for name, value in of_pair.items()
        if name not in without
    }
    by_layer = {
        name: quantity([[given.get(name, {}).get(i, value(i)) for i in range(8)]], half(name))
        for name, value in of_layer.items()
        if name not in without
    }
    return planted_evidence(by_layer, by_pair)


def names(s: int, t: int) -> LayerPair:
    return LayerPair(EIGHT[s], EIGHT[t])


def test_without_labels_the_effective_rank_decides_and_a_named_criterion_stays_itself() -> None:
    ranks = {RANK: quantity([np.exp(1 + 0.2 * np.arange(8))])}
    both = planted_evidence(ranks | {e.NOISE_LIDAR: ranks[RANK]}, planted().by_pair)
    selection = ranking.rank_pairs(both, label_free=True)
    assert selection.basis.metric == RANK
    assert e.RANK_GAP in dict(selection.basis.weights)
    assert "effective rank counts noise" in [caution.code for caution in selection.cautions]
    named = ranking.rank_pairs(both, label_free=True, rule={e.LIDAR_GAP: 1.0})
    assert dict(named.basis.weights) == {e.LIDAR_GAP: 1.0}


@pytest.mark.parametrize("label_free", [False, True])
def test_the_rule_needs_labels_only_if_told(label_free: bool) -> None:
    selection = rank_pairs(planted(labels=not label_free), label_free=label_free)
    assert selection.pick == names(1, 5)
    assert {p.pair for p in selection.ranked} == {names(s, t) for s, t in ADMISSIBLE}
    assert selection.basis.layers == EIGHT
    assert selection.basis.noise_levels == (0.1,)
    assert selection.basis.metric == ("noise-LiDAR" if label_free else "probe accuracy")
    qualities = [layer.quality for layer in selection.layers]
    expected = [np.exp(1 + 0.2 * i) if label_free else 0.2 + 0.05 * i for i in range(8)]
    assert qualities == pytest.approx(expected)


def test_what_needs_labels_changes_nothing_without_them() -> None:
    upside_down = planted({e.PROBE_GAP: {(1, 5): -0.3}, PROBE: {5: 0.0}})
    assert rank_pairs(upside_down, label_free=True) == rank_pairs(planted(), label_free=True)


@pytest.mark.parametrize("label_free", [False, True])
@pytest.mark.parametrize(("need", "why"), [(0.0, "is 0"), (-0.01, "better off without"), (0.0005, "uncertain")])
def test_a_layer_that_the_network_does_not_need_is_no_teacher(label_free: bool, need: float, why: str) -> None:
    selection = rank_pairs(planted({LOSS_INCREASE: {5: need}}), label_free=label_free)
    assert selection.pick == names(1, 4), why
    assert {p.teacher for p in selection.ranked} == {EIGHT[3], EIGHT[4]}
    (objection,) = against(selection, EIGHT[1], EIGHT[5])
    assert (objection.code, objection.value) == ("teacher not needed", pytest.approx(need))


def test_where_skipping_was_not_measured_a_caution_says_so() -> None:
    assert Caution("needs not measured") in rank_pairs(planted(without=[LOSS_INCREASE])).cautions
    assert Caution("needs not measured") not in rank_pairs(planted()).cautions


@pytest.mark.parametrize("width", [0.001, 0.1])
def test_what_the_student_could_give_by_itself_is_nothing_to_teach(width: float) -> None:
    """The interval must clear the threshold, not the estimate."""
    selection = rank_pairs(planted({e.RECOVERABILITY: {(1, 5): 0.06}}, width={e.RECOVERABILITY: width}))
    if width < 0.01:
        assert names(1, 5) in {p.pair for p in selection.ranked}
    else:
        (objection,) = against(selection, EIGHT[1], EIGHT[5])
        assert objection.code == "within linear reach"
        assert (objection.value, objection.low, objection.limit) == pytest.approx((0.06, -0.04, 0.05))


def test_of_pairs_that_cannot_be_told_apart_the_surest_is_picked_and_the_others_are_ties() -> None:
    """Planted: two pairs lead with nearly one score, and the first of them is hardly known."""
    values = {(1, 4): 0.91, (2, 5): 0.90, (1, 5): 0.5, (3, 5): 0.2}
    known = np.array([[values.get(pair, 0.1) for pair in combinations(range(8), 2)]])
    half = np.array([[0.6 if pair == (1, 4) else 0.001 for pair in combinations(range(8), 2)]])

    def pick(half: Any) -> Selection:
        table = planted()
        evidence = replace(table, by_pair={**table.by_pair, e.COSINE: quantity(known, half)})
        return rank_pairs(evidence, rule={e.COSINE: 1.0})

    vague = pick(half)
    assert vague.pick == names(2, 5)
    assert names(1, 4) in {p.pair for p in vague.ranked if p.ties_with_first}
    clear = pick(1e-3)
    assert clear.pick == names(1, 4)
    assert not any(p.ties_with_first for p in clear.ranked)


def test_the_interval_of_a_score_is_what_the_rule_says_of_criteria_within_theirs() -> None:
    """By force: redraw every number, then rank and standardize anew."""
    width = {e.CKA: 0.05, e.PROBE_GAP: 0.05}
    pair = next(p for p in rank_pairs(planted(width=width)).ranked if p.pair == names(2, 4))
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
    assert (pair.score_low, pair.score_high) == pytest.approx((low, high), abs=0.12 * (high - low))


def test_users_rank_by_criteria_of_their_own() -> None:
    evidence = planted({e.CKA: {(2, 4): 0.1}, e.RECOVERABILITY: {(1, 3): 0.99}})
    assert rank_pairs(evidence, rule=equal_weights([e.CKA])).pick == names(2, 4)
    assert rank_pairs(evidence, rule=equal_weights([e.RECOVERABILITY])).pick == names(1, 3)
    both = rank_pairs(evidence, rule=equal_weights([e.CKA, e.RECOVERABILITY]))
    assert both.basis.weights == ((e.CKA, -1.0), (e.RECOVERABILITY, 1.0))
    assert equal_weights([e.STUDENT_DEPTH, e.TEACHER_DEPTH]) == {e.STUDENT_DEPTH: -1.0, e.TEACHER_DEPTH: 1.0}
    with pytest.raises(ValueError, match=r"unknown criterion 'CAK'; use teacher probe accuracy, .* did you mean CKA"):
        equal_weights(["CAK"])
    with pytest.raises(ValueError, match="'probe accuracy gap' needs labels; leave it out"):
        equal_weights([e.PROBE_GAP], label_free=True)


def test_a_rule_of_which_nothing_was_measured_ranks_nothing() -> None:
    with pytest.raises(ValueError, match="the evidence has none of CKNNA, cosine; name other criteria"):
        rank_pairs(planted(), rule={e.CKNNA: -1.0, e.COSINE: 1.0})


def test_the_evidence_must_tell_a_weaker_layer() -> None:
    with pytest.raises(ValueError, match="the evidence has no probe accuracy gap; select without labels"):
        rank_pairs(planted(labels=False))


def test_tokens_narrower_than_any_published_are_told() -> None:
    evidence = evidence_of()
    for width, told in ((48, [48.0]), (384, [])):
        selection = rank_pairs(evidence, shapes=dict.fromkeys(evidence.layers, (16, width)))
        assert [c.value for c in selection.cautions if c.code == "narrower than published"] == told
