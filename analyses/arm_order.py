"""Which criterion of a run's evidence foretold the order in which the arms of its confirmation ended.

A handful of arms can be put into few orders, and one of many criteria will often have the right one by chance. So the
best criterion's figure stands beside how often the best criterion does as well in a random order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, permutations
from math import factorial

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from layerprobe.layersync import LayerPair

FEWEST_ARMS = 3
MOST_ORDERS = 5000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Criterion:
    """A criterion's rank correlation with the benefit of the arms, in [-1, 1]; below 0 where less of it was better."""

    name: str
    needs_labels: bool
    rank_correlation: float


@dataclass(frozen=True)
class ArmOrder:
    """How the criteria stand to the order of the arms.

    Attributes:
        num_arms: Aligned arms whose pairs the evidence knows.
        criteria: Largest rank correlation first, whatever its sign; those that are equal in all arms are left out.
        chance: The share of all orders of the arms in which some criterion has as large a rank correlation as the
            first one has in this order.
        agreement: Mean rank correlation of the order in one seed with that in another: where seeds do not agree, no
            criterion can be right.
    """

    num_arms: int
    criteria: tuple[Criterion, ...]
    chance: float
    agreement: float

    def sentence(self) -> str:
        """For people."""
        best = self.criteria[0]
        return (
            f"Of {len(self.criteria)} criteria, {best.name} goes best with the order of these {self.num_arms} aligned "
            f"arms (rank correlation {best.rank_correlation:+.2f}; in a random order some criterion does as well in "
            f"{self.chance:.0%} of cases; two seeds agree on the order by {self.agreement:+.2f})."
        )


def arm_order(evidence: pd.DataFrame, differences: pd.DataFrame, pairs: Mapping[str, LayerPair]) -> ArmOrder | None:
    """Compares the order of the arms with that of each criterion.

    Args:
        evidence: Columns student, teacher, criterion, noise_level (nan for the mean over levels), value, needs_labels.
        differences: Distance minus that without alignment: a row for each seed, a column for each aligned arm.
        pairs: Of those arms.

    Returns:
        None if the evidence has no criterion of at least three of these pairs that differs between them.
    """
    means = evidence[evidence["noise_level"].isna()]
    table = means.pivot_table(index=["student", "teacher"], columns="criterion", values="value")
    known = [arm for arm in differences.columns if (pairs[arm].student, pairs[arm].teacher) in table.index]
    if len(known) < FEWEST_ARMS:
        return None
    values = table.loc[[(pairs[arm].student, pairs[arm].teacher) for arm in known]].dropna(axis=1)
    values = values.loc[:, values.nunique() > 1]
    benefit = -differences[known]
    if values.empty or benefit.mean().nunique() < 2:
        return None
    criteria, seeds = _ranks(values.to_numpy(np.float64).T), _ranks(benefit.to_numpy(np.float64))
    ranks = _ranks(benefit.mean().to_numpy(np.float64)[None])
    found = (criteria @ ranks.T)[:, 0]
    orders = ranks[0][_orders(len(known))]
    best = np.abs(criteria @ orders.T).max(0)
    needs = means.groupby("criterion")["needs_labels"].any()
    return ArmOrder(
        num_arms=len(known),
        criteria=tuple(
            Criterion(str(values.columns[i]), bool(needs[values.columns[i]]), float(found[i]))
            for i in np.argsort(-np.abs(found), kind="stable")
        ),
        chance=float(np.mean(best >= np.abs(found).max() - 1e-9)),
        agreement=float(np.mean([a @ b for a, b in combinations(seeds, 2)])),
    )


def _ranks(values: Array) -> Array:
    """Ranks along rows (m, n), scaled so that the product of two rows is Spearman's correlation; 0 if all tie."""
    ranks = pd.DataFrame(values).rank(axis=1).to_numpy(np.float64)
    ranks = ranks - ranks.mean(1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    scaled: Array = np.divide(ranks, length, out=np.zeros_like(ranks), where=length > 0)
    return scaled


def _orders(n: int) -> NDArray[np.int64]:
    """All orders of n things, or many of them where there are too many, shape (orders, n)."""
    if factorial(n) <= MOST_ORDERS:
        return np.array(list(permutations(range(n))))
    return np.random.default_rng(0).permuted(np.tile(np.arange(n), (MOST_ORDERS, 1)), axis=1)
