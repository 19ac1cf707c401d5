"""An evidence table as a rule reads it: the means over noise levels, a number for each pair and criterion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from layerprobe.analyses.measures import Z95, Floats
from layerprobe.analyses.tables import (
    LIDAR_GAP,
    PROBE,
    PROBE_GAP,
    RANK,
    RANK_GAP,
    STUDENT_DEPTH,
    TEACHER_DEPTH,
    TEACHER_LIDAR,
    TEACHER_PROBE,
)

NOISE_LIDAR = "noise-LiDAR"
DRAWS = 400  # of the criteria within their intervals


class Number(NamedTuple):
    """A value with its 95 % interval; nan for what there is not."""

    value: float
    low: float
    high: float
    note: str

    @property
    def surely(self) -> float:
        """The lower end; the value where there is no interval."""
        return self.value if math.isnan(self.low) else self.low

    @property
    def possibly(self) -> float:
        """The upper end; the value where there is no interval."""
        return self.value if math.isnan(self.high) else self.high

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Of the interval, for JSON."""
        return (None, None) if math.isnan(self.low) or math.isnan(self.high) else (self.low, self.high)


class PairMeans:
    """All criteria of all P pairs, averaged over noise levels.

    Attributes:
        pairs: (student, teacher), in the order of the table.
        layers: In execution order.
        noise_levels: Of the table, ascending.
        gap: The criterion that says by how much a student is weaker.

    Args:
        evidence: As `pair_evidence` returns it.
        layers: Names in execution order; by the depths of the table if None.
        label_free: Whether nothing that needs labels counts.

    Raises:
        ValueError: If the table has nothing that tells a weaker layer.
    """

    def __init__(self, evidence: pd.DataFrame, layers: Sequence[str] | None, *, label_free: bool) -> None:
        means = evidence[evidence["noise_level"].isna()]
        self.pairs = list(dict.fromkeys(zip(means["student"], means["teacher"], strict=True)))
        self._place = {pair: i for i, pair in enumerate(self.pairs)}
        self._columns: dict[str, dict[str, Any]] = {}
        for criterion, rows in means.groupby("criterion", sort=False):
            places = [self._place[pair] for pair in zip(rows["student"], rows["teacher"], strict=True)]
            columns: dict[str, Any] = {name: np.full(len(self.pairs), np.nan) for name in ("value", "low", "high")}
            for name, column in columns.items():
                column[places] = rows[name]
            columns["note"] = np.full(len(self.pairs), "", dtype=object)
            columns["note"][places] = rows["note"]
            self._columns[str(criterion)] = columns
        self.layers = self._by_depth() if layers is None else tuple(layers)
        self.noise_levels = tuple(sorted(float(level) for level in evidence["noise_level"].dropna().unique()))
        self.gap = PROBE_GAP if not label_free else LIDAR_GAP if self.has(LIDAR_GAP) else RANK_GAP
        if self.pairs and self.gap not in self._columns:
            cure = "extract features of the model" if label_free else "select without labels"
            raise ValueError(f"the evidence has no {self.gap}; {cure}")

    def __contains__(self, pair: tuple[str, str]) -> bool:
        return pair in self._place

    def place(self, pair: tuple[str, str]) -> int:
        """Of a pair, in the arrays."""
        return self._place[pair]

    def has(self, criterion: str) -> bool:
        """Whether any pair has a value."""
        return criterion in self._columns and bool(np.isfinite(self._columns[criterion]["value"]).any())

    def number(self, criterion: str, pair: tuple[str, str]) -> Number:
        """One criterion of one pair."""
        if criterion not in self._columns:
            return Number(math.nan, math.nan, math.nan, f"the evidence has no {criterion}")
        columns, i = self._columns[criterion], self._place[pair]
        value, low, high = (float(columns[name][i]) for name in ("value", "low", "high"))
        return Number(value, low, high, columns["note"][i])

    def values(self, criterion: str) -> Floats:
        """Of all pairs, shape (P,)."""
        found: Floats = self._columns[criterion]["value"]
        return found

    def drawn(self, criterion: str, *, seed: int) -> Floats:
        """Values as they might be within their intervals, shape (DRAWS, P); pairs share what is one layer's."""
        columns = self._columns[criterion]
        error = np.nan_to_num((columns["high"] - columns["low"]) / (2 * Z95))
        whose: list[Any] = list(self.pairs)
        if criterion.startswith(("teacher", "student")):
            whose = [pair[criterion.startswith("teacher")] for pair in whose]
        order = {name: column for column, name in enumerate(dict.fromkeys(whose))}
        noise = np.random.default_rng(seed).standard_normal((DRAWS, len(order)))
        found: Floats = columns["value"] + error * noise[:, [order[name] for name in whose]]
        return found

    def distance(self, pair: tuple[str, str]) -> int:
        """In layers."""
        student, teacher = pair
        return self.layers.index(teacher) - self.layers.index(student)

    @property
    def metric(self) -> str:
        """What the quality of a layer is."""
        return {PROBE_GAP: PROBE, LIDAR_GAP: NOISE_LIDAR, RANK_GAP: RANK}[self.gap]

    def quality(self, layer: str) -> Number:
        """Of one layer: as a teacher, and where it is none, what follows from a pair in which it learns."""
        level = {PROBE_GAP: TEACHER_PROBE, LIDAR_GAP: TEACHER_LIDAR}.get(self.gap)
        taught = [pair for pair in self.pairs if pair[1] == layer]
        if level is not None and taught:
            return self.number(level, taught[0])
        found = [self._inferred(pair, layer) for pair in self.pairs if layer in pair]
        known = [number for number in found if not math.isnan(number.value)]
        return (known or found or [Number(math.nan, math.nan, math.nan, f"{layer} has no equal in shape")])[0]

    def _inferred(self, pair: tuple[str, str], layer: str) -> Number:
        gap = self.number(self.gap, pair)
        if self.gap == RANK_GAP:  # ratios only, so relative to the first layer
            ratio = math.exp(gap.value) if pair == (self.layers[0], layer) else 1.0
            own = ratio if pair[0] == self.layers[0] and not math.isnan(gap.value) else math.nan
        elif self.gap == PROBE_GAP:
            own = self.number(TEACHER_PROBE, pair).value - gap.value
        else:
            own = self.number(TEACHER_LIDAR, pair).value * math.exp(-gap.value)
        return Number(own, math.nan, math.nan, gap.note)

    def _by_depth(self) -> tuple[str, ...]:
        depths: dict[str, float] = {}
        for pair in self.pairs:
            for name, criterion in zip(pair, (STUDENT_DEPTH, TEACHER_DEPTH), strict=True):
                depths[name] = self.number(criterion, pair).value
        return tuple(sorted(depths, key=lambda layer: depths[layer]))


def standard_ranks(values: Floats) -> Floats:
    """Ranks along the last axis, of mean 0 and variance 1, ties shared; 0 where there is no value or all are equal."""
    # What differs by rounding error only is equal.
    size = np.nanmax(np.abs(values), initial=np.finfo(np.float64).tiny)
    return standardized(stats.rankdata(np.round(values / size, 9), axis=-1, nan_policy="omit"))


def standardized(values: Floats) -> Floats:
    """Values along the last axis at mean 0 and variance 1; 0 where there is none or all are equal."""
    known = np.isfinite(values)
    count = np.maximum(known.sum(-1, keepdims=True), 1)
    filled = np.where(known, values, 0)
    away = np.where(known, filled - filled.sum(-1, keepdims=True) / count, 0)
    size = np.sqrt(np.square(away).sum(-1, keepdims=True) / count)
    scaled: Floats = np.divide(away, size, out=np.zeros_like(away), where=size > 1e-12)
    return scaled
