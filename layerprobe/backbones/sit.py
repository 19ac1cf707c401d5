"""SiT, the scalable interpolant transformer, on 1-D, 2-D and 3-D grids: the backbone that layerprobe trains.

In two dimensions the state dict has the names and shapes of the official SiT, which DiT and LayerSync share. Tokens
are the patches in row-major order; there is no class token.

Source: Ma et al. 2024, SiT (arXiv:2401.08740); Peebles & Xie 2022, DiT (arXiv:2212.09748).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import floordiv
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.backbones.base import Backbone
from layerprobe.capture import real_tokens
from layerprobe.noise import LinearPath, NoiseSchedule, Prediction

# name: (depth, hidden size, heads); Table 1 of DiT.
PRESETS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PRESET_PATCH_SIZES = (2, 4, 8)
# name: (depth, hidden size, heads, most tokens); for small machines, with patches that suit the data.
SMALL_PRESETS = {"tiny": (8, 64, 4, 64), "small": (8, 128, 4, 256)}
FEWEST_TOKENS = 16
FREQUENCIES = 256


@dataclass(frozen=True)
class SiTConfig:
    """The shape of a SiT.

    Attributes:
        shape: Shape (C, *grid) of one input, one to three grid axes.
        patch_size: Edge of a patch along every grid axis, or one edge per axis.
        hidden_size: Width of a token.
        depth: Number of blocks.
        num_heads: Attention heads; divides hidden_size.
        num_classes: 0 for an unconditional model.
        mlp_ratio: Width of the MLP over the width of a token.
        learn_sigma: The official models give 2 C channels, the second half unused; ours give C.
        qk_norm: Queries and keys are normalized within each head, as REPA and SRA can.

    Raises:
        ValueError: If these make no network.
    """

    shape: tuple[int, ...]
    patch_size: int | tuple[int, ...] = 2
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    num_classes: int = 0
    mlp_ratio: float = 4.0
    learn_sigma: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not 2 <= len(self.shape) <= 4:
            raise ValueError(f"shape must be (C, *grid) with one to three grid axes, got {self.shape}")
        if not isinstance(self.patch_size, int):
            edges = tuple(self.patch_size)
            if len(edges) != len(self.shape) - 1:
                raise ValueError(
                    f"a patch of {'x'.join(map(str, edges))} does not fit the grid {self.shape[1:]}; pass one edge for "
                    "all axes, or one for each"
                )
            object.__setattr__(self, "patch_size", edges[0] if len(set(edges)) == 1 else edges)
        numbers = (*self.shape, *self.patch, self.hidden_size, self.depth, self.num_heads, self.num_classes + 1)
        if min(numbers) < 1:
            raise ValueError(f"shape, patch, width, depth and heads count from 1 and classes from 0, got {self}")
        if any(edge % step for edge, step in zip(self.shape[1:], self.patch, strict=True)):
            raise ValueError(
                f"the grid {self.shape[1:]} does not divide into patches of {self.patch_name}; change one of them"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden size {self.hidden_size} does not divide into {self.num_heads} heads; change one of them"
            )
        if self.hidden_size % 2 or self.hidden_size // 2 < len(self.shape) - 1:
            raise ValueError(
                f"hidden size {self.hidden_size} has no room for positions; pass an even one, at least 2 per grid axis"
            )

    @classmethod
    def preset(
        cls, name: str, *, shape: tuple[int, ...], num_classes: int = 0, patch_size: int | tuple[int, ...] | None = None
    ) -> SiTConfig:
        """ "S/2" to "XL/8": a size of the paper and a patch size; "tiny" and "small": a patch by `fitting_patch`.

        Args:
            name: Of the preset.
            shape: Shape (C, *grid) of one input.
            num_classes: 0 for an unconditional model.
            patch_size: Instead of the preset's.

        Raises:
            ValueError: If there is no such preset, or no patch that fits the grid.
        """
        if name in SMALL_PRESETS:
            depth, hidden_size, num_heads, most = SMALL_PRESETS[name]
            patch_size = fitting_patch(tuple(shape[1:]), most) if patch_size is None else patch_size
            return cls(shape, patch_size, hidden_size, depth, num_heads, num_classes)
        size, _, patch = name.partition("/")
        if size not in PRESETS or not patch.isdigit() or int(patch) not in PRESET_PATCH_SIZES:
            raise ValueError(
                f"unknown preset {name!r}; use {', '.join(SMALL_PRESETS)}, or one of {', '.join(PRESETS)} with patch "
                "size 2, 4 or 8, such as S/2"
            )
        depth, hidden_size, num_heads = PRESETS[size]
        return cls(shape, int(patch) if patch_size is None else patch_size, hidden_size, depth, num_heads, num_classes)

    @property
    def patch(self) -> tuple[int, ...]:
        """Edge of a patch along each axis."""
        return (self.patch_size,) * (len(self.shape) - 1) if isinstance(self.patch_size, int) else self.patch_size

    @property
    def patch_name(self) -> str:
        """For people: "2", or "1x4x4" where the axes differ."""
        return str(self.patch_size) if isinstance(self.patch_size, int) else "x".join(map(str, self.patch_size))

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of patches along each axis."""
        return tuple(edge // step for edge, step in zip(self.shape[1:], self.patch, strict=True))

    @property
    def name(self) -> str:
        """For people."""
        return f"SiT with {self.depth} blocks of width {self.hidden_size}, patch {self.patch_name}"

    def to_dict(self) -> dict[str, Any]:
        """What `SiTConfig(**...)` takes."""
        patch = self.patch_size if isinstance(self.patch_size, int) else list(self.patch_size)
        return asdict(self) | {"shape": list(self.shape), "patch_size": patch}


def fitting_patch(grid: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The patch that makes as many tokens as possible but not more than `most`; of several, the nearest to a cube.

    It divides the grid, is square on the last two axes and takes no more frames of a video than it is wide. Fewer than
    16 tokens are too few for attention to mean much, so they are only made where the grid has no more places.

    Args:
        grid: Of the samples, such as (L,), (H, W) or (F, H, W).
        most: Tokens of a sample.

    Raises:
        ValueError: If no patch makes 16 tokens to `most`.
    """
    divisors = [[step for step in range(1, edge + 1) if edge % step == 0] for edge in grid]
    square = (patch for patch in itertools.product(*divisors) if len(set(patch[-2:])) == 1 and patch[0] <= patch[-1])
    places = math.prod(grid)
    fewest = min(FEWEST_TOKENS, places)
    fitting = [patch for patch in square if fewest <= places // math.prod(patch) <= most]
    if not fitting:
        seen = "x".join(map(str, grid))
        raise ValueError(
            f"no {'square ' * (len(grid) > 1)}patch divides a grid of {seen} into {FEWEST_TOKENS} to {most} tokens; "
            "pass --patch-size, or another --length or --size"
        )
    return min(fitting, key=lambda patch: (math.prod(patch), max(patch) / min(patch)))


class SiT(nn.Module):
    """The transformer: x_t, native time and labels in, prediction out.

    A new SiT is an identity from block to block (adaLN-Zero), so all layers start equal.
    """

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        width, channels = config.hidden_size, config.shape[0]
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(config.grid), width), requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(config) for _ in range(config.depth))
        out_channels = channels * 2 if config.learn_sigma else channels
        self.final_layer = FinalLayer(width, math.prod(config.patch) * out_channels)
        self._initialize()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The prediction, like x.

        Args:
            x: Shape (B, C, *grid).
            t: Native times, shape (B,).
            y: Labels, shape (B,), with `num_classes` for "no label".
            mask: Shape (B, *grid), bool, True where a sample is real. No token attends to patches of padding alone,
                and the rest of the padding is seen as 0; so is what is given there.
        """
        keys = None
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(1), 0.0)
            keys = real_tokens(mask, self.config.grid)
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c) if keys is None else block(tokens, c, keys)
        output = unpatchify(self.final_layer(tokens, c), config=self.config)
        return output if mask is None else output.masked_fill(~mask.unsqueeze(1), 0.0)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.pos_embed.data.copy_(sincos_position(self.config.hidden_size, self.config.grid))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for index in (0, 2):
            nn.init.normal_(cast(nn.Linear, self.t_embedder.mlp[index]).weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
            nn.init.zeros_(layer.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)


class PatchEmbed(nn.Module):
    """(B, C, *grid) -> (B, T, D)."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        convolution: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(config.grid)]
        self.proj = convolution(config.shape[0], config.hidden_size, config.patch, stride=config.patch)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x)
        return patches.flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Native times (B,) -> (B, D): sinusoids and an MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t.float()[:, None] * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedded: Tensor = self.mlp(sinusoids.to(cast(nn.Linear, self.mlp[0]).weight.dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B, D); row `num_classes` means "no label". Who trains drops the labels."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_table(y)
        return embedded


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D), to the tokens of `keys`, (B, T) bool; to all without."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        seen = None if keys is None else keys[:, None, None]
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=seen)
        mixed: Tensor = self.proj(attended.transpose(1, 2).reshape(b, n, d))
        return mixed


class MLP(nn.Module):
    """Two layers around the tanh approximation of GELU, (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return output


class SiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, config.num_heads, qk_norm=config.qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, keys: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1), keys)
        output: Tensor = x + gate2 * self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2))
        return output


