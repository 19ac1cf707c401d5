"""The minutes, memory and disk of a probing run, told before it.

Pieces of the run are timed on its own devices: one batch of its network, and the measures on features that random
layers of the same width make of its own samples. What remains is counting.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.analyses.runs.stages import (
    CONTROLS,
    CONVENTION,
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
)
from layerprobe.analyses.tables import ANALYSES, MODEL, RANDOM_WEIGHTS, frame_probes, measure, measure_evidence
from layerprobe.backbones import Backbone, layer_shapes, wrap
from layerprobe.data import Samples, Splits, Subset, TensorSamples
from layerprobe.extraction import (
    RAW_INPUT_WIDTH,
    TOKENS_PER_SAMPLE,
    ExtractionPlan,
    extract,
    extract_evidence,
    raw_input,
    read_features,
    write_tensors,
)

MAX_SAMPLES = 4096  # of a split that measures are timed on; more take proportionally longer
ABLATED, CHECKED, FEW = 256, 64, 384  # samples of the ablation, the convention check and the evidence, at most
# What the convention check tries at five noise levels on its first samples: schedules and heads, for pixels also value
# ranges. And what it usually tries on all its samples: the best convention, another one, and two kinds of labels.
_TRIED, _TRIED_OF_PIXELS, _TRIED_ON_ALL = 10, 22, 4
_FIGURES_S = 4.0  # seconds of all figures and the report without any cell, where one picture takes a second
_CELL_S = 0.05  # and of each layer at each noise level
_TIMED_S = 2.0  # what a batch may take at the most before fewer rows are timed
_REPEATED = 3  # timings, of which the fastest counts
_LEVEL = 0.3


def forecast_cost(
    backbone: Backbone,
    splits: Splits,
    plan: ExtractionPlan,
    *,
    batch_size: int = 128,
    measuring: torch.device | None = None,
    processes: int = 1,
) -> Cost:
    """Returns what a probing run will cost; times a batch of the model and a few representations.

    Args:
        backbone: The model on its device.
        splits: The data.
        plan: Plan of the extraction.
        batch_size: Rows per forward pass.
        measuring: Device of the measures; the CPU if None.
        processes: Number of processes that share the work, each with a device of its own.
    """
    shapes = layer_shapes(backbone, plan.layers)
    counts = _Counts(backbone, splits, plan, shapes)
    row_s = row_seconds(backbone, plan, batch_size)
    raw_s = row_seconds(raw_input(backbone), plan, batch_size)
    load_s, byte_s = _load_seconds(splits.train), _byte_seconds()
    read_s = counts.samples * load_s + counts.rows * (row_s + counts.row_bytes * byte_s)
    raw_read_s = counts.samples * load_s + counts.rows * (raw_s + 4 * counts.raw_width * byte_s)
    shuffle_s = 2 * _shuffle_seconds(backbone)
    few_s = counts.few_rows * (row_s + counts.few_bytes * byte_s) + min(FEW, counts.samples) * load_s
    # A skipped layer costs half a pass on the average; the outputs of all layers are recorded and replayed before.
    skipped_s = counts.ablated_rows * (2 + len(shapes) / 2) * row_s
    probes_s, similarity_s, pairs_s = _measure_seconds(splits, plan, shapes, measuring or torch.device("cpu"))
    shared = {
        MODEL_FEATURES: read_s,
        CONTROLS: read_s + raw_read_s + shuffle_s,
        EVIDENCE: few_s + skipped_s,
        PROBES: probes_s,
        SIMILARITY: similarity_s,
        PAIRS: pairs_s,
    }
    seconds = {stage: value / processes for stage, value in shared.items()}
    seconds |= {CONVENTION: counts.checked_rows * row_s, FIGURES: _figure_seconds(counts.cells)}
    return Cost(
        {stage: seconds[stage] for stage in STAGES},
        peak_memory() + counts.held_bytes(batch_size, on_host=backbone.device.type == "cpu"),
        peak_device_memory(),
        counts.disk_bytes,
    )


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
        self.checked_rows = 5 * (8 * tried + _TRIED_ON_ALL * min(CHECKED, len(splits.train)))
        kept = sum(min(plan.token_samples, len(samples)) for _, samples in splits.items()) * levels * plan.draws
        per_token = [min(plan.tokens_per_sample or t, t) * d for t, d in shapes.values()]
        self.disk_bytes = (
            self.rows * (2 * self.row_bytes + 4 * self.raw_width)
            + self.few_rows * self.few_bytes
            + 2 * kept * 4 * sum(per_token)
        )
        self._shard_bytes: int = min(plan.shard_size, self.samples) * levels * plan.draws * self.row_bytes
        self._token_bytes: int = 4 * tokens
        self._widest: int = 4 * max(t * d for t, d in shapes.values())

    def held_bytes(self, batch_size: int, *, on_host: bool) -> int:
        """Memory of the host beyond what the timed pieces had: a shard twice, or the ablation with all outputs."""
        if not on_host:
            return 2 * self._shard_bytes
        batch = min(batch_size, self.rows)
        ablation = 2 * self._token_bytes * min(batch_size, self.ablated_rows)
        return max(2 * self._shard_bytes + 8 * self._widest * batch, ablation)


def row_seconds(backbone: Backbone, plan: ExtractionPlan, batch_size: int) -> float:
    """Returns the seconds of one row of the extraction, a sample at a noise level, in batches of this size.

    Values do not change the time, so the samples are noise.
    """
    plan = ExtractionPlan(backbone.layers, (_LEVEL,), pool_cells=plan.pool_cells, precision=plan.precision)
    generator = torch.Generator().manual_seed(0)
    samples = TensorSamples(torch.randn(batch_size, *backbone.shape, generator=generator))

    def seconds(rows: int) -> float:
        few = Subset(samples, range(rows), name="forecast")
        return _seconds(lambda: read_features(backbone, few, plan, batch_size=batch_size))

    seconds(1)
    one_s = min(seconds(1) for _ in range(_REPEATED))
    rows = min(batch_size, 2 + round(_TIMED_S / one_s))
    if rows == 1:
        return one_s
    all_s = min(seconds(rows) for _ in range(_REPEATED if one_s < _TIMED_S else 1))
    # Both check the weights and pass two samples before. Where the clock is not fine enough for the difference, all
    # of it counts.
    return (all_s - one_s) / (rows - 1) if all_s > 2 * one_s else all_s / rows


def _measure_seconds(
    splits: Splits, plan: ExtractionPlan, shapes: dict[str, tuple[int, int]], device: torch.device
) -> tuple[float, float, float]:
    """Seconds of all probes, of the similarities, and of the measures of pairs."""
    num, levels = max(2, torch.get_num_threads()), len(plan.noise_levels)
    widths = [d * plan.pool_cells ** (len(splits.train.shape) - 1) for _, d in shapes.values()]
    chosen = [widths[i * len(widths) // (3 * num)] for i in range(3 * num)]
    network = _projections(splits.train, chosen)
    few = Splits(*(_first(samples, MAX_SAMPLES) for _, samples in splits.items()))
    share = sum(map(len, (few.train, few.validation, few.test))) / sum(len(samples) for _, samples in splits.items())
    one_level = ExtractionPlan(network.layers[:num], (_LEVEL,), seed=plan.seed)
    with tempfile.TemporaryDirectory() as folder:
        stores = [
            extract(network, parts, each, Path(folder) / name, batch_size=512)
            for name, parts, each in (
                ("few", few, one_level),
                ("more", few, replace(one_level, layers=network.layers)),
            )
        ]
        # Frames are probed on kept tokens, which there are none of here.
        analyses = [analysis for analysis in ANALYSES if analysis is not frame_probes]
        probes_s = _seconds(lambda: measure({RANDOM_WEIGHTS: stores[0]}, analyses=analyses, device=device)) / share
        similar_s = [_seconds(partial(measure, {MODEL: store}, analyses=(), device=device)) for store in stores]
        pairs_s = []
        for name, layers in (("a", network.layers[:num]), ("b", network.layers)):
            small = extract_evidence(network, few, replace(one_level, layers=layers), Path(folder) / name)
            pairs_s.append(_seconds(partial(measure_evidence, small)))
    representations = (2 * len(shapes) + 1) * levels * plan.draws
    return (
        probes_s * representations / num,
        plan.draws * _squared(similar_s, num, len(shapes) * levels) * len(splits.validation) / len(few.validation),
        levels * _squared(pairs_s, num, len(shapes)),
    )


def _squared(seconds: Sequence[float], num: int, wanted: int) -> float:
    """Seconds for a number of things of which all pairs are compared, from those for `num` and `3 * num`."""
    square = max(seconds[1] - 3 * seconds[0], 0.0) / (6 * num**2)
    return max(seconds[0] / num - square * num, 0.0) * wanted + square * wanted**2


class _Projections(nn.Module):
    """Random layers of given widths, each of which reads the noisy sample: features with its classes, for little."""

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


def _projections(samples: Samples, widths: Sequence[int]) -> Backbone:
    # Tokens of padded samples would need a grid.
    num_tokens = 8 if samples.batch(range(1)).mask is None else 1
    network = wrap(
        _Projections(math.prod(samples.shape), widths, num_tokens),
        layers="layers.*",
        schedule="sit",
        prediction="velocity",
        shape=samples.shape,
        forward=lambda module, x_t, time, condition, *mask: module(x_t, time),
    )
    return replace(network, takes_mask=True)


def _first(samples: Samples, count: int) -> Samples:
    return samples if len(samples) <= count else Subset(samples, range(count), name="forecast")


def _load_seconds(samples: Samples) -> float:
    num = min(64, len(samples))
    return _seconds(lambda: samples.batch(range(num))) / num


def _byte_seconds() -> float:
    """Seconds to write a byte of features."""
    values = np.zeros((64, 2**16), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        return _seconds(lambda: write_tensors(Path(folder) / "shard.safetensors", {"values": values})) / values.nbytes


def _shuffle_seconds(backbone: Backbone) -> float:
    """Seconds to draw the permutations of all weights."""
    num = sum(parameter.numel() for parameter in backbone.module.parameters())
    timed = min(num, 2**20)
    return _seconds(lambda: torch.randperm(timed)) * num / timed


def _figure_seconds(cells: int) -> float:
    """Seconds of the figures and the report, which take in proportion to one picture."""
    from layerprobe.analyses.figures import sample_grid, save_figure

    images = np.zeros((64, 1, 8, 8), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        draw = partial(sample_grid, images, None, columns=8)
        picture_s = min(_seconds(lambda: save_figure(draw(), Path(folder), "a")) for _ in range(2))
    return picture_s * (_FIGURES_S + _CELL_S * cells)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
