"""A criterion that knew the order is found, and said to be luck where it may be."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from layerprobe.analyses.arm_order import arm_order
from layerprobe.layersync.pair import LayerPair

PAIRS = {f"arm {i}": LayerPair("blocks.0", f"blocks.{i + 1}") for i in range(6)}
BENEFIT = np.array([0.1, 0.5, -0.2, 0.3, 0.0, 0.2])


def evidence(**criteria: object) -> pd.DataFrame:
    """A row for each pair and criterion, of the mean over levels, and misleading ones of single levels."""
    rows = []
    for criterion, values in criteria.items():
        for pair, value in zip(PAIRS.values(), np.asarray(values, dtype=float), strict=True):
            for level, shown in ((np.nan, value), (0.1, -value), (0.5, 0.0)):
                rows.append((pair.student, pair.teacher, criterion, level, shown, criterion.startswith("probe")))
    return pd.DataFrame(rows, columns=["student", "teacher", "criterion", "noise_level", "value", "needs_labels"])


def differences(num_arms: int = 6, *, noise: float = 0.0, num_seeds: int = 3) -> pd.DataFrame:
    spread = np.random.default_rng(0).normal(0, noise, (num_seeds, num_arms))
    return pd.DataFrame(-BENEFIT[:num_arms] + spread, columns=list(PAIRS)[:num_arms])


def test_the_criterion_that_knew_the_order_comes_first() -> None:
    other = np.random.default_rng(1).normal(size=6)
    found = arm_order(
        evidence(other=other, cka=-BENEFIT, probe=[*BENEFIT[:3], 0.6, *BENEFIT[4:]]), differences(), PAIRS
    )
    assert found is not None
    assert (found.criteria[0].name, found.criteria[0].rank_correlation) == ("cka", pytest.approx(-1))
    by_name = {criterion.name: criterion for criterion in found.criteria}
    assert by_name["other"].rank_correlation == pytest.approx(stats.spearmanr(other, BENEFIT).statistic)
    assert (by_name["probe"].needs_labels, by_name["cka"].needs_labels) == (True, False)
    assert (found.num_arms, found.agreement) == (6, pytest.approx(1))
    assert found.sentence().startswith("Of 3 criteria, cka goes best with the order of these 6 aligned arms (rank corr")


def test_the_chance_is_that_of_the_best_of_all_criteria() -> None:
    alone = arm_order(evidence(cka=BENEFIT), differences(), PAIRS)
    assert alone is not None
    assert alone.chance == pytest.approx(2 / 720)  # this order and its reverse
    values = np.random.default_rng(2).normal(size=(12, 6))
    many = arm_order(evidence(**{f"c{i}": row for i, row in enumerate(values)}), differences(), PAIRS)
    assert many is not None
    best = abs(many.criteria[0].rank_correlation)
    orders = np.random.default_rng(3).permuted(np.tile(np.arange(6), (2000, 1)), axis=1)
    correlations = np.corrcoef(np.vstack([stats.rankdata(values, axis=1), orders]))[:12, 12:]
    hits = np.mean(np.abs(correlations).max(0) >= best - 1e-9)
    assert many.chance == pytest.approx(hits, abs=0.04)
    assert many.chance > 0.3  # twelve criteria, six arms: luck


def test_three_arms_prove_nothing() -> None:
    found = arm_order(evidence(cka=BENEFIT), differences(3), PAIRS)
    assert found is not None
    assert found.chance == pytest.approx(1 / 3)
    assert "in a random order some criterion does as well in 33% of cases" in found.sentence()


def test_seeds_that_disagree_are_said_to() -> None:
    found = arm_order(evidence(cka=BENEFIT), differences(noise=10.0, num_seeds=40), PAIRS)
    assert found is not None
    assert abs(found.agreement) < 0.1


def test_more_arms_than_orders_can_be_listed() -> None:
    pairs = {f"arm {i}": LayerPair("blocks.0", f"blocks.{i + 1}") for i in range(9)}
    rows = [("blocks.0", p.teacher, "cka", np.nan, float(i), False) for i, p in enumerate(pairs.values())]
    table = pd.DataFrame(rows, columns=["student", "teacher", "criterion", "noise_level", "value", "needs_labels"])
    seeds = pd.DataFrame([[*range(9)], [*range(9)]], columns=list(pairs))
    found = arm_order(table, seeds, pairs)
    assert found is not None
    assert found.criteria[0].rank_correlation == pytest.approx(-1)
    assert found.chance < 0.001


def test_where_there_is_no_order_to_foretell_nothing_is_said() -> None:
    table = evidence(cka=BENEFIT)
    assert arm_order(table, differences(2), PAIRS) is None
    assert arm_order(table, 0 * differences(), PAIRS) is None
    assert arm_order(evidence(cka=np.ones(6)), differences(), PAIRS) is None
    assert arm_order(table[table["noise_level"].notna()], differences(), PAIRS) is None
    others = {name: LayerPair("mid.0", "mid.1") for name in PAIRS}
    assert arm_order(table, differences(), others) is None


def test_a_criterion_that_is_missing_for_a_pair_is_left_out() -> None:
    holed = BENEFIT.copy()
    holed[2] = np.nan
    found = arm_order(evidence(holed=holed, cka=BENEFIT), differences(), PAIRS)
    assert found is not None
    assert [criterion.name for criterion in found.criteria] == ["cka"]
