"""Timed pieces of jobs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_samples, tiny_sit, tiny_splits

from layerprobe.analyses.runs import timing
from layerprobe.analyses.runs.timing import Rate, as_encoded, rate_of, squared, step_seconds
from layerprobe.data import Samples
from layerprobe.extraction import ExtractionPlan
from layerprobe.layersync import LayerPair, SyncOptions
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_rate_tells_what_each_row_takes_from_what_a_call_takes(now: list[float]) -> None:
    def call(rows: int) -> None:
        now[0] += 0.3 + 0.1 * rows

    rate = rate_of(call, 32)
    assert rate == (pytest.approx(0.3), pytest.approx(0.1), 32)
    assert rate.of(10) == pytest.approx(1.3)
    assert rate.of(0) == 0
    now[0], slow = 0.0, []
    assert rate_of(lambda rows: (slow.append(rows), call(60 * rows)), 32).each_s == pytest.approx(6, rel=0.1)
    assert max(slow) == 2  # A call of six seconds is not repeated for a whole batch.
    assert rate_of(lambda rows: None, 32) == Rate(0.0, 0.0, 32)


@pytest.mark.parametrize("each_s", [20e-6, 5e-6, 0.0])
@pytest.mark.parametrize("once_s", [5e-3, 0.5])
def test_every_batch_takes_what_a_call_takes(now: list[float], once_s: float, each_s: float) -> None:
    def call(rows: int) -> None:
        now[0] += once_s + rows * each_s

    assert rate_of(call, 256).of(50_000) == pytest.approx(196 * once_s + 50_000 * each_s)
    assert rate_of(call, 256).of(10) == pytest.approx(once_s + 10 * each_s)


@pytest.mark.parametrize("rows_s", [20e-6, 5e-3])
def test_a_row_of_the_extraction_takes_its_share_of_a_batch(
    now: list[float], monkeypatch: pytest.MonkeyPatch, rows_s: float
) -> None:
    """Not of what a call takes beside its batches."""

    def read(backbone: object, samples: Samples, *_: object, batch_size: int) -> None:
        now[0] += 4e-3 + -(-len(samples) // batch_size) * 5e-3 + len(samples) * rows_s

    monkeypatch.setattr(timing, "read_features", read)
    backbone = tiny_sit()
    row_s = timing.row_seconds(backbone, ExtractionPlan(backbone.layers), 256)
    assert row_s == pytest.approx(5e-3 / 256 + rows_s, rel=0.01)


def test_a_step_is_the_trainers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of many, aligned at full weight from the first one on; nothing stays."""
    seen: list[TrainingPlan] = []
    real = timing.train
    monkeypatch.setattr(timing, "train", lambda b, s, plan, *a, **k: (seen.append(plan), real(b, s, plan, *a, **k)))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    backbone, generator = tiny_sit(), torch.get_rng_state()
    weights = [p.clone() for p in backbone.module.parameters()]
    sync = SyncOptions(warmup_steps=50, stop_step=90)
    plan = TrainingPlan(steps=10**6, batch_size=4, pairs=(LayerPair("blocks.0", "blocks.2"),), sync=sync)
    assert 0 < step_seconds(backbone, tiny_samples(), plan) < 1
    assert seen[0].sync == SyncOptions()
    assert (seen[0].pairs, seen[0].batch_size) == (plan.pairs, 4)
    assert all(torch.equal(a, b) for a, b in zip(weights, backbone.module.parameters(), strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    assert [*tmp_path.iterdir()] == []


def test_a_sample_takes_the_passes_of_its_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network takes a second for each of its calls of a row, twice with guidance, which the sampler itself adds."""
    plans = (SamplingPlan("euler", 5), SamplingPlan("heun", 5, guidance=2.0), SamplingPlan("dopri5", 5))
    assert [timing.passes_of_a_sample(plan) for plan in plans] == [5, 9, 30]
    drawn: list[SamplingPlan] = []
    monkeypatch.setattr(timing, "sample", lambda *_, plan, **__: drawn.append(plan))
    monkeypatch.setattr(timing, "rate_of", lambda call, size: (call(size), Rate(0.0, 4.0, size))[1])
    assert timing.sample_seconds(tiny_sit(), plans[1], 10) == pytest.approx(10 * 9)
    assert drawn == [SamplingPlan("euler", 4, guidance=2.0)]


def test_pairs_take_the_square_of_their_number() -> None:
    assert squared([2 + 4, 6 + 36], 2, 10) == pytest.approx(10 + 100)
    assert squared([0.0, 0.0], 2, 10) == 0


def test_images_that_are_not_encoded_have_stand_ins() -> None:
    images = tiny_splits(24, shape=(3, 8, 8))
    latents = as_encoded(images, (4, 2, 2))
    assert as_encoded(images, (3, 8, 8)) is images
    assert latents.train.modality == "image"  # as of latents, so that the convention check tries as much
    batch, again = latents.train.batch([0, 5]), latents.train.batch([5])
    assert batch.x.shape == (2, 4, 2, 2)
    assert torch.equal(batch.x[1:], again.x)
    assert torch.equal(latents.train.labels, images.train.labels)
    assert torch.equal(batch.ids, images.train.ids[[0, 5]])


def test_a_row_takes_what_rows_take() -> None:
    backbone, began = tiny_sit(depth=8).in_precision("float32"), time.perf_counter()
    row_s = timing.row_seconds(backbone, ExtractionPlan(backbone.layers), 128)
    assert 0 < row_s < time.perf_counter() - began
