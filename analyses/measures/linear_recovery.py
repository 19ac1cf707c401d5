"""Recoverability: how much of what a teacher layer adds to a student layer a linear map cannot predict.

For a student s and a later teacher t of the same shape the increment is `x_t - x_s`, token by token. A ridge
regression predicts it from the student's token. The gap is the share of the increment's variance that the prediction
misses on samples it was not fitted on: 0 if the teacher is a linear function of the student, 1 if the student's token
does not help. A layer that is linearly recoverable has little to teach.

Everything follows from the first two moments of all layers' tokens side by side. `TokenMoments` collects them in one
pass over the data, whatever the batches; `recoverability` then solves all pairs and all penalties in closed form.
scikit-learn's `Ridge` would need the tokens of every pair in memory, and many times as long. Moments belong to one
noise level, or to one band of them.

Source: RARE (2026), where this gap predicted the benefit of alignment over forks of one checkpoint far better than
probes or CKA did; it has external teachers. Here the teacher is a later layer, and one whitening is shared by all
layers, so that a difference of layers remains one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from layerprobe.analyses.measures.arrays import NEGLIGIBLE, SPLITS, Features, Floats
from layerprobe.analyses.measures.token_moments import TokenMoments, unit_trace

PENALTIES = tuple(float(p) for p in 10.0 ** np.arange(-8, 4))


@dataclass(frozen=True, eq=False)
class Recoverability:
    """The gap of every student and every later teacher: arrays are [student, teacher], nan if there is no result.

    Attributes:
        layers: Names of the layers, in the order in which they run.
        gap: Share of the increment's variance that the ridge misses on the test split, shape (L, L). 0 means that a
            linear map of the student's token predicts all of it, 1 no better than its mean, above 1 worse than that.
        validation_gap: The same on the split that chose the penalty, and may choose layers.
        increment: Variance of the increment over that of the teacher on the test split: how much there is to learn.
        penalty: Ridge penalty that was best on the validation split, in units of the student's mean variance per
            direction; of equally good ones the largest.
        reasons: Why each pair has no result, or "", L tuples of L strings.
        num_tokens: Number of tokens of each split.
    """

    layers: tuple[str, ...]
    gap: Floats = field(repr=False)
    validation_gap: Floats = field(repr=False)
    increment: Floats = field(repr=False)
    penalty: Floats = field(repr=False)
    reasons: tuple[tuple[str, ...], ...] = field(repr=False)
    num_tokens: dict[str, int]


def recoverability(
    statistics: TokenMoments, *, penalties: Sequence[float] = PENALTIES, whiten: bool = True
) -> Recoverability:
    """Computes the recoverability gap of all pairs from moments alone.

    Args:
        statistics: Moments of one noise level or band, with tokens of all three splits.
        penalties: Ridge penalties to choose from, positive, in units of the student's mean variance per direction.
        whiten: Whether to measure in coordinates where the layers have unit covariance on average on the training
            split (each layer with the same weight), so that every direction counts and a few massive channels do not
            decide. Otherwise the tokens' own coordinates are used, where large channels count more, as in a cosine.

    Raises:
        ValueError: If a split has no tokens, or a penalty is not positive.
    """
    if not penalties or min(penalties) <= 0 or not np.isfinite(penalties).all():
        raise ValueError(f"the penalties are {tuple(penalties)}; pass finite numbers above 0")
    moments = {split: statistics.moments(split)[1] for split in SPLITS}
    if whiten:
        maps = _whitening(moments["train"])
        moments = {split: np.einsum("arbs,rk,sl->akbl", m, maps, maps, optimize=True) for split, m in moments.items()}
    num = len(statistics.layers)
    gap, validation_gap, increment, penalty = (np.full((num, num), np.nan) for _ in range(4))
    reasons = [["" for _ in range(num)] for _ in range(num)]
    candidates = np.sort(np.asarray(penalties, np.float64))[::-1]
    for s in range(num):
        student = None if statistics.constant[s] else _Student(moments, s)
        for t in range(num):
            reasons[s][t] = reason = _reason(moments, statistics.constant, s, t)
            if reason or student is None:
                continue
            validation_gaps = student.gaps("validation", t, candidates)
            best = int(np.argmin(validation_gaps))
            penalty[s, t], validation_gap[s, t] = candidates[best], validation_gaps[best]
            gap[s, t] = student.gaps("test", t, candidates[best : best + 1])[0]
            increment[s, t] = student.variance("test", t) / np.trace(moments["test"][t, :, t])
    counts = dict(statistics.counts)
    return Recoverability(
        statistics.layers, gap, validation_gap, increment, penalty, tuple(tuple(r) for r in reasons), counts
    )


def missed_by_sample(layers: Sequence[str], tokens: Mapping[str, Sequence[Features]]) -> tuple[Floats, Floats]:
    """Computes each test sample's terms of the gap: the ratio of the two sums is the gap of `recoverability`.

    Args:
        layers: Names of the L layers.
        tokens: Tokens of each split, one array (n, T, D) per layer.

    Returns:
        For each student, teacher and sample of the test split the squared error of the ridge regression and the
        squared norm of the increment, both in whitened coordinates, shape (L, L, n); nan if there is no result.
    """
    moments = TokenMoments(layers)
    for split in SPLITS:
        moments.update(split, tokens[split])
    penalty = recoverability(moments).penalty
    maps = _whitening(moments.moments("train")[1])
    centers = [x.mean((0, 1), dtype=np.float64) for x in tokens["train"]]
    train, test = (
        [(x - center) @ maps for x, center in zip(tokens[split], centers, strict=True)] for split in ("train", "test")
    )
    num, n = len(layers), len(test[0])
    missed, increments = np.full((2, num, num, n), np.nan)
    for s in range(num):
        x = train[s].reshape(-1, maps.shape[1])
        covariance = x.T @ x / len(x)
        ridge = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        for t in np.flatnonzero(np.isfinite(penalty[s])):
            cross = x.T @ (train[t] - train[s]).reshape(x.shape) / len(x)
            increment = test[t] - test[s]
            error = increment - test[s] @ np.linalg.solve(covariance + penalty[s, t] * ridge, cross)
            missed[s, t], increments[s, t] = (np.square(y).sum((1, 2)) for y in (error, increment))
    return missed, increments


class _Student:
    """The ridge regressions from one layer, on the principal axes of its tokens, where every penalty is a division."""

    def __init__(self, moments: dict[str, Floats], s: int) -> None:
        self._moments, self._s = moments, s
        self._variances, self._axes = np.linalg.eigh(moments["train"][s, :, s])
        self._covariances = {split: self._axes.T @ m[s, :, s] @ self._axes for split, m in moments.items()}

    def variance(self, split: str, t: int) -> float:
        """Variance of the increment about its mean on the training split."""
        return float(np.trace(_increment_covariance(self._moments[split], self._s, t)))

    def gaps(self, split: str, t: int, penalties: Floats) -> Floats:
        """Share of the increment's variance that is missed, for each penalty.

        With W = (C + penalty)^-1 C_sy of the training split it is (tr C_yy - 2 tr W^T C_sy + tr W^T C_ss W) / tr C_yy.
        """
        train_cross, split_cross = (self._axes.T @ self._cross_covariance(name, t) for name in ("train", split))
        linear = (train_cross * split_cross).sum(axis=1)
        quadratic = self._covariances[split] * (train_cross @ train_cross.T)
        inverse = 1 / (self._variances + penalties[:, None] * self._variances.mean())
        total = self.variance(split, t)
        missed = total - 2 * inverse @ linear + np.einsum("pi,ij,pj->p", inverse, quadratic, inverse)
        shares: Floats = np.maximum(missed, 0) / total
        return shares

    def _cross_covariance(self, split: str, t: int) -> Floats:
        """Cross-covariance of the student's tokens and the increment, shape (r, r)."""
        second, s = self._moments[split], self._s
        cross: Floats = second[s, :, t] - second[s, :, s]
        return cross


