"""Finds the files of a diffusers model, on disk or in the local cache of the Hub, and those of its denoiser."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprobe.configs import check_numbers, read_config
from layerprobe.files import (
    REMOTE,
    MissingWeights,
    hub_error_line,
    import_optional,
    is_hub_name,
    one_line,
    similar_path,
)
from layerprobe.memory import pass_on

MAX_STEPS = 100_000  # a larger number means a damaged configuration, or one that would exhaust the memory
WEIGHTS = "diffusion_pytorch_model"
# `*` also matches slashes. Weights in the top folder are copies for other programs, or those of a single model.
DOWNLOADED = ["*/*.safetensors", f"{WEIGHTS}*.safetensors", "*.json", "*.txt", "*.model"]
NOT_DOWNLOADED = ["vae*/*", "safety_checker/*", "image_encoder/*", "*.fp16.safetensors", "*.non_ema.safetensors"]
# Names of the denoising network in pipelines.
DENOISERS = ("transformer", "unet", "dit", "prior", "decoder")
# Prefixes of the components that a pipeline's `encode_prompt` needs.
ENCODERS = ("text_encoder", "tokenizer", "projection_model", "language_model")


@dataclass(frozen=True)
class ModelFolder:
    """The location of a model.

    Attributes:
        pipeline: Folder of the pipeline; None for a single model.
        index: Content of the pipeline's `model_index.json`; {} for a single model.
        model: Folder of the denoiser.
        config: Configuration of the denoiser.
        others: Folders with other denoisers of the pipeline or training, such as "unet" beside "unet_ema".
    """

    pipeline: Path | None
    index: Mapping[str, Any]
    model: Path
    config: Mapping[str, Any]
    others: tuple[str, ...] = ()

    @property
    def component(self) -> str:
        """The name of the denoiser among the pipeline's components."""
        name = _without_ema(self.model.name)
        if self.pipeline or name in DENOISERS:
            return name
        return "unet" if "UNet" in str(self.config.get("_class_name")) else "transformer"

    @property
    def scheduler(self) -> Path | None:
        """The scheduler's configuration file; None if it is missing."""
        folders = [self.pipeline] if self.pipeline else [self.model, self.model.parent]
        if self.model.parent.name.startswith("checkpoint-"):  # The training writes its pipeline beside these.
            folders.append(self.model.parent.parent)
        names = ("scheduler/scheduler_config.json", "scheduler_config.json")
        return next((f / n for f in folders for n in names if (f / n).is_file()), None)


def exported_class(name: Any, kind: str) -> Any:
    """Returns the class that diffusers exports under this name, if it derives from `kind`; None otherwise."""
    diffusers = import_optional("diffusers", "diffusers")
    value = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return value if inspect.isclass(value) and issubclass(value, getattr(diffusers, kind)) else None


def locate_model(path: str | Path, subfolder: str | None) -> ModelFolder:
    """Finds a model by its folder or its name on the Hub.

    Raises:
        FileNotFoundError: If the folder or its configuration is missing.
        ValueError: If a file is damaged or outside of the folder, or the pipeline needs code of its own or has no
            denoiser.
    """
    folder = snapshot_of(Path(path)) if Path(path).is_dir() else _snapshot(str(path), subfolder)
    if subfolder is None and not (folder / "model_index.json").is_file() and folder.name:
        # A component inside its pipeline: the other components define the schedule and the text.
        parent = folder.resolve().parent
        if (parent / "model_index.json").is_file() and folder.name in read_json(parent / "model_index.json"):
            folder, subfolder = parent, folder.resolve().name
    _refuse_links_outside(folder)
    index: Mapping[str, Any] = {}
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        if not isinstance(index.get("_class_name"), str):
            raise ValueError(
                f"{folder} needs code of its own ({index.get('_class_name')}), which is never run; wrap it"
            )
        subfolder = subfolder or _denoiser(folder, index)
    elif subfolder is None and not (folder / "config.json").is_file():
        subfolder = next(iter(denoiser_folders(folder)), None)
    model = folder / subfolder if subfolder else folder
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"there is no {model / 'config.json'}; pass a folder that diffusers saved")
    others = tuple(name for name in denoiser_folders(folder) if name != subfolder) if subfolder else ()
    return ModelFolder(folder if index else None, index, model, read_json(model / "config.json"), others)


def denoiser_folders(folder: Path) -> tuple[str, ...]:
    """Returns the denoisers among the folders in a folder, as trainers leave them; averaged weights first."""
    names = [entry.name for entry in folder.iterdir() if _is_denoiser(entry)]
    order = {name: i for i, name in enumerate(DENOISERS)}
    return tuple(sorted(names, key=lambda name: (name == _without_ema(name), order.get(_without_ema(name), 99), name)))


def _is_denoiser(folder: Path) -> bool:
    name, config = re.sub(r"_\d+$", "", _without_ema(folder.name)), folder / "config.json"
    return name in DENOISERS and config.is_file() and "_class_name" in read_json(config)


