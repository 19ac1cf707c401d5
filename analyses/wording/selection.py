"""Sentences about a selection: why the pick is the pick, why pairs are refused, and what weakens the pick."""

from __future__ import annotations

import math
from collections.abc import Sequence

from layerprobe.analyses.selection import (
    MAJORITY,
    Caution,
    CautionCode,
    Objection,
    RankedPair,
    RejectedPair,
    Selection,
    nearest_published,
)
from layerprobe.analyses.tables import RANDOM_WEIGHTS, RAW_INPUT
from layerprobe.analyses.wording.pair_checks import published_text

TRUST = (
    "A pick is a hypothesis from this network's layers and from published trainings of others; a training decides "
    "(`layerprobe confirm`; docs/picking.md)."
)


# Cautions that say how a pick was measured; all others are reasons to doubt it, and stand beside it.
_NOTES: tuple[CautionCode, ...] = (
    "no labels",
    "effective rank counts noise",
    "needs not measured",
    "criterion not measured",
    "shallower than published",
    "narrower than published",
    "layers named",
)


# For tokens 32 to 64 wide: with it trials were behind at first and caught up (docs/atlas/where-it-pays.md).
_NARROW_WEIGHT = 0.03


def weight_text(selection: Selection) -> str:
    """Returns the weight to begin with: that of the selection, or a smaller one where the tokens are narrow."""
    if any(caution.code == "narrower than published" for caution in selection.cautions):
        return f"{_NARROW_WEIGHT:g} to begin with, since its tokens are narrow"
    return f"{selection.weight:g}"


def selection_headline(selection: Selection) -> str:
    """Returns the pick with the cautions that are reasons to doubt it, or "none" with the reason."""
    if selection.pick is None:
        return f"none. {selection_reason(selection)}"
    doubts = _called(doubt_texts(selection))
    return " ".join([f"{selection.pick.student} should learn from {selection.pick.teacher}.", *doubts])


def _called(doubts: Sequence[str]) -> list[str]:
    return [f"{'Caution' if len(doubts) == 1 else f'{len(doubts)} cautions'}: {' '.join(doubts)}"] if doubts else []


def selection_reason(selection: Selection) -> str:
    """Returns the reasons for the pick, in three sentences, or why no pair is admissible."""
    if selection.ranked:
        return " ".join(pair_reasons(selection.ranked[0], selection))
    if not selection.rejected:
        return "No pair is admissible: there are fewer than two layers."
    closest, objections = selection.refusal
    if closest is None:
        pair, begins = selection.rejected[0], "No pair is admissible:"
    else:
        pair, begins = closest, f"No pair is admissible. Closest to it is {closest.student} <- {closest.teacher}:"
    return f"{begins} {'; '.join(_objection(objection, pair, selection) for objection in objections)}."


def selection_brief(selection: Selection) -> str:
    """Returns why the pick is the pick, in one sentence; "" if there is none."""
    if not selection.ranked:
        return ""
    pair, metric = selection.ranked[0], selection.basis.metric
    stands = "is as rich as any layer that may teach" if pair.teacher_is_best else "is not the richest layer"
    uncertain = " (within the uncertainty)" if pair.gap_is_certain is False else ""
    weaker = "less" if pair.gap >= 0 else "more"
    student, teacher = selection.depth(pair.student), selection.depth(pair.teacher)
    (nearest,) = nearest_published(student, teacher, num=1)
    return (
        f"{pair.teacher} {stands} (mean {metric} {pair.teacher_quality:.3g}); {pair.student} has {abs(pair.gap):.3g} "
        f"{weaker}{uncertain}. Depths {student:.2f} and {teacher:.2f}; the nearest published pair, "
        f"{nearest.student} <- {nearest.teacher} of {nearest.network}, had {nearest.share or 0.0:.0%} of the best gain."
    )


def pair_reasons(pair: RankedPair, selection: Selection) -> list[str]:
    """Returns the three sentences that explain the rank of a pair: what the two know, where they lie, the score."""
    reasons = [_strength(pair, selection), _place(pair, selection), score_sentence(pair)]
    return [*reasons, "The data cannot tell it from the pick."] if pair.ties_with_first else reasons


def _strength(pair: RankedPair, selection: Selection) -> str:
    """The sentence about what student and teacher know, beside what is known without training."""
    best, metric = selection.best_teacher, selection.basis.metric
    assert best is not None
    if pair.teacher == best.layer:
        stands = "is the best layer that may teach"
    elif pair.teacher_is_best:
        stands = f"ties with {best.layer} ({best.measured:.3f}), the best layer that may teach"
    else:
        stands = f"is below {best.layer} ({best.measured:.3f}), the best layer that may teach"
    controls = [f"{name} {value:.3f}" for name, value in selection.basis.controls]
    beside = f" (controls: {_listed(controls)})" if controls else ""
    uncertain = ", which is within the uncertainty" if pair.gap_is_certain is False else ""
    weaker = "weaker" if pair.gap >= 0 else "stronger"
    teacher = f"The teacher {pair.teacher} {stands}: {metric} {pair.teacher_quality:.3f}{beside}"
    return f"{teacher}; the student {pair.student} is {abs(pair.gap):.3f} {weaker}{uncertain}."


