"""The arguments of a training that are written beside its checkpoints, or in the header of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from layerprobe.backbones import DECISIVE
from layerprobe.configs import read_config

NAMES = ("args.json", "config.json", "hparams.yaml", "config.yaml")
# Names of folders that training code makes for checkpoints alone, below the folder of the run.
_CHECKPOINT_FOLDERS = ("checkpoints", "checkpoint", "ckpts", "ckpt", "weights")


def stated_arguments(path: Path, files: Sequence[Path], inside: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns every argument that is stated about a checkpoint, and the places that state any.

    Args:
        path: Checkpoint: a file or a folder.
        files: Files that it was read from.
        inside: Arguments that the file itself holds.

    Raises:
        ValueError: If one of the places is damaged, or two of them contradict each other.
    """
    args: dict[str, Any] = {}
    origins: dict[str, str] = {}
    places = {path.name: inside, **_headers(files), **_beside(path if path.is_dir() else path.parent)}
    for place, stated in places.items():
        for name, value in stated.items():
            if name in args and name in DECISIVE and args[name] != value:
                raise ValueError(
                    f"{origins[name]} has {name} = {args[name]}, but {place} has {value}; remove the file that belongs "
                    "to another training"
                )
            args[name], origins[name] = value, place
    return args, [place for place, stated in places.items() if stated]


def _headers(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Reads the metadata of safetensors files, whose values are texts: JSON values, or texts as they are."""
    headers = {}
    for file in (file for file in files if file.suffix == ".safetensors"):
        with safe_open(file, framework="pt") as tensors:
            headers[f"the header of {file.name}"] = {
                name: _value(text) for name, text in (tensors.metadata() or {}).items()
            }
    return headers


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _beside(folder: Path) -> dict[str, dict[str, Any]]:
    folders = [folder, folder.parent] if folder.name in _CHECKPOINT_FOLDERS else [folder]
    files = [file for place in folders for name in NAMES if (file := place / name).is_file()]
    return {str(file): read_config(file) for file in files}
