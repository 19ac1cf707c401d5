"""The spectrum of a representation: in how many directions it varies, and how unevenly.

`spectrum` decomposes the features once, in float64 and free of their offset, and every number is a property of what it
returns. LiDAR asks for several noise draws of the same samples, and the massive channels for no decomposition: they
stand apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprobe.analyses.measures.arrays import Features, Floats, centered, checked, unusable

EPSILON = 1e-7  # of RankMe and of LiDAR, added to every normalized value, as in both papers
POWER_LAW_RANKS = (11, 100)


@dataclass(frozen=True)
class PowerLaw:
    """A line through log eigenvalue against log rank.

    Attributes:
        exponent: alpha of `eigenvalue ~ rank ** -alpha`; nan where fewer than ten ranks are left to fit.
        r_squared: Of the fit, with its weights; 1 is a perfect power law.
        first_rank: First rank of the fit, counted from 1.
        last_rank: Last rank of the fit, inclusive.
    """

    exponent: float
    r_squared: float
    first_rank: int
    last_rank: int


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of one representation, and what follows from them; every number is nan where there are none.

    Attributes:
        singular_values: Of the centered features, shape (min(n, D),), in descending order, in units of the features.
        uncentered: Singular values of the features as they are, shape (min(n, D),), in descending order.
        mean_cosine: See `anisotropy`.
        num_samples: n.
        reason: Why there are no singular values, or "".
    """

    singular_values: Floats = field(repr=False)
    uncentered: Floats = field(repr=False)
    mean_cosine: float
    num_samples: int
    reason: str

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the normalized singular values; at least 1, at most min(n - 1, D).

        It counts directions, whatever they carry: noise that passes through a layer raises it too.

        Source: Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality.
        """
        return np.nan if self.reason else _exponential_entropy(self.singular_values)

    @property
    def rank_me(self) -> float:
        """RankMe: the same of the features as they are, with `EPSILON` added to every normalized singular value.

        Not centered, as published: a large mean counts as one direction that dominates all others and hides them, so
        compare it with `effective_rank` before reading anything into it.

        Source: Garrido et al. 2023 (arXiv:2210.02885), eq. 1.
        """
        return np.nan if self.reason else _exponential_entropy(self.uncentered, epsilon=EPSILON)

    @property
    def participation_ratio(self) -> float:
        """`(sum of variances)^2 / sum of squared variances` on the principal axes; between 1 and min(n - 1, D)."""
        if self.reason:
            return np.nan
        variances = np.square(self.singular_values / self.singular_values[0])
        return float(variances.sum() ** 2 / np.square(variances).sum())

    @property
    def power_law(self) -> PowerLaw:
        """The decay of the variances, by least squares in logarithms with weights 1 / rank on `POWER_LAW_RANKS`.

        A smaller spectrum is fitted up to its last variance above rounding error. Where `r_squared` is low the
        spectrum is no power law and the exponent says nothing.

        Source: alpha-ReQ, Agrawal et al., NeurIPS 2022; range and weights as in the authors' package reptrix, after
            Stringer et al. 2019.
        """
        return PowerLaw(np.nan, np.nan, *POWER_LAW_RANKS) if self.reason else _power_law(self)

    @property
    def anisotropy(self) -> float:
        """Mean cosine between two different samples, in [-1 / (n - 1), 1]; 1 where all point the same way.

        nan where a sample is the zero vector, which points nowhere.

        Source: Ethayarajh 2019 (arXiv:1909.00512).
        """
        return self.mean_cosine


def spectrum(x: Features) -> Spectrum:
    """The spectrum of a representation, from one QR decomposition.

    Effective rank, participation ratio and power law are invariant to rotation, isotropic scale and translation;
    RankMe and the anisotropy are not to translation. Features that are the same for all samples have no spectrum:
    every number is nan and `reason` says why.

    Args:
        x: Features, shape (n, D), any float dtype; computed in float64.

    Raises:
        ValueError: If features are not finite.
    """
    checked(x)
    if reason := unusable(x):
        return Spectrum(np.empty(0), np.empty(0), np.nan, len(x), reason)
    # Squares of very small or large features leave the range of a float.
    scale = float(np.abs(x).max())
    wide = x.astype(np.float64) / scale
    cosine = _mean_cosine(wide)
    mean = wide.mean(axis=0) * np.sqrt(len(x))
    values, uncentered = _singular_values(centered(wide), mean)
    return Spectrum(values * scale, uncentered * scale, cosine, len(x), "")


def effective_rank(x: Features) -> float:
    """`spectrum(x).effective_rank`, for those who want nothing else."""
    return spectrum(x).effective_rank


@dataclass(frozen=True, eq=False)
class MassiveChannels:
    """Channels that are far larger than the others, in descending order of size.

    Attributes:
        channels: Their indices, shape (k,).
        magnitudes: Their root mean squares over samples, shape (k,), in units of the features.
        ratios: `magnitudes` over the median of all channels, shape (k,).
        energy_shares: Their shares of the sum of all squares, shape (k,), in [0, 1].
        reason: Why there is no answer, or "".
    """

    channels: NDArray[np.intp]
    magnitudes: Floats
    ratios: Floats
    energy_shares: Floats
    reason: str

    @property
    def energy_share(self) -> float:
        """Share of the sum of all squares that these channels carry together, in [0, 1]; nan without an answer."""
        return np.nan if self.reason else float(self.energy_shares.sum())


def massive_channels(x: Features, *, ratio: float = 10.0) -> MassiveChannels:
    """Which channels drown the others in every inner product, cosine and distance.

    A channel is massive if its root mean square over samples exceeds `ratio` times the median of all channels. At 10
    it weighs in a cosine as much as a hundred median channels. Constant channels count: massive activations are
    mostly the same for every input.

    Args:
        x: Features, shape (n, D), any float dtype; or tokens as rows.
        ratio: Threshold, above 1. Sun et al. ask of single activations that they exceed 100 and about 1000 times the
            median of their token; ours is about channels and has no units.

    Raises:
        ValueError: If features are not finite, or ratio is not above 1.

    Source: Sun et al. 2024 (arXiv:2402.17762), with another threshold.
    """
    checked(x)
    if not ratio > 1:
        raise ValueError(f"ratio is {ratio}; pass a number above 1, such as 10")
    scale = float(np.abs(x).max()) or 1.0
    magnitudes = np.sqrt(np.square(x.astype(np.float64) / scale).mean(axis=0))
    median = np.median(magnitudes)
    if median == 0:
        reason = f"{np.count_nonzero(magnitudes == 0)} of {len(magnitudes)} channels are 0, and so is the median"
        return MassiveChannels(np.empty(0, np.intp), np.empty(0), np.empty(0), np.empty(0), reason)
    order = np.argsort(-magnitudes, kind="stable")
    found = order[magnitudes[order] > ratio * median]
    shares = np.square(magnitudes) / np.square(magnitudes).sum()
    return MassiveChannels(found, magnitudes[found] * scale, magnitudes[found] / median, shares[found], "")


@dataclass(frozen=True, eq=False)
class Lidar:
    """The discriminant spectrum of noise draws.

    Attributes:
        eigenvalues: Variance between samples over variance between draws of a sample, on the discriminant axes, shape
            (min(n - 1, D),), in descending order.
        num_draws: Draws per sample.
        reason: Why there are no eigenvalues, or "".
    """

    eigenvalues: Floats = field(repr=False)
    num_draws: int
    reason: str

    @property
    def rank(self) -> float:
        """LiDAR as published: exponential of the entropy of the eigenvalues; between 1 and min(n - 1, D).

        Means of few draws still hold noise: features that are nothing but noise have eigenvalues of about
        1 / num_draws in every direction, and so a high rank.
        """
        return np.nan if self.reason else _exponential_entropy(self.eigenvalues, epsilon=EPSILON)

    @property
    def debiased_rank(self) -> float:
        """The same after 1 / num_draws, which is what noise alone gives, is taken off every eigenvalue.

        Ours, not the paper's, which has 50 draws or more and need not care. nan where nothing is left.
        """
        left = np.maximum(self.eigenvalues - 1 / self.num_draws, 0)
        return _exponential_entropy(left, epsilon=EPSILON) if left.any() else np.nan


def lidar(x: Features, *, ridge: float = 1e-4) -> Lidar:
    """LiDAR with noise draws as the augmentation: in how many directions samples differ more than noise moves them.

    Each sample is a class, its noise draws are the members. Needs no labels. Invariant to rotation, scale and
    translation, and but for the ridge to any invertible linear map.

    Args:
        x: Features, shape (n, draws, D) with n, draws >= 2, any float dtype; computed in float64. `n (draws - 1)`
            should exceed D: in directions where no draw moved anything, the ridge decides.
        ridge: Added to the variances between draws, in units of their median, where the paper adds an absolute 1e-4
            or so: the answer then does not depend on the features' scale or on a few massive channels.

    Raises:
        ValueError: If features are not finite or have another shape, or the ridge is not positive.

    Source: Thilak et al. 2023 (arXiv:2312.04000).
    """
    if x.ndim != 3 or min(x.shape[:2]) < 2:
        raise ValueError(f"LiDAR got features of shape {x.shape}; pass (n, draws, D) with 2 samples and draws or more")
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}; pass a positive number, such as 1e-4")
    n, draws, width = x.shape
    checked(x.reshape(-1, width))
    if (x == x[:, :1]).all():
        return Lidar(np.empty(0), draws, "the features are the same for all draws of a sample")
    wide = centered(x.reshape(-1, width) / np.float64(np.abs(x).max())).reshape(x.shape)
    means = wide.mean(axis=1)
    inner = (wide - means[:, None]).reshape(-1, width)
    variances, axes = np.linalg.eigh(inner.T @ inner / (n * (draws - 1)))
    variances = np.maximum(variances, 0)
    moved = variances[variances > 1e-12 * variances[-1]]
    whitened = means @ (axes / np.sqrt(variances + ridge * np.median(moved)))
    eigenvalues = np.square(np.linalg.svd(centered(whitened), compute_uv=False)) / (n - 1)
    return Lidar(eigenvalues[: min(n - 1, width)], draws, "")


def _singular_values(x: Floats, mean: Floats) -> tuple[Floats, Floats]:
    """Singular values of centered features, and of the features with their mean.

    Args:
        x: Centered features, shape (n, D).
        mean: The mean times the root of n, shape (D,): as one more row, it makes the Gram matrix that of the features.
    """
    # Not through the covariance, whose square roots know the small values only to 1e-8 of the largest.
    if len(x) >= x.shape[1]:
        triangle: Any = np.linalg.qr(x, mode="r")
        with_mean: Any = np.concatenate([triangle, mean[None]])
    else:
        with_mean = np.linalg.qr(np.concatenate([x, mean[None]]).T, mode="r")
        triangle = with_mean[:, :-1]
    size = min(x.shape)
    values: Floats = np.linalg.svd(triangle, compute_uv=False)[:size]
    uncentered: Floats = np.linalg.svd(with_mean, compute_uv=False)[:size]
    return values, uncentered


def _mean_cosine(x: Floats) -> float:
    """Mean over all ordered pairs of different rows, without forming them: `(|sum of units|^2 - n) / (n (n - 1))`."""
    lengths = np.linalg.norm(x, axis=1)
    if not lengths.all():
        return np.nan
    n = len(x)
    total = (x / lengths[:, None]).sum(axis=0)
    return float((total @ total - n) / (n * (n - 1)))


def _exponential_entropy(values: Floats, *, epsilon: float = 0.0) -> float:
    p = values / values.sum() + epsilon
    p = p[p > 0]
    return float(np.exp(-np.sum(p * np.log(p))))


def _power_law(spectrum: Spectrum) -> PowerLaw:
    sigma = spectrum.singular_values / spectrum.singular_values[0]
    first = POWER_LAW_RANKS[0]
    rounding = max(spectrum.num_samples, len(sigma)) * np.finfo(np.float64).eps
    last = min(POWER_LAW_RANKS[1], int(np.count_nonzero(sigma > rounding)))
    if last - first + 1 < 10:
        return PowerLaw(np.nan, np.nan, first, last)
    rank = np.arange(first, last + 1)
    log_rank, log_variance, weight = np.log(rank), 2 * np.log(sigma[first - 1 : last]), 1 / rank
    along = log_rank - np.average(log_rank, weights=weight)
    up = log_variance - np.average(log_variance, weights=weight)
    slope = (weight * along) @ up / ((weight * along) @ along)
    spread = weight @ np.square(up)
    left = weight @ np.square(up - slope * along)
    r_squared = 1 - left / spread if spread > 0 else 0.0
    return PowerLaw(float(-slope), float(r_squared), first, last)
