"""Commands whose options are fields of dataclasses.

`from_dataclasses` turns every parameter of a command that is annotated with a dataclass into the options that this
dataclass declares (see `layerprobe.options`), and calls the command with the object. The annotation says more where a
command differs from the dataclass:

    source: DataSource                                     all options; --data is required
    source: DataSource | None                              None if --data is not given
    source: Annotated[DataSource, without("num_test")]     all options but some
    options: Annotated[Given, only(TrainingPlan, "steps", "batch_size", steps=1000, batch_size=Unset("..."))]
                                                           some options with other defaults, as a dictionary
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin
from warnings import catch_warnings, simplefilter

import typer

from layerprobe.cli.parsing import integers, names, numbers
from layerprobe.messages import as_written, unknown
from layerprobe.options import OptionField, option_fields
from layerprobe.ranks import processes

Command = Callable[..., None]
# Variables by which torchrun and srun number the processes that they start together.
_STARTED = {"WORLD_SIZE", "SLURM_STEP_NUM_TASKS"}
# Options that a command gets as a dictionary by field; those that were not given are missing.
Given = dict[str, Any]


@dataclass(frozen=True)
class Unset:
    """A default of a command that is only known once the command runs.

    Attributes:
        source: Where the value comes from, for the help page: "as the checkpoint was trained".
    """

    source: str


@dataclass(frozen=True)
class Choice:
    """The fields of a dataclass that a command has as options.

    Attributes:
        cls: The dataclass, if the annotation does not name it.
        only: Names of the fields; empty for all options.
        without: Names of the fields to leave out.
        defaults: Defaults of this command by field.
    """

    cls: type | None = None
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


def without(*fields: str) -> Choice:
    """Returns the choice of all options but these."""
    return Choice(without=fields)


def only(cls: type, *fields: str, **defaults: Any) -> Choice:
    """Returns the choice of these options, with defaults of the command in place of the dataclass's."""
    return Choice(cls, only=fields, defaults=defaults)


@dataclass(frozen=True)
class Group:
    """Options of a command that come from one dataclass.

    Attributes:
        parameter: Name of the command's parameter.
        cls: The dataclass.
        options: The options.
        defaults: Defaults of this command by field.
        builds: Whether the command gets an object; a dictionary otherwise.
        optional: Whether the command gets None if the required options are not given.
    """

    parameter: str
    cls: type
    options: tuple[OptionField, ...]
    defaults: Mapping[str, Any]
    builds: bool
    optional: bool

    def parameters(self) -> list[inspect.Parameter]:
        """Returns the parameters from which typer makes the options."""
        return [_parameter(option, self._default(option)) for option in self.options]

    def value(self, values: dict[str, Any]) -> Any:
        """Takes the values of the options out of `values` and returns what the command gets.

        Raises:
            ValueError: If a value cannot be parsed or the dataclass refuses it; the message names the flag.
        """
        fields: dict[str, Any] = {}
        for option in self.options:
            value = values.pop(option.name)
            if value is not None and not (option.is_switch and not value):
                fields[option.field] = _parsed(value, option)
        if not self.builds:
            return fields
        missing = [option.flag for option in self.options if option.required and option.field not in fields]
        if missing:
            given = [
                option.flag for option in self.options if fields.get(option.field, option.default) != option.default
            ]
            if given:
                raise ValueError(
                    f"{given[0]} has no effect without {missing[0]}; pass {missing[0]} too, or leave out {given[0]}"
                )
            return None
        try:
            built = self.cls(**fields)
        except ValueError as error:
            raise ValueError(_with_flags(str(error), self.options)) from error
        if hasattr(built, "check"):  # of what a command would open, before it imports what opens it
            built.check()
        return built

    def _default(self, option: OptionField) -> Any:
        if self.optional and option.required:
            return None
        default = self.defaults.get(option.field, option.default)
        if isinstance(default, Unset):
            return dataclasses.replace(default, source=f"{default.source}, else {option.default}")
        return default


