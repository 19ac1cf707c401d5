"""Equal results of equal calls on a GPU, where the order of sums is otherwise left to chance.

On a CPU, equal calls give equal bits without it.
"""

from __future__ import annotations

import os

# cuBLAS chooses among its kernels by the space it has; this much and no more makes the choice the same every time.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
_REFUSAL = "does not have a deterministic implementation"


def compute_deterministically() -> None:
    """Makes torch use deterministic kernels in this process, before the first use of a GPU.

    Operations without one raise a `RuntimeError` from then on; see `is_refusal`. A workspace of cuBLAS that the
    environment names already is kept.
    """
    os.environ.setdefault(*_WORKSPACE)
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def is_refusal(error: BaseException) -> bool:
    """Whether torch refused an operation because it has no deterministic implementation."""
    return isinstance(error, RuntimeError) and _REFUSAL in str(error)
