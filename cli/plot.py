"""`layerprobe plot`: the figures of a run."""

from __future__ import annotations

from layerprobe.cli import options
from layerprobe.cli.output import emit


def plot(run: options.Run, as_json: options.Json = False, config: options.Config = None) -> None:
    """Draw every figure of a run as PNG and SVG."""
    from layerprobe.analyses.runs import draw_figures

    paths = [str(path) for path in draw_figures(run)]
    emit({"figures": paths}, paths, as_json=as_json)
