"""What a device says when it fails, and batches that become smaller when its memory runs out.

Running out of memory says nothing about a network or its data. So it never becomes a result: the batch is repeated in
halves, and where a single row does not fit, the error goes on to the user. Other failures of a device go on as well.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

Result = TypeVar("Result")

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")
_DEVICE_ERRORS = (
    "cuda error",
    "hip error",
    "cublas_status",
    "cudnn_status",
    "cudnn error",
    "cusolver error",
    "nccl error",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory, which says nothing about what was computed.

    Most backends of torch raise a plain `RuntimeError` then, so that the text decides.
    """
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or _is_kind(error, "OutOfMemoryError")
        or (isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY))
    )


def is_device_failure(error: BaseException) -> bool:
    """Whether a device failed for a reason of its own, or ran out of memory.

    After some of these errors a process cannot use the device any more, so that all later results would be wrong.
    """
    text = str(error).lower()
    return (
        is_out_of_memory(error)
        or _is_kind(error, "AcceleratorError")
        or (isinstance(error, RuntimeError) and any(sign in text for sign in _DEVICE_ERRORS))
    )


def _is_kind(error: BaseException, name: str) -> bool:
    """Whether an error is of a type of torch, which this module does not import."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


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
