"""Recoverability: how much of what a teacher layer adds to a student layer is out of a linear map's reach.

For a student s and a later teacher t of the same shape the increment is `x_t - x_s`, token by token. A ridge
regression predicts it from the student's token. The gap is the share of the increment's variance that the prediction
misses on samples it was not fitted on: 0 where the teacher is a linear function of the student, 1 where the student's
token tells nothing. A layer that is linearly recoverable has little to teach.

Everything follows from the first two moments of all layers' tokens side by side. `TokenMoments` collects them in one
pass over the data, whatever the batches; `recoverability` then solves all pairs and all penalties in closed form.
Moments belong to one noise level, or one band of them.

Source: RARE (2026), where over forks of one checkpoint this gap went with the benefit of alignment far better than
probes or CKA did; it has external teachers. Here the teacher is a later layer, and one whitening is shared by all
layers, so that a difference of layers stays one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from layerprobe.analyses.measures.arrays import Features, Floats, centered, checked

SPLITS = ("train", "validation", "test")
PENALTIES = tuple(float(p) for p in 10.0 ** np.arange(-8, 4))

_MAX_ROWS = 4096  # tokens that are widened to float64 together
_MAX_SIZE = 8192  # layers times width: 1.6 GB of moments
_NEGLIGIBLE = 1e-12  # of a variance: what is below is rounding error


class TokenMoments:
    """First and second moments of the tokens of several layers side by side, split by split; updated with batches.

    Memory is three matrices of `(layers * r)^2` in float64, whatever the number of tokens, r being the width or the
    number of columns of `basis`: 25 MB for 8 layers of 128, 308 MB for 28 layers of 128.

    Args:
        layers: Names, in the order in which the layers run.
        basis: Shape (D, r), from `shared_basis`, to keep wide layers in memory; None keeps the tokens as they are,
            which is exact.

    Raises:
        ValueError: If there are fewer than two layers, or one stands twice.
    """

    def __init__(self, layers: Sequence[str], *, basis: Floats | None = None) -> None:
        if len(layers) < 2 or len(set(layers)) < len(layers):
            raise ValueError(f"the layers are {', '.join(layers)}; pass two or more different ones")
        self.layers = tuple(layers)
        self.basis = basis
        self.counts = dict.fromkeys(SPLITS, 0)
        self._shift: Floats | None = None  # (layers, D): the first token of any split
        self._sums: dict[str, Floats] = {}  # (layers * r,)
        self._products: dict[str, Floats] = {}  # (layers * r, layers * r)
        self._first: list[Features] = []  # of the training split, one token (D,) per layer
        self._constant = np.ones(len(layers), np.bool_)

    @property
    def width(self) -> int:
        """Directions that are kept of each layer's tokens; 0 before the first update."""
        if self.basis is not None:
            return int(self.basis.shape[1])
        return 0 if self._shift is None else int(self._shift.shape[1])

    def update(self, split: str, tokens: Sequence[Features]) -> None:
        """Adds a batch.

        Args:
            split: "train", "validation" or "test"; a sample belongs to one split only.
            tokens: One array per layer of the same tokens in the same order, shape (n, T, D) or (N, D).

        Raises:
            ValueError: If the split is unknown, tokens are not finite, layers differ in shape, or their moments would
                not fit into memory without a basis.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
        flat = self._flat(tokens)
        if self._shift is None:
            # Any point near the tokens will do: products of what is left of a large offset would drown the rest.
            self._shift = np.stack([x[0].astype(np.float64) for x in flat])
        if split == "train":
            self._first = self._first or [x[0].copy() for x in flat]
            self._constant &= [bool((x == first).all()) for x, first in zip(flat, self._first, strict=True)]
        size = len(self.layers) * self.width
        if size > _MAX_SIZE:
            need = f"{len(self.layers)} layers of width {self.width} need {3 * 8e-9 * size**2:.0f} GB of moments"
            raise ValueError(f"{need}; pass basis=shared_basis(tokens, rank={min(128, _MAX_SIZE // len(self.layers))})")
        self._sums.setdefault(split, np.zeros(size))
        self._products.setdefault(split, np.zeros((size, size)))
        for start in range(0, len(flat[0]), _MAX_ROWS):
            rows = self._rows([x[start : start + _MAX_ROWS] for x in flat])
            self._sums[split] += rows.sum(axis=0)
            self._products[split] += rows.T @ rows
        self.counts[split] += len(flat[0])

    def moments(self, split: str) -> tuple[Floats, Floats]:
        """Mean (layers, r) and second moment about the training split's mean (layers, r, layers, r) of a split's tokens.

        Raises:
            ValueError: If the split has no tokens, or the training split has none.
        """
        for needed in ("train", split):
            if not self.counts[needed]:
                raise ValueError(f"no tokens of the split {needed!r} were added; add {', '.join(SPLITS)}")
        center = self._sums["train"] / self.counts["train"]
        mean = self._sums[split] / self.counts[split]
        second = self._products[split] / self.counts[split]
        second = second - np.outer(mean, mean) + np.outer(mean - center, mean - center)
        shape = (len(self.layers), self.width)
        return mean.reshape(shape), second.reshape(shape * 2)

    @property
    def constant(self) -> tuple[bool, ...]:
        """For each layer, whether all tokens of the training split so far are the same."""
        return tuple(self._constant.tolist())

    def _flat(self, tokens: Sequence[Features]) -> list[Features]:
        if len(tokens) != len(self.layers):
            raise ValueError(f"{len(tokens)} arrays for {len(self.layers)} layers; pass one per layer")
        flat = [x.reshape(-1, x.shape[-1]) for x in tokens]
        first = flat[0].shape if self._shift is None else (len(flat[0]), self._shift.shape[1])
        for layer, x in zip(self.layers, flat, strict=True):
            checked(x, f"tokens of {layer}")
            if x.shape != first:
                seen = f"tokens of {layer} have shape {x.shape}, those before {first}"
                raise ValueError(f"{seen}; an increment needs equal shapes: pass the layers of one stage")
        if self.basis is not None and self.basis.shape[0] != first[1]:
            seen = f"the basis is for width {self.basis.shape[0]}, the tokens have {first[1]}"
            raise ValueError(f"{seen}; make it from these layers")
        return flat

    def _rows(self, parts: Sequence[Features]) -> Floats:
        assert self._shift is not None
        rows = np.empty((len(parts[0]), len(parts), self.width))
        for i, (x, shift) in enumerate(zip(parts, self._shift, strict=True)):
            wide = x.astype(np.float64) - shift
            rows[:, i] = wide if self.basis is None else wide @ self.basis
        return rows.reshape(len(rows), -1)


@dataclass(frozen=True, eq=False)
class Recoverability:
    """The gap of every student and every later teacher: arrays are [student, teacher], nan where there is no answer.

    Attributes:
        layers: Names, in the order in which the layers run.
        gap: Share of the increment's variance that the ridge misses on the test split, shape (L, L). 0: a linear map
            of the student's token gives it all; 1: no better than its mean; above 1: worse.
        validation_gap: The same on the split that chose the penalty, and may choose layers.
        increment: Variance of the increment over that of the teacher, on the test split: how much there is to learn.
        penalty: Ridge penalty that was best on the validation split, in units of the student's mean variance per
            direction; of equals the largest.
        reasons: Why a pair has no answer, or "", L tuples of L.
        num_tokens: Tokens of each split.
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
    """The recoverability gap of all pairs, from moments alone.

    Args:
        statistics: Moments of one noise level or band, with tokens of all three splits.
        penalties: Ridge penalties to choose from, positive, in units of the student's mean variance per direction.
        whiten: Measure in coordinates where the layers have unit covariance on average on the training split (each layer
            weighs the same), so that every direction counts and a few massive channels do not decide. Otherwise in the
            tokens' own coordinates, where large channels count more, as they do in a cosine.

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
    for s in range(num):
        student = None if statistics.constant[s] else _Student(moments, s)
        for t in range(num):
            reasons[s][t] = reason = _objection(moments, statistics.constant, s, t)
            if reason or student is None:
                continue
            candidates = np.sort(np.asarray(penalties, np.float64))[::-1]
            choose = student.gaps("validation", t, candidates)
            best = int(np.argmin(choose))
            penalty[s, t], validation_gap[s, t] = candidates[best], choose[best]
            gap[s, t] = student.gaps("test", t, candidates[best : best + 1])[0]
            teacher = np.trace(moments["test"][t, :, t])
            increment[s, t] = student.variance("test", t) / teacher
    counts = dict(statistics.counts)
    return Recoverability(
        statistics.layers, gap, validation_gap, increment, penalty, tuple(tuple(r) for r in reasons), counts
    )


def shared_basis(tokens: Sequence[Features], *, rank: int = 128) -> Floats:
    """The directions in which the layers vary most on average, shape (D, min(rank, D)), orthonormal.

    One basis for all layers, every layer weighing the same: a difference of layers is still one after it.

    Args:
        tokens: One array per layer, shape (n, T, D) or (N, D), of samples of the training split; a few thousand tokens do.
        rank: Directions to keep; RARE keeps 128.

    Raises:
        ValueError: If tokens are not finite, or layers differ in width.
    """
    total = np.zeros((1, 1))
    for x in tokens:
        wide = centered(checked(x.reshape(-1, x.shape[-1]), "tokens"))
        if len(total) > 1 and len(total) != wide.shape[1]:
            raise ValueError(f"layers have widths {len(total)} and {wide.shape[1]}; pass the layers of one stage")
        total = total + _unit_trace(wide.T @ wide)
    axes = np.linalg.eigh(total)[1]
    return np.ascontiguousarray(axes[:, ::-1][:, :rank])


def missed_by_sample(layers: Sequence[str], tokens: Mapping[str, Sequence[Features]]) -> tuple[Floats, Floats]:
    """What each judged sample adds to the gap: the ratio of the two sums is the gap of `recoverability`.

    Args:
        layers: L names.
        tokens: Of each split, one array (n, T, D) per layer; the test split is judged.

    Returns:
        For each student, teacher and sample of the test split the squared error of the ridge regression and the
        square of the increment, both in whitened coordinates, shape (L, L, n); nan where there is no answer.
    """
    moments = TokenMoments(layers)
    for split in SPLITS:
        moments.update(split, tokens[split])
    penalty = recoverability(moments).penalty
    maps = _whitening(moments.moments("train")[1])
    centers = [x.mean((0, 1), dtype=np.float64) for x in tokens["train"]]
    fitted, judged = (
        [(x - center) @ maps for x, center in zip(tokens[split], centers, strict=True)] for split in ("train", "test")
    )
    num, n = len(layers), len(judged[0])
    missed, increment = np.full((2, num, num, n), np.nan)
    for s in range(num):
        x = fitted[s].reshape(-1, maps.shape[1])
        covariance = x.T @ x / len(x)
        ridge = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        for t in np.flatnonzero(np.isfinite(penalty[s])):
            cross = x.T @ (fitted[t] - fitted[s]).reshape(x.shape) / len(x)
            wanted = judged[t] - judged[s]
            error = wanted - judged[s] @ np.linalg.solve(covariance + penalty[s, t] * ridge, cross)
            missed[s, t], increment[s, t] = (np.square(y).sum((1, 2)) for y in (error, wanted))
    return missed, increment


class _Student:
    """The ridge regressions from one layer, on the principal axes of its tokens, where every penalty is a division."""

    def __init__(self, moments: dict[str, Floats], s: int) -> None:
        self._moments, self._s = moments, s
        self._variances, self._axes = np.linalg.eigh(moments["train"][s, :, s])
        self._own = {split: self._axes.T @ m[s, :, s] @ self._axes for split, m in moments.items()}

    def variance(self, split: str, t: int) -> float:
        """Of the increment, about its mean on the training split."""
        return float(np.trace(_increment_covariance(self._moments[split], self._s, t)))

    def gaps(self, split: str, t: int, penalties: Floats) -> Floats:
        """Share of the increment's variance that is missed, for each penalty.

        With W = (C + penalty)^-1 C_sy of the training split it is (tr C_yy - 2 tr W^T C_sy + tr W^T C_ss W) / tr C_yy.
        """
        fitted, seen = (self._axes.T @ self._cross(part, t) for part in ("train", split))
        linear = (fitted * seen).sum(axis=1)
        quadratic = self._own[split] * (fitted @ fitted.T)
        inverse = 1 / (self._variances + penalties[:, None] * self._variances.mean())
        total = self.variance(split, t)
        missed = total - 2 * inverse @ linear + np.einsum("pi,ij,pj->p", inverse, quadratic, inverse)
        shares: Floats = np.maximum(missed, 0) / total
        return shares

    def _cross(self, split: str, t: int) -> Floats:
        """Of the student's tokens and the increment, shape (r, r)."""
        second, s = self._moments[split], self._s
        cross: Floats = second[s, :, t] - second[s, :, s]
        return cross


