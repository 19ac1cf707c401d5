"""Branches of a pair sweep differ in their pair alone, and each is what a training of its own gives."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_sit, tiny_splits

from layerprobe.analyses.experiments import probe_errors as probe_scores
from layerprobe.analyses.experiments.arms import FRECHET, HELD_OUT
from layerprobe.analyses.experiments.pair_sweep import (
    PAIR_SWEEP_COLUMNS,
    PairSweepPlan,
    all_pairs,
    benefits,
    pair_sweep_table,
    read_pair_sweep,
    sweep_pairs,
)
from layerprobe.analyses.figures.pair_sweep import pair_sweep_heatmap
from layerprobe.analyses.generation.distances import frechet_distance, gaussian
from layerprobe.analyses.generation.extractors import Extractor, sample_features
from layerprobe.analyses.runs import pair_sweep as sweep_runs
from layerprobe.backbones.sit import new_sit
from layerprobe.cli.main import run as command_line
from layerprobe.layersync.pair import LayerPair
from layerprobe.sampling import SamplingPlan, sample
from layerprobe.training.loop import Decision, train
from layerprobe.training.losses import held_out_loss
from layerprobe.training.plan import TrainingPlan
from layerprobe.training.state import checkpoints

PIXELS = Extractor("pixels", lambda x: x.flatten(1))
TRAINING = TrainingPlan(steps=4, batch_size=5, learning_rate=1e-2, ema_decay=0.5, log_every=2)
PLAN = PairSweepPlan(TRAINING, seeds=(3, 4), num_samples=9, sampling=SamplingPlan("heun", 2))
PAIRS = (LayerPair("blocks.0", "blocks.1"), LayerPair("blocks.0", "blocks.2"))


def draw(
    folder: Path, pairs: tuple[LayerPair, ...] = PAIRS, plan: PairSweepPlan = PLAN, **options: Any
) -> pd.DataFrame:
    options = {"extractor": PIXELS} | options
    return sweep_pairs(options.pop("start", tiny_sit()), tiny_splits(24), pairs, plan, folder, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("atlas") / "whole"
    draw(folder)
    return folder


def planted(values: dict[tuple[str, str], float], *, seed: int = 0) -> pd.DataFrame:
    """A pair sweep whose baseline scores 2."""
    scores = {(seed, LayerPair(*names)): {10: {FRECHET: value, HELD_OUT: value}} for names, value in values.items()}
    return pair_sweep_table({(seed, None): {10: {FRECHET: 2.0, HELD_OUT: 2.0}}} | scores)


# ------------------------------------------------------------------------------------------------------------- branches


def test_all_pairs_are_every_earlier_layer_with_every_later_one() -> None:
    assert all_pairs(("a", "b", "c")) == (LayerPair("a", "b"), LayerPair("a", "c"), LayerPair("b", "c"))


def test_every_pair_and_the_baseline_are_there_once_a_seed(whole: Path) -> None:
    sweep = read_pair_sweep(whole / "atlas.csv")
    assert tuple(sweep.columns) == PAIR_SWEEP_COLUMNS
    assert not sweep.duplicated(["student", "teacher", "seed", "step", "metric"]).any()
    runs = set(sweep[["student", "teacher", "seed"]].itertuples(index=False, name=None))
    expected = {("", ""), ("blocks.0", "blocks.1"), ("blocks.0", "blocks.2")}
    assert runs == {(*names, seed) for names in expected for seed in (3, 4)}
    levels = {f"{HELD_OUT} at noise level {level}" for level in (0.1, 0.3, 0.5, 0.7, 0.9)}
    assert set(sweep["metric"]) == {FRECHET, HELD_OUT, *levels, probe_scores.PROBE_ERROR, probe_scores.BEST_PROBE_ERROR}
    assert set(sweep["step"]) == {4}


def test_a_branch_scores_what_a_training_of_its_own_scores(whole: Path, tmp_path: Path) -> None:
    splits = tiny_splits(24)
    model = train(tiny_sit(), splits.train, replace(TRAINING, seed=4, pairs=(PAIRS[1],)), tmp_path / "own")
    sweep = read_pair_sweep(whole / "atlas.csv")
    rows = sweep[(sweep["student"] == "blocks.0") & (sweep["teacher"] == "blocks.2") & (sweep["seed"] == 4)]
    found = rows.set_index("metric")["value"]
    losses = held_out_loss(model, splits.test)
    assert found[f"{HELD_OUT} at noise level 0.7"] == pytest.approx(losses[0.7], rel=1e-12)
    assert found[HELD_OUT] == pytest.approx(np.mean(list(losses.values())), rel=1e-12)
    errors = probe_scores.probing_errors(model, splits)
    assert set(errors) == {probe_scores.PROBE_ERROR, probe_scores.BEST_PROBE_ERROR}
    assert {name: found[name] for name in errors} == pytest.approx(errors, rel=1e-12)
    x = sample(model, range(9), labels=torch.tensor([0] * 3 + [1] * 3 + [2] * 3), plan=PLAN.sampling)
    real = splits.test.batch(range(len(splits.test))).x
    expected = frechet_distance(gaussian(sample_features(PIXELS, x)), gaussian(real.flatten(1).numpy()))
    assert found[FRECHET] == pytest.approx(expected, rel=1e-12)


def test_the_benefit_is_the_share_below_the_baseline_of_the_same_seed(whole: Path) -> None:
    sweep = read_pair_sweep(whole / "atlas.csv")
    sweep = sweep[sweep["metric"] != probe_scores.BEST_PROBE_ERROR]  # 0: shares of it are nan
    without = sweep[sweep["student"] == ""].set_index(["seed", "metric"])["value"]
    keys = pd.MultiIndex.from_frame(sweep[["seed", "metric"]])
    expected = (without[keys].to_numpy() - sweep["value"]) / without[keys].to_numpy()
    assert sweep["benefit"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-12)
    assert (sweep[sweep["student"] == ""]["benefit"] == 0).all()
    aligned = sweep[(sweep["student"] != "") & (sweep["metric"] != probe_scores.PROBE_ERROR)]
    assert aligned["benefit"].abs().min() > 0


def test_only_scores_are_left_of_a_finished_sweep(whole: Path) -> None:
    names = sorted(path.name for path in whole.rglob("*"))
    branches = [f"{pair.student}-from-{pair.teacher}.json" for pair in PAIRS]
    assert names == sorted(
        [*branches * 2, *["baseline.json"] * 2, "atlas.csv", "atlas.json", "seed-3", "seed-4", *["checksums.json"] * 3]
    )


def test_shards_together_are_the_whole_and_may_be_on_other_machines(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = draw(tmp_path / "a", shard=(1, 2))
    assert len(first[["student", "teacher", "seed"]].drop_duplicates()) == 3
    draw(tmp_path / "b", shard=(2, 2))
    for path in (tmp_path / "b").glob("seed-*/*.json"):
        (tmp_path / "a" / path.relative_to(tmp_path / "b")).write_bytes(path.read_bytes())
    monkeypatch.setattr("layerprobe.analyses.experiments.confirmation.train", None)
    draw(tmp_path / "a")
    assert (tmp_path / "a" / "atlas.csv").read_bytes() == (whole / "atlas.csv").read_bytes()


@pytest.mark.parametrize(("branch", "step"), [("seed 3, baseline", 2), ("seed 3, blocks.0 from blocks.2", 3)])
def test_interrupted_and_repeated_it_gives_the_same_table(whole: Path, tmp_path: Path, branch: str, step: int) -> None:
    told: list[tuple[str, int, int]] = []

    def interrupt(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        if what == branch and done % 4 == step:
            raise KeyboardInterrupt

    plan = replace(PLAN, training=replace(TRAINING, checkpoint_every=2))
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "a", plan=plan, progress=interrupt)
    assert told[0] == ("seed 3, baseline", 1, 24)
    draw(tmp_path / "a", plan=plan)
    assert (tmp_path / "a" / "atlas.csv").read_bytes() == (whole / "atlas.csv").read_bytes()


def test_a_call_for_fewer_pairs_keeps_the_others_in_the_table(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "atlas"))
    before = read_pair_sweep(folder / "atlas.csv")
    after = draw(folder, PAIRS[:1])
    keys = ["student", "teacher", "seed", "step", "metric"]
    pd.testing.assert_frame_equal(
        after.sort_values(keys, ignore_index=True), before.sort_values(keys, ignore_index=True), check_exact=False
    )
    assert len(read_pair_sweep(folder / "atlas.csv")) == len(before)


def test_pairs_and_seeds_may_be_added_later(whole: Path, tmp_path: Path) -> None:
    first = draw(tmp_path / "a", PAIRS[:1], replace(PLAN, seeds=(4,)))
    assert len(first) == 2 * 9
    draw(tmp_path / "a")
    assert (tmp_path / "a" / "atlas.csv").read_bytes() == (whole / "atlas.csv").read_bytes()


@pytest.mark.parametrize(
    ("options", "different"),
    [
        ({"plan": replace(PLAN, num_samples=8)}, "num_samples"),
        ({"plan": replace(PLAN, training=replace(TRAINING, weight=0.5))}, "training.weight"),
        ({"start": tiny_sit(seed=1)}, "start"),
        ({"extractor": Extractor("other", PIXELS.features)}, "extractor"),
    ],
)
def test_another_sweep_is_refused(whole: Path, options: dict[str, Any], different: str) -> None:
    before = (whole / "atlas.csv").read_bytes()
    with pytest.raises(ValueError, match=rf"holds a pair sweep of another run \(different: {different}\)"):
        draw(whole, **options)
    assert (whole / "atlas.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": (3, 2)}, r"there is no shard 3 of 2; pass 1/2 to 2/2"),
        ({"pairs": (PAIRS[0], PAIRS[0])}, "a pair is listed twice"),
    ],
)
def test_what_makes_no_sweep_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": ()}, r"the seeds are \[\]; pass at least one"),
        ({"seeds": (1, 1)}, r"the seeds are \[1, 1\]"),
        ({"num_evaluations": 5}, "5 evaluations do not fit into branches of 4 steps"),
        ({"first_step": 4}, "do not fit into branches of 0 steps"),
        ({"num_samples": 1}, "needs at least 2 samples, got 1"),
    ],
)
def test_an_impossible_plan_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **fields)


# -------------------------------------------------------------------------------------------------- going on from a run


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm") / "warm"
    train(tiny_sit(), tiny_splits(24).train, replace(TRAINING, steps=3, seed=3), folder)
    return folder


def test_without_a_pair_a_branch_of_a_training_is_that_training_gone_on(warm: Path, tmp_path: Path) -> None:
    """Same weights, optimizer, averages and batches as if it had never stopped."""
    plan = replace(PLAN, training=replace(TRAINING, steps=7), first_step=3, seeds=(3,), num_evaluations=2)
    sweep = draw(tmp_path / "a", PAIRS[:1], plan, state=checkpoints(warm)[-1])
    assert sorted(set(sweep["step"])) == [5, 7]
    model = train(tiny_sit(), tiny_splits(24).train, replace(TRAINING, steps=7, seed=3), tmp_path / "through")
    row = sweep[(sweep["student"] == "") & (sweep["step"] == 7)].set_index("metric")["value"]
    expected = np.mean(list(held_out_loss(model, tiny_splits(24).test).values()))
    assert row[HELD_OUT] == pytest.approx(expected, rel=1e-12)
    aligned = sweep[(sweep["student"] != "") & (sweep["step"] == 7)].set_index("metric")["value"]
    assert aligned[HELD_OUT] != row[HELD_OUT]


def test_what_the_training_decided_is_not_what_its_branches_align(tmp_path: Path) -> None:
    decided = Decision((PAIRS[1],), {})
    splits = tiny_splits(24)
    train(
        tiny_sit(),
        splits.train,
        replace(TRAINING, steps=3),
        tmp_path / "warm",
        direct=lambda *_: decided,
        direct_at=[1],
    )
    logs: list[str] = []

    def keep(what: str, done: int, _: int) -> None:
        name = "baseline" if "baseline" in what else "blocks.0-from-blocks.1"
        place = tmp_path / "a" / "seed-3" / name / "log.jsonl"
        logs.extend(place.read_text().splitlines() if done % 4 == 0 else [])

    plan = replace(PLAN, training=replace(TRAINING, steps=7, log_every=1), first_step=3, seeds=(3,))
    draw(tmp_path / "a", PAIRS[:1], plan, state=checkpoints(tmp_path / "warm")[-1], progress=keep)
    cosines = [sorted(key for key in json.loads(line) if key.startswith("cosine")) for line in logs]
    assert cosines == [[]] * 4 + [["cosine blocks.0 <- blocks.1"]] * 4


def test_the_start_is_read_from_a_folder_of_a_training_or_from_a_checkpoint(warm: Path) -> None:
    gone_on = sweep_runs.pair_sweep_start(warm, steps=20, weight=0.7)
    assert gone_on.state == checkpoints(warm)[-1]
    assert (gone_on.plan.first_step, gone_on.plan.training.steps) == (3, 23)
    assert gone_on.plan.training == replace(TRAINING, steps=23, weight=0.7, log_every=50, precision="float32")
    fresh = sweep_runs.pair_sweep_start(warm / "model.safetensors", steps=20, learning_rate=1e-3)
    assert fresh.state is None
    assert (fresh.plan.first_step, fresh.plan.training.steps) == (0, 20)
    expected = replace(TRAINING, steps=20, warmup_steps=2, learning_rate=1e-3, log_every=50, precision="float32")
    assert fresh.plan.training == expected


def test_from_scratch_the_start_only_says_how_the_network_looks_and_was_trained(warm: Path) -> None:
    start = sweep_runs.pair_sweep_start(warm, steps=40, from_scratch=True, seeds=(3, 4))
    trained = sweep_runs.pair_sweep_start(warm, steps=40)
    assert (start.state, start.plan.first_step, start.plan.training.steps) == (None, 0, 40)
    assert start.plan.from_scratch
    assert (start.trained_steps, trained.trained_steps) == (3, None)
    assert start.plan.training.learning_rate == trained.plan.training.learning_rate
    # Not a tenth of the steps, as branches of a checkpoint have it.
    assert start.plan.training.warmup_steps == trained.plan.training.warmup_steps == TRAINING.warmup_steps


def test_from_scratch_every_seed_has_weights_of_its_own(tmp_path: Path) -> None:
    splits = tiny_splits(24)
    sweep = draw(tmp_path / "atlas", PAIRS[:1], replace(PLAN, from_scratch=True)).set_index(["student", "metric"])
    for seed in PLAN.seeds:
        start = new_sit(tiny_sit().module.config, seed=seed)
        model = train(start, splits.train, replace(TRAINING, seed=seed), tmp_path / f"own-{seed}")
        found = sweep[sweep["seed"] == seed].loc[("", f"{HELD_OUT} at noise level 0.7"), "value"]
        assert found == pytest.approx(held_out_loss(model, splits.test)[0.7], rel=1e-12)
    with pytest.raises(ValueError, match=r"holds a pair sweep of another run \(different: start\)"):
        draw(tmp_path / "atlas", PAIRS[:1], PLAN)
    other = new_sit(replace(tiny_sit().module.config, num_heads=4), seed=0)
    with pytest.raises(ValueError, match=r"\(different: start\.network\.num_heads\)"):
        draw(tmp_path / "atlas", PAIRS[:1], replace(PLAN, from_scratch=True), start=other)


def test_branches_do_not_go_on_with_other_data(warm: Path, tmp_path: Path) -> None:
    start = sweep_runs.pair_sweep_start(warm, steps=4)
    with pytest.raises(ValueError, match=r"the training of .* had other data; pass its --data and --size"):
        sweep_runs.pair_sweep_run(start, tiny_splits(28), PAIRS, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# --------------------------------------------------------------------------------------------------------------- tables


def test_benefits_are_means_over_seeds_best_first() -> None:
    one = planted({("a", "b"): 1.0, ("a", "c"): 1.5, ("b", "c"): 3.0}, seed=0)
    two = planted({("a", "b"): 1.4, ("a", "c"): 1.5, ("b", "c"): 2.0}, seed=1)
    sweep = pd.concat([one, two])
    ranked = benefits(sweep)
    assert list(ranked.index) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert ranked.to_list() == pytest.approx([0.4, 0.25, -0.25])


def test_a_pair_without_its_baseline_has_no_benefit() -> None:
    sweep = pair_sweep_table({(0, LayerPair("a", "b")): {10: {FRECHET: 1.0}}})
    assert sweep["benefit"].isna().all()
    with pytest.raises(ValueError, match=r"has no benefit in 'Frechet distance'.*finish the branches first"):
        benefits(sweep)


def test_another_table_is_no_pair_sweep(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("arm,seed\nnone,0\n")
    with pytest.raises(ValueError, match=r"it has no column student\); pass an atlas.csv"):
        read_pair_sweep(tmp_path / "x.csv")


def test_a_table_reads_back_as_it_was_written(tmp_path: Path) -> None:
    sweep = planted({("null", "nan"): 1.0, ("a", "c"): 2.5})
    sweep.to_csv(tmp_path / "atlas.csv", index=False)
    pd.testing.assert_frame_equal(read_pair_sweep(tmp_path / "atlas.csv"), sweep)


# --------------------------------------------------------------------------------------------------------------- figure


def test_the_figure_puts_each_pair_in_its_cell_and_says_what_is_seen() -> None:
    sweep = planted({("a", "b"): 1.0, ("a", "c"): 1.5, ("b", "c"): 3.0})
    figure = pair_sweep_heatmap(sweep, ("a", "b", "c"), pick=LayerPair("a", "c"))
    title = figure.get_suptitle()
    assert "2 of 3 pairs beat the baseline in Frechet distance; a from b by 50.0 %" in " ".join(title.split())
    assert "one seed" in title
    left = figure.axes[0]
    cells = {(t.get_position()[0], t.get_position()[1]): t.get_text() for t in left.texts}
    assert cells == {(0.5, 0.5): "+50", (1.5, 0.5): "+25", (1.5, 1.5): "-50"}
    assert left.get_title(loc="left") == "Frechet distance: best a from b\nthin frame: the pick"
    lost = planted({("a", "b"): 3.0})
    assert "None of 1 pairs beats the baseline" in pair_sweep_heatmap(lost, ("a", "b")).get_suptitle()


def test_a_pair_of_other_layers_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="c is not among the layers a, b; pass the layers of the model of"):
        pair_sweep_heatmap(planted({("a", "c"): 1.0}), ("a", "b"))


def test_what_pairs_do_to_the_representation_is_told_beside_the_distance() -> None:
    def scores(distance: float, error: float) -> dict[int, dict[str, float]]:
        return {10: {FRECHET: distance, HELD_OUT: 1.0, probe_scores.PROBE_ERROR: error}}

    pairs = {None: (2.0, 0.5), LayerPair("a", "b"): (1.0, 0.6), LayerPair("a", "c"): (3.0, 0.4)}
    sweep = pair_sweep_table({(0, pair): scores(*values) for pair, values in pairs.items()})
    assert [" ".join(line.split()) for line in sweep_runs.describe_pair_sweep(sweep, 3)] == [
        "branches 3 of 3 finished",
        "1 of 2 pairs beat the baseline in Frechet distance",
        "a <- b +50.0%",
        "a <- c -50.0%",
        "1 of 2 pairs beat the baseline in probe error",
        "a <- c +20.0%",
        "a <- b -20.0%",
    ]
    unlabeled = sweep[sweep["metric"] != probe_scores.PROBE_ERROR]
    assert not any("probe error" in line for line in sweep_runs.describe_pair_sweep(unlabeled, 3))


def test_a_panel_has_room_however_many_there_are() -> None:
    sweep = planted({("a", "b"): 1.0, ("a", "c"): 3.0})
    third = sweep[sweep["metric"] == FRECHET].assign(metric=probe_scores.PROBE_ERROR)
    metrics = (FRECHET, HELD_OUT, probe_scores.PROBE_ERROR)
    two, three = (
        pair_sweep_heatmap(pd.concat([sweep, third]), ("a", "b", "c"), metrics=metrics[:number]) for number in (2, 3)
    )
    assert three.get_figwidth() == pytest.approx(1.5 * two.get_figwidth())


# -------------------------------------------------------------------------------------------------------------- command


def shell(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["layerprobe", "atlas", *map(str, arguments)])
    return command_line()


@pytest.mark.usefixtures("untimed")
def test_the_command_trains_a_shard_and_then_the_rest_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("layerprobe.analyses.experiments.pair_sweep.classifier_extractor", lambda *_: PIXELS)
    drawn: list[tuple[str, ...]] = []

    def heatmap(*given: Any, metrics: tuple[str, ...]) -> Any:
        drawn.append(metrics)
        return pair_sweep_heatmap(*given, metrics=metrics)

    monkeypatch.setattr(sweep_runs, "pair_sweep_heatmap", heatmap)
    options = ("digits", "--data", "digits", "--out", tmp_path / "a", "--steps", 2, "--num-samples", 20)
    options += ("--batch-size", 4, "--pair", "0:2", "--pair", "1:3", "--sync-stop-step", 1)
    assert shell(monkeypatch, *options, "--dry-run") == 0
    assert "branches: 3" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()
    assert shell(monkeypatch, *options, "--shard", "1/2") == 0
    assert "branches 2 of 3 finished" in capsys.readouterr().out
    assert shell(monkeypatch, *options, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["pairs"], record["branches"]) == (2, 3)
    assert len(read_pair_sweep(record["table"])) == 3 * 9
    assert (tmp_path / "a" / "figures" / "atlas.png").is_file()
    assert drawn[-1] == (FRECHET, HELD_OUT, probe_scores.PROBE_ERROR)
    assert json.loads((tmp_path / "a" / "atlas.json").read_text())["training"]["sync"]["stop_step"] == 1
    assert shell(monkeypatch, *options, "--sync-stop-step", 2, "--dry-run") == 2
    assert "a pair sweep of another run (different: training.sync.stop_step)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pair", "0:9"), "blocks.9 cannot be aligned in"),
        (("--shard", "2"), "--shard 2 is not i/N"),
        (("--shard", "3/2"), "--shard 3/2 is not i/N"),
        (("--pair", "0:2", "--pair", "0:2", "--dry-run"), "a pair is listed twice; pass each pair once"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    given = ("digits", "--data", "digits", "--out", tmp_path / "a", "--steps", 2, *options)
    assert shell(monkeypatch, *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
