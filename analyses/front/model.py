"""A model as notebooks use it: opened in one call, its features in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from layerprobe.analyses.front.objects import as_samples
from layerprobe.backbones import Backbone, wrap
from layerprobe.capture import match_layers
from layerprobe.checkpoints import CheckpointSource, check_convention, convention_message, weights_hash
from layerprobe.extraction import ExtractionPlan, read_features
from layerprobe.files import IN_MEMORY

_SHOWN = 6  # layers in a text


@dataclass(frozen=True)
class Model:
    """A diffusion model whose layers can be read.

    Attributes:
        backbone: The model in layerprobe's common convention.
        source: What it was opened from; a record alone if it was passed as an object.
    """

    backbone: Backbone
    source: CheckpointSource = field(repr=False)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that are read unless others are named."""
        return self.backbone.layers

    def features(
        self,
        x: Any,
        layers: str | Sequence[str] | None = None,
        noise_level: float | Sequence[float] = 0.3,
        *,
        labels: Any = None,
        per_token: bool = False,
        ids: Any = None,
        seed: int = 0,
        batch_size: int = 128,
    ) -> Any:
        """Returns the features of samples in memory, as `layerprobe probe` stores them.

            model.features(x, "blocks.5", 0.3)                        # (n, D)
            model.features(x, ["blocks.2", "blocks.5"], [0.1, 0.3])   # {("blocks.2", 0.1): (n, D), ...}

        Args:
            x: Samples, shape (n, C, *grid): a tensor, an array or a list; floating point in about [-1, 1], latents as
                the network takes them, uint8 that represents [-1, 1], or `Samples`.
            layers: Name of a layer, or names and patterns such as "blocks.*"; all layers of the model if None.
            noise_level: Noise level, or several, in [0, 1]; 0 is clean, 1 is pure noise.
            labels: Number of the class that the model is conditioned on for each sample; the null label if None.
            per_token: Whether to return all tokens (n, T, D) instead of their mean (n, D).
            ids: Integer id of each sample, to which its noise is keyed; positions if None. Pass ids to get equal noise
                for a sample in other batches.
            seed: Seed of the noise.
            batch_size: Number of rows per forward pass.

        Returns:
            Features, float32 on the CPU, if one layer and one level are named; otherwise a dict by (layer, level).

        Raises:
            ValueError: If a layer is unknown, or samples or labels do not fit the model.
        """
        if isinstance(layers, int):
            raise ValueError(f"layers are named, got {layers}; pass a name such as {self.layers[0]!r}")
        one_level = np.ndim(noise_level) == 0  # NumPy's and torch's scalars included
        single = isinstance(layers, str) and "*" not in layers and one_level
        names = self.layers if layers is None else match_layers(self.backbone.module, layers)
        levels = tuple(map(float, np.atleast_1d(np.asarray(noise_level))))
        plan = ExtractionPlan(names, levels, condition="null" if labels is None else "label", seed=seed)
        samples = as_samples(x, labels, ids=ids, num_classes=self.backbone.num_classes)
        if labels is not None and samples.class_names:  # numbered anew, so they would condition on other classes
            raise ValueError(
                f"the labels condition {self.backbone.name}, which has {self.backbone.num_classes} classes; pass "
                "their numbers, counted from 0"
            )
        features = read_features(self.backbone, samples, plan, per_token=per_token, batch_size=batch_size)
        return next(iter(features.values())) if single else features

    def check(self, x: Any, *, seed: int = 0) -> str:
        """Returns a sentence: whether the weights denoise samples under the declared schedule and prediction.

        Args:
            x: Samples, as for `features`; some hundred are enough.
            seed: Seed of the noise.
        """
        return convention_message(check_convention(self.backbone, as_samples(x), seed=seed))

    def __repr__(self) -> str:
        names = self.layers if len(self.layers) <= _SHOWN else (*self.layers[:2], "...", self.layers[-1])
        return "\n".join([self.backbone.name, *(f"  {name}: {text}" for name, text in self._facts(", ".join(names)))])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>"
            for name, text in self._facts(", ".join(self.layers))
        )
        return f"<b>{escape(self.backbone.name)}</b><table>{rows}</table>"

    def _facts(self, layers: str) -> list[tuple[str, str]]:
        backbone = self.backbone
        facts = [
            ("layers", f"{len(self.layers)} ({layers})"),
            ("input", " x ".join(map(str, backbone.shape)) + f", {backbone.num_classes or 'no'} classes"),
            ("convention", f"{backbone.schedule.name} schedule, predicts {backbone.prediction}"),
            ("device", str(backbone.device)),
        ]
        return facts + [("assumed", text) for text in backbone.assumptions[:3]]


def open(model: str | Path | nn.Module | Backbone, *, device: str = "auto", **options: Any) -> Model:
    """Opens a checkpoint, or takes a module that is in memory.

        model = lp.open("model.safetensors")
        model = lp.open(net, layers="blocks.*", schedule="flow", prediction="velocity", shape=(3, 32, 32))

    Args:
        model: Path of a checkpoint or "digits", as for `layerprobe.checkpoints.open_checkpoint`; a `torch.nn.Module`;
            or a `Backbone`.
        device: Device of a checkpoint; a module stays where it is.
        **options: Options of `open_checkpoint` for a checkpoint, of `layerprobe.backbones.wrap` for a module.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint cannot be opened, or a module lacks an option that it needs.
    """
    if isinstance(model, str | Path):
        source = CheckpointSource(str(model), **{name: _plain(value) for name, value in options.items()})
        return Model(source.open(device=device), source.absolute())
    if isinstance(model, Backbone):
        if options:
            raise ValueError(f"a backbone carries its {', '.join(options)}; change it by dataclasses.replace")
        return _in_memory(model)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"a model cannot be opened from a {type(model).__name__}; pass the path of a checkpoint, a torch.nn.Module "
            "or a Backbone"
        )
    if missing := [name for name in ("layers", "schedule", "prediction", "shape") if name not in options]:
        raise ValueError(
            f"a module does not say its {missing[0]}; pass layers, schedule, prediction and shape, as in "
            'lp.open(net, layers="blocks.*", schedule="flow", prediction="velocity", shape=(3, 32, 32))'
        )
    return _in_memory(wrap(model, **options))


def _in_memory(backbone: Backbone) -> Model:
    # The hash tells a run of other weights apart.
    return Model(backbone, CheckpointSource(f"{IN_MEMORY}{backbone.name}, {weights_hash(backbone.module)[:16]}"))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
