"""Sentences about a selection: why the pick is the pick, why pairs are refused, and what weakens the pick."""

from __future__ import annotations

import math
from collections.abc import Sequence

from layerprobe.analyses.selection import Caution, Objection, RankedPair, RejectedPair, Selection

TRUST = (
    "A pick is a hypothesis; the confirmation run is the verdict. On trial in six small networks the picks of this "
    "rule were worth -8 to +18 % from a slow start, -31 to +2 % from a fair one (docs/picking.md)."
)


def selection_reason(selection: Selection) -> str:
    """Returns the reasons for the pick, or why no pair is admissible."""
    if selection.ranked:
        return " ".join(pair_reasons(selection.ranked[0], selection))
    closest = min(selection.rejected, key=lambda pair: len(pair.objections), default=None)
    reasons = ["there are fewer than two layers"] if closest is None else objection_texts(closest, selection)
    return f"No pair is admissible. Closest to it: {'; '.join(reasons)}."


def pair_reasons(pair: RankedPair, selection: Selection) -> list[str]:
    """Returns the sentences that explain the rank of a pair."""
    best, metric = selection.best_teacher, selection.basis.metric
    assert best is not None
    value = f"{metric} {pair.teacher_quality:.3f}"
    if pair.teacher == best.layer:
        teacher = f"{pair.teacher} is the best layer that may teach: {value}."
    elif pair.teacher_is_best:
        teacher = f"{pair.teacher} ties with {best.layer}, the best that may teach: {value} and {best.measured:.3f}."
    else:
        teacher = f"{pair.teacher} is below {best.layer}, the best that may teach: {value} against {best.measured:.3f}."
    uncertain = ", which is within the uncertainty" if pair.gap_is_certain is False else ""
    apart = "1 layer" if pair.distance == 1 else f"{pair.distance} layers"
    reasons = [
        teacher,
        f"{pair.student} is {abs(pair.gap):.3f} {'weaker' if pair.gap >= 0 else 'stronger'}{uncertain}.",
        f"They are {apart} apart, and their mean CKA at equal noise levels is {pair.mean_cka:.3f}.",
        score_sentence(pair),
    ]
    return [*reasons, "The data cannot tell it from the pick."] if pair.ties_with_first else reasons


def score_sentence(pair: RankedPair) -> str:
    """Returns the sentence about the score of a pair and the contributions to it."""
    parts = [f"{part.adds:+.2f} for {part.criterion} {part.value:.3g}" for part in pair.parts]
    return f"The score is {pair.score:+.2f} ({pair.score_low:+.2f} to {pair.score_high:+.2f}): {_listed(parts)}."


def objection_texts(pair: RejectedPair, selection: Selection) -> list[str]:
    """Returns why a pair is refused: one text for each objection, without a full stop."""
    return [_objection(objection, pair, selection) for objection in pair.objections]


def _objection(objection: Objection, pair: RejectedPair, selection: Selection) -> str:
    value, limit = _number(objection.value), _number(objection.limit)
    match objection.code:
        case "teacher in the tail":
            return f"{pair.teacher} is {_among('last', limit)}, where networks decode"
        case "student in the head":
            return f"{pair.student} is {_among('first', limit)}, where networks only take in the input"
        case "too close":
            return f"they are {value:.0f} apart, and at least {limit:.0f} is required"
        case "different shapes":
            return f"their tokens differ in shape: {objection.note}"
        case "not measured":
            return f"there is no {objection.subject}: {objection.note}" if objection.subject else objection.note
        case "student not weaker":
            qualities = {layer.layer: layer.measured for layer in selection.layers if layer.quality is not None}
            figures = f"{qualities[pair.student]:.3f} against {qualities[pair.teacher]:.3f}"
            return f"{pair.student} is not weaker than {pair.teacher}: {selection.basis.metric} {figures}"
        case "already alike":
            return f"they are alike already: mean CKA {value:.3f}, above {limit:g}"
        case "within linear reach":
            begins = value if objection.low is None else objection.low
            figures = f"the gap is {value:.3f}, its interval begins at {begins:.3f}"
            return f"what the teacher adds is within the student's linear reach: {figures}"
        case "teacher not needed":
            interval = "" if objection.low is None else f" ({objection.low:.4f} to {objection.high:.4f})"
            return f"the network does not need {pair.teacher}: without it the loss rises by {value:.4f}{interval}"


def caution_texts(selection: Selection) -> list[str]:
    """Returns what weakens a selection: one sentence for each caution."""
    return [_caution(caution, selection) for caution in selection.cautions]


def probe_caution_text(caution: Caution) -> str:
    """Returns the sentence about probes that may be too bad."""
    counts = f"{_number(caution.value):.0f} of {_number(caution.limit):.0f} probes of {caution.subject!r}"
    if caution.code == "probes not converged":
        return f"{counts} did not converge."
    return f"{counts} took the last penalty of the search; with another one they may know more."


def _caution(caution: Caution, selection: Selection) -> str:
    value, limit = _number(caution.value), _number(caution.limit)
    match caution.code:
        case "no labels":
            return f"Chosen without labels: {selection.basis.metric}, not a probe, tells which layer is weaker."
        case "effective rank for noise-LiDAR":
            return "The effective rank stands in for noise-LiDAR; it also counts the directions of noise."
        case "needs not measured":
            return "Whether the network needs its layers was not measured."
        case "gap within the uncertainty":
            first = selection.ranked[0]
            return f"The gap between {first.student} and {first.teacher} is within the uncertainty; use more samples."
        case "ties with the pick":
            others = "1 other pair" if value == 1 else f"{value:.0f} other pairs"
            return f"The data cannot tell {others} from the pick; use more samples."
        case "criterion not measured":
            return f"Ranked without {caution.subject} ({caution.note})."
        case "probes not converged" | "probes at the end of the search":
            return probe_caution_text(caution)
        case "control knows as much":
            teacher = selection.ranked[0].teacher
            return f"{teacher} does not beat the control {caution.subject!r}: {value:.3f} against {limit:.3f}."


def _number(value: float | None) -> float:
    # A number that a record lacks is told as nan, never as 0.
    return math.nan if value is None else value


def _among(end: str, count: float) -> str:
    return f"the {end} layer" if count == 1 else f"among the {end} {count:.0f} layers"


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
