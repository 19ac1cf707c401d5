"""LayerSync: a strong layer of a network teaches a weaker layer of the same network.

The regularizer is `- weight * mean over batch and tokens of cos(student token, stop-gradient of the teacher token)`,
summed over the pairs. It uses the raw outputs of the layers in the usual forward pass of training: no second pass, no
projector and no other network. `SyncOptions` holds variants for comparison.

Source: Haghighi et al. 2025, LayerSync (arXiv:2510.12581).
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from layerprobe.backbones import Backbone
from layerprobe.capture import INPUT, as_tokens, evaluating, find_layer
from layerprobe.layersync.alignment import Projectors, mean_cosine, token_rank, tokens_that_count, without_padding
from layerprobe.layersync.average import WeightAverage
from layerprobe.layersync.naming import Layer, as_pairs, picked_in
from layerprobe.layersync.options import WEIGHT, SyncOptions, check_noise_levels
from layerprobe.layersync.pair import LayerPair
from layerprobe.layersync.reading import TokenReader
from layerprobe.layersync.recorder import PassRecorder

PAPER_OPTIONS = SyncOptions()
# A student whose effective rank is below this share of the highest seen has collapsed.
COLLAPSE = 0.25
# Share of the running cosine that a loss leaves as it was; about the last hundred losses count.
_MEMORY = 0.99
_HIGHEST, _RUNNING = "highest rank ", "running cosine "


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

    def __str__(self) -> str:
        """What is aligned, as "blocks.1 <- blocks.4: 256 tokens of width 1152"."""
        (_, count, width), target = self.student.shape, self.teacher.shape[-1]
        projected = "" if width == target else f", projected to {target}"
        return f"{self.pair}: {count} tokens of width {width}{projected}"

    def not_finite(self) -> str | None:
        """Returns the name of a layer with a counted token that is not finite."""
        for name, tokens in ((self.pair.student, self.student), (self.pair.teacher, self.teacher)):
            if not bool((tokens if self.counts is None else tokens[self.counts]).isfinite().all()):
                return name
        return None

    @property
    def tokens_that_count(self) -> Tensor:
        """The counted tokens of the student, shape (n, D)."""
        return self.student.flatten(0, -2) if self.counts is None else self.student[self.counts]


def _print(line: str) -> None:
    """Prints a line to standard error, in the first of several processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()):
        print(f"layerprobe: {line}", file=sys.stderr, flush=True)


