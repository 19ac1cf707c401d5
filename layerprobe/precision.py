"""The precision in which networks are computed.

- float32: 24 bits, on every device.
- tf32: float32 numbers whose products are of 11 bits, several times as fast on the tensor cores of NVIDIA's GPUs from
  Ampere on (compute capability 8.0).
- bfloat16: products of 8 bits by autocast; weights, norms and sums stay as they are.

It holds round the passes of a network alone: probes, CKA and all other measures are computed in float32 and float64.

On a GPU the order of sums is left to chance, so that equal calls agree up to rounding, unless
`compute_deterministically` was called before. On a CPU equal calls give equal bits.

Options are of these types, so the module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

from layerprobe.messages import unknown

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "tf32", "bfloat16"]
WeightType = Literal["float32", "stored"]  # the type that weights are held in; "stored" is that of their file

# The precision that "auto" chooses keeps pooled features this close to those in float32: root mean square error as a
# share of their spread over samples. benchmarks/precisions.py measures it: tf32 keeps it, bfloat16 does not.
FEATURE_TOLERANCE = 0.01

_TF32_CAPABILITY = (8, 0)
# cuBLAS chooses among its kernels by the space it has; this much and no more makes the choice the same every time.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def check_precision(name: str) -> None:
    """Refuses what is no precision.

    Raises:
        ValueError: If the name is not one of `Precision`.
    """
    if name not in get_args(Precision):
        raise ValueError(unknown("precision", name, get_args(Precision)))


def precision_on(name: str, device: torch.device | None) -> Precision:
    """Returns the precision that a name stands for on a device.

    Args:
        name: One of `Precision`. "auto" is the fastest that keeps features within `FEATURE_TOLERANCE`: tf32 where the
            device has it, otherwise float32.
        device: Device of the network; None if it has no weights, which any precision suits.

    Raises:
        ValueError: If the name is unknown, or the device does not compute in tf32.
    """
    check_precision(name)
    if name == "auto":
        return "tf32" if device is not None and has_tf32(device) else "float32"
    if name == "tf32" and device is not None and not has_tf32(device):
        raise ValueError(
            f"{device} does not compute in tf32, as NVIDIA's GPUs from compute capability 8.0 on do; pass --precision "
            "float32 or bfloat16"
        )
    return name  # type: ignore[return-value]


def rounded_by(precision: str | None) -> dict[str, str]:
    """Returns the entry of a record that says the precision; none for float32, as in records of earlier versions."""
    return {} if precision in (None, "float32") else {"precision": str(precision)}


def has_tf32(device: torch.device) -> bool:
    """Whether a device has tensor cores for tf32."""
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= _TF32_CAPABILITY


@contextmanager
def computing(precision: str | None, device: torch.device) -> Iterator[None]:
    """Computes in a precision inside the block, and as before after it.

    Args:
        precision: float32, tf32 or bfloat16; None leaves everything as torch is set.
        device: Device of the computation.
    """
    if precision is None:
        yield
        return
    import torch

    with products_of(precision), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


@contextmanager
def products_of(precision: str | None) -> Iterator[None]:
    """Allows tf32 inside the block, or forbids it, without autocast: for a backward pass, which repeats its types.

    Args:
        precision: float32 or bfloat16 forbid tf32, and tf32 allows it; None leaves everything as torch is set.
    """
    if precision is None:
        yield
        return
    import torch

    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    # Torch 2.9 has newer names of the same settings; the older ones are refused where a caller has used the newer.
    newer = {matmul: (matmul,), cudnn: (cudnn.conv, cudnn.rnn)} if hasattr(matmul, "fp32_precision") else {}
    with ExitStack() as stack:
        for backend in (matmul, cudnn):
            parts = [(part, part.fp32_precision) for part in newer.get(backend, ())]
            stack.callback(_restore, backend, _allows_tf32(backend, parts), parts)
            backend.allow_tf32 = precision == "tf32"
        yield


def _allows_tf32(backend: Any, parts: list[tuple[Any, str]]) -> bool:
    try:
        return bool(backend.allow_tf32)
    except RuntimeError:  # It disagrees with the newer setting, which is the one that holds.
        return parts[0][1] != "tf32"


def _restore(backend: Any, allowed: bool, parts: list[tuple[Any, str]]) -> None:
    backend.allow_tf32 = allowed
    for part, setting in parts:
        part.fp32_precision = setting


def compute_deterministically() -> None:
    """Makes torch use deterministic kernels in this process, before the first use of a GPU.

    Operations without one raise a `RuntimeError` from then on; see `memory.is_refusal`. A workspace of cuBLAS that the
    environment names already is kept.
    """
    os.environ.setdefault(*_WORKSPACE)
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
