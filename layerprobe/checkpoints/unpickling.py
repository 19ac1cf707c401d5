"""Reads pickle streams as plain data, without running code from them.

Python's own reader calls whatever a file names. This one calls only the few pure functions that its caller lists; every
other name becomes an `Inert`, which keeps the name, the arguments and the state as data.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np

# Today's names of Python 2's modules, which pickles of protocol 2, as PyTorch writes them, still use.
_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Opcodes whose argument is the value itself: numbers, texts and bytes.
_LITERALS = {op.name for op in pickletools.opcodes if op.arg and op.stack_after and not op.stack_before} - {
    *("GET", "BINGET", "LONG_BINGET", "GLOBAL", "INST", "PERSID", "EXT1", "EXT2", "EXT4")
}
_SIMPLE = (str, int, float, bool, bytes, type(None))


class Refused(ValueError):
    """A file cannot be read safely; the message gives the reason and what to do, without the file as its subject."""


@dataclass(frozen=True)
class Global:
    """The full name of a class or function that a file refers to, such as "torch.float32"."""

    name: str


@dataclass(eq=False)
class Inert:
    """An object of the file that is kept as data instead of being built.

    Attributes:
        name: Full name of the class or function that would have built it.
        args: Arguments of that call.
        state: Attributes that would have been set, as the file stores them.
        items: Items that would have been appended.
        pairs: Keys and values that would have been set.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


class Budget:
    """Limits the steps of a walk: a small file can claim a tree of any size by naming one part many times."""

    def __init__(self, steps: int = 400_000) -> None:
        self._left = steps

    def spend(self, steps: int = 1) -> None:
        """Counts steps.

        Raises:
            Refused: If no steps are left.
        """
        self._left -= steps
        if self._left < 0:
            raise Refused("refers to its parts too many times for a checkpoint; get it from a source you trust")


