"""LayerSync: a strong layer of a network teaches a weaker layer of the same network.

The regularizer is `- weight * mean over batch and tokens of cos(student token, stop-gradient of the teacher token)`,
summed over the pairs. It uses the raw outputs of the layers in the usual forward pass of training: no second pass, no
projector and no other network. `SyncOptions` holds variants for comparison.

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
# A student whose effective rank is below this share of the highest seen has collapsed.
COLLAPSE = 0.25
_HIGHEST = "highest rank "


@dataclass(frozen=True, eq=False)
class _Term:
    """The part of one pair in a loss: tokens (B, T, D), mask of the counted ones (B, T), factor of the cosine."""

    pair: LayerPair
    student: Tensor
    teacher: Tensor
    counts: Tensor | None
    weight: float

    def over_counted_samples(self, mean: Tensor) -> Tensor:
        """Converts a mean over all samples, where samples without counted tokens add 0, to one over the others."""
        return mean if self.counts is None else mean / self.counts.any(1).to(mean.dtype).mean()

    @property
    def tokens_that_count(self) -> Tensor:
        """The counted tokens of the student, shape (n, D)."""
        return self.student.flatten(0, -2) if self.counts is None else self.student[self.counts]


class LayerSync:
    """Aligns layers of any module in any training loop.

        with LayerSync(model, [("blocks.2", "blocks.5")], weight=0.3) as sync:
            for x, y in loader:
                loss = training_loss(model, x, y) + sync.loss()
                ...

    `sync.loss()` uses the latest forward pass with gradients and can be called once per pass. Passes without gradients
    are not recorded and may happen in between. Layers may return tokens (B, T, D), feature maps (B, C, *grid) or tuples
    that begin with one of these. Leaving the block removes every hook.

    Works under autocast, torch.compile (compiled graphs are compiled again), non-reentrant gradient checkpointing, DDP
    and `fully_shard`. Cosines are computed in at least float32.

    Some options need more in the loop. The parameters of projectors must be passed to the optimizer; they are not part
    of the module that DDP or `fully_shard` wraps, so wrap `sync.projectors` too. A separate teacher must be called and
    updated:

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
        module: The network, also wrapped in DDP or torch.compile; call the module itself, not its `forward`.
        pairs: Pairs of layers, as (student, teacher) names or `LayerPair`s; the student must run before the teacher.
        weight: Factor of the alignment; values of about 0.1 to 0.7 are published as working.
        options: Differences from the paper.
        tokens: Function from a layer's output and name to its tokens (B, T, D), as in `Backbone`.

    Attributes:
        cosines: Mean cosine of each pair over the counted tokens of the latest loss, detached.
        projectors: Projectors of the pairs, created by `prepare`; else None.
        teacher: Moving average of the network, or None. It is created here, before `fully_shard`; shard it likewise.

    Raises:
        ValueError: If a layer is missing in the module, no pair is given, a pair is given twice, a layer is aligned to
            itself or to an earlier one, or the number of pair weights differs from the number of pairs.
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
                f"{len(options.pair_weights)} weights for {len(self.pairs)} layer pairs; pass one per pair"
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
            teacher = self.module if self.teacher is None else self.teacher
            self._teacher_pass = PassRecorder(teacher, dict.fromkeys(pair.teacher for pair in self.pairs), tokens)
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
        """Computes the regularizer of the latest forward pass, a scalar, and updates `cosines`.

        Samples outside the noise range and masked tokens add neither value nor gradient. Parts of a batch of equal size
        average to the whole, as in `mean_cosine`.

        Args:
            step: Training step, counted from 0; required by a schedule.
            noise_level: Noise levels of the samples, shape (B,), in [0, 1]; required by a noise range.
            mask: Mask of the counted tokens, shape (B, T), bool; False for padding.

        Raises:
            ValueError: If no forward pass was recorded, a layer ran twice in it, a teacher ran before its student,
                the layers differ in shape, the student has no gradient, or an option lacks its argument.
        """
        factor, samples = self._factor(step), self._samples_that_count(noise_level)
        student_outputs, teacher_outputs = self._take()
        terms = []
        for pair, weight in zip(self.pairs, self.options.pair_weights or (1.0,) * len(self.pairs), strict=True):
            student, teacher = student_outputs[pair.student], teacher_outputs[pair.teacher].detach()
            _check_gradient(student, pair)
            counts = tokens_that_count(student, samples=samples, mask=mask)
            terms.append(_Term(pair, student, teacher, counts, self.weight * factor * weight))
        total = torch.zeros((), device=terms[0].student.device)
        with torch.set_grad_enabled(factor > 0 and torch.is_grad_enabled()):
            for term, projected in zip(terms, self._projected(self.projectors, terms), strict=True):
                cosine = self._mean_cosine(projected, term)
                self.cosines[term.pair] = term.over_counted_samples(cosine.detach())
                total = total - term.weight * cosine
        self._latest = tuple(replace(term, student=term.student.detach()) for term in terms)
        return total

    def statistics(self) -> dict[str, float]:
        """Computes statistics of the latest loss for the log; this takes longer than the loss itself.

        Call it before the next forward pass begins. Pairs without counted tokens are left out. For each pair it returns
        "cosine ..." and "gradient norm ...", the norm of the regularizer's gradient with respect to the student's
        tokens, weights included. For each student it returns "effective rank ..." and "collapse ...", which is 1 if the
        rank is below a quarter of its highest value so far, else 0. With several processes, the statistics are those of
        this process' part of the batch.

        Raises:
            ValueError: If `loss` was not called since the latest forward pass.
        """
        if not self._latest:
            raise ValueError("there is no latest loss; call statistics() between loss() and the next forward pass")
        statistics: dict[str, float] = {}
        for term, gradient_norm in zip(self._latest, self._gradient_norms(), strict=True):
            if not term.tokens_that_count.numel():
                continue
            statistics[f"cosine {term.pair}"] = float(self.cosines[term.pair])
            statistics[f"gradient norm {term.pair}"] = gradient_norm
            if f"effective rank {term.pair.student}" not in statistics:
                statistics |= self._rank(term)
        return statistics

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Creates the projectors, after one forward pass without gradients that shows the widths of the tokens.

        With a projector, call it once before creating the optimizer. Weights are drawn from torch's global generator.

        Args:
            *args: Positional arguments of the network.
            **kwargs: Keyword arguments of the network.

        Raises:
            ValueError: If the options contain no projector.
        """
        if not self.options.projector_width:
            raise ValueError("there is no projector to prepare; pass SyncOptions(projector_width=...)")
        names = [name for pair in self.pairs for name in (pair.student, pair.teacher)]
        forget_compiled()
        with torch.no_grad(), evaluating(self.module), capture(self.module, names, tokens=self._tokens) as outputs:
            self.module(*args, **kwargs)
        forget_compiled()
        widths = [(outputs[pair.student].shape[-1], outputs[pair.teacher].shape[-1]) for pair in self.pairs]
        weight = next(self.module.parameters())
        self.projectors = Projectors(widths, self.options.projector_width).to(weight.device, weight.dtype)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Returns the parameters of the projectors, for the optimizer; none without projectors."""
        return iter(()) if self.projectors is None else self.projectors.parameters()

    @contextmanager
    def teaching(self) -> Iterator[nn.Module]:
        """Yields the teacher in evaluation mode and without gradients; call it once inside the block, before `loss`.

        The teacher is the moving average of the network, or the network itself if the options have a noise gap only.

        Raises:
            ValueError: If the options need no second forward pass.
        """
        if self._teacher_pass is None:
            raise ValueError(
                "the teacher has no separate forward pass; pass SyncOptions(teacher_decay=...) or noise_gap"
            )
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
        """Updates the moving average of the teacher; call it after each step of the optimizer.

        Raises:
            ValueError: If the teacher is not a moving average.
        """
        if self.teacher is None:
            raise ValueError("there is no teacher to update; pass SyncOptions(teacher_decay=...)")
        torch._foreach_lerp_([*self.teacher.parameters()], [*self.module.parameters()], 1 - self.options.teacher_decay)
        for teacher_buffer, buffer in zip(self.teacher.buffers(), self.module.buffers(), strict=True):
            teacher_buffer.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state that a resumed training needs besides the network: projectors, teacher, highest ranks."""
        state = {f"{name}.{key}": tensor for name, part in self._parts() for key, tensor in part.state_dict().items()}
        return state | {
            _HIGHEST + name: torch.tensor(rank, dtype=torch.float64) for name, rank in self._highest_ranks.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the result of `state_dict`; needs the same pairs and options, and projectors from `prepare`.

        Raises:
            ValueError: If the state contains other parts than this LayerSync has.
        """
        parts = dict(self._parts())
        state_parts = dict.fromkeys(key.split(".")[0] for key in state if not key.startswith(_HIGHEST))
        if set(state_parts) != set(parts):
            raise ValueError(
                f"the state contains {' and '.join(state_parts) or 'no parts'}, this LayerSync has "
                f"{' and '.join(parts) or 'none'}; pass the same options, and call prepare() for projectors first"
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
            raise ValueError("the weight depends on the step; pass loss(step=...)")
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
            raise ValueError("the projectors do not exist yet; call prepare() before creating the optimizer")
        projected: list[Tensor] = projectors(students)
        return projected

    def _mean_cosine(self, projected: Tensor, term: _Term) -> Tensor:
        if projected.shape != term.teacher.shape:
            raise ValueError(
                f"{term.pair.student} returns tokens of shape {tuple(projected.shape[1:])}, "
                f"{term.pair.teacher} of {tuple(term.teacher.shape[1:])}; align layers of equal shape"
            )
        return mean_cosine(projected, term.teacher, term.counts, centered=self.options.centered)

    def _gradient_norms(self) -> list[float]:
        # Without the wrapper, which would wait for the other processes.
        projectors = None if self.projectors is None else _network(self.projectors)
        students = [term.student.detach().requires_grad_() for term in self._latest]
        with torch.enable_grad():
            terms = [replace(term, student=student) for term, student in zip(self._latest, students, strict=True)]
            projected = self._projected(projectors, terms)
            cosines = [t.weight * self._mean_cosine(p, t) for p, t in zip(projected, terms, strict=True)]
        return [float(gradient.norm()) for gradient in torch.autograd.grad(cosines, students)]

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
            "the teacher did not run; call it inside `with sync.teaching()` before loss()"
        )

    def _forget_latest(self) -> None:
        self._latest = ()


def _check_gradient(student: Tensor, pair: LayerPair) -> None:
    if not student.requires_grad:
        raise ValueError(
            f"{pair.student} has no gradient (frozen, or under reentrant checkpointing); "
            "train it, or checkpoint with use_reentrant=False"
        )


def _network(module: nn.Module) -> nn.Module:
    """Unwraps DDP and torch.compile, whose names contain "module." and "_orig_mod."."""
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):
            module = compiled
        else:
            return module
