"""Builds backbones of the published families of diffusion transformers from a file's tensors and arguments.

SiT, LayerSync, DispLoss and DiT files have the same names and shapes, but differ in schedule and prediction target.
Training arguments saved with the weights can distinguish them.

Sources: the published training code of SiT (arXiv:2401.08740), LayerSync (arXiv:2510.12581), DispLoss
(arXiv:2506.09027), DiT (arXiv:2212.09748), REPA (arXiv:2410.06940), SRA (arXiv:2505.02831) and LightningDiT
(arXiv:2501.01423); `mdm` names the source of MDM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from layerprobe.backbones import lightningdit, sit
from layerprobe.backbones.base import Backbone
from layerprobe.backbones.lightningdit import LightningDiT, lightningdit_backbone
from layerprobe.backbones.mdm import build_mdm, recognize_mdm
from layerprobe.backbones.sit import SiT, sit_backbone
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
    """

    backbone: Backbone
    tensors: dict[str, Tensor]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """The convention of a family's published training code.

    Attributes:
        title: Name shown to the user.
        schedule: Name of the noise schedule.
        prediction: Prediction target of the network.
        mark: Training argument that only this family's script has; None if there is no such argument.
        heads: Prefixes of the names of tensors that only training needs.
        latents: Input of the network in training; samples must be encoded and scaled in the same way.
    """

    title: str
    schedule: str
    prediction: Prediction
    mark: str | None = None
    heads: tuple[str, ...] = ()
    latents: str = SD_LATENTS


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "sit": Family("SiT", "sit", "velocity"),
        "layersync": Family("LayerSync", "sit", "velocity", mark="gt_encoder_depth"),
        "disploss": Family("DispLoss", "sit", "velocity", mark="disp"),
        "dit": Family("DiT", "ddpm-linear", "eps"),
        "repa": Family("REPA", "flow", "velocity", mark="proj_coeff", heads=("projectors.",)),
        "sra": Family("SRA", "flow", "velocity", mark="block_out_s", heads=("ap_head.",)),
        "sra-dit": Family("SRA-DiT", "ddpm-linear", "eps", mark="block_out_s", heads=("ap_head.",)),
        "lightningdit": Family(
            "LightningDiT",
            "sit",
            "velocity",
            mark="transport",
            latents="latents of the VA-VAE, (z - mean) / std by channel with the statistics of latents_stats.pt",
        ),
        "mdm": Family("MDM", "ddpm-cosine", "x0", latents="motions, normalized as in the code of the training data"),
    }
)


def recognize(tensors: Mapping[str, Tensor], args: Mapping[str, Any] = NO_ARGUMENTS) -> tuple[str, ...]:
    """Returns the families that a file may belong to: none for unknown networks, several if the user has to choose.

    Args:
        tensors: Tensors by name.
        args: Training arguments saved with them, such as `{"model": "SiT-XL/2", "path_type": "Linear"}`; the
            configuration of a LightningDiT.
    """
    if recognize_mdm(tensors):
        return ("mdm",)
    patch, last = tensors.get("x_embedder.proj.weight"), tensors.get("final_layer.linear.weight")
    if patch is None or last is None:
        return ()
    # Products over slices of the shape, which exist for tensors of any shape.
    learn_sigma = last.shape[:1].numel() == 2 * patch.shape[1:].numel()
    if _is_lightningdit(tensors, width=patch.shape[:1].numel()):
        return ("lightningdit",)
    if any(name.startswith(("projectors.", "decoder_blocks.")) for name in tensors):
        return ("repa",)
    if any(name.startswith("ap_head.") for name in tensors):
        return ("sra-dit",) if learn_sigma else ("sra",)
    # Without the heads that only training needs, REPA and SRA files have the names of the others.
    qk_norm = any(".attn.q_norm." in name for name in tensors)
    allowed: tuple[str, ...]
    if learn_sigma:
        allowed = ("sra-dit",) if qk_norm else ("sit", "layersync", "disploss", "dit", "sra-dit")
    else:
        allowed = ("repa", "sra") if qk_norm else ("sit", "layersync", "disploss", "dit", "repa", "sra")
    candidates = _families_with_arguments(args)
    return tuple(name for name in allowed if name in candidates) or allowed


