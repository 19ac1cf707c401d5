"""Tables of runs that were never made, for tests of figures and of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

BLOCKS = [f"blocks.{i}" for i in range(8)]
LEVELS = (0.1, 0.3, 0.5)
COLUMNS = ["source", "layer", "layer_index", "noise_level", "metric", "split", "value", "low", "high", "note"]


def quality_table(
    layers: Sequence[str] = BLOCKS,
    levels: Sequence[float] = LEVELS,
    *,
    missing: Sequence[tuple[str, float]] = (),
    metrics: Sequence[str] = ("probe accuracy", "effective rank"),
) -> pd.DataFrame:
    """Accuracies rise to 0.97 at two thirds of the depth and fall with the noise; random weights stay below."""
    rows: list[tuple[Any, ...]] = []
    best = 2 * (len(layers) - 1) // 3
    for level in levels:
        drop = level - levels[0]
        for metric in metrics:
            scale, splits = (100, ("train",)) if metric == "effective rank" else (1, ("validation", "test"))
            for split in splits:
                shift = 0.01 if split == "validation" else 0.0
                for i, layer in enumerate(layers):
                    model = (0.97 - 0.5 * drop - 0.3 * abs(i - best) / len(layers)) * scale - shift
                    random = (0.6 - 0.4 * drop - 0.05 * i / len(layers)) * scale
                    half = 0.02 if scale == 1 else np.nan
                    if (layer, level) in missing:
                        model = np.nan
                    rows.append(("model", layer, i, level, metric, split, model, model - half, model + half, "C=1"))
                    rows.append(
                        ("random weights", layer, i, level, metric, split, random, random - half, random + half, "")
                    )
                raw = (0.8 - 0.6 * drop) * scale
                rows.append(("raw input", "input", -1, level, metric, split, raw, raw - half, raw + half, ""))
    return pd.DataFrame(rows, columns=COLUMNS)


def similarity_table(
    layers: Sequence[str] = BLOCKS, levels: Sequence[float] = LEVELS, *, both_orders: bool = True
) -> pd.DataFrame:
    at = [(layer, level, i) for i, layer in enumerate(layers) for level in levels]
    rows = [
        (a, p, b, q, *[np.exp(-abs(i - j) / len(layers) - abs(p - q))] * 3)
        for first, (a, p, i) in enumerate(at)
        for second, (b, q, j) in enumerate(at)
        if both_orders or first < second
    ]
    measures = ["cka", "mutual_knn", "cknna"]
    return pd.DataFrame(rows, columns=["layer_a", "noise_level_a", "layer_b", "noise_level_b", *measures])


ARMS = {"no alignment": 1.0, "pick": 0.8, "bad control": 1.2}


def confirmation_table(num_seeds: int = 3, arms: Mapping[str, float] = ARMS) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(num_seeds):
        luck = rng.normal(0, 0.1)
        for arm, factor in arms.items():
            for step in (0, 1000, 2000):
                value = 20.0 if step == 0 else (3000 / step + luck) * factor + rng.normal(0, 0.01)
                rows += [(arm, seed, step, "Frechet distance", value), (arm, seed, step, "held-out loss", value / 10)]
    return pd.DataFrame(rows, columns=["arm", "seed", "step", "metric", "value"])


def title_of(figure: Figure) -> str:
    return " ".join(figure.get_suptitle().split())
