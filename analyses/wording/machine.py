"""A machine in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def machine_rows(machine: Mapping[str, Any]) -> dict[str, str]:
    """Returns the record of a machine as texts by name, one device a row.

    Args:
        machine: Record as from `describe_machine`, with "precision" and "embedded model".
    """
    memory, driver = machine["memory_bytes"], machine["driver"]
    rows = {"layerprobe": machine["layerprobe"], "python": machine["python"], "platform": machine["platform"]}
    rows |= machine["packages"]
    rows |= {"processors": f"{machine['processors']}, {machine['threads']} threads of torch"}
    rows |= {"memory": gigabytes(memory) if memory else "unknown"}
    for index, device in enumerate(machine["devices"]):
        kinds = [name for name in ("bfloat16", "tf32") if device[name]]
        rows[f"cuda:{index}"] = (
            f"{device['name']}, {gigabytes(device['memory_bytes'])}, compute capability {device['capability']}, "
            f"{' and '.join(kinds) if kinds else 'neither bfloat16 nor tf32'}"
        )
    if not machine["devices"]:
        rows["cuda"] = "none" if driver["cuda"] or driver["rocm"] else "none: this torch is built for the CPU"
    else:
        rows["driver"] = ", ".join(f"{name} {number}" for name, number in driver.items() if number)
    rows["precision"] = f"{machine['precision']}, unless --precision says another"
    return rows | {"embedded model": machine["embedded model"]}


def gigabytes(size: float) -> str:
    """Returns a size in bytes as gibibytes, or mebibytes below one: "79.1 GiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
