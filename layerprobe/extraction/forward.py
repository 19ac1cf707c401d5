"""Extraction, (Backbone, Splits, ExtractionPlan) -> FeatureStore.

One forward pass per sample, noise level and draw reads all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe import __version__
from layerprobe.backbones import Backbone, layer_shapes
from layerprobe.capture import capture, evaluating, real_tokens
from layerprobe.checkpoints import weights_hash
from layerprobe.data import Batch, Samples, Splits, content_hash, joined
from layerprobe.extraction.features import (
    SPLITS,
    FeatureStore,
    begin_store,
    column_key,
    filled_tensors,
    is_whole,
    shard_path,
    token_path,
    token_rows,
    write_tensors,
)
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.extraction.tokens import pool_tokens, token_grid
from layerprobe.memory import BatchSize
from layerprobe.noise import RandomStream
from layerprobe.progress import StepProgress


def extract(
    backbone: Backbone,
    splits: Splits,
    plan: ExtractionPlan,
    folder: str | Path,
    *,
    batch_size: int = 128,
    progress: StepProgress | None = None,
) -> FeatureStore:
    """Reads every layer of the plan at every noise level, pooled over tokens, into a store on disk.

    Existing shards are kept, so an interrupted extraction continues and a finished one returns at once. Memory holds
    one shard of features and one batch of activations, independent of the size of the data; kept tokens are written to
    disk layer by layer. The model runs in evaluation mode, and the forward pass stops at the deepest requested layer.

    Args:
        backbone: The model, on the device where it should run.
        splits: The data; the noise is keyed by the sample ids.
        plan: The extraction plan.
        folder: Folder of the store; created if it does not exist.
        batch_size: Number of rows per forward pass; it changes the features by rounding only.
        progress: Called with (samples done, samples in total).

    Raises:
        ValueError: If the data does not fit the model, a value is not finite, or the folder belongs to another run.
    """
    folder, size = Path(folder), BatchSize(batch_size)
    backbone = backbone.in_precision(plan.precision)
    _check(backbone, splits, plan)
    table = _Table(splits)
    with evaluating(backbone.module):
        shapes = layer_shapes(backbone, plan.layers)
        plan = replace(plan, layers=tuple(shapes), precision=backbone.precision or plan.precision)
        columns = table.columns()
        kept = token_rows(columns["splits"], plan.token_samples)
        begin_store(folder, _manifest(backbone, splits, plan, shapes, kept), columns)
        for index, rows in enumerate(_runs(len(table), plan.shard_size)):
            kept_in_shard = kept[(kept >= rows.start) & (kept < rows.stop)] - rows.start
            # The shard is written after its tokens, so a shard on disk implies that its tokens are complete.
            files = [shard_path(folder, index)] + [token_path(folder, index)] * bool(len(kept_in_shard))
            if not all(is_whole(file) for file in files):
                with _kept_tokens(token_path(folder, index), backbone, plan, shapes, kept_in_shard) as keep:
                    features = _shard(backbone, table.batch(rows), plan, size, keep)
                write_tensors(shard_path(folder, index), features)
            if progress:
                progress(rows.stop, len(table))
    return FeatureStore.open(folder)


def read_features(
    backbone: Backbone, samples: Samples, plan: ExtractionPlan, *, per_token: bool = False, batch_size: int = 128
) -> dict[tuple[str, float], Tensor]:
    """Reads every layer of the plan at every noise level into memory: the numbers that `extract` stores.

    Args:
        backbone: The model, on the device where it should run.
        samples: The n samples; the noise is keyed by their ids.
        plan: The extraction plan, of one draw.
        per_token: Whether to return all tokens instead of their mean.
        batch_size: Number of rows per forward pass; it changes the features by rounding only.

    Returns:
        For each (layer, noise level) the pooled features (n, D), or the tokens (n, T, D), those of padding included;
        float32, on the CPU.

    Raises:
        ValueError: If the samples do not fit the model, or a value is not finite.
    """
    assert plan.draws == 1
    backbone = backbone.in_precision(plan.precision)
    _check(backbone, Splits(samples, samples, samples), plan)
    tokens: dict[tuple[str, float], Tensor] = {}
    n, size = len(samples), BatchSize(batch_size)

    def keep(row: Tensor, mask: Tensor | None, layer: str, values: Tensor) -> None:
        for level in sorted(set(row[0].tolist())):
            of_level = row[0] == level
            key = (layer, plan.noise_levels[level])
            store = tokens.setdefault(key, torch.empty(n, *values.shape[1:]))
            store[row[2, of_level]] = values[of_level.to(values.device)].float().cpu()

    with evaluating(backbone.module):
        shapes = layer_shapes(backbone, plan.layers)
        batch = samples.batch(range(n))
        pooled = _shard(backbone, batch, replace(plan, layers=tuple(shapes)), size, keep if per_token else None)
    if per_token:
        return {(layer, level): tokens[layer, level] for layer in pooled for level in plan.noise_levels}
    return {
        (layer, level): torch.from_numpy(values[index, 0].copy())
        for layer, values in pooled.items()
        for index, level in enumerate(plan.noise_levels)
    }


class _Table:
    """The samples of the three splits in one sequence: training, then validation, then test."""

    def __init__(self, splits: Splits) -> None:
        self._parts: list[Samples] = [samples for _, samples in splits.items()]
        self._ends = np.cumsum([len(part) for part in self._parts]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, rows: range) -> Batch:
        batches = []
        for part, end in zip(self._parts, self._ends, strict=True):
            start = end - len(part)
            inside = [row - start for row in rows if start <= row < end]
            if inside:
                batches.append(part.batch(inside))
        return joined(batches)

    def columns(self) -> dict[str, np.ndarray]:
        labels = [part.labels for part in self._parts if part.labels is not None]
        codes = np.repeat(np.arange(len(SPLITS)), [len(part) for part in self._parts])
        columns = {"ids": torch.cat([part.ids for part in self._parts]).numpy(), "splits": codes.astype(np.int64)}
        if len(np.unique(columns["ids"])) < len(columns["ids"]):
            raise ValueError(
                "two samples have the same id, so they would see the same noise; give every sample a unique id"
            )
        columns |= {"labels": torch.cat(labels).numpy()} if labels else {}
        return columns | {column_key(name): labels.numpy() for name, labels in self.extra_labels().items()}

    def extra_labels(self) -> dict[str, Tensor]:
        """Extra labels by column name."""
        columns = [{column.name: column.labels for column in part.columns} for part in self._parts]
        return {name: torch.cat([part[name] for part in columns]) for name in columns[0]}


def _check(backbone: Backbone, splits: Splits, plan: ExtractionPlan) -> None:
    if not plan.layers:
        raise ValueError("the plan has no layers; pass at least one")
    for name, samples in splits.items():
        if samples.shape != backbone.shape:
            raise ValueError(
                f"the {name} samples have shape {samples.shape} but {backbone.name} expects {backbone.shape}; "
                "pass --size or other data"
            )
        if (samples.labels is None) != (splits.train.labels is None):
            raise ValueError(f"only one of the train and the {name} splits has labels; label both or none")
        if [column.name for column in samples.columns] != [column.name for column in splits.train.columns]:
            raise ValueError(
                f"the train and the {name} splits have different extra label columns; use the same columns in both"
            )
    if plan.condition == "label" and not 0 < splits.train.num_classes <= backbone.num_classes:
        raise ValueError(
            f"the data has {splits.train.num_classes} classes but {backbone.name} has {backbone.num_classes}; "
            "use the null condition"
        )
    # Fused attention can turn NaN into finite values, so the features would not reveal it.
    finite = {name: weight.isfinite().all() for name, weight in backbone.module.named_parameters()}
    bad = [name for name, is_finite in zip(finite, _values(finite.values()), strict=True) if not is_finite]
    if bad:
        raise ValueError(f"{backbone.name} has values that are not finite in {bad[0]}; use an earlier checkpoint")
    whole_grids = plan.token_samples and not plan.tokens_per_sample
    if whole_grids and _padded(splits) and not any(column.labels.ndim > 1 for column in splits.train.columns):
        raise ValueError(
            "whole token grids can be kept only for samples of equal length or with labels of frames, but the samples "
            "are padded; leave out --token-samples, or cut the samples to one length"
        )
    highest = torch.tensor(plan.noise_levels[-1], dtype=torch.float64)
    if not bool(backbone.schedule.sigma(highest).isfinite()):
        raise ValueError(
            f"noise level {float(highest):g} is infinitely noisy under the schedule {backbone.schedule.name}; "
            f"pass levels up to {backbone.schedule.level_range[1]:.4g}"
        )


def _values(flags: Iterable[Tensor]) -> list[bool]:
    """The values of single flags, for which the device is waited for once."""
    together = [*flags]
    return torch.stack(together).tolist() if together else []


def _padded(splits: Splits) -> bool:
    return any(len(samples) and samples.batch(range(1)).mask is not None for _, samples in splits.items())


def _manifest(
    backbone: Backbone,
    splits: Splits,
    plan: ExtractionPlan,
    shapes: Mapping[str, tuple[int, int]],
    kept: NDArray[np.int64],
) -> dict[str, Any]:
    n = sum(len(samples) for _, samples in splits.items())
    manifest = {
        "layerprobe": __version__,
        "plan": plan.to_dict(),
        "plan_hash": plan.hash(),
        "model": backbone.name,
        "model_hash": weights_hash(backbone.module),
        "schedule": backbone.schedule.name,
        # The same weights under two time conventions are two models.
        "schedule_hash": content_hash(backbone.schedule.to_config())[:16],
        "prediction": backbone.prediction,
        "data": {name: samples.fingerprint for name, samples in splits.items()},
        "class_names": list(splits.train.class_names),
        "layer_shapes": {name: list(shape) for name, shape in shapes.items()},
        "num_samples": n,
        "num_shards": -(-n // plan.shard_size),
    }
    if splits.train.columns:  # absent otherwise, so that manifests of older stores stay equal
        manifest["columns"] = {
            column.name: {
                "class_names": list(column.class_names),
                "labels_hash": content_hash(labels)[:16],
                "axis": column.axis,
            }
            for column, labels in zip(splits.train.columns, _Table(splits).extra_labels().values(), strict=True)
        }
    if not plan.token_samples:
        return manifest
    padded, limit = _padded(splits), plan.tokens_per_sample
    layer_grids = {
        name: token_grid(n, backbone.shape[1:], known=backbone.token_grid) for name, (n, _) in shapes.items()
    }
    is_whole = {name: not limit or (n <= limit and not padded) for name, (n, _) in shapes.items()}
    grids = {name: layer_grids[name] if is_whole[name] else None for name in shapes}
    tokens = {"shards": np.unique(kept // plan.shard_size).tolist(), "grids": grids}
    return manifest | {"tokens": tokens | ({"padded": True} if padded and not limit else {})}


def _select_tokens(tokens: Tensor, mask: Tensor | None, backbone: Backbone, plan: ExtractionPlan) -> Tensor:
    """Selects the kept tokens of each sample, shape (B, K, D); layers with equally many tokens keep the same positions.

    The positions are the first K of a random order drawn once. With a mask of B rows, each sample keeps its first K
    real tokens in that order, repeated if it has fewer than K.
    """
    count, num_kept = tokens.shape[1], min(plan.tokens_per_sample, tokens.shape[1])
    if not num_kept:
        return tokens
    order = RandomStream(plan.seed, "order").permutation(count)
    if mask is None or count == 1:
        return tokens[:, order[:num_kept].sort().values.to(tokens.device)]
    grid = token_grid(count, backbone.shape[1:], known=backbone.token_grid)
    assert grid is not None  # otherwise pooling with a mask has failed before
    real = real_tokens(mask, grid)[:, order]
    real_first = real.int().argsort(dim=1, descending=True, stable=True)
    positions = order[real_first.gather(1, torch.arange(num_kept) % real.sum(1, keepdim=True))].to(tokens.device)
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


# (level, draw and sample of each row of a batch, shape (3, B); mask of its rows; layer; its tokens (B, T, D)) -> None
_Keep = Callable[[Tensor, Tensor | None, str, Tensor], None]


@contextmanager
def _kept_tokens(
    path: Path,
    backbone: Backbone,
    plan: ExtractionPlan,
    shapes: Mapping[str, tuple[int, int]],
    samples: NDArray[np.int64],
) -> Iterator[_Keep | None]:
    """Yields a function that writes the tokens of these samples of a shard to disk; None if there are no samples."""
    if not len(samples):
        yield None
        return
    kept_samples, limit = torch.from_numpy(samples), plan.tokens_per_sample
    lengths = {name: min(limit or count, count) for name, (count, _) in shapes.items()}
    blocks = (len(plan.noise_levels), plan.draws, len(samples))

    def keep(row: Tensor, mask: Tensor | None, layer: str, tokens: Tensor) -> None:
        chosen = torch.isin(row[2], kept_samples)
        level, draw, sample = row[:, chosen]
        real = None if mask is None else mask[chosen]
        kept = _select_tokens(tokens[chosen.to(tokens.device)], real, backbone, plan)
        indices = zip(level.tolist(), draw.tolist(), torch.searchsorted(kept_samples, sample).tolist(), strict=True)
        for index, block in zip(indices, kept.float().cpu().numpy(), strict=True):
            put(layer, index, block)

    with filled_tensors(path, {name: (*blocks, lengths[name], shapes[name][1]) for name in plan.layers}) as put:
        yield keep


@torch.inference_mode()
def _shard(
    backbone: Backbone, batch: Batch, plan: ExtractionPlan, size: BatchSize, keep: _Keep | None
) -> dict[str, NDArray[np.float32]]:
    if not bool(batch.x.isfinite().all()):
        bad = int(batch.ids[~batch.x.flatten(1).isfinite().all(1)][0])
        raise ValueError(f"sample {bad} has values that are not finite; remove it from the data")
    noise = RandomStream(plan.seed)
    n, levels = len(batch.x), torch.tensor(plan.noise_levels, dtype=torch.float64)
    eps = torch.stack([noise.normal(batch.ids, backbone.shape, draw=draw) for draw in range(plan.draws)])
    features: dict[str, Tensor] = {}

    def read(rows: range) -> dict[str, Tensor]:
        row = torch.arange(rows.start, rows.stop)
        level, draw, sample = row // (plan.draws * n), row // n % plan.draws, row % n
        labels = batch.labels[sample] if plan.condition == "label" and batch.labels is not None else None
        mask = None if batch.mask is None else batch.mask[sample]
        write = partial(keep, torch.stack([level, draw, sample]), mask) if keep else None
        x_t = backbone.schedule.corrupt(batch.x[sample], eps[draw, sample], levels[level])
        return _read(backbone, x_t, levels[level], labels, mask, plan, write)

    # Levels and draws share batches, so that batches are full: row = (level, draw, sample).
    for rows, outputs in size.batches(len(levels) * plan.draws * n, read):
        for name, pooled in outputs.items():
            store = features.setdefault(name, torch.empty(len(levels) * plan.draws * n, pooled.shape[1]))
            store[rows.start : rows.stop] = pooled
    for name, values in features.items():
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite().all(1)).nonzero()[0])
            raise ValueError(
                f"{name} outputs values that are not finite at noise level {float(levels[bad // (plan.draws * n)]):g}; "
                "check the checkpoint, or use float32 precision"
            )
    return {name: values.view(len(levels), plan.draws, n, -1).numpy() for name, values in features.items()}


def _read(
    backbone: Backbone,
    x_t: Tensor,
    level: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    plan: ExtractionPlan,
    write: Callable[[str, Tensor], None] | None,
) -> dict[str, Tensor]:
    device = backbone.device

    def own_tokens(output: Any, layer: str) -> Tensor:
        tokens = backbone.tokens(output, layer)
        if write:  # immediately, because the tokens of all layers may not fit into memory
            write(layer, tokens)
        return tokens

    def pool(tokens: Tensor) -> Tensor:
        return pool_tokens(tokens, plan.pool_cells, backbone.shape[1:], mask, known=backbone.token_grid)

    labels = None if labels is None else labels.to(device)
    with capture(backbone.module, plan.layers, tokens=own_tokens, transform=pool, stop_early=True) as outputs:
        backbone.masked(mask).predict(x_t.to(device), level.to(device, torch.float32), labels)
    # One copy for all layers: the host waits for the device once a batch.
    pooled = torch.cat([values.float() for values in outputs.values()], dim=1).cpu()
    widths = [values.shape[1] for values in outputs.values()]
    return dict(zip(outputs, torch.split(pooled, widths, dim=1), strict=True))


def _runs(n: int, size: int) -> Iterator[range]:
    for start in range(0, n, size):
        yield range(start, min(start + size, n))
