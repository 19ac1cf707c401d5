"""The search for a probe's penalty: four decades of C, and more of them where the choice would lie near an end.

A choice at the end of a grid means that the grid is too short, and the accuracy is then that of the grid. A range that
suits one network does not suit another: the bottleneck of a convolutional DDPM wants a C a million times as large as
the raw input. So the search goes on, decade by decade, until two on either side of the choice are no better. With one
alone, the chance of few validation samples ends a search that has just begun: of layers of this DDPM with 300 training
and 300 validation samples, one lost 25 points of accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from layerprobe.analyses.measures.logistic.fits import ClassWeight, LogisticFit, check_penalties, logistic_path
from layerprobe.analyses.measures.tensors import FeatureMatrix

INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # always tried
STRONGER = (1e-4, 1e-5, 1e-6)  # tried in this order
WEAKER = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)  # tried in this order
PATIENCE = 2  # penalties on either side of the choice that are no better

SearchEnd = Literal["", "strongest", "weakest"]


@dataclass(frozen=True, eq=False)
class ChosenFit:
    """The fit with the penalty of the best score.

    Attributes:
        fit: Chosen fit.
        end: "strongest" or "weakest" if the choice is that of all penalties tried, so that one beyond it may be better;
            "" if it lies between others, or its score is 1.
    """

    fit: LogisticFit
    end: SearchEnd


def choose_fit(
    x: FeatureMatrix,
    y: NDArray[Any],
    score: Callable[[LogisticFit], float],
    *,
    inverse_penalties: Sequence[float] | None = None,
    class_weight: ClassWeight = None,
) -> ChosenFit:
    """Fits one penalty after another and chooses the one with the best score.

    `INVERSE_PENALTIES` are tried first, and of equally good ones the strongest is chosen. While fewer than `PATIENCE`
    penalties on one side of the choice were tried, the next one of `WEAKER` or `STRONGER` is. It is chosen only if it
    is better. After a fit that does not converge, or a score of 1, nothing more is tried.

    Args:
        x: Features, shape (n, D), any float dtype.
        y: Labels, shape (n,).
        score: Score of a fit on samples that it was not fitted on, at most 1; larger is better.
        inverse_penalties: Values of C to choose from, and no others; None for the search.
        class_weight: Weight of the samples of each class, as in `fit_logistic`.

    Raises:
        ValueError: As in `fit_logistic`.
    """
    waiting = sorted(set(INVERSE_PENALTIES if inverse_penalties is None else inverse_penalties))
    check_penalties(waiting)
    path = logistic_path(x, y, weakest=max(waiting), class_weight=class_weight)
    tried: list[float] = []
    chosen, best_score = None, -np.inf
    while waiting:
        fit = path.fit(waiting.pop(0))
        tried.append(fit.inverse_penalty)
        fit_score = score(fit)
        if chosen is None or fit_score > best_score:
            chosen, best_score = fit, fit_score
        if inverse_penalties is None and not waiting and fit.converged and best_score < 1:
            waiting = _next(chosen.inverse_penalty, tried)
    assert chosen is not None
    ends: dict[float, SearchEnd] = {min(tried): "strongest", max(tried): "weakest"}
    is_open = len(tried) > 1 and best_score < 1
    return ChosenFit(chosen, ends.get(chosen.inverse_penalty, "") if is_open else "")


def _next(chosen: float, tried: Sequence[float]) -> list[float]:
    """The next decade on a side of the choice where fewer than `PATIENCE` were tried; none if there is none."""
    sides = {WEAKER: sum(c > chosen for c in tried), STRONGER: sum(c < chosen for c in tried)}
    left = [[c for c in side if c not in tried] for side, num_tried in sides.items() if num_tried < PATIENCE]
    return next((decades[:1] for decades in left if decades), [])
