"""Picks on the way: from planted evidence the pair that the rule says, from a network no more than its weights tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_samples, tiny_sit

from layerprobe.analyses.auto import AutoPick, Evidence, Held, Rules, decide, held_pair, missed_by_sample, probe
from layerprobe.analyses.recoverability import TokenMoments, recoverability
from layerprobe.backbones.base import Backbone
from layerprobe.backbones.sit import SiTConfig, new_sit
from layerprobe.layersync import LayerPair
from layerprobe.training import TrainingPlan, train

LAYERS = tuple(f"blocks.{i}" for i in range(8))
PAIRS = tuple(LayerPair(LAYERS[s], LAYERS[t]) for s, t in zip(*np.triu_indices(8, 1), strict=True))
# Of eight layers the first may not learn, the last two may not teach, and two layers lie between at least.
ADMISSIBLE = [LayerPair(LAYERS[s], LAYERS[t]) for s, t in ((1, 3), (1, 4), (1, 5), (2, 4), (2, 5), (3, 5))]
SHAPE = (1, 8, 8)


def evidence(
    gaps: dict[tuple[int, int], float],
    *,
    others: float = 0.2,
    cka: dict[tuple[int, int], float] | None = None,
    richness: tuple[float, ...] = (1, 2, 3, 4, 5, 6, 7, 8),
    spread: float = 0.0,
    n: int = 100,
) -> Evidence:
    """Planted gaps at two noise levels whose mean is as given; all pairs' samples vary alike by `spread`."""
    levels, num = (0.2, 0.8), len(PAIRS)
    gap, similar = np.full(num, others), np.full(num, 0.9)
    for values, into in ((gaps, gap), (cka or {}, similar)):
        for (s, t), value in values.items():
            into[PAIRS.index(LayerPair(LAYERS[s], LAYERS[t]))] = value
    generator = np.random.default_rng(0)
    wiggle = 1 + spread * generator.standard_normal((num, n))
    wiggle /= wiggle.mean(1, keepdims=True)
    missed = np.stack([(gap + shift)[:, None] * wiggle for shift in (-0.01, 0.01)])
    return Evidence(
        LAYERS,
        levels,
        np.tile(np.array(richness, np.float64), (2, 1)),
        PAIRS,
        np.tile(similar, (2, 1)),
        np.full((2, num), 0.5),
        missed,
        np.ones((2, num, n)),
    )


def against(record: dict[str, Any], student: int, teacher: int) -> str:
    names = (LAYERS[student], LAYERS[teacher])
    return "; ".join(next(p["against"] for p in record["pairs"] if (p["student"], p["teacher"]) == names))


# ------------------------------------------------------------------------------------------------------------- the rule


def test_of_the_admissible_pairs_the_one_with_the_largest_gap_is_picked() -> None:
    # The largest gaps of all belong to pairs that the rules exclude.
    planted = {(0, 5): 0.9, (2, 7): 0.8, (4, 5): 0.7, (2, 4): 0.5, (1, 5): 0.4}
    decision = decide(evidence(planted))
    assert decision.pairs == (LayerPair(LAYERS[2], LAYERS[4]),)
    assert decision.record["decision"] == "picked"
    assert decision.record["reason"] == (
        "blocks.2 <- blocks.4 has the largest gap of 6 admissible pairs: a ridge regression from blocks.2 misses 50.0% "
        "(95 % interval 50.0% to 50.0%) of what blocks.4 adds. noise-LiDAR is 3.00 in the student and 5.00 in the "
        "teacher, their CKA 0.900, the cosine that alignment starts from 0.500, and they are 2 layers apart."
    )
    assert [p for p in PAIRS if not against(decision.record, *(LAYERS.index(n) for n in (p.student, p.teacher)))] == (
        ADMISSIBLE
    )
    assert "among the first layer" in against(decision.record, 0, 5)
    assert "among the last 2 layers, which decode" in against(decision.record, 2, 7)
    assert "they are 1 apart, and at least 2" in against(decision.record, 4, 5)


