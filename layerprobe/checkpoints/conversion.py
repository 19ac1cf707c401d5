"""Any checkpoint -> safetensors, which cannot hold code, and a JSON file beside it that says where it comes from."""

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

from layerprobe.checkpoints.formats import METADATA_KEY, weight_files
from layerprobe.checkpoints.unpickling import printable
from layerprobe.checkpoints.weight_sets import read_weights
from layerprobe.files import whole


def convert_checkpoint(
    source: str | Path, out: str | Path, *, weights: str | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Writes one set of weights of a checkpoint as safetensors, types and names as `read_weights` gives them.

    Both files appear whole or not at all. Repeating a finished conversion changes nothing.

    Args:
        source: See `read_weights`.
        out: A `.safetensors` file; the JSON file beside it has the same name with `.json`.
        weights: See `read_weights`.
        dry_run: Reads and checks, and writes nothing.

    Returns:
        What the JSON file says: where the weights come from, how many they are, and settings of their training.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it cannot be read safely, or `out` is something else already.
    """
    out = Path(out)
    description = out.with_suffix(".json")
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} is not the name of a safetensors file; end it in .safetensors")
    read = read_weights(source, weights=weights)
    record = {
        "source": Path(source).name,
        "source_sha256": _hash(weight_files(source)),
        "format": read.format,
        "container": read.container,
        "containers": list(read.containers),
        "tensors": len(read.tensors),
        "values": sum(tensor.numel() for tensor in read.tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in read.tensors.values()}),
        "args": _json(read.args),
        "foreign": list(read.foreign),
    }
    if out.exists() or description.exists():
        if not (out.is_file() and _says(description, record)):
            taken = out if out.exists() else description
            raise ValueError(f"{taken} exists and does not hold these weights; choose another --out")
    elif not dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt"} | ({METADATA_KEY: json.dumps(read.record, sort_keys=True)} if read.record else {})
        with whole(out) as partial, whole(description) as partial_description:
            partial_description.write_text(json.dumps(record, indent=1), encoding="utf-8")
            try:
                save_file(_separate(read.tensors), partial, metadata=metadata)
            except Exception as error:
                partial.unlink()
                partial_description.unlink()
                why = printable(" ".join(str(error).split()))
                raise ValueError(f"{source} does not fit into safetensors ({why}); convert its types first") from error
    return record


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those tensors that share memory with others, or have gaps, which safetensors refuses."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        separate[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
    return separate


def _hash(files: tuple[Path, ...]) -> str:
    """SHA-256 of a file; of several, over the list that `sha256sum` prints of them."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(files) == 1:
        return digests[0]
    listed = (f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True))
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def _says(description: Path, record: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads(description.read_text(encoding="utf-8")) == json.loads(json.dumps(record)))
    except (OSError, ValueError):
        return False


def _json(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become texts."""
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
