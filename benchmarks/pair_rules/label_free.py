"""How well each measure without labels follows the probe: which one may stand in for it when a teacher is picked.

    python benchmarks/pair_rules/label_free.py RUN [RUN ...]

Every RUN is the folder of a probed run with labels, or the `evidence.csv` of one, which has fewer measures. For each
measure the table has, per run: Spearman with the probe accuracy over the layers of one noise level, averaged over the
levels; the same of the means over levels; and the accuracy that is lost if the layer with the largest mean is taken for
the richest, of the layers that may teach. The last columns are the worst run of the second number and the mean of the
third.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from layerprobe.analyses.runs import RunFolder
from layerprobe.analyses.selection import PairLimits
from layerprobe.analyses.tables import MODEL, PROBE, RANK_GAP, RECOVERABILITY, PairEvidence

SPATIAL_GAP = "spatial structure gap"
Values = NDArray[np.float64]  # (noise levels, layers)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of probed runs with labels, or their evidence.")
    names, tables = [], []
    for run in parser.parse_args().runs:
        names.append(run.stem.removesuffix("-evidence"))
        tables.append(compared(run))
    table = pd.concat(dict(zip(names, tables, strict=True)), axis=1)
    worst = table.xs("by layer", axis=1, level=1).min(axis=1, skipna=False)
    table[("all", "worst")] = worst
    table[("all", "lost")] = table.xs("lost", axis=1, level=1).mean(axis=1, skipna=False)
    print(table.loc[worst.sort_values(ascending=False).index].round(2).to_string())


def compared(run: Path) -> pd.DataFrame:
    """Returns how each measure of a run follows its probe, a row for each measure."""
    evidence = PairEvidence.read_csv(run) if run.is_file() else RunFolder(run).evidence()
    probe = evidence.by_layer[PROBE].value
    tail = PairLimits().tail(evidence.layers)
    able = np.array([layer not in tail for layer in evidence.layers])
    found = of_evidence(evidence) | ({} if run.is_file() else of_tables(RunFolder(run), evidence))
    rows = {name: agreement(values, probe, able) for name, values in found.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["by level", "by layer", "lost"])


def agreement(values: Values, probe: Values, able: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Returns Spearman at equal level, Spearman of the means, and the accuracy that is lost by trusting the measure."""
    means, of_probe = values.mean(0), probe.mean(0)
    teachers = able & np.isfinite(means)
    if teachers.sum() < 2:
        return np.nan, np.nan, np.nan
    taken = int(np.argmax(np.where(teachers, means, -np.inf)))
    levels = [_spearman(of_level, accuracies) for of_level, accuracies in zip(values, probe, strict=True)]
    return (
        float(np.nanmean(levels)),
        _spearman(means, of_probe),
        float(of_probe[teachers].max() - of_probe[taken]),
    )


def _spearman(values: Values, probe: Values) -> float:
    known = np.isfinite(values) & np.isfinite(probe)
    return float(stats.spearmanr(values[known], probe[known]).statistic) if known.sum() > 2 else np.nan


def of_evidence(evidence: PairEvidence) -> dict[str, Values]:
    """Returns the measures of the evidence that need no labels, larger meant as richer."""
    shape = (len(evidence.noise_levels), len(evidence.layers))
    found = {"depth": np.broadcast_to(evidence.depths, shape)}
    found |= {name: of.value for name, of in evidence.by_layer.items() if "accuracy" not in name}
    for name, gap in (("effective rank", RANK_GAP), ("spatial contrast", SPATIAL_GAP)):
        if name not in found and gap in evidence.by_pair:
            found[name] = _above_first(evidence, gap)
    if RECOVERABILITY in evidence.by_pair:
        found[f"mean {RECOVERABILITY} as teacher"] = _as_teacher(evidence)
    return found


def of_tables(folder: RunFolder, evidence: PairEvidence) -> dict[str, Values]:
    """Returns the other measures of a run that need no labels."""
    found: dict[str, Values] = {}
    quality = folder.quality()
    quality = quality[(quality["source"] == MODEL) & ~quality["metric"].str.contains("accuracy|calibration")]
    for name, rows in quality.groupby("metric", sort=False):
        grid = rows.pivot_table(index="noise_level", columns="layer", values="value", aggfunc="mean", dropna=False)
        if name not in evidence.by_layer:
            found[str(name)] = grid.reindex(evidence.noise_levels).reindex(columns=evidence.layers).to_numpy()
    for column in ("mutual_knn", "cka", "cknna"):
        found[f"{column} with the same layer at other levels"] = _stability(folder.similarity(), column, evidence)
    return found


def _above_first(evidence: PairEvidence, gap: str) -> Values:
    """By how much a layer is above the first one, which orders the layers of a level as the quantity itself does."""
    values = np.zeros((len(evidence.noise_levels), len(evidence.layers)))
    first = evidence.students == 0
    values[:, evidence.teachers[first]] = evidence.by_pair[gap].value[:, first]
    return values


def _as_teacher(evidence: PairEvidence) -> Values:
    """The recoverability gap of the pairs that a layer teaches, averaged over their students."""
    gaps = evidence.by_pair[RECOVERABILITY].value
    means = np.full((len(evidence.noise_levels), len(evidence.layers)), np.nan)
    for teacher in set(evidence.teachers):
        means[:, teacher] = gaps[:, evidence.teachers == teacher].mean(1)
    return means


def _stability(similarity: pd.DataFrame, column: str, evidence: PairEvidence) -> Values:
    """How alike a layer is to itself at the other noise levels."""
    same = similarity[similarity["layer_a"] == similarity["layer_b"]]
    same = same[same["noise_level_a"] != same["noise_level_b"]]
    grid = same.pivot_table(index="noise_level_a", columns="layer_a", values=column, aggfunc="mean", dropna=False)
    values: Values = grid.reindex(evidence.noise_levels).reindex(columns=evidence.layers).to_numpy()
    return values


if __name__ == "__main__":
    main()