def _without_ema(name: str) -> str:
    return re.sub(r"^ema[_-]|[_-]ema$", "", name)


def snapshot_of(folder: Path) -> Path:
    """Returns the snapshot in a folder of the Hub's cache, `models--owner--name`; other folders as they are.

    Raises:
        ValueError: If there are several snapshots and none is that of `refs/main`.
    """
    snapshots = folder / "snapshots"
    if not folder.name.startswith("models--") or not snapshots.is_dir():
        return folder
    names = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    main = folder / "refs" / "main"
    wanted = main.read_text(encoding="utf-8").strip() if main.is_file() else None
    if len(names) != 1 and wanted not in names:
        raise ValueError(f"{folder} has {len(names)} snapshots ({', '.join(names[:4])}); pass one of them")
    return snapshots / (names[0] if len(names) == 1 else str(wanted))


def _denoiser(folder: Path, index: Mapping[str, Any]) -> str:
    components = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    denoiser = next((name for name in DENOISERS if name in components), None)
    if denoiser is None:
        raise ValueError(f"{folder} has no transformer and no unet; pass --subfolder, one of {', '.join(components)}")
    return denoiser


def _snapshot(name: str, subfolder: str | None) -> Path:
    """Returns the folder of a model of the Hub, from the cache or downloaded if the user asks for it."""
    remote, name = name.startswith(REMOTE), name.removeprefix(REMOTE)
    if not is_hub_name(name):
        raise FileNotFoundError(
            f"there is no folder {name}; pass one that diffusers saved, or owner/name of the Hub{similar_path(name)}"
        )
    import huggingface_hub

    patterns = DOWNLOADED if subfolder is None else [f"{subfolder}/*.safetensors", *DOWNLOADED[1:]]
    try:
        folder = huggingface_hub.snapshot_download(
            name, local_files_only=not remote, allow_patterns=patterns, ignore_patterns=NOT_DOWNLOADED
        )
        return Path(folder)
    except Exception as error:  # The Hub's client raises many kinds of errors.
        pass_on(error)
        missing = f"{name} is not a folder and not in the Hub's cache; pass {REMOTE}{name} to download it"
        raise FileNotFoundError(hub_error_line(name, error) if remote else missing) from error


def _refuse_links_outside(folder: Path) -> None:
    root = folder.resolve()
    # The Hub's cache links its snapshots to blobs beside them.
    root = root.parents[1] if root.parent.name == "snapshots" and len(root.parents) > 1 else root
    for link in (folder, *folder.rglob("*")):
        if link.is_symlink() and link != folder and not link.resolve().is_relative_to(root):
            raise ValueError(f"{link} is a link out of the folder, which is not followed; replace it by the file")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds a dictionary.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        content = read_config(path)
    except OSError as error:
        pass_on(error)
        raise ValueError(f"{path} is damaged ({one_line(error)}); copy or download it again") from error
    check_numbers(content, path)
    return content


def weight_files(folder: Path) -> dict[str, Any]:
    """Returns the options of `from_pretrained` that select the weights in a folder.

    If there are several variants, the plain one is selected, else the first by name.

    Raises:
        MissingWeights: If a weight file is missing.
        ValueError: If the index of the weights is damaged.
    """
    match = _weight_variants(folder)[0]
    files = {p.name for p in folder.iterdir()}
    for shard in _shards(folder, match.string):
        if shard not in files:
            raise MissingWeights(f"there is no weight file {folder / shard}; put it there")
    return {"use_safetensors": ".safetensors" in match.string, "variant": match[1]}


def read_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Returns the weight files that `weight_files` selects, and the names of the other variants beside them."""
    match, *others = _weight_variants(folder)
    return [folder / shard for shard in _shards(folder, match.string)], [other.string for other in others]


def _weight_variants(folder: Path) -> list[re.Match[str]]:
    """Returns the names of the files or indices of weights: safetensors first, then the plain one of the variants."""
    files = {p.name for p in folder.iterdir()}
    matches: list[re.Match[str]] = []
    for suffix in ("safetensors", "bin"):
        single = re.compile(rf"{WEIGHTS}(?:\.(\w+))?\.{suffix}")
        index = re.compile(rf"{WEIGHTS}\.{suffix}\.index(?:\.(\w+))?\.json")
        found = (m for name in files if (m := single.fullmatch(name) or index.fullmatch(name)))
        matches += sorted(found, key=lambda match: match[1] or "")
    if not matches:
        raise MissingWeights(f"there is no weight file {folder / f'{WEIGHTS}.safetensors'}; put it there")
    return matches


def _shards(folder: Path, name: str) -> list[str]:
    if not name.endswith(".json"):
        return [name]
    shards = read_json(folder / name).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
        raise ValueError(f"{folder / name} is damaged (no map of weights to files beside it); download it again")
    return sorted(set(shards.values()))
