"""How a job reports its progress."""

from __future__ import annotations

from collections.abc import Callable

# (what is running, done, in all)
Progress = Callable[[str, int, int], None]


def named_progress(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)
