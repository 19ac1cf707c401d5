"""SiT, the scalable interpolant transformer, on 1-D, 2-D and 3-D grids: the backbone that layerprobe trains.

In two dimensions the state dict has the names and shapes of the official SiT, which DiT and LayerSync share. Tokens
are the patches in row-major order; there is no class token.

Source: Ma et al. 2024, SiT (arXiv:2401.08740); Peebles & Xie 2022, DiT (arXiv:2212.09748).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import floordiv
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.backbones.base import Backbone
from layerprobe.backbones.heads import possible_heads
from layerprobe.capture import real_tokens
from layerprobe.messages import did_you_mean
from layerprobe.noise import LinearPath, NoiseSchedule, Prediction

# name: (depth, hidden size, heads); Table 1 of DiT.
PRESETS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PRESET_PATCH_SIZES = (2, 4, 8)
# name: (depth, hidden size, heads, maximum tokens); for small machines, with patches chosen for the data.
SMALL_PRESETS = {"tiny": (8, 64, 4, 64), "small": (8, 128, 4, 256)}
MIN_TOKENS = 16
FREQUENCIES = 256
MAX_DEPTH, MAX_VALUES = 1000, 2**31  # beyond these a configuration is damaged, or would exhaust the memory


@dataclass(frozen=True)
class SiTConfig:
    """The configuration of a SiT.

    Attributes:
        shape: Shape (C, *grid) of one input, one to three grid axes.
        patch_size: Edge of a patch along every grid axis, or one edge per axis.
        hidden_size: Width of a token.
        depth: Number of blocks.
        num_heads: Number of attention heads; divides hidden_size.
        num_classes: Number of classes; 0 for an unconditional model.
        mlp_ratio: Width of the MLP over the width of a token.
        learn_sigma: Whether the output has 2 C channels with an unused second half, as in the official models, instead
            of C.
        qk_norm: Whether queries and keys are normalized within each head, as is optional in REPA and SRA.

    Raises:
        ValueError: If a value is out of its range, or the values do not fit together.
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
                    "all axes, or one edge per axis"
                )
            object.__setattr__(self, "patch_size", edges[0] if len(set(edges)) == 1 else edges)
        sizes = (*self.shape, *self.patch, self.hidden_size, self.depth, self.num_heads, self.num_classes)
        if not all(type(size) is int for size in sizes) or not 0 < self.mlp_ratio <= 64:
            raise ValueError(f"sizes must be whole numbers, and mlp_ratio above 0 and at most 64, got {self}")
        numbers = (*sizes[:-1], self.num_classes + 1)
        if min(numbers) < 1:
            raise ValueError(
                f"shape, patch, width, depth and heads must be at least 1, and classes at least 0, got {self}"
            )
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
                f"hidden size {self.hidden_size} is odd or too small for positions; pass an even one, at least 2 per "
                "grid axis"
            )
        rows = max(math.prod(self.grid), self.num_classes, self.depth * self.hidden_size)
        if self.depth > MAX_DEPTH or rows * self.hidden_size > MAX_VALUES:
            raise ValueError(
                f"a network of {math.prod(self.grid)} tokens, width {self.hidden_size}, depth {self.depth} and "
                f"{self.num_classes} classes is larger than any that exists; check the sizes"
            )

    @classmethod
    def preset(
        cls, name: str, *, shape: tuple[int, ...], num_classes: int = 0, patch_size: int | tuple[int, ...] | None = None
    ) -> SiTConfig:
        """Returns the configuration of a preset.

        Args:
            name: Name of the preset: "S/2" to "XL/8", a size of the paper and a patch size; or "tiny" or "small", with
                a patch by `fitting_patch`.
            shape: Shape (C, *grid) of one input.
            num_classes: Number of classes; 0 for an unconditional model.
            patch_size: Patch size to use instead of the preset's.

        Raises:
            ValueError: If the preset is unknown, or no patch fits the grid.
        """
        if name in SMALL_PRESETS:
            depth, hidden_size, num_heads, max_tokens = SMALL_PRESETS[name]
            patch_size = fitting_patch(tuple(shape[1:]), max_tokens) if patch_size is None else patch_size
            return cls(shape, patch_size, hidden_size, depth, num_heads, num_classes)
        size, _, patch = name.partition("/")
        if size not in PRESETS or not patch.isdigit() or int(patch) not in PRESET_PATCH_SIZES:
            known = [*SMALL_PRESETS, *(f"{size}/{patch}" for size in PRESETS for patch in PRESET_PATCH_SIZES)]
            raise ValueError(
                f"unknown preset {name!r}; use {', '.join(SMALL_PRESETS)}, or one of {', '.join(PRESETS)} with patch "
                f"size 2, 4 or 8, such as S/2{did_you_mean(name, known)}"
            )
        depth, hidden_size, num_heads = PRESETS[size]
        return cls(shape, int(patch) if patch_size is None else patch_size, hidden_size, depth, num_heads, num_classes)

    @property
    def patch(self) -> tuple[int, ...]:
        """The edge of a patch along each axis."""
        return (self.patch_size,) * (len(self.shape) - 1) if isinstance(self.patch_size, int) else self.patch_size

    @property
    def patch_name(self) -> str:
        """The patch size as text: "2", or "1x4x4" if the axes differ."""
        return str(self.patch_size) if isinstance(self.patch_size, int) else "x".join(map(str, self.patch_size))

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of patches along each axis."""
        return tuple(edge // step for edge, step in zip(self.shape[1:], self.patch, strict=True))

    @property
    def name(self) -> str:
        """The name shown to the user."""
        return f"SiT with {self.depth} blocks of width {self.hidden_size}, patch {self.patch_name}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the arguments of `SiTConfig` as a JSON-compatible dict."""
        patch = self.patch_size if isinstance(self.patch_size, int) else list(self.patch_size)
        return asdict(self) | {"shape": list(self.shape), "patch_size": patch}


