"""Hurts layerprobe in every way that we know, and prints a table of how it ended.

    python benchmarks/faults/campaign.py                                # all of it, most of an hour on two cores
    python benchmarks/faults/campaign.py --scale 0.05 --only configs,kills

Every case has its own seed, from --seed: the same command makes the same cases, but for the moments of signals, which
are drawn as shares of the time that a command takes. Exit code 1 if there is a fault; see outcome.py for the kinds.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import configs
import disks
import folders
import inputs
import kills
import pairs
from outcome import FAULTS, Result, table, warm_up

# The parts, each with the number of cases at scale 1; of data sets it is the number beside those that are named.
PARTS: dict[str, tuple[Callable[[int, int], Iterator[Result]], int]] = {
    "kills": (kills.run, 200),
    "configs": (configs.run, 10_000),
    "inputs": (inputs.run, 120),
    "folders": (folders.run, 200),
    "disks": (disks.run, 7),
    "pairs": (pairs.run, 50),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas; default %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the cases of every part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("faults.csv"), help="a row per case; default %(default)s")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(PARTS)):
        parser.error(f"there is no part {unknown[0]}; pass some of {', '.join(PARTS)}")
    warm_up()
    results: list[Result] = []
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("part", "group", "name", "kind", "code", "seconds", "text"))
        for part in names:
            began = time.monotonic()
            run, count = PARTS[part]
            for result in run(max(1, round(count * options.scale)), options.seed):
                group, name, outcome = result
                results.append(Result(f"{part}: {group}", name, outcome))
                seconds = f"{outcome.seconds:.2f}"
                writer.writerow((part, group, ascii(name)[1:-1], outcome.kind, outcome.code, seconds, outcome.text))
                file.flush()
                if outcome.kind in FAULTS:
                    print(
                        f"{outcome.kind:9} {part}: {group}: {ascii(name)[1:-1]} [{seconds} s] {outcome.text}",
                        flush=True,
                    )
            print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table([result._replace(group=result.group.partition(":")[0]) for result in results]), end="\n\n")
    print(table(results))
    return int(any(result.outcome.kind in FAULTS for result in results))


if __name__ == "__main__":
    sys.exit(main())
