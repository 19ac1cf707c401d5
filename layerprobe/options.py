"""Dataclass fields that are also options of the command line.

A dataclass says everything about an option once: the field gives its name, type and default, the `Attributes:` section
of the docstring gives the help text, and `option` adds what only the command line needs. Commands and the tables in the
documentation are made from `option_fields`. Modules with such dataclasses must not import torch, so that
`layerprobe --help` starts quickly.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Headings of the groups of options on help pages, which show them in the order of `PANELS`.
CHECKPOINT_PANEL = "Model"
NETWORK_PANEL = "Model with fresh weights"
DATA_PANEL = "Data"
MEDIA_PANEL = "Sound, motion and video"
PROBING_PANEL = "Probing"
RANKING_PANEL = "Ranking"
TRAINER_PANEL = "Other trainers"
OPTIMIZER_PANEL = "Training"
LEARNING_PANEL = "Training objective"
LAYERSYNC_PANEL = "LayerSync"
TRIAL_PANEL = "Trial"
SAMPLING_PANEL = "Sampling"
OUTPUT_PANEL = "Output"
RUNNING_PANEL = "Running"
PANELS = (
    CHECKPOINT_PANEL,
    NETWORK_PANEL,
    DATA_PANEL,
    MEDIA_PANEL,
    PROBING_PANEL,
    RANKING_PANEL,
    TRAINER_PANEL,
    OPTIMIZER_PANEL,
    LEARNING_PANEL,
    LAYERSYNC_PANEL,
    TRIAL_PANEL,
    SAMPLING_PANEL,
    OUTPUT_PANEL,
    RUNNING_PANEL,
)

_KEY = "option"
_ENTRY = re.compile(r"^    (\w+): ?(.*)$")


@dataclass(frozen=True)
class OptionField:
    """A field of a dataclass as an option.

    Attributes:
        field: Name of the field.
        name: Name of the option as a parameter, in environment variables: "sync_decay".
        flag: Name of the option on the command line: "--sync-decay". Arguments have their name in capitals.
        type: Type of one value, without None: int, float, str or bool, or a tuple type such as `tuple[float, float]`.
        default: Default of the field; `dataclasses.MISSING` if the field is required.
        help: Help text.
        panel: Heading of the group of options on the help page: that of the field, else `PANEL` of the class.
        minimum: Smallest allowed value, or None.
        maximum: Largest allowed value, or None.
        value: Value that a flag without a value stands for, or None for options that take a value.
        is_argument: Whether the command line takes the value by position, without a flag.
        choices: The values that the field may have, if its type is a choice of strings.
    """

    field: str
    name: str
    flag: str
    type: Any
    default: Any
    help: str
    panel: str = RUNNING_PANEL
    minimum: float | None = None
    maximum: float | None = None
    value: Any = None
    is_argument: bool = False
    choices: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        """Whether the option has no default."""
        return self.default is dataclasses.MISSING

    @property
    def is_switch(self) -> bool:
        """Whether the option is a flag without a value."""
        return self.type is bool or self.value is not None


def option(
    name: str | None = None,
    *,
    flag: str | None = None,
    help: str | None = None,
    panel: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    value: Any = None,
    is_argument: bool = False,
) -> dict[str, Any]:
    """Returns the metadata that makes a dataclass field an option of the command line.

    Args:
        name: Name of the option with underscores; the field's name where not given.
        flag: Flag, if it does not follow from the name.
        help: Help text, if the field's entry in the docstring is about Python rather than the command line.
        panel: See `OptionField`.
        minimum: See `OptionField`.
        maximum: See `OptionField`.
        value: See `OptionField`.
        is_argument: See `OptionField`.
    """
    settings = {"name": name, "flag": flag, "help": help, "panel": panel, "minimum": minimum, "maximum": maximum}
    settings |= {"value": value, "is_argument": is_argument}
    return {_KEY: {key: setting for key, setting in settings.items() if setting is not None}}


def option_fields(cls: type) -> tuple[OptionField, ...]:
    """Returns the fields of a dataclass that are options, in the order of the class.

    Raises:
        TypeError: If a field has no entry in the `Attributes:` section of the docstring.
    """
    entries, hints = attribute_entries(cls), get_type_hints(cls)
    options = []
    for field in dataclasses.fields(cls):
        if _KEY not in field.metadata:
            continue
        settings = dict(field.metadata[_KEY])
        name = settings.pop("name", field.name)
        if field.name not in entries:
            raise TypeError(f"the docstring of {cls.__name__} does not describe {field.name}; add it to Attributes")
        settings.setdefault("help", entries[field.name])
        settings.setdefault("panel", getattr(cls, "PANEL", RUNNING_PANEL))
        settings.setdefault("flag", name.upper() if settings.get("is_argument") else f"--{name.replace('_', '-')}")
        hint = _given(hints[field.name])
        if get_origin(hint) is Literal:
            hint, settings["choices"] = str, get_args(hint)
        options.append(OptionField(field=field.name, name=name, type=hint, default=field.default, **settings))
    return tuple(options)


def check_ranges(instance: Any, *, skip: tuple[str, ...] = ()) -> None:
    """Checks the numbers of a dataclass instance against the ranges that its options declare; None passes.

    Args:
        instance: The instance.
        skip: Fields that may have other values than the command line allows.

    Raises:
        ValueError: If one is outside of its range or not finite; the message names the field.
    """
    for option in option_fields(type(instance)):
        value = getattr(instance, option.field)
        if value is None or option.field in skip or (option.minimum is None and option.maximum is None):
            continue
        if option.minimum is not None and not option.minimum <= value < math.inf:  # NaN also fails this
            raise ValueError(f"{option.field} must be at least {option.minimum}, got {value!r:.40}")
        if option.maximum is not None and not value <= option.maximum:
            raise ValueError(f"{option.field} must be at most {option.maximum}, got {value!r:.40}")


def flags(cls: type, fields: Iterable[str]) -> list[str]:
    """Returns the flags of fields of a dataclass; names that are no options become flags of that name."""
    by_field = {option.field: option.flag for option in option_fields(cls)}
    return [by_field.get(name, f"--{name.replace('_', '-')}") for name in fields]


def attribute_entries(cls: type) -> dict[str, str]:
    """Returns the entries of the `Attributes:` section of a class's docstring, each as one line."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    entries: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):  # the next section
            break
        if match := _ENTRY.match(line):
            name, entries[match[1]] = match[1], match[2]
        elif name and line.strip():
            entries[name] += f" {line.strip()}"
    return entries


def to_record(instance: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass instance that are not None, by name."""
    values = ((field.name, getattr(instance, field.name)) for field in dataclasses.fields(instance))
    return {name: value for name, value in values if value is not None}


def _given(hint: Any) -> Any:
    """Returns a type without None."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
    return hint
