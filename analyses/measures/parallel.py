"""Many representations at a time: a thread for each, and one core for each thread."""

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
    """`[function(item) for item in items]`, several at a time.

    The matrices of one representation are too small for all cores, so calls run side by side and each gets one thread
    of torch and of numpy. At most `workers` items are held at a time. After an exception nothing new is begun.

    Args:
        function: What to do; its time should be spent in torch or numpy, which let other threads run.
        items: Taken one by one, as they are needed.
        workers: Calls at a time; None for the number of threads that torch may use.
    """
    threads = torch.get_num_threads()
    workers = workers or threads
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
                    taken = None if stopped else next(queue, None)
                if taken is None:
                    return
                results[taken[0]] = function(taken[1])
        except BaseException:
            stopped = True
            raise

    try:
        with _libraries().limit(limits=1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
            for running in [pool.submit(work) for _ in range(workers)]:
                running.result()
    finally:
        torch.set_num_threads(threads)
    return [results[index] for index in range(len(results))]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for an operation of torch or numpy, within; small ones are many times slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with _libraries().limit(limits=count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
