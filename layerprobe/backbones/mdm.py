"""MDM, the human motion diffusion model: a transformer encoder over the frames of a motion.

A motion is (C, T): the features of a frame (joint-major, `njoints * nfeats` in the official code) over time. The
network runs sequence-first, (1 + T, B, D), and the first token carries the time and the condition. It predicts x_0.

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
from layerprobe.capture import as_tokens
from layerprobe.noise import DDPM, NoiseSchedule, Prediction, schedule_from_name

# The official code has no option for the heads, and none for the frames of its data sets beyond these.
NUM_HEADS = 4
NUM_FRAMES = {"humanml": 196, "kit": 196, "humanact12": 60, "uestc": 60}
NUM_POSITIONS = 5000
DROPOUT = 0.1
# Read by nothing here: the text encoder, targets that only goal-conditioned sampling uses, and the positions again.
_UNUSED = ("clip_model.", "embed_target_cond.")
_POSITIONS = "sequence_pos_encoder.pe"
_SAME_POSITIONS = "embed_timestep.sequence_pos_encoder.pe"
_BLOCKS = "seqTransEncoder.layers."
_ACTIONS, _TEXT = "embed_action.action_embedding", "embed_text.weight"
_TELLING = (
    "input_process.poseEmbedding.weight",
    "output_process.poseFinal.weight",
    "embed_timestep.time_embed.0.weight",
)


@dataclass(frozen=True)
class MDMConfig:
    """The shape of an MDM.

    Attributes:
        shape: (C, T): features of a frame and number of frames.
        hidden_size: Width of a token.
        depth: Number of blocks.
        num_heads: Attention heads; divides hidden_size.
        mlp_size: Width of a block's MLP.
        num_actions: Actions to condition on; 0 for none.
        text_size: Length of a text's vector to condition on; 0 for none.
        num_positions: Rows of the table that places tokens and times.

    Raises:
        ValueError: If these make no network.
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
            raise ValueError(f"features, frames, width, depth and heads count from 1, got {self}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden size {self.hidden_size} does not divide into {self.num_heads} heads; pass --num-heads"
            )
        if self.shape[1] >= self.num_positions:
            raise ValueError(
                f"{self.shape[1]} frames are more than the {self.num_positions - 1} that this MDM has positions for; "
                "pass shorter motions"
            )


