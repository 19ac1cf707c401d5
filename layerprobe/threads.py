"""Work of the host in threads, so that a device does not wait for it.

Reading files, hashing, decoding images, drawing noise and the operations of torch let other threads run meanwhile.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_MOST_THREADS = 16


def num_threads() -> int:
    """Returns how many threads this process may use: its share of the cores that its machine lets it use."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        cores = os.cpu_count() or 1
    # torchrun starts several processes on the same cores; SLURM gives each its own.
    return max(1, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), _MOST_THREADS))


def each(function: Callable[..., Result], *columns: Sequence[Any], least: int) -> list[Result]:
    """Returns function(*row) for each row of some columns, in their order; threads share the rows, if there are enough.

    An exception is raised as if the rows were computed in order, after the threads have ended.

    Args:
        function: Function of one value of each column.
        columns: Sequences of equal length.
        least: Least number of rows for which a thread is worth its start.
    """
    rows = list(zip(*columns, strict=True))
    parts = max(1, min(num_threads(), len(rows) // least))
    edges = [len(rows) * part // parts for part in range(parts + 1)]

    def part(start: int, stop: int) -> list[Result]:
        return [function(*row) for row in rows[start:stop]]

    if parts == 1:
        return part(0, len(rows))
    with ThreadPoolExecutor(parts, thread_name_prefix="each") as pool:
        return [result for results in pool.map(part, edges[:-1], edges[1:]) for result in results]


def prefetched(items: Iterator[Item], *, ahead: int = 2) -> Generator[Item]:
    """Yields the items, while a thread prepares the next ones.

    An exception is raised at the position of its item. Closing the generator ends the thread.

    Args:
        items: Iterator, which is used in the thread only.
        ahead: Maximum number of items prepared in advance.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        try:
            queue = deque(pool.submit(next, items, end) for _ in range(ahead))
            while (item := queue.popleft().result()) is not end:
                queue.append(pool.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def behind() -> Iterator[Callable[..., None]]:
    """Yields a function `later(function, *args)` that makes calls in a thread, one after another.

    A call waits until the one before it has ended, so that at most one is open. What a call raises is raised by the
    next one, or at the end of the block, which waits for the last. After an exception in the block, the open call still
    ends, and the exception goes on.
    """
    open_call: Future[Any] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="behind") as pool:

        def later(function: Callable[..., object], *args: object) -> None:
            nonlocal open_call
            if open_call:
                open_call.result()
            open_call = pool.submit(function, *args)

        yield later
        if open_call:
            open_call.result()
