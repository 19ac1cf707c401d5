"""A search for networks and data in which alignment pays: arms at several weights, depths and projectors, in C.

    python regimes.py --out where-it-pays.csv [--only depth] [--mnist FOLDER] [--cifar FOLDER]

Every arm is trained from scratch by `sit.c` (see fast_atlas.py) and scored by layerprobe; finished arms are not
repeated. `docs/make_where_it_pays.py` makes figure and tables of `docs/atlas/where-it-pays.md` from the file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from fast_atlas import Steps, Trainer

from layerprobe.analyses.experiments import FRECHET, HELD_OUT, PROBE_ERROR, Scorer, branch_scores
from layerprobe.analyses.generation import classifier_extractor
from layerprobe.analyses.tables import PRIOR_DEPTHS
from layerprobe.backbones import SiTConfig, new_sit
from layerprobe.data import Samples, Splits, TensorSamples, load
from layerprobe.layersync import LayerPair, SyncOptions
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan


@dataclass(frozen=True)
class Arm:
    """One way to train: the published prior at a weight, after a projector, up to a step; weight 0 aligns nothing."""

    weight: float = 0.0
    projector: int = 0
    stop_step: int | None = None


@dataclass(frozen=True)
class Regime:
    """A network, its training, and the arms that are compared in it."""

    name: str
    arms: tuple[Arm, ...]
    data: str = "digits"
    depth: int = 12
    width: int = 32
    patch: int = 2
    batch: int = 64
    learning_rate: float = 1e-3
    warmup: int = 0
    clip: float = 0.0
    label_drop: float = 0.1
    seeds: tuple[int, ...] = (0,)
    steps: tuple[int, ...] = (500, 1000, 2000)


_KEY = ["seed", "weight", "projector", "stop_step"]
NONE = Arm()
DEEP = {"batch": 32, "learning_rate": 2e-3, "warmup": 50, "clip": 1.0, "seeds": (0, 1, 2)}
DEEP |= {"steps": (1000, 2000, 4000, 8000)}
SLOW = {"data": "mnist", "patch": 4, "warmup": 400, "seeds": (0, 1, 2), "steps": (2000, 4000)}
CLASSES = {"data": "two digits", "width": 64, "patch": 4, "batch": 32, "warmup": 100, "clip": 1.0}
REGIMES = (
    Regime("low learning rate", (NONE, Arm(0.03), Arm(0.1)), width=48, learning_rate=1e-4, steps=(1000, 2000)),
    Regime("weights", (NONE, Arm(0.03), Arm(0.1), Arm(0.1, 96), Arm(0.3, 96), Arm(0.3, 0, 500))),
    Regime("as the checkpoint", (NONE, Arm(0.3), Arm(0.03)), depth=8, width=64, warmup=100, clip=1.0, label_drop=0.5),
    *(Regime(f"depth {depth}", (NONE, Arm(0.03)), depth=depth, **DEEP) for depth in (6, 12, 24)),
    Regime("slow start", (NONE, Arm(0.3), Arm(0.1), Arm(0.3, 96)), **SLOW),
    Regime("slow start", (NONE, Arm(0.1)), **SLOW | {"seeds": (3, 4, 5)}),  # its best weight again
    Regime("100 classes", (NONE, Arm(0.03)), **CLASSES, seeds=(0, 1), steps=(1000, 2000, 4000, 8000)),
    Regime("100 classes", (NONE, Arm(0.03)), **CLASSES, seeds=(2, 3), steps=(4000, 8000)),
    Regime("100 classes", (NONE, Arm(0.03)), **CLASSES, seeds=(0,), steps=(16000,)),
    Regime(
        "CIFAR-10",
        (NONE, Arm(0.03)),
        data="cifar10",
        width=64,
        batch=32,
        learning_rate=5e-4,
        warmup=100,
        clip=1.0,
        seeds=(0, 1, 2),
        steps=(1000, 2000, 4000),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="only regimes whose name contains this")
    parser.add_argument("--mnist", default="mnist/", help="folder of MNIST")
    parser.add_argument("--cifar", default="cifar10/", help="folder of CIFAR-10")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = pd.read_csv(options.out) if options.out.is_file() else pd.DataFrame(columns=["regime"])
    for regime in REGIMES:
        if options.only not in regime.name:
            continue
        splits = read(regime.data, options.mnist, options.cifar)
        rows = table[table["regime"] == regime.name].reindex(columns=_KEY)
        done = set(rows.itertuples(index=False, name=None))
        for rows in trained(regime, splits, options.out.parent, done):
            table = pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
            table.to_csv(options.out, index=False)
            print(table.tail(1).to_string(header=False), flush=True)


def read(data: str, mnist: str, cifar: str) -> Splits:
    """Reads the data of a regime; images are brought to 16 x 16 pixels."""
    if data == "digits":
        return load(data)
    if data == "cifar10":
        return load(cifar, size=16)
    splits = load(mnist, size=16)
    return splits if data == "mnist" else splits.mapped(side_by_side)


def side_by_side(name: str, samples: Samples) -> Samples:
    """Puts each image beside another one of the same split: 100 classes of 10, as many samples as there were."""
    other = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    batch = samples.batch(range(len(samples)))
    assert batch.labels is not None
    x, labels = torch.cat([batch.x, batch.x[other]], dim=3), 10 * batch.labels + batch.labels[other]
    return TensorSamples(x, labels, ids=samples.ids, modality=samples.modality)


def trained(
    regime: Regime, splits: Splits, folder: Path, done: set[tuple[float, ...]]
) -> Iterator[list[dict[str, object]]]:
    """Trains the arms of a regime that are not done, and yields the rows of each."""
    classes = splits.train.num_classes
    config = SiTConfig(tuple(splits.train.shape), regime.patch, regime.width, regime.depth, 4, classes)
    backbone, last = new_sit(config, seed=0), regime.steps[-1]
    pair = LayerPair(*(backbone.layers[round(fraction * regime.depth) - 1] for fraction in PRIOR_DEPTHS))
    plan = TrainingPlan(
        steps=last,
        batch_size=regime.batch,
        learning_rate=regime.learning_rate,
        warmup_steps=regime.warmup,
        clip_norm=regime.clip,
        ema_decay=0.995,
        label_drop=regime.label_drop,
    )
    extractor = classifier_extractor(splits.train, folder / f"extractor-{regime.data.replace(' ', '-')}.safetensors")
    scorer = Scorer(splits.test, extractor, num_samples=1000, sampling=SamplingPlan(solver="heun", steps=8))
    for seed in regime.seeds:
        batches: dict[int, Steps] = {}
        for arm in regime.arms:
            key = {"seed": seed, "weight": arm.weight, "projector": arm.projector, "stop_step": arm.stop_step or last}
            if tuple(key.values()) in done:
                continue
            sync = SyncOptions(projector_width=arm.projector, stop_step=arm.stop_step)
            trainer = Trainer(backbone, splits.train, replace(plan, weight=arm.weight, sync=sync))
            rows, seconds, began = [], 0.0, time.perf_counter()
            for step, model in zip(
                regime.steps, trainer.train(seed, pair if arm.weight else None, batches, regime.steps), strict=True
            ):
                seconds += time.perf_counter() - began
                scores = branch_scores(model, scorer, splits)
                rows.append(
                    {
                        "regime": regime.name, "data": regime.data, "depth": regime.depth, "width": regime.width,
                        "patch": regime.patch, "batch": regime.batch, "learning_rate": regime.learning_rate,
                        "warmup": regime.warmup, "student": pair.student, "teacher": pair.teacher, **key, "step": step,
                        "frechet": scores[FRECHET], "held_out": scores[HELD_OUT], "probe_error": scores[PROBE_ERROR],
                        "seconds": round(seconds),
                    }
                )  # fmt: skip
                began = time.perf_counter()
            yield rows


if __name__ == "__main__":
    main()
