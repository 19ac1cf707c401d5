"""The minutes, memory and disk of a probing run, told before it.

Pieces of the run are timed on its own devices: one batch of its network, and the measures on features that random
layers of the same width make of its own samples. What remains is counting.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.analyses.runs.stages import (
    CONTROLS,
    CONVENTION,
    ENCODING,
    EVIDENCE,
    FIGURES,
    MODEL_FEATURES,
    PAIRS,
    PROBES,
    SIMILARITY,
    STAGES,
    Cost,
    peak_device_memory,
    peak_memory,
    shared_out,
)
from layerprobe.analyses.runs.timing import (
    LEVEL,
    as_encoded,
    byte_seconds,
    encoding_seconds,
    figure_seconds,
    first,
    load_seconds,
    row_seconds,
    seconds_of,
    squared,
)
from layerprobe.analyses.tables import (
    ANALYSES,
    MODEL,
    RANDOM_WEIGHTS,
    frame_probes,
    measure,
    measure_evidence,
    recoverability_table,
    spatial,
)
from layerprobe.backbones import Backbone, layer_shapes, wrap
from layerprobe.data import LabelColumn, Samples, Splits, Subset, TensorSamples
from layerprobe.extraction import (
    RAW_INPUT_WIDTH,
    SPLITS,
    TOKENS_PER_SAMPLE,
    ExtractionPlan,
    FeatureStore,
    extract,
    extract_evidence,
    raw_input,
)

MAX_SAMPLES = 4096  # of a split that measures are timed on; more take proportionally longer
ABLATED, FEW = 256, 384  # samples of the ablation and the evidence, at most
CHECKED_FIRST, CHECKED = 8, 64  # samples of the convention check: those on which all is tried, and all, at most
_PROBE_S = 3e-7  # seconds of a sample, channel and class in the probes of few classes
# What the convention check tries at five noise levels on its first samples: schedules and heads, for pixels also value
# ranges. And what it usually tries on all its samples: the best convention, another one, and two kinds of labels.
_TRIED, _TRIED_OF_PIXELS, _TRIED_ON_ALL = 10, 22, 4


def forecast_cost(
    backbone: Backbone,
    splits: Splits,
    plan: ExtractionPlan,
    *,
    vae: str | Path | None = None,
    batch_size: int = 128,
    measuring: torch.device | None = None,
    processes: int = 1,
    stages: Sequence[str] = STAGES,
) -> Cost:
    """Returns what a probing run will cost; times a batch of the model and a few representations.

    Args:
        backbone: The model on its device.
        splits: The data; images that are not encoded yet if there is an autoencoder.
        plan: Plan of the extraction.
        vae: Folder of the autoencoder that encodes them.
        batch_size: Rows per forward pass.
        measuring: Device of the measures; the CPU if None.
        processes: Number of processes that share the work, each with a device of its own.
        stages: Stages of the run; those of `extract` are the first of them.
    """
    encoding_s = encoding_seconds(splits, vae)
    splits = as_encoded(splits, backbone.shape)
    shapes = layer_shapes(backbone, plan.layers)
    counts = _Counts(backbone, splits, plan, shapes)
    seconds = _extraction_seconds(backbone, splits, plan, counts, batch_size, len(shapes))
    if encoding_s:
        seconds = {ENCODING: encoding_s} | seconds
    if PROBES in stages:
        seconds |= _measure_seconds(splits, plan, shapes, measuring or torch.device("cpu"))
    if FIGURES in stages:
        seconds[FIGURES] = figure_seconds(counts.cells)
    return Cost(
        shared_out(seconds, processes),
        peak_memory() + counts.held_bytes(batch_size, on_host=backbone.device.type == "cpu"),
        peak_device_memory(),
        counts.disk_bytes,
    )


def analysis_cost(store: FeatureStore, raw: FeatureStore, device: torch.device, *, processes: int = 1) -> Cost:
    """Returns what it will cost to measure features that are there, by measures of a few of their own size.

    Args:
        store: Features of the model.
        raw: Features of the raw input, in place of the samples; those of the model if there are no others.
        device: Device of the measures.
        processes: Number of processes that share the work.
    """
    plan = ExtractionPlan(store.layers, store.noise_levels, draws=store.draws)
    if len(store.token_rows):
        kept = store.manifest["plan"]
        plan = replace(plan, token_samples=kept["token_samples"], tokens_per_sample=kept["tokens_per_sample"])
    shapes: dict[str, tuple[int, int]] = store.manifest["layer_shapes"]
    pooled = store.features(store.layers[0], store.noise_levels[0], split="validation").shape[1]
    cells = pooled // shapes[store.layers[0]][1]
    shapes = {layer: (shapes[layer][0], cells * shapes[layer][1]) for layer in store.layers}
    seconds = _measure_seconds(_stored(raw), plan, shapes, device)
    seconds[FIGURES] = figure_seconds(len(store.layers) * len(store.noise_levels))
    return Cost(shared_out(seconds, processes), peak_memory(), peak_device_memory(), 0)


def rough_probe_seconds(stores: Iterable[FeatureStore]) -> float:
    """Returns about how long the probes of all features take on one core, nothing being timed."""
    seconds = 0.0
    for store in stores:
        width = max(width for _, width in store.manifest["layer_shapes"].values())
        classes = 1 if store.labels is None else len(np.unique(store.labels))
        seconds += len(store.layers) * len(store.noise_levels) * len(store.ids) * width * classes * _PROBE_S
    return seconds


def _stored(raw: FeatureStore) -> Splits:
    """Features of the first layer as samples of shape (1, D), with the labels of the store."""
    x = torch.from_numpy(raw[raw.layers[0], raw.noise_levels[0]]).unsqueeze(1)
    columns = tuple(
        LabelColumn(name, torch.from_numpy(labels), tuple(raw.manifest["columns"][name]["class_names"]))
        for name, labels in raw.columns.items()
        if labels.ndim == 1
    )
    samples = TensorSamples(
        x,
        None if raw.labels is None else torch.from_numpy(raw.labels),
        ids=torch.from_numpy(raw.ids),
        class_names=tuple(raw.manifest.get("class_names", ())),
        columns=columns,
    )
    return Splits(*(Subset(samples, np.flatnonzero(raw.splits == split).tolist(), name=split) for split in SPLITS))


def _extraction_seconds(
    backbone: Backbone, splits: Splits, plan: ExtractionPlan, counts: _Counts, batch_size: int, num_layers: int
) -> dict[str, float]:
    row_s = row_seconds(backbone, plan, batch_size)
    raw_s = row_seconds(raw_input(backbone), plan, batch_size)
    load_s, byte_s = load_seconds(splits.train), byte_seconds()
    written = counts.rows * counts.row_bytes + counts.token_bytes
    read_s = counts.samples * load_s + counts.rows * row_s + written * byte_s
    raw_read_s = counts.samples * load_s + counts.rows * (raw_s + 4 * counts.raw_width * byte_s)
    shuffle_s = 2 * _shuffle_seconds(backbone)
    few_s = counts.few_rows * (row_s + counts.few_bytes * byte_s) + min(FEW, counts.samples) * load_s
    # A skipped layer costs half a pass on the average; the outputs of all layers are recorded and replayed before.
    skipped_s = counts.ablated_rows * (2 + num_layers / 2) * row_s
    return {
        CONVENTION: counts.checked_rows * row_s,
        MODEL_FEATURES: read_s,
        CONTROLS: read_s + raw_read_s + shuffle_s,
        EVIDENCE: few_s + skipped_s,
    }


class _Counts:
    """Numbers of samples, rows and bytes of a run."""

    def __init__(
        self, backbone: Backbone, splits: Splits, plan: ExtractionPlan, shapes: dict[str, tuple[int, int]]
    ) -> None:
        levels, cells = len(plan.noise_levels), plan.pool_cells ** (len(backbone.shape) - 1)
        widths, tokens = (sum(values) for values in zip(*[(d, t * d) for t, d in shapes.values()], strict=True))
        self.samples = sum(len(samples) for _, samples in splits.items())
        self.rows, self.cells = self.samples * levels * plan.draws, len(shapes) * levels
        self.row_bytes, self.raw_width = 4 * widths * cells, min(math.prod(backbone.shape), RAW_INPUT_WIDTH)
        few = min(FEW // 2, len(splits.train)) + min(FEW // 2, len(splits.validation))
        self.few_rows = few * levels * max(2, plan.draws)
        self.few_bytes = 4 * sum((1 + min(TOKENS_PER_SAMPLE, t)) * d for t, d in shapes.values())
        self.ablated_rows = min(ABLATED, len(splits.validation)) * levels
        tried = _TRIED_OF_PIXELS if splits.train.modality in ("image", "video") else _TRIED
        self.checked_rows = 5 * (CHECKED_FIRST * tried + _TRIED_ON_ALL * min(CHECKED, len(splits.train)))
        kept = sum(min(plan.token_samples, len(samples)) for _, samples in splits.items()) * levels * plan.draws
        per_token = [min(plan.tokens_per_sample or t, t) * d for t, d in shapes.values()]
        self.token_bytes = kept * 4 * sum(per_token)  # of those that are kept beside the pooled features
        self.disk_bytes = (
            self.rows * (2 * self.row_bytes + 4 * self.raw_width)
            + self.few_rows * self.few_bytes
            + 2 * self.token_bytes
        )
        self._shard_bytes: int = min(plan.shard_size, self.samples) * levels * plan.draws * self.row_bytes
        self._output_bytes: int = 4 * tokens
        self._widest: int = 4 * max(t * d for t, d in shapes.values())

    def held_bytes(self, batch_size: int, *, on_host: bool) -> int:
        """Memory of the host beyond what the timed pieces had: a shard twice, or the ablation with all outputs."""
        if not on_host:
            return 2 * self._shard_bytes
        batch = min(batch_size, self.rows)
        ablation = 2 * self._output_bytes * min(batch_size, self.ablated_rows)
        return max(2 * self._shard_bytes + 8 * self._widest * batch, ablation)


def _measure_seconds(
    splits: Splits, plan: ExtractionPlan, shapes: dict[str, tuple[int, int]], device: torch.device
) -> dict[str, float]:
    """Seconds of all probes, of the similarities, and of the measures of pairs."""
    num, levels = max(2, torch.get_num_threads()), len(plan.noise_levels)
    widths = [d * plan.pool_cells ** (len(splits.train.shape) - 1) for _, d in shapes.values()]
    few = splits.mapped(lambda _, samples: first(samples, MAX_SAMPLES))
    share = sum(map(len, (few.train, few.validation, few.test))) / sum(len(samples) for _, samples in splits.items())
    # Tokens of padded samples would need a grid.
    network = projections(few.train, _chosen(widths, num), 8 if few.train.batch(range(1)).mask is None else 1)
    one_level = ExtractionPlan(network.layers, (LEVEL,), seed=plan.seed)
    pairs_s = []
    with tempfile.TemporaryDirectory() as folder:
        stores = _stores(network, few, one_level, num, Path(folder))
        # Frames and places are measured on kept tokens.
        pooled = [analysis for analysis in ANALYSES if analysis not in (frame_probes, spatial)]
        probes_s = seconds_of(lambda: measure({RANDOM_WEIGHTS: stores[0]}, analyses=pooled, device=device)) / share
        similar_s = [seconds_of(partial(measure, {MODEL: store}, analyses=(), device=device)) for store in stores]
        for name, layers in (("a", network.layers[:num]), ("b", network.layers)):
            small = extract_evidence(network, few, replace(one_level, layers=layers), Path(folder) / name)
            pairs_s.append(seconds_of(partial(measure_evidence, small)))
    representations = (2 * len(shapes) + 1) * levels * plan.draws
    of_tokens = (0.0, 0.0)
    if plan.token_samples:
        of_tokens = _token_seconds(splits, plan, shapes, device, num)
    return {
        PROBES: (probes_s / num + of_tokens[0]) * representations,
        SIMILARITY: plan.draws
        * squared(similar_s, num, len(shapes) * levels)
        * len(splits.validation)
        / len(few.validation),
        PAIRS: levels * (squared(pairs_s, num, len(shapes)) + plan.draws * of_tokens[1]),
    }


def _token_seconds(
    splits: Splits, plan: ExtractionPlan, shapes: dict[str, tuple[int, int]], device: torch.device, num: int
) -> tuple[float, float]:
    """Seconds of the measures of the kept tokens: those of a representation, and of all pairs of a noise level."""
    kept = splits.mapped(lambda _, samples: first(samples, plan.token_samples))
    num_tokens = max(tokens for tokens, _ in shapes.values())
    network = projections(kept.train, _chosen([d for _, d in shapes.values()], num), num_tokens)
    one_level = replace(plan, layers=network.layers, noise_levels=(LEVEL,), draws=1, pool_cells=1)
    with tempfile.TemporaryDirectory() as folder:
        stores = _stores(network, kept, one_level, num, Path(folder))
        measure_s = seconds_of(
            lambda: measure({RANDOM_WEIGHTS: stores[0]}, analyses=(frame_probes, spatial), device=device)
        )
        pairs_s = [seconds_of(partial(recoverability_table, store, device=device)) for store in stores]
    return measure_s / num, squared(pairs_s, num, len(shapes))


def _chosen(widths: Sequence[int], num: int) -> list[int]:
    """So many widths, and twice as many more, evenly among those of all layers."""
    return [widths[i * len(widths) // (3 * num)] for i in range(3 * num)]


def _stores(
    network: Backbone, splits: Splits, plan: ExtractionPlan, num: int, folder: Path
) -> tuple[FeatureStore, FeatureStore]:
    """Features of the first layers, so many, and of all three times as many."""
    fewer = replace(plan, layers=network.layers[:num])
    return (
        extract(network, splits, fewer, folder / "few", batch_size=512),
        extract(network, splits, plan, folder / "more", batch_size=512),
    )


class _Projections(nn.Module):
    def __init__(self, num_values: int, widths: Sequence[int], num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        generator = torch.Generator().manual_seed(0)
        self.step = -(-num_values // RAW_INPUT_WIDTH)
        inputs = len(range(0, num_values, self.step))
        self.layers = nn.ModuleList(nn.Linear(inputs, width) for width in widths)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) / math.sqrt(inputs)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        values = x.flatten(1)[:, :: self.step]
        tokens = torch.stack([values * (1 + 0.1 * i) for i in range(self.num_tokens)], dim=1)
        for layer in self.layers:
            layer(tokens)
        return x


def projections(samples: Samples, widths: Sequence[int], num_tokens: int) -> Backbone:
    """Returns a network of random layers that each read the noisy sample: features with its classes, for little.

    Args:
        samples: Samples that it takes.
        widths: Widths of the layers.
        num_tokens: Number of tokens of each.
    """
    network = wrap(
        _Projections(math.prod(samples.shape), widths, num_tokens),
        layers="layers.*",
        schedule="sit",
        prediction="velocity",
        shape=samples.shape,
        forward=lambda module, x_t, time, condition, *mask: module(x_t, time),
    )
    return replace(network, takes_mask=True)


def _shuffle_seconds(backbone: Backbone) -> float:
    """Seconds to draw the permutations of all weights."""
    num = sum(parameter.numel() for parameter in backbone.module.parameters())
    timed = min(num, 2**20)
    return seconds_of(lambda: torch.randperm(timed)) * num / timed
