"""A pair sweep from scratch in C: the table of `layerprobe atlas --from-scratch`, several times faster.

    python fast_atlas.py START --data DATA --out FOLDER --steps 12000 [--num-seeds 2] [--shard 1/2]
    python fast_atlas.py START --data DATA --check

For networks of a few thousand weights, torch spends most of its time between operations. `sit.c` trains the same
network on the same batches with the same noise, one core per arm; sampling and scores are those of layerprobe.
`--check` prints the differences of loss and gradient from torch, and the time per step of both.

It supports SiTs that predict the velocity on the linear path, with a width and a number of tokens that are multiples of
16, and needs a processor with AVX-512.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from layerprobe.analyses.experiments import (
    BASELINE,
    FRECHET,
    Arm,
    PairSweepPlan,
    Scorer,
    all_pairs,
    branch_scores,
    pair_sweep_table,
    run_folder,
)
from layerprobe.analyses.generation import classifier_extractor
from layerprobe.analyses.runs import PairSweepStart, pair_sweep_start
from layerprobe.backbones import Backbone, SiT, SiTConfig, fresh_sit, network_record
from layerprobe.capture import real_tokens
from layerprobe.data import Samples, Splits, load
from layerprobe.files import write_text
from layerprobe.layersync import LayerPair, LayerSync, Projectors, SyncOptions
from layerprobe.noise import LinearPath, RandomStream
from layerprobe.records import claim
from layerprobe.training import TrainingBatch, TrainingPlan, noise_levels, prediction_loss

Array = NDArray[Any]
AHEAD = 500  # steps whose batches are made together
SOURCE = Path(__file__).with_name("sit.c")
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-shared", "-fPIC", "-lm")


def main() -> None:
    options = parsed()
    reading = {name: getattr(options, name) for name in ("size", "channels", "mels", "length", "hop", "stride")}
    splits = load(options.data, **reading)
    start = pair_sweep_start(
        options.start,
        steps=options.steps,
        from_scratch=True,
        seeds=tuple(range(options.seed, options.seed + options.num_seeds)),
        num_evaluations=options.num_evaluations,
        num_samples=options.num_samples,
        weight=options.weight,
        sync=SyncOptions(projector_width=options.projector_width, stop_step=options.stop_step),
    )
    torch.set_num_threads(1)
    trainer = Trainer(start.backbone, splits.train, start.plan.training)
    if options.check:
        check(trainer)
    else:
        sweep(start, splits, trainer, options.out, options.shard)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "start", help="folder of `layerprobe train`, or checkpoint, with the network and its training plan"
    )
    parser.add_argument("--data", required=True)
    for name in ("size", "channels", "mels", "length", "hop", "stride"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--out", type=Path, default=Path("fast-atlas"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--weight", type=float, default=0.3)
    parser.add_argument("--projector-width", type=int, default=0)
    parser.add_argument("--stop-step", type=int, help="step from which on nothing is aligned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--num-evaluations", type=int, default=1)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--shard", default="1/1", help="part of the arms: i/N is every N-th from the i-th on")
    parser.add_argument("--check", action="store_true", help="compare loss, gradient and time with torch")
    return parser.parse_args()


# -------------------------------------------------------------------------------------------------------------- weights


def patches(x: Tensor, config: SiTConfig) -> Tensor:
    """Splits samples (n, C, *grid) into patches (n, T, values), channel first, padded to a multiple of 16 values."""
    axes = len(config.grid)
    split = x.reshape(len(x), len(x[0]), *(n for pair in zip(config.grid, config.patch, strict=True) for n in pair))
    order = [0, *(2 + 2 * i for i in range(axes)), 1, *(3 + 2 * i for i in range(axes))]
    rows = split.permute(order).reshape(len(x), math.prod(config.grid), -1)
    return F.pad(rows, (0, -rows.shape[-1] % 16))


def weight_names(depth: int, *, projector: bool) -> Iterator[str]:
    """Yields the names of the weights in the order of `carve` in sit.c."""
    modules = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"]
    parts = ("adaLN_modulation.1", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    modules += [f"blocks.{i}.{part}" for i in range(depth) for part in parts]
    modules += ["final_layer.adaLN_modulation.1", "final_layer.linear", *_PROJECTOR * projector]
    for module in modules:
        yield f"{module}.weight"
        if module != "y_embedder.embedding_table":
            yield f"{module}.bias"


_PROJECTOR = ("heads.0.0", "heads.0.2")  # in `Projectors` with one pair


def projector_state(width: int, hidden: int, seed: int) -> dict[str, Tensor]:
    """Weights of a fresh projector; {} for a hidden width of 0."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return dict(Projectors([(width, width)], hidden).state_dict()) if hidden else {}


