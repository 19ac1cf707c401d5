"""Sentences about checks of a layer pair, published pairs, and what trainers do with a pair."""

from __future__ import annotations

from collections.abc import Sequence

from layerprobe.analyses.selection import Finding, PublishedPair, ReadPair, Trainer

_SENTENCES = {
    "LP001": "{student} is its own teacher: the cosine has no gradient there, and with a projector or a teacher of "
    "averaged weights published trainings got worse (SRA 3 <- 3, Self-Flow 20 <- 20).",
    "LP002": "the student {student} is at {depth:.2f} of the depth; published students beyond 0.5 kept 0.64 of the "
    "best gain or less, with an external encoder 0.82 or less.",
    "LP003": "the teacher is {distance:.2f} of the depth after the student; published pairs closer than 0.15 kept "
    "0.64 of the best gain or less, pairs at least 0.3 apart 0.82 or more.",
    "LP004": "the {role} is at {depth:.2f} of the depth; the {end_name} published one is at {end:.2f}, and nothing is "
    "known beyond.",
    "LP005": "the weights do not fit the declared schedule and prediction, so what was measured at a noise level is "
    "not what the layers do there.",
    "LP006": "the teacher does not beat the raw input: {quality:.3f} against {control:.3f}.",
    "LP007": "the teacher does not beat random weights: {quality:.3f} against {control:.3f}; a pick that failed on "
    "CIFAR-10 had this sign.",
    "LP008": "the teacher {teacher} comes before the student {student}; a teacher comes later.",
    "LP010": "the weight is {weight:g}: {effect}.",
    "LP011": "the gradient goes into the teacher too, so the teacher may move to the student instead.",
    "LP012": "{option} is {value}, so nothing is aligned; it must be {needed}.",
    "LP013": "{option} = {written:g} is read as {meant:g}.",
}


def finding_text(finding: Finding, layers: Sequence[str] = ()) -> str:
    """Returns what a check found, as one sentence.

    Args:
        finding: Finding of a check.
        layers: Names of the blocks in the order of the network; `blocks.0`, `blocks.1`, ... if empty.
    """
    values = dict(finding.values)
    for role in ("student", "teacher"):
        if role in values:
            values[role] = layer_name(int(values[role]), layers)
    if finding.code == "LP004":
        values["end_name"] = "earliest" if values["role"] == "student" else "latest"
    if finding.code == "LP009":
        return _no_such_block(values, layers)
    if finding.code == "LP010":
        values["effect"] = "nothing is aligned" if values["weight"] == 0 else "it pushes the layers apart"
    return _SENTENCES[finding.code].format(**values)


def layer_name(block: int, layers: Sequence[str] = ()) -> str:
    """Returns the name of a block, counted from 0; `blocks.N` if the names are not known."""
    return layers[block] if 0 <= block < len(layers) else f"blocks.{block}"


def published_text(pair: PublishedPair) -> str:
    """Returns a published self-aligned pair with its gain, in the counting of the papers, from 1."""
    place = f"{pair.student} <- {pair.teacher} ({pair.student_depth:.2f}, {pair.teacher_depth or 0.0:.2f})"
    share = "" if pair.share is None else f", {pair.share:.2f} of the best gain of its study"
    gain = f"gain {pair.gain:+.0%} in {pair.metric} at {pair.budget}"
    return f"{pair.method}, {pair.network}: {place}, {gain}{share} ({pair.confidence})"


def trainer_notes(trainer: Trainer) -> list[str]:
    """Returns how a trainer counts, what its defaults mean, and what it does with a block that does not exist."""
    notes = [f"{trainer.name} counts blocks from {trainer.first}: {trainer.first} is blocks.0."]
    if trainer.zero_is_first:
        notes.append("0 is the same block as 1: numbers counted from 0 are all one block too early, except 0.")
    if trainer.student_by_default:
        notes.append(f"Without {trainer.teacher} the student is its own teacher.")
    elif trainer.default_teacher is not None:
        notes.append(
            f"Without {trainer.teacher} the teacher is {trainer.default_teacher}, whatever the network and the student "
            f"({trainer.default_student} by default)."
        )
    if not trainer.teacher:
        notes.append("An external encoder teaches; what is known of pairs tells about the student alone.")
    notes += [f"Nothing is aligned without {_setting(name, on[0])}." for name, on, off in trainer.on if off not in on]
    if trainer.zero_weight_is_default:
        notes.append(f"{trainer.weight} = 0 means {trainer.default_weight:g}.")
    if trainer.unknown_block == "trains without":
        notes.append("A block that does not exist is a warning in its log, and nothing is aligned.")
    if not trainer.runs:
        notes.append("The version that was read declares these options and stops when they are used.")
    return notes


def read_pair_text(read: ReadPair, layers: Sequence[str] = ()) -> str:
    """Returns which layers a configuration aligns, such as "blocks.7 <- blocks.19"."""
    facts = read.facts
    teacher = "an external encoder" if facts.teacher is None else layer_name(facts.teacher, layers)
    return f"{layer_name(facts.student, layers)} <- {teacher}"


def _no_such_block(values: dict[str, float | str], layers: Sequence[str]) -> str:
    block = int(values["block"])
    if block < 0:
        return f"the {values['role']} is before the first block, {layer_name(0, layers)}."
    last = layer_name(int(values["blocks"]) - 1, layers)
    return f"the {values['role']} would be block {block}, and the last one is {last}."


def _setting(name: str, value: bool | str) -> str:
    return name if value is True else f"{name} = {value}"
