"""Recording the outputs of layers while a network is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerprobe.capture import hook_layer


class PassRecorder:
    """Records the tokens of layers in the latest forward pass, attached to the autograd graph, until they are taken.

    Hooks stay from `attach` to `detach`, so that torch.compile traces them once. For a single pass, use `capture`.

    Args:
        module: The network.
        layers: Names of submodules, or of their inputs.
        tokens: Function from the raw output of a layer, and the layer's name, to its tokens (B, T, D).
        on_begin: Function called at the beginning of a pass with gradients. Every such pass is recorded and replaces
            the previous one. With None, passes are recorded only while `recording` is True, with or without gradients.

    Attributes:
        recording: Whether outputs are recorded.
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
        """Whether the hooks are attached."""
        return bool(self._handles)

    def attach(self) -> None:
        """Attaches the hooks.

        Raises:
            ValueError: If a layer is missing in the module.
        """
        if self._on_begin is not None:
            self._handles.append(self._module.register_forward_pre_hook(self._begin))
        for name in self._layers:
            self._handles.append(hook_layer(self._module, name, self._record))
        forget_compiled()

    def detach(self) -> None:
        """Removes the hooks and the recorded tokens."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()
        self.recording = False
        forget_compiled()

    def clear(self) -> None:
        """Removes the recorded tokens."""
        self._outputs.clear()

    def take(self, missing: str) -> dict[str, Tensor]:
        """Returns the tokens of every layer, in the order in which the layers ran, and removes them.

        Args:
            missing: Error message if no pass was recorded.

        Raises:
            ValueError: If no pass was recorded, or a layer ran twice or not at all in it.
        """
        if not self._outputs:
            raise ValueError(missing)
        order = [name for name, _ in self._outputs]
        repeated = sorted({name for name in order if order.count(name) > 1})
        if repeated:
            raise ValueError(
                f"{repeated[0]} ran {order.count(repeated[0])} times in one forward pass; name a layer that runs once"
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
        # Gradient checkpointing runs layers again in the backward pass; these outputs are not part of a loss.
        if self.recording and not _recomputing():
            tokens = self._tokens(output, name)
            # Reentrant checkpointing runs layers without gradients and adds some outputs to the graph afterwards.
            # Detached, they are recognized as outputs without a gradient.
            self._outputs.append((name, tokens if torch.is_grad_enabled() else tokens.detach()))


def forget_compiled() -> None:
    """Discards compiled graphs, since Dynamo's guards do not detect hooks that are added or removed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _recomputing() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
