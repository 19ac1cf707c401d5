"""`layerprobe atlas`: the pair sweep, which trains every layer pair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from layerprobe.cli import options
from layerprobe.cli.costs import emit_forecast, tell_forecast, tell_took
from layerprobe.cli.fields import Given, changed, from_dataclasses, only, without
from layerprobe.cli.output import emit, progress_bar, tell_reading
from layerprobe.cli.parsing import layer_pairs
from layerprobe.data import DataSource
from layerprobe.layersync import SyncOptions
from layerprobe.options import LAYERSYNC_PANEL, OUTPUT_PANEL, TRIAL_PANEL
from layerprobe.progress import named_progress
from layerprobe.ranks import current
from layerprobe.training import TrainingPlan


@from_dataclasses(several_processes=True)
def atlas(
    start: Annotated[
        str,
        typer.Argument(
            help="Start of all branches: a folder of `layerprobe train`, which they continue, or a checkpoint.",
            callback=options.existing_checkpoint,
        ),
    ],
    *,
    data: Annotated[DataSource, without(*options.COUNTS)],
    out: Annotated[
        Path,
        typer.Option(help="Folder of the pair sweep; repeat the command to continue it.", rich_help_panel=OUTPUT_PANEL),
    ],
    training_options: Annotated[
        Given,
        only(
            TrainingPlan,
            *("steps", "weight", "batch_size", "learning_rate", "precision"),
            batch_size=options.AS_TRAINED,
            learning_rate=options.AS_TRAINED,
        ),
    ],
    pair: Annotated[
        list[str] | None,
        typer.Option(
            help="Pair to train, student:teacher such as 2:5; may be repeated; all pairs if not given.",
            rich_help_panel=LAYERSYNC_PANEL,
        ),
    ] = None,
    from_scratch: options.FromScratch = False,
    shard: Annotated[
        str,
        typer.Option(
            help="Part of the branches to train: i/N is every N-th from the i-th on.", rich_help_panel=TRIAL_PANEL
        ),
    ] = "1/1",
    num_seeds: Annotated[
        int, typer.Option(min=1, help="Number of branches per pair.", rich_help_panel=TRIAL_PANEL)
    ] = 1,
    num_evaluations: options.NumEvaluations = 1,
    num_samples: options.NumSamples = 1000,
    sync_options: SyncOptions,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    deterministic: options.Deterministic = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Train every layer pair and a baseline from one start, and report the benefit of each pair.

    Examples:
        # How many branches would it train?
        layerprobe atlas runs/plain --data images/ --steps 500 --out runs/sweep --dry-run
        # Two pairs, the first half of the branches; another machine trains 2/2.
        layerprobe atlas digits --data digits --steps 200 --pair 1:3 --pair 2:4 --shard 1/2 --out runs/sweep
    """
    from layerprobe.analyses.experiments import TRAINING
    from layerprobe.analyses.runs import (
        ENCODING,
        Cost,
        StageClock,
        check_pair_sweep,
        describe_pair_sweep,
        pair_sweep_run,
        pair_sweep_start,
        rough_seconds,
        sweep_cost,
        wanted_pairs,
    )
    from layerprobe.analyses.wording import length_cautions

    begin = pair_sweep_start(
        start,
        from_scratch=from_scratch,
        seeds=tuple(range(seed, seed + num_seeds)),
        num_evaluations=num_evaluations,
        num_samples=num_samples,
        device=device,
        sync=sync_options,
        **training_options,
    )
    steps = training_options["steps"]
    cautions = length_cautions(steps, trained_steps=begin.trained_steps)
    pairs = wanted_pairs(begin.backbone, layer_pairs(pair or []))
    branches, part = (len(pairs) + 1) * num_seeds, _part(shard)
    own_branches = len(range(part[0] - 1, branches, part[1]))
    record: dict[str, Any] = {
        "model": begin.backbone.name,
        "pairs": len(pairs),
        "branches": branches,
        "branches_of_this_shard": own_branches,
        "first_step": begin.plan.first_step,
        "steps": steps,
        "learning_rate": begin.plan.training.learning_rate,
        **changed(sync_options),
        "out": str(out),
    }
    splits = data.load()
    if data.vae is None:  # Latents are known once they are encoded.
        check_pair_sweep(begin, splits, pairs, out)
    num_processes = current().world_size

    def cost() -> Cost:
        plan = begin.plan
        return sweep_cost(
            begin.backbone, splits, pairs, plan, branches=own_branches, vae=data.vae, processes=num_processes
        )

    if dry_run:
        record |= {"processes": num_processes}
        emit_forecast(record, cost(), as_json=as_json, lines=cautions, further={"cautions": cautions})
        return
    for line in cautions:
        typer.echo(line, err=True)
    tell_reading(splits.train.reading)
    clock = StageClock(out)
    training = replace(begin.plan.training, steps=own_branches * begin.plan.branch_steps)
    clock.foretell(TRAINING, lambda: rough_seconds(begin.backbone, splits, training, data.vae), cost, tell_forecast)
    with progress_bar() as progress:
        if data.vae is not None:
            clock.begin(ENCODING)
        splits = data.encode(splits, progress=named_progress(progress, "encoding images"))
        table = pair_sweep_run(begin, splits, pairs, out, shard=part, clock=clock, progress=progress)
    tell_took(out)
    lines = [*describe_pair_sweep(table, branches), str(out / "atlas.csv")]
    emit(record | {"table": str(out / "atlas.csv")}, lines, as_json=as_json)


def _part(text: str) -> tuple[int, int]:
    """Parses "2/3" as (2, 3)."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--shard {text} is not i/N with i from 1 to N; write it as 1/2")
    return int(number), int(count)
