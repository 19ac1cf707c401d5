"""The rule against what is published: thirteen readings of SiT-XL/2, and a network with its probe curve.

A regression guard and no proof: the readings are few, of one network, and the published depths were chosen on them.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from planted_evidence import planted_evidence, quantity
from scipy import stats

from layerprobe.analyses.selection import PRIOR_RANGES, PublishedPair, published_pairs, rank_pairs, scores
from layerprobe.analyses.tables import evidence as e
from layerprobe.analyses.tables.measurements import PROBE

BLOCKS = 28
LAYERS = tuple(f"blocks.{i}" for i in range(BLOCKS))
PAIRS = list(combinations(range(BLOCKS), 2))
# Probe accuracy of SiT-XL in percent by block, read off a figure of Self-Flow (arXiv:2603.06507), and a start at 5.
CURVE = np.interp(np.arange(1, BLOCKS + 1), [0, 4, 8, 12, 16, 20, 24, 28], [5, 10, 15, 20, 40, 55, 50, 38]) / 100
READINGS = [pair for pair in published_pairs() if pair.study.startswith(("LayerSync pairs", "Self-Flow"))]
STUDIES = sorted({pair.study for pair in READINGS})


def evidence(curve: np.ndarray = CURVE, *, labels: bool = True, half: float = 0.01) -> e.PairEvidence:
    gaps = quantity([[curve[t] - curve[s] for s, t in PAIRS]], half)
    by_pair = {e.CKA: quantity([[1 - 0.03 * (t - s) for s, t in PAIRS]])}
    by_pair |= {e.PROBE_GAP: gaps} if labels else {e.LIDAR_GAP: gaps}
    return planted_evidence({PROBE if labels else e.NOISE_LIDAR: quantity([curve], half)}, by_pair, layers=LAYERS)


def agreement(readings: list[PublishedPair], criterion: str | None = None) -> float:
    """Spearman correlation with the published shares: of the rule, or of one criterion alone."""
    found = evidence()
    of_pairs = scores(found) if criterion is None else found.columns(criterion)[0]
    by_pair = dict(zip(PAIRS, np.round(of_pairs, 9), strict=True))  # Equal distances differ by rounding errors.
    # A pair of a block with itself, which is no pair here, is below all others in every criterion of the rule.
    values = [by_pair.get((pair.student - 1, (pair.teacher or 0) - 1), -9.0) for pair in readings]
    return float(stats.spearmanr(values, [pair.share for pair in readings]).statistic)


def test_the_score_goes_with_the_published_gains() -> None:
    assert len(READINGS) == 13
    assert agreement(READINGS) >= 0.75
    alone = {name: agreement(READINGS, name) for name in (e.PROBE_GAP, e.CAPPED_DISTANCE, e.NEARNESS)}
    assert all(0.55 < value < 0.85 for value in alone.values()), alone


@pytest.mark.parametrize("left_out", STUDIES)
def test_no_single_study_carries_the_agreement(left_out: str) -> None:
    assert agreement([pair for pair in READINGS if pair.study != left_out]) > 0.65


@pytest.mark.parametrize("labels", [True, False])
def test_the_pick_of_a_network_with_the_published_curve_lies_where_published_pairs_gain(labels: bool) -> None:
    selection = rank_pairs(evidence(labels=labels), label_free=not labels)
    assert selection.pick is not None
    for layer, (low, high) in zip((selection.pick.student, selection.pick.teacher), PRIOR_RANGES, strict=True):
        assert low <= selection.depth(layer) <= high
    assert selection.ranked[0].teacher_is_best


def test_errors_of_reading_the_curve_do_not_move_the_pick_out_of_the_ranges() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        noisy = CURVE + np.interp(np.arange(BLOCKS), np.arange(0, BLOCKS + 3, 4), rng.normal(0, 0.025, 8))
        selection = rank_pairs(evidence(noisy))
        assert selection.pick is not None
        assert 0.1 <= selection.depth(selection.pick.student) <= 0.4
        assert 0.6 <= selection.depth(selection.pick.teacher) <= 0.83


def test_a_students_accuracy_never_counts_in_its_favor() -> None:
    """REPA: deeper students know more and gain less. Of one teacher's pairs a student that knows more scores lower."""
    richer = CURVE.copy()
    richer[6] += 0.1
    place = PAIRS.index((6, 19))
    assert scores(evidence(richer))[place] < scores(evidence())[place]


@pytest.mark.parametrize("useless", [17, 19, 21])
def test_a_layer_that_knows_nothing_or_repeats_the_student_is_never_the_teacher(useless: int) -> None:
    damaged = CURVE.copy()
    damaged[useless] = 0.1
    selection = rank_pairs(evidence(damaged))
    assert selection.pick is not None
    assert selection.pick.teacher != LAYERS[useless]
