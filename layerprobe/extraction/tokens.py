"""The token grid of a layer, and pooling of tokens over cells of that grid."""

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
    """Averages tokens over cells of their grid.

    Args:
        tokens: Tokens, shape (B, T, D), row-major on `known` or on a grid proportional to `input_grid`, or T = 1.
        cells: Number of cells per grid axis; axes with fewer tokens get one cell per token.
        input_grid: Grid of the model's input, such as (H, W).
        mask: Mask of the input, shape (B, *input_grid), bool. Only tokens that are not padding are averaged; a cell of
            padding alone is 0.
        known: Grid reported by the model, as in `token_grid`.

    Returns:
        Pooled tokens, shape (B, cells**d * D), float32; (B, D) for one cell.

    Raises:
        ValueError: If the tokens do not form such a grid, and there is a mask or more than one cell.
    """
    tokens = tokens.float()  # averaging in bfloat16 loses digits
    if tokens.shape[1] == 1 or (cells == 1 and mask is None):
        return tokens.mean(1)
    grid = token_grid(tokens.shape[1], input_grid, known=known)
    if grid is None:
        remedy = "pass pool_cells 1" if mask is None else "cut all samples to one length"
        raise ValueError(
            f"{tokens.shape[1]} tokens form no grid with the proportions of the input {input_grid}; {remedy}"
        )
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
    """Returns the grid of `count` tokens that has the proportions of the input grid.

    For video, a grid that keeps all frames and divides each frame is accepted too.

    Args:
        count: Number of tokens.
        input_grid: Grid of the model's input: (L,), (H, W) or (F, H, W).
        known: Grid reported by the model; used if it has `count` tokens.

    Returns:
        Grid with as many axes as the input, or None if there is no such grid.
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
