"""Scores of generated samples against real ones: distances and neighborhoods in the features of a named extractor.

Every score has a 95 % interval that covers the sampling of both sets. Samples are divided at random into ten groups;
the kernel distance is measured group by group, all other scores with one group left out at a time (the jackknife). The
intervals of precision, recall, density and coverage are one and a half to two times as long as necessary.

Scores of finite sets have a bias that shrinks with their size, so they should be compared at equal sizes. Two scores
have none: the kernel distance, by its estimator, and the extrapolated Fréchet distance, to first order in 1 / n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from layerprobe.analyses.generation.distances import frechet_distance, gaussian, kernel_distance, leave_out_gaussians
from layerprobe.analyses.measures import (
    TILE_BYTES,
    Features,
    Floats,
    as_tensor,
    feature_statistics,
    nearest,
    subtract_mean,
)
from layerprobe.messages import unknown
from layerprobe.progress import StepCounter, StepProgress

FRECHET, EXTRAPOLATED, KERNEL = "Frechet distance", "Frechet distance, extrapolated", "kernel distance"
METRICS = ("frechet", "kernel", "precision", "recall", "density", "coverage")
NEIGHBORHOODS = METRICS[2:]
GROUPS = 10
FEWEST_SAMPLES = 2 * GROUPS
KERNEL_SUBSET = 1000
# A Fréchet distance with more than this share of bias depends more on n than on the samples.
MOST_BIAS = 0.1

_Interval = tuple[str, float, float, float]  # metric, value, low, high


@dataclass(frozen=True)
class Score:
    """One score with its 95 % interval.

    Attributes:
        metric: "Frechet distance", "Frechet distance, extrapolated", "kernel distance", "precision", "recall",
            "density" or "coverage".
        value: Score of all samples; for the kernel distance the mean over disjoint subsets of at most about 1000.
        low: Lower end of the interval.
        high: Upper end of the interval.
        better: Whether lower or higher values are better.
        num_samples: Number of generated samples.
        num_reference: Number of real samples.
        extractor: Name of the extractor of the features.
    """

    metric: str
    value: float
    low: float
    high: float
    better: Literal["lower", "higher"]
    num_samples: int
    num_reference: int
    extractor: str


@dataclass(frozen=True)
class Neighborhoods:
    """Overlap of generated and real samples, by balls that reach from a sample to its k-th neighbor in its own set.

    Attributes:
        precision: Fraction of generated samples in the ball of some real sample.
        recall: Fraction of real samples in the ball of some generated sample.
        density: Mean number of real balls that contain a generated sample, divided by k; may exceed 1.
        coverage: Fraction of real samples whose ball contains a generated sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def score_features(
    features: Features,
    reference: Features,
    *,
    extractor: str,
    metrics: Sequence[str] = METRICS,
    k: int = 5,
    seed: int = 0,
    progress: StepProgress | None = None,
) -> tuple[tuple[Score, ...], tuple[str, ...]]:
    """Computes scores, and warnings about scores with a large bias.

    Args:
        features: Features of generated samples, shape (n, D), n at least 20.
        reference: Features of real samples, shape (m, D), m at least 20.
        extractor: Name of the extractor of the features.
        metrics: Names of the scores, some of `METRICS`.
        k: Neighbor that the balls of the neighborhoods reach to.
        seed: Seed of the division of samples into groups.
        progress: Callback with (steps done, total steps).

    Raises:
        ValueError: If there are too few samples, the widths differ, a feature is not finite, or a metric is unknown.
    """
    check_metrics(metrics)
    _check(features, reference, metrics, k)
    rng = np.random.default_rng(seed)
    groups = [rng.permutation(len(z)) % GROUPS for z in (features, reference)]
    neighborhood_metrics = [name for name in NEIGHBORHOODS if name in metrics]
    num_steps = ("frechet" in metrics) + ("kernel" in metrics) + bool(neighborhood_metrics) * (GROUPS + 1)
    report = StepCounter(progress, num_steps)
    intervals: list[_Interval] = []
    warnings: tuple[str, ...] = ()
    if "frechet" in metrics:
        distances, warnings = _frechet_scores(features, reference, groups)
        intervals += distances
        report()
    if "kernel" in metrics:
        intervals.append(_kernel_score(features, reference, rng))
        report()
    if neighborhood_metrics:
        intervals += _neighborhood_scores(features, reference, groups, k, neighborhood_metrics, report)
    scores = tuple(
        Score(*one, "higher" if one[0] in NEIGHBORHOODS else "lower", len(features), len(reference), extractor)
        for one in intervals
    )
    return scores, warnings


