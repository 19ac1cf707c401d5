"""Ridge probes: regression targets, and a quick screen for labels, with leave-one-out for every penalty at once.

The objective is scikit-learn's: `||T - X W - b||^2 + alpha ||W||^2`, with the bias unpenalised. One decomposition of
the features serves all penalties, and leaving a sample out is a division: its residual over one minus its leverage.

Ridge regression to labels is a screen. It never stands for the accuracy of the logistic probe, which may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprobe.analyses.arrays import Features, Floats, centred, checked

# Of the mean eigenvalue of the centred X^T X.
RELATIVE_PENALTIES = tuple(float(a) for a in np.logspace(-6, 2, 17))


@dataclass(frozen=True, eq=False)
class RidgePath:
    """Ridge regressions of q targets at g penalties.

    Attributes:
        alphas: Shape (g,), as they were given.
        weights: Shape (g, q, D), for the features as they were passed.
        bias: Shape (g, q).
        left_out: What each sample is predicted by the fit without it, shape (g, n, q).
    """

    alphas: Floats
    weights: Floats
    bias: Floats
    left_out: Floats

    def predict(self, x: Features, index: int) -> Floats:
        """Predictions at the penalty of that index, shape (n, q)."""
        predicted: Floats = x.astype(np.float64) @ self.weights[index].T + self.bias[index]
        return predicted


@dataclass(frozen=True, eq=False)
class RidgeScreen:
    """How well a ridge classifier reads labels, by leave-one-out.

    Attributes:
        accuracy: Leave-one-out accuracy at the chosen penalty.
        correct: Per sample, shape (n,), bool.
        alpha: The penalty of the smallest squared leave-one-out error.
        alphas: Shape (g,).
        accuracies: Leave-one-out accuracy at every penalty, shape (g,).
    """

    accuracy: float
    correct: NDArray[np.bool_]
    alpha: float
    alphas: Floats
    accuracies: Floats


@dataclass(frozen=True, eq=False)
class RegressionResult:
    """What a linear probe finds of continuous targets in one representation.

    Attributes:
        choose_r2: Mean over targets of the share of variance explained, at most 1, on the split that chose the penalty.
        report_r2: The same on the split that nothing was chosen on.
        target_r2: Per target on the report split, shape (q,); nan where the target is constant there.
        alpha: The penalty of the best `choose_r2`; of equals the largest.
    """

    choose_r2: float
    report_r2: float
    target_r2: Floats
    alpha: float


def fit_ridge(x: Features, targets: NDArray[Any], *, alphas: Sequence[float] | None = None) -> RidgePath:
    """Ridge regression at all penalties, with closed-form leave-one-out.

    Args:
        x: Features, shape (n, D), any float dtype; computed in float64.
        targets: Shape (n, q).
        alphas: Penalties above 0; None for `RELATIVE_PENALTIES` times the mean eigenvalue of the centred X^T X.

    Raises:
        ValueError: If x and targets disagree or are not finite, n < 2, or a penalty is not positive.

    Source: leave-one-out from the leverages, Allen 1974 (PRESS).
    """
    targets = _checked_targets(x, targets, "fit")
    if len(x) < 2:
        raise ValueError("1 sample leaves none to fit when it is left out; pass two or more")
    wide, mean = centred(x), x.mean(axis=0, dtype=np.float64)
    basis = None
    if wide.shape[0] < wide.shape[1]:  # The optimum lies in the span of the samples.
        basis, triangle = np.linalg.qr(wide.T)
        wide = triangle.T
    values, axes = np.linalg.eigh(wide.T @ wide)
    values = np.maximum(values, 0.0)
    if alphas is None:
        alphas = [a * (float(values.sum()) / x.shape[1] or 1.0) for a in RELATIVE_PENALTIES]
    if not len(alphas) or min(alphas) <= 0 or not np.isfinite(alphas).all():
        raise ValueError(f"the penalties alpha are {tuple(alphas)}; pass finite numbers above 0")
    coordinates = wide @ axes
    shrinkage = 1 / (values + np.asarray(alphas, np.float64)[:, None])  # (g, r)
    level = targets.mean(axis=0)
    deviations = targets - level
    solved = shrinkage[:, :, None] * (coordinates.T @ deviations)  # (g, r, q)
    leverages = 1 / len(x) + np.square(coordinates) @ shrinkage.T  # (n, g)
    residuals = deviations - coordinates @ solved  # (g, n, q)
    weights = np.swapaxes(solved, 1, 2) @ axes.T
    weights = weights if basis is None else weights @ basis.T
    return RidgePath(
        alphas=np.asarray(alphas, np.float64),
        weights=weights,
        bias=level - weights @ mean,
        left_out=targets - residuals / (1 - leverages.T)[:, :, None],
    )


def ridge_screen(x: Features, y: NDArray[Any], *, alphas: Sequence[float] | None = None) -> RidgeScreen:
    """Leave-one-out accuracy of ridge regression to targets of +-1, one per class (one in all for two classes).

    Equals `sklearn.linear_model.RidgeClassifierCV(alphas)`, in one pass for all penalties.

    Args:
        x: Features, shape (n, D).
        y: Labels, shape (n,), of two classes or more.
        alphas: As in `fit_ridge`.

    Raises:
        ValueError: As `fit_ridge`, or if y has one class.
    """
    classes, indices = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all {len(y)} labels are {classes[0]}; a probe needs two classes or more")
    targets = np.where(np.arange(len(classes)) == indices[:, None], 1.0, -1.0)
    targets = targets[:, 1:] if len(classes) == 2 else targets
    path = fit_ridge(x, targets, alphas=alphas)
    found = path.left_out[:, :, 0] > 0 if len(classes) == 2 else path.left_out.argmax(axis=2)
    correct = found == indices
    best = int(np.square(path.left_out - targets).mean(axis=(1, 2)).argmin())
    return RidgeScreen(
        accuracy=float(correct[best].mean()),
        correct=correct[best],
        alpha=float(path.alphas[best]),
        alphas=path.alphas,
        accuracies=correct.mean(axis=1),
    )


def regression_probe(
    fit_x: Features,
    fit_targets: NDArray[Any],
    choose_x: Features,
    choose_targets: NDArray[Any],
    report_x: Features,
    report_targets: NDArray[Any],
    *,
    alphas: Sequence[float] | None = None,
) -> RegressionResult:
    """How much of continuous targets a linear map reads from features.

    One regression per penalty on the fit split, the best on the choose split, scored once on the report split. R^2 is
    against the mean of the split that is scored; below 0 means worse than that constant.

    Args:
        fit_x: Features, shape (n_fit, D).
        fit_targets: Shape (n_fit, q).
        choose_x: Shape (n_choose, D).
        choose_targets: Shape (n_choose, q).
        report_x: Shape (n_report, D).
        report_targets: Shape (n_report, q).
        alphas: As in `fit_ridge`.

    Raises:
        ValueError: As `fit_ridge`, or if all targets are constant on the choose split.
    """
    path = fit_ridge(fit_x, fit_targets, alphas=alphas)
    choose_targets = _checked_targets(choose_x, choose_targets, "choose")
    report_targets = _checked_targets(report_x, report_targets, "report")
    if (choose_targets == choose_targets[:1]).all():
        raise ValueError("the targets of the choose split are constant; no penalty can be chosen on them")
    strongest_first = np.argsort(-path.alphas)
    r2 = np.array([np.nanmean(_r2(path.predict(choose_x, index), choose_targets)) for index in strongest_first])
    best = int(strongest_first[r2.argmax()])
    target_r2 = _r2(path.predict(report_x, best), report_targets)
    known = target_r2[np.isfinite(target_r2)]
    return RegressionResult(
        choose_r2=float(r2.max()),
        report_r2=float(known.mean()) if len(known) else float("nan"),
        target_r2=target_r2,
        alpha=float(path.alphas[best]),
    )


def _checked_targets(x: Features, targets: NDArray[Any], split: str) -> Floats:
    checked(x, f"features of the {split} split")
    targets = np.asarray(targets, np.float64)
    if targets.ndim != 2 or len(targets) != len(x):
        raise ValueError(f"the {split} split has {len(x)} samples but targets of shape {targets.shape}; pass (n, q)")
    return checked(targets, f"targets of the {split} split")


def _r2(predicted: Floats, targets: Floats) -> Floats:
    """Share of variance explained, per target; nan where there is none."""
    total = np.square(centred(targets)).sum(axis=0)
    varies = (targets != targets[:1]).any(axis=0)
    error = np.square(targets - predicted).sum(axis=0)
    return np.where(varies, 1 - error / np.where(varies, total, 1), np.nan)
