"""The time of a confirmation is that of its steps and its evaluations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_sit

from layerprobe.analyses.experiments import duration
from layerprobe.analyses.experiments.arms import BASELINE, PICK, Arm, ConfirmationPlan
from layerprobe.layersync.pair import LayerPair
from layerprobe.sampling import SamplingPlan
from layerprobe.training.plan import TrainingPlan

PLAN = ConfirmationPlan(TrainingPlan(steps=100, batch_size=5), (0, 1), 4, 50, SamplingPlan("heun", 3))
ARMS = (Arm(BASELINE, None), Arm(PICK, LayerPair("blocks.0", "blocks.2")))


def test_steps_and_evaluations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 3 s, a forward pass of 1 s for the batch of 5."""
    backbone, times = tiny_sit(), iter([3.0, 1.0] * 6)
    monkeypatch.setattr(duration, "_fastest", lambda call: (call(), next(times))[1])
    weights = [p.clone() for p in backbone.module.parameters()]
    generator = torch.get_rng_state()
    evaluations = (2 * 4 + 1) * (50 * 3 * 2 + 1000 * 5) / 5
    assert duration.confirmation_seconds(backbone, ARMS, PLAN) == pytest.approx(2 * (100 * 2 * 3 + evaluations))
    # A teacher with a forward pass of its own is one more for each of its steps.
    sra = replace(ARMS[1], options={"noise_gap": 0.2})
    more = duration.confirmation_seconds(backbone, (ARMS[0], sra), PLAN)
    assert more == pytest.approx(2 * (100 * (2 * 3 + 1) + evaluations))
    # Two processes train two arms of two seeds in half the time; of three, one trains two.
    halves = [duration.confirmation_seconds(backbone, ARMS, PLAN, num_processes=num) for num in (2, 3, 4)]
    assert halves == pytest.approx([100 * 2 * 3 + evaluations] * 2 + [(100 * 2 * 3 + evaluations) / 2])
    guided = replace(PLAN, sampling=replace(PLAN.sampling, guidance=2.0))
    twice = duration.confirmation_seconds(backbone, ARMS, guided)
    assert twice - 2 * (600 + evaluations) == pytest.approx(2 * 9 * 300 / 5)
    assert all(torch.equal(a, b) for a, b in zip(weights, backbone.module.parameters(), strict=True))
    assert torch.equal(generator, torch.get_rng_state())


def test_a_sample_takes_the_passes_of_its_solver() -> None:
    plans = (SamplingPlan("euler", 5), SamplingPlan("heun", 5, guidance=2.0), SamplingPlan("dopri5", 5))
    assert [duration.passes_of_a_sample(plan) for plan in plans] == [5, 20, 30]


def test_the_time_is_measured() -> None:
    assert duration.confirmation_seconds(tiny_sit(), ARMS, PLAN) > 0
