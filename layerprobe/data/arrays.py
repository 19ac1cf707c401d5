"""Samples in a single NumPy file, read in place.

| file | content |
|---|---|
| `.npz` | `arr_0`, uint8 (n, H, W, C): images as in the evaluation of ADM |
| `.npy` | floating point (n, C, *grid) in about [-1, 1], one to three grid axes |

Source of the `.npz` format: openai/guided-diffusion, scripts/image_sample.py.
"""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray

from layerprobe.data.contents import check_npy, load_npy_file
from layerprobe.data.names import Modality
from layerprobe.data.samples import Batch, Samples, pixels_to_float
from layerprobe.files import one_line
from layerprobe.memory import pass_on

_ARRAY = "arr_0"
_MODALITIES = {1: "audio", 2: "image", 3: "video"}
_CHUNK_BYTES = 64 * 2**20


class ArraySamples(Samples):
    """Unlabeled samples in an array, which may be memory-mapped.

    Args:
        array: Samples, shape (n, H, W, C) and uint8, or (n, C, *grid) and floating point.
        source: Origin of the array, for error messages.

    Attributes:
        value_range: Smallest and largest value in the batches.

    Raises:
        ValueError: If there are no samples, or a sample is not finite.
    """

    def __init__(self, array: NDArray[Any], *, source: str) -> None:
        if not array.size:
            raise ValueError(f"{source} contains no samples (shape {array.shape}); pass a file with samples")
        self._array, self._source = array, source
        channels, *grid = (array.shape[-1], *array.shape[1:-1]) if array.dtype == np.uint8 else array.shape[1:]
        self.shape, self.modality = (channels, *grid), _MODALITIES[len(grid)]
        self.num_classes, self.class_names, self.labels = 0, (), None
        self.ids = torch.arange(len(array))
        self.fingerprint, self.value_range = _hash_and_range(array, source)

    def __len__(self) -> int:
        return len(self._array)

    def gray(self) -> ArraySamples:
        """Returns the samples with a single channel, for gray images stored as three equal channels (ADM's format).

        Raises:
            ValueError: If a sample is in color.
        """
        first_channel = self._array[..., :1] if self._array.dtype == np.uint8 else self._array[:, :1]
        for start in range(0, len(self), 4096):
            if (self._array[start : start + 4096] != first_channel[start : start + 4096]).any():
                raise ValueError(f"{self._source} contains color images but the data is gray; pass --channels 3")
        return ArraySamples(first_channel, source=self._source)

    def batch(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices, dtype=torch.long)
        x = self._array[index.numpy()]
        if x.dtype == np.uint8:
            return Batch(pixels_to_float(torch.from_numpy(x).movedim(-1, 1)).contiguous(), None, self.ids[index])
        return Batch(torch.from_numpy(x.astype(np.float32)), None, self.ids[index])


def load_array(path: str | Path) -> ArraySamples:
    """Opens a file of samples in a format of the table above.

    A compressed `.npz` is read into memory; all other files stay on disk.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged, contains no samples or other content, or has values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; pass an .npz or .npy of samples")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; write it again")
    try:
        array = _npz_array(path) if path.suffix == ".npz" else load_npy_file(path, mmap=True)
    except KeyError:
        raise ValueError(f"{path} has no array {_ARRAY}; pass images as uint8 (n, H, W, C) under that name") from None
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        pass_on(error)
        raise ValueError(
            f"{path} is not a complete {path.suffix} of numbers ({one_line(error)}); write it again"
        ) from error
    content = f"{path} contains {array.dtype} of shape {array.shape}"
    if path.suffix == ".npz" and (array.dtype != np.uint8 or array.ndim != 4):
        raise ValueError(f"{content}; an .npz must contain images as uint8 (n, H, W, C)")
    if path.suffix != ".npz" and (array.dtype.kind != "f" or not 3 <= array.ndim <= 5):
        raise ValueError(f"{content}; an .npy must contain floating point (n, C, *grid) in about [-1, 1]")
    return ArraySamples(array, source=str(path))


def array_modality(path: Path, folders: Sequence[Path]) -> Modality:
    """Returns the modality of a data set of arrays in files of their own, by the first of them: "image" or "motion".

    Motion has shape (frames, joints, 3), (frames, channels) or the like; an image is uint8, with 1, 3 or 4 channels
    as its first or last axis.

    Args:
        path: The first file.
        folders: Folders that it may lie in.

    Raises:
        ValueError: If the array may be a latent or an image of other values.
    """
    try:
        array = load_npy_file(path, folders, mmap=True)
    except (ValueError, OSError) as error:
        pass_on(error)
        return "motion"  # whose loader names what is wrong
    shape = array.shape[1:] if array.ndim == 4 and len(array) == 1 else array.shape
    if array.dtype == np.uint8 and len(shape) in (2, 3):
        return "image"
    if len(shape) == 3 and shape[1] == shape[2] > 3:
        raise ValueError(
            f"{path} contains {array.dtype} of shape {'x'.join(map(str, array.shape))}, a latent or an image rather "
            "than motion; pass latents as REPA, LightningDiT or fast-DiT write them, images as uint8, or for motion "
            "--modality motion"
        )
    return "motion"


def _npz_array(path: Path) -> NDArray[Any]:
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{_ARRAY}.npy")
        with archive.open(member) as file:
            shape, fortran, dtype = check_npy(cast("BinaryIO", file), member.file_size)
            header_bytes = file.tell()
            if member.compress_type != zipfile.ZIP_STORED:
                _check_memory(path, member.file_size)
                values = np.frombuffer(file.read(), dtype)
                return values.reshape(shape, order="F" if fortran else "C")
    with path.open("rb") as stored:
        # A local header has 30 bytes, followed by the name and an extra field, whose lengths it states.
        stored.seek(member.header_offset + 26)
        lengths = np.frombuffer(stored.read(4), "<u2")
    start = member.header_offset + 30 + int(lengths.sum()) + header_bytes
    if not all(shape):
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=start, shape=shape, order="F" if fortran else "C")


def _check_memory(path: Path, num_bytes: int) -> None:
    """Checks that a compressed array, which cannot be read in place, fits into half of the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if num_bytes > memory / 2:
        raise ValueError(f"it unpacks to {num_bytes / 2**30:.3g} GiB, too much for the memory; save it uncompressed")


def _hash_and_range(array: NDArray[Any], source: str) -> tuple[str, tuple[float, float]]:
    """Hash of the content and range of the values, in one pass over the file."""
    digest = hashlib.sha256(f"array, {array.dtype.str} {array.shape};".encode())
    rows = max(1, _CHUNK_BYTES // (array[0].nbytes or 1))
    low, high = np.inf, -np.inf
    for start in range(0, len(array), rows):
        part = np.ascontiguousarray(array[start : start + rows])
        digest.update(part.data)
        if part.dtype.kind == "f":
            bad = np.flatnonzero(~np.isfinite(part).reshape(len(part), -1).all(1))
            if len(bad):
                raise ValueError(f"sample {start + bad[0]} of {source} has NaN or infinite values; remove or redraw it")
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    if array.dtype == np.uint8:
        low, high = low / 127.5 - 1, high / 127.5 - 1
    return digest.hexdigest()[:32], (low, high)
