"""Images side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import ArrayLike

from layerprobe.analyses.figures.labels import counted
from layerprobe.analyses.figures.style import WIDTH_IN, styled


@styled()
def sample_grid(x: ArrayLike, labels: Sequence[object] | None = None, *, columns: int = 8) -> Figure:
    """Draws images side by side, enlarged without smoothing.

    Args:
        x: Images, shape (n, C, H, W) with C = 1 (gray) or 3 (RGB), values in [-1, 1]; values outside are clipped.
        labels: One text per image, written above it, or None.
        columns: Number of images in a row, at least 1.

    Raises:
        ValueError: If x has another shape or contains nan, labels has another length, or columns < 1.
    """
    images = np.asarray(x, dtype=np.float32)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.size == 0:
        raise ValueError(f"samples have shape {images.shape}; pass images (n, 1 or 3, height, width), decode latents")
    if np.isnan(images).any():
        bad = int(np.isnan(images).any(axis=(1, 2, 3)).sum())
        raise ValueError(f"{bad} of {len(images)} samples contain nan; leave them out")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} samples but {len(labels)} labels; pass one label per sample")
    if columns < 1:
        raise ValueError(f"columns is {columns}; pass at least 1")
    columns = min(columns, len(images))
    rows = int(np.ceil(len(images) / columns))
    height, width = images.shape[2:]
    side_in = min(1.25, WIDTH_IN / columns)
    strip_in = 0.17 if labels is not None else 0.04
    size = (max(columns * side_in, 3.2), rows * (side_in * height / width + strip_in) + 0.28)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0))
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in all_axes:
        axes.set_axis_off()
    pixels = (np.clip(images, -1, 1).transpose(0, 2, 3, 1) + 1) / 2
    for i, image in enumerate(np.broadcast_to(pixels, (*pixels.shape[:3], 3))):
        all_axes[i].imshow(image, interpolation="none")
        if labels is not None:
            all_axes[i].set_title(str(labels[i]), loc="center", fontsize=8.5, pad=2)
    figure.suptitle(f"{counted(len(images), 'sample')}, {width} x {height} pixels", x=0.01, ha="left", fontsize=10)
    return figure
