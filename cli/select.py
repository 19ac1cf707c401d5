"""`layerprobe select`: ranked layer pairs of a run, and single layers that people ask for."""

from __future__ import annotations

from typing import Annotated

import typer

from layerprobe.analyses.selection import PairLimits
from layerprobe.cli import options
from layerprobe.cli.fields import from_dataclasses
from layerprobe.cli.output import emit
from layerprobe.cli.parsing import names


@from_dataclasses()
def select(
    run: options.Run,
    *,
    criteria: Annotated[
        str | None,
        typer.Option(help="Criteria to rank by, with equal weights: 'CKA,recoverability gap'."),
    ] = None,
    label_free: Annotated[bool, typer.Option("--label-free", help="Rank without anything that needs labels.")] = False,
    limits: PairLimits,
    keep: Annotated[
        bool, typer.Option("--keep", help="Make this the run's own selection, which confirm, plot and report use.")
    ] = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Rank the layer pairs of a run again, with reasons, and name layers for other uses; a what-if without --keep."""
    from layerprobe.analyses.report import write_report
    from layerprobe.analyses.runs import (
        RunFolder,
        choose_layers,
        describe_ownership,
        describe_recommendations,
        describe_selection,
        draw_figures,
        recommend_layers,
        selection_record,
    )

    selection = choose_layers(
        run,
        criteria=names(criteria) if criteria else None,
        label_free=label_free or None,
        limits=limits,
    )
    folder = RunFolder(run)
    folder.keep_selection(selection, replace=keep)
    if keep:
        draw_figures(run)
        write_report(run)
    answers = recommend_layers(run, selection)
    lines = [*describe_ownership(run, selection), *describe_selection(selection, num_pairs=10)]
    lines += describe_recommendations(answers)
    record = {"run": str(run), "is_kept": folder.selection() == selection} | selection_record(selection)
    emit(record | {"recommendations": [answer.to_dict() for answer in answers]}, lines, as_json=as_json)
