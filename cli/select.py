"""`layerprobe select`: ranked layer pairs of a run, and single layers that people ask for."""

from __future__ import annotations

from typing import Annotated

import typer

from layerprobe.analyses.selection import TRAINERS, PairLimits, trainer_named
from layerprobe.cli import options
from layerprobe.cli.fields import from_dataclasses
from layerprobe.cli.output import emit
from layerprobe.cli.parsing import blocks, names
from layerprobe.options import OUTPUT_PANEL, RANKING_PANEL, TRAINER_PANEL


@from_dataclasses()
def select(
    run: options.Run,
    *,
    criteria: Annotated[
        str | None,
        typer.Option(
            help="Criteria to rank by, with equal weights: 'CKA,recoverability gap'.", rich_help_panel=RANKING_PANEL
        ),
    ] = None,
    label_free: Annotated[
        bool,
        typer.Option("--label-free", help="Rank without anything that needs labels.", rich_help_panel=RANKING_PANEL),
    ] = False,
    limits: PairLimits,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Make this the run's own selection, which confirm, plot and report use.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    trainer: Annotated[
        str | None,
        typer.Option(
            "--for",
            help=f"Also write the pick as another trainer does: {', '.join(TRAINERS)}.",
            rich_help_panel=TRAINER_PANEL,
        ),
    ] = None,
    num_blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks",
            help="For --for: all blocks of the network, such as 28 or double_blocks:19,single_blocks:38; needed if "
            "the run measured only the layers of --layers.",
            rich_help_panel=TRAINER_PANEL,
        ),
    ] = None,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Rank the layer pairs of a run again, with reasons, and name layers for other uses; a what-if without --keep.

    Examples:
        # What would be picked without labels? Nothing is changed.
        layerprobe select runs/mine --label-free
        # Rank by other criteria, and make that the run's own pick.
        layerprobe select runs/mine --criteria 'CKA,recoverability gap' --keep
        # The pick as the options of another trainer.
        layerprobe select runs/mine --for simpletuner --blocks 28
    """
    from layerprobe.analyses.report import write_report
    from layerprobe.analyses.runs import (
        RunFolder,
        answer_run,
        choose_layers,
        describe_answers,
        describe_options,
        describe_ownership,
        describe_selection,
        draw_figures,
        numbered_blocks,
        pick_for,
        selection_record,
    )

    if num_blocks and not trainer:
        raise ValueError("--blocks counts the blocks for another trainer; pass --for too")
    other = trainer_named(trainer) if trainer else None
    selection = choose_layers(
        run,
        criteria=names(criteria) if criteria else None,
        label_free=label_free or None,
        limits=limits,
    )
    written = other and pick_for(
        other, selection, blocks(num_blocks) if num_blocks else numbered_blocks(run, selection)
    )
    folder = RunFolder(run)
    folder.keep_selection(selection, replace=keep)
    if keep:
        draw_figures(run)
        write_report(run)
    answers = answer_run(run, selection)
    lines = [*describe_ownership(run, selection), *describe_selection(selection, num_pairs=10)]
    lines += describe_answers(answers)
    lines += describe_options(written) if written else []
    record = {"run": str(run), "is_kept": folder.selection() == selection} | selection_record(selection)
    record |= {"for": written} if written else {}
    emit(record | {"answers": answers.to_dict()}, lines, as_json=as_json)