def _by_channel(config: SiTConfig) -> Tensor:
    """Indices that reorder the values of an output patch from channel last to channel first."""
    values, channels = math.prod(config.patch), config.shape[0]
    return torch.arange(values * channels).reshape(values, channels).T.reshape(-1)


def flat(state: dict[str, Tensor], config: SiTConfig) -> Array:
    """Converts a state dict to the flat array of weights of sit.c."""
    parts = []
    for name in weight_names(config.depth, projector=f"{_PROJECTOR[0]}.weight" in state):
        tensor = state[name].flatten(1) if state[name].ndim > 1 else state[name]
        if name.startswith("final_layer.linear"):
            tensor = tensor[_by_channel(config)]
            tensor = F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, -len(tensor) % 16))
        if name == "x_embedder.proj.weight":
            tensor = F.pad(tensor, (0, -tensor.shape[1] % 16))
        turned = tensor.ndim > 1 and "embedding_table" not in name
        parts.append((tensor.T if turned else tensor).reshape(-1))
    return np.ascontiguousarray(torch.cat(parts).detach().float().numpy())


def state_dict(weights: Array, like: dict[str, Tensor], config: SiTConfig) -> dict[str, Tensor]:
    """Converts the flat array of weights of sit.c to a state dict with the shapes of another one."""
    state, rest = dict(like), torch.from_numpy(weights.copy())
    values, order = math.prod(config.patch) * config.shape[0], _by_channel(config).argsort()
    for name in weight_names(config.depth, projector=f"{_PROJECTOR[0]}.weight" in like):
        rows, *others = like[name].shape
        cols = math.prod(others)
        if name.startswith("final_layer.linear"):
            rows += -rows % 16
        if name == "x_embedder.proj.weight":
            cols += -cols % 16
        part, rest = rest[: rows * cols], rest[rows * cols :]
        turned = bool(others) and "embedding_table" not in name
        tensor = part.reshape(cols, rows).T if turned else part.reshape(rows, *others)
        if name.startswith("final_layer.linear"):
            tensor = tensor[:values][order]
        if name == "x_embedder.proj.weight":
            tensor = tensor[:, :values].reshape(like[name].shape)
        state[name] = tensor.contiguous()
    assert not len(rest)
    return state


# ----------------------------------------------------------------------------------------------------------- the C code


class _Network(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("depth", "values", "classes")]


class _Data(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("position", "samples", "element", "token")]


class _Step(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("rows", "noise", "level", "time", "label")]


class _Alignment(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("student", "teacher")),
        *((name, ctypes.c_float) for name in ("weight", "low", "high")),
    ]


@dataclass(frozen=True)
class Steps:
    """The batches of consecutive steps, one after the other; the arrays are the fields of `_Step`."""

    rows: Array
    noise: Array
    level: Array
    time: Array
    label: Array

    def pointers(self) -> _Step:
        return _Step(*(array.ctypes.data for array in vars(self).values()))


