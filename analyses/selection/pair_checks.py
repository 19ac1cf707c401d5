"""Checks of a layer pair that need no run: what makes an alignment do nothing, and what published trainings warn of.

Each check has a code that stays the same, so that scripts can rely on it. An **error** is a setting that does nothing
or harms by construction. A **caution** is a setting that gained little where it was tried, or that nobody has tried.
Facts that are not known are None and give no finding. `layerprobe.analyses.wording.finding_text` makes the sentences.

Blocks are counted from 0, as in `blocks.7`; the depth of a block is (index + 1) / number of blocks, as in `published`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from layerprobe.analyses.selection.records import Selection

LATEST_STUDENT = 0.5  # depth; of the published pairs none with a later student kept more than 0.64 of the best gain
LEAST_DISTANCE = 0.15  # of the depth; closer published pairs kept 0.64 or less
EARLIEST_PUBLISHED_STUDENT = 4 / 28  # Self-Flow 4 <- 20
LATEST_PUBLISHED_TEACHER = 24 / 28  # Self-Flow 8 <- 24
_ROUNDING = 1e-9

Severity = Literal["error", "caution"]
Values = Mapping[str, float | str]


@dataclass(frozen=True)
class PairFacts:
    """What is known of a pair and of the training that aligns it; None or empty where it is not known.

    Attributes:
        student: Block that learns, counted from 0.
        teacher: Block that teaches; None for an external encoder.
        num_blocks: Number of blocks of the network.
        weight: Weight of the alignment.
        stop_gradient: Whether the gradient of the alignment stops at the teacher.
        convention_fits: Whether the weights fit the declared schedule and prediction.
        teacher_quality: Quality of the teacher, such as probe accuracy, averaged over noise levels.
        random_weights: The same quality of the best layer with random weights.
        raw_input: The same quality of the raw input.
        switched_off: Settings that switch the alignment off, (name, what it is, what it must be).
        misread: Settings that mean another number than is written, (name, number written, number meant).
    """

    student: int
    teacher: int | None
    num_blocks: int | None = None
    weight: float | None = None
    stop_gradient: bool | None = None
    convention_fits: bool | None = None
    teacher_quality: float | None = None
    random_weights: float | None = None
    raw_input: float | None = None
    switched_off: tuple[tuple[str, str, str], ...] = ()
    misread: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        code: Code of the check, such as "LP001".
        severity: "error" or "caution".
        values: Numbers and names behind it; "student" and "teacher" are blocks counted from 0.
        source: What the check rests on.
    """

    code: str
    severity: Severity
    values: Values
    source: str


@dataclass(frozen=True)
class PairCheck:
    """One check.

    Attributes:
        code: Code, the same in every version.
        severity: Severity of its findings.
        test: Function that yields the values of each finding.
        source: Published evidence, or the measurement of this project, that the check rests on.
    """

    code: str
    severity: Severity
    test: Callable[[PairFacts], Iterator[Values]]
    source: str


def check_pair(facts: PairFacts) -> tuple[Finding, ...]:
    """Returns what speaks against a pair, errors first, each group in the order of the codes."""
    found = [Finding(one.code, one.severity, values, one.source) for one in CHECKS for values in one.test(facts)]
    return tuple(sorted(found, key=lambda finding: finding.severity != "error"))


def check_pick(selection: Selection) -> tuple[Finding, ...]:
    """Returns what speaks against the pick of a selection; nothing without a pick.

    Convention and controls (LP005 to LP007) are left out: a pick that they speak against is refused, or its cautions
    say so.
    """
    pick, layers = selection.pick, selection.basis.layers
    if pick is None:
        return ()
    return check_pair(
        PairFacts(layers.index(pick.student), layers.index(pick.teacher), len(layers), weight=selection.weight)
    )


def _own_teacher(facts: PairFacts) -> Iterator[Values]:
    if facts.student == facts.teacher:
        yield {"student": facts.student}


def _late_student(facts: PairFacts) -> Iterator[Values]:
    depth = _depth(facts.student, facts)
    if depth is not None and depth > LATEST_STUDENT + _ROUNDING:
        yield {"student": facts.student, "depth": depth}


