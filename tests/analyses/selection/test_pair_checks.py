"""Each check finds what it is for, finds nothing beside it, and rests on what was published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerprobe.analyses.selection import CHECKS, PairFacts, check_pair, published_pairs
from layerprobe.analyses.selection.pair_checks import (
    EARLIEST_PUBLISHED_STUDENT,
    LATEST_PUBLISHED_TEACHER,
    LATEST_STUDENT,
    LEAST_DISTANCE,
)
from layerprobe.layersync import mean_cosine

PAGE = Path(__file__).parents[3] / "docs" / "other-trainers.md"
SELF_ALIGNED = [pair for pair in published_pairs() if pair.share is not None and pair.teacher_depth is not None]


def codes(**facts: object) -> list[str]:
    pair = {"student": 7, "teacher": 19, "num_blocks": 28} | facts
    return [finding.code for finding in check_pair(PairFacts(**pair))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"teacher": 7}, "LP001"),
        ({"student": 14, "teacher": 22}, "LP002"),
        ({"teacher": 10}, "LP003"),
        ({"teacher": 24}, "LP004"),
        ({"student": 2}, "LP004"),
        ({"convention_fits": False}, "LP005"),
        ({"teacher_quality": 0.3, "raw_input": 0.3}, "LP006"),
        ({"teacher_quality": 0.3, "random_weights": 0.4}, "LP007"),
        ({"student": 9, "teacher": 7}, "LP008"),
        ({"teacher": 28}, "LP009"),
        ({"student": -1}, "LP009"),
        ({"weight": 0.0}, "LP010"),
        ({"stop_gradient": False}, "LP011"),
        ({"switched_off": (("enabled", "false", "true"),)}, "LP012"),
        ({"misread": (("block", 0, 1),)}, "LP013"),
    ],
)
def test_a_check_finds_its_fault_alone(facts: dict[str, object], code: str) -> None:
    assert codes(**facts) == [code]


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"student": 13, "teacher": 23},  # student at 0.5, teacher at 24/28
        {"student": 3},  # student at 4/28
        {"student": 3, "teacher": 6, "num_blocks": 20},  # 0.15 apart, which floats make slightly less
        {"weight": 0.002, "stop_gradient": True, "convention_fits": True},
        {"teacher_quality": 0.5, "random_weights": 0.4, "raw_input": 0.3},
        {"teacher": None},
        {"student": 900, "teacher": 901, "num_blocks": None},
    ],
)
def test_nothing_is_found_at_the_limits_and_where_facts_are_missing(facts: dict[str, object]) -> None:
    assert codes(**facts) == []


def test_errors_come_first() -> None:
    assert codes(student=20, teacher=19, weight=0.0) == ["LP008", "LP010", "LP002"]


def test_every_code_is_on_the_page_once_with_its_severity() -> None:
    assert [check.code for check in CHECKS] == [f"LP{number:03}" for number in range(1, len(CHECKS) + 1)]
    page = PAGE.read_text(encoding="utf-8")
    for check in CHECKS:
        assert page.count(f"\n| {check.code} | {check.severity} |") == 1


def test_limits_and_shares_are_those_of_the_published_table() -> None:
    late = [pair.share for pair in SELF_ALIGNED if pair.student_depth > LATEST_STUDENT]
    external = [
        p.share for p in published_pairs() if p.teacher is None and p.share and p.student_depth > LATEST_STUDENT
    ]
    close = [p.share for p in SELF_ALIGNED if 0 < p.teacher_depth - p.student_depth < LEAST_DISTANCE]  # type: ignore[operator]
    far = [p.share for p in SELF_ALIGNED if p.teacher_depth - p.student_depth >= 0.3]  # type: ignore[operator]
    assert [round(max(shares), 2) for shares in (late, external, close)] == [0.64, 0.82, 0.64]  # type: ignore[type-var]
    assert round(min(far), 2) == 0.82  # type: ignore[type-var]
    own = [pair for pair in published_pairs() if pair.teacher_depth is not None]
    assert min(pair.student_depth for pair in own) == EARLIEST_PUBLISHED_STUDENT
    assert max(pair.teacher_depth or 0 for pair in own) == LATEST_PUBLISHED_TEACHER


def test_a_layer_aligned_to_itself_gets_no_gradient() -> None:
    tokens = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    other = tokens.detach() + 0.5 * torch.randn(
        2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    (own,) = torch.autograd.grad(mean_cosine(tokens, tokens.detach()), tokens)
    (learns,) = torch.autograd.grad(mean_cosine(tokens, other), tokens)
    assert own.abs().max() < 1e-15 < 1e-4 < learns.abs().max()  # float64: rounding alone is left
