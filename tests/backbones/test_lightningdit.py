"""LightningDiT against a forward pass written by hand, its official names and shapes, and what rotations promise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from layerprobe.backbones.base import layer_shapes
from layerprobe.backbones.families import build
from layerprobe.backbones.lightningdit import (
    LightningDiT,
    LightningDiTConfig,
    RotaryPosition,
    config_from_state_dict,
    lightningdit_backbone,
)
from layerprobe.backbones.sit import SiTConfig
from layerprobe.capture import capture

TRUNK = SiTConfig((3, 4, 4), patch_size=1, hidden_size=48, depth=3, num_heads=3, num_classes=5, mlp_ratio=8 / 3)
PUBLISHED = LightningDiTConfig(TRUNK)
PLAIN = LightningDiTConfig(replace(TRUNK, mlp_ratio=4.0), rotary=False, rms_norm=False, gated_mlp=False, shift=False)
CONFIGS = {
    "published": PUBLISHED,
    "patch 2, normalized queries": replace(PUBLISHED, trunk=replace(TRUNK, patch_size=2, qk_norm=True)),
    "unequal axes": replace(PUBLISHED, trunk=replace(TRUNK, shape=(3, 6, 2))),
    "LayerNorm of queries": replace(PUBLISHED, rms_norm=False, trunk=replace(TRUNK, qk_norm=True)),
    "nothing but what SiT has not": PLAIN,
    "learned sigma": replace(PLAIN, rms_norm=True, trunk=replace(PLAIN.trunk, learn_sigma=True)),
}


def random_state(config: LightningDiTConfig) -> dict[str, Tensor]:
    """Every weight random; the rotary tables are no weights."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor if "feat_rope" in name else 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in LightningDiT(config).state_dict().items()
    }


