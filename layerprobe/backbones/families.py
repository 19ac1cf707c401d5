"""The published families of diffusion transformers: from the tensors and arguments in a file to a backbone.

SiT, LayerSync, DispLoss and DiT files have the same names and shapes and differ in what time and output mean, which is
the family's schedule and prediction here. Training arguments that were saved with the weights can tell more.

Sources: the published training code of SiT (arXiv:2401.08740), LayerSync (arXiv:2510.12581), DispLoss
(arXiv:2506.09027), DiT (arXiv:2212.09748), REPA (arXiv:2410.06940), SRA (arXiv:2505.02831) and LightningDiT
(arXiv:2501.01423); MDM has its own in `mdm`.
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
# What the training scripts call their predictions.
PREDICTION_NAMES: dict[str, Prediction] = {"velocity": "velocity", "v": "velocity", "noise": "eps", "score": "score"}
# What they call a path that is not linear, by the schedule of the family on the linear path.
CURVED_PATHS: Mapping[tuple[str, str], Callable[[], NoiseSchedule]] = MappingProxyType(
    {("sit", "GVP"): GVP, ("sit", "VP"): VP, ("flow", "cosine"): lambda: GVP(data_time=0, noise_time=1)}
)


@dataclass(frozen=True, eq=False)
class Opened:
    """A network without weights, and the weights for it.

    Attributes:
        backbone: Its module is on the "meta" device: fill it with `load_state_dict(tensors, assign=True)`.
        tensors: The file's tensors by the module's names.
        unused: Names of the file's tensors that only training needs.
    """

    backbone: Backbone
    tensors: dict[str, Tensor]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """What the published training code of a family means.

    Attributes:
        title: For people.
        schedule: Name of the noise schedule.
        prediction: What the network gives.
        mark: A training argument that only this family's script has; None where it has none of its own.
        heads: How the names of tensors begin that only training needs.
        latents: What the training script feeds the network; samples have to be encoded and scaled alike.
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
        "mdm": Family("MDM", "ddpm-cosine", "x0", latents="motions, normalized as in the training data's code"),
    }
)


