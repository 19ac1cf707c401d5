"""Extraction, (Backbone, Splits, ExtractionPlan) -> FeatureStore.

One forward pass per sample, noise level and draw reads all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

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
from layerprobe.memory import BatchSize, is_out_of_memory
from layerprobe.noise import RandomStream
from layerprobe.progress import StepProgress
from layerprobe.ranks import ALONE, Ranks
from layerprobe.records import differences
from layerprobe.threads import behind, prefetched

Item = TypeVar("Item")
_MOST_ON_DEVICE_BYTES = 2**30  # of the samples and the noise of a shard


def extract(
    backbone: Backbone,
    splits: Splits,
    plan: ExtractionPlan,
    folder: str | Path,
    *,
    batch_size: int = 128,
    ranks: Ranks = ALONE,
    progress: StepProgress | None = None,
) -> FeatureStore:
    """Reads every layer of the plan at every noise level, pooled over tokens, into a store on disk.

    Existing shards are kept, so an interrupted extraction continues and a finished one returns at once. While a shard
    is computed, threads prepare the samples of the next one and write the one before. Memory holds two shards of
    features, the samples and noise of two, and one batch of activations, independent of the size of the data; kept
    tokens are written to disk layer by layer. The model runs in evaluation mode, and the forward pass stops at the
    deepest requested layer.

    Args:
        backbone: The model, on the device where it should run.
        splits: The data; the noise is keyed by the sample ids.
        plan: The extraction plan.
        folder: Folder of the store; created if it does not exist.
        batch_size: Number of rows per forward pass; it changes the features by rounding only.
        ranks: Processes that share the shards and all call this function; the store is the same for any number of them.
        progress: Called with (samples done, samples in total).

    Raises:
        ValueError: If the data does not fit the model, a value is not finite, the folder belongs to another run, or the
            processes have different models or data.
    """
    extract_part(backbone, splits, plan, folder, batch_size=batch_size, ranks=ranks, progress=progress)
    ranks.barrier()
    return FeatureStore.open(folder)


def extract_part(
    backbone: Backbone,
    splits: Splits,
    plan: ExtractionPlan,
    folder: str | Path,
    *,
    batch_size: int = 128,
    ranks: Ranks = ALONE,
    turn: int = 0,
    progress: StepProgress | None = None,
) -> int:
    """Does this process' part of `extract`, without waiting for that of the others.

    Args:
        backbone: See `extract`.
        splits: See `extract`.
        plan: See `extract`.
        folder: See `extract`.
        batch_size: See `extract`.
        ranks: See `extract`.
        turn: Number of shards that were divided before, so that the processes take turns over several stores.
        progress: See `extract`.

    Returns:
        The turn after this store.
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
        manifest, shards = _manifest(backbone, splits, plan, shapes, kept), [*_runs(len(table), plan.shard_size)]
        if ranks.is_first:
            begin_store(folder, manifest, columns)
        _check_equal(manifest, ranks)
        done = 0
        todo = ranks.mine(list(enumerate(shards)), turn=turn)
        with closing(prefetched(_work(todo, folder, table, backbone, plan, kept), ahead=1)) as ready, behind() as later:
            for work in ready:
                ranks.check()
                if work.inputs:
                    tokens = token_path(folder, work.index)
                    with _kept_tokens(tokens, backbone, plan, shapes, work.kept) as keep:
                        features = _shard(backbone, work.inputs, plan, size, keep)
                    # The shard is written after its tokens, so a shard on disk implies that its tokens are complete.
                    later(write_tensors, shard_path(folder, work.index), features)
                    del features  # the thread holds it as long as it is written
                if progress and done:  # of the shard before, which is on disk now
                    progress(done, len(table))
                done = work.rows.stop
    if progress:
        progress(len(table), len(table))
    return turn + len(shards)


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
        inputs = _inputs(backbone, samples.batch(range(n)), plan)
        pooled = _shard(backbone, inputs, replace(plan, layers=tuple(shapes)), size, keep if per_token else None)
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


