"""The limits of admissible pairs."""

from __future__ import annotations

import pytest

from layerprobe.analyses.selection.limits import PairLimits


@pytest.mark.parametrize(
    ("fraction", "depth", "tail"), [(0.2, 10, 2), (0.2, 8, 1), (0.2, 14, 2), (0.29, 100, 29), (0, 5, 0)]
)
def test_the_tail_is_whole_layers(fraction: float, depth: int, tail: int) -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point.
    layers = tuple(f"blocks.{i}" for i in range(depth))
    assert PairLimits(exclude_tail=fraction).tail(layers) == layers[depth - tail :]


def test_limits_follow_the_depth_unless_given() -> None:
    layers = tuple(f"blocks.{i}" for i in range(28))
    assert PairLimits().head(layers) == layers[:3]  # The earliest published student is 4 of 28, counted from 1.
    assert [len(PairLimits().head(layers[:depth])) for depth in (6, 7, 8, 12, 24)] == [0, 0, 1, 1, 3]
    assert PairLimits().distance(layers) == 8
    assert PairLimits().late(layers) == layers[14:]
    assert PairLimits(max_student=1.0).late(layers) == ()
    assert PairLimits(skip_first=0, min_distance=1).head(layers) == ()
    assert PairLimits(min_distance=1).distance(layers) == 1
    assert PairLimits().distance(layers[:3]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude_tail": 1.0}, r"exclude_tail is 1\.0; pass a fraction"),
        ({"min_distance": 0}, "min_distance is 0; pass 1 or more"),
        ({"skip_first": -1}, "skip_first is -1; pass 0 or more"),
    ],
)
def test_bad_limits_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairLimits(**options)  # type: ignore[arg-type]
