"""The check of a configuration of another trainer: which layers it aligns, and what speaks against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.selection import (
    Finding,
    PairFacts,
    PublishedPair,
    ReadPair,
    Selection,
    Trainer,
    check_pair,
    check_pick,
    lines_for,
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
        layers: All layers of the network, in its order; of a pair of other modules nothing is known.
        weight: Weight of the alignment.
    """
    if not {pair.student, pair.teacher} <= set(layers):
        return []
    facts = PairFacts(layers.index(pair.student), layers.index(pair.teacher), len(layers), weight=weight)
    return [_finding_line(finding, layers) for finding in check_pair(facts)]


def pick_findings(selection: Selection) -> list[dict[str, Any]]:
    """Returns the findings of the checks on the pick as JSON values; none without a pick."""
    return [_record(finding, selection.basis.layers) for finding in check_pick(selection)]


def numbered_blocks(run: str | Path, selection: Selection) -> tuple[str, ...]:
    """Returns all blocks of the network of a run, in the order in which trainers count them.

    Raises:
        ValueError: If the run does not tell them: its layers were named by the user, or are no numbered blocks.
    """
    if (named := RunFolder(run).plan().checkpoint.layers) is not None:
        raise ValueError(
            f"{run} measured the layers that --layers {','.join(named)} names, which need not be all blocks of the "
            "network; pass --blocks, such as 28, or double_blocks:8,single_blocks:48"
        )
    layers = selection.basis.layers
    lists: dict[str, int] = {}
    for name in layers:
        prefix, _, index = name.rpartition(".")
        if index != str(lists.get(prefix, 0)) or (prefix in lists and prefix != next(reversed(lists))):
            raise ValueError(
                f"{name} of {run} is no block of a numbered list, so other trainers cannot count it; pass --blocks "
                "with the blocks that the trainer counts through, such as transformer_blocks:28"
            )
        lists[prefix] = lists.get(prefix, 0) + 1
    return layers


def pick_for(trainer: Trainer, selection: Selection, blocks: Sequence[str]) -> dict[str, Any]:
    """Returns the pick as another trainer writes it, as JSON values; "options" is None without a pick.

    Args:
        trainer: The trainer.
        selection: Selection with the pick.
        blocks: All blocks of the network, in the order in which the trainer counts them.

    Raises:
        ValueError: If a layer of the pick is not among the blocks.
    """
    options, pick = None, selection.pick
    if pick is not None:
        for name in (pick.student, pick.teacher):
            if name not in blocks:
                raise ValueError(
                    f"{name} of the pick is not among the {len(blocks)} blocks {blocks[0]} to {blocks[-1]}; pass "
                    "--blocks with the names of the run's layers, such as transformer_blocks:28"
                )
        teacher = blocks.index(pick.teacher) if trainer.teacher else None
        options = lines_for(trainer, blocks.index(pick.student), teacher, len(blocks))
    return {"trainer": trainer.key, "blocks": len(blocks), "options": options, "notes": trainer_notes(trainer)}


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
