"""LayerSync: a strong layer of a network teaches a weaker one of the same network.

The regularizer is `- weight * mean over batch and tokens of cos(student token, stop-gradient of the teacher token)`,
summed over the pairs, on the raw outputs of the layers in the forward pass that training does anyway: no second pass,
no projector, no other network. `SyncOptions` has what else can be done, for comparison.

Source: Haghighi et al. 2025, LayerSync (arXiv:2510.12581).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from layerprobe.capture import as_tokens, capture, evaluating, find_layer
from layerprobe.layersync.alignment import Projectors, mean_cosine, token_rank, tokens_that_count
from layerprobe.layersync.options import SyncOptions
from layerprobe.layersync.pair import LayerPair, as_pair
from layerprobe.layersync.recorder import PassRecorder, forget_compiled

PAPER_OPTIONS = SyncOptions()
# Of all pair atlases in docs/atlas. LayerSync has 0.2 for SiT-XL/2, and 0.1 to 0.7 alike on SiT-B/2.
WEIGHT = 0.3
# A student whose effective rank is below this share of the highest seen has collapsed.
COLLAPSE = 0.25
_HIGHEST = "highest rank "


@dataclass(frozen=True, eq=False)
class _Term:
    """One pair's part of a loss: tokens (B, T, D), which of them count (B, T), and the factor of the cosine."""

    pair: LayerPair
    student: Tensor
    teacher: Tensor
    counts: Tensor | None
    weight: float

    def over_what_counts(self, mean: Tensor) -> Tensor:
        """A mean over all samples, of which those without a token that counts added 0, as one over the others."""
        return mean if self.counts is None else mean / self.counts.any(1).to(mean.dtype).mean()

    @property
    def tokens_that_count(self) -> Tensor:
        """The student's, shape (n, D)."""
        return self.student.flatten(0, -2) if self.counts is None else self.student[self.counts]


