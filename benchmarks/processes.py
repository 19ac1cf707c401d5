"""How much faster several processes extract than one, with one thread each, and whether the stores are equal.

    python benchmarks/processes.py --processes 1 2

Prints the rows (a sample at a noise level) per second for each number of processes, and the ratio to the first number:
by the clock, and by the processor time of the busiest process, which tells how the work is divided where other programs
run on the machine. The time is that of `extract` alone: starting Python, joining the processes and making the data are
not counted.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE, LEVELS = (4, 16, 16), (0.1, 0.3, 0.5, 0.7, 0.9)


def measure(folder: Path, num_samples: int) -> None:
    """Extracts in this process, one of several; the first one prints the seconds of the clock and of a processor."""
    import torch

    from layerprobe.backbones import SiTConfig, new_sit
    from layerprobe.data import Splits, Subset, TensorSamples
    from layerprobe.extraction import ExtractionPlan, extract
    from layerprobe.ranks import processes

    torch.set_num_threads(1)
    with processes() as ranks:
        backbone = new_sit(SiTConfig(SHAPE, 2, 256, 8, 4, 10), seed=0)
        x = torch.randn(num_samples, *SHAPE, generator=torch.Generator().manual_seed(0))
        samples = TensorSamples(x, torch.arange(num_samples) % 10)
        half, most = num_samples // 2, 3 * num_samples // 4
        parts = (("train", range(half)), ("validation", range(half, most)), ("test", range(most, num_samples)))
        splits = Splits(*(Subset(samples, rows, name=name) for name, rows in parts))
        plan = ExtractionPlan(backbone.layers, LEVELS, shard_size=num_samples // 16)
        ranks.barrier()
        began, busy = time.perf_counter(), time.process_time()
        extract(backbone, splits, plan, folder, batch_size=64, ranks=ranks)
        seconds, of_processor = time.perf_counter() - began, ranks.whole([time.process_time() - busy])
        if ranks.is_first:
            print(seconds, max(of_processor))


def digest(folder: Path) -> str:
    """A hash of all files of a store."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def main() -> None:
    """Measures every number of processes in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        measure(arguments.folder, arguments.samples)
        return
    first: list[float] = []
    for num in arguments.processes:
        seconds: list[list[float]] = []
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as scratch:
                start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num), __file__]
                options = ["--samples", str(arguments.samples), "--folder", f"{scratch}/store"]
                ran = subprocess.run(
                    [sys.executable, *start, *options],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
                seconds.append([float(text) for text in ran.stdout.split()])
                found = digest(Path(scratch) / "store")
        rates = [arguments.samples * len(LEVELS) / min(times) for times in zip(*seconds, strict=True)]
        first = first or rates
        clock, processor = (f"{rate:.0f} rows/s, ratio {rate / of:.2f}" for rate, of in zip(rates, first, strict=True))
        print(f"{num} processes: {clock} by the clock; {processor} by processor time; store {found}", flush=True)


if __name__ == "__main__":
    main()
