"""LightningDiT: a SiT with rotary positions, RMS norms and a gated MLP, on a two-dimensional grid.

The state dict has the names and shapes of the official one. Native time 1 is data, as in SiT, whose transport code it
uses. Each of its changes to SiT leaves a trace in the tensors, so a file determines which of them it has.

Source: Yao & Wang 2025, "Reconstruction vs. Generation" (arXiv:2501.01423).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.backbones import sit
from layerprobe.backbones.base import Backbone
from layerprobe.backbones.family import Family, Opened, build_transformer
from layerprobe.backbones.heads import possible_heads
from layerprobe.backbones.sit import MLP, LabelEmbedder, PatchEmbed, SiTConfig, TimestepEmbedder
from layerprobe.backbones.stated import NAMED_SIZES, check_sizes, network_settings
from layerprobe.backbones.without_values import unfilled
from layerprobe.noise import LinearPath, NoiseSchedule, Prediction

ROTARY = "feat_rope.freqs_cos"
GATED_MLP = "blocks.0.mlp.w3.weight"


@dataclass(frozen=True)
class LightningDiTConfig:
    """The configuration of a LightningDiT.

    Attributes:
        trunk: Configuration in common with a SiT; with a gated MLP, `mlp_ratio` is the width of its inner layer over
            the width of a token.
        rotary: Whether queries and keys are rotated by their position on the grid.
        rms_norm: Whether norms are trained RMS norms instead of LayerNorms without weights.
        gated_mlp: Whether the MLP is SwiGLU instead of GELU.
        shift: Whether the condition shifts the activations that it scales.

    Raises:
        ValueError: If the grid is not two-dimensional, or the width of a head does not divide evenly over its axes.
    """

    trunk: SiTConfig
    rotary: bool = True
    rms_norm: bool = True
    gated_mlp: bool = True
    shift: bool = True

    def __post_init__(self) -> None:
        if len(self.trunk.grid) != 2:
            raise ValueError(f"LightningDiT takes samples of shape (C, height, width), got {self.trunk.shape}")
        if self.rotary and self.head_width % 4:
            raise ValueError(
                f"rotary positions need a head width that is a multiple of 4, got {self.head_width}; change num_heads"
            )

    @property
    def head_width(self) -> int:
        """The width of one attention head."""
        return self.trunk.hidden_size // self.trunk.num_heads


class LightningDiT(nn.Module):
    """The transformer that maps x_t, native time and labels to the prediction."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        trunk = config.trunk
        width, out_channels = trunk.hidden_size, trunk.shape[0] * (2 if trunk.learn_sigma else 1)
        self.config = config
        self.pos_embed = nn.Parameter(sit.sincos_position(width, trunk.grid), requires_grad=False)
        self.x_embedder = PatchEmbed(trunk)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(trunk.num_classes, width)
        self.feat_rope = RotaryPosition(trunk.grid, config.head_width) if config.rotary else None
        self.blocks = nn.ModuleList(LightningDiTBlock(config) for _ in range(trunk.depth))
        self.final_layer = FinalLayer(config, math.prod(trunk.patch) * out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Returns the prediction, shape of x.

        Args:
            x: Noisy samples, shape (B, C, *grid).
            t: Native times, shape (B,).
            y: Labels, shape (B,), with `num_classes` for "no label".
        """
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c, self.feat_rope)
        return sit.unpatchify(self.final_layer(tokens, c), config=self.config.trunk)


class RotaryPosition(nn.Module):
    """Rotates pairs of channels of (B, heads, T, head width) by angles proportional to the token's row and column.

    The first half of the pairs encodes the row, the second half the column. The tables are saved with the weights, as
    in the official code.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, grid: tuple[int, ...], head_width: int) -> None:
        super().__init__()
        rates = 10000 ** (-torch.arange(0, head_width // 2, 2, dtype=torch.float64) / (head_width // 2))
        axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
        angles = torch.cat([axis.reshape(-1, 1) * rates for axis in axes], dim=1).repeat_interleave(2, dim=1)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        rotated = torch.stack([-odd, even], dim=-1).flatten(-2)
        return x * self.freqs_cos + rotated * self.freqs_sin


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        width = config.trunk.hidden_size
        self.num_heads = config.trunk.num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = _head_norm(config), _head_norm(config)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: RotaryPosition | None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        mixed: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return mixed


class GatedMLP(nn.Module):
    """SwiGLU, (B, T, D) -> (B, T, D): w3(silu(first half of w12 x) * second half).

    Source: Shazeer 2020 (arXiv:2002.05202).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        output: Tensor = self.w3(F.silu(gate) * value)
        return output


class LightningDiTBlock(nn.Module):
    """Attention and MLP, each scaled, gated and usually shifted by the condition."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        width = config.trunk.hidden_size
        self.norm1 = _norm(config)
        self.attn = Attention(config)
        self.norm2 = _norm(config)
        self.mlp = (GatedMLP if config.gated_mlp else MLP)(width, int(width * config.trunk.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if config.shift else 4) * width))
        self.shift = config.shift

    def forward(self, x: Tensor, c: Tensor, rotary: RotaryPosition | None) -> Tensor:
        modulation = self.adaLN_modulation(c).unsqueeze(1)
        if self.shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        else:
            scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
            shift1 = shift2 = torch.zeros_like(scale1)
        x = x + gate1 * self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1), rotary)
        output: Tensor = x + gate2 * self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2))
        return output


