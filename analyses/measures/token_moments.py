"""First and second moments of the tokens of several layers side by side, collected in one pass over the data.

The layers share one basis, so that a difference of layers remains one in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from layerprobe.analyses.measures.arrays import SPLITS, Floats
from layerprobe.analyses.measures.tensors import FeatureMatrix, centered_with_mean, checked_tensor, product

_MAX_ROWS = 4096  # tokens that are converted to float64 together
_MAX_SIZE = 8192  # layers times width: 1.6 GB of moments


class TokenMoments:
    """Moments of the tokens of several layers, split by split, updated with batches.

    Memory is three matrices of `(layers * r)^2` in float64, whatever the number of tokens, where r is the width or the
    number of columns of `basis`: 25 MB for 8 layers of 128, 308 MB for 28 layers of 128.

    Args:
        layers: Names of the layers, in the order in which they run.
        basis: Basis from `shared_basis`, shape (D, r), which limits the memory for wide layers; None keeps the tokens
            as they are, which is exact.
        device: Device of the sums, with float64; tokens are moved there in parts.

    Raises:
        ValueError: If there are fewer than two layers, or a name occurs twice.
    """

    def __init__(
        self, layers: Sequence[str], *, basis: Floats | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if len(layers) < 2 or len(set(layers)) < len(layers):
            raise ValueError(f"the layers are {', '.join(layers)}; pass two or more different ones")
        self.layers = tuple(layers)
        self.basis = basis
        self._device = torch.device(device)
        self._basis = None if basis is None else torch.from_numpy(basis).to(self._device)
        self.counts = dict.fromkeys(SPLITS, 0)
        self._shift: Tensor | None = None  # (layers, D): the first token of any split
        self._sums: dict[str, Tensor] = {}  # (layers * r,)
        self._products: dict[str, Tensor] = {}  # (layers * r, layers * r)
        self._first_tokens: list[Tensor] = []  # of the training split, one token (D,) per layer
        self._constant = np.ones(len(layers), np.bool_)

    @property
    def width(self) -> int:
        """Number of directions that are kept of each layer's tokens; 0 before the first update."""
        if self.basis is not None:
            return int(self.basis.shape[1])
        return 0 if self._shift is None else int(self._shift.shape[1])

    @property
    def constant(self) -> tuple[bool, ...]:
        """For each layer, whether all tokens of the training split so far are the same."""
        return tuple(self._constant.tolist())

    def update(self, split: str, tokens: Sequence[FeatureMatrix]) -> None:
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
            # Any point near the tokens: otherwise products of a large offset would drown the rest.
            self._shift = torch.stack([x[0] for x in flat]).to(self._device).double()
        if split == "train":
            self._first_tokens = self._first_tokens or [x[0].clone() for x in flat]
            self._constant &= [bool((x == first).all()) for x, first in zip(flat, self._first_tokens, strict=True)]
        size = len(self.layers) * self.width
        if size > _MAX_SIZE:
            need = f"{len(self.layers)} layers of width {self.width} need {3 * 8e-9 * size**2:.0f} GB of moments"
            raise ValueError(f"{need}; pass basis=shared_basis(tokens, rank={min(128, _MAX_SIZE // len(self.layers))})")
        self._sums.setdefault(split, self._shift.new_zeros(size))
        self._products.setdefault(split, self._shift.new_zeros(size, size))
        for start in range(0, len(flat[0]), _MAX_ROWS):
            rows = self._rows([x[start : start + _MAX_ROWS] for x in flat])
            self._sums[split] += rows.sum(0)
            self._products[split] += product(rows.T, rows)
        self.counts[split] += len(flat[0])

    def moments(self, split: str) -> tuple[Floats, Floats]:
        """Computes mean and second moment of a split's tokens.

        Returns:
            Mean, shape (layers, r), and second moment about the training split's mean, shape (layers, r, layers, r).

        Raises:
            ValueError: If the split or the training split has no tokens.
        """
        for required in ("train", split):
            if not self.counts[required]:
                raise ValueError(f"no tokens of the split {required!r} were added; add {', '.join(SPLITS)}")
        center = self._sums["train"].numpy(force=True) / self.counts["train"]
        mean = self._sums[split].numpy(force=True) / self.counts[split]
        second = self._products[split].numpy(force=True) / self.counts[split]
        second = second - np.outer(mean, mean) + np.outer(mean - center, mean - center)
        shape = (len(self.layers), self.width)
        return mean.reshape(shape), second.reshape(shape * 2)

    def _flat(self, tokens: Sequence[FeatureMatrix]) -> list[Tensor]:
        if len(tokens) != len(self.layers):
            raise ValueError(f"{len(tokens)} arrays for {len(self.layers)} layers; pass one per layer")
        flat = [
            checked_tensor(x.reshape(-1, x.shape[-1]), f"tokens of {layer}")
            for layer, x in zip(self.layers, tokens, strict=True)
        ]
        shape = tuple(flat[0].shape) if self._shift is None else (len(flat[0]), self._shift.shape[1])
        for layer, x in zip(self.layers, flat, strict=True):
            if x.shape != shape:
                shapes = f"tokens of {layer} have shape {tuple(x.shape)}, those before {shape}"
                raise ValueError(f"{shapes}; an increment needs equal shapes: pass the layers of one stage")
        if self.basis is not None and self.basis.shape[0] != shape[1]:
            widths = f"the basis is for width {self.basis.shape[0]}, the tokens have {shape[1]}"
            raise ValueError(f"{widths}; make it from these layers")
        return flat

    def _rows(self, tokens: Sequence[Tensor]) -> Tensor:
        assert self._shift is not None
        rows = self._shift.new_empty(len(tokens[0]), len(tokens), self.width)
        for i, (x, shift) in enumerate(zip(tokens, self._shift, strict=True)):
            wide = x.to(self._device).double() - shift
            rows[:, i] = wide if self._basis is None else product(wide, self._basis)
        return rows.view(len(rows), -1)


def shared_basis(tokens: Iterable[FeatureMatrix], *, rank: int = 128) -> Floats:
    """Computes the directions in which the layers vary most on average, shape (D, min(rank, D)), orthonormal.

    The basis is the same for all layers, and each layer has the same weight in it.

    Args:
        tokens: One array or tensor per layer, shape (n, T, D) or (N, D), of samples of the training split; a few
            thousand tokens are enough.
        rank: Number of directions; RARE keeps 128.

    Raises:
        ValueError: If tokens are not finite, or layers differ in width.
    """
    total = np.zeros((1, 1))
    for x in tokens:
        wide, _ = centered_with_mean(checked_tensor(x.reshape(-1, x.shape[-1]), "tokens"))
        if len(total) > 1 and len(total) != wide.shape[1]:
            raise ValueError(f"layers have widths {len(total)} and {wide.shape[1]}; pass the layers of one stage")
        total = total + unit_trace(product(wide.T, wide).numpy(force=True))
    axes = np.linalg.eigh(total)[1]
    return np.ascontiguousarray(axes[:, ::-1][:, :rank])


def unit_trace(covariance: Floats) -> Floats:
    """Divides a covariance by its trace; one of trace 0 stays as it is."""
    scaled: Floats = covariance / (np.trace(covariance) or 1.0)
    return scaled
