"""Nearest neighbors: how well the labels of a sample's neighbors in feature space predict its own.

The accuracy needs no optimization, so it checks that a probe's ranking of layers is not an artifact of the solver.

Candidates come from float32 products and are ranked by float64 ones; where rounding could have excluded a true
neighbor, the search is repeated in float64. So the neighbors are those of float64, and of samples at the same
distance the one that comes first in the bank counts as nearer. scikit-learn's brute-force search does not define the
order of equal distances, and it does not run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.analyses.measures.arrays import Floats
from layerprobe.analyses.measures.tensors import FeatureMatrix, as_tensor, feature_statistics, subtract_mean

Metric = Literal["cosine", "euclidean"]
NeighborScore = Literal["inner product", "distance"]
TILE_BYTES = 16 * 2**20

# Candidates beyond the k nearest: with more of them, float32 decides for more samples.
_SPARE_CANDIDATES = 16


@dataclass(frozen=True, eq=False)
class KnnResult:
    """Result of predicting labels by nearest neighbors.

    Attributes:
        accuracy: Fraction correct.
        correct: Whether each query was predicted correctly, shape (n_query,), bool.
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
    """Computes the accuracy of the vote of the k nearest neighbors.

    Without a temperature every neighbor has one vote, and of equally common labels the smallest wins, as in
    `sklearn.neighbors.KNeighborsClassifier`. With a temperature, a neighbor has exp(cosine / temperature) votes, as in
    DINO (0.07 and k = 20 there). For unit vectors at distance d that is proportional to
    exp(-d^2 / (2 temperature)), which is the vote for "euclidean", with distances in units of the bank's root mean
    square distance from its mean.

    Features are centered on the mean of the bank before cosines are computed: all samples share most of a residual
    stream, and cosines of the raw features are all close to 1. Centering leaves Euclidean distances as they are and
    improves their accuracy.

    Args:
        bank_x: Features whose labels vote, array or tensor of shape (n_bank, D), any dtype.
        bank_y: Labels of the bank, shape (n_bank,).
        query_x: Features to classify, shape (n_query, D).
        query_y: Labels of the queries, shape (n_query,).
        k: Number of neighbors.
        metric: "cosine" or "euclidean".
        temperature: Temperature of the votes, positive; None for equal votes.
        tile_bytes: Memory in bytes in addition to the features in float64 and float32; a tile has at least one query.

    Raises:
        ValueError: If features and labels disagree, bank and queries differ in D, features are not finite, k is not
            in [1, n_bank], the metric is unknown or the temperature is not positive.

    Source: Wu et al. 2018 (arXiv:1805.01978) and Caron et al. 2021 (arXiv:2104.14294) for weighted votes.
    """
    bank, queries = _checked(bank_x, bank_y, "bank"), _checked(query_x, query_y, "query")
    if bank.shape[1] != queries.shape[1]:
        widths = f"{bank.shape[1]} features in the bank, {queries.shape[1]} in the queries"
        raise ValueError(f"{widths}; pass the same layer")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric {metric!r} is not known; use 'cosine' or 'euclidean'")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}, but the bank has {len(bank)} samples; pass k between 1 and {len(bank)}")
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
    """Divides every sample by its norm; zero vectors stay zero."""
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norms == 0, 1, norms)


