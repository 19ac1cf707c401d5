"""The arms that are asked for are the arms that are trained, and each pair is trained once."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from layerprobe.analyses.experiments.arms import (
    BASELINE,
    LEARNING_RATE,
    NEGATIVE_CONTROL,
    PICK,
    PRIOR,
    RUNNER_UP,
    SAME_DISTANCE,
    SRA,
    Arm,
    ConfirmationPlan,
    arms_for,
    missing_arms,
    sra_options,
)
from layerprobe.layersync.options import SyncOptions
from layerprobe.layersync.pair import LayerPair
from layerprobe.training.plan import TrainingPlan

LAYERS = tuple(f"blocks.{i}" for i in range(10))
RANKED = (LayerPair("blocks.1", "blocks.7"), LayerPair("blocks.1", "blocks.6"))
FOUR = (RANKED[0], LayerPair("blocks.2", "blocks.7"))  # with the prior and the control, four pairs
ARMS = arms_for(RANKED, LAYERS)
OPTIONS = {"projector_width": 32, "teacher_decay": 0.9, "noise_gap": 0.2}
SEEDS = (0, 1, 2)
PLAN = ConfirmationPlan(TrainingPlan(steps=100), SEEDS)


def test_the_usual_arms_are_five_without_duplicates() -> None:
    assert [arm.name for arm in ARMS] == [BASELINE, PICK, PRIOR, SAME_DISTANCE, NEGATIVE_CONTROL]
    prior, control, other = (LayerPair(f"blocks.{s}", f"blocks.{t}") for s, t in ((1, 6), (8, 9), (0, 7)))
    assert [arm.pair for arm in ARMS[:3] + ARMS[4:]] == [None, RANKED[0], prior, control]
    for ranked, names, missing in (
        ([], [BASELINE, PRIOR, SAME_DISTANCE, NEGATIVE_CONTROL], (PICK,)),
        ([prior, other], [BASELINE, PICK, SAME_DISTANCE, NEGATIVE_CONTROL], ()),
        ([other, prior], [BASELINE, PICK, PRIOR, SAME_DISTANCE, NEGATIVE_CONTROL], ()),
        ([control], [BASELINE, PICK, PRIOR, SAME_DISTANCE], (NEGATIVE_CONTROL,)),
        ([LayerPair("blocks.0", "blocks.9")], [BASELINE, PICK, PRIOR, NEGATIVE_CONTROL], (SAME_DISTANCE,)),
    ):
        arms = arms_for(ranked, LAYERS)
        assert [arm.name for arm in arms] == names
        assert missing_arms(arms) == missing
        assert len({arm.pair for arm in arms}) == len(arms)
    two = arms_for([], LAYERS[:2])
    assert [(arm.name, arm.also) for arm in two] == [(BASELINE, ()), (PRIOR, (NEGATIVE_CONTROL,))]
    assert missing_arms(two) == (PICK, SAME_DISTANCE, NEGATIVE_CONTROL)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ranked", [RANKED, RANKED[:1], (), (LayerPair("blocks.0", "blocks.1"),)])
def test_the_random_pair_is_as_far_apart_as_the_pick_and_is_no_other_arm_s(ranked: Any, seed: int) -> None:
    arms = {arm.name: arm.pair for arm in arms_for(ranked, LAYERS, seed=seed)}
    drawn, like = arms.pop(SAME_DISTANCE), arms.get(PICK) or arms[PRIOR]
    assert drawn is not None
    assert like is not None
    assert _distance(drawn) == _distance(like)
    assert drawn not in {*arms.values(), *ranked[:2]}


def test_the_seed_decides_the_random_pair_of_the_same_distance() -> None:
    drawn = [arms_for(RANKED, LAYERS, seed=seed)[3] for seed in range(12)]
    assert len({arm.pair for arm in drawn}) == 3  # all pairs of its distance but the pick
    assert drawn[2] == arms_for(RANKED, LAYERS, seed=2, names=["none", "same-distance"])[1]


def _distance(pair: LayerPair) -> int:
    return LAYERS.index(pair.teacher) - LAYERS.index(pair.student)


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
    every = [BASELINE, PICK, PRIOR, SAME_DISTANCE, RUNNER_UP, "random pair 1", "random pair 2"]
    every += [LEARNING_RATE, SRA, NEGATIVE_CONTROL]
    assert (
        names("bad,sra,learning-rate,random:2,runner-up,same-distance,prior,pick,none", FOUR, options=OPTIONS) == every
    )
    assert names("none,runner-up") == [BASELINE, RUNNER_UP]
    matched = arms_for(RANKED, LAYERS, names=["none", "pick", "learning-rate"])[2]
    assert (matched.pair, matched.matched) == (None, RANKED[0])
    assert str(matched) == "learning rate (baseline with steps as long as with blocks.1 <- blocks.7)"


def test_an_arm_that_is_there_already_is_named_there() -> None:
    prior = ARMS[2].pair
    assert prior is not None
    arms = arms_for([prior, RANKED[0]], LAYERS, names=["none", "pick", "prior", "bad"])
    assert [str(arm) for arm in arms] == [
        BASELINE,
        "pick and published prior (blocks.1 <- blocks.6)",
        "negative control (blocks.8 <- blocks.9)",
    ]


def test_methods_are_arms_of_their_own_on_a_pair() -> None:
    """SRA is its three parts on the pick; a part may have another value; the pair of a method is no duplicate."""
    wanted = ["none", "pick", "sra", "pick+noise-gap:0.1", "prior+projector+teacher-decay:0.5"]
    arms = arms_for(RANKED[:1], LAYERS, names=wanted, options=OPTIONS)
    assert [str(arm) for arm in arms] == [
        BASELINE,
        "pick (blocks.1 <- blocks.7)",
        "SRA (blocks.1 <- blocks.7, projector width 32, teacher decay 0.9, noise gap 0.2)",
        "pick with noise gap 0.1 (blocks.1 <- blocks.7, noise gap 0.1)",
        "published prior with projector and teacher decay 0.5 (blocks.1 <- blocks.6, projector width 32, teacher decay "
        "0.5)",
    ]
    shared = TrainingPlan(steps=100, ema_decay=0.9, sync=SyncOptions(centered=True))
    assert sra_options(shared, token_width=16) == OPTIONS
    assert sra_options(replace(shared, ema_decay=0.99999), token_width=16)["teacher_decay"] == 0.9999
    own = SyncOptions(centered=True, projector_width=32, teacher_decay=0.9, noise_gap=0.2)
    assert arms[2].training(shared) == replace(shared, pairs=RANKED[:1], sync=own)
    assert arms[0].training(shared) == shared
    same = arms_for(RANKED, LAYERS, names=["none", "sra", "pick+projector+teacher-decay+noise-gap"], options=OPTIONS)
    assert (len(same), same[1].also) == (2, ("pick with projector and teacher decay and noise gap",))
    # A method whose options all arms have would be trained twice.
    pair, off = ["none", "pick", "pick+noise-gap:0"], SyncOptions(noise_gap=0.2)
    assert len(arms_for(RANKED, LAYERS, names=pair)) == 2
    assert len(arms_for(RANKED, LAYERS, names=pair, sync=off)) == 3
    assert arms_for((), LAYERS, names=["none", "sra"], options=OPTIONS)[1].pair == ARMS[2].pair


def test_random_pairs_are_those_that_no_other_arm_could_have() -> None:
    others = {arm.pair for arm in arms_for(FOUR, LAYERS, names=["none", "pick", "prior", "runner-up", "bad"])}
    others.add(arms_for(FOUR, LAYERS)[3].pair)
    drawn = arms_for(FOUR, LAYERS, names=["none", "pick", "random:40"])[2:]
    assert len({arm.pair for arm in drawn}) == 40  # 45 pairs but for five
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
            "unknown arm 'best'; pass some of none, pick, prior, same-distance, runner-up, random, learning",
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
        ("none,heuristic", RANKED, "unknown arm 'heuristic'"),
        ("none,bad+noise-gap", RANKED, r"unknown arm 'bad\+noise-gap'; .*or pick\+projector\+teacher-decay\+noise-gap"),
        ("none,pick+noise-gap+noise-gap", RANKED, "unknown arm 'pick"),
        ("none", RANKED, "the arms none align no layers; add pick or prior"),
        ("none,learning-rate", RANKED, "the arms none,learning-rate align no layers"),
        ("none,pick+noise-gap:wide", RANKED, "noise-gap:wide needs a number after its colon, such as noise-gap:0.2"),
        ("none,pick+projector:8.5", RANKED, "projector:8.5 needs an integer after its colon, such as projector:32"),
        ("none,pick+noise-gap:2", RANKED, r"noise_gap in \[0, 1\], got 0.0, 2.0"),
        ("none,same-distance", (LayerPair("blocks.0", "blocks.9"),), "a network of 10 layers has no pair for the arm"),
        ("none,random:41", FOUR, "only 40 pairs are left for random pairs, too few for random:41"),
    ],
)
def test_arms_that_cannot_be_are_refused(wanted: str, ranked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        names(wanted, ranked, options=OPTIONS)
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
