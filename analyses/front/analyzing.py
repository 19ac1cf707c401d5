"""Measuring features that the user holds, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprobe.analyses.front.run import Run, made_run
from layerprobe.analyses.runs import features_run
from layerprobe.extraction import features_from_arrays, features_from_file
from layerprobe.progress import TaskProgress


def analyze(
    features: Mapping[Any, Any] | str | Path,
    labels: Any = None,
    *,
    ids: Any = None,
    layers: Sequence[str] = (),
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: TaskProgress | None = None,
) -> Run:
    """Measures features that another program has computed, picks a pair, draws the figures and writes the report.

        run = lp.analyze("features.npz")
        run = lp.analyze({"blocks.0@0.3": a, "blocks.1@0.3": b, "blocks.2@0.3": c}, labels)
        run = lp.analyze(model.features(x, noise_level=[0.1, 0.3]), labels)

    Args:
        features: Arrays (n, D) by "LAYER@LEVEL" or (layer, noise level), or a file of them: `.npz`, `.safetensors` or
            `.h5`, which may hold `labels` and `ids` too.
        labels: One integer or string for each sample of arrays; None to measure without labels.
        ids: One integer for each sample of arrays. With them, runs of several networks are compared sample by sample.
        layers: Names of the layers to measure, in the order in which they run; by default all, see
            `layerprobe.extraction.features_from_file`.
        out: Run folder, as for `probe`.
        seed: Seed of the measures.
        device: Device of the measures.
        progress: Called with (task name, steps done, steps in total).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the arrays do not fit together, or are too few to be measured.
    """
    if isinstance(features, str | Path):
        if labels is not None or ids is not None:
            raise ValueError("a file of features carries its labels and ids; store them in it as labels and ids")
        own = features_from_file(features, layers=layers)
    else:
        own = features_from_arrays(features, labels, ids=ids, layers=layers)
    return made_run(out, lambda run: features_run(own, run, seed=seed, device=device, progress=progress))
