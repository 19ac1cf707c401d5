"""Types of the functions that long computations call to report their progress."""

from __future__ import annotations

from collections.abc import Callable

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
