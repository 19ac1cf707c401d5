"""The comparison of several runs: curves in one figure, differences, and a block map."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

import pandas as pd

from layerprobe.analyses.figures import block_map_heatmap, comparison_curves, quality_over_steps, save_figure
from layerprobe.analyses.report import write_comparison
from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.tables import (
    MODEL,
    PROBE,
    RANK,
    ComparedRun,
    block_map,
    in_order,
    network_cka,
    quality_differences,
    what_differs,
    write_table,
)
from layerprobe.analyses.wording import block_map_sentences, difference_sentences
from layerprobe.checkpoints import training_record
from layerprobe.files import holding
from layerprobe.memory import pass_on

_SHOWN = 8  # lines in a text
# Trainers write 0400000.pt or checkpoint-500/; model-ema-0.999.pt, SiT-XL-2-256.pt and a folder 2025/ are no steps.
_END = r"(?=\.(?:pt|pth|ckpt|safetensors|bin)$)"
_STEP = re.compile(rf"(?<=/)(?:(?:checkpoint|ckpt|steps?|iter)[-_=]?(\d+)(?:(?=$|/)|{_END})|(\d+){_END})")


@dataclass(frozen=True, eq=False)
class Comparison:
    """What was compared, beside the files that were written.

    Attributes:
        differences: Differences of every run to the first, see `quality_differences`.
        block_maps: Most alike layers of the first run for every layer of each other run, see `block_map`.
        lines: The same in sentences.
        files: Files that were written, the page first.
    """

    differences: pd.DataFrame
    block_maps: pd.DataFrame
    lines: tuple[str, ...]
    files: tuple[Path, ...]

    def __repr__(self) -> str:
        left_out = len(self.lines) - _SHOWN
        rest = [f"... and {left_out} more in .lines"] if left_out > 0 else []
        return "\n".join([f"Comparison, page {self.files[0]}", *self.lines[:_SHOWN], *rest])

    def _repr_html_(self) -> str:
        first, *others = (escape(line) for line in repr(self).splitlines())
        return f"<b>{first}</b><ul>{''.join(f'<li>{line}</li>' for line in others)}</ul>"


@holding("out")
def compare_runs(runs: Sequence[str | Path], out: str | Path) -> Comparison:
    """Compares runs with the first one of them, and writes tables and figures into a folder.

    Written are the page `comparison.html`, `differences.csv`, `block-map.csv`, and as PNG and SVG `curves`, `steps` if
    the runs are steps of one training, and one `block-map-N` for each further run.

    Args:
        runs: Folders of two to eight finished runs.
        out: Folder of the results; created if it does not exist.

    Raises:
        FileNotFoundError: If a folder holds no finished run.
        ValueError: If there are fewer than two runs, or they have no metric or noise level in common.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs two runs, got {len(runs)}; pass the folders of two or more")
    steps = training_steps(runs)
    compared = [_opened(run, name) for run, name in zip(runs, _names(runs, steps), strict=True)]
    out = Path(out)
    metric = PROBE if all(PROBE in set(run.quality["metric"]) for run in compared) else RANK
    # Saving fixes a figure's layout, and the page has its own: every figure is drawn for each of the two.
    figures = {"curves": partial(comparison_curves, {run.name: run.quality for run in compared}, metric)}
    if steps and len({run.store.layers for run in compared}) == 1:
        by_step = {step: run.quality for step, run in zip(steps, compared, strict=True)}
        figures["steps"] = partial(quality_over_steps, by_step, metric)
    lines, differences, maps = list[str](), [], []
    first = compared[0]
    for number, other in enumerate(compared[1:], 1):
        reason = what_differs(first, other)
        if metric == PROBE:
            differences.append(quality_differences(first, other))
            lines += difference_sentences(differences[-1])
        if reason:
            lines.append(f"{other.name} has no block map to {first.name}: {reason}")
            continue
        cka = network_cka(other, first)
        table = block_map(other, first, cka)
        maps.append(table)
        lines += block_map_sentences(table, kept_order=in_order(list(table["layer_b"]), first.store.layers))
        layers = other.store.layers, first.store.layers
        names = other.name, first.name
        figures[f"block-map-{number}"] = partial(block_map_heatmap, cka.value, *layers, names=names)
    files = [path for name, draw in figures.items() for path in save_figure(draw(), out, name)]
    tables = {"differences.csv": differences, "block-map.csv": maps}
    for name, parts in tables.items():
        if parts:
            write_table(pd.concat(parts, ignore_index=True), out / name)
            files.append(out / name)
    found = _joined(differences), _joined(maps)
    drawn = [(draw(), f"{name}.png") for name, draw in figures.items()]
    files.insert(0, write_comparison(out, [run.name for run in compared], lines, drawn, *found))
    return Comparison(*found, tuple(lines), tuple(files))


def _opened(run: str | Path, name: str) -> ComparedRun:
    folder = RunFolder(run)
    folder.plan()  # which names a folder that is no run
    return ComparedRun(name, folder.store(MODEL), folder.quality(), folder.probe_scores())


def _names(runs: Sequence[str | Path], steps: Sequence[int] | None) -> list[str]:
    """The shortest ends of the paths that differ, with the training step if the runs are steps of one training."""
    paths = [Path(run).resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError(f"the run {paths[0]} is named twice; pass each run once")
    parts = next(n for n in range(1, 99) if len({path.parts[-n:] for path in paths}) == len(paths))
    names = ["/".join(path.parts[-parts:]) for path in paths]
    return [f"{name} ({step} steps)" for name, step in zip(names, steps, strict=True)] if steps else names


def training_steps(runs: Sequence[str | Path]) -> list[int] | None:
    """Returns the steps of runs that are steps of one training, by their checkpoints' records or names; else None.

    Args:
        runs: Folders of the runs.
    """
    for told in (_recorded_step, _named_step):
        found = [told(RunFolder(run).plan().checkpoint.path) for run in runs]
        steps = [one[0] for one in found if one is not None]
        trainings = {one[1] for one in found if one is not None}
        if len(steps) == len(runs) == len(set(steps)) and len(trainings) == 1:
            return steps
    return None


def _recorded_step(checkpoint: str) -> tuple[int, str] | None:
    """The step of a checkpoint of layerprobe, and what else its record says of the training."""
    try:
        record = dict(training_record(checkpoint))
    except (OSError, ValueError) as error:  # a checkpoint that has moved, or was passed as an object, says no step
        pass_on(error)
        return None
    steps = record.pop("steps", None)
    return None if steps is None else (steps, json.dumps(record, sort_keys=True))


def _named_step(checkpoint: str) -> tuple[int, str] | None:
    """The step in the name of a file or folder, such as 0400000.pt or checkpoint-500, and the path without it."""
    found = _STEP.search(checkpoint)
    return (int(found[1] or found[2]), _STEP.sub("", checkpoint)) if found else None


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
