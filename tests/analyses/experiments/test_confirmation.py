"""The runs of a seed differ in nothing but their pair, and nothing that is done is done again."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_samples, tiny_sit, tiny_splits

from layerprobe.analyses.experiments import confirmation as confirm_module
from layerprobe.analyses.experiments import evaluation
from layerprobe.analyses.experiments.arms import (
    BASELINE,
    FRECHET,
    HELD_OUT,
    PICK,
    PRIOR,
    Arm,
    ConfirmationPlan,
    arms_for,
)
from layerprobe.analyses.experiments.confirmation import confirm_pair, earlier_looks, kept_spread, step_length
from layerprobe.analyses.experiments.evaluation import Scorer
from layerprobe.analyses.experiments.verdict import Verdict
from layerprobe.analyses.generation.distances import frechet_distance, gaussian
from layerprobe.analyses.generation.extractors import Extractor, sample_features
from layerprobe.backbones.base import Backbone
from layerprobe.data.samples import Splits, TensorSamples
from layerprobe.layersync.pair import LayerPair
from layerprobe.sampling import SamplingPlan, sample
from layerprobe.training.loop import train
from layerprobe.training.losses import held_out_loss
from layerprobe.training.plan import TrainingPlan

LAYERS = tuple(f"blocks.{i}" for i in range(10))

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
    return confirm_pair(options.pop("start", start), splits or tiny_splits(24), arms, plan, folder, **options)


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
    model = train(start(4), splits.train, plan, whole.parent / "separate")
    row = table[(table.arm == PICK) & (table.seed == 4) & (table.step == 5)].set_index("metric").value
    assert row[HELD_OUT] == pytest.approx(np.mean(list(held_out_loss(model, splits.test).values())), rel=1e-12)
    labels = splits.test.labels
    assert labels is not None
    assert labels.bincount().tolist() == [2, 2, 2]
    x = sample(model, range(9), labels=torch.tensor([0] * 3 + [1] * 3 + [2] * 3), plan=TINY.sampling)
    real = splits.test.batch(range(len(splits.test))).x
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
    monkeypatch.setattr(evaluation, "held_out_loss", lambda *a: calls.append(1) or held_out_loss(*a))
    run(tmp_path, arms=TINY_ARMS[:2])
    assert len(calls) == 2 * (1 + 2 * 2)  # for each seed its start, which the arms share, and two evaluations an arm


def test_a_start_that_draws_fresh_weights_at_every_call_is_called_once_a_seed(tmp_path: Path) -> None:
    fresh = iter(range(100))
    run(tmp_path, start=lambda seed: tiny_sit(seed=next(fresh)), arms=TINY_ARMS[:2])
    assert next(fresh) == 2


@pytest.mark.parametrize(("seed", "arm", "step"), [(3, BASELINE, 1), (3, PRIOR, 3), (4, PICK, 5)])
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
        patch.setattr(evaluation, "held_out_loss", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    run(tmp_path)
    assert results(tmp_path) == results(whole)


def stamps_of_files(folder: Path) -> dict[Path, int]:
    """When each file of the arms was written; checksums change with every further file of their folder."""
    files = (path for path in folder.glob("seed-*/**/*") if path.is_file() and path.name != "checksums.json")
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_finished_confirmation_trains_and_scores_nothing(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, stamps = results(whole), stamps_of_files(whole)
    monkeypatch.setattr("layerprobe.training.loop._step", None)
    monkeypatch.setattr(evaluation, "held_out_loss", None)
    run(whole)
    assert results(whole) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_seeds_and_arms_may_be_added_later(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, arms=TINY_ARMS[:2])
    stamps = stamps_of_files(tmp_path)
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

    run(tmp_path, splits=tiny_splits(24, labeled=False), extractor=Extractor("seen", features), arms=TINY_ARMS[:2])
    # The first features are of the real samples, the second of what the first arm draws before training.
    assert torch.equal(seen[1], sample(start(3), range(9), plan=TINY.sampling))


def test_classes_are_drawn_as_often_as_they_are_real() -> None:
    labels = torch.tensor([2] * 10 + [0] * 20 + [1] * 10)
    samples = TensorSamples(torch.zeros(40, 1, 4, 4), labels)
    assert labels[evaluation._rows_like(samples, 8)].bincount().tolist() == [4, 2, 2]
    assert labels[evaluation._rows_like(samples, 80)].bincount().tolist() == [40, 20, 20]


@pytest.mark.parametrize("labeled", [True, False])
def test_padded_samples_are_drawn_as_long_as_real_ones(labeled: bool) -> None:
    """Each class keeps its own lengths: here class 1 is four frames long or five, all others fill their eight."""
    lengths = torch.tensor([8, 4, 8, 8, 5, 8] * 2)
    mask = torch.arange(8) < lengths.unsqueeze(1)
    whole = tiny_samples(12, shape=(1, 8), labeled=labeled)
    samples = TensorSamples(whole.x, whole.labels, mask=mask)
    seen: list[torch.Tensor] = []

    def features(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.flatten(1)

    scorer = Scorer(samples, Extractor("seen", features), num_samples=24, sampling=TINY.sampling)
    model = tiny_sit(shape=(1, 8))
    assert scorer.distance(model) == scorer.distance(model)
    drawn = seen[1]
    found = (drawn != 0).flatten(1).sum(1)
    assert sorted(found.tolist()) == sorted(lengths.tolist() * 2)
    if labeled:
        assert sorted(found[8:16].tolist()) == [4, 4, 4, 4, 5, 5, 5, 5]
    else:
        assert found.tolist() == lengths.tolist() * 2
    labels = torch.tensor([0] * 8 + [1] * 8 + [2] * 8) if labeled else None
    real = torch.arange(8) < found.unsqueeze(1)
    assert torch.equal(drawn, sample(model, range(24), labels=labels, plan=TINY.sampling, mask=real))


def test_without_an_extractor_a_classifier_is_trained_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, calls = confirm_module.classifier_extractor, []

    def quick(samples: Any, cache: Path) -> Extractor:
        calls.append(cache)
        return classifier(samples, cache, steps=3, batch_size=4)

    monkeypatch.setattr(confirm_module, "classifier_extractor", quick)
    found = run(tmp_path, extractor=None, arms=TINY_ARMS[:2])
    assert found.extractor == "64 features of a classifier trained 3 steps on the labels"
    assert calls == [tmp_path / "extractor.safetensors"]
    stamp, before = calls[0].stat().st_mtime_ns, results(tmp_path)
    run(tmp_path, extractor=None, arms=TINY_ARMS[:2])
    assert results(tmp_path) == before
    assert calls[0].stat().st_mtime_ns == stamp


def test_held_out_samples_are_not_trained_on(whole: Path) -> None:
    other = tiny_samples(6, first_id=900, seed=5)
    splits = replace(tiny_splits(24), test=other)
    run(whole.parent / "other", splits=splits, arms=TINY_ARMS[:2])
    for arm in ("baseline", "pick"):
        models = [
            (folder / "seed-3" / arm / "model.safetensors").read_bytes() for folder in (whole, whole.parent / "other")
        ]
        assert models[0] == models[1]
    assert results(whole)[0] != results(whole.parent / "other")[0]


# ------------------------------------------------------------------------------------------------------ looks and arms


def test_it_stops_where_the_difference_is_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted distance: the pick is better by about 1 in every seed."""
    distances = iter([9.0, 5.0, 4.1, 9.0, 5.0, 4.0, 9.0, 5.0, 3.9])
    monkeypatch.setattr(evaluation.Scorer, "distance", lambda *_: next(distances))
    once = replace(TINY.training, steps=1)
    plan = replace(TINY, training=once, seeds=(3, 4, 5, 6, 7), num_evaluations=1, stop_early=True)
    told: list[tuple[str, int, int]] = []
    found = run(tmp_path, plan=plan, arms=TINY_ARMS[:2], progress=lambda *what: told.append(what))
    assert (found.num_seeds, found.planned_seeds, found.looks.keys()) == (3, 5, {3})
    assert told[-1] == (f"seed 5, {PICK}", 6, 10)
    assert not (tmp_path / "seed-6").exists()
    # Repeated, it stops there again; asked for all of its seeds, it goes on and knows that it has looked before.
    before = results(tmp_path)
    run(tmp_path, plan=plan, arms=TINY_ARMS[:2])
    assert results(tmp_path) == before
    distances = iter([9.0, 5.0, 4.0, 9.0, 5.0, 4.2])
    more = run(tmp_path, plan=replace(plan, stop_early=False), arms=TINY_ARMS[:2])
    assert (more.num_seeds, list(more.looks)) == (5, [3, 5])
    assert 0.05 < more.error_rate < 0.1