def jackknife(value: float, left_out: Sequence[float]) -> tuple[float, float]:
    """Computes the jackknife of a statistic: its extrapolation to infinitely many samples, and its error.

    With G groups, G value - (G - 1) mean(left_out) extrapolates a bias of order 1 / n to n = infinity, along the line
    through n and n (G - 1) / G. Chong and Forsyth 2020 (arXiv:1911.07023) fit it to more sizes, of the generated
    samples only.

    Args:
        value: Statistic of all samples.
        left_out: Statistic of the samples outside each group, G values.

    Returns:
        The extrapolated value, and half the length of the 95 % interval of either (t with G - 1 degrees of freedom).

    Source: Quenouille 1956 for the bias, Tukey 1958 for the variance.
    """
    num = len(left_out)
    half = stats.t.ppf(0.975, num - 1) * np.sqrt((num - 1) * np.var(left_out))
    return float(num * value - (num - 1) * np.mean(left_out)), float(half)


def check_metrics(metrics: Sequence[str]) -> None:
    """Checks that names are in `METRICS`.

    Raises:
        ValueError: If a name is unknown, or there is none.
    """
    strange = [name for name in metrics if name not in METRICS]
    if strange or not metrics:
        raise ValueError(unknown("score", strange[0] if strange else "", METRICS))


