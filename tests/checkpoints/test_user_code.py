"""A user's file finds what is beside it, whatever else has the same name, and fails in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import ONE_LINE

from layerprobe.checkpoints.user_code import import_object, run_user_code


def write(folder: Path, **texts: str) -> Path:
    """Writes files; `a__b` is a file in a folder."""
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def imported(path: Path, name: str = "found") -> Any:
    return import_object(f"{path}:{name}", "--model")


@pytest.mark.parametrize("statement", ["from parts import found", "from .parts import found"])
@pytest.mark.parametrize("name", ["net", "my net-v1.2"])
def test_a_file_finds_its_neighbors(tmp_path: Path, statement: str, name: str) -> None:
    write(tmp_path, parts="found = 1")
    (tmp_path / f"{name}.py").write_text(statement)
    assert imported(tmp_path / f"{name}.py") == 1
    assert "parts" not in sys.modules


@pytest.mark.parametrize(
    "statement", ["from .parts import found", "from ..tools import found", "from top.tools import found"]
)
def test_a_file_in_a_package_is_part_of_it(tmp_path: Path, statement: str) -> None:
    (tmp_path / "top" / "models").mkdir(parents=True)
    for folder in ("top", "top/models"):
        (tmp_path / folder / "__init__.py").write_text("")
    write(tmp_path / "top", net="", tools="found = 2", models__parts="found = 2", models__net=statement)
    assert imported(tmp_path / "top" / "models" / "net.py") == 2


def test_equal_names_of_two_folders_and_of_installed_modules_stay_apart(tmp_path: Path) -> None:
    import yaml

    for number in (1, 2):
        write(tmp_path / str(number), net="from parts import found\nimport yaml", parts=f"found = {number}", yaml="")
    assert [imported(tmp_path / str(number) / "net.py") for number in (1, 2, 1)] == [1, 2, 1]
    assert imported(tmp_path / "1" / "net.py", "yaml").__file__ == str(tmp_path / "1" / "yaml.py")
    assert sys.modules["yaml"] is yaml


def test_packages_of_equal_names_stay_apart(tmp_path: Path) -> None:
    for number in (1, 2):
        write(
            tmp_path / str(number) / "same", __init__="", net="from same.parts import found", parts=f"found = {number}"
        )
        (tmp_path / str(number) / "same" / "__init__.py").write_text("")
    assert [imported(tmp_path / str(number) / "same" / "net.py") for number in (1, 2)] == [1, 2]
    assert sys.modules.pop("same").__file__ == str(tmp_path / "1" / "same" / "__init__.py")


def test_the_standard_library_is_never_replaced(tmp_path: Path) -> None:
    write(tmp_path, net="import colorsys as found", colorsys="")
    sys.modules.pop("colorsys", None)
    assert hasattr(imported(tmp_path / "net.py"), "rgb_to_hsv")


def test_modules_of_the_working_directory_are_found_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, models__net="from models.parts import found", models__parts="found = 3", torch="found = 4")
    assert imported(Path("models/net.py")) == 3
    assert import_object("models.parts:found", "--model") == 3
    sys.modules.pop("models.parts"), sys.modules.pop("models")
    write(tmp_path, models__net="from torch import nn as found")
    assert imported(Path("models/net.py")).__name__ == "torch.nn"


def test_what_a_factory_imports_is_found_too(tmp_path: Path) -> None:
    write(tmp_path, net="def make():\n    from late import found\n    return found", late="found = 5")
    spec = f"{tmp_path / 'net.py'}:make"
    assert run_user_code(import_object(spec, "--model"), spec, "fails", "") == 5
    assert "late" not in sys.modules


def test_user_code_reads_no_options_and_prints_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import argparse, sys\np = argparse.ArgumentParser()\np.add_argument('--layers')\nfound = p.parse_args().layers"
    )
    write(tmp_path, net=f"{code}\nprint('hello')\nprint('again', file=sys.stderr)")
    monkeypatch.setattr(sys, "argv", ["layerprobe", "--layers", "blocks.*"])
    assert imported(tmp_path / "net.py") is None
    assert sys.argv[1:] == ["--layers", "blocks.*"]
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello\nagain\n")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", r"cannot be imported \(ZeroDivisionError: division by zero, \S*net.py:1\); correct the file$"),
        ("import parts", r"\(NameError: name 'x' is not defined, \S*parts.py:1\); correct the file$"),
        ("import nowhere", r"\(No module named 'nowhere', \S*net.py:1\); install it, or keep it beside the file or in"),
        (
            "from ..up import x",
            r"\(attempted relative import .*\); run from the folder above the package and pass pack",
        ),
        ("import sys; sys.exit('done')", r"\(it ends the program with 'done', \S*net.py:1\); put what it runs as a"),
        (
            "import argparse\np = argparse.ArgumentParser()\np.add_argument('config')\np.parse_args()",
            r"with 'net.py: error: the following arguments are required: config', \S*net.py:4\); put what it runs",
        ),
    ],
)
def test_mistakes_of_a_file_are_told_in_one_line(
    tmp_path: Path, code: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, net=code, parts="x")
    with pytest.raises(ValueError, match=message) as caught:
        imported(tmp_path / "net.py")
    caught.match(ONE_LINE)
    assert caught.value.__cause__ is not None
    assert capsys.readouterr().err == ""


def test_a_notebook_is_no_file_of_code(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a notebook; save the network's code as a .py file and pass file.py:name"):
        import_object("net.ipynb:Net", "--model")
