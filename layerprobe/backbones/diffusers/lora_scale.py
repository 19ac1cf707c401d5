"""Finds the factor of a LoRA, alpha / rank: in its tensors, in its header, or in the configuration beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerprobe.backbones.diffusers.folders import read_json
from layerprobe.configs import parse_config

_METADATA, _CONFIG = "lora_adapter_metadata", "adapter_config.json"
# Settings of peft that are read here, and those that do not change what the matrices mean. Any other is refused if set.
_READ = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "peft_type", "bias")
_WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r"),
    *("target_modules", "exclude_modules", "lora_dropout", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "megatron_core", "qalora_group_size", "lora_bias", "eva_config", "runtime_config"),
)
# Other starts, such as PiSSA, also change the weights of the base model.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


class AdapterRefused(ValueError):
    """An adapter cannot be merged; the message gives the reason and what to do, without the file as its subject."""


@dataclass(frozen=True)
class Alpha:
    """What says the factor of a LoRA.

    Attributes:
        source: Its name for the user, such as "adapter_config.json"; "" if nothing says it.
        value: Alpha of the modules that no pattern matches; None for their rank.
        patterns: Alpha by the end of a module's name, a regular expression, as in peft.
        by_root: Whether the factor is alpha / sqrt(rank).
        sets_norm: Whether the adapter is a DoRA, which also has magnitudes.
        replaces: Whether the adapter may hold parameters that replace those of the network.
        targets: Ends of the names of the modules that were adapted, if they are listed.
        in_tensors: Whether every module has a tensor with its own alpha.
    """

    source: str = ""
    value: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False
    sets_norm: bool = False
    replaces: bool = False
    targets: tuple[str, ...] = ()
    in_tensors: bool = False

    def of(self, module: str, rank: int) -> float:
        """Returns the alpha of a module."""
        matching = (alpha for end, alpha in self.patterns.items() if re.match(rf"(.*\.)?({end})$", module))
        return float(next(matching, rank if self.value is None else self.value))

    def factor(self, alpha: float, rank: int) -> float:
        """Returns what the product of the two matrices is multiplied by."""
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def read_alpha(
    file: Path, header: Mapping[str, str], names: Iterable[str], component: str, *, given: float | None
) -> Alpha:
    """Finds what says the factor of an adapter.

    Args:
        file: The adapter.
        header: Texts in its header.
        names: Names of its tensors.
        component: Name of the base model among the components of its pipeline.
        given: Alpha as the user passed it, for an adapter that does not say it.

    Raises:
        AdapterRefused: If the configuration is missing, has settings that are not supported, or names another alpha
            than the given one.
        ValueError: If the configuration is damaged.
    """
    alpha = _said(file, header, names, component)
    if alpha.source and given is not None:
        raise AdapterRefused(f"has its alpha in {alpha.source}; leave --lora-alpha out")
    return alpha if given is None else Alpha("--lora-alpha", given)


def _said(file: Path, header: Mapping[str, str], names: Iterable[str], component: str) -> Alpha:
    if any(name.endswith(".alpha") for name in names):
        return Alpha("its alpha tensors", in_tensors=True)
    if file.name == "adapter_model.safetensors":
        if not (file.parent / _CONFIG).is_file():
            raise AdapterRefused(f"has no {_CONFIG} beside it; put it there")
        return _configured(read_json(file.parent / _CONFIG), _CONFIG)
    if _METADATA in header:
        content = parse_config(header[_METADATA], "JSON")
        prefix = "" if "lora_alpha" in content else f"{component}."
        own = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
        if own:
            return _configured(own, f"{_METADATA} in its header")
    if header.get("ss_network_alpha") not in (None, "None", ""):
        return Alpha("ss_network_alpha in its header", float(header["ss_network_alpha"]))
    return Alpha()


def _configured(config: Mapping[str, Any], source: str) -> Alpha:
    if config.get("peft_type", "LORA") != "LORA":
        raise AdapterRefused(f"is a {config['peft_type']} adapter according to {source}; only LORA is merged")
    if config.get("init_lora_weights") not in _STARTS:
        raise AdapterRefused(
            f"started from {config['init_lora_weights']!r} according to {source}, which changes the base model too; "
            "convert it to a plain LoRA with peft's path_initial_model_for_weight_conversion"
        )
    other = next((key for key, value in config.items() if value and key not in (*_READ, *_WITHOUT_EFFECT)), None)
    if other is not None:
        raise AdapterRefused(f"sets {other} in {source}, which is not supported; merge it with peft, pass the result")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise AdapterRefused(f"has no lora_alpha in {source}; download it again")
    return Alpha(
        source,
        float(config["lora_alpha"]),
        config.get("alpha_pattern") or {},
        by_root=bool(config.get("use_rslora")),
        sets_norm=bool(config.get("use_dora")),
        targets=tuple(targets) if isinstance(targets := config.get("target_modules"), list) else (),
        replaces=bool(config.get("modules_to_save")) or config.get("bias", "none") != "none",
    )
