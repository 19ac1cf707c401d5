"""Evidence with a planted answer: every number is given, nothing is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from layerprobe.analyses.tables.evidence import PairEvidence, Quantity

EIGHT = tuple(f"blocks.{i}" for i in range(8))


def quantity(value: Any, half: Any = 0.001, notes: Mapping[tuple[int, int], str] | None = None) -> Quantity:
    """A quantity of values (V, N) that are known to within `half`; the mean as surely as its parts."""
    value = np.asarray(value, np.float64)
    half = np.broadcast_to(np.asarray(half, np.float64), value.shape)
    rows = [[(notes or {}).get((v, i), "") for i in range(value.shape[1])] for v in range(value.shape[0])]
    return Quantity.from_ends(value, value - half, value + half, rows)


def planted_evidence(
    by_layer: Mapping[str, Quantity],
    by_pair: Mapping[str, Quantity],
    *,
    layers: Sequence[str] = EIGHT,
    noise_levels: Sequence[float] = (0.1,),
    pairs: Sequence[tuple[int, int]] | None = None,
) -> PairEvidence:
    """Evidence of all pairs of an earlier and a later layer, unless others are given."""
    places = np.array(list(combinations(range(len(layers)), 2) if pairs is None else pairs), np.intp).reshape(-1, 2)
    return PairEvidence(tuple(layers), tuple(noise_levels), places[:, 0], places[:, 1], dict(by_layer), dict(by_pair))


def of_pairs(value: Callable[[int, int], float], num_layers: int = 8) -> list[float]:
    """A number of each pair, from the positions of student and teacher."""
    return [value(s, t) for s, t in combinations(range(num_layers), 2)]
