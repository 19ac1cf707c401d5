"""Check of this machine: versions, devices, whether the embedded model runs; and which families were verified."""

from __future__ import annotations

from typing import Any

from layerprobe.analyses.runs.machine import describe_machine
from layerprobe.analyses.wording import machine_rows
from layerprobe.backbones import installed_versions, layer_shapes, other_classes, verified_families
from layerprobe.checkpoints import open_checkpoint


def examine_machine() -> dict[str, Any]:
    """Returns versions and devices of this machine, after running the embedded model on it.

    "rows" holds all of it as texts by name.
    """
    backbone = open_checkpoint("digits", device="auto").in_precision("auto")
    shapes = layer_shapes(backbone)
    record = describe_machine() | {"precision": backbone.precision}
    record["embedded model"] = f"{backbone.name}: {len(shapes)} layers read"
    return record | {"rows": machine_rows(record)}


def examine_families() -> dict[str, Any]:
    """Returns which classes of diffusers were verified, with which versions, and what the installed one has besides."""
    record = verified_families()
    return {
        "verified_with": record["versions"],
        "installed": installed_versions(),
        "classes": record["classes"],
        "without_entry": other_classes(),
    }
