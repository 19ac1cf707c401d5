"""Converts any checkpoint to safetensors, which cannot hold code, with a JSON file beside it that names its origin."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from layerprobe.checkpoints.formats import METADATA_KEY
from layerprobe.checkpoints.unpickling import printable
from layerprobe.checkpoints.weight_sets import read_weights
from layerprobe.files import atomic_write
from layerprobe.memory import pass_on


def convert_checkpoint(
    source: str | Path, out: str | Path, *, weights: str | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Writes one set of weights of a checkpoint as safetensors, with the types and names that `read_weights` returns.

    Both files appear whole or not at all. Repeating a finished conversion changes nothing.

    Args:
        source: Path of the checkpoint, as for `read_weights`.
        out: Path of the new `.safetensors` file; the JSON file beside it has the same name with `.json`.
        weights: Name of the set of weights, as for `read_weights`.
        dry_run: Whether to read and check only, and write nothing.

    Returns:
        Content of the JSON file: the origin and number of the weights, and settings of their training.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If the checkpoint cannot be read safely, or `out` exists and holds something else.
    """
    out = Path(out)
    description = out.with_suffix(".json")
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} is not the name of a safetensors file; end it in .safetensors")
    checkpoint = read_weights(source, weights=weights)
    record = {
        "source": Path(source).name,
        "source_sha256": _hash(checkpoint.files),
        "format": checkpoint.format,
        "container": checkpoint.container,
        "containers": list(checkpoint.containers),
        "tensors": len(checkpoint.tensors),
        "values": sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()}),
        "args": _json(checkpoint.args),
        "foreign": list(checkpoint.foreign),
    }
    if out.exists() or description.exists():
        if not (out.is_file() and _describes(description, record)):
            existing = out if out.exists() else description
            raise ValueError(f"{existing} exists and does not hold these weights; choose another --out")
    elif not dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt"}
        if checkpoint.record:
            metadata[METADATA_KEY] = json.dumps(checkpoint.record, sort_keys=True)
        try:
            with atomic_write(out) as partial, atomic_write(description) as partial_description:
                partial_description.write_text(json.dumps(record, indent=1), encoding="utf-8")
                save_file(_separate(checkpoint.tensors), partial, metadata=metadata)
        except OSError:  # The disk is full, or the folder cannot be written to.
            raise
        except Exception as error:
            pass_on(error)
            reason = printable(" ".join(str(error).split()))
            raise ValueError(
                f"{source} cannot be written as safetensors ({reason}); convert its types first"
            ) from error
    return record


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies the tensors that share memory with others or have gaps, which safetensors refuses."""
    separate, storages = {}, set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in storages
        storages.add(storage.data_ptr())
        separate[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
    return separate


def _hash(files: tuple[Path, ...]) -> str:
    """SHA-256 of a file; for several files, of the list that `sha256sum` prints."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(files) == 1:
        return digests[0]
    lines = (f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _describes(description: Path, record: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads(description.read_text(encoding="utf-8")) == json.loads(json.dumps(record)))
    except (OSError, ValueError) as error:
        pass_on(error)
        return False


def _json(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by text."""
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
