"""What memory, devices and connections say when they fail, and batches that become smaller when memory runs out.

Running out of memory says nothing about a network or its data. So it never becomes a result: the batch is repeated in
halves, and where a single row does not fit, the error goes on to the user. So do other failures of the machine.
"""

from __future__ import annotations

import errno
import gc
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can.?t allocate memory|cannot allocate memory|status_alloc_failed|out_of_(device|host)_memory",
    re.IGNORECASE,
)
_REFUSAL = "does not have a deterministic implementation"
# Gloo begins with its place in its own code; other libraries' connections and folders of that name are none of ours.
_LOST_CONNECTION = re.compile(r"\bgloo/\S+\.cc:\d+|\bgloo connectfullmesh failed", re.IGNORECASE)
_DEVICE = re.compile(
    r"\b(cuda|cuda driver|hip|xpu|nccl|cublas|cudnn|cusolver|cufft|cusparse|curand|miopen|rocblas|triton) error\b"
    # Names of layers in a message end in words like "current_status_".
    r"|\b(cu|hip|roc)(blas|dnn|solver|fft|sparse|rand|tensor)[a-z]*_status_|\bmiopenstatus"
    r"|ur_result_error|device-side assert",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory, or an error was made of one that says so.

    Most backends of torch raise a plain `RuntimeError` then, so that the text decides.
    """
    return any(map(_says_out_of_memory, _and_its_causes(error)))


def is_refusal(error: BaseException) -> bool:
    """Whether torch refused an operation because it has no deterministic implementation."""
    return isinstance(error, RuntimeError) and _REFUSAL in str(error)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a process lost another one, which was killed or cannot be reached."""
    return _is_kind(error, "DistError") or (
        isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error)) is not None
    )


def failure_in(error: BaseException) -> BaseException | None:
    """Returns the failure that says nothing about what was computed, if an error is one or was made of one.

    Such are memory that ran out, a failure of a device, an operation refused by `--deterministic`, and a lost
    connection between processes. After some of them a process cannot use its device any more, so that all later
    results would be wrong.
    """
    return next(filter(_is_failure, _and_its_causes(error)), None)


def pass_on(error: BaseException) -> None:
    """Raises the failure that says nothing about what was computed, if an error is one or was made of one.

    It is the first statement of every `except` that catches more than wrong input, so that no such failure becomes a
    result or a message about a file or a network.
    """
    failure = failure_in(error)
    if failure is not None:
        raise failure


def failure_line(error: BaseException) -> str:
    """Returns the line of a failure's message that says what failed; some backends put it below their own places."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    signs = (_OUT_OF_MEMORY, _DEVICE, _LOST_CONNECTION)
    return next((line for line in lines if any(sign.search(line) for sign in signs)), lines[0]).strip()


def _is_failure(error: BaseException) -> bool:
    return (
        _says_out_of_memory(error)
        or is_refusal(error)
        or is_lost_connection(error)
        or _is_kind(error, "AcceleratorError")
        or (isinstance(error, RuntimeError) and _DEVICE.search(str(error)) is not None)
    )


def _says_out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or _is_kind(error, "OutOfMemoryError")
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None)
    )


def _is_kind(error: BaseException, name: str) -> bool:
    """Whether an error is of a type of torch, which this module does not import."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def _and_its_causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and those that it was made of: its causes, or what its own calls were handling.

    What was being handled before these calls, such as the attempt of a caller with a larger batch, is no part of them.
    """
    seen: list[BaseException] = []
    reached: BaseException | None = error
    while reached is not None and not any(reached is each for each in seen):
        yield reached
        seen.append(reached)
        context = reached.__context__
        handled = context is not None and _first_frame(context) in _frames(reached)
        reached = reached.__cause__ or (context if handled else None)


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _first_frame(error: BaseException) -> FrameType | None:
    return None if error.__traceback__ is None else error.__traceback__.tb_frame


class BatchSize:
    """The number of rows per batch, which is halved when memory runs out and stays so.

    Args:
        rows: Number of rows to begin with.

    Raises:
        ValueError: If it is below 1.
    """

    def __init__(self, rows: int) -> None:
        if rows < 1:
            raise ValueError(f"a batch needs at least 1 row, got {rows}; pass a larger batch size")
        self.rows = rows

    def batches(
        self, num_rows: int, compute: Callable[[range], Result], *, start: int = 0
    ) -> Iterator[tuple[range, Result]]:
        """Yields the rows of each batch with the result for them, in order.

        A batch that does not fit is computed again in halves, and a warning says so. Its results must therefore not
        depend on the size of the batch.

        Args:
            num_rows: Number of rows in all.
            compute: Function of the rows of one batch.
            start: First row.

        Raises:
            Exception: What `compute` raises, memory that runs out with a single row included.
        """
        while start < num_rows:
            batch = range(start, min(start + self.rows, num_rows))
            try:
                result = compute(batch)
            except Exception as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    pass_on(error)
                    raise
            else:
                yield batch, result
                start = batch.stop
                continue
            # The error is gone here, and with it the tensors of the calls that it came through.
            self.rows = len(batch) // 2
            _free()
            warnings.warn(
                f"{len(batch)} rows at a time do not fit into memory; continuing with {self.rows} (--batch-size)",
                stacklevel=2,
            )


def _free() -> None:
    """Gives unused memory back, so that it is there in pieces of another size."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
