"""Guesses how to call diffusers classes without an entry in the class table, and measures their layers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.backbones.diffusers.diffusers_class import Config, DiffusersClass, Shape, Text
from layerprobe.backbones.diffusers.forward import DiffusersForward
from layerprobe.capture import as_tokens
from layerprobe.files import one_line
from layerprobe.memory import pass_on
from layerprobe.noise import NoiseSchedule

# Names of the width of the text in configurations.
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
GUESSED_LENGTH = 77  # number of text tokens


def guess_family(module: nn.Module, config: Config) -> DiffusersClass:
    """Guesses how to call a class without an entry, from the names of its arguments.

    Raises:
        ValueError: If the class needs an unknown argument, or is not a denoiser of one sample.
    """
    name, parameters = type(module).__name__, inspect.signature(module.forward).parameters
    width = next((config[key] for key in TEXT_WIDTHS if isinstance(config.get(key), int)), 0)
    pooled = config.get("pooled_projection_dim") or 0
    arguments: dict[str, Callable[[Text], Any]] = {}
    if width:
        arguments["encoder_hidden_states"] = lambda text: text.tokens
        arguments["encoder_attention_mask"] = lambda text: text.mask
    if pooled:
        arguments["pooled_projections"] = lambda text: text.pooled
    needed = [key for key, p in parameters.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    unknown = [key for key in needed if key not in (*arguments, "sample", "hidden_states", "timestep")]
    unknown += ["guidance"] if config.get("guidance_embeds") else []
    # Sequences (B, T, D) and (B, C, L) cannot be distinguished by their shapes.
    denoises = {"sample", "hidden_states"} & set(parameters) and "timestep" in parameters and "1D" not in name
    if unknown or not denoises or "in_channels" not in config:
        problem = f"needs the unknown argument {unknown[0]}" if unknown else "is not a denoiser of one sample"
        raise ValueError(
            f"{name} {problem}; wrap the module yourself, or fill in the entry of `layerprobe doctor --entry {name}`"
        )
    names = [key for key in arguments if key in parameters]
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
        arguments=lambda c, shape, text: {key: arguments[key](text) for key in names},
        times=None,
    )


@torch.inference_mode()
def measure_layers(
    module: nn.Module, forward: DiffusersForward, shape: Shape, schedule: NoiseSchedule
) -> tuple[tuple[str, ...], Callable[[Any, str], Tensor]]:
    """Finds the blocks in running order, and a function that extracts the image's tokens from their outputs.

    The image is the part of an output whose length stays the same when the text gets longer.

    Raises:
        ValueError: If the class cannot be called as guessed, or a block's output holds image and text in one sequence.
    """
    family, config, name = forward.family, forward.config, type(module).__name__
    widths = family.text(config) if family.text else (0, 0, 0)
    time = schedule.native_time(torch.full((1,), 0.5))
    runs = []
    for extra_tokens in (0, 1):
        text = Text.zeros(widths[0] + extra_tokens, *widths[1:])
        call = DiffusersForward(family, config, shape, text, forward.num_classes, forward.preconditioner)
        with _lengths(module) as lengths:
            try:
                call(module, torch.zeros(1, *shape), time, None)
            except Exception as error:  # A class without an entry may fail for any reason.
                pass_on(error)
                raise ValueError(
                    f"{name} does not run as guessed ({one_line(error)}); wrap the module yourself"
                ) from error
        runs.append(lengths)
    parts: dict[str, int] = {}
    for block, counts in runs[0].items():
        same = [i for i, (a, b) in enumerate(zip(counts, runs[1][block], strict=True)) if a == b and a is not None]
        if same:
            parts[block] = same[0]
        elif any(count != widths[0] for count in counts if count is not None):
            raise ValueError(f"{block} of {name} holds image and text in one sequence; wrap the module yourself")
    if not parts:
        raise ValueError(f"{name} has no list of blocks; wrap the module yourself")

    own_counts = {1, *(runs[0][block][part] for block, part in parts.items())}

    def tokens(output: Any, layer: str) -> Tensor:
        part = parts.get(layer, 0)
        found = as_tokens(output[part] if isinstance(output, (tuple, list)) else output, layer)
        if layer not in parts and found.shape[1] not in own_counts:
            raise ValueError(f"{layer} returns {found.shape[1]} tokens, not those of the sample; name another layer")
        return found

    return tuple(parts), tokens


@contextlib.contextmanager
def _lengths(module: nn.Module) -> Iterator[dict[str, list[int | None]]]:
    """Records, in running order, the token counts of the outputs of the blocks in the outermost lists."""
    lengths: dict[str, list[int | None]] = {}

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_: nn.Module, __: Any, output: Any) -> None:
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            lengths[name] = [
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
        yield lengths
    finally:
        for handle in handles:
            handle.remove()
    for name in [name for name, counts in lengths.items() if not any(counts)]:
        del lengths[name]
