"""Recording the outputs of layers while a network is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture import Hook, changed_in_place, hook_layer, version_of

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a forward pass."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What was recorded of one forward pass.

    Attributes:
        outputs: Outputs of the layers, in the order in which they ran; what `keep` returned for them, if it is given.
        detached: Names of the layers that ran without gradients.
        calls: Arguments of the networks that were called, by the id of the module.
    """

    outputs: dict[str, Any]
    detached: frozenset[str]
    calls: dict[int, Call]


@dataclass(frozen=True, eq=False)
class _Recorded:
    name: str
    output: Any
    versions: tuple[int | None, ...]
    detached: bool


class PassRecorder:
    """Records the outputs of layers in the latest forward pass, attached to the autograd graph, until they are taken.

    Hooks stay from `attach` to `detach`, so that torch.compile traces them once. They only store what they get, since
    they become part of compiled graphs; it is converted to tokens later.

    Args:
        module: The network.
        layers: Names of submodules, or of their inputs.
        keep: Function from the raw output of a layer, and the layer's name, to what is recorded; by default the output.
        on_begin: Function called at the beginning of a pass with gradients. Every such pass is recorded and replaces
            the previous one. With None, passes are recorded only while `recording` is True, with or without gradients.
        inner: Networks inside the module whose arguments are recorded besides those of the module.

    Attributes:
        recording: Whether outputs are recorded.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Iterable[str],
        *,
        keep: Callable[[Any, str], Tensor] | None = None,
        on_begin: Callable[[], None] | None = None,
        inner: Iterable[nn.Module] = (),
    ) -> None:
        self.recording = False
        self._module, self._layers, self._keep, self._on_begin = module, tuple(layers), keep, on_begin
        self._inner = tuple(network for network in inner if network is not module)
        self._outputs: list[_Recorded] = []
        self._calls: dict[int, Call] = {}
        self._hooks: list[Hook] = []

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles are not attached, as the network in them is not.
        return self.__dict__ | {"recording": False, "_outputs": [], "_calls": {}, "_hooks": []}

    @property
    def attached(self) -> bool:
        """Whether the hooks are attached."""
        return bool(self._hooks)

    def attach(self) -> None:
        """Attaches the hooks.

        Raises:
            ValueError: If a layer is missing in the module.
        """
        begin = self._module.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._hooks.append(Hook(self._module, begin))
        for network in self._inner:
            self._hooks.append(Hook(network, network.register_forward_pre_hook(self._store_call, with_kwargs=True)))
        for name in self._layers:
            self._hooks.append(hook_layer(self._module, name, self._record))
        if self._on_begin is not None:
            # Layers that are called by themselves afterwards do not belong to the pass.
            self._hooks.append(Hook(self._module, self._module.register_forward_hook(self._end)))
        forget_compiled()

    def detach(self) -> None:
        """Removes the hooks and the recorded outputs."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.clear()
        self.recording = False
        forget_compiled()

    def clear(self) -> None:
        """Removes the recorded outputs."""
        self._outputs.clear()
        self._calls.clear()

    def take(self, missing: str) -> Pass:
        """Returns the recorded pass, and removes it.

        Args:
            missing: Error message if no pass was recorded.

        Raises:
            ValueError: If no pass was recorded, a layer ran twice or not at all in it, or its output was changed.
        """
        if not self._outputs:
            raise ValueError(missing)
        order = [recorded.name for recorded in self._outputs]
        repeated = sorted({name for name in order if order.count(name) > 1})
        if repeated:
            raise ValueError(
                f"{repeated[0]} ran {order.count(repeated[0])} times in one forward pass; name a layer that runs once"
            )
        absent = [name for name in self._layers if name not in order]
        if absent:
            raise ValueError(f"{absent[0]} did not run in the forward pass; name a layer that does")
        for recorded in self._outputs:
            if recorded.versions and recorded.versions != _versions(recorded.output):
                raise changed_in_place(recorded.name)
        recorded_pass = Pass(
            {recorded.name: recorded.output for recorded in self._outputs},
            frozenset(recorded.name for recorded in self._outputs if recorded.detached),
            dict(self._calls),
        )
        self.clear()
        self.recording = False
        return recorded_pass

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel runs copies of the network that each see a part of the batch; use "
                "DistributedDataParallel, or one device"
            )
        if not _recomputing():
            if self._on_begin is not None:
                self.recording = torch.is_grad_enabled()
                if self.recording:
                    self.clear()
                    self._on_begin()
            self._store_call(module, args, kwargs)

    def _store_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.recording and not _recomputing():
            self._calls[id(module)] = (args, kwargs)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not _recomputing():
            self.recording = False

    def _record(self, name: str, output: Any) -> None:
        # Gradient checkpointing runs layers again in the backward pass; these outputs are not part of a loss.
        if self.recording and not _recomputing():
            kept = output if self._keep is None else self._keep(output, name)
            # Reentrant checkpointing runs layers without gradients and adds some outputs to the graph afterwards.
            detached = not torch.is_grad_enabled()
            if torch.compiler.is_compiling():
                # A compiled graph does not count changes in place, so its outputs are recorded as copies.
                self._outputs.append(_Recorded(name, _copied(kept), (), detached))
            else:
                self._outputs.append(_Recorded(name, kept, _versions(kept), detached))


def forget_compiled() -> None:
    """Discards compiled graphs, since Dynamo's guards do not detect hooks that are added or removed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _versions(output: Any) -> tuple[int | None, ...]:
    parts = output if isinstance(output, (tuple, list)) else (output,)
    return tuple(version_of(part) for part in parts if isinstance(part, Tensor))


def _copied(output: Any) -> Any:
    if isinstance(output, (tuple, list)):
        return tuple(_copied(part) for part in output)
    return output.clone() if isinstance(output, Tensor) else output


def _recomputing() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
