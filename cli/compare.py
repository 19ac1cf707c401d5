"""`layerprobe compare`: two or more runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit
from layerprobe.options import OUTPUT_PANEL


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Finished runs, two or more; the first is the reference.", callback=options.existing_run),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the figures and tables.", rich_help_panel=OUTPUT_PANEL)] = Path(
        "runs/comparison"
    ),
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Compare runs: quality curves, differences with intervals, and the most alike layers of two networks.

    Examples:
        # Two checkpoints of one training, against the first.
        layerprobe compare runs/step-10k runs/step-50k
        # Several runs, into a folder of your choice.
        layerprobe compare runs/base runs/lora runs/full --out runs/three
    """
    from layerprobe.analyses.runs import compare_runs

    comparison = compare_runs(runs, out)
    files = [str(path) for path in comparison.files]
    record: dict[str, Any] = {
        name: table.astype(object).where(table.notna(), None).to_dict("records")
        for name, table in (("differences", comparison.differences), ("block_map", comparison.block_maps))
    }
    record["files"] = files
    emit(record, [*comparison.lines, *(f"written  {path}" for path in files)], as_json=as_json)
