"""What is said before a confirmation trains is what its numbers say."""

from __future__ import annotations

from typing import get_args

from layerprobe.analyses.experiments.arms import NEGATIVE_CONTROL, PICK, SAME_DISTANCE
from layerprobe.analyses.experiments.branching import BranchCourse, StartCaution
from layerprobe.analyses.experiments.power import ENOUGH_STEPS, Spread, power, resolution
from layerprobe.analyses.wording import (
    converged_sentence,
    cost_sentence,
    length_cautions,
    missing_arm_sentences,
    published_gain_sentences,
    resolution_sentences,
    spread_source,
    start_sentences,
)


def test_the_published_gain_is_that_of_the_stage_and_names_its_source() -> None:
    source, stage, needed = published_gain_sentences(300_000, resolution(3))
    assert source.startswith("LayerSync gained 40% after 100K, 37% after 400K, 24% after 4M steps of 256 samples")
    assert "(SiT-XL/2, 8 <- 16 of 28 blocks; LayerSync, arXiv:2510.12581;" in source.replace(
        ", pair from the README of the code", ","
    ).replace("; pair from the README of the code;", ";")
    assert stage == "These arms end at step 300000; the nearest of them is 37% after 400K steps."
    # 37.4 % / 3 over the 3.26 spreads that three seeds find.
    assert needed.startswith(
        "A third of 37% is 12% of the distance: 3 seeds show it if the spread over seeds is at most 3.8%"
    )
    assert needed.endswith("Two finished seeds, --pilot or --spread tell the spread.")
    early = published_gain_sentences(1000, resolution(3))
    assert early[1].startswith("These arms end at step 1000, long before the first of them")
    assert "A third of 40% is 13%" in early[2]
    unknown = published_gain_sentences(None, resolution(3))
    assert "is not recorded, so the smallest of these is taken: 24% after 4M steps" in unknown[1]
    assert "A third of 24% is 8%" in unknown[2]


def test_seeds_for_a_third_of_the_published_gain_come_from_the_measured_spread() -> None:
    spread = Spread(0.08, 3, "this confirmation", 1000)
    needed = published_gain_sentences(100_000, resolution(3, spread=spread))[2]
    third = (1 - 16.03 / 26.53) / 3
    num = next(n for n in range(2, 99) if power(third / spread.share, n) >= 0.8)
    assert f"with this spread {num} seeds show it, at a length where gains were seen: 100K steps there" in needed
    wide = Spread(3.0, 3, "this confirmation", 1000)
    assert "more than 200 seeds" in published_gain_sentences(100_000, resolution(3, spread=wide))[2]


def test_the_start_is_told_with_what_is_known_of_it() -> None:
    sentences = start_sentences(get_args(StartCaution), trained_steps=6000, fall=0.004)
    assert (
        "method for training from scratch, and these arms branch from a checkpoint trained for 6000 steps"
        in sentences[0]
    )
    assert (
        "its held-out loss fell by 0.4% over the last quarter of its training (converged: less than 1%)" in sentences[1]
    )
    assert "a warning comes when its first seed has trained" in sentences[2]
    assert "an unrecorded number of steps" in start_sentences(("branch",), trained_steps=None, fall=None)[0]
    assert "over them the baseline's held-out loss fell by 0.2% at most (converged: less than 1%) and its Fréchet" in (
        converged_sentence(BranchCourse(90, 0.002, 0.01))
    )


def test_arms_that_cannot_be_and_the_cost_are_told() -> None:
    pick, same, control = missing_arm_sentences((PICK, SAME_DISTANCE, NEGATIVE_CONTROL), 3)
    assert "control" in control
    assert pick == "The selection has no pick, so the verdict will be about another pair."
    assert same == "There is no random pair of the same distance: 3 layers have no other pair of it."
    cost = cost_sentence(num_arms=5, num_seeds=3, steps=10, num_evaluations=4, num_samples=9, duration="12 min")
    assert cost.startswith(
        "5 arms x 3 seeds x 10 steps, with 4 evaluations of 9 samples each, take about 12 min on this"
    )


def test_the_resolution_is_told_before_the_training() -> None:
    assert resolution_sentences(resolution(3)) == [
        "3 seeds find a difference of 3.3 times its spread over seeds with a probability of at least 80% (two-sided t "
        "test, error rate 5%).",
        "The spread is not known before the first seeds; pass --spread or --pilot to state it.",
    ]
    stated = resolution(3, spread=Spread(0.04, None, "stated"))
    assert resolution_sentences(stated)[1:] == [
        "With a spread of 4.0% of the distance (as stated), that is 13.1% of the distance.",
        "A difference half as large takes 6 seeds.",
    ]
    assert power(stated.in_spreads / 2, 6) >= 0.8 > power(stated.in_spreads / 2, 5)
    pilot = Spread(0.04, 2, "pilot", 9)
    assert spread_source(pilot) == "2 seeds of the pilot, after 9 steps"
    uncertain = "that is 13.1% of the distance, or 7.9% to 103.9% given how few seeds the spread was estimated from."
    assert resolution_sentences(resolution(3, spread=pilot))[1].endswith(uncertain)


def test_short_trainings_are_told_what_they_cannot_show() -> None:
    assert length_cautions(ENOUGH_STEPS, trained_steps=ENOUGH_STEPS) == []
    (line,) = length_cautions(ENOUGH_STEPS - 1)
    assert line.startswith("3999 steps show what alignment costs at first")
    (line,) = length_cautions(ENOUGH_STEPS, trained_steps=ENOUGH_STEPS + 1)
    assert f"trained for {ENOUGH_STEPS + 1} steps, the arms for {ENOUGH_STEPS}" in line
    assert len(length_cautions(10, trained_steps=20)) == 2
