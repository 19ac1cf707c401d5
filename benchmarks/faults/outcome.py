"""Runs commands in forked workers with a time limit, and says how each ended.

A part of the campaign makes cases: a folder, the arguments of a command, and which endings are right. A worker is a
fork of the program, which has imported torch before, so that a case takes milliseconds. It has limits of its own for
time, memory and the size of a file, and no input.

| kind | meaning |
|---|---|
| ok, failed, refused, missing, interrupted | exit code 0, 1, 2, 3, 130, with one line of layerprobe for all but 0 |
| WRONG | an ending that is not among those of the case |
| CHANGED | other bytes than those of an undisturbed run |
| TRACEBACK | a traceback, or an exit code that is not documented |
| HANG | no end within the limit |
| CRASH | ended by a signal, such as a segmentation fault |
| MEMORY | more memory than the limit, found only while allocating |
| MUTE | an error without a line of its own at the end |
| NOISE | lines of libraries before the error |
| LONG | a line of more than 1000 characters |
| RAW | control characters or marks of writing direction in the output |
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

CODES = {0: "ok", 1: "failed", 2: "refused", 3: "missing", 130: "interrupted"}
FAULTS = ("WRONG", "CHANGED", "TRACEBACK", "HANG", "CRASH", "MEMORY", "MUTE", "NOISE", "LONG", "RAW")
WRONG_CODE = 76  # of work that found something wrong by itself
LIMIT_S = 20.0
MEMORY_BYTES = 4 * 2**30  # on top of what the parent has
_LONGEST = 1000
_PREFIX = "layerprobe: "
# What libraries print: warnings, places in code and the lines quoted from there, logs, bars.
_FOREIGN = re.compile(r"(Warning|Error)\b|\.(py|cpp|cc|h):\d+|^\s|^\[?[EWI]\d{4}\b|\d+%\|")


@dataclass(frozen=True)
class Outcome:
    """How one case ended.

    Attributes:
        kind: Kind of the table above.
        code: Exit code; negative for a signal.
        text: Last line of the error output, shortened.
        seconds: Time that it took.
    """

    kind: str
    code: int
    text: str
    seconds: float


class Result(NamedTuple):
    """A case that was run: the name of its row in the table, what was done, and how it ended."""

    group: str
    name: str
    outcome: Outcome


@dataclass(frozen=True)
class Case:
    """One case of a campaign.

    Attributes:
        group: Name of the row in the table.
        name: What was done, so that it can be done again.
        prepare: Makes the inputs in an empty folder and returns the arguments of the command.
        right: Kinds that are right.
        memory_bytes: Memory of the worker beyond the parent's.
        file_bytes: Largest file that the worker may write, as on a full disk; None for any.
        work: Work in place of the command; its errors are told as those of a command are.
    """

    group: str
    name: str
    prepare: Callable[[Path], Sequence[str]]
    right: tuple[str, ...] = ("ok", "refused")
    memory_bytes: int = MEMORY_BYTES
    file_bytes: int | None = None
    work: Callable[[Sequence[str]], object] | None = None


def run_case(case: Case, *, limit_s: float = LIMIT_S) -> Outcome:
    """Runs a case in a temporary folder, which is the working directory of the worker."""
    folder = Path(tempfile.mkdtemp(prefix="case-"))
    try:
        arguments = case.prepare(folder)
        limits = {resource.RLIMIT_FSIZE: case.file_bytes} if case.file_bytes is not None else {}
        worker = Forked(arguments, folder, memory_bytes=case.memory_bytes, limits=limits, work=case.work)
        outcome = worker.end(limit_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if outcome.kind in FAULTS or outcome.kind in case.right:
        return outcome
    return Outcome("WRONG", outcome.code, f"{outcome.kind}: {outcome.text}", outcome.seconds)


class Forked:
    """`layerprobe ARGUMENTS`, or `work` in its place, that runs in a fork with this working directory."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        memory_bytes: int = MEMORY_BYTES,
        limits: dict[int, int] | None = None,
        work: Callable[[Sequence[str]], object] | None = None,
    ) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._began = time.monotonic()
        self._worker = os.fork()
        if self._worker == 0:
            _work(arguments, folder, self._output.fileno(), memory_bytes, limits or {}, work)

    def end(self, limit_s: float) -> Outcome:
        """Waits until it ends, kills it after this time from now, and says how it ended."""
        status = _wait(self._worker, time.monotonic() + limit_s)
        seconds = time.monotonic() - self._began
        with self._output:
            self._output.seek(0)
            return classify(status, self._output.read(2**20).decode("utf-8", "replace"), seconds)


def _work(
    arguments: Sequence[str],
    folder: Path,
    output: int,
    memory_bytes: int,
    limits: dict[int, int],
    work: Callable[[Sequence[str]], object] | None,
) -> None:
    """Never returns."""
    code = 99
    try:
        os.setpgid(0, 0)
        _limit(memory_bytes, limits)
        code = _call(arguments, folder, output, work)
    finally:
        os._exit(code)


def _limit(memory_bytes: int, limits: dict[int, int]) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # Writing too much is then an error of its own, EFBIG.
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def _call(
    arguments: Sequence[str], folder: Path, output: int, work: Callable[[Sequence[str]], object] | None = None
) -> int:
    """Runs the command in this process, with all that it prints in `output`; returns its exit code."""
    code = 99
    try:
        os.chdir(folder)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["layerprobe", *arguments]
        from layerprobe.cli import main

        if work is not None:
            main.app = lambda **_: work(arguments)
        code = main.run()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
    return code


