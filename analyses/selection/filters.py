"""Objections against layer pairs that break a condition stated in `limits`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from layerprobe.analyses.selection.controls import below_controls
from layerprobe.analyses.selection.records import Objection, SelectionBasis
from layerprobe.analyses.tables import CKA, PROBE, RECOVERABILITY, TEACHER_NEED, Number, PairEvidence


def objections(evidence: PairEvidence, index: int, basis: SelectionBasis, gap_criterion: str) -> tuple[Objection, ...]:
    """Returns all objections against a pair; empty if it is admissible.

    Args:
        evidence: Evidence of the pair.
        index: Position of the pair in the evidence.
        basis: Limits, and the criteria of which the pair must have values.
        gap_criterion: Criterion that measures by how much the student is weaker.
    """
    student, teacher = evidence.pairs[index]
    against = list(_by_place(student, teacher, evidence, basis))
    against += _without_value(evidence, index, (gap_criterion, CKA, *(name for name, _ in basis.weights)))
    gap = evidence.number(gap_criterion, index)
    if gap.value <= 0:
        against.append(_objection("student not weaker", gap_criterion, gap))
    cka = evidence.number(CKA, index)
    if cka.value > basis.max_cka:
        against.append(_objection("already alike", CKA, cka, basis.max_cka))
    reach = evidence.number(RECOVERABILITY, index)
    if reach.lower_bound < basis.min_gap:
        against.append(_objection("within linear reach", RECOVERABILITY, reach, basis.min_gap))
    need = evidence.number(TEACHER_NEED, index)
    if need.lower_bound <= 0:
        against.append(_objection("teacher not needed", TEACHER_NEED, need, 0.0))
    against += below_controls(evidence.layer_number(PROBE, teacher), dict(basis.controls))
    return tuple(against)


def different_shapes(student: str, teacher: str, shapes: Mapping[str, Sequence[int]]) -> Objection:
    """Returns the objection against a pair that the evidence does not contain."""
    if student not in shapes or teacher not in shapes:
        return Objection("not measured", note="the evidence has no such pair")
    sizes = [" x ".join(map(str, shapes[layer])) for layer in (student, teacher)]
    return Objection("different shapes", note=f"{student} gives {sizes[0]}, {teacher} {sizes[1]}")


def _by_place(student: str, teacher: str, evidence: PairEvidence, basis: SelectionBasis) -> list[Objection]:
    against = []
    if teacher in basis.tail:
        against.append(Objection("teacher in the tail", limit=len(basis.tail)))
    if student in basis.head:
        against.append(Objection("student in the head", limit=len(basis.head)))
    if student in basis.late:
        against.append(
            Objection("student too deep", value=evidence.layers.index(student) + 1, limit=len(evidence.layers))
        )
    distance = evidence.distance(student, teacher)
    if distance < basis.min_distance:
        against.append(Objection("too close", value=distance, limit=basis.min_distance))
    return against


def _without_value(evidence: PairEvidence, index: int, criteria: Sequence[str]) -> list[Objection]:
    """Objections for criteria that the rule needs and the evidence does not contain, each reason once."""
    numbers = [(name, evidence.number(name, index)) for name in dict.fromkeys(criteria)]
    reasons = {number.note: name for name, number in reversed(numbers) if math.isnan(number.value)}
    return [Objection("not measured", name, note=note) for note, name in reversed(reasons.items())]


def _objection(code: str, subject: str, number: Number, limit: float | None = None) -> Objection:
    return Objection(code, subject, number.value, *number.ends, limit)  # type: ignore[arg-type]