def _increment_covariance(second: Floats, s: int, t: int) -> Floats:
    cross = second[s, :, t]
    covariance: Floats = second[t, :, t] + second[s, :, s] - cross - cross.T
    return covariance


def _reason(moments: dict[str, Floats], constant: Sequence[bool], s: int, t: int) -> str:
    """Why a pair has no gap, or ""."""
    if t <= s:
        return "a teacher lies after its student"
    for i, role in ((s, "student"), (t, "teacher")):
        if constant[i]:
            return f"the tokens of the {role} are all the same on the training split"
    for split in SPLITS:
        second = moments[split]
        size = np.trace(second[s, :, s]) + np.trace(second[t, :, t])
        if not np.trace(_increment_covariance(second, s, t)) > NEGLIGIBLE * size:
            return f"teacher and student differ by a constant on the {split} split: there is no increment"
    return ""


def _whitening(second: Floats) -> Floats:
    """Map (r, k) to coordinates in which the layers' mean covariance is 1; directions without variance are dropped.

    Each layer's covariance has trace 1 in the mean, and constant layers add nothing.
    """
    mean_covariance = np.mean([unit_trace(second[i, :, i]) for i in range(len(second))], axis=0)
    variances, axes = np.linalg.eigh(mean_covariance)
    has_variance = variances > 1e-10 * variances[-1]
    whitening: Floats = axes[:, has_variance] / np.sqrt(variances[has_variance])
    return whitening
