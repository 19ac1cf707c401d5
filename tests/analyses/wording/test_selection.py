"""Every code of a selection has its sentence, with the numbers that the record holds."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from layerprobe.analyses.selection.records import (
    Caution,
    CautionCode,
    LayerQuality,
    Objection,
    ObjectionCode,
    RankedPair,
    RejectedPair,
    ScorePart,
    Selection,
    SelectionBasis,
)
from layerprobe.analyses.wording.selection import (
    caution_texts,
    objection_texts,
    pair_reasons,
    score_sentence,
    selection_headline,
    selection_reason,
    weight_text,
)

BASIS = SelectionBasis("probe accuracy", "validation", (0.1,), ("a", "b", "c"), ("c",), ("a",), (), 2, 0.9, 0.05, ())
LAYERS = (
    LayerQuality("a", 0.25, 0.24, 0.26, may_teach=True),
    LayerQuality("b", 0.5, 0.49, 0.51, may_teach=True, ties_with_best=True),
    LayerQuality("c", 0.1, 0.09, 0.11),
)
PAIR = RankedPair(
    student="a",
    teacher="b",
    score=1.5,
    score_low=1.25,
    score_high=1.75,
    parts=(ScorePart("effective rank gap", 0.6875, 0.5, 0.75, 1.0), ScorePart("CKA", 0.729, 0.7, 0.75, 0.5)),
    teacher_quality=0.5,
    student_quality=0.25,
    gap=0.25,
    gap_is_certain=True,
    mean_cka=0.729,
    distance=1,
    teacher_is_best=True,
    ties_with_first=False,
)


def selection(*pairs: RankedPair, rejected: tuple[RejectedPair, ...] = (), **changes: object) -> Selection:
    return replace(Selection(BASIS, False, pairs, rejected, LAYERS, ()), **changes)  # type: ignore[arg-type]


def test_the_reason_for_a_pick_explains_the_score_that_ranked_it() -> None:
    assert selection_reason(selection(PAIR)) == (
        "The teacher b is the best layer that may teach: probe accuracy 0.500; the student a is 0.250 weaker. They are "
        "1 layer apart, at 0.33 and 0.67 of the depth, with a mean CKA (likeness) of 0.729; the published pair at the "
        "nearest depths is Self-Flow, SiT-XL/2: 8 <- 20 (0.29, 0.71), gain +30% in FID at 400K steps, 0.82 of the best "
        "gain of its study (figure, read off). The score, +1.50 (+1.25 to +1.75), is +1.00 for effective rank gap "
        "(0.688) and +0.50 for CKA (0.729)."
    )
    assert score_sentence(replace(PAIR, parts=PAIR.parts[:1])).endswith(" is +1.00 for effective rank gap (0.688).")


def test_a_teacher_that_ties_or_is_below_the_best_is_said_to() -> None:
    tied = replace(PAIR, teacher="a", teacher_quality=0.49, gap=-0.01, gap_is_certain=False, ties_with_first=True)
    reasons = pair_reasons(tied, selection(tied))
    assert reasons[0] == (
        "The teacher a ties with b (0.500), the best layer that may teach: probe accuracy 0.490; the student a is "
        "0.010 stronger, which is within the uncertainty."
    )
    assert reasons[-1] == "The data cannot tell it from the pick."
    below = replace(tied, teacher_is_best=False)
    assert pair_reasons(below, selection(below))[0].startswith("The teacher a is below b (0.500), the best layer that")


OBJECTIONS = {
    Objection("teacher in the tail", limit=1): "b is the last layer, where networks decode",
    Objection("student in the head", limit=2): "a is among the first 2 layers, where networks only take in the input",
    Objection("student too deep", value=5, limit=8): "a is layer 5 of 8; published students gained little beyond half",
    Objection("all layers alike", "CKA", value=0.95, limit=0.9): (
        "all layers are alike: the mean CKA of every pair is 0.950 or more, above 0.9"
    ),
    Objection("too close", value=1, limit=2): "they are 1 apart, and at least 2 is required",
    Objection("different shapes", note="a gives 16 x 64, b 4 x 64"): "their tokens differ in shape: a gives 16 x 64, b",
    Objection("not measured", "CKA", note="at noise level 0.1, x"): "there is no CKA: at noise level 0.1, x",
    Objection("not measured", note="the evidence has no such pair"): "the evidence has no such pair",
    Objection("student not weaker", "probe accuracy gap", -0.1): "a is not weaker than b: probe accuracy 0.250 against",
    Objection("already alike", "CKA", 0.99, 0.98, 1.0, 0.9): "they are alike already: mean CKA 0.990, above 0.9",
    Objection("within linear reach", "recoverability gap", 0.06, -0.04, 0.16, 0.05): (
        "what the teacher adds is within the student's linear reach: the recoverability gap is 0.060, its interval "
        "begins at -0.040"
    ),
    Objection("teacher not needed", "teacher loss increase", 0.001, -0.002, 0.004, 0.0): (
        "the network does not need b: without it the loss rises by 0.0010 (-0.0020 to 0.0040)"
    ),
    Objection("below a control", "majority class", 0.7, 0.66, 0.74, 0.667): (
        "b is not surely above the share of the majority class: probe accuracy 0.700 (0.660 to 0.740) against 0.667"
    ),
    Objection("below a control", "random weights", 0.5, limit=0.55): (
        "b is not above the control 'random weights': probe accuracy 0.500 against 0.550"
    ),
    Objection("below a control", "raw input", 0.5, limit=0.55): "b is below the control 'raw input': probe accuracy",
    Objection("network does not denoise", value=2.125, note="--schedule sit --prediction velocity"): (
        "the network does not denoise this data under any known convention, so its features mean nothing: the error is "
        "2.12 times that of a linear denoiser at best (--schedule sit --prediction velocity); if the data and the "
        "weights are right, run `layerprobe probe` again with --trust-convention"
    ),
    Objection("nothing but noise", value=1.0): "every noise level is 1, where samples are pure noise",
}


@pytest.mark.parametrize(("objection", "text"), OBJECTIONS.items(), ids=[o.code for o in OBJECTIONS])
def test_an_objection_in_words(objection: Objection, text: str) -> None:
    (found,) = objection_texts(RejectedPair("a", "b", (objection,)), selection())
    assert found.startswith(text)


CAUTIONS = {
    Caution("alike", "CKA", value=0.95, limit=0.9): "The two are nearly alike: mean CKA 0.950, above 0.9.",
    Caution("teacher not the richest", value=0.4): "b is not the richest layer that may teach: b has 0.500 against 0.4",
    Caution(
        "shallower than published", value=6, limit=12
    ): "The network has 6 layers; the published comparisons are of",
    Caution(
        "narrower than published", value=48, limit=384
    ): "Its tokens are 48 wide, and the published comparisons are",
    Caution("layers named", value=5): "Depths are counted through the 5 layers that --layers names; they are wrong if",
    Caution("no labels"): "Chosen without labels: probe accuracy, not a probe, tells which layer is weaker, and no",
    Caution("effective rank counts noise"): "The effective rank stands in for the probe; it also counts the",
    Caution("needs not measured"): "Whether the network needs its layers was not measured.",
    Caution("gap within the uncertainty"): "The gap between a and b is within the uncertainty; use more samples.",
    Caution("ties with the pick", value=3): "The data cannot tell 3 other pairs from the pick; use more samples.",
    Caution("criterion not measured", "CKNNA", note="no CKNNA"): "Ranked without CKNNA (no CKNNA).",
    Caution("control knows as much", "raw input", 0.5, 0.55): "b is not surely above the control 'raw input': 0.500 a",
    Caution("only one pair"): "It is the only admissible pair, so there was no choice.",
    Caution("convention trusted", note="unclear"): "The convention check says 'unclear'; the declared schedule and",
    Caution("no controls"): "The features came without the network, so there are no controls: nothing tells what",
    Caution("probes not converged", "model", value=1, limit=16): "1 of 16 probes of 'model' did not converge.",
    Caution("probes at the end of the search", "raw input", value=2, limit=16): (
        "2 of 16 probes of 'raw input' took the last penalty of the search; with another one they may know more."
    ),
}


@pytest.mark.parametrize(("caution", "text"), CAUTIONS.items(), ids=[c.code for c in CAUTIONS])
def test_a_caution_in_words(caution: Caution, text: str) -> None:
    (found,) = caution_texts(selection(PAIR, cautions=(caution,)))
    assert found.startswith(text)


def test_the_weight_to_begin_with_is_smaller_where_tokens_are_narrow() -> None:
    assert weight_text(selection(PAIR)) == f"{selection(PAIR).weight:g}"
    narrow = Caution("narrower than published", value=48, limit=384)
    assert weight_text(selection(PAIR, cautions=(narrow,))) == "0.03 to begin with, since its tokens are narrow"
    assert "begin with a weight of 0.03" in caution_texts(selection(PAIR, cautions=(narrow,)))[0]


def test_every_code_is_tried_above() -> None:
    assert {objection.code for objection in OBJECTIONS} == set(get_args(ObjectionCode))
    assert {caution.code for caution in CAUTIONS} == set(get_args(CautionCode))


def test_without_an_admissible_pair_the_closest_one_is_named() -> None:
    far = RejectedPair("a", "c", (Objection("teacher in the tail", limit=1), Objection("student in the head", limit=1)))
    near = RejectedPair("a", "b", (Objection("too close", value=1, limit=2),))
    expected = "No pair is admissible. Closest to it is a <- b: they are 1 apart, and at least 2 is required."
    assert selection_reason(selection(rejected=(far, near))) == expected
    assert selection_reason(selection()) == "No pair is admissible: there are fewer than two layers."


def test_an_objection_to_the_run_is_the_only_reason() -> None:
    noise = Objection("nothing but noise", value=1.0)
    pairs = tuple(RejectedPair("a", b, (noise, Objection("too close", value=1, limit=2))) for b in "bc")
    reason = selection_reason(selection(rejected=pairs))
    assert reason.startswith("No pair is admissible: every noise level is 1")
    assert "apart" not in reason
    assert selection_headline(selection(rejected=pairs)) == f"none. {reason}"


def test_the_headline_has_the_reasons_to_doubt_a_pick_and_not_how_it_was_measured() -> None:
    assert selection_headline(selection(PAIR)) == "a should learn from b."
    noted = selection(PAIR, cautions=(Caution("no labels"), Caution("only one pair")))
    only = "It is the only admissible pair, so there was no choice."
    assert selection_headline(noted) == f"a should learn from b. Caution: {only}"
    two = replace(noted, cautions=(*noted.cautions, Caution("probes not converged", "model", value=1, limit=2)))
    unfinished = "1 of 2 probes of 'model' did not converge."
    assert selection_headline(two) == f"a should learn from b. 2 cautions: {only} {unfinished}"


def test_the_controls_stand_beside_the_accuracy_of_the_pick() -> None:
    basis = replace(BASIS, controls=(("majority class", 0.25), ("raw input", 0.125)))
    reason = selection_reason(selection(PAIR, basis=basis))
    assert ": probe accuracy 0.500 (controls: majority class 0.250 and raw input 0.125); the student" in reason
