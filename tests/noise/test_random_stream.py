"""Keyed random numbers against pinned values, and their independence of batch, order and restart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerprobe.noise.random_stream import PURPOSES, Purpose, RandomStream


def test_numbers_are_pinned() -> None:
    """Stored features and interrupted trainings rely on these values with every version of numpy."""
    ids = torch.tensor([0, 5])
    normal = [
        [-0.2933390140533447, 1.703830599784851, 1.5391918420791626],
        [0.173655167222023, 0.08959107846021652, 0.7525456547737122],
    ]
    assert RandomStream(7).normal(ids, (3,)).tolist() == normal
    assert RandomStream(7, "level").uniform(ids).tolist() == [0.8325354439343788, 0.5844585136340464]
    assert RandomStream(7, "order").permutation(8).tolist() == [3, 6, 0, 7, 5, 2, 4, 1]
    drawn = RandomStream(7, "sampling").normal(torch.tensor([5]), (2,), draw=3)
    assert drawn.tolist() == [[1.8070327043533325, 1.1463477611541748]]


def test_noise_of_a_sample_is_the_same_bits_in_any_batch() -> None:
    stream, ids = RandomStream(3), torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:64]
    together = stream.normal(ids, (2, 4, 4), draw=1)
    assert together.shape == (64, 2, 4, 4)
    assert together.dtype == torch.float32
    alone = torch.cat([stream.normal(ids[i : i + 1], (2, 4, 4), draw=1) for i in range(64)])
    assert torch.equal(together, alone)
    assert torch.equal(together.flip(0), stream.normal(ids.flip(0), (2, 4, 4), draw=1))
    levels = stream.uniform(ids)
    assert levels.dtype == torch.float64
    assert torch.equal(levels, torch.cat([stream.uniform(ids[i : i + 1]) for i in range(64)]))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6), st.integers(0, 2**63 - 1))
def test_noise_does_not_depend_on_its_neighbors(ids: list[int], seed: int) -> None:
    stream, batch = RandomStream(seed), torch.tensor(ids)
    first = stream.normal(batch, (4,))
    assert torch.equal(first[-1:], stream.normal(batch[-1:], (4,)))
    assert bool(first.isfinite().all())


def test_streams_of_seeds_purposes_samples_and_draws_are_independent() -> None:
    streams = [RandomStream(seed, purpose) for seed in (0, 1, 2**62) for purpose in PURPOSES]
    ids = torch.tensor([0, 1, 2, 2**40, -1])
    rows = torch.cat([stream.normal(ids, (8,), draw=draw) for stream in streams for draw in (0, 1, 7)])
    assert len(rows.unique(dim=0)) == len(rows)
    # Neighboring seeds, purposes, ids and draws are also uncorrelated.
    neighbors: list[tuple[int, Purpose, int, int]] = [
        (0, "noise", 0, 0),
        (1, "noise", 0, 0),
        (0, "level", 0, 0),
        (0, "noise", 1, 0),
        (0, "noise", 0, 1),
    ]
    long = [RandomStream(s, purpose).normal(torch.tensor([i]), (20_000,), draw=d)[0] for s, purpose, i, d in neighbors]
    correlation = torch.corrcoef(torch.stack(long)) - torch.eye(5)
    # Five standard errors of a correlation of 20 000 independent pairs.
    assert float(correlation.abs().max()) < 5 / math.sqrt(20_000)


def test_numbers_are_standard_normal_and_uniform() -> None:
    normal = RandomStream(0).normal(torch.arange(400), (500,)).double()
    n = normal.numel()
    # Five standard errors of the moments of n = 200 000 normal numbers.
    assert abs(float(normal.mean())) < 5 / math.sqrt(n)
    assert abs(float(normal.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((normal**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    # Also across samples at a fixed position, where only the ids differ.
    assert float(normal.mean(0).abs().max()) < 5 / math.sqrt(400)
    uniform = RandomStream(0, "level").uniform(torch.arange(4000))
    assert 0 <= float(uniform.min()) <= float(uniform.max()) < 1
    counts = torch.histc(uniform, 10, 0, 1)
    assert float((counts - 400).abs().max()) < 5 * math.sqrt(4000 * 0.1 * 0.9)


def test_orders_are_permutations_that_change_with_the_epoch() -> None:
    stream = RandomStream(0, "order")
    first, second = stream.permutation(50), stream.permutation(50, draw=1)
    assert first.dtype == torch.int64
    assert sorted(first.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()
    assert torch.equal(first, RandomStream(0, "order").permutation(50))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed must be between 0 and 2\*\*63 - 1, got {seed}"):
        RandomStream(seed)
