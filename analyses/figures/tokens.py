"""Figure of PCA-to-RGB maps: layers as columns, noise levels as rows, a few samples below each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from layerprobe.analyses.figures.labels import counted, label_layers, short_names, wrap_title
from layerprobe.analyses.figures.style import MISSING, WIDTH_IN, styled
from layerprobe.analyses.measures import RgbMap

HALF_CELL = 0.47  # half the size of a map, in columns or rows; the rest is the gap between maps
SAMPLE_GAP = 0.35  # gap between samples, in rows
MAX_CELL_IN = 1.1

Pixels = NDArray[np.float32]


@styled()
def token_maps(
    maps: Mapping[tuple[str, float], RgbMap],
    grids: Mapping[str, Sequence[int]],
    *,
    samples: Sequence[int] = (0, 1, 2),
    inputs: Mapping[float, ArrayLike] | None = None,
) -> Figure:
    """Draws the tokens of each layer at each noise level as colors, as in the figures of LayerSync and REPA.

    Every cell has its own three components: colors can be compared within a cell and between samples, but not between
    cells. Sequences (one grid axis) are drawn as stripes from left to right, video (three axes) as frames side by side.

    Args:
        maps: Colors of the tokens of the same samples, from `pca_rgb`, by (layer, noise level); a cell without a map
            or without colors is hatched.
        grids: Number of tokens along each of one to three axes, by layer; layers may differ.
        samples: Indices of the samples to show.
        inputs: Input of the network, images of shape (n, 1 or 3, height, width) in [-1, 1], by noise level; drawn as
            the first column. None for no such column.

    Raises:
        ValueError: If there is no map, a map does not fit the grid of its layer, or a sample is not in the maps.
    """
    if not maps:
        raise ValueError("there is no map to draw; pass at least one layer at one noise level")
    layers = list(dict.fromkeys(layer for layer, _ in maps))
    levels = sorted({level for _, level in maps})
    pictures = {key: _pictures(rgb_map, grids, key, samples) for key, rgb_map in maps.items()}
    columns = ["input", *layers] if inputs is not None else layers
    ratio = max(pixels.shape[2] / pixels.shape[1] for pixels in pictures.values())
    ratio = 4.0 if any(pixels.shape[1] == 1 for pixels in pictures.values()) else ratio
    width_in = min((WIDTH_IN - 1.0) / len(columns), MAX_CELL_IN * max(ratio, 1.0))
    height = len(samples) * (len(levels) + SAMPLE_GAP) - SAMPLE_GAP
    size = (max(len(columns) * width_in + 1.0, 6.0), height * width_in / ratio + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    rows = {}
    for position, sample in enumerate(samples):
        for i, level in enumerate(levels):
            row = position * (len(levels) + SAMPLE_GAP) + i
            rows[row] = f"{level:.3g}"
            for column, layer in enumerate(columns):
                if layer == "input" and inputs is not None and column == 0:
                    _draw(axes, column, row, _image(inputs[level], sample))
                else:
                    pixels = pictures.get((layer, level))
                    _draw(axes, column, row, None if pixels is None else pixels[position])
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_aspect(1 / ratio)
    axes.set_frame_on(False)
    axes.grid(False)
    axes.xaxis.tick_top()
    names, pattern = short_names(layers)
    label_layers(axes, ["input", *names] if inputs is not None else layers, len(columns) * width_in)
    axes.set_xlabel(pattern)
    axes.set_yticks(list(rows), list(rows.values()))
    axes.tick_params(length=0, which="both")
    axes.set_ylabel("noise level")
    figure.suptitle(wrap_title(_title(maps, layers, levels, len(samples))), x=0.01, ha="left")
    return figure


def _title(maps: Mapping[tuple[str, float], RgbMap], layers: Sequence[str], levels: Sequence[float], num: int) -> str:
    shares = [100 * rgb_map.explained.sum() for rgb_map in maps.values() if not rgb_map.reason]
    share = f"{min(shares):.0f} to {max(shares):.0f} % of the variance" if shares else "nothing"
    counts = (counted(num, "sample"), counted(len(layers), "layer"), counted(len(levels), "noise level"))
    return f"Tokens of {counts[0]} in {counts[1]} at {counts[2]}; the three colors of a cell hold {share}"


def _pictures(
    rgb_map: RgbMap, grids: Mapping[str, Sequence[int]], key: tuple[str, float], samples: Sequence[int]
) -> Pixels:
    """The maps of the samples as pixels, shape (samples, height, width, 3)."""
    layer, level = key
    grid = tuple(grids[layer])
    num_tokens = rgb_map.rgb.shape[1]
    if num_tokens != np.prod(grid) or len(grid) > 3:
        message = f"{layer} at noise level {level:g} has {num_tokens} tokens, but its grid is {grid}"
        raise ValueError(f"{message}; pass a grid of one to three axes with as many cells")
    missing = [sample for sample in samples if not 0 <= sample < len(rgb_map.rgb)]
    if missing:
        raise ValueError(f"sample {missing[0]} is not in the maps, which have {len(rgb_map.rgb)}; count from 0")
    pixels = rgb_map.rgb[list(samples)].reshape(len(samples), *grid, 3)
    if len(grid) == 1:
        return pixels[:, None]
    if len(grid) == 3:
        frames, height, width = grid
        return pixels.transpose(0, 2, 1, 3, 4).reshape(len(samples), height, frames * width, 3)
    return pixels


def _image(images: ArrayLike, sample: int) -> Pixels:
    """One image (C, H, W) in [-1, 1] as pixels."""
    pixels = (np.clip(np.asarray(images, np.float32)[sample], -1, 1).transpose(1, 2, 0) + 1) / 2
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _draw(axes: Axes, column: int, row: float, pixels: Pixels | None) -> None:
    left, right, bottom, top = column - HALF_CELL, column + HALF_CELL, row + HALF_CELL, row - HALF_CELL
    if pixels is None or np.isnan(pixels).any():
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, **MISSING))
        return
    axes.imshow(pixels, extent=(left, right, bottom, top), interpolation="none", aspect="auto", vmin=0, vmax=1)
