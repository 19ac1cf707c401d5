"""Types of the functions that long computations call to report their progress."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

StepProgress = Callable[[int, int], None]
"""Called with (steps done, steps in total). What counts as a step is up to the computation that reports it."""

TaskProgress = Callable[[str, int, int], None]
"""Called with (task name, steps done, steps in total), for jobs that consist of several tasks."""

TrainingProgress = Callable[[int, int, float], None]
"""Called with (steps done, steps in total, training loss of the step just done)."""


def named_progress(progress: TaskProgress | None, task: str) -> StepProgress | None:
    """Returns a function that reports the steps of one task, or None if `progress` is None.

    Args:
        progress: Function that takes the steps of all tasks, or None.
        task: Name of the task.
    """
    if progress is None:
        return None
    return lambda done, total: progress(task, done, total)


class StepCounter:
    """Counts finished steps, of several threads too, and reports each of them.

    Args:
        progress: Callback, or None.
        total: Number of steps in total.
    """

    def __init__(self, progress: StepProgress | None, total: int) -> None:
        self._progress, self._total, self._done, self._lock = progress, total, 0, Lock()

    def __call__(self) -> None:
        with self._lock:
            self._done += 1
            if self._progress:
                self._progress(self._done, self._total)
