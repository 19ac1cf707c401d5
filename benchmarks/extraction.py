"""Extraction of every block at every noise level, over the bare forward passes that it needs."""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from layerprobe.backbones.sit import SiTConfig, new_sit
from layerprobe.data.base import Splits, Subset, TensorSamples
from layerprobe.extract import extract
from layerprobe.features import ExtractionPlan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shape = (3, options.size, options.size)
    backbone = new_sit(SiTConfig(shape, 2, options.width, options.depth, 4), seed=0)
    backbone.module.eval()
    samples = TensorSamples(torch.rand(options.samples, *shape) * 2 - 1)
    thirds = torch.arange(options.samples).tensor_split(3)
    splits = Splits(*(Subset(samples, third, name=str(i)) for i, third in enumerate(thirds)))
    levels = tuple(torch.linspace(0.1, 0.9, options.levels).tolist())
    plan = ExtractionPlan(backbone.layers, levels)
    ratios = []
    for _ in range(options.rounds):
        bare = bare_forward(backbone, samples.x, options.levels, options.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            extract(backbone, splits, plan, Path(folder) / "store", batch_size=options.batch_size)
            whole = time.perf_counter() - began
        ratios.append(whole / bare)
        print(f"bare {bare:.2f} s, extraction {whole:.2f} s, ratio {ratios[-1]:.3f}")
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"median ratio {sorted(ratios)[len(ratios) // 2]:.3f}, peak memory {peak_mib:.0f} MiB")


@torch.inference_mode()
def bare_forward(backbone, x, num_levels: int, batch_size: int) -> float:
    """Seconds for the blocks alone, which is where extraction stops."""
    rows = x.repeat(num_levels, 1, 1, 1)
    began = time.perf_counter()
    for part in rows.split(batch_size):
        backbone.predict(part, torch.full((len(part),), 0.5))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