def run_batch(cases: Sequence[Case], *, limit_s: float = LIMIT_S) -> list[Outcome]:
    """Runs commands one after the other in one fork, which costs a tenth; what seems a fault runs again in its own."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        outcomes += _run_some(cases[len(outcomes) :], limit_s)
    pairs = zip(cases, outcomes, strict=True)
    return [outcome if outcome.kind in case.right else run_case(case, limit_s=limit_s) for case, outcome in pairs]


_SAID = struct.Struct("<id")  # exit code, seconds


def _run_some(cases: Sequence[Case], limit_s: float) -> list[Outcome]:
    """Runs cases up to the first that does not end by itself, which is included."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as place:
        reading, writing = os.pipe()
        worker = os.fork()
        if worker == 0:
            _work_through(cases, Path(place), writing)
        os.close(writing)
        for i in range(len(cases)):
            ready, _, _ = select.select([reading], [], [], limit_s)
            said = os.read(reading, _SAID.size) if ready else b""
            if not said:
                outcomes.append(Outcome("HANG" if not ready else "CRASH", 124, "", limit_s))
                break
            code, seconds = _SAID.unpack(said)
            output = Path(place, f"{i}.txt")
            outcomes.append(classify(code, output.read_bytes()[: 2**20].decode("utf-8", "replace"), seconds))
            output.unlink()
        os.close(reading)
        with suppress(ProcessLookupError):
            os.killpg(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
    return outcomes


def _work_through(cases: Sequence[Case], place: Path, writing: int) -> None:
    """Never returns."""
    try:
        os.setpgid(0, 0)
        _limit(MEMORY_BYTES, {})
        for i, case in enumerate(cases):
            folder = place / str(i)
            folder.mkdir()
            with (place / f"{i}.txt").open("wb") as output:
                arguments = case.prepare(folder)
                began = time.monotonic()
                code = _call(arguments, folder, output.fileno())
            os.write(writing, _SAID.pack(code, time.monotonic() - began))
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(0)


def _wait(worker: int, until: float) -> int | None:
    """Returns the exit code, negative for a signal; None after killing a worker that did not end in time."""
    pause = 0.002
    while True:
        pid, status = os.waitpid(worker, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            with suppress(ProcessLookupError):
                os.killpg(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            return None
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def classify(code: int | None, output: str, seconds: float) -> Outcome:
    """Says how a command ended, from its exit code (None: it did not end) and all that it printed."""
    lines = [line for line in output.splitlines() if line.strip()]
    told = [line for line in lines if any(map(str.isalnum, line))]  # not the lower edge of the box of a usage error
    last = told[-1].strip("│ ") if told else ""
    return Outcome(_kind(code, output, lines), 124 if code is None else code, ascii(last)[1:-1][:300], seconds)


def _kind(code: int | None, output: str, lines: list[str]) -> str:
    if code is None:
        return "HANG"
    if code < 0:
        return "CRASH"
    if code == WRONG_CODE:
        return "WRONG"
    if "Traceback (most recent call last)" in output and ("MemoryError" in lines[-1] or "bad_alloc" in lines[-1]):
        return "MEMORY"
    if "Traceback (most recent call last)" in output or code not in CODES:
        return "TRACEBACK"
    if "out of memory" in output or "allocate memory" in output:
        return "MEMORY"
    if any(map(_is_control, output)):
        return "RAW"
    if any(len(line) > _LONGEST for line in lines):
        return "LONG"
    if code == 0:
        return CODES[code]
    usage = any(line.startswith("Usage:") for line in lines)  # of typer, with its box
    if not usage and not (lines and lines[-1].startswith(_PREFIX)):
        return "MUTE"
    foreign = [line for line in lines if not line.startswith(_PREFIX) and _FOREIGN.search(line)]
    return CODES[code] if usage or not foreign else "NOISE"


def _is_control(character: str) -> bool:
    return character not in "\n\r\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def warm_up() -> None:
    """Imports what the commands import, once for all workers, with a cache of its own for prepared data."""
    cache = tempfile.mkdtemp(prefix="cache-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ |= {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    import datasets  # noqa: F401
    import diffusers  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch

    from layerprobe.cli import main

    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()):
        for arguments in (["inspect", "digits"], ["probe", "digits", "--data", "digits", "--out", "none", "--dry-run"]):
            sys.argv = ["layerprobe", *arguments]
            main.run()
    # A fork copies a page that is written to; collected objects would be written to.
    gc.collect()
    gc.freeze()


def run_cases(cases: Iterable[Case], *, limit_s: float = LIMIT_S, batch: int = 1) -> Iterator[Result]:
    """Runs cases one after the other, `batch` of them in a fork."""
    left = iter(cases)
    while some := list(islice(left, batch)):
        outcomes = run_batch(some, limit_s=limit_s) if batch > 1 else [run_case(some[0], limit_s=limit_s)]
        for case, outcome in zip(some, outcomes, strict=True):
            yield Result(case.group, case.name, outcome)


def table(results: Iterable[Result]) -> str:
    """Returns the counts of every kind by group, as a table in Markdown."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        counts[result.group][result.outcome.kind] += 1
    found = {kind for group in counts.values() for kind in group}
    kinds = [kind for kind in (*CODES.values(), *FAULTS) if kind in found]
    rows = [["", "cases", *kinds]]
    rows += [[group, str(sum(c.values())), *(str(c[kind]) for kind in kinds)] for group, c in counts.items()]
    total = sum(counts.values(), Counter[str]())
    rows.append(["all", str(sum(total.values())), *(str(total[kind]) for kind in kinds)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
