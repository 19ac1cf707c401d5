"""Small images of noise, as files and as samples."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from layerprobe.data import Samples, Splits, TensorSamples


def noise(n: int, *, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> list[Image.Image]:
    shape = (n, size[1], size[0], 3) if mode == "RGB" else (n, size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_parquet(path: Path, items: list[bytes], **columns: list[object]) -> Path:
    """A parquet file as other tools than `datasets` write them: without its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": item, "path": f"{i}.png"} for i, item in enumerate(items)]
    pq.write_table(pa.table({"image": images, **columns}), path)
    return path


def write_folder(root: Path, images: list[Image.Image], classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for i, image in enumerate(images):
        folder = root / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:03}.png")
    return root


def pixels(samples: Samples) -> Tensor:
    """All samples as 0 ... 255."""
    return ((samples.batch(range(len(samples))).x + 1) * 127.5).round().to(torch.uint8)


def expected(images: list[Image.Image]) -> Tensor:
    arrays = [np.asarray(image).reshape(image.height, image.width, -1) for image in images]
    return torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2))


def labeled(counts: list[int], *, first: int = 0) -> TensorSamples:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = torch.arange(first, first + len(labels))
    # Every sample is its own: its pixels are the bytes of its id.
    x = (ids.unsqueeze(1) >> torch.tensor([0, 8, 16, 24]) & 255).to(torch.uint8)
    return TensorSamples(x.view(-1, 1, 2, 2), labels, ids=ids)


def all_ids(splits: Splits) -> dict[str, set[int]]:
    return {name: set(samples.ids.tolist()) for name, samples in splits.items()}
