"""Check of this machine: versions, devices, whether the embedded model runs; and which families were verified."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from layerprobe import __version__
from layerprobe.analyses.runs.folder import PACKAGES
from layerprobe.backbones import installed_versions, layer_shapes, other_classes, verified_families
from layerprobe.checkpoints import open_checkpoint


def examine_machine() -> dict[str, Any]:
    """Returns versions and devices of this machine, after running the embedded model on it."""
    backbone = open_checkpoint("digits", device="auto")
    shapes = layer_shapes(backbone)
    return {
        "layerprobe": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "embedded model": f"{backbone.name}: {len(shapes)} layers read",
    }


def examine_families() -> dict[str, Any]:
    """Returns which classes of diffusers were verified, with which versions, and what the installed one has besides."""
    record = verified_families()
    return {
        "verified_with": record["versions"],
        "installed": installed_versions(),
        "classes": record["classes"],
        "without_entry": other_classes(),
    }
