"""The figure of PCA-to-RGB maps: layers as columns, noise levels as rows, a few samples below each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from layerprobe.analyses.figures.style import MISSING_COLOR, WIDTH_IN, label_layers, short_names, styled, wrap_title
from layerprobe.analyses.measures import RgbMap

_HALF_CELL = 0.47  # of a column or row; the rest is the gap between maps
_SAMPLE_GAP = 0.35  # rows between samples
_MAX_CELL_IN = 1.1

Pixels = NDArray[np.float32]


@styled()
def token_maps(
    maps: Mapping[tuple[str, float], RgbMap],
    grids: Mapping[str, Sequence[int]],
    *,
    samples: Sequence[int] = (0, 1, 2),
    inputs: Mapping[float, ArrayLike] | None = None,
) -> Figure:
    """What each layer's tokens look like at each noise level, as in the figures of LayerSync and REPA.

    Every cell has its own three components, so colors compare within a cell and between samples, not between cells.
    Sequences (one grid axis) are drawn as stripes from left to right, video (three axes) as frames side by side.

    Args:
        maps: For each (layer, noise level) the colors of the same samples' tokens, from `maps.pca_rgb`; a cell without
            a map or without colors stays gray.
        grids: For each layer the cells along each axis, one to three of them; layers may differ.
        samples: Which samples to show, as indices into the maps.
        inputs: For each noise level what the network saw, images (n, 1 or 3, height, width) in [-1, 1], drawn as a
            first column.

    Raises:
        ValueError: If there is no map, a map does not fit its layer's grid, or a sample is not in it.
    """
    if not maps:
        raise ValueError("there is no map to draw; pass at least one layer at one noise level")
    layers = list(dict.fromkeys(layer for layer, _ in maps))
    levels = sorted({level for _, level in maps})
    pictures = {key: _pictures(found, grids, key, samples) for key, found in maps.items()}
    columns = ["input", *layers] if inputs is not None else layers
    ratio = max(shown.shape[2] / shown.shape[1] for shown in pictures.values())
    ratio = 4.0 if any(shown.shape[1] == 1 for shown in pictures.values()) else ratio
    width_in = min((WIDTH_IN - 1.0) / len(columns), _MAX_CELL_IN * max(ratio, 1.0))
    height = len(samples) * (len(levels) + _SAMPLE_GAP) - _SAMPLE_GAP
    size = (max(len(columns) * width_in + 1.0, 6.0), height * width_in / ratio + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    rows = {}
    for place, sample in enumerate(samples):
        for i, level in enumerate(levels):
            row = place * (len(levels) + _SAMPLE_GAP) + i
            rows[row] = f"{level:.3g}"
            for column, layer in enumerate(columns):
                if layer == "input" and inputs is not None and column == 0:
                    _draw(axes, column, row, _image(inputs[level], sample))
                else:
                    shown = pictures.get((layer, level))
                    _draw(axes, column, row, None if shown is None else shown[place])
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
    shares = [100 * found.explained.sum() for found in maps.values() if not found.reason]
    held = f"{min(shares):.0f} to {max(shares):.0f} % of the variance" if shares else "nothing"
    counts = (_count(num, "sample"), _count(len(layers), "layer"), _count(len(levels), "noise level"))
    return f"Tokens of {counts[0]} in {counts[1]} at {counts[2]}; the three colors of a cell hold {held}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _pictures(
    found: RgbMap, grids: Mapping[str, Sequence[int]], key: tuple[str, float], samples: Sequence[int]
) -> Pixels:
    """The samples' maps as pixels, shape (samples, height, width, 3)."""
    layer, level = key
    grid = tuple(grids[layer])
    if found.rgb.shape[1] != np.prod(grid) or len(grid) > 3:
        seen = f"{layer} at noise level {level:g} has {found.rgb.shape[1]} tokens, its grid is {grid}"
        raise ValueError(f"{seen}; pass a grid of one to three axes with as many cells")
    missing = [sample for sample in samples if not 0 <= sample < len(found.rgb)]
    if missing:
        raise ValueError(f"sample {missing[0]} is not in the maps, which have {len(found.rgb)}; count from 0")
    shown = found.rgb[list(samples)].reshape(len(samples), *grid, 3)
    if len(grid) == 1:
        return shown[:, None]
    if len(grid) == 3:
        frames, height, width = grid
        return shown.transpose(0, 2, 1, 3, 4).reshape(len(samples), height, frames * width, 3)
    return shown


def _image(images: ArrayLike, sample: int) -> Pixels:
    """One image (C, H, W) in [-1, 1] as pixels."""
    pixels = (np.clip(np.asarray(images, np.float32)[sample], -1, 1).transpose(1, 2, 0) + 1) / 2
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _draw(axes: Axes, column: int, row: float, pixels: Pixels | None) -> None:
    left, right, bottom, top = column - _HALF_CELL, column + _HALF_CELL, row + _HALF_CELL, row - _HALF_CELL
    if pixels is None or np.isnan(pixels).any():
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, facecolor=MISSING_COLOR, edgecolor="none"))
        return
    axes.imshow(pixels, extent=(left, right, bottom, top), interpolation="none", aspect="auto", vmin=0, vmax=1)
