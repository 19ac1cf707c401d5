"""A confirmation from scratch in C: that of `layerprobe confirm RUN --from-scratch`, several times faster.

    python fast_confirm.py RUN --out FOLDER --steps 4000 [--num-seeds 3] [--weight 0.03] [--arms none,pick,bad]

The arms are trained by `sit.c` (see fast_atlas.py) on the batches, the noise and the initial weights of `confirm`, and
scored and judged by layerprobe. FOLDER gets `confirmation.csv` and `verdict.json`, as a run has, and the scores of
every finished arm, so that the command continues interrupted work.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pandas as pd
import torch
from fast_atlas import Steps, Trainer

from layerprobe.analyses.experiments import CONFIRMATION_COLUMNS, ConfirmationPlan, Scorer, arms_for, judge, run_folder
from layerprobe.analyses.generation import classifier_extractor
from layerprobe.analyses.runs import RunFolder, confirmation_training
from layerprobe.backbones import alignable_layers, fresh_sit
from layerprobe.files import claim, write_text
from layerprobe.layersync import SyncOptions
from layerprobe.sampling import SamplingPlan

START = "from scratch"


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    run, folder = RunFolder(options.run), options.out
    sync = SyncOptions(projector_width=options.projector_width, stop_step=options.stop_step)
    training = confirmation_training(
        options.run, steps=options.steps, from_scratch=True, weight=options.weight, sync=sync
    )
    plan = ConfirmationPlan(
        training,
        tuple(range(options.num_seeds)),
        options.num_evaluations,
        options.num_samples,
        SamplingPlan(solver="heun", steps=options.solver_steps),
    )
    backbone = run.plan().checkpoint.open(device="cpu")
    data = run.plan().data
    splits = data.encode(data.training_splits(backbone.shape), expect_shape=backbone.shape)
    arms = arms_for(
        [ranked.pair for ranked in run.selection().ranked], alignable_layers(backbone), names=options.arms.split(",")
    )
    claim(folder, "confirmation.json", {"plan": plan.identity(), "start": START}, what="a confirmation")
    extractor = classifier_extractor(splits.train, folder / "extractor.safetensors")
    scorer = Scorer(splits.test, extractor, num_samples=plan.num_samples, sampling=plan.sampling)
    trainer, rows = Trainer(backbone, splits.train, training), []
    for seed in plan.seeds:
        batches: dict[int, Steps] = {}
        known = {0: scorer.means(fresh_sit(backbone, seed))}
        for arm in arms:
            place = run_folder(folder, arm, seed).with_suffix(".json")
            if not place.is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                began, (_, *stops) = time.perf_counter(), plan.evaluation_steps
                models = trainer.train(seed, arm.pair, batches, stops)
                scores = known | {step: scorer.means(model) for step, model in zip(stops, models, strict=True)}
                write_text(place, json.dumps(scores))
                print(f"seed {seed}, {arm}: {scores[stops[-1]]}, {time.perf_counter() - began:.0f} s", flush=True)
            record = json.loads(place.read_text())
            rows += [
                (arm.name, seed, int(step), metric, value)
                for step, values in record.items()
                for metric, value in values.items()
            ]
    curves = pd.DataFrame(rows, columns=list(CONFIRMATION_COLUMNS))
    if len(plan.seeds) > 1:
        verdict = judge(curves, arms, plan, extractor_name=extractor.name, start_name=START, trained_steps=0)
        write_text(folder / "verdict.json", verdict.to_json())
    write_text(folder / "confirmation.csv", curves.to_csv(index=False))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder with a selection, as of `layerprobe probe`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--weight", type=float, default=0.3)
    parser.add_argument("--projector-width", type=int, default=0)
    parser.add_argument("--stop-step", type=int, help="step from which on nothing is aligned")
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--arms", default="none,pick,bad")
    parser.add_argument("--num-evaluations", type=int, default=4)
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--solver-steps", type=int, default=12, help="steps of the sampler")
    return parser.parse_args()


if __name__ == "__main__":
    main()
