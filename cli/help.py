"""Help pages: every option in its panel, with its default, and examples that can be copied.

The text of a page is the docstring of the command; its section `Examples:` has a line that begins with `#` and says
what for, then the command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from typer.core import TyperArgument, TyperCommand, TyperGroup

from layerprobe.options import PANELS, RUNNING_PANEL

if TYPE_CHECKING:
    from rich.console import RenderableType

ARGUMENTS = "Arguments"
_EXAMPLES = "\n\nExamples:\n"
_WIDEST = 120
_LARGE = 1000  # limits above it only catch slips of the hand
_KINDS = {int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}


class HelpfulCommand(TyperCommand):
    """A command with a help page of this module."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the help page."""
        text, _, examples = (self.help or "").partition(_EXAMPLES)
        _print(_usage(self, ctx), text, _panels(self, ctx), inspect.cleandoc(examples))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Returns the words behind the name of the command: arguments, what is required, and the rest."""
        kinds = _kinds(self.callback)
        words = []
        for parameter in sorted(self.get_params(ctx), key=lambda one: panel_of(one) != ARGUMENTS):
            if panel_of(parameter) == ARGUMENTS:
                words.append(_name(parameter) if parameter.required else f"[{_name(parameter)}]")
            elif parameter.required:
                words.append(f"{parameter.opts[0]} {kinds[parameter.name]}")
        return [*words, "[OPTIONS]"]


class HelpfulGroup(TyperGroup):
    """The application, with a help page of this module."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the help page."""
        commands = [self.commands[name] for name in self.list_commands(ctx)]
        panels = [
            (str(panel), [(one.name or "", (one.help or "").partition("\n\n")[0]) for one in members])
            for panel, members in groupby(commands, key=lambda one: getattr(one, "rich_help_panel", None))
        ]
        own = [_row(parameter, "") for parameter in self.get_params(ctx)]
        _print(_usage(self, ctx), self.help or "", [*panels, ("Options", own)], self.epilog or "")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Returns the words behind the name of the application."""
        return ["COMMAND", "[OPTIONS]"]


def examples_of(command: Callable[..., Any]) -> list[str]:
    """Returns the command lines of the examples in the help of a command."""
    _, _, examples = inspect.getdoc(command).partition(_EXAMPLES)  # type: ignore[union-attr]
    return [line.strip() for line in examples.splitlines() if line.strip()[:1] not in ("", "#")]


def panel_of(parameter: Any) -> str:
    """Returns the heading that a parameter of a command stands below."""
    if isinstance(parameter, TyperArgument):
        return ARGUMENTS
    panel = getattr(parameter, "rich_help_panel", None)
    return panel if panel in PANELS else RUNNING_PANEL


def _usage(command: Any, ctx: Any) -> str:
    return " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])


def _panels(command: Any, ctx: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    places = {panel: place for place, panel in enumerate((ARGUMENTS, *PANELS))}
    kinds = _kinds(command.callback)
    parameters = sorted(command.get_params(ctx), key=lambda one: (places[panel_of(one)], not one.required))
    return [
        (panel, [_row(parameter, kinds.get(parameter.name, "")) for parameter in members])
        for panel, members in groupby(parameters, key=panel_of)
    ]


def _kinds(command: Any) -> dict[str, str]:
    """Returns what each parameter takes, such as INT; "" for a switch."""
    return {name: _kind(one.annotation) for name, one in inspect.signature(command, eval_str=True).parameters.items()}


def _kind(annotation: Any) -> str:
    """Returns the word for a type, looking through `Annotated`, `| None` and lists."""
    if annotation in _KINDS or annotation is bool or not get_args(annotation):
        return _KINDS.get(annotation, "")
    first = _kind(get_args(annotation)[0])
    return f"{first}..." if get_origin(annotation) is list else first


def _row(parameter: Any, kind: str) -> tuple[str, str]:
    """Returns an option as it is typed, and what it means, with its limits and its default."""
    notes = ["required"] if parameter.required and panel_of(parameter) != ARGUMENTS else []
    notes += filter(None, (_limits(parameter), _default(parameter)))
    meaning = " ".join([parameter.help or "", *([f"[{'; '.join(notes)}]"] if notes else [])])
    if panel_of(parameter) == ARGUMENTS:
        return _name(parameter), meaning
    flags = ", ".join(sorted((*parameter.opts, *parameter.secondary_opts), key=lambda flag: not flag.startswith("--")))
    return f"{flags} {kind}".rstrip(), meaning


def _name(parameter: Any) -> str:
    return f"{parameter.name.upper()}{'...' if parameter.nargs != 1 else ''}"


def _limits(parameter: Any) -> str:
    low, high = (getattr(parameter, name, None) for name in ("min", "max"))
    high = high if high is not None and high <= _LARGE else None
    if low is None and high is None:
        return ""
    if low is None or high is None:
        return f"at most {high:g}" if low is None else f"at least {low:g}"
    return f"{low:g} to {high:g}"


def _default(parameter: Any) -> str:
    shown = parameter.default
    if isinstance(parameter.show_default, str):
        shown = parameter.show_default
    elif parameter.secondary_opts:
        shown = (parameter.opts if shown else parameter.secondary_opts)[0]
    elif parameter.required or shown in (None, "", ()) or isinstance(shown, bool) or callable(shown):
        return ""
    return f"default: {shown:g}" if isinstance(shown, float) else f"default: {shown}"


def _print(usage: str, text: str, panels: Iterable[tuple[str, list[tuple[str, str]]]], examples: str) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = min(console.width, _WIDEST)
    for part in _parts(usage, text, panels):
        console.print(part)
    if examples:
        console.print("[bold]Examples[/]")
        # Not wrapped: a command is copied as it stands.
        for line in examples.splitlines():
            console.print(f"  {line}", style="dim" if line.startswith("#") else "", markup=False, soft_wrap=True)


def _parts(usage: str, text: str, panels: Iterable[tuple[str, list[tuple[str, str]]]]) -> Iterator[RenderableType]:
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    yield Text.assemble(("Usage: ", "bold"), usage)
    for paragraph in text.split("\n\n"):
        yield Padding(escape(" ".join(paragraph.split())), (1, 0, 0, 0))
    yield ""
    for panel, rows in panels:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, style="cyan")
        table.add_column()
        for flags, meaning in rows:
            table.add_row(escape(flags), escape(meaning))
        yield f"[bold]{panel}[/]"
        yield Padding(table, (0, 0, 1, 2))
