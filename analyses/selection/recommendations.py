"""Single layers that people ask for, from the tables of a run: for features, for an outside encoder, to leave out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from layerprobe.analyses.selection.pair_means import NOISE_LIDAR
from layerprobe.analyses.selection.ranking import Selection
from layerprobe.analyses.tables import (
    MODEL,
    PROBE,
    STUDENT_NEED,
    TEACHER_LIDAR,
    TEACHER_NEED,
    read_evidence,
    read_quality,
)
from layerprobe.layersync import depth_heuristic


@dataclass(frozen=True)
class Recommendation:
    """One answer, and the layers that it names.

    Attributes:
        question: "features", "encoder" or "prune".
        text: For people, with its numbers and what it rests on.
        layers: Best first; empty where there is none.
        noise_level: Where it is of one noise level.
    """

    question: str
    text: str
    layers: tuple[str, ...]
    noise_level: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def recommendations(run: str | Path, selection: Selection) -> list[Recommendation]:
    """What the run says of single layers.

    Args:
        run: A run folder with quality.csv and evidence.csv.
        selection: Of this run; without labels the answers are too.
    """
    quality, evidence = read_quality(Path(run) / "quality.csv"), read_evidence(Path(run) / "evidence.csv")
    model = quality[quality["source"] == MODEL]
    return [
        for_features(model, evidence, label_free=selection.label_free),
        for_encoder(model, selection.criteria.layers),
        to_prune(evidence, selection.criteria.layers),
    ]


def for_features(quality: pd.DataFrame, evidence: pd.DataFrame, *, label_free: bool = False) -> Recommendation:
    """The layer and the noise level whose features tell most, for use downstream.

    Chosen on the validation split, its accuracy told on the test split. Without labels by noise-LiDAR.
    """
    if label_free:
        rows = evidence[(evidence["criterion"] == TEACHER_LIDAR) & evidence["noise_level"].notna()]
        rows = rows.rename(columns={"teacher": "layer"}).drop_duplicates(["layer", "noise_level"])
        metric = NOISE_LIDAR
    else:
        rows = quality[(quality["metric"] == PROBE) & (quality["split"] == "validation")]
        metric = PROBE
    rows = rows.dropna(subset="value")
    if rows.empty:
        return Recommendation("features", f"Nothing is known of the features: the run has no {metric}.", ())
    best = rows.sort_values("value", ascending=False, kind="stable").iloc[0]
    close = rows[rows["value"] >= best["low"]].sort_values("value", ascending=False)
    others = [f"{row.layer} at {row.noise_level:g}" for row in close.itertuples() if row.Index != best.name]
    told = f"{metric} {best['value']:.3f} ({best['low']:.3f} to {best['high']:.3f})"
    if not label_free:
        told += _on_test(quality, best)
    tied = f"; {_listed(others)} cannot be told from it" if others else ""
    text = f"The richest features are those of {best['layer']} at noise level {best['noise_level']:g}: {told}{tied}."
    layers = tuple(dict.fromkeys([best["layer"], *close["layer"]]))
    return Recommendation("features", text, layers, float(best["noise_level"]))


def _on_test(quality: pd.DataFrame, best: Any) -> str:
    same = quality[(quality["metric"] == PROBE) & (quality["split"] == "test")]
    same = same[(same["layer"] == best["layer"]) & (same["noise_level"] == best["noise_level"])]
    return f", {same['value'].item():.3f} on samples that nothing was chosen on" if len(same) == 1 else ""


def for_encoder(quality: pd.DataFrame, layers: Sequence[str]) -> Recommendation:
    """The layer to align with an outside encoder, as REPA does.

    Published depths stand at about 0.3 of the network: early, so that the layers after it are free for detail; aligning
    deeper layers raised probe accuracy there and worsened FID. What was measured here does not overrule that.

    Source: REPA, Yu et al. 2024 (arXiv:2410.06940), Table 2.
    """
    if len(layers) < 2:
        return Recommendation("encoder", "There are fewer than two layers.", ())
    layer = depth_heuristic(tuple(layers)).student
    known = quality[quality["metric"].str.startswith("CKA with ") & (quality["layer"] == layer)]
    known = known.dropna(subset="value")
    measured = "".join(
        f" Its mean {metric} is {rows['value'].mean():.3f}." for metric, rows in known.groupby("metric", sort=False)
    )
    text = f"To align with an outside encoder: {layer}, at about 0.3 of the depth, where REPA aligns.{measured}"
    return Recommendation("encoder", text, (layer,))


def to_prune(evidence: pd.DataFrame, layers: Sequence[str]) -> Recommendation:
    """Layers without which the loss does not rise beyond the uncertainty, each skipped alone."""
    means = evidence[evidence["noise_level"].isna()]
    known: dict[str, Any] = {}
    for criterion, column in ((TEACHER_NEED, "teacher"), (STUDENT_NEED, "student")):
        rows = means[means["criterion"] == criterion].dropna(subset="value")
        known |= {getattr(row, column): row for row in rows.itertuples()}
    if not known:
        return Recommendation("prune", "What skipping a layer costs was not measured, or none can be skipped.", ())
    order = sorted((layer for layer in layers if layer in known), key=lambda layer: known[layer].value)
    free = tuple(layer for layer in order if known[layer].low <= 0)
    least = order[0]
    costs = f"the loss rises by {known[least].value:.4f} ({known[least].low:.4f} to {known[least].high:.4f})"
    if free:
        text = f"The network does as well without {_listed(free)}, each alone; without {least} {costs}."
    else:
        text = f"No layer can be left out; the one that is needed least is {least}: without it {costs}."
    return Recommendation("prune", text, free)


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = list(names[:most])
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