class Trainer:
    """Trains SiTs of one shape on one data set.

    Args:
        backbone: Network to train; its weights are not used.
        samples: Training samples, which are held in memory.
        plan: Batch size, learning rate, clipping, averages and label drop; of the alignment its weight, projector,
            noise range and stop step.

    Raises:
        ValueError: If sit.c cannot train this network by this plan.
    """

    def __init__(self, backbone: Backbone, samples: Samples, plan: TrainingPlan) -> None:
        check_supported(backbone, samples, plan)
        self.config = config = backbone.module.config
        self.backbone, self.samples, self.plan = backbone, samples, plan
        whole = samples.batch(range(len(samples)))
        self.ids, self.labels, self.mask = whole.ids, whole.labels, whole.mask
        self._samples = np.ascontiguousarray(patches(whole.x.float(), config).numpy())
        self._position = np.ascontiguousarray(backbone.module.pos_embed[0].detach().numpy())
        self._element = self._token = None
        if whole.mask is not None:
            spread = whole.mask.unsqueeze(1).expand(whole.x.shape)
            self._element = np.ascontiguousarray(patches(spread.float(), config).numpy().astype(np.uint8))
            self._token = np.ascontiguousarray(real_tokens(whole.mask, config.grid).numpy().astype(np.uint8))
        values = math.prod(config.patch) * config.shape[0]
        self._network = _Network(config.depth, values, config.num_classes)
        self._library = compiled(config, plan)

    def steps(self, seed: int, start: int, stop: int) -> Steps:
        """Makes the batches of the steps from start to stop, as `layerprobe.training.batches` does."""
        order, levels, noise = (RandomStream(seed, name) for name in ("order", "level", "noise"))
        drops, n = RandomStream(seed, "label drop"), len(self.samples)
        parts = []
        places = np.arange(start * self.plan.batch_size, stop * self.plan.batch_size)
        for epoch in np.unique(places // n).tolist():
            rows = order.permutation(n, draw=epoch)[places[places // n == epoch] - epoch * n]
            ids = self.ids[rows]
            level = noise_levels(levels.uniform(ids, draw=epoch), self.backbone, self.plan)
            dropped = drops.uniform(ids, draw=epoch) < self.plan.label_drop
            parts.append(
                (
                    rows.int(),
                    patches(noise.normal(ids, self.samples.shape, draw=epoch).float(), self.config),
                    level.float(),
                    self.backbone.schedule.native_time(level).float(),
                    self.labels[rows].masked_fill(dropped, self.config.num_classes).int(),
                )
            )
        return Steps(*(np.ascontiguousarray(torch.cat(column).numpy()) for column in zip(*parts, strict=True)))

    def train(
        self, seed: int, pair: LayerPair | None, batches: dict[int, Steps], stops: Sequence[int]
    ) -> Iterator[Backbone]:
        """Trains one arm and yields the averaged model after each of some steps.

        Args:
            seed: Seed of weights, order and noise.
            pair: Pair to align; None for the baseline.
            batches: Batches by first step, which are added as they are made; shared by the arms of a seed.
            stops: Steps after which the model is yielded, ascending.
        """
        start = fresh_sit(self.backbone, seed)
        like = {name: tensor.detach().clone() for name, tensor in start.module.state_dict().items()}
        like |= projector_state(self.config.hidden_size, self.plan.sync.projector_width, seed)
        weights = flat(like, self.config)
        average, first, second = weights.copy(), np.zeros_like(weights), np.zeros_like(weights)
        losses, cosines = np.zeros(AHEAD), np.zeros(AHEAD)
        off = self.plan.sync.stop_step or stops[-1]
        marks = sorted({*range(0, stops[-1], AHEAD), *stops, min(off, stops[-1])})
        for begin, end in itertools.pairwise(marks):
            base = begin // AHEAD * AHEAD
            if base not in batches:
                batches[base] = self.steps(seed, base, base + AHEAD)
            piece = slice((begin - base) * self.plan.batch_size, (end - base) * self.plan.batch_size)
            steps = Steps(*(array[piece] for array in vars(batches[base]).values()))
            self._library.train(
                ctypes.byref(self._network),
                *(ctypes.c_void_p(array.ctypes.data) for array in (weights, first, second, average)),
                ctypes.byref(self._data()),
                ctypes.byref(steps.pointers()),
                ctypes.byref(self._alignment(pair if begin < off else None)),
                *(begin, end, ctypes.c_float(self.plan.learning_rate), self.plan.warmup_steps),
                *(ctypes.c_float(value) for value in (self.plan.clip_norm, self.plan.ema_decay)),
                *(ctypes.c_void_p(array.ctypes.data) for array in (losses, cosines)),
            )
            if not np.isfinite(average).all():
                raise ValueError(f"the weights are not finite after step {end}; lower the learning rate")
            if end in stops:
                averaged = state_dict(average, like, self.config)
                start.module.load_state_dict({name: averaged[name] for name in start.module.state_dict()})
                yield start

    def gradient(self, weights: Array, steps: Steps, pair: LayerPair | None) -> tuple[float, float, Array]:
        """Computes prediction loss, mean cosine, and the gradient of the whole loss."""
        gradient, cosine = np.zeros_like(weights), ctypes.c_double()
        loss = self._library.one_gradient(
            ctypes.byref(self._network),
            *(ctypes.c_void_p(array.ctypes.data) for array in (weights, gradient)),
            *(ctypes.byref(part) for part in (self._data(), steps.pointers(), self._alignment(pair), cosine)),
        )
        return loss, cosine.value, gradient

    def _data(self) -> _Data:
        arrays = (self._position, self._samples, self._element, self._token)
        return _Data(*(None if array is None else array.ctypes.data for array in arrays))

    def _alignment(self, pair: LayerPair | None) -> _Alignment:
        if pair is None:
            return _Alignment(-1, -1, 0.0, 0.0, 0.0)
        places = [self.backbone.layers.index(name) for name in (pair.student, pair.teacher)]
        return _Alignment(*places, self.plan.weight, *self.plan.sync.noise_range)


def check_supported(backbone: Backbone, samples: Samples, plan: TrainingPlan) -> None:
    """Checks that sit.c trains the same as layerprobe.

    Raises:
        ValueError: If the network, the samples or the plan have a feature that sit.c lacks.
    """
    config = backbone.module.config if isinstance(backbone.module, SiT) else None
    fields = ("weight_decay", "loss_weighting", "precision")
    plain = all(getattr(plan, name) == getattr(TrainingPlan(steps=0), name) for name in fields)
    known = {name: getattr(plan.sync, name) for name in ("projector_width", "noise_range", "stop_step")}
    sync = SyncOptions(**known)
    path = isinstance(backbone.schedule, LinearPath) and backbone.prediction == "velocity"
    shape = config and not config.qk_norm and not config.learn_sigma and config.mlp_ratio == 4 and config.depth <= 32
    if not (
        plain
        and sync == plan.sync
        and plan.sync.projector_width % 16 == 0
        and path
        and shape
        and samples.labels is not None
    ):
        raise ValueError(
            "sit.c trains plain SiTs of at most 32 blocks on labeled samples, by the velocity on the linear path, "
            f"with {', '.join(fields)} at their defaults, and a projector of a width that "
            f"is a multiple of 16 at most; use `layerprobe atlas --from-scratch` for {backbone.name}"
        )


def compiled(config: SiTConfig, plan: TrainingPlan) -> ctypes.CDLL:
    """Compiles sit.c for the sizes of a network, a batch and a projector."""
    batch_size = plan.batch_size
    tokens, values = math.prod(config.grid), math.prod(config.patch) * config.shape[0]
    if tokens % 16 or config.hidden_size % 16 or batch_size % 4:
        raise ValueError(f"width and tokens must be multiples of 16, the batch of 4; got {config.name}, {batch_size}")
    sizes = {"WIDTH": config.hidden_size, "TOKENS": tokens, "HEADS": config.num_heads, "BATCH": batch_size}
    sizes["PROJECTOR"] = plan.sync.projector_width
    sizes["PATCH"] = values + -values % 16
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "sit.so"
        defined = [f"-D{name}={value}" for name, value in sizes.items()]
        subprocess.run(["cc", *defined, str(SOURCE), "-o", str(library), *FLAGS], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.one_gradient.restype = ctypes.c_double
    return loaded


# ------------------------------------------------------------------------------------------------------------- the jobs


def sweep(start: PairSweepStart, splits: Splits, trainer: Trainer, folder: Path, shard: str) -> None:
    """Trains and scores the arms of a shard as `sweep_pairs` does; finished arms are not repeated."""
    plan: PairSweepPlan = start.plan
    number, count = (int(part) for part in shard.split("/"))
    pairs = all_pairs(start.backbone.layers)
    arms = (Arm(BASELINE, None), *(Arm(f"{pair.student} from {pair.teacher}", pair) for pair in pairs))
    runs = [(seed, arm) for seed in plan.seeds for arm in arms]
    training = plan.training.identity() | {"steps": plan.training.steps, "seed": None}
    data = {name: samples.fingerprint for name, samples in splits.items()}
    claim(
        folder, "atlas.json", {"training": training, "data": data} | network_record(start.backbone), what="a pair sweep"
    )
    extractor = classifier_extractor(splits.train, folder / "extractor.safetensors")
    scorer = Scorer(splits.test, extractor, num_samples=plan.num_samples, sampling=plan.sampling)
    batches: dict[int, Steps] = {}
    last_seed = None
    for seed, arm in runs[number - 1 :: count]:
        place = _scores_of(folder, arm, seed)
        if place.is_file():
            continue
        if seed != last_seed:
            batches, last_seed = {}, seed
        began, scores = time.perf_counter(), {}
        models = trainer.train(seed, arm.pair, batches, plan.evaluation_steps)
        for step, model in zip(plan.evaluation_steps, models, strict=True):
            scores[step] = branch_scores(model, scorer, splits)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, json.dumps(scores))
        print(f"seed {seed}, {arm.name}: {scores[step][FRECHET]:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    files = {(seed, arm.pair): _scores_of(folder, arm, seed) for seed, arm in runs}
    records = {run: json.loads(file.read_text()) for run, file in files.items() if file.is_file()}
    by_step = {run: {int(step): values for step, values in scores.items()} for run, scores in records.items()}
    write_text(folder / "atlas.csv", pair_sweep_table(by_step).to_csv(index=False))


def _scores_of(folder: Path, arm: Arm, seed: int) -> Path:
    run = run_folder(folder, arm, seed)
    return run.with_name(f"{run.name}.json")


def check(trainer: Trainer) -> None:
    """Prints loss, cosine, gradient and time per step beside those of torch, at weights that differ from fresh ones."""
    config, layers, size = trainer.config, trainer.backbone.layers, trainer.plan.batch_size
    pair = LayerPair(layers[len(layers) // 5], layers[(2 * len(layers)) // 3])
    backbone, generator = fresh_sit(trainer.backbone, 0), torch.Generator().manual_seed(1)
    for parameter in backbone.module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    steps = trainer.steps(0, 0, 1)
    rows = torch.from_numpy(steps.rows).long()
    noise = RandomStream(0, "noise").normal(trainer.ids[rows], trainer.samples.shape)
    level, label = torch.from_numpy(steps.level).double(), torch.from_numpy(steps.label).long()
    mask = None if trainer.mask is None else trainer.mask[rows]
    batch = TrainingBatch(trainer.samples.batch(rows.tolist()).x, noise, level, label, mask)
    tokens = None if mask is None else real_tokens(mask, config.grid)

    def by_torch() -> float:
        for parameter in (*backbone.module.parameters(), *sync.parameters()):
            parameter.grad = None
        loss = prediction_loss(backbone, batch).mean()
        (loss + sync.loss(mask=tokens)).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    options, head = trainer.plan.sync, projector_state(config.hidden_size, trainer.plan.sync.projector_width, 0)
    with LayerSync(backbone.module, [pair], weight=trainer.plan.weight, options=options) as sync:
        if head:
            sync.prepare(batch.x[:1], torch.zeros(1), label[:1])
            sync.projectors.load_state_dict(head)
        loss = by_torch()
        cosine = float(sync.cosines[pair])
        state = {name: tensor.detach() for name, tensor in backbone.module.state_dict().items()} | head
        named = [*backbone.module.named_parameters(), *(sync.projectors.named_parameters() if head else ())]
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}
        torch_s = _seconds(by_torch)
    weights = flat(state, config)
    back = state_dict(weights, state, config)
    assert all(torch.equal(back[name], state[name]) for name in state)
    expected, (c_loss, c_cosine, gradient) = flat(grads, config), trainer.gradient(weights, steps, pair)
    c_s = _seconds(lambda: trainer.gradient(weights, steps, pair))
    print(f"{config.name}, batch {size}, {pair}")
    print(f"loss      {c_loss:.9f}  torch {loss:.9f}")
    print(f"cosine    {c_cosine:.9f}  torch {cosine:.9f}")
    print(f"gradient  relative difference {np.linalg.norm(gradient - expected) / np.linalg.norm(expected):.1e}")
    print(f"step      {c_s * 1e3:.1f} ms, torch {torch_s * 1e3:.1f} ms: {torch_s / c_s:.1f} times")


def _seconds(function: Any, repeats: int = 30) -> float:
    """Median time of one call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


if __name__ == "__main__":
    main()
