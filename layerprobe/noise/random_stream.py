"""Random numbers that depend only on a seed, a purpose and a sample's id, never on batch size, order or restart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from layerprobe.threads import each

_NUMBERS_PER_THREAD = 2**20  # a few milliseconds of work
# New purposes are appended: the index of a purpose is part of the key of its streams.
Purpose = Literal["noise", "level", "label drop", "order", "sampling", "latent", "length"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


@dataclass(frozen=True)
class RandomStream:
    """Random numbers that depend on (seed, purpose, sample id, draw) and on nothing else.

    Every sample has its own Philox counter stream. Its numbers are therefore the same in any batch, order or process,
    and after a restart. Sample ids are int64, draws count from 0.

    Attributes:
        seed: Seed, non-negative and below 2**63.
        purpose: Use of the numbers; streams of different purposes are independent.

    Raises:
        ValueError: If the seed is out of range.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """

    seed: int
    purpose: Purpose = "noise"

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")

    def normal(self, ids: Tensor, shape: tuple[int, ...], *, draw: int = 0) -> Tensor:
        """Draws standard normal numbers for B sample ids, shape (B, *shape), float32."""
        out = np.empty((len(ids), math.prod(shape)), np.float32)
        at_once = max(1, _NUMBERS_PER_THREAD // max(1, out.shape[1]))

        def fill(start: int) -> None:
            part = slice(start, start + at_once)
            for row, stream in zip(out[part], self._streams(ids[part].tolist(), draw), strict=True):
                stream.standard_normal(dtype=np.float32, out=row)

        each(fill, range(0, len(ids), at_once), least=1)
        return torch.from_numpy(out).view(len(ids), *shape)

    def uniform(self, ids: Tensor, *, draw: int = 0) -> Tensor:
        """Draws one uniform number in [0, 1) per sample id, shape (B,), float64."""
        return torch.tensor([stream.random() for stream in self._streams(ids.tolist(), draw)], dtype=torch.float64)

    def permutation(self, n: int, *, draw: int = 0) -> Tensor:
        """Draws a permutation of 0 ... n-1, shape (n,), int64."""
        return torch.from_numpy(next(self._streams([0], draw)).permutation(n))

    def _streams(self, ids: Sequence[int], draw: int) -> Iterator[np.random.Generator]:
        """Yields one generator again and again, each time at the beginning of the stream of the next sample."""
        counter = np.array([0, 0, draw, PURPOSES.index(self.purpose)], np.uint64)
        bits = np.random.Philox(key=np.array([self.seed, 0], np.uint64), counter=counter)
        generator = np.random.Generator(cast(np.random.BitGenerator, bits))
        beginning: Any = bits.state
        for sample_id in ids:
            # Ids may be negative, such as hashes; the mask maps them to distinct unsigned keys.
            beginning["state"]["key"][1] = sample_id & (2**64 - 1)
            bits.state = beginning  # a third of the time of a new generator
            yield generator
