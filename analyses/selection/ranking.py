"""Which layer should teach which: from the evidence table to ranked pairs, what each may bring, and "none".

A pick is a hypothesis and `confirm` is the verdict: a layer that knows much is not always a good teacher. Under REPA
a deeper alignment raised probe accuracy and worsened FID (arXiv:2410.06940, Table 2), and so far nobody has published
an automatic picker for self-alignment. So every number that a ranking rests on stands beside it, and every pair that
was refused has its reason.

First, what a pair must be, for any ordered list of layers:

- **No teacher in the tail**, the whole layers of the last 20 %: they turn back from content to pixels, and the
  teachers of all pairs published for LayerSync come before.
- **No student among the first layers**, the whole ones of a tenth: none of fewer than ten.
- **The student comes before its teacher and is not stronger** beyond the uncertainty: by probe accuracy, without labels
  by noise-LiDAR.
- **Distance**: at least a quarter of the depth. Close pairs gained least in LayerSync's own comparison of depths.
- **Not alike already**: CKA between the two at equal noise levels, averaged, is at most 0.9. In a network whose pairs
  all lie above, alignment cost quality (docs/picking.md).
- **Out of linear reach**: where tokens were kept, a ridge regression from the student's tokens misses at least 5 % of
  what the teacher adds (the recoverability gap), beyond the uncertainty.
- **The network needs its teacher**: without the layer its loss rises, beyond the uncertainty. A layer that does
  nothing, repeats another one or was damaged has nothing to teach, whatever a probe reads from the stream that passes.

Pairs that pass are ranked by a **rule**, a weighted sum of criteria. Each criterion is turned into ranks among all
pairs of the network, of mean 0 and variance 1, since sizes differ too much between models to be compared; the score is
the sum at mean 0 and variance 1. Which criteria with which weights stands in the constants below. Where a rule was
calibrated on pair atlases it also says what gain to expect, and how far to trust that. A pair whose expected gain lies
below 0 beyond the uncertainty is not picked: none is worth it then.

**Ties**: the intervals of the criteria (and, if calibrated, what the rule leaves unexplained) tell which pairs cannot
be told from the first one. Of those the one whose score is largest at the lower end of its uncertainty is picked, and
the others are reported as ties.

The rule itself needs no labels. Without them noise-LiDAR stands in for the probe where students are compared with
teachers: in how many directions samples differ more than noise moves them. Where features have one noise draw only it
is the effective rank, which also counts the directions of noise. The result says which.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from layerprobe.analyses.measures import Floats
from layerprobe.analyses.selection.pair_means import PairMeans, standard_ranks, standardized
from layerprobe.analyses.tables import (
    CKA,
    CKNNA,
    CRITERIA,
    LIDAR_GAP,
    MODEL,
    NEED_LABELS,
    PROBE,
    RANDOM_WEIGHTS,
    RANK,
    RANK_GAP,
    RAW_INPUT,
    RECOVERABILITY,
    STUDENT_DEPTH,
    TEACHER_NEED,
    table_evidence,
)
from layerprobe.layersync import WEIGHT, LayerPair

HYPOTHESIS = (
    "A pick is a hypothesis; the confirmation run is the verdict. On trial in six small networks the picks of this "
    "rule were worth -8 to +18 % from a slow start, -31 to +2 % from a fair one (docs/picking.md)."
)
LABEL_FREE = "Chosen without labels: noise-LiDAR, not a probe, tells which layer is weaker."


# ---------------------------------------------------------------------------------------------------------- the rules


@dataclass(frozen=True)
class Calibration:
    """What a rule's scores are worth, learned on pair atlases of other models.

    Attributes:
        level: Mean gain of all pairs of a network: the share by which a pair undercuts the score without alignment.
        slope: Gain per unit of score.
        half_width: Of the 95 % interval of an expected gain.
        error: Standard error of the difference between two pairs' gains beyond what the score explains.
        source: Which atlases.
    """

    level: float
    slope: float
    half_width: float
    error: float
    source: str


@dataclass(frozen=True)
class Rule:
    """Which criteria count how much.

    Attributes:
        weights: By criterion; the sign says which end is good.
        calibration: None as long as nothing is known of the rule's worth.
    """

    weights: Mapping[str, float]
    calibration: Calibration | None = None


# Given the depths of both layers, the gap in effective rank goes with the gain in five of six atlases of long
# trainings with a slow start. Nothing that needs labels does (docs/picking.md).
# Recoverability and CKA go with it where alignment pays; weighing the two is RARE's idea.
RULE = Rule({RANK_GAP: 1.0, RECOVERABILITY: 1.0, CKA: -1.0})
# Which end of a criterion is good, where a user names criteria. Those that are not here count as they are.
SMALLER_IS_BETTER = (CKA, CKNNA, STUDENT_DEPTH)


# -------------------------------------------------------------------------------------------------------- the records


@dataclass(frozen=True)
class Criteria:
    """What a selection was made by.

    Attributes:
        metric: What the quality of a layer is: "probe accuracy", "noise-LiDAR", or "effective rank" relative to the
            first layer (in selections of earlier versions to the largest).
        split: The split it was measured on.
        noise_levels: The levels that the criteria are averaged over.
        layers: All layers, in execution order.
        tail: Layers that may not teach.
        head: Layers that may not learn.
        min_distance: In layers.
        max_cka: Largest mean CKA.
        min_gap: Least recoverability gap, where it is known.
        weights: Of the criteria in the score, [name, weight]; none in selections of earlier versions, whose score is
            gap * (1 - CKA).
    """

    metric: str
    split: str
    noise_levels: tuple[float, ...]
    layers: tuple[str, ...]
    tail: tuple[str, ...]
    head: tuple[str, ...]
    min_distance: int
    max_cka: float
    min_gap: float = 0.0
    weights: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class LayerQuality:
    """What a layer knows, as far as the selection cares.

    Attributes:
        layer: Its name.
        quality: Mean over noise levels, None if a level is missing.
        low: Lower end of the 95 % interval; None where there is none.
        high: Upper end.
        may_teach: Whether it has a quality and lies before the tail.
        ties_with_best: Whether it is the best layer that may teach, or within that layer's interval.
        note: Why there is no quality, or "".
    """

    layer: str
    quality: float | None
    low: float | None
    high: float | None
    may_teach: bool = False
    ties_with_best: bool = False
    note: str = ""


@dataclass(frozen=True)
class Part:
    """One criterion of a pair, and what it adds to the score.

    Attributes:
        criterion: Its name.
        value: Mean over noise levels.
        low: Lower end of the 95 % interval; None where there is none.
        high: Upper end.
        adds: To the score.
    """

    criterion: str
    value: float
    low: float | None
    high: float | None
    adds: float


@dataclass(frozen=True)
class RankedPair:
    """An admissible pair and its evidence.

    Attributes:
        student: Name of the layer that would learn.
        teacher: Name of the layer that would teach.
        score: Of the rule: 0 is the mean over all pairs of the network, 1 their standard deviation.
        teacher_quality: Mean over noise levels.
        student_quality: Mean over noise levels.
        gap: Their difference; below 0 only within the uncertainty.
        mean_cka: Between the two at equal noise levels.
        distance: In layers.
        teacher_is_best: Whether the teacher is the best layer that may teach or ties with it.
        gap_is_certain: Whether the interval of the gap lies above 0; None where there is none.
        ties_with_first: Whether it cannot be told from the pick.
        reasons: Short sentences.
        gain: The gain to expect, as a share of the score without alignment; None if the rule is not calibrated.
        gain_low: Lower end of its 95 % interval.
        gain_high: Upper end.
        parts: What the score is the sum of.
        score_low: Lower end of the score's 95 % interval; None in selections of earlier versions.
        score_high: Upper end.
    """

    student: str
    teacher: str
    score: float
    teacher_quality: float
    student_quality: float
    gap: float
    mean_cka: float
    distance: int
    teacher_is_best: bool
    gap_is_certain: bool | None
    ties_with_first: bool
    reasons: tuple[str, ...]
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    parts: tuple[Part, ...] = ()
    score_low: float | None = None
    score_high: float | None = None

    @property
    def pair(self) -> LayerPair:
        """As LayerSync takes it."""
        return LayerPair(self.student, self.teacher)


@dataclass(frozen=True)
class RejectedPair:
    """A pair that is not admissible, and all reasons why."""

    student: str
    teacher: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """Ranked pairs, and everything that speaks for and against them.

    Attributes:
        criteria: What decided.
        label_free: Whether no labels were used.
        ranked: Admissible pairs, the pick first, then by falling score.
        rejected: All other pairs of an earlier and a later layer.
        layers: The quality of each layer, in execution order.
        warnings: What weakens the pick.
        worth_it: Whether the first pair may gain anything; if not, there is no pick.
        weight: Of the alignment, to start with.
        calibration: What the expected gains rest on, or "".
    """

    criteria: Criteria
    label_free: bool
    ranked: tuple[RankedPair, ...]
    rejected: tuple[RejectedPair, ...]
    layers: tuple[LayerQuality, ...]
    warnings: tuple[str, ...]
    worth_it: bool = True
    weight: float = WEIGHT
    calibration: str = ""

    @property
    def pick(self) -> LayerPair | None:
        """The first pair, or None if none is admissible or worth it."""
        return self.ranked[0].pair if self.ranked and self.worth_it else None

    @property
    def reason(self) -> str:
        """Why the pick is the pick, or why there is none."""
        if self.pick is not None:
            return " ".join(self.ranked[0].reasons)
        if self.ranked:
            first = self.ranked[0]
            return f"No pair is worth it. The best one is {first.pair}. {' '.join(first.reasons)}"
        fewest = min((pair.reasons for pair in self.rejected), key=len, default=("there are fewer than two layers",))
        return f"No admissible pair. Closest to one: {'; '.join(fewest)}."

    def to_json(self) -> str:
        """As in selection.json."""
        pick = {"student": self.pick.student, "teacher": self.pick.teacher} if self.pick else None
        return json.dumps(
            {"pick": pick, "reason": self.reason, "status": HYPOTHESIS} | asdict(self), indent=1, allow_nan=False
        )

    @classmethod
    def from_json(cls, text: str) -> Selection:
        """The selection that `to_json` wrote, in this version or an earlier one.

        Raises:
            ValueError: If the text is something else.
        """
        try:
            record = json.loads(text)
            criteria = dict(record["criteria"])
            criteria["weights"] = tuple((name, weight) for name, weight in criteria.get("weights", ()))
            later = {name: record[name] for name in ("worth_it", "weight", "calibration") if name in record}
            return cls(
                criteria=_record(Criteria, criteria),
                label_free=record["label_free"],
                ranked=tuple(_ranked_pair(pair) for pair in record["ranked"]),
                rejected=tuple(_record(RejectedPair, pair) for pair in record["rejected"]),
                layers=tuple(_record(LayerQuality, layer) for layer in record["layers"]),
                warnings=tuple(record["warnings"]),
                **later,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is not a selection ({error}); run `layerprobe select` again") from error


# ---------------------------------------------------------------------------------------------------------- selecting


def select(quality: pd.DataFrame, similarity: pd.DataFrame, layers: Sequence[str], **options: Any) -> Selection:
    """Ranks pairs from the quality and the similarity table alone, for runs that have kept nothing else.

    Args:
        quality: As `measure` returns it.
        similarity: As `measure` returns it.
        layers: Names in execution order.
        options: As in `rank_pairs`.

    Raises:
        ValueError: If a layer or a noise level is missing in a table, or as `rank_pairs`.
    """
    if len(set(layers)) < len(layers):
        raise ValueError(f"a layer is named twice in {', '.join(layers)}; name each once, in execution order")
    metric = RANK if options.get("label_free") else PROBE
    evidence = table_evidence(quality, similarity, layers, metric=metric, shapes=options.get("shapes"))
    selection = rank_pairs(evidence, layers=layers, **options)
    return replace(selection, warnings=(*selection.warnings, *cautions(selection, quality)))


def rank_pairs(
    evidence: pd.DataFrame,
    *,
    layers: Sequence[str] | None = None,
    label_free: bool = False,
    rule: Rule | None = None,
    criteria: Sequence[str] | None = None,
    exclude_tail: float = 0.2,
    skip_first: int | None = None,
    min_distance: int | None = None,
    max_cka: float = 0.9,
    min_gap: float = 0.05,
    num_pairs: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Selection:
    """Ranks the pairs in which an earlier layer could learn from a later one.

    The rule and its reasons stand at the top of this module. That no pair is admissible, or worth it, is an answer too.

    Args:
        evidence: As `pair_evidence` returns it.
        layers: Names in execution order; those of the table if not given. They need not be a chain of equal blocks.
        label_free: Use nothing that needs labels.
        rule: `RULE` if not given.
        criteria: Rank by these with equal weights, in place of a rule.
        exclude_tail: Fraction of the layers, rounded down to whole ones, that may not teach.
        skip_first: Number of first layers that may not learn; the whole ones of a tenth of the depth if not given.
        min_distance: In layers; a quarter of the depth, at least 2, if not given.
        max_cka: Pairs with a larger mean CKA count as aligned already.
        min_gap: Least recoverability gap; the lower end of its interval must reach it.
        num_pairs: How many ranked pairs to keep; all if not given.
        shapes: (tokens, width) of each layer, to say why a pair is not in the table.

    Raises:
        ValueError: If the table lacks what the rule needs, a criterion is not known, or an argument is out of range.
    """
    counts = {"skip_first": (skip_first, 0), "min_distance": (min_distance, 1), "num_pairs": (num_pairs, 1)}
    _check(exclude_tail, counts)
    rule = _named_criteria(criteria, label_free) if criteria else rule or RULE
    means = PairMeans(evidence, layers, label_free=label_free)
    rule, missing = _usable(rule, means)
    if criteria and missing:
        raise ValueError(f"the evidence has no {missing[0]}; name other criteria, or extract more")
    depth = len(means.layers)
    limits = Criteria(
        metric=means.metric,
        split="train and validation" if label_free else "validation",
        noise_levels=means.noise_levels,
        layers=means.layers,
        tail=means.layers[depth - int(exclude_tail * depth + 1e-9) :],
        head=means.layers[: int(0.1 * depth + 1e-9) if skip_first is None else skip_first],
        min_distance=max(2, round(0.25 * depth)) if min_distance is None else min_distance,
        max_cka=max_cka,
        min_gap=min_gap,
        weights=tuple(rule.weights.items()),
    )
    admissible, rejected = [], []
    for pair in combinations(means.layers, 2):
        against = _against(pair, means, limits) if pair in means else (_why_absent(*pair, shapes or {}),)
        if against:
            rejected.append(RejectedPair(*pair, against))
        else:
            admissible.append(pair)
    qualities = _qualities(means, limits)
    ranked = _ranked(means, rule, admissible, qualities) if admissible else ()
    return Selection(
        criteria=limits,
        label_free=label_free,
        ranked=ranked[:num_pairs],
        rejected=tuple(rejected),
        layers=tuple(qualities),
        warnings=(*_warnings(ranked, means, label_free), *(f"Ranked without {what}." for what in missing)),
        worth_it=not (ranked and ranked[0].gain_high is not None and ranked[0].gain_high < 0),
        calibration=rule.calibration.source if rule.calibration else "",
    )


def cautions(selection: Selection, quality: pd.DataFrame) -> list[str]:
    """What the quality table has against a selection: probes that did not converge, controls that know as much."""
    limits = selection.criteria
    found: list[str] = []
    if selection.label_free:
        return found
    ours = _rows(quality, MODEL, limits)
    unfinished = ours["note"].str.contains("did not converge").sum()
    if unfinished:
        found.append(f"{unfinished} of {len(ours)} probes did not converge.")
    for source in (RANDOM_WEIGHTS, RAW_INPUT) if selection.ranked else ():
        rows = _rows(quality, source, limits)
        if rows.empty:
            continue
        first, mean = selection.ranked[0], float(rows.groupby("layer")["value"].mean().max())
        if first.teacher_quality <= mean:
            figures = f"{first.teacher_quality:.3f} against {mean:.3f}"
            found.append(f"{first.teacher} does not beat the control {source!r}: {figures}.")
    return found


def _rows(quality: pd.DataFrame, source: str, limits: Criteria) -> pd.DataFrame:
    """What decided, of a source."""
    rows = quality[(quality["source"] == source) & (quality["metric"] == limits.metric)]
    return rows[(rows["split"] == limits.split) & rows["noise_level"].isin(limits.noise_levels)]


# ------------------------------------------------------------------------------------------------- what a pair must be


def _check(exclude_tail: float, counts: Mapping[str, tuple[int | None, int]]) -> None:
    if not 0 <= exclude_tail < 1:
        raise ValueError(f"exclude_tail is {exclude_tail}; pass a fraction of the layers, at least 0 and below 1")
    for name, (count, smallest) in counts.items():
        if count is not None and count < smallest:
            raise ValueError(f"{name} is {count}; pass {smallest} or more, or None for the default")


def _named_criteria(names: Sequence[str], label_free: bool) -> Rule:
    """Equal weights, each with the sign that its criterion has."""
    for name in names:
        if name not in CRITERIA:
            raise ValueError(f"there is no criterion {name!r}; use some of {', '.join(CRITERIA)}")
        if label_free and name in NEED_LABELS:
            raise ValueError(f"{name!r} needs labels; leave it out, or leave out label_free")
    return Rule({name: -1.0 if name in SMALLER_IS_BETTER else 1.0 for name in names})


def _usable(rule: Rule, means: PairMeans) -> tuple[Rule, list[str]]:
    """The rule as far as the table goes, and what it has to do without, each with the reason.

    Without noise-LiDAR the effective rank stands in for it. What was learned of a whole rule does not hold for a part.
    """
    stand_in = {LIDAR_GAP: RANK_GAP} if means.gap == RANK_GAP else {}
    weights = {stand_in.get(name, name): weight for name, weight in rule.weights.items()}
    found = {name: weight for name, weight in weights.items() if means.has(name)}
    pairs = means.pairs[:1]
    missing = [f"{name} ({means.number(name, pair).note})" for name in weights if name not in found for pair in pairs]
    return Rule(found, rule.calibration if found == dict(rule.weights) else None), missing


def _why_absent(student: str, teacher: str, shapes: Mapping[str, Sequence[int]]) -> str:
    ours, theirs = shapes.get(student), shapes.get(teacher)
    if ours is None or theirs is None:
        return "the evidence has no such pair"
    sizes = [" x ".join(map(str, shape)) for shape in (ours, theirs)]
    return f"their tokens differ in shape: {student} gives {sizes[0]}, {teacher} {sizes[1]}"


def _against(pair: tuple[str, str], means: PairMeans, limits: Criteria) -> tuple[str, ...]:
    """All that speaks against a pair; empty if it is admissible."""
    (student, teacher), distance, against = pair, means.distance(pair), []
    if teacher in limits.tail:
        against.append(f"{teacher} is among the last {_count(limits.tail)}, which decode")
    if student in limits.head:
        against.append(f"{student} is among the first {_count(limits.head)}, which only take in the input")
    if distance < limits.min_distance:
        against.append(f"they are {distance} apart, and at least {limits.min_distance} is asked for")
    against += _without_value(pair, means, limits)
    if means.number(means.gap, pair).possibly <= 0:
        known, taught = (means.quality(layer).value for layer in pair)
        against.append(f"{student} is not weaker than {teacher}: {means.metric} {known:.3f} against {taught:.3f}")
    cka = means.number(CKA, pair).value
    if cka > limits.max_cka:
        against.append(f"they are aligned already: mean CKA {cka:.3f}, above {limits.max_cka:g}")
    gap = means.number(RECOVERABILITY, pair)
    if gap.surely < limits.min_gap:
        figures = f"the gap is {gap.value:.3f}, its interval begins at {gap.surely:.3f}"
        against.append(f"what the teacher adds is within the student's linear reach: {figures}")
    need = means.number(TEACHER_NEED, pair)
    if need.surely <= 0:
        figures = f"without it the loss rises by {need.value:.4f} ({need.low:.4f} to {need.high:.4f})"
        against.append(f"the network does not need {teacher}: {figures}")
    return tuple(against)


def _without_value(pair: tuple[str, str], means: PairMeans, limits: Criteria) -> list[str]:
    """What the rule needs of a pair and the table has not, each reason once."""
    needed = dict.fromkeys((means.gap, CKA, *(name for name, _ in limits.weights)))
    found = [(name, means.number(name, pair)) for name in needed]
    reasons = {number.note: name for name, number in reversed(found) if math.isnan(number.value)}
    return [f"there is no {name}: {note}" for note, name in reversed(reasons.items())]


def _count(layers: Sequence[str]) -> str:
    return "layer" if len(layers) == 1 else f"{len(layers)} layers"


def _qualities(means: PairMeans, limits: Criteria) -> list[LayerQuality]:
    """Of every layer."""
    known = []
    for layer in means.layers:
        number = means.quality(layer)
        if math.isnan(number.value):
            known.append(LayerQuality(layer, None, None, None, note=number.note))
        else:
            known.append(LayerQuality(layer, number.value, *number.ends, may_teach=layer not in limits.tail))
    able = [layer for layer in known if layer.may_teach]
    if not able:
        return known
    best = max(able, key=_quality)
    floor = _quality(best) if best.low is None else best.low
    return [replace(layer, ties_with_best=layer.may_teach and _quality(layer) >= floor) for layer in known]


def _quality(layer: LayerQuality) -> float:
    assert layer.quality is not None
    return layer.quality


# --------------------------------------------------------------------------------------------------------- the ranking


def _ranked(
    means: PairMeans, rule: Rule, admissible: Sequence[tuple[str, str]], qualities: Sequence[LayerQuality]
) -> tuple[RankedPair, ...]:
    """Admissible pairs, the pick first."""
    names, weights = list(rule.weights), np.array(list(rule.weights.values()))
    parts = weights[:, None] * standard_ranks(np.stack([means.values(name) for name in names]))
    size = parts.sum(0).std() or 1.0
    ranks = standard_ranks(np.stack([means.drawn(name, seed=i) for i, name in enumerate(names)], axis=1))
    # As they might be: what the rule says of criteria drawn from within their intervals, shape (draws, P).
    drawn = standardized(np.tensordot(ranks, weights, axes=(1, 0)))
    scores = standardized(parts.sum(0))
    # Stable: of equal scores the earlier student comes first, then the earlier teacher.
    order = sorted((means.place(pair) for pair in admissible), key=lambda i: -scores[i])
    ties = _ties(order, scores, drawn, rule.calibration)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    pick = max(ties, key=lambda i: float(low[i]))
    order.sort(key=lambda i: i != pick)
    by_layer = {layer.layer: layer for layer in qualities}
    best = max((layer for layer in qualities if layer.may_teach), key=_quality)
    ranked = []
    for i in order:
        pair = means.pairs[i]
        student, teacher = (by_layer[name] for name in pair)
        gap = means.number(means.gap, pair)
        found = RankedPair(
            student=student.layer,
            teacher=teacher.layer,
            score=float(scores[i]),
            teacher_quality=_quality(teacher),
            student_quality=_quality(student),
            gap=_quality(teacher) - _quality(student),
            mean_cka=means.number(CKA, pair).value,
            distance=means.distance(pair),
            teacher_is_best=teacher.ties_with_best,
            gap_is_certain=None if math.isnan(gap.low) else gap.low > 0,
            ties_with_first=i != pick and i in ties,
            reasons=(),
            **_gain(float(scores[i]), rule.calibration),
            parts=tuple(
                _part(name, means, pair, float(adds[i] / size)) for name, adds in zip(names, parts, strict=True)
            ),
            score_low=float(low[i]),
            score_high=float(high[i]),
        )
        ranked.append(replace(found, reasons=_reasons(found, best, means.metric)))
    return tuple(ranked)


def _part(name: str, means: PairMeans, pair: tuple[str, str], adds: float) -> Part:
    number = means.number(name, pair)
    return Part(name, number.value, *number.ends, adds)


def _ties(order: Sequence[int], scores: Floats, drawn: Floats, calibration: Calibration | None) -> list[int]:
    """The pair with the largest score, and those that cannot be told from it."""
    top, ties = order[0], []
    for i in order:
        close = calibration is not None and calibration.slope * (scores[top] - scores[i]) < calibration.error
        if i == top or close or np.quantile(drawn[:, top] - drawn[:, i], 0.025) <= 0:
            ties.append(i)
    return ties


def _gain(score: float, calibration: Calibration | None) -> dict[str, float]:
    """What a pair may bring, by the names of `RankedPair`; nothing where that is not known."""
    if calibration is None:
        return {}
    gain, half = calibration.level + calibration.slope * score, calibration.half_width
    return {"gain": gain, "gain_low": gain - half, "gain_high": gain + half}


def _reasons(pair: RankedPair, best: LayerQuality, metric: str) -> tuple[str, ...]:
    own = f"{metric} {pair.teacher_quality:.3f}"
    if pair.teacher == best.layer:
        reasons = [f"{pair.teacher} is the best layer that may teach: {own}."]
    elif pair.teacher_is_best:
        reasons = [f"{pair.teacher} ties with {best.layer}, the best that may teach: {own} and {_quality(best):.3f}."]
    else:
        reasons = [f"{pair.teacher} knows less than {best.layer}: {own} against {_quality(best):.3f}."]
    uncertain = ", which is within the uncertainty" if pair.gap_is_certain is False else ""
    reasons.append(f"{pair.student} is {abs(pair.gap):.3f} {'weaker' if pair.gap >= 0 else 'stronger'}{uncertain}.")
    apart = f"They are {pair.distance} layers apart, and their mean CKA at equal noise levels is {pair.mean_cka:.3f}."
    reasons.append(apart)
    if pair.gain is not None:
        interval = f"95 % interval {pair.gain_low:+.1%} to {pair.gain_high:+.1%}"
        reasons.append(f"The gain to expect is {pair.gain:+.1%} ({interval}).")
    if pair.ties_with_first:
        reasons.append("It cannot be told from the first pair.")
    return tuple(reasons)


def _warnings(ranked: Sequence[RankedPair], means: PairMeans, label_free: bool) -> list[str]:
    warnings = [LABEL_FREE] if label_free else []
    if means.gap == RANK_GAP:
        warnings.append("The effective rank stands in for noise-LiDAR; it also counts the directions of noise.")
    if means.pairs and not means.has(TEACHER_NEED):
        warnings.append("Whether the network needs its layers was not measured.")
    if not ranked:
        return warnings
    first = ranked[0]
    if first.gap_is_certain is False:
        gap = f"The gap between {first.student} and {first.teacher} is within the uncertainty"
        warnings.append(f"{gap}; score more samples.")
    ties = sum(pair.ties_with_first for pair in ranked)
    if ties:
        others = "1 other pair" if ties == 1 else f"{ties} other pairs"
        warnings.append(f"{others} cannot be told from the first one; score more samples.")
    return warnings


_T = TypeVar("_T")


def _record(kind: type[_T], fields: Mapping[str, Any]) -> _T:
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def _ranked_pair(fields: Mapping[str, Any]) -> RankedPair:
    parts = tuple(_record(Part, part) for part in fields.get("parts", ()))
    return _record(RankedPair, dict(fields) | {"parts": parts})