class MDM(nn.Module):
    """The transformer: x_t, native time and condition in, x_0 out."""

    def __init__(self, config: MDMConfig) -> None:
        super().__init__()
        self.config = config
        features, width = config.shape[0], config.hidden_size
        # Dictionaries give the official names; what they hold is called in `forward`.
        self.input_process = nn.ModuleDict({"poseEmbedding": nn.Linear(features, width)})
        self.sequence_pos_encoder = PositionalEncoding(config.num_positions, width)
        time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_timestep = nn.ModuleDict({"time_embed": time_embed})
        if config.text_size:
            self.embed_text = nn.Linear(config.text_size, width)
        if config.num_actions:
            self.embed_action = nn.ParameterDict({"action_embedding": torch.randn(config.num_actions, width)})
        block = nn.TransformerEncoderLayer(width, config.num_heads, config.mlp_size, DROPOUT, "gelu")
        self.seqTransEncoder = nn.TransformerEncoder(block, config.depth, enable_nested_tensor=False)
        self.output_process = nn.ModuleDict({"poseFinal": nn.Linear(width, features)})

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The prediction of x_0, shape (B, C, T).

        Args:
            x: Noisy motions, shape (B, C, T).
            t: Native times, shape (B,), integers.
            condition: Actions, shape (B,), with `num_actions` for "no action"; or vectors of texts, shape
                (B, text_size), with None for "no text".
        """
        first = self.embed_timestep["time_embed"](self.sequence_pos_encoder.pe[t, 0]) + self._embed(condition, x)
        frames = self.input_process["poseEmbedding"](x.permute(2, 0, 1))
        tokens = self.sequence_pos_encoder(torch.cat([first.unsqueeze(0), frames]))
        motion: Tensor = self.output_process["poseFinal"](self.seqTransEncoder(tokens)[1:])
        return motion.permute(1, 2, 0)

    def _embed(self, condition: Tensor | None, x: Tensor) -> Tensor:
        """(B, D). "No action" adds nothing; "no text" is the zero vector, so what it adds is the bias."""
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
    """Adds the fixed embedding of the place in the sequence; a buffer, because files hold it."""

    pe: Tensor

    def __init__(self, num_positions: int, width: int) -> None:
        super().__init__()
        self.register_buffer("pe", sinusoids(num_positions, width))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, tokens: Tensor) -> Tensor:
        placed: Tensor = self.dropout(tokens + self.pe[: len(tokens)])
        return placed


def sinusoids(num_positions: int, width: int) -> Tensor:
    """Sines in the even and cosines in the odd channels, shape (num_positions, 1, width), in float32 as in the files.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5.
    """
    places = torch.arange(num_positions, dtype=torch.float32).unsqueeze(1)
    frequencies = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
    table = torch.zeros(num_positions, width)
    table[:, 0::2] = torch.sin(places * frequencies)
    table[:, 1::2] = torch.cos(places * frequencies[: width // 2])
    return table.unsqueeze(1)


def mdm_backbone(module: MDM, *, schedule: NoiseSchedule, prediction: Prediction = "x0") -> Backbone:
    """An MDM behind the common convention."""
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
    )


def frame_tokens(output: Any, name: str) -> Tensor:
    """The frames of what a layer gives, shape (B, T, D): batch first, without the token of the condition."""
    if name.startswith("seqTransEncoder"):
        return as_tokens(output, name)[1:].transpose(0, 1)
    sequence_first = name.startswith(("input_process", "output_process"))
    return as_tokens(output, name).transpose(0, 1) if sequence_first else as_tokens(output, name)


def recognize_mdm(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of an MDM, of any of its variants."""
    return tensors.keys() >= set(_TELLING)


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
    """The network that a state dict is of, without its weights: `load_state_dict(tensors, assign=True)` fills it.

    Args:
        tensors: An official state dict.
        args: What the official training wrote into `args.json` beside it; {} where there is none.
        shape: (C, T). Files tell the features C of a frame, not the number T of frames; where not given, T is that of
            the data set in `args`.
        num_classes: To check the file against.
        num_heads: 4 where neither this nor `args` says otherwise, as in the official code.
        schedule: A schedule or its name; that of `args` where not given.
        prediction: "x0" where not given.

    Returns:
        The backbone, its module on the "meta" device; the tensors that its module takes, all of them; the names of
        those that nothing reads.

    Raises:
        ValueError: If this is another variant, or something that the file does not tell is not given.
    """
    _check_variant(tensors, args)
    features, frames = _shape(tensors, args, shape)
    config = MDMConfig(
        shape=(features, frames),
        hidden_size=tensors["input_process.poseEmbedding.weight"].shape[0],
        depth=len({name.split(".")[2] for name in tensors if name.startswith(_BLOCKS)}),
        num_heads=_whole(args, "num_heads", NUM_HEADS) if num_heads is None else num_heads,
        mlp_size=len(tensors[f"{_BLOCKS}0.linear1.weight"]),
        num_actions=len(tensors[_ACTIONS]) if _ACTIONS in tensors else 0,
        text_size=tensors[_TEXT].shape[1] if _TEXT in tensors else 0,
        num_positions=len(tensors[_POSITIONS]) if _POSITIONS in tensors else NUM_POSITIONS,
    )
    if num_classes is not None and num_classes != config.num_actions:
        raise ValueError(f"this MDM has {config.num_actions} actions, not {num_classes}; leave --num-classes out")
    unused = tuple(name for name in tensors if name.startswith(_UNUSED))
    wanted = {name: tensor for name, tensor in tensors.items() if name not in {*unused, _SAME_POSITIONS}}
    with torch.device("cpu"):  # These are needed as numbers, also where the caller builds on "meta".
        given = schedule_from_name(schedule) if isinstance(schedule, str) else schedule
        native = given or _schedule(args)
        _check_times(native, config.num_positions)
        wanted.setdefault(_POSITIONS, sinusoids(config.num_positions, config.hidden_size))
    with torch.device("meta"):
        module = MDM(config)
    backbone = mdm_backbone(module, schedule=native, prediction=prediction or "x0")
    if args.get("cond_mask_prob") == 0 and config.num_actions + config.text_size:
        backbone = replace(backbone, name=f"{backbone.name}, never trained without a condition")
    return backbone, wanted, unused


