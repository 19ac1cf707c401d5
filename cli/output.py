"""What commands print: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]


def emit(record: Mapping[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    """Prints a result: the record as JSON, or lines for people."""
    print(json.dumps(record, indent=1) if as_json else "\n".join(lines))


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A function to report progress with: bars on a terminal, else a line per task and every tenth of it."""
    if not sys.stderr.isatty():
        yield _PlainProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


class _PlainProgress:
    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._tenth: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        began = self._began.setdefault(what, time.monotonic())
        tenth = 10 * done // max(total, 1)
        if tenth > self._tenth.get(what, -1):
            self._tenth[what] = tenth
            print(f"{what}: {done} of {total} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