def _check_equal(manifest: dict[str, Any], ranks: Ranks) -> None:
    """Waits until the store has begun, and refuses another model or other data than those of the first process."""
    if changed := differences(ranks.broadcast(manifest), manifest):
        raise ValueError(
            f"process {ranks.rank} has another model or other data than the first one (different: "
            f"{', '.join(changed[:4])}); give all processes the same files"
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
        if not bool(chosen.any()):
            return
        level, draw, sample = row[:, chosen]
        real = None if mask is None else mask[chosen]
        kept = _select_tokens(tokens[chosen.to(tokens.device)], real, backbone, plan)
        indices = zip(level.tolist(), draw.tolist(), torch.searchsorted(kept_samples, sample).tolist(), strict=True)
        for index, block in zip(indices, kept.float().cpu().numpy(), strict=True):
            put(layer, index, block)

    with filled_tensors(path, {name: (*blocks, lengths[name], shapes[name][1]) for name in plan.layers}) as put:
        yield keep


@dataclass(frozen=True)
class _Inputs:
    """The samples of a shard, and their noise of every draw, shape (draws, n, C, *grid)."""

    batch: Batch
    eps: Tensor


@dataclass(frozen=True)
class _Work:
    """A shard: its rows in the table, those of the shard whose tokens are kept, and its inputs, if it is not made."""

    index: int
    rows: range
    kept: NDArray[np.int64]
    inputs: _Inputs | None


def _work(
    shards: Sequence[tuple[int, range]],
    folder: Path,
    table: _Table,
    backbone: Backbone,
    plan: ExtractionPlan,
    kept: NDArray[np.int64],
) -> Iterator[_Work]:
    """Yields these shards, each an index and its rows, with the inputs of those that are not on disk."""
    for index, rows in shards:
        kept_in_shard = kept[(kept >= rows.start) & (kept < rows.stop)] - rows.start
        files = [shard_path(folder, index)] + [token_path(folder, index)] * bool(len(kept_in_shard))
        whole = all(is_whole(file) for file in files)
        yield _Work(index, rows, kept_in_shard, None if whole else _inputs(backbone, table.batch(rows), plan))


def _inputs(backbone: Backbone, batch: Batch, plan: ExtractionPlan) -> _Inputs:
    if not bool(batch.x.isfinite().all()):
        bad = int(batch.ids[~batch.x.flatten(1).isfinite().all(1)][0])
        raise ValueError(f"sample {bad} has values that are not finite; remove it from the data")
    noise = RandomStream(plan.seed)
    eps = torch.stack([noise.normal(batch.ids, backbone.shape, draw=draw) for draw in range(plan.draws)])
    return _Inputs(batch, eps)


def _on_device(inputs: _Inputs, device: torch.device) -> _Inputs:
    """Returns the inputs on the device, where x_t is made then; those on the host if there is no room for them.

    The noise is drawn on the host in any case, where its bits are known.
    """
    batch, eps = inputs.batch, inputs.eps
    if batch.x.nbytes + eps.nbytes > _MOST_ON_DEVICE_BYTES:
        return inputs
    try:
        labels, mask = (None if column is None else column.to(device) for column in (batch.labels, batch.mask))
        return _Inputs(Batch(batch.x.to(device), labels, batch.ids, mask), eps.to(device))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return inputs


@torch.inference_mode()
def _shard(
    backbone: Backbone, inputs: _Inputs, plan: ExtractionPlan, size: BatchSize, keep: _Keep | None
) -> dict[str, NDArray[np.float32]]:
    n, num_levels, mask_here = len(inputs.eps[0]), len(plan.noise_levels), inputs.batch.mask
    inputs = _on_device(inputs, backbone.device)
    batch, eps, place = inputs.batch, inputs.eps, inputs.eps.device
    levels = torch.tensor(plan.noise_levels, dtype=torch.float64).to(place)
    conditions = batch.labels if plan.condition == "label" else None

    def read(rows: range) -> tuple[tuple[str, ...], list[int], Callable[[], Tensor]]:
        # Levels and draws share batches, so that batches are full: row = (level, draw, sample).
        level, draw, sample = _row(rows, plan.draws, n, place)
        labels, mask = (None if column is None else column[sample] for column in (conditions, batch.mask))
        write = None
        if keep:
            here = _row(rows, plan.draws, n, torch.device("cpu"))
            write = partial(keep, here, None if mask_here is None else mask_here[here[2]])
        x_t = backbone.schedule.corrupt(batch.x[sample], eps[draw, sample], levels[level])
        return _read(backbone, x_t, levels[level], labels, mask, plan, write)

    features: dict[str, Tensor] = {}
    for rows, (names, widths, arrived) in _one_behind(size.batches(num_levels * plan.draws * n, read)):
        *pooled, finite = torch.split(arrived(), [*widths, 1], dim=1)
        if not bool(finite.all()):
            bad = int((finite[:, 0] == 0).nonzero()[0])
            name = next(name for name, values in zip(names, pooled, strict=True) if not values[bad].isfinite().all())
            level = plan.noise_levels[(rows.start + bad) // (plan.draws * n)]
            raise ValueError(
                f"{name} outputs values that are not finite at noise level {level:g}; "
                "check the checkpoint, or use float32 precision"
            )
        for name, values in zip(names, pooled, strict=True):
            store = features.setdefault(name, torch.empty(num_levels * plan.draws * n, values.shape[1]))
            store[rows.start : rows.stop] = values
    return {name: values.view(num_levels, plan.draws, n, -1).numpy() for name, values in features.items()}


def _row(rows: range, draws: int, n: int, device: torch.device) -> Tensor:
    """Level, draw and sample of the rows of a shard of n samples, shape (3, B)."""
    row = torch.arange(rows.start, rows.stop, device=device)
    return torch.stack([row // (draws * n), row // n % draws, row % n])


def _read(
    backbone: Backbone,
    x_t: Tensor,
    level: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    plan: ExtractionPlan,
    write: Callable[[str, Tensor], None] | None,
) -> tuple[tuple[str, ...], list[int], Callable[[], Tensor]]:
    """The layers, their widths, and their values side by side with a last column of whether a row is finite."""
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
    widths = [values.shape[1] for values in outputs.values()]
    together = torch.empty(len(x_t), sum(widths) + 1, device=device)
    pooled = together[:, :-1]
    torch.cat([values.float() for values in outputs.values()], dim=1, out=pooled)
    together[:, -1] = pooled.isfinite().all(1)
    return tuple(outputs), widths, _copied(together)


def _copied(values: Tensor) -> Callable[[], Tensor]:
    """Begins to copy values to the host, and returns a function that waits for them."""
    if values.device.type != "cuda":
        here = values.cpu()
        return lambda: here
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        copied.synchronize()
        return here

    return wait


def _one_behind(items: Iterator[Item]) -> Iterator[Item]:
    """Yields each item after the next one is begun, so that a device has work while the host uses an item."""
    waiting: list[Item] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def _runs(n: int, size: int) -> Iterator[range]:
    for start in range(0, n, size):
        yield range(start, min(start + size, n))
