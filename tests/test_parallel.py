"""Many items at a time give what one at a time gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from layerprobe.analyses.parallel import in_parallel


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_keep_the_order_and_the_threads_of_torch_come_back(workers: int) -> None:
    threads = torch.get_num_threads()
    assert in_parallel(lambda i: i * i, range(20), workers=workers) == [i * i for i in range(20)]
    assert torch.get_num_threads() == threads


def test_items_are_taken_as_they_are_needed() -> None:
    taken, done, held = 0, [], []

    def items() -> Iterator[int]:
        nonlocal taken
        for i in range(10):
            taken += 1
            held.append(taken - len(done))
            yield i

    in_parallel(done.append, items(), workers=2)
    assert max(held) <= 2
    assert sorted(done) == list(range(10))


def test_an_exception_comes_out_and_nothing_new_begins() -> None:
    begun = []

    def work(i: int) -> None:
        begun.append(i)
        raise RuntimeError(f"item {i}")

    with pytest.raises(RuntimeError, match="item"):
        in_parallel(work, range(100), workers=2)
    assert len(begun) <= 2