class LayerSync:
    """Aligns layers of any module, in any training loop.

        with LayerSync(model, [("blocks.2", "blocks.5")], weight=0.3) as sync:
            for x, y in loader:
                loss = training_loss(model, x, y) + sync.loss()
                ...

    `sync.loss()` belongs to the latest forward pass with gradients, and once to each; passes without gradients are not
    recorded and may come in between. Layers may return tokens (B, T, D), maps (B, C, *grid) or tuples that begin with
    one of these. Leaving the block removes every hook.

    Works under autocast, torch.compile (what was compiled before is compiled anew), non-reentrant gradient
    checkpointing, DDP and `fully_shard`. The cosine is computed in float32 at least.

    Some options ask more of the loop. A projector's parameters belong to the optimizer, and are not part of the module
    that DDP or `fully_shard` wraps (wrap `sync.projectors` too); a teacher of its own is shown its inputs and follows:

        sync = LayerSync(model, pairs, weight=0.3, options=SyncOptions(projector_width=512, teacher_decay=0.999))
        sync.prepare(x_t, t, y)
        optimizer = torch.optim.AdamW([*model.parameters(), *sync.parameters()])
        with sync:
            for ...:
                loss = training_loss(model, x_t, t, y)
                with sync.teaching() as teacher:
                    teacher(x_t, t, y)
                (loss + sync.loss()).backward()
                optimizer.step()
                sync.update_teacher()

    Args:
        module: The network, or DDP or torch.compile around it; it must be called as a module, not by `forward`.
        pairs: (student, teacher) names in the network, or `LayerPair`s; the student must run before the teacher.
        weight: The factor of the alignment; the published range that works is about 0.1 to 0.7.
        options: What is done differently from the paper.
        tokens: What of a layer's output is aligned, see `Backbone`.

    Attributes:
        cosines: Mean cosine of each pair over the tokens that counted in the latest loss, detached.
        projectors: The pairs' heads, once `prepare` has made them.
        teacher: Moving average of the network, made here, so before `fully_shard`; shard it in the same way.

    Raises:
        ValueError: If a name is not in the module, no pair is given, a pair stands twice, a layer would be aligned
            to itself or to an earlier one, or the weights of the pairs are not one for each.
    """

    def __init__(
        self,
        module: nn.Module,
        pairs: Iterable[LayerPair | tuple[str, str]],
        *,
        weight: float,
        options: SyncOptions = PAPER_OPTIONS,
        tokens: Callable[[Any, str], Tensor] = as_tokens,
    ) -> None:
        self.pairs = tuple(as_pair(pair) for pair in pairs)
        if not self.pairs:
            raise ValueError("no layer pair given; pass at least one (student, teacher)")
        if len(set(self.pairs)) < len(self.pairs):
            raise ValueError(f"a layer pair is given twice: {', '.join(map(str, self.pairs))}")
        if len(options.pair_weights) not in (0, len(self.pairs)):
            raise ValueError(
                f"{len(options.pair_weights)} weights for {len(self.pairs)} layer pairs; pass one for each"
            )
        self.module, self.weight, self.options = _network(module), weight, options
        self.cosines: dict[LayerPair, Tensor] = {}
        names = dict.fromkeys(name for pair in self.pairs for name in (pair.student, pair.teacher))
        for name in names:
            find_layer(self.module, name)
        self._tokens = tokens
        self.projectors: nn.Module | None = None
        self.teacher: nn.Module | None = None
        if options.teacher_decay:
            self.teacher = copy.deepcopy(self.module).eval().requires_grad_(False)
        self._student_pass = PassRecorder(self.module, names, tokens, on_begin=self._forget_latest)
        self._teacher_pass: PassRecorder | None = None
        if options.second_pass:
            taught = self.module if self.teacher is None else self.teacher
            self._teacher_pass = PassRecorder(taught, dict.fromkeys(pair.teacher for pair in self.pairs), tokens)
        self._latest: tuple[_Term, ...] = ()
        self._highest_ranks: dict[str, float] = {}

    def __enter__(self) -> LayerSync:
        if self._student_pass.attached:
            raise ValueError("this LayerSync is already active; leave its block first")
        self._student_pass.attach()
        if self._teacher_pass is not None:
            self._teacher_pass.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._student_pass.detach()
        if self._teacher_pass is not None:
            self._teacher_pass.detach()
        self._latest = ()

    def loss(self, step: int | None = None, noise_level: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """The regularizer of the latest forward pass, a scalar; `cosines` then holds each pair's mean cosine, detached.

        Samples outside the noise range and masked tokens add nothing, and no gradient. See `mean_cosine` for the mean:
        parts of a batch, of equal size, average to the whole.

        Args:
            step: Of the training, from 0; for a schedule.
            noise_level: Of the samples, shape (B,), in [0, 1]; for a noise range.
            mask: True for the tokens that count, shape (B, T), bool: False for padding.

        Raises:
            ValueError: If no forward pass was recorded, a layer ran twice in it, a teacher ran before its student,
                the layers differ in shape, the student carries no gradient, or an option lacks its argument.
        """
        factor, samples = self._factor(step), self._samples_that_count(noise_level)
        outputs, taught = self._take()
        terms = []
        for pair, weight in zip(self.pairs, self.options.pair_weights or (1.0,) * len(self.pairs), strict=True):
            student, teacher = outputs[pair.student], taught[pair.teacher].detach()
            _check_gradient(student, pair)
            counts = tokens_that_count(student, samples=samples, mask=mask)
            terms.append(_Term(pair, student, teacher, counts, self.weight * factor * weight))
        total = torch.zeros((), device=terms[0].student.device)
        with torch.set_grad_enabled(factor > 0 and torch.is_grad_enabled()):
            for term, compared in zip(terms, self._projected(self.projectors, terms), strict=True):
                value = self._mean_cosine(compared, term)
                self.cosines[term.pair] = term.over_what_counts(value.detach())
                total = total - term.weight * value
        self._latest = tuple(replace(term, student=term.student.detach()) for term in terms)
        return total

    def statistics(self) -> dict[str, float]:
        """What to log of the latest loss, until the next forward pass begins; it takes longer than the loss itself.

        For every pair in which something counted: "cosine ..." and "gradient norm ...", of the gradient that the
        regularizer has at the student's tokens, weights included. For every such student: "effective rank ..." of its
        tokens, and "collapse ...", 1 if that is below a quarter of the highest that was seen, else 0. With several
        processes they are those of this one's part of the batch.

        Raises:
            ValueError: If there is no such loss.
        """
        if not self._latest:
            raise ValueError("there is no loss to tell of; call statistics() between loss() and the next forward pass")
        numbers: dict[str, float] = {}
        for term, gradient_norm in zip(self._latest, self._gradient_norms(), strict=True):
            if not term.tokens_that_count.numel():
                continue
            numbers[f"cosine {term.pair}"] = float(self.cosines[term.pair])
            numbers[f"gradient norm {term.pair}"] = gradient_norm
            if f"effective rank {term.pair.student}" not in numbers:
                numbers |= self._rank(term)
        return numbers

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Makes the projectors: one forward pass of the network without gradients tells the widths of the tokens.

        To be called once, before the optimizer is made, where there is a projector. Torch's global generator draws the
        weights.

        Raises:
            ValueError: If no projector is wanted.
        """
        if not self.options.projector_width:
            raise ValueError("there is no projector to prepare; pass SyncOptions(projector_width=...)")
        names = [name for pair in self.pairs for name in (pair.student, pair.teacher)]
        forget_compiled()
        with torch.no_grad(), evaluating(self.module), capture(self.module, names, tokens=self._tokens) as found:
            self.module(*args, **kwargs)
        forget_compiled()
        widths = [(found[pair.student].shape[-1], found[pair.teacher].shape[-1]) for pair in self.pairs]
        weights = next(self.module.parameters())
        self.projectors = Projectors(widths, self.options.projector_width).to(weights.device, weights.dtype)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the projectors, for the optimizer; there are none without."""
        return iter(()) if self.projectors is None else self.projectors.parameters()

    @contextmanager
    def teaching(self) -> Iterator[nn.Module]:
        """Gives the teacher, to be called once inside, before `loss`: without gradients, in evaluation mode.

        It is the moving average, or with a noise gap alone the network itself.

        Raises:
            ValueError: If the options have no second forward pass.
        """
        if self._teacher_pass is None:
            raise ValueError("the teacher has no pass of its own; pass SyncOptions(teacher_decay=...) or noise_gap")
        teacher = self.module if self.teacher is None else self.teacher
        self._teacher_pass.clear()
        self._teacher_pass.recording = True
        try:
            with torch.no_grad(), evaluating(teacher):
                yield teacher
        finally:
            self._teacher_pass.recording = False

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Moves the teacher's average towards the network, after each step of the optimizer.

        Raises:
            ValueError: If there is no such teacher.
        """
        if self.teacher is None:
            raise ValueError("there is no teacher to update; pass SyncOptions(teacher_decay=...)")
        torch._foreach_lerp_([*self.teacher.parameters()], [*self.module.parameters()], 1 - self.options.teacher_decay)
        for buffer, latest in zip(self.teacher.buffers(), self.module.buffers(), strict=True):
            buffer.copy_(latest)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed training needs besides the network: projectors, teacher, the highest ranks seen."""
        state = {f"{name}.{key}": tensor for name, part in self._parts() for key, tensor in part.state_dict().items()}
        return state | {
            _HIGHEST + name: torch.tensor(rank, dtype=torch.float64) for name, rank in self._highest_ranks.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state_dict` gave, for the same pairs and options; projectors are prepared first.

        Raises:
            ValueError: If the state belongs to other parts than there are.
        """
        parts = dict(self._parts())
        there = dict.fromkeys(key.split(".")[0] for key in state if not key.startswith(_HIGHEST))
        if set(there) != set(parts):
            raise ValueError(
                f"the state has {' and '.join(there) or 'no parts'}, here there are {' and '.join(parts) or 'none'}; "
                "pass the same options, and prepare() projectors first"
            )
        for name, part in parts.items():
            part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
        self._highest_ranks = {k.removeprefix(_HIGHEST): float(v) for k, v in state.items() if k.startswith(_HIGHEST)}

    def _parts(self) -> list[tuple[str, nn.Module]]:
        parts = (("projectors", self.projectors), ("teacher", self.teacher))
        return [(name, _network(part)) for name, part in parts if part is not None]

    def _factor(self, step: int | None) -> float:
        if not self.options.scheduled:
            return 1.0
        if step is None:
            raise ValueError("the weight follows a schedule; pass loss(step=...)")
        return self.options.factor(step)

    def _samples_that_count(self, noise_level: Tensor | None) -> Tensor | None:
        if not self.options.ranged:
            return None
        if noise_level is None:
            raise ValueError("only a range of noise levels is aligned; pass loss(noise_level=...)")
        low, high = self.options.noise_range
        return (noise_level >= low) & (noise_level <= high)

    def _projected(self, projectors: nn.Module | None, terms: Sequence[_Term]) -> list[Tensor]:
        students = [term.student for term in terms]
        if not self.options.projector_width:
            return students
        if projectors is None:
            raise ValueError("the projectors are not made yet; call prepare() before the optimizer is made")
        projected: list[Tensor] = projectors(students)
        return projected

    def _mean_cosine(self, compared: Tensor, term: _Term) -> Tensor:
        if compared.shape != term.teacher.shape:
            raise ValueError(
                f"{term.pair.student} gives tokens of shape {tuple(compared.shape[1:])}, "
                f"{term.pair.teacher} of {tuple(term.teacher.shape[1:])}; align layers of equal shape"
            )
        return mean_cosine(compared, term.teacher, term.counts, centered=self.options.centered)

    def _gradient_norms(self) -> list[float]:
        # A wrapper for several processes would wait for the others.
        projectors = None if self.projectors is None else _network(self.projectors)
        students = [term.student.detach().requires_grad_() for term in self._latest]
        with torch.enable_grad():
            terms = [replace(term, student=student) for term, student in zip(self._latest, students, strict=True)]
            projected = self._projected(projectors, terms)
            values = [t.weight * self._mean_cosine(p, t) for p, t in zip(projected, terms, strict=True)]
        return [float(gradient.norm()) for gradient in torch.autograd.grad(values, students)]

    def _rank(self, term: _Term) -> dict[str, float]:
        student, rank = term.pair.student, token_rank(term.tokens_that_count)
        highest = self._highest_ranks[student] = max(rank, self._highest_ranks.get(student, 0.0))
        return {f"effective rank {student}": rank, f"collapse {student}": float(rank < COLLAPSE * highest)}

    def _take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        outputs = self._student_pass.take(
            "no forward pass with gradients was recorded; call the module inside the `with` block before loss()"
        )
        order = list(outputs)
        for pair in self.pairs:
            if order.index(pair.student) > order.index(pair.teacher):
                raise ValueError(f"student {pair.student} runs after teacher {pair.teacher}; swap them")
        if self._teacher_pass is None:
            return outputs, outputs
        return outputs, self._teacher_pass.take(
            "the teacher did not run; call it in `with sync.teaching()` before loss()"
        )

    def _forget_latest(self) -> None:
        self._latest = ()


def _check_gradient(student: Tensor, pair: LayerPair) -> None:
    if not student.requires_grad:
        raise ValueError(
            f"{pair.student} carries no gradient (frozen, or under reentrant checkpointing); "
            "train it, or checkpoint with use_reentrant=False"
        )


def _network(module: nn.Module) -> nn.Module:
    """The module inside DDP and torch.compile: its names are without "module." and "_orig_mod."."""
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(inside := getattr(module, "_orig_mod", None), nn.Module):
            module = inside
        else:
            return module
