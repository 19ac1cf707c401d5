"""Motion: joint positions over time, from arrays in files or columns, and from BVH files.

A clip has shape (frames, joints, 3), (frames, 3 joints) or (frames, channels); a sample has shape (channels, frames), a
1-D grid. On the two floor axes, positions are relative to the first joint in the first frame, so a walk does not depend
on where it starts. With a root joint, the root replaces the first joint, and all other joints are relative to the root
in every frame, so a pose does not depend on where the body is.

Source of the BVH format: Meredith & Maddock 2001, "Motion capture file formats explained".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.data import tables
from layerprobe.data.contents import npy_array
from layerprobe.data.kind import DataKind
from layerprobe.data.listing import list_files
from layerprobe.data.samples import Samples
from layerprobe.data.sequences.bvh import Floats, bvh_positions
from layerprobe.data.sequences.items import Decoder, file_bytes, load_media

SUFFIXES = (".npy", ".npz", ".bvh")
COLUMNS = ("motion", "motions", "joints", "poses", "skeleton")


@dataclass(frozen=True)
class MotionDecoder(Decoder):
    """Decoder of clips to (channels, frames).

    Attributes:
        stride: Stride between the frames that are kept.
        up_axis: Vertical axis, 0, 1 or 2; None keeps absolute positions.
        root: Joint that the others are relative to in every frame, or None. Bodies cross meters while limbs move by
            centimeters; in channels with both motions, a model learns the small one poorly.
    """

    stride: int = 1
    up_axis: int | None = 1
    root: int | None = field(default=None, repr=False)  # without a root, the fingerprint does not change
    modality = "motion"
    row_format = "numpy"  # nested Python lists take ten times as long

    def __call__(self, item: Any) -> Tensor:
        """Decodes a clip, shape (channels, frames)."""
        frames = _frames(item)
        if frames.ndim == 3:
            frames = frames.reshape(len(frames), -1)
        if frames.ndim != 2 or not frames.size:
            raise ValueError(f"it has shape {frames.shape}, not (frames, channels) or (frames, joints, 3)")
        if not np.isfinite(frames).all():
            raise ValueError("it contains NaN or infinite values")
        frames = frames[:: self.stride]
        if self.root is not None:
            frames = self._relative_to_root(frames)
        elif self.up_axis is not None and frames.shape[1] % 3 == 0:
            origin = frames[0, :3].copy()
            origin[self.up_axis] = 0
            frames = frames - np.tile(origin, frames.shape[1] // 3)
        return torch.from_numpy(np.ascontiguousarray(frames.T)).float()

    def _relative_to_root(self, frames: Floats) -> Floats:
        assert self.root is not None and self.up_axis is not None
        if frames.shape[1] % 3 or not 0 <= self.root < frames.shape[1] // 3:
            raise ValueError(
                f"it has {frames.shape[1]} channels, which do not include the 3 coordinates of joint {self.root}"
            )
        joints = frames.reshape(len(frames), -1, 3)
        path = joints[:, self.root].copy()
        path[:, self.up_axis] = 0
        relative = joints - path[:, None]
        relative[:, self.root] += path - path[0]
        return relative.reshape(len(frames), -1)


def load_motion(
    source: str | Path,
    *,
    length: int | None = None,
    stride: int = 1,
    up_axis: int | None = 1,
    root_joint: int | None = None,
    data_root: str | Path | None = None,
    split: str | None = None,
    column: str | None = None,
    label_column: str | None = None,
    probe_labels: str = "",
    skip_bad: int = 0,
) -> dict[str, Samples]:
    """Loads the parts of a motion data set.

    Args:
        source: Source as in `list_files`: .npy, .npz (one array) or .bvh files with a folder per class, or rows
            with a column of nested lists.
        length: Number of frames of a sample, after the stride; None for the longest clip.
        stride: Stride between the frames that are kept.
        up_axis: Vertical axis, 0, 1 or 2; None keeps absolute positions.
        root_joint: Root joint, counted from 0, usually the pelvis; None for no root.
        data_root: Folder that links and tables of the data may name files in, beside that of the data.
        split: Name of the only part to read; None for all parts.
        column: Column of the clips; None finds it by name and type.
        label_column: Column of the class labels; None finds it as in `labels.label_column`.
        probe_labels: Extra label columns, as in `load_media`.
        skip_bad: Maximum number of unreadable clips per part, which are left out.

    Returns:
        Samples by part name.

    Raises:
        ValueError: If the data cannot be read, or clips differ in their channels.
    """
    if stride < 1:
        raise ValueError(f"--stride is {stride}; pass at least 1")
    listing = list_files(source, SUFFIXES, data_root=data_root)
    parts = tables.read(listing, split=split)
    item_column = tables.item_column(parts, column, usual=COLUMNS, what="motion", fits=holds_motion)
    if root_joint is not None and up_axis is None:
        raise ValueError("--root-joint needs a vertical axis; pass up_axis 0, 1 or 2")
    decoder = MotionDecoder(stride, up_axis, root_joint)
    return load_media(
        listing,
        parts,
        item_column,
        decoder,
        label_column=label_column,
        probe_labels=probe_labels,
        length=length,
        skip_bad=skip_bad,
    )


def holds_motion(feature: Any) -> bool:
    """Returns whether a column of this type contains nested lists of numbers."""
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
    loaded = npy_array(file_bytes(item).getvalue())
    if loaded.dtype.kind not in "fiu":
        raise ValueError(f"it contains values of type {loaded.dtype}, not numbers")
    return np.asarray(loaded, np.float64)


KIND = DataKind(load_motion, SUFFIXES, telling=SUFFIXES, holds=lambda _, feature: holds_motion(feature))