def test_an_earlier_verdict_on_the_same_arm_counts_as_looks(tmp_path: Path, whole: Path) -> None:
    place = tmp_path / "verdict.json"
    assert earlier_looks(tmp_path, PICK) == {}
    verdict = json.loads((whole / "verdict.json").read_text()) | {"judged": PRIOR, "looks": {"3": 0.01, "4": 0.02}}
    place.write_text(json.dumps(verdict))
    assert earlier_looks(tmp_path, PRIOR) == {3: 0.01, 4: 0.02}
    assert earlier_looks(tmp_path, PICK) == {}
    for damaged in ("{", "[]", "{}", json.dumps(verdict | {"looks": 3})):
        place.write_text(damaged)
        with pytest.raises(ValueError, match=r"verdict.json is damaged \(.*\); delete it") as error:
            earlier_looks(tmp_path, PICK)
        assert "\n" not in str(error.value)


def test_steps_are_as_long_as_the_weights_move(tmp_path: Path) -> None:
    """Against one plain step of AdamW, whose first step moves every weight by the learning rate."""
    backbone, samples = tiny_sit(), tiny_splits(24).train
    once = replace(TINY.training, steps=1)
    weights = sum(p.numel() for p in backbone.module.parameters() if p.requires_grad)
    assert step_length(backbone, samples, once) == pytest.approx(1e-2 * weights**0.5, rel=0.02)
    plan = replace(TINY.training, steps=3, ema_decay=0.0)
    after = [
        torch.cat(
            [
                p.detach().flatten()
                for p in train(backbone, samples, replace(plan, steps=n), tmp_path / str(n)).module.parameters()
            ]
        )
        for n in range(4)
    ]
    expected = np.mean([float((b - a).norm()) for a, b in itertools.pairwise(after)])
    assert step_length(backbone, samples, replace(plan, ema_decay=0.9)) == pytest.approx(expected, rel=1e-5)


