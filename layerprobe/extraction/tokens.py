"""Tokens of a layer on their grid: its size, and pooling over its cells."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from layerprobe.capture import real_tokens


def pool_tokens(
    tokens: Tensor,
    cells: int,
    input_grid: tuple[int, ...],
    mask: Tensor | None = None,
    *,
    known: tuple[int, ...] | None = None,
) -> Tensor:
    """Tokens averaged over cells of their grid, float32.

    Args:
        tokens: Shape (B, T, D), row-major on the known grid, or one with the proportions of the input's; or T = 1.
        cells: Per grid axis; never more than there are tokens.
        input_grid: The grid of the model's input, such as (H, W).
        mask: Shape (B, *input_grid), bool: only tokens that hold something real count, and a cell without any is 0.
        known: As in `token_grid`.

    Returns:
        Shape (B, cells**d * D); (B, D) for one cell.

    Raises:
        ValueError: If the tokens are on no such grid, and there is more than one cell or a mask.
    """
    tokens = tokens.float()  # a bfloat16 mean loses digits
    if tokens.shape[1] == 1 or (cells == 1 and mask is None):
        return tokens.mean(1)
    grid = token_grid(tokens.shape[1], input_grid, known=known)
    if grid is None:
        remedy = "pass pool_cells 1" if mask is None else "cut all samples to one length"
        raise ValueError(f"{tokens.shape[1]} tokens lie on no grid like the input's {input_grid}; {remedy}")
    pool: Any = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(grid)]
    maps, edges = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid), [min(cells, edge) for edge in grid]
    if mask is None:
        pooled: Tensor = pool(maps, edges)
        return pooled.flatten(1)
    real = real_tokens(mask.to(tokens.device), grid).view(len(maps), 1, *grid)
    share: Tensor = pool(real.float(), edges)
    sums: Tensor = pool(maps.masked_fill(~real, 0.0), edges)
    return (sums / share.masked_fill(share == 0, 1.0)).flatten(1)


def token_grid(
    count: int, input_grid: tuple[int, ...], *, known: tuple[int, ...] | None = None
) -> tuple[int, ...] | None:
    """The grid of so many tokens, with the proportions of the input's; of a video, also one with all its frames.

    Args:
        count: Number of tokens.
        input_grid: The grid of the model's input: (L,), (H, W) or (F, H, W).
        known: The grid that the model itself tells, taken where it has so many tokens.

    Returns:
        As many edges as the input has, or None if there is no such grid.
    """
    if known is not None and math.prod(known) == count:
        return known
    stride = (math.prod(input_grid) / count) ** (1 / len(input_grid))
    grid = tuple(round(edge / stride) for edge in input_grid)
    if math.prod(grid) == count:
        return grid
    frames, *frame = input_grid
    if len(frame) == 2 and count % frames == 0:
        in_frame = token_grid(count // frames, tuple(frame))
        return None if in_frame is None else (frames, *in_frame)
    return None
