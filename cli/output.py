"""Output of commands: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe.messages import MAX_MESSAGE, safe, safe_lines
from layerprobe.progress import TaskProgress

if TYPE_CHECKING:
    from layerprobe.analyses.runs import LevelGrid
    from layerprobe.data import Reading

# A label and the spaces up to the text; a line without one begins with a capital letter, or is to be copied.
_LABEL = re.compile(r"\S+(?: \S+){0,3} {2,}(?=\S)| {9}(?=\S)|(?=[A-Z])|next:")
_WIDEST = 120
_AT_ONCE_S = 5.0  # a task that is done by then prints one line


def emit(record: Mapping[str, Any], lines: Sequence[str | LevelGrid], *, as_json: bool) -> None:
    """Prints a result: the record as JSON, or lines and grids for people.

    On a terminal lines are wrapped below their labels, and grids are coloured. Elsewhere each line stays one line.
    """
    if as_json:
        print(json.dumps(record, indent=1))
    elif sys.stdout.isatty():
        _emit_on_terminal(lines)
    else:
        print(safe_lines("\n".join(line if isinstance(line, str) else _plain(line) for line in lines)))


def _plain(grid: LevelGrid) -> str:
    from layerprobe.cli.heatmap import heatmap

    return "\n".join(line.rstrip() for line in heatmap(grid, sys.maxsize).plain.splitlines())


def _emit_on_terminal(lines: Sequence[str | LevelGrid]) -> None:
    from rich.console import Console
    from rich.text import Text

    from layerprobe.cli.heatmap import heatmap

    console = Console(highlight=False)
    for line in lines:
        if isinstance(line, str):
            line = safe_lines(line)
            text = Text(_wrapped(line, min(console.width, _WIDEST)))
            label = _LABEL.match(line)
            text.stylize("bold", 0, len(label[0]) if label else 0)
        else:
            text = heatmap(line, console.width)
        console.print(text, soft_wrap=True)


def _wrapped(line: str, width: int) -> str:
    """A line with a label as several ones, the text below itself; any other line as it is."""
    label = _LABEL.match(line)
    if label is None or len(line) <= width:
        return line
    indent = " " * len(label[0])
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def tell(line: str) -> None:
    """Prints a line beside the results, before or while a command works."""
    print(f"layerprobe: {safe(line, MAX_MESSAGE)}", file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Prints a warning."""
    tell(f"warning: {line}")


def tell_reading(reading: Reading | None) -> None:
    """Prints what was read of a data set; of the embedded digits, there is no record."""
    from layerprobe.data import reading_lines

    if reading is None:
        if Path("digits").exists():
            warn("digits are the embedded scans; pass ./digits to read what is there of that name")
    else:
        for subject, text in reading_lines(reading).items():
            tell(f"{subject}: {text}")


@contextmanager
def progress_bar(batch_sizes: Mapping[str, int] | None = None, *, quiet: bool = False) -> Iterator[TaskProgress]:
    """Yields a function that reports progress.

    On a terminal it draws bars. Elsewhere a task that is done within five seconds prints one line; a longer one prints
    a line for each tenth and at least one per minute.

    Args:
        batch_sizes: Samples per step, by task; these tasks also show samples per second.
        quiet: Whether to show nothing.
    """
    samples = batch_sizes or {}
    if quiet:
        yield lambda what, done, total: None
        return
    if not sys.stderr.isatty():
        yield _PlainProgress(samples)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(_rate((task.finished_speed or task.speed or 0.0) * samples.get(task.description, 0)))

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                # A training that is continued has done steps before, which must not count as speed.
                tasks[what] = bars.add_task(what, total=total, completed=done)
            bars.update(tasks[what], completed=done, total=total)

        yield report


class _PlainProgress:
    def __init__(self, batch_sizes: Mapping[str, int]) -> None:
        self._batch_sizes = batch_sizes
        self._began: dict[str, tuple[float, int]] = {}
        self._printed: dict[str, tuple[float, int]] = {}  # time and tenth of the last line

    def __call__(self, what: str, done: int, total: int) -> None:
        now, tenth = time.monotonic(), 10 * done // max(total, 1)
        began, first = self._began.setdefault(what, (now, done))
        printed, last_tenth = self._printed.get(what, (now, -1))
        if (tenth <= last_tenth and now - printed < 60) or (done < total and now - began < _AT_ONCE_S):
            return
        self._printed[what] = now, tenth
        speed = (done - first) / (now - began) if now > began else 0.0
        left = f"{span((total - done) / speed)} left" if speed and done < total else ""
        notes = (span(now - began), _rate(speed * self._batch_sizes.get(what, 0)), left)
        print(f"{what}: {done} of {total} ({', '.join(filter(None, notes))})", file=sys.stderr, flush=True)


def _rate(samples_per_s: float) -> str:
    return f"{samples_per_s:.{0 if samples_per_s >= 10 else 2}f} samples/s" if samples_per_s else ""


def span(seconds: float) -> str:
    """Returns a time in words, such as "35 s", "12 min" or "3 h 5 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
