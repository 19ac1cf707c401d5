"""Dense linear probes: what a linear classifier predicts from each token, scored pixel by pixel.

Tokens (n, T, D) lie on a grid, labels (n, *size) on a finer or equal one with as many axes: segmentation masks of
images (height, width), labels per frame of audio or motion (frames,), masks of video. Each token learns the class
that covers most of its area; the logits are then interpolated linearly to the size of the labels and scored there.

Confusions are counted here for each sample, which intervals need; scikit-learn's `confusion_matrix` takes three
times as long. Interpolation is that of torch, for any number of axes.

Source: the protocol of LayerSync's VOC probe and of DINOv2's linear segmentation (one linear layer on tokens, logits
upsampled bilinearly), with the classifier at its true optimum instead of after some steps of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from layerprobe.analyses.measures.arrays import SPLITS, Features, Floats, checked
from layerprobe.analyses.measures.logistic.fits import LogisticFit
from layerprobe.analyses.measures.logistic.search import SearchEnd, choose_fit

Labels = NDArray[Any]

_BATCH_SAMPLES = 16  # samples whose logits are interpolated together


@dataclass(frozen=True, eq=False)
class SegmentationScore:
    """Counts of predicted against true classes, pixel by pixel.

    Attributes:
        classes: The K classes in ascending order.
        confusions: Number of pixels by sample, true class and predicted class, shape (n, K, K); ignored pixels are
            not counted.
    """

    classes: NDArray[Any]
    confusions: NDArray[np.int64] = field(repr=False)

    @property
    def iou(self) -> Floats:
        """Intersection over union of each class over all samples, shape (K,), in [0, 1].

        nan for a class that neither occurs nor is predicted.
        """
        confusion = self.confusions.sum(axis=0)
        intersection = np.diag(confusion)
        union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
        iou: Floats = np.divide(intersection, union, out=np.full(len(union), np.nan), where=union > 0)
        return iou

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` (mIoU) over the classes that have one."""
        return float(np.nanmean(self.iou))

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of all pixels that are predicted correctly."""
        confusion = self.confusions.sum(axis=0)
        return float(np.trace(confusion) / confusion.sum())


@dataclass(frozen=True, eq=False)
class DenseProbeResult:
    """Result of a dense linear probe on one layer.

    Attributes:
        validation: Score on the split that chose the penalty (and chooses layers).
        test: Score on the split on which nothing was chosen.
        ceiling: Score on the test split of each token's own majority label, interpolated in the same way: roughly the
            best that the grid allows.
        inverse_penalty: The C with the best mIoU on the validation split, by the search of `choose_fit`.
        search_end: Which end of the search the C lies at, so that one beyond may be better; "" if at none.
        gradient_norm: Gradient norm of the chosen fit.
        converged: Whether the chosen fit converged.
    """

    validation: SegmentationScore
    test: SegmentationScore
    ceiling: SegmentationScore
    inverse_penalty: float
    search_end: SearchEnd
    gradient_norm: float
    converged: bool


def dense_probe(
    tokens: Mapping[str, Features],
    labels: Mapping[str, Labels],
    grid: Sequence[int],
    *,
    ignore: int | None = None,
    inverse_penalties: Sequence[float] | None = None,
) -> DenseProbeResult:
    """Measures how well a linear classifier predicts the label of every pixel from its token.

    As in `linear_probe`, each channel is divided by its standard deviation on the training split, one classifier per
    penalty is fitted there, the validation split chooses one, and the test split is only scored. Tokens without a
    label are left out of the fit.

    Args:
        tokens: Tokens of the splits "train", "validation" and "test", each of shape (n, T, D), any float dtype;
            computed in float64.
        labels: Integer labels of each split, shape (n, *size); size has as many axes as the grid.
        grid: Number of cells along each axis, of product T.
        ignore: Label that is not scored, such as 11, the void of CamVid.
        inverse_penalties: Values of C to choose from, and no others; None for the search of `choose_fit`.

    Raises:
        ValueError: If a split is missing, arrays do not fit together, tokens are not finite, or fewer than two classes
            are left to learn.
    """
    for split in SPLITS:
        _check(split, tokens, labels, grid)
    classes = _classes(labels.values(), ignore)
    shares = area_shares(labels["train"], classes, grid).reshape(-1, len(classes))
    is_labeled = shares.any(axis=1)
    train_x = tokens["train"].reshape(-1, tokens["train"].shape[2]).astype(np.float64)
    scaler = StandardScaler().fit(train_x)

    def score(fit: LogisticFit, split: str) -> SegmentationScore:
        def logits(samples: slice) -> Floats:
            x = (tokens[split][samples] - scaler.mean_) / scaler.scale_
            return _for_all_classes(x @ fit.weights.T + fit.bias, fit.classes, classes)

        return _score(logits, labels[split], classes, grid)

    chosen = choose_fit(
        scaler.transform(train_x[is_labeled]),
        classes[shares[is_labeled].argmax(axis=1)],
        lambda fit: score(fit, "validation").mean_iou,
        inverse_penalties=inverse_penalties,
    )
    return DenseProbeResult(
        validation=score(chosen.fit, "validation"),
        test=score(chosen.fit, "test"),
        ceiling=_ceiling(labels["test"], classes, grid),
        inverse_penalty=chosen.fit.inverse_penalty,
        search_end=chosen.end,
        gradient_norm=chosen.fit.gradient_norm,
        converged=chosen.fit.converged,
    )


def area_shares(labels: Labels, classes: NDArray[Any], grid: Sequence[int]) -> Floats:
    """Computes the share of each token's area that each class covers, shape (n, T, K); the rest is ignored area.

    Tokens are the cells that divide the labels' axes evenly; a pixel on a border counts for both cells in proportion.

    Args:
        labels: Labels, shape (n, *size).
        classes: The K classes to distinguish.
        grid: Number of cells along each axis.
    """
    overlaps = [_overlap(num_cells, size) for num_cells, size in zip(grid, labels.shape[1:], strict=True)]
    shares = np.stack([_along_axes(labels == label, overlaps) for label in classes], axis=-1)
    flat: Floats = shares.reshape(len(labels), -1, len(classes))
    return flat


def interpolated(values: Floats, size: Sequence[int]) -> Floats:
    """Interpolates values on a grid linearly along every axis to another size, shape (n, *size, K).

    Pixel centers are half a pixel from the border, and values outside of the outermost centers are held constant. It
    equals torch's "bilinear" with align_corners False, for any number of axes.

    Args:
        values: Values, shape (n, *grid, K).
        size: New number of points along each axis.
    """
    weights = [_linear(target, num_cells) for target, num_cells in zip(size, values.shape[1:-1], strict=True)]
    return _along_axes(values, weights)


def _check(split: str, tokens: Mapping[str, Features], labels: Mapping[str, Labels], grid: Sequence[int]) -> None:
    if split not in tokens or split not in labels:
        raise ValueError(f"no tokens or labels of the split {split!r}; pass train, validation and test")
    x, y = tokens[split], labels[split]
    if x.ndim != 3 or x.shape[1] != np.prod(grid):
        raise ValueError(f"tokens of the {split} split have shape {x.shape}, the grid {tuple(grid)}; pass (n, T, D)")
    checked(x.reshape(-1, x.shape[2]), f"tokens of the {split} split")
    if y.ndim != 1 + len(grid) or len(y) != len(x):
        shapes = f"labels of the {split} split have shape {y.shape} for {len(x)} samples on a grid {tuple(grid)}"
        raise ValueError(f"{shapes}; pass (n, *size) with as many axes as the grid")


def _classes(labels: Iterable[Labels], ignore: int | None) -> NDArray[Any]:
    classes = np.unique(np.concatenate([np.unique(y) for y in labels]))
    return classes if ignore is None else classes[classes != ignore]


def _for_all_classes(logits: Floats, trained: NDArray[Any], classes: NDArray[Any]) -> Floats:
    """Logits of all classes, where those missing from the training split are never the largest."""
    wide = np.full((*logits.shape[:-1], len(classes)), logits.min() - 1)
    wide[..., np.searchsorted(classes, trained)] = logits
    return wide


def _ceiling(labels: Labels, classes: NDArray[Any], grid: Sequence[int]) -> SegmentationScore:
    def majority(samples: slice) -> Floats:
        shares = area_shares(labels[samples], classes, grid)
        one_hot: Floats = np.eye(len(classes))[shares.argmax(axis=-1)] * shares.any(axis=-1, keepdims=True)
        return one_hot

    return _score(majority, labels, classes, grid)


def _score(
    logits: Callable[[slice], Floats], labels: Labels, classes: NDArray[Any], grid: Sequence[int]
) -> SegmentationScore:
    """Scores logits (n, T, K), which are computed for slices of samples, at the size of the labels."""
    num_classes, size = len(classes), labels.shape[1:]
    confusions = np.zeros((len(labels), num_classes, num_classes), np.int64)
    for start in range(0, len(labels), _BATCH_SAMPLES):
        batch = slice(start, start + _BATCH_SAMPLES)
        values = logits(batch)
        predicted = interpolated(values.reshape(len(values), *grid, num_classes), size).argmax(axis=-1)
        for i, (sample_labels, sample_predicted) in enumerate(zip(labels[batch], predicted, strict=True), start):
            is_scored = np.isin(sample_labels, classes)
            true = np.searchsorted(classes, sample_labels[is_scored])
            pairs = true * num_classes + sample_predicted[is_scored]
            confusions[i] = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    return SegmentationScore(classes, confusions)


def _along_axes(values: NDArray[Any], matrices: Sequence[Floats]) -> Floats:
    """Applies one matrix (out, in) to each axis after the first; further axes stay as they are."""
    result: Floats = values.astype(np.float64)
    for axis, matrix in enumerate(matrices, 1):
        result = np.moveaxis(np.tensordot(matrix, result, axes=(1, axis)), 0, axis)
    return result


def _overlap(num_cells: int, size: int) -> Floats:
    """Share of cell i's length that pixel j covers, shape (num_cells, size); rows sum to 1."""
    starts, pixels = np.arange(num_cells)[:, None] * size / num_cells, np.arange(size)
    covered = np.minimum(starts + size / num_cells, pixels + 1) - np.maximum(starts, pixels)
    overlap: Floats = np.maximum(covered, 0) * num_cells / size
    return overlap


def _linear(target: int, num_cells: int) -> Floats:
    """Weights of linear interpolation from `num_cells` to `target` points, shape (target, num_cells)."""
    positions = np.clip((np.arange(target) + 0.5) * num_cells / target - 0.5, 0, num_cells - 1)
    weights: Floats = np.maximum(1 - np.abs(positions[:, None] - np.arange(num_cells)), 0)
    return weights
