"""The measures of a run on the CPU and on a device: seconds of both, and how far their numbers are apart.

    python benchmarks/devices.py RUN --device cuda

RUN is a run folder with features of more than 1000 training samples; fewer are measured on the CPU in any case.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from layerprobe.analyses.measures import FEW_SAMPLES
from layerprobe.analyses.tables import MODEL, measure, recoverability_table
from layerprobe.extraction import FeatureStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    store = FeatureStore.open(options.run / "features" / MODEL)
    num = int((store.splits == "train").sum())
    print(f"{len(store.layers)} layers, {len(store.noise_levels)} noise levels, {num} training samples")
    if num <= FEW_SAMPLES:
        print(f"a run measures up to {FEW_SAMPLES} training samples on the CPU; here both do, to compare")
    results = {device: tables(store, torch.device(device)) for device in dict.fromkeys(("cpu", options.device))}
    for name, wanted in results["cpu"].items():
        got = results[options.device][name]
        for column in wanted.select_dtypes("float"):
            apart = np.nanmax(np.abs(got[column] - wanted[column]), initial=0)
            print(f"{name}, {column}: {apart:.1e} apart at most")


def tables(store: FeatureStore, device: torch.device) -> dict[str, pd.DataFrame]:
    began = time.perf_counter()
    quality, similarity = measure({MODEL: store}, device=device)
    print(f"{device}: quality and similarity {time.perf_counter() - began:.1f} s", flush=True)
    found = {"quality": quality, "similarity": similarity}
    if len(store.token_rows):
        began = time.perf_counter()
        found["recoverability"] = recoverability_table(store, device=device)
        print(f"{device}: recoverability {time.perf_counter() - began:.1f} s", flush=True)
    return found


if __name__ == "__main__":
    main()
