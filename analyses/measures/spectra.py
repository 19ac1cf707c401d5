"""Spectra of a representation: in how many directions it varies, and how unevenly.

`spectrum` decomposes the features once, in float64 and without their mean, and every number is a property of its
result. `lidar` needs several noise draws of the same samples and compares the variance between samples with that
between draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import entr
from torch import Tensor

from layerprobe.analyses.measures.arrays import NEGLIGIBLE, Features, Floats, centered, checked
from layerprobe.analyses.measures.tensors import FeatureMatrix, centered_with_mean, checked_tensor, unusable_tensor

EPSILON = 1e-7  # added to every normalized value in RankMe and LiDAR, as in both papers
POWER_LAW_RANKS = (11, 100)


@dataclass(frozen=True)
class PowerLaw:
    """A line fitted to log eigenvalue against log rank.

    Attributes:
        exponent: Exponent alpha of `eigenvalue ~ rank ** -alpha`; nan if fewer than ten ranks can be fitted.
        r_squared: Weighted R^2 of the fit; 1 is a perfect power law.
        first_rank: First rank of the fit, counted from 1.
        last_rank: Last rank of the fit, inclusive.
    """

    exponent: float
    r_squared: float
    first_rank: int
    last_rank: int


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of one representation and the numbers that follow from them; all nan if there are none.

    Attributes:
        singular_values: Singular values of the centered features, shape (min(n, D),), in descending order, in units of
            the features.
        uncentered: Singular values of the features without centering, shape (min(n, D),), in descending order.
        mean_cosine: Mean cosine between two different samples, as `anisotropy` documents it.
        num_samples: Number of samples n.
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

        It counts directions, whatever they encode: noise that passes through a layer raises it too.

        Source: Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality.
        """
        return np.nan if self.reason else exponential_entropy(self.singular_values)

    @property
    def rank_me(self) -> float:
        """RankMe: effective rank without centering, with `EPSILON` added to every normalized singular value.

        Not centered, as published: a large mean counts as one direction that dominates all others and hides them, so
        compare it with `effective_rank` before interpreting it.

        Source: Garrido et al. 2023 (arXiv:2210.02885), eq. 1.
        """
        return np.nan if self.reason else exponential_entropy(self.uncentered, epsilon=EPSILON)

    @property
    def participation_ratio(self) -> float:
        """`(sum of variances)^2 / sum of squared variances` on the principal axes; between 1 and min(n - 1, D)."""
        if self.reason:
            return np.nan
        variances = np.square(self.singular_values / self.singular_values[0])
        return float(variances.sum() ** 2 / np.square(variances).sum())

    @property
    def power_law(self) -> PowerLaw:
        """Decay of the variances, by least squares in logarithms with weights 1 / rank on `POWER_LAW_RANKS`.

        A smaller spectrum is fitted up to its last variance above rounding error. If `r_squared` is low, the spectrum
        is not a power law and the exponent has no meaning.

        Source: alpha-ReQ, Agrawal et al., NeurIPS 2022; range and weights as in the authors' package reptrix, after
            Stringer et al. 2019.
        """
        return PowerLaw(np.nan, np.nan, *POWER_LAW_RANKS) if self.reason else _power_law(self)

    @property
    def anisotropy(self) -> float:
        """Mean cosine between two different samples, in [-1 / (n - 1), 1]; 1 if all point in the same direction.

        nan if a sample is the zero vector, which has no direction.

        Source: Ethayarajh 2019 (arXiv:1909.00512).
        """
        return self.mean_cosine


def spectrum(x: FeatureMatrix) -> Spectrum:
    """Computes the spectrum of a representation from one QR decomposition, on the device of the features.

    Effective rank, participation ratio and power law are invariant to rotation, isotropic scale and translation;
    RankMe and the anisotropy are not invariant to translation. Features that are the same for all samples have no
    spectrum: every number is nan and `reason` says why.

    Args:
        x: Features, shape (n, D), any float dtype; computed in float64.

    Raises:
        ValueError: If features are not finite.
    """
    features = checked_tensor(x)
    if reason := unusable_tensor(features):
        return Spectrum(np.empty(0), np.empty(0), np.nan, len(x), reason)
    # Squares of very small or large features leave the range of a float.
    scale = float(features.abs().max())
    wide = features.double() / scale
    cosine = _mean_cosine(wide)
    scaled_mean = wide.mean(0) * np.sqrt(len(x))
    values, uncentered = _singular_values(centered_with_mean(wide)[0], scaled_mean)
    return Spectrum(values * scale, uncentered * scale, cosine, len(x), "")


def effective_rank(x: FeatureMatrix) -> float:
    """Computes `spectrum(x).effective_rank`."""
    return spectrum(x).effective_rank


def exponential_entropy(values: Floats, *, epsilon: float = 0.0) -> float:
    """Computes the exponential of the entropy of values normalized to sum 1.

    Args:
        values: Nonnegative values, not all 0.
        epsilon: Number added to every normalized value.
    """
    return float(np.exp(entr(values / values.sum() + epsilon).sum()))


@dataclass(frozen=True, eq=False)
class Lidar:
    """The discriminant spectrum of noise draws.

    Attributes:
        eigenvalues: Variance between samples over variance between draws of a sample, on the discriminant axes, shape
            (min(n - 1, D),), in descending order.
        num_draws: Number of draws per sample.
        reason: Why there are no eigenvalues, or "".
    """

    eigenvalues: Floats = field(repr=False)
    num_draws: int
    reason: str

    @property
    def rank(self) -> float:
        """LiDAR as published: exponential of the entropy of the eigenvalues; between 1 and min(n - 1, D).

        Means of few draws still contain noise: features that are only noise have eigenvalues of about 1 / num_draws
        in every direction, and so a high rank.
        """
        return np.nan if self.reason else exponential_entropy(self.eigenvalues, epsilon=EPSILON)

    @property
    def debiased_rank(self) -> float:
        """LiDAR after subtracting 1 / num_draws, the share of noise alone, from every eigenvalue.

        An addition to the paper, which has 50 draws or more and does not need it. nan if no eigenvalue is larger.
        """
        excess = np.maximum(self.eigenvalues - 1 / self.num_draws, 0)
        return exponential_entropy(excess, epsilon=EPSILON) if excess.any() else np.nan