def build(
    family: str,
    tensors: Mapping[str, Tensor],
    *,
    args: Mapping[str, Any] = NO_ARGUMENTS,
    num_heads: int | None = None,
    shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    schedule: NoiseSchedule | str | None = None,
    prediction: Prediction | None = None,
) -> Opened:
    """Builds the network that a family's file was saved from, as a backbone without weights.

    Args:
        family: Name of the family, one of `FAMILIES`.
        tensors: Tensors of the file by name, without what wrappers of the network add to it. Only names and shapes are
            used.
        args: Training arguments saved with them, as in `recognize`.
        num_heads: Number of attention heads; needed if neither the width nor a tensor determines it.
        shape: Shape (C, *grid) of one input; needed if the grid is not square.
        num_classes: Number of classes, to check the file against.
        schedule: Schedule or its name, if the model was trained differently from the published one.
        prediction: Prediction target, in the same case.

    Raises:
        ValueError: If the family is unknown, a tensor that determines the configuration is missing or has a wrong
            shape, the arguments contradict the tensors, or training used an unknown path or prediction.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; use one of {', '.join(FAMILIES)}")
    if family == "mdm":
        if not recognize_mdm(tensors):
            raise ValueError(
                "this is not an MDM: it lacks input_process, output_process or embed_timestep; pass an MDM's file"
            )
        options: dict[str, Any] = {"num_heads": num_heads, "shape": shape, "num_classes": num_classes}
        return Opened(*build_mdm(tensors, args=args, schedule=schedule, prediction=prediction, **options))
    published, settings = FAMILIES[family], _settings(args)
    schedule, prediction = _convention(published, settings, schedule, prediction)
    unused = tuple(name for name in tensors if name.startswith(published.heads))
    network_tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    if family == "repa":
        network_tensors = _without_decoder_blocks(network_tensors)
    make: Callable[..., Backbone] = _lightningdit if family == "lightningdit" else _sit
    backbone = make(
        network_tensors, published, num_heads=num_heads, shape=shape, schedule=schedule, prediction=prediction
    )
    _check_classes(backbone.num_classes, settings.get("num_classes") if num_classes is None else num_classes)
    return Opened(backbone, network_tensors, unused)


def _sit(
    tensors: Mapping[str, Tensor],
    family: Family,
    *,
    num_heads: int | None,
    shape: Sequence[int] | None,
    **convention: Any,
) -> Backbone:
    config = sit.config_from_state_dict(tensors, num_heads=num_heads, shape=shape)
    with torch.device("meta"):
        module = SiT(config)
    return sit_backbone(module, name=config.name.replace("SiT", family.title, 1), **convention)


def _lightningdit(
    tensors: Mapping[str, Tensor],
    family: Family,
    *,
    num_heads: int | None,
    shape: Sequence[int] | None,
    **convention: Any,
) -> Backbone:
    config = lightningdit.config_from_state_dict(tensors, num_heads=num_heads, shape=shape)
    with torch.device("meta"):
        module = LightningDiT(config)
    return lightningdit_backbone(module, **convention)


def _is_lightningdit(tensors: Mapping[str, Tensor], *, width: int) -> bool:
    """Tests for any of the changes of LightningDiT to SiT."""
    modulation = tensors.get("blocks.0.adaLN_modulation.1.bias")
    added = (lightningdit.ROTARY, lightningdit.GATED_MLP, "blocks.0.norm1.weight")
    return any(name in tensors for name in added) or (modulation is not None and modulation.numel() == 4 * width)


def _families_with_arguments(args: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the families whose training scripts have such arguments; all families if none matches."""
    marked = tuple(name for name, family in FAMILIES.items() if family.mark in args)
    if marked:
        return marked
    model, path = str(args.get("model")), args.get("path_type")
    if model.startswith("DiT"):
        return ("dit",)
    # SiT's script and its forks write "Linear"; REPA's and its forks, in which time 1 is noise, write "linear".
    if model.startswith("SiT") and isinstance(path, str):
        return ("repa", "sra") if path.islower() else ("sit",)
    return tuple(FAMILIES)


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


def _without_decoder_blocks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames `decoder_blocks`, as early REPA files call the blocks after the aligned one, counted from 0 again."""
    first = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    return {
        re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{first + int(match[1])}", name): tensor
        for name, tensor in tensors.items()
    }


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
