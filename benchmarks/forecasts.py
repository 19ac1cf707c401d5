"""The forecast of a probing run against what it takes, for three sizes.

    OMP_NUM_THREADS=1 python benchmarks/forecasts.py

Times are those of the processor on one thread, so that other work on the machine does not count; the code is the same
as that of `layerprobe probe --dry-run`, which reads the clock of the wall.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from layerprobe.analyses.runs import RunPlan, probe_run
from layerprobe.analyses.runs.costing import forecast_cost
from layerprobe.analyses.runs.stages import cost_record
from layerprobe.backbones import Backbone, SiTConfig, new_sit
from layerprobe.checkpoints import CheckpointSource, open_checkpoint
from layerprobe.data import DataSource, Splits, TensorSamples
from layerprobe.extraction import ExtractionPlan

FACTOR = 1.5


def network(shape: tuple[int, ...], width: int, depth: int) -> Backbone:
    """A SiT whose blocks are no identity, with random weights."""
    backbone = new_sit(SiTConfig(shape, 2, width, depth, 4, 10), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.module.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return backbone


def patterns(shape: tuple[int, ...], counts: tuple[int, int, int], noise: float = 1.0) -> Splits:
    """Latents of ten classes that differ in their mean."""
    generator = torch.Generator().manual_seed(0)
    means, parts, first = torch.randn(10, *shape, generator=generator), [], 0
    for count in counts:
        labels = torch.arange(count) % 10
        x = means[labels] * 0.3 + noise * torch.randn(count, *shape, generator=generator)
        parts.append(TensorSamples(x, labels, ids=torch.arange(first, first + count), modality="latent"))
        first += count
    return Splits(*parts)


def cases() -> Iterator[tuple[str, Backbone, Splits, tuple[float, ...]]]:
    digits = open_checkpoint("digits", device="cpu")
    yield "digits, 8 x 64", digits, DataSource("digits").probing_splits(expect_shape=digits.shape), (0.1, 0.3, 0.5, 0.9)
    yield "4 x 8 x 8, 6 x 128", network((4, 8, 8), 128, 6), patterns((4, 8, 8), (1500, 300, 300)), (0.2, 0.4, 0.7)
    yield "4 x 16 x 16, 4 x 256", network((4, 16, 16), 256, 4), patterns((4, 16, 16), (2500, 500, 500)), (0.3, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, help="number of the one case to measure, from 0")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    time.perf_counter = time.process_time
    for index, (name, backbone, splits, levels) in enumerate(cases()):
        if only not in (None, index):
            continue
        backbone = backbone.in_precision("auto")
        plan = ExtractionPlan(noise_levels=levels)
        source = RunPlan(CheckpointSource("memory"), DataSource("memory"), plan)
        cost = forecast_cost(backbone, splits, source.extraction_from(backbone))
        with tempfile.TemporaryDirectory() as folder:
            opened = (backbone, splits)
            probe_run(source, Path(folder) / "run", opened=opened, trust_convention=True, device="cpu")
            _, took = cost_record(Path(folder) / "run")
        assert took is not None
        total = sum(took["seconds"].values())
        ratio = cost.total_s / total
        print(f"{name}: forecast {cost.total_s:.1f} s, took {total:.1f} s, ratio {ratio:.2f}")
        for stage, seconds in cost.seconds.items():
            print(f"  {stage:<18} {seconds:7.2f} {took['seconds'].get(stage, 0):7.2f}")
        for key, value in (("memory", "memory_bytes"), ("disk", "disk_bytes")):
            print(f"  {key:<18} {getattr(cost, value) / 2**20:7.0f} {took[value] / 2**20:7.0f} MiB", flush=True)
        print("  within the factor" if 1 / FACTOR <= ratio <= FACTOR else "  BEYOND THE FACTOR", flush=True)


if __name__ == "__main__":
    main()
