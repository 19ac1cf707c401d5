"""Rows per second of an extraction on a device that costs nothing: what the host can feed to a GPU.

A row is one sample at one noise level. The network lies on torch's device "meta", which has shapes and no values, and
what is copied from it is ones. What remains is the work of the host: read and decode samples, make noise, copy, check
and write shards. The layers have the number and width of SiT-XL/2.

    python benchmarks/host.py latents pixels jpeg
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from layerprobe import checksums
from layerprobe.backbones import Backbone, wrap
from layerprobe.data import Samples, Splits, Subset, load_images
from layerprobe.data.latents.samples import FileRows, LatentSamples
from layerprobe.extraction import ExtractionPlan, extract
from layerprobe.noise import RandomStream

T = TypeVar("T")
CLOCKS = (time.perf_counter, time.thread_time, time.process_time)
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SHAPES = {"latents": (4, 32, 32), "pixels": (3, 256, 256), "jpeg": (3, 256, 256)}


class Free(nn.Module):
    """A network whose layers return the beginning of their input as one token, without computing."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.width, self.blocks = width, nn.ModuleList(nn.Identity() for _ in range(depth))
        self.weight = nn.Parameter(torch.zeros(1, device="meta"))

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        token = x.flatten(1)[:, None, : self.width]
        for block in self.blocks:
            token = block(token)
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=tuple(SHAPES))
    parser.add_argument("--samples", type=int, default=1536)
    parser.add_argument("--shard", type=int, default=512)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print where one process spends its time")
    parser.add_argument("--out", type=Path, help="a folder for the data and the stores, on the disk to measure")
    options = parser.parse_args()
    print(f"{options.depth} layers of width {options.width}, {len(LEVELS)} noise levels, {options.samples} samples in "
          f"shards of {options.shard}; {torch.get_num_threads()} threads of torch")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=options.out) as folder:  # the first use of "meta" imports much of torch
        write("latents", Path(folder) / "data", 12)
        extraction("latents", Path(folder), options)
    for what in options.what:
        with tempfile.TemporaryDirectory(dir=options.out) as folder:
            measure(what, Path(folder), options)


def measure(what: str, folder: Path, options: argparse.Namespace) -> None:
    shape, n = SHAPES[what], options.samples
    write(what, folder / "data", n)
    _, seconds = timed(lambda: opened(what, folder / "data"))
    print(f"{what}: opened {n / seconds:.0f} samples/s", flush=True)
    found: dict[str, list[tuple[float, ...]]] = {"with checksums": [], "without": []}
    for _ in range(options.rounds):
        found["with checksums"].append(extraction(what, folder, options))
        with mock.patch.object(checksums, "_digest", return_value="0" * 64):
            found["without"].append(extraction(what, folder, options))
    rows = n * len(LEVELS)
    for name, rounds in found.items():
        clock, own, every = (min(seconds) for seconds in zip(*rounds, strict=True))
        print(f"{what}, {name}: {rows / clock:.0f} rows/s by the clock; by CPU time {rows / own:.0f} ({own:.2f} s) in "
              f"the thread that the device waits for, {rows / every:.0f} ({every:.2f} s) in all")  # fmt: skip
    ids = torch.arange(min(n, 256))
    _, noise = timed(lambda: RandomStream(0).normal(ids, shape))
    _, read = timed(lambda: [opened(what, folder / "data").batch(range(len(ids)))])
    print(f"{what}: noise of {len(ids) / noise:.0f} samples/s, {len(ids)} opened and read in {read:.2f} s", flush=True)
    if options.profile:
        profile = cProfile.Profile()
        extraction(what, folder, options, profile)
        pstats.Stats(profile).sort_stats("tottime").print_stats(22)


def extraction(
    what: str, folder: Path, options: argparse.Namespace, profile: cProfile.Profile | None = None
) -> tuple[float, ...]:
    """Seconds of one extraction, its data opened before it: by the clock, of the main thread, and of all threads."""
    samples = opened(what, folder / "data")
    parts = torch.arange(len(samples)).split([len(samples) - 8, 4, 4])
    splits = Splits(*(Subset(samples, rows, name=str(len(rows))) for rows in parts))
    backbone = network(SHAPES[what], options)
    plan = ExtractionPlan(backbone.layers, LEVELS, shard_size=options.shard)
    with free_device(), profile or nullcontext():
        began = [clock() for clock in CLOCKS]
        extract(backbone, splits, plan, folder / "store")
        seconds = tuple(clock() - start for clock, start in zip(CLOCKS, began, strict=True))
    shutil.rmtree(folder / "store")
    return seconds


@contextmanager
def free_device() -> Iterator[None]:
    """Makes copies from the device "meta" give ones, as if a device had computed them in no time."""
    tolist = Tensor.tolist

    def values(tensor: Tensor) -> Tensor:
        return torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor

    with (
        mock.patch.object(Tensor, "cpu", values),
        mock.patch.object(torch, "autocast", return_value=nullcontext()),  # which knows no such device
        mock.patch.object(Tensor, "tolist", lambda tensor: [True] if tensor.is_meta else tolist(tensor)),
    ):
        yield


def network(shape: tuple[int, ...], options: argparse.Namespace) -> Backbone:
    module = Free(options.depth, options.width)
    return wrap(module, layers="blocks.*", schedule="sit", prediction="velocity", shape=shape)


def write(what: str, folder: Path, n: int) -> None:
    """Writes n samples: one .npy a latent, raw images, or JPEGs of 500 x 375."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for row in range(n):
        if what == "latents":
            np.save(folder / f"{row:05d}.npy", generator.standard_normal(SHAPES[what], np.float32))
            continue
        side = (256, 256) if what == "pixels" else (375, 500)
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
        image = coarse.resize(side[::-1], Image.Resampling.BICUBIC)
        noisy = np.asarray(image, np.int16) + generator.integers(-12, 13, (*side, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{row:05d}.{'bmp' if what == 'pixels' else 'jpg'}", quality=90)


def opened(what: str, folder: Path) -> Samples:
    if what == "latents":
        rows = FileRows(sorted(folder.iterdir()), (folder,))
        one = torch.ones(())
        return LatentSamples(rows, content="", labels=None, shift=0 * one, scale=one)
    (samples,) = load_images(folder, size=256).values()
    return samples


def timed(function: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    result = function()
    return result, time.perf_counter() - began


if __name__ == "__main__":
    main()