def from_dataclasses(*, several_processes: bool = False) -> Callable[[Command], Command]:
    """Makes the options of a command from the dataclasses that its parameters are annotated with.

    Args:
        several_processes: Whether several processes may run the command together. Their options are then read when the
            processes have met, so that only one of them reports an error.
    """

    def decorate(command: Command) -> Command:
        parameters: list[inspect.Parameter] = []
        groups: list[Group] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            group = _group(parameter)
            if group is not None:
                groups.append(group)
            parameters += [parameter] if group is None else group.parameters()

        def call(**values: Any) -> None:
            with _processes() if several_processes and _STARTED & set(os.environ) else nullcontext():
                for group in groups:
                    values[group.parameter] = group.value(values)
                command(**values)

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.several_processes = several_processes  # type: ignore[attr-defined]
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        )
        call.groups = tuple(groups)  # type: ignore[attr-defined]
        return call

    return decorate


def changed(instance: Any) -> dict[str, Any]:
    """Returns the options of a dataclass instance that differ from their defaults, by name."""
    values = ((option, getattr(instance, option.field)) for option in option_fields(type(instance)))
    return {option.name: value for option, value in values if value != option.default}


def groups_of(command: Command) -> tuple[Group, ...]:
    """Returns the groups of options of a command that come from dataclasses."""
    groups: tuple[Group, ...] = getattr(command, "groups", ())
    return groups


def shares_work(command: Command | None) -> bool:
    """Returns whether several processes may run a command together."""
    return getattr(command, "several_processes", False)


@contextmanager
def _processes() -> Iterator[None]:
    """The processes of the command, of which all but the first are silent."""
    with processes() as ranks:
        if ranks.is_first:
            yield
            return
        with (
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
            catch_warnings(),
        ):
            simplefilter("ignore")
            yield


def _group(parameter: inspect.Parameter) -> Group | None:
    """Returns the group that a parameter stands for; None for a parameter that is an option itself."""
    annotation, choice = parameter.annotation, Choice()
    if get_origin(annotation) is Annotated:
        annotation, *marks = get_args(annotation)
        choice = next((mark for mark in marks if isinstance(mark, Choice)), choice)
    optional = isinstance(annotation, types.UnionType)
    if optional:
        annotation = get_args(annotation)[0]
    cls = choice.cls or annotation
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        return None
    options = [option for option in option_fields(cls) if option.field not in choice.without]
    if choice.only:
        by_field = {option.field: option for option in options}
        options = [by_field[name] for name in choice.only]
    return Group(parameter.name, cls, tuple(options), choice.defaults, builds=choice.cls is None, optional=optional)


def _parameter(option: OptionField, default: Any) -> inspect.Parameter:
    is_tuple = get_origin(option.type) is tuple
    kind: Any = bool if option.is_switch else str if is_tuple else option.type
    shown: bool | str = True
    if isinstance(default, Unset):
        default, shown = None, default.source
    elif option.is_switch:
        default = False
    elif is_tuple and default is not dataclasses.MISSING:
        default = ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in default or ()) or None
    if default is None:
        kind |= None
    if option.is_argument:
        declared = typer.Argument(help=option.help)
    else:
        limits: dict[str, Any] = {"min": option.minimum, "max": option.maximum}
        declared = typer.Option(
            option.flag, help=option.help, rich_help_panel=option.panel or None, show_default=shown, **limits
        )
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind, declared],
        default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
    )


def _parsed(value: Any, option: OptionField) -> Any:
    if option.value is not None:
        return option.value
    if option.choices:
        value = as_written(value, option.choices)
        if value not in option.choices:
            raise ValueError(unknown(option.flag, value, option.choices))
    if get_origin(option.type) is not tuple:
        return value
    kind, *rest = get_args(option.type)
    if kind is str:
        return tuple(names(value))
    parts: tuple[float, ...] = (integers if kind is int else numbers)(value, option.flag)
    if rest != [...] and len(parts) != 1 + len(rest):
        raise ValueError(f"{option.flag} {value} is not {1 + len(rest)} numbers; write them as 0.2,0.7")
    return parts


def _with_flags(message: str, options: Iterable[OptionField]) -> str:
    """Writes flags in place of field names; a name of one word may be meant as a word."""
    for option in options:
        if "_" in option.field:
            message = re.sub(rf"\b{option.field}\b", option.flag, message)
    return message