def _check_variant(tensors: Mapping[str, Tensor], args: Mapping[str, Any]) -> None:
    axes = dict.fromkeys((*_TELLING, f"{_BLOCKS}0.linear1.weight", _ACTIONS, _TEXT), 2) | {_POSITIONS: 3}
    for name, count in axes.items():
        if name in tensors and (tensors[name].ndim != count or not tensors[name].numel()):
            raise ValueError(f"this is no whole MDM: {name} has shape {tuple(tensors[name].shape)}; use another copy")
    if "input_process.velEmbedding.weight" in tensors or _whole(args, "context_len", 0):
        kind = "a prefix of the motion" if _whole(args, "context_len", 0) else "velocities"
        raise ValueError(f"this MDM also takes {kind}, which is not read; pass --model file.py:factory")
    if f"{_BLOCKS}0.linear1.weight" not in tensors:
        raise ValueError(
            f"this MDM has no {_BLOCKS}0 (its arch is {args.get('arch', 'not known')}), only trans_enc is read; "
            "pass --model file.py:factory for your own network"
        )


def _check_times(schedule: NoiseSchedule, num_positions: int) -> None:
    last = float(schedule.native_time(torch.tensor(schedule.level_range[1], dtype=torch.float64)))
    if not schedule.integer_time or last >= num_positions:
        raise ValueError(
            f"this MDM looks its time up in {num_positions} rows, and the last time of {schedule.name} is {last:g}; "
            "pass the --schedule it was trained with, such as ddpm-cosine"
        )


def _shape(tensors: Mapping[str, Tensor], args: Mapping[str, Any], given: Sequence[int] | None) -> tuple[int, int]:
    features = tensors["input_process.poseEmbedding.weight"].shape[1]
    if given is None:
        frames = NUM_FRAMES.get(str(args.get("dataset")))
        if frames is None:
            raise ValueError(f"an MDM file does not tell the number of frames; pass --shape {features},196 or other")
        return features, frames
    if len(given) != 2 or given[0] != features:
        raise ValueError(
            f"this MDM takes {features} features a frame, --shape says {','.join(map(str, given))}; "
            f"pass --shape {features},FRAMES"
        )
    return features, int(given[1])


def _schedule(args: Mapping[str, Any]) -> NoiseSchedule:
    """That of the official training: a cosine, or the linear betas stretched to the number of steps."""
    name, steps = args.get("noise_schedule"), _whole(args, "diffusion_steps", 0)
    if name not in ("cosine", "linear") or not steps:
        raise ValueError(
            "an MDM file does not tell its noise schedule; put the training's args.json beside it, or pass --schedule"
        )
    if name == "cosine":
        return DDPM.from_name("cosine", steps)
    return DDPM.from_name("linear", steps, 1e-4 * 1000 / steps, 0.02 * 1000 / steps)


def _whole(args: Mapping[str, Any], name: str, default: int) -> int:
    value = args.get(name, default)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"args.json says {name} is {value!r}, which is no whole number; mend it")
    return value


def _forward(module: nn.Module, x_t: Tensor, native_time: Tensor, condition: Tensor | None) -> Tensor:
    output: Tensor = module(x_t, native_time, condition)
    return output