def test_the_record_is_json_and_holds_every_number_of_every_pair() -> None:
    found = evidence({(2, 4): 0.5}, spread=0.3)
    record = json.loads(json.dumps(decide(found).record, allow_nan=False))
    assert len(record["pairs"]) == 28
    row = next(p for p in record["pairs"] if (p["student"], p["teacher"]) == ("blocks.2", "blocks.4"))
    assert (row["gap"], row["gap_by_level"], row["cka"], row["cosine"]) == (0.5, [0.49, 0.51], [0.9, 0.9], [0.5, 0.5])
    low, high = row["interval"]
    assert low < 0.5 < high
    assert [layer["noise-LiDAR"] for layer in record["layers"]] == [[float(i)] * 2 for i in range(1, 9)]
    assert "not calibrated" in record["status"]


def test_a_pair_that_is_aligned_already_is_not_picked() -> None:
    found = evidence({(2, 4): 0.5, (1, 5): 0.4}, cka={(2, 4): 0.985})
    decision = decide(found)
    assert decision.pairs == (LayerPair(LAYERS[1], LAYERS[5]),)
    assert "aligned already: mean CKA 0.985, above 0.98" in against(decision.record, 2, 4)
    assert decide(found, Rules(max_cka=0.99)).pairs == (LayerPair(LAYERS[2], LAYERS[4]),)


def test_a_student_that_is_as_rich_as_its_teacher_is_not_picked() -> None:
    decision = decide(evidence({(2, 4): 0.5, (1, 3): 0.4}, richness=(1, 2, 6, 7, 5, 5, 5, 5)))
    assert decision.pairs == (LayerPair(LAYERS[1], LAYERS[3]),)
    assert "blocks.2 is not weaker than blocks.4" in against(decision.record, 2, 4)


@pytest.mark.parametrize("gap", [0.0, 0.04])
def test_where_students_could_give_all_by_themselves_no_pair_is_worth_it(gap: float) -> None:
    decision = decide(evidence({(2, 4): gap + 0.001}, others=gap + 1e-4, spread=0.1))
    assert decision.pairs == ()
    assert (decision.record["decision"], decision.record["credit"]) == ("none", None)
    assert decision.record["reason"].startswith("No pair is worth it yet. Closest to one is blocks.2 <- blocks.4: what")
    assert "is within the student's linear reach: the gap is" in decision.record["reason"]


def test_an_uncertain_gap_is_not_enough() -> None:
    """The interval must clear the threshold, not the estimate."""
    clear, vague = (evidence({(2, 4): 0.06}, others=0.01, spread=spread, n=20) for spread in (0.01, 3.0))
    assert decide(clear).pairs
    assert not decide(vague).pairs


def test_of_pairs_that_cannot_be_told_apart_the_one_with_the_lowest_cka_is_picked() -> None:
    near, similar = {(2, 4): 0.5, (1, 5): 0.49, (1, 4): 0.3}, {(1, 5): 0.8, (1, 4): 0.1}
    tie = decide(evidence(near, cka=similar, spread=0.5))
    assert tie.pairs == (LayerPair(LAYERS[1], LAYERS[5]),)
    expected = "blocks.1 <- blocks.5 has the lowest CKA of the 2 pairs that share the largest gap (with blocks.2 <- blo"
    assert tie.record["reason"].startswith(expected)
    clear = decide(evidence(near, cka=similar, spread=0.01))
    assert clear.pairs == (LayerPair(LAYERS[2], LAYERS[4]),)


def test_layers_without_an_answer_are_objections_and_no_error() -> None:
    found = evidence({(2, 4): 0.5, (1, 5): 0.4})
    broken = PAIRS.index(LayerPair(LAYERS[2], LAYERS[4]))
    found.missed[1, broken] = np.nan
    found.richness[0, 3] = np.nan
    decision = decide(found)
    assert decision.pairs == (LayerPair(LAYERS[1], LAYERS[5]),)
    assert "one adds nothing but a constant to the other at a noise level" in against(decision.record, 2, 4)
    assert "blocks.3 tells no sample from another at a noise level" in against(decision.record, 1, 3)
    found.missed[:] = np.nan
    found.richness[:] = np.nan
    assert decide(found).record["decision"] == "none"
    assert decide(found, held=Held(PAIRS[0], 1.0)).pairs == (PAIRS[0],)


