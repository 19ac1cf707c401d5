"""Comparison of runs: differences of quality, and which layer of one network is most like which of another.

Runs that measured the same samples with the same noise are compared sample by sample: intervals are paired, and layers
of two networks are compared by CKA at equal noise levels, whatever their numbers and widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from layerprobe.analyses.measures import Estimate, Floats, cka_estimates, mean_estimate, stacked
from layerprobe.analyses.tables.measurements import PROBE
from layerprobe.analyses.tables.quality import MODEL
from layerprobe.extraction import FeatureStore

MAX_SAMPLES = 512  # Gram matrices of all layers of both networks fit into memory then
DIFFERENCE_COLUMNS = (
    "run_a",
    "run_b",
    "noise_level",
    "compared",
    "layer_a",
    "layer_b",
    "value_a",
    "value_b",
    "difference",
    "low",
    "high",
    "interval",
)
BLOCK_MAP_COLUMNS = ("run_a", "run_b", "layer_a", "layer_b", "cka", "low", "high", "as_alike")
BEST, SAME = "best layer", "same layer"
PAIRED, UNPAIRED, NO_SCORES = "paired", "unpaired", "none: a run has no scores by sample; analyze it again"


@dataclass(frozen=True, eq=False)
class ComparedRun:
    """What a comparison needs of a run.

    Attributes:
        name: Name shown to the user.
        store: Features of the model.
        quality: Quality table.
        scores: Which samples of the test split the probe classifies correctly, by layer and noise level, arrays (n,);
            empty if they were not kept.
    """

    name: str
    store: FeatureStore
    quality: pd.DataFrame
    scores: Mapping[tuple[str, float], Floats]


def what_differs(a: ComparedRun, b: ComparedRun) -> str:
    """Returns why two runs cannot be compared sample by sample; "" if they can."""
    if not np.array_equal(a.store.ids, b.store.ids) or not np.array_equal(a.store.splits, b.store.splits):
        return "they measured different samples"
    if a.store.manifest["data"] != b.store.manifest["data"]:
        return "their samples differ in content, as after another resizing or encoding"
    if a.store.manifest["plan"]["seed"] != b.store.manifest["plan"]["seed"]:
        return "their noise has different seeds"
    if not common_levels(a, b):
        return "they have no noise level in common"
    return ""


def common_levels(a: ComparedRun, b: ComparedRun) -> tuple[float, ...]:
    """Returns the noise levels that both runs have."""
    return tuple(level for level in a.store.noise_levels if level in b.store.noise_levels)


def quality_differences(a: ComparedRun, b: ComparedRun) -> pd.DataFrame:
    """Compares the probe accuracy of two runs on the test split, at the noise levels that both have.

    At each level the best layers of the two are compared, chosen on the validation split, and every layer that both
    have by name. The difference is b minus a, with a 95 % interval: paired by sample if both measured the same samples
    with the same noise.

    Returns:
        One row per noise level and comparison, with the columns `DIFFERENCE_COLUMNS`.
    """
    is_paired = not what_differs(a, b)
    names = [layer for layer in a.store.layers if layer in b.store.layers]
    rows = []
    for level in common_levels(a, b):
        tables = [_at_level(run, level) for run in (a, b)]
        pairs = [(SAME, layer, layer) for layer in names]
        if all(table["validation"].notna().any() for table in tables):
            best_a, best_b = (str(table["validation"].idxmax()) for table in tables)
            pairs.insert(0, (BEST, best_a, best_b))
        for compared, layer_a, layer_b in pairs:
            values = [table["test"].get(layer, np.nan) for table, layer in zip(tables, (layer_a, layer_b), strict=True)]
            low, high, interval = _interval(
                a.scores.get((layer_a, level)), b.scores.get((layer_b, level)), is_paired=is_paired
            )
            rows.append(
                (a.name, b.name, level, compared, layer_a, layer_b, *values, values[1] - values[0], low, high, interval)
            )
    return pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS))


def _at_level(run: ComparedRun, level: float) -> pd.DataFrame:
    """Probe accuracy of the model's layers at a level, by layer and split."""
    rows = run.quality[
        (run.quality["source"] == MODEL) & (run.quality["metric"] == PROBE) & (run.quality["noise_level"] == level)
    ]
    table = rows.pivot_table(index="layer", columns="split", values="value", sort=False)
    return table.reindex(columns=["validation", "test"])


def _interval(a: Floats | None, b: Floats | None, *, is_paired: bool) -> tuple[float, float, str]:
    if a is None or b is None:
        return np.nan, np.nan, NO_SCORES
    if is_paired:
        difference = mean_estimate(b - a)
        value, half = float(difference.value), float(difference.half_width)
        return value - half, value + half, PAIRED
    value = float(b.mean() - a.mean())
    half = float(np.hypot(mean_estimate(a).half_width, mean_estimate(b).half_width))
    return value - half, value + half, UNPAIRED


def network_cka(a: ComparedRun, b: ComparedRun) -> Estimate:
    """Estimates debiased linear CKA between the layers of two networks, averaged over equal noise levels.

    Measured on the validation split, at most 512 samples, first noise draw.

    Returns:
        The estimate, shape (layers of a, layers of b).

    Raises:
        ValueError: If the runs cannot be compared sample by sample.
    """
    if reason := what_differs(a, b):
        raise ValueError(f"{a.name} and {b.name} cannot be compared layer by layer: {reason}")
    first = len(a.store.layers)
    levels = []
    for level in common_levels(a, b):
        features = [
            run.store.features(layer, level, split="validation")[:MAX_SAMPLES]
            for run in (a, b)
            for layer in run.store.layers
        ]
        levels.append(cka_estimates(features)[:first, first:])
    return stacked(levels).mean()


def block_map(a: ComparedRun, b: ComparedRun, cka: Estimate) -> pd.DataFrame:
    """Finds the layer of b that is most like each layer of a.

    Args:
        a: Run of the first network.
        b: Run of the second network.
        cka: Result of `network_cka`.

    Returns:
        One row per layer of a, with the columns `BLOCK_MAP_COLUMNS`: the layer of b with the highest CKA, that CKA with
        its 95 % interval, and the layers of b that the samples cannot tell from it, by the paired interval of the
        difference.
    """
    rows: list[tuple[Any, ...]] = []
    for i, layer in enumerate(a.store.layers):
        values = cka[i]
        best = int(np.argmax(values.value))
        gaps = Estimate(values.value[best] - values.value, values.influence[best] - values.influence)
        alike = [
            name
            for j, name in enumerate(b.store.layers)
            if j != best and gaps.value[j] <= gaps.half_width[j] + _ROUNDING
        ]
        value, half = float(values.value[best]), float(values.half_width[best])
        rows.append((a.name, b.name, layer, b.store.layers[best], value, value - half, value + half, " ".join(alike)))
    return pd.DataFrame(rows, columns=list(BLOCK_MAP_COLUMNS))


_ROUNDING = 1e-9  # of CKA between features that are equal


def in_order(matches: Sequence[str], layers: Sequence[str]) -> bool:
    """Whether matches to these layers never go back: the map keeps the order of the network."""
    places = [layers.index(match) for match in matches]
    return places == sorted(places)
