"""The software and the devices of this machine."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from layerprobe import __version__
from layerprobe.precision import has_tf32

PACKAGES = ("torch", "numpy", "scikit-learn", "pandas", "matplotlib", "safetensors", "datasets")
_DRIVER = Path("/proc/driver/nvidia/version")


def describe_machine() -> dict[str, Any]:
    """Returns versions, memory and devices as JSON values."""
    return {
        "layerprobe": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "memory_bytes": host_memory(),
        "devices": [_device(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "driver": _driver(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def host_memory() -> int | None:
    """Returns the memory of this machine in bytes; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "bfloat16": (properties.major, properties.minor) >= (8, 0),
        "tf32": has_tf32(torch.device("cuda", index)),
    }


def _driver() -> dict[str, str | None]:
    """The driver of the GPUs, and the CUDA or ROCm that torch was built for; None for what is not there."""
    found = re.search(r"Module\b.*?\s(\d+\.[\d.]+)", _DRIVER.read_text()) if _DRIVER.is_file() else None
    return {"nvidia": found[1] if found else None, "cuda": torch.version.cuda, "rocm": torch.version.hip}
