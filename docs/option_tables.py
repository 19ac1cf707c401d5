"""Tables of options in Markdown, made from the dataclasses and commands that declare the options.

A page has a comment in place of each table: `<!-- options of layerprobe.training.TrainingPlan -->` for a dataclass,
`<!-- options of train -->` for those options of a command that are not fields of a dataclass, and
`<!-- common options -->` for those of every command.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import typer

from layerprobe.cli.fields import groups_of
from layerprobe.cli.main import COMMANDS, app
from layerprobe.options import option_fields

COMMON = ("seed", "device", "dry_run", "as_json", "config")
_PLACEHOLDER = re.compile(r"^<!-- (?:options of (?P<name>[\w.]+)|common options) -->$", re.MULTILINE)


def with_tables(text: str) -> str:
    """Replaces the comments of a page by tables."""
    return _PLACEHOLDER.sub(lambda match: _table(_rows(match["name"])), text)


def _rows(name: str | None) -> Iterable[tuple[str, Any, str]]:
    """Yields flag, default and meaning of options."""
    if name is not None and "." in name:
        module, _, cls = name.rpartition(".")
        for option in option_fields(getattr(import_module(module), cls)):
            yield option.flag, None if option.required or option.is_switch else option.default, option.help
        return
    command = next(one for one in COMMANDS if one.__name__ == (name or "train"))
    elsewhere = {option.name for group in groups_of(command) for option in group.options}
    for parameter in typer.main.get_command(app).commands[command.__name__].params:
        if parameter.name not in elsewhere | {"help"} and (parameter.name in COMMON) == (name is None):
            is_argument = not parameter.opts[0].startswith("-")
            flag = parameter.opts[0].upper() if is_argument else parameter.opts[0]
            yield flag, parameter.default or None, getattr(parameter, "help", None) or ""


def _table(rows: Iterable[tuple[str, Any, str]]) -> str:
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for flag, default, meaning in rows:
        cells = (f"`{flag}`{{.flag}}", _default_text(default), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |")
    return "\n".join(lines)


def _default_text(default: Any) -> str:
    if default is None or default is dataclasses.MISSING or default == ():
        return ""
    if isinstance(default, tuple):
        return ",".join(map(_default_text, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def setup(app: Any) -> None:
    """Registers the replacement with Sphinx."""

    def read(_app: Any, _page: str, content: list[str]) -> None:
        content[0] = with_tables(content[0])

    app.connect("source-read", read)
