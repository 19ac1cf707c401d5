"""The imports of the whole tree against the rules of docs/architecture.md.

A room is a folder of one subject, or a single file. Imports between rooms follow `ARROWS`; nothing imports in a circle;
other rooms import what a room's `__init__` exports, and never a private name.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple, TypeGuard

import pytest

ROOT = Path(__file__).parents[1]
BUILDINGS = {"layerprobe": "layerprobe", "analyses": "layerprobe.analyses", "cli": "layerprobe.cli"}
PLOTTING = ("matplotlib", "seaborn")
HEAVY = ("datasets", "matplotlib", "pandas", "pyarrow", "scipy", "seaborn", "sklearn", "torch")

# What each room may import, beside itself and `layerprobe` (the version). A new arrow needs a page in docs/decisions/.
_COMPUTING = ("precision", "ranks", "threads")
_LOWEST = ("configs", "files", "checksums", "records", "memory", "messages", "options", "progress", *_COMPUTING)
_MODELS = (*_LOWEST, "noise", "parts", "capture", "data", "backbones")
_ENGINE = (*_MODELS, "checkpoints", "extraction", "layersync", "sampling", "training")
_NUMBERS = ("analyses.measures", "analyses.tables")
ARROWS: Mapping[str, tuple[str, ...]] = {
    "configs": ("files",),
    "files": ("memory", "messages"),
    "messages": (),
    "__main__": ("cli",),
    "memory": (),
    "checksums": ("files",),
    "records": ("files", "checksums"),
    "options": (),
    "precision": ("messages",),
    "progress": (),
    "ranks": ("files", "memory"),
    "threads": (),
    "parts": (),
    "capture": ("parts",),
    "noise": _LOWEST,
    "data": (*_LOWEST, "noise"),
    "backbones": (*_LOWEST, "noise", "capture"),
    "checkpoints": _MODELS,
    "extraction": (*_MODELS, "checkpoints"),
    "layersync": (*_LOWEST, "capture", "backbones"),
    "sampling": (*_LOWEST, "noise", "capture", "backbones"),
    "training": (*_MODELS, "checkpoints", "extraction", "layersync"),
    "analyses.measures": (),
    "analyses.tables": (*_LOWEST, "data", "extraction", "analyses.measures"),
    "analyses.selection": (*_ENGINE, *_NUMBERS),
    "analyses.generation": (*_LOWEST, "noise", "data", "checkpoints", "analyses.measures"),
    "analyses.experiments": (*_ENGINE, *_NUMBERS, "analyses.selection", "analyses.generation"),
    "analyses.wording": (*_NUMBERS, "analyses.selection", "analyses.experiments"),
    "analyses.figures": (*_ENGINE, *_NUMBERS, "analyses.selection", "analyses.experiments", "analyses.wording"),
    "analyses.report": (
        *_LOWEST,
        *_NUMBERS,
        *(f"analyses.{room}" for room in ("selection", "experiments", "wording", "figures")),
    ),
    "analyses.runs": (
        *_ENGINE,
        *_NUMBERS,
        *(f"analyses.{room}" for room in ("selection", "generation", "experiments", "wording", "figures", "report")),
    ),
    "analyses.front": (
        *_ENGINE,
        *_NUMBERS,
        *(f"analyses.{room}" for room in ("selection", "wording", "figures", "runs")),
    ),
    "cli": (
        *_ENGINE,
        *_NUMBERS,
        *(
            f"analyses.{room}"
            for room in ("selection", "generation", "experiments", "wording", "figures", "report", "runs")
        ),
    ),
}


class Import(NamedTuple):
    """One imported name: the module and the name, or the module alone."""

    line: int
    module: str
    name: str | None

    @property
    def full(self) -> str:
        return self.module if self.name is None else f"{self.module}.{self.name}"


def _files(root: Path, building: str) -> Iterator[Path]:
    """The building's own files: the links in layerprobe/ lead to the other buildings."""
    for path in sorted((root / building).rglob("*.py*")):
        below = path.relative_to(root)
        if path.suffix in (".py", ".pyi") and not any((root / parent).is_symlink() for parent in below.parents):
            yield below


def _module(path: Path) -> str:
    """The name that a file is imported by."""
    building, *parts = path.with_suffix("").parts
    return ".".join([BUILDINGS[building], *(part for part in parts if part != "__init__")])


def _room(module: str) -> str:
    """The room of a module: `noise`, `analyses.tables`, `cli`; "" for the package itself."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["analyses"] else 1])


def _imports(tree: ast.AST) -> Iterator[Import]:
    """Everything imported anywhere below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (Import(node.lineno, module, alias.name) for alias in node.names)


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


