"""MDM, the human motion diffusion model: a transformer encoder over the frames of a motion.

A motion has shape (C, T): the features of a frame (joint-major, `njoints * nfeats` in the official code) over time. The
network runs sequence-first, (1 + T, B, D), and its first token carries the time and the condition. It predicts x_0.

The state dict has the names and shapes of the official encoder variant (`trans_enc`).

Source: Tevet et al. 2022, Human Motion Diffusion Model (arXiv:2209.14916).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone
from layerprobe.backbones.family import Family, Opened
from layerprobe.backbones.heads import possible_heads
from layerprobe.backbones.stated import check_sizes
from layerprobe.backbones.without_values import unfilled
from layerprobe.capture import as_tokens
from layerprobe.noise import DDPM, NoiseSchedule, Prediction, schedule_from_name

# The official code has no option for the number of heads, nor for the number of frames of these data sets.
NUM_HEADS = 4
NUM_FRAMES = {"humanml": 196, "kit": 196, "humanact12": 60, "uestc": 60}
NUM_POSITIONS = 5000
DROPOUT = 0.1
# Tensors that are not needed here: the text encoder, and targets of goal-conditioned sampling.
_UNUSED = ("clip_model.", "embed_target_cond.")
_POSITIONS = "sequence_pos_encoder.pe"
_SAME_POSITIONS = "embed_timestep.sequence_pos_encoder.pe"
_BLOCKS = "seqTransEncoder.layers."
_ACTIONS, _TEXT = "embed_action.action_embedding", "embed_text.weight"
_MARKS = (
    "input_process.poseEmbedding.weight",
    "output_process.poseFinal.weight",
    "embed_timestep.time_embed.0.weight",
)


@dataclass(frozen=True)
class MDMConfig:
    """The configuration of an MDM.

    Attributes:
        shape: Shape (C, T) of one motion: features of a frame and number of frames.
        hidden_size: Width of a token.
        depth: Number of blocks.
        num_heads: Number of attention heads; divides hidden_size.
        mlp_size: Width of a block's MLP.
        num_actions: Number of actions to condition on; 0 for none.
        text_size: Length of the text vector to condition on; 0 for none.
        num_positions: Number of rows in the table of positions, which is also used for times.

    Raises:
        ValueError: If a value is out of its range, or the values do not fit together.
    """

    shape: tuple[int, int]
    hidden_size: int = 512
    depth: int = 8
    num_heads: int = NUM_HEADS
    mlp_size: int = 1024
    num_actions: int = 0
    text_size: int = 0
    num_positions: int = NUM_POSITIONS

    def __post_init__(self) -> None:
        if min(*self.shape, self.hidden_size, self.depth, self.num_heads, self.mlp_size) < 1:
            raise ValueError(f"features, frames, width, depth and heads must be at least 1, got {self}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden size {self.hidden_size} does not divide into {self.num_heads} heads; pass --num-heads"
            )
        if self.shape[1] >= self.num_positions:
            raise ValueError(
                f"{self.shape[1]} frames are more than the {self.num_positions - 1} positions of this MDM; "
                "pass shorter motions"
            )


class MDM(nn.Module):
    """The transformer that maps x_t, native time and condition to x_0."""

    def __init__(self, config: MDMConfig) -> None:
        super().__init__()
        self.config = config
        features, width = config.shape[0], config.hidden_size
        # Module dictionaries give the official names; `forward` calls what they hold.
        self.input_process = nn.ModuleDict({"poseEmbedding": nn.Linear(features, width)})
        self.sequence_pos_encoder = PositionalEncoding(config.num_positions, width)
        time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_timestep = nn.ModuleDict({"time_embed": time_embed})
        if config.text_size:
            self.embed_text = nn.Linear(config.text_size, width)
        if config.num_actions:
            self.embed_action = nn.ParameterDict({"action_embedding": torch.empty(config.num_actions, width).normal_()})
        block = nn.TransformerEncoderLayer(width, config.num_heads, config.mlp_size, DROPOUT, "gelu")
        self.seqTransEncoder = nn.TransformerEncoder(block, config.depth, enable_nested_tensor=False)
        self.output_process = nn.ModuleDict({"poseFinal": nn.Linear(width, features)})

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns the prediction of x_0, shape (B, C, T).

        Args:
            x: Noisy motions, shape (B, C, T).
            t: Native integer times, shape (B,).
            condition: Actions, shape (B,), with `num_actions` for "no action"; or text vectors, shape
                (B, text_size), with None for "no text".
        """
        first = self.embed_timestep["time_embed"](self.sequence_pos_encoder.pe[t, 0]) + self._embed(condition, x)
        frames = self.input_process["poseEmbedding"](x.permute(2, 0, 1))
        tokens = self.sequence_pos_encoder(torch.cat([first.unsqueeze(0), frames]))
        motion: Tensor = self.output_process["poseFinal"](self.seqTransEncoder(tokens)[1:])
        return motion.permute(1, 2, 0)

    def _embed(self, condition: Tensor | None, x: Tensor) -> Tensor:
        """Embeds the condition, shape (B, D): "no action" as zeros, "no text" as the bias of a zero vector."""
        config = self.config
        if config.num_actions:
            table = self.embed_action["action_embedding"]
            if condition is None:
                condition = torch.full((len(x),), config.num_actions, device=x.device)
            return torch.cat([table, torch.zeros_like(table[:1])])[condition]
        if config.text_size:
            text = x.new_zeros(len(x), config.text_size) if condition is None else condition
            embedded: Tensor = self.embed_text(text)
            return embedded
        return x.new_zeros(())


