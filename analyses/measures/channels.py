"""Massive channels: channels that are far larger than the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerprobe.analyses.measures.arrays import Features, Floats, checked


@dataclass(frozen=True, eq=False)
class MassiveChannels:
    """Channels that are far larger than the others, in descending order of size.

    Attributes:
        channels: Indices of the channels, shape (k,).
        magnitudes: Root mean squares of the channels over samples, shape (k,), in units of the features.
        ratios: `magnitudes` over the median of all channels, shape (k,).
        energy_shares: Shares of the channels in the sum of all squares, shape (k,), in [0, 1].
        reason: Why there is no result, or "".
    """

    channels: NDArray[np.intp]
    magnitudes: Floats
    ratios: Floats
    energy_shares: Floats
    reason: str

    @property
    def energy_share(self) -> float:
        """Share of these channels together in the sum of all squares, in [0, 1]; nan without a result."""
        return np.nan if self.reason else float(self.energy_shares.sum())


def massive_channels(x: Features, *, ratio: float = 10.0) -> MassiveChannels:
    """Finds the channels that dominate every inner product, cosine and distance.

    A channel is massive if its root mean square over samples exceeds `ratio` times the median of all channels. At a
    ratio of 10 it weighs as much in a cosine as a hundred median channels. Constant channels count: massive
    activations are mostly the same for every input.

    Args:
        x: Features, shape (n, D), any float dtype; or tokens as rows.
        ratio: Threshold, above 1. Sun et al. require that single activations exceed 100, and about 1000 times the
            median of their token; this threshold is for channels and has no units.

    Raises:
        ValueError: If features are not finite, or ratio is not above 1.

    Source: Sun et al. 2024 (arXiv:2402.17762), with another threshold.
    """
    checked(x)
    if not ratio > 1:
        raise ValueError(f"ratio is {ratio}; pass a number above 1, such as 10")
    scale = float(np.abs(x).max()) or 1.0
    magnitudes = np.sqrt(np.square(x.astype(np.float64) / scale).mean(axis=0))
    median = np.median(magnitudes)
    if median == 0:
        reason = f"{np.count_nonzero(magnitudes == 0)} of {len(magnitudes)} channels are 0, and so is the median"
        return MassiveChannels(np.empty(0, np.intp), np.empty(0), np.empty(0), np.empty(0), reason)
    order = np.argsort(-magnitudes, kind="stable")
    massive = order[magnitudes[order] > ratio * median]
    shares = np.square(magnitudes) / np.square(magnitudes).sum()
    return MassiveChannels(massive, magnitudes[massive] * scale, magnitudes[massive] / median, shares[massive], "")
