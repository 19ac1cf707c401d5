"""Configurations in JSON, YAML and TOML that somebody else may have written, read as plain data or refused in one line.

Nothing in them is run or built. What most readers accept without a word is refused: a key that occurs twice, of which
one would win, and nesting that exceeds the stack.
"""

from __future__ import annotations

import json
import math
import stat
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layerprobe.files import one_line

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 100
MAX_NUMBER = 2**53  # of an integer; larger ones are no counts
# Schedulers clip at minus infinity, and tokenizers without a limit have 1e30.
_UNLIMITED = ("lambda_min_clipped", "model_max_length")


def read_config(path: Path) -> dict[str, Any]:
    """Reads a configuration file by its ending: .json, .yaml, .yml or .toml.

    Objects that YAML names by a tag are read as None; keys that are no texts are left out of JSON and YAML.

    Raises:
        ValueError: If it is no regular file, too large, no valid file of its kind, holds no keys and values, has a key
            twice or is nested too deeply; the message names the file.
        OSError: If it cannot be read.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_BYTES:
        raise ValueError(f"{path} is no file of at most {MAX_BYTES // 2**20} MiB; copy or download it again")
    kind = {".json": "JSON", ".toml": "TOML"}.get(path.suffix, "YAML")
    try:
        # An editor may have put a mark of UTF-8 at the beginning.
        content = parse_config(path.read_bytes().decode("utf-8-sig"), kind)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid {kind} ({one_line(error)}); repair or remove it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not keys and values; repair it or copy it again")
    return content


def parse_config(text: str, kind: str) -> Any:
    """Returns the content of a text in "JSON", "YAML" or "TOML".

    Raises:
        ValueError: If it is not valid, has a key twice or is nested too deeply.
    """
    try:
        if kind == "JSON":
            content = json.loads(text, object_pairs_hook=_once)
        else:
            content = tomllib.loads(text) if kind == "TOML" else _yaml(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(content)
    return content


def check_numbers(config: Mapping[str, Any], path: Path) -> None:
    """Checks that no number in a configuration is absurd: not finite, or an integer beyond 2**53.

    The two keys that mean "without a limit" by such a number may have one.

    Raises:
        ValueError: If there is one; the message names the file and the key.
    """
    for key, value in _leaves(config):
        if key.rpartition(".")[2] in _UNLIMITED:
            continue
        absurd = isinstance(value, float) and not math.isfinite(value)
        if absurd or (isinstance(value, int) and abs(value) > MAX_NUMBER):
            raise ValueError(f"{path} has {key} = {value!r:.40}, which cannot be right; repair it or copy it again")


def _leaves(value: Any, at: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{at}.{key}".strip("."))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner, at)
    else:
        yield at, value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.60} occurs twice")
    return content


def _check_depth(content: Any) -> None:
    """Refuses content that is nested too deeply or in itself, or that grows by naming its parts many times."""
    level, steps = [content], 0
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _inner(value)]
        steps += len(level)
        if steps > 10**6:
            raise ValueError("it names its parts too many times")
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _inner(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [part for part in inner if isinstance(part, (dict, list, tuple))]


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
        """Plain data, each key once, and None for the objects that training code writes by name."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            self.flatten_mapping(node)
            pairs = [
                (str(self.construct_object(key, deep=True)), self.construct_object(value, deep=deep))
                for key, value in node.value
                if isinstance(key, yaml.ScalarNode)
            ]
            return _once(pairs)

    Loader.add_multi_constructor("", lambda loader, tag, node: None)
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:120]) from error
