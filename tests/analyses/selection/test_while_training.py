"""Picks on the way: from planted evidence the pair that the rule says, from a network no more than its weights tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_evidence import planted_evidence, quantity
from tiny import tiny_samples, tiny_sit

from layerprobe.analyses.selection.limits import PairLimits
from layerprobe.analyses.selection.ranking import rank_pairs
from layerprobe.analyses.selection.while_training import AutoPick, Held, decide, held_pair, measure_layers
from layerprobe.analyses.tables import evidence as e
from layerprobe.analyses.tables.evidence import CRITERIA, PairEvidence
from layerprobe.analyses.wording.decisions import decision_text
from layerprobe.backbones.base import Backbone
from layerprobe.backbones.sit import SiTConfig, new_sit
from layerprobe.extraction.ablation import LOSS_INCREASE
from layerprobe.layersync.pair import LayerPair
from layerprobe.training.loop import train
from layerprobe.training.plan import TrainingPlan

LAYERS = tuple(f"blocks.{i}" for i in range(8))
PLACES = [(s, t) for s in range(8) for t in range(s + 1, 8)]
PAIRS = tuple(LayerPair(LAYERS[s], LAYERS[t]) for s, t in PLACES)
SHAPE = (1, 8, 8)


def pair(student: int, teacher: int) -> LayerPair:
    return LayerPair(LAYERS[student], LAYERS[teacher])


def evidence(
    gaps: Mapping[tuple[int, int], float],
    *,
    reach: Mapping[tuple[int, int], float] | None = None,
    cka: Mapping[tuple[int, int], float] | None = None,
    half: float = 0.0,
) -> PairEvidence:
    """Planted gaps in noise-LiDAR, others 0.1, known to `half`; all else is equal and known exactly."""
    by_pair = {
        e.LIDAR_GAP: quantity([[gaps.get(place, 0.1) for place in PLACES]], half),
        e.CKA: quantity([[(cka or {}).get(place, 0.9) for place in PLACES]], 0.0),
        e.RECOVERABILITY: quantity([[(reach or {}).get(place, 0.2) for place in PLACES]], 0.0),
    }
    by_layer = {e.NOISE_LIDAR: quantity([[5.0] * 8], 0.0), LOSS_INCREASE: quantity([[1.0] * 8], 0.0)}
    return planted_evidence(by_layer, by_pair, noise_levels=(0.2,))


def against(record: dict[str, Any], student: int, teacher: int) -> list[str]:
    names = (LAYERS[student], LAYERS[teacher])
    refused = {(p["student"], p["teacher"]): p["objections"] for p in record["selection"]["rejected"]}
    return [objection["code"] for objection in refused.get(names, [])]


def score(found: PairEvidence, of: LayerPair) -> float:
    return next(p.score for p in rank_pairs(found, label_free=True).ranked if p.pair == of)


# ------------------------------------------------------------------------------------------------------------- the rule


def test_the_decision_is_the_selection_s_without_labels() -> None:
    found = evidence({(2, 5): 0.5, (1, 3): 0.4, (2, 7): 0.8, (3, 4): 0.7})
    decision, selection = decide(found), rank_pairs(found, label_free=True)
    assert decision.pairs == (selection.pick,) == (pair(2, 5),)
    assert decision.record["decision"] == "picked"
    assert decision_text(decision.record).startswith("blocks.2 <- blocks.5 is picked. The teacher blocks.")
    assert decision.record["credit"] == selection.ranked[0].score
    assert against(decision.record, 2, 7) == ["teacher in the tail"]
    assert against(decision.record, 3, 4) == ["too close"]
    assert not any(CRITERIA[name].needs_labels for name, _ in selection.basis.weights)


def test_the_record_is_json_and_holds_every_number_of_every_layer_and_pair() -> None:
    record = json.loads(json.dumps(decide(evidence({(2, 4): 0.5})).record, allow_nan=False))
    assert len(record["evidence"]["by_pair"][e.LIDAR_GAP]) == 28
    assert record["evidence"]["by_pair"][e.LIDAR_GAP]["blocks.2 <- blocks.4"] == [0.5, 0.5, 0.5]
    assert record["evidence"]["by_layer"][e.NOISE_LIDAR] == {layer: [5.0, 5.0, 5.0] for layer in LAYERS}
    assert record["selection"]["ranked"][0]["score"] > 0
    assert record["selection"]["basis"]["noise_levels"] == [0.2]


@pytest.mark.parametrize(("limits", "allowed"), [(PairLimits(max_cka=0.98), False), (PairLimits(), True)])
def test_the_limits_say_what_a_pair_must_be(limits: PairLimits, allowed: bool) -> None:
    decision = decide(evidence({(2, 4): 0.5}, cka={(2, 4): 0.985}), limits)
    assert against(decision.record, 2, 4) == ([] if allowed else ["already alike"])


@pytest.mark.parametrize("gap", [0.0, 0.04])
def test_where_students_could_give_all_by_themselves_no_pair_is_worth_it(gap: float) -> None:
    decision = decide(evidence({}, reach=dict.fromkeys(PLACES, gap)))
    assert decision.pairs == ()
    assert (decision.record["decision"], decision.record["credit"]) == ("none", None)
    assert decision_text(decision.record).startswith("No pair yet. No pair is admissible. Closest to it is b")


# ------------------------------------------------------------------------------------------------------- looking again


HELD = pair(2, 5)


def test_a_pair_stays_while_it_has_the_largest_score() -> None:
    decision = decide(evidence({(2, 5): 0.5}), held=Held(HELD, 1.0))
    assert (decision.pairs, decision.record["decision"]) == ((HELD,), "kept")
    assert "stays: it has the largest score" in decision_text(decision.record)


@pytest.mark.parametrize(("half", "kept"), [(0.001, False), (1.0, True)])
def test_another_pair_takes_over_only_beyond_the_uncertainty(half: float, kept: bool) -> None:
    found = evidence({(2, 5): 0.7, (1, 5): 0.9, **dict.fromkeys([(2, 4), (1, 4)], 0.8)}, half=half)
    decision = decide(found, PairLimits(min_gap=-9.0), held=Held(HELD, -9.0))
    assert decision.pairs == ((HELD,) if kept else (pair(1, 5),))
    expected = (
        "blocks.2 <- blocks.5 stays: " if kept else "blocks.1 <- blocks.5 takes the place of blocks.2 <- blocks.5"
    )
    assert decision_text(decision.record).startswith(expected)
    ahead, low, high = decision.record["lead"]
    assert low < ahead < high
    assert (low <= 0) == kept


def test_what_alignment_has_done_to_its_own_pair_is_not_held_against_it() -> None:
    picked = decide(evidence({(2, 5): 0.5, (1, 3): 0.4}))
    aligned = evidence({(2, 5): 0.06, (1, 3): 0.4}, cka={(2, 5): 0.97})
    assert decide(aligned, held=Held(HELD, -9.0)).record["decision"] == "changed"
    kept = decide(aligned, held=Held(HELD, picked.record["credit"]))
    assert (kept.record["decision"], kept.record["credit"]) == ("kept", picked.record["credit"])
    # Not even where it is no longer admissible, its layers being as good as one.
    closed = evidence({(2, 5): 0.01, (1, 3): 0.4}, cka={(2, 5): 1.0})
    assert decide(closed, held=Held(HELD, picked.record["credit"])).pairs == (HELD,)


def test_the_credit_of_a_pair_grows_with_its_score() -> None:
    found = evidence({(2, 5): 0.5})
    assert decide(found, held=Held(HELD, 0.1)).record["credit"] == pytest.approx(score(found, HELD))


def test_a_held_pair_stays_when_none_is_admissible() -> None:
    decision = decide(evidence({}, reach=dict.fromkeys(PLACES, 0.01)), held=Held(HELD, 1.0))
    assert decision.pairs == (HELD,)
    assert decision_text(decision.record).endswith("stays: no pair is admissible at this step.")


# ------------------------------------------------------------------------------------------------------------- the look


def model(seed: int = 0) -> Backbone:
    return tiny_sit(depth=8, shape=SHAPE, seed=seed)


def test_a_look_depends_on_weights_samples_and_seed_and_never_on_labels() -> None:
    samples = tiny_samples(60, shape=SHAPE)
    found = measure_layers(model(), samples, num_samples=48, noise_levels=(0.2,))
    assert {LayerPair(*names) for names in found.pairs} == set(PAIRS)
    assert not {*found.by_layer, *found.by_pair} & set(e.LABEL_QUANTITIES)
    unlabeled = tiny_samples(60, shape=SHAPE, labeled=False)
    again = measure_layers(model(), unlabeled, num_samples=48, noise_levels=(0.2,))
    for name in (e.CKA, e.RECOVERABILITY, e.LIDAR_GAP):
        assert np.array_equal(again.by_pair[name].value, found.by_pair[name].value)
    for other in (
        measure_layers(model(1), samples, num_samples=48, noise_levels=(0.2,)),
        measure_layers(model(), samples, num_samples=48, seed=1, noise_levels=(0.2,)),
        measure_layers(model(), tiny_samples(60, shape=SHAPE, seed=1), num_samples=48, noise_levels=(0.2,)),
    ):
        for criterion in (e.CKA, e.RECOVERABILITY, e.TEACHER_NEED, e.LIDAR_GAP):
            mine, theirs = (of.columns(criterion)[0] for of in (found, other))
            assert not np.isclose(mine, theirs, rtol=1e-9, atol=0).any(), criterion


def test_a_look_finds_the_network_as_it_was_and_the_random_numbers_too() -> None:
    network = model()
    network.module.train()
    before = torch.random.get_rng_state()
    weights = {name: value.clone() for name, value in network.module.state_dict().items()}
    measure_layers(network, tiny_samples(30, shape=SHAPE), num_samples=24, noise_levels=(0.2,))
    assert network.module.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(weights[name], value) for name, value in network.module.state_dict().items())
    assert not [module for module in network.module.modules() if module._forward_hooks]


def test_blocks_that_do_nothing_have_nothing_to_teach() -> None:
    """Planted: blocks 2 to 5 are switched off, so that all of 1 to 5 say the same."""
    network = model()
    for index in range(2, 6):
        torch.nn.init.zeros_(network.module.blocks[index].adaLN_modulation[-1].weight)
        torch.nn.init.zeros_(network.module.blocks[index].adaLN_modulation[-1].bias)
    decision = decide(measure_layers(network, tiny_samples(60, shape=SHAPE), num_samples=48, noise_levels=(0.2,)))
    assert decision.pairs == ()
    codes = against(decision.record, 1, 5)
    assert {"already alike", "teacher not needed"} <= set(codes)


def test_a_network_that_has_learned_nothing_gets_no_pair() -> None:
    """With adaLN-Zero every block of a new SiT is the identity."""
    fresh = new_sit(SiTConfig(SHAPE, 2, 16, 8, 2, 3), seed=0)
    decision = decide(measure_layers(fresh, tiny_samples(60, shape=SHAPE), num_samples=48, noise_levels=(0.2,)))
    assert decision.pairs == ()
    assert decision_text(decision.record).startswith("No pair yet.")
    json.dumps(decision.record, allow_nan=False)


# ----------------------------------------------------------------------------------------------------------- a training


PLAN = TrainingPlan(steps=6, batch_size=4, learning_rate=1e-3, ema_decay=0.5, log_every=1, checkpoint_every=2)
EASY = PairLimits(max_cka=1.0, min_gap=0.0, min_distance=1, skip_first=0, exclude_tail=0.0)


def auto_train(folder: Path, *, stop_at: int | None = None) -> Backbone:
    samples = tiny_samples(40, shape=SHAPE)
    auto = AutoPick(samples, folder, warmup_steps=2, every=2, num_samples=24, noise_levels=(0.5,), limits=EASY)

    def interrupt(step: int, _: int, __: float) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    steps = auto.direct_at(PLAN.steps)
    assert steps == (2, 4)
    return train(model(), samples, PLAN, folder, direct=auto.direct, direct_at=steps, progress=interrupt)


def decisions(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Backbone]:
    """A training from start to end: its folder and its model."""
    folder = tmp_path_factory.mktemp("auto") / "whole"
    return folder, auto_train(folder)


def test_alignment_begins_after_the_warm_up_and_every_decision_is_kept(whole: tuple[Path, Backbone]) -> None:
    rows = decisions(whole[0])
    assert [row["step"] for row in rows] == [2, 4]
    assert (rows[0]["record"]["decision"], len(rows[0]["pairs"])) == ("picked", 1)
    assert rows[1]["record"]["decision"] in ("kept", "changed")
    log = [json.loads(line) for line in (whole[0] / "log.jsonl").read_text().splitlines()]
    aligned = [any(key.startswith("cosine") for key in row) for row in log]
    assert aligned == [False, False, True, True, True, True]


@pytest.mark.parametrize("stop_at", [3, 5])
def test_interrupted_and_resumed_it_decides_the_same(
    tmp_path: Path, whole: tuple[Path, Backbone], stop_at: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        auto_train(tmp_path, stop_at=stop_at)
    resumed = auto_train(tmp_path)
    assert decisions(tmp_path) == decisions(whole[0])
    for name, value in whole[1].module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name])


def test_what_was_decided_before_a_step_is_read_from_the_training(tmp_path: Path) -> None:
    assert held_pair(tmp_path, before=10) is None
    rows: list[dict[str, Any]] = [
        {"step": 2, "pairs": [], "record": {"credit": None}},
        {"step": 4, "pairs": [["blocks.1", "blocks.4"]], "record": {"credit": 1.5}},
    ]
    (tmp_path / "decisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert held_pair(tmp_path, before=2) is None
    assert held_pair(tmp_path, before=4) is None
    assert held_pair(tmp_path, before=5) == Held(LayerPair("blocks.1", "blocks.4"), 1.5)


@pytest.mark.parametrize(
    ("warmup", "every", "steps", "expected"),
    [(2, 3, 10, (2, 5, 8)), (2, 0, 10, (2,)), (10, 2, 10, ()), (0, 4, 5, (0, 4)), (0, 0, 0, ())],
)
def test_it_decides_after_the_warm_up_and_never_at_the_end(
    tmp_path: Path, warmup: int, every: int, steps: int, expected: tuple[int, ...]
) -> None:
    auto = AutoPick(tiny_samples(40), tmp_path, warmup_steps=warmup, every=every)
    assert auto.direct_at(steps) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"every": -1}, "every must be at least 0, got -1"),
        ({"num_samples": 23}, "23 samples of 40 are too few to measure layers; pass 24 or more"),
        ({"samples": tiny_samples(20)}, "384 samples of 20 are too few"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    auto = AutoPick(tiny_samples(40), tmp_path)
    with pytest.raises(ValueError, match=message):
        replace(auto, **options)
