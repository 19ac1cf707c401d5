"""`layerprobe select`: ranked layer pairs of a run, and single layers that people ask for."""

from __future__ import annotations

from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit
from layerprobe.cli.parsing import names


def select(
    run: options.Run,
    criteria: Annotated[
        str | None, typer.Option(help="Rank by these criteria of evidence.csv, equally: 'CKA,recoverability gap'.")
    ] = None,
    label_free: Annotated[bool, typer.Option("--label-free", help="Use nothing that needs labels.")] = False,
    exclude_tail: Annotated[float, typer.Option(min=0, max=1, help="Share of last layers that cannot teach.")] = 0.2,
    min_distance: Annotated[
        int | None, typer.Option(min=1, help="Layers between student and teacher, at least.")
    ] = None,
    max_cka: Annotated[
        float, typer.Option("--max-cka", min=-1, max=1, help="Pairs with a larger mean CKA are alike already.")
    ] = 0.9,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Rank the layer pairs of a run again, with reasons, write selection.json, and name layers for other uses."""
    from layerprobe.analyses.runs import (
        choose_layers,
        describe_recommendations,
        describe_selection,
        recommend_layers,
        selection_record,
    )
    from layerprobe.analyses.selection import PairLimits

    selection = choose_layers(
        run,
        criteria=names(criteria) if criteria else None,
        label_free=label_free or None,
        limits=PairLimits(exclude_tail=exclude_tail, min_distance=min_distance, max_cka=max_cka),
    )
    answers = recommend_layers(run, selection)
    lines = [*describe_selection(selection, num_pairs=10), *describe_recommendations(answers)]
    record = {"run": str(run)} | selection_record(selection)
    emit(record | {"recommendations": [answer.to_dict() for answer in answers]}, lines, as_json=as_json)
