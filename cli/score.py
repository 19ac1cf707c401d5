"""`layerprobe score`: how close generated samples are to real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit, progress_bar


@options.spread(reading=options.READING)
def score(
    samples: Annotated[
        Path,
        typer.Argument(
            help="An .npz with uint8 (n, H, W, C) as arr_0, an .npy (n, C, ...) in [-1, 1], or a folder of `sample`."
        ),
    ],
    *,
    data: Annotated[
        str, typer.Option(help="What to compare with: the test split of a data set as elsewhere, or an .npz or .npy.")
    ],
    extractor: Annotated[
        str | None,
        typer.Option(help="A transformers folder, a TorchScript file or file.py:function; else one is trained here."),
    ] = None,
    metrics: Annotated[str, typer.Option(help="Comma-separated.")] = "frechet,kernel,precision,recall,density,coverage",
    neighbors: Annotated[int, typer.Option(min=1, help="k of precision, recall, density and coverage.")] = 5,
    num_test: Annotated[
        int | None, typer.Option(help="Samples of the test split to compare with; all where not given.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for scores.csv and scores.json.")] = None,
    reading: options.Given,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Score samples against real data in the features of a named extractor, with intervals and warnings."""
    from dataclasses import asdict

    from layerprobe.analyses.generation import check_metrics, open_encoder
    from layerprobe.analyses.runs import describe_scores, open_comparison, score_run, write_scores
    from layerprobe.checkpoints import resolve_device

    names = options.names(metrics)
    check_metrics(names)
    if out is not None and out.is_file():
        raise ValueError(f"{out} is a file, not a folder; choose another --out")
    reading = options.located_vae(reading)
    generated, splits = open_comparison(samples, data, reading, num_test=num_test)
    given = None if extractor is None else open_encoder(extractor, option="--extractor", device=resolve_device(device))
    record = {"samples": str(samples), "data": data, "metrics": names, "neighbors": neighbors, "seed": seed}
    if dry_run:
        record |= {"num_samples": len(generated), "num_reference": len(splits.test)}
        record |= {"extractor": given.name if given else "trained on the data"}
        emit(record, [f"{key}: {value}" for key, value in record.items()], as_json=as_json)
        return
    with progress_bar() as progress:
        scores, warnings = score_run(
            generated, splits, reading, extractor=given, metrics=names, k=neighbors, seed=seed, progress=progress
        )
    record |= {"extractor": scores[0].extractor, "scores": [asdict(s) for s in scores], "warnings": list(warnings)}
    if out is not None:
        write_scores(out, scores, record)
    emit(record, describe_scores(scores, warnings), as_json=as_json)
