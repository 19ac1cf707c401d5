"""The words say what the record holds: every code has its sentence, and every number in it is the record's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest

from layerprobe.analyses.experiments.arms import BASELINE, LEARNING_RATE, PICK, PRIOR, RANDOM
from layerprobe.analyses.experiments.branching import BranchCourse
from layerprobe.analyses.experiments.power import Spread, resolution
from layerprobe.analyses.experiments.verdict import Answer, ArmResult, Comparison, Trend, Verdict, VerdictCaution
from layerprobe.analyses.wording import (
    answer_title,
    short_answer,
    verdict_cautions,
    verdict_details,
    verdict_paragraph,
    verdict_sentence,
)


def result(name: str, final: float, *, student: str | None = None, rate: float = 1e-4) -> ArmResult:
    interval = (None, None, None) if name == BASELINE else (final - 4, final - 4.1, final - 3.9)
    teacher = None if student is None else "blocks.7"
    trend = Trend(best=3.5, best_step=50, late_gain=0.17, late_step=75)
    return ArmResult(name, student, teacher, 0.3, [final - 0.1, final + 0.1], *interval, [None, 80.0], rate, trend)


VERDICT = Verdict(
    metric="Frechet distance",
    extractor="pixels",
    lower_is_better=True,
    start="from scratch",
    steps=100,
    num_seeds=3,
    num_samples=10,
    answer="helps",
    cautions=(),
    arms=(result(BASELINE, 4.0), result(PICK, 3.5, student="blocks.1")),
    judged=PICK,
    comparisons=(),
    planned_seeds=3,
    stop_early=False,
    level=0.05,
    looks={3: 0.05},
)
CHANGE = (
    "Aligning blocks.1 to blocks.7 changed the Fréchet distance from the baseline's 4 by -0.5 (95 % interval -0.6 to "
    "-0.4), after 100 steps from scratch with 3 seeds."
)


def paragraph(**changes: Any) -> str:
    return verdict_paragraph(replace(VERDICT, **changes))


def test_the_paragraph_gives_the_difference_and_the_answer() -> None:
    assert paragraph() == f"{CHANGE} The pair helps: the whole interval lies below zero."
    hurts = "The pair hurts: the whole interval lies above zero, and both runs have leveled off."
    assert paragraph(answer="hurts") == f"{CHANGE} {hurts}"
    nothing = "No difference was found: the interval includes zero, and both runs have leveled off."
    assert paragraph(answer="no difference found") == f"{CHANGE} {nothing}"


def test_one_sentence_gives_the_answer_or_why_there_is_none() -> None:
    assert verdict_sentence(VERDICT) == "The pair helps: the whole interval lies below zero."
    undecided = replace(VERDICT, answer="too early to tell", cautions=("baseline still improves", "no arm moved"))
    assert verdict_sentence(undecided) == verdict_cautions(undecided)[0]
    assert verdict_details(undecided) == []


@pytest.mark.parametrize(
    ("answer", "caution", "sentence"),
    [
        (
            "too early to tell",
            "baseline still improves",
            "The baseline still improved by 17% since step 75, and alignment can cost quality at first and pay off "
            "later. Run more steps.",
        ),
        (
            "helps",
            "baseline still improves",
            "The baseline still improved by 17% since step 75, so the lead may not last.",
        ),
        (
            "too early to tell",
            "aligned arm still improves",
            "The aligned arm still improved by 17% since step 75, and alignment can cost quality at first and pay off "
            "later. Run more steps.",
        ),
        (
            "too early to tell",
            "baseline got worse",
            "The baseline's distance was lowest at step 50 (3.5) and ended at 4, so there is no settled level to "
            "compare with. Run more steps or lower the learning rate.",
        ),
        (
            "too early to tell",
            "no spread over seeds",
            "Every seed gave the same difference, so there is no spread to judge by. Run other seeds.",
        ),
        (
            "too early to tell",
            "no arm moved",
            "Neither run changed by 5% since its start. Run more steps or raise the learning rate.",
        ),
    ],
)
def test_a_caution_follows_the_answer(answer: Answer, caution: VerdictCaution, sentence: str) -> None:
    verdict = replace(VERDICT, answer=answer, cautions=(caution,))
    assert verdict_cautions(verdict) == [sentence]
    assert verdict_paragraph(verdict).endswith(sentence)
    assert ("It is too early to tell. " in verdict_paragraph(verdict)) == (answer == "too early to tell")


def test_every_code_has_a_sentence() -> None:
    arms = (*VERDICT.arms, result(LEARNING_RATE, 3.6, rate=2e-4))
    comparison = Comparison("learning rate", 1, -0.1, -0.3, 0.1)
    changes = {"comparisons": (comparison,), "branch": BranchCourse(90, 0.002, 0.01)}
    verdict = replace(VERDICT, arms=arms, cautions=get_args(VerdictCaution), **changes)
    sentences = verdict_cautions(verdict)
    assert len(set(sentences)) == len(get_args(VerdictCaution))
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in sentences)


def test_a_difference_that_is_clear_too_early_is_told_as_a_cost_so_far() -> None:
    early = {"answer": "too early to tell", "cautions": ("baseline still improves",)}
    assert "It is too early to tell." in paragraph(**early)
    worse = replace(VERDICT.arms[1], low=0.1, high=0.3)
    text = paragraph(**early, arms=(VERDICT.arms[0], worse))
    assert "So far the pair costs: the whole interval lies above zero. It is too early to tell how it ends." in text
    verdict = replace(VERDICT, **early, arms=(VERDICT.arms[0], worse))
    assert (short_answer(verdict), answer_title("pick", verdict)) == ("costs so far", "pick costs so far")
    assert verdict_sentence(verdict).startswith("So far the pair costs")
    assert short_answer(replace(VERDICT, **early)) == "too early to tell"


def test_another_arm_than_the_pick_is_named() -> None:
    arms = (VERDICT.arms[0], result(PRIOR, 3.5, student="blocks.1"))
    text = paragraph(arms=arms, judged=PRIOR, cautions=("judged arm is not the pick",))
    assert text.endswith("The pick is not among the arms, so the verdict is about the published prior.")


def test_the_step_length_is_excluded_or_is_a_caution() -> None:
    arms = (*VERDICT.arms, result(LEARNING_RATE, 3.9, rate=2e-4))
    clear = paragraph(arms=arms, comparisons=(Comparison("learning rate", 1, -0.4, -0.5, -0.3),))
    interval = "with steps of the same length (learning rate 0.0002) is -0.4 (-0.5 to -0.3)"
    assert f"{interval}, so its step length does not explain the gain." in clear
    open_question = paragraph(
        arms=arms,
        comparisons=(Comparison("learning rate", 1, -0.1, -0.3, 0.1),),
        cautions=("gain may come from step length",),
    )
    assert "is -0.1 (-0.3 to +0.1), so the gain may come from its step length alone." in open_question
    assert open_question.count("learning rate 0.0002") == 1
    # Only a gain can come from the step length.
    comparisons = (Comparison("learning rate", 1, 0.4, 0.3, 0.5),)
    assert "step length" not in paragraph(arms=arms, answer="hurts", comparisons=comparisons)


def test_random_pairs_and_the_lowest_arm_are_named() -> None:
    arms = (*VERDICT.arms, result(f"{RANDOM} 1", 3.9, student="blocks.2"), result(f"{RANDOM} 2", 3.7))
    text = paragraph(arms=arms, comparisons=(Comparison("random pairs", 2, -0.3, -0.4, -0.2),))
    assert "The pair's difference to the mean of 2 random pairs is -0.3 (-0.4 to -0.2)." in text
    assert text.endswith("Of the 4 arms, the pick ended lowest (3.5).")
    alone = paragraph(arms=arms[:3], comparisons=(Comparison("random pairs", 1, -0.4, -0.5, -0.3),))
    assert "difference to a random pair is -0.4" in alone
    lower = (*VERDICT.arms, result(f"{RANDOM} 1", 3.0))
    assert paragraph(arms=lower).endswith("Of the 3 arms, random pair 1 ended lowest (3).")


def test_the_prior_and_the_pair_of_the_same_distance_are_named() -> None:
    comparisons = (Comparison("published prior", 1, -0.1, -0.4, 0.2), Comparison("same distance", 1, -0.2, -0.3, -0.1))
    assert paragraph(comparisons=comparisons).endswith(
        "The pair's difference to the published prior is -0.1 (-0.4 to +0.2). "
        "The pair's difference to a random pair of the same distance is -0.2 (-0.3 to -0.1)."
    )
    arms = (VERDICT.arms[0], replace(VERDICT.arms[1], also=(PRIOR,)))
    assert paragraph(arms=arms).endswith("It is also the pair of the published prior, which was trained once.")


def test_early_looks_are_told() -> None:
    early = paragraph(stop_early=True, planned_seeds=8)
    assert "(95 % interval over all looks -0.6" in early
    told = "at levels that keep the error rate of all tests at 5%, and the difference was clear after 3 of 8."
    assert early.endswith(told)
    assert paragraph(stop_early=True).endswith("keep the error rate of all tests at 5%.")
    unplanned = paragraph(
        looks={3: 0.05, 6: 0.05}, error_rate=0.089, stop_early=True, cautions=("looks not planned together",)
    )
    assert unplanned.endswith(
        "The difference was tested after 3 and 6 seeds, at levels that were not planned together: where there is no "
        "difference, one would be found in 8.9% of cases."
    )


def test_no_difference_says_which_one_would_have_been_found() -> None:
    known = resolution(3, spread=Spread(0.01, 3, "this verdict", 100))
    text = paragraph(answer="no difference found", resolution=known)
    expected = (
        "With the spread that these seeds show, 3 seeds find a difference of 0.13 (3%) with a probability of 80%."
    )
    assert text.endswith(expected)
    assert expected not in paragraph(resolution=known)


def test_titles_name_the_arm_or_the_answer() -> None:
    assert answer_title("pick", None) == "pick"
    assert answer_title("pick", VERDICT) == "pick helps"
    assert answer_title("pick", replace(VERDICT, answer="too early to tell")) == "too early to tell"
