"""Samples of latents on disk, independent of their file format."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerprobe.data.contents import load_npy_file
from layerprobe.data.reading import Reading
from layerprobe.data.samples import Batch, LabelColumn, Samples, content_hash
from layerprobe.files import one_line
from layerprobe.memory import pass_on
from layerprobe.noise import RandomStream
from layerprobe.threads import each

Format = Literal["vae-sd", "lightningdit", "fast-dit"]
# Scale of Stable Diffusion's latents: REPA applies it during training, fast-DiT before storing them.
SD_SCALE = 0.18215
# Above this size, names, sizes and modification times are hashed: reading ImageNet's latents takes many minutes.
MOST_HASHED_BYTES = 2 * 2**30
_FILES_PER_THREAD = 32  # each file is opened by itself, which takes milliseconds on a network disk


class LatentSamples(Samples):
    """Latents on disk.

    Args:
        rows: The stored tensors.
        content: Hash of the stored tensors.
        labels: Class labels, shape (n,), integers, or None for unlabeled data.
        ids: Sample ids, shape (n,); None for the row numbers.
        class_names: Class names, one per class, or empty.
        columns: Extra label columns.
        shift: Shift that is subtracted from z, a number or shape (C, 1, 1).
        scale: Factor that multiplies the shifted z, a number or shape (C, 1, 1).
        posterior_seed: Seed for drawing z from stored means and standard deviations, shape (2C, H, W); None if z itself
            is stored.
        reading: What was read of the data set.

    Raises:
        ValueError: If labels are negative, or the numbers of labels and rows differ.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        content: str,
        labels: Tensor | None,
        ids: Tensor | None = None,
        class_names: tuple[str, ...] = (),
        columns: tuple[LabelColumn, ...] = (),
        shift: Tensor,
        scale: Tensor,
        posterior_seed: int | None = None,
        reading: Reading | None = None,
    ) -> None:
        if labels is not None and len(labels) != len(rows):
            raise ValueError(f"{len(rows)} latents but {len(labels)} labels; encode the images again")
        if labels is not None and int(labels.min()) < 0:
            raise ValueError(f"label {int(labels.min())} is negative; labels count from 0")
        self._rows, self._shift, self._scale, self._seed = rows, shift, scale, posterior_seed
        channels, *grid = rows.shape
        if posterior_seed is not None and channels % 2:
            raise ValueError(
                f"{rows.name(0)} has {channels} channels, which cannot be a mean and a standard deviation; "
                "encode it again"
            )
        self.shape = (channels if posterior_seed is None else channels // 2, *grid)
        self.modality, self.reading = "image", reading
        self.labels, self.class_names, self.columns = labels, class_names, columns
        self.num_classes = 0 if labels is None else len(class_names) or int(labels.max()) + 1
        self.ids = torch.arange(len(rows)) if ids is None else ids
        self.fingerprint = content_hash("latents, version 1", content, shift, scale, posterior_seed, labels, self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int]) -> Batch:
        index = torch.arange(len(self))[torch.as_tensor(indices, dtype=torch.long)]
        stored = self._rows.read(index.tolist()) if len(index) else torch.empty(0, *self._rows.shape)
        bad = index[~stored.flatten(1).isfinite().all(1)]
        if len(bad):
            raise ValueError(f"{self._rows.name(int(bad[0]))} has NaN or infinite values; encode that image again")
        labels = None if self.labels is None else self.labels[index]
        return Batch((self._z(stored, self.ids[index]) - self._shift) * self._scale, labels, self.ids[index])

    def content(self, indices: Sequence[int]) -> Tensor:
        """Returns the stored tensors, which are equal for equal images, unlike draws from the posterior."""
        return self._rows.read(torch.arange(len(self))[torch.as_tensor(indices, dtype=torch.long)].tolist())

    def _z(self, stored: Tensor, ids: Tensor) -> Tensor:
        if self._seed is None:
            return stored
        mean, deviation = stored.chunk(2, dim=1)
        return mean + deviation * RandomStream(self._seed, "latent").normal(ids, self.shape)


