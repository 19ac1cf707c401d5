"""Nearest neighbors: how well the labels of a sample's neighbors in feature space predict its own.

It needs no optimization, so it is the check that a probe's ranking of layers is not the solver's.

Candidates come from float32 products and are ranked by float64 ones; where rounding could have kept a true neighbor
from the candidates, they are looked for again in float64. So the neighbors are those of float64, and of samples at
the same distance the one that stands first in the bank is nearer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.analyses.measures.arrays import Floats
from layerprobe.analyses.measures.tensors import FeatureMatrix, as_tensor, centered, centering

Metric = Literal["cosine", "euclidean"]
NeighborScore = Literal["inner product", "distance"]
TILE_BYTES = 16 * 2**20

# Candidates beyond the k nearest: more of them leave fewer samples for which float32 does not decide.
_SPARE = 16


@dataclass(frozen=True, eq=False)
class KnnResult:
    """What the nearest neighbors predict.

    Attributes:
        accuracy: Fraction correct.
        correct: Per sample, shape (n_query,), bool.
        k: Number of neighbors.
        metric: "cosine" or "euclidean".
    """

    accuracy: float
    correct: NDArray[np.bool_]
    k: int
    metric: Metric


def knn_accuracy(
    bank_x: FeatureMatrix,
    bank_y: NDArray[Any],
    query_x: FeatureMatrix,
    query_y: NDArray[Any],
    *,
    k: int = 10,
    metric: Metric = "cosine",
    temperature: float | None = None,
    tile_bytes: int = TILE_BYTES,
) -> KnnResult:
    """Accuracy of the vote of the k nearest neighbors.

    Without a temperature every neighbor has one vote; of equally common labels the smallest wins, as in
    `sklearn.neighbors.KNeighborsClassifier`. With one, a neighbor has exp(cosine / temperature) votes, as in DINO
    (0.07 and k = 20 there), which is exp(-d^2 / (2 temperature)) of the distance d of two unit vectors; for "euclidean"
    it is the same of distances in units of the bank's root mean square distance from its mean.

    Features are centered on the mean of the bank before cosines are taken: all samples share most of a residual
    stream, and cosines of the raw features are all close to 1. Euclidean distances do not change by it, but keep
    their digits.

    Args:
        bank_x: Features whose labels vote, array or tensor of shape (n_bank, D), any dtype.
        bank_y: Their labels, shape (n_bank,).
        query_x: Features to classify, shape (n_query, D).
        query_y: Their labels, shape (n_query,).
        k: Number of neighbors.
        metric: "cosine" or "euclidean".
        temperature: Of the votes; positive.
        tile_bytes: Memory beside the features in float64 and float32; a tile has at least one query.

    Raises:
        ValueError: If features and labels disagree, bank and queries differ in D, features are not finite, k is not
            in [1, n_bank], the metric is not known or the temperature is not positive.

    Source: Wu et al. 2018 (arXiv:1805.01978) and Caron et al. 2021 (arXiv:2104.14294) for weighted votes.
    """
    bank, queries = _checked(bank_x, bank_y, "bank"), _checked(query_x, query_y, "query")
    if bank.shape[1] != queries.shape[1]:
        widths = f"{bank.shape[1]} features in the bank, {queries.shape[1]} in the queries"
        raise ValueError(f"{widths}; pass the same layer")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric {metric!r} is not known; use 'cosine' or 'euclidean'")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}, but the bank has {len(bank)} samples; pass k between 1 and that")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"the temperature is {temperature}; pass a positive one, or None for equal votes")
    bank, queries = _prepared(bank, queries, metric)
    score: NeighborScore = "inner product" if metric == "cosine" else "distance"
    positions, scores = nearest(bank, queries, k=k, score=score, tile_bytes=tile_bytes)
    classes, targets = np.unique(bank_y, return_inverse=True)
    weights = np.ones(scores.shape) if temperature is None else np.exp((scores - scores[:, :1]) / temperature)
    correct = classes[_winners(targets[positions], weights, len(classes))] == query_y
    return KnnResult(float(correct.mean()), correct, k, metric)


def unit_rows(x: Tensor) -> Tensor:
    """Every sample divided by its norm; zeros stay zeros."""
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norms == 0, 1, norms)


def nearest(
    bank: Tensor, queries: Tensor | None, *, k: int, score: NeighborScore, tile_bytes: int = TILE_BYTES
) -> tuple[NDArray[np.intp], Floats]:
    """The k nearest neighbors of every query, nearest first.

    Args:
        bank: Shape (n_bank, D), float64.
        queries: Shape (n_query, D), float64; None for the bank itself, whose samples are then no neighbors of their
            own.
        k: Number of neighbors.
        score: What orders the neighbors: the largest inner product or the smallest euclidean distance.
        tile_bytes: Memory beside two copies of the features.

    Returns:
        Positions in the bank and scores, both of shape (n_query, k). A score is the inner product, for "distance" less
        half the neighbor's square norm, which is half the square distance but for the sign and the query's own norm.
    """
    search = _Search(bank, score, k, own=queries is None)
    queries = bank if queries is None else queries
    candidates = min(len(bank), k + _SPARE)
    rows = max(1, tile_bytes // max(12 * len(bank), 16 * candidates * bank.shape[1]))
    tiles = [search(queries[start : start + rows], start) for start in range(0, len(queries), rows)]
    positions, scores = (torch.cat(parts).cpu().numpy() for parts in zip(*tiles, strict=True))
    return positions, scores


class _Search:
    """Nearest neighbors in one bank.

    Products give every sample an upper bound of its score, rounding included. The samples with the largest bounds are
    scored one by one; if the k-th best of them beats the bounds of all others, it is settled.
    """

    def __init__(self, bank: Tensor, score: NeighborScore, k: int, *, own: bool) -> None:
        self.bank, self.k, self.own = bank, k, own
        self.squares = bank.square().sum(1)
        self.penalties = self.squares / 2 if score == "distance" else torch.zeros_like(self.squares)
        self._banks: dict[torch.dtype, Tensor] = {}

    def __call__(self, queries: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Positions and scores for queries that, if the bank is its own, stand there from position `first` on."""
        places = torch.arange(first, first + len(queries), device=queries.device)
        positions, scores, settled = self._by_products(queries, places, torch.float32)
        open_rows = torch.nonzero(~settled).flatten()
        if len(open_rows):
            found = self._by_products(queries[open_rows], places[open_rows], torch.float64)
            positions[open_rows], scores[open_rows], settled[open_rows] = found
        everything = torch.arange(len(self.bank), device=queries.device)
        # What is left has more samples at the distance of the k-th neighbor than there are candidates.
        for row in torch.nonzero(~settled).flatten().tolist():
            row = slice(row, row + 1)
            positions[row], scores[row] = self._ranked(queries[row], places[row], everything[None])
        return positions, scores

    def _by_products(self, queries: Tensor, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        slack = _slack(self.bank.shape[1], dtype)
        norms = torch.linalg.vector_norm(queries, dim=1, keepdim=True)
        bounds = torch.cat([queries, slack * norms, torch.ones_like(norms)], dim=1).to(dtype) @ self._bounding(dtype).T
        if self.own:
            bounds[torch.arange(len(places)), places] = -torch.inf
        best, candidates = torch.topk(bounds, min(len(self.bank), self.k + _SPARE))
        positions, scores = self._ranked(queries, places, candidates.sort(dim=1).values)
        complete = candidates.shape[1] == len(self.bank)
        return positions, scores, (scores[:, -1] > best[:, -1].double()) | complete

    def _bounding(self, dtype: torch.dtype) -> Tensor:
        """The bank with two more columns, which add the slack and the penalty to a product."""
        if dtype not in self._banks:
            penalties = self.penalties * (1 - _slack(self.bank.shape[1], dtype))
            self._banks[dtype] = torch.column_stack([self.bank, self.squares.sqrt(), -penalties]).to(dtype)
        return self._banks[dtype]

    def _ranked(self, queries: Tensor, places: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The k best of candidates in ascending order; of equal ones the first."""
        # A sum per pair and no matrix product, whose rounding depends on where in the bank a sample stands.
        scores = (self.bank[candidates] * queries[:, None]).sum(-1) - self.penalties[candidates]
        if self.own:
            scores.masked_fill_(candidates == places[:, None], -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return candidates.gather(1, order[:, : self.k]), scores[:, : self.k]


def _slack(width: int, dtype: torch.dtype) -> float:
    """More than the relative rounding error of a product of this many terms, its factors rounded too."""
    return (width + 8) * torch.finfo(dtype).eps


def _checked(x: FeatureMatrix, y: NDArray[Any], name: str) -> Tensor:
    features = as_tensor(x)
    if y.shape != (len(features),):
        raise ValueError(f"{len(features)} {name} samples but labels of shape {y.shape}; pass one label per sample")
    broken = features.numel() - int(torch.isfinite(features).sum())
    if broken:
        raise ValueError(f"{name} features hold {broken} values that are nan or inf; extract them again in float32")
    return features


def _prepared(bank: Tensor, queries: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Bank and queries minus the mean of the bank, in float64, as `nearest` takes them.

    For "cosine" samples get unit norm (one at the mean stays 0: it has cosine 0 with all), for "euclidean" the bank
    gets mean square norm 1.
    """
    known = centering(bank)
    bank, queries = (centered(x, known.mean, torch.float64) for x in (bank, queries))
    if metric == "cosine":
        return unit_rows(bank), unit_rows(queries)
    scale = known.square_norms.mean().sqrt()
    scale = torch.where(scale > 0, scale, 1)
    return bank / scale, queries / scale


def _winners(labels: NDArray[np.intp], weights: Floats, num_classes: int) -> NDArray[np.intp]:
    rows = np.arange(len(labels))[:, None] * num_classes
    votes = np.bincount((rows + labels).ravel(), weights.ravel(), minlength=len(labels) * num_classes)
    winners: NDArray[np.intp] = votes.reshape(-1, num_classes).argmax(axis=1)
    return winners
