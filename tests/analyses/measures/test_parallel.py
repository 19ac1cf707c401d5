"""Computation of several items at a time gives the results of one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import threadpool_info

from layerprobe.analyses.measures.parallel import in_parallel, torch_threads


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_keep_the_order_and_the_threads_of_torch_come_back(workers: int) -> None:
    threads, blas = torch.get_num_threads(), blas_threads()
    assert in_parallel(lambda i: i * i, range(20), workers=workers) == [i * i for i in range(20)]
    assert (torch.get_num_threads(), blas_threads()) == (threads, blas)


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_within_a_worker_and_within_one_thread_numpy_has_one_too() -> None:
    assert in_parallel(lambda _: set(blas_threads()), range(2), workers=2) == [{1}, {1}]
    with torch_threads(1):
        assert set(blas_threads()) == {1}


def test_items_are_taken_as_they_are_needed() -> None:
    num_taken, done, num_held = 0, [], []

    def items() -> Iterator[int]:
        nonlocal num_taken
        for i in range(10):
            num_taken += 1
            num_held.append(num_taken - len(done))
            yield i

    in_parallel(done.append, items(), workers=2)
    assert max(num_held) <= 2
    assert sorted(done) == list(range(10))


def test_an_exception_comes_out_and_nothing_new_begins() -> None:
    begun = []

    def work(i: int) -> None:
        begun.append(i)
        raise RuntimeError(f"item {i}")

    with pytest.raises(RuntimeError, match="item"):
        in_parallel(work, range(100), workers=2)
    assert len(begun) <= 2
