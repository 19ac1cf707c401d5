"""Modules that are built for weights that come later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


@contextmanager
def unfilled() -> Iterator[None]:
    """Builds modules with weights that have no values yet: on the "meta" device, without memory and random draws.

    `load_state_dict(tensors, assign=True)` fills them. Only what `torch.empty` makes is without values; tables that are
    computed, such as positions, have theirs, wherever the caller builds networks.
    """
    with torch.device("cpu"), _EmptyOnMeta():
        yield


class _EmptyOnMeta(TorchFunctionMode):
    """Puts `torch.empty` on "meta", and nothing else: to compute there loads torch's compiler, which takes seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            return func(*args, **{**kwargs, "device": "meta"})
        if func in _DRAWS:
            drawn = args[0] if args else kwargs["tensor"]
            if drawn.is_meta:
                return drawn
        return func(*args, **kwargs)
