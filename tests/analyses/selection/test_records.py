"""Selections survive their file, and only selections are read."""

from __future__ import annotations

import json

import pytest

from layerprobe.analyses.selection.records import (
    Caution,
    LayerQuality,
    Objection,
    RankedPair,
    RejectedPair,
    ScorePart,
    Selection,
    SelectionBasis,
)
from layerprobe.layersync.pair import LayerPair

BASIS = SelectionBasis(
    metric="probe accuracy",
    split="validation",
    noise_levels=(0.1, 0.5),
    layers=("a", "b", "c"),
    tail=("c",),
    head=(),
    late=(),
    min_distance=1,
    max_cka=0.9,
    min_gap=0.05,
    weights=(("CKA", -1.0),),
)
PAIR = RankedPair(
    student="a",
    teacher="b",
    score=1.0,
    score_low=0.5,
    score_high=1.5,
    parts=(ScorePart("CKA", 0.4, 0.3, 0.5, 1.0),),
    teacher_quality=0.6,
    student_quality=0.4,
    gap=0.2,
    gap_is_certain=True,
    mean_cka=0.4,
    distance=1,
    teacher_is_best=True,
    ties_with_first=False,
)
SELECTION = Selection(
    basis=BASIS,
    label_free=False,
    ranked=(PAIR,),
    rejected=(RejectedPair("a", "c", (Objection("teacher in the tail", limit=1),)),),
    layers=(
        LayerQuality("a", 0.4, 0.3, 0.5, may_teach=True),
        LayerQuality("b", 0.6, 0.5, 0.7, may_teach=True, ties_with_best=True),
        LayerQuality("c", None, None, None, note="the features hold nan or inf"),
    ),
    cautions=(Caution("ties with the pick", value=2),),
)


def test_a_selection_survives_its_file() -> None:
    record = json.loads(SELECTION.to_json())
    assert record["pick"] == {"student": "a", "teacher": "b"}
    assert record["rejected"][0]["objections"][0]["code"] == "teacher in the tail"
    assert Selection.from_dict(record) == SELECTION
    assert SELECTION.pick == LayerPair("a", "b")
    assert SELECTION.best_teacher == SELECTION.layers[1]


@pytest.mark.parametrize("record", [{}, {"basis": 3}])
def test_other_records_are_refused(record: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"basis|cautions"):
        Selection.from_dict(record)


def test_a_code_without_words_is_refused() -> None:
    for before, after in (("teacher in the tail", "x"), ("ties with the pick", "y")):
        with pytest.raises(ValueError, match=f'code is "{after}", not one of'):
            Selection.from_dict(json.loads(SELECTION.to_json().replace(before, after)))