def _increment_covariance(second: Floats, s: int, t: int) -> Floats:
    crossed = second[s, :, t]
    covariance: Floats = second[t, :, t] + second[s, :, s] - crossed - crossed.T
    return covariance


def _objection(moments: dict[str, Floats], constant: Sequence[bool], s: int, t: int) -> str:
    if t <= s:
        return "a teacher lies after its student"
    for i, what in ((s, "student"), (t, "teacher")):
        if constant[i]:
            return f"the tokens of the {what} are all the same on the training split"
    for split in SPLITS:
        second = moments[split]
        size = np.trace(second[s, :, s]) + np.trace(second[t, :, t])
        if not np.trace(_increment_covariance(second, s, t)) > _NEGLIGIBLE * size:
            return f"teacher and student differ by a constant on the {split} split: there is no increment"
    return ""


def _mean_covariance(second: Floats) -> Floats:
    """Mean over layers of their covariances, each at trace 1, shape (r, r); constant layers add nothing."""
    mean: Floats = np.mean([_unit_trace(second[i, :, i]) for i in range(len(second))], axis=0)
    return mean


def _unit_trace(covariance: Floats) -> Floats:
    scaled: Floats = covariance / (np.trace(covariance) or 1.0)
    return scaled


def _whitening(second: Floats) -> Floats:
    """Map (r, k) to coordinates in which the layers' mean covariance is 1; directions without variance are dropped."""
    variances, axes = np.linalg.eigh(_mean_covariance(second))
    kept = variances > 1e-10 * variances[-1]
    whitening: Floats = axes[:, kept] / np.sqrt(variances[kept])
    return whitening
