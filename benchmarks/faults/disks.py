"""Commands on disks that are full, and on folders that cannot be written to.

    python benchmarks/faults/disks.py           # as root, which may mount small disks in memory

Each command writes to a disk that is too small, of several sizes. It must end with one line and exit code 1, leave no
partial file, and make the same files once there is space, by the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from outcome import FAULTS, Case, Outcome, run_forked, table, warm_up

SIZES_KB = (4, 24, 64, 128, 256, 512, 1024)
NETWORK = ("--width", "16", "--depth", "3", "--heads", "2", "--batch-size", "16", "--log-every", "1")
TRAIN = ("train", "--data", "digits", "--steps", "4", "--checkpoint-every", "2", *NETWORK)
COUNTS = ("--num-train", "60", "--num-validation", "30", "--num-test", "30", "--noise-levels", "0.3,0.7")
PROBE = ("digits", "--data", "digits", *COUNTS)
# Commands by name; OUT is the folder on the small disk.
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": (*TRAIN, "--out", "OUT"),
    "extract": ("extract", *PROBE, "--out", "OUT"),
    "probe": ("probe", *PROBE, "--out", "OUT"),
    "sample png": ("sample", "digits", "--num", "8", "--steps", "2", "--out", "OUT"),
    "sample npz": ("sample", "digits", "--num", "8", "--steps", "2", "--format", "npz", "--out", "OUT"),
    "convert": ("convert", "digits", "--out", "OUT/x.safetensors"),
    "inspect": ("inspect", "--data", "digits", "--out", "OUT"),
}
# What differs between two runs of one command: times, paths, processes.
NOT_COMPARED = ("log.jsonl", "log.csv", "environment.json", ".lock", "report.html", "timing.json", "run.json")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(
        file for file in folder.rglob("*") if file.is_file() and file.name not in NOT_COMPARED and file.suffix != ".pt"
    )
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run(name: str, out: Path, folder: Path) -> Outcome:
    return run_forked([part.replace("OUT", str(out)) for part in COMMANDS[name]], folder, limit_s=120)


def mounted(disk: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)], check=True)


def on_full_disk(name: str, size_kb: int, folder: Path, whole: dict[str, str]) -> Outcome:
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    mounted(disk, f"size={size_kb}k")
    try:
        (disk / "out").mkdir()
        first = run(name, disk / "out", folder)
        partial = [str(file) for file in disk.rglob("*.partial")]
        if first.kind in FAULTS or first.kind not in ("ok", "failed"):
            return first
        if first.kind == "failed" and ("free" not in first.text or str(disk) not in first.text):
            return Outcome("WRONG", first.code, f"no path or remedy: {first.text}", first.seconds)
        if partial:
            return Outcome("WRONG", first.code, f"left {partial[0]}", first.seconds)
        mounted(disk, "remount", "size=200m")
        again = run(name, disk / "out", folder)
        made = digests(disk / "out")
        if again.kind != "ok" or made != whole:
            different = sorted(key for key in made.keys() | whole.keys() if made.get(key) != whole.get(key))
            return Outcome(
                "WRONG", again.code, f"then {again.kind} {again.text}, different {different[:4]}", first.seconds
            )
        return first
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def on_readonly_disk(name: str, folder: Path) -> Outcome:
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    mounted(disk, "size=1m", "ro")
    try:
        outcome = run(name, disk / "out", folder)
        named = str(disk) in outcome.text and ";" in outcome.text
        right = outcome.kind in ("refused", "failed") and named
        return (
            outcome
            if right or outcome.kind in FAULTS
            else Outcome("WRONG", outcome.code, outcome.text, outcome.seconds)
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="name of the command")
    options = parser.parse_args()
    warm_up()
    results: list[tuple[Case, Outcome]] = []

    def keep(name: str, what: str, outcome: Outcome) -> None:
        results.append((Case(name, what, lambda _: ()), outcome))
        if outcome.kind in FAULTS:
            print(f"{outcome.kind:9} {name}: {what} {outcome.text}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in COMMANDS:
            if options.only and options.only != name:
                continue
            (folder / name).mkdir()
            first = run(name, folder / name, folder)
            keep(name, "undisturbed", first)
            whole = digests(folder / name)
            for size_kb in SIZES_KB:
                keep(name, f"disk of {size_kb} KB", on_full_disk(name, size_kb, folder, whole))
            keep(name, "disk that is read only", on_readonly_disk(name, folder))
    print(table(results))
    return int(Counter(outcome.kind in FAULTS for _, outcome in results)[True] > 0)


if __name__ == "__main__":
    sys.exit(main())
