"""The forecasts of the long commands against what they take.

    OMP_NUM_THREADS=1 python benchmarks/forecasts.py [--only WORD]
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/forecasts.py --only digits

Times are those of the processor on one thread, so that other work on the machine does not count; the code is the same
as that of `--dry-run`, which reads the clock of the wall. Of several processes the first one prints, with its own
times, and `--wall` prints those of the wall, which count what it waits for.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from layerprobe.analyses.experiments import PairSweepPlan, all_pairs
from layerprobe.analyses.generation import METRICS
from layerprobe.analyses.runs import (
    EXTRACTION,
    STAGES,
    ConfirmationJob,
    Cost,
    CurvePlan,
    PairSweepStart,
    RunPlan,
    StageClock,
    auto_pick,
    confirm_run,
    confirmation_job,
    confirmation_training,
    cost_record,
    draw_archive,
    extract_run,
    pair_sweep_run,
    probe_run,
    sampling_cost,
    score_cost,
    score_run,
    sweep_cost,
    train_run,
    training_cost,
)
from layerprobe.analyses.runs.costing import forecast_cost
from layerprobe.backbones import Backbone, SiTConfig, new_sit
from layerprobe.checkpoints import CheckpointSource, open_checkpoint, save_checkpoint
from layerprobe.data import ArraySamples, DataSource, Splits, TensorSamples, load_array
from layerprobe.extraction import ExtractionPlan
from layerprobe.layersync import LayerPair, SyncOptions
from layerprobe.ranks import current, processes
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan

FACTOR = 1.5


@dataclass(frozen=True)
class Case:
    """A job: its forecast, and the job itself in a folder that does not exist yet."""

    name: str
    forecast: Callable[[], Cost]
    run: Callable[[Path], object]
    at: Callable[[], str] = lambda: "."  # where in the folder the times lie


def network(shape: tuple[int, ...], width: int, depth: int) -> Backbone:
    """A SiT whose blocks are no identity, with random weights."""
    backbone = new_sit(SiTConfig(shape, 2, width, depth, 4, 10), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.module.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return backbone.in_precision("auto")


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


def sizes() -> Iterator[tuple[str, Backbone, Splits, tuple[float, ...]]]:
    """Three models with their data and noise levels."""
    digits = open_checkpoint("digits", device="cpu").in_precision("auto")
    yield "digits, 8 x 64", digits, DataSource("digits").probing_splits(expect_shape=digits.shape), (0.1, 0.3, 0.5, 0.9)
    yield "4 x 8 x 8, 6 x 128", network((4, 8, 8), 128, 6), patterns((4, 8, 8), (1500, 300, 300)), (0.2, 0.4, 0.7)
    yield "4 x 16 x 16, 4 x 256", network((4, 16, 16), 256, 4), patterns((4, 16, 16), (2500, 500, 500)), (0.3, 0.6)


def probing(
    name: str, backbone: Backbone, splits: Splits, extraction: ExtractionPlan, stages: tuple[str, ...] = STAGES
) -> Case:
    plan = RunPlan(CheckpointSource("memory"), DataSource("memory"), extraction)

    def forecast() -> Cost:
        extraction = plan.extraction_from(backbone)
        return forecast_cost(backbone, splits, extraction, stages=stages, processes=current().world_size)

    def run(folder: Path) -> None:
        job = probe_run if stages == STAGES else extract_run
        job(plan, folder, opened=(backbone, splits), trust_convention=True, device="cpu")

    return Case(name, forecast, run)


def encoded() -> Iterator[Case]:
    """Images that a small autoencoder encodes, and samples that it decodes."""
    folder = shared_folder()
    vae, data = str(folder / "vae"), DataSource(str(folder / "images"), vae=str(folder / "vae"))
    backbone = network((4, 16, 16), 128, 4)
    extraction = ExtractionPlan(noise_levels=(0.3, 0.6))
    plan = RunPlan(CheckpointSource(str(folder / "model.safetensors")), data, extraction)

    def forecast() -> Cost:
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        if current().is_first:
            write_images(folder, backbone)
        current().barrier()
        splits, extraction = plan.open(device="cpu")[1], plan.extraction_from(backbone)
        return forecast_cost(backbone, splits, extraction, vae=vae, processes=current().world_size)

    yield Case("probe --vae", forecast, lambda run: probe_run(plan, run, trust_convention=True, device="cpu"))
    steps = SamplingPlan(steps=4)
    yield Case(
        "sample --vae, after probe --vae",
        lambda: sampling_cost(backbone, steps, 512, pictures=False, vae=vae, processes=current().world_size),
        lambda run: draw_archive(backbone, run, num=512, plan=steps, vae=vae),
    )


def write_images(folder: Path, backbone: Backbone) -> None:
    """Writes an autoencoder, images for it, and the network as a checkpoint."""
    from diffusers import AutoencoderKL
    from PIL import Image

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    blocks = {"block_out_channels": (32, 32), "norm_num_groups": 8, "layers_per_block": 1, "latent_channels": 4}
    AutoencoderKL(in_channels=3, out_channels=3, **blocks, **kinds).save_pretrained(folder / "vae")
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (600, 32, 32, 3), np.uint8)):
        place = folder / "images" / f"{i % 10}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i}.png")
    save_checkpoint(folder / "model.safetensors", backbone, backbone.module.state_dict(), training={})


def shared_folder() -> Path:
    """A new folder, the same in all processes."""
    return Path(current().broadcast(tempfile.mkdtemp()))


def training(
    name: str, backbone: Backbone, splits: Splits, plan: TrainingPlan, curves: CurvePlan | None = None
) -> Case:
    return Case(
        name,
        lambda: training_cost(backbone, splits, plan, curves=curves, processes=current().world_size),
        lambda run: train_run(backbone, splits, plan, run, curves=curves, warn=print, say=print),
    )


def choosing(name: str, backbone: Backbone, splits: Splits) -> Case:
    plan = TrainingPlan(steps=60, batch_size=32)

    def rule(folder: str | Path) -> object:
        return auto_pick(splits, plan, folder, begin=20, every=20)

    return Case(
        name,
        lambda: training_cost(backbone, splits, plan, auto=rule("."), processes=current().world_size),
        lambda run: train_run(backbone, splits, plan, run, auto=rule(run), warn=print),
    )


def confirming() -> Case:
    """The arms of the embedded digits, SRA and a matched learning rate among them."""
    options = {"seeds": (0, 1), "num_evaluations": 2, "num_samples": 200, "device": "cpu"}
    options |= {"arms": ("none", "pick", "sra", "learning-rate")}

    @cache
    def job() -> ConfirmationJob:
        probed = shared_folder() / "probed"
        source = RunPlan(CheckpointSource("digits"), DataSource("digits"), ExtractionPlan(noise_levels=(0.3,)))
        probe_run(source, probed, device="cpu")
        return confirmation_job(probed, confirmation_training(probed, steps=60), **options)

    def run(folder: Path) -> None:
        confirm_run(job())

    return Case("confirm, digits", lambda: job().cost, run, lambda: str(job().folder.confirmation))


def sweeping(name: str, backbone: Backbone, splits: Splits) -> Case:
    plan = PairSweepPlan(TrainingPlan(steps=40, batch_size=32), num_samples=200)
    pairs = all_pairs(backbone.layers)[:2]
    start = PairSweepStart(backbone, plan, None, None)
    return Case(
        name,
        lambda: sweep_cost(backbone, splits, pairs, plan, branches=3, processes=current().world_size),
        lambda run: pair_sweep_run(start, splits, pairs, run),
    )


def drawing(name: str, backbone: Backbone, plan: SamplingPlan) -> Case:
    return Case(
        name,
        lambda: sampling_cost(backbone, plan, 200, pictures=False, processes=current().world_size),
        lambda run: draw_archive(backbone, run, num=200, plan=plan),
    )


def scoring(name: str, backbone: Backbone, splits: Splits, num: int) -> Case:
    """Samples that are as good as the data, with the embedded extractor."""
    data, options = DataSource("memory"), {"metrics": METRICS, "k": 5}

    @cache
    def generated() -> ArraySamples:
        folder = shared_folder()
        os.environ["XDG_CACHE_HOME"] = str(folder)
        x = splits.train.batch(range(len(splits.train))).x
        if current().is_first:
            np.save(folder / "samples.npy", x[torch.arange(num) % len(x)].clamp(-1, 1).numpy())
        current().barrier()
        return load_array(folder / "samples.npy")

    def run(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        clock = StageClock(folder, writes=current().is_first)
        score_run(generated(), splits, data, clock=clock, **options)
        clock.end()

    def forecast() -> Cost:
        return score_cost(generated(), splits, data, processes=current().world_size, **options)

    return Case(name, forecast, run)


def cases() -> Iterator[Case]:
    for name, backbone, splits, levels in sizes():
        pair = (LayerPair("blocks.1", "blocks.3"),)
        yield probing(f"probe, {name}", backbone, splits, ExtractionPlan(noise_levels=levels))
        yield probing(f"extract, {name}", backbone, splits, ExtractionPlan(noise_levels=levels), EXTRACTION)
        yield training(f"train, {name}", backbone, splits, TrainingPlan(steps=80, batch_size=32))
        plan = TrainingPlan(steps=80, batch_size=32, pairs=pair, sync=SyncOptions(noise_gap=0.2, projector_width=64))
        yield training(f"train aligned, {name}", backbone, splits, plan)
        if backbone.shape[0] == 1:  # the others are of latents, see `encoded`
            yield drawing(f"sample, {name}", backbone, SamplingPlan("heun", 8, guidance=2.0))
        yield sweeping(f"atlas, {name}", backbone, splits)
        yield scoring(f"score, {name}", backbone, splits, 1500)
    backbone, splits = network((4, 8, 8), 128, 6), patterns((4, 8, 8), (1500, 300, 300))
    kept = ExtractionPlan(noise_levels=(0.2, 0.4, 0.7), token_samples=200)
    yield probing("probe --token-samples 200", backbone, splits, kept)
    curves = CurvePlan(every=20, max_share=1)
    yield training("train --probe-every 20", backbone, splits, TrainingPlan(steps=80, batch_size=32), curves)
    yield choosing("train --sync auto", backbone, splits)
    yield confirming()
    yield from encoded()


def shown(name: str, cost: Cost, folder: Path) -> bool:
    """Prints a forecast beside what the job took; whether the whole is within the factor."""
    _, took = cost_record(folder)
    assert took is not None
    ratio = cost.total_s / took["total_s"]
    print(f"{name}: forecast {cost.total_s:.1f} s, took {took['total_s']:.1f} s, ratio {ratio:.2f}")
    for stage in dict.fromkeys([*cost.seconds, *took["seconds"]]):
        print(f"  {stage:<18} {cost.seconds.get(stage, 0):7.2f} {took['seconds'].get(stage, 0):7.2f}")
    for key, value in (("memory", "memory_bytes"), ("disk", "disk_bytes")):
        print(f"  {key:<18} {getattr(cost, value) / 2**20:7.1f} {took[value] / 2**20:7.1f} MiB", flush=True)
    within = 1 / FACTOR <= ratio <= FACTOR
    print("  within the factor" if within else "  BEYOND THE FACTOR", flush=True)
    return within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="word in the names of the cases to measure")
    parser.add_argument("--wall", action="store_true", help="measure by the clock of the wall")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.wall:
        time.perf_counter = time.process_time
    results: dict[str, bool] = {}
    with processes() as ranks:
        for case in cases():
            if options.only not in case.name:
                continue
            cost = case.forecast()
            place = shared_folder() / "run"
            case.run(place)
            ranks.barrier()
            if ranks.is_first:
                results[case.name] = shown(case.name, cost, place / case.at())
    if results:
        print(f"{sum(results.values())} of {len(results)} within a factor of {FACTOR}")


if __name__ == "__main__":
    main()
