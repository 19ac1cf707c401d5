"""(Backbone, Splits, ExtractionPlan) -> FeatureStore: a forward pass per sample, level and draw, all layers at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe import __version__
from layerprobe.backbones.base import Backbone, layer_shapes, wrap
from layerprobe.capture import capture, evaluating, real_tokens
from layerprobe.checkpoints import weights_hash
from layerprobe.data.base import Batch, Samples, Splits, content_hash, joined
from layerprobe.features import (
    SPLITS,
    ExtractionPlan,
    FeatureStore,
    begin_store,
    column_key,
    filled_tensors,
    shard_path,
    token_path,
    token_rows,
    write_tensors,
)
from layerprobe.noise import NoiseKey

# Raw inputs wider than this are averaged over neighbouring pixels, so that the control stays cheap on large inputs.
RAW_INPUT_WIDTH = 1024

Progress = Callable[[int, int], None]


def extract(
    backbone: Backbone,
    splits: Splits,
    plan: ExtractionPlan,
    folder: str | Path,
    *,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> FeatureStore:
    """Reads every layer of the plan at every noise level, pooled over tokens, into a store on disk.

    Shards that are there already are kept, so an interrupted extraction continues and a finished one returns at once.
    Memory holds one shard of features and one batch of activations, whatever the size of the data and whatever tokens
    are kept: those go to disk layer by layer. The forward pass ends at the deepest layer wanted, and runs in evaluation
    mode.

    Args:
        backbone: The model, on the device where it should run.
        splits: The data; the sample ids key the noise.
        plan: What to read.
        folder: Where the store is, or is to be.
        batch_size: Rows per forward pass; it changes the features by rounding only.
        progress: Called with (samples done, samples in all).

    Raises:
        ValueError: If the data does not fit the model, a value is not finite, or the folder holds another run.
    """
    folder = Path(folder)
    _check(backbone, splits, plan)
    table = _Table(splits)
    with evaluating(backbone.module):
        shapes = layer_shapes(backbone, plan.layers)
        plan, columns = replace(plan, layers=tuple(shapes)), table.columns()
        kept = token_rows(columns["splits"], plan.token_samples)
        begin_store(folder, _manifest(backbone, splits, plan, shapes, kept), columns)
        for index, rows in enumerate(_runs(len(table), plan.shard_size)):
            here = kept[(kept >= rows.start) & (kept < rows.stop)] - rows.start
            # The shard is written last: where it is, its tokens are.
            files = [shard_path(folder, index)] + [token_path(folder, index)] * bool(len(here))
            if not all(file.is_file() for file in files):
                with _kept_tokens(token_path(folder, index), backbone, plan, shapes, here) as keep:
                    features = _shard(backbone, table.batch(rows), plan, batch_size, keep)
                write_tensors(shard_path(folder, index), features)
            if progress:
                progress(rows.stop, len(table))
    return FeatureStore.open(folder)


def random_weights(backbone: Backbone, *, seed: int = 0) -> Backbone:
    """A control: the same network, with the entries of every trained tensor shuffled.

    Shuffling keeps each tensor's distribution, so the control differs from the model in what was learned and in
    nothing else; a fresh initialisation would make every adaLN-Zero block an identity.
    """
    module = copy.deepcopy(backbone.module)
    generator = torch.Generator().manual_seed(seed)
    # A network that was frozen as a whole, to be read, was trained all the same.
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad] or module.parameters()
    with torch.no_grad():
        for parameter in trained:
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return replace(backbone, module=module, name=f"{backbone.name}, random weights")


def raw_input(backbone: Backbone, *, places: bool = False) -> Backbone:
    """A control: the noisy input itself as the only layer, under the model's own schedule.

    Args:
        backbone: The model.
        places: One token for every place of the grid, whose channels are its features, for probes of tokens; else the
            whole input is flattened to one token.
    """
    reader = wrap(
        _RawInput(_Places() if places else _Flatten()),
        layers="input",
        schedule=backbone.schedule,
        prediction="velocity",
        shape=backbone.shape,
        forward=_call_raw_input,
        name="raw input",
    )
    return replace(reader, takes_mask=True)


def raw_pool_cells(shape: tuple[int, ...]) -> int:
    """So many cells per axis keep most of an input of shape (C, *grid) within `RAW_INPUT_WIDTH` numbers; at least 1."""
    channels, *grid = shape
    widths = ((cells, channels * math.prod(min(cells, edge) for edge in grid)) for cells in range(max(grid), 1, -1))
    return next((cells for cells, width in widths if width <= RAW_INPUT_WIDTH), 1)


def pool_tokens(
    tokens: Tensor,
    cells: int,
    input_grid: tuple[int, ...],
    mask: Tensor | None = None,
    *,
    known: tuple[int, ...] | None = None,
) -> Tensor:
    """Tokens averaged over cells of their grid, float32.

    Args:
        tokens: Shape (B, T, D), row-major on the known grid, or one with the proportions of the input's; or T = 1.
        cells: Per grid axis; never more than there are tokens.
        input_grid: The grid of the model's input, such as (H, W).
        mask: Shape (B, *input_grid), bool: only tokens that hold something real count, and a cell without any is 0.
        known: As in `token_grid`.

    Returns:
        Shape (B, cells**d * D); (B, D) for one cell.

    Raises:
        ValueError: If the tokens are on no such grid, and there is more than one cell or a mask.
    """
    tokens = tokens.float()  # a bfloat16 mean loses digits
    if tokens.shape[1] == 1 or (cells == 1 and mask is None):
        return tokens.mean(1)
    grid = token_grid(tokens.shape[1], input_grid, known=known)
    if grid is None:
        remedy = "pass pool_cells 1" if mask is None else "cut all samples to one length"
        raise ValueError(f"{tokens.shape[1]} tokens lie on no grid like the input's {input_grid}; {remedy}")
    pool: Any = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(grid)]
    maps, edges = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid), [min(cells, edge) for edge in grid]
    if mask is None:
        pooled: Tensor = pool(maps, edges)
        return pooled.flatten(1)
    real = real_tokens(mask.to(tokens.device), grid).view(len(maps), 1, *grid)
    share: Tensor = pool(real.float(), edges)
    sums: Tensor = pool(maps.masked_fill(~real, 0.0), edges)
    return (sums / share.masked_fill(share == 0, 1.0)).flatten(1)


def token_grid(
    count: int, input_grid: tuple[int, ...], *, known: tuple[int, ...] | None = None
) -> tuple[int, ...] | None:
    """The grid of so many tokens, with the proportions of the input's; of a video, also one with all its frames.

    Args:
        count: Number of tokens.
        input_grid: The grid of the model's input: (L,), (H, W) or (F, H, W).
        known: The grid that the model itself tells, taken where it has so many tokens.

    Returns:
        As many edges as the input has, or None if there is no such grid.
    """
    if known is not None and math.prod(known) == count:
        return known
    stride = (math.prod(input_grid) / count) ** (1 / len(input_grid))
    grid = tuple(round(edge / stride) for edge in input_grid)
    if math.prod(grid) == count:
        return grid
    frames, *frame = input_grid
    if len(frame) == 2 and count % frames == 0:
        in_frame = token_grid(count // frames, tuple(frame))
        return None if in_frame is None else (frames, *in_frame)
    return None


def _call_raw_input(
    module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None, *mask: Tensor
) -> Tensor:
    output: Tensor = module(x_t.masked_fill(~mask[0].unsqueeze(1), 0.0) if mask else x_t, native_time)
    return output


class _RawInput(nn.Module):
    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.input = reader

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.input(x_t)
        return x_t


class _Places(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class _Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x[0].numel() > RAW_INPUT_WIDTH and max(x.shape[2:]) > 1:
            grid = [max(1, edge // 2) for edge in x.shape[2:]]
            pool: Any = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(grid)]
            x = pool(x, grid)
        return x.flatten(1)


class _Table:
    """The three splits as one run of samples: fit, then choose, then report."""

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
                "two samples have the same id, so they would see the same noise; give every sample an id of its own"
            )
        columns |= {"labels": torch.cat(labels).numpy()} if labels else {}
        return columns | {column_key(name): labels.numpy() for name, labels in self.further().items()}

    def further(self) -> dict[str, Tensor]:
        """Further labels by the name of their column."""
        columns = [{column.name: column.labels for column in part.columns} for part in self._parts]
        return {name: torch.cat([part[name] for part in columns]) for name in columns[0]}


def _check(backbone: Backbone, splits: Splits, plan: ExtractionPlan) -> None:
    for name, samples in splits.items():
        if samples.shape != backbone.shape:
            raise ValueError(
                f"the {name} samples have shape {samples.shape}, {backbone.name} takes {backbone.shape}; "
                "pass --size or other data"
            )
        if (samples.labels is None) != (splits.fit.labels is None):
            raise ValueError(f"only one of the fit and the {name} samples has labels; label both or none")
        if [column.name for column in samples.columns] != [column.name for column in splits.fit.columns]:
            raise ValueError(f"the fit and the {name} samples have other further label columns; label all alike")
    if plan.condition == "label" and not 0 < splits.fit.num_classes <= backbone.num_classes:
        raise ValueError(
            f"the data has {splits.fit.num_classes} classes, {backbone.name} {backbone.num_classes}; "
            "use the null condition"
        )
    # Fused attention can turn a NaN into a finite number, so features would not tell.
    bad = [name for name, weight in backbone.module.named_parameters() if not bool(weight.isfinite().all())]
    if bad:
        raise ValueError(f"{backbone.name} holds values that are not finite in {bad[0]}; use an earlier checkpoint")
    whole_grids = plan.token_samples and not plan.tokens_per_sample
    if whole_grids and _padded(splits) and not any(column.labels.ndim > 1 for column in splits.fit.columns):
        raise ValueError(
            "whole grids of tokens are kept of samples of one length only, or for labels of frames; leave out "
            "--token-samples, or cut the samples"
        )
    highest = torch.tensor(plan.noise_levels[-1], dtype=torch.float64)
    if not bool(backbone.schedule.sigma(highest).isfinite()):
        raise ValueError(
            f"noise level {float(highest):g} is infinitely noisy under the schedule {backbone.schedule.name}; "
            f"pass levels up to {backbone.schedule.level_range[1]:.4g}"
        )


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
        # The same weights under two conventions of time are two models.
        "schedule_hash": content_hash(backbone.schedule.to_config())[:16],
        "prediction": backbone.prediction,
        "data": {name: samples.fingerprint for name, samples in splits.items()},
        "class_names": list(splits.fit.class_names),
        "layer_shapes": {name: list(shape) for name, shape in shapes.items()},
        "num_samples": n,
        "num_shards": -(-n // plan.shard_size),
    }
    if splits.fit.columns:  # a store without them is on disk what it was before there were any
        manifest["columns"] = {
            column.name: {
                "class_names": list(column.class_names),
                "labels_hash": content_hash(labels)[:16],
                "axis": column.axis,
            }
            for column, labels in zip(splits.fit.columns, _Table(splits).further().values(), strict=True)
        }
    if not plan.token_samples:
        return manifest
    padded, few = _padded(splits), plan.tokens_per_sample
    found = {name: token_grid(n, backbone.shape[1:], known=backbone.token_grid) for name, (n, _) in shapes.items()}
    whole = {name: not few or (n <= few and not padded) for name, (n, _) in shapes.items()}
    grids = {name: found[name] if whole[name] else None for name in shapes}
    tokens = {"shards": np.unique(kept // plan.shard_size).tolist(), "grids": grids}
    return manifest | {"tokens": tokens | ({"padded": True} if padded and not few else {})}


def _at_places(tokens: Tensor, mask: Tensor | None, backbone: Backbone, plan: ExtractionPlan) -> Tensor:
    """The tokens of each sample that are kept, shape (B, K, D); all layers with as many tokens keep the same ones.

    Without a mask the places are drawn once for all samples. With one, `B` rows of it, each sample gives the first real
    ones of the drawn order, over again where it has fewer than K.
    """
    count, few = tokens.shape[1], min(plan.tokens_per_sample, tokens.shape[1])
    if not few:
        return tokens
    order = NoiseKey(plan.seed, "order").permutation(count)
    if mask is None or count == 1:
        return tokens[:, order[:few].sort().values.to(tokens.device)]
    grid = token_grid(count, backbone.shape[1:], known=backbone.token_grid)
    assert grid is not None  # or the tokens could not have been averaged
    real = real_tokens(mask, grid)[:, order]
    real_first = real.int().argsort(dim=1, descending=True, stable=True)
    where = order[real_first.gather(1, torch.arange(few) % real.sum(1, keepdim=True))].to(tokens.device)
    return tokens.gather(1, where.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


# (level, draw and sample of each row in a batch, shape (3, B); what of it is real; layer; its tokens (B, T, D)) -> None
_Keep = Callable[[Tensor, Tensor | None, str, Tensor], None]


@contextmanager
def _kept_tokens(
    path: Path,
    backbone: Backbone,
    plan: ExtractionPlan,
    shapes: Mapping[str, tuple[int, int]],
    samples: NDArray[np.int64],
) -> Iterator[_Keep | None]:
    """Writes the tokens of these samples of a shard while they are made; None where there are no such samples."""
    if not len(samples):
        yield None
        return
    wanted, few = torch.from_numpy(samples), plan.tokens_per_sample
    lengths = {name: min(few or count, count) for name, (count, _) in shapes.items()}
    blocks = (len(plan.noise_levels), plan.draws, len(samples))

    def keep(row: Tensor, mask: Tensor | None, layer: str, tokens: Tensor) -> None:
        chosen = torch.isin(row[2], wanted)
        level, draw, sample = row[:, chosen]
        real = None if mask is None else mask[chosen]
        kept = _at_places(tokens[chosen.to(tokens.device)], real, backbone, plan)
        index = zip(level.tolist(), draw.tolist(), torch.searchsorted(wanted, sample).tolist(), strict=True)
        for place, block in zip(index, kept.float().cpu().numpy(), strict=True):
            put(layer, place, block)

    with filled_tensors(path, {name: (*blocks, lengths[name], shapes[name][1]) for name in plan.layers}) as put:
        yield keep


@torch.inference_mode()
def _shard(
    backbone: Backbone, batch: Batch, plan: ExtractionPlan, batch_size: int, keep: _Keep | None
) -> dict[str, NDArray[np.float32]]:
    if not bool(batch.x.isfinite().all()):
        bad = int(batch.ids[~batch.x.flatten(1).isfinite().all(1)][0])
        raise ValueError(f"sample {bad} holds values that are not finite; remove it from the data")
    noise = NoiseKey(plan.seed)
    n, levels = len(batch.x), torch.tensor(plan.noise_levels, dtype=torch.float64)
    eps = torch.stack([noise.normal(batch.ids, backbone.shape, draw=draw) for draw in range(plan.draws)])
    features: dict[str, Tensor] = {}
    # Levels and draws share batches, so that batches stay full: row = (level, draw, sample).
    for rows in _runs(len(levels) * plan.draws * n, batch_size):
        row = torch.arange(rows.start, rows.stop)
        level, draw, sample = row // (plan.draws * n), row // n % plan.draws, row % n
        labels = batch.labels[sample] if plan.condition == "label" and batch.labels is not None else None
        mask = None if batch.mask is None else batch.mask[sample]
        write = partial(keep, torch.stack([level, draw, sample]), mask) if keep else None
        x_t = backbone.schedule.corrupt(batch.x[sample], eps[draw, sample], levels[level])
        for name, pooled in _read(backbone, x_t, levels[level], labels, mask, plan, write).items():
            store = features.setdefault(name, torch.empty(len(levels) * plan.draws * n, pooled.shape[1]))
            store[rows.start : rows.stop] = pooled
    for name, values in features.items():
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite().all(1)).nonzero()[0])
            raise ValueError(
                f"{name} gives values that are not finite at noise level {float(levels[bad // (plan.draws * n)]):g}; "
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
        if write:  # at once: the tokens of all layers may not fit into memory
            write(layer, tokens)
        return tokens

    def pool(tokens: Tensor) -> Tensor:
        return pool_tokens(tokens, plan.pool_cells, backbone.shape[1:], mask, known=backbone.token_grid)

    labels = None if labels is None else labels.to(device)
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"),
        capture(backbone.module, plan.layers, tokens=own_tokens, transform=pool, stop_early=True) as outputs,
    ):
        backbone.masked(mask).predict(x_t.to(device), level.to(device, torch.float32), labels)
    return {name: pooled.cpu() for name, pooled in outputs.items()}


def _runs(n: int, size: int) -> Iterator[range]:
    for start in range(0, n, size):
        yield range(start, min(start + size, n))
