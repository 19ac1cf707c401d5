"""`layerprobe doctor`: check of this machine, and the verified families of models."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from layerprobe.cli import options
from layerprobe.cli.output import emit

_SHOWN = 8  # classes without an entry in a line


def doctor(
    families: Annotated[
        bool, typer.Option("--families", help="Print which classes of diffusers were verified, with which versions.")
    ] = False,
    entry: Annotated[
        str | None, typer.Option(help="Print the entry to fill in for a class of diffusers that has none.")
    ] = None,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Print versions and devices of this machine, and check that the embedded model runs.

    With --families: which classes of diffusers were verified. With --entry: what another class needs.

    Examples:
        # For a report of a problem.
        layerprobe doctor
        # Which classes of diffusers open by their path alone.
        layerprobe doctor --families
    """
    if families and entry is not None:
        raise ValueError("--families and --entry are two questions; pass one of them")
    if families:
        from layerprobe.analyses.runs import examine_families

        record = examine_families()
        emit(record, _family_lines(record), as_json=as_json)
    elif entry is not None:
        from layerprobe.backbones import entry_to_fill_in

        text = entry_to_fill_in(entry)
        where = "in CLASSES of layerprobe.backbones.diffusers.class_table, from where it is opened by path"
        emit({"class": entry, "entry": text}, [text, f"# Its place is {where}."], as_json=as_json)
    else:
        from layerprobe.analyses.runs import examine_machine

        record = examine_machine()
        emit(record, [f"{key:<24} {value}" for key, value in record.pop("rows").items()], as_json=as_json)


def _family_lines(record: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {value}" for name, value in record["verified_with"].items())
    other = {name: value for name, value in record["installed"].items() if record["verified_with"][name] != value}
    lines = [f"{len(record['classes'])} classes of diffusers were verified with {versions}"]
    if other:
        lines.append("installed here: " + ", ".join(f"{name} {value}" for name, value in other.items()))
    lines.append(f"{'class':<36} {'input':<20} {'native time':<22} layers; parts of their blocks")
    for one in record["classes"]:
        layers, parts = ", ".join(one["layers"]), ", ".join(one["parts"]) or "none"
        lines.append(f"{one['class']:<36} {one['input']:<20} {one['time']:<22} {layers}; {parts}")
    if without := record["without_entry"]:
        more = f" and {len(without) - _SHOWN} more (--json)" if len(without) > _SHOWN else ""
        lines.append(f"no entry: {', '.join(without[:_SHOWN])}{more}; --entry CLASS prints one to fill in")
    return lines