class FinalLayer(nn.Module):
    """The modulated projection of tokens (B, T, D) to patches (B, T, values of a patch * C)."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        patches: Tensor = self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))
        return patches


def unpatchify(tokens: Tensor, *, config: SiTConfig) -> Tensor:
    """The samples (B, C, *grid) that patches (B, T, values of a patch * C) make; learned sigma is left out."""
    grid, d = config.grid, len(config.grid)
    x = tokens.view(len(tokens), *grid, *config.patch, -1)
    # (B, g1..gd, p1..pd, C) -> (B, C, g1, p1, ..., gd, pd)
    order = [axis for i in range(d) for axis in (1 + i, 1 + d + i)]
    x = x.permute(0, 1 + 2 * d, *order).reshape(len(tokens), -1, *config.shape[1:])
    return x[:, : config.shape[0]]


def sincos_position(width: int, grid: tuple[int, ...]) -> Tensor:
    """Fixed sine-cosine position embedding, shape (1, T, width) with an even width, in row-major order of the patches.

    In two dimensions the first half of the channels encodes the column, as in MAE, DiT and SiT; so the axes are taken
    from the last to the first. Each has an equal share of the channels, the first axis also what does not divide.
    """
    pairs = [width // 2 // len(grid)] * len(grid)
    pairs[-1] += width // 2 - sum(pairs)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = []
    for axis, half in zip(reversed(axes), pairs, strict=True):
        frequencies = 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = axis.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).float().unsqueeze(0)


def sit_backbone(
    module: SiT, *, schedule: NoiseSchedule | None = None, prediction: Prediction = "velocity", name: str | None = None
) -> Backbone:
    """A SiT behind the common convention; by default the official one, time 1 is data and the velocity is predicted."""
    return Backbone(
        module=module,
        layers=tuple(f"blocks.{i}" for i in range(module.config.depth)),
        schedule=schedule or LinearPath(),
        prediction=prediction,
        shape=module.config.shape,
        num_classes=module.config.num_classes,
        forward=labeled,
        name=name or module.config.name,
        takes_mask=True,
        token_grid=module.config.grid,
    )


def new_sit(
    config: SiTConfig, *, seed: int, schedule: NoiseSchedule | None = None, prediction: Prediction = "velocity"
) -> Backbone:
    """A SiT with fresh weights that depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sit_backbone(SiT(config), schedule=schedule, prediction=prediction)