def _place(pair: RankedPair, selection: Selection) -> str:
    """The sentence about the depths of a pair, how alike its layers are, and the most similar published pair."""
    student, teacher = selection.depth(pair.student), selection.depth(pair.teacher)
    apart = "1 layer" if pair.distance == 1 else f"{pair.distance} layers"
    (nearest,) = nearest_published(student, teacher, num=1)
    return (
        f"They are {apart} apart, at {student:.2f} and {teacher:.2f} of the depth, with a mean CKA (likeness) of "
        f"{pair.mean_cka:.3f}; the published pair at the nearest depths is {published_text(nearest)}."
    )


def score_sentence(pair: RankedPair) -> str:
    """Returns the sentence about the score of a pair and the contributions to it."""
    parts = [f"{part.adds:+.2f} for {part.criterion} ({part.value:.3g})" for part in pair.parts]
    return f"The score, {pair.score:+.2f} ({pair.score_low:+.2f} to {pair.score_high:+.2f}), is {_listed(parts)}."


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
        case "student too deep":
            place = f"layer {value:.0f} of {limit:.0f}"
            return f"{pair.student} is {place}; published students gained little beyond half of the depth"
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
            figures = f"the recoverability gap is {value:.3f}, its interval begins at {begins:.3f}"
            return f"what the teacher adds is within the student's linear reach: {figures}"
        case "teacher not needed":
            interval = "" if objection.low is None else f" ({objection.low:.4f} to {objection.high:.4f})"
            return f"the network does not need {pair.teacher}: without it the loss rises by {value:.4f}{interval}"
        case "below a control":
            interval = "" if objection.low is None else f" ({objection.low:.3f} to {objection.high:.3f})"
            figures = f"{selection.basis.metric} {value:.3f}{interval} against {limit:.3f}"
            return f"{pair.teacher} {_BELOW[objection.subject]} {_control(objection.subject)}: {figures}"
        case "network does not denoise":
            return (
                "the network does not denoise this data under any known convention, so its features mean nothing: the "
                f"error is {value:.3g} times that of a linear denoiser at best ({objection.note}); if the data and the "
                "weights are right, run `layerprobe probe` again with --trust-convention"
            )
        case "nothing but noise":
            return f"every noise level is {value:g}, where samples are pure noise; measure at lower levels too"
        case "all layers alike":
            return f"all layers are alike: the mean CKA of every pair is {value:.3f} or more, above {limit:g}"


# How a teacher stands to the controls that refute it.
_BELOW = {MAJORITY: "is not surely above", RANDOM_WEIGHTS: "is not above", RAW_INPUT: "is below"}


def _control(name: str) -> str:
    return f"the share of the {name}" if name == MAJORITY else f"the control {name!r}"


def caution_texts(selection: Selection) -> list[str]:
    """Returns what weakens a selection: one sentence for each caution."""
    return [_caution(caution, selection) for caution in selection.cautions]


def doubt_texts(selection: Selection) -> list[str]:
    """Returns the cautions that are reasons to doubt the pick: one sentence each."""
    return [_caution(caution, selection) for caution in selection.cautions if caution.code not in _NOTES]


def note_texts(selection: Selection) -> list[str]:
    """Returns the other cautions, which say how the pick was measured: one sentence each."""
    return [_caution(caution, selection) for caution in selection.cautions if caution.code in _NOTES]


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
            return (
                f"Chosen without labels: {selection.basis.metric}, not a probe, tells which layer is weaker, and no "
                "control was compared."
            )
        case "effective rank counts noise":
            return "The effective rank stands in for the probe; it also counts the directions of noise."
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
        case "only one pair":
            return "It is the only admissible pair, so there was no choice."
        case "alike":
            return f"The two are nearly alike: mean CKA {value:.3f}, above {limit:g}."
        case "teacher not the richest":
            first, best = selection.ranked[0], selection.best_teacher
            richer = f": {best.layer} has {best.measured:.3f} against {value:.3f}" if best else ""
            return f"{first.teacher} is not the richest layer that may teach{richer}."
        case "layers named":
            named = "that --layers names" if caution.note != "given" else "of the file"
            return (
                f"Depths are counted through the {value:.0f} layers {named}; they are wrong if these do not cover the "
                "whole network evenly."
            )
        case "no controls":
            return (
                "The features came without the network, so there are no controls: nothing tells what training or the "
                "raw input contributes."
            )
        case "shallower than published":
            return f"The network has {value:.0f} layers; the published comparisons are of {limit:.0f} and more."
        case "narrower than published":
            return (
                f"Its tokens are {value:.0f} wide, and the published comparisons are of {limit:.0f} and more; begin "
                f"with a weight of {_NARROW_WEIGHT:g}, since {selection.weight:g} harmed trials with tokens 32 to 64 "
                "wide."
            )
        case "convention trusted":
            return (
                f"The convention check says {caution.note!r}; the declared schedule and prediction were trusted "
                "(--trust-convention)."
            )
        case "probes not converged" | "probes at the end of the search":
            return probe_caution_text(caution)
        case "control knows as much":
            teacher = selection.ranked[0].teacher
            return f"{teacher} is not surely above {_control(caution.subject)}: {value:.3f} against {limit:.3f}."


def _number(value: float | None) -> float:
    # A number that a record lacks is told as nan, never as 0.
    return math.nan if value is None else value


def _among(end: str, count: float) -> str:
    return f"the {end} layer" if count == 1 else f"among the {end} {count:.0f} layers"


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
