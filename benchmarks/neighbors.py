"""Mutual-kNN, CKNNA and cycle-kNN of all pairs and kNN accuracy, against the platonic-rep code where it is at hand.

    python benchmarks/neighbors.py --platonic-rep path/to/platonic-rep/metrics.py

The peer is given the same centered and normalized features. It compares pair by pair; the output says on how many pairs
it was timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_features import add_arguments, representations

from layerprobe.analyses.measures import cknna, cycle_knn, knn_accuracy, mutual_knn, neighbor_graph

MEASURES = {"mutual_knn": mutual_knn, "cknna": cknna, "cycle_knn": cycle_knn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--representations", type=int, default=24)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--platonic-rep", type=Path, help="its metrics.py")
    parser.add_argument("--peer-representations", type=int, default=4, help="all pairs of this many are timed")
    options = parser.parse_args()
    xs = representations(options, options.representations, options.samples)
    ours = [time_ours(xs, options.k) for _ in range(options.rounds)]
    if options.platonic_rep:
        best = {name: min(times[name] for times in ours) for name in MEASURES}
        time_platonic(xs, options.k, options.platonic_rep, options.peer_representations, best)
    time_accuracy()


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def time_ours(xs: list[np.ndarray], k: int) -> dict[str, float]:
    """Seconds for each measure of all pairs, the search included every time."""
    search, graphs = seconds(lambda: [neighbor_graph(x, k=k) for x in xs])
    times = {name: seconds(lambda measure=measure: measure(graphs))[0] for name, measure in MEASURES.items()}
    print(f"search {search:.2f} s, then " + ", ".join(f"{name} {t:.2f} s" for name, t in times.items()))
    return {name: search + t for name, t in times.items()}


def time_platonic(xs: list[np.ndarray], k: int, path: Path, size: int, ours: dict[str, float]) -> None:
    peer = load_metrics(path).AlignmentMetrics
    features = [torch.nn.functional.normalize(torch.from_numpy(x - x.mean(0, dtype=float)), dim=1) for x in xs]
    graphs = [neighbor_graph(x, k=k) for x in xs[:size]]
    total_peer = total_ours = 0.0
    for name, measure in MEASURES.items():
        pairs = list(product(range(size), repeat=2))
        # float64 to compare values, float32 to compare times: it is faster so.
        exact = [getattr(peer, name)(features[a], features[b], topk=k) for a, b in pairs]
        error = np.abs(np.array(exact).reshape(size, size) - measure(graphs).values).max()
        single = [x.float() for x in features[:size]]
        peer_seconds = seconds(lambda: [getattr(peer, name)(single[a], single[b], topk=k) for a, b in pairs])[0]  # noqa: B023
        total = peer_seconds * (len(xs) / size) ** 2
        total_peer, total_ours = total_peer + total, total_ours + ours[name]
        print(
            f"{name}: platonic-rep {total:.1f} s ({len(pairs)} pairs timed, scaled to {len(xs) ** 2}), "
            f"ours {ours[name]:.2f} s, ratio {total / ours[name]:.0f}, largest difference in float64 {error:.1e}"
        )
    print(f"together: ratio {total_peer / total_ours:.0f}")


def load_metrics(path: Path) -> Any:
    """The peer's module; torchaudio, which it needs for another measure, may be missing."""
    if importlib.util.find_spec("torchaudio") is None:
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        sys.modules["torchaudio.functional"] = types.ModuleType("torchaudio.functional")
        sys.modules["torchaudio"].functional = sys.modules["torchaudio.functional"]
        sys.modules["torchaudio.functional"].edit_distance = None
    spec = importlib.util.spec_from_file_location("platonic_metrics", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def time_accuracy(num_bank: int = 8000, num_queries: int = 2000, width: int = 256) -> None:
    """kNN accuracy at a size that the embedded digits do not reach: the digits, repeated with a little noise."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    rows = rng.integers(0, len(images), num_bank + num_queries)
    x = (np.tanh(images[rows] / 8 - 1) @ rng.normal(size=(64, width))).astype(np.float32)
    x += 0.5 * rng.normal(size=x.shape).astype(np.float32)
    bank, queries = (x[:num_bank], labels[rows[:num_bank]]), (x[num_bank:], labels[rows[num_bank:]])
    for metric in ("euclidean", "cosine"):
        ours, result = seconds(lambda metric=metric: knn_accuracy(*bank, *queries, metric=metric))
        mean = bank[0].mean(0, dtype=float)
        reference = KNeighborsClassifier(10, metric=metric, algorithm="brute").fit(bank[0] - mean, bank[1])
        peer, predicted = seconds(lambda model=reference, mean=mean: model.predict(queries[0] - mean))
        same = np.mean((predicted == queries[1]) == result.correct)
        products = seconds(lambda: torch.from_numpy(queries[0]) @ torch.from_numpy(bank[0]).T)[0]
        print(
            f"kNN accuracy, {metric}, {num_bank} x {width} bank, {num_queries} queries: {ours:.2f} s, scikit-learn "
            f"{peer:.2f} s, ratio {peer / ours:.1f}, same answer for {same:.4f}; bare product {products:.2f} s"
        )


if __name__ == "__main__":
    main()