def check_neighbors(metrics: Sequence[str], k: int, num: int, num_reference: int) -> None:
    """Checks that so many samples have a k-th neighbor, also without those that the intervals leave out at a time.

    Raises:
        ValueError: If they are too few, and a metric counts neighbors.
    """
    if set(metrics) & set(NEIGHBORHOODS):
        _check_neighbors(k, *(n - -(-n // GROUPS) for n in (num, num_reference)))


def neighborhoods(x: Features, reference: Features, *, k: int = 5, tile_bytes: int = TILE_BYTES) -> Neighborhoods:
    """Computes precision, recall, density and coverage; exact, and invariant to rotation, shift and scale.

    A ball contains its surface, so duplicates are in each other's balls.

    Args:
        x: Features of generated samples, shape (n, D).
        reference: Features of real samples, shape (m, D).
        k: Neighbor that a ball reaches to, in [1, min(n, m) - 1].
        tile_bytes: Memory in bytes, in addition to copies of the features in float64 and float32.

    Raises:
        ValueError: If k does not fit the numbers of samples.

    Source: precision and recall of Kynkäänniemi et al. 2019 (arXiv:1904.06991); density and coverage of Naeem et al.
        2020 (arXiv:2002.09797).
    """
    _check_neighbors(k, len(x), len(reference))
    fakes, reals = as_tensor(x), as_tensor(reference)
    statistics = feature_statistics(reals)
    mean, scale = statistics.mean, statistics.square_norms.mean().sqrt()
    scale = torch.where(scale > 0, scale, 1)
    fake_radii, real_radii = (
        _square_radii(z, subtract_mean(z, mean, torch.float64) / scale, k, tile_bytes) for z in (fakes, reals)
    )
    num_balls = torch.zeros(len(fakes), dtype=torch.long)  # real balls that contain each generated sample
    covered, recalled = (torch.zeros(len(reals), dtype=torch.bool) for _ in range(2))
    pairs = _Pairs(reals, mean, scale)
    rows = max(1, tile_bytes // (24 * len(reals)))
    for start in range(0, len(fakes), rows):
        part = slice(start, start + rows)
        in_real, in_fake = pairs.within(fakes[part], real_radii[None, :], fake_radii[part, None])
        num_balls[part] = in_real.sum(1)
        covered |= in_real.any(0)
        recalled |= in_fake.any(0)
    return Neighborhoods(
        precision=float((num_balls > 0).double().mean()),
        recall=float(recalled.double().mean()),
        density=float(num_balls.double().mean()) / k,
        coverage=float(covered.double().mean()),
    )


class _Pairs:
    """Compares square distances with limits, by float32 products where these are precise enough.

    The products use samples that are centered and of order 1; all other pairs are compared by float64 differences of
    the original samples.
    """

    def __init__(self, bank: Tensor, mean: Tensor, scale: Tensor) -> None:
        self.bank, self._mean, self._scale = bank, mean, scale
        narrow, self._squares = self._narrow(bank)
        self._transposed = narrow.T.contiguous()
        # An upper bound of the relative rounding error of a square distance computed from products.
        self._slack = 2 * (bank.shape[1] + 8) * torch.finfo(torch.float32).eps

    def within(self, x: Tensor, *limits: Tensor) -> list[Tensor]:
        """Whether square distances of x (B, D) to the bank are within each limit; limits and results (B, n_bank)."""
        narrow, squares = self._narrow(x)
        slack = squares[:, None] + self._squares
        distances = slack - 2 * (narrow @ self._transposed)
        slack *= self._slack
        return [self._settled(x, distances, slack, limit) for limit in limits]

    def _narrow(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = subtract_mean(x, self._mean, torch.float64) / self._scale
        return wide.float(), wide.square().sum(1).float()

    def _settled(self, x: Tensor, distances: Tensor, slack: Tensor, limit: Tensor) -> Tensor:
        # The slack also covers the rounding of a limit that is close to a distance.
        gap = distances - (limit / self._scale**2).float()
        inside = gap <= 0
        # The negation includes pairs that overflowed to nan.
        undecided = torch.nonzero(~(gap.abs_() > slack))
        for rows in torch.split(undecided, max(1, TILE_BYTES // (32 * self.bank.shape[1]))):
            i, j = rows.T
            inside[i, j] = _square_distances(x[i], self.bank[j]) <= limit.expand(distances.shape)[i, j]
        return inside


def _square_radii(x: Tensor, z: Tensor, k: int, tile_bytes: int) -> Tensor:
    """Square distances of x to the k-th nearest other sample, shape (n,); z is x centered and scaled."""
    positions, _ = nearest(z, None, k=k, score="distance", tile_bytes=tile_bytes)
    rows = max(1, tile_bytes // (32 * x.shape[1]))
    farthest = torch.from_numpy(positions[:, -1])
    parts = zip(torch.split(x, rows), torch.split(farthest, rows), strict=True)
    return torch.cat([_square_distances(part, x[indices]) for part, indices in parts])


def _square_distances(a: Tensor, b: Tensor) -> Tensor:
    """Square distances of rows; equal for equal rows at any position, so that ties remain ties."""
    return (a.double() - b.double()).square_().sum(1)


def _frechet_scores(
    x: Features, y: Features, groups: Sequence[NDArray[Any]]
) -> tuple[list[_Interval], tuple[str, ...]]:
    """The distance, its extrapolation where there are enough samples, and a warning where the bias is large."""
    left_out = [frechet_distance(a, b) for a, b in zip(*map(leave_out_gaussians, (x, y), groups), strict=True)]
    value = frechet_distance(gaussian(x), gaussian(y))
    extrapolated, half = jackknife(value, left_out)
    intervals = [(FRECHET, value, max(value - half, 0.0), value + half)]
    (n, width), m = x.shape, len(y)
    if min(n, m) <= 2 * width:
        return intervals, (
            f"{min(n, m)} samples are too few for the Frechet distance of {width} features: most of it may be bias, "
            f"and it cannot be extrapolated; use {10 * width} or more samples on both sides, or the kernel distance",
        )
    intervals.append((EXTRAPOLATED, extrapolated, extrapolated - half, extrapolated + half))
    bias = 1 - extrapolated / value if value > 0 else 0.0
    if bias <= MOST_BIAS:
        return intervals, ()
    return intervals, (
        f"about {min(bias, 1.0):.0%} of the Frechet distance is the bias of {n} and {m} samples; use more samples, or "
        "report the extrapolated or the kernel distance",
    )


def _kernel_score(x: Features, y: Features, rng: np.random.Generator) -> _Interval:
    """The mean over disjoint subsets of both sets."""
    num = max(GROUPS, round(min(len(x), len(y)) / KERNEL_SUBSET))
    parts = ([z[part] for part in np.array_split(rng.permutation(len(z)), num)] for z in (x, y))
    distances: Floats = np.array([kernel_distance(a, b) for a, b in zip(*parts, strict=True)])
    value, half = distances.mean(), stats.t.ppf(0.975, num - 1) * distances.std(ddof=1) / np.sqrt(num)
    return KERNEL, float(value), float(value - half), float(value + half)


def _neighborhood_scores(
    x: Features,
    y: Features,
    groups: Sequence[NDArray[Any]],
    k: int,
    metrics: Sequence[str],
    report: Callable[[], None],
) -> list[_Interval]:
    results = []
    for group in range(-1, GROUPS):  # -1 leaves out no sample
        results.append(neighborhoods(x[groups[0] != group], y[groups[1] != group], k=k))
        report()
    intervals = []
    for name in metrics:
        value, *left_out = (getattr(result, name) for result in results)
        half = jackknife(value, left_out)[1]
        intervals.append((name, value, max(value - half, 0.0), min(value + half, np.inf if name == "density" else 1.0)))
    return intervals


def _check(features: Features, reference: Features, metrics: Sequence[str], k: int) -> None:
    for z, what in ((features, "samples"), (reference, "reference samples")):
        if z.ndim != 2 or len(z) < FEWEST_SAMPLES:
            raise ValueError(f"{what} have features of shape {z.shape}; pass (n, D) with n at least {FEWEST_SAMPLES}")
        if not np.isfinite(z).all():
            raise ValueError(f"features of {what} are not finite; the samples or the extractor have diverged")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features of width {features.shape[1]} and {reference.shape[1]} cannot be compared; use one extractor"
        )
    check_neighbors(metrics, k, len(features), len(reference))


def _check_neighbors(k: int, n: int, m: int) -> None:
    if not 1 <= k < min(n, m):
        raise ValueError(f"k is {k} for {n} and {m} samples; pass k between 1 and {min(n, m) - 1}")