def recognize(tensors: Mapping[str, Tensor], args: Mapping[str, Any] = NO_ARGUMENTS) -> tuple[str, ...]:
    """The families that a file can be of: none for unknown networks, several where the user must say.

    Args:
        tensors: Tensors by name.
        args: Training arguments saved with them, such as `{"model": "SiT-XL/2", "path_type": "Linear"}`; for
            LightningDiT its configuration.
    """
    if recognize_mdm(tensors):
        return ("mdm",)
    patch, last = tensors.get("x_embedder.proj.weight"), tensors.get("final_layer.linear.weight")
    if patch is None or last is None:
        return ()
    # Sizes as products over slices of a shape, which any shape has.
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
    told = _told(args)
    return tuple(name for name in allowed if name in told) or allowed


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
    """The network that a family's file was saved from, behind the common convention.

    Args:
        family: One of `FAMILIES`.
        tensors: The file's tensors by name, without what wrappers of the network add to it. Only names and shapes are
            looked at.
        args: Training arguments saved with them, see `recognize`.
        num_heads: Needed where neither the width nor a tensor tells it.
        shape: Shape (C, *grid) of one input; needed where the grid is not square.
        num_classes: Checked against the file, which tells it.
        schedule: Where the model was trained otherwise than the published one; a schedule or its name.
        prediction: Likewise.

    Raises:
        ValueError: If the family is unknown, a tensor that tells the configuration is missing or misshapen, the
            arguments contradict the tensors, or training used a path or prediction that has no schedule here.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; use one of {', '.join(FAMILIES)}")
    if family == "mdm":
        if not recognize_mdm(tensors):
            raise ValueError(
                "this is no MDM: it has no input_process, output_process and embed_timestep; use its own file"
            )
        asked: dict[str, Any] = {"num_heads": num_heads, "shape": shape, "num_classes": num_classes}
        return Opened(*build_mdm(tensors, args=args, schedule=schedule, prediction=prediction, **asked))
    known, settings = FAMILIES[family], _settings(args)
    schedule, prediction = _convention(known, settings, schedule, prediction)
    unused = tuple(name for name in tensors if name.startswith(known.heads))
    kept = {name: tensor for name, tensor in tensors.items() if name not in unused}
    if family == "repa":
        kept = _without_decoder_blocks(kept)
    make: Callable[..., Backbone] = _lightningdit if family == "lightningdit" else _sit
    backbone = make(kept, known, num_heads=num_heads, shape=shape, schedule=schedule, prediction=prediction)
    _check_classes(backbone.num_classes, settings.get("num_classes") if num_classes is None else num_classes)
    return Opened(backbone, kept, unused)


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
    """Whether there is any of what LightningDiT adds to a SiT or leaves out of it."""
    modulation = tensors.get("blocks.0.adaLN_modulation.1.bias")
    added = (lightningdit.ROTARY, lightningdit.GATED_MLP, "blocks.0.norm1.weight")
    return any(name in tensors for name in added) or (modulation is not None and modulation.numel() == 4 * width)


def _told(args: Mapping[str, Any]) -> tuple[str, ...]:
    """The families whose training scripts have such arguments; all where they tell nothing."""
    marked = tuple(name for name, family in FAMILIES.items() if family.mark in args)
    if marked:
        return marked
    model, path = str(args.get("model")), args.get("path_type")
    if model.startswith("DiT"):
        return ("dit",)
    # SiT's script and its kin write "Linear"; REPA's and its kin, where time 1 is noise, write "linear".
    if model.startswith("SiT") and isinstance(path, str):
        return ("repa", "sra") if path.islower() else ("sit",)
    return tuple(FAMILIES)


def _settings(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in one level: LightningDiT saves a configuration with sections."""
    sections = [value for value in args.values() if isinstance(value, Mapping)]
    plain = {name: value for name, value in args.items() if not isinstance(value, Mapping)}
    return {name: value for section in (*sections, plain) for name, value in section.items()}


def _convention(
    family: Family, settings: Mapping[str, Any], schedule: NoiseSchedule | str | None, prediction: Prediction | None
) -> tuple[NoiseSchedule, Prediction]:
    """What the caller says, else what the training arguments say, else what the family's script does by default."""
    path, name = str(settings.get("path_type") or "linear"), settings.get("prediction") or family.prediction
    curved = CURVED_PATHS.get((family.schedule, path))
    if schedule is None and curved is not None:
        schedule = curved()
    if schedule is None and path.lower() != "linear":
        raise ValueError(
            f"this model was trained on the path {path!r}, which {family.title} does not have; pass --schedule"
        )
    if prediction is None:
        if name not in (*PREDICTION_NAMES, family.prediction):
            raise ValueError(
                f"this model was trained to predict {name!r}; only {', '.join(PREDICTION_NAMES)} are known"
            )
        prediction = PREDICTION_NAMES.get(name, family.prediction)
    if isinstance(schedule, NoiseSchedule):
        return schedule, prediction
    with torch.device("cpu"):  # Its tables have values, whatever device the caller makes networks on.
        return schedule_from_name(schedule or family.schedule), prediction


def _without_decoder_blocks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Early REPA files call the blocks after the aligned one `decoder_blocks` and count them from 0 again."""
    first = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    return {
        re.sub(r"^decoder_blocks\.(\d+)", lambda found: f"blocks.{first + int(found[1])}", name): tensor
        for name, tensor in tensors.items()
    }


def _check_classes(found: int, told: Any) -> None:
    """The null label is the last row of the label table, if there is one; one row alone is an unconditional model's."""
    if told in (None, found) or (told, found) == (1, 0):
        return
    if told == found + 1:
        raise ValueError(
            f'all {told} rows of the label table are classes: trained without label dropout, this model has no "no '
            'label" to be read under; pass --model with a forward of your own'
        )
    raise ValueError(
        f"the label table has {found} classes and a row for no label, not {told} classes; pass the number of the "
        "training data"
    )
