"""Scores of generated samples against real ones: distances and neighborhoods in the features of a named extractor.

Every score comes with a 95 % interval that covers the draw of both sets. Samples are divided at random into ten
groups; the kernel distance is measured group by group, all else with one group left out at a time (the jackknife).
Intervals of precision, recall, density and coverage come out one and a half to two times as long as they need to be.

Scores of finite sets have a bias that shrinks with their size: compare at equal sizes only. Two have none: the kernel
distance by its estimator, and the extrapolated Fréchet distance in the first order of 1 / n.
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
from layerprobe.progress import StepProgress

FRECHET, EXTRAPOLATED, KERNEL = "Frechet distance", "Frechet distance, extrapolated", "kernel distance"
METRICS = ("frechet", "kernel", "precision", "recall", "density", "coverage")
NEIGHBORHOODS = METRICS[2:]
GROUPS = 10
FEWEST_SAMPLES = 2 * GROUPS
KERNEL_SUBSET = 1000
# A Fréchet distance with more than this share of bias says more of n than of the samples.
MOST_BIAS = 0.1

_Found = tuple[str, float, float, float]  # metric, value, low, high


@dataclass(frozen=True)
class Score:
    """One number with its 95 % interval.

    Attributes:
        metric: "Frechet distance", "Frechet distance, extrapolated", "kernel distance", "precision", "recall",
            "density" or "coverage".
        value: Of all samples; for the kernel distance the mean over disjoint subsets of at most about 1000.
        low: Lower end of the interval.
        high: Upper end.
        better: Which way is better.
        num_samples: Generated samples.
        num_reference: Real ones.
        extractor: Whose features were compared.
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
    """How generated samples lie among real ones, by balls that reach to the k-th neighbor of a sample in its own set.

    Attributes:
        precision: Fraction of generated samples in a ball of some real one.
        recall: Fraction of real samples in a ball of some generated one.
        density: Mean number of real balls around a generated sample, divided by k; may exceed 1.
        coverage: Fraction of real samples whose ball holds a generated one.
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
    """Scores and warnings.

    Args:
        features: Of generated samples, shape (n, D), n at least 20.
        reference: Of real samples, shape (m, D), m at least 20.
        extractor: The name of what made the features.
        metrics: Some of `METRICS`.
        k: Of the neighborhoods.
        seed: Divides samples into groups.
        progress: Called with (steps done, steps in all).

    Raises:
        ValueError: If there are too few samples, the widths differ, a feature is not finite, or a metric is not known.
    """
    check_metrics(metrics)
    _check(features, reference, metrics, k)
    rng = np.random.default_rng(seed)
    groups = [rng.permutation(len(z)) % GROUPS for z in (features, reference)]
    wanted = [name for name in NEIGHBORHOODS if name in metrics]
    report = _Steps(progress, ("frechet" in metrics) + ("kernel" in metrics) + bool(wanted) * (GROUPS + 1))
    found: list[_Found] = []
    warnings: tuple[str, ...] = ()
    if "frechet" in metrics:
        scores, warnings = _frechet_scores(features, reference, groups)
        found += scores
        report()
    if "kernel" in metrics:
        found.append(_kernel_score(features, reference, rng))
        report()
    if wanted:
        found += _neighborhood_scores(features, reference, groups, k, wanted, report)
    sizes = (len(features), len(reference), extractor)
    return tuple(Score(*f, "higher" if f[0] in NEIGHBORHOODS else "lower", *sizes) for f in found), warnings


def jackknife(value: float, left_out: Sequence[float]) -> tuple[float, float]:
    """Of a statistic of all samples and of those outside of each group: its limit for many samples, and an error.

    With G groups, G value - (G - 1) mean(left_out) is what a bias of order 1 / n extrapolates to at n = infinity: the
    line through n and n (G - 1) / G. Chong and Forsyth 2020 (arXiv:1911.07023) draw it through more sizes, of the
    generated samples only.

    Returns:
        The extrapolated value, and half the length of the 95 % interval of either (t with G - 1 degrees of freedom).

    Source: Quenouille 1956 for the bias, Tukey 1958 for the variance.
    """
    num = len(left_out)
    half = stats.t.ppf(0.975, num - 1) * np.sqrt((num - 1) * np.var(left_out))
    return float(num * value - (num - 1) * np.mean(left_out)), float(half)


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuses names that are not in `METRICS`.

    Raises:
        ValueError: Naming one.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"there is no score {unknown[0] if unknown else ''!r}; pass some of {', '.join(METRICS)}")


def neighborhoods(x: Features, reference: Features, *, k: int = 5, tile_bytes: int = TILE_BYTES) -> Neighborhoods:
    """Precision, recall, density and coverage; exact, and unchanged by rotation, shift and scale of all features.

    A ball holds its surface, so duplicates are in each other's balls.

    Args:
        x: Features of generated samples, shape (n, D).
        reference: Features of real samples, shape (m, D).
        k: Which neighbor a ball reaches to, in [1, min(n, m) - 1].
        tile_bytes: Memory beside copies of the features in float64 and float32.

    Raises:
        ValueError: If the features do not fit together or k to them.

    Source: precision and recall of Kynkäänniemi et al. 2019 (arXiv:1904.06991); density and coverage of Naeem et al.
        2020 (arXiv:2002.09797).
    """
    _check_neighbors(k, len(x), len(reference))
    fakes, reals = as_tensor(x), as_tensor(reference)
    known = feature_statistics(reals)
    scale = known.square_norms.mean().sqrt()
    scale = torch.where(scale > 0, scale, 1)
    fake_radii, real_radii = (
        _square_radii(z, subtract_mean(z, known.mean, torch.float64) / scale, k, tile_bytes) for z in (fakes, reals)
    )
    around = torch.zeros(len(fakes), dtype=torch.long)  # real balls around each generated sample
    covered, recalled = (torch.zeros(len(reals), dtype=torch.bool) for _ in range(2))
    pairs = _Pairs(reals, known.mean, scale)
    rows = max(1, tile_bytes // (24 * len(reals)))
    for start in range(0, len(fakes), rows):
        part = slice(start, start + rows)
        in_real, in_fake = pairs.within(fakes[part], real_radii[None, :], fake_radii[part, None])
        around[part] = in_real.sum(1)
        covered |= in_real.any(0)
        recalled |= in_fake.any(0)
    return Neighborhoods(
        precision=float((around > 0).double().mean()),
        recall=float(recalled.double().mean()),
        density=float(around.double().mean()) / k,
        coverage=float(covered.double().mean()),
    )


class _Pairs:
    """Which square distances are within limits: by float32 products where these decide, else one by one.

    Float32 sees samples centered and of order 1; what decides are float64 differences of the samples as they are.
    """

    def __init__(self, bank: Tensor, mean: Tensor, scale: Tensor) -> None:
        self.bank, self._mean, self._scale = bank, mean, scale
        narrow, self._squares = self._narrow(bank)
        self._transposed = narrow.T.contiguous()
        # More than the relative rounding error of a square distance that is a difference of products.
        self._slack = 2 * (bank.shape[1] + 8) * torch.finfo(torch.float32).eps

    def within(self, x: Tensor, *limits: Tensor) -> list[Tensor]:
        """Whether the square distances of x (B, D) and the bank keep each limit; limits and results (B, n_bank)."""
        narrow, squares = self._narrow(x)
        slack = squares[:, None] + self._squares
        distances = slack - 2 * (narrow @ self._transposed)
        slack *= self._slack
        return [self._settled(x, distances, slack, limit) for limit in limits]

    def _narrow(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = subtract_mean(x, self._mean, torch.float64) / self._scale
        return wide.float(), wide.square().sum(1).float()

    def _settled(self, x: Tensor, distances: Tensor, slack: Tensor, limit: Tensor) -> Tensor:
        # The rounding of a limit that is near a distance is in the slack too.
        gap = distances - (limit / self._scale**2).float()
        inside = gap <= 0
        # Not "within the slack": what overflowed is open too.
        open_pairs = torch.nonzero(~(gap.abs_() > slack))
        for some in torch.split(open_pairs, max(1, TILE_BYTES // (32 * self.bank.shape[1]))):
            i, j = some.T
            inside[i, j] = _square_distances(x[i], self.bank[j]) <= limit.expand(distances.shape)[i, j]
        return inside


def _square_radii(x: Tensor, z: Tensor, k: int, tile_bytes: int) -> Tensor:
    """Square distances to the k-th nearest other sample, shape (n,), of x; z is x centered and scaled."""
    positions, _ = nearest(z, None, k=k, score="distance", tile_bytes=tile_bytes)
    rows = max(1, tile_bytes // (32 * x.shape[1]))
    farthest = torch.from_numpy(positions[:, -1])
    parts = zip(torch.split(x, rows), torch.split(farthest, rows), strict=True)
    return torch.cat([_square_distances(part, x[at]) for part, at in parts])


def _square_distances(a: Tensor, b: Tensor) -> Tensor:
    """Of rows, the same number for the same two rows wherever they stand, so that ties are ties."""
    return (a.double() - b.double()).square_().sum(1)


def _frechet_scores(x: Features, y: Features, groups: Sequence[NDArray[Any]]) -> tuple[list[_Found], tuple[str, ...]]:
    """The distance, its extrapolation where that means something, and a warning where the bias is large."""
    left_out = [frechet_distance(a, b) for a, b in zip(*map(leave_out_gaussians, (x, y), groups), strict=True)]
    value = frechet_distance(gaussian(x), gaussian(y))
    extrapolated, half = jackknife(value, left_out)
    found = [(FRECHET, value, max(value - half, 0.0), value + half)]
    (n, width), m = x.shape, len(y)
    if min(n, m) <= 2 * width:
        return found, (
            f"{min(n, m)} samples are too few for the Frechet distance of {width} features: most of it may be bias, "
            f"and it does not extrapolate; use {10 * width} or more on both sides, or the kernel distance",
        )
    found.append((EXTRAPOLATED, extrapolated, extrapolated - half, extrapolated + half))
    bias = 1 - extrapolated / value if value > 0 else 0.0
    if bias <= MOST_BIAS:
        return found, ()
    return found, (
        f"about {min(bias, 1.0):.0%} of the Frechet distance is the bias of {n} and {m} samples; use more, or quote "
        "the extrapolated or the kernel distance",
    )


def _kernel_score(x: Features, y: Features, rng: np.random.Generator) -> _Found:
    """Mean over disjoint subsets of both sets."""
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
    wanted: Sequence[str],
    report: Callable[[], None],
) -> list[_Found]:
    every = []
    for group in range(-1, GROUPS):  # first of all samples
        every.append(neighborhoods(x[groups[0] != group], y[groups[1] != group], k=k))
        report()
    found = []
    for name in wanted:
        value, *left_out = (getattr(scores, name) for scores in every)
        half = jackknife(value, left_out)[1]
        found.append((name, value, max(value - half, 0.0), min(value + half, np.inf if name == "density" else 1.0)))
    return found


class _Steps:
    """Counts the steps that are done."""

    def __init__(self, progress: StepProgress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def __call__(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)


def _check(features: Features, reference: Features, metrics: Sequence[str], k: int) -> None:
    for z, what in ((features, "samples"), (reference, "reference samples")):
        if z.ndim != 2 or len(z) < FEWEST_SAMPLES:
            raise ValueError(f"{what} have features of shape {z.shape}; pass (n, D), n at least {FEWEST_SAMPLES}")
        if not np.isfinite(z).all():
            raise ValueError(f"features of {what} are not finite; the samples or the extractor have diverged")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features of width {features.shape[1]} and {reference.shape[1]} do not compare")
    if set(metrics) & set(NEIGHBORHOODS):
        left = [len(z) - -(-len(z) // GROUPS) for z in (features, reference)]
        _check_neighbors(k, *left)


def _check_neighbors(k: int, n: int, m: int) -> None:
    if not 1 <= k < min(n, m):
        raise ValueError(f"k is {k} for {n} and {m} samples; pass k between 1 and {min(n, m) - 1}")
