"""The table of published pairs: true to its source, with shares as the docs define them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from layerprobe.analyses.selection import (
    PRIOR_RANGES,
    PublishedPair,
    nearest_published,
    prior_pair,
    published_pairs,
)
from layerprobe.analyses.tables import PRIOR_DEPTHS
from layerprobe.layersync import LayerPair, layer_of_depth

SHARED = Path(__file__).parents[4] / "shared" / "data" / "published-pairs.csv"


def of_study(study: str) -> list[PublishedPair]:
    return [pair for pair in published_pairs() if pair.study == study]


def test_shares_are_gains_over_the_best_gain_of_the_study() -> None:
    shares = {(pair.student, pair.teacher): pair.share for pair in of_study("LayerSync pairs")}
    best = 26.53 - 15.39
    assert shares == {
        (6, 18): 1.0,
        (8, 16): pytest.approx((26.53 - 16.03) / best),
        (15, 23): pytest.approx((26.53 - 23.03) / best),
        (6, 9): pytest.approx((26.53 - 23.31) / best),
    }
    assert [round(pair.share or 0, 2) for pair in of_study("Self-Flow students")] == [0.91, 0.82, 1.0, 0.64, -0.09]
    assert [round(pair.share or 0, 2) for pair in of_study("Self-Flow teachers")] == [0.2, 0.6, 1.0, 1.0]


def test_a_metric_that_is_better_when_higher_gains_by_rising() -> None:
    assert [round(pair.share or 0, 2) for pair in of_study("RARE depth")] == [0.43, 0.93, 1.0, 0.51]
    (video,) = of_study("MoAlign")
    assert video.gain == pytest.approx((24.9 - 22.3) / 22.3)


def test_a_study_of_one_row_has_a_gain_and_no_share() -> None:
    (pair,) = of_study("LayerSync 80 epochs")
    assert pair.share is None
    assert pair.gain == pytest.approx(1 - 11.24 / 17.97)


def test_every_row_is_a_layer_of_its_network_with_its_source() -> None:
    for pair in published_pairs():
        assert 0 < pair.student_depth <= 1
        assert pair.teacher_depth is None or 0 < pair.teacher_depth <= 1
        assert pair.confidence
        assert pair.source


def test_nearest_pairs_come_first_and_external_encoders_never() -> None:
    first, second, third = nearest_published(8 / 28, 20 / 28)
    assert {(first.student, first.teacher), (second.student, second.teacher)} == {(8, 20)}
    assert (third.student, third.teacher, third.network) == (3, 8, "SiT-B/2")
    assert len(nearest_published(0.25, 0.7, num=99)) == 15


def test_the_prior_lies_in_its_ranges_and_the_good_pairs_in_or_near_them() -> None:
    for depth, (low, high) in zip(PRIOR_DEPTHS, PRIOR_RANGES, strict=True):
        assert low < depth < high
    inside = [
        pair
        for pair in published_pairs()
        if pair.share is not None
        and pair.teacher_depth is not None
        and PRIOR_RANGES[0][0] <= pair.student_depth <= PRIOR_RANGES[0][1]
        and PRIOR_RANGES[1][0] <= pair.teacher_depth <= PRIOR_RANGES[1][1]
    ]
    assert len(inside) == 4
    assert all((pair.share or 0) > 0.8 for pair in inside)


@pytest.mark.parametrize(
    ("depth", "student", "teacher"), [(2, 1, 2), (3, 1, 2), (5, 1, 4), (8, 2, 6), (12, 3, 8), (28, 7, 20)]
)
def test_the_prior_is_a_quarter_and_seven_tenths_down(depth: int, student: int, teacher: int) -> None:
    pair = prior_pair([layer_of_depth(i + 1) for i in range(depth)])
    assert pair == LayerPair(layer_of_depth(student), layer_of_depth(teacher))


def test_the_prior_exists_at_every_depth_from_two() -> None:
    for depth in range(2, 61):
        prior_pair([layer_of_depth(i + 1) for i in range(depth)])  # LayerPair refuses a wrong order
    with pytest.raises(ValueError, match=r"^a pair needs two layers, got 1$"):
        prior_pair(["blocks.0"])


def test_every_value_stands_in_the_collected_table() -> None:
    if not SHARED.is_file():
        pytest.skip(f"{SHARED} is not there")
    with SHARED.open(encoding="utf-8", newline="") as file:
        collected = {(row["blocks"], row["student"], row["value"]) for row in csv.DictReader(file)}
    known = {(blocks, student, float(value)) for blocks, student, value in collected if _is_number(value)}
    missing = [pair for pair in published_pairs() if (str(pair.blocks), str(pair.student), pair.value) not in known]
    assert missing == []


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
