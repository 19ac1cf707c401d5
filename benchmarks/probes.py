"""A map of linear probes, 48 representations x 10 penalties, against scikit-learn at the same optimum.

python benchmarks/probes.py STORE [--checkpoint C --data D]   # the map, raw and standardized
python benchmarks/probes.py STORE --single                    # one problem at a time, 110 to 10 000 samples

STORE is a folder for the features of a checkpoint, made at the first call: six stages of a DDPM on MNIST at eight
noise levels, 160 to 180 wide, 10 000 samples. Penalties are scikit-learn's own, `LogisticRegressionCV(Cs=10)`.

The peer gets, for each representation and penalty, the time of the solver and tolerance that reach our objective
within 1e-8 soonest, found by trying; those that fail or lose cost it nothing. It starts from the optimum of the
previous penalty, and has both cores: two representations at a time, one thread each. It is timed on two
representations, at the quartiles of the passes that ours took, and its time for all is their mean times 48; ours is
measured on all, and on the same two once more.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from layerprobe.analyses.measures import LogisticFit, fit_logistic, fit_logistic_map
from layerprobe.backbones import wrap
from layerprobe.checkpoints import open_checkpoint
from layerprobe.data import load
from layerprobe.extraction import ExtractionPlan, FeatureStore, extract

SHARED = Path(__file__).parents[2] / "shared"
UNET = Path(__file__).parents[1] / "tests" / "ddpm_unet.py"
LEVELS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75)
CS = np.logspace(-4, 4, 10)
SAME = 1e-8  # relative objective
SOLVERS = ("newton-cholesky", "newton-cg", "lbfgs")
TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=SHARED / "checkpoints" / "ddpm_mnist.pt")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "mnist")
    parser.add_argument("--form", choices=("raw", "standardized", "both"), default="both")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--single", action="store_true")
    options = parser.parse_args()
    if not options.store.is_dir() and not (options.checkpoint.exists() and options.data.exists()):
        print(f"skipped: {options.checkpoint} or {options.data} is not there; pass --checkpoint and --data")
        return
    store = features(options.store, options.checkpoint, options.data)
    fit = np.flatnonzero(store.splits == "train")[: options.samples]
    y = store.labels[fit]
    keys = [(layer, level) for layer in store.layers for level in store.noise_levels]
    for form in ("raw", "standardized") if options.form == "both" else (options.form,):
        xs = [prepared(store.features(*key)[fit], form) for key in keys]
        widths = f"{min(x.shape[1] for x in xs)} to {max(x.shape[1] for x in xs)} wide"
        print(f"\n{form}: {len(xs)} representations, {len(y)} samples, {widths}, {os.cpu_count()} cores", flush=True)
        if options.single:
            single(xs[10], y)
        else:
            whole_map(keys, xs, y)


def features(folder: Path, checkpoint: Path, data: Path) -> FeatureStore:
    if (folder / "manifest.json").is_file() and not checkpoint.exists():
        return FeatureStore.open(folder)
    torch.manual_seed(0)
    module = open_checkpoint(
        checkpoint,
        model=f"{UNET}:DDPMUNet",
        layers=["b1", "b2", "b3", "b_mid", "b4", "b5"],
        schedule="ddpm-linear",
        prediction="eps",
        shape=(1, 28, 28),
        device="cpu",
    ).module
    backbone = wrap(
        module,
        layers=["b1", "b2", "b3", "b_mid", "b4", "b5"],
        schedule="ddpm-linear",
        prediction="eps",
        shape=(1, 28, 28),
        tokens=pooled,
    )
    splits = load(data, num_train=10_000, num_validation=500, num_test=1000, expect_shape=(1, 28, 28))
    return extract(backbone, splits, ExtractionPlan(backbone.layers, LEVELS), folder, batch_size=256)


def pooled(output: torch.Tensor, name: str) -> torch.Tensor:
    """Means over as many cells of the image as make 128 features or more."""
    cells = math.ceil(math.sqrt(128 / output.shape[1]))
    return F.adaptive_avg_pool2d(output, cells).flatten(1).unsqueeze(1)


def prepared(x: np.ndarray, form: str) -> np.ndarray:
    if form == "raw":
        return x
    spread = x.std(0, dtype=np.float64)
    return (x - x.mean(0, dtype=np.float64)) / np.where((x == x[:1]).all(0), 1, spread)


def whole_map(keys: list, xs: list, y: np.ndarray) -> None:
    ours, paths = timed_map(xs, y)
    fits = [fit for path in paths for fit in path]
    passes = np.array([sum(fit.passes for fit in path) for path in paths])
    print(f"layerprobe {ours:.1f} s, {ours / len(fits) * 1e3:.0f} ms a probe, {passes.sum() / len(fits):.0f} passes")
    print(
        f"certificate: {sum(fit.converged for fit in fits)} of {len(fits)} converged, gradient norm at most "
        f"{max(fit.gradient_norm for fit in fits):.1e}, objective above its minimum by at most "
        f"{max(fit.gap for fit in fits):.1e} of it",
        flush=True,
    )
    few = np.argsort(passes)[[len(xs) // 4, 3 * len(xs) // 4]]
    found = Parallel(2)(delayed(peer_path)(xs[i], y, paths[i]) for i in few)
    for i, rows in zip(few, found, strict=True):
        print(f"scikit-learn on {keys[i][0]} at {keys[i][1]}: {sum(seconds for seconds, *_ in rows):.1f} s")
        for c, (seconds, name, excess, different) in zip(CS, rows, strict=True):
            print(f"  C={c:.1e}: {seconds:.2f} s {name}, objective {excess:.0e} above ours, {different} labels differ")
    theirs = sum(seconds for rows in found for seconds, *_ in rows) / 2 * len(xs) / len(few)
    print(f"scikit-learn would take {theirs:.0f} s for {len(xs)} (extrapolated from two, two at a time)")
    print(f"ratio {theirs / ours:.1f}")
    same, _ = timed_map([xs[i] for i in few], y)
    slowest = max(sum(seconds for seconds, *_ in rows) for rows in found)
    print(f"the same two at a time: layerprobe {same:.2f} s, scikit-learn {slowest:.1f} s, ratio {slowest / same:.1f}")


def timed_map(xs: list, y: np.ndarray) -> tuple[float, list]:
    began = time.perf_counter()
    paths = fit_logistic_map(xs, y, CS)
    return time.perf_counter() - began, paths


def peer_path(x: np.ndarray, y: np.ndarray, path: tuple[LogisticFit, ...]) -> list[tuple[float, str, float, int]]:
    """For each penalty: seconds, solver and tolerance, relative objective above ours, predictions that differ."""
    x, start, rows, lost = x.astype(np.float64), None, [], dict.fromkeys(SOLVERS, 0)
    with threadpool_limits(1):
        for fit in path:
            seconds, name, model = soonest(x, y, fit, start, lost)
            excess = objective(x, y, model.coef_, model.intercept_, fit.inverse_penalty) / fit.objective - 1
            rows.append((seconds, name, excess, int((model.predict(x) != fit.predict(x)).sum())))
            start = fit
    return rows


def objective(x: np.ndarray, y: np.ndarray, coef: np.ndarray, bias: np.ndarray, c: float) -> float:
    logits = x.astype(np.float64) @ coef.T + bias
    loss = np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(y)), y])
    return float(loss + np.sum(coef**2) / (2 * c * len(y)))


def soonest(
    x: np.ndarray, y: np.ndarray, fit: LogisticFit, start: LogisticFit | None = None, lost: dict[str, int] | None = None
) -> tuple[float, str, LogisticRegression]:
    """Seconds and name of the solver and tolerance that reach the optimum first, and what they found.

    Each attempt is cut off when it is slower than the best so far. A solver that was cut off at two penalties in a row
    is not tried at weaker ones, where conditioning is worse; `lost` counts.
    """
    lost = dict.fromkeys(SOLVERS, 0) if lost is None else lost
    best: tuple = (120.0, "none", None)
    for solver in (solver for solver in SOLVERS if lost[solver] < 2):
        for tolerance in TOLERANCES:
            model = LogisticRegression(
                C=fit.inverse_penalty, solver=solver, tol=tolerance, max_iter=100_000, warm_start=True
            )
            if start is not None:
                model.coef_, model.intercept_, model.classes_ = start.weights.copy(), start.bias.copy(), start.classes
            seconds = limited(lambda model=model: model.fit(x, y), best[0])
            if seconds is None:
                lost[solver] += solver != "newton-cholesky"
                break
            if objective(x, y, model.coef_, model.intercept_, fit.inverse_penalty) <= fit.objective * (1 + SAME):
                best = (seconds, f"{solver}:{tolerance:.0e}", model)
                lost[solver] = 0
                break
    return best


def limited(work: Callable[[], object], limit: float) -> float | None:
    """Seconds that the work takes, or None if that is more than the limit."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
        return time.perf_counter() - began
    except TimeoutError:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def single(x: np.ndarray, y: np.ndarray) -> None:
    fit_logistic(x[:100], y[:100])  # whatever is loaded at the first call
    for n in (n for n in (110, 150, 300, 500, 1000, 2000, 10_000) if n <= len(y)):
        for c in (1e-3, 1.0, 1e3):
            part = x[:n].astype(np.float64)
            ours, fit = math.inf, None
            for _ in range(3):
                began = time.perf_counter()
                fit = fit_logistic(part, y[:n], inverse_penalty=c)
                ours = min(ours, time.perf_counter() - began)
            theirs, name, _ = soonest(part, y[:n], fit)
            print(
                f"n={n}, C={c:g}: layerprobe {ours * 1e3:.0f} ms (gap {fit.gap:.0e}), scikit-learn "
                f"{theirs * 1e3:.0f} ms ({name}), ratio {theirs / ours:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