class FinalLayer(nn.Module):
    """The modulated projection of tokens (B, T, D) to patches (B, T, patch**2 * C)."""

    def __init__(self, config: LightningDiTConfig, out_features: int) -> None:
        super().__init__()
        width = config.trunk.hidden_size
        self.norm_final = _norm(config)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        patches: Tensor = self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))
        return patches


def _norm(config: LightningDiTConfig) -> nn.Module:
    width = config.trunk.hidden_size
    return nn.RMSNorm(width, eps=1e-6) if config.rms_norm else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def _head_norm(config: LightningDiTConfig) -> nn.Module:
    if not config.trunk.qk_norm:
        return nn.Identity()
    return nn.RMSNorm(config.head_width, eps=1e-6) if config.rms_norm else nn.LayerNorm(config.head_width)


def lightningdit_backbone(
    module: LightningDiT,
    *,
    schedule: NoiseSchedule | None = None,
    prediction: Prediction = "velocity",
    name: str | None = None,
) -> Backbone:
    """Wraps a LightningDiT as a backbone; by default time 1 is data and the network predicts the velocity."""
    trunk = module.config.trunk
    return Backbone(
        module=module,
        layers=tuple(f"blocks.{i}" for i in range(trunk.depth)),
        schedule=schedule or LinearPath(),
        prediction=prediction,
        shape=trunk.shape,
        num_classes=trunk.num_classes,
        forward=sit.labeled,
        name=name or f"LightningDiT with {trunk.depth} blocks of width {trunk.hidden_size}, patch {trunk.patch_name}",
        num_heads=trunk.num_heads,
        # Rotary tables and the norms of queries and keys are as wide as a head.
        possible_heads=() if module.config.rotary or trunk.qk_norm else possible_heads(trunk.hidden_size),
    )


def config_from_state_dict(
    state_dict: Mapping[str, Tensor], *, num_heads: int | None = None, shape: Sequence[int] | None = None
) -> LightningDiTConfig:
    """Reads the configuration from an official state dict; arguments and errors as in `sit.config_from_state_dict`.

    Rotary tables determine the width of a head, so `num_heads` is rarely needed.
    """
    tensors = dict(state_dict)
    for name in (ROTARY, GATED_MLP):
        if name in tensors and (tensors[name].ndim != 2 or not tensors[name].numel()):
            raise ValueError(
                f"this is not a complete LightningDiT: {name} has shape {tuple(tensors[name].shape)}; "
                "use a complete state dict"
            )
    if GATED_MLP in tensors:  # Its last layer determines the inner width, as the first layer of a SiT's MLP does.
        tensors["blocks.0.mlp.fc1.weight"] = tensors[GATED_MLP].T
    width = tensors["pos_embed"].shape[-1:].numel() if "pos_embed" in tensors else 0
    rotary_heads = width // tensors[ROTARY].shape[1] if ROTARY in tensors else None
    if rotary_heads is not None and num_heads not in (None, rotary_heads):
        raise ValueError(f"{ROTARY} shows {rotary_heads} heads, not {num_heads}; leave --num-heads out")
    trunk = sit.config_from_state_dict(
        tensors,
        num_heads=next(
            (n for n in (num_heads, rotary_heads, dict(NAMED_SIZES.values()).get(width)) if n is not None), None
        ),
        shape=shape,
    )
    modulation = tensors.get("blocks.0.adaLN_modulation.1.bias")
    return LightningDiTConfig(
        trunk,
        rotary=ROTARY in tensors,
        rms_norm="blocks.0.norm1.weight" in tensors,
        gated_mlp=GATED_MLP in tensors,
        shift=modulation is None or modulation.numel() != 4 * width,
    )


def recognize_lightningdit(tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether these are the weights of a SiT with any of the changes of LightningDiT."""
    patch, modulation = tensors.get("x_embedder.proj.weight"), tensors.get("blocks.0.adaLN_modulation.1.bias")
    if patch is None or "final_layer.linear.weight" not in tensors:
        return False
    added = (ROTARY, GATED_MLP, "blocks.0.norm1.weight")
    shared = modulation is not None and modulation.numel() == 4 * patch.shape[:1].numel()
    return any(name in tensors for name in added) or shared


def _make(
    tensors: Mapping[str, Tensor],
    family: Family,
    *,
    num_heads: int | None,
    shape: Sequence[int] | None,
    **convention: Any,
) -> Backbone:
    config = config_from_state_dict(tensors, num_heads=num_heads, shape=shape)
    with unfilled():
        module = LightningDiT(config)
    return lightningdit_backbone(module, **convention)


def _build(tensors: Mapping[str, Tensor], family: Family, **options: Any) -> Opened:
    opened = build_transformer(_make, tensors, family, **options)
    config: Any = opened.backbone.module.config
    switches = {"use_rope": config.rotary, "use_swiglu": config.gated_mlp, "use_rmsnorm": config.rms_norm}
    switches |= {"wo_shift": not config.shift, "use_qknorm": config.trunk.qk_norm}
    check_sizes(network_settings(options["args"]), switches)
    return opened


FAMILY = Family(
    "LightningDiT",
    "sit",
    "velocity",
    mark="transport",
    latents="latents of the VA-VAE, (z - mean) / std by channel with the statistics of latents_stats.pt",
    recognizes=recognize_lightningdit,
    build=_build,
)