class Rows(ABC):
    """Tensors of equal shape on disk.

    Attributes:
        shape: Shape of one tensor.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Tensor:
        """Reads tensors in this order, shape (B, *shape), float32; there must be at least one row."""

    @abstractmethod
    def name(self, row: int) -> str:
        """Returns the location of a tensor, for messages."""


class FileRows(Rows):
    """Rows in one .npy file each, with or without a leading axis of length 1."""

    def __init__(self, paths: Sequence[Path], folders: Sequence[Path]) -> None:
        self._paths, self._folders = paths, folders
        self.shape = self._load(0).shape
        # Only files of another size are opened here, because opening a million files would take minutes.
        sizes = [path.stat().st_size for path in paths]
        for row, size in enumerate(sizes):
            if size != sizes[0]:
                self._load(row)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, rows: Sequence[int]) -> Tensor:
        loaded = each(self._load, rows, least=_FILES_PER_THREAD)
        return torch.from_numpy(np.stack(loaded).astype(np.float32, copy=False))

    def name(self, row: int) -> str:
        return str(self._paths[row])

    def _load(self, row: int) -> NDArray[Any]:
        array = load_npy(self._paths[row], self._folders)
        array = array[0] if array.ndim == 4 and len(array) == 1 else array
        expected = getattr(self, "shape", array.shape)
        if array.shape != expected or array.ndim != 3:
            problem = f"not {expected} like {self._paths[0].name}" if array.ndim == 3 else "not (C, H, W)"
            raise ValueError(
                f"{self._paths[row]} has shape {array.shape}, {problem}; keep latents of one shape together"
            )
        return array


class ShardRows(Rows):
    """Rows in the tensor `latents` of safetensors files.

    Attributes:
        counts: Number of rows of each file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        shapes = []
        for path in paths:
            with open_shard(path) as file:
                latents = file.get_slice("latents")
                shapes.append(tuple(latents.get_shape()))
                if latents.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{path} has latents of type {latents.get_dtype()}; pass floating point ones")
        self.shape = shapes[0][1:]
        for path, shape in zip(paths, shapes, strict=True):
            if len(shape) != 4 or shape[1:] != self.shape:
                raise ValueError(
                    f"{path} contains latents of shape {shape}, not (n, {', '.join(map(str, self.shape))}) like "
                    f"{paths[0].name}; keep latents of one shape together"
                )
        self.counts = [shape[0] for shape in shapes]
        self._ends = np.cumsum(self.counts)
        if not self._ends[-1]:
            raise ValueError(f"{paths[0]} contains no latents; pass a folder with some")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: Sequence[int]) -> Tensor:
        out = torch.empty(len(rows), *self.shape)
        shards, offsets = self._locate(rows)
        for shard in np.unique(shards):
            with open_shard(self._paths[shard]) as file:
                latents = file.get_slice("latents")
                for position in np.flatnonzero(shards == shard):
                    offset = int(offsets[position])
                    out[position] = latents[offset : offset + 1][0]
        return out

    def name(self, row: int) -> str:
        (shard,), (offset,) = self._locate([row])
        return f"latent {offset} of {self._paths[shard]}"

    def _locate(self, rows: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
        index = np.asarray(rows)
        shards = np.searchsorted(self._ends, index, side="right")
        return shards, index - np.concatenate([[0], self._ends])[shards]


class ArrayRows(Rows):
    """Rows of one memory-mapped .npy file, opened at each access, so that worker processes receive only its path."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count: int
        self._count, *shape = load_npy(path, mmap=True).shape
        self.shape = tuple(shape)

    def __len__(self) -> int:
        return self._count

    def read(self, rows: Sequence[int]) -> Tensor:
        return torch.from_numpy(load_npy(self._path, mmap=True)[list(rows)])

    def name(self, row: int) -> str:
        return f"latent {row} of {self._path}"


def load_npy(path: Path, folders: Sequence[Path] | None = None, *, mmap: bool = False) -> NDArray[Any]:
    """Loads a .npy file of numbers.

    Args:
        path: The file.
        folders: Folders that it may lie in; its own if not given.
        mmap: Whether to leave the values on disk.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged or contains anything else.
    """
    try:
        array = load_npy_file(path, folders, mmap=mmap)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        pass_on(error)
        raise ValueError(
            f"{path} is not a complete .npy file of numbers ({one_line(error)}); encode it again"
        ) from error
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path} contains no array of numbers; encode it again")
    return array


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Opens a safetensors file with `latents` and `labels`.

    Raises:
        ValueError: If the file is damaged or lacks one of the two tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            missing = {"latents", "labels"} - set(file.keys())
            if not missing:
                yield file
    except (SafetensorError, OSError) as error:
        pass_on(error)
        raise ValueError(f"{path} is not a complete safetensors file; copy it again") from error
    if missing:
        raise ValueError(f"{path} lacks {' and '.join(sorted(missing))}; pass a folder as LightningDiT writes it")


def check_scale(scale: float | None) -> None:
    """Checks the factor of the latents.

    Raises:
        ValueError: If the factor is given and is not positive and finite.
    """
    if scale is not None and not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"--latent-scale is {scale}; pass a positive number")


def files_hash(paths: Sequence[Path], root: Path | None = None) -> str:
    """Returns a hash of the names, sizes and content of files.

    If they exceed `MOST_HASHED_BYTES` in total, their modification times stand in for the content.

    Args:
        paths: The files.
        root: Folder that file names are relative to; None uses the last part of each path.
    """
    digest, stats = hashlib.sha256(), [path.stat() for path in paths]
    hash_content = sum(stat.st_size for stat in stats) <= MOST_HASHED_BYTES
    for path, stat in zip(paths, stats, strict=True):
        digest.update(f"{path.relative_to(root) if root else path.name} {stat.st_size};".encode())
        if hash_content:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            digest.update(f"{stat.st_mtime_ns};".encode())
    return digest.hexdigest()
