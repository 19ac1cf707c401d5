"""A tiny Motion Diffusion Model: the tensors of its file, and the network that is opened from them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from layerprobe.backbones.base import Backbone
from layerprobe.backbones.mdm import build_mdm

# As an official training leaves them, only smaller: 5 features, width 8, 3 blocks, 2 heads.
FEATURES, WIDTH, DEPTH, FRAMES, ACTIONS, TEXT = 5, 8, 3, 7, 4, 6
ARGS = {
    "arch": "trans_enc",
    "dataset": "humanml",
    "diffusion_steps": 1000,
    "noise_schedule": "cosine",
    "cond_mask_prob": 0.1,
    "num_heads": 2,
}


def state_dict(condition: str = "text", *, seed: int = 0) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "input_process.poseEmbedding.weight": (WIDTH, FEATURES),
        "input_process.poseEmbedding.bias": (WIDTH,),
        "output_process.poseFinal.weight": (FEATURES, WIDTH),
        "output_process.poseFinal.bias": (FEATURES,),
    }
    for i in (0, 2):
        shapes |= {
            f"embed_timestep.time_embed.{i}.weight": (WIDTH, WIDTH),
            f"embed_timestep.time_embed.{i}.bias": (WIDTH,),
        }
    for i in range(DEPTH):
        block = {
            "self_attn.in_proj_weight": (3 * WIDTH, WIDTH),
            "self_attn.in_proj_bias": (3 * WIDTH,),
            "self_attn.out_proj.weight": (WIDTH, WIDTH),
            "self_attn.out_proj.bias": (WIDTH,),
            "linear1.weight": (16, WIDTH),
            "linear1.bias": (16,),
            "linear2.weight": (WIDTH, 16),
            "linear2.bias": (WIDTH,),
        }
        block |= {f"norm{k}.{part}": (WIDTH,) for k in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"seqTransEncoder.layers.{i}.{name}": shape for name, shape in block.items()}
    if condition == "text":
        shapes |= {"embed_text.weight": (WIDTH, TEXT), "embed_text.bias": (WIDTH,)}
    if condition == "action":
        shapes["embed_action.action_embedding"] = (ACTIONS, WIDTH)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    positions = table(1000).float().unsqueeze(1)
    return tensors | dict.fromkeys(("sequence_pos_encoder.pe", "embed_timestep.sequence_pos_encoder.pe"), positions)


def table(rows: int) -> Tensor:
    """sin and cos of place / 10000^(2 i / width), in turn."""
    return torch.tensor(
        [
            [(math.sin, math.cos)[c % 2](row / 10000 ** ((c - c % 2) / WIDTH)) for c in range(WIDTH)]
            for row in range(rows)
        ],
        dtype=torch.float64,
    )


def opened(tensors: dict[str, Tensor], **options: Any) -> Backbone:
    backbone, wanted, _ = build_mdm(tensors, **{"args": ARGS, "shape": (FEATURES, FRAMES)} | options)
    assert all(parameter.is_meta for parameter in backbone.module.parameters())
    backbone.module.load_state_dict(wanted, assign=True)
    backbone.module.eval()
    return backbone
