"""How much each block contributes to what is predicted: the velocity without the block, beside the velocity with it.

A skipped block gives its input in place of its output: of a residual block only the stream that passes by is left. All
layers see the same samples, noise and levels, so their numbers can be compared one by one.

Source: skipping single blocks is the lesion study of Veit et al. 2016 (arXiv:1605.06431).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from layerprobe.backbones import Backbone
from layerprobe.capture import INPUT, evaluating, find_layer
from layerprobe.data import Samples
from layerprobe.noise import RandomStream, target
from layerprobe.progress import StepProgress

VELOCITY_CHANGE, LOSS_INCREASE = "velocity change when skipped", "loss increase when skipped"

SampleScores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerAblation:
    """What skipping each layer does to the velocity of each sample.

    Attributes:
        split: Name of the split that the samples are from.
        layers: Names, as they were asked for.
        noise_levels: As they were asked for.
        velocity_change: `||v - v_skip||^2 / ||v||^2`, shape (layers, noise levels, n), at least 0. nan where a layer
            cannot be skipped.
        loss_increase: By how much the mean squared error of the velocity grows, same shape; negative where the model
            is better off without the layer. The target is the velocity of the sample and its noise.
        reasons: Why a layer cannot be skipped, for those that cannot.
    """

    split: str
    layers: tuple[str, ...]
    noise_levels: tuple[float, ...]
    velocity_change: SampleScores
    loss_increase: SampleScores
    reasons: Mapping[str, str]

    def rows(self, *, source: str = "model", seed: int = 0) -> list[dict[str, Any]]:
        """Rows of the quality table: means over the samples, with their 95 % bootstrap interval.

        Args:
            source: What the model is called in the table.
            seed: Of the bootstrap.

        Returns:
            One row per layer, noise level and metric. A value that does not exist is nan, and its note says why.
        """
        rows = []
        for metric, scores in ((VELOCITY_CHANGE, self.velocity_change), (LOSS_INCREASE, self.loss_increase)):
            means, low, high = _means(scores, seed)
            for i, layer in enumerate(self.layers):
                for j, level in enumerate(self.noise_levels):
                    note = self.reasons.get(layer, "" if math.isfinite(means[i, j]) else _NOT_FINITE)
                    numbers = {"value": means[i, j], "low": low[i, j], "high": high[i, j]}
                    place = {"source": source, "layer": layer, "layer_index": i, "noise_level": level}
                    rows.append(place | {"metric": metric, "split": self.split} | numbers | {"note": note})
        return rows


_NOT_FINITE = "the velocity is zero, or not finite"


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
    progress: StepProgress | None = None,
) -> LayerAblation:
    """Skips one layer after the other and records what becomes of the predicted velocity, under the null condition.

    Up to the skipped layer nothing changes, so what the layers before it gave is kept and given again: L layers cost
    about L / 2 forward passes per sample and level, and memory for the outputs of all layers for one batch.

    A layer can be skipped if it gives a tensor of the shape of one it takes. Of a tuple, each tensor that has such an
    input is replaced by it (the streams of text and image, say), and the others stay.

    Args:
        backbone: The model, on the device where it should run.
        samples: Data that the model was not fitted on; the first `num_samples` are used.
        noise_levels: In [0, 1].
        split: Name of the split that `samples` are; it goes into the quality table.
        layers: Names of submodules; the backbone's where not given.
        num_samples: All samples where there are fewer.
        seed: Of the noise, which is that of an extraction with this seed.
        batch_size: Rows per forward pass; it changes the numbers by rounding only.
        progress: Called with (forward passes done, forward passes in all).

    Raises:
        ValueError: If the samples do not fit, a level is outside [0, 1], or a layer is unknown, does not run or runs
            twice.
    """
    layers = tuple(dict.fromkeys(layers or backbone.layers))
    levels = torch.tensor(list(noise_levels), dtype=torch.float64)
    if not len(levels) or not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(f"noise levels lie between 0 (clean) and 1 (pure noise), got {levels.tolist()}")
    if num_samples < 1 or not len(samples):
        raise ValueError(f"{min(num_samples, len(samples))} samples show nothing; pass at least 1")
    batch = samples.batch(range(min(num_samples, len(samples))))
    eps, n = RandomStream(seed).normal(batch.ids, samples.shape), len(batch.x)
    scores = np.full((2, len(layers), len(levels) * n), np.nan)
    reasons = {name: "what goes into a layer cannot be skipped" for name in layers if name.endswith(INPUT)}
    blocks = [name for name in layers if name not in reasons]
    with evaluating(backbone.module), torch.inference_mode():
        for start in range(0, len(levels) * n, batch_size):
            rows = torch.arange(start, min(start + batch_size, len(levels) * n))
            sample, level = rows % n, levels[rows // n]
            mask = None if batch.mask is None else batch.mask[sample]
            for name, found in _skips(backbone.masked(mask), blocks, batch.x[sample], eps[sample], level):
                if isinstance(found, str):
                    reasons[name] = found
                else:
                    scores[:, layers.index(name), rows.numpy()] = found
            if progress:
                progress(int(rows[-1]) + 1, len(levels) * n)
    velocity_change, loss_increase = scores.reshape(2, len(layers), len(levels), n)
    return LayerAblation(split, layers, tuple(levels.tolist()), velocity_change, loss_increase, reasons)


def _skips(
    backbone: Backbone, layers: Sequence[str], x: Tensor, eps: Tensor, level: Tensor
) -> Iterator[tuple[str, SampleScores | str]]:
    """Each layer, as they run, with its two scores per sample, shape (2, B), or with why it cannot be skipped."""
    device, time = backbone.device, level.to(backbone.device, torch.float32)
    x_t = backbone.schedule.corrupt(x, eps, level).to(device)
    truth = target("velocity", backbone.schedule, x=x, eps=eps, level=level).to(device)
    with _recorded(backbone.module, layers) as calls:
        velocity = backbone(x_t, time)
    given = {name: _giving(call.output) for name, call in calls.items()}
    with _replaced(backbone.module, given):
        # A block may do more than give its output, such as leave something behind for a later block.
        reusable = torch.equal(backbone(x_t, time), velocity)
    earlier: dict[str, _Forward] = {}
    for name, call in calls.items():
        if call.reason:
            yield name, call.reason
        else:
            with _replaced(backbone.module, earlier | {name: _passing(call.output)}):
                skipped = backbone(x_t, time)
            yield name, _scores(velocity, skipped, truth)
        if reusable:
            earlier[name] = given[name]


def _scores(velocity: Tensor, skipped: Tensor, truth: Tensor) -> SampleScores:
    """The velocity change and the increase of the loss, shape (2, B)."""
    v, v_skip, target_v = (tensor.double().flatten(1) for tensor in (velocity, skipped, truth))
    change = (v - v_skip).square().sum(1) / v.square().sum(1)
    increase = (v_skip - target_v).square().mean(1) - (v - target_v).square().mean(1)
    return torch.stack([change, increase]).cpu().numpy()


def _means(scores: SampleScores, seed: int) -> tuple[SampleScores, SampleScores, SampleScores]:
    """Means over the last axis with the ends of their intervals; all rows see the same resamples."""
    n = scores.shape[-1]
    weights = np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1 / n), size=1000) / n
    low, high = np.quantile(scores @ weights.T, [0.025, 0.975], axis=-1)
    return scores.mean(-1), low, high


_Forward = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class _Call:
    output: Any  # a copy
    reason: str  # why the layer cannot be skipped, or ""


@contextmanager
def _recorded(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, _Call]]:
    """What the layers give in one forward pass, in the order in which they end."""
    calls: dict[str, _Call] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name in calls:
                raise ValueError(f"{name} ran twice in one forward pass; name a layer that runs once")
            calls[name] = _Call(_copy(output), _why_not(output, _tensors((*args, *kwargs.values()))))

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
    """Inside the block these layers compute something else."""
    with ExitStack() as stack:
        for name, forward in forwards.items():
            layer = find_layer(module, name)
            if "forward" in vars(layer):  # some wrappers put one there
                stack.callback(setattr, layer, "forward", layer.forward)
            else:
                stack.callback(delattr, layer, "forward")
            layer.forward = forward
        yield


def _giving(output: Any) -> _Forward:
    return lambda *_, **__: _copy(output)


def _passing(output: Any) -> _Forward:
    """Gives each tensor of `output` the value of the first input of its shape; what has none stays as it was."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = _tensors((*args, *kwargs.values()))
        return _map(lambda part: next((x for x in inputs if x.shape == part.shape), part), output)

    return forward


def _why_not(output: Any, inputs: Sequence[Tensor]) -> str:
    """Why a layer with this output cannot be skipped, or ""."""
    outputs = _tensors(output if isinstance(output, (tuple, list)) else (output,))
    if not outputs:
        return f"it gives {type(output).__name__}, no tensor"
    given, taken = ([tuple(t.shape[1:]) for t in tensors] for tensors in (outputs, inputs))
    matching = [shape for shape in given if shape in taken]
    if not matching:
        return f"it gives {_words(given)} per sample and takes {_words(taken)}"
    if len(set(matching)) < len(matching):
        return f"it gives {_words(given)} per sample, so which input belongs to which is not known"
    return ""


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _map(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """The output with its tensors, but not those deeper inside, replaced."""
    if isinstance(output, Tensor):
        return function(output)
    if not isinstance(output, (tuple, list)):
        return output
    parts = [function(part) if isinstance(part, Tensor) else part for part in output]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def _copy(output: Any) -> Any:
    return _map(Tensor.clone, output)


def _words(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes)) or "no tensor"
