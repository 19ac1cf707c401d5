"""`layerprobe convert`: unsafe formats to safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.checkpoints import CheckpointSource
from layerprobe.cli import options
from layerprobe.cli.fields import Given, from_dataclasses, only
from layerprobe.cli.output import emit
from layerprobe.options import OUTPUT_PANEL


@from_dataclasses()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A .pt, .ckpt, .pkl, .safetensors or index file, or a folder of these.",
            callback=options.existing_checkpoint,
        ),
    ],
    *,
    out: Annotated[
        Path,
        typer.Option(
            help="The .safetensors file to write; a .json file is written beside it.", rich_help_panel=OUTPUT_PANEL
        ),
    ],
    opening: Annotated[Given, only(CheckpointSource, "weights")],
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Write the weights of any checkpoint as safetensors, without running code from the file.

    Examples:
        # What is in the file?
        layerprobe convert last.ckpt --out model.safetensors --dry-run
        # Its averaged weights alone.
        layerprobe convert last.ckpt --weights ema --out ema.safetensors
    """
    from layerprobe.checkpoints import convert_checkpoint

    record = convert_checkpoint(source, out, dry_run=dry_run, **opening)
    others = ", ".join(record["containers"][1:])
    lines = [
        f"{record['format']}: {record['tensors']} tensors, {record['values']} values, {', '.join(record['dtypes'])}",
        f"weights: {record['container'] or 'the file itself'}" + (f" (also there: {others})" if others else ""),
        *([f"left as data, not run: {', '.join(record['foreign'])}"] if record["foreign"] else []),
        f"{'would write' if dry_run else 'wrote'} {out} and {out.with_suffix('.json')}",
    ]
    emit(record | {"out": str(out)}, lines, as_json=as_json)