def unpickle(
    file: BinaryIO,
    *,
    known: Mapping[str, Callable[..., Any] | None],
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """Reads one pickle, up to its end and no further.

    Args:
        file: File object; only `read`, `readline` and `tell` are used.
        known: Pure functions that may be called, by the names that files use for them. A name with None becomes an
            `Inert` or a `Global` like an unknown name, but is not reported as unknown.
        persistent: Function that returns the objects that the file stores outside of the pickle.

    Returns:
        The content, with dictionaries, lists and plain values as they were saved, and the unknown names.

    Raises:
        Exception: Of any kind, if the stream is damaged.
    """
    machine = _Machine(known, persistent)
    return machine.run(file), tuple(machine.foreign)


def mapping(value: Any) -> dict[Any, Any]:
    """Returns the entries of a dictionary, or of an inert object of a dictionary class; {} for other values."""
    if isinstance(value, Inert):
        return dict(value.pairs)
    return value if isinstance(value, dict) else {}


def state(value: Inert) -> dict[str, Any]:
    """Returns the attributes that an inert object would have."""
    if value.name.endswith("._reconstruct_persistent_obj") and value.args:  # NVIDIA's pickles, which carry source code.
        return mapping(mapping(value.args[0]).get("state"))
    return mapping(value.state)


def plain(value: Any, budget: Budget | None = None, depth: int = 0) -> Any:
    """Reduces a value to numbers, texts, lists and dictionaries; other objects become their name or type."""
    budget = budget or Budget(100_000)
    budget.spend()
    if depth > 32:
        return "..."
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return f"<a number of {value.bit_length()} bits>"  # Python refuses to print those of more than 4300 digits.
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {_text(key): plain(entry, budget, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry, budget, depth + 1) for entry in value]
    if isinstance(value, Inert):
        return plain(_meaning(value), budget, depth + 1)
    return value.name if isinstance(value, Global) else f"<{type(value).__name__}>"


def printable(text: str, length: int = 160) -> str:
    """Escapes and shortens text from an untrusted file, so that it cannot control the terminal."""
    return (text if text.isprintable() else ascii(text)[1:-1])[:length]


def _text(key: Any) -> str:
    return str(plain(key))


def _meaning(value: Inert) -> Any:
    """Returns the value of an inert object, for classes that training code uses for its settings."""
    attributes = state(value)
    if "_content" in attributes:  # Dictionaries and lists of omegaconf.
        return attributes["_content"]
    if "_val" in attributes:  # Single values of omegaconf.
        return attributes["_val"]
    if value.name.endswith(".multiarray.scalar"):
        return _numpy_scalar(value)
    if value.name.startswith("pathlib.") and all(isinstance(part, str) for part in value.args):
        return str(PurePosixPath(*value.args))
    if value.pairs:
        return mapping(value)
    if value.items:
        return value.items
    if attributes or value.name == "argparse.Namespace":
        return attributes
    return value.args[0] if len(value.args) == 1 and isinstance(value.args[0], _SIMPLE) else value.name


def _numpy_scalar(value: Inert) -> Any:
    kind, data = value.args
    code = kind.args[0]
    if not re.fullmatch(r"[biuf][1248]", code):
        return f"<numpy {code}>"
    order = kind.state[1] if isinstance(kind.state, tuple) else "<"
    return np.frombuffer(data, np.dtype(code).newbyteorder("=" if order == "|" else order))[0].item()


class _Machine:
    """The stack machine that runs a pickle; `pickletools` documents its opcodes."""

    def __init__(self, known: Mapping[str, Callable[..., Any] | None], persistent: Callable[[Any], Any] | None) -> None:
        self._known, self._persistent_load = known, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self.foreign: dict[str, None] = {}  # A set in the order of the file.

    def run(self, file: BinaryIO) -> Any:
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name in _LITERALS:
                self._stack.append(argument)
            elif name in _FRESH:
                self._stack.append(_FRESH[name]())
            elif name in _TUPLES:
                self._stack[-_TUPLES[name] :] = [tuple(self._stack[-_TUPLES[name] :])]
            elif name == "STOP":
                return self._stack.pop()
            else:
                getattr(self, f"_{name.lower()}")(argument)
        raise AssertionError("genops ends with STOP or raises")

    def _proto(self, version: int) -> None:
        if version > 5:
            raise Refused(
                f"is a pickle of protocol {version}, but the newest known protocol is 5; copy or download it again"
            )

    def _frame(self, _: int) -> None:
        pass

    def _mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        at = self._marks.pop()
        items = self._stack[at:]
        del self._stack[at:]
        return items

    def _pop(self, _: None) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _pop_mark(self, _: None) -> None:
        self._since_mark()

    def _dup(self, _: None) -> None:
        self._stack.append(self._stack[-1])

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _binput = _long_binput = _put

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _binget = _long_binget = _get

    def _tuple(self, _: None) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _list(self, _: None) -> None:
        self._stack.append(self._since_mark())

    def _dict(self, _: None) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._add_pairs(items)

    def _frozenset(self, _: None) -> None:
        self._stack.append(frozenset(map(safe_key, self._since_mark())))

    def _append(self, _: None) -> None:
        self._add_items([self._stack.pop()])

    def _appends(self, _: None) -> None:
        self._add_items(self._since_mark())

    def _add_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        (target.items if isinstance(target, Inert) else target).extend(items)

    def _additems(self, _: None) -> None:
        items = self._since_mark()
        self._stack[-1].update(map(safe_key, items))

    def _setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._add_pairs([key, value])

    def _setitems(self, _: None) -> None:
        self._add_pairs(self._since_mark())

    def _add_pairs(self, items: list[Any]) -> None:
        target, pairs = self._stack[-1], list(zip(map(safe_key, items[::2]), items[1::2], strict=True))
        if isinstance(target, Inert):
            target.pairs.extend(pairs)
        else:
            target.update(pairs)

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self._named(module, name))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(self._named(module, name))

    def _ext1(self, code: int) -> None:
        self._stack.append(self._named("copyreg", f"extension_{code}"))

    _ext2 = _ext4 = _ext1

    def _named(self, module: str, name: str) -> Global:
        full = f"{_MODULES.get(module, module)}.{name}"
        if full not in self._known:
            self.foreign[printable(full)] = None
        return Global(full)

    def _reduce(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    _newobj = _reduce  # A class and the arguments of its `__new__`: the same stack and the same result.

    def _newobj_ex(self, _: None) -> None:
        keywords, arguments, kind = self._stack.pop(), self._stack.pop(), self._stack.pop()
        value = self._call(kind, arguments)
        if isinstance(value, Inert):
            value.state = keywords
        self._stack.append(value)

    def _inst(self, argument: str) -> None:
        arguments = self._since_mark()
        module, _, name = argument.partition(" ")
        self._stack.append(self._call(self._named(module, name), arguments))

    def _obj(self, _: None) -> None:
        kind, *arguments = self._since_mark()
        self._stack.append(self._call(kind, arguments))

    def _call(self, function: Any, arguments: Any) -> Any:
        builder = self._known.get(function.name)
        return builder(*arguments) if builder is not None else Inert(function.name, tuple(arguments))

    def _build(self, _: None) -> None:
        attributes = self._stack.pop()
        target = self._stack[-1]
        if isinstance(attributes, tuple) and len(attributes) == 2 and isinstance(attributes[1], dict):
            attributes = mapping(attributes[0]) | attributes[1]  # Attributes and slots.
        if isinstance(target, Inert):  # Plain data needs no attributes.
            target.state = attributes

    def _persid(self, argument: str) -> None:
        self._stack.append(self._persistent(argument))

    def _binpersid(self, _: None) -> None:
        self._stack.append(self._persistent(self._stack.pop()))

    def _persistent(self, identity: Any) -> Any:
        if self._persistent_load is None:
            raise Refused("stores parts outside of its pickle, which torch.save does not do; save its state dict")
        return self._persistent_load(identity)


def safe_key(value: Any) -> Any:
    """Returns a key of a dictionary if its hash is quick to compute, otherwise a placeholder."""
    simple = isinstance(value, (*_SIMPLE, Global, Inert)) or (
        # The hash of nested tuples can take forever: a shared part is hashed again wherever it occurs.
        isinstance(value, tuple) and all(isinstance(part, _SIMPLE) for part in value)
    )
    if isinstance(value, float) and math.isnan(value):
        simple = False
    return value if simple else Inert("key")
