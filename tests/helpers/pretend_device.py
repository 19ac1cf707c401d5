"""A second device in pure Python for machines without a GPU: importing this module gives torch the device "pretend".

A tensor on it keeps its values in memory of the CPU, behind a device of its own. So what a GPU refuses is refused:
operations between devices, `.numpy()`, and inside `without_float64` also float64, as on Apple's MPS. `watched` counts
what costs time on a GPU: kernels, copies between the devices, and each place where the host waits for the device.

Torch's hook for backends written in Python is private and exists since torch 2.9; `AVAILABLE` says whether it is there.
With LAYERPROBE_TEST_DEVICE, which names a real device for these tests, there is no pretended one.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
except ImportError:
    AVAILABLE = False
else:
    AVAILABLE = True

NAME = "pretend"

# Results have a size, or a status, that CUDA must know before it goes on.
_WAITING = frozenset(
    (
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "equal",
        "repeat_interleave",
        "_linalg_eigh",
        "_linalg_svd",
        "linalg_qr",
        "linalg_cholesky_ex",
        "_linalg_solve_ex",
    )
)
_INDEXING = frozenset(("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"))
_OURS = tuple(f"{Path(__file__).resolve().parents[2] / building}/" for building in ("layerprobe", "analyses", "cli"))
_DOUBLE = (torch.float64, torch.complex128)


@dataclass
class Ledger:
    """What happened on the device.

    Attributes:
        kernels: Number of kernels by operation.
        waits: How often the host waited for the device, by "file:line" of ours.
        uploads: Copies to the device, by the same.
        downloads: Copies from the device, by the same.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    downloads: Counter[str] = field(default_factory=Counter)


_ledger = Ledger()
_has_float64 = True


@contextmanager
def watched() -> Iterator[Ledger]:
    """Yields a ledger of what happens inside the block."""
    global _ledger
    before, _ledger = _ledger, Ledger()
    try:
        yield _ledger
    finally:
        _ledger = before


@contextmanager
def without_float64() -> Iterator[None]:
    """Makes the device refuse float64 inside the block."""
    global _has_float64
    _has_float64 = False
    try:
        yield
    finally:
        _has_float64 = True


def _refuse_double(dtype: torch.dtype | None) -> None:
    if not _has_float64 and dtype in _DOUBLE:
        raise TypeError("Cannot convert a tensor to float64 dtype as the pretend device has none; use float32 instead")


class OnDevice(torch.Tensor):
    """A tensor on the device; `raw` has its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnDevice:
        _refuse_double(raw.dtype)
        # A view of weights is no tensor of inference mode, inside of it either.
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(raw.is_inference()):
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                raw.size(),
                strides=raw.stride(),
                storage_offset=raw.storage_offset(),
                dtype=raw.dtype,
                device=f"{NAME}:0",
            )
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.raw})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.raw.__reduce_ex__(protocol)  # a file holds what it would hold from the CPU

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, OnDevice) else value


def _dispatched(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.split("::")[1]
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        parts = func.decompose(*args, **kwargs)  # Inference mode shows some operations whole.
        if parts is not NotImplemented:
            return parts
    if name == "_to_copy":
        return _converted(args[0], kwargs)
    if name == "copy_":
        return _copied(args[0], args[1])
    if name == "_local_scalar_dense":
        _ledger.waits[_place()] += 1
        return args[0].raw.item()
    if name in ("is_pinned", "_pin_memory"):
        return False if name == "is_pinned" else args[0]
    _check_devices(name, args, kwargs)
    if kwargs.get("device") is not None:
        to_cpu = torch.device(kwargs["device"]).type == "cpu"
        kwargs = kwargs | {"device": "cpu"}
        if to_cpu:
            return func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    return _run(name, func, args, kwargs)


def _run(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operation on the values; its results are on the device, and views stay views."""
    known = {id(x.raw): x for x in tree_leaves((args, kwargs)) if isinstance(x, OnDevice)}
    out = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    storages = {x.raw.untyped_storage().data_ptr() for x in known.values()}
    is_view = all(id(x) not in known and x.untyped_storage().data_ptr() in storages for x in results)
    _ledger.kernels[name] += not is_view
    _ledger.waits[_place()] += name in _WAITING

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else OnDevice(x)

    return tree_map(placed, out)


def _check_devices(name: str, args: Any, kwargs: Any) -> None:
    """Refuses tensors of the CPU beside those on the device, except single numbers and indices, as CUDA does."""
    leaves = tree_leaves((args, kwargs))
    hosts = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
    if name in _INDEXING:
        indices = [i for i in tree_leaves(args[1]) if isinstance(i, Tensor)]
        hosts = [x for x in hosts if not any(x is i for i in indices)]
        _ledger.waits[_place()] += any(isinstance(i, OnDevice) and i.dtype == torch.bool for i in indices)
        _ledger.uploads[_place()] += sum(not isinstance(i, OnDevice) for i in indices)
    into_host = name.endswith("_") and args and any(x is args[0] for x in hosts)
    if into_host or any(x.ndim for x in hosts):
        shape = tuple(hosts[0].shape)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {shape} on cpu and {NAME}:0")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")


def _converted(x: OnDevice, kwargs: Any) -> Tensor:
    """`x` with another type, or on the CPU."""
    to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    if not to_cpu:
        _refuse_double(kwargs.get("dtype"))
    options = {key: kwargs[key] for key in ("dtype", "memory_format") if kwargs.get(key) is not None}
    raw = torch.ops.aten._to_copy(x.raw, **options)
    if to_cpu:
        _ledger.downloads[_place()] += 1
        _ledger.waits[_place()] += 1
        return raw
    _ledger.kernels["_to_copy"] += 1
    return OnDevice(raw)


def _copied(target: Tensor, source: Tensor) -> Tensor:
    onto, of = isinstance(target, OnDevice), isinstance(source, OnDevice)
    up, down = onto and not of, of and not onto
    _ledger.uploads[_place()] += up
    _ledger.downloads[_place()] += down
    _ledger.waits[_place()] += down
    _ledger.kernels["copy_"] += not up and not down
    _raw(target).copy_(_raw(source))
    return target


def _place() -> str:
    """The innermost line of ours that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OURS):
            return f"{'/'.join(name.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class _Backend:
    """What torch asks of the module of a device."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed = manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.empty(0, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda state, device=None: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    synchronize = set_device = staticmethod(lambda device=None: None)


def _installed() -> tuple[Any, ...]:
    """Registers the device for the rest of the process; the libraries must stay referenced."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, dtype: Any = None, **_: Any) -> Tensor:
        return OnDevice(torch.empty(size, dtype=dtype or torch.get_default_dtype(), device="cpu"))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
        return OnDevice(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype(), device="cpu"))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        return _copied(target, source)

    def made_whole(make: Any) -> Any:
        """For what every backend has to have, or torch would make of an empty tensor, which we do not see grow."""

        def factory(*args: Any, dtype: Any = None, **_: Any) -> Tensor:
            return OnDevice(make(*args, dtype=dtype, device="cpu"))

        return factory

    for name, make in (
        *((f"arange{overload}", torch.arange) for overload in ("", ".start", ".start_step")),
        *((f"eye{overload}", torch.eye) for overload in ("", ".m")),
        ("tril_indices", torch.tril_indices),
    ):
        library.impl(name, made_whole(make), "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    autocast = torch.library.Library("_", "IMPL")
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return library, autocast


# Beside a real device torch would take this one for the accelerator, and look for pinned memory here.
_LIBRARIES = _installed() if AVAILABLE and "LAYERPROBE_TEST_DEVICE" not in os.environ else ()
