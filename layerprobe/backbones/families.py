"""Builds backbones of the published families of diffusion transformers from a file's tensors and arguments.

SiT, LayerSync, DispLoss and DiT files have the same names and shapes, but differ in schedule and prediction target.
Training arguments saved with the weights can distinguish them.

Sources: the published training code of SiT (arXiv:2401.08740), LayerSync (arXiv:2510.12581), DispLoss
(arXiv:2506.09027), DiT (arXiv:2212.09748), REPA (arXiv:2410.06940), REPA-E (arXiv:2504.10483), SRA (arXiv:2505.02831)
and LightningDiT (arXiv:2501.01423); `mdm` names the source of MDM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from layerprobe.backbones import lightningdit, mdm, sit
from layerprobe.backbones.base import Backbone
from layerprobe.backbones.family import NO_ARGUMENTS, Family, Opened, build_transformer
from layerprobe.backbones.sit import SiT, sit_backbone
from layerprobe.backbones.without_values import unfilled
from layerprobe.messages import unknown
from layerprobe.noise import NoiseSchedule, Prediction


def recognize(tensors: Mapping[str, Tensor], args: Mapping[str, Any] = NO_ARGUMENTS) -> tuple[str, ...]:
    """Returns the families that a file may belong to: none for unknown networks, several if the user has to choose.

    Args:
        tensors: Tensors by name.
        args: Training arguments saved with them, such as `{"model": "SiT-XL/2", "path_type": "Linear"}`; for
            LightningDiT, its training configuration.
    """
    for name, family in FAMILIES.items():
        if family.recognizes is not None and family.recognizes(tensors):
            return (name,)
    patch, last = tensors.get("x_embedder.proj.weight"), tensors.get("final_layer.linear.weight")
    if patch is None or last is None:
        return ()
    # Products over slices of the shape, which exist for tensors of any shape.
    learn_sigma = last.shape[:1].numel() == 2 * patch.shape[1:].numel()
    if any(name.startswith(("projectors.", "decoder_blocks.", "bn.")) for name in tensors):
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
        raise ValueError(unknown("family", family, FAMILIES))
    make = FAMILIES[family].build or _build_sit
    return make(
        tensors,
        FAMILIES[family],
        args=args,
        num_heads=num_heads,
        shape=shape,
        num_classes=num_classes,
        schedule=schedule,
        prediction=prediction,
    )


def _build_sit(tensors: Mapping[str, Tensor], family: Family, **options: Any) -> Opened:
    return build_transformer(_sit, tensors, family, **options)


def _build_repa(tensors: Mapping[str, Tensor], family: Family, **options: Any) -> Opened:
    opened = build_transformer(_sit, _without_decoder_blocks(tensors), family, **options)
    return replace(opened, latents=_normalized_latents(tensors))


def _normalized_latents(tensors: Mapping[str, Tensor]) -> str:
    """Returns what REPA-E's network takes: latents normalized by the running statistics in front of it; else ""."""
    mean, variance = tensors.get("bn.running_mean"), tensors.get("bn.running_var")
    if mean is None or variance is None:
        return ""
    shift, scale = (
        ", ".join(f"{value:.4g}" for value in values.flatten().tolist()) for values in (mean, variance.rsqrt())
    )
    return f"unscaled latents z of the VAE in the file's training, as (z - {shift}) * {scale} per channel, from bn.*"


def _sit(
    tensors: Mapping[str, Tensor],
    family: Family,
    *,
    num_heads: int | None,
    shape: Sequence[int] | None,
    **convention: Any,
) -> Backbone:
    config = sit.config_from_state_dict(tensors, num_heads=num_heads, shape=shape)
    with unfilled():
        module = SiT(config)
    return sit_backbone(module, name=config.name.replace("SiT", family.title, 1), **convention)


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


def _without_decoder_blocks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames `decoder_blocks`, as early REPA files call the blocks after the aligned one, counted from 0 again."""
    first = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    return {
        re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{first + int(match[1])}", name): tensor
        for name, tensor in tensors.items()
    }


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "sit": Family("SiT", "sit", "velocity"),
        "layersync": Family("LayerSync", "sit", "velocity", mark="gt_encoder_depth"),
        "disploss": Family("DispLoss", "sit", "velocity", mark="disp"),
        "dit": Family("DiT", "ddpm-linear", "eps"),
        "repa": Family("REPA", "flow", "velocity", mark="proj_coeff", heads=("projectors.", "bn."), build=_build_repa),
        "sra": Family("SRA", "flow", "velocity", mark="block_out_s", heads=("ap_head.",)),
        "sra-dit": Family("SRA-DiT", "ddpm-linear", "eps", mark="block_out_s", heads=("ap_head.",)),
        "lightningdit": lightningdit.FAMILY,
        "mdm": mdm.FAMILY,
    }
)
