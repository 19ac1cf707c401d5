"""Threads give what one would, in order, with its errors, and end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from layerprobe.threads import behind, each, num_threads, prefetched


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_prefetched_items_are_the_same_and_come_from_another_thread() -> None:
    item_threads = []

    def items() -> Iterator[int]:
        for i in range(20):
            item_threads.append(threading.current_thread())
            yield i

    assert list(prefetched(items())) == list(range(20))
    assert threading.main_thread() not in item_threads
    assert threads() == []
    assert list(prefetched(iter([None, 0, None]))) == [None, 0, None]
    assert list(prefetched(iter(()))) == []


def test_at_most_the_given_number_of_items_is_prepared_in_advance() -> None:
    num_prepared = 0

    def items() -> Iterator[int]:
        nonlocal num_prepared
        while True:
            num_prepared += 1
            yield num_prepared

    with closing(prefetched(items(), ahead=3)) as ready:
        for num_used in range(1, 10):
            assert next(ready) == num_used
            threading.Event().wait(0.01)
            assert num_prepared <= num_used + 3
    assert threads() == []


def test_an_exception_is_raised_at_its_item_and_the_thread_ends() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("the disk is gone")

    ready = prefetched(items())
    assert [next(ready) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ready)
    assert threads() == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_thread_ends_when_the_loop_does(error: type[BaseException]) -> None:
    def loop() -> None:
        with closing(prefetched(iter(range(100)))) as ready:
            for item in ready:
                if item == 5:
                    raise error

    with pytest.raises(error):
        loop()
    assert threads() == []


def test_each_row_is_computed_once_and_in_order_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerprobe.threads.num_threads", lambda: 3)
    together, used = threading.Barrier(3, timeout=10), set()

    def added(a: int, b: int) -> int:
        if threading.current_thread() not in used:
            used.add(threading.current_thread())
            together.wait()  # only three threads at a time get past here
        return a + b

    assert each(added, range(20), range(100, 120), least=5) == [100 + 2 * i for i in range(20)]
    assert len(used) == 3
    assert threading.current_thread() not in used
    used.add(threading.main_thread())
    assert each(added, range(9), range(9), least=5) == [2 * i for i in range(9)]  # too few for a thread
    assert each(added, [], [], least=5) == []


def test_the_first_row_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerprobe.threads.num_threads", lambda: 4)

    def fails(row: int) -> None:
        if row in (7, 30, 39):
            raise ValueError(f"row {row}")

    with pytest.raises(ValueError, match=r"^row 7$"):
        each(fails, range(40), least=1)


def test_processes_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert num_threads() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert num_threads() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "40")
    assert num_threads() == 1


def test_calls_behind_are_made_in_order_by_another_thread_while_the_block_goes_on() -> None:
    made, gate = [], threading.Event()

    def call(name: str) -> None:
        assert gate.wait(10)
        made.append((name, threading.current_thread() is threading.main_thread()))

    with behind() as later:
        later(call, "first")
        assert made == []
        gate.set()
        later(call, "second")
        assert made[0] == ("first", False)
    assert made == [("first", False), ("second", False)]


def test_what_a_call_behind_raises_is_raised_by_the_next_or_at_the_end() -> None:
    def fails() -> None:
        raise OSError("the disk is gone")

    def blocks(made: list[int], *, end: Exception | None = None) -> None:
        with behind() as later:
            later(made.append, 1)
            if end:
                raise end
            later(fails)
            later(made.append, 2)

    def last(made: list[int]) -> None:
        with behind() as later:
            later(made.append, 1)
            later(fails)

    for block in (blocks, last):
        made: list[int] = []
        with pytest.raises(OSError, match="the disk is gone"):
            block(made)
        assert made == [1]
    made = []
    with pytest.raises(ValueError, match="of the block"):
        blocks(made, end=ValueError("of the block"))
    assert made == [1]