def _is(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _exports(root: Path) -> dict[str, dict[str, str]]:
    """What each room exports: for each name the module that it comes from, read from the stub of its `__init__`."""
    exports: dict[str, dict[str, str]] = {}
    for building in BUILDINGS:
        for path in _files(root, building):
            room = _room(_module(path))
            if path.name == "__init__.pyi" and len(_module(path).split(".")) == 1 + len(room.split(".")):
                found = _imports(ast.parse((root / path).read_text(encoding="utf-8")))
                exports[room] = {str(i.name): f"{_module(path)}{i.module}" for i in found if i.name}
    return exports


def _trees(root: Path) -> dict[Path, ast.Module]:
    return {
        path: ast.parse((root / path).read_text(encoding="utf-8"))
        for building in BUILDINGS
        for path in _files(root, building)
        if path.suffix == ".py"
    }


def _violations(root: Path) -> list[str]:
    """All imports that the rules forbid, as "file:line: name: reason"."""
    found, trees, exports = [], _trees(root), _exports(root)
    modules = {_module(path) for path in trees}
    for path, tree in trees.items():
        for_types = {
            i.line for node in ast.walk(tree) if _is_for_types(node) for inner in node.body for i in _imports(inner)
        }
        for i in _imports(tree):
            reason = _outside(path, i, for_types=i.line in for_types) or _between_rooms(path, i, exports, modules)
            if reason:
                found.append(f"{path.as_posix()}:{i.line}: {i.full}: {reason}")
        if path.parts[0] == "cli":
            found += [
                f"{path.as_posix()}:{i.line}: {i.full}: heavy, import it inside the function that needs it"
                for statement in _run_on_import(tree.body)
                for i in _imports(statement)
                if _is(i.full, HEAVY)
            ]
    return found + [f"circle of imports: {circle}" for circle in _circles(trees, exports, modules)]


def _outside(path: Path, i: Import, *, for_types: bool) -> str | None:
    """The objection against a name from outside, or against the way in which it is named."""
    if i.module.startswith("."):
        return "relative, use the absolute name"
    if _is(i.full, ("analyses", "cli")):
        return "not there once installed, import it from layerprobe"
    if _is(i.full, ("click",)):
        return "typer carries its own click"
    if _is(i.full, PLOTTING) and path.parent.as_posix() != "analyses/figures" and not for_types:
        return "only analyses/figures draws"
    return None


def _between_rooms(path: Path, i: Import, exports: Mapping[str, Mapping[str, str]], modules: set[str]) -> str | None:
    """The objection against an arrow between rooms."""
    if not _is(i.full, ("layerprobe",)):
        return None
    here, target = _room(_module(path)), i.full if i.full in modules else i.module
    there = _room(target)
    if here == there or (there == "" and target == "layerprobe" and i.name == "__version__"):
        return None
    if there not in ARROWS.get(here, ()):
        return f"{here or path.name} must not import {there or i.full}"
    if i.name is not None and i.name.startswith("_"):
        return "private to its room"
    if there in exports and (i.module != f"layerprobe.{there}" or i.name not in exports[there]):
        return f"not exported by {there}; import what its __init__.pyi names"
    return None


def _circles(
    trees: Mapping[Path, ast.Module], exports: Mapping[str, Mapping[str, str]], modules: set[str]
) -> list[str]:
    """The first circle among the modules, imports inside functions and for types included."""
    graph: dict[str, set[str]] = {}
    for path, tree in trees.items():
        here, needed = _module(path), set()
        for i in _imports(tree):
            if i.full in modules:
                needed.add(i.full)
            elif (room := _room(i.module)) in exports and i.module == f"layerprobe.{room}" and i.name:
                needed.add(exports[room].get(i.name, i.module))
            elif i.module in modules:
                needed.add(i.module)
        graph[here] = needed - {here}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def test_the_tree_keeps_the_rules() -> None:
    assert _violations(ROOT) == []


def test_every_room_has_its_arrows_and_every_arrow_its_room() -> None:
    rooms = {_room(_module(path)) for building in BUILDINGS for path in _files(ROOT, building)} - {"", "analyses"}
    assert rooms == set(ARROWS)


def test_the_arrows_between_rooms_have_no_circle() -> None:
    TopologicalSorter(ARROWS).prepare()


def test_what_a_room_exports_is_there_and_has_one_home() -> None:
    trees = {_module(path): tree for path, tree in _trees(ROOT).items()}
    for room, names in _exports(ROOT).items():
        for name, module in names.items():
            defined = {
                *(node.name for node in trees[module].body if isinstance(node, ast.FunctionDef | ast.ClassDef)),
                *(
                    target.id
                    for node in trees[module].body
                    if isinstance(node, ast.Assign | ast.AnnAssign)
                    for target in ast.walk(node)
                    if isinstance(target, ast.Name)
                ),
            }
            assert name in defined, f"{room} exports {name}, which {module} does not define"
            # Importing the file would put it in the place of the name.
            assert f"layerprobe.{room}.{name}" not in trees, f"{room} exports {name}, which is one of its files too"


@pytest.mark.parametrize("building", BUILDINGS)
def test_every_building_is_read(building: str) -> None:
    names = {path.name for path in _files(ROOT, building)}
    assert "__init__.py" in names
    assert len(names) > 1


PLANTED = {
    "engine imports analyses": ("layerprobe/noise/a.py", "from layerprobe.analyses.measures import cka", "must not"),
    "engine imports analyses as a name": ("layerprobe/noise/a.py", "from layerprobe import analyses", "must not"),
    "engine imports cli in a function": (
        "layerprobe/data/a.py",
        "def f():\n    import layerprobe.cli.main",
        "must not",
    ),
    "engine imports analyses for types": (
        "layerprobe/training/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from layerprobe.analyses.tables import measure",
        "training must not import analyses.tables",
    ),
    "data knows models": ("layerprobe/data/a.py", "from layerprobe.backbones import wrap", "data must not import"),
    "measures know the engine": ("analyses/measures/a.py", "from layerprobe.noise import RandomStream", "must not"),
    "selection trains": (
        "analyses/selection/a.py",
        "from layerprobe.analyses.experiments import train_arm",
        "must not",
    ),
    "report runs": ("analyses/report/a.py", "from layerprobe.analyses.runs import probe_run", "must not import"),
    "analyses import cli": ("analyses/runs/a.py", "from layerprobe.cli.main import main", "must not import cli"),
    "a room that nobody knows": ("layerprobe/b/a.py", "from layerprobe.noise import RandomStream", "b must not import"),
    "a private name": (
        "analyses/tables/a.py",
        "from layerprobe.analyses.measures import _secret",
        "private to its room",
    ),
    "past the door": (
        "analyses/tables/a.py",
        "from layerprobe.analyses.measures.knn import knn_accuracy",
        "not exported by analyses.measures",
    ),
    "what is not exported": (
        "analyses/tables/a.py",
        "from layerprobe.analyses.measures import hidden",
        "not exported by analyses.measures",
    ),
    "top-level analyses": ("cli/a.py", "from analyses.knn import search", "not there once installed"),
    "top-level cli": ("analyses/runs/a.py", "import cli", "not there once installed"),
    "relative": ("analyses/runs/a.py", "from . import knn", "relative"),
    "click": ("cli/a.py", "import click", "carries its own"),
    "a figure in a measure": ("analyses/measures/a.py", "import matplotlib.pyplot as plt", "only analyses/figures"),
    "a figure in a command": ("cli/a.py", "def f():\n    import seaborn", "only analyses/figures"),
    "a figure in the engine": ("layerprobe/figures.py", "import seaborn", "only analyses/figures"),
    "torch at the top of a command": ("cli/a.py", "import torch.nn", "heavy"),
    "pandas in a try": ("cli/a.py", "try:\n    from pandas import read_csv\nexcept ImportError:\n    pass", "heavy"),
    "torch in a class body": ("cli/a.py", "class A:\n    import torch", "heavy"),
}


def _planted(root: Path, file: str, text: str) -> None:
    """The text in its file, beside a room with an export."""
    for name, content in {
        file: text,
        "analyses/measures/__init__.py": "",
        "analyses/measures/__init__.pyi": "from .knn import knn_accuracy as knn_accuracy",
        "analyses/measures/knn.py": "def knn_accuracy(): ...\ndef hidden(): ...",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize(("file", "text", "reason"), PLANTED.values(), ids=PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, text: str, reason: str) -> None:
    _planted(tmp_path, file, text)
    (violation,) = _violations(tmp_path)
    assert violation.startswith(f"{file}:")
    assert reason in violation


CIRCLES = {
    "two files": {
        "layerprobe/noise/a.py": "from layerprobe.noise.b import x",
        "layerprobe/noise/b.py": "def f():\n    from layerprobe.noise import a",
    },
    "through the door of a room": {
        "layerprobe/noise/__init__.pyi": "from .a import x as x",
        "layerprobe/noise/a.py": "from layerprobe.noise.b import y",
        "layerprobe/noise/b.py": "def f():\n    from layerprobe.noise import x",
    },
}


@pytest.mark.parametrize("files", CIRCLES.values(), ids=CIRCLES)
def test_a_planted_circle_is_found(tmp_path: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        _planted(tmp_path, name, text)
    (violation,) = _violations(tmp_path)
    assert violation.startswith("circle of imports: layerprobe.noise.")


ALLOWED = {
    "cli imports a job and the engine": (
        "cli/a.py",
        "from layerprobe.noise import RandomStream\nfrom layerprobe.analyses.runs import probe_run",
    ),
    "tables import measures through their door": (
        "analyses/tables/a.py",
        "from layerprobe.analyses.measures import knn_accuracy",
    ),
    "a room's own files": ("analyses/measures/a.py", "from layerprobe.analyses.measures.knn import hidden"),
    "the version": ("layerprobe/extraction/a.py", "from layerprobe import __version__"),
    "figures draw": ("analyses/figures/style.py", "import seaborn"),
    "a figure's type in the report": (
        "analyses/report/a.py",
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
    _planted(tmp_path, file, text)
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
