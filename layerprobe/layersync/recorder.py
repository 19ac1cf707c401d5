"""Keeping what layers give while a network is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerprobe.capture import hook_layer


class PassRecorder:
    """Keeps the tokens of layers in the latest forward pass, with their gradients, until they are taken.

    Its hooks stay from `attach` to `detach`, so that torch.compile traces them once; `capture` is for a single pass.

    Args:
        module: The network.
        layers: Names of its submodules, or of their inputs.
        tokens: What of a layer's output are tokens (B, T, D); gets the raw output and the layer's name.
        on_begin: Called when a pass with gradients begins; every such pass is recorded, and replaces the one before.
            None records only while `recording` is set by hand, whether there are gradients or not.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Iterable[str],
        tokens: Callable[[Any, str], Tensor],
        *,
        on_begin: Callable[[], None] | None = None,
    ) -> None:
        self.recording = False
        self._module, self._layers, self._tokens, self._on_begin = module, tuple(layers), tokens, on_begin
        self._outputs: list[tuple[str, Tensor]] = []
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    def attach(self) -> None:
        """Places the hooks.

        Raises:
            ValueError: If a layer is not in the module.
        """
        if self._on_begin is not None:
            self._handles.append(self._module.register_forward_pre_hook(self._begin))
        for name in self._layers:
            self._handles.append(hook_layer(self._module, name, self._record))
        forget_compiled()

    def detach(self) -> None:
        """Removes the hooks and what is kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()
        self.recording = False
        forget_compiled()

    def clear(self) -> None:
        """Drops what is kept."""
        self._outputs.clear()

    def take(self, missing: str) -> dict[str, Tensor]:
        """The tokens of every layer, in the order in which the layers ran; they are given once.

        Args:
            missing: What to tell who asks before there was a pass.

        Raises:
            ValueError: If there was no pass, or a layer ran twice or not at all in it.
        """
        if not self._outputs:
            raise ValueError(missing)
        order = [name for name, _ in self._outputs]
        twice = sorted({name for name in order if order.count(name) > 1})
        if twice:
            raise ValueError(
                f"{twice[0]} ran {order.count(twice[0])} times in one forward pass; name a layer that runs once"
            )
        absent = [name for name in self._layers if name not in order]
        if absent:
            raise ValueError(f"{absent[0]} did not run in the forward pass; name a layer that does")
        outputs = dict(self._outputs)
        self.clear()
        self.recording = False
        return outputs

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        if not _recomputing():
            self.recording = torch.is_grad_enabled()
            if self.recording and self._on_begin is not None:
                self.clear()
                self._on_begin()

    def _record(self, name: str, output: Any) -> None:
        # Checkpointing runs layers again in the backward pass; those outputs belong to no loss.
        if self.recording and not _recomputing():
            tokens = self._tokens(output, name)
            # Reentrant checkpointing runs layers without gradients and attaches some later: these have none.
            self._outputs.append((name, tokens if torch.is_grad_enabled() else tokens.detach()))


def forget_compiled() -> None:
    """Has compiled graphs compiled anew: they do not notice hooks that come or go (Dynamo's guards skip them)."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _recomputing() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
