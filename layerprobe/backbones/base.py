"""What a model is to layerprobe: a module, its layers, and how to speak to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture import as_tokens, capture, match_layers
from layerprobe.noise import PREDICTIONS, NoiseSchedule, Prediction, convert_prediction, schedule_from_name

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Backbone:
    """A diffusion model behind one convention.

    `backbone(x_t, noise_level, condition)` is the velocity from data to noise (by the time of
    `layerprobe.noise.schedules`), whatever the family predicts and however it counts time.

    Attributes:
        module: The network.
        layers: Names of the layers worth probing, in the module's order.
        schedule: How data and noise mix, and the family's own time.
        prediction: What the network gives; its sign follows the schedule's direction of time.
        shape: Shape (C, *grid) of one input.
        num_classes: 0 for an unconditional model.
        forward: Calls the module: (module, x_t, native time (B,), condition (B,) or None) -> output like x_t.
        name: For people: "SiT 8 x 64, patch 2".
        tokens: What of a layer's output are the sample's own tokens (B, T, D): gets the raw output and the layer's
            name. For layers that give several streams, carry a condition's tokens along or put the sequence first.
        takes_mask: Whether `forward` takes a fifth argument, a mask (B, *grid) of what is no padding, so that samples
            may differ in length.
        mask: Of the batch at hand, see `masked`.
        token_grid: How many tokens a layer has along each axis, where the family tells; otherwise it is guessed from
            their number.

    Raises:
        ValueError: If the prediction is none of `PREDICTIONS`.
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

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {self.prediction!r}; use one of {', '.join(PREDICTIONS)}")

    def __call__(self, x_t: Tensor, noise_level: Tensor, condition: Tensor | None = None) -> Tensor:
        """The velocity, shape of x_t.

        Args:
            x_t: Noisy samples, shape (B, C, *grid).
            noise_level: Shape (B,), in [0, 1].
            condition: Class labels, shape (B,), or None for the null condition.

        Raises:
            ValueError: If the samples have another shape, or a level makes `convert_prediction` divide by zero.
        """
        output = self.predict(x_t, noise_level, condition)
        velocity = convert_prediction(output, x_t, noise_level, self.schedule, source=self.prediction, to="velocity")
        return velocity if self.mask is None else velocity.masked_fill(~self._real(x_t).unsqueeze(1), 0.0)

    def predict(self, x_t: Tensor, noise_level: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the network itself predicts (`self.prediction`), with time pointing from data to noise."""
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(
                f"samples have shape {tuple(x_t.shape[1:])}, {self.name} takes {self.shape}; resize the samples"
            )
        if condition is None:
            condition = self.null_condition(len(x_t), x_t.device)
        native_time = self.schedule.native_time(noise_level)
        if not self.schedule.integer_time:
            native_time = native_time.to(x_t.dtype)
        mask = () if self.mask is None else (self._real(x_t),)
        output = self.forward(self.module, x_t, native_time, condition, *mask)
        flip = self.prediction == "velocity" and self.schedule.time_direction < 0
        return -output if flip else output

    def masked(self, mask: Tensor | None) -> Backbone:
        """This backbone for the samples of one batch, of which only the masked part is real.

        What it gives there does not depend on the padding, and on the padding it gives 0.

        Args:
            mask: Shape (B, *grid), bool, as in `Batch`; the backbone may then be given the batch, or the batch several
                times over. None leaves it as it is.

        Raises:
            ValueError: If the network cannot tell padding from data.
        """
        if mask is None:
            return self
        if not self.takes_mask:
            raise ValueError(f"{self.name} takes no padded samples; cut all to one length")
        return replace(self, mask=mask)

    def _real(self, x_t: Tensor) -> Tensor:
        """The mask for the batch, or for the batch several times over, as guidance asks for it."""
        assert self.mask is not None
        return self.mask.to(x_t.device).repeat(len(x_t) // len(self.mask), *[1] * (self.mask.ndim - 1))

    def null_condition(self, batch_size: int, device: torch.device | str = "cpu") -> Tensor | None:
        """The label that means "no label", `num_classes`, shape (B,); None for unconditional models."""
        return torch.full((batch_size,), self.num_classes, device=device) if self.num_classes else None

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
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
    """Makes a backbone from anybody's module.

        backbone = wrap(unet, layers="b*", schedule="ddpm-linear", prediction="eps", shape=(1, 28, 28))

    Args:
        module: The network; it is put into evaluation mode.
        layers: Names or patterns; `*` stands for one part of a name ("blocks.*").
        schedule: A `NoiseSchedule` or its name: sit, flow, flow-1000, ddpm-linear, ddpm-scaled_linear, ddpm-cosine,
            edm, sit-gvp, sit-vp.
        prediction: "velocity", "eps", "x0", "v" or "score".
        shape: Shape (C, *grid) of one input.
        num_classes: Number of classes; the null label is `num_classes`. 0 for an unconditional model.
        forward: How to call the module where `module(x_t, time)`, or `module(x_t, time, label)` with classes, is not
            right.
        name: For people; the class name where not given.
        tokens: See `Backbone`.

    Raises:
        ValueError: If a layer, the schedule or the prediction is unknown.
    """
    return Backbone(
        module=module.eval(),
        layers=match_layers(module, layers),
        schedule=schedule_from_name(schedule) if isinstance(schedule, str) else schedule,
        prediction=prediction,
        shape=tuple(shape),
        num_classes=num_classes,
        forward=forward or _call,
        name=name or type(module).__name__,
        tokens=tokens,
    )


@torch.inference_mode()
def layer_shapes(backbone: Backbone, layers: Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
    """Number of tokens and width of each layer, in the order in which they run; one whole forward pass of one sample.

    Raises:
        ValueError: If a layer does not run, runs twice or gives no tokens.
    """
    device = backbone.device
    # To the end, unlike in extraction: this is where a layer that runs twice is noticed.
    with capture(backbone.module, layers or backbone.layers, tokens=backbone.tokens) as outputs:
        backbone.predict(torch.zeros(1, *backbone.shape, device=device), torch.full((1,), 0.5, device=device))
    return {name: (tokens.shape[1], tokens.shape[2]) for name, tokens in outputs.items()}


def _call(module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None) -> Tensor:
    arguments = (x_t, native_time) if condition is None else (x_t, native_time, condition)
    output: Tensor = module(*arguments)
    return output


def alignable_layers(backbone: Backbone) -> tuple[str, ...]:
    """The layers of the commonest shape, in the order in which they run: only these can be aligned with one another.

    Raises:
        ValueError: If no two layers have a shape in common.
    """
    shapes = layer_shapes(backbone)
    commonest = max(shapes.values(), key=list(shapes.values()).count)
    alike = tuple(name for name, shape in shapes.items() if shape == commonest)
    if len(alike) < 2:
        raise ValueError(f"no two layers of {backbone.name} have tokens of one shape; pass other --layers to probe")
    return alike
