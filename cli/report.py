"""`layerprobe report`: the page of a run."""

from __future__ import annotations

from layerprobe.cli import options
from layerprobe.cli.output import emit, tell
from layerprobe.files import holder


def report(run: options.Run, as_json: options.Json = False, config: options.Config = None) -> None:
    """Write report.html, one self-contained page.

    Examples:
        # Again, after `plot` or `confirm`, or of a run that was interrupted.
        layerprobe report runs/mine
        # For a script: the path as JSON.
        layerprobe report runs/mine --json
    """
    from layerprobe.analyses.report import write_report

    if who := holder(run):
        tell(f"{run} is in use by {who}; the page shows what is finished")
    path = str(write_report(run))
    emit({"report": path}, [path], as_json=as_json)
