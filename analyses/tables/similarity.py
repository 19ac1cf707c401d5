"""The similarity table: CKA, mutual kNN and CKNNA of all pairs of layers and noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from layerprobe.analyses.measures import Floats, cka_matrix, cknna, in_parallel, mutual_knn, neighbor_graph
from layerprobe.analyses.tables.csv_files import read_table
from layerprobe.analyses.tables.measurements import CPU, num_neighbors, num_workers
from layerprobe.extraction import FeatureStore
from layerprobe.ranks import ALONE, Ranks

SIMILARITY_COLUMNS = ("layer_a", "noise_level_a", "layer_b", "noise_level_b", "cka", "mutual_knn", "cknna")


def read_similarity(path: str | Path) -> pd.DataFrame:
    """Reads the similarity table from a CSV file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If columns are missing.
    """
    return read_table(path, SIMILARITY_COLUMNS, numbers=("noise_level_a", "noise_level_b", *SIMILARITY_COLUMNS[4:]))


class ValidationSplit(Sequence[Any]):
    """Features of the validation split of all representations on a device, each read from disk when it is used."""

    def __init__(self, store: FeatureStore, draw: int, device: torch.device) -> None:
        self.store, self.draw, self.device = store, draw, device
        self.keys = representations(store)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, m: Any) -> Any:
        features = self.store.features(*self.keys[m], draw=self.draw, split="validation")
        return torch.from_numpy(features).to(self.device)


def representations(store: FeatureStore) -> list[tuple[str, float]]:
    """Returns the layers and noise levels of a store, in the order of the similarity matrices."""
    return [(layer, level) for layer in store.layers for level in store.noise_levels]


def similarities(
    store: FeatureStore, step: Callable[[], None], *, device: torch.device = CPU, ranks: Ranks = ALONE
) -> tuple[dict[str, Floats], dict[tuple[str, float], str]]:
    """Measures the similarities of all representations, averaged over noise draws.

    Args:
        store: Features of the model.
        step: Called after every noise draw.
        device: Device of the comparisons; neighbors are compared on the CPU.
        ranks: Processes that share the work and all call this function.

    Returns:
        A matrix for each measure, and the reasons for missing values by layer and noise level.
    """
    keys = representations(store)
    k = num_neighbors(int((store.splits == "validation").sum()) - 1)
    total = {name: np.zeros((len(keys), len(keys))) for name in ("cka", "mutual_knn", "cknna")}
    reasons: dict[tuple[str, float], str] = {}
    for draw in range(store.draws):
        features = ValidationSplit(store, draw, device)
        find = partial(neighbor_graph, k=k)
        my_features = (features[m] for m in ranks.mine(range(len(keys))))
        graphs = ranks.whole(in_parallel(find, my_features, workers=num_workers(device)))
        result = cka_matrix(features, share=ranks.map)
        my_graphs = ranks.mine(graphs)
        matrices = {"cka": result.values} | {
            name: np.array(ranks.whole([*measure(my_graphs, graphs).values] if my_graphs else []))
            for name, measure in (("mutual_knn", mutual_knn), ("cknna", cknna))
        }
        for name, values in matrices.items():
            total[name] += values / store.draws
        reasons |= {key: reason for key, reason in zip(keys, result.reasons, strict=True) if reason}
        step()
    return total, reasons


def similarity_table(store: FeatureStore, values: Mapping[str, Floats]) -> pd.DataFrame:
    """Arranges similarity matrices as a table with one row per ordered pair of representations."""
    keys = representations(store)
    rows = [
        (*a, *b, *(matrix[i, j] for matrix in values.values())) for i, a in enumerate(keys) for j, b in enumerate(keys)
    ]
    return pd.DataFrame(rows, columns=list(SIMILARITY_COLUMNS))
