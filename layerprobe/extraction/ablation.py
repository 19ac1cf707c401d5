"""Layer ablation: how much the predicted velocity changes when a single layer is skipped.

A skipped layer returns its input in place of its output, so a residual block is reduced to its skip connection. All
layers see the same samples, noise and noise levels, so their scores are comparable sample by sample.

Source: skipping single blocks is the lesion study of Veit et al. 2016 (arXiv:1605.06431).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from layerprobe.backbones import Backbone
from layerprobe.capture import INPUT, evaluating, find_layer, is_slice
from layerprobe.data import Samples
from layerprobe.memory import BatchSize
from layerprobe.noise import RandomStream, target
from layerprobe.progress import StepProgress
from layerprobe.ranks import ALONE, Ranks

VELOCITY_CHANGE, LOSS_INCREASE = "velocity change when skipped", "loss increase when skipped"

SampleScores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerAblation:
    """The effect of skipping each layer on the velocity of each sample.

    Attributes:
        split: Name of the split that the samples are from.
        layers: Layer names, in the requested order.
        noise_levels: Noise levels in [0, 1], in the requested order.
        velocity_change: Relative change `||v - v_skip||^2 / ||v||^2`, shape (layers, noise levels, n) for n
            samples, at least 0; nan for layers that cannot be skipped.
        loss_increase: Increase of the mean squared error of the velocity, same shape; negative where the model is
            better without the layer. The target is the true velocity of the sample and its noise.
        reasons: Reason per layer that cannot be skipped, by layer name.
    """

    split: str
    layers: tuple[str, ...]
    noise_levels: tuple[float, ...]
    velocity_change: SampleScores
    loss_increase: SampleScores
    reasons: Mapping[str, str]

    def rows(self, *, source: str = "model", seed: int = 0) -> list[dict[str, Any]]:
        """Returns rows of the quality table: means over the samples with 95 % bootstrap intervals.

        Args:
            source: Name of the model in the table.
            seed: Seed of the bootstrap.

        Returns:
            One row per layer, noise level and metric. An undefined value is nan, and its note gives the reason.
        """
        rows = []
        for metric, scores in ((VELOCITY_CHANGE, self.velocity_change), (LOSS_INCREASE, self.loss_increase)):
            means, low, high = _means(scores, seed)
            for i, layer in enumerate(self.layers):
                for j, level in enumerate(self.noise_levels):
                    note = self.reasons.get(layer, "" if math.isfinite(means[i, j]) else _NOT_FINITE)
                    numbers = {"value": means[i, j], "low": low[i, j], "high": high[i, j]}
                    key = {"source": source, "layer": layer, "layer_index": i, "noise_level": level}
                    rows.append(key | {"metric": metric, "split": self.split} | numbers | {"note": note})
        return rows


_NOT_FINITE = "the velocity is zero or not finite"


def ablate_layers(
    backbone: Backbone,
    samples: Samples,
    noise_levels: Sequence[float],
    *,
    split: str,
    layers: Sequence[str] | None = None,
    num_samples: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    ranks: Ranks = ALONE,
    progress: StepProgress | None = None,
) -> LayerAblation:
    """Skips the layers one at a time and measures the effect on the velocity, under the null condition.

    Outputs before the skipped layer do not change, so they are stored and reused: L layers cost about L / 2 forward
    passes per sample and level, plus memory for the outputs of all layers for one batch.

    A layer can be skipped if its output has the shape of one of its inputs. In a tuple output, every tensor with a
    matching input is replaced by that input (text and image streams, for example), and the other tensors are kept.

    Args:
        backbone: The model, on the device where it should run.
        samples: Samples that the model was not trained on; the first `num_samples` are used.
        noise_levels: Noise levels in [0, 1].
        split: Name of the split that the samples are from; it is written into the quality table.
        layers: Names of submodules; None for the layers of the backbone.
        num_samples: Maximum number of samples.
        seed: Seed of the noise; an extraction with the same seed uses the same noise.
        batch_size: Number of rows per forward pass; it changes the numbers by rounding only.
        ranks: Processes that share the batches and all call this function; all get the whole result.
        progress: Called with (rows done, rows in total), where a row is one sample at one noise level.

    Raises:
        ValueError: If there are no samples, a level is outside [0, 1], or a layer is unknown, does not run, or runs
            twice.
    """
    layers = tuple(dict.fromkeys(layers or backbone.layers))
    levels = torch.tensor(list(noise_levels), dtype=torch.float64)
    if not len(levels) or not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(f"noise levels must lie between 0 (clean) and 1 (pure noise), got {levels.tolist()}")
    if num_samples < 1 or not len(samples):
        raise ValueError(f"layer ablation got {min(num_samples, len(samples))} samples; pass at least 1")
    batch = samples.batch(range(min(num_samples, len(samples))))
    eps, n = RandomStream(seed).normal(batch.ids, samples.shape), len(batch.x)
    scores = np.full((2, len(layers), len(levels) * n), np.nan)
    reasons = {name: "the input of a layer cannot be skipped" for name in layers if name.endswith(INPUT)}
    slices = [name for name in layers if is_slice(backbone.module, name)]
    reasons |= dict.fromkeys(slices, "a part of a layer's output cannot be skipped")
    blocks = [name for name in layers if name not in reasons]

    def skip(rows: range) -> _Outcomes:
        row = torch.arange(rows.start, rows.stop)
        sample, level = row % n, levels[row // n]
        mask = None if batch.mask is None else batch.mask[sample]
        return [*_skip_each(backbone.masked(mask), blocks, batch.x[sample], eps[sample], level)]

    num_rows, size = len(levels) * n, BatchSize(batch_size)
    mine: list[list[tuple[range, _Outcomes]]] = []
    with evaluating(backbone.module), torch.inference_mode():
        for start in ranks.mine(range(0, num_rows, batch_size)):
            ranks.check()
            stop = min(start + batch_size, num_rows)
            mine.append([*size.batches(stop, skip, start=start)])
            if progress:
                progress(stop, num_rows)
    for rows, outcomes in chain.from_iterable(ranks.whole(mine)):
        for name, outcome in outcomes:
            if isinstance(outcome, str):
                reasons[name] = outcome
            else:
                scores[:, layers.index(name), rows.start : rows.stop] = outcome
    velocity_change, loss_increase = scores.reshape(2, len(layers), len(levels), n)
    return LayerAblation(split, layers, tuple(levels.tolist()), velocity_change, loss_increase, reasons)


def _skip_each(
    backbone: Backbone, layers: Sequence[str], x: Tensor, eps: Tensor, level: Tensor
) -> Iterator[tuple[str, SampleScores | str]]:
    """Yields each layer in execution order with its scores, shape (2, B), or the reason why it cannot be skipped."""
    device, time = backbone.device, level.to(backbone.device, torch.float32)
    x_t = backbone.schedule.corrupt(x, eps, level).to(device)
    true_velocity = target("velocity", backbone.schedule, x=x, eps=eps, level=level).to(device)
    with _recorded(backbone.module, layers) as calls:
        velocity = backbone(x_t, time)
    replays = {name: _replaying(call.output) for name, call in calls.items()}
    with _replaced(backbone.module, replays):
        # A block may have side effects beyond its output, such as state that a later block reads.
        reusable = torch.equal(backbone(x_t, time), velocity)
    earlier: dict[str, _Forward] = {}
    for name, call in calls.items():
        if call.reason:
            yield name, call.reason
        else:
            with _replaced(backbone.module, earlier | {name: _passing_input(call.output)}):
                skipped_velocity = backbone(x_t, time)
            yield name, _scores(velocity, skipped_velocity, true_velocity)
        if reusable:
            earlier[name] = replays[name]


def _scores(velocity: Tensor, skipped_velocity: Tensor, true_velocity: Tensor) -> SampleScores:
    """Velocity change and loss increase, shape (2, B)."""
    v, v_skip, v_true = (tensor.double().flatten(1) for tensor in (velocity, skipped_velocity, true_velocity))
    change = (v - v_skip).square().sum(1) / v.square().sum(1)
    increase = (v_skip - v_true).square().mean(1) - (v - v_true).square().mean(1)
    return torch.stack([change, increase]).cpu().numpy()


def _means(scores: SampleScores, seed: int) -> tuple[SampleScores, SampleScores, SampleScores]:
    """Means over the last axis with both interval ends; all rows share the same resamples."""
    n = scores.shape[-1]
    weights = np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1 / n), size=1000) / n
    low, high = np.quantile(scores @ weights.T, [0.025, 0.975], axis=-1)
    return scores.mean(-1), low, high


_Forward = Callable[..., Any]
_Outcomes = list[tuple[str, "SampleScores | str"]]  # the scores of each layer, or why it cannot be skipped


@dataclass(frozen=True, eq=False)
class _Call:
    output: Any  # a copy
    reason: str  # why the layer cannot be skipped; empty if it can


@contextmanager
def _recorded(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, _Call]]:
    """Records the layer outputs of one forward pass, in the order in which the layers finish."""
    calls: dict[str, _Call] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name in calls:
                raise ValueError(f"{name} ran twice in one forward pass; name a layer that runs once")
            calls[name] = _Call(_copy(output), _reason_against(output, _tensors((*args, *kwargs.values()))))

        return record

    with ExitStack() as hooks:
        for name in layers:
            handle = find_layer(module, name).register_forward_hook(recorder(name), with_kwargs=True)
            hooks.callback(handle.remove)
        yield calls
    missing = [name for name in layers if name not in calls]
    if missing:
        raise ValueError(f"{missing[0]} did not run in the forward pass; name a layer that does")


@contextmanager
def _replaced(module: nn.Module, forwards: Mapping[str, _Forward]) -> Iterator[None]:
    """Replaces the forward functions of layers inside the `with` block."""
    with ExitStack() as stack:
        for name, forward in forwards.items():
            layer = find_layer(module, name)
            if "forward" in vars(layer):  # set on the instance by some wrappers
                stack.callback(setattr, layer, "forward", layer.forward)
            else:
                stack.callback(delattr, layer, "forward")
            layer.forward = forward
        yield


def _replaying(output: Any) -> _Forward:
    return lambda *_, **__: _copy(output)


def _passing_input(output: Any) -> _Forward:
    """Replaces each tensor of `output` by the first input of the same shape; other tensors are kept."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = _tensors((*args, *kwargs.values()))
        return _map(lambda part: next((x for x in inputs if x.shape == part.shape), part), output)

    return forward


def _reason_against(output: Any, inputs: Sequence[Tensor]) -> str:
    """The reason why a layer with this output cannot be skipped; empty if it can."""
    outputs = _tensors(output if isinstance(output, (tuple, list)) else (output,))
    if not outputs:
        return f"its output is of type {type(output).__name__}, not a tensor"
    output_shapes, input_shapes = ([tuple(t.shape[1:]) for t in tensors] for tensors in (outputs, inputs))
    matching = [shape for shape in output_shapes if shape in input_shapes]
    if not matching:
        return f"no output shape ({_listed(output_shapes)}) equals an input shape ({_listed(input_shapes)})"
    if len(set(matching)) < len(matching):
        return f"several outputs have the same shape ({_listed(output_shapes)}), so the matching inputs are ambiguous"
    return ""


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _map(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Applies a function to the tensors of an output; deeper nested tensors are kept."""
    if isinstance(output, Tensor):
        return function(output)
    if not isinstance(output, (tuple, list)):
        return output
    parts = [function(part) if isinstance(part, Tensor) else part for part in output]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def _copy(output: Any) -> Any:
    return _map(Tensor.clone, output)


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes)) or "no tensor"