def plain(weights: dict[str, Tensor], config: LightningDiTConfig, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
    """LightningDiT written from its paper on a state dict: tokens after each block, then the output."""
    trunk = config.trunk
    heads, p, (rows, columns) = trunk.num_heads, trunk.patch_size, trunk.grid
    d = trunk.hidden_size // heads

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        if config.rms_norm:
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()

    def head_norm(name: str, x: Tensor) -> Tensor:
        if not trunk.qk_norm or config.rms_norm:
            return norm(name, x) if trunk.qk_norm else x
        return norm(name, x, 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def turned(x: Tensor) -> Tensor:
        """Pairs of channels as complex numbers: a quarter of a head's width for the row, a quarter for the column."""
        rates = 10000 ** (-torch.arange(d // 4) / (d // 4))
        places = torch.arange(rows * columns)
        angles = torch.cat([(places // columns)[:, None] * rates, (places % columns)[:, None] * rates], 1)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def attend(name: str, x: Tensor) -> Tensor:
        seen = []
        for head in range(heads):
            q, k, v = (part[..., head * d : head * d + d] for part in linear(f"{name}.qkv", x).chunk(3, -1))
            q, k = head_norm(f"{name}.q_norm", q), head_norm(f"{name}.k_norm", k)
            if config.rotary:
                q, k = turned(q), turned(k)
            seen.append((q @ k.mT / math.sqrt(d)).softmax(-1) @ v)
        return linear(f"{name}.proj", torch.cat(seen, -1))

    def mlp(name: str, x: Tensor) -> Tensor:
        if not config.gated_mlp:
            return linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", x), approximate="tanh"))
        gate, value = linear(f"{name}.w12", x).chunk(2, -1)
        return linear(f"{name}.w3", gate * gate.sigmoid() * value)

    kernel = weights["x_embedder.proj.weight"].flatten(1)
    patches = [x[:, :, i * p : i * p + p, j * p : j * p + p] for i in range(rows) for j in range(columns)]
    tokens = torch.stack([patch.flatten(1) @ kernel.T for patch in patches], 1) + weights["x_embedder.proj.bias"]
    tokens = tokens + weights["pos_embed"]
    angles = t[:, None] * 10000 ** (-torch.arange(128) / 128)
    time = F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1)))
    c = F.silu(linear("t_embedder.mlp.2", time) + weights["y_embedder.embedding_table.weight"][y])[:, None]
    seen = []
    for i in range(trunk.depth):
        name = f"blocks.{i}"
        if config.shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", c).chunk(6, -1)
        else:
            scale1, gate1, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", c).chunk(4, -1)
            shift1, shift2 = 0 * scale1, 0 * scale2
        tokens = tokens + gate1 * attend(f"{name}.attn", norm(f"{name}.norm1", tokens) * (1 + scale1) + shift1)
        tokens = tokens + gate2 * mlp(f"{name}.mlp", norm(f"{name}.norm2", tokens) * (1 + scale2) + shift2)
        seen.append(tokens)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, -1)
    out = linear("final_layer.linear", norm("final_layer.norm_final", tokens) * (1 + scale) + shift)
    image = out.view(len(x), rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *trunk.shape[1:])
    return [*seen, image[:, : trunk.shape[0]]]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_blocks_and_velocity_equal_a_forward_pass_written_by_hand(config: LightningDiTConfig) -> None:
    """Time 1 is data and the network gives data - noise, as in SiT."""
    tensors = random_state(config)
    opened = build("lightningdit", tensors, num_heads=3, shape=config.trunk.shape)
    backbone = opened.backbone
    backbone.module.load_state_dict(opened.tensors, assign=True)
    backbone.module.eval()
    x, labels, level = torch.randn(2, *config.trunk.shape), torch.tensor([0, 4]), torch.tensor([0.2, 0.7])
    for condition, rows in ((labels, labels), (None, torch.tensor([5, 5]))):
        with capture(backbone.module, backbone.layers) as outputs:
            velocity = backbone(x, level, condition)
        *blocks, output = plain(tensors, config, x, 1 - level, rows)
        for got, wanted in zip(outputs.values(), blocks, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(velocity, -output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_configuration_is_found_from_the_tensors(config: LightningDiTConfig) -> None:
    assert config_from_state_dict(random_state(config), num_heads=3, shape=config.trunk.shape) == config


def test_names_and_shapes_are_the_official_ones() -> None:
    d, inner, head = 48, 128, 16
    block = {
        "norm1.weight": (d,),
        "attn.qkv.weight": (3 * d, d),
        "attn.qkv.bias": (3 * d,),
        "attn.q_norm.weight": (head,),
        "attn.k_norm.weight": (head,),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "norm2.weight": (d,),
        "mlp.w12.weight": (2 * inner, d),
        "mlp.w12.bias": (2 * inner,),
        "mlp.w3.weight": (d, inner),
        "mlp.w3.bias": (d,),
        "adaLN_modulation.1.weight": (6 * d, d),
        "adaLN_modulation.1.bias": (6 * d,),
    }
    wanted = {
        "pos_embed": (1, 16, d),
        "x_embedder.proj.weight": (d, 3, 1, 1),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (6, d),
        "feat_rope.freqs_cos": (16, head),
        "feat_rope.freqs_sin": (16, head),
        **{f"blocks.{i}.{name}": shape for i in range(3) for name, shape in block.items()},
        "final_layer.norm_final.weight": (d,),
        "final_layer.linear.weight": (3, d),
        "final_layer.linear.bias": (3,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    module = LightningDiT(replace(PUBLISHED, trunk=replace(TRUNK, qk_norm=True)))
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == wanted


def test_rotary_products_depend_on_the_distance_only() -> None:
    rotary = RotaryPosition((4, 5), 16)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    scores = (rotary(q.expand(20, 16)) @ rotary(k.expand(20, 16)).T).view(4, 5, 4, 5)
    torch.testing.assert_close(scores[:-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:])
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0])  # the two axes are told apart
    torch.testing.assert_close(rotary(q.expand(20, 16)).norm(dim=1), q.norm().expand(20))


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1152, 16), (1536, 24), (1792, 28)])
def test_heads_of_the_published_sizes(width: int, heads: int) -> None:
    trunk = replace(TRUNK, hidden_size=width, depth=1, num_heads=heads)
    with torch.device("meta"):
        rotary = LightningDiT(LightningDiTConfig(trunk)).state_dict()
        fixed = LightningDiT(LightningDiTConfig(trunk, rotary=False)).state_dict()
    assert config_from_state_dict(rotary).trunk.num_heads == heads
    assert config_from_state_dict(fixed).trunk.num_heads == heads


def test_rotary_tables_tell_the_number_of_heads() -> None:
    tensors = random_state(PUBLISHED)
    assert config_from_state_dict(tensors) == PUBLISHED
    with pytest.raises(ValueError, match=r"^feat_rope.freqs_cos shows 3 heads, not 4; leave --num-heads"):
        config_from_state_dict(tensors, num_heads=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3, 16)}, r"^LightningDiT takes samples of shape \(C, height, width\), got \(3, 16\)$"),
        ({"num_heads": 8}, r"^rotary positions need a head width that is a multiple of 4, got 6; change num_heads$"),
    ],
)
def test_configurations_that_make_no_network_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LightningDiTConfig(replace(TRUNK, **change))


def test_backbone() -> None:
    backbone = lightningdit_backbone(LightningDiT(PUBLISHED))
    assert backbone.name == "LightningDiT with 3 blocks of width 48, patch 1"
    assert layer_shapes(backbone) == {f"blocks.{i}": (16, 48) for i in range(3)}
    unconditional = lightningdit_backbone(LightningDiT(replace(PUBLISHED, trunk=replace(TRUNK, num_classes=0))))
    assert unconditional.null_condition(2) is None
    assert unconditional(torch.zeros(2, 3, 4, 4), torch.tensor([0.1, 0.9])).shape == (2, 3, 4, 4)
