"""Debiased linear CKA of all pairs, over the bare products that it needs and against peers where they are installed.

Peers are given the same features. One that would take an hour is timed on fewer representations; the output says so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from checkpoint_features import add_arguments, representations
from torch import nn

from layerprobe.analyses.measures import cka_matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--representations", type=int, default=48)
    parser.add_argument("--width", type=int, help="keep this many channels, spread evenly, of wider representations")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer-representations", type=int, nargs="+", default=[8, 16, 24], help="pytorch-cka: sizes")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    arrays = representations(options, options.representations, options.samples)
    if options.width:
        arrays = [x[:, np.linspace(0, x.shape[1] - 1, min(options.width, x.shape[1])).astype(int)] for x in arrays]
        print(f"channels thinned to {max(x.shape[1] for x in arrays)}")
    xs: list[Any] = [torch.from_numpy(x).to(options.device) for x in arrays] if options.device != "cpu" else arrays
    test_accuracy(xs)
    ours, bare = [], []
    for _ in range(options.rounds):
        bare.append(bare_products(xs))
        ours.append(seconds(lambda: cka_matrix(xs)))
        print(f"bare products {bare[-1]:.2f} s, cka_matrix {ours[-1]:.2f} s")
    print(f"cka_matrix over bare products: {np.median(np.divide(ours, bare)):.2f}")
    if not options.no_peers:
        time_pytorch_cka(arrays, options.peer_representations, min(ours))
        time_torch_cka(arrays, min(ours))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def test_accuracy(xs: list[Any]) -> None:
    exact = cka_matrix(xs, precision="float64").values
    print(
        f"float32 products: largest error of CKA {np.abs(cka_matrix(xs, precision='float32').values - exact).max():.1e}"
    )
    print(f"as chosen: largest error of CKA {np.abs(cka_matrix(xs).values - exact).max():.1e}")


def bare_products(xs: list[Any]) -> float:
    """Seconds of the cheaper of the two sets of float32 products, on features that are prepared already."""
    features = [torch.as_tensor(x).float() for x in xs]
    n, num, width = len(features[0]), len(features), sum(x.shape[1] for x in features)
    if n * width**2 < n**2 * (width + num**2):
        panel = torch.cat([x - x.mean(0) for x in features], dim=1)
        starts = np.cumsum([0, *(x.shape[1] for x in features)])
        return seconds(lambda: [panel[:, a:b].T @ panel[:, a:] for a, b in pairwise(starts)])
    rows = max(1, 2**28 // (4 * num * n))
    tile = torch.zeros(num, rows, n, device=features[0].device)

    def products() -> None:
        for start in range(0, n, rows):
            stop = min(start + rows, n)
            part = tile.flatten()[: num * (stop - start) * (n - start)].view(num, stop - start, n - start)
            for x, gram in zip(features, part, strict=True):
                torch.mm(x[start:stop], x[start:].T, out=gram)
            torch.bmm(part.transpose(0, 1), part.permute(1, 2, 0))

    return seconds(products)


def time_pytorch_cka(xs: list[np.ndarray], sizes: list[int], ours: float) -> None:
    try:
        from cka import cka_from_features
    except ImportError:
        print("pytorch-cka is not installed")
        return
    features = [torch.from_numpy(x) for x in xs]
    times = []
    for size in sizes:
        times.append(seconds(lambda size=size: cka_from_features(features[:size], features[:size])))
        print(f"pytorch-cka, {size} representations: {times[-1]:.2f} s")
    if sizes[-1] == len(xs):
        print(f"pytorch-cka over cka_matrix: {times[-1] / ours:.1f}")
        return
    # M products with the features, M^2 with one another: t = a M + b M^2.
    design = np.stack([sizes, np.square(sizes)], axis=1)
    a, b = np.linalg.lstsq(design / np.array(times)[:, None], np.ones(len(sizes)), rcond=None)[0]
    total = a * len(xs) + b * len(xs) ** 2
    print(f"pytorch-cka over cka_matrix: {total / ours:.1f} ({total:.1f} s, extrapolated to {len(xs)} as a M + b M^2)")


class Feed(nn.Module):
    """Hands precomputed features to peers that read layers through hooks."""

    def __init__(self, features: list[torch.Tensor]) -> None:
        super().__init__()
        self.features = features
        self.layers = nn.ModuleList(nn.Identity() for _ in features)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for layer, x in zip(self.layers, self.features, strict=True):
            layer(x[rows])
        return rows


def time_torch_cka(xs: list[np.ndarray], ours: float) -> None:
    try:
        from torch_cka import CKA
    except ImportError:
        print("torch_cka is not installed")
        return
    size = 2
    features = [torch.from_numpy(x) for x in xs[:size]]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.arange(len(xs[0]))), batch_size=len(xs[0])
    )
    names = [f"layers.{i}" for i in range(size)]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        peer = CKA(Feed(features), Feed(features), model1_layers=names, model2_layers=names)
        # It finishes with an assertion that fails on features with a large mean, when all the time is spent.
        with contextlib.suppress(AssertionError):
            measured = seconds(lambda: peer.compare(loader))
            error = np.abs(np.asarray(peer.export()["CKA"]) - cka_matrix(xs[:size]).values).max()
            print(f"torch_cka: largest difference from cka_matrix {error:.1e}")
    total = measured * (len(xs) / size) ** 2
    print(
        f"torch_cka over cka_matrix: {total / ours:.0f} ({total:.0f} s, scaled from {measured:.1f} s for the {size**2} "
        f"pairs of {size} to {len(xs) ** 2} pairs)"
    )


if __name__ == "__main__":
    main()
