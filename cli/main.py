"""The application: commands, exit codes, one-line errors.

Exit codes: 0 done, 1 failed, 2 usage or bad input, 3 a dependency or weight file is missing, 130 interrupted with
everything kept.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module

import typer

from layerprobe.files import DiskFull, MissingWeights, is_out_of_memory, one_line

app = typer.Typer(
    name="layerprobe",
    help="Measure what each layer of a diffusion model knows, pick which should teach which, prove it by training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# The commands in the order of the help, each with the file of cli/ that it is in.
FILES = {
    "quickstart": "quickstart",
    "inspect": "inspect",
    "probe": "probe",
    "extract": "probe",
    "analyze": "probe",
    "select": "select",
    "check": "check",
    "plot": "plot",
    "report": "report",
    "train": "train",
    "sample": "sample",
    "score": "score",
    "confirm": "confirm",
    "atlas": "atlas",
    "convert": "convert",
    "doctor": "doctor",
}
COMMANDS = tuple(getattr(import_module(f"layerprobe.cli.{file}"), name) for name, file in FILES.items())
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Runs the command line and exits with its exit code."""
    sys.exit(run())


def run() -> int:
    """Runs the command line and returns its exit code."""
    logging.getLogger("layerprobe").handlers[:] = [_Notices()]
    try:
        app(auto_envvar_prefix="LAYERPROBE")
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else 1
    except KeyboardInterrupt:
        return _fail("interrupted; repeat the command to continue where it stopped", 130)
    except MissingWeights as error:
        return _fail(str(error), 3)
    except (ModuleNotFoundError, ImportError) as error:
        return _fail(f"{error}; install the missing package", 3)
    except DiskFull as error:
        return _fail(str(error), 1)
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(f"out of memory ({one_line(error)}); pass a smaller --batch-size or --device cpu, or free some", 1)
    return 0


class _Notices(logging.Handler):
    """Prints what the package tells beside its results, such as files that were made again, as `tell` does."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"layerprobe: warning: {record.getMessage()}", file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> int:
    if "LAYERPROBE_DEBUG" in os.environ:
        import traceback

        traceback.print_exc()
    print(f"layerprobe: {' '.join(message.split())}", file=sys.stderr)
    return code
