"""Which layer should teach which: from the quality and similarity tables to ranked pairs with their evidence.

A pick is a hypothesis and `confirm` is the verdict: a layer that knows much is not always a good teacher. Under REPA
a deeper alignment raised probe accuracy and worsened FID (arXiv:2410.06940, Table 2), and so far nobody has published
an automatic picker for self-alignment. So every number that a ranking rests on stands beside it, and every pair that
was refused has its reason.

The rule, for any ordered list of layers:

- **Quality** of a layer is its probe accuracy on the split "choose", averaged over noise levels. "report" stays
  untouched, so the numbers shown for the pick are not inflated by having been picked.
- **No teacher in the tail**, the last 20 % of the layers: they turn back from content to pixels, and the teachers of
  all pairs published for LayerSync come before.
- **No student among the first layers** (a tenth, at least one): LayerSync skips them too.
- **The student comes before its teacher and is weaker.**
- **Distance**: at least a quarter of the depth. Close pairs gained least in LayerSync's own comparison of depths.
- **Not aligned already**: CKA between the two at equal noise levels, averaged, is at most 0.98. This only excludes
  layers that are the same up to rotation; below it the score weighs CKA. (In a CIFAR-10 SiT after 3000 steps all pairs
  of eight blocks lie between 0.94 and 0.995.) In the RARE study (2026) the benefit of an external teacher fell with its
  CKA to the student (rank correlation -0.85) and rose with what the student could not predict of it (+0.92). Nobody
  has tested that on self-teachers.

Pairs that pass are ranked first by whether their teacher is the best one or cannot be told from it within the
bootstrap interval, then by `score = (quality of teacher - quality of student) * (1 - CKA)`: what the student lacks,
as far as it is not there already.

Without labels, quality is the effective rank, divided at each noise level by the largest among the layers. It counts
directions, whatever they carry, and is weaker evidence; the result says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from layerprobe.analyses.measurements import PROBE, RANK
from layerprobe.analyses.quality import MODEL, RANDOM_WEIGHTS, RAW_INPUT
from layerprobe.layersync import LayerPair

HYPOTHESIS = "A pick is a hypothesis; the confirmation run is the verdict."
LABEL_FREE = (
    "Chosen without labels, by effective rank, which also counts the directions of noise: weaker evidence than a probe."
)


@dataclass(frozen=True)
class Criteria:
    """What a selection was made by.

    Attributes:
        metric: "probe accuracy", or "effective rank" relative to the largest of the layers.
        split: The split it was measured on.
        noise_levels: The levels that quality and CKA are averaged over.
        layers: All layers, in execution order.
        tail: Layers that may not teach.
        head: Layers that may not learn.
        min_distance: In layers.
        max_cka: Largest mean CKA.
    """

    metric: str
    split: str
    noise_levels: tuple[float, ...]
    layers: tuple[str, ...]
    tail: tuple[str, ...]
    head: tuple[str, ...]
    min_distance: int
    max_cka: float


@dataclass(frozen=True)
class LayerQuality:
    """What a layer knows, as far as the selection cares.

    Attributes:
        layer: Its name.
        quality: Mean over noise levels, None if a level is missing.
        low: Mean of the lower ends of the 95 % intervals; None where there are none. As the same samples are scored
            at all levels this is somewhat wider than an interval of the mean.
        high: Mean of the upper ends.
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
class RankedPair:
    """An admissible pair and its evidence.

    Attributes:
        student: Name of the layer that would learn.
        teacher: Name of the layer that would teach.
        score: gap * (1 - mean_cka).
        teacher_quality: Mean over noise levels.
        student_quality: Mean over noise levels.
        gap: Their difference, above 0.
        mean_cka: Between the two at equal noise levels.
        distance: In layers.
        teacher_is_best: Whether the teacher is the best layer that may teach or ties with it.
        gap_is_certain: Whether the intervals of the two are disjoint; None where there are no intervals.
        ties_with_first: Whether it comes after the first pair by less than the uncertainty of that pair's gap.
        reasons: Short sentences.
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
        ranked: Admissible pairs, best first.
        rejected: All other pairs of an earlier and a later layer.
        layers: The quality of each layer, in execution order.
        warnings: What weakens the pick.
    """

    criteria: Criteria
    label_free: bool
    ranked: tuple[RankedPair, ...]
    rejected: tuple[RejectedPair, ...]
    layers: tuple[LayerQuality, ...]
    warnings: tuple[str, ...]

    @property
    def pick(self) -> LayerPair | None:
        """The first pair, or None if none is admissible."""
        return self.ranked[0].pair if self.ranked else None

    @property
    def reason(self) -> str:
        """Why the pick is the pick, or why there is none."""
        if self.ranked:
            return " ".join(self.ranked[0].reasons)
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
        """The selection that `to_json` wrote.

        Raises:
            ValueError: If the text is something else.
        """
        try:
            record = json.loads(text)
            return cls(
                criteria=_record(Criteria, record["criteria"]),
                label_free=record["label_free"],
                ranked=tuple(_record(RankedPair, pair) for pair in record["ranked"]),
                rejected=tuple(_record(RejectedPair, pair) for pair in record["rejected"]),
                layers=tuple(_record(LayerQuality, layer) for layer in record["layers"]),
                warnings=tuple(record["warnings"]),
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is not a selection ({error}); run `layerprobe select` again") from error


def select(
    quality: pd.DataFrame,
    similarity: pd.DataFrame,
    layers: Sequence[str],
    *,
    label_free: bool = False,
    exclude_tail: float = 0.2,
    skip_first: int | None = None,
    min_distance: int | None = None,
    max_cka: float = 0.98,
    num_pairs: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Selection:
    """Ranks the pairs in which an earlier layer could learn from a later one.

    The rule and its reasons stand at the top of this module. That no pair is admissible is an answer too: `ranked` is
    then empty and `reason` says why.

    Args:
        quality: As `measure` returns it; the rows of the controls only give warnings.
        similarity: As `measure` returns it.
        layers: Names in execution order; they need not be a chain of equal blocks. Of a U-Net pass the layers of one
            shape, since LayerSync aligns equal shapes only.
        label_free: Use the effective rank instead of the probe.
        exclude_tail: Fraction of the layers, rounded up, that may not teach.
        skip_first: Number of first layers that may not learn; a tenth of the depth, at least 1, if not given.
        min_distance: In layers; a quarter of the depth, at least 2, if not given.
        max_cka: Pairs with a larger mean CKA count as aligned already.
        num_pairs: How many ranked pairs to keep; all if not given.
        shapes: (tokens, width) of each layer; layers of unequal shapes cannot be aligned. All equal if not given.

    Raises:
        ValueError: If a layer or a noise level is missing in a table, or an argument is out of range.
    """
    _check(
        layers,
        exclude_tail,
        {"skip_first": (skip_first, 0), "min_distance": (min_distance, 1), "num_pairs": (num_pairs, 1)},
    )
    depth = len(layers)
    metric, split = (RANK, "fit") if label_free else (PROBE, "choose")
    rows = _rows(quality, MODEL, metric, split)
    levels = tuple(sorted(float(level) for level in rows["noise_level"].unique()))
    tail = math.ceil(exclude_tail * depth - 1e-9)
    criteria = Criteria(
        metric=metric,
        split=split,
        noise_levels=levels,
        layers=tuple(layers),
        tail=tuple(layers[depth - tail :]),
        head=tuple(layers[: max(1, round(0.1 * depth)) if skip_first is None else skip_first]),
        min_distance=max(2, round(0.25 * depth)) if min_distance is None else min_distance,
        max_cka=max_cka,
    )
    known = _layer_qualities(rows, criteria, relative=label_free)
    similar = _mean_cka(similarity, criteria)
    candidates, rejected = [], []
    for i, student in enumerate(known):
        for distance, teacher in enumerate(known[i + 1 :], 1):
            candidate = _Candidate(student, teacher, similar[student.layer, teacher.layer], distance)
            against = _against(candidate, criteria) + _shape_mismatch(student.layer, teacher.layer, shapes or {})
            if against:
                rejected.append(RejectedPair(student.layer, teacher.layer, against))
            else:
                candidates.append(candidate)
    ranked = _ranked(candidates, known, criteria)
    return Selection(
        criteria=criteria,
        label_free=label_free,
        ranked=ranked[:num_pairs],
        rejected=tuple(rejected),
        layers=tuple(known),
        warnings=tuple(_warnings(ranked, quality, rows, criteria, label_free)),
    )


def _check(layers: Sequence[str], exclude_tail: float, counts: Mapping[str, tuple[int | None, int]]) -> None:
    if len(set(layers)) < len(layers):
        raise ValueError(f"a layer is named twice in {', '.join(layers)}; name each once, in execution order")
    if not 0 <= exclude_tail < 1:
        raise ValueError(f"exclude_tail is {exclude_tail}; pass a fraction of the layers, at least 0 and below 1")
    for name, (count, smallest) in counts.items():
        if count is not None and count < smallest:
            raise ValueError(f"{name} is {count}; pass {smallest} or more, or None for the default")


def _rows(quality: pd.DataFrame, source: str, metric: str, split: str) -> pd.DataFrame:
    rows = quality[(quality["source"] == source) & (quality["metric"] == metric) & (quality["split"] == split)]
    if source == MODEL and rows.empty:
        cure = "select without labels" if metric == PROBE else "run the analyses on the model"
        raise ValueError(f"the quality table has no {metric} of the model on the split {split!r}; {cure}")
    return rows


def _layer_qualities(rows: pd.DataFrame, criteria: Criteria, *, relative: bool) -> list[LayerQuality]:
    if relative:
        ours = rows[rows["layer"].isin(criteria.layers)]
        rows = rows.assign(value=rows["value"] / rows["noise_level"].map(ours.groupby("noise_level")["value"].max()))
    known = [_layer_quality(rows[rows["layer"] == layer], layer, criteria) for layer in criteria.layers]
    able = [layer for layer in known if layer.may_teach]
    if not able:
        return known
    best = max(able, key=_quality)
    floor = _quality(best) if best.low is None else best.low
    return [replace(layer, ties_with_best=layer.may_teach and _quality(layer) >= floor) for layer in known]


def _layer_quality(rows: pd.DataFrame, layer: str, criteria: Criteria) -> LayerQuality:
    by_level = rows.set_index("noise_level")
    absent = [level for level in criteria.noise_levels if level not in by_level.index]
    if absent:
        seen = f"no {criteria.metric} of {layer} at noise level {absent[0]}"
        raise ValueError(f"the quality table has {seen}; measure all layers alike")
    values = by_level["value"]
    if values.isna().any():
        level = values.index[values.isna()][0]
        note = f"{layer} has no {criteria.metric} at noise level {level}: {by_level.loc[level, 'note']}"
        return LayerQuality(layer, None, None, None, note=note)
    low, high = (None if by_level[end].isna().any() else float(by_level[end].mean()) for end in ("low", "high"))
    return LayerQuality(layer, float(values.mean()), low, high, may_teach=layer not in criteria.tail)


def _quality(layer: LayerQuality) -> float:
    assert layer.quality is not None
    return layer.quality


def _mean_cka(similarity: pd.DataFrame, criteria: Criteria) -> dict[tuple[str, str], float]:
    """CKA of each earlier and later layer at equal noise levels, averaged; nan if a level has none."""
    equal = similarity[similarity["noise_level_a"] == similarity["noise_level_b"]]
    table = {
        (a, b, level): cka for a, b, level, cka in equal[["layer_a", "layer_b", "noise_level_a", "cka"]].to_numpy()
    }
    means = {}
    for i, student in enumerate(criteria.layers):
        for teacher in criteria.layers[i + 1 :]:
            absent = [level for level in criteria.noise_levels if (student, teacher, level) not in table]
            if absent:
                seen = f"no CKA between {student} and {teacher} at noise level {absent[0]}"
                raise ValueError(f"the similarity table has {seen}; measure both tables in one run")
            means[student, teacher] = fmean(table[student, teacher, level] for level in criteria.noise_levels)
    return means


class _Candidate(NamedTuple):
    student: LayerQuality
    teacher: LayerQuality
    cka: float
    distance: int

    @property
    def gap(self) -> float:
        return _quality(self.teacher) - _quality(self.student)

    @property
    def score(self) -> float:
        return self.gap * (1 - self.cka)

    @property
    def uncertainty(self) -> float:
        """Of the score, from the intervals of the two qualities as if they were independent; 0 where there are none."""
        widths = [
            layer.high - layer.low
            for layer in (self.student, self.teacher)
            if layer.high is not None and layer.low is not None
        ]
        return math.hypot(*widths) / 2 * (1 - self.cka)


def _against(candidate: _Candidate, criteria: Criteria) -> tuple[str, ...]:
    """All that speaks against a pair; empty if it is admissible."""
    student, teacher, cka, distance = candidate
    against = [layer.note for layer in (student, teacher) if layer.note]
    if teacher.layer in criteria.tail:
        against.append(f"{teacher.layer} is among the last {_count(criteria.tail)}, which decode")
    if student.layer in criteria.head:
        against.append(f"{student.layer} is among the first {_count(criteria.head)}, which only take in the input")
    if distance < criteria.min_distance:
        against.append(f"they are {distance} apart, and at least {criteria.min_distance} is asked for")
    if not (student.note or teacher.note) and candidate.gap <= 0:
        figures = f"{_quality(student):.3f} against {_quality(teacher):.3f}"
        against.append(f"{student.layer} is not weaker than {teacher.layer}: {figures}")
    if math.isnan(cka):
        against.append("their CKA is missing at a noise level")
    elif cka > criteria.max_cka:
        against.append(f"they are aligned already: mean CKA {cka:.3f}, above {criteria.max_cka:g}")
    return tuple(against)


def _shape_mismatch(student: str, teacher: str, shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    ours, theirs = tuple(shapes.get(student, ())), tuple(shapes.get(teacher, ()))
    if ours == theirs:
        return ()
    sizes = [" x ".join(map(str, shape)) for shape in (ours, theirs)]
    return (f"their tokens differ in shape: {student} gives {sizes[0]}, {teacher} {sizes[1]}",)


def _count(layers: Sequence[str]) -> str:
    return "layer" if len(layers) == 1 else f"{len(layers)} layers"


def _ranked(
    candidates: Sequence[_Candidate], known: Sequence[LayerQuality], criteria: Criteria
) -> tuple[RankedPair, ...]:
    # Stable: of equal scores the earlier student comes first, then the earlier teacher.
    ordered = sorted(candidates, key=lambda c: (not c.teacher.ties_with_best, -c.score))
    if not ordered:
        return ()
    best = max((layer for layer in known if layer.may_teach), key=_quality)
    first = ordered[0]
    pairs = []
    for c in ordered:
        ties = c is not first and c.teacher.ties_with_best and first.score - c.score < first.uncertainty
        certain = None if c.student.high is None or c.teacher.low is None else c.student.high < c.teacher.low
        pairs.append(
            RankedPair(
                student=c.student.layer,
                teacher=c.teacher.layer,
                score=c.score,
                teacher_quality=_quality(c.teacher),
                student_quality=_quality(c.student),
                gap=c.gap,
                mean_cka=c.cka,
                distance=c.distance,
                teacher_is_best=c.teacher.ties_with_best,
                gap_is_certain=certain,
                ties_with_first=ties,
                reasons=_reasons(c, best, certain, ties, criteria.metric),
            )
        )
    return tuple(pairs)


def _reasons(c: _Candidate, best: LayerQuality, certain: bool | None, ties: bool, metric: str) -> tuple[str, ...]:
    own = f"{'relative ' if metric == RANK else ''}{metric} {_quality(c.teacher):.3f}"
    if c.teacher.layer == best.layer:
        reasons = [f"{c.teacher.layer} is the best layer that may teach: {own}."]
    elif c.teacher.ties_with_best:
        reasons = [
            f"{c.teacher.layer} ties with {best.layer}, the best that may teach: {own} and {_quality(best):.3f}."
        ]
    else:
        reasons = [f"{c.teacher.layer} knows less than {best.layer}: {own} against {_quality(best):.3f}."]
    reasons.append(
        f"{c.student.layer} is {c.gap:.3f} weaker{', which is within the uncertainty' if certain is False else ''}."
    )
    reasons.append(f"They are {c.distance} layers apart, and their mean CKA at equal noise levels is {c.cka:.3f}.")
    if ties:
        reasons.append("Its score is within the uncertainty of the first pair's.")
    return tuple(reasons)


def _warnings(
    ranked: Sequence[RankedPair], quality: pd.DataFrame, rows: pd.DataFrame, criteria: Criteria, label_free: bool
) -> list[str]:
    warnings = [LABEL_FREE] if label_free else []
    unfinished = rows["note"].str.contains("did not converge").sum()
    if unfinished:
        warnings.append(f"{unfinished} of {len(rows)} probes did not converge.")
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
    if not label_free:
        warnings += [
            _control_warning(first, source, mean)
            for source, mean in _control_means(quality, criteria)
            if first.teacher_quality <= mean
        ]
    return warnings


def _control_means(quality: pd.DataFrame, criteria: Criteria) -> list[tuple[str, float]]:
    """The best layer of each control, averaged over the same noise levels."""
    means = []
    for source in (RANDOM_WEIGHTS, RAW_INPUT):
        rows = _rows(quality, source, criteria.metric, criteria.split)
        rows = rows[rows["noise_level"].isin(criteria.noise_levels)]
        if not rows.empty:
            means.append((source, float(rows.groupby("layer")["value"].mean().max())))
    return means


def _control_warning(first: RankedPair, source: str, mean: float) -> str:
    return f"{first.teacher} does not beat the control {source!r}: {first.teacher_quality:.3f} against {mean:.3f}."


_T = TypeVar("_T")


def _record(kind: type[_T], fields: Mapping[str, Any]) -> _T:
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
