"""Dense linear probes: what a linear classifier reads from each token, scored pixel by pixel.

Tokens (n, T, D) stand on a grid, labels (n, *size) on a finer or equal one with as many axes: segmentation masks of
images (height, width), labels per frame of audio or motion (frames,), masks of video. Tokens learn the class that
holds most of their area; their logits are then interpolated linearly to the size of the labels and scored there.

Source: the protocol of LayerSync's VOC probe and of DINOv2's linear segmentation (one linear layer on tokens, logits
upsampled bilinearly), with the classifier at its true optimum instead of after some steps of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprobe.analyses.measures.arrays import Features, Floats, centered, checked
from layerprobe.analyses.measures.linear_probes import INVERSE_PENALTIES, LogisticFit, fit_logistic_path

Labels = NDArray[Any]

_BATCH = 16  # samples whose logits are interpolated together


@dataclass(frozen=True, eq=False)
class SegmentationScore:
    """Predicted against true classes, pixel by pixel.

    Attributes:
        classes: The K classes, ascending.
        confusions: Pixels per sample, true class and predicted class, shape (n, K, K); ignored pixels are not counted.
    """

    classes: NDArray[Any]
    confusions: NDArray[np.int64] = field(repr=False)

    @property
    def iou(self) -> Floats:
        """Intersection over union of each class over all samples, shape (K,), in [0, 1].

        nan for a class that neither occurs nor is predicted.
        """
        total = self.confusions.sum(axis=0)
        union = total.sum(axis=0) + total.sum(axis=1) - np.diag(total)
        iou: Floats = np.divide(np.diag(total), union, out=np.full(len(total), np.nan), where=union > 0)
        return iou

    @property
    def mean_iou(self) -> float:
        """mIoU: mean of `iou` over the classes that have one."""
        return float(np.nanmean(self.iou))

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of all pixels that are right."""
        total = self.confusions.sum(axis=0)
        return float(np.trace(total) / total.sum())


@dataclass(frozen=True, eq=False)
class DenseProbeResult:
    """What a linear classifier finds in each token.

    Attributes:
        validation: Score on the split that chose the penalty (and chooses layers).
        test: Score on the split that nothing was chosen on.
        ceiling: Score on the test split of the tokens' own majority labels, interpolated in the same way: what the
            grid allows at best, roughly.
        inverse_penalty: The C of the best mIoU on the validation split; of equals the smallest.
        gradient_norm: Of the chosen fit.
        converged: Whether the chosen fit converged.
    """

    validation: SegmentationScore
    test: SegmentationScore
    ceiling: SegmentationScore
    inverse_penalty: float
    gradient_norm: float
    converged: bool


def dense_probe(
    tokens: Mapping[str, Features],
    labels: Mapping[str, Labels],
    grid: Sequence[int],
    *,
    ignore: int | None = None,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
) -> DenseProbeResult:
    """How well a linear classifier reads the label of every pixel from its token.

    As in `linear_probe`, each channel is divided by its standard deviation on the training split, one classifier per
    penalty is fitted there, the validation split picks one and the test split is only scored. Tokens without a label
    are left out of the fit.

    Args:
        tokens: For each of "train", "validation" and "test", shape (n, T, D), any float dtype; computed in float64.
        labels: For each split, integers of shape (n, *size); size has as many axes as the grid.
        grid: Cells along each axis, of product T.
        ignore: A label that is not scored, such as 11, the void of CamVid.
        inverse_penalties: Values of C to choose from.

    Raises:
        ValueError: If a split is missing, arrays do not fit together, tokens are not finite, or fewer than two classes
            are left to learn.
    """
    for split in ("train", "validation", "test"):
        _check(split, tokens, labels, grid)
    classes = _classes(labels.values(), ignore)
    shares = area_shares(labels["train"], classes, grid).reshape(-1, len(classes))
    seen = shares.any(axis=1)
    train_x = tokens["train"].reshape(-1, tokens["train"].shape[2])
    mean, scale = _standardization(train_x)
    x = (train_x[seen] - mean) / scale
    fits = fit_logistic_path(x, classes[shares[seen].argmax(axis=1)], sorted(inverse_penalties))

    def score(fit: LogisticFit, split: str) -> SegmentationScore:
        def logits(part: slice) -> Floats:
            rows = (tokens[split][part] - mean) / scale
            return _on_all_classes(rows @ fit.weights.T + fit.bias, fit.classes, classes)

        return _scored(logits, labels[split], classes, grid)

    chosen = [score(fit, "validation") for fit in fits]
    best = int(np.argmax([result.mean_iou for result in chosen]))
    return DenseProbeResult(
        validation=chosen[best],
        test=score(fits[best], "test"),
        ceiling=_ceiling(labels["test"], classes, grid),
        inverse_penalty=fits[best].inverse_penalty,
        gradient_norm=fits[best].gradient_norm,
        converged=fits[best].converged,
    )


