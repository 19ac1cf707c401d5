"""The definition of a family of published networks, and building a transformer backbone from the tensors of a file.

A new family is a file of its own with a `Family` in it, and one line in `families.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from layerprobe.backbones.base import Backbone
from layerprobe.noise import GVP, VP, NoiseSchedule, Prediction, schedule_from_name

NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})
SD_LATENTS = "latents of Stable Diffusion's VAE x 0.18215"
# Prediction targets by their names in the training scripts.
PREDICTION_NAMES: dict[str, Prediction] = {"velocity": "velocity", "v": "velocity", "noise": "eps", "score": "score"}
# Schedules of the curved paths, by the family's schedule on the linear path and the path's name in the scripts.
CURVED_PATHS: Mapping[tuple[str, str], Callable[[], NoiseSchedule]] = MappingProxyType(
    {("sit", "GVP"): GVP, ("sit", "VP"): VP, ("flow", "cosine"): lambda: GVP(data_time=0, noise_time=1)}
)


@dataclass(frozen=True, eq=False)
class Opened:
    """A network without weights, and the weights to load into it.

    Attributes:
        backbone: Backbone with its module on the "meta" device; `load_state_dict(tensors, assign=True)` fills it.
        tensors: Tensors of the file, by the module's names.
        unused: Names of the file's tensors that only training needs.
        latents: Input of the network in training, if the file itself says it; "" for that of the family.
    """

    backbone: Backbone
    tensors: dict[str, Tensor]
    unused: tuple[str, ...]
    latents: str = ""


@dataclass(frozen=True)
class Family:
    """The convention of a family's published training code.

    Attributes:
        title: Name shown to the user.
        schedule: Name of the noise schedule.
        prediction: Prediction target of the network.
        mark: Training argument from which the script of this family is recognized; None if there is no such argument.
        heads: Prefixes of the names of tensors that only training needs.
        latents: Input of the network in training; samples must be encoded and scaled in the same way.
        recognizes: Function that tests whether tensors have the structure of this family's network; None for the
            families that share the structure of SiT.
        build: Function that builds a network of this family from its tensors; None for that of SiT.
    """

    title: str
    schedule: str
    prediction: Prediction
    mark: str | None = None
    heads: tuple[str, ...] = ()
    latents: str = SD_LATENTS
    recognizes: Callable[[Mapping[str, Tensor]], bool] | None = None
    build: Builder | None = None


class Builder(Protocol):
    """Builds the network that a family's file was saved from; see `families.build` for the arguments."""

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        family: Family,
        *,
        args: Mapping[str, Any],
        num_heads: int | None,
        shape: Sequence[int] | None,
        num_classes: int | None,
        schedule: NoiseSchedule | str | None,
        prediction: Prediction | None,
    ) -> Opened: ...


def build_transformer(
    make: Callable[..., Backbone],
    tensors: Mapping[str, Tensor],
    family: Family,
    *,
    args: Mapping[str, Any],
    num_classes: int | None,
    schedule: NoiseSchedule | str | None,
    prediction: Prediction | None,
    **options: Any,
) -> Opened:
    """Builds a class-conditional transformer whose training arguments are those of SiT's script or its forks.

    Args:
        make: Function that makes the backbone from the network's tensors and the family, with its module on the "meta"
            device.
        tensors: Tensors of the file by name.
        family: Family of the file.
        args: Training arguments saved with the tensors.
        num_classes: Number of classes, to check the file against.
        schedule: Schedule or its name, if the model was trained differently from the published one.
        prediction: Prediction target, in the same case.
        options: Further arguments of `make`.

    Raises:
        ValueError: If the arguments contradict the tensors, or name a path or a prediction that is unknown.
    """
    settings = _settings(args)
    schedule, prediction = _convention(family, settings, schedule, prediction)
    unused = tuple(name for name in tensors if name.startswith(family.heads))
    network_tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    backbone = make(network_tensors, family, schedule=schedule, prediction=prediction, **options)
    _check_classes(backbone.num_classes, settings.get("num_classes") if num_classes is None else num_classes)
    return Opened(backbone, network_tensors, unused)


def _settings(args: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens the arguments: LightningDiT saves a configuration with sections."""
    sections = [value for value in args.values() if isinstance(value, Mapping)]
    top_level = {name: value for name, value in args.items() if not isinstance(value, Mapping)}
    return {name: value for section in (*sections, top_level) for name, value in section.items()}


def _convention(
    family: Family, settings: Mapping[str, Any], schedule: NoiseSchedule | str | None, prediction: Prediction | None
) -> tuple[NoiseSchedule, Prediction]:
    """Returns the caller's convention, else that of the training arguments, else the default of the family's script."""
    path, name = str(settings.get("path_type") or "linear"), settings.get("prediction") or family.prediction
    curved = CURVED_PATHS.get((family.schedule, path))
    if schedule is None and curved is not None:
        schedule = curved()
    if schedule is None and path.lower() != "linear":
        raise ValueError(
            f"this model was trained on the path {path!r}, which is unknown for {family.title}; pass --schedule"
        )
    if prediction is None:
        if name not in (*PREDICTION_NAMES, family.prediction):
            raise ValueError(
                f"this model was trained to predict {name!r}; only {', '.join(PREDICTION_NAMES)} are known"
            )
        prediction = PREDICTION_NAMES.get(name, family.prediction)
    if isinstance(schedule, NoiseSchedule):
        return schedule, prediction
    with torch.device("cpu"):  # Schedules have tables of values, even if the caller builds on the "meta" device.
        return schedule_from_name(schedule or family.schedule), prediction


def _check_classes(num_classes: int, expected: Any) -> None:
    """Checks the classes: the null label is the table's last row; a table of one row is of an unconditional model."""
    if expected in (None, num_classes) or (expected, num_classes) == (1, 0):
        return
    if expected == num_classes + 1:
        raise ValueError(
            f"all {expected} rows of the label table are classes: this model was trained without label dropout and has "
            "no null label; pass --model with a forward of your own"
        )
    raise ValueError(
        f"the label table has {num_classes} classes and a null label, not {expected} classes; pass the number of "
        "classes of the training data"
    )
