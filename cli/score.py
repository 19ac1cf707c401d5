"""`layerprobe score`: distance between generated and real samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.costs import emit_forecast, tell_forecast, tell_took
from layerprobe.cli.fields import Given, from_dataclasses, only, without
from layerprobe.cli.output import emit, progress_bar
from layerprobe.cli.parsing import existing, names
from layerprobe.data import DataSource
from layerprobe.extraction import ExtractionPlan
from layerprobe.options import DATA_PANEL, OUTPUT_PANEL, PROBING_PANEL
from layerprobe.ranks import current


@from_dataclasses(several_processes=True)
def score(
    samples: Annotated[
        Path,
        typer.Argument(
            help="An .npz with uint8 (n, H, W, C) as arr_0, an .npy (n, C, ...) in [-1, 1], or a folder of `sample`.",
            callback=existing("file or folder of samples", "pass an .npz, an .npy or a folder of `layerprobe sample`"),
        ),
    ],
    *,
    data: Annotated[DataSource, without(*options.COUNTS)],
    extractor: Annotated[
        str | None,
        typer.Option(
            help="Feature extractor: a transformers folder, a TorchScript file or file.py:function; one is trained on "
            "the data if not given.",
            rich_help_panel=PROBING_PANEL,
        ),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Metrics, separated by commas.", rich_help_panel=PROBING_PANEL)
    ] = "frechet,kernel,precision,recall,density,coverage",
    neighbors: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of neighbors k of precision, recall, density and coverage.",
            rich_help_panel=PROBING_PANEL,
        ),
    ] = 5,
    num_test: Annotated[
        int | None,
        typer.Option(
            help="Number of samples of the test split to compare with; all if not given.", rich_help_panel=DATA_PANEL
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for scores.csv and scores.json.", rich_help_panel=OUTPUT_PANEL)
    ] = None,
    extraction_options: Annotated[Given, only(ExtractionPlan, "precision")],
    seed: options.Seed = 0,
    device: options.Device = "auto",
    deterministic: options.Deterministic = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Score samples against real data in the features of an extractor, with intervals and warnings.

    They are compared with the test split of --data, or with an .npz or .npy file given there.

    Examples:
        # Samples of `layerprobe sample` against the images that the model was trained on.
        layerprobe score samples/ --data images/ --out scores/
        # Two archives, by the features of an encoder, two metrics.
        layerprobe score archive/samples.npz --data real.npz --extractor ./dinov2-base --metrics frechet,precision
    """
    from dataclasses import asdict

    from layerprobe.analyses.generation import check_metrics, check_neighbors, open_encoder
    from layerprobe.analyses.runs import (
        SCORES,
        Cost,
        check_scores,
        describe_scores,
        open_comparison,
        rough_score_seconds,
        score_clock,
        score_cost,
        score_run,
        write_scores,
    )
    from layerprobe.checkpoints import resolve_device
    from layerprobe.precision import rounded_by

    metric_names = names(metrics)
    check_metrics(metric_names)
    if out is not None and out.is_file():
        raise ValueError(f"{out} is a file, not a folder; choose another --out")
    generated, splits = open_comparison(samples, data, num_test=num_test)
    check_neighbors(metric_names, neighbors, len(generated), len(splits.test))
    encoder = None
    if extractor is None and extraction_options["precision"] != "auto":
        raise ValueError("--precision has no effect without --extractor; pass it too, or leave out --precision")
    if extractor is not None:
        encoder = open_encoder(extractor, option="--extractor", device=resolve_device(device), **extraction_options)
    record = {
        "samples": str(samples),
        "data": data.source,
        "metrics": metric_names,
        "neighbors": neighbors,
        "seed": seed,
        **(rounded_by(encoder.precision) if encoder else {}),
    }
    if out is not None:
        check_scores(out, record)

    def cost() -> Cost:
        return score_cost(
            generated,
            splits,
            data,
            extractor=encoder,
            seed=seed,
            metrics=metric_names,
            k=neighbors,
            processes=current().world_size,
        )

    if dry_run:
        record |= {"num_samples": len(generated), "num_reference": len(splits.test)}
        record |= {"extractor": encoder.name if encoder else "trained on the data"}
        emit_forecast(record, cost(), as_json=as_json)
        return
    clock = None
    if out is not None:
        clock = score_clock(out)
        clock.foretell(
            SCORES, lambda: rough_score_seconds(generated, splits, data, extractor=encoder), cost, tell_forecast
        )
    with progress_bar() as progress:
        scores, warnings = score_run(
            generated,
            splits,
            data,
            extractor=encoder,
            metrics=metric_names,
            k=neighbors,
            seed=seed,
            clock=clock,
            progress=progress,
        )
    record |= {"extractor": scores[0].extractor, "scores": [asdict(s) for s in scores], "warnings": list(warnings)}
    if out is not None and current().is_first:
        write_scores(out, scores, record, clock=clock)
        tell_took(out)
    emit(record, describe_scores(scores, warnings), as_json=as_json)
