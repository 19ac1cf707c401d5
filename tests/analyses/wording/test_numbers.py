"""Numbers as text."""

from __future__ import annotations

import pytest

from layerprobe.analyses.wording.numbers import rounded


@pytest.mark.parametrize(
    ("numbers", "signed", "text"),
    [
        ((0.93451, 0.90932, 0.95718), False, "0.935 [0.909, 0.957]"),
        ((0.003, -0.0456, 0.0513), True, "+0.003 [−0.046, +0.051]"),
        ((-0.0004, -0.0456, 0.0513), True, "0.000 [−0.046, +0.051]"),
        ((-0.00249, -0.00495, -0.0000235), True, "−0.00249 [−0.00495, −0.00002]"),
        ((0.0253, 0.0, 0.0506), True, "+0.025 [0.000, +0.051]"),
        ((1234.5, 1100.0, 1400.0), False, "1,230 [1,100, 1,400]"),
        ((0.5, 0.5, 0.5), False, "0.500"),
        ((0.12345, None, None), False, "0.123"),
        ((143.21, float("nan"), float("nan")), False, "143"),
        ((0.0, None, None), True, "0"),
        ((None, None, None), False, "–"),
        ((float("nan"), 0.1, 0.2), False, "–"),
    ],
)
def test_a_number_is_rounded_to_its_interval(numbers: tuple[float, ...], signed: bool, text: str) -> None:
    assert rounded(*numbers, signed=signed) == text
