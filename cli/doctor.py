"""`layerprobe doctor`: check of this machine."""

from __future__ import annotations

from layerprobe.cli import options
from layerprobe.cli.output import emit


def doctor(as_json: options.Json = False, config: options.Config = None) -> None:
    """Print versions and devices of this machine, and check that the embedded model runs.

    Examples:
        # For a report of a problem.
        layerprobe doctor
        # For a script.
        layerprobe doctor --json
    """
    from layerprobe.analyses.runs import examine_machine

    record = examine_machine()
    emit(record, [f"{key:<24} {value}" for key, value in record.pop("rows").items()], as_json=as_json)
