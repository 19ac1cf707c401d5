"""The wheel and the source distribution hold what the tree holds, and nothing goes beside the package."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import layerprobe

ROOT = Path(__file__).parents[1]
ROOMS = {"layerprobe": "layerprobe", "analyses": "layerprobe/analyses", "cli": "layerprobe/cli"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Where a module's name is not that of its distribution.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def _tree(root: Path) -> dict[str, Path]:
    """Every file that belongs into the wheel, by its name there. The links in layerprobe/ lead to the other rooms."""
    found = {}
    for room, target in ROOMS.items():
        for path in sorted((root / room).rglob("*")):
            below = path.relative_to(root / room)
            linked = any((root / room / parent).is_symlink() for parent in [below, *below.parents[:-1]])
            if path.is_file() and not linked and "__pycache__" not in below.parts:
                found[f"{target}/{below.as_posix()}"] = path
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, as a build writes into its tree."""
    copy = tmp_path_factory.mktemp("tree") / "layerprobe"
    made = shutil.ignore_patterns("build", "dist", "runs")
    junk = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "_build")

    def ignored(folder: str, names: list[str]) -> set[str]:
        return junk(folder, names) | (made(folder, names) if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def built(copy: Path) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    out = copy.parent / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return out


def test_the_wheel_holds_the_tree(built: Path, copy: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    tree = _tree(copy)
    assert sorted(held) == sorted(tree)
    assert [name for name, path in tree.items() if held[name] != path.read_bytes()] == []


def test_the_wheel_adds_one_module_that_is_typed(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert {name.split("/")[0] for name in names} == {"layerprobe", f"layerprobe-{layerprobe.__version__}.dist-info"}
    assert "layerprobe/py.typed" in names
    assert f"layerprobe-{layerprobe.__version__}.dist-info/licenses/LICENSE" in names
    assert f"\nVersion: {layerprobe.__version__}\n" in metadata


def test_the_sdist_holds_what_its_tests_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    # The wheel above was built from this archive, so the package is in it.
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "tests/conftest.py"} <= held
    assert not [name for name in held if "__pycache__" in name or name.startswith(("runs/", ".venv/"))]


def test_the_links_are_relative() -> None:
    links = {room: ROOT / "layerprobe" / room for room in ("analyses", "cli")}
    assert {room: str(link.readlink()) for room, link in links.items()} == {room: f"../{room}" for room in links}


def test_every_import_is_a_declared_dependency() -> None:
    requirements = PROJECT["dependencies"] + [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    declared = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements}
    undeclared = set()
    for path in _tree(ROOT).values():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"layerprobe"}:
                if DISTRIBUTIONS.get(module, module.lower().replace("_", "-")) not in declared:
                    undeclared.add(f"{path.relative_to(ROOT)}: {module}")
    assert undeclared == set()