def lidar(x: Features, *, ridge: float = 1e-4) -> Lidar:
    """Computes LiDAR with noise draws as the augmentation: in how many directions samples differ more than draws.

    Each sample is a class, and its noise draws are the members. No labels are needed. Invariant to rotation, scale and
    translation, and, apart from the effect of the ridge, to any invertible linear map.

    Args:
        x: Features, shape (n, draws, D) with n, draws >= 2, any float dtype; computed in float64. `n (draws - 1)`
            should exceed D: in directions without variance between draws, the result depends on the ridge.
        ridge: Ridge added to the variances between draws, in units of their median. The paper adds an absolute 1e-4 or
            so; in these units the result does not depend on the features' scale or on a few massive channels.

    Raises:
        ValueError: If features are not finite or have another shape, or the ridge is not positive.

    Source: Thilak et al. 2023 (arXiv:2312.04000).
    """
    if x.ndim != 3 or min(x.shape[:2]) < 2:
        raise ValueError(f"LiDAR got features of shape {x.shape}; pass (n, draws, D) with 2 samples and draws or more")
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}; pass a positive number, such as 1e-4")
    n, num_draws, width = x.shape
    checked(x.reshape(-1, width))
    if (x == x[:, :1]).all():
        return Lidar(np.empty(0), num_draws, "the features are the same for all draws of a sample")
    _, means, whitening = whiten_draws(x, ridge)
    eigenvalues = np.square(np.linalg.svd(centered(means @ whitening), compute_uv=False)) / (n - 1)
    return Lidar(eigenvalues[: min(n - 1, width)], num_draws, "")


def whiten_draws(x: Features, ridge: float) -> tuple[Floats, Floats, Floats]:
    """Splits noise draws into means and deviations, with a map to coordinates of unit variance between draws.

    Args:
        x: Features, shape (n, draws, D).
        ridge: Ridge added to the variances between draws, in units of their median.

    Returns:
        Deviations of the draws from the means of their samples, shape (n, draws, D), means, shape (n, D), and the
        whitening map, shape (D, D); the features are centered and in units of their largest absolute value.
    """
    n, num_draws, width = x.shape
    wide = centered(x.reshape(-1, width) / np.float64(np.abs(x).max())).reshape(x.shape)
    means = wide.mean(axis=1)
    deviations = wide - means[:, None]
    flat = deviations.reshape(-1, width)
    variances, axes = np.linalg.eigh(flat.T @ flat / (n * (num_draws - 1)))
    variances = np.maximum(variances, 0)
    median = np.median(variances[variances > NEGLIGIBLE * variances[-1]])
    return deviations, means, axes / np.sqrt(variances + ridge * median)


def _singular_values(x: Tensor, scaled_mean: Tensor) -> tuple[Floats, Floats]:
    """Singular values of centered features, and of the features with their mean.

    Args:
        x: Centered features, shape (n, D).
        scaled_mean: Mean times the root of n, shape (D,): as one more row, it makes the Gram matrix that of the
            features.
    """
    # Square roots of the covariance's eigenvalues would be accurate only to 1e-8 of the largest.
    if len(x) >= x.shape[1]:
        triangle = torch.linalg.qr(x, mode="r").R
        with_mean = torch.cat([triangle, scaled_mean[None]])
    else:
        with_mean = torch.linalg.qr(torch.cat([x, scaled_mean[None]]).T, mode="r").R
        triangle = with_mean[:, :-1]
    values, uncentered = (torch.linalg.svdvals(part)[: min(x.shape)] for part in (triangle, with_mean))
    return values.numpy(force=True), uncentered.numpy(force=True)


def _mean_cosine(x: Tensor) -> float:
    """Mean over all ordered pairs of different rows, without forming them: `(|sum of units|^2 - n) / (n (n - 1))`."""
    lengths = torch.linalg.vector_norm(x, dim=1)
    if not bool(lengths.all()):
        return np.nan
    n = len(x)
    total = (x / lengths[:, None]).sum(0)
    return float((total @ total - n) / (n * (n - 1)))


def _power_law(spectrum: Spectrum) -> PowerLaw:
    sigma = spectrum.singular_values / spectrum.singular_values[0]
    first = POWER_LAW_RANKS[0]
    rounding = max(spectrum.num_samples, len(sigma)) * np.finfo(np.float64).eps
    last = min(POWER_LAW_RANKS[1], int(np.count_nonzero(sigma > rounding)))
    if last - first + 1 < 10:
        return PowerLaw(np.nan, np.nan, first, last)
    rank = np.arange(first, last + 1)
    log_rank, log_variance, weights = np.log(rank), 2 * np.log(sigma[first - 1 : last]), 1 / rank
    slope, intercept = np.polyfit(log_rank, log_variance, 1, w=np.sqrt(weights))
    residual = weights @ np.square(log_variance - intercept - slope * log_rank)
    total = weights @ np.square(log_variance - np.average(log_variance, weights=weights))
    r_squared = 1 - residual / total if total > 0 else 0.0
    return PowerLaw(float(-slope), float(r_squared), first, last)