# ------------------------------------------------------------------------------------------------------- looking again


HELD = LayerPair(LAYERS[2], LAYERS[4])


def test_a_pair_stays_while_it_has_the_largest_gap() -> None:
    decision = decide(evidence({(2, 4): 0.5}), held=Held(HELD, 1.0))
    assert (decision.pairs, decision.record["decision"]) == ((HELD,), "kept")
    assert "stays: it has the largest gap" in decision.record["reason"]


@pytest.mark.parametrize(("spread", "kept"), [(0.01, False), (2.0, True)])
def test_another_pair_takes_over_only_beyond_the_uncertainty(spread: float, kept: bool) -> None:
    found = evidence({(2, 4): 0.4, (1, 5): 0.45}, spread=spread)
    decision = decide(found, held=Held(HELD, 0.0))
    assert decision.pairs == ((HELD,) if kept else (LayerPair(LAYERS[1], LAYERS[5]),))
    reason = decision.record["reason"]
    assert ("blocks.1 <- blocks.5 is ahead by" in reason) == kept
    assert "not beyond the uncertainty" in reason if kept else "takes the place of blocks.2 <- blocks.4" in reason


def test_the_gap_that_alignment_has_closed_is_not_held_against_the_pair() -> None:
    picked = decide(evidence({(2, 4): 0.5, (1, 5): 0.4}, spread=0.01))
    credit = picked.record["credit"]
    aligned = evidence({(2, 4): 0.05, (1, 5): 0.4}, spread=0.01)
    assert decide(aligned, held=Held(HELD, 0.0)).record["decision"] == "changed"
    kept = decide(aligned, held=Held(HELD, credit))
    assert (kept.record["decision"], kept.record["credit"]) == ("kept", credit)


def test_gaps_that_grow_together_change_nothing() -> None:
    picked = decide(evidence({(2, 4): 0.5, (1, 5): 0.4}, spread=0.01))
    later = evidence({(2, 4): 0.3, (1, 5): 0.6}, others=0.3, spread=0.01)  # half as much again, but for the aligned
    assert decide(later, held=Held(HELD, picked.record["credit"])).record["decision"] == "kept"


def test_a_lead_beyond_what_the_pair_had_when_it_was_picked_takes_over() -> None:
    """Credit is relative to the mean gap: 1.2 of a mean of about 0.2 is less than 0.6."""
    decision = decide(evidence({(2, 4): 0.2, (1, 5): 0.6}, spread=0.01), held=Held(HELD, 1.2))
    assert decision.record["decision"] == "changed"


def test_a_held_pair_stays_when_none_is_admissible() -> None:
    decision = decide(evidence({}, others=0.01), held=Held(HELD, 1.0))
    assert decision.pairs == (HELD,)
    assert "no pair is admissible at this step" in decision.record["reason"]


# ------------------------------------------------------------------------------------------------------------ the probe


def test_the_share_missed_by_the_judged_samples_is_the_recoverability_gap() -> None:
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((4, 6, 6))

    def tokens(n: int) -> list[Any]:
        stream = generator.standard_normal((n, 5, 6)) + 7
        layers = [stream]
        for matrix in mixing:
            layers.append(layers[-1] + np.tanh(layers[-1] @ matrix) + 0.1 * generator.standard_normal((n, 5, 6)))
        return [x.astype(np.float32) for x in layers]

    parts = {"fit": tokens(60), "choose": tokens(30), "report": tokens(40)}
    names = [f"blocks.{i}" for i in range(5)]
    missed, increment = missed_by_sample(names, parts)
    moments = TokenMoments(names)
    for split, x in parts.items():
        moments.update(split, x)
    expected = recoverability(moments).gap
    assert missed.shape == (5, 5, 40)
    # Increments are about the fit split's mean there, about nothing but the layers' own means here: the same thing.
    np.testing.assert_allclose(missed.sum(-1) / increment.sum(-1), expected, rtol=1e-6)


