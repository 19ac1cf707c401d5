"""The check of a configuration of another trainer: which layers it aligns, and what speaks against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layerprobe.analyses.selection import (
    Finding,
    PairFacts,
    PublishedPair,
    ReadPair,
    check_pair,
    nearest_published,
    read_pair,
    read_settings,
    recognized,
    trainer_named,
)
from layerprobe.analyses.wording import finding_text, published_text, read_pair_text, trainer_notes
from layerprobe.layersync import LayerPair


def check_config(path: str | Path, *, trainer: str | None = None, layers: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the pair of a configuration and checks it.

    Args:
        path: Configuration: JSON, TOML, YAML, or a script with a command line.
        trainer: Key of the trainer that reads it; recognized by its options if None.
        layers: Names of the blocks in the order of the network; empty if they are not known.

    Returns:
        JSON values; "failed" tells whether a check found an error.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or has no pair.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration {path}; pass the file with the options of the trainer")
    try:
        settings = read_settings(path.read_text(encoding="utf-8"), path.suffix)
        chosen = trainer_named(trainer) if trainer else recognized(settings)
        read = read_pair(chosen, settings, len(layers) or None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    findings, published = check_pair(read.facts), _nearest(read.facts)
    return {
        "config": str(path),
        "trainer": chosen.key,
        "pair": read_pair_text(read, layers),
        "weight": read.facts.weight,
        "left_out": list(read.left_out),
        "findings": [_record(finding, layers) for finding in findings],
        "published": [asdict(pair) for pair in published],
        "notes": trainer_notes(chosen),
        "failed": any(finding.severity == "error" for finding in findings),
        "lines": _lines(read, findings, published, layers),
    }


def pair_warnings(pair: LayerPair, layers: Sequence[str], *, weight: float) -> list[str]:
    """Returns what speaks against aligning two layers of a network, one line with its code each.

    Args:
        pair: Pair of the layers.
        layers: All layers of the network, in its order.
        weight: Weight of the alignment.
    """
    facts = PairFacts(layers.index(pair.student), layers.index(pair.teacher), len(layers), weight=weight)
    return [_finding_line(finding, layers) for finding in check_pair(facts)]


def _nearest(facts: PairFacts) -> tuple[PublishedPair, ...]:
    if facts.teacher is None or facts.num_blocks is None or facts.num_blocks <= max(facts.student, facts.teacher):
        return ()
    return nearest_published((facts.student + 1) / facts.num_blocks, (facts.teacher + 1) / facts.num_blocks)


def _record(finding: Finding, layers: Sequence[str]) -> dict[str, Any]:
    return asdict(finding) | {"text": finding_text(finding, layers)}


def _finding_line(finding: Finding, layers: Sequence[str]) -> str:
    return f"{finding.code} {finding.severity}: {finding_text(finding, layers)}"


def _lines(
    read: ReadPair, findings: Sequence[Finding], published: Sequence[PublishedPair], layers: Sequence[str]
) -> list[str]:
    size = f" of {len(layers)} blocks" if layers else ""
    lines = [f"trainer   {read.trainer.name} ({read.trainer.read})", f"pair      {read_pair_text(read, layers)}{size}"]
    if read.facts.weight is not None:
        lines.append(f"weight    {read.facts.weight:g}")
    lines += [f"default   {name} is left out" for name in read.left_out]
    lines += [_finding_line(finding, layers) for finding in findings] or ["checks    nothing speaks against it"]
    lines += [f"published {published_text(pair)}" for pair in published]
    lines += [f"note      {note}" for note in trainer_notes(read.trainer)]
    if not layers:
        lines.append("note      Pass --blocks, the number of blocks, for the checks that need the depth.")
    return lines
