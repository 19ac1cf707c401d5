"""The parameters of the published SiT, and its forward pass written out plainly."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from layerprobe.backbones.sit import SiTConfig


def plain_sit(weights: dict[str, Tensor], config: SiTConfig, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
    """SiT in two dimensions, written from the paper on a state dict: tokens after each block, then the output."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def normalized(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * (1 + scale[:, None]) + shift[:, None]

    def head_norm(name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in weights:
            return x
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(name: str, x: Tensor) -> Tensor:
        rows = []
        q, k, v = linear(f"{name}.qkv", x).chunk(3, -1)
        for head in range(config.num_heads):
            part = slice(head * (d := config.hidden_size // config.num_heads), (head + 1) * d)
            scores = head_norm(f"{name}.q_norm", q[..., part]) @ head_norm(f"{name}.k_norm", k[..., part]).mT
            weights_ = (scores / math.sqrt(d)).softmax(-1)
            rows.append(weights_ @ v[..., part])
        return linear(f"{name}.proj", torch.cat(rows, -1))

    (p, q), (rows, columns) = config.patch, config.grid
    kernel = weights["x_embedder.proj.weight"].flatten(1)
    patches = [x[:, :, i * p : i * p + p, j * q : j * q + q] for i in range(rows) for j in range(columns)]
    tokens = torch.stack([patch.flatten(1) @ kernel.T for patch in patches], 1) + weights["x_embedder.proj.bias"]
    tokens = tokens + weights["pos_embed"]
    angles = t[:, None] * 10000 ** (-torch.arange(128) / 128)
    time = F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1)))
    c = F.silu(linear("t_embedder.mlp.2", time) + weights["y_embedder.embedding_table.weight"][y])
    seen = []
    for i in range(config.depth):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", c).chunk(6, -1)
        tokens = tokens + gate1[:, None] * attend(f"{name}.attn", normalized(tokens, shift1, scale1))
        hidden = F.gelu(linear(f"{name}.mlp.fc1", normalized(tokens, shift2, scale2)), approximate="tanh")
        tokens = tokens + gate2[:, None] * linear(f"{name}.mlp.fc2", hidden)
        seen.append(tokens)
    out = linear("final_layer.linear", normalized(tokens, *linear("final_layer.adaLN_modulation.1", c).chunk(2, -1)))
    image = torch.empty(len(x), out.shape[-1] // (p * q), rows * p, columns * q)
    for i in range(rows):
        for j in range(columns):
            patch = out[:, i * columns + j].view(-1, p, q, image.shape[1]).permute(0, 3, 1, 2)
            image[:, :, i * p : i * p + p, j * q : j * q + q] = patch
    return [*seen, image[:, : config.shape[0]]]


# --- names and shapes


def official_shapes(
    *, depth: int, d: int, patch: int, edge: int, c: int, classes: int, sigma: bool = True
) -> dict[str, tuple[int, ...]]:
    """The state dict of the official SiT, DiT and LayerSync: names and shapes, in their order."""
    block = {
        "attn.qkv.weight": (3 * d, d),
        "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "mlp.fc1.weight": (4 * d, d),
        "mlp.fc1.bias": (4 * d,),
        "mlp.fc2.weight": (d, 4 * d),
        "mlp.fc2.bias": (d,),
        "adaLN_modulation.1.weight": (6 * d, d),
        "adaLN_modulation.1.bias": (6 * d,),
    }
    out = patch * patch * c * (2 if sigma else 1)
    return {
        "pos_embed": (1, (edge // patch) ** 2, d),
        "x_embedder.proj.weight": (d, c, patch, patch),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (classes + 1, d),
        **{f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()},
        "final_layer.linear.weight": (out, d),
        "final_layer.linear.bias": (out,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
