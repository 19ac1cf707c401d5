"""Batches do not depend on interruptions or processes, and the thread that prepares them always ends."""

from __future__ import annotations

import math
import statistics
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from tiny import SHAPE, tiny_samples, tiny_sit

from layerprobe.layersync.options import SyncOptions
from layerprobe.layersync.pair import LayerPair
from layerprobe.noise.schedules import schedule_from_name
from layerprobe.training.batches import TrainingBatch, batches, noise_levels
from layerprobe.training.plan import TrainingPlan

PAIR = LayerPair("blocks.0", "blocks.2")
PLAN = TrainingPlan(steps=13, batch_size=5, label_drop=0.25, seed=3)
NUM = 12


def numbers(purpose: int, sample_id: int, epoch: int) -> np.random.Generator:
    """The stream of a sample, with key (seed, id) and counter (0, 0, draw, purpose)."""
    key, counter = np.array([PLAN.seed, sample_id], np.uint64), np.array([0, 0, epoch, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def equal(a: TrainingBatch, b: TrainingBatch) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(TrainingBatch)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def test_epochs_follow_each_other_without_a_gap() -> None:
    samples, plan = tiny_samples(NUM, first_id=30), replace(PLAN, steps=24)  # 10 epochs of 12 in 24 batches of 5
    x = torch.cat([batch.x for batch in batches(tiny_sit(), samples, plan)])
    rows = [int((samples.x == one).flatten(1).all(1).nonzero()) for one in x]
    epochs = [rows[i : i + NUM] for i in range(0, len(rows), NUM)]
    assert len(epochs) == 10
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_noise_and_level_of_a_sample_depend_on_seed_id_and_epoch_only() -> None:
    samples = tiny_samples(NUM, first_id=30)
    for size in (5, 12, 40):  # 40: more than three epochs in one batch
        plan = replace(PLAN, steps=3, batch_size=size)
        for index, batch in enumerate(batches(tiny_sit(), samples, plan)):
            for position in range(size):
                row = int((samples.x == batch.x[position]).flatten(1).all(1).nonzero())
                epoch = (index * size + position) // NUM
                eps = numbers(0, 30 + row, epoch).standard_normal(16, np.float32).reshape(SHAPE)
                np.testing.assert_array_equal(batch.eps[position].numpy(), eps)
                assert batch.level[position].item() == numbers(1, 30 + row, epoch).random()


def test_alignment_and_optimizer_do_not_change_the_batches() -> None:
    samples = tiny_samples(NUM)
    other = replace(PLAN, pairs=(PAIR,), weight=0.7, learning_rate=1.0, warmup_steps=0, ema_decay=0.5, clip_norm=0.0)
    assert all(
        equal(a, b)
        for a, b in zip(batches(tiny_sit(), samples, PLAN), batches(tiny_sit(), samples, other), strict=True)
    )
    reseeded = batches(tiny_sit(), samples, replace(PLAN, seed=4))
    assert not any(equal(a, b) for a, b in zip(batches(tiny_sit(), samples, PLAN), reseeded, strict=True))


@pytest.mark.parametrize("start", [1, 5, 12, 13])
def test_batches_from_a_later_step_are_the_end_of_all_batches(start: int) -> None:
    samples = tiny_samples(NUM)
    whole, tail = list(batches(tiny_sit(), samples, PLAN)), list(batches(tiny_sit(), samples, PLAN, start=start))
    assert len(whole) == 13
    assert len(tail) == 13 - start
    assert all(equal(a, b) for a, b in zip(whole[start:], tail, strict=True))


def test_labels_are_dropped_at_the_rate_of_the_plan() -> None:
    samples, plan = tiny_samples(300), replace(PLAN, steps=20, batch_size=300)
    dropped = []
    for batch in batches(tiny_sit(), samples, plan):
        assert batch.condition is not None
        rows = [int((samples.x == one).flatten(1).all(1).nonzero()) for one in batch.x[:20]]
        true = samples.labels[rows]  # type: ignore[index]
        assert all(condition in (label, 3) for condition, label in zip(batch.condition[:20], true, strict=True))
        dropped.append(batch.condition == 3)
    share = torch.stack(dropped).float().mean().item()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 6000)  # four standard deviations of the binomial
    for rate, all_dropped in ((0.0, False), (1.0, True)):
        batch = next(iter(batches(tiny_sit(), samples, replace(plan, label_drop=rate))))
        assert batch.condition is not None
        assert ((batch.condition == 3) == all_dropped).all()


def test_unlabeled_samples_have_no_condition() -> None:
    assert all(batch.condition is None for batch in batches(tiny_sit(), tiny_samples(NUM, labeled=False), PLAN))


def test_two_processes_take_every_other_position() -> None:
    samples = tiny_samples(NUM)
    whole = list(batches(tiny_sit(), samples, PLAN))
    for rank in (0, 1):
        part = list(batches(tiny_sit(), samples, PLAN, select=lambda positions, rank=rank: positions[rank::2]))
        assert all(equal(a.mapped(lambda t, r=rank: t[r::2]), b) for a, b in zip(whole, part, strict=True))


def test_a_batch_is_split_into_equal_parts_in_order() -> None:
    whole = next(iter(batches(tiny_sit(), tiny_samples(NUM), replace(PLAN, batch_size=6))))
    parts = whole.split(3)
    assert [len(part.x) for part in parts] == [2, 2, 2]
    for field in fields(TrainingBatch):
        columns = [getattr(part, field.name) for part in parts]
        if field.name in ("mask", "teacher_draw"):
            assert columns == [None] * 3
        else:
            assert torch.equal(torch.cat(columns), getattr(whole, field.name))


def test_masks_stay_with_their_samples_over_the_end_of_an_epoch() -> None:
    samples = tiny_samples(NUM, labeled=False)
    mask = torch.ones(NUM, *SHAPE[1:], dtype=torch.bool)
    mask[:, 2:] = torch.arange(NUM).view(-1, 1, 1) % 2 == 0
    samples.mask = mask
    for batch in batches(tiny_sit(), samples, PLAN):
        rows = [int((samples.x == one).flatten(1).all(1).nonzero()) for one in batch.x]
        assert batch.mask is not None
        assert torch.equal(batch.mask, mask[rows])
        assert batch.condition is None


# -------------------------------------------------------------------------------------------------------- noise levels


def test_logit_normal_levels_are_keyed_and_have_the_mean_and_std_of_the_plan() -> None:
    """Esser et al. 2024: t = sigmoid(u) with normal u, here computed from the uniform number of the sample."""
    samples = tiny_samples(NUM, first_id=30)
    plan = replace(PLAN, time_sampling="logit-normal", time_mean=0.5, time_std=0.8, steps=1, batch_size=NUM)
    batch = next(iter(batches(tiny_sit(), samples, plan)))
    for x, level in zip(batch.x, batch.level, strict=True):
        row = int((samples.x == x).flatten(1).all(1).nonzero())
        normal = statistics.NormalDist(0.5, 0.8).inv_cdf(numbers(1, 30 + row, 0).random())
        assert level.item() == pytest.approx(1 / (1 + math.exp(-normal)), rel=1e-12)
    many = noise_levels(torch.rand(20_000, dtype=torch.float64), tiny_sit(), plan)
    logit = torch.logit(many)
    assert abs(logit.mean() - 0.5) < 4 * 0.8 / math.sqrt(20_000)  # four standard errors
    assert abs(logit.std() - 0.8) < 4 * 0.8 / math.sqrt(40_000)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
@pytest.mark.parametrize("name", ["sit", "flow-1000", "ddpm-linear", "edm", "sit-gvp", "sit-vp"])
def test_extreme_uniform_numbers_give_usable_levels(name: str, sampling: str) -> None:
    uniform = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    predictions = {"edm": ("x0",), "ddpm-linear": ("eps", "x0", "v")}.get(name, ("velocity",))
    for prediction in predictions:
        backbone = tiny_sit(schedule=schedule_from_name(name), prediction=prediction)  # type: ignore[arg-type]
        level = noise_levels(uniform, backbone, replace(PLAN, time_sampling=sampling, time_std=0.5))  # type: ignore[arg-type]
        assert ((level >= 0) & (level <= 1) & (level.diff(prepend=level[:1] - 1) > 0)).all()


def test_uniform_times_of_the_cosine_path_equal_those_of_sit() -> None:
    """t uniform, and alpha = sin(pi t / 2), sigma = cos(pi t / 2) with data at t = 1."""
    backbone = tiny_sit(schedule=schedule_from_name("sit-gvp"))
    time = torch.rand(100, dtype=torch.float64)
    level = noise_levels(time, backbone, PLAN)
    sigma, alpha = torch.sin(torch.pi / 2 * time), torch.cos(torch.pi / 2 * time)
    torch.testing.assert_close(level, sigma / (sigma + alpha))
    torch.testing.assert_close(backbone.schedule.native_time(level), 1 - time)


def test_draws_of_the_teacher_are_independent_of_the_levels() -> None:
    samples, gap = tiny_samples(NUM), replace(PLAN, sync=SyncOptions(noise_gap=0.2), pairs=(PAIR,))
    for plain, batch in zip(batches(tiny_sit(), samples, PLAN), batches(tiny_sit(), samples, gap), strict=True):
        assert batch.teacher_draw is not None
        assert ((batch.teacher_draw >= 0) & (batch.teacher_draw < 1)).all()
        assert (batch.teacher_draw != batch.level).all()
        assert equal(replace(batch, teacher_draw=None), plain)


# ----------------------------------------------------------------------------------------------------------- the thread