def area_shares(labels: Labels, classes: NDArray[Any], grid: Sequence[int]) -> Floats:
    """Share of each token's area that each class holds, shape (n, T, K); the rest of 1 is ignored area.

    Tokens are the cells that divide the labels' axes evenly; pixels on a border count for both sides by their parts.

    Args:
        labels: Shape (n, *size).
        classes: The K classes to tell apart.
        grid: Cells along each axis.
    """
    maps = [_overlap(cells, size) for cells, size in zip(grid, labels.shape[1:], strict=True)]
    shares = np.stack([_along_axes(labels == label, maps) for label in classes], axis=-1)
    flat: Floats = shares.reshape(len(labels), -1, len(classes))
    return flat


def interpolated(values: Floats, size: Sequence[int]) -> Floats:
    """Values on a grid, linearly interpolated along every axis to another size, shape (n, *size, K).

    Pixel centers are half a pixel from the border, and the outermost values are held: what torch calls "bilinear" with
    align_corners False, for any number of axes.

    Args:
        values: Shape (n, *grid, K).
        size: Wanted number of points along each axis.
    """
    maps = [_linear(target, cells) for target, cells in zip(size, values.shape[1:-1], strict=True)]
    return _along_axes(values, maps)


def _check(split: str, tokens: Mapping[str, Features], labels: Mapping[str, Labels], grid: Sequence[int]) -> None:
    if split not in tokens or split not in labels:
        raise ValueError(f"no tokens or labels of the split {split!r}; pass train, validation and test")
    x, y = tokens[split], labels[split]
    if x.ndim != 3 or x.shape[1] != np.prod(grid):
        raise ValueError(f"tokens of the {split} split have shape {x.shape}, the grid {tuple(grid)}; pass (n, T, D)")
    checked(x.reshape(-1, x.shape[2]), f"tokens of the {split} split")
    if y.ndim != 1 + len(grid) or len(y) != len(x):
        seen = f"labels of the {split} split have shape {y.shape} for {len(x)} samples on a grid {tuple(grid)}"
        raise ValueError(f"{seen}; pass (n, *size) with as many axes as the grid")


def _classes(labels: Any, ignore: int | None) -> NDArray[Any]:
    found = np.unique(np.concatenate([np.unique(y) for y in labels]))
    return found if ignore is None else found[found != ignore]


def _standardization(x: Features) -> tuple[Floats, Floats]:
    scale = np.sqrt(np.square(centered(x)).mean(axis=0))
    # Not `scale == 0`: the standard deviation of equal numbers is rounding error.
    scale[(x == x[:1]).all(axis=0)] = 1.0
    return x.mean(axis=0, dtype=np.float64), scale


def _on_all_classes(logits: Floats, known: NDArray[Any], classes: NDArray[Any]) -> Floats:
    """Logits of the classes that the training split has, among all; the others are never the largest."""
    wide = np.full((*logits.shape[:-1], len(classes)), logits.min() - 1)
    wide[..., np.searchsorted(classes, known)] = logits
    return wide


def _ceiling(labels: Labels, classes: NDArray[Any], grid: Sequence[int]) -> SegmentationScore:
    def votes(part: slice) -> Floats:
        shares = area_shares(labels[part], classes, grid)
        won: Floats = np.eye(len(classes))[shares.argmax(axis=-1)] * shares.any(axis=-1, keepdims=True)
        return won

    return _scored(votes, labels, classes, grid)


def _scored(
    logits: Callable[[slice], Floats], labels: Labels, classes: NDArray[Any], grid: Sequence[int]
) -> SegmentationScore:
    """Scores logits (n, T, K), asked for by slices of samples, at the size of the labels."""
    num, size = len(classes), labels.shape[1:]
    confusions = np.zeros((len(labels), num, num), np.int64)
    for start in range(0, len(labels), _BATCH):
        part = slice(start, start + _BATCH)
        values = logits(part)
        predicted = interpolated(values.reshape(len(values), *grid, num), size).argmax(axis=-1)
        for i, (truth, found) in enumerate(zip(labels[part], predicted, strict=True), start):
            scored = np.isin(truth, classes)
            pairs = np.searchsorted(classes, truth[scored]) * num + found[scored]
            confusions[i] = np.bincount(pairs, minlength=num * num).reshape(num, num)
    return SegmentationScore(classes, confusions)


def _along_axes(values: NDArray[Any], maps: Sequence[Floats]) -> Floats:
    """Applies one matrix (out, in) to each axis after the first; what lies behind them stays."""
    result: Floats = values.astype(np.float64)
    for axis, matrix in enumerate(maps, 1):
        result = np.moveaxis(np.tensordot(matrix, result, axes=(1, axis)), 0, axis)
    return result


def _overlap(cells: int, size: int) -> Floats:
    """Share of cell i's length that pixel j covers, shape (cells, size); rows sum to 1."""
    starts, pixels = np.arange(cells)[:, None] * size / cells, np.arange(size)
    covered = np.minimum(starts + size / cells, pixels + 1) - np.maximum(starts, pixels)
    overlap: Floats = np.maximum(covered, 0) * cells / size
    return overlap


def _linear(target: int, cells: int) -> Floats:
    """Weights of linear interpolation from `cells` to `target` points, shape (target, cells); rows sum to 1."""
    where = np.clip((np.arange(target) + 0.5) * cells / target - 0.5, 0, cells - 1)
    weights: Floats = np.maximum(1 - np.abs(where[:, None] - np.arange(cells)), 0)
    return weights
