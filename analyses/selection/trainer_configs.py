"""The layer pair in a configuration of another trainer: options in JSON, TOML, YAML or a command line."""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from layerprobe.analyses.selection.pair_checks import PairFacts
from layerprobe.analyses.selection.trainers import TRAINERS, Trainer
from layerprobe.memory import pass_on

_TYPO = 0.9  # similarity of two names from which on one is taken for a slip of the other


@dataclass(frozen=True)
class ReadPair:
    """A pair as a configuration gives it.

    Attributes:
        trainer: Trainer whose options were read.
        facts: The pair in our terms: blocks counted from 0.
        left_out: Options that the configuration leaves out, so that the trainer's default holds.
    """

    trainer: Trainer
    facts: PairFacts
    left_out: tuple[str, ...]


def read_settings(text: str, suffix: str = "") -> dict[str, Any]:
    """Returns the options in a text by name, with - as _ and without leading dashes; tables are flattened.

    Args:
        text: JSON, TOML or YAML, or a command line with comments and continued lines.
        suffix: Suffix of the file, which tells the format; a text in braces is JSON, and any other is a command line.

    Raises:
        ValueError: If the text cannot be read as this format.
    """
    try:
        if suffix == ".json" or text.lstrip().startswith("{"):
            content = json.loads(text)
        elif suffix == ".toml":
            content = tomllib.loads(text)
        elif suffix in (".yaml", ".yml"):
            import yaml

            content = yaml.safe_load(text)
        else:
            return dict(_words(text))
    except Exception as error:  # each parser has errors of its own
        pass_on(error)
        raise ValueError(f"this cannot be read as {suffix.lstrip('.') or 'options'} ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"this has no names and values, but is a {type(content).__name__}; pass a file with options")
    return dict(_flat(content))


def recognized(settings: Mapping[str, Any]) -> Trainer:
    """Returns the trainer to which the options belong.

    Raises:
        ValueError: If the options are of no known trainer, or of several.
    """
    marked = {one.key: {name for name in one.marks if _norm(name) in settings} for one in TRAINERS.values()}
    found = [key for key, marks in marked.items() if marks]
    # SRA's two trainers share options, and one of them has more.
    if "sra-dts" in found and "sra" in found:
        found.remove("sra")
    if len(found) != 1:
        what = f"of {' and '.join(found)}" if found else "of no trainer that is known by them"
        names = ", ".join(found or TRAINERS)
        raise ValueError(f"the options are {what}; say which trainer reads them: --for one of {names}")
    return TRAINERS[found[0]]


def read_pair(trainer: Trainer, settings: Mapping[str, Any], num_blocks: int | None = None) -> ReadPair:
    """Returns the pair that a trainer would align with these options.

    Args:
        trainer: Trainer that reads the options.
        settings: Options by name, as `read_settings` returns them.
        num_blocks: Number of blocks of the network, if it is known.

    Raises:
        ValueError: If no option is the trainer's, a name is misspelled, a required option is missing, an option is no
            number, or the pair is written in a way that is not read.
    """
    settings = _own_names(trainer, settings)
    if not any(_norm(name) in settings for name in trainer.options):
        raise ValueError(f"this has no option of {trainer.name}; it reads {', '.join(trainer.options)}")
    for name, instead in trainer.unread:
        if settings.get(_norm(name)):
            raise ValueError(f"{name} decides what is aligned, and is not read here; write {instead} to check a pair")
    given = {
        name: _number(name, settings[_norm(name)])
        for name in (trainer.student, trainer.teacher, trainer.weight)
        if settings.get(_norm(name)) is not None
    }
    student = given.get(trainer.student, trainer.default_student)
    teacher = given.get(trainer.teacher, student if trainer.student_by_default else trainer.default_teacher)
    for name, number in ((trainer.student, student), (trainer.teacher, teacher)):
        if name and number is None:
            raise ValueError(f"{name} is missing, and {trainer.name} requires it")
    weight = given.get(trainer.weight, trainer.default_weight)
    misread: list[tuple[str, float, float]] = []
    if weight == 0 and trainer.zero_weight_is_default and trainer.default_weight is not None:
        misread.append((trainer.weight, 0, trainer.default_weight))
        weight = trainer.default_weight
    if trainer.zero_is_first:
        misread += [(name, 0, 1) for name in (trainer.student, trainer.teacher) if given.get(name) == 0]
    assert student is not None
    facts = PairFacts(
        student=_block(trainer.student, student, trainer),
        teacher=None if teacher is None else _block(trainer.teacher, teacher, trainer),
        num_blocks=num_blocks,
        weight=weight,
        stop_gradient=settings.get(_norm(trainer.stop_gradient)),
        switched_off=tuple(_switched_off(trainer, settings)),
        misread=tuple(misread),
    )
    options = (trainer.student, trainer.teacher, trainer.weight)
    return ReadPair(trainer, facts, tuple(name for name in options if name and name not in given))


def _block(option: str, number: float, trainer: Trainer) -> int:
    """Block counted from 0."""
    if number != int(number):
        raise ValueError(f"{option} is {number:g}; write a whole number")
    if number == 0 and trainer.zero_is_first:
        return 0
    return int(number) - trainer.first


def _switched_off(trainer: Trainer, settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, accepted, default in trainer.on:
        value = settings.get(_norm(name))
        value = default if value is None else value
        if value not in accepted:
            yield name, _text(value), " or ".join(map(_text, accepted))


def _own_names(trainer: Trainer, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces aliases, and refuses names that are almost a name of an option: the trainer may ignore them."""
    aliases = {_norm(other): _norm(name) for other, name in trainer.aliases}
    own = {aliases.get(name, name): value for name, value in settings.items() if name in aliases}
    own |= {name: value for name, value in settings.items() if name not in aliases}
    known = [_norm(name) for name in trainer.options]
    for name in sorted(set(own) - set(known)):
        # Options of other methods may differ in the first letter alone: crepa_enabled, irepa_enabled.
        alike = [other for other in known if other[0] == name[:1]]
        if close := difflib.get_close_matches(name, alike, n=1, cutoff=_TYPO):
            raise ValueError(f"{name} is not an option of {trainer.name}; write {close[0]}, or leave it out")
    return own


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, which is not a number")
    return value


def _words(text: str) -> Iterator[tuple[str, Any]]:
    """Options of a command line; a word a=b after --option is the option "option.a"."""
    text = re.sub(r"(^|\s)#.*", r"\1", text.replace("\\\n", " "))
    option = ""
    for word in shlex.split(text):
        if word.startswith("--"):
            option, _, value = word[2:].partition("=")
            negated = option.startswith(("no-", "no_")) and not value
            option = option[3:] if negated else option
            yield _norm(option), _value(value) if value else not negated
        elif option and re.fullmatch(r"[A-Za-z_]\w*=.*", word):
            name, _, value = word.partition("=")
            yield _norm(f"{option}.{name}"), _value(value)
        elif option and not re.match(r"-[A-Za-z]", word):
            yield _norm(option), _value(word)


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value)
            continue
        yield _norm(str(name)), _value(value) if isinstance(value, str) else value
        for word in value if isinstance(value, list) else ():
            if isinstance(word, str) and "=" in word:
                inner, _, text = word.partition("=")
                yield _norm(f"{name}.{inner}"), _value(text)


def _value(text: str) -> Any:
    """The number or truth value that a text stands for, otherwise the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _norm(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
