"""The file of `--config`: options of a command, in TOML or YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


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
    defaults = {parameters[key]: value for key, value in values.items()}
    context.default_map = dict(context.default_map or {}) | defaults
    return path


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}; pass a .toml or .yaml file")
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            content = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML ({' '.join(str(error).split())[:120]})") from error
    elif path.suffix == ".toml":
        import tomllib

        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML ({error})") from error
    else:
        raise ValueError(f"{path} is neither .toml nor .yaml; pass one of these")
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain keys and values, as in `seed = 1`")
    return content
