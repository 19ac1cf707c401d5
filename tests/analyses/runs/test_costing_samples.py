"""The forecast of samples and of their scores."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_samples, tiny_sit, tiny_splits

from layerprobe.analyses.experiments import EXTRACTOR
from layerprobe.analyses.generation import METRICS, Extractor
from layerprobe.analyses.runs import costing_samples as costing
from layerprobe.analyses.runs.stages import DECODING, ENCODING, FEATURES, FIGURES, SAMPLING, SCORES
from layerprobe.analyses.runs.timing import Rate
from layerprobe.sampling import SamplingPlan

PIXELS = Extractor("pixels", lambda x: x.flatten(1))


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each sample, for each row of any other piece, and for each comparison of all with all."""
    monkeypatch.setattr(costing, "sample_seconds", lambda backbone, plan, num, batch_size: float(num))
    monkeypatch.setattr(costing, "rate_of", lambda call, size: Rate(0.0, 1.0, size))
    monkeypatch.setattr(costing, "picture_seconds", lambda: 1.0)
    monkeypatch.setattr(costing, "load_seconds", lambda samples: 0.0)
    monkeypatch.setattr(costing, "encoding_seconds", lambda splits, vae: 60.0 if vae else 0.0)


def test_samples_are_drawn_decoded_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costing, "decoder", lambda vae, device: lambda x: torch.zeros(len(x), 3, 8, 8))
    monkeypatch.setattr(costing, "peak_memory", lambda: 1000)
    plan = SamplingPlan(steps=2)
    archive = costing.sampling_cost(tiny_sit(), plan, 768, pictures=False, vae="vae", processes=2)
    # Of three parts of 256 samples, one process draws two.
    assert archive.seconds == pytest.approx({SAMPLING: 512, DECODING: 512})
    assert (archive.disk_bytes, archive.memory_bytes) == (2 * 768 * 3 * 64, 1000)
    pictures = costing.sampling_cost(tiny_sit(), plan, 80, pictures=True, processes=2)
    assert pictures.seconds == {SAMPLING: 48, FIGURES: 1.25}  # three of five parts of 16
    pictures = costing.sampling_cost(tiny_sit(), plan, 128, pictures=True)
    assert pictures.seconds == {SAMPLING: 128, FIGURES: 2}
    both = 2 * 4 * 128 * 16  # the parts and what they are joined to, on disk and in memory
    assert (pictures.disk_bytes, pictures.memory_bytes) == (both, 1000 + both)


def test_few_samples_are_known_to_be_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample of one pass takes half a second."""
    monkeypatch.setattr(costing, "seconds_of", lambda call: (call(), 0.5)[1])
    assert costing.rough_sampling_seconds(tiny_sit(), SamplingPlan("heun", 5), 10) == 10 * 9 * 0.5


def test_scores_are_those_of_both_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    generated, splits = tiny_samples(30), tiny_splits(100)
    monkeypatch.setattr(costing, "seconds_of", lambda call: 0.0)
    monkeypatch.setattr(costing, "extractor_seconds", lambda splits: (PIXELS, 20.0))
    options = {"metrics": METRICS, "k": 3}
    cost = costing.scoring_cost(generated, splits, processes=2, **options)
    assert cost.seconds == {EXTRACTOR: 20, FEATURES: 30 + 25, SCORES: 0}  # of a batch each
    assert costing.scoring_cost(generated, splits, cached=True, **options).seconds[EXTRACTOR] == 0
    given = costing.scoring_cost(generated, tiny_splits(100, shape=(3, 8, 8)), extractor=PIXELS, vae="vae", **options)
    assert given.seconds == {ENCODING: 60, FEATURES: 30 + 25, SCORES: 0}


def test_comparing_takes_the_square_of_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(costing, "score_features", lambda x, y, **_: sizes.append(len(x)))
    monkeypatch.setattr(costing, "seconds_of", lambda call: (call(), sizes[-1] ** 2)[1])
    assert costing._comparing_seconds(6000, 6000, 4, METRICS, 3) == pytest.approx(6000**2, rel=1e-6)
    assert sizes == [1000, 3000]
    expected = (6000**2 + 6000 * 3000 + 3000**2) / 3
    assert costing._comparing_seconds(6000, 3000, 4, METRICS, 3) == pytest.approx(expected, rel=1e-3)


def test_far_neighbors_are_forecast_although_few_samples_do_not_have_them() -> None:
    assert costing._comparing_seconds(240, 240, 4, ("precision",), 200) > 0


def test_an_extractor_is_timed_by_a_few_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costing, "seconds_of", lambda call: (call(), 1.0)[1])
    extractor, seconds = costing.extractor_seconds(tiny_splits(24))
    assert (extractor.features(torch.zeros(2, 1, 4, 4)).shape, seconds) == ((2, 64), 30 + 1)