def _close_teacher(facts: PairFacts) -> Iterator[Values]:
    student, teacher = _depth(facts.student, facts), _depth(facts.teacher, facts)
    if student is not None and teacher is not None and 0 < teacher - student < LEAST_DISTANCE - _ROUNDING:
        yield {"distance": teacher - student}


def _unpublished_depth(facts: PairFacts) -> Iterator[Values]:
    student, teacher = _depth(facts.student, facts), _depth(facts.teacher, facts)
    if student is not None and student < EARLIEST_PUBLISHED_STUDENT - _ROUNDING:
        yield {"role": "student", "depth": student, "end": EARLIEST_PUBLISHED_STUDENT}
    if teacher is not None and teacher > LATEST_PUBLISHED_TEACHER + _ROUNDING:
        yield {"role": "teacher", "depth": teacher, "end": LATEST_PUBLISHED_TEACHER}


def _wrong_convention(facts: PairFacts) -> Iterator[Values]:
    if facts.convention_fits is False:
        yield {}


def _below_raw_input(facts: PairFacts) -> Iterator[Values]:
    yield from _not_above(facts.teacher_quality, facts.raw_input)


def _below_random_weights(facts: PairFacts) -> Iterator[Values]:
    yield from _not_above(facts.teacher_quality, facts.random_weights)


def _teacher_first(facts: PairFacts) -> Iterator[Values]:
    if facts.teacher is not None and facts.teacher < facts.student:
        yield {"student": facts.student, "teacher": facts.teacher}


def _no_such_block(facts: PairFacts) -> Iterator[Values]:
    for role, block in (("student", facts.student), ("teacher", facts.teacher)):
        if block is not None and (block < 0 or (facts.num_blocks is not None and block >= facts.num_blocks)):
            yield {"role": role, "block": block, "blocks": facts.num_blocks or 0}


def _no_weight(facts: PairFacts) -> Iterator[Values]:
    if facts.weight is not None and facts.weight <= 0:
        yield {"weight": facts.weight}


def _moving_teacher(facts: PairFacts) -> Iterator[Values]:
    if facts.stop_gradient is False:
        yield {}


def _switched_off(facts: PairFacts) -> Iterator[Values]:
    for option, value, needed in facts.switched_off:
        yield {"option": option, "value": value, "needed": needed}


def _misread(facts: PairFacts) -> Iterator[Values]:
    for option, written, meant in facts.misread:
        yield {"option": option, "written": written, "meant": meant}


def _depth(block: int | None, facts: PairFacts) -> float | None:
    """Depth of a block of the network; None where it is not known, or there is no such block."""
    if block is None or facts.num_blocks is None or not 0 <= block < facts.num_blocks:
        return None
    return (block + 1) / facts.num_blocks


def _not_above(teacher: float | None, control: float | None) -> Iterator[Values]:
    if teacher is not None and control is not None and teacher <= control:
        yield {"quality": teacher, "control": control}


_PUBLISHED = "LayerSync, arXiv:2510.12581; Self-Flow, arXiv:2603.06507"

CHECKS = (
    PairCheck("LP001", "error", _own_teacher, "gradient of the cosine; SRA, arXiv:2505.02831; Self-Flow"),
    PairCheck("LP002", "caution", _late_student, f"{_PUBLISHED}; REPA, arXiv:2410.06940"),
    PairCheck("LP003", "caution", _close_teacher, _PUBLISHED),
    PairCheck("LP004", "caution", _unpublished_depth, "docs/published-pairs.md"),
    PairCheck("LP005", "error", _wrong_convention, "the convention check of docs/checkpoints.md"),
    PairCheck("LP006", "caution", _below_raw_input, "docs/picking.md"),
    PairCheck("LP007", "caution", _below_random_weights, "docs/picking.md"),
    PairCheck("LP008", "error", _teacher_first, "LayerSync, arXiv:2510.12581"),
    PairCheck("LP009", "error", _no_such_block, "the number of blocks"),
    PairCheck("LP010", "error", _no_weight, "the loss, weight times (- cosine)"),
    PairCheck("LP011", "caution", _moving_teacher, "LayerSync, arXiv:2510.12581"),
    PairCheck("LP012", "error", _switched_off, "code of the trainer"),
    PairCheck("LP013", "caution", _misread, "code of the trainer"),
)
