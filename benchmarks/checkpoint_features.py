"""Features of real checkpoints for the benchmarks: made once into a feature store, then read from it.

python benchmarks/checkpoint_features.py FOLDER                        # the embedded digits checkpoint
python benchmarks/checkpoint_features.py FOLDER --ddpm CKPT --data D   # the DDPM of docs/own-model.md on MNIST
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from layerprobe.checkpoints import open_checkpoint
from layerprobe.data import digits, load
from layerprobe.extraction import ExtractionPlan, FeatureStore, extract

LEVELS = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9)
UNET = Path(__file__).parents[1] / "tests" / "ddpm_unet.py"


def digits_store(folder: Path) -> FeatureStore:
    """8 blocks at 6 noise levels, 2 x 2 cells of 64 channels; 1797 samples with 3 noise draws each."""
    # No level 0: there all draws are the same, and exact duplicates have neighbors in no particular order.
    backbone = open_checkpoint("digits", device="cpu")
    return extract(backbone, digits(), ExtractionPlan(backbone.layers, LEVELS, draws=3, pool_cells=2), folder)


def ddpm_store(folder: Path, checkpoint: Path, data: Path) -> FeatureStore:
    """7 stages at 7 noise levels, 2 x 2 cells of 10 to 40 channels; 5000 samples."""
    backbone = open_checkpoint(
        checkpoint,
        model=f"{UNET}:DDPMUNet",
        layers="b*",
        schedule="ddpm-linear",
        prediction="eps",
        shape=(1, 28, 28),
        device="cpu",
    )
    splits = load(data, num_train=3000, num_validation=1000, num_test=1000, expect_shape=(1, 28, 28))
    return extract(backbone, splits, ExtractionPlan(backbone.layers, (0.0, *LEVELS), pool_cells=2), folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, help="a feature store; without it the digits checkpoint is read")
    parser.add_argument("--standardize", action="store_true", help="every channel to mean 0 and variance 1")


def representations(options: argparse.Namespace, num: int, n: int) -> list[np.ndarray]:
    """`num` representations of n samples, float32; the noise draws of a sample count as samples of their own."""
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore.open(options.store) if options.store else digits_store(Path(folder) / "store")
        keys = [(layer, level) for layer in store.layers for level in store.noise_levels]
        xs = []
        for layer, level in keys[:num]:
            x = np.concatenate([store.features(layer, level, draw=draw) for draw in range(store.draws)])[:n]
            xs.append((x - x.mean(0)) / np.maximum(x.std(0), 1e-12) if options.standardize else x)
    print(
        f"{len(xs)} representations of {store.manifest['model']}, "
        f"{len(xs[0])} samples, {min(x.shape[1] for x in xs)} to {max(x.shape[1] for x in xs)} wide, "
        f"{'standardized' if options.standardize else 'raw'}"
    )
    return xs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ddpm", type=Path)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    if options.ddpm:
        ddpm_store(options.folder, options.ddpm, options.data)
    else:
        digits_store(options.folder)


if __name__ == "__main__":
    main()
