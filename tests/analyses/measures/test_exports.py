"""What the room exports, and that it imports nothing else of layerprobe."""

from __future__ import annotations

import ast
from pathlib import Path

from layerprobe.analyses import measures

ROOM = Path(measures.__file__).parent
NAME = "layerprobe.analyses.measures"


def test_every_exported_name_exists_and_is_no_module() -> None:
    assert "linear_probe" in measures.__all__
    for name in measures.__all__:
        assert type(getattr(measures, name)).__name__ != "module"


def test_no_module_has_the_name_of_an_export() -> None:
    """Importing the module would hide the function of the same name."""
    assert not {path.stem for path in ROOM.rglob("*.py")} & set(measures.__all__)


def test_the_room_imports_nothing_else_of_layerprobe() -> None:
    files = list(ROOM.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = [name for name in names if name.split(".")[0] == "layerprobe"]
            assert all(name.startswith(f"{NAME}.") for name in ours), (path, ours)
