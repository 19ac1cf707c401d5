"""The arms that are asked for are the arms that are trained, and each pair is trained once."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from layerprobe.analyses.experiments.arms import (
    BASELINE,
    HEURISTIC,
    LEARNING_RATE,
    NEGATIVE_CONTROL,
    PICK,
    RUNNER_UP,
    Arm,
    ConfirmationPlan,
    arms_for,
)
from layerprobe.layersync.options import SyncOptions
from layerprobe.layersync.pair import LayerPair
from layerprobe.training.plan import TrainingPlan

LAYERS = tuple(f"blocks.{i}" for i in range(10))
RANKED = (LayerPair("blocks.1", "blocks.7"), LayerPair("blocks.1", "blocks.6"))
ARMS = arms_for(RANKED, LAYERS)
SEEDS = (0, 1, 2)
PLAN = ConfirmationPlan(TrainingPlan(steps=100), SEEDS)


def test_arms_are_four_without_duplicates() -> None:
    assert [arm.name for arm in ARMS] == [BASELINE, PICK, HEURISTIC, NEGATIVE_CONTROL]
    heuristic, control = LayerPair("blocks.2", "blocks.5"), LayerPair("blocks.8", "blocks.9")
    assert [arm.pair for arm in ARMS] == [None, LayerPair("blocks.1", "blocks.7"), heuristic, control]
    other = LayerPair("blocks.1", "blocks.6")
    for ranked, names in (
        ([], [BASELINE, HEURISTIC, NEGATIVE_CONTROL]),
        ([heuristic], [BASELINE, PICK, NEGATIVE_CONTROL]),
        ([heuristic, other], [BASELINE, PICK, RUNNER_UP, NEGATIVE_CONTROL]),
        ([other, heuristic], [BASELINE, PICK, HEURISTIC, NEGATIVE_CONTROL]),
        ([control], [BASELINE, PICK, HEURISTIC]),
    ):
        arms = arms_for(ranked, LAYERS)
        assert [arm.name for arm in arms] == names
        assert len({arm.pair for arm in arms}) == len(arms)
    assert [arm.name for arm in arms_for([], LAYERS[:2])] == [BASELINE, HEURISTIC]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (0,)}, r"a paired difference needs at least 2 seeds, got \[0\]"),
        ({"seeds": (3, 3)}, r"needs at least 2 seeds, got \[3, 3\]"),
        ({"seeds": (0, 1, 1)}, r"the seeds \[0, 1, 1\] contain a duplicate; pass each seed once"),
        ({"num_evaluations": 0}, "0 evaluations do not fit into 100 steps"),
        ({"num_evaluations": 101}, "101 evaluations do not fit into 100 steps"),
        ({"num_samples": 1}, "a Fréchet distance needs at least 2 samples, got 1"),
        ({"stop_early": True}, "stopping early needs 4 to 50 seeds"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **options)


@pytest.mark.parametrize(("steps", "num"), [(100, 4), (10, 3), (7, 7), (1000, 3), (3, 1)])
def test_evaluations_are_even_and_end_at_the_end(steps: int, num: int) -> None:
    found = ConfirmationPlan(TrainingPlan(steps=steps), SEEDS, num).evaluation_steps
    assert (found[0], found[-1], len(found)) == (0, steps, num + 1)
    assert max(abs(a - b - steps / num) for a, b in zip(found[1:], found, strict=False)) <= 1


def names(wanted: str, ranked: Any = RANKED, **options: Any) -> list[str]:
    return [arm.name for arm in arms_for(ranked, LAYERS, names=wanted.split(","), **options)]


def test_arms_come_as_asked_for_and_in_one_order() -> None:
    every = [BASELINE, PICK, HEURISTIC, RUNNER_UP, "random pair 1", "random pair 2", LEARNING_RATE, NEGATIVE_CONTROL]
    assert names("bad,learning-rate,random:2,runner-up,heuristic,pick,none") == every
    assert names("none,runner-up") == [BASELINE, RUNNER_UP]
    matched = arms_for(RANKED, LAYERS, names=["none", "pick", "learning-rate"])[2]
    assert (matched.pair, matched.matched) == (None, RANKED[0])
    assert str(matched) == "learning rate (baseline with steps as long as with blocks.1 <- blocks.7)"


def test_an_arm_that_is_there_already_is_named_there() -> None:
    heuristic = ARMS[2].pair
    assert heuristic is not None
    arms = arms_for([heuristic, RANKED[0]], LAYERS, names=["none", "pick", "heuristic", "bad"])
    assert [str(arm) for arm in arms] == [
        BASELINE,
        "pick and depth heuristic (blocks.2 <- blocks.5)",
        "negative control (blocks.8 <- blocks.9)",
    ]


def test_random_pairs_are_those_that_no_other_arm_could_have() -> None:
    others = {arm.pair for arm in arms_for(RANKED, LAYERS, names=["none", "pick", "heuristic", "runner-up", "bad"])}
    drawn = arms_for(RANKED, LAYERS, names=["none", "pick", "random:41"])[2:]
    assert len({arm.pair for arm in drawn}) == 41  # 45 pairs but for four
    assert not {arm.pair for arm in drawn} & others
    three = {seed: arms_for(RANKED, LAYERS, names=["none", "random:3"], seed=seed)[1:] for seed in (0, 1)}
    # More random pairs, and other arms beside them, leave the first ones as they are: their runs can go on.
    assert three[0] == arms_for(RANKED, LAYERS, names=["none", "bad", "random:5"])[1:4]
    assert three[0] != three[1]


@pytest.mark.parametrize(
    ("wanted", "ranked", "message"),
    [
        (
            "none,best",
            RANKED,
            "unknown arm 'best'; pass some of none, pick, heuristic, runner-up, random, learning",
        ),
        ("none,pick:2", RANKED, "unknown arm 'pick:2'"),
        ("none,random:0", RANKED, "unknown arm 'random:0'"),
        ("none,random:x", RANKED, "unknown arm 'random:x'"),
        ("none,", RANKED, "unknown arm ''"),
        ("none,pick,pick", RANKED, "the arm 'pick' is listed twice in none,pick,pick; pass each arm once"),
        ("none,random,random:2", RANKED, "the arm 'random' is listed twice"),
        ("pick,bad", RANKED, "the arms pick,bad lack none, the baseline of all comparisons; add it"),
        ("none,runner-up", RANKED[:1], "the selection has no pair for the arm 'runner-up'; leave it out of --arms"),
        ("none,pick", (), "the selection has no pair for the arm 'pick'"),
        ("none,random:42", RANKED, "only 41 pairs are left for random pairs, too few for random:42"),
    ],
)
def test_arms_that_cannot_be_are_refused(wanted: str, ranked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        names(wanted, ranked)
    assert "\n" not in str(error.value)


def test_seeds_and_early_stops_may_change_when_a_confirmation_is_continued() -> None:
    assert replace(PLAN, stop_early=True, seeds=(5, 6, 7, 8)).identity() == PLAN.identity()
    assert replace(PLAN, num_samples=7).identity() != PLAN.identity()
    centered = replace(PLAN, training=replace(PLAN.training, sync=SyncOptions(centered=True)))
    assert centered.identity()["training"]["sync"] == asdict(SyncOptions(centered=True))


def test_looks_are_one_at_the_end_unless_it_may_stop_early() -> None:
    assert PLAN.looks == {3: 0.05}
    assert list(replace(PLAN, seeds=(0, 1, 2, 3, 4), stop_early=True).looks) == [3, 4, 5]


def test_arms_have_names_for_people() -> None:
    assert [str(arm) for arm in (Arm(BASELINE, None), Arm("mine", RANKED[1]))] == [
        BASELINE,
        "mine (blocks.1 <- blocks.6)",
    ]
