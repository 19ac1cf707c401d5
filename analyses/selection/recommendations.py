"""Recommendations of single layers: for features, to align with an external encoder, to leave out.

The records hold numbers. `layerprobe.analyses.wording` turns them into sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import pandas as pd

from layerprobe.analyses.selection.controls import MAJORITY, measured_controls
from layerprobe.analyses.selection.records import Selection
from layerprobe.analyses.tables import MODEL, NOISE_LIDAR, PROBE, PairEvidence
from layerprobe.extraction import LOSS_INCREASE

# Objections to a run whose features mean nothing, for whatever purpose.
_MEANINGLESS = ("network does not denoise", "nothing but noise")
# Depth of the student that REPA aligns with its encoder: 8 of 24 to 28 blocks.
_ENCODER_DEPTH = 0.3
LevelEnd = Literal["", "lowest", "highest"]


@dataclass(frozen=True)
class Candidate:
    """A layer, at one noise level or averaged over all, with the value by which it is judged.

    Attributes:
        layer: Name of the layer.
        noise_level: Noise level; None for the mean over all levels.
        value: Value of the metric.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
    """

    layer: str
    noise_level: float | None
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Recommendation:
    """The layers to use for one purpose.

    Attributes:
        purpose: "features" for use downstream, "encoder" to align with an external encoder, "prune" to leave out.
        metric: Metric by which the layers are judged; "" if they are chosen by depth alone.
        candidates: Layers: the best one first, then those that the data cannot tell from it. For "prune" all layers
            that were skipped, the least needed one first; those whose interval reaches 0 can be left out.
        test_value: Value of the best layer on the test split, which nothing was chosen on; None if it is missing.
        by_depth: Layer that is chosen by its depth alone, for "encoder"; "" otherwise.
        encoder_similarity: Mean CKA of that layer with external encoders, by metric.
        level_end: Whether the noise level of the best layer, for "features", is the lowest or the highest of those that
            were measured, so that one beyond it may be better; "" if it lies between others, or is 0 or 1.
        controls: Accuracy of each control at the noise level of the best layer, (name, accuracy), for "features".
    """

    purpose: Literal["features", "encoder", "prune"]
    metric: str
    candidates: tuple[Candidate, ...]
    test_value: float | None = None
    by_depth: str = ""
    encoder_similarity: tuple[tuple[str, float], ...] = ()
    level_end: LevelEnd = ""
    controls: tuple[tuple[str, float], ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, best first; for "prune" only those that can be left out."""
        if self.by_depth:
            return (self.by_depth,)
        chosen = [c for c in self.candidates if c.low <= 0] if self.purpose == "prune" else self.candidates
        return tuple(dict.fromkeys(candidate.layer for candidate in chosen))

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as JSON values."""
        return asdict(self) | {"layers": list(self.layers)}


def recommend(quality: pd.DataFrame, evidence: PairEvidence, selection: Selection) -> list[Recommendation]:
    """Recommends single layers for each purpose; none where the features of the whole run mean nothing.

    Args:
        quality: Quality table of the run.
        evidence: Evidence of the run.
        selection: Selection of the run; if it used no labels, the recommendations use none either.
    """
    if any(objection.code in _MEANINGLESS for objection in selection.refusal[1]):
        return []
    model = quality[quality["source"] == MODEL]
    features = for_features(model, evidence, label_free=selection.label_free)
    if features.candidates and (majority := dict(selection.basis.controls).get(MAJORITY)) is not None:
        level = features.candidates[0].noise_level
        assert level is not None
        controls = {MAJORITY: majority} | measured_controls(quality, [level])
        features = replace(features, controls=tuple(controls.items()))
    return [
        features,
        for_encoder(model, selection.basis.layers),
        to_prune(evidence),
    ]


def for_features(quality: pd.DataFrame, evidence: PairEvidence, *, label_free: bool = False) -> Recommendation:
    """Recommends the layer and noise level with the highest probe accuracy, or noise-LiDAR without labels.

    It is chosen on the validation split; its accuracy on the test split is reported.
    """
    if label_free:
        measured = _by_level(evidence, NOISE_LIDAR)
        return Recommendation("features", NOISE_LIDAR, _tied(measured), level_end=_level_end(measured))
    rows = quality[(quality["metric"] == PROBE) & (quality["split"] == "validation")].dropna(subset="value")
    measured = [_candidate(row) for row in rows.itertuples()]
    candidates = _tied(measured)
    test_value = _on_test(quality, candidates)
    return Recommendation("features", PROBE, candidates, test_value, level_end=_level_end(measured))


def for_encoder(quality: pd.DataFrame, layers: Sequence[str]) -> Recommendation:
    """Recommends the layer to align with an external encoder, as REPA does.

    The published depth is about 0.3 of the network: early, so that the later layers are free for detail. In REPA,
    aligning deeper layers raised probe accuracy and worsened FID. The measurements of the run do not change the choice.

    Source: REPA, Yu et al. 2024 (arXiv:2410.06940), Table 2.
    """
    if len(layers) < 2:
        return Recommendation("encoder", "", ())
    layer = layers[max(round(_ENCODER_DEPTH * len(layers)), 1) - 1]
    rows = quality[quality["metric"].str.startswith("CKA with ") & (quality["layer"] == layer)].dropna(subset="value")
    similarity = tuple((str(metric), float(of["value"].mean())) for metric, of in rows.groupby("metric", sort=False))
    return Recommendation("encoder", "", (), by_depth=layer, encoder_similarity=similarity)


def to_prune(evidence: PairEvidence) -> Recommendation:
    """Recommends layers to leave out: if one of them is skipped, the loss does not rise beyond the uncertainty."""
    numbers = {layer: evidence.layer_number(LOSS_INCREASE, layer) for layer in evidence.layers}
    candidates = [Candidate(layer, None, n.value, n.low, n.high) for layer, n in numbers.items() if n.value == n.value]
    return Recommendation("prune", LOSS_INCREASE, tuple(sorted(candidates, key=lambda c: c.value)))


def _by_level(evidence: PairEvidence, name: str) -> list[Candidate]:
    quantity = evidence.by_layer.get(name)
    if quantity is None:
        return []
    return [
        Candidate(layer, level, *(float(of[v, i]) for of in (quantity.value, quantity.low, quantity.high)))
        for v, level in enumerate(evidence.noise_levels)
        for i, layer in enumerate(evidence.layers)
        if quantity.value[v, i] == quantity.value[v, i]
    ]


def _candidate(row: Any) -> Candidate:
    return Candidate(str(row.layer), float(row.noise_level), float(row.value), float(row.low), float(row.high))


def _tied(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The best candidate, and those not below the lower end of its interval; all by falling value."""
    ordered = sorted(candidates, key=lambda candidate: -candidate.value)
    return tuple(candidate for candidate in ordered if candidate.value >= ordered[0].low or candidate is ordered[0])


def _level_end(candidates: Sequence[Candidate]) -> LevelEnd:
    """At which end of the measured noise levels the best candidate lies, if there is room beyond it."""
    levels = sorted({c.noise_level for c in candidates if c.noise_level is not None})
    if len(levels) < 2:
        return ""
    best = _tied(candidates)[0].noise_level
    if best == levels[0] > 0:
        return "lowest"
    return "highest" if best == levels[-1] < 1 else ""


def _on_test(quality: pd.DataFrame, candidates: Sequence[Candidate]) -> float | None:
    if not candidates:
        return None
    best = candidates[0]
    rows = quality[(quality["metric"] == PROBE) & (quality["split"] == "test") & (quality["layer"] == best.layer)]
    rows = rows[rows["noise_level"] == best.noise_level]
    return float(rows["value"].item()) if len(rows) == 1 else None
