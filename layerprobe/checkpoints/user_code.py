"""Imports what a user names as "file.py:name" or "package.module:name", with the modules that it needs beside it.

A file in a package is imported as part of the package. Any other file finds the modules and packages beside it, by
absolute and by relative imports, before installed ones of the same name. Modules of the working directory are found
after all others. Afterwards installed modules of the same names, and modules beside another file, are what they were.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from layerprobe.files import error_place, one_line
from layerprobe.memory import pass_on

T = TypeVar("T")
_HOW = "pass file.py:name or package.module:name"
_ALIAS = "layerprobe_user_"


def import_object(spec: str, option: str) -> Any:
    """Imports "file.py:name" or "package.module:name"; no other code of a user or a checkpoint is ever run.

    Args:
        spec: The name, as the user wrote it.
        option: Command-line option that the user passed it with, for the error.

    Raises:
        ValueError: If it cannot be imported.
    """
    location, _, name = spec.rpartition(":")
    if not location:
        raise ValueError(f"{option} {spec} names no object; {_HOW}")
    if location.endswith(".ipynb"):
        raise ValueError(f"{option} {spec} is a notebook; save the network's code as a .py file and pass file.py:name")
    if location.endswith(".py") and not Path(location).is_file():
        raise ValueError(f"{option} {spec} cannot be imported (there is no file {location}); {_HOW}")
    module = run_user_code(lambda: _import(location), spec, f"{option} {spec} cannot be imported", _HOW)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        likely = difflib.get_close_matches(name, own)
        names = [*likely, *(key for key in own if key not in likely)][:6]
        raise ValueError(f"{option} {spec}: {location} has no {name}; it has {', '.join(names) or 'nothing to call'}")
    return getattr(module, name)


def run_user_code(code: Callable[[], T], spec: str, failure: str, advice: str) -> T:
    """Runs code of a user's file or package, with its neighbors importable and what it prints on standard error.

    Args:
        code: Code to run.
        spec: "file.py:name" or "package.module:name" that the code belongs to.
        failure: Start of the error message.
        advice: What to do, unless the exception itself tells it.

    Raises:
        ValueError: If the code raises anything, or ends the program.
    """
    location, errors, arguments = spec.rpartition(":")[0], io.StringIO(), sys.argv
    try:
        # Results go to standard output, which must stay JSON for --json; and a parser of the user's code must not read
        # layerprobe's options.
        sys.argv = [location]
        with _importable(location), redirect_stdout(sys.stderr), redirect_stderr(errors):
            made = code()
    except SystemExit as error:
        last = [line for line in (errors.getvalue() or str(error)).splitlines() if line.strip()][-1:]
        raise ValueError(
            f"{failure} (it ends the program{''.join(f' with {line!r}' for line in last)}{_at(error)}); put what it "
            'runs as a script under if __name__ == "__main__":'
        ) from error
    except Exception as error:
        pass_on(error)
        kind = "" if isinstance(error, (ImportError, SyntaxError, OSError)) else f"{type(error).__name__}: "
        text = re.sub(r" \([^()]*, line \d+\)$", "", one_line(error))
        raise ValueError(f"{failure} ({kind}{text}{_at(error)}); {_advice(error) or advice}") from error
    finally:
        sys.argv = arguments
    sys.stderr.write(errors.getvalue())
    return made


def _at(error: BaseException) -> str:
    place = error_place(error)
    return f", {place}" if place else ""


def _advice(error: Exception) -> str | None:
    if isinstance(error, ModuleNotFoundError) and error_place(error):
        return "install it, or keep it beside the file or in the working directory"
    if isinstance(error, ImportError) and "beyond top-level package" in str(error):
        return "run from the folder above the package and pass package.module:name"
    return "correct the file" if error_place(error) else None


def _import(location: str) -> ModuleType:
    if not location.endswith(".py"):
        return importlib.import_module(location)
    path = Path(location).resolve()
    root = _package_root(path.parent)
    if root != path.parent and path.stem.isidentifier():
        return importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
    # Registered because dataclasses look their module up; a package of its own keeps a user's `random.py` apart, and
    # lets it import its neighbors relatively.
    package = f"{_ALIAS}{hashlib.sha256(str(path.parent).encode()).hexdigest()[:8]}"
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = [str(path.parent)]
    alias = f"{package}.{path.stem.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _package_root(folder: Path) -> Path:
    """Returns the folder that holds the outermost package around a folder; the folder itself if it is in none."""
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


@contextmanager
def _importable(location: str) -> Iterator[None]:
    """Makes a file's neighbors, and modules of the working directory, importable inside the block."""
    finders = [_Folder(Path.cwd())]
    names: list[str] = []
    root = None
    if location.endswith(".py"):
        path = Path(location).resolve()
        root = _package_root(path.parent)
        names = [name for name in _first_names(path, root) if not _is_below(root, sys.modules.get(name))]
        finders.insert(0, _Folder(root))
    hidden, known, before = _removed(names), set(sys.modules), list(sys.meta_path)
    importlib.invalidate_caches()
    sys.meta_path[:] = [*([_Folder(root, names)] if root else []), *before, *finders]
    try:
        yield
    finally:
        sys.meta_path[:] = before
        if root is not None and root == path.parent:
            for name in set(sys.modules) - known:
                if not name.startswith(_ALIAS) and _is_below(root, sys.modules[name]):
                    del sys.modules[name]
        if hidden:
            _removed(names)
            sys.modules.update(hidden)


def _first_names(path: Path, root: Path) -> list[str]:
    """Returns the names that a file's imports find below the root before anything installed."""
    if root != path.parent:
        return [path.relative_to(root).parts[0]]
    beside = {item.stem for item in root.glob("*.py")} | {item.parent.name for item in root.glob("*/__init__.py")}
    return sorted(beside - {path.stem} - sys.stdlib_module_names)


def _removed(names: Iterable[str]) -> dict[str, ModuleType]:
    """Removes the modules with these names, and all inside them, from `sys.modules`; returns them."""
    found = [name for name in sys.modules if name.partition(".")[0] in names]
    return {name: sys.modules.pop(name) for name in found}


def _is_below(folder: Path, module: ModuleType | None) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(place is not None and Path(place).resolve().is_relative_to(folder) for place in places)


class _Folder(MetaPathFinder):
    """Finds modules and packages in one folder: those with certain names, or all.

    Args:
        folder: Folder.
        names: Names of the modules that are found; None for all.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        self._folder, self._names = str(folder), names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds a module at the top; those inside packages are found by Python itself."""
        if path is not None or (self._names is not None and fullname not in self._names):
            return None
        return PathFinder.find_spec(fullname, [self._folder], target)
