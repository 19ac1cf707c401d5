"""Damages the files of a small finished run, one at a time, and records what the commands that read them do.

    python benchmarks/faults/run_folders.py [--cases 300] [--seed 0] [--runs FOLDER] [--without-checksums]

Every case is (file, mutation, command) on a fresh copy of the run, in a forked process. The outcome is one of

    ok                exit code 0, and every other file and the output are as without the damage
    repaired          as ok, and the damaged file has its old content again
    told              exit code 0, other results, and a line on standard error that names the file
    one line          a documented exit code other than 0, and one line
    TRACEBACK, HANG, EXIT CODE, SILENTLY CHANGED: faults
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FAULTS = ("TRACEBACK", "HANG", "EXIT CODE", "SILENTLY CHANGED")
LIMIT_S = 60  # CPU seconds and wall-clock seconds on a busy machine; an undamaged command takes less than 10
DATA = ["--data", "digits", "--num-train", "560", "--num-validation", "40", "--num-test", "40"]
PROBE = ["probe", "digits", *DATA, "--noise-levels", "0.5", "--layers", "blocks.1,blocks.3,blocks.5,blocks.6"]
CONFIRM = ["--arms", "none,pick", "--steps", "2", "--num-seeds", "2", "--num-samples", "20", "--num-evaluations", "1"]
TRAIN = ["train", "--data", "digits", "--steps", "4", "--width", "16", "--depth", "2", "--heads", "2"]
TRAIN += ["--checkpoint-every", "2", "--keep-last", "2", "--log-every", "1"]
COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "select": lambda run: ["select", f"{run}/probe", "--json"],
    "report": lambda run: ["report", f"{run}/probe"],
    "plot": lambda run: ["plot", f"{run}/probe"],
    "analyze": lambda run: ["analyze", f"{run}/probe", "--json"],
    "probe": lambda run: [*PROBE, "--out", f"{run}/probe", "--json"],
    "confirm": lambda run: ["confirm", f"{run}/probe", *CONFIRM, "--json"],
    "train": lambda run: [*TRAIN, "--out", f"{run}/train"],
    "compare": lambda run: ["compare", f"{run}/probe", f"{run}/other", "--out", f"{run}/comparison", "--json"],
    "sample": lambda run: ["sample", f"{run}/train/model.safetensors", "--num", "4", "--out", f"{run}/samples"],
}
# Commands that read a file, by the beginning of its path; the first one that fits.
READERS = {
    "probe/features": ("select", "analyze", "probe", "compare"),
    "probe/confirmation/": ("confirm",),
    "probe/confirmation": ("report", "plot", "confirm"),
    "probe/verdict": ("report", "plot", "confirm"),
    "probe/figures": (),  # drawn again by every command that reads tables
    "probe": ("select", "report", "plot", "analyze", "probe", "confirm", "compare"),
    "train/model": ("sample", "train"),
    "train": ("train",),
}
# How often a command is drawn, so that the slow ones do not take all of the time.
SHARES = {
    "select": 16,
    "train": 6,
    "sample": 6,
    "probe": 1,
    "confirm": 1,
    "analyze": 1,
    "report": 1,
    "plot": 1,
    "compare": 2,
}
NEVER_SAME = ("log.jsonl", "log.csv", "curves.png", "curves.svg", ".lock")  # hold speeds
NEVER_SAME_DIRS = ("checkpoints", "samples")


@dataclass(frozen=True)
class Case:
    """A damaged file and the command that meets it.

    Attributes:
        file: Path in the folder that `make_runs` makes.
        mutation: Name of the mutation.
        content: Damaged content; None for a file that is gone.
        command: Name of the command, a key of `COMMANDS`.
    """

    file: str
    mutation: str
    content: bytes | None
    command: str


@dataclass(frozen=True)
class Result:
    """What a command did with a damaged file: its outcome, exit code and last line on standard error."""

    case: Case
    outcome: str
    code: int
    line: str
    seconds: float


def make_runs(folder: Path) -> None:
    """Makes a small finished run with a confirmation, `probe/`, and a small training, `train/`."""
    out = str(folder)
    for command in ("probe", "confirm", "train"):
        code, _, errors = call(COMMANDS[command](out), limit_s=600)
        if code:
            raise RuntimeError(f"{command} ended with {code}: {errors}")
    shutil.copytree(folder / "probe", folder / "other")  # for comparisons


def cases(folder: Path, *, seed: int, count: int) -> Iterator[Case]:
    """Yields seeded cases, evenly over files, mutations and commands."""
    rng = random.Random(seed)
    pool: dict[str, list[Case]] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        readers = next((commands for start, commands in READERS.items() if name.startswith(start)), ())
        if not path.is_file() or not path.stat().st_size or path.name == "report.html" or not readers:
            continue
        for mutation, content in _mutations(path, rng):
            pool.setdefault(name, []).append(
                Case(name, mutation, content, rng.choices(readers, [SHARES[reader] for reader in readers])[0])
            )
    for of_file in pool.values():
        rng.shuffle(of_file)
    names = sorted(pool)
    rng.shuffle(names)
    for _ in range(count):
        names = [name for name in names if pool[name]]
        if not names:
            return
        name = names.pop(0)
        names.append(name)
        yield pool[name].pop()


def _mutations(path: Path, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    content = path.read_bytes()
    size = len(content)
    yield "empty", b""
    yield "half", content[: size // 2]
    yield "one byte short", content[:-1]
    for _ in range(3):
        place = rng.randrange(size)
        yield "flipped bit", content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    start = rng.randrange(max(1, size - 4096) // 4096 + 1) * 4096
    yield "zeroed page", content[:start] + bytes(min(4096, size - start)) + content[start + 4096 :]
    siblings = [other for other in path.parent.glob(f"*{path.suffix}") if other != path]
    if siblings:
        yield "swapped", rng.choice(siblings).read_bytes()
    yield "noise", rng.randbytes(min(size, 1000))
    if path.suffix == ".json":
        yield from _json_mutations(content, rng)
    if path.suffix == ".csv":
        lines = content.splitlines(keepends=True)
        yield "half the rows", b"".join(lines[: 1 + len(lines) // 2])
        yield "column gone", b"".join(line.partition(b",")[2] for line in lines)
        yield "a word for a number", lines[0] + b"".join(line.replace(b"0.", b"x.", 1) for line in lines[1:])
        yield "header alone", lines[0]


def _json_mutations(content: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    record = json.loads(content)
    yield "a list", json.dumps([record]).encode()
    yield "null", b"null"
    yield "deep nesting", b"[" * 200_000
    yield "deep nesting inside", content.rstrip()[:-1] + b', "x": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001
    places = list(_places(record))
    wrong = (None, "text", -1, 10**30, 1e308, [], {}, True, float("nan"), 2**40)
    for key in (*rng.sample(places, min(6, len(places))),):
        for mutation in ("key gone", "unknown key", "wrong value"):
            changed = json.loads(content)
            parent = changed
            for step in key[:-1]:
                parent = parent[step]
            if mutation == "key gone":
                del parent[key[-1]]
            elif mutation == "unknown key" and isinstance(parent, dict):
                parent["unknown"] = 1
            else:
                parent[key[-1]] = rng.choice(wrong)
            yield f"{mutation} at {'.'.join(map(str, key))}", json.dumps(changed, indent=1).encode()


def _places(record: object, at: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """Yields the path of every value below a JSON value, of lists only the first."""
    pairs = record.items() if isinstance(record, dict) else enumerate(record[:1]) if isinstance(record, list) else ()
    for key, value in pairs:
        yield (*at, key)
        yield from _places(value, (*at, key))


def run_case(case: Case, runs: Path) -> Result:
    """Runs a case on a copy of the runs; what the undamaged runs give is asked once per command."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "runs"
        shutil.copytree(runs, copy)
        damaged = copy / case.file
        if case.content is None:
            damaged.unlink()
        else:
            damaged.write_bytes(case.content)
        code, output, errors = call(COMMANDS[case.command](str(copy)), limit_s=LIMIT_S)
        files = _files(copy)
    intact_output, intact = _intact(case.command, runs)
    before, after = intact.get(case.file), files.get(case.file)
    changed = sorted(name for name in intact.keys() | files.keys() if files.get(name) != intact.get(name))
    changed = [name for name in changed if name != case.file and not _may_differ(name)]
    same = not changed and output.replace(str(copy), "") == intact_output
    named = Path(case.file).name in errors
    lines = [line for line in errors.splitlines() if line.startswith("layerprobe:")]
    if code in (-signal.SIGKILL, -signal.SIGALRM):
        outcome = "HANG"
    elif "Traceback" in errors:
        outcome = "TRACEBACK"
    elif code not in (0, 1, 2, 3) or (code and not lines):
        outcome = "EXIT CODE"
    elif code:
        outcome = "one line"
    elif not same:
        outcome = "told" if named else "SILENTLY CHANGED"
    elif after == before:
        outcome = "repaired"
    else:
        outcome = "ok"  # the command does not read the file
    line = (lines or errors.splitlines() or [""])[-1]
    if outcome in FAULTS and changed:
        line = f"{line} [changed: {', '.join(changed[:4])}]"
    return Result(case, outcome, code, line.replace(str(copy), "RUNS"), time.monotonic() - began)