def fitting_patch(grid: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """Returns the patch with the most tokens up to `max_tokens`; of several, the one nearest to a cube.

    The patch divides the grid, is square on the last two axes and covers no more frames of a video than it is wide.
    Attention needs at least 16 tokens; smaller numbers are used only if the grid has fewer positions.

    Args:
        grid: Grid of a sample, such as (L,), (H, W) or (F, H, W).
        max_tokens: Maximum number of tokens of a sample.

    Raises:
        ValueError: If no patch makes 16 to `max_tokens` tokens.
    """
    divisors = [[step for step in range(1, edge + 1) if edge % step == 0] for edge in grid]
    square = (patch for patch in itertools.product(*divisors) if len(set(patch[-2:])) == 1 and patch[0] <= patch[-1])
    num_positions = math.prod(grid)
    min_tokens = min(MIN_TOKENS, num_positions)
    fitting = [patch for patch in square if min_tokens <= num_positions // math.prod(patch) <= max_tokens]
    if not fitting:
        raise ValueError(
            f"no {'square ' * (len(grid) > 1)}patch divides a grid of {'x'.join(map(str, grid))} into {MIN_TOKENS} "
            f"to {max_tokens} tokens; pass --patch-size, or another --length or --size"
        )
    return min(fitting, key=lambda patch: (math.prod(patch), max(patch) / min(patch)))


class SiT(nn.Module):
    """The transformer that maps x_t, native time and labels to the prediction.

    Every block of a new SiT is the identity (adaLN-Zero), so all layers start equal.
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
        """Returns the prediction, shape of x.

        Args:
            x: Noisy samples, shape (B, C, *grid).
            t: Native times, shape (B,).
            y: Labels, shape (B,), with `num_classes` for "no label".
            mask: Mask, shape (B, *grid), bool, True outside of padding. No token attends to patches that are all
                padding; other padding is set to 0 in the input and the output.
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
    """Embedding of patches, (B, C, *grid) -> (B, T, D)."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        convolution: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(config.grid)]
        self.proj = convolution(config.shape[0], config.hidden_size, config.patch, stride=config.patch)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x)
        return patches.flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Embedding of native times, (B,) -> (B, D): sinusoids and an MLP."""

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
    """Embedding of labels, (B,) -> (B, D); row `num_classes` means "no label". Label dropout is up to the trainer."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_table(y)
        return embedded


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D), to the tokens in the mask `keys`, (B, T), or to all."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        mask = None if keys is None else keys[:, None, None]
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=mask)
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
    """The modulated projection of tokens (B, T, D) to patches (B, T, patch * C)."""

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
    """Joins patches (B, T, patch * C) to samples (B, C, *grid), without the channels of a learned sigma."""
    grid, d = config.grid, len(config.grid)
    x = tokens.view(len(tokens), *grid, *config.patch, -1)
    # (B, g1..gd, p1..pd, C) -> (B, C, g1, p1, ..., gd, pd)
    order = [axis for i in range(d) for axis in (1 + i, 1 + d + i)]
    x = x.permute(0, 1 + 2 * d, *order).reshape(len(tokens), -1, *config.shape[1:])
    return x[:, : config.shape[0]]


def sincos_position(width: int, grid: tuple[int, ...]) -> Tensor:
    """Returns the fixed sine-cosine position embedding, shape (1, T, width), in row-major order of the patches.

    In two dimensions the first half of the channels encodes the column, as in MAE, DiT and SiT; so the axes run from
    the last to the first. Each axis has an equal share of the channels; the first axis also gets the remainder. The
    width must be even.
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
    """Wraps a SiT as a backbone; by default, as in the official code, time 1 is data and it predicts the velocity."""
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
        num_heads=module.config.num_heads,
        # The norms of queries and keys are as wide as a head.
        possible_heads=() if module.config.qk_norm else possible_heads(module.config.hidden_size),
    )


def new_sit(
    config: SiTConfig, *, seed: int, schedule: NoiseSchedule | None = None, prediction: Prediction = "velocity"
) -> Backbone:
    """Returns a SiT with fresh weights that depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sit_backbone(SiT(config), schedule=schedule, prediction=prediction)


def fresh_sit(backbone: Backbone, seed: int) -> Backbone:
    """Returns the same SiT with fresh weights, in the same convention and on the same device.

    Raises:
        ValueError: If the network is not a SiT: layerprobe cannot initialize other networks.
    """
    if not isinstance(backbone.module, SiT):
        raise ValueError(
            f"{backbone.name} is not a SiT, so its weights cannot be initialized again; leave out --from-scratch"
        )
    new = new_sit(backbone.module.config, seed=seed, schedule=backbone.schedule, prediction=backbone.prediction)
    new.module.to(backbone.device)
    return replace(new, precision=backbone.precision)


def network_record(backbone: Backbone) -> dict[str, Any]:
    """Describes a SiT without its weights, as JSON: configuration, path and prediction target."""
    assert isinstance(backbone.module, SiT)
    path = type(backbone.schedule.own).__name__
    record = {"network": backbone.module.config.to_dict(), "path": path, "prediction": backbone.prediction}
    return record | ({} if backbone.value_range == (-1, 1) else {"value_range": list(backbone.value_range)})


def labeled(module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None, *mask: Tensor) -> Tensor:
    """Calls a network that always takes labels, with a mask if there is one."""
    if condition is None:  # The label table of an unconditional model still has the row for "no label".
        condition = torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)
    output: Tensor = module(x_t, native_time, condition, *mask)
    return output


def config_from_state_dict(
    state_dict: Mapping[str, Tensor], *, num_heads: int | None = None, shape: Sequence[int] | None = None
) -> SiTConfig:
    """Reads the configuration from a state dict with the names of the official SiT, which many families share.

    Args:
        state_dict: Tensors by name; other tensors are ignored.
        num_heads: Number of attention heads; needed if no preset has this width and queries are not normalized, since
            no other shape depends on it.
        shape: Shape (C, *grid) of one input; needed if the grid is not square.

    Raises:
        ValueError: If the number of heads or the grid is unknown or contradicts the tensors, or a tensor is missing or
            has a wrong shape.
    """
    for name, axes in _CONFIG_TENSORS.items():
        if name == _HEAD_NORM and name not in state_dict:
            continue
        if name not in state_dict or state_dict[name].ndim not in axes or not state_dict[name].numel():
            problem = f"has shape {tuple(state_dict[name].shape)}" if name in state_dict else "is missing"
            raise ValueError(f"this is not a complete SiT or DiT: {name} {problem}; use a complete state dict")
    patch_weight = state_dict["x_embedder.proj.weight"]
    (width, channels), patch = patch_weight.shape[:2], tuple(patch_weight.shape[2:])
    mlp_width = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
    mlp_ratio = mlp_width / width
    if int(width * mlp_ratio) < mlp_width:  # The network rounds down, and the quotient was already rounded.
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    out_channels = state_dict["final_layer.linear.weight"].shape[0] // math.prod(patch)
    shape = _shape(channels, patch, state_dict["pos_embed"].shape[1], shape)
    _check_positions(state_dict["pos_embed"], shape, patch)
    return SiTConfig(
        shape=shape,
        patch_size=patch,
        hidden_size=width,
        depth=len({key.split(".")[1] for key in state_dict if key.startswith("blocks.")}),
        num_heads=_heads(state_dict, width, num_heads),
        num_classes=state_dict["y_embedder.embedding_table.weight"].shape[0] - 1,
        mlp_ratio=mlp_ratio,
        learn_sigma=out_channels == 2 * channels,
        qk_norm=_HEAD_NORM in state_dict,
    )


def _heads(state_dict: Mapping[str, Tensor], width: int, num_heads: int | None) -> int:
    norm_heads = width // state_dict[_HEAD_NORM].shape[0] if _HEAD_NORM in state_dict else None
    if norm_heads is not None and num_heads not in (None, norm_heads):
        raise ValueError(f"{_HEAD_NORM} shows {norm_heads} heads, not {num_heads}; leave --num-heads out")
    preset_heads = {hidden_size: heads for _, hidden_size, heads in PRESETS.values()}
    heads = next((n for n in (num_heads, norm_heads, preset_heads.get(width)) if n is not None), None)
    if heads is None:
        raise ValueError(f"no preset has width {width}, so the number of heads is unknown; pass --num-heads")
    return heads


def _shape(channels: int, patch: tuple[int, ...], num_tokens: int, shape: Sequence[int] | None) -> tuple[int, ...]:
    """Checks the shape of one input; by default, a square of as many patches as there are positions."""
    edge, cube = round(num_tokens ** (1 / len(patch))), len(set(patch)) == 1
    if shape is None and (edge ** len(patch) != num_tokens or not cube):
        grid = "do not form a square grid" if cube else f"leave the grid of {'x'.join(map(str, patch))} patches open"
        raise ValueError(f"the {num_tokens} positions in pos_embed {grid}; pass --shape")
    shape = (channels, *(edge * step for step in patch)) if shape is None else tuple(shape)
    complete = len(shape) == len(patch) + 1
    if not complete or shape[0] != channels or math.prod(map(floordiv, shape[1:], patch)) != num_tokens:
        raise ValueError(
            f"shape {shape} does not fit {channels} channels and {num_tokens} patches of "
            f"{patch[0] if cube else 'x'.join(map(str, patch))}; pass the shape of the training data"
        )
    return shape


def _check_positions(positions: Tensor, shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    """Refuses a grid if the file has the sine-cosine positions of another grid with as many patches."""
    grid, (_, num_tokens, width) = tuple(map(floordiv, shape[1:], patch)), positions.shape
    if len(grid) != 2 or width < 4 or width % 4 or positions.is_meta or _are_of_grid(positions, grid):
        return
    for rows in (rows for rows in range(1, num_tokens + 1) if num_tokens % rows == 0):
        if _are_of_grid(positions, (rows, num_tokens // rows)):
            right = (shape[0], rows * patch[0], num_tokens // rows * patch[1])
            raise ValueError(
                f"pos_embed has the positions of {rows}x{num_tokens // rows} patches, not of "
                f"{'x'.join(map(str, grid))}; pass --shape {','.join(map(str, right))}"
            )


def _are_of_grid(positions: Tensor, grid: tuple[int, ...]) -> bool:
    return torch.allclose(positions.float(), sincos_position(positions.shape[-1], grid), atol=0.02)


_HEAD_NORM = "blocks.0.attn.q_norm.weight"
# Tensors that determine the configuration, and how many axes each may have.
_CONFIG_TENSORS = {
    "x_embedder.proj.weight": (3, 4, 5),
    "pos_embed": (3,),
    "final_layer.linear.weight": (2,),
    "y_embedder.embedding_table.weight": (2,),
    "blocks.0.mlp.fc1.weight": (2,),
    _HEAD_NORM: (1,),  # Optional: only if queries and keys are normalized.
}