def test_the_bootstrap_draws_samples_and_keeps_levels_and_pairs_together() -> None:
    found = evidence({(2, 4): 0.5}, spread=0.5, n=30)
    draws = found.resampled(seed=3, resamples=20)
    rows = np.random.default_rng([3, 30]).integers(0, 30, (20, 30))
    expected = np.stack(
        [(found.missed[:, :, row].sum(-1) / found.increment[:, :, row].sum(-1)).mean(0) for row in rows], axis=1
    )
    np.testing.assert_allclose(draws, expected, rtol=1e-12)


def model(seed: int = 0) -> Backbone:
    return tiny_sit(depth=8, shape=SHAPE, seed=seed)


def numbers(found: Evidence) -> tuple[Any, ...]:
    return found.richness, found.cka, found.cosine, found.missed, found.increment


def test_a_probe_depends_on_weights_samples_and_seed_and_never_on_labels() -> None:
    samples = tiny_samples(60, shape=SHAPE)
    found = probe(model(), samples, num_samples=48)
    assert (found.layers, found.noise_levels, found.pairs) == (LAYERS, (0.2, 0.5, 0.8), PAIRS)
    assert found.missed.shape == (3, 28, 24)
    for same in (samples, tiny_samples(60, shape=SHAPE, labelled=False)):
        again = probe(model(), same, num_samples=48)
        assert all(np.array_equal(a, b) for a, b in zip(numbers(found), numbers(again), strict=True))
    for other in (
        probe(model(1), samples, num_samples=48),
        probe(model(), samples, num_samples=48, seed=1),
        probe(model(), tiny_samples(60, shape=SHAPE, seed=1), num_samples=48),
    ):
        assert not any(np.array_equal(a, b) for a, b in zip(numbers(found), numbers(other), strict=True))


def test_a_probe_finds_the_network_as_it_was_and_the_random_numbers_too() -> None:
    network = model()
    network.module.train()
    before = torch.random.get_rng_state()
    weights = {name: value.clone() for name, value in network.module.state_dict().items()}
    probe(network, tiny_samples(30, shape=SHAPE), num_samples=24)
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
    decision = decide(probe(network, tiny_samples(60, shape=SHAPE), num_samples=48))
    assert decision.pairs == ()
    assert "aligned already: mean CKA 1.000" in against(decision.record, 1, 5)
    assert "one adds nothing but a constant" in against(decision.record, 1, 5)


def test_a_network_that_has_learned_nothing_gets_no_pair() -> None:
    """With adaLN-Zero every block of a new SiT is the identity."""
    fresh = new_sit(SiTConfig(SHAPE, 2, 16, 8, 2, 3), seed=0)
    decision = decide(probe(fresh, tiny_samples(60, shape=SHAPE), num_samples=48))
    assert decision.pairs == ()
    assert decision.record["reason"].startswith("No pair is worth it yet.")
    json.dumps(decision.record, allow_nan=False)


# ----------------------------------------------------------------------------------------------------------- a training


PLAN = TrainingPlan(steps=6, batch_size=4, learning_rate=1e-3, ema_decay=0.5, log_every=1, checkpoint_every=2)
EASY = Rules(max_cka=1.0, min_gap=0.0, min_distance=1)


def auto_train(folder: Path, *, stop_at: int | None = None) -> Backbone:
    samples = tiny_samples(40, shape=SHAPE)
    auto = AutoPick(samples, folder, warmup_steps=2, every=2, num_samples=24, rules=EASY)

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
        ({"num_samples": 23}, "a probe of 23 samples of 40 says nothing; it needs 24 or more"),
        ({"samples": tiny_samples(20)}, "a probe of 384 samples of 20 says nothing"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    auto = AutoPick(tiny_samples(40), tmp_path)
    with pytest.raises(ValueError, match=message):
        replace(auto, **options)