class LayerSync:
    """Aligns layers of any module in any training loop.

        with LayerSync(model, [("blocks.2", "blocks.5")], weight=0.3) as sync:
            for x, y in loader:
                loss = training_loss(model, x, y) + sync.loss()
                ...

    In a network with one list of blocks their numbers are enough: `LayerSync(model, 2, 5)`. The pick of a run, with its
    weight: `LayerSync.from_selection(model, "runs/mine")`.

    `sync.loss()` uses the latest forward pass with gradients and can be called once per pass. Passes without gradients
    are not recorded and may happen in between. Leaving the block removes every hook; copies and pickles made inside it
    have none.

    In the diffusers classes that layerprobe knows, also inside wrappers, the tokens of the noisy sample are aligned,
    and not those of the text. Layers of other networks may return tokens (B, T, D), feature maps (B, C, *grid) or
    tuples that begin with one of these; whatever can be read in several ways is refused. The first loss says what is
    aligned.

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
        module: The network, also wrapped in DDP, torch.compile or peft; call the module itself, not its `forward`.
        pairs: Pairs of layers, as (student, teacher) or `LayerPair`s; the student must run before the teacher. A layer
            is a name, or the number of a block in a network with one list of blocks, counted from 0. With `teacher`,
            the student alone.
        teacher: Teacher of the student that is given as `pairs`.
        weight: Factor of the alignment, at least 0; values of about 0.1 to 0.7 are published as working.
        options: Differences from the paper.
        stop_cosine: Cosine, in (0, 1], at which the alignment of a pair ends for good, by the running mean over about a
            hundred losses (over all processes); None to go on. With it, each loss waits for the device once.
        tokens: Function from a layer's output and name to its tokens (B, T, D), as in `Backbone`, applied as soon as
            the layer has run.
        say: Function called with a line for each pair about what is aligned, at the first loss, and about the end of
            its alignment; by default it prints to standard error.

    Attributes:
        aligned: What the latest loss aligned, a line for each pair: "blocks.1 <- blocks.4: 256 tokens of width 1152".
        cosines: Mean cosine of each pair over the counted tokens of the latest loss, detached.
        projectors: Projectors of the pairs, created by `prepare`; else None.

    Raises:
        ValueError: If a layer is missing in the module, a number is that of no block or of several, no pair is given, a
            pair is given twice, a layer is aligned to itself or to an earlier one, the weight is negative or not
            finite, the number of pair weights differs from the number of pairs, or `stop_cosine` is out of its range or
            comes with a projector.
    """

    def __init__(
        self,
        module: nn.Module,
        pairs: Iterable[LayerPair | tuple[Layer, Layer]] | Layer,
        teacher: Layer | None = None,
        *,
        weight: float = WEIGHT,
        options: SyncOptions = PAPER_OPTIONS,
        stop_cosine: float | None = None,
        tokens: Callable[[Any, str], Tensor] | None = None,
        say: Callable[[str], None] = _print,
    ) -> None:
        self.module, self.weight, self.options = unwrapped(module), weight, options
        self.pairs = as_pairs(pairs, teacher, self.module)
        if not self.pairs:
            raise ValueError("no layer pair given; pass at least one (student, teacher)")
        if len(set(self.pairs)) < len(self.pairs):
            raise ValueError(f"a layer pair is given twice: {', '.join(map(str, self.pairs))}")
        if len(options.pair_weights) not in (0, len(self.pairs)):
            raise ValueError(
                f"{len(options.pair_weights)} weights for {len(self.pairs)} layer pairs; pass one per pair"
            )
        if stop_cosine is not None:
            _check_stop(stop_cosine, options)
        self.stop_cosine = stop_cosine
        self.aligned: tuple[str, ...] = ()
        self.cosines: dict[LayerPair, Tensor] = {}
        for pair in self.pairs:
            _check_layers(self.module, pair)
        names = dict.fromkeys(name for pair in self.pairs for name in (pair.student, pair.teacher))
        self._tokens, self._say = tokens, say
        self._reader = TokenReader(self.module, names, tokens)
        self.projectors: nn.Module | None = None
        self._average = WeightAverage(self.module, options.teacher_decay) if options.teacher_decay else None
        self._student_pass = self._recorder(self.module, self._reader, names, on_begin=self._new_pass)
        self._teacher_reader, self._teacher_pass = self._reader, None
        if options.second_pass:
            teaching = self.module if self._average is None else self._average.module
            taught = dict.fromkeys(pair.teacher for pair in self.pairs)
            self._teacher_reader = TokenReader(teaching, taught, tokens)
            self._teacher_pass = self._recorder(teaching, self._teacher_reader, taught)
        self._latest: tuple[_Term, ...] = ()
        self._total = torch.zeros(())
        self._num_passes = 0
        self._highest_ranks: dict[str, float] = {}
        self._running: dict[LayerPair, float] = {}

    @classmethod
    def from_selection(cls, module: nn.Module | Backbone, run: Any, **options: Any) -> LayerSync:
        """Returns the alignment of the pair that a run picked, with the weight of its selection.

            with LayerSync.from_selection(model, "runs/mine") as sync:

        Layers are found by their names, also in a network that a trainer or peft has wrapped.

        Args:
            module: Network of the run in training; or a `Backbone`, whose function for tokens is used too.
            run: Folder of a run or its `selection.json`, a `layerprobe.Run`, or a `Selection`.
            **options: Further arguments of `LayerSync`, such as weight, options, stop_cosine and tokens.

        Raises:
            FileNotFoundError: If the folder holds no selection.
            ValueError: If the run has no admissible pair, or measured layers that the module does not have.
        """
        if isinstance(module, Backbone):
            if module.tokens is not as_tokens:  # `LayerSync` itself also looks at the network's input.
                options = {"tokens": module.tokens} | options
            module = module.module
        pick = picked_in(unwrapped(module), run)
        return cls(module, [pick.pair], **({"weight": pick.weight} | options))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_latest": (), "_num_passes": 0}  # Copies and pickles have no recorded pass.

    @property
    def teacher(self) -> nn.Module | None:
        """Moving average of the network, or None. It is created before `fully_shard`; shard it likewise."""
        return None if self._average is None else self._average.module

    @property
    def weight(self) -> float:
        """Factor of the alignment, which may be changed at any step."""
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        is_number = isinstance(weight, (int, float))
        if not is_number and not (isinstance(weight, Tensor) and weight.numel() == 1 and not weight.requires_grad):
            raise ValueError(
                f"the weight is a {type(weight).__name__}; pass a number, and for a schedule SyncOptions or "
                "sync.weight = ... at each step"
            )
        number = float(weight)
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(
                f"the weight is {number:g}; pass a finite number of at least 0, since the loss has its minus already"
            )
        self._weight = number

    def __enter__(self) -> LayerSync:
        if self._student_pass.attached:
            raise ValueError("this LayerSync is already active; leave its block first")
        try:
            self._student_pass.attach()
            if self._teacher_pass is not None:
                self._teacher_pass.attach()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._student_pass.detach()
        if self._teacher_pass is not None:
            self._teacher_pass.detach()
        self._latest, self._num_passes = (), 0

    def loss(self, step: int | None = None, noise_level: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Computes the regularizer of the latest forward pass, a scalar, and updates `cosines`.

        Samples outside the noise range and masked tokens add neither value nor gradient. Parts of a batch of equal size
        average to the whole, as in `mean_cosine`.

        Args:
            step: Training step, counted from 0; required by a schedule.
            noise_level: Noise levels of the samples, shape (B,), in [0, 1]; required by a noise range.
            mask: Mask of the counted tokens, shape (B, T), bool or numbers 0 and 1; False or 0 for padding.

        Raises:
            ValueError: If no forward pass was recorded, a layer ran twice in it, a teacher ran before its student,
                an output was changed in place, it is unknown which tokens are those of the sample, the layers differ
                in shape, the student has no gradient, or an option lacks its argument. The first loss also raises it
                for tokens that are not finite, a mask without any token and noise levels outside [0, 1]; on the CPU,
                noise levels are always checked.
        """
        is_first = not self.aligned
        factor, samples = self._factor(step), self._samples_that_count(noise_level, is_first=is_first)
        student_outputs, teacher_outputs = self._take()
        terms = []
        for pair, weight in zip(self.pairs, self.options.pair_weights or (1.0,) * len(self.pairs), strict=True):
            student, teacher = student_outputs[pair.student], teacher_outputs[pair.teacher].detach()
            if teacher.is_inference():  # Autograd does not save such tensors for the backward pass.
                teacher = teacher.clone()
            _check_tokens(student, teacher, pair)
            counts = tokens_that_count(student, samples=samples, mask=mask)
            weight = 0.0 if self.has_ended(pair) else self.weight * factor * weight
            terms.append(_Term(pair, student, teacher, counts, weight))
        total = torch.zeros((), device=terms[0].student.device)
        is_aligned = factor > 0 and not all(map(self.has_ended, self.pairs))
        with torch.set_grad_enabled(is_aligned and torch.is_grad_enabled()):
            for term, projected in zip(terms, self._projected(self.projectors, terms), strict=True):
                cosine = self._mean_cosine(projected, term)
                self.cosines[term.pair] = term.over_counted_samples(cosine.detach())
                total = total - term.weight * cosine
        self._latest = tuple(replace(term, student=term.student.detach()) for term in terms)
        self._total = total.detach()
        if is_first:
            _check_first(self._latest, mask)
        self.aligned = tuple(map(str, self._latest))
        if is_first:
            for line in self.aligned:
                self._say(line)
        if self.stop_cosine is not None and is_aligned:
            self._follow(self.stop_cosine)
        return total

    def has_ended(self, pair: LayerPair) -> bool:
        """Whether the alignment of a pair has ended, because its running cosine has reached `stop_cosine`."""
        return self.stop_cosine is not None and self._running.get(pair, -1.0) >= self.stop_cosine

    def logs(self) -> dict[str, float]:
        """Returns the latest loss for the log, by the names of SimpleTuner: two numbers, which cost next to nothing.

        `layersync_loss` is the regularizer, weights included; `layersync_similarity` is the mean cosine of the pairs.

        Raises:
            ValueError: If `loss` was not called since the latest forward pass.

        Source: SimpleTuner, simpletuner/helpers/training/layersync.py.
        """
        if not self._latest:
            raise ValueError("there is no latest loss; call logs() between loss() and the next forward pass")
        cosines = torch.stack([self.cosines[term.pair] for term in self._latest])
        return {"layersync_loss": float(self._total), "layersync_similarity": float(cosines.nanmean())}

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
        names = dict.fromkeys(name for pair in self.pairs for name in (pair.student, pair.teacher))
        recorder = self._recorder(self.module, self._reader, names)
        recorder.attach()
        try:
            recorder.recording = True
            with torch.no_grad(), evaluating(self.module):
                self.module(*args, **kwargs)
            outputs = self._reader.read(recorder.take("the network ran none of the layers; name layers that run"))
        finally:
            recorder.detach()
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
        teacher = self.module
        if self._average is not None:
            self._average.check_device(self.module)
            teacher = self._average.module
        self._teacher_pass.clear()
        self._teacher_pass.recording = True
        try:
            with torch.no_grad(), evaluating(teacher):
                yield teacher
        finally:
            self._teacher_pass.recording = False

    def update_teacher(self) -> None:
        """Updates the moving average of the teacher; call it after each step of the optimizer.

        It is kept in at least float32, also for a network in half precision.

        Raises:
            ValueError: If the teacher is not a moving average, or the network has other parameters than it or is on
                another device.
        """
        if self._average is None:
            raise ValueError("there is no teacher to update; pass SyncOptions(teacher_decay=...)")
        self._average.update(self.module)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what a resumed training needs besides the network: projectors, teacher, highest ranks, cosines."""
        state = {f"{name}.{key}": tensor for name, part in self._parts() for key, tensor in part.state_dict().items()}
        numbers = {_HIGHEST + name: rank for name, rank in self._highest_ranks.items()}
        numbers |= {f"{_RUNNING}{pair}": cosine for pair, cosine in self._running.items()}
        return state | {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the result of `state_dict`; needs the same pairs and options, and projectors from `prepare`.

        Raises:
            ValueError: If the state contains other parts than this LayerSync has.
        """
        parts = dict(self._parts())
        state_parts = dict.fromkeys(key.split(".")[0] for key in state if not key.startswith((_HIGHEST, _RUNNING)))
        if set(state_parts) != set(parts):
            raise ValueError(
                f"the state contains {' and '.join(state_parts) or 'no parts'}, this LayerSync has "
                f"{' and '.join(parts) or 'none'}; pass the same options, and call prepare() for projectors first"
            )
        for name, part in parts.items():
            part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
        self._highest_ranks = {k.removeprefix(_HIGHEST): float(v) for k, v in state.items() if k.startswith(_HIGHEST)}
        named = {f"{_RUNNING}{pair}": pair for pair in self.pairs}
        self._running = {named[key]: float(value) for key, value in state.items() if key in named}

    def _parts(self) -> list[tuple[str, nn.Module | WeightAverage]]:
        projectors = None if self.projectors is None else unwrapped(self.projectors)
        return [(name, p) for name, p in (("projectors", projectors), ("teacher", self._average)) if p is not None]

    def _recorder(
        self, module: nn.Module, reader: TokenReader, layers: Iterable[str], on_begin: Callable[[], None] | None = None
    ) -> PassRecorder:
        return PassRecorder(module, layers, keep=self._tokens, on_begin=on_begin, inner=reader.networks)

    def _factor(self, step: int | None) -> float:
        if not self.options.scheduled:
            return 1.0
        if step is None:
            raise ValueError("the weight depends on the step; pass loss(step=...)")
        return self.options.factor(step)

    def _samples_that_count(self, noise_level: Tensor | None, *, is_first: bool) -> Tensor | None:
        if noise_level is not None:
            check_noise_levels(noise_level, on_any_device=is_first)
        if not self.options.ranged:
            return None
        if noise_level is None:
            raise ValueError("only a range of noise levels is aligned; pass loss(noise_level=...)")
        low, high = self.options.noise_range
        return (noise_level >= low) & (noise_level <= high)

    def _projected(self, projectors: nn.Module | None, terms: Sequence[_Term]) -> list[Tensor]:
        if not self.options.projector_width:
            return [term.student for term in terms]
        students = [
            term.student if term.counts is None else without_padding(term.student, term.counts) for term in terms
        ]
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
        projectors = None if self.projectors is None else unwrapped(self.projectors)
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

    def _follow(self, stop: float) -> None:
        """Updates the running cosines, the same ones in all processes, and says which pairs end."""
        going_on = [pair for pair in self.pairs if not self.has_ended(pair)]
        latest = torch.stack([self.cosines[pair].float() for pair in going_on])
        counted = latest.isfinite()  # A batch without a counted token has no cosine.
        sums = torch.stack([latest.where(counted, 0.0), counted.float()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        for pair, total, count in zip(going_on, *sums.tolist(), strict=True):
            if count:
                before = self._running.get(pair, total / count)
                self._running[pair] = _MEMORY * before + (1 - _MEMORY) * total / count
            if self.has_ended(pair):
                self._say(f"{pair}: the cosine has reached {self._running[pair]:.3f} of {stop:g}; the alignment ends")

    def _take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        recorded = self._student_pass.take(
            "no forward pass with gradients was recorded; call the module inside the `with` block before loss()"
        )
        if self._num_passes > 1:
            warnings.warn(
                f"{self._num_passes} forward passes with gradients, but only the latest is aligned; call loss() after "
                "each, and evaluate under no_grad",
                stacklevel=3,
            )
        self._num_passes = 0
        outputs = self._reader.read(recorded)
        order = list(outputs)
        for pair in self.pairs:
            if order.index(pair.student) > order.index(pair.teacher):
                raise ValueError(f"student {pair.student} runs after teacher {pair.teacher}; swap them")
        if self._teacher_pass is None:
            return outputs, outputs
        taught = self._teacher_pass.take("the teacher did not run; call it inside `with sync.teaching()` before loss()")
        return outputs, self._teacher_reader.read(taught)

    def _new_pass(self) -> None:
        self._latest, self._num_passes = (), self._num_passes + 1


def _check_stop(stop: float, options: SyncOptions) -> None:
    if not 0 < stop <= 1:
        raise ValueError(f"stop_cosine must be above 0 and at most 1, got {stop!r:.40}")
    if options.projector_width:
        raise ValueError(
            "stop_cosine is about the tokens themselves, not about those behind a projector; pass only one of "
            "stop_cosine and projector_width"
        )


def _check_layers(module: nn.Module, pair: LayerPair) -> None:
    student, teacher = find_layer(module, pair.student), find_layer(module, pair.teacher)
    if student is teacher and pair.student.endswith(INPUT) == pair.teacher.endswith(INPUT):
        raise ValueError(f"{pair.student} and {pair.teacher} are the same layer, which would learn nothing from itself")


def _check_first(terms: Iterable[_Term], mask: Tensor | None) -> None:
    """Checks values, for which other devices have to be waited for."""
    if mask is not None and not bool(mask.any()):
        raise ValueError("the mask counts no token; pass True for tokens that count, False for padding")
    for term in terms:
        if name := term.not_finite():
            raise ValueError(
                f"the tokens of {name} are not finite; look for an overflow, or leave padding out with loss(mask=...)"
            )


def _check_tokens(student: Tensor, teacher: Tensor, pair: LayerPair) -> None:
    # Empty tensors and those that wrap others have no memory of their own, and the address 0.
    if student.data_ptr() == teacher.data_ptr() != 0 and student.shape == teacher.shape:
        raise ValueError(
            f"{pair.student} and {pair.teacher} return the same tensor, which learns nothing from itself; name a later "
            "teacher"
        )
    if not student.requires_grad:
        raise ValueError(
            f"{pair.student} has no gradient (frozen, or under reentrant checkpointing); "
            "train it, or checkpoint with use_reentrant=False"
        )


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the network inside DDP and torch.compile, whose names contain "module." and "_orig_mod.".

    Raises:
        ValueError: If it is not a module.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{type(module).__name__} is not a torch.nn.Module; pass the network, such as backbone.module or "
            "pipeline.transformer"
        )
    while True:
        if isinstance(module, (DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):
            module = compiled
        else:
            return module
