"""LayerSync: a strong layer of a network teaches a weaker one of the same network.

The regulariser is `- weight * mean over batch and tokens of cos(student token, stop-gradient of the teacher token)`,
summed over the pairs, on the raw outputs of the layers in the forward pass that training does anyway: no second pass,
no projector, no other network.

Source: Haghighi et al. 2025, LayerSync (arXiv:2510.12581).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from layerprobe.capture import as_tokens, find_layer, hook_layer


@dataclass(frozen=True, order=True)
class LayerPair:
    """Which layer learns from which.

    Attributes:
        student: Name of the layer that is pulled, as in the module: "blocks.2".
        teacher: Name of the later layer that it is pulled towards.
    """

    student: str
    teacher: str

    def __post_init__(self) -> None:
        if self.student == self.teacher:
            raise ValueError(f"{self.student} cannot be its own teacher: a layer aligned to itself learns nothing")
        student, teacher = _block_index(self.student), _block_index(self.teacher)
        if student and teacher and student[0] == teacher[0] and student[1] > teacher[1]:
            raise ValueError(f"student {self.student} comes after teacher {self.teacher}; swap them")

    def __str__(self) -> str:
        return f"{self.student} <- {self.teacher}"


def layer_of_depth(depth: int, *, prefix: str = "blocks") -> str:
    """The name of LayerSync's 1-based depth: depth 8 is `blocks.7`.

    Raises:
        ValueError: If depth is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth counts from 1, got {depth}; depth 1 is {prefix}.0")
    return f"{prefix}.{depth - 1}"


def depth_heuristic(layers: tuple[str, ...]) -> LayerPair:
    """The pair that hand-picking would give: the student at 0.3, the teacher at 0.6 of the depth.

    Raises:
        ValueError: If there are fewer than two layers.

    Source: near the depths published for LayerSync, 8 <- 16 of 28 blocks (arXiv:2510.12581); this gives 8 <- 17.
    """
    depth = len(layers)
    if depth < 2:
        raise ValueError(f"a pair needs two layers, got {depth}")
    student = min(max(round(0.3 * depth), 1), depth - 1)
    teacher = max(round(0.6 * depth), student + 1)
    return LayerPair(layers[student - 1], layers[teacher - 1])


