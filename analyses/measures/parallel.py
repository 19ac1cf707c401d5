"""Computation on many representations at a time: one thread for each, and one core for each thread.

joblib would run the same threads, but limits neither torch's threads nor those of numpy's BLAS within them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None
) -> list[Result]:
    """Computes `[function(item) for item in items]`, several items at a time.

    The matrices of one representation are too small to use all cores, so calls run side by side and each gets one
    thread of torch and of numpy. At most `workers` items are held at a time. After an exception no new call starts.

    Args:
        function: Function of one item; it should spend its time in torch or numpy, which let other threads run.
        items: Items, taken one by one as they are needed.
        workers: Number of calls at a time; None for the number of threads that torch may use.
    """
    num_threads = torch.get_num_threads()
    workers = workers or num_threads
    if workers == 1:
        return [function(item) for item in items]
    queue, lock = enumerate(items), Lock()
    results: dict[int, Result] = {}
    stopped = False

    def work() -> None:
        nonlocal stopped
        torch.set_num_threads(1)
        try:
            while True:
                with lock:
                    entry = None if stopped else next(queue, None)
                if entry is None:
                    return
                index, item = entry
                results[index] = function(item)
        except BaseException:
            stopped = True
            raise

    try:
        with _libraries().limit(limits=1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
            for future in [pool.submit(work) for _ in range(workers)]:
                future.result()
    finally:
        torch.set_num_threads(num_threads)
    return [results[index] for index in range(len(results))]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Limits torch and numpy to `count` threads; small operations are many times slower on several threads."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with _libraries().limit(limits=count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads_before)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
