"""Extraction of every block at every noise level: its time over the forward passes that it needs, its peak memory."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from layerprobe.backbones import Backbone, SiTConfig, new_sit
from layerprobe.capture import capture
from layerprobe.checkpoints import open_checkpoint
from layerprobe.data import Splits, load, load_images, split
from layerprobe.extraction import ExtractionPlan, ablate_layers, extract

SHAPE = (3, 16, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("digits", "sit", "memory", "skipping", "one"))
    parser.add_argument("--data", help="a folder with CIFAR-10 as parquet")
    parser.add_argument("--samples", type=int, help="how many, for sit and one")
    parser.add_argument("--token-samples", type=int, default=0)
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "digits":
        compare(open_checkpoint("digits"), load("digits"), options)
    elif options.what == "sit":
        compare(sit(width=384, depth=12, heads=6, patch=2), cifar10(options.data, options.samples or 128), options)
    elif options.what == "memory":
        memory(options)
    elif options.what == "skipping":
        skipping(open_checkpoint("digits"), load("digits"), options)
    else:
        one(options)


def compare(backbone: Backbone, splits: Splits, options: argparse.Namespace) -> None:
    plan = ExtractionPlan(backbone.layers, levels(options.levels), token_samples=options.token_samples)
    x = torch.cat([samples.batch(range(len(samples))).x for _, samples in splits.items()])
    print(f"{backbone.name}, {len(x)} samples x {options.levels} levels, {torch.get_num_threads()} threads")
    ratios = []
    for _ in range(options.rounds):
        bare = bare_passes(backbone, x, plan.noise_levels, options.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            extract(backbone, splits, plan, Path(folder) / "store", batch_size=options.batch_size)
            whole = time.perf_counter() - began
        ratios.append(whole / bare)
        print(f"bare {bare:.2f} s, extraction {whole:.2f} s, ratio {ratios[-1]:.3f}")
    print(f"median ratio {sorted(ratios)[len(ratios) // 2]:.3f}")


@torch.inference_mode()
def bare_passes(backbone: Backbone, x: torch.Tensor, noise_levels: tuple[float, ...], batch_size: int) -> float:
    """Seconds for the network up to its last block, where extraction stops too; inputs lie ready, nothing is kept."""
    began = time.perf_counter()
    for level in noise_levels:
        for part in x.split(batch_size):
            with capture(backbone.module, backbone.layers[-1:], stop_early=True):
                backbone.predict(part, torch.full((len(part),), level))
    return time.perf_counter() - began


def skipping(backbone: Backbone, splits: Splits, options: argparse.Namespace) -> None:
    """How many forward passes it costs to skip every block once."""
    x, noise_levels = splits.test.batch(range(len(splits.test))).x, levels(options.levels)
    passes = []
    for _ in range(options.rounds):
        bare = bare_passes(backbone, x, noise_levels, options.batch_size)
        began = time.perf_counter()
        ablate_layers(
            backbone, splits.test, noise_levels, split="test", num_samples=len(x), batch_size=options.batch_size
        )
        passes.append((time.perf_counter() - began) / bare)
        print(f"{len(backbone.layers)} blocks skipped one by one: {passes[-1]:.2f} forward passes")
    print(f"median {sorted(passes)[len(passes) // 2]:.2f}")


def memory(options: argparse.Namespace) -> None:
    """Peak memory for few and for many samples, each in a process of its own."""
    found = {}
    for n in (2000, 50000):
        command = [sys.executable, __file__, "one", "--data", options.data, "--samples", str(n)]
        command += ["--token-samples", str(options.token_samples), "--levels", str(options.levels)]
        found[n] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{n} samples: " + ", ".join(f"{name} {value:.1f}" for name, value in found[n].items()))
    for name in found[2000]:
        if name.startswith("MiB"):
            print(f"{name}: {found[50000][name] / found[2000][name]:.3f} times as much for 25 times the samples")


def one(options: argparse.Namespace) -> None:
    """One extraction with a tiny network; prints its time and the largest memory seen, in MiB."""
    backbone, splits = sit(width=32, depth=4, heads=2, patch=4), cifar10(options.data, options.samples)
    plan = ExtractionPlan(backbone.layers, levels(options.levels), token_samples=options.token_samples)
    own: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        extract(backbone, splits, plan, Path(folder) / "store", progress=lambda *_: own.append(own_mib()))
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"s": seconds, "MiB resident at most": peak, "MiB of its own after a shard, at most": max(own)}))


def own_mib() -> float:
    """Resident memory without the pages of mapped files, which the system may take back at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def sit(*, width: int, depth: int, heads: int, patch: int) -> Backbone:
    """A SiT whose weights are random everywhere: a new one has gates of zero."""
    backbone = new_sit(SiTConfig(SHAPE, patch, width, depth, heads, 10), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.module.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    backbone.module.eval()
    return backbone


def cifar10(source: str, n: int) -> Splits:
    """n images; decoded again at every access, because kept pixels would be counted as memory of extraction."""
    parts = load_images(source, size=SHAPE[1], memory_budget_bytes=0)
    return split(parts, num_train=round(0.64 * n), num_validation=round(0.18 * n), num_test=round(0.18 * n))


def levels(n: int) -> tuple[float, ...]:
    return tuple(torch.linspace(0.1, 0.9, n).tolist())


if __name__ == "__main__":
    main()
