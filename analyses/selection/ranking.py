"""Ranking of layer pairs by their evidence; it may find that no pair is admissible.

**The rule.** The teacher is the richest layer before the tail: the one with the highest probe accuracy, or one that the
data cannot tell from it. Among the pairs of these teachers, three terms of equal weight decide:

- the **gap**: by how much the teacher's probe accuracy exceeds the student's;
- the **distance** in depth, up to 0.4, beyond which published pairs gain no more;
- the **nearness to published depths**: student at 0.25 and teacher at 0.70 of the depth.

Each term is turned into ranks among all pairs of the network, of mean 0 and variance 1, because raw values differ too
much between models; the score is the sum, scaled to mean 0 and variance 1. On thirteen published readings of one
network the score goes with the gain (Spearman +0.77). That is weak evidence: they are few, and the published depths
were chosen on them (docs/published-pairs.md). The student's own accuracy never counts in its favor: under REPA,
aligning a deeper layer raised probe accuracy and worsened FID (arXiv:2410.06940, Table 2).

A pick is a hypothesis, and `layerprobe confirm` gives the verdict. So a selection contains every number that its
ranking rests on, and the reasons against every refused pair (see `filters`).

**Ties**: the intervals of the terms show which pairs cannot be distinguished from the first one. Of those the pick is
the one whose score is largest at the lower end of its uncertainty; the others are reported as ties.

**Without labels** the effective rank replaces the probe: of the measures without labels it followed the probe best in
the networks at hand (docs/atlas/picks.md), although it also counts the directions of noise. Where it was not measured,
noise-LiDAR does: the number of directions in which samples differ more than noise moves them. The selection records
which was used.

**Other rules**: `equal_weights` makes a rule of criteria that a user names; all admissible pairs are ranked by these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from layerprobe.analyses.measures import Z95, Floats
from layerprobe.analyses.selection.controls import near_controls
from layerprobe.analyses.selection.filters import different_shapes, objections
from layerprobe.analyses.selection.limits import DEFAULT_LIMITS, PairLimits
from layerprobe.analyses.selection.published import FEWEST_BLOCKS, NARROWEST_TOKENS
from layerprobe.analyses.selection.records import (
    Caution,
    LayerQuality,
    Metric,
    Objection,
    RankedPair,
    RejectedPair,
    ScorePart,
    Selection,
    SelectionBasis,
)
from layerprobe.analyses.tables import (
    CAPPED_DISTANCE,
    CKA,
    CRITERIA,
    LIDAR_GAP,
    NEARNESS,
    NOISE_LIDAR,
    PROBE,
    PROBE_GAP,
    RANK,
    RANK_GAP,
    TEACHER_NEED,
    Number,
    PairEvidence,
)
from layerprobe.messages import unknown

# Weights of the terms; without labels another gap stands in for the first.
RULE: Mapping[str, float] = {PROBE_GAP: 1.0, CAPPED_DISTANCE: 1.0, NEARNESS: 1.0}
# Mean CKA above which a caution is due: alignment cost quality where all pairs were above it (docs/picking.md).
ALIKE = 0.9
_DRAWS = 400  # random draws of the criteria within their intervals
_QUALITY: Mapping[str, Metric] = {PROBE_GAP: "probe accuracy", LIDAR_GAP: "noise-LiDAR", RANK_GAP: "effective rank"}
_QUANTITY: Mapping[Metric, str] = {"probe accuracy": PROBE, "noise-LiDAR": NOISE_LIDAR, "effective rank": RANK}


def rank_pairs(
    evidence: PairEvidence,
    *,
    label_free: bool = False,
    rule: Mapping[str, float] | None = None,
    limits: PairLimits = DEFAULT_LIMITS,
    num_pairs: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    controls: Mapping[str, float] | None = None,
    against_all: Sequence[Objection] = (),
    cautions: Sequence[Caution] = (),
) -> Selection:
    """Ranks the pairs of an earlier layer (student) and a later layer (teacher).

    Args:
        evidence: Evidence of the layers and pairs, as `measure_evidence` measures it.
        label_free: Whether to use only criteria that need no labels.
        rule: Weights of other criteria to rank by, see `equal_weights`; None for the rule of this module.
        limits: Limits that an admissible pair must keep.
        num_pairs: Number of ranked pairs to keep; all if None.
        shapes: Shape (tokens, width) of each layer, for the reason why the evidence does not contain a pair.
        controls: Probe accuracy of the controls, see `control_accuracies`; without labels they are not compared.
        against_all: Objections against every pair of the run, such as weights that do not denoise its data.
        cautions: What else weakens a pick of the run.

    Raises:
        ValueError: If the evidence lacks what the ranking needs, or an argument is out of range.
    """
    if num_pairs is not None and num_pairs < 1:
        raise ValueError(f"num_pairs is {num_pairs}; pass 1 or more, or None for all pairs")
    gap = _gap_criterion(evidence, label_free)
    weights, missing = _usable(RULE if rule is None else rule, evidence, gap)
    basis = SelectionBasis(
        metric=_QUALITY[gap],
        split="train and validation" if label_free else "validation",
        noise_levels=evidence.noise_levels,
        layers=evidence.layers,
        tail=limits.tail(evidence.layers),
        head=limits.head(evidence.layers),
        late=limits.late(evidence.layers),
        min_distance=limits.distance(evidence.layers),
        max_cka=limits.max_cka,
        min_gap=limits.min_gap,
        weights=tuple(weights.items()),
        controls=tuple((controls or {}).items()) if gap == PROBE_GAP else (),
    )
    against_all = (*against_all, *_against_network(evidence, limits))
    admissible, rejected = [], []
    places = {pair: index for index, pair in enumerate(evidence.pairs)}
    for pair in combinations(evidence.layers, 2):
        index = places.get(pair)
        if index is None:
            rejected.append(RejectedPair(*pair, (*against_all, different_shapes(*pair, shapes or {}))))
        elif against := (*against_all, *objections(evidence, index, basis, gap)):
            rejected.append(RejectedPair(*pair, against))
        else:
            admissible.append(index)
    if admissible and not weights:
        raise ValueError(f"the evidence has none of {', '.join(rule or RULE)}; name other criteria, or extract more")
    qualities = _qualities(evidence, basis)
    ranked = _ranked(evidence, weights, admissible, qualities, gap, richest_first=rule is None) if admissible else ()
    return Selection(
        basis=basis,
        label_free=label_free,
        ranked=ranked[:num_pairs],
        rejected=tuple(rejected),
        layers=tuple(qualities),
        cautions=(*cautions, *_cautions(ranked, evidence, gap, basis, label_free, shapes or {}), *missing),
    )


def equal_weights(criteria: Sequence[str], *, label_free: bool = False) -> dict[str, float]:
    """Returns a rule that weighs the named criteria equally, each with the sign of its better direction.

    Raises:
        ValueError: If a criterion is unknown, or needs labels although `label_free` is set.
    """
    for name in criteria:
        if name not in CRITERIA:
            raise ValueError(unknown("criterion", name, CRITERIA))
        if label_free and CRITERIA[name].needs_labels:
            raise ValueError(f"{name!r} needs labels; leave it out, or leave out label_free")
    return {name: -1.0 if CRITERIA[name].smaller_is_better else 1.0 for name in criteria}


def _gap_criterion(evidence: PairEvidence, label_free: bool) -> str:
    """Criterion that measures by how much a student is weaker."""
    if label_free:
        has_rank = evidence.has(RANK_GAP) and RANK in evidence.by_layer
        return RANK_GAP if has_rank or not evidence.has(LIDAR_GAP) else LIDAR_GAP
    if evidence.pairs and PROBE_GAP not in evidence.by_pair:
        raise ValueError(f"the evidence has no {PROBE_GAP}; select without labels")
    return PROBE_GAP


def _usable(rule: Mapping[str, float], evidence: PairEvidence, gap: str) -> tuple[dict[str, float], list[Caution]]:
    """Weights of the criteria that the evidence contains, and cautions about the others.

    The gap by which students are compared with teachers replaces that of the probe, or of noise-LiDAR if it is missing.
    """
    replaced = {PROBE_GAP} if evidence.has(LIDAR_GAP) else {PROBE_GAP, LIDAR_GAP}
    weights = {gap if name in replaced and gap != PROBE_GAP else name: weight for name, weight in rule.items()}
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
    *,
    richest_first: bool,
) -> tuple[RankedPair, ...]:
    """The admissible pairs, the pick first; those of the richest teachers before all others if `richest_first`."""
    by_layer = {layer.layer: layer for layer in qualities}
    names, weights = list(rule), np.array(list(rule.values()))
    parts = _parts(evidence, rule)
    size = parts.sum(0).std() or 1.0
    ranks = standard_ranks(np.stack([_drawn(evidence, name, seed=i) for i, name in enumerate(names)], axis=1))
    # Scores as they might be: the rule on criteria drawn from within their intervals, shape (draws, P).
    drawn = standardized(np.tensordot(ranks, weights, axes=(1, 0)))
    of_pairs = standardized(parts.sum(0))
    # Stable: of equal scores the earlier student comes first, then the earlier teacher.
    rich = [richest_first and by_layer[teacher].ties_with_best for _, teacher in evidence.pairs]
    order = sorted(admissible, key=lambda i: (not rich[i], -of_pairs[i]))
    first = order[0]
    ties = [
        i
        for i in order
        if rich[i] == rich[first] and (i == first or np.quantile(drawn[:, first] - drawn[:, i], 0.025) <= 0)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    pick = max(ties, key=lambda i: float(low[i]))
    order.sort(key=lambda i: i != pick)
    ranked = []
    for i in order:
        student, teacher = (by_layer[name] for name in evidence.pairs[i])
        gap = evidence.number(gap_criterion, i)
        ranked.append(
            RankedPair(
                student=student.layer,
                teacher=teacher.layer,
                score=float(of_pairs[i]),
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


def scores(evidence: PairEvidence, rule: Mapping[str, float] = RULE) -> Floats:
    """Returns the score of every pair of the evidence by a rule, admissible or not, shape (P,)."""
    return standardized(_parts(evidence, rule).sum(0))


def _parts(evidence: PairEvidence, rule: Mapping[str, float]) -> Floats:
    """What each criterion adds to the scores before these are scaled, shape (criteria, P)."""
    ranks = standard_ranks(np.stack([evidence.columns(name)[0] for name in rule]))
    parts: Floats = np.array(list(rule.values()))[:, None] * ranks
    return parts


def _against_network(evidence: PairEvidence, limits: PairLimits) -> list[Objection]:
    """Objections against every pair of a network."""
    against = []
    if min(evidence.noise_levels, default=0.0) >= 1:
        against.append(Objection("nothing but noise", value=min(evidence.noise_levels)))
    cka = evidence.columns(CKA)[0]
    least = float(np.nanmin(cka)) if np.isfinite(cka).any() else math.nan
    if least > ALIKE and limits.max_cka < 1:
        against.append(Objection("all layers alike", CKA, least, limit=ALIKE))
    return against


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


def _cautions(
    ranked: Sequence[RankedPair],
    evidence: PairEvidence,
    gap: str,
    basis: SelectionBasis,
    label_free: bool,
    shapes: Mapping[str, Sequence[int]],
) -> list[Caution]:
    cautions = [Caution("no labels")] if label_free else []
    if gap == RANK_GAP:
        cautions.append(Caution("effective rank counts noise"))
    if evidence.pairs and not evidence.has(TEACHER_NEED):
        cautions.append(Caution("needs not measured"))
    if ranked and ranked[0].gap_is_certain is False:
        cautions.append(Caution("gap within the uncertainty"))
    ties = sum(pair.ties_with_first for pair in ranked)
    if ties:
        cautions.append(Caution("ties with the pick", value=ties))
    if len(ranked) == 1:
        cautions.append(Caution("only one pair"))
    if ranked:
        first = ranked[0]
        if first.mean_cka > ALIKE:
            cautions.append(Caution("alike", CKA, value=first.mean_cka, limit=ALIKE))
        if not first.teacher_is_best:
            cautions.append(Caution("teacher not the richest", value=first.teacher_quality))
        if len(evidence.layers) < FEWEST_BLOCKS:
            cautions.append(Caution("shallower than published", value=len(evidence.layers), limit=FEWEST_BLOCKS))
        width = shapes[first.student][-1] if first.student in shapes else NARROWEST_TOKENS
        if width < NARROWEST_TOKENS:
            cautions.append(Caution("narrower than published", value=width, limit=NARROWEST_TOKENS))
        cautions += near_controls(evidence.layer_number(PROBE, first.teacher), basis)
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
