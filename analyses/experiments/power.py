"""Power of paired seeds: the difference they can find, and early looks that keep the error rate.

A difference over seeds is judged by a two-sided t test of the paired differences. Effects are in units of their spread,
the standard deviation over seeds, so nothing here depends on a metric. Testing at several looks finds a difference that
is not there more often than one test does; the levels of `look_levels` keep the error rate of all looks together at
5 %. They are found by simulation, because normal approximations do not hold for three or four seeds: whatever the
spread, the t statistics of the looks have one joint distribution. No number of seeds shows what a longer training would
have shown; `too_short` checks the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

LEVEL, POWER = 0.05, 0.8
# Two seeds say almost nothing about their spread: a test of them needs a difference of 50 times the spread.
FIRST_LOOK, MOST_LOOKED_AT = 3, 50
DRAWS = 200_000
# In the pair sweeps of three networks in which some pairs gain (58 pairs, two seeds), 39 % of the pairs gained at step
# 2000 and 63 % at step 4000 (docs/picking.md).
ENOUGH_STEPS = 4000

Array = NDArray[np.float64]
SpreadSource = Literal["stated", "pilot", "this confirmation", "this verdict"]
LengthCaution = Literal["few steps", "shorter than the training"]


def power(effect: float, num_seeds: int, *, level: float = LEVEL) -> float:
    """Returns the probability that a paired t test finds a true difference, on either side of zero.

    Args:
        effect: Mean difference in units of its spread, at least 0.
        num_seeds: Number of seeds, at least 2.
        level: Level of the test.

    Source: the noncentral t distribution, integrated over the observed spread; scipy's function returns nan for some
    effects of two seeds.
    """
    critical, shift = stats.t.isf(level / 2, num_seeds - 1), effect * math.sqrt(num_seeds)
    thresholds = critical * _observed_spreads(num_seeds)
    return float(np.mean(stats.norm.sf(thresholds - shift) + stats.norm.cdf(-thresholds - shift)))


@lru_cache
def _observed_spreads(num_seeds: int) -> Array:
    """Equally likely values of the spread that `num_seeds` seeds show where the true spread is 1."""
    quantiles = (np.arange(4096) + 0.5) / 4096
    spreads: Array = np.sqrt(stats.chi2.ppf(quantiles, num_seeds - 1) / (num_seeds - 1))
    return spreads


def detectable(num_seeds: int, *, level: float = LEVEL) -> float:
    """Returns the smallest difference, in units of its spread, that is found with a power of 80 %."""
    effect: float = optimize.brentq(lambda effect: power(effect, num_seeds, level=level) - POWER, 0, 10 / level)
    return effect


def seeds_needed(effect: float, *, most: int = 200) -> int | None:
    """Returns the fewest seeds that find a difference of `effect` spreads with a power of 80 %.

    Returns None if more than `most` seeds are needed.
    """
    # The number that suffices if the spread is known exactly.
    lower_bound = math.ceil((stats.norm.isf(LEVEL / 2) + stats.norm.ppf(POWER)) ** 2 / effect**2)
    return next((n for n in range(max(lower_bound, 2), most + 1) if power(effect, n) >= POWER), None)


@lru_cache
def look_levels(num_seeds: int) -> Mapping[int, float]:
    """Returns the levels of looks after every seed from the third on, {number of seeds: level of the t test}.

    The looks up to n of N seeds may spend the share (n / N)^2 of the error rate (Lan & DeMets 1983), so that most of it
    is left for the last look.

    Raises:
        ValueError: If there is no look before the last one, or there are too many looks to simulate.
    """
    if not FIRST_LOOK < num_seeds <= MOST_LOOKED_AT:
        raise ValueError(
            f"stopping early needs {FIRST_LOOK + 1} to {MOST_LOOKED_AT} seeds (the first look is after {FIRST_LOOK}), "
            f"got {num_seeds}"
        )
    sizes = _null_sizes(num_seeds)
    alive, levels, spent = np.ones(DRAWS, dtype=bool), {}, 0
    for n in range(FIRST_LOOK, num_seeds + 1):
        may_stop = round(LEVEL * (n / num_seeds) ** 2 * DRAWS) - spent
        critical = np.partition(sizes[alive, n - 2], -may_stop)[-may_stop]
        stopped = alive & (sizes[:, n - 2] >= critical)
        alive, spent = alive & ~stopped, spent + int(stopped.sum())
        levels[n] = float(2 * stats.t.sf(critical, n - 1))
    return levels


def error_rate(levels: Mapping[int, float]) -> float:
    """Returns how often looks with these levels find a difference where there is none.

    Args:
        levels: Levels of the looks, {number of seeds: level}.
    """
    if len(levels) == 1:
        return next(iter(levels.values()))
    sizes = _null_sizes(max(levels))
    rejected = [sizes[:, n - 2] >= stats.t.isf(level / 2, n - 1) for n, level in levels.items()]
    return float(np.logical_or.reduce(rejected).mean())


def _null_sizes(num_seeds: int) -> Array:
    """|t| after 2, 3, ... seeds without a true difference, shape (DRAWS, num_seeds - 1); the same at every call."""
    draws = np.random.default_rng(0).standard_normal((DRAWS, num_seeds))
    n = np.arange(2, num_seeds + 1)
    sums, squares = draws.cumsum(1)[:, 1:], (draws**2).cumsum(1)[:, 1:]
    sizes: Array = np.abs(sums) / np.sqrt(n * (squares - sums**2 / n) / (n - 1))
    return sizes


def p_value(differences: Array) -> float:
    """Returns the p value of the two-sided t test of paired differences, shape (n,); 1 if they have no spread."""
    spread, n = float(np.std(differences, ddof=1)), len(differences)
    mean = abs(float(np.mean(differences)))
    if spread <= 1e-9 * mean or not spread:
        return 1.0
    return float(2 * stats.t.sf(mean * math.sqrt(n) / spread, n - 1))


@dataclass(frozen=True)
class Spread:
    """Standard deviation of a paired difference over seeds.

    Attributes:
        share: Standard deviation, as a share of the baseline's distance.
        num_seeds: Number of seeds it was estimated from; None if it is stated.
        source: Origin of the estimate: stated by the user, a pilot, the finished seeds of this confirmation, or the
            seeds of the verdict itself.
        steps: Training steps after which it was measured; None if it is stated.
    """

    share: float
    num_seeds: int | None
    source: SpreadSource
    steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise ValueError(f"a spread must be positive, got {self.share}; pass 0.05 for 5 % of the distance")

    def interval(self) -> tuple[float, float]:
        """Returns the 80 % interval of the share, from the chi-squared distribution of its square.

        A stated spread has an interval of width zero. The arms of a seed share its baseline, so further arms do not
        count as further seeds.
        """
        if self.num_seeds is None:
            return self.share, self.share
        df = self.num_seeds - 1
        low, high = (self.share * math.sqrt(df / stats.chi2.ppf(quantile, df)) for quantile in (0.9, 0.1))
        return low, high


@dataclass(frozen=True)
class Resolution:
    """The smallest difference that a confirmation can be expected to find.

    Attributes:
        num_seeds: Number of seeds.
        level: Level of the test after the last seed.
        in_spreads: Difference that is found with a power of 80 %, in units of the spread over seeds.
        spread: Spread over seeds; None if it is not known yet.
    """

    num_seeds: int
    level: float
    in_spreads: float
    spread: Spread | None

    @property
    def share(self) -> float | None:
        """The difference as a share of the baseline's distance; None if the spread is not known."""
        return None if self.spread is None else self.in_spreads * self.spread.share

    def to_dict(self) -> dict[str, float | int | str | None]:
        """Returns the record as JSON values."""
        spread = asdict(self.spread) if self.spread else {}
        return {
            "num_seeds": self.num_seeds,
            "level": self.level,
            "power": POWER,
            "difference_in_spreads": self.in_spreads,
            "spread": spread.get("share"),
            "spread_source": spread.get("source"),
            "spread_seeds": spread.get("num_seeds"),
            "spread_steps": spread.get("steps"),
            "difference": self.share,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Resolution:
        """Reads what `to_dict` returns."""
        spread = None
        if record["spread"] is not None:
            spread = Spread(record["spread"], record["spread_seeds"], record["spread_source"], record["spread_steps"])
        return cls(record["num_seeds"], record["level"], record["difference_in_spreads"], spread)


def resolution(num_seeds: int, *, stop_early: bool = False, spread: Spread | None = None) -> Resolution:
    """Returns the resolution of a confirmation; early stopping counts its last look only, so it can do slightly better.

    Args:
        num_seeds: Number of seeds.
        stop_early: Whether there are looks before the last seed.
        spread: Spread over seeds, where it is known.
    """
    level = look_levels(num_seeds)[num_seeds] if stop_early else LEVEL
    return Resolution(num_seeds, level, detectable(num_seeds, level=level), spread)


def too_short(steps: int, *, trained_steps: int | None = None) -> tuple[LengthCaution, ...]:
    """Returns the cautions about the number of training steps; empty if they are enough.

    Args:
        steps: Training steps of an arm.
        trained_steps: Length of the training that an arm from scratch stands for; None where it is not known.
    """
    cautions: list[LengthCaution] = []
    if steps < ENOUGH_STEPS:
        cautions.append("few steps")
    if trained_steps is not None and steps < trained_steps:
        cautions.append("shorter than the training")
    return tuple(cautions)