_INTACT: dict[str, tuple[str, dict[str, bytes]]] = {}


def _intact(command: str, runs: Path) -> tuple[str, dict[str, bytes]]:
    if command not in _INTACT:
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / "runs"
            shutil.copytree(runs, copy)
            code, output, errors = call(COMMANDS[command](str(copy)), limit_s=LIMIT_S)
            if code:
                raise RuntimeError(f"{command} on undamaged runs ended with {code}: {errors}")
            _INTACT[command] = output.replace(str(copy), ""), _files(copy)
    return _INTACT[command]


def _files(folder: Path) -> dict[str, bytes]:
    """The content of every file; the report names the folder, which differs from case to case."""
    here = str(folder).encode()
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(here, b"RUNS")
        for path in folder.rglob("*")
        if path.is_file()
    }


def _may_differ(name: str) -> bool:
    path = Path(name)
    return (
        path.name in NEVER_SAME or path.name == "checksums.json" or any(part in NEVER_SAME_DIRS for part in path.parts)
    )


def call(arguments: Sequence[str], *, limit_s: int) -> tuple[int, str, str]:
    """Runs the command line in a forked process; returns exit code, or minus the signal, and what it printed."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                sys.argv = ["layerprobe", *arguments]
                signal.alarm(limit_s)
                from layerprobe.cli.main import run

                code = run()
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                with suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return os.waitstatus_to_exitcode(status), texts[0], texts[1]


def warm_up() -> None:
    """Imports what the commands import, so that each fork finds it loaded; with one thread, which a fork survives."""
    import torch

    import layerprobe.analyses.runs
    import layerprobe.cli.main

    torch.set_num_threads(1)
    for name in ("draw_figures", "probe_run", "confirm_run", "train_run", "draw_samples", "RunFolder", "choose_layers"):
        getattr(layerprobe.analyses.runs, name)


def main() -> None:
    """Prints a table of outcomes by kind of file and command, and every fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="folder of the runs, made if it does not exist")
    parser.add_argument("--without-checksums", action="store_true", help="as runs of earlier versions are")
    parser.add_argument("--all", action="store_true", help="print every case, not only faults")
    args = parser.parse_args()
    warm_up()
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place) / "runs"
        source = args.runs or Path(place) / "made"
        if not source.exists():
            make_runs(source)
        shutil.copytree(source, runs)
        for path in [*runs.rglob("checksums.json")] * args.without_checksums:
            path.unlink()
        results = []
        for case in cases(runs, seed=args.seed, count=args.cases):
            results.append(result := run_case(case, runs))
            if args.all or result.outcome in FAULTS:
                what = f"{case.command:8} {case.file}: {case.mutation}"
                print(f"{result.outcome:16} {result.code:3} {what} | {result.line[:240]}", flush=True)
    for outcome, number in Counter(result.outcome for result in results).most_common():
        print(f"{number:5} {outcome}")
    sys.exit(any(result.outcome in FAULTS for result in results))


if __name__ == "__main__":
    main()