def nearest(
    bank: Tensor, queries: Tensor | None, *, k: int, score: NeighborScore, tile_bytes: int = TILE_BYTES
) -> tuple[NDArray[np.intp], Floats]:
    """Finds the k nearest neighbors of every query, nearest first.

    Args:
        bank: Samples to search, shape (n_bank, D), float64.
        queries: Queries, shape (n_query, D), float64; None for the bank itself, where a sample is not its own neighbor.
        k: Number of neighbors.
        score: Order of the neighbors: "inner product" for the largest first, "distance" for the smallest Euclidean
            distance first.
        tile_bytes: Memory in bytes in addition to two copies of the features.

    Returns:
        Positions in the bank and scores, both of shape (n_query, k). The score is the inner product; for "distance",
        half the neighbor's square norm is subtracted, which gives minus half the square distance plus half the
        query's square norm.
    """
    search = _Search(bank, score, k, excludes_self=queries is None)
    queries = bank if queries is None else queries
    num_candidates = min(len(bank), k + _SPARE_CANDIDATES)
    rows = max(1, tile_bytes // max(12 * len(bank), 16 * num_candidates * bank.shape[1]))
    tiles = [search(queries[start : start + rows], start) for start in range(0, len(queries), rows)]
    positions, scores = (torch.cat(parts).cpu().numpy() for parts in zip(*tiles, strict=True))
    return positions, scores


class _Search:
    """Search for nearest neighbors in one bank.

    Products give every sample an upper bound of its score, rounding included. The samples with the largest bounds are
    scored one by one; if the k-th best of them exceeds the bounds of all others, the neighbors are final.
    """

    def __init__(self, bank: Tensor, score: NeighborScore, k: int, *, excludes_self: bool) -> None:
        self.bank, self.k, self.excludes_self = bank, k, excludes_self
        self.squares = bank.square().sum(1)
        self.penalties = self.squares / 2 if score == "distance" else torch.zeros_like(self.squares)
        self._extended_banks: dict[torch.dtype, Tensor] = {}

    def __call__(self, queries: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Returns positions and scores for queries; without self-neighbors, they are the bank's from `start` on."""
        query_positions = torch.arange(start, start + len(queries), device=queries.device)
        positions, scores, is_final = self._by_products(queries, query_positions, torch.float32)
        remaining = torch.nonzero(~is_final).flatten()
        if len(remaining):
            positions[remaining], scores[remaining], is_final[remaining] = self._by_products(
                queries[remaining], query_positions[remaining], torch.float64
            )
        all_positions = torch.arange(len(self.bank), device=queries.device)
        # The remaining queries have more samples at the distance of the k-th neighbor than there are candidates.
        for index in torch.nonzero(~is_final).flatten().tolist():
            row = slice(index, index + 1)
            positions[row], scores[row] = self._ranked(queries[row], query_positions[row], all_positions[None])
        return positions, scores

    def _by_products(
        self, queries: Tensor, query_positions: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        slack = _slack(self.bank.shape[1], dtype)
        norms = torch.linalg.vector_norm(queries, dim=1, keepdim=True)
        extended = torch.cat([queries, slack * norms, torch.ones_like(norms)], dim=1).to(dtype)
        bounds = extended @ self._extended_bank(dtype).T
        if self.excludes_self:
            bounds[torch.arange(len(query_positions)), query_positions] = -torch.inf
        largest, candidates = torch.topk(bounds, min(len(self.bank), self.k + _SPARE_CANDIDATES))
        positions, scores = self._ranked(queries, query_positions, candidates.sort(dim=1).values)
        is_complete = candidates.shape[1] == len(self.bank)
        return positions, scores, (scores[:, -1] > largest[:, -1].double()) | is_complete

    def _extended_bank(self, dtype: torch.dtype) -> Tensor:
        """The bank with two more columns, which add the slack and the penalty to a product."""
        if dtype not in self._extended_banks:
            penalties = self.penalties * (1 - _slack(self.bank.shape[1], dtype))
            columns = [self.bank, self.squares.sqrt(), -penalties]
            self._extended_banks[dtype] = torch.column_stack(columns).to(dtype)
        return self._extended_banks[dtype]

    def _ranked(self, queries: Tensor, query_positions: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The k best of candidates in ascending order of position; of equal ones the first."""
        # A sum per pair, since the rounding of a matrix product depends on a sample's position in the bank.
        scores = (self.bank[candidates] * queries[:, None]).sum(-1) - self.penalties[candidates]
        if self.excludes_self:
            scores.masked_fill_(candidates == query_positions[:, None], -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return candidates.gather(1, order[:, : self.k]), scores[:, : self.k]


def _slack(width: int, dtype: torch.dtype) -> float:
    """More than the relative rounding error of a product of `width` terms, including that of its factors."""
    return (width + 8) * torch.finfo(dtype).eps


def _checked(x: FeatureMatrix, y: NDArray[Any], name: str) -> Tensor:
    features = as_tensor(x)
    if y.shape != (len(features),):
        raise ValueError(f"{len(features)} {name} samples but labels of shape {y.shape}; pass one label per sample")
    num_broken = features.numel() - int(torch.isfinite(features).sum())
    if num_broken:
        raise ValueError(f"{name} features hold {num_broken} values that are nan or inf; extract them again in float32")
    return features


def _prepared(bank: Tensor, queries: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Bank and queries minus the mean of the bank, in float64, as `nearest` takes them.

    For "cosine" samples get unit norm (one at the mean stays 0: it has cosine 0 with all), for "euclidean" the bank
    gets mean square norm 1.
    """
    statistics = feature_statistics(bank)
    bank, queries = (subtract_mean(x, statistics.mean, torch.float64) for x in (bank, queries))
    if metric == "cosine":
        return unit_rows(bank), unit_rows(queries)
    scale = statistics.square_norms.mean().sqrt()
    scale = torch.where(scale > 0, scale, 1)
    return bank / scale, queries / scale


def _winners(labels: NDArray[np.intp], weights: Floats, num_classes: int) -> NDArray[np.intp]:
    """Label with the most votes for each row of labels (n, k); of equal ones the smallest."""
    offsets = np.arange(len(labels))[:, None] * num_classes
    votes = np.bincount((offsets + labels).ravel(), weights.ravel(), minlength=len(labels) * num_classes)
    winners: NDArray[np.intp] = votes.reshape(-1, num_classes).argmax(axis=1)
    return winners