def fresh_sit(backbone: Backbone, seed: int) -> Backbone:
    """The same SiT, behind the same convention and on the same device, with fresh weights.

    Raises:
        ValueError: If it is no SiT: layerprobe does not know how other networks are initialized.
    """
    if not isinstance(backbone.module, SiT):
        raise ValueError(f"{backbone.name} cannot be initialized afresh; leave out --from-scratch")
    new = new_sit(backbone.module.config, seed=seed, schedule=backbone.schedule, prediction=backbone.prediction)
    new.module.to(backbone.device)
    return new


def network_record(backbone: Backbone) -> dict[str, Any]:
    """What a SiT is but for its weights, as JSON: shape, path and prediction."""
    assert isinstance(backbone.module, SiT)
    path = type(backbone.schedule).__name__
    return {"network": backbone.module.config.to_dict(), "path": path, "prediction": backbone.prediction}


def labeled(module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None, *mask: Tensor) -> Tensor:
    """Calls a network that always takes labels, and a mask where there is one."""
    if condition is None:  # An unconditional one still has the row for "no label".
        condition = torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)
    output: Tensor = module(x_t, native_time, condition, *mask)
    return output


def config_from_state_dict(
    state_dict: Mapping[str, Tensor], *, num_heads: int | None = None, shape: Sequence[int] | None = None
) -> SiTConfig:
    """The configuration of a state dict with the names of the official SiT, which many families share.

    Args:
        state_dict: Tensors by name; those of other names are not looked at.
        num_heads: Needed where the width is not one of the presets and no normalized queries tell a head's width:
            heads leave no other trace in the shapes.
        shape: Shape (C, *grid) of one input, needed where the grid is not square.

    Raises:
        ValueError: If the number of heads or the grid is unknown or contradicts the tensors, or a tensor is missing or
            misshapen.
    """
    for name, axes in _TELLING.items():
        if name == _HEAD_NORM and name not in state_dict:
            continue
        if name not in state_dict or state_dict[name].ndim not in axes or not state_dict[name].numel():
            seen = f"has shape {tuple(state_dict[name].shape)}" if name in state_dict else "is missing"
            raise ValueError(f"this is no whole SiT or DiT: {name} {seen}; use a whole state dict")
    patch_weight = state_dict["x_embedder.proj.weight"]
    (width, channels), patch = patch_weight.shape[:2], tuple(patch_weight.shape[2:])
    mlp_width = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
    mlp_ratio = mlp_width / width
    if int(width * mlp_ratio) < mlp_width:  # The network rounds down, and the quotient was rounded too.
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    out_channels = state_dict["final_layer.linear.weight"].shape[0] // math.prod(patch)
    return SiTConfig(
        shape=_shape(channels, patch, state_dict["pos_embed"].shape[1], shape),
        patch_size=patch,
        hidden_size=width,
        depth=len({key.split(".")[1] for key in state_dict if key.startswith("blocks.")}),
        num_heads=_heads(state_dict, width, num_heads),
        num_classes=state_dict["y_embedder.embedding_table.weight"].shape[0] - 1,
        mlp_ratio=mlp_ratio,
        learn_sigma=out_channels == 2 * channels,
        qk_norm=_HEAD_NORM in state_dict,
    )