class LayerSync:
    """Aligns layers of any module, in any training loop.

        with LayerSync(model, [("blocks.2", "blocks.5")], weight=0.3) as sync:
            for x, y in loader:
                loss = training_loss(model, x, y) + sync.loss()
                ...

    `sync.loss()` belongs to the latest forward pass with gradients, and once to each; passes without gradients are not
    recorded and may come in between. Layers may return tokens (B, T, D), maps (B, C, *grid) or tuples that begin with
    one of these. Leaving the block removes every hook.

    Works under autocast, torch.compile (what was compiled before is compiled anew) and non-reentrant gradient
    checkpointing. The cosine is computed in float32.

    Args:
        module: The network; its own `forward` must be called through `module(...)`.
        pairs: (student, teacher) names or `LayerPair`s; the student must run before the teacher.
        weight: The factor of the alignment; the published range that works is about 0.1 to 0.7.
        tokens: What of a layer's output is aligned, see `Backbone`.

    Raises:
        ValueError: If a name is not in the module, no pair is given, a pair stands twice, or a layer would be aligned
            to itself or to an earlier one.
    """

    def __init__(
        self,
        module: nn.Module,
        pairs: Iterable[LayerPair | tuple[str, str]],
        *,
        weight: float,
        tokens: Callable[[Any, str], Tensor] = as_tokens,
    ) -> None:
        self.pairs = tuple(_pair(pair) for pair in pairs)
        if not self.pairs:
            raise ValueError("no layer pair given; pass at least one (student, teacher)")
        if len(set(self.pairs)) < len(self.pairs):
            raise ValueError(f"a layer pair is given twice: {', '.join(map(str, self.pairs))}")
        self.module, self.weight = module, weight
        self.cosines: dict[LayerPair, Tensor] = {}
        names = dict.fromkeys(name for pair in self.pairs for name in (pair.student, pair.teacher))
        for name in names:
            find_layer(module, name)
        self._layers, self._tokens = tuple(names), tokens
        self._outputs: list[tuple[str, Tensor]] = []
        self._recording = False
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> LayerSync:
        if self._handles:
            raise ValueError("this LayerSync is already active; leave its block first")
        self._handles.append(self.module.register_forward_pre_hook(self._begin))
        for name in self._layers:
            self._handles.append(hook_layer(self.module, name, self._record))
        _forget_compiled()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()
        self._recording = False
        _forget_compiled()

    def loss(self) -> Tensor:
        """The regulariser of the latest forward pass, a scalar; `cosines` then holds each pair's mean cosine, detached.

        Raises:
            ValueError: If no forward pass was recorded, a layer ran twice in it, a teacher ran before its student,
                the layers differ in shape, or the student carries no gradient.
        """
        outputs = self._take_outputs()
        total = torch.zeros((), device=next(iter(outputs.values())).device)
        for pair in self.pairs:
            cosine = _mean_cosine(outputs[pair.student], outputs[pair.teacher], pair)
            self.cosines[pair] = cosine.detach()
            total = total - self.weight * cosine
        return total

    def _take_outputs(self) -> dict[str, Tensor]:
        if not self._outputs:
            raise ValueError(
                "no forward pass with gradients was recorded; call the module inside the `with` block before loss()"
            )
        order = [name for name, _ in self._outputs]
        twice = sorted({name for name in order if order.count(name) > 1})
        if twice:
            raise ValueError(
                f"{twice[0]} ran {order.count(twice[0])} times in one forward pass; name a layer that runs once"
            )
        missing = [name for name in self._layers if name not in order]
        if missing:
            raise ValueError(f"{missing[0]} did not run in the forward pass; name a layer that does")
        for pair in self.pairs:
            if order.index(pair.student) > order.index(pair.teacher):
                raise ValueError(f"student {pair.student} runs after teacher {pair.teacher}; swap them")
        outputs = dict(self._outputs)
        self._outputs.clear()
        self._recording = False
        return outputs

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        if not _recomputing():
            self._recording = torch.is_grad_enabled()
            if self._recording:
                self._outputs.clear()

    def _record(self, name: str, output: Any) -> None:
        # Checkpointing runs layers again in the backward pass; those outputs belong to no loss.
        if self._recording and not _recomputing():
            tokens = self._tokens(output, name)
            # Reentrant checkpointing runs layers without gradients and attaches some later: loss() refuses all.
            self._outputs.append((name, tokens if torch.is_grad_enabled() else tokens.detach()))


def _pair(pair: LayerPair | tuple[str, str]) -> LayerPair:
    if isinstance(pair, LayerPair):
        return pair
    if isinstance(pair, str) or len(pair) != 2:
        raise ValueError(f"{pair!r} is not a (student, teacher) pair; pass a list of pairs of layer names")
    return LayerPair(*pair)


def _mean_cosine(student: Tensor, teacher: Tensor, pair: LayerPair) -> Tensor:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{pair.student} gives tokens of shape {tuple(student.shape[1:])}, "
            f"{pair.teacher} of {tuple(teacher.shape[1:])}; align layers of equal shape"
        )
    if not student.requires_grad:
        raise ValueError(
            f"{pair.student} carries no gradient (frozen, or under reentrant checkpointing); "
            "train it, or checkpoint with use_reentrant=False"
        )
    # Norms overflow and cosines lose digits in half precision.
    return F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1).mean()


def _forget_compiled() -> None:
    """Has compiled graphs compiled anew: they do not notice hooks that come or go (Dynamo's guards skip them)."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _recomputing() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _block_index(name: str) -> tuple[str, int] | None:
    prefix, _, index = name.rpartition(".")
    return (prefix, int(index)) if index.isdigit() else None
