"""Samples of every modality as pictures: spectrograms, film strips of movements and video clips, and films.

Time runs from left to right. Samples come with the values that a model sees; their rendering converts them to sound,
joint positions or frames. The pictures have axes in seconds or none, so they are drawn with matplotlib's `imshow`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.analyses.figures.image_grid import sample_grid
from layerprobe.analyses.figures.labels import counted
from layerprobe.analyses.figures.style import GRAY, INK, LINE_COLORS, WIDTH_IN, styled
from layerprobe.analyses.measures import Floats
from layerprobe.data import AudioDecoder, Rendering, Skeleton, leftwards
from layerprobe.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE_COLORS = {1: LINE_COLORS[1], -1: LINE_COLORS[0], 0: INK}  # left and right limbs, and the trunk between them
NUM_POSES, NUM_FRAMES = 10, 8  # in a film strip
DECIBELS = 60.0  # range of the color scale below the loudest point of a recording
# From the side one arm hides the other, and from the front a step cannot be seen; from between them all is visible.
VIEW_DEGREES = 40.0
FILM_RATE = {"motion": 30.0, "video": 8.0}  # frames per second, if the data has no rate
MAX_FILM_RATE, FILM_COLORS = 15, 64  # more make large files
FILM_SIDE, FILM_TITLE, FILM_COLUMNS = 128, 16, 5  # pixels of a sample and height of its title; samples in a row


@styled()
def strip(x: Tensor, rendering: Rendering | None, titles: Sequence[str], *, mask: Tensor | None = None) -> Figure:
    """Draws samples as pictures: images, spectrograms, or poses or frames at equal steps of time.

    Args:
        x: Samples, shape (n, C, *grid), with the values that a model sees or generates.
        rendering: Rendering that converts the values; None for images.
        titles: One text per sample.
        mask: Mask of the values that are no padding, shape (n, *grid), bool; None without padding.

    Raises:
        ValueError: If there are no samples, some are not finite, or the number of titles differs.
    """
    if not len(x) or len(titles) != len(x):
        raise ValueError(f"{len(x)} samples and {len(titles)} titles; pass at least one sample and a title for each")
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        raise ValueError(f"{bad} of {len(x)} samples are not finite; leave them out")
    if rendering is None:
        return sample_grid(x.numpy(), titles, columns=min(10, len(x)))
    lengths = _lengths(x, rendering, mask)
    draw = {"audio": _spectrograms, "motion": _movements, "video": _clips}[rendering.modality]
    return draw(x, rendering, titles, lengths)


def film(
    x: Tensor, rendering: Rendering, titles: Sequence[str], path: str | Path, *, mask: Tensor | None = None
) -> None:
    """Writes samples of motion or video side by side as a GIF in a loop.

    Args:
        x: Samples, shape (n, C, *grid), with the values that a model sees or generates.
        rendering: Rendering that converts the values.
        titles: One text per sample.
        path: Path of the file.
        mask: Mask as in `strip`; a sample stays at its last frame until the longest one has ended.
    """
    lengths = _lengths(x, rendering, mask)
    paint = _painted_poses if rendering.modality == "motion" else _painted_frames
    clips = [paint(sample, rendering, length) for sample, length in zip(x, lengths, strict=True)]
    pages = [_page([frames[min(t, len(frames) - 1)] for frames in clips], titles) for t in range(max(lengths))]
    rate = rendering.rate or FILM_RATE[rendering.modality]
    stride = -(-int(rate) // MAX_FILM_RATE)
    pages = [page.quantize(FILM_COLORS) for page in pages[::stride]]
    duration_ms = round(100 * stride / rate) * 10  # a GIF counts in hundredths of a second
    with atomic_write(Path(path)) as partial:
        pages[0].save(
            partial, format="GIF", save_all=True, append_images=pages[1:], duration=duration_ms, loop=0, optimize=True
        )


def _lengths(x: Tensor, rendering: Rendering, mask: Tensor | None) -> list[int]:
    return [x.shape[1 + rendering.time_axis]] * len(x) if mask is None else rendering.lengths_of(mask).tolist()


# ---------------------------------------------------------------------------------------------------------------- audio


def _spectrograms(x: Tensor, rendering: Rendering, titles: Sequence[str], lengths: Sequence[int]) -> Figure:
    assert rendering.audio is not None
    pictures = [_log_mel(sample, rendering, length) for sample, length in zip(x, lengths, strict=True)]
    seconds = [picture.shape[1] * rendering.audio.hop / rendering.audio.rate for picture in pictures]
    figure, all_axes = _panels(len(x), columns=5, height_in=1.35, legend_in=0.55)
    for i, (axes, picture) in enumerate(zip(all_axes, pictures, strict=True)):
        image = axes.imshow(
            picture - picture.max(),
            origin="lower",
            aspect="auto",
            extent=(0, seconds[i], 0, len(picture)),
            vmin=-DECIBELS,
            vmax=0,
            cmap="magma",
            interpolation="none",
        )
        axes.set(xlim=(0, max(seconds)), ylim=(0, len(picture)), title=titles[i])
        _label_frequencies(axes, rendering.audio, len(picture))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.grid(False)
    for axes in all_axes:
        axes.label_outer()
    figure.supxlabel("seconds", fontsize=9)
    figure.supylabel("kHz", fontsize=9)
    figure.colorbar(image, ax=all_axes, label="dB relative to the loudest point", aspect=30, pad=0.01, fraction=0.03)
    figure.suptitle(f"{counted(len(x), 'recording')} as log-mel spectrograms", x=0.01, ha="left")
    return figure


def _log_mel(x: Tensor, rendering: Rendering, length: int) -> Floats:
    """Decibels, shape (mels, columns)."""
    assert rendering.audio is not None
    values = rendering.values(x, length)
    if rendering.audio.form == "waveform":
        values = replace(rendering.audio, form="log-mel").log_mel(rendering.waveform(x, length))
    picture: Floats = values[0].double().numpy() * 20 / np.log(10)
    return picture


def _label_frequencies(axes: Axes, decoder: AudioDecoder, mels: int) -> None:
    """Ticks at round frequencies of the mel scale."""
    top = decoder.rate / 2
    ticks = [hertz for hertz in (250, 1000, 3000, 8000) if hertz < top]
    axes.set_yticks([mels * np.log1p(hertz / 700) / np.log1p(top / 700) for hertz in ticks])
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda _, index: f"{ticks[index] / 1000:g}" if index is not None else "")
    )


# --------------------------------------------------------------------------------------------------------------- motion


def _movements(x: Tensor, rendering: Rendering, titles: Sequence[str], lengths: Sequence[int]) -> Figure:
    if rendering.skeleton is None:
        return _channels(x, rendering, titles, lengths)
    skeleton = rendering.skeleton
    clips = [_project(rendering.positions(sample, length), skeleton) for sample, length in zip(x, lengths, strict=True)]
    low, high = _height(clips, skeleton)
    height = high - low
    figure, all_axes = _panels(len(x), columns=2, height_in=0.95)
    for i, (axes, clip) in enumerate(zip(all_axes, clips, strict=True)):
        gap = 0.7 * height
        for position, pose in enumerate(clip[_even_indices(len(clip), NUM_POSES)]):
            _draw_pose(axes, pose + np.array([position * gap, 0.0]), skeleton, height)
        axes.axhline(low, color=GRAY, linewidth=0.8, zorder=0)
        axes.set(xlim=(-0.6 * gap, (NUM_POSES - 0.4) * gap), ylim=(low - 0.06 * height, high + 0.1 * height))
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.set_title(f"{titles[i]} ({_duration(lengths[i], rendering)})")
    figure.suptitle(
        f"{counted(len(x), 'movement')}, each as {NUM_POSES} poses from its beginning to its end", x=0.01, ha="left"
    )
    return figure


def _project(clip: Floats, skeleton: Skeleton) -> Floats:
    """Projects a clip (frames, joints, 3) into a picture, shape (frames, joints, 2), that moves along with the body.

    The view is oblique from the front, relative to the direction that the body faces at the beginning, so that it walks
    to the right.
    """
    up = np.asarray(skeleton.up)
    start = clip[: max(len(clip) // 10, 1)]
    left = leftwards(start, skeleton.sides).mean(0) if any(skeleton.sides) else np.roll(up, 1)
    left = left - (left @ up) * up
    left = left / max(float(np.linalg.norm(left)), 1e-9)
    angle = np.deg2rad(VIEW_DEGREES)
    right_of_picture = np.cos(angle) * np.cross(left, up) + np.sin(angle) * left
    body = clip - clip[:, skeleton.joints].mean(1, keepdims=True) * (1 - up**2)
    return np.stack([body @ right_of_picture, body @ up], axis=-1)


def _height(clips: Sequence[Floats], skeleton: Skeleton) -> tuple[float, float]:
    """Lower and upper limit of the picture: the few bodies that a model places far above the others are cut off."""
    lows = [clip[:, skeleton.joints, 1].min() for clip in clips]
    highs = [clip[:, skeleton.joints, 1].max() for clip in clips]
    low, usual = float(np.median(lows)), float(np.median(highs))
    return low, min(float(np.max(highs)), low + 1.4 * (usual - low))


def _draw_pose(axes: Axes, pose: Floats, skeleton: Skeleton, height: float) -> None:
    bones = sorted(skeleton.bones, key=lambda bone: -_side(bone, skeleton))
    lines = LineCollection(
        [pose[list(bone)] for bone in bones],
        colors=[SIDE_COLORS[_side(bone, skeleton)] for bone in bones],
        linewidths=1.6,
        capstyle="round",
    )
    axes.add_collection(lines)
    if skeleton.head is not None:
        axes.add_patch(Circle((pose[skeleton.head, 0], pose[skeleton.head, 1]), 0.05 * height, color=INK, linewidth=0))


def _side(bone: tuple[int, int], skeleton: Skeleton) -> int:
    """Side of a bone: that of the first of its joints that belongs to a limb."""
    return skeleton.sides[bone[0]] or skeleton.sides[bone[1]]


def _channels(x: Tensor, rendering: Rendering, titles: Sequence[str], lengths: Sequence[int]) -> Figure:
    """Draws all channels over time, for data that has no joint positions."""
    figure, all_axes = _panels(len(x), columns=3, height_in=1.4)
    for i, axes in enumerate(all_axes):
        values = x[i, :, : lengths[i]].numpy()
        image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=-2.5, vmax=2.5, interpolation="none")
        axes.set(title=f"{titles[i]} ({_duration(lengths[i], rendering)})", xlim=(-0.5, max(lengths) - 0.5))
        axes.grid(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.label_outer()
    figure.supxlabel("frame", fontsize=9)
    figure.supylabel("channel", fontsize=9)
    figure.colorbar(image, ax=all_axes, label="standard deviations from the mean", aspect=30, pad=0.01, fraction=0.03)
    figure.suptitle(f"{counted(len(x), 'movement')}: all channels over time (no joint positions)", x=0.01, ha="left")
    return figure


def _painted_poses(x: Tensor, rendering: Rendering, length: int) -> list[Image]:
    from PIL import Image, ImageDraw

    skeleton = rendering.skeleton
    assert skeleton is not None
    clip = _project(rendering.positions(x, length), skeleton)
    low, high = _height([clip], skeleton)
    side = 2 * FILM_SIDE  # drawn at twice the size, so that lines become smooth
    unit = 0.85 * side / max(high - low, 1e-9)
    frames = []
    for pose in clip:
        image = Image.new("RGB", (side, side), "white")
        pen = ImageDraw.Draw(image)
        pixels = np.stack([side / 2 + unit * pose[:, 0], 0.95 * side - unit * (pose[:, 1] - low)], axis=-1)
        pen.line([(0, 0.95 * side), (side, 0.95 * side)], fill=GRAY, width=2)
        for bone in sorted(skeleton.bones, key=lambda bone: -_side(bone, skeleton)):
            ends = [(float(pixels[joint, 0]), float(pixels[joint, 1])) for joint in bone]
            pen.line(ends, fill=SIDE_COLORS[_side(bone, skeleton)], width=6)
        if skeleton.head is not None:
            pen.circle(tuple(pixels[skeleton.head].tolist()), 0.055 * unit * (high - low), fill=INK)
        frames.append(image.resize((FILM_SIDE, FILM_SIDE), Image.Resampling.LANCZOS))
    return frames


# ---------------------------------------------------------------------------------------------------------------- video


def _clips(x: Tensor, rendering: Rendering, titles: Sequence[str], lengths: Sequence[int]) -> Figure:
    figure, all_axes = _panels(len(x), columns=2, height_in=0.68)
    for i, (axes, sample) in enumerate(zip(all_axes, x, strict=True)):
        frames = _pixels(sample, rendering, lengths[i])
        chosen = frames[_even_indices(len(frames), NUM_FRAMES)]
        margin = max(1, chosen.shape[2] // 16)
        framed = np.pad(chosen, ((0, 0), (0, 0), (0, margin), (0, 0)), constant_values=255)
        axes.imshow(np.concatenate(list(framed), axis=1), interpolation="none")
        axes.set_axis_off()
        axes.set_title(f"{titles[i]} ({_duration(lengths[i], rendering)})")
    figure.suptitle(
        f"{counted(len(x), 'clip')}, each as {NUM_FRAMES} frames from its beginning to its end", x=0.01, ha="left"
    )
    return figure


def _pixels(x: Tensor, rendering: Rendering, length: int) -> NDArray[np.uint8]:
    """Frames of a clip, shape (frames, height, width, 3)."""
    values = rendering.values(x, length).clamp(-1, 1)
    pixels: NDArray[np.uint8] = ((values + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).numpy()
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3))


def _painted_frames(x: Tensor, rendering: Rendering, length: int) -> list[Image]:
    from PIL import Image

    size = (FILM_SIDE, FILM_SIDE)
    return [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in _pixels(x, rendering, length)]


# -------------------------------------------------------------------------------------------------------------- helpers


def _panels(n: int, *, columns: int, height_in: float, legend_in: float = 0.3) -> tuple[Figure, list[Axes]]:
    """A figure with n panels, row by row; panels share the width, so a single one is as wide as the figure."""
    per_row = min(columns, n)
    rows = -(-n // per_row)
    size = (WIDTH_IN, rows * (height_in * columns / per_row + 0.25) + legend_in)
    figure = Figure(figsize=size, layout="constrained")
    all_axes = list(figure.subplots(rows, per_row, squeeze=False).flat)
    for axes in all_axes[n:]:
        axes.remove()
    return figure, all_axes[:n]


def _page(images: Sequence[Image], titles: Sequence[str]) -> Image:
    """One frame of a film: images side by side under their titles."""
    from PIL import Image, ImageDraw

    columns = min(FILM_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (FILM_SIDE + 4), rows * (FILM_SIDE + FILM_TITLE)), "white")
    pen = ImageDraw.Draw(page)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        corner = (i % columns * (FILM_SIDE + 4) + 2, i // columns * (FILM_SIDE + FILM_TITLE))
        pen.text((corner[0] + 2, corner[1] + 2), title, fill=INK)
        page.paste(image, (corner[0], corner[1] + FILM_TITLE))
    return page


def _even_indices(length: int, count: int) -> NDArray[np.int64]:
    """Evenly spaced indices from 0 to length - 1."""
    return np.linspace(0, length - 1, count).round().astype(np.int64)


def _duration(length: int, rendering: Rendering) -> str:
    return f"{length} frames" if rendering.rate is None else f"{length / rendering.rate:.1f} s"
