"""`layerprobe plot`: the figures of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit
from layerprobe.cli.parsing import names
from layerprobe.options import OUTPUT_PANEL


def plot(
    run: options.Run,
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            help="Formats, separated by commas: png, svg or pdf, with embedded fonts.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = "png,svg",
    only: Annotated[
        str,
        typer.Option(help="Names of the figures to draw, such as cka; all if not given.", rich_help_panel=OUTPUT_PANEL),
    ] = "",
    title: Annotated[
        bool, typer.Option("--title/--no-title", help="Whether figures have titles.", rich_help_panel=OUTPUT_PANEL)
    ] = True,
    tables: Annotated[
        bool, typer.Option("--tables", help="Also write every curve as CSV and LaTeX.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    width: Annotated[
        str | None,
        typer.Option(
            help="Draw for a paper: column (3.3 in) or full (7 in), one panel, no title; for curves, heatmaps, cka "
            "and confirmation.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    context: Annotated[
        str, typer.Option(help="paper, or talk for larger text; with --width.", rich_help_panel=OUTPUT_PANEL)
    ] = "paper",
    style: Annotated[
        str | None, typer.Option(help="A matplotlib style sheet, applied over ours.", rich_help_panel=OUTPUT_PANEL)
    ] = None,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Draw the figures of a run, for screens or for papers.

    Examples:
        # One column of a paper, with the numbers of every curve.
        layerprobe plot runs/mine --format pdf --width column --tables
        # One figure for a talk, in a style of your own.
        layerprobe plot runs/mine --only cka --width full --context talk --style talk.mplstyle
    """
    from layerprobe.analyses.runs import draw_figures, write_curves

    drawn = draw_figures(
        run,
        formats=names(formats),
        only=names(only) if only else (),
        title=title,
        width=width,
        context=context,
        style=style,
    )
    paths = [str(path) for path in (*drawn, *(write_curves(run) if tables else ()))]
    emit({"figures": paths}, paths, as_json=as_json)
