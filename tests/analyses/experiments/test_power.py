"""What is promised of so many seeds is what simulated seeds do."""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import pytest
from scipy import stats

from layerprobe.analyses.experiments.power import (
    ENOUGH_STEPS,
    LEVEL,
    Resolution,
    Spread,
    detectable,
    error_rate,
    look_levels,
    p_value,
    power,
    resolution,
    seeds_needed,
    too_short,
)


@lru_cache
def p_values(num_seeds: int, *, effect: float = 0.0, draws: int = 40_000) -> np.ndarray:
    """Of scipy's t test after 3, 4, ... seeds, shape (draws, num_seeds - 2)."""
    if effect == 0 and num_seeds < 12:
        return p_values(12)[:, : num_seeds - 2]
    differences = np.random.default_rng(1).normal(3 * effect, 3, (draws, num_seeds))
    return np.stack([stats.ttest_1samp(differences[:, :n], 0, axis=1).pvalue for n in range(3, num_seeds + 1)], axis=1)


@pytest.mark.parametrize(("num_seeds", "effect", "level"), [(3, 2.0, 0.05), (5, 0.7, 0.05), (8, 1.0, 0.01)])
def test_power_is_that_of_the_noncentral_t(num_seeds: int, effect: float, level: float) -> None:
    critical, shift = stats.t.isf(level / 2, num_seeds - 1), effect * np.sqrt(num_seeds)
    expected = stats.nct.sf(critical, num_seeds - 1, shift) + stats.nct.cdf(-critical, num_seeds - 1, shift)
    assert power(effect, num_seeds, level=level) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("num_seeds", "effect"), [(3, 0.0), (3, 3.264), (6, 1.0)])
def test_power_is_how_often_simulated_seeds_find_it(num_seeds: int, effect: float) -> None:
    found = (p_values(num_seeds, effect=effect)[:, -1] <= LEVEL).mean()
    assert power(effect, num_seeds) == pytest.approx(found, abs=0.008)  # four standard errors


def test_what_is_detectable_is_found_in_four_of_five_cases() -> None:
    # Two seeds: scipy's noncentral t gives nan on the way there.
    for num_seeds in (2, 3, 5, 12, 40):
        assert power(detectable(num_seeds), num_seeds) == pytest.approx(0.8, abs=1e-9)
    # Published tables of the paired t test, in standard deviations: Cohen's d for n = 3, 5, 10 at 80 %.
    assert [round(detectable(n), 2) for n in (3, 5, 10)] == [3.26, 1.68, 1.0]


def test_seeds_needed_are_the_fewest() -> None:
    assert seeds_needed(1.0) == 10
    assert power(1.0, 10) >= 0.8 > power(1.0, 9)
    assert seeds_needed(0.01) is None


@pytest.mark.parametrize("num_seeds", [4, 8, 12])
def test_looks_at_every_seed_keep_the_error_rate(num_seeds: int) -> None:
    levels = look_levels(num_seeds)
    assert list(levels) == list(range(3, num_seeds + 1))
    found = (p_values(num_seeds) <= np.array([*levels.values()])).any(1).mean()
    assert found == pytest.approx(LEVEL, abs=0.0044)  # four standard errors of 40 000 draws
    assert error_rate(levels) == pytest.approx(LEVEL, abs=1e-4)
    # What may be spent up to n of N seeds is (n / N)^2 of it.
    half = num_seeds // 2 + 1
    early = (p_values(half) <= np.array([levels[n] for n in range(3, half + 1)])).any(1).mean()
    assert early == pytest.approx(LEVEL * (half / num_seeds) ** 2, abs=0.004)


def test_looks_that_are_not_planned_together_do_not() -> None:
    """The control of the test above: 5 % at every look is far more in all."""
    found = (p_values(8) <= LEVEL).any(1).mean()
    assert found > 0.1
    assert error_rate(dict.fromkeys(range(3, 9), LEVEL)) == pytest.approx(found, abs=0.008)
    assert error_rate({3: 0.05, 6: 0.05}) == pytest.approx((p_values(6)[:, [0, 3]] <= LEVEL).any(1).mean(), abs=0.006)
    assert error_rate({5: 0.05}) == 0.05


def test_a_large_difference_ends_the_looks_soon_and_a_small_one_is_hardly_missed_more() -> None:
    levels = np.array([*look_levels(8).values()])
    crossed = p_values(8, effect=3.0) <= levels
    assert crossed.any(1).mean() > 0.999
    assert (3 + crossed.argmax(1)).mean() < 5
    assert (p_values(8, effect=1.5) <= levels).any(1).mean() > power(1.5, 8) - 0.06


@pytest.mark.parametrize("num_seeds", [2, 3, 51])
def test_stopping_early_takes_a_look_before_the_last(num_seeds: int) -> None:
    with pytest.raises(ValueError, match=rf"stopping early needs 4 to 50 seeds \(the first look is.*, got {num_seeds}"):
        look_levels(num_seeds)


@pytest.mark.parametrize("n", [2, 3, 9])
def test_the_p_value_is_students(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.5, 1, n)
    assert p_value(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=1e-9)


def test_equal_differences_prove_nothing() -> None:
    assert p_value(np.full(4, -0.3)) == 1
    assert p_value(np.zeros(4)) == 1


def test_the_spread_of_few_seeds_is_itself_uncertain() -> None:
    """Its interval holds the true spread in four of five cases, and a stated one has none."""
    shown = np.random.default_rng(0).normal(0, 0.05, (1500, 3)).std(1, ddof=1)
    intervals = np.array([Spread(float(share), 3, "pilot", 9).interval() for share in shown])
    covered = (intervals[:, 0] <= 0.05) & (intervals[:, 1] >= 0.05)
    assert covered.mean() == pytest.approx(0.8, abs=0.042)
    assert Spread(0.05, None, "stated").interval() == (0.05, 0.05)
    for share in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"a spread must be positive, got .*; pass 0.05 for 5 % of the distance"):
            Spread(share, None, "stated")


def test_the_resolution_is_in_shares_of_the_distance_once_the_spread_is_known() -> None:
    assert resolution(3).share is None
    stated = resolution(3, spread=Spread(0.04, None, "stated"))
    assert stated.share == pytest.approx(0.04 * detectable(3))
    for record in (resolution(3), stated, resolution(3, spread=Spread(0.04, 2, "pilot", 9))):
        assert Resolution.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_early_stops_cost_little_of_what_can_be_found() -> None:
    fixed, early = resolution(8), resolution(8, stop_early=True)
    assert early.level == look_levels(8)[8] < fixed.level
    assert fixed.in_spreads < early.in_spreads < 1.2 * fixed.in_spreads
    found = (p_values(8, effect=early.in_spreads) <= np.array([*look_levels(8).values()])).any(1).mean()
    assert found >= 0.8  # the last look alone has this chance


def test_short_trainings_are_cautioned() -> None:
    assert too_short(ENOUGH_STEPS) == ()
    assert too_short(ENOUGH_STEPS - 1) == ("few steps",)


def test_arms_shorter_than_the_training_are_cautioned() -> None:
    assert too_short(ENOUGH_STEPS, trained_steps=ENOUGH_STEPS) == ()
    assert too_short(ENOUGH_STEPS, trained_steps=ENOUGH_STEPS + 1) == ("shorter than the training",)
    assert too_short(10, trained_steps=20) == ("few steps", "shorter than the training")
