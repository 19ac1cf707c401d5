"""What a device does: whether everything runs there and gives the numbers of the CPU, and how fast it is.

    python benchmarks/devices.py certify --device cuda
    python benchmarks/devices.py measure --device cuda
    python benchmarks/devices.py tables RUN --device cuda

`certify` runs the tests of `tests/devices` on the device, and counts on one that is pretended without it. `measure`
times an extraction over its forward passes in each precision, a map of probes with 1000 classes, and a training step
with LayerSync over one without, on a SiT-XL/2 unless another --preset is named. Both together take less than five
minutes on a data center's GPU. `tables` compares the measures of a run on the CPU and on the device; the run needs more
than 1000 training samples, since fewer are measured on the CPU in any case.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aligned_step
import numpy as np
import pandas as pd
import torch

from layerprobe.analyses.measures import FEW_SAMPLES
from layerprobe.analyses.tables import MODEL, measure, recoverability_table
from layerprobe.backbones import Backbone, SiTConfig, new_sit
from layerprobe.capture import capture
from layerprobe.data import Splits, Subset, TensorSamples
from layerprobe.extraction import ExtractionPlan, FeatureStore, extract, write_tensors
from layerprobe.extraction.features import begin_store, shard_path
from layerprobe.precision import has_tf32

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("certify", "measure", "tables"))
    parser.add_argument("run", type=Path, nargs="?", help="for tables: a run folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default="XL/2")
    parser.add_argument("--size", type=int, default=32, help="side of the latents of 4 channels")
    parser.add_argument("--samples", type=int, default=256, help="that are read at four noise levels")
    parser.add_argument("--batch-size", type=int, default=64, help="of the extraction")
    parser.add_argument("--train-batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10, help="training steps of each kind")
    parser.add_argument("--classes", type=int, default=1000)
    options = parser.parse_args()
    if options.device == "pretend":
        sys.path.insert(0, str(ROOT / "tests" / "helpers"))
        import pretend_device

        assert pretend_device.AVAILABLE
    if options.what == "certify":
        return certify(options.device)
    if options.what == "measure":
        for part in (extraction, probes, training):
            began = time.perf_counter()
            part(options)
            print(f"  ({time.perf_counter() - began:.0f} s)", flush=True)
    elif options.run is None:
        parser.error("tables needs a run folder")
    else:
        compare_tables(options)
    return 0


def certify(device: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if device != "pretend":
        environment["LAYERPROBE_TEST_DEVICE"] = device
    command = [sys.executable, "-m", "pytest", "-m", "devices", "-p", "no:cacheprovider", "-q", "tests/devices"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def extraction(options: argparse.Namespace) -> None:
    """Seconds of an extraction of all blocks over those of its forward passes, in each precision."""
    shape = (4, options.size, options.size)
    backbone = new_sit(SiTConfig.preset(options.preset, shape=shape, num_classes=1000), seed=0)
    backbone.module.to(options.device)
    generator = torch.Generator().manual_seed(0)
    samples = TensorSamples(torch.randn(options.samples, *shape, generator=generator))
    parts = np.array_split(np.arange(options.samples), 3)
    splits = Splits(*(Subset(samples, rows.tolist(), name=n) for rows, n in zip(parts, "abc", strict=True)))
    for precision in ("float32", *(("tf32",) if has_tf32(backbone.device) else ()), "bfloat16"):
        plan = ExtractionPlan(backbone.layers, (0.2, 0.4, 0.6, 0.8), precision=precision)
        bare_seconds(backbone, samples, plan, options.batch_size, num_levels=1)  # Kernels are chosen and loaded.
        bare = bare_seconds(backbone, samples, plan, options.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            extract(backbone, splits, plan, Path(folder) / "store", batch_size=options.batch_size)
            whole = time.perf_counter() - began
        rows = options.samples * len(plan.noise_levels)
        print(
            f"{precision}: {rows / whole:.0f} rows/s, {whole / bare:.3f} of the bare passes ({bare:.2f} s)", flush=True
        )


@torch.inference_mode()
def bare_seconds(
    backbone: Backbone, samples: TensorSamples, plan: ExtractionPlan, batch_size: int, *, num_levels: int | None = None
) -> float:
    """Seconds of the passes up to the last block, where an extraction stops too; inputs lie ready, nothing is kept."""
    x = samples.x.to(backbone.device)
    backbone = backbone.in_precision(plan.precision)
    synchronize(backbone.device)
    began = time.perf_counter()
    for level in plan.noise_levels[:num_levels]:
        for part in x.split(batch_size):
            with capture(backbone.module, backbone.layers[-1:], stop_early=True):
                backbone.predict(part, torch.full((len(part),), level, device=backbone.device))
    synchronize(backbone.device)
    return time.perf_counter() - began


def probes(options: argparse.Namespace) -> None:
    """Seconds of the measures of one representation with many classes, ten training samples of each."""
    rng = np.random.default_rng(0)
    width = SiTConfig.preset(options.preset, shape=(4, options.size, options.size), num_classes=1000).hidden_size
    labels = np.tile(np.arange(options.classes), 12)
    splits = np.repeat([0, 1, 2], [10 * options.classes, options.classes, options.classes])
    centers = rng.normal(size=(options.classes, width))
    x = (0.3 * centers[labels] + rng.normal(size=(len(labels), width))).astype(np.float32)
    plan = {"layers": ("blocks.0",), "noise_levels": (0.5,), "draws": 1, "token_samples": 0}
    with tempfile.TemporaryDirectory() as folder:
        samples = {"ids": np.arange(len(labels)), "splits": splits, "labels": labels}
        begin_store(Path(folder), {"plan": plan, "num_shards": 1}, samples)
        write_tensors(shard_path(Path(folder), 0), {"blocks.0": x[None, None]})
        began = time.perf_counter()
        quality, _ = measure({MODEL: FeatureStore.open(Path(folder))}, device=torch.device(options.device))
        seconds = time.perf_counter() - began
    accuracy = quality[(quality["metric"] == "probe accuracy") & (quality["split"] == "test")].iloc[0]
    print(
        f"measures of a layer, {options.classes} classes, {width} wide: {seconds:.1f} s, "
        f"probe accuracy {accuracy['value']:.3f} {accuracy['note']}".rstrip()
    )


def training(options: argparse.Namespace) -> None:
    """A training step with LayerSync over one without, in two precisions."""
    for precision in ("float32", "bfloat16"):
        plain, ratio = step_seconds(options, precision)
        print(f"training step, {precision}: plain {plain:.3f} s, aligned / plain {ratio:.3f}", flush=True)


def step_seconds(options: argparse.Namespace, precision: str) -> tuple[float, float]:
    """Median seconds of a plain step, and median ratio; the networks are gone afterwards."""
    settings = argparse.Namespace(**vars(options), channels=4, precision=precision, compile=False)
    settings.batch_size = options.train_batch_size
    steps = {kind: aligned_step.make_step(kind, settings) for kind in ("plain", "aligned")}
    times = aligned_step.rounds(steps, settings)
    ratios = [a / b for a, b in zip(times["aligned"], times["plain"], strict=True)]
    return statistics.median(times["plain"]), statistics.median(ratios)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare_tables(options: argparse.Namespace) -> None:
    store = FeatureStore.open(options.run / "features" / MODEL)
    num = int((store.splits == "train").sum())
    print(f"{len(store.layers)} layers, {len(store.noise_levels)} noise levels, {num} training samples")
    if num <= FEW_SAMPLES:
        print(f"a run measures up to {FEW_SAMPLES} training samples on the CPU; here both do, to compare")
    results = {device: tables(store, torch.device(device)) for device in dict.fromkeys(("cpu", options.device))}
    for name, wanted in results["cpu"].items():
        got = results[options.device][name]
        for column in wanted.select_dtypes("float"):
            apart = np.nanmax(np.abs(got[column] - wanted[column]), initial=0)
            print(f"{name}, {column}: {apart:.1e} apart at most")


def tables(store: FeatureStore, device: torch.device) -> dict[str, pd.DataFrame]:
    began = time.perf_counter()
    quality, similarity = measure({MODEL: store}, device=device)
    print(f"{device}: quality and similarity {time.perf_counter() - began:.1f} s", flush=True)
    found = {"quality": quality, "similarity": similarity}
    if len(store.token_rows):
        began = time.perf_counter()
        found["recoverability"] = recoverability_table(store, device=device)
        print(f"{device}: recoverability {time.perf_counter() - began:.1f} s", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
