"""How much faster several processes are than one, with one thread each, and whether what they make is equal.

    python benchmarks/processes.py extraction --processes 1 2
    python benchmarks/processes.py cka --processes 1 2 --samples 2000

Prints the rows (a sample at a noise level), or the pairs of representations, per second for each number of processes,
and the ratio to the first number: by the clock, and by the processor time of the busiest process, which tells how the
work is divided where other programs run on the machine. Starting Python, joining the processes and making the data are
not counted. The representations are as wide as those of SiT-XL/2 and read from disk, as those of a run are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from layerprobe.ranks import Ranks

SHAPE, LEVELS = (4, 16, 16), (0.1, 0.3, 0.5, 0.7, 0.9)
REPRESENTATIONS, WIDTH = 280, 1152  # 28 layers at 10 noise levels


def extraction(folder: Path, num_samples: int, ranks: Ranks) -> Callable[[], object]:
    """Prepares an extraction of noise by a small SiT."""
    import torch

    from layerprobe.backbones import SiTConfig, new_sit
    from layerprobe.data import Splits, Subset, TensorSamples
    from layerprobe.extraction import ExtractionPlan, extract

    backbone = new_sit(SiTConfig(SHAPE, 2, 256, 8, 4, 10), seed=0)
    x = torch.randn(num_samples, *SHAPE, generator=torch.Generator().manual_seed(0))
    samples = TensorSamples(x, torch.arange(num_samples) % 10)
    half, most = num_samples // 2, 3 * num_samples // 4
    parts = (("train", range(half)), ("validation", range(half, most)), ("test", range(most, num_samples)))
    splits = Splits(*(Subset(samples, rows, name=name) for name, rows in parts))
    plan = ExtractionPlan(backbone.layers, LEVELS, shard_size=num_samples // 16)
    return lambda: extract(backbone, splits, plan, folder / "store", batch_size=64, ranks=ranks)


def cka(folder: Path, num_samples: int, ranks: Ranks) -> Callable[[], object]:
    """Prepares CKA of all pairs of representations in a file."""
    from layerprobe.analyses.measures import cka_matrix

    def write() -> None:
        rng = np.random.default_rng(0)
        shape = REPRESENTATIONS, num_samples, WIDTH
        features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, shape)
        for m in range(REPRESENTATIONS):
            rng.standard_normal(out=features[m], dtype=np.float32)

    ranks.once(write)
    features: Any = np.load(folder / "features.npy", mmap_mode="c")

    def measured() -> None:
        values = cka_matrix(features, estimator="biased", precision="float32", share=ranks.map).values
        np.save(folder / f"cka-{ranks.rank}.npy", values)

    return measured


WORK = {"extraction": extraction, "cka": cka}
UNITS = {"extraction": "rows", "cka": "pairs"}


def measure(what: str, folder: Path, num_samples: int) -> None:
    """Works in this process, one of several; the first one prints the seconds of the clock and of a processor."""
    import torch

    from layerprobe.ranks import processes

    torch.set_num_threads(1)
    with processes() as ranks:
        work = WORK[what](folder, num_samples, ranks)
        ranks.barrier()
        began, busy = time.perf_counter(), time.process_time()
        work()
        seconds, of_processor = time.perf_counter() - began, ranks.whole([time.process_time() - busy])
        if ranks.is_first:
            print(seconds, max(of_processor))


def digest(what: str, folder: Path) -> str:
    """A hash of all files that were made."""
    if what == "cka":
        (found,) = {hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in folder.glob("cka-*.npy")}
        return found
    whole = hashlib.sha256()
    for path in sorted((folder / "store").iterdir()):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def main() -> None:
    """Measures every number of processes in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=tuple(WORK))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        measure(arguments.what, arguments.folder, arguments.samples)
        return
    done = arguments.samples * len(LEVELS) if arguments.what == "extraction" else REPRESENTATIONS**2
    first: list[float] = []
    for num in arguments.processes:
        seconds: list[list[float]] = []
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as scratch:
                start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num), __file__]
                options = ["--samples", str(arguments.samples), "--folder", scratch]
                ran = subprocess.run(
                    [sys.executable, *start, arguments.what, *options],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
                seconds.append([float(text) for text in ran.stdout.split()])
                found = digest(arguments.what, Path(scratch))
        rates = [done / min(times) for times in zip(*seconds, strict=True)]
        first = first or rates
        told = [
            f"{rate:.0f} {UNITS[arguments.what]}/s, ratio {rate / of:.2f}"
            for rate, of in zip(rates, first, strict=True)
        ]
        print(f"{num} processes: {told[0]} by the clock; {told[1]} by processor time; made {found}", flush=True)


if __name__ == "__main__":
    main()
