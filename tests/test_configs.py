"""Configurations are read as plain data, or refused in one line that names the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layerprobe.configs import check_numbers, parse_config, read_config

BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.json", '{"seed": 1, "layers": [1, null]}'),
        ("c.yaml", "seed: 1\nlayers: [1, null]\n"),
        ("c.json", '\ufeff{"seed": 1, "layers": [1, null]}'),
        ("c.yaml", "seed: 1\nlayers: [1, !!python/object/apply:os.system ['touch x']]\n"),
    ],
)
def test_plain_data_is_read(tmp_path: Path, name: str, content: str) -> None:
    assert read_config(written(tmp_path, name, content)) == {"seed": 1, "layers": [1, None]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", '{"a": 1, "a": 2}', "is not valid JSON .*the key 'a' occurs twice"),
        ("c.yaml", "a: 1\na: 2\n", "is not valid YAML .*the key 'a' occurs twice"),
        ("c.toml", "a = 1\na = 2\n", "is not valid TOML"),
        ("c.json", '{"a": ' + "[" * 100_000, "is not valid JSON .*it is nested too deeply"),
        ("c.json", '{"a": ' + "[" * 200 + "]" * 200 + "}", "is not valid JSON .*it is nested too deeply"),
        ("c.yaml", "a: " + "[" * 3000, "is not valid YAML .*it is nested too deeply"),
        ("c.yaml", "&a\nb: *a\n", "is not valid YAML .*it is nested too deeply"),
        ("c.yaml", BOMB, "is not valid YAML .*it names its parts too many times"),
        ("c.yaml", "a: 2020-99-99\n", "is not valid YAML"),
        ("c.yaml", "a: *b\n", "is not valid YAML"),
        ("c.json", b"\xff\xfe\x00", "is not valid JSON .*utf-8"),
        ("c.json", '{"a": ' + "9" * 6000 + "}", "is not valid JSON .*digits"),
        ("c.json", "[1]", "holds a list, not keys and values; repair it or copy it again"),
        ("c.yaml", "", "holds a NoneType, not keys and values"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        read_config(written(tmp_path, name, content))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.json")
    with pytest.raises(ValueError, match=r"c\.json is no file of at most 64 MiB"):
        read_config(tmp_path / "c.json")


def test_absurd_numbers_are_named() -> None:
    for text in ('{"a": {"b": [1, NaN]}}', '{"a": {"b": 1e999}}', '{"a": {"b": 9007199254740993}}'):
        with pytest.raises(ValueError, match=r"x\.json has a\.b = .*, which cannot be right; repair it"):
            check_numbers(parse_config(text, "JSON"), Path("x.json"))
    check_numbers({"a": 2**53, "b": [True, None, "nan", 1.5]}, Path("x.json"))
