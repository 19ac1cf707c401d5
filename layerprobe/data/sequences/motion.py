"""Motion: positions of joints over time, from arrays in files or columns, and from BVH files.

A clip is (frames, joints, 3) or (frames, 3 joints), or any (frames, channels); a sample is (channels, frames), on a
1-D grid. Positions become relative to where the first joint stands in the first frame, on the two axes of the floor:
a walk looks the same wherever it begins. Where a root is named, it takes the part of the first joint, and the other
joints become relative to it in every frame: a pose then looks the same wherever the walk has got to.

Source of the BVH format: Meredith & Maddock 2001, "Motion capture file formats explained".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.data import tables
from layerprobe.data.samples import Samples
from layerprobe.data.sequences.bvh import bvh_positions
from layerprobe.data.sequences.items import Decoder, file_bytes, load_media

SUFFIXES = (".npy", ".npz", ".bvh")
COLUMNS = ("motion", "motions", "joints", "poses", "skeleton")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MotionDecoder(Decoder):
    """Clips as (channels, frames).

    Attributes:
        stride: Every stride-th frame is kept.
        up_axis: 0, 1 or 2: the axis that is not of the floor; None leaves positions where they are.
        root: The joint that the others are relative to in every frame, or None. Bodies cross a room of meters while
            limbs move by centimeters, and a channel that holds both is learned to a share of the meters.
    """

    stride: int = 1
    up_axis: int | None = 1
    root: int | None = field(default=None, repr=False)  # data without one keeps its fingerprint
    modality = "motion"
    row_format = "numpy"  # nested lists of Python numbers take ten times as long

    def __call__(self, item: Any) -> Tensor:
        """Shape (channels, frames)."""
        frames = _frames(item)
        if frames.ndim == 3:
            frames = frames.reshape(len(frames), -1)
        if frames.ndim != 2 or not frames.size:
            raise ValueError(f"it has shape {frames.shape}, not (frames, channels) or (frames, joints, 3)")
        frames = frames[:: self.stride]
        if self.root is not None:
            frames = self._about_root(frames)
        elif self.up_axis is not None and frames.shape[1] % 3 == 0:
            origin = frames[0, :3].copy()
            origin[self.up_axis] = 0
            frames = frames - np.tile(origin, frames.shape[1] // 3)
        return torch.from_numpy(np.ascontiguousarray(frames.T)).float()

    def _about_root(self, frames: Floats) -> Floats:
        assert self.root is not None and self.up_axis is not None
        if frames.shape[1] % 3 or not 0 <= self.root < frames.shape[1] // 3:
            raise ValueError(f"it has {frames.shape[1]} channels, of which none are the 3 of joint {self.root}")
        joints = frames.reshape(len(frames), -1, 3)
        place = joints[:, self.root].copy()
        place[:, self.up_axis] = 0
        about = joints - place[:, None]
        about[:, self.root] += place - place[0]
        return about.reshape(len(frames), -1)


def load_motion(
    source: str | Path,
    *,
    length: int | None = None,
    stride: int = 1,
    up_axis: int | None = 1,
    root_joint: int | None = None,
    split: str | None = None,
    column: str | None = None,
    label_column: str | None = None,
    probe_labels: str = "",
    skip_bad: int = 0,
) -> dict[str, Samples]:
    """The parts of a motion data set.

    Args:
        source: What `tables.read_items` takes: .npy, .npz (one array) or .bvh files in a folder per class, or rows with
            a column of nested lists.
        length: Frames of a sample, after the stride.
        stride: Every stride-th frame is kept.
        up_axis: See `MotionDecoder`.
        root_joint: Its `root`, counted from 0: the pelvis or what else carries the body.
        split: The only part to read.
        column: Where the clips are; found by name where not given.
        label_column: Where the labels are.
        probe_labels: Further label columns, see `load_media`.
        skip_bad: See `load_media`.

    Raises:
        ValueError: If the data cannot be read, or clips differ in their channels.
    """
    if stride < 1:
        raise ValueError(f"--stride is {stride}; pass at least 1")
    parts = tables.read_items(source, suffixes=SUFFIXES, split=split)
    found = tables.item_column(parts, column, usual=COLUMNS, what="motion", fits=holds_motion)
    if root_joint is not None and up_axis is None:
        raise ValueError("--root-joint needs a floor to move on; pass up_axis 0, 1 or 2")
    decoder = MotionDecoder(stride, up_axis, root_joint)
    return load_media(
        parts, found, decoder, label_column=label_column, probe_labels=probe_labels, length=length, skip_bad=skip_bad
    )


def holds_motion(feature: Any) -> bool:
    """Whether a column's type is nested lists of numbers."""
    inner = getattr(feature, "feature", None)
    leaf = getattr(inner, "feature", None)
    while getattr(leaf, "feature", None) is not None:
        leaf = leaf.feature  # type: ignore[union-attr]
    array = type(feature).__name__ in ("Array2D", "Array3D")
    return array or str(getattr(leaf, "dtype", "")).startswith(("float", "double"))


def _frames(item: Any) -> Floats:
    if isinstance(item, (list, np.ndarray)):
        lengths = {len(frame) for frame in item}
        if len(lengths) > 1:
            raise ValueError(f"its frames have {min(lengths)} to {max(lengths)} values")
        return np.asarray(item, np.float64)
    path = str(item.get("path") if isinstance(item, Mapping) else item)
    if path.lower().endswith(".bvh"):
        return bvh_positions(file_bytes(item).read().decode("utf-8", errors="strict"))
    loaded = np.load(file_bytes(item), allow_pickle=False)
    if isinstance(loaded, np.lib.npyio.NpzFile):
        if len(loaded.files) != 1:
            raise ValueError(f"it holds the arrays {', '.join(loaded.files)}; keep one per file")
        loaded = loaded[loaded.files[0]]
    if loaded.dtype.kind not in "fiu":
        raise ValueError(f"it holds values of type {loaded.dtype}")
    return np.asarray(loaded, np.float64)
