"""Peak memory of reading the averaged weights of a training checkpoint, over the size of these weights.

A checkpoint with weights, their average and the optimizer's two moments is written into a temporary folder, in every
format that can hold it. Each reading runs in a process of its own and touches every value. The peak counts from after
the imports; pages of the file that are mapped count as memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

LAYER_SIZE = 2048
FORMATS = ("PyTorch zip", "PyTorch legacy", "pickle", "DCP folder", "safetensors")
PEERS = {"PyTorch zip": ("torch.load mmap", "torch.load"), "PyTorch legacy": ("torch.load",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="Of the whole checkpoint; a quarter is the average."
    )
    parser.add_argument("--formats", default=",".join(FORMATS[:1]), help=f"Comma-separated, of {', '.join(FORMATS)}.")
    parser.add_argument("--measure", nargs=2, metavar=("HOW", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(*options.measure)))
        return
    layers = max(1, round(options.gigabytes * 2**30 / 4 / (4 * LAYER_SIZE**2)))
    for name in options.formats.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = written(Path(folder), name, layers)
            for how in ("read_weights", "into a module", *PEERS.get(name, ())):
                command = [sys.executable, __file__, "--measure", how, str(path)]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                peak, before, size = (round(found[key] / 2**20) for key in ("peak", "before", "size"))
                print(
                    f"{name}, {how}: peak {peak} MiB over {before} MiB of imports = {found['peak'] / found['size']:.3f}"
                    f" of the {size} MiB of averaged weights, {found['seconds']:.2f} s",
                    flush=True,
                )


def network(layers: int, device: str) -> nn.Module:
    with torch.device(device):
        return nn.Sequential(*(nn.Linear(LAYER_SIZE, LAYER_SIZE, bias=False) for _ in range(layers)))


def written(folder: Path, name: str, layers: int) -> Path:
    def state(value: int) -> dict[str, Tensor]:
        return {f"{i}.weight": torch.full((LAYER_SIZE, LAYER_SIZE), float(value + i)) for i in range(layers)}

    moments = {i: {"exp_avg": tensor, "exp_avg_sq": tensor + 1} for i, tensor in enumerate(state(-1).values())}
    content = {"model": state(0), "ema": state(1), "opt": {"state": moments}, "args": argparse.Namespace(lr=1e-4)}
    path = folder / "checkpoint.pt"
    if name == "DCP folder":
        import torch.distributed.checkpoint as dcp

        del content["args"]
        dcp.save(content, checkpoint_id=folder / "checkpoint", no_dist=True)
        return folder / "checkpoint"
    if name == "safetensors":
        from safetensors.torch import save_file

        save_file(content["ema"], folder / "checkpoint.safetensors")  # It has no place for the rest.
        return folder / "checkpoint.safetensors"
    if name == "pickle":
        import pickle

        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=name == "PyTorch zip")
    return path


def measured(how: str, path: str) -> dict[str, float]:
    from layerprobe.checkpoints import read_weights

    torch.ones(8).sum()
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before, began = memory("VmRSS"), time.perf_counter()
    if how.startswith("torch"):
        safe = [argparse.Namespace]
        with torch.serialization.safe_globals(safe):
            tensors = torch.load(path, map_location="cpu", mmap=how.endswith("mmap"), weights_only=True)["ema"]
    else:
        tensors = read_weights(path).tensors
    if how == "into a module":
        module = network(len(tensors), "meta")
        module.load_state_dict(tensors, assign=True)
        tensors = module.state_dict()
    for i in range(len(tensors)):
        assert float(tensors[f"{i}.weight"].max()) == i + 1, "not the averaged weights"
    seconds = time.perf_counter() - began
    size = sum(tensor.nbytes for tensor in tensors.values())
    return {"before": before, "peak": memory("VmHWM") - before, "size": size, "seconds": seconds}


def memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
