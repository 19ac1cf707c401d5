"""The backbone: a module, its layers, and how to call it in one convention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.backbones.network_call import Forward, call_module, checked
from layerprobe.capture import as_tokens, capture, match_layers
from layerprobe.messages import unknown
from layerprobe.noise import (
    PREDICTIONS,
    NoiseSchedule,
    Prediction,
    Rescaled,
    convert_prediction,
    in_data_units,
    schedule_from_name,
)
from layerprobe.precision import Precision, computing, precision_on

# Clean enough and noisy enough to read most of a table of times, and inside the training of every schedule.
TRIAL_LEVELS = (0.5, 0.88)


@dataclass(frozen=True)
class Backbone:
    """A diffusion model that is called in the same convention as every other.

    `backbone(x_t, noise_level, condition)` is the velocity from data to noise, with time as in
    `layerprobe.noise.schedules`, for every family, prediction target and native time.

    Attributes:
        module: Network.
        layers: Names of the layers to probe, in the module's order.
        schedule: Schedule, which mixes data and noise and defines the family's native time.
        prediction: Prediction target of the network; its sign follows the schedule's direction of time.
        shape: Shape (C, *grid) of one input.
        num_classes: Number of classes; 0 for an unconditional model.
        forward: Function that calls the module: (module, x_t, native time (B,), condition (B,) or None) -> output,
            shape of x_t.
        name: Name shown to the user, such as "SiT with 8 blocks of width 64, patch 2".
        tokens: Function that extracts the sample's own tokens (B, T, D) from a layer's raw output and the layer's
            name. It is needed if layers return several streams, include a condition's tokens or put the sequence first.
        takes_mask: Whether `forward` takes a fifth argument, a mask (B, *grid) that is True outside of padding, so
            that samples may differ in length.
        mask: Mask of the current batch, set by `masked`.
        token_grid: Number of tokens of a layer along each axis, if the family determines it; otherwise it is guessed
            from their total number.
        num_heads: Number of attention heads; None if the network has none or does not tell.
        possible_heads: Numbers of attention heads that the weights allow, if they allow several: with a wrong one, the
            weights fit all the same.
        assumptions: What was assumed because no file and no option told it, one sentence each, with the option that
            tells it otherwise.
        origin: Where the weights come from, as JSON: files, stored types, adapters, what was left out.
        precision: Precision of the network's passes, set by `in_precision`; None computes as torch is set.

    Raises:
        ValueError: If the prediction is not one of `PREDICTIONS`.
    """

    module: nn.Module
    layers: tuple[str, ...]
    schedule: NoiseSchedule
    prediction: Prediction
    shape: tuple[int, ...]
    num_classes: int
    forward: Forward = field(repr=False)
    name: str = "model"
    tokens: Callable[[Any, str], Tensor] = field(default=as_tokens, repr=False)
    takes_mask: bool = False
    mask: Tensor | None = field(default=None, repr=False, compare=False)
    token_grid: tuple[int, ...] | None = None
    num_heads: int | None = None
    possible_heads: tuple[int, ...] = ()
    assumptions: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(unknown("prediction", self.prediction, PREDICTIONS))

    def __call__(self, x_t: Tensor, noise_level: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns the velocity, shape of x_t.

        Args:
            x_t: Noisy samples, shape (B, C, *grid).
            noise_level: Noise levels in [0, 1], shape (B,).
            condition: Class labels, shape (B,), or None for the null condition.

        Raises:
            ValueError: If the samples have another shape, or `convert_prediction` would divide by zero at a level.
        """
        output = self.predict(x_t, noise_level, condition)
        velocity = convert_prediction(output, x_t, noise_level, self.schedule, source=self.prediction, to="velocity")
        return velocity if self.mask is None else velocity.masked_fill(~self._real(x_t).unsqueeze(1), 0.0)

    def predict(self, x_t: Tensor, noise_level: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns the network's prediction (`self.prediction`), in units of x_t, with time from data to noise."""
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(
                f"samples have shape {tuple(x_t.shape[1:])}, but {self.name} takes {self.shape}; resize the samples"
            )
        if condition is None:
            condition = self.null_condition(len(x_t), x_t.device)
        native_time = self.schedule.native_time(noise_level)
        if not self.schedule.integer_time:
            native_time = native_time.to(x_t.dtype)
        mask = () if self.mask is None else (self._real(x_t),)
        own_x_t = self.schedule.network_input(x_t, noise_level)
        with computing(self.precision, x_t.device):
            output = self.forward(self.module, own_x_t, native_time, condition, *mask)
        flip = self.prediction == "velocity" and self.schedule.time_direction < 0
        return in_data_units(-output if flip else output, noise_level, self.schedule, prediction=self.prediction)

    def masked(self, mask: Tensor | None) -> Backbone:
        """Returns this backbone for one batch of padded samples.

        Its output does not depend on the padding, and is 0 there.

        Args:
            mask: Mask of the batch, True outside of padding, shape (B, *grid), bool, as in `Batch`. The backbone then
                takes this batch, or the batch repeated several times. None returns the backbone unchanged.

        Raises:
            ValueError: If the network does not take a mask.
        """
        if mask is None:
            return self
        if not self.takes_mask:
            raise ValueError(f"{self.name} does not take padded samples; cut all to one length")
        return replace(self, mask=mask)

    def in_precision(self, precision: str) -> Backbone:
        """Returns this backbone with the network's passes in a precision, whatever torch is set to.

        Args:
            precision: One of `Precision`; "auto" is the one it has already, or what suits the device, see
                `precision_on`.

        Raises:
            ValueError: If the precision is unknown, or the device or weights of 16 bits do not allow it.
        """
        if precision == "auto" and self.precision:
            return self
        # Without weights, as the raw input, it is on no device of its own.
        has_weights = next(self.module.parameters(), None) is not None
        chosen = precision_on(precision, self.device if has_weights else None)
        if chosen != "bfloat16" and self.is_narrow:
            raise ValueError(
                f"{self.name} has weights of 16 bits, which are not computed in {chosen}; pass --precision bfloat16, "
                "or --dtype float32"
            )
        return replace(self, precision=chosen)

    @property
    def is_narrow(self) -> bool:
        """Whether weights are of 16 bits."""
        return any(parameter.itemsize == 2 for parameter in self.module.parameters())

    def _real(self, x_t: Tensor) -> Tensor:
        """Returns the mask, repeated if the batch is repeated, as guidance does."""
        assert self.mask is not None
        return self.mask.to(x_t.device).repeat(len(x_t) // len(self.mask), *[1] * (self.mask.ndim - 1))

    def null_condition(self, batch_size: int, device: torch.device | str = "cpu") -> Tensor | None:
        """Returns the null label, `num_classes`, shape (B,); None for unconditional models."""
        return torch.full((batch_size,), self.num_classes, device=device) if self.num_classes else None

    @property
    def value_range(self) -> tuple[float, ...]:
        """What the values -1 and 1 of the samples are to the network; these two of each channel, if channels differ."""
        return self.schedule.value_range if isinstance(self.schedule, Rescaled) else (-1.0, 1.0)

    def with_schedule(self, schedule: NoiseSchedule) -> Backbone:
        """Returns this backbone under another schedule of its own data, with the same value range."""
        return replace(self, schedule=schedule).with_value_range(self.value_range)

    def with_value_range(self, value_range: Sequence[float]) -> Backbone:
        """Returns this backbone for a network that was trained on values in another range.

        Samples keep their values everywhere else: the network's input and prediction are converted.

        Args:
            value_range: What the values -1 and 1 of the samples are to the network, such as (0, 1); see `Rescaled`.

        Raises:
            ValueError: If this is not a range, or has another number of channels than the network.
        """
        if len(value_range) not in (2, 2 * self.shape[0]):
            raise ValueError(
                f"the value range has {len(value_range)} numbers, but {self.name} takes {self.shape[0]} channels; "
                "pass LOW,HIGH, or such a pair for each channel"
            )
        own = self.schedule.own
        return replace(self, schedule=own if tuple(value_range) == (-1, 1) else Rescaled(own, value_range))

    @property
    def device(self) -> torch.device:
        """The device of the network's weights."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))


def wrap(
    module: nn.Module,
    *,
    layers: str | Sequence[str],
    schedule: NoiseSchedule | str,
    prediction: Prediction,
    shape: Sequence[int],
    num_classes: int = 0,
    forward: Forward | None = None,
    name: str | None = None,
    tokens: Callable[[Any, str], Tensor] = as_tokens,
) -> Backbone:
    """Wraps any module as a backbone.

        backbone = wrap(unet, layers="b*", schedule="ddpm-linear", prediction="eps", shape=(1, 28, 28))

    Args:
        module: Network; it is set to evaluation mode. The page "Your own network" shows what it is called with.
        layers: Names or patterns of layers; `*` stands for one part of a name ("blocks.*").
        schedule: `NoiseSchedule` or its name: sit, flow, flow-1000, ddpm-linear, ddpm-scaled_linear, ddpm-cosine,
            edm, sit-gvp, sit-vp.
        prediction: Prediction target: "velocity", "eps", "x0", "v" or "score".
        shape: Shape (C, *grid) of one input.
        num_classes: Number of classes; the null label is `num_classes`. 0 for an unconditional model.
        forward: Function that calls the module, as in `Backbone`; by default `module(x_t, time)`, or
            `module(x_t, time, label)` with classes, where the first half of 2 C channels is the prediction.
        name: Name shown to the user; by default the name of the module's class.
        tokens: Function that extracts the tokens of a layer's output, as in `Backbone`.

    Raises:
        ValueError: If a layer, the schedule or the prediction is unknown, or the shape has no positive lengths.
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"shape {tuple(shape)} is none of a sample; pass channels first, such as --shape 3,32,32")
    return Backbone(
        module=module.eval(),
        layers=match_layers(module, layers),
        schedule=schedule_from_name(schedule) if isinstance(schedule, str) else schedule,
        prediction=prediction,
        shape=tuple(shape),
        num_classes=num_classes,
        forward=forward or call_module,
        name=name or type(module).__name__,
        tokens=tokens,
    )


@torch.no_grad()
def layer_shapes(backbone: Backbone, layers: Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
    """Returns (number of tokens, width) by layer, in running order, from one forward pass of two samples.

    Raises:
        ValueError: As for `checked_pass`.
    """
    x_t = torch.zeros(len(TRIAL_LEVELS), *backbone.shape, device=backbone.device)
    tokens, _ = checked_pass(backbone, x_t, layers)
    return {name: (output.shape[1], output.shape[2]) for name, output in tokens.items()}


def checked_pass(
    backbone: Backbone, x_t: Tensor, layers: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Calls the network, and checks what it and its layers return.

    Args:
        backbone: Model.
        x_t: Noisy samples at the first of `TRIAL_LEVELS`, shape (B, C, *grid).
        layers: Names of the layers to read; those of the backbone if not given.

    Returns:
        The tokens (B, T, D) of the layers, in running order, and the network's own prediction.

    Raises:
        ValueError: If the call fails or returns no prediction; if a layer does not run, runs twice, returns no tokens,
            or does not have the samples as its first axis.
    """
    levels = torch.tensor(TRIAL_LEVELS[: len(x_t)], device=x_t.device)
    backbone = replace(backbone, forward=checked(backbone.forward, backbone.schedule))
    # A complete pass, unlike in extraction, so that a layer that runs twice is noticed.
    with capture(backbone.module, layers or backbone.layers, tokens=backbone.tokens, transform=Tensor.clone) as tokens:
        prediction = backbone.predict(x_t, levels)
    for name, output in tokens.items():
        if len(output) != len(x_t):
            raise ValueError(
                f"{name} returns {tuple(output.shape)} for {len(x_t)} samples, which are not its first axis; "
                "name another layer, or pass wrap(..., tokens=...) to read it"
            )
    return tokens, prediction


def alignable_layers(backbone: Backbone) -> tuple[str, ...]:
    """Returns the layers of the most common shape, in running order; only these can be aligned with each other.

    Raises:
        ValueError: If no two layers have the same shape.
    """
    shapes = layer_shapes(backbone)
    most_common = max(shapes.values(), key=list(shapes.values()).count)
    layers = tuple(name for name, shape in shapes.items() if shape == most_common)
    if len(layers) < 2:
        raise ValueError(
            f"no two layers of {backbone.name} have tokens of the same shape; pass other --layers to probe"
        )
    return layers
