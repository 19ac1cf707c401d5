"""Records of a selection: ranked and refused pairs with the numbers behind them.

The records hold numbers and codes. `layerprobe.analyses.wording` turns them into sentences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Literal

from layerprobe.layersync import WEIGHT, LayerPair
from layerprobe.records import parse

_SHOWN = 8  # ranked pairs in a text
_DERIVED = ("pick", "no_pick")  # in selection.json, made from the rest

ObjectionCode = Literal[
    "teacher in the tail",
    "student in the head",
    "student too deep",
    "too close",
    "different shapes",
    "not measured",
    "student not weaker",
    "already alike",
    "within linear reach",
    "teacher not needed",
    "below a control",
    "network does not denoise",
    "nothing but noise",
    "all layers alike",
]
# Objections to the whole run, which stand against each of its pairs.
OF_THE_RUN: tuple[ObjectionCode, ...] = ("network does not denoise", "nothing but noise", "all layers alike")
CautionCode = Literal[
    "no labels",
    "effective rank counts noise",
    "needs not measured",
    "gap within the uncertainty",
    "ties with the pick",
    "only one pair",
    "alike",
    "teacher not the richest",
    "shallower than published",
    "narrower than published",
    "layers named",
    "convention trusted",
    "no controls",
    "criterion not measured",
    "probes not converged",
    "probes at the end of the search",
    "control knows as much",
]
Metric = Literal["probe accuracy", "noise-LiDAR", "effective rank"]


@dataclass(frozen=True)
class Objection:
    """One reason why a pair is refused.

    Attributes:
        code: Code of the reason.
        subject: Criterion, metric or control; "" if the reason needs no measurement.
        value: Value of the pair, or of the run where the reason stands against all of its pairs; None without one.
        low: Lower end of the value's 95 % interval; None without an interval.
        high: Upper end of the value's 95 % interval; None without an interval.
        limit: Limit that the value violates; None without a limit.
        note: Reason for a missing value, the two shapes, or the name of the best convention.
    """

    code: ObjectionCode
    subject: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Caution:
    """One fact that weakens a selection.

    Attributes:
        code: Code of the fact.
        subject: Criterion or source that the caution is about; "" if it is about the selection.
        value: Number of pairs or probes, or the quality of the teacher.
        limit: Number that the value is compared with: all probes, or the best quality of the control.
        note: Reason for a missing value, the verdict of the convention check, or "given" for features alone.
    """

    code: CautionCode
    subject: str = ""
    value: float | None = None
    limit: float | None = None
    note: str = ""


@dataclass(frozen=True)
class SelectionBasis:
    """Settings and data that a selection is based on.

    Attributes:
        metric: Metric of the quality of a layer; noise-LiDAR and effective rank need no labels.
        split: Split or splits on which it was measured.
        noise_levels: Noise levels over which the criteria are averaged.
        layers: All layers, in execution order.
        tail: Layers that may not teach.
        head: First layers, which may not learn.
        late: Layers too deep to learn.
        min_distance: Least number of layers between student and teacher.
        max_cka: Largest mean CKA of a pair.
        min_gap: Least recoverability gap, where it was measured.
        weights: Weights of the criteria in the score, (name, weight).
        controls: Quality of the controls, (name, quality): the best layer with random weights, the raw input, and the
            share of the most frequent class. Empty where no labels are used.
    """

    metric: Metric
    split: str
    noise_levels: tuple[float, ...]
    layers: tuple[str, ...]
    tail: tuple[str, ...]
    head: tuple[str, ...]
    late: tuple[str, ...]
    min_distance: int
    max_cka: float
    min_gap: float
    weights: tuple[tuple[str, float], ...]
    controls: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class LayerQuality:
    """The quality of a layer, averaged over noise levels.

    Attributes:
        layer: Name of the layer.
        quality: Mean over noise levels; None if a level is missing.
        low: Lower end of the 95 % interval; None without an interval.
        high: Upper end of the 95 % interval; None without an interval.
        may_teach: Whether it has a quality, has the shape of another layer, and lies before the tail.
        ties_with_best: Whether it is the best layer that may teach, or within the interval of that layer.
        note: Reason for a missing quality, otherwise "".
    """

    layer: str
    quality: float | None
    low: float | None
    high: float | None
    may_teach: bool = False
    ties_with_best: bool = False
    note: str = ""

    @property
    def measured(self) -> float:
        """Quality of a layer whose quality is not None."""
        assert self.quality is not None
        return self.quality


@dataclass(frozen=True)
class ScorePart:
    """One criterion of a pair and its contribution to the score.

    Attributes:
        criterion: Name of the criterion.
        value: Mean over noise levels.
        low: Lower end of the 95 % interval; None without an interval.
        high: Upper end of the 95 % interval; None without an interval.
        adds: Contribution to the score.
    """

    criterion: str
    value: float
    low: float | None
    high: float | None
    adds: float


@dataclass(frozen=True)
class RankedPair:
    """An admissible pair and the numbers that rank it.

    Attributes:
        student: Layer that would learn.
        teacher: Layer that would teach.
        score: Score by the rule, in standard deviations from the mean over all pairs of the network.
        score_low: Lower end of the 95 % interval of the score.
        score_high: Upper end of the 95 % interval of the score.
        parts: Criteria, whose contributions sum to the score.
        teacher_quality: Quality of the teacher, averaged over noise levels.
        student_quality: Quality of the student, averaged over noise levels.
        gap: Quality of the teacher minus that of the student.
        gap_is_certain: Whether the interval of the gap lies above 0; None without an interval.
        mean_cka: CKA between the two at equal noise levels, averaged.
        distance: Number of layers from the student to the teacher.
        teacher_is_best: Whether the teacher is the best layer that may teach, or ties with it.
        ties_with_first: Whether it is another pair than the pick, and the data cannot tell the two apart.
    """

    student: str
    teacher: str
    score: float
    score_low: float
    score_high: float
    parts: tuple[ScorePart, ...]
    teacher_quality: float
    student_quality: float
    gap: float
    gap_is_certain: bool | None
    mean_cka: float
    distance: int
    teacher_is_best: bool
    ties_with_first: bool

    @property
    def pair(self) -> LayerPair:
        """Pair in the form that LayerSync takes."""
        return LayerPair(self.student, self.teacher)


@dataclass(frozen=True)
class RejectedPair:
    """A pair that is not admissible.

    Attributes:
        student: Layer that would learn.
        teacher: Layer that would teach.
        objections: All reasons against the pair.
    """

    student: str
    teacher: str
    objections: tuple[Objection, ...]


@dataclass(frozen=True, repr=False)
class Selection:
    """Ranked pairs, refused pairs, and what weakens the pick.

    Attributes:
        basis: Settings and data of the selection.
        label_free: Whether no labels were used.
        ranked: Admissible pairs, the pick first, then in descending order of score.
        rejected: All other pairs of an earlier and a later layer.
        layers: Quality of each layer, in execution order.
        cautions: Facts that weaken the pick.
        weight: Weight of the alignment to start with.
    """

    basis: SelectionBasis
    label_free: bool
    ranked: tuple[RankedPair, ...]
    rejected: tuple[RejectedPair, ...]
    layers: tuple[LayerQuality, ...]
    cautions: tuple[Caution, ...]
    weight: float = WEIGHT

    def __repr__(self) -> str:
        counts = f"{len(self.ranked)} pairs by {self.basis.metric}, {len(self.rejected)} refused"
        rows = (f"  {pair.pair}  score {_span(pair)}{' tie' * pair.ties_with_first}" for pair in self.ranked[:_SHOWN])
        return "\n".join([f"Selection: {counts}", *rows])

    def _repr_html_(self) -> str:
        first, *_ = repr(self).splitlines()
        names = "".join(f"<th>{name}</th>" for name in ("rank", "student", "teacher", "score (95 % interval)", "tie"))
        rows = "".join(
            f"<tr><td>{rank}</td><td>{escape(pair.student)}</td><td>{escape(pair.teacher)}</td><td>{_span(pair)}</td>"
            f"<td>{'yes' * pair.ties_with_first}</td></tr>"
            for rank, pair in enumerate(self.ranked[:_SHOWN], 1)
        )
        return f"<b>{escape(first)}</b>" + (f"<table><tr>{names}</tr>{rows}</table>" if rows else "")

    @property
    def pick(self) -> LayerPair | None:
        """Pair that is ranked first, or None if no pair is admissible."""
        return self.ranked[0].pair if self.ranked else None

    def depth(self, layer: str) -> float:
        """Returns the number of a layer, counted from 1, over the number of layers."""
        return (self.basis.layers.index(layer) + 1) / len(self.basis.layers)

    @property
    def refusal(self) -> tuple[RejectedPair | None, tuple[Objection, ...]]:
        """Why there is no pick: the objections to the whole run, else those against the closest pair.

        The first item is the closest pair, None where the objections are to the run. Both are empty if there is a pick,
        or no pair at all.
        """
        if self.ranked or not self.rejected:
            return None, ()
        closest = min(self.rejected, key=lambda pair: len(pair.objections))
        to_run = tuple(objection for objection in closest.objections if objection.code in OF_THE_RUN)
        return (None, to_run) if to_run else (closest, closest.objections)

    @property
    def best_teacher(self) -> LayerQuality | None:
        """Best layer that may teach, or None if no layer may."""
        able = [layer for layer in self.layers if layer.may_teach]
        return max(able, key=lambda layer: layer.measured) if able else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the selection as JSON values, as in selection.json."""
        pick = {"student": self.pick.student, "teacher": self.pick.teacher} if self.pick else None
        no_pick = None if self.pick else [asdict(objection) for objection in self.refusal[1]]
        return {"pick": pick, "no_pick": no_pick} | asdict(self)

    def to_json(self) -> str:
        """Returns the content of selection.json."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Selection:
        """Reads what `to_dict` returns.

        Raises:
            ValueError: If the record is no selection.
        """
        selection: Selection = parse(cls, {key: value for key, value in record.items() if key not in _DERIVED})
        return selection


def _span(pair: RankedPair) -> str:
    return f"{pair.score:.2f} ({pair.score_low:.2f} to {pair.score_high:.2f})"
