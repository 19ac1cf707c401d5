"""What paired seeds can tell: the difference they find, and looks at them on the way that keep the error rate.

A difference over seeds is judged by a two-sided t test of the paired differences. Effects are in units of their spread,
the standard deviation over seeds, so nothing here depends on a metric. A test at several looks finds a difference where
there is none more often than one test does; the levels of `look_levels` keep the rate of all looks together at 5 %.
They are found by simulation, because normal approximations do not hold for three or four seeds: whatever the spread,
the t statistics of the looks have one joint distribution. What no number of seeds can tell is what a training too short
would have shown later; `too_short` says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

LEVEL, POWER = 0.05, 0.8
# Two seeds know next to nothing of their spread: a look at them would have to see 50 times the spread.
FIRST_LOOK, MOST_LOOKED_AT = 3, 50
DRAWS = 200_000
# Of the pairs of three networks in which some gain, 58 pairs of two seeds, 39 % gained at step 2000, 63 % at 4000
# (docs/picking.md).
ENOUGH_STEPS = 4000

Array = NDArray[np.float64]


def power(effect: float, num_seeds: int, *, level: float = LEVEL) -> float:
    """The chance that a paired t test finds a difference that is there, on either side of zero.

    Args:
        effect: Mean difference in units of its spread, at least 0.
        num_seeds: At least 2.
        level: Of the test.

    Source: the noncentral t distribution, integrated over the spread that the seeds show; scipy's gives nan for some
    effects of two seeds.
    """
    critical, shift = stats.t.isf(level / 2, num_seeds - 1), effect * math.sqrt(num_seeds)
    least = critical * _shown_spreads(num_seeds)
    return float(np.mean(stats.norm.sf(least - shift) + stats.norm.cdf(-least - shift)))


@lru_cache
def _shown_spreads(num_seeds: int) -> Array:
    """Equally likely values of the spread that so many seeds show where the true one is 1."""
    quantiles = (np.arange(4096) + 0.5) / 4096
    shown: Array = np.sqrt(stats.chi2.ppf(quantiles, num_seeds - 1) / (num_seeds - 1))
    return shown


def detectable(num_seeds: int, *, level: float = LEVEL) -> float:
    """The smallest difference, in units of its spread, that is found with a chance of 80 %."""
    effect: float = optimize.brentq(lambda effect: power(effect, num_seeds, level=level) - POWER, 0, 10 / level)
    return effect


def seeds_needed(effect: float, *, most: int = 200) -> int | None:
    """The fewest seeds that find a difference of so many spreads with a chance of 80 %; None if it takes too many."""
    # As many would do if the spread were known.
    known = math.ceil((stats.norm.isf(LEVEL / 2) + stats.norm.ppf(POWER)) ** 2 / effect**2)
    return next((n for n in range(max(known, 2), most + 1) if power(effect, n) >= POWER), None)


@lru_cache
def look_levels(num_seeds: int) -> Mapping[int, float]:
    """Levels of looks after every seed from the third to the last: {number of seeds: level of that look's t test}.

    Up to n of N seeds, the share (n / N)^2 of the error rate may be spent (Lan & DeMets 1983), so that most is left for
    the last look.

    Raises:
        ValueError: If there is no look before the last, or there are too many to simulate.
    """
    if not FIRST_LOOK < num_seeds <= MOST_LOOKED_AT:
        raise ValueError(
            f"stopping early takes {FIRST_LOOK + 1} to {MOST_LOOKED_AT} seeds (the first look is after {FIRST_LOOK}), "
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
    """How often looks with these levels, by number of seeds, find a difference at some look where there is none."""
    if len(levels) == 1:
        return next(iter(levels.values()))
    sizes = _null_sizes(max(levels))
    found = [sizes[:, n - 2] >= stats.t.isf(level / 2, n - 1) for n, level in levels.items()]
    return float(np.logical_or.reduce(found).mean())


def _null_sizes(num_seeds: int) -> Array:
    """|t| after 2, 3, ... seeds that differ by nothing but chance, shape (DRAWS, num_seeds - 1); always the same."""
    draws = np.random.default_rng(0).standard_normal((DRAWS, num_seeds))
    n = np.arange(2, num_seeds + 1)
    sums, squares = draws.cumsum(1)[:, 1:], (draws**2).cumsum(1)[:, 1:]
    sizes: Array = np.abs(sums) / np.sqrt(n * (squares - sums**2 / n) / (n - 1))
    return sizes


def p_value(differences: Array) -> float:
    """Of the two-sided t test of paired differences, shape (n,); 1 where they have no spread to judge by."""
    spread, n = float(np.std(differences, ddof=1)), len(differences)
    mean = abs(float(np.mean(differences)))
    if spread <= 1e-9 * mean or not spread:
        return 1.0
    return float(2 * stats.t.sf(mean * math.sqrt(n) / spread, n - 1))


@dataclass(frozen=True)
class Spread:
    """How much a paired difference varies over seeds.

    Attributes:
        share: Its standard deviation, as a share of the distance without alignment.
        num_seeds: Seeds that it was estimated from; None if somebody states it.
        source: Where it comes from, as "3 seeds of this confirmation".
    """

    share: float
    num_seeds: int | None
    source: str

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise ValueError(f"a spread must lie above 0, got {self.share}; pass 0.05 for 5 % of the distance")

    def interval(self) -> tuple[float, float]:
        """80 % interval of the share, from the chi-squared distribution of its square; a stated one has no width.

        Arms share the baseline of a seed, so that more arms are counted as no further knowledge.
        """
        if self.num_seeds is None:
            return self.share, self.share
        df = self.num_seeds - 1
        low, high = (self.share * math.sqrt(df / stats.chi2.ppf(quantile, df)) for quantile in (0.9, 0.1))
        return low, high


@dataclass(frozen=True)
class Resolution:
    """The smallest difference that a confirmation can be expected to find, said before it starts.

    Attributes:
        num_seeds: In all.
        level: Of the test after the last seed.
        in_spreads: The difference found with a chance of 80 %, in units of the spread over seeds.
        spread: How large that is, or None where nobody knows yet.
    """

    num_seeds: int
    level: float
    in_spreads: float
    spread: Spread | None

    @property
    def share(self) -> float | None:
        """The difference as a share of the distance without alignment."""
        return None if self.spread is None else self.in_spreads * self.spread.share

    def sentences(self) -> list[str]:
        """For people."""
        chance = f"with a chance of {POWER:.0%} at least (two-sided t test, error rate {LEVEL:.0%})"
        found = (
            f"{self.num_seeds} seeds find a difference of {self.in_spreads:.2g} times its spread over seeds {chance}"
        )
        if self.spread is None:
            return [f"{found}; how large that is nobody knows before the first seeds (pass --spread or --pilot)."]
        low, high = (end * self.in_spreads for end in self.spread.interval())
        width = "" if low == high else f", {low:.1%} to {high:.1%} as so few seeds know the spread"
        known = f"With a spread of {self.spread.share:.1%} of the distance ({self.spread.source})"
        lines = [f"{found}.", f"{known} that is {self.share:.1%} of the distance{width}."]
        half = seeds_needed(self.in_spreads / 2)
        return lines + ([f"A difference half as large takes {half} seeds."] if half else [])

    def to_dict(self) -> dict[str, float | int | str | None]:
        """As JSON."""
        spread = self.spread
        return {
            "num_seeds": self.num_seeds,
            "level": self.level,
            "power": POWER,
            "difference_in_spreads": self.in_spreads,
            "spread": None if spread is None else spread.share,
            "spread_from": None if spread is None else spread.source,
            "difference": self.share,
        }


def resolution(num_seeds: int, *, stop_early: bool = False, spread: Spread | None = None) -> Resolution:
    """What a confirmation with so many seeds can tell; with early stops by its last look alone, so rather more."""
    level = look_levels(num_seeds)[num_seeds] if stop_early else LEVEL
    return Resolution(num_seeds, level, detectable(num_seeds, level=level), spread)


def too_short(steps: int, *, trained_steps: int | None = None) -> list[str]:
    """What so few steps cannot show, for people; nothing if they are enough.

    Args:
        steps: Of an arm.
        trained_steps: Of the training that an arm from scratch stands for, where that is known.
    """
    lines = []
    if steps < ENOUGH_STEPS:
        lines.append(
            f"{steps} steps show what alignment costs at first rather than what it brings later: in the pair atlases "
            f"gains came between step 2000 and {ENOUGH_STEPS}, of 64 samples each. Take at least {ENOUGH_STEPS} for a "
            "verdict."
        )
    if trained_steps is not None and steps < trained_steps:
        lines.append(
            f"The checkpoint was trained for {trained_steps} steps, the arms for {steps}. A gain on the way may be a "
            "loss at the end: in a pair atlas of four seeds six of fifteen pairs gained at step 4000 and one at step "
            "12000. Take as many steps as the training will have."
        )
    return lines
