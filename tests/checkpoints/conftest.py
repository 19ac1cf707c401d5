"""Watches for anything that reading a checkpoint must not do: running commands, writing files, importing by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

_HARM = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.remove",
    "os.rename",
    "socket.connect",
)
_seen: list[str] | None = None


def _watch(event: str, arguments: Any) -> None:
    if _seen is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event in (*_HARM, "pickle.find_class") or writes:
        _seen.append(f"{event} {arguments!r:.80}")


sys.addaudithook(_watch)


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """What was run, written or looked up by pickle while the test ran, as Python's own auditing sees it."""
    global _seen
    _seen = []
    yield _seen
    _seen = None
