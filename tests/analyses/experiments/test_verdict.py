"""The verdict never says more than the runs show."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from layerprobe.analyses.experiments.arms import (
    BASELINE,
    FRECHET,
    HELD_OUT,
    LEARNING_RATE,
    NEGATIVE_CONTROL,
    PICK,
    PRIOR,
    RANDOM,
    SAME_DISTANCE,
    SRA,
    Arm,
    ConfirmationPlan,
    arms_for,
)
from layerprobe.analyses.experiments.power import look_levels
from layerprobe.analyses.experiments.verdict import (
    Comparison,
    Verdict,
    is_clear,
    judge,
    paired_interval,
    steps_to_reach,
)
from layerprobe.layersync.pair import LayerPair
from layerprobe.training.plan import TrainingPlan

LAYERS = tuple(f"blocks.{i}" for i in range(10))
ARMS = arms_for([LayerPair("blocks.1", "blocks.7")], LAYERS, names=["none", "pick", "prior", "bad"])
SEEDS = (0, 1, 2)
STEPS = (0, 25, 50, 75, 100)
PLAN = ConfirmationPlan(TrainingPlan(steps=100), SEEDS)
SETTLED = (10.0, 6.0, 5.0, 4.1, 4.0)  # the baseline: improves by 2 % over the last quarter
FALL = (10, 6.5, 4.6, 3.6, 3.5)  # an arm that ends 0.5 lower
NOISE = (-0.05, 0.0, 0.05)  # what the seeds differ by, the same in every arm
JITTER = (0.01, -0.02, 0.01)  # what the differences differ by


def curves(arms: dict[str, Any], *, steps: tuple[int, ...] = STEPS, seeds: tuple[int, ...] = SEEDS) -> pd.DataFrame:
    """Planted curves: a row of distances by step for each arm, moved a little for each seed."""
    rows = []
    for arm, values in arms.items():
        for i, seed in enumerate(seeds):
            for step, value in zip(steps, values, strict=True):
                moved = value * (1 + NOISE[i]) + (JITTER[i] if arm != BASELINE else 0)
                rows += [(arm, seed, step, FRECHET, moved), (arm, seed, step, HELD_OUT, 1.0)]
    return pd.DataFrame(rows, columns=["arm", "seed", "step", "metric", "value"])


def verdict(
    baseline: Any, pick: Any, *, plan: ConfirmationPlan = PLAN, steps: tuple[int, ...] = STEPS, **others: Any
) -> Verdict:
    arms = [arm for arm in ARMS if arm.name in (BASELINE, PICK, *others)]
    table = curves({BASELINE: baseline, PICK: pick, **others}, steps=steps, seeds=plan.seeds)
    return judge(table, arms, plan, extractor_name="pixels", start_name="from scratch")


# -------------------------------------------------------------------------------------------------------------- verdict


def test_a_pick_that_is_better_at_the_end_helps() -> None:
    found = verdict(SETTLED, (10, 6.5, 4.6, 3.6, 3.5))
    assert (found.answer, found.cautions) == ("helps", ())


def test_a_lead_over_a_baseline_that_still_improves_is_called_a_lead() -> None:
    found = verdict((10, 8, 7, 6, 5), (10, 7, 6, 5, 4))
    assert (found.answer, found.cautions) == ("helps", ("baseline still improves",))
    trend = found.arms[0].trend
    assert (trend.late_gain, trend.late_step) == (pytest.approx(1 / 6), 75)


def test_a_pick_that_is_worse_when_both_have_levelled_off_hurts() -> None:
    found = verdict(SETTLED, (10, 7, 6, 5.1, 5.0))
    assert (found.answer, found.cautions) == ("hurts", ())


def test_an_interval_that_includes_zero_is_no_difference() -> None:
    found = verdict(SETTLED, (10, 6.5, 5.1, 4.1, 4.0))
    assert (found.answer, found.cautions) == ("no difference found", ())


@pytest.mark.parametrize("pick", [(10, 9, 8, 7, 6), (10, 8, 7, 6, 5)], ids=["behind", "level"])
def test_it_is_too_early_while_the_baseline_improves(pick: Any) -> None:
    found = verdict((10, 8, 7, 6, 5), pick)
    assert (found.answer, found.cautions) == ("too early to tell", ("baseline still improves",))


def test_it_is_too_early_while_the_aligned_run_catches_up() -> None:
    found = verdict(SETTLED, (10, 9, 8, 6, 4.5))
    assert (found.answer, found.cautions) == ("too early to tell", ("aligned arm still improves",))
    trend = found.arms[1].trend
    assert (trend.late_gain, trend.late_step) == (pytest.approx(0.25), 75)


def test_a_crossover_has_another_answer_before_than_after() -> None:
    """The course that was measured on digits of handwriting: a loss first, a gain later."""
    baseline, pick = (16.0, 10.9, 1.85, 0.96, 0.69), (16.0, 14.4, 1.51, 0.73, 0.51)
    early = replace(PLAN, training=TrainingPlan(steps=25))
    assert verdict(baseline[:2], pick[:2], plan=early, steps=STEPS[:2]).answer == "too early to tell"
    assert verdict(baseline, pick).answer == "helps"


@pytest.mark.parametrize("pick", [(10, 6, 5, 6.5, 8.5), (10, 6, 5, 7, 9), (10, 6, 5, 7.5, 9.5)])
def test_a_baseline_that_training_made_worse_is_no_measure(pick: Any) -> None:
    """Not even for a pick that ends better than it: it is worse than what there was at step 50."""
    found = verdict((10, 6, 5, 7, 9), pick)
    assert (found.answer, found.cautions) == ("too early to tell", ("baseline got worse",))
    assert (found.arms[0].trend.best_step, found.arms[0].trend.best) == (50, pytest.approx(5))


def test_a_branch_that_has_not_won_back_its_start_is_no_measure() -> None:
    found = verdict((0.19, 0.27, 0.25, 0.247, 0.247), (0.19, 0.3, 0.25, 0.248, 0.247))
    assert (found.answer, found.cautions) == ("too early to tell", ("baseline got worse",))
    assert found.arms[0].trend.best_step == 0


def test_a_pick_better_than_the_baseline_ever_was_helps_even_if_that_got_worse() -> None:
    assert verdict((10, 6, 5, 7, 9), (10, 6, 5, 4.2, 4)).answer == "helps"


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_runs_that_have_not_begun_to_learn_show_nothing(offset: float) -> None:
    found = verdict((20.6, 20.55, 20.5, 20.4, 20.3), (20.6, 20.55, 20.5, 20.4 + offset, 20.3 + offset))
    assert (found.answer, found.cautions) == ("too early to tell", ("no arm moved",))


def test_harm_to_a_checkpoint_that_has_converged_is_seen() -> None:
    assert verdict((5, 5, 5, 5, 5), (5, 6, 6.5, 6.5, 6.5)).answer == "hurts"


def test_a_checkpoint_is_not_called_converged_beside_a_baseline_that_still_improves() -> None:
    dipped = (10, 11, 11, 11, 9.8)  # 2 % below its start, and 11 % over the last quarter
    for baseline, cautions in (
        (dipped, ("baseline still improves",)),
        ((10, 10, 10, 9.9, 9.8), ("no arm moved", "start looks converged")),
    ):
        table = curves({BASELINE: baseline, PICK: baseline})
        found = judge(table, ARMS[:2], PLAN, extractor_name="pixels", start_name="from the checkpoint")
        assert found.cautions == cautions


def test_a_verdict_on_the_negative_control_says_so() -> None:
    table = curves({BASELINE: SETTLED, NEGATIVE_CONTROL: FALL})
    found = judge(table, (ARMS[0], ARMS[-1]), PLAN, extractor_name="pixels", start_name="from scratch")
    assert (found.judged, found.cautions) == (NEGATIVE_CONTROL, ("judged arm is not the pick",))


def test_one_evaluation_says_how_far_the_baseline_came_from_its_start() -> None:
    plan = replace(PLAN, num_evaluations=1)
    assert plan.evaluation_steps == (0, 100)
    found = verdict((10, 4), (10, 4.5), plan=plan, steps=(0, 100))
    assert (found.answer, found.cautions) == ("too early to tell", ("baseline still improves",))
    assert (found.arms[0].trend.late_gain, found.arms[0].trend.late_step) == (pytest.approx(0.6), 0)
    assert verdict((10, 4), (10, 3), plan=plan, steps=(0, 100)).answer == "helps"


def test_more_frequent_evaluations_do_not_make_a_run_look_settled() -> None:
    """Every interval gains 2 % and the last quarter 40 %."""
    steps = tuple(range(101))
    baseline = 10 * 0.98 ** np.arange(101)
    found = verdict(baseline, baseline * 1.1, steps=steps)
    assert (found.answer, found.cautions) == ("too early to tell", ("baseline still improves",))
    assert (found.arms[0].trend.late_gain, found.arms[0].trend.late_step) == (pytest.approx(1 - 0.98**25), 75)


def test_equal_differences_have_no_spread_to_judge_by() -> None:
    table = curves({BASELINE: SETTLED, PICK: SETTLED})
    base = table[table.arm == BASELINE].value.to_numpy()
    arms = ARMS[:2]
    for change, answer in ((-1.0, "too early to tell"), (1.0, "too early to tell"), (0.0, "no difference found")):
        table.loc[table.arm == PICK, "value"] = base + change
        found = judge(table, arms, PLAN, extractor_name="pixels", start_name="from scratch")
        assert found.answer == answer
        assert found.cautions == (("no spread over seeds",) if change else ())


def test_a_perfect_baseline_divides_by_nothing() -> None:
    table = curves({BASELINE: (10, 0, 0, 0, 0), PICK: (10, 1, 1, 1, 1)})
    table.loc[(table.arm == BASELINE) & (table.step > 0), "value"] = 0.0
    assert judge(table, ARMS[:2], PLAN, extractor_name="pixels", start_name="x").answer == "hurts"


def test_the_control_does_not_decide() -> None:
    table = curves({BASELINE: SETTLED, PICK: (10, 7, 6, 5.1, 5.0), NEGATIVE_CONTROL: (10, 5, 3, 2.1, 2.0)})
    for order in ((0, 1, 3), (0, 3, 1)):
        found = judge(table, [ARMS[i] for i in order], PLAN, extractor_name="x", start_name="y")
        assert found.answer == "hurts"
        assert [arm.name for arm in found.arms] == [ARMS[i].name for i in order]
        assert {arm.name: arm.difference for arm in found.arms}[NEGATIVE_CONTROL] == pytest.approx(-2)


def test_without_a_pick_the_prior_is_judged_and_named() -> None:
    arms = arms_for([], LAYERS, names=["none", "prior", "bad"])
    table = curves({BASELINE: SETTLED, PRIOR: (10, 6, 4, 3.1, 3), NEGATIVE_CONTROL: SETTLED})
    found = judge(table, arms, PLAN, extractor_name="pixels", start_name="from scratch")
    assert (found.answer, found.judged) == ("helps", PRIOR)
    assert found.cautions == ("judged arm is not the pick",)


def test_arms_of_other_names_are_judged_too() -> None:
    arms = [Arm("plain", None), Arm("mine", LayerPair("blocks.0", "blocks.9"))]
    table = curves({"plain": SETTLED, "mine": (10, 6, 4, 3.1, 3)})
    found = judge(table, arms, PLAN, extractor_name="pixels", start_name="from scratch")
    assert (found.answer, found.arms[1].student) == ("helps", "blocks.0")


def test_the_numbers_of_the_verdict() -> None:
    table = curves({BASELINE: SETTLED, PICK: (10, 6.5, 4.6, 3.6, 3.5)})
    found = judge(table, ARMS[:2], PLAN, extractor_name="pixels", start_name="from scratch")
    last = table[(table.step == 100) & (table.metric == FRECHET)].pivot(index="seed", columns="arm", values="value")
    test = stats.ttest_1samp(last[PICK] - last[BASELINE], 0).confidence_interval(0.95)
    baseline, pick = found.arms
    assert baseline.final == last[BASELINE].tolist()
    assert (baseline.difference, baseline.low, baseline.high, baseline.weight) == (None, None, None, 0.0)
    assert (pick.student, pick.teacher, pick.weight) == ("blocks.1", "blocks.7", 0.3)
    expected = ((last[PICK] - last[BASELINE]).mean(), test.low, test.high)
    assert (pick.difference, pick.low, pick.high) == pytest.approx(expected, rel=1e-9)
    # 4.6 at step 50 and 3.6 at step 75: the baseline's 4.0 is reached on the way.
    assert pick.steps_to_baseline[1] == pytest.approx(50 + 25 * (4.58 - 4.0) / 1.0)
    record = json.loads(found.to_json())
    assert record["arms"][1] == json.loads(json.dumps(asdict(pick)))
    expected_record = {
        "metric": "Frechet distance",
        "lower_is_better": True,
        "steps": 100,
        "num_seeds": 3,
        "extractor": "pixels",
    }
    assert {key: record[key] for key in expected_record} == expected_record


def test_a_verdict_reads_back_as_it_was_written() -> None:
    drawn = {f"{RANDOM} 1": (10, 6, 5, 4, 3.9), LEARNING_RATE: SETTLED}
    for found in (
        verdict(SETTLED, FALL),
        verdict((10, 8, 7, 6, 5), (10, 9, 8, 7, 6)),
        judged((-0.5, -0.52, -0.48), EIGHT),
        every("none,pick,random,learning-rate", {BASELINE: SETTLED, PICK: FALL, **drawn}),
    ):
        assert Verdict.from_dict(json.loads(found.to_json())) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "pays"}, 'answer is "pays", not one of helps'),
        ({"cautions": ["odd"]}, 'cautions is "odd", not one of'),
        ({"looks": 3}, "looks is 3, not an object"),
        ({"paragraph": "It helps."}, "unknown key 'paragraph'"),
    ],
)
def test_another_record_is_no_verdict(change: dict[str, Any], message: str) -> None:
    record = json.loads(verdict(SETTLED, FALL).to_json()) | change
    with pytest.raises(ValueError, match=message) as error:
        Verdict.from_dict(record)
    assert "\n" not in str(error.value)


def test_the_order_of_rows_and_of_seeds_does_not_matter() -> None:
    table = curves({BASELINE: SETTLED, PICK: (10, 6.5, 4.6, 3.6, 3.5)})
    expected = judge(table, ARMS[:2], PLAN, extractor_name="x", start_name="y")
    shuffled = table.sample(frac=1, random_state=0)
    assert judge(shuffled, ARMS[:2], PLAN, extractor_name="x", start_name="y") == expected
    reversed_seeds = judge(table, ARMS[:2], replace(PLAN, seeds=SEEDS[::-1]), extractor_name="x", start_name="y")
    assert reversed_seeds.arms[1].final == expected.arms[1].final[::-1]
    assert reversed_seeds.arms[1].low == pytest.approx(expected.arms[1].low)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t[~((t.arm == PICK) & (t.seed == 1))],
            "pick, seed 1 has no finite Frechet distance at step 0; repeat",
        ),
        (
            lambda t: t[~((t.arm == BASELINE) & (t.seed == 2) & (t.step == 50))],
            "baseline, seed 2 has no finite .* step 50",
        ),
        (
            lambda t: t.assign(value=t.value.where(t.step != 75, np.nan)),
            "seed 0 has no finite Frechet distance at step 75",
        ),
        (
            lambda t: t.assign(value=t.value.where(t.step != 100, np.inf)),
            "seed 0 has no finite Frechet distance at step 100",
        ),
        (lambda t: t[t.step < 100], r"the curves have steps \[0, 25, 50, 75\] of 100; finish the runs first"),
        (lambda t: t[t.step == 100], r"the curves have steps \[100\] of 100"),
        (lambda t: t[t.metric == HELD_OUT], r"the curves have steps \[\] of 100"),
    ],
)
def test_incomplete_curves_give_no_verdict(change: Any, message: str) -> None:
    table = change(curves({BASELINE: SETTLED, PICK: SETTLED}))
    with pytest.raises(ValueError, match=message) as error:
        judge(table, ARMS[:2], PLAN, extractor_name="x", start_name="y")
    assert "\n" not in str(error.value)


BAD_ARMS = [
    ([], "the first arm must be the baseline"),
    (ARMS[1:], "the first arm must be the baseline"),
    (ARMS[:1], "every arm after the baseline must align layers or match the steps of one that does, and at least one"),
    ([ARMS[0], Arm(LEARNING_RATE, None, matched=ARMS[1].pair)], "at least one must align; pass arms with a pair"),
    ([replace(ARMS[0], matched=ARMS[1].pair), ARMS[1]], "the first arm must be the baseline"),
    ([ARMS[0], Arm("other", None)], "every arm after the baseline must align layers"),
    (
        [ARMS[0], ARMS[1], Arm(PICK, ARMS[2].pair)],
        r"two arms have the same name \(baseline, pick, pick\); give every",
    ),
]


@pytest.mark.parametrize(("arms", "message"), BAD_ARMS)
def test_arms_that_do_not_compare_are_refused(arms: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(curves({BASELINE: SETTLED, PICK: SETTLED}), arms, PLAN, extractor_name="x", start_name="y")


# ---------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_is_students(n: int, confidence: float) -> None:
    differences = np.random.default_rng(n).normal(0.3, 1, n)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(confidence)
    mean, low, high = paired_interval(differences, confidence=confidence)
    assert mean == pytest.approx(differences.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("values", "goal", "expected"),
    [
        ((8.0, 4.0, 2.0), 6.0, 5.0),
        ((8.0, 4.0, 2.0), 4.0, 10.0),
        ((8.0, 4.0, 2.0), 3.0, 15.0),
        ((8.0, 4.0, 2.0), 9.0, 0.0),
        ((8.0, 4.0, 2.0), 1.0, None),
        ((8.0, 3.0, 5.0), 4.0, 8.0),  # what comes after the first time does not count
        ((8.0, 8.0, 2.0), 8.0, 0.0),
    ],
)
def test_steps_to_reach(values: Any, goal: float, expected: float | None) -> None:
    assert steps_to_reach([0.0, 10.0, 20.0], np.array(values), goal) == expected


# --------------------------------------------------------------------------------------------------- looks on the way

EIGHT = replace(PLAN, seeds=tuple(range(8)), stop_early=True)


def ends(differences: Any, *, base: float = 4.0) -> pd.DataFrame:
    """Settled curves whose pick differs from the baseline by these in the end, one for each seed."""
    rows = []
    for seed, difference in enumerate(differences):
        for step, value in zip(STEPS, SETTLED, strict=True):
            level = value / 4 * base
            rows += [
                (BASELINE, seed, step, FRECHET, level),
                (PICK, seed, step, FRECHET, level + difference * (step > 0)),
            ]
    return pd.DataFrame(rows, columns=["arm", "seed", "step", "metric", "value"])


def judged(differences: Any, plan: ConfirmationPlan, **options: Any) -> Verdict:
    return judge(ends(differences), ARMS[:2], plan, extractor_name="pixels", start_name="from scratch", **options)


def test_a_clear_difference_stops_and_an_unclear_one_does_not() -> None:
    clear, unclear = (-0.5, -0.52, -0.48), (-0.5, -0.1, -0.3)
    assert is_clear(ends(clear), ARMS[:2], EIGHT)
    assert not is_clear(ends(clear[:2]), ARMS[:2], EIGHT)  # two seeds are no look
    assert not is_clear(ends(unclear), ARMS[:2], EIGHT)
    assert not is_clear(ends((-0.5, -0.5, -0.5)), ARMS[:2], EIGHT)  # no spread to judge by
    found = judged(clear, EIGHT)
    assert (found.answer, found.num_seeds, found.planned_seeds) == ("helps", 3, 8)
    assert (found.stop_early, found.error_rate, found.cautions) == (True, 0.05, ())


def test_a_clear_loss_stops_too_although_the_verdict_is_open() -> None:
    """More seeds do not tell whether the curves will cross; more steps do."""
    table = ends((0.5, 0.52, 0.48))
    table.loc[table["step"] == 75, "value"] *= 2
    assert is_clear(table, ARMS[:2], EIGHT)
    found = judge(table, ARMS[:2], EIGHT, extractor_name="x", start_name="y")
    assert found.answer == "too early to tell"


def test_the_interval_and_the_stop_agree() -> None:
    """The interval has the level of its look, so it excludes zero where the look is beyond it, and nowhere else."""
    rng, clear = np.random.default_rng(0), 0
    for _ in range(16):
        differences = rng.normal(-0.3, 0.1, 4)
        found = judged(differences, EIGHT) if is_clear(ends(differences), ARMS[:2], EIGHT) else None
        p = stats.ttest_1samp(differences, 0).pvalue
        assert (found is not None) == (p <= look_levels(8)[4])
        clear += found is not None
        if found is not None:
            pick = found.arms[1]
            assert pick.low is not None and pick.high is not None
            assert pick.low * pick.high > 0
            expected = stats.ttest_1samp(differences, 0).confidence_interval(1 - look_levels(8)[4])
            assert (pick.low, pick.high) == pytest.approx((expected.low, expected.high))
    assert 0 < clear < 16


def test_verdicts_of_simulated_confirmations_keep_the_error_rate() -> None:
    """Over whole confirmations: seeds of no difference are judged one by one until clear or at their end."""
    rng, found = np.random.default_rng(0), 0
    plan = replace(PLAN, seeds=(0, 1, 2, 3), stop_early=True)
    levels, n = look_levels(4), 4000
    differences = rng.normal(0, 0.1, (n, 4))
    p = np.stack([stats.ttest_1samp(differences[:, :k], 0, axis=1).pvalue for k in (3, 4)], axis=1)
    crossing = (p <= [levels[3], levels[4]]).any(1)
    # The rule of the module on those that cross, and on as many that do not.
    rows = [*np.flatnonzero(crossing)[:5], *np.flatnonzero(~crossing)[:5]]
    for row in rows:
        stopped = is_clear(ends(differences[row, :3]), ARMS[:2], plan)
        answer = judged(differences[row, : 3 if stopped else 4], plan).answer
        found += answer in ("helps", "hurts")
        assert (answer in ("helps", "hurts")) == crossing[row]
    assert found == 5
    assert crossing.mean() == pytest.approx(0.05, abs=0.014)


def test_a_plan_that_stops_early_needs_a_look() -> None:
    with pytest.raises(ValueError, match="the curves have 2 of 8 seeds; finish the runs first"):
        judged((0.1, 0.2), EIGHT)


def test_a_verdict_after_more_seeds_counts_the_first_one() -> None:
    plan = replace(PLAN, seeds=tuple(range(6)))
    differences = (-0.5, -0.52, -0.48, -0.5, -0.49, -0.51)
    alone, again = judged(differences, plan), judged(differences, plan, looked={3: 0.05})
    assert (alone.looks, alone.error_rate) == ({6: 0.05}, 0.05)
    assert again.looks == {3: 0.05, 6: 0.05}
    assert 0.08 < again.error_rate < 0.1
    assert (alone.cautions, again.cautions) == ((), ("looks not planned together",))
    # The same look again is no second one, and planned looks are none either.
    assert judged(differences, plan, looked={6: 0.05}) == alone
    clear = judged(differences[:4], EIGHT, looked={3: look_levels(8)[3]})
    assert clear == judged(differences[:4], EIGHT)
    mixed = judged(differences[:4], EIGHT, looked={3: 0.05})
    assert (mixed.looks[3], mixed.looks[4]) == (0.05, look_levels(8)[4])
    assert mixed.cautions == ("looks not planned together",)


# ------------------------------------------------------------------------------------------------- cautions and others


def every(names: str, arms: dict[str, Any], **options: Any) -> Verdict:
    method = {"noise_gap": 0.2}
    chosen = arms_for([LayerPair("blocks.1", "blocks.7")], LAYERS, names=names.split(","), options=method)
    chosen = tuple(replace(arm, learning_rate=2e-4) if arm.matched else arm for arm in chosen)
    return judge(curves(arms), chosen, PLAN, extractor_name="pixels", start_name="from scratch", **options)


def test_a_gain_that_the_learning_rate_gives_too_is_not_the_pairs() -> None:
    names = "none,pick,learning-rate"
    found = every(names, {BASELINE: SETTLED, PICK: FALL, LEARNING_RATE: FALL})
    assert found.answer == "helps"
    assert found.cautions == ("gain may come from step length",)
    assert found.comparisons == (Comparison("learning rate", 1, 0.0, 0.0, 0.0),)
    assert (found.arms[2].learning_rate, found.arms[2].weight, found.arms[2].student) == (2e-4, 0.0, None)
    assert found.arms[2].difference is not None
    found = every(names, {BASELINE: SETTLED, PICK: FALL, LEARNING_RATE: (10, 6, 5, 4.1, 4.05)})
    assert (found.judged, found.cautions) == (PICK, ())
    assert found.comparisons[0].high < 0


def test_random_pairs_stand_beside_the_pick_in_their_mean() -> None:
    drawn = {f"{RANDOM} 1": (10, 6, 5, 4, 3.9), f"{RANDOM} 2": (10, 6, 5, 4, 3.7)}
    found = every("none,pick,random:2", {BASELINE: SETTLED, PICK: FALL, **drawn})
    (comparison,) = found.comparisons
    assert (comparison.against, comparison.num_arms) == ("random pairs", 2)
    assert comparison.difference == pytest.approx(-0.3)
    alone = every("none,random", {BASELINE: SETTLED, f"{RANDOM} 1": FALL})
    assert alone.judged == "random pair 1"
    assert (alone.cautions, alone.comparisons) == (("judged arm is not the pick",), ())


def test_the_prior_and_the_pair_of_the_same_distance_are_compared_with_the_pick() -> None:
    lines = {BASELINE: SETTLED, PICK: FALL, PRIOR: (10, 6, 5, 4, 3.9), SAME_DISTANCE: (10, 6, 5, 4, 3.7)}
    found = every("none,pick,prior,same-distance", lines)
    numbers = [(one.against, one.num_arms, round(one.difference, 9)) for one in found.comparisons]
    assert numbers == [("published prior", 1, -0.4), ("same distance", 1, -0.2)]
    alone = every("none,prior,same-distance", {name: lines[name] for name in (BASELINE, PRIOR, SAME_DISTANCE)})
    assert [one.against for one in alone.comparisons] == ["same distance"]


def test_a_method_is_described_and_is_not_the_pick() -> None:
    found = every("none,sra", {BASELINE: SETTLED, SRA: FALL})
    assert (found.judged, found.cautions, found.arms[1].options) == (
        SRA,
        ("judged arm is not the pick",),
        {"noise_gap": 0.2},
    )
    assert Verdict.from_dict(json.loads(found.to_json())) == found


def test_a_verdict_of_an_earlier_version_is_read() -> None:
    """Its arms have no options, and one of them a name that no arm has any more."""
    record = every("none,pick,prior", {BASELINE: SETTLED, PICK: FALL, PRIOR: FALL}).to_dict()
    for arm in record["arms"]:
        del arm["options"]
    record["arms"][2]["name"] = "depth heuristic"
    old = Verdict.from_dict(record)
    assert [(arm.name, arm.options) for arm in old.arms] == [(BASELINE, {}), (PICK, {}), ("depth heuristic", {})]


def test_no_difference_says_what_could_have_been_found() -> None:
    found = verdict(SETTLED, (10, 6.5, 5.1, 4.1, 4.0))
    assert found.resolution is not None and found.resolution.spread is not None
    spread = np.std(JITTER, ddof=1) / np.mean([4 * (1 + move) for move in NOISE])
    assert found.resolution.spread.share == pytest.approx(spread, rel=1e-9)
    assert found.resolution.share == pytest.approx(3.264 * spread, rel=1e-3)
    assert json.loads(found.to_json())["resolution"]["difference"] == found.resolution.share