def test_the_control_of_the_learning_rate_moves_as_far_as_the_pick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(TINY, training=replace(TINY.training, weight=30.0, learning_rate=1e-3))
    wanted = ["none", "pick", "learning-rate"]
    arms = arms_for([LayerPair("blocks.0", "blocks.2")], LAYERS[:3], names=wanted)
    found = run(tmp_path, plan=plan, arms=arms)
    kept = json.loads((tmp_path / "learning-rate.json").read_text())
    rate = found.arms[2].learning_rate
    assert rate == kept["learning_rate"] == pytest.approx(1e-3 * kept["mean_step_aligned"] / kept["mean_step"])
    assert abs(rate / 1e-3 - 1) > 0.01
    assert [arm.learning_rate for arm in found.arms[:2]] == [1e-3, 1e-3]
    splits = tiny_splits(24)
    aligned = step_length(start(3), splits.train, replace(plan.training, pairs=(arms[1].pair,)))
    matched = step_length(start(3), splits.train, replace(plan.training, learning_rate=rate))
    unmatched = step_length(start(3), splits.train, plan.training)
    assert abs(matched - aligned) < abs(unmatched - aligned) / 5
    records = [
        json.loads((tmp_path / "seed-4" / name / "training.json").read_text()) for name in ("pick", "learning-rate")
    ]
    assert [(r["plan"]["learning_rate"], len(r["plan"]["pairs"])) for r in records] == [(1e-3, 1), (rate, 0)]
    # Measured once: interrupted and repeated, it goes on at the same learning rate.
    monkeypatch.setattr(confirm_module, "step_length", None)
    before = results(tmp_path)
    run(tmp_path, plan=plan, arms=arms)
    assert results(tmp_path) == before


def test_the_spread_of_finished_arms_is_known(whole: Path, tmp_path: Path) -> None:
    table = pd.read_csv(whole / "confirmation.csv").query("step == 5 and metric == @FRECHET")
    ends = table.pivot(index="seed", columns="arm", values="value")
    moves = [np.var(ends[arm] - ends[BASELINE], ddof=1) for arm in (PICK, PRIOR)]
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "other", ignore_errors=True)
    spread = kept_spread(folder, "this confirmation")
    assert spread is not None
    assert spread.share == pytest.approx(np.sqrt(np.mean(moves)) / ends[BASELINE].mean())
    assert (spread.num_seeds, spread.source, spread.steps) == (2, "this confirmation", 5)
    # An arm whose second seed is under way does not count yet, nor does a seed without a baseline.
    (folder / "seed-4" / "checksums.json").unlink()  # the record below is written by hand
    (folder / "seed-4" / "published-prior.json").write_text('{"0": {"Frechet distance": 1.0}}')
    one = kept_spread(folder, "pilot")
    assert one is not None
    assert one.share == pytest.approx(np.sqrt(moves[0]) / ends[BASELINE].mean())
    (folder / "seed-4" / "baseline.json").unlink()
    assert kept_spread(folder, "pilot") is None
    assert kept_spread(tmp_path / "nothing", "pilot") is None
