"""Random numbers that depend only on a seed, a purpose and a sample's id, never on batch size, order or restart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

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
        for row, sample_id in zip(out, ids.tolist(), strict=True):
            self._stream(sample_id, draw).standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(out).view(len(ids), *shape)

    def uniform(self, ids: Tensor, *, draw: int = 0) -> Tensor:
        """Draws one uniform number in [0, 1) per sample id, shape (B,), float64."""
        return torch.tensor([self._stream(i, draw).random() for i in ids.tolist()], dtype=torch.float64)

    def permutation(self, n: int, *, draw: int = 0) -> Tensor:
        """Draws a permutation of 0 ... n-1, shape (n,), int64."""
        return torch.from_numpy(self._stream(0, draw).permutation(n))

    def _stream(self, sample_id: int, draw: int) -> np.random.Generator:
        purpose = PURPOSES.index(self.purpose)
        bits = np.random.Philox(
            # Ids may be negative, such as hashes; the mask maps them to distinct unsigned keys.
            key=np.array([self.seed, sample_id & (2**64 - 1)], np.uint64),
            counter=np.array([0, 0, draw, purpose], np.uint64),
        )
        return np.random.Generator(cast(np.random.BitGenerator, bits))