def _heads(state_dict: Mapping[str, Tensor], width: int, given: int | None) -> int:
    found = width // state_dict[_HEAD_NORM].shape[0] if _HEAD_NORM in state_dict else None
    if found is not None and given not in (None, found):
        raise ValueError(f"{_HEAD_NORM} tells that there are {found} heads, not {given}; leave --num-heads out")
    presets = {preset_width: preset_heads for _, preset_width, preset_heads in PRESETS.values()}
    heads = next((n for n in (given, found, presets.get(width)) if n is not None), None)
    if heads is None:
        raise ValueError(f"width {width} is no preset's, so the number of heads is unknown; pass --num-heads")
    return heads


def _shape(channels: int, patch: tuple[int, ...], num_tokens: int, given: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one input: the given one, or a square of as many patches as there are positions."""
    edge, cube = round(num_tokens ** (1 / len(patch))), len(set(patch)) == 1
    if given is None and (edge ** len(patch) != num_tokens or not cube):
        grid = "no square grid" if cube else f"no known grid of {'x'.join(map(str, patch))} patches"
        raise ValueError(f"pos_embed has {num_tokens} places, which make {grid}; pass --shape")
    shape = (channels, *(edge * step for step in patch)) if given is None else tuple(given)
    whole = len(shape) == len(patch) + 1
    if not whole or shape[0] != channels or math.prod(map(floordiv, shape[1:], patch)) != num_tokens:
        raise ValueError(
            f"shape {shape} does not fit {channels} channels and {num_tokens} patches of "
            f"{patch[0] if cube else 'x'.join(map(str, patch))}; pass the shape of the training data"
        )
    return shape


_HEAD_NORM = "blocks.0.attn.q_norm.weight"
# The tensors that tell a configuration, and how many axes each may have.
_TELLING = {
    "x_embedder.proj.weight": (3, 4, 5),
    "pos_embed": (3,),
    "final_layer.linear.weight": (2,),
    "y_embedder.embedding_table.weight": (2,),
    "blocks.0.mlp.fc1.weight": (2,),
    _HEAD_NORM: (1,),  # Where queries and keys are normalized.
}
