"""What training arguments state about a transformer, and whether that agrees with its weights.

The names are those of the official SiT and DiT and of their forks. Numbers of other networks (autoencoder, text
encoder) stand in sections of their own, so only the top level and sections called after the network are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from layerprobe.backbones.sit import PRESETS

# Width and heads by the size in a model's name; the last two are of LightningDiT.
NAMED_SIZES = {size: (width, heads) for size, (_, width, heads) in PRESETS.items()}
NAMED_SIZES |= {"1p0B": (1536, 24), "1p6B": (1792, 28)}
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nheads", "heads")
DROPOUT = ("class_dropout_prob", "label_dropout", "label_drop", "cfg_prob", "cond_mask_prob")
SIZES = ("hidden_size", "depth", "patch_size", "in_channels", "in_chans", "input_size", "latent_dim", "layers")
# Arguments that decide how a checkpoint is read.
DECISIVE = (*HEADS, *DROPOUT, *SIZES, "num_classes", "path_type", "prediction", "noise_schedule", "diffusion_steps")
_MODEL_NAMES = ("model", "model_type", "model_name", "arch", "name")
_SECTIONS = (
    *("model", "network", "net", "transformer", "backbone", "params", "init_args", "config"),
    *(f"{name}_{kind}" for name in ("model", "network") for kind in ("args", "config", "kwargs", "params")),
)
_SIZE = re.compile(r"[-_](\w+)[/_-]\d+$")


def network_settings(args: Mapping[str, Any], *, depth: int = 2) -> dict[str, Any]:
    """Flattens the arguments of the network: those of the top level win over those of sections, to this depth.

    Numbers that are stored as texts become numbers.
    """
    settings: dict[str, Any] = {}
    for section in (args[name] for name in _SECTIONS if depth and isinstance(args.get(name), Mapping)):
        settings |= network_settings(section, depth=depth - 1)
    return settings | {name: _number(value) for name, value in args.items() if not isinstance(value, Mapping)}


def _number(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", value.strip()):
        return float(value) if "." in value else int(value)
    return value


def stated_number(settings: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, float] | None:
    """Returns the first of these arguments that is a number, with its name; None if there is none."""
    for name in names:
        value = settings.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return name, value
    return None


def model_name(settings: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns a model's name and the size in it: ("SiT-XL/2", "XL"); None if no argument is such a name."""
    sizes = {size.lower(): size for size in NAMED_SIZES}
    for key in _MODEL_NAMES:
        match = _SIZE.search(str(settings.get(key)))
        if match and match[1].lower() in sizes:
            return str(settings[key]), sizes[match[1].lower()]
    return None


def check_sizes(settings: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Refuses arguments that contradict what the weights determine: then they are of another network.

    Args:
        settings: Arguments of the network, flattened.
        sizes: Values that the weights determine, by the argument's name.

    Raises:
        ValueError: If an argument has another value.
    """
    for name, value in sizes.items():
        stated = settings.get(name)
        if isinstance(stated, (list, tuple)) and stated and all(one == stated[0] for one in stated):
            stated = stated[0]
        if isinstance(stated, (bool, int)) and isinstance(value, (bool, int)) and stated != value:
            raise ValueError(
                f"the training arguments have {name} = {stated}, but the weights show {value}; these arguments are of "
                "another network: correct or remove them"
            )
