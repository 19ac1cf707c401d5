"""What `probe`, `analyze` and `quickstart` print when a run is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe.cli.output import emit
from layerprobe.ranks import current

if TYPE_CHECKING:
    from layerprobe.analyses.runs import LevelGrid
    from layerprobe.analyses.selection import Selection


def show_run(
    run: Path,
    selection: Selection,
    *,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    record: Mapping[str, Any] | None = None,
    following: Sequence[tuple[str, str]] = (),
    quiet: bool = False,
    verbose: bool = False,
    as_json: bool = False,
) -> None:
    """Prints a run: all layers at all noise levels, the single answers, the pick and why, and what to do next.

    Args:
        run: Folder of the run.
        selection: Its selection.
        before: Lines about how it was measured.
        after: Lines about what a trial found.
        record: What belongs to the record besides.
        following: The two commands to name, each with what it is for; those of the run by default.
        quiet: Whether to print the answer alone.
        verbose: Whether to print also how the pick is ranked.
        as_json: Whether to print the record alone.
    """
    if not current().is_first:
        return
    from layerprobe.analyses.runs import (
        answer_run,
        describe_answers,
        describe_copies,
        describe_labels,
        describe_pick,
        describe_selection,
        level_grid,
        next_commands,
        selection_record,
    )

    answers = answer_run(run, selection)
    whole = {"run": str(run)} | selection_record(selection) | {"answers": answers.to_dict()} | dict(record or {})
    if quiet and not as_json:
        emit(whole, [str(selection.pick or "none")], as_json=False)
        return
    lines: list[str | LevelGrid] = [*before, *describe_copies(run), *describe_labels(run)]
    grid = level_grid(run, answers)
    if grid is not None:
        lines += ["", *_explained(grid), grid, ""]
    lines += describe_answers(answers)
    lines += ["", *(describe_selection(selection) if verbose else describe_pick(selection)), *after]
    lines += ["", f"report   {run / 'report.html'}", "next:"]
    for purpose, command in following or next_commands(run, selection):
        lines += [f"  # {purpose}", f"  {command}"]
    emit(whole, lines, as_json=as_json)


def _explained(grid: LevelGrid) -> list[str]:
    """What the numbers of the grid are; each sentence one line."""
    controls = {
        "random weights": "random weights, the best layer of the same network before training",
        "raw input": "raw input, the noisy sample itself",
    }
    metric = f"{grid.metric[:1].upper()}{grid.metric[1:]}"
    lines = [f"{metric}: {grid.meaning}.", "Noise level: 0 is the clean sample, 1 is pure noise."]
    if grid.controls:
        lines.append(f"Controls: {'; '.join(controls[name] for name, _ in grid.controls)}.")
    added = "; + where training added most over the better control" if grid.added_most else ""
    return [*lines, f"Marks: * the richest features{added}."]
