"""Diffusers classes without an entry in the class table: their call is guessed and their layers are measured."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.backbones.diffusers.class_table import Config, DiffusersClass, Shape, Text
from layerprobe.backbones.diffusers.folders import first_line
from layerprobe.backbones.diffusers.forward import DiffusersForward
from layerprobe.capture import as_tokens
from layerprobe.noise import NoiseSchedule

# --- Classes without an entry of their own

# Under which names configurations keep the width of the text, and the number of tokens that stands for an empty one.
TEXT_WIDTHS = (
    "encoder_hid_dim",
    "caption_channels",
    "text_embed_dim",
    "text_dim",
    "context_in_dim",
    "cap_feat_dim",
    "text_in_channels",
    "joint_attention_dim",
    "cross_attention_input_dim",
    "cross_attention_dim",
)
GUESSED_LENGTH = 77


def guess_family(module: nn.Module, config: Config) -> DiffusersClass:
    """How to call a class that has no entry, from the names of its arguments; ValueError where they say too little."""
    name, takes = type(module).__name__, inspect.signature(module.forward).parameters
    width = next((config[key] for key in TEXT_WIDTHS if isinstance(config.get(key), int)), 0)
    pooled = config.get("pooled_projection_dim") or 0
    known: dict[str, Callable[[Text], Any]] = {}
    if width:
        known["encoder_hidden_states"] = lambda text: text.tokens
        known["encoder_attention_mask"] = lambda text: text.mask
    if pooled:
        known["pooled_projections"] = lambda text: text.pooled
    needed = [key for key, value in takes.items() if value.default is value.empty and value.kind != value.VAR_KEYWORD]
    strange = [key for key in needed if key not in (*known, "sample", "hidden_states", "timestep")]
    strange += ["guidance"] if config.get("guidance_embeds") else []
    # Sequences (B, T, D) and (B, C, L) cannot be told apart by their shapes.
    denoises = {"sample", "hidden_states"} & set(takes) and "timestep" in takes and "1D" not in name
    if strange or not denoises or "in_channels" not in config:
        what = f"wants {strange[0]}" if strange else "is no denoiser of one sample"
        raise ValueError(f"{name} {what}, which layerprobe cannot give; wrap the module yourself")
    given = [key for key in known if key in takes]
    edges = config.get("patch_size") or 1
    axes = 3 if "3D" in name else 2
    patch = tuple(edges) if isinstance(edges, (tuple, list)) else (edges,) * axes
    if axes == 3 and isinstance(edges, int):
        patch = (config.get("patch_size_t") or 1, edges, edges)
    size = config.get("sample_size")
    return DiffusersClass(
        layers=(),
        patch=lambda c: patch,
        size=lambda c: (c.in_channels, *(size,) * axes) if isinstance(size, int) and axes < 3 else None,
        text=(lambda c: (GUESSED_LENGTH, width, pooled)) if width else None,
        arguments=lambda c, shape, text: {key: known[key](text) for key in given},
        times=None,
    )


@torch.inference_mode()
def measure_layers(
    module: nn.Module, forward: DiffusersForward, shape: Shape, schedule: NoiseSchedule
) -> tuple[tuple[str, ...], Callable[[Any, str], Tensor]]:
    """The blocks that run, in that order, and the part of their outputs whose length does not follow the text's.

    Raises:
        ValueError: If the class cannot be called as guessed, or a block's output holds image and text in one sequence.
    """
    family, config, name = forward.family, forward.config, type(module).__name__
    widths = family.text(config) if family.text else (0, 0, 0)
    time = schedule.native_time(torch.full((1,), 0.5))
    runs = []
    for extra in (0, 1):
        text = Text.zeros(widths[0] + extra, *widths[1:])
        longer = DiffusersForward(family, config, shape, text, forward.num_classes, forward.preconditioner)
        with _lengths(module) as lengths:
            try:
                longer(module, torch.zeros(1, *shape), time, None)
            except Exception as error:  # Whatever a class without an entry fails of.
                raise ValueError(
                    f"{name} does not run as guessed ({first_line(error)}); wrap the module yourself"
                ) from error
        runs.append(lengths)
    parts: dict[str, int] = {}
    for block, before in runs[0].items():
        same = [i for i, (a, b) in enumerate(zip(before, runs[1][block], strict=True)) if a == b and a is not None]
        if same:
            parts[block] = same[0]
        elif any(length != widths[0] for length in before if length is not None):
            raise ValueError(f"{block} of {name} holds image and text in one sequence; wrap the module yourself")
    if not parts:
        raise ValueError(f"{name} has no list of blocks; wrap the module yourself")

    def tokens(output: Any, layer: str) -> Tensor:
        part = parts.get(layer, 0)
        return as_tokens(output[part] if isinstance(output, (tuple, list)) else output, layer)

    return tuple(parts), tokens


@contextlib.contextmanager
def _lengths(module: nn.Module) -> Iterator[dict[str, list[int | None]]]:
    """Records, in order, the token counts of what the blocks of the outermost lists give."""
    found: dict[str, list[int | None]] = {}

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_: nn.Module, __: Any, output: Any) -> None:
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            found[name] = [
                as_tokens(o, name).shape[1] if isinstance(o, Tensor) and o.ndim > 2 and len(o) == 1 else None
                for o in outputs
            ]

        return record

    lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    outer = [*lists, "mid_block"]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in outer)]
    blocks = [f"{name}.{i}" for name in outermost for i in range(len(module.get_submodule(name)))]  # type: ignore[arg-type]
    blocks += ["mid_block"] if isinstance(getattr(module, "mid_block", None), nn.Module) else []
    handles = [module.get_submodule(name).register_forward_hook(recorder(name)) for name in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name in [name for name, lengths in found.items() if not any(lengths)]:
        del found[name]
