"""The comparison of several runs: curves in one figure, differences, and a block map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from layerprobe.analyses.figures import block_map_heatmap, comparison_curves, save_figure
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


@dataclass(frozen=True, eq=False)
class Comparison:
    """What was compared, beside the files that were written.

    Attributes:
        differences: Differences of every run to the first, see `quality_differences`.
        block_maps: Most alike layers of the first run for every layer of each other run, see `block_map`.
        lines: The same in sentences.
        files: Files that were written.
    """

    differences: pd.DataFrame
    block_maps: pd.DataFrame
    lines: tuple[str, ...]
    files: tuple[Path, ...]


@holding("out")
def compare_runs(runs: Sequence[str | Path], out: str | Path) -> Comparison:
    """Compares runs with the first one of them, and writes tables and figures into a folder.

    Written are `differences.csv`, `block-map.csv`, `curves` and one `block-map-N` for each further run, as PNG and SVG.

    Args:
        runs: Folders of two to eight finished runs.
        out: Folder of the results; created if it does not exist.

    Raises:
        FileNotFoundError: If a folder holds no finished run.
        ValueError: If there are fewer than two runs, or they have no metric or noise level in common.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs two runs, got {len(runs)}; pass the folders of two or more")
    compared = [_opened(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    out = Path(out)
    metric = PROBE if all(PROBE in set(run.quality["metric"]) for run in compared) else RANK
    figure = comparison_curves({run.name: run.quality for run in compared}, metric)
    files = list(save_figure(figure, out, "curves"))
    lines, differences, maps = [], [], []
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
        figure = block_map_heatmap(cka.value, *layers, names=(other.name, first.name))
        files += save_figure(figure, out, f"block-map-{number}")
    tables = {"differences.csv": differences, "block-map.csv": maps}
    for name, parts in tables.items():
        if parts:
            write_table(pd.concat(parts, ignore_index=True), out / name)
            files.append(out / name)
    return Comparison(_joined(differences), _joined(maps), tuple(lines), tuple(files))


def _opened(run: str | Path, name: str) -> ComparedRun:
    folder = RunFolder(run)
    folder.plan()  # which names a folder that is no run
    return ComparedRun(name, folder.store(MODEL), folder.quality(), folder.probe_scores())


def _names(runs: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that differ, with the training step where the checkpoint records one."""
    paths = [Path(run).resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError(f"the run {paths[0]} is named twice; pass each run once")
    parts = next(n for n in range(1, 99) if len({path.parts[-n:] for path in paths}) == len(paths))
    names = ["/".join(path.parts[-parts:]) for path in paths]
    steps = [_steps(run) for run in runs]
    return [name if step is None else f"{name} ({step} steps)" for name, step in zip(names, steps, strict=True)]


def _steps(run: str | Path) -> int | None:
    try:
        steps: int | None = training_record(RunFolder(run).plan().checkpoint.path).get("steps")
    except (OSError, ValueError):  # a checkpoint that has moved, or was passed as an object, says no step
        return None
    return steps


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
