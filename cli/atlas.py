"""`layerprobe atlas`: the pair sweep, which trains every layer pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit, progress_bar


@options.spread(sync_options=options.SYNC, reading=options.READING)
def atlas(
    start: Annotated[
        str,
        typer.Argument(
            help="Where all branches start: a folder of `layerprobe train`, which they continue, or a checkpoint."
        ),
    ],
    *,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Folder of the pair sweep; repeat the command to continue it.")],
    steps: options.Steps,
    pair: Annotated[
        list[str] | None, typer.Option(help="Only this pair, student:teacher, as 2:5; may be repeated.")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Fresh weights instead of the start's, in the same network.")
    ] = False,
    shard: Annotated[str, typer.Option(help="i/N: train every N-th branch, from the i-th on.")] = "1/1",
    num_seeds: Annotated[int, typer.Option(min=1, help="Branches per pair.")] = 1,
    weight: options.Weight = 0.3,
    batch_size: Annotated[int | None, typer.Option(min=1, help="As the checkpoint was trained, else 128.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="As the checkpoint was trained, else 1e-4.")] = None,
    num_evaluations: Annotated[int, typer.Option(min=1, help="Evenly spaced over the steps.")] = 1,
    num_samples: Annotated[int, typer.Option(min=2, help="Drawn for each Frechet distance.")] = 1000,
    sync_options: options.Given,
    reading: options.Given,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Train every layer pair and a baseline from one start, and report the benefit of each pair."""
    from layerprobe.analyses.runs import (
        describe_pair_sweep,
        encoded,
        load_splits,
        pair_sweep_run,
        pair_sweep_start,
        wanted_pairs,
    )
    from layerprobe.analyses.wording import length_cautions

    begin = pair_sweep_start(
        start,
        steps=steps,
        from_scratch=from_scratch,
        seeds=tuple(range(seed, seed + num_seeds)),
        num_evaluations=num_evaluations,
        num_samples=num_samples,
        device=device,
        sync=options.sync_options(sync_options),
        **options.given(weight=weight, batch_size=batch_size, learning_rate=learning_rate),
    )
    cautions = length_cautions(steps, trained_steps=begin.trained_steps)
    wanted = wanted_pairs(begin.backbone, options.layer_pairs(pair or []))
    branches, part = (len(wanted) + 1) * num_seeds, _part(shard)
    record = {
        "model": begin.backbone.name,
        "pairs": len(wanted),
        "branches": branches,
        "branches_of_this_shard": len(range(part[0] - 1, branches, part[1])),
        "first_step": begin.plan.first_step,
        "steps": steps,
        "learning_rate": begin.plan.training.learning_rate,
        **sync_options,
        "out": str(out),
    }
    if dry_run:
        lines = [f"{key}: {value}" for key, value in record.items()] + cautions
        emit(record | {"cautions": cautions}, lines, as_json=as_json)
        return
    for line in cautions:
        typer.echo(line, err=True)
    reading = options.located_vae(reading)
    with progress_bar() as progress:
        splits = encoded(load_splits(data, reading)[0], reading, progress=progress)
        found = pair_sweep_run(begin, splits, wanted, out, shard=part, progress=progress)
    lines = [*describe_pair_sweep(found, branches), str(out / "atlas.csv")]
    emit(record | {"table": str(out / "atlas.csv")}, lines, as_json=as_json)


def _part(text: str) -> tuple[int, int]:
    """ "2/3" -> (2, 3)."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--shard {text} is not i/N with i from 1 to N; write it as 1/2")
    return int(number), int(count)
