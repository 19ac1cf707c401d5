"""The file of `--config`: options of a command, in TOML or YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from layerprobe import configs


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the values of the file the defaults of this command.

    The precedence is command line > environment > file > built-in default. Keys are option names as typed, with - or _.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read or has a key that is not an option of the command.
    """
    if path is None:
        return None
    parameters = {flag.lstrip("-").replace("-", "_"): p.name for p in context.command.params for flag in p.opts}
    values = {key.replace("-", "_"): value for key, value in _parse(path).items()}
    unknown_keys = sorted(set(values) - set(parameters) | {"config"} & set(values))
    if unknown_keys:
        keys = ", ".join(sorted(set(parameters) - {"config", "help"}))
        raise ValueError(
            f"{path} has the key {unknown_keys[0]!r}, which is not an option of {context.info_name}; use one of {keys}"
        )
    defaults = {parameters[key]: _value(path, key, value) for key, value in values.items()}
    context.default_map = dict(context.default_map or {}) | defaults
    return path


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}; pass a .toml or .yaml file")
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise ValueError(f"{path} is neither .toml nor .yaml; pass one of these")
    return configs.read_config(path)


def _value(path: Path, key: str, value: Any) -> Any:
    """Returns a value as an option takes it; lists are of options that may be repeated, or numbers between commas."""
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, (str, int, float)) for part in parts):
        kind = "a list of other things" if isinstance(value, list) else f"a {type(value).__name__}"
        raise ValueError(f"{path} has {kind} as {key}; write a number, a text, true or false, or a list of these")
    return value
