"""The imports of the whole tree against the rules of docs/decisions/0001-layout.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("layerprobe", "analyses", "cli")
FORBIDDEN_ROOMS = {"layerprobe": ("layerprobe.analyses", "layerprobe.cli"), "analyses": ("layerprobe.cli",), "cli": ()}
PLOTTING = ("matplotlib", "seaborn")
HEAVY = ("datasets", "matplotlib", "pandas", "pyarrow", "scipy", "seaborn", "sklearn", "torch")


def _files(root: Path, room: str) -> Iterator[Path]:
    """The room's own files: the links in layerprobe/ lead to the other rooms."""
    for path in sorted((root / room).rglob("*.py")):
        below = path.relative_to(root)
        if not any((root / parent).is_symlink() for parent in below.parents):
            yield below


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported anywhere below a node; `from a import b` gives a.b, module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _run_on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if _is_for_types(node):
            yield from _run_on_import(node.orelse)
            continue
        inner = [child for field in ("body", "orelse", "finalbody") for child in getattr(node, field, [])]
        inner += [child for handler in getattr(node, "handlers", []) for child in handler.body]
        if inner:
            yield from _run_on_import(inner)
        else:
            yield node


def _is_for_types(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _is(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _violations(root: Path) -> list[str]:
    found = []
    for room in ROOMS:
        for path in _files(root, room):
            tree = ast.parse((root / path).read_text(encoding="utf-8"))
            for_types = {
                line
                for node in ast.walk(tree)
                if _is_for_types(node)
                for statement in node.body
                for line, _ in _imports(statement)
            }
            for line, name in _imports(tree):
                if reason := _objection(room, path, name, for_types=line in for_types):
                    found.append(f"{path.as_posix()}:{line}: {name}: {reason}")
            if room == "cli":
                for statement in _run_on_import(tree.body):
                    found += [
                        f"{path.as_posix()}:{line}: {name}: heavy, import it inside the function that needs it"
                        for line, name in _imports(statement)
                        if _is(name, HEAVY)
                    ]
    return found


def _objection(room: str, path: Path, name: str, *, for_types: bool) -> str | None:
    if name.startswith("."):
        return "relative, use the absolute name"
    if _is(name, ("analyses", "cli")):
        return "not there once installed, import it from layerprobe"
    if _is(name, ("click",)):
        return "typer carries its own click"
    if _is(name, FORBIDDEN_ROOMS[room]):
        return f"{room} must not import it"
    draws = path.parent.as_posix() == "analyses/figures"
    if _is(name, PLOTTING) and not draws and not for_types:
        return "only analyses/figures draws"
    return None


def test_the_tree_keeps_the_rules() -> None:
    assert _violations(ROOT) == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_read(room: str) -> None:
    names = {path.name for path in _files(ROOT, room)}
    assert "__init__.py" in names
    assert len(names) > 1


PLANTED = {
    "engine imports analyses": (
        "layerprobe/a.py",
        "from layerprobe.analyses.measures.knn import search",
        "layerprobe must not",
    ),
    "engine imports analyses as a name": ("layerprobe/a.py", "from layerprobe import analyses", "layerprobe must not"),
    "engine imports cli in a function": ("layerprobe/b/a.py", "def f():\n    import layerprobe.cli.main", "must not"),
    "engine imports analyses for types": (
        "layerprobe/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from layerprobe.analyses import knn",
        "layerprobe must not",
    ),
    "analyses import cli": ("analyses/a.py", "from layerprobe.cli.main import main", "analyses must not"),
    "top-level analyses": ("cli/a.py", "from analyses.knn import search", "not there once installed"),
    "top-level cli": ("analyses/a.py", "import cli", "not there once installed"),
    "relative": ("analyses/a.py", "from . import knn", "relative"),
    "click": ("cli/a.py", "import click", "carries its own"),
    "a figure in an analysis": (
        "analyses/knn.py",
        "import matplotlib.pyplot as plt",
        "only analyses/figures",
    ),
    "a figure in a command": ("cli/a.py", "def f():\n    import seaborn", "only analyses/figures"),
    "a figure in the engine's plots.py": (
        "layerprobe/plots.py",
        "import seaborn",
        "only analyses/figures",
    ),
    "torch at the top of a command": ("cli/a.py", "import torch.nn", "heavy"),
    "pandas in a try": ("cli/a.py", "try:\n    from pandas import read_csv\nexcept ImportError:\n    pass", "heavy"),
    "torch in a class body": ("cli/a.py", "class A:\n    import torch", "heavy"),
}


@pytest.mark.parametrize(("file", "text", "reason"), PLANTED.values(), ids=PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, text: str, reason: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    (violation,) = _violations(tmp_path)
    assert violation.startswith(f"{file}:")
    assert reason in violation


ALLOWED = {
    "cli imports analyses and engine": (
        "cli/a.py",
        "from layerprobe import noise\nfrom layerprobe.analyses import knn",
    ),
    "analyses import the engine": ("analyses/a.py", "from layerprobe.extraction.features import FeatureStore"),
    "figures draw": ("analyses/figures/style.py", "import seaborn"),
    "a figure's type in the report": (
        "analyses/report.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from matplotlib.figure import Figure",
    ),
    "torch in a command's function": ("cli/a.py", "def f():\n    import torch"),
    "torch in a command for types": (
        "cli/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
    ),
    "names that only begin alike": ("cli/a.py", "import clicker, torchlike, client"),
}


@pytest.mark.parametrize(("file", "text"), ALLOWED.values(), ids=ALLOWED)
def test_what_is_allowed_is_not_reported(tmp_path: Path, file: str, text: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    assert _violations(tmp_path) == []


def test_links_are_read_once_as_their_own_room(tmp_path: Path) -> None:
    (tmp_path / "analyses" / "figures").mkdir(parents=True)
    (tmp_path / "analyses" / "figures" / "style.py").write_text("import seaborn", encoding="utf-8")
    (tmp_path / "layerprobe").mkdir()
    (tmp_path / "layerprobe" / "analyses").symlink_to("../analyses")
    assert _violations(tmp_path) == []


def test_the_command_line_starts_without_heavy_modules() -> None:
    """What the rule above is for, heavy modules that come by way of others included."""
    code = f"import sys, layerprobe.cli.main; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
