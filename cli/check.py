"""`layerprobe check`: the layers that a configuration of another trainer aligns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.analyses.selection import TRAINERS
from layerprobe.cli import options
from layerprobe.cli.fields import from_dataclasses
from layerprobe.cli.output import emit
from layerprobe.cli.parsing import blocks, existing
from layerprobe.options import TRAINER_PANEL


@from_dataclasses()
def check(
    configuration: Annotated[
        Path,
        typer.Argument(
            help="Options of another trainer: JSON, TOML, YAML, or a script with a command line.",
            callback=existing("configuration", "pass a file with the options of the training"),
        ),
    ],
    *,
    trainer: Annotated[
        str | None,
        typer.Option(
            "--for",
            help=f"Trainer; recognized by its options if not given: {', '.join(TRAINERS)}.",
            rich_help_panel=TRAINER_PANEL,
        ),
    ] = None,
    num_blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks",
            help="Number of blocks, such as 28; two lists of blocks as double_blocks:19,single_blocks:38.",
            rich_help_panel=TRAINER_PANEL,
        ),
    ] = None,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Name the layers that a configuration of another trainer would align, and what speaks against them.

    The exit code is 1 if a check finds an error, and 0 if it finds only cautions.

    Examples:
        # Which layers would this training align?
        layerprobe check config.toml
        # The trainer named, with the number of blocks of its network.
        layerprobe check train.sh --for musubi --blocks 40
    """
    from layerprobe.analyses.runs import check_config

    record = check_config(configuration, trainer=trainer, layers=blocks(num_blocks) if num_blocks else ())
    lines = record.pop("lines")
    emit(record, lines, as_json=as_json)
    if record["failed"]:
        raise typer.Exit(1)