class PositionalEncoding(nn.Module):
    """Adds the fixed position embedding, which is a buffer because files contain it."""

    pe: Tensor

    def __init__(self, num_positions: int, width: int) -> None:
        super().__init__()
        self.register_buffer("pe", sinusoids(num_positions, width))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(tokens + self.pe[: len(tokens)])
        return embedded


def sinusoids(num_positions: int, width: int) -> Tensor:
    """Returns sines in the even and cosines in the odd channels, shape (num_positions, 1, width), float32.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5.
    """
    positions = torch.arange(num_positions, dtype=torch.float32).unsqueeze(1)
    frequencies = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
    table = torch.zeros(num_positions, width)
    table[:, 0::2] = torch.sin(positions * frequencies)
    table[:, 1::2] = torch.cos(positions * frequencies[: width // 2])
    return table.unsqueeze(1)


def mdm_backbone(module: MDM, *, schedule: NoiseSchedule, prediction: Prediction = "x0") -> Backbone:
    """Wraps an MDM as a backbone; by default the network predicts x_0."""
    config = module.config
    return Backbone(
        module=module,
        layers=tuple(f"{_BLOCKS}{i}" for i in range(config.depth)),
        schedule=schedule,
        prediction=prediction,
        shape=config.shape,
        num_classes=config.num_actions,
        forward=_forward,
        name=f"MDM with {config.depth} blocks of width {config.hidden_size}",
        tokens=frame_tokens,
        num_heads=config.num_heads,
        possible_heads=possible_heads(config.hidden_size),
    )


def frame_tokens(output: Any, name: str) -> Tensor:
    """Extracts a layer's tokens of the frames, shape (B, T, D): batch first, without the token of the condition."""
    if name.startswith("seqTransEncoder"):
        return as_tokens(output, name)[1:].transpose(0, 1)
    sequence_first = name.startswith(("input_process", "output_process"))
    return as_tokens(output, name).transpose(0, 1) if sequence_first else as_tokens(output, name)


def recognize_mdm(tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether these are the weights of an MDM, of any variant."""
    return tensors.keys() >= set(_MARKS)


def build_mdm(
    tensors: Mapping[str, Tensor],
    *,
    args: Mapping[str, Any],
    shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    num_heads: int | None = None,
    schedule: NoiseSchedule | str | None = None,
    prediction: Prediction | None = None,
) -> tuple[Backbone, dict[str, Tensor], tuple[str, ...]]:
    """Builds the network of a state dict without its weights; `load_state_dict(tensors, assign=True)` fills it.

    Args:
        tensors: Official state dict.
        args: Content of the `args.json` that the official training wrote beside it; {} if it is missing.
        shape: Shape (C, T) of one motion. Files determine the features C of a frame, but not the number T of frames;
            by default, T is that of the data set in `args`.
        num_classes: Number of actions, to check the file against.
        num_heads: Number of attention heads; by default that of `args`, or 4 as in the official code.
        schedule: Schedule or its name; by default that of `args`.
        prediction: Prediction target; "x0" by default.

    Returns:
        The backbone with its module on the "meta" device, all tensors that the module takes, and the names of unused
        tensors.

    Raises:
        ValueError: If the file is of another variant, or a value that the file leaves open is missing.
    """
    _check_variant(tensors, args)
    stated = _integer(args, "num_heads", 0)
    if stated and num_heads not in (None, stated):
        raise ValueError(f"args.json has num_heads = {stated}, not {num_heads}; leave --num-heads out")
    features, frames = _shape(tensors, args, shape)
    config = MDMConfig(
        shape=(features, frames),
        hidden_size=tensors["input_process.poseEmbedding.weight"].shape[0],
        depth=len({name.split(".")[2] for name in tensors if name.startswith(_BLOCKS)}),
        num_heads=(stated or NUM_HEADS) if num_heads is None else num_heads,
        mlp_size=len(tensors[f"{_BLOCKS}0.linear1.weight"]),
        num_actions=len(tensors[_ACTIONS]) if _ACTIONS in tensors else 0,
        text_size=tensors[_TEXT].shape[1] if _TEXT in tensors else 0,
        num_positions=len(tensors[_POSITIONS]) if _POSITIONS in tensors else NUM_POSITIONS,
    )
    check_sizes(args, {"latent_dim": config.hidden_size, "layers": config.depth, "ff_size": config.mlp_size})
    if num_classes is not None and num_classes != config.num_actions:
        raise ValueError(f"this MDM has {config.num_actions} actions, not {num_classes}; leave --num-classes out")
    unused = tuple(name for name in tensors if name.startswith(_UNUSED))
    network_tensors = {name: tensor for name, tensor in tensors.items() if name not in {*unused, _SAME_POSITIONS}}
    with torch.device("cpu"):  # The schedule and the positions need values, even if the caller builds on "meta".
        schedule = schedule_from_name(schedule) if isinstance(schedule, str) else schedule
        schedule = schedule or _schedule(args)
        _check_times(schedule, config.num_positions)
        network_tensors.setdefault(_POSITIONS, sinusoids(config.num_positions, config.hidden_size))
    with unfilled():
        module = MDM(config)
    backbone = mdm_backbone(module, schedule=schedule, prediction=prediction or "x0")
    conditional = bool(config.num_actions + config.text_size)
    notes = []
    if num_heads is None and not stated:
        notes.append(
            f"no file states the number of attention heads: {NUM_HEADS} as in the official code; pass --num-heads if "
            "it has another"
        )
    if args.get("cond_mask_prob") == 0 and conditional:
        notes.append("the network was never trained without a condition (cond_mask_prob = 0), but is run without one")
    elif "cond_mask_prob" not in args and conditional:
        notes.append("no file states that the network was trained without a condition too, as it is run")
    return replace(backbone, assumptions=tuple(notes)), network_tensors, unused


def _check_variant(tensors: Mapping[str, Tensor], args: Mapping[str, Any]) -> None:
    axes = dict.fromkeys((*_MARKS, f"{_BLOCKS}0.linear1.weight", _ACTIONS, _TEXT), 2) | {_POSITIONS: 3}
    for name, count in axes.items():
        if name in tensors and (tensors[name].ndim != count or not tensors[name].numel()):
            raise ValueError(
                f"this is not a complete MDM: {name} has shape {tuple(tensors[name].shape)}; use another copy"
            )
    if "input_process.velEmbedding.weight" in tensors or _integer(args, "context_len", 0):
        kind = "a prefix of the motion" if _integer(args, "context_len", 0) else "velocities"
        raise ValueError(f"this MDM also takes {kind}, which is not supported; pass --model file.py:factory")
    if f"{_BLOCKS}0.linear1.weight" not in tensors:
        raise ValueError(
            f"this MDM has no {_BLOCKS}0 (its arch is {args.get('arch', 'unknown')}), only trans_enc is supported; "
            "pass --model file.py:factory for your own network"
        )


def _check_times(schedule: NoiseSchedule, num_positions: int) -> None:
    last = float(schedule.native_time(torch.tensor(schedule.level_range[1], dtype=torch.float64)))
    if not schedule.integer_time or last >= num_positions:
        raise ValueError(
            f"this MDM has a table of {num_positions} times, but the last time of {schedule.name} is {last:g}; "
            "pass the --schedule it was trained with, such as ddpm-cosine"
        )


def _shape(tensors: Mapping[str, Tensor], args: Mapping[str, Any], shape: Sequence[int] | None) -> tuple[int, int]:
    features = tensors["input_process.poseEmbedding.weight"].shape[1]
    if shape is None:
        frames = NUM_FRAMES.get(str(args.get("dataset")))
        if frames is None:
            raise ValueError(
                f"an MDM file does not contain the number of frames; pass it in --shape, such as {features},196"
            )
        return features, frames
    if len(shape) != 2 or shape[0] != features:
        raise ValueError(
            f"this MDM takes {features} features per frame, not --shape {','.join(map(str, shape))}; "
            f"pass --shape {features},FRAMES"
        )
    return features, int(shape[1])


def _schedule(args: Mapping[str, Any]) -> NoiseSchedule:
    """Returns the schedule of the official training: a cosine, or linear betas rescaled to the number of steps."""
    name, steps = args.get("noise_schedule"), _integer(args, "diffusion_steps", 0)
    if name not in ("cosine", "linear") or not steps:
        raise ValueError(
            "an MDM file does not contain its noise schedule; put the training's args.json beside it, or pass "
            "--schedule"
        )
    if name == "cosine":
        return DDPM.from_name("cosine", steps)
    return DDPM.from_name("linear", steps, 1e-4 * 1000 / steps, 0.02 * 1000 / steps)


def _integer(args: Mapping[str, Any], name: str, default: int) -> int:
    value = args.get(name, default)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"args.json has {name} = {value!r}, which is not a valid number; correct it")
    return value


def _forward(module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None) -> Tensor:
    output: Tensor = module(x_t, native_time, condition)
    return output


def _build(tensors: Mapping[str, Tensor], family: Family, **options: Any) -> Opened:
    if not recognize_mdm(tensors):
        raise ValueError(
            "this is not an MDM: it lacks input_process, output_process or embed_timestep; pass an MDM's file"
        )
    return Opened(*build_mdm(tensors, **options))


FAMILY = Family(
    "MDM",
    "ddpm-cosine",
    "x0",
    latents="motions, normalized as in the code of the training data",
    recognizes=recognize_mdm,
    build=_build,
)
