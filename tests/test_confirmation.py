"""The verdict never says more than the runs show, and the runs of a seed differ in nothing but their pair."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tiny import tiny_samples, tiny_sit, tiny_splits

from layerprobe.analyses import confirmation as confirmation_module
from layerprobe.analyses.confirmation import (
    BASELINE,
    CONTROL,
    FRECHET,
    HELD_OUT,
    HEURISTIC,
    PICK,
    RUNNER_UP,
    Arm,
    ConfirmationPlan,
    Verdict,
    arms_for,
    confirm,
    judge,
    paired_interval,
    steps_to_reach,
)
from layerprobe.backbones.base import Backbone
from layerprobe.data.base import Splits
from layerprobe.fidelity import Extractor, frechet_distance, gaussian, sample_features
from layerprobe.layersync import LayerPair
from layerprobe.sampling import SamplingPlan, sample
from layerprobe.training import TrainingPlan, held_out_loss, train

LAYERS = tuple(f"blocks.{i}" for i in range(10))
ARMS = arms_for([LayerPair("blocks.1", "blocks.7")], LAYERS)
SEEDS = (0, 1, 2)
STEPS = (0, 25, 50, 75, 100)
PLAN = ConfirmationPlan(TrainingPlan(steps=100), SEEDS)
SETTLED = (10.0, 6.0, 5.0, 4.1, 4.0)  # without alignment: improves by 2 % over the last quarter
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
    assert found.answer == "helps"
    assert found.paragraph.startswith("Aligning blocks.1 to blocks.7 changed the Fréchet distance by -0.5 (95 % inter")
    assert "from 4 without alignment, after 100 steps from scratch, 3 seeds. The pair helps" in found.paragraph
    assert "may not last" not in found.paragraph


def test_a_lead_over_a_baseline_that_still_improves_is_called_a_lead() -> None:
    found = verdict((10, 8, 7, 6, 5), (10, 7, 6, 5, 4))
    assert found.answer == "helps"
    assert "The baseline still improved by 17% since step 75, so the lead may not last." in found.paragraph


def test_a_pick_that_is_worse_when_both_have_levelled_off_hurts() -> None:
    found = verdict(SETTLED, (10, 7, 6, 5.1, 5.0))
    assert found.answer == "hurts"
    assert "the whole interval lies on the side of the loss, and both runs have levelled off" in found.paragraph


def test_an_interval_that_includes_zero_is_no_difference() -> None:
    found = verdict(SETTLED, (10, 6.5, 5.1, 4.1, 4.0))
    assert found.answer == "no difference found"
    assert "the interval includes zero, and both runs have levelled off" in found.paragraph


@pytest.mark.parametrize("pick", [(10, 9, 8, 7, 6), (10, 8, 7, 6, 5)], ids=["behind", "level"])
def test_it_is_too_early_while_the_baseline_improves(pick: Any) -> None:
    found = verdict((10, 8, 7, 6, 5), pick)
    assert found.answer == "too early to tell"
    assert "the baseline still improved by 17% since step 75, and alignment can cost quality" in found.paragraph


def test_it_is_too_early_while_the_aligned_run_catches_up() -> None:
    found = verdict(SETTLED, (10, 9, 8, 6, 4.5))
    assert found.answer == "too early to tell"
    assert "the aligned run still improved by 25% since step 75" in found.paragraph


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
    assert found.answer == "too early to tell"
    assert "without alignment the distance was best at step 50 (5) and ended at 9, so there" in found.paragraph


def test_a_branch_that_has_not_won_back_its_start_is_no_measure() -> None:
    found = verdict((0.19, 0.27, 0.25, 0.247, 0.247), (0.19, 0.3, 0.25, 0.248, 0.247))
    assert found.answer == "too early to tell"
    assert "best at step 0 (0.19)" in found.paragraph


def test_a_pick_better_than_the_baseline_ever_was_helps_even_if_that_got_worse() -> None:
    assert verdict((10, 6, 5, 7, 9), (10, 6, 5, 4.2, 4)).answer == "helps"


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_runs_that_have_not_begun_to_learn_show_nothing(offset: float) -> None:
    found = verdict((20.6, 20.55, 20.5, 20.4, 20.3), (20.6, 20.55, 20.5, 20.4 + offset, 20.3 + offset))
    assert found.answer == "too early to tell"
    assert "neither run moved by 5% since its start. Run more steps or raise the learning rate." in found.paragraph


def test_harm_to_a_checkpoint_that_has_converged_is_seen() -> None:
    assert verdict((5, 5, 5, 5, 5), (5, 6, 6.5, 6.5, 6.5)).answer == "hurts"


def test_one_evaluation_says_how_far_the_baseline_came_from_its_start() -> None:
    plan = replace(PLAN, num_evaluations=1)
    assert plan.evaluation_steps == (0, 100)
    found = verdict((10, 4), (10, 4.5), plan=plan, steps=(0, 100))
    assert found.answer == "too early to tell"
    assert "the baseline still improved by 60% since step 0" in found.paragraph
    assert verdict((10, 4), (10, 3), plan=plan, steps=(0, 100)).answer == "helps"


def test_more_frequent_evaluations_do_not_make_a_run_look_settled() -> None:
    """Every interval gains 2 % and the last quarter 40 %."""
    steps = tuple(range(101))
    baseline = 10 * 0.98 ** np.arange(101)
    found = verdict(baseline, baseline * 1.1, steps=steps)
    assert found.answer == "too early to tell"
    assert "improved by 40% since step 75" in found.paragraph


def test_equal_differences_have_no_spread_to_judge_by() -> None:
    table = curves({BASELINE: SETTLED, PICK: SETTLED})
    base = table[table.arm == BASELINE].value.to_numpy()
    arms = ARMS[:2]
    for change, answer in ((-1.0, "too early to tell"), (1.0, "too early to tell"), (0.0, "no difference found")):
        table.loc[table.arm == PICK, "value"] = base + change
        found = judge(table, arms, PLAN, extractor_name="pixels", start_name="from scratch")
        assert found.answer == answer
        assert ("every seed gave the same difference" in found.paragraph) == (change != 0)


def test_a_perfect_baseline_divides_by_nothing() -> None:
    table = curves({BASELINE: (10, 0, 0, 0, 0), PICK: (10, 1, 1, 1, 1)})
    table.loc[(table.arm == BASELINE) & (table.step > 0), "value"] = 0.0
    assert judge(table, ARMS[:2], PLAN, extractor_name="pixels", start_name="x").answer == "hurts"


def test_the_control_does_not_decide() -> None:
    table = curves({BASELINE: SETTLED, PICK: (10, 7, 6, 5.1, 5.0), CONTROL: (10, 5, 3, 2.1, 2.0)})
    for order in ((0, 1, 3), (0, 3, 1)):
        found = judge(table, [ARMS[i] for i in order], PLAN, extractor_name="x", start_name="y")
        assert found.answer == "hurts"
        assert [arm.name for arm in found.arms] == [ARMS[i].name for i in order]
        assert {arm.name: arm.difference for arm in found.arms}[CONTROL] == pytest.approx(-2)


def test_without_a_pick_the_heuristic_is_judged_and_named() -> None:
    arms = arms_for([], LAYERS)
    table = curves({BASELINE: SETTLED, HEURISTIC: (10, 6, 4, 3.1, 3), CONTROL: SETTLED})
    found = judge(table, arms, PLAN, extractor_name="pixels", start_name="from scratch")
    assert found.answer == "helps"
    assert found.paragraph.startswith("Aligning blocks.2 to blocks.5 changed")
    assert "No pair was picked, so this is the depth heuristic. The pair helps" in found.paragraph


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
    assert record["arms"][1] == json.loads(json.dumps(pick.__dict__))
    assert {
        key: record[key] for key in ("metric", "lower_is_better", "steps", "num_seeds", "curves_csv", "extractor")
    } == {
        "metric": "Frechet distance",
        "lower_is_better": True,
        "steps": 100,
        "num_seeds": 3,
        "curves_csv": "confirmation.csv",
        "extractor": "pixels",
    }


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
            "no alignment, seed 2 has no finite .* step 50",
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
    ([], "the first arm must be the one without alignment"),
    (ARMS[1:], "the first arm must be the one without alignment"),
    (ARMS[:1], "every arm after the first must align layers, and there must be one; pass arms with a pair"),
    ([ARMS[0], Arm("other", None)], "every arm after the first must align layers"),
    (
        [ARMS[0], ARMS[1], Arm(PICK, ARMS[2].pair)],
        r"two arms have the same name \(no alignment, pick, pick\); give every",
    ),
]


@pytest.mark.parametrize(("arms", "message"), BAD_ARMS)
def test_arms_that_do_not_compare_are_refused(arms: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        judge(curves({BASELINE: SETTLED, PICK: SETTLED}), arms, PLAN, extractor_name="x", start_name="y")
    with pytest.raises(ValueError, match=message):
        confirm(lambda seed: tiny_sit(), tiny_splits(), arms, PLAN, tmp_path / "run", start_name="y")
    assert not (tmp_path / "run").exists()


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


def test_arms_are_four_without_duplicates() -> None:
    assert [arm.name for arm in ARMS] == [BASELINE, PICK, HEURISTIC, CONTROL]
    heuristic, control = LayerPair("blocks.2", "blocks.5"), LayerPair("blocks.8", "blocks.9")
    assert [arm.pair for arm in ARMS] == [None, LayerPair("blocks.1", "blocks.7"), heuristic, control]
    other = LayerPair("blocks.1", "blocks.6")
    for ranked, names in (
        ([], [BASELINE, HEURISTIC, CONTROL]),
        ([heuristic], [BASELINE, PICK, CONTROL]),
        ([heuristic, other], [BASELINE, PICK, RUNNER_UP, CONTROL]),
        ([other, heuristic], [BASELINE, PICK, HEURISTIC, CONTROL]),
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
        ({"seeds": (0, 1, 1)}, r"a seed stands twice in \[0, 1, 1\] and would count twice; pass each once"),
        ({"num_evaluations": 0}, "0 evaluations do not fit into 100 steps"),
        ({"num_evaluations": 101}, "101 evaluations do not fit into 100 steps"),
        ({"num_samples": 1}, "a Fréchet distance needs at least 2 samples, got 1"),
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


# ----------------------------------------------------------------------------------------------------------- whole runs

TINY = ConfirmationPlan(
    TrainingPlan(steps=5, batch_size=5, learning_rate=1e-2, ema_decay=0.5, log_every=2),
    seeds=(3, 4),
    num_evaluations=2,
    num_samples=9,
    sampling=SamplingPlan("heun", 2),
)
TINY_ARMS = arms_for([LayerPair("blocks.0", "blocks.2")], LAYERS[:3])[:3]
PIXELS = Extractor("pixels", lambda x: x.flatten(1))


def start(seed: int) -> Backbone:
    return tiny_sit(seed=seed)


def run(folder: Path, *, plan: ConfirmationPlan = TINY, splits: Splits | None = None, **options: Any) -> Verdict:
    arms = options.pop("arms", TINY_ARMS)
    options = {"start_name": "from scratch", "extractor": PIXELS} | options
    return confirm(options.pop("start", start), splits or tiny_splits(24), arms, plan, folder, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def results(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "confirmation.csv").read_bytes(), (folder / "verdict.json").read_bytes()


def test_the_curves_are_what_separate_runs_score(whole: Path) -> None:
    table = pd.read_csv(whole / "confirmation.csv")
    assert list(table.columns) == ["arm", "seed", "step", "metric", "value"]
    assert len(table) == 3 * 2 * 3 * 2
    assert not table.duplicated(["arm", "seed", "step", "metric"]).any()
    assert sorted(set(table.step)) == [0, 2, 5]
    splits, arm = tiny_splits(24), TINY_ARMS[1]
    plan = replace(TINY.training, seed=4, pairs=(arm.pair,))
    model = train(start(4), splits.fit, plan, whole.parent / "separate")
    row = table[(table.arm == PICK) & (table.seed == 4) & (table.step == 5)].set_index("metric").value
    assert row[HELD_OUT] == pytest.approx(np.mean(list(held_out_loss(model, splits.report).values())), rel=1e-12)
    labels = splits.report.labels
    assert labels is not None
    assert labels.bincount().tolist() == [2, 2, 2]
    x = sample(model, range(9), labels=torch.tensor([0] * 3 + [1] * 3 + [2] * 3), plan=TINY.sampling)
    real = splits.report.batch(range(len(splits.report))).x
    expected = frechet_distance(gaussian(sample_features(PIXELS, x)), gaussian(real.flatten(1).numpy()))
    assert row[FRECHET] == pytest.approx(expected, rel=1e-12)


def test_the_arms_of_a_seed_start_equal_and_the_seeds_do_not(whole: Path) -> None:
    table = pd.read_csv(whole / "confirmation.csv")
    first = table[table.step == 0].groupby(["seed", "metric"]).value.nunique()
    assert (first == 1).all()
    last = table[table.step == 5].groupby(["seed", "metric"]).value.nunique()
    assert (last == 3).all()
    records = {path: json.loads(path.read_text()) for path in whole.glob("seed-*/*/training.json")}
    assert len(records) == 6
    starts = {(path.parents[1].name, record["start"]) for path, record in records.items()}
    assert len(starts) == 2
    assert len({start for _, start in starts}) == 2


def test_every_model_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(confirmation_module, "held_out_loss", lambda *a: calls.append(1) or held_out_loss(*a))
    run(tmp_path, arms=TINY_ARMS[:2])
    assert len(calls) == 2 * (1 + 2 * 2)  # for each seed its start, which the arms share, and two evaluations an arm


def test_a_start_that_draws_fresh_weights_at_every_call_is_called_once_a_seed(tmp_path: Path) -> None:
    fresh = iter(range(100))
    run(tmp_path, start=lambda seed: tiny_sit(seed=next(fresh)), arms=TINY_ARMS[:2])
    assert next(fresh) == 2


@pytest.mark.parametrize(("seed", "arm", "step"), [(3, BASELINE, 1), (3, HEURISTIC, 3), (4, PICK, 5)])
def test_interrupted_and_repeated_it_gives_the_same_files(
    tmp_path: Path, whole: Path, seed: int, arm: str, step: int
) -> None:
    told: list[tuple[str, int, int]] = []

    def interrupt(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        if what == f"seed {seed}, {arm}" and done % 5 == step % 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=interrupt)
    assert not (tmp_path / "verdict.json").exists()
    assert told[0] == (f"seed 3, {BASELINE}", 1, 30)
    run(tmp_path)
    assert results(tmp_path) == results(whole)


@pytest.mark.parametrize("call", [0, 4])
def test_interrupted_in_an_evaluation_it_gives_the_same_files(
    tmp_path: Path, whole: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(range(call))

    def failing(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return held_out_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(confirmation_module, "held_out_loss", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    run(tmp_path)
    assert results(tmp_path) == results(whole)


def test_a_finished_confirmation_trains_and_scores_nothing(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, stamps = results(whole), {path: path.stat().st_mtime_ns for path in whole.glob("seed-*/**/*")}
    monkeypatch.setattr("layerprobe.training._step", None)
    monkeypatch.setattr(confirmation_module, "held_out_loss", None)
    run(whole)
    assert results(whole) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_seeds_and_arms_may_be_added_later(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, arms=TINY_ARMS[:2])
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed-*/**/*")}
    found = run(tmp_path, plan=replace(TINY, seeds=(3, 4, 7)))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    table, two = (pd.read_csv(folder / "confirmation.csv") for folder in (tmp_path, whole))
    pd.testing.assert_frame_equal(table[table.seed != 7].reset_index(drop=True), two)
    assert set(table.seed) == {3, 4, 7}
    assert (found.num_seeds, len(found.arms[1].final)) == (3, 3)


@pytest.mark.parametrize(
    ("options", "different"),
    [
        ({"plan": replace(TINY, num_samples=8)}, "plan.num_samples"),
        ({"plan": replace(TINY, training=replace(TINY.training, steps=6))}, "plan.training.steps"),
        ({"start_name": "from the checkpoint"}, "start"),
        ({"splits": tiny_splits(24, seed=1)}, "data"),
        ({"extractor": Extractor("other", PIXELS.features)}, "extractor"),
    ],
)
def test_another_confirmation_is_refused(whole: Path, options: dict[str, Any], different: str) -> None:
    before = results(whole)
    with pytest.raises(ValueError, match=rf"holds a confirmation of another run \(different: {different}\); choose"):
        run(whole, **options)
    assert results(whole) == before


def test_another_pick_under_the_same_name_is_refused(whole: Path) -> None:
    arms = [TINY_ARMS[0], Arm(PICK, LayerPair("blocks.1", "blocks.2"))]
    with pytest.raises(ValueError, match=r"seed-3/pick holds a training of another run \(different: plan.pairs\)"):
        run(whole, arms=arms)


def test_lost_scores_are_named(tmp_path: Path) -> None:
    run(tmp_path, arms=TINY_ARMS[:2])
    (tmp_path / "seed-4" / "pick.json").unlink()
    with pytest.raises(ValueError, match=r"pick.json lacks step 2 of a finished run; delete .*seed-4/pick to repeat"):
        run(tmp_path, arms=TINY_ARMS[:2])


def test_data_without_labels_are_sampled_without_labels(tmp_path: Path) -> None:
    seen = []

    def features(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.flatten(1)

    run(tmp_path, splits=tiny_splits(24, labelled=False), extractor=Extractor("seen", features), arms=TINY_ARMS[:2])
    # The first features are of the real samples, the second of what the first arm draws before training.
    assert torch.equal(seen[1], sample(start(3), range(9), plan=TINY.sampling))


def test_classes_are_drawn_as_often_as_they_are_real() -> None:
    labels = torch.tensor([2] * 10 + [0] * 20 + [1] * 10)
    assert confirmation_module._like(labels, 8).bincount().tolist() == [4, 2, 2]
    assert confirmation_module._like(labels, 80).bincount().tolist() == [40, 20, 20]


def test_without_an_extractor_a_classifier_is_trained_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, calls = confirmation_module.classifier_extractor, []

    def quick(samples: Any, cache: Path) -> Extractor:
        calls.append(cache)
        return classifier(samples, cache, steps=3, batch_size=4)

    monkeypatch.setattr(confirmation_module, "classifier_extractor", quick)
    found = run(tmp_path, extractor=None, arms=TINY_ARMS[:2])
    assert found.extractor == "64 features of a classifier trained 3 steps on the labels"
    assert calls == [tmp_path / "extractor.safetensors"]
    stamp, before = calls[0].stat().st_mtime_ns, results(tmp_path)
    run(tmp_path, extractor=None, arms=TINY_ARMS[:2])
    assert results(tmp_path) == before
    assert calls[0].stat().st_mtime_ns == stamp


def test_held_out_samples_are_not_trained_on(whole: Path) -> None:
    other = tiny_samples(6, first_id=900, seed=5)
    splits = replace(tiny_splits(24), report=other)
    run(whole.parent / "other", splits=splits, arms=TINY_ARMS[:2])
    for arm in ("no-alignment", "pick"):
        models = [
            (folder / "seed-3" / arm / "model.safetensors").read_bytes() for folder in (whole, whole.parent / "other")
        ]
        assert models[0] == models[1]
    assert results(whole)[0] != results(whole.parent / "other")[0]
