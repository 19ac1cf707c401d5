"""Copies: samples that are equal, value for value, to another sample of the data set.

A copy of a training sample in the test split measures memory, and a sample that a split has twice makes its intervals
too narrow. So data that is divided here keeps equal samples in one split (`groups`), and a probing run leaves out of
validation and test what a split before them has, or they themselves have already (`without_copies`). The training split
stays as it is (docs/decisions/0013-copies.md). Samples that are nearly equal are not looked for.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.data.samples import (
    MEMORY_BUDGET_BYTES,
    MISSING,
    Copies,
    Samples,
    Splits,
    Subset,
    pixels_to_float,
    row_digests,
)

_CHUNK_BYTES = 64 * 2**20  # samples that are in memory at a time


def without_copies(splits: Splits) -> Splits:
    """Returns the splits without the copies in validation and test, and with the counts of all copies.

    Every sample is read once; 16 bytes of it are kept in memory.

    Args:
        splits: The splits.

    Returns:
        The splits; one that has nothing but copies is empty.
    """
    first: dict[bytes, tuple[str, int]] = {}
    types = {samples.content([0]).dtype for _, samples in splits.items() if len(samples)}
    copies: list[Copies] = []

    def different(name: str, samples: Samples) -> Samples:
        rows, numbers, contradictions = [], Counter[str](), Counter[str]()
        labels = [MISSING] * len(samples) if samples.labels is None else samples.labels.tolist()
        for row, (digest, label) in enumerate(zip(digests(samples, as_floats=len(types) > 1), labels, strict=True)):
            if digest in first:
                of, first_label = first[digest]
                numbers[of] += 1
                contradictions[of] += label != first_label
            else:
                first[digest] = name, label
                rows.append(row)
        is_left_out = name != "train"
        copies.extend(
            Copies(name, of, num, len(samples), is_left_out, contradictions[of]) for of, num in numbers.items()
        )
        return Subset(samples, rows, name="without-copies") if numbers and is_left_out else samples

    return replace(splits.mapped(different), copies=tuple(copies))


def digests(samples: Samples, *, as_floats: bool = False) -> list[bytes]:
    """Returns a hash of the content of every sample, of which some are read at a time; equal for equal samples.

    Args:
        samples: The samples.
        as_floats: Whether to convert 8-bit pixels first, so that they can be compared with samples of other data.
    """

    def read(rows: range) -> Tensor:
        x = samples.content(rows)
        return pixels_to_float(x) if as_floats and x.dtype == torch.uint8 else x

    rows = max(1, _CHUNK_BYTES // _num_bytes(samples.shape))
    chunks = (range(start, min(start + rows, len(samples))) for start in range(0, len(samples), rows))
    return [digest for chunk in chunks for digest in row_digests(read(chunk))]


def groups(samples: Samples) -> NDArray[np.int64]:
    """Returns the position of the first sample, by id, that each sample is known to equal, shape (n,).

    Samples of unknown content count as different: reading more than fits into memory would take too long here.
    """
    known = samples.stored_digests()
    if known is None and len(samples) * _num_bytes(samples.shape) <= MEMORY_BUDGET_BYTES:
        known = digests(samples)
    if known is None:
        return np.arange(len(samples))
    first: dict[bytes, int] = {}
    for position in np.argsort(samples.ids.numpy(), kind="stable").tolist():
        first.setdefault(known[position], position)
    return np.array([first[digest] for digest in known], np.int64)


def _num_bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)
