"""The definition of a family of published networks, and building a transformer backbone from the tensors of a file.

A new family is a file of its own with a `Family` in it, and one line in `families.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from layerprobe.backbones.base import Backbone
from layerprobe.backbones.stated import (
    DROPOUT,
    HEADS,
    NAMED_SIZES,
    check_sizes,
    model_name,
    network_settings,
    stated_number,
)
from layerprobe.noise import GVP, VP, NoiseSchedule, Prediction, schedule_from_name

NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})
SD_LATENTS = "latents of Stable Diffusion's VAE x 0.18215"
# Prediction targets by their names in the training scripts.
PREDICTION_NAMES: dict[str, Prediction] = {"velocity": "velocity", "v": "velocity", "noise": "eps", "score": "score"}
_LABELS = "y_embedder.embedding_table.weight"
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
    num_heads: int | None,
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
        num_heads: Number of attention heads; None leaves it to the arguments and `make`.
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
    network_tensors, class_notes = _with_null_label(network_tensors, settings, num_classes)
    num_heads, head_notes = _heads(network_tensors, network_settings(args), num_heads)
    backbone = make(network_tensors, family, schedule=schedule, prediction=prediction, num_heads=num_heads, **options)
    check_sizes(network_settings(args), _sizes(network_tensors, backbone))
    if num_heads is None and backbone.possible_heads and head_notes:
        raise ValueError(f"{head_notes[0]}, so the number of heads is unknown; pass --num-heads")
    if num_heads is None and backbone.possible_heads:
        head_notes.append(
            f"no file states the number of attention heads: {backbone.num_heads} is that of the published model of "
            "this width; pass --num-heads if it has another"
        )
    return Opened(replace(backbone, assumptions=(*head_notes, *class_notes)), network_tensors, unused)


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


def _heads(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], num_heads: int | None
) -> tuple[int | None, list[str]]:
    """Returns the number of heads that the caller or the arguments state, None if neither does, and what to tell.

    Raises:
        ValueError: If the arguments contradict the caller or the weights.
    """
    width = tensors["pos_embed"].shape[-1:].numel() if "pos_embed" in tensors else 0
    stated = stated_number(settings, HEADS)
    if stated is not None:
        if num_heads not in (None, stated[1]):
            raise ValueError(
                f"the training arguments have {stated[0]} = {stated[1]}, not {num_heads}; leave --num-heads out"
            )
        return int(stated[1]), []
    named = model_name(settings)
    if named is None:
        return num_heads, []
    name, size = named
    named_width, named_heads = NAMED_SIZES[size]
    if named_width == width:
        if num_heads not in (None, named_heads):
            return num_heads, [
                f"the file's model name {name} means {named_heads} heads; --num-heads {num_heads} is used"
            ]
        return named_heads, []
    return num_heads, [
        f"the file's model name {name} is of another network: it means a width of {named_width}, the weights have "
        f"{width}"
    ]


def _sizes(tensors: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Any]:
    """Returns the sizes that the weights determine, by their names in the official code."""
    width, channels, *patch = tensors["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    sizes = {"hidden_size": width, "in_channels": channels, "in_chans": channels, "depth": depth}
    sizes |= {"patch_size": patch[0]} if len(set(patch)) == 1 else {}
    return sizes | ({"input_size": backbone.shape[1]} if len(set(backbone.shape[1:])) == 1 else {})


def _with_null_label(
    tensors: dict[str, Tensor], settings: Mapping[str, Any], num_classes: int | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors with a null label after the last class, and what is assumed about it.

    A table of one row is of an unconditional model. Training without label dropout leaves a table without a null
    label; then the mean of the classes takes its place.

    Raises:
        ValueError: If the table has neither as many rows as classes nor one more.
    """
    table = tensors.get(_LABELS)
    if table is None or table.ndim != 2 or len(table) < 2:  # Missing and odd tables are told by `make`.
        return tensors, []
    rows, stated, dropout = len(table), settings.get("num_classes"), stated_number(settings, DROPOUT)
    never_dropped = dropout is not None and dropout[1] == 0
    classes = num_classes if num_classes is not None else stated
    notes = []
    if num_classes is not None and stated not in (None, num_classes):
        notes.append(f"the training arguments have num_classes = {stated}; --num-classes {num_classes} is used")
    if classes is None and never_dropped:
        classes = rows
    if classes is None:
        if dropout is None:
            notes.append(
                f"no file states the number of classes: the last of the {rows} rows of the label table is taken as the "
                f"null label; pass --num-classes {rows} if all rows are classes"
            )
    elif classes == rows:
        mean = table.float().mean(0, keepdim=True).to(table.dtype)
        tensors = tensors | {_LABELS: torch.cat([table, mean])}
        notes.append(
            f"all {rows} rows of the label table are classes, so the network has no null label: 'no label' is the mean "
            "of the classes, which it never saw in training; pass --condition label to give it the true labels"
        )
    elif classes != rows - 1:
        raise ValueError(
            f"the label table has {rows - 1} classes and a null label, not {classes} classes; pass the number of "
            "classes of the training data"
        )
    elif never_dropped:
        notes.append(
            "the null label was never trained, since no label was dropped in training; pass --condition label to give "
            "the network the true labels"
        )
    return tensors, notes
