"""How well each measure without labels follows the probe: which one may stand in for it when a teacher is picked.

    python benchmarks/pair_rules/label_free.py RUN [RUN ...]

Every RUN is the folder of a probed run with labels. For each measure the table has, per run: Spearman with the probe
accuracy over all layers and noise levels; the same over the layers alone, averaged over the levels; and the accuracy
that is lost if the layer with the largest value is taken for the richest, of the layers that may teach. The last
column is the worst run of the second number. A measure that follows the probe only across levels follows the noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from layerprobe.analyses.runs import RunFolder
from layerprobe.analyses.selection import PairLimits
from layerprobe.analyses.tables import MODEL, PROBE, RECOVERABILITY, PairEvidence

Values = NDArray[np.float64]  # (noise levels, layers)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of probed runs with labels.")
    names, tables = [], []
    for run in parser.parse_args().runs:
        names.append(run.name)
        tables.append(compared(RunFolder(run)))
    table = pd.concat(dict(zip(names, tables, strict=True)), axis=1)
    by_layer = table.xs("by layer", axis=1, level=1)
    table["worst"] = by_layer.min(axis=1).where(by_layer.notna().all(axis=1))
    print(table.sort_values("worst", ascending=False).round(2).to_string())


def compared(folder: RunFolder) -> pd.DataFrame:
    """Returns how each measure of a run follows its probe, a row for each measure."""
    evidence = folder.evidence()
    probe = evidence.by_layer[PROBE].value
    tail = PairLimits().tail(evidence.layers)
    able = np.array([layer not in tail for layer in evidence.layers])
    rows = {name: agreement(values, probe, able) for name, values in measures(folder, evidence).items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["by cell", "by layer", "lost"])


def agreement(values: Values, probe: Values, able: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Returns Spearman over cells, Spearman over layers, and the accuracy that is lost by trusting the measure."""
    known = np.isfinite(values) & np.isfinite(probe)
    means, of_probe = values.mean(0), probe.mean(0)
    teachers = able & np.isfinite(means)
    if known.sum() < 3 or teachers.sum() < 2:
        return np.nan, np.nan, np.nan
    taken = int(np.argmax(np.where(teachers, means, -np.inf)))
    both = np.isfinite(means) & np.isfinite(of_probe)
    return (
        float(stats.spearmanr(values[known], probe[known]).statistic),
        float(stats.spearmanr(means[both], of_probe[both]).statistic),
        float(of_probe[teachers].max() - of_probe[taken]),
    )


def measures(folder: RunFolder, evidence: PairEvidence) -> Mapping[str, Values]:
    """Returns every measure of a run that needs no labels, larger meant as richer."""
    shape = (len(evidence.noise_levels), len(evidence.layers))
    found = {"depth": np.broadcast_to(evidence.depths, shape)}
    found |= {name: of.value for name, of in evidence.by_layer.items() if "accuracy" not in name}
    quality = folder.quality()
    quality = quality[(quality["source"] == MODEL) & ~quality["metric"].str.contains("accuracy|calibration")]
    for name, rows in quality.groupby("metric", sort=False):
        grid = rows.pivot_table(index="noise_level", columns="layer", values="value", aggfunc="mean", dropna=False)
        found.setdefault(str(name), grid.reindex(evidence.noise_levels).reindex(columns=evidence.layers).to_numpy())
    if RECOVERABILITY in evidence.by_pair:
        found[f"mean {RECOVERABILITY} as teacher"] = _as_teacher(evidence)
    for column in ("mutual_knn", "cka", "cknna"):
        found[f"{column} with the same layer at other levels"] = _stability(folder.similarity(), column, evidence)
    return found


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
