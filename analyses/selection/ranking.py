"""Ranking of layer pairs by their evidence; it may find that no pair is admissible.

A pick is a hypothesis, and `layerprobe confirm` gives the verdict: a layer with informative features is not always a
good teacher. Under REPA, aligning a deeper layer raised probe accuracy and worsened FID (arXiv:2410.06940, Table 2),
and no automatic picker for self-alignment has been published so far. So a selection contains every number that its
ranking rests on, and the reasons against every refused pair.

Pairs that pass the filters (see `filters`) are ranked by a **rule**, a weighted sum of criteria. Each criterion is
turned into ranks among all pairs of the network, of mean 0 and variance 1, because raw values differ too much
between models; the score is the sum, scaled to mean 0 and variance 1.

**Ties**: the intervals of the criteria show which pairs cannot be distinguished from the first one. Of those the pick
is the one whose score is largest at the lower end of its uncertainty; the others are reported as ties.

The rule needs no labels. Without labels, noise-LiDAR replaces the probe where students are compared with teachers: the
number of directions in which samples differ more than noise moves them. If the features have a single noise draw, the
effective rank replaces noise-LiDAR; it also counts the directions of noise. The selection records which was used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from layerprobe.analyses.measures import Z95, Floats
from layerprobe.analyses.selection.filters import different_shapes, objections
from layerprobe.analyses.selection.limits import DEFAULT_LIMITS, PairLimits
from layerprobe.analyses.selection.records import (
    Caution,
    CautionCode,
    LayerQuality,
    Metric,
    RankedPair,
    RejectedPair,
    ScorePart,
    Selection,
    SelectionBasis,
)
from layerprobe.analyses.tables import (
    CKA,
    CRITERIA,
    LAST_PENALTY,
    LIDAR_GAP,
    NOISE_LIDAR,
    PROBE,
    PROBE_GAP,
    RANDOM_WEIGHTS,
    RANK,
    RANK_GAP,
    RAW_INPUT,
    RECOVERABILITY,
    TEACHER_NEED,
    UNFINISHED,
    Number,
    PairEvidence,
)

# Weights of the criteria; the sign says which end is good. Given the depths of both layers, the gap in effective rank
# goes with the gain in five of six sweeps of long trainings with a slow start. Nothing that needs labels does.
# Recoverability and CKA go with it where alignment pays; weighing the two is RARE's idea (docs/atlas/findings.md).
RULE: Mapping[str, float] = {RANK_GAP: 1.0, RECOVERABILITY: 1.0, CKA: -1.0}
_DRAWS = 400  # random draws of the criteria within their intervals
_PROBE_CAUTIONS: Mapping[CautionCode, str] = {
    "probes not converged": UNFINISHED,
    "probes at the end of the search": LAST_PENALTY,
}
_QUALITY: Mapping[str, Metric] = {PROBE_GAP: "probe accuracy", LIDAR_GAP: "noise-LiDAR", RANK_GAP: "effective rank"}
_QUANTITY: Mapping[Metric, str] = {"probe accuracy": PROBE, "noise-LiDAR": NOISE_LIDAR, "effective rank": RANK}


def rank_pairs(
    evidence: PairEvidence,
    *,
    label_free: bool = False,
    rule: Mapping[str, float] = RULE,
    limits: PairLimits = DEFAULT_LIMITS,
    num_pairs: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Selection:
    """Ranks the pairs of an earlier layer (student) and a later layer (teacher).

    Args:
        evidence: Evidence of the layers and pairs, as `measure_evidence` measures it.
        label_free: Whether to use only criteria that need no labels.
        rule: Weights of the criteria; see `equal_weights` for criteria that a user names.
        limits: Limits that an admissible pair must keep.
        num_pairs: Number of ranked pairs to keep; all if None.
        shapes: Shape (tokens, width) of each layer, for the reason why the evidence does not contain a pair.

    Raises:
        ValueError: If the evidence lacks what the ranking needs, or an argument is out of range.
    """
    if num_pairs is not None and num_pairs < 1:
        raise ValueError(f"num_pairs is {num_pairs}; pass 1 or more, or None for all pairs")
    gap = _gap_criterion(evidence, label_free)
    weights, missing = _usable(rule, evidence, gap)
    basis = SelectionBasis(
        metric=_QUALITY[gap],
        split="train and validation" if label_free else "validation",
        noise_levels=evidence.noise_levels,
        layers=evidence.layers,
        tail=limits.tail(evidence.layers),
        head=limits.head(evidence.layers),
        min_distance=limits.distance(evidence.layers),
        max_cka=limits.max_cka,
        min_gap=limits.min_gap,
        weights=tuple(weights.items()),
    )
    admissible, rejected = [], []
    places = {pair: index for index, pair in enumerate(evidence.pairs)}
    for pair in combinations(evidence.layers, 2):
        index = places.get(pair)
        if index is None:
            rejected.append(RejectedPair(*pair, (different_shapes(*pair, shapes or {}),)))
        elif against := objections(evidence, index, basis, gap):
            rejected.append(RejectedPair(*pair, against))
        else:
            admissible.append(index)
    if admissible and not weights:
        raise ValueError(f"the evidence has none of {', '.join(rule)}; name other criteria, or extract more")
    qualities = _qualities(evidence, basis)
    ranked = _ranked(evidence, weights, admissible, qualities, gap) if admissible else ()
    return Selection(
        basis=basis,
        label_free=label_free,
        ranked=ranked[:num_pairs],
        rejected=tuple(rejected),
        layers=tuple(qualities),
        cautions=(*_cautions(ranked, evidence, gap, label_free), *missing),
    )


def equal_weights(criteria: Sequence[str], *, label_free: bool = False) -> dict[str, float]:
    """Returns a rule that weighs the named criteria equally, each with the sign of its better direction.

    Raises:
        ValueError: If a criterion is unknown, or needs labels although `label_free` is set.
    """
    for name in criteria:
        if name not in CRITERIA:
            raise ValueError(f"there is no criterion {name!r}; use some of {', '.join(CRITERIA)}")
        if label_free and CRITERIA[name].needs_labels:
            raise ValueError(f"{name!r} needs labels; leave it out, or leave out label_free")
    return {name: -1.0 if CRITERIA[name].smaller_is_better else 1.0 for name in criteria}


def with_control_cautions(selection: Selection, quality: pd.DataFrame) -> Selection:
    """Adds cautions from the quality table: probes that may be too bad, and controls as good as the picked teacher.

    A selection without labels is returned unchanged.

    Args:
        selection: Selection of the run.
        quality: Quality table of the run.
    """
    if selection.label_free:
        return selection
    basis = selection.basis
    cautions = probe_cautions(quality[quality["noise_level"].isin(basis.noise_levels)], basis.metric, basis.split)
    for source in (RANDOM_WEIGHTS, RAW_INPUT) if selection.ranked else ():
        rows = _rows(quality, source, basis)
        if rows.empty:
            continue
        first, best = selection.ranked[0], float(rows.groupby("layer")["value"].mean().max())
        if first.teacher_quality <= best:
            cautions.append(Caution("control knows as much", source, value=first.teacher_quality, limit=best))
    return replace(selection, cautions=(*selection.cautions, *cautions))


def probe_cautions(quality: pd.DataFrame, metric: str, split: str) -> list[Caution]:
    """Returns cautions about probes that may be too bad, by source: the model and its controls.

    Args:
        quality: Quality table.
        metric: Metric of the probes.
        split: Split of the rows to count.
    """
    rows = quality[(quality["metric"] == metric) & (quality["split"] == split)]
    return [
        Caution(code, str(source), value=count, limit=len(notes))
        for source, notes in rows.groupby("source", sort=False)["note"]
        for code, sign in _PROBE_CAUTIONS.items()
        if (count := int(notes.str.contains(sign, regex=False).sum()))
    ]


def _rows(quality: pd.DataFrame, source: str, basis: SelectionBasis) -> pd.DataFrame:
    """Rows of a source in the metric, split and noise levels of the selection."""
    rows = quality[(quality["source"] == source) & (quality["metric"] == basis.metric)]
    return rows[(rows["split"] == basis.split) & rows["noise_level"].isin(basis.noise_levels)]


def _gap_criterion(evidence: PairEvidence, label_free: bool) -> str:
    """Criterion that measures by how much a student is weaker."""
    if label_free:
        return LIDAR_GAP if evidence.has(LIDAR_GAP) else RANK_GAP
    if evidence.pairs and PROBE_GAP not in evidence.by_pair:
        raise ValueError(f"the evidence has no {PROBE_GAP}; select without labels")
    return PROBE_GAP


def _usable(rule: Mapping[str, float], evidence: PairEvidence, gap: str) -> tuple[dict[str, float], list[Caution]]:
    """Weights of the criteria that the evidence contains, and cautions about the others.

    The effective rank replaces noise-LiDAR if that is missing.
    """
    stand_in = {LIDAR_GAP: RANK_GAP} if gap == RANK_GAP else {}
    weights = {stand_in.get(name, name): weight for name, weight in rule.items()}
    usable = {name: weight for name, weight in weights.items() if evidence.has(name)}
    missing = [
        Caution("criterion not measured", name, note=evidence.number(name, 0).note)
        for name in weights
        if name not in usable and evidence.pairs
    ]
    return usable, missing


def _qualities(evidence: PairEvidence, basis: SelectionBasis) -> list[LayerQuality]:
    """The quality of every layer."""
    paired = {layer for pair in evidence.pairs for layer in pair}
    qualities = []
    for layer in evidence.layers:
        number = evidence.layer_number(_QUANTITY[basis.metric], layer)
        if math.isnan(number.value):
            qualities.append(LayerQuality(layer, None, None, None, note=number.note))
        else:
            may_teach = layer in paired and layer not in basis.tail
            qualities.append(LayerQuality(layer, number.value, *number.ends, may_teach=may_teach))
    able = [layer for layer in qualities if layer.may_teach]
    if not able:
        return qualities
    best = max(able, key=lambda layer: layer.measured)
    floor = best.measured if best.low is None else best.low
    return [replace(layer, ties_with_best=layer.may_teach and layer.measured >= floor) for layer in qualities]


def _ranked(
    evidence: PairEvidence,
    rule: Mapping[str, float],
    admissible: Sequence[int],
    qualities: Sequence[LayerQuality],
    gap_criterion: str,
) -> tuple[RankedPair, ...]:
    """The admissible pairs, the pick first."""
    names, weights = list(rule), np.array(list(rule.values()))
    parts = weights[:, None] * standard_ranks(np.stack([evidence.columns(name)[0] for name in names]))
    size = parts.sum(0).std() or 1.0
    ranks = standard_ranks(np.stack([_drawn(evidence, name, seed=i) for i, name in enumerate(names)], axis=1))
    # Scores as they might be: the rule on criteria drawn from within their intervals, shape (draws, P).
    drawn = standardized(np.tensordot(ranks, weights, axes=(1, 0)))
    scores = standardized(parts.sum(0))
    # Stable: of equal scores the earlier student comes first, then the earlier teacher.
    order = sorted(admissible, key=lambda i: -scores[i])
    ties = [i for i in order if i == order[0] or np.quantile(drawn[:, order[0]] - drawn[:, i], 0.025) <= 0]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    pick = max(ties, key=lambda i: float(low[i]))
    order.sort(key=lambda i: i != pick)
    by_layer = {layer.layer: layer for layer in qualities}
    ranked = []
    for i in order:
        student, teacher = (by_layer[name] for name in evidence.pairs[i])
        gap = evidence.number(gap_criterion, i)
        ranked.append(
            RankedPair(
                student=student.layer,
                teacher=teacher.layer,
                score=float(scores[i]),
                score_low=float(low[i]),
                score_high=float(high[i]),
                parts=tuple(
                    _part(name, evidence.number(name, i), float(adds[i] / size))
                    for name, adds in zip(names, parts, strict=True)
                ),
                teacher_quality=teacher.measured,
                student_quality=student.measured,
                gap=teacher.measured - student.measured,
                gap_is_certain=None if math.isnan(gap.low) else gap.low > 0,
                mean_cka=evidence.number(CKA, i).value,
                distance=evidence.distance(student.layer, teacher.layer),
                teacher_is_best=teacher.ties_with_best,
                ties_with_first=i != pick and i in ties,
            )
        )
    return tuple(ranked)


def _part(name: str, number: Number, adds: float) -> ScorePart:
    return ScorePart(name, number.value, *number.ends, adds)


def _drawn(evidence: PairEvidence, criterion: str, *, seed: int) -> Floats:
    """Values drawn from within the intervals, shape (draws, P); pairs share the draw of a layer that they share."""
    value, low, high = evidence.columns(criterion)
    error = np.nan_to_num((high - low) / (2 * Z95))
    owners: list[Any] = list(evidence.pairs)
    if CRITERIA[criterion].of in ("student", "teacher"):
        owners = [pair[CRITERIA[criterion].of == "teacher"] for pair in owners]
    columns = {name: column for column, name in enumerate(dict.fromkeys(owners))}
    noise = np.random.default_rng(seed).standard_normal((_DRAWS, len(columns)))
    drawn: Floats = value + error * noise[:, [columns[name] for name in owners]]
    return drawn


def _cautions(ranked: Sequence[RankedPair], evidence: PairEvidence, gap: str, label_free: bool) -> list[Caution]:
    cautions = [Caution("no labels")] if label_free else []
    if gap == RANK_GAP:
        cautions.append(Caution("effective rank for noise-LiDAR"))
    if evidence.pairs and not evidence.has(TEACHER_NEED):
        cautions.append(Caution("needs not measured"))
    if ranked and ranked[0].gap_is_certain is False:
        cautions.append(Caution("gap within the uncertainty"))
    ties = sum(pair.ties_with_first for pair in ranked)
    if ties:
        cautions.append(Caution("ties with the pick", value=ties))
    return cautions


def standard_ranks(values: Floats) -> Floats:
    """Computes ranks along the last axis, scaled to mean 0 and variance 1; equal values share a rank.

    The result is 0 for missing values, and everywhere if all values are equal.
    """
    # Values that differ by rounding errors only are equal.
    size = np.nanmax(np.abs(values), initial=np.finfo(np.float64).tiny)
    return standardized(stats.rankdata(np.round(values / size, 9), axis=-1, nan_policy="omit"))


def standardized(values: Floats) -> Floats:
    """Scales values along the last axis to mean 0 and variance 1.

    The result is 0 for missing values, and everywhere if all values are equal.
    """
    is_finite = np.isfinite(values)
    count = np.maximum(is_finite.sum(-1, keepdims=True), 1)
    filled = np.where(is_finite, values, 0)
    deviations = np.where(is_finite, filled - filled.sum(-1, keepdims=True) / count, 0)
    size = np.sqrt(np.square(deviations).sum(-1, keepdims=True) / count)
    scaled: Floats = np.divide(deviations, size, out=np.zeros_like(deviations), where=size > 1e-12)
    return scaled
