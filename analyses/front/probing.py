"""Probing in one call: a model and data in, a run out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from layerprobe.analyses.front.model import Model, open
from layerprobe.analyses.front.objects import as_splits
from layerprobe.analyses.front.run import Run, made_run
from layerprobe.analyses.runs import RunPlan, probe_run
from layerprobe.backbones import Backbone
from layerprobe.data import DataSource, Splits, content_hash
from layerprobe.extraction import ExtractionPlan
from layerprobe.files import IN_MEMORY
from layerprobe.progress import TaskProgress


def probe(
    model: Model | str | Path | nn.Module | Backbone,
    data: Any,
    labels: Any = None,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 128,
    trust_convention: bool = False,
    progress: TaskProgress | None = None,
    **extraction: Any,
) -> Run:
    """Measures every layer at every noise level, picks a pair, draws the figures and writes the report.

        run = lp.probe("digits", "digits")
        run = lp.probe(model, x, y, noise_levels=(0.1, 0.3, 0.5))

    Args:
        model: Model from `open`, or what `open` takes.
        data: Path or name of a data set, a `DataSource`, `Samples`, `Splits`, or an array as for
            `Model.features`.
        labels: Labels of an array: an integer or a string for each sample.
        out: Run folder, which the call continues if it was interrupted. None makes a temporary one, which is removed
            with the returned run.
        device: Device of a model that is opened here.
        batch_size: Number of rows per forward pass.
        trust_convention: Whether to continue if the weights fit another schedule or prediction than the declared one.
        progress: Called with (task name, steps done, steps in total).
        **extraction: Fields of `ExtractionPlan`: noise_levels, draws, seed, token_samples, ...

    Raises:
        ValueError: If model, data and plan do not fit, or the folder holds another run.
    """
    model = model if isinstance(model, Model) else open(model, device=device)
    if isinstance(data, str | Path):
        data = DataSource(str(data))
    if isinstance(data, DataSource):
        if labels is not None:
            raise ValueError("a data set on disk carries its labels; name them by DataSource(..., label_column=...)")
        source, shape = data.absolute(), model.backbone.shape
        splits = source.encode(source.probing_splits(expect_shape=shape), expect_shape=shape)
    else:
        splits = as_splits(data, labels, num_classes=model.backbone.num_classes)
        source = DataSource(IN_MEMORY + _fingerprint(splits))
    plan = RunPlan(model.source, source, ExtractionPlan(**extraction))
    options: dict[str, Any] = {"batch_size": batch_size, "trust_convention": trust_convention, "progress": progress}
    return made_run(out, lambda run: probe_run(plan, run, opened=(model.backbone, splits), **options))


def _fingerprint(splits: Splits) -> str:
    number = sum(len(samples) for _, samples in splits.items())
    return f"{number} samples, {content_hash(*(samples.fingerprint for _, samples in splits.items()))[:16]}"
