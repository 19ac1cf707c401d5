"""`layerprobe select`: ranked layer pairs of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit


def select(
    run: options.Run,
    label_free: Annotated[bool, typer.Option("--label-free", help="Rank without labels, by effective rank.")] = False,
    exclude_tail: Annotated[float, typer.Option(min=0, max=1, help="Share of last layers that cannot teach.")] = 0.2,
    min_distance: Annotated[
        int | None, typer.Option(min=1, help="Layers between student and teacher, at least.")
    ] = None,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Rank the layer pairs of a run again, with reasons, and write selection.json."""
    from layerprobe.analyses import runs

    chosen = options.given(label_free=label_free or None, exclude_tail=exclude_tail, min_distance=min_distance)
    selection = runs.choose_layers(run, **chosen)
    emit({"run": str(run)} | runs.selection_record(selection), runs.describe(selection, num_pairs=10), as_json=as_json)
