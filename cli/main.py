"""The application: commands, exit codes, one-line errors.

Exit codes: 0 done, 1 failed, 2 usage or bad input, 3 a dependency or weight file is missing, 130 interrupted with
everything kept.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from layerprobe import __version__
from layerprobe.cli.fields import shares_work
from layerprobe.cli.help import HelpfulCommand, HelpfulGroup
from layerprobe.cli.output import tell, warn
from layerprobe.files import MissingWeights, is_disk_full, os_error_line
from layerprobe.memory import failure_in, failure_line, is_out_of_memory, is_refusal
from layerprobe.messages import MAX_MESSAGE, safe
from layerprobe.ranks import alone, ranks_of

_MAX_REASON = 160  # characters of what a device says of itself
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"layerprobe {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="layerprobe",
    cls=HelpfulGroup,
    help="Measure what each layer of a diffusion model knows, pick which should teach which, prove it by training.",
    epilog="# A minute on two cores, nothing to download.\n"
    "layerprobe quickstart\n"
    "# Then your own: what is read of it, and the whole measurement.\n"
    "layerprobe inspect model.safetensors\n"
    "layerprobe probe model.safetensors --data images/ --out runs/mine\n"
    "# The options of a command, with examples.\n"
    "layerprobe probe --help",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # an error of usage is plain lines, not a box
)


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Takes the options that belong to no command."""


# The commands in the order of the help, below their headings, each with the file of cli/ that it is in.
FILES = {
    "Measure": {
        "quickstart": "quickstart",
        "inspect": "inspect",
        "probe": "probe",
        "extract": "probe",
        "analyze": "probe",
    },
    "Read a run": {
        "select": "select",
        "compare": "compare",
        "plot": "plot",
        "report": "report",
    },
    "Train and test the pick": {
        "train": "train",
        "confirm": "confirm",
        "atlas": "atlas",
        "sample": "sample",
        "score": "score",
    },
    "Files and machine": {
        "check": "check",
        "convert": "convert",
        "doctor": "doctor",
    },
}


class _Command(HelpfulCommand):
    """A command of one process or several."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command, in the first process alone if it does not share its work."""
        ranks, _ = ranks_of(os.environ)
        if ranks.world_size > 1:  # torch, which is not imported yet, logs a lost connection as a stack of C++ frames.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if ranks.world_size > 1 and not shares_work(self.callback):
            if not ranks.is_first:
                return None
            tell(f"{self.name} is the work of one process; the other {ranks.world_size - 1} end at once")
            with alone():
                return super().invoke(ctx)
        return super().invoke(ctx)


COMMANDS = tuple(
    getattr(import_module(f"layerprobe.cli.{file}"), name) for files in FILES.values() for name, file in files.items()
)
for panel, files in FILES.items():
    for command in COMMANDS:
        if command.__name__ in files:
            app.command(cls=_Command, rich_help_panel=panel)(command)


def main() -> None:
    """Runs the command line and exits with its exit code."""
    sys.exit(run())


def run() -> int:
    """Runs the command line and returns its exit code."""
    logging.getLogger("layerprobe").handlers[:] = [_Notices()]
    try:
        with _warnings_in_one_line():
            app(auto_envvar_prefix="LAYERPROBE")
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else 1
    except KeyboardInterrupt:
        return _fail("interrupted; repeat the command to continue where it stopped", 130)
    except MissingWeights as error:
        return _fail(str(error), 3)
    except (ModuleNotFoundError, ImportError) as error:
        return _fail(f"{error}; install the missing package", 3)
    except ConnectionError as error:  # It tells in its own words which failure it was made of.
        return _fail(os_error_line(error), 1)
    except Exception as error:
        failure = failure_in(error)
        if failure is not None:
            return _fail(_failure_line(failure), 1)
        if isinstance(error, OSError):
            return _fail(os_error_line(error), 1 if is_disk_full(error) else 2)
        if isinstance(error, ValueError):
            return _fail(str(error), 2)
        raise
    return 0


def _failure_line(failure: BaseException) -> str:
    line = safe(failure_line(failure))[:_MAX_REASON]
    if is_out_of_memory(failure):
        advice = "pass a smaller --batch-size (train: a larger --accumulate) or --device cpu, or free some"
        return f"out of memory ({line}); {advice}"
    if is_refusal(failure):
        return f"{line}; leave out --deterministic, or compute on a CPU with --device cpu"
    return f"the device failed ({line}); repeat the command, or pass --device cpu"


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Shows our own warnings at once, and those of libraries once a command has succeeded: an error explains itself."""
    of_libraries: dict[str, None] = {}

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if filename.startswith(_PACKAGE):
            tell(f"warning: {text}")
        else:
            of_libraries[f"{category.__name__}: {text}"] = None

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        except SystemExit as finished:  # as typer ends every command
            for line in () if finished.code else of_libraries:
                tell(f"warning: {line}")
            raise


class _Notices(logging.Handler):
    """Prints what the package tells beside its results, such as files that were made again."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def _fail(message: str, code: int) -> int:
    if "LAYERPROBE_DEBUG" in os.environ:
        import traceback

        traceback.print_exc()
    print(f"layerprobe: {safe(' '.join(message.split()), MAX_MESSAGE)}", file=sys.stderr)
    return code
