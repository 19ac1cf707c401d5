"""Layer quality as curves during any training: plain loops, Lightning, the Trainer of transformers."""

from __future__ import annotations

import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

from layerprobe.analyses.figures import layer_step_heatmaps
from layerprobe.analyses.front.model import Model, open
from layerprobe.analyses.front.objects import as_splits
from layerprobe.analyses.runs import CurvePlan, LayerCurves
from layerprobe.analyses.tables import CurveFinding
from layerprobe.backbones import Backbone
from layerprobe.capture import evaluating
from layerprobe.files import import_optional
from layerprobe.layersync import LayerPair, unwrapped
from layerprobe.training import open_trackers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Log = Callable[[int, Mapping[str, float]], Any]


class ProbeEvery:
    """Measures all layers of a network every so many steps of its training.

        with lp.ProbeEvery(net, x, y, every=1000, out="runs/curves", layers="blocks.*", schedule="flow",
                           prediction="velocity", shape=(3, 32, 32)) as probe:
            probe(0)
            for step, batch in enumerate(loader, start=1):
                ...
                optimizer.step()
                probe(step)

    The same samples are read under the same noise at every step. With labels of several classes the quality of a layer
    is the accuracy of a linear probe, otherwise noise-LiDAR. See `layerprobe.analyses.runs.LayerCurves` for the files
    and for how the cost is bounded: steps are left out so that measuring takes at most `max_share` of the time.

    Measuring changes nothing in the training: random generators, gradients, buffers and the mode of every submodule
    stay as they are. Of several processes with copies of the network (DDP) the first one measures; the others go on and
    wait for it where they next exchange gradients. The live weights are measured; pass the averaged copy of the network
    to measure that.

    Args:
        model: Network in training, `Model` or `Backbone`. A network comes with `options`, and keeps its mode.
        data: `Samples`, `Splits` or an array, as for `layerprobe.probe`.
        labels: Labels of an array.
        every: Number of steps between measurements.
        out: Folder of the table, the findings and the figure; a temporary one, removed with this object, if None.
        pairs: Layer pairs that are aligned, as (student, teacher) names.
        drift_from: Model, or path of a checkpoint, to compare each layer with; the first measured step if None.
        tracker: Function called with (step, values by name), or names of trackers as for `open_trackers`.
        noise_levels: Noise levels, ascending.
        num_samples: Number of samples; half fit the probes and half score them.
        max_share: Largest share of the time that measuring may take; 1 leaves out no step.
        seed: Seed of the noise and of the samples.
        say: Function called with a line for each finding; by default it prints to standard error.
        **options: Options of a network: layers, schedule, prediction, shape, ..., as for `layerprobe.open`.

    Raises:
        ValueError: If the data and the model do not fit, or an option is missing or out of its range.
    """

    def __init__(
        self,
        model: Model | Backbone | nn.Module,
        data: Any,
        labels: Any = None,
        *,
        every: int = 1000,
        out: str | Path | None = None,
        pairs: Iterable[LayerPair | tuple[str, str]] = (),
        drift_from: Model | Backbone | str | Path | None = None,
        tracker: Log | str | Sequence[str] | None = None,
        noise_levels: Sequence[float] = CurvePlan.noise_levels,
        num_samples: int = CurvePlan.num_samples,
        max_share: float = CurvePlan.max_share,
        seed: int = 0,
        say: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        plan = CurvePlan(every, tuple(noise_levels), num_samples, max_share, seed)
        self._backbone = _opened(model, options)
        splits = as_splits(data, labels)
        start = None if drift_from is None else drift_from
        if isinstance(start, str | Path):
            start = open(start, device=str(self._backbone.device))
        folder = Path(tempfile.mkdtemp(prefix="layerprobe-")) if out is None else Path(out)
        if out is None:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        say = say or _print
        self._close_trackers: Callable[[], None] = lambda: None
        log: Log | None = None
        if callable(tracker):
            log = tracker
        elif tracker is not None:
            names = [tracker] if isinstance(tracker, str) else list(tracker)
            trackers = open_trackers(names, folder, config={}, run_name=folder.resolve().name, warn=say)
            log, self._close_trackers = trackers, trackers.close
        self._curves = LayerCurves(
            splits,
            folder,
            plan,
            pairs=tuple(pair if isinstance(pair, LayerPair) else LayerPair(*pair) for pair in pairs),
            drift_from=start.backbone if isinstance(start, Model) else start,
            log=log,
            say=say,
        )

    @property
    def table(self) -> pd.DataFrame:
        """All measurements: step, layer, noise_level, metric, value; for qualities low and high, the 95 % interval."""
        return self._curves.table

    @property
    def findings(self) -> list[CurveFinding]:
        """What was found so far, the oldest first."""
        return list(self._curves.findings)

    @property
    def cost_s(self) -> float:
        """Seconds that measuring has taken in this process."""
        return self._curves.spent_s

    def __call__(self, step: int, *, last: bool = False) -> list[CurveFinding]:
        """Measures if the step is due; call it after every step of the optimizer, and with 0 before the first.

        Args:
            step: Number of steps done.
            last: Whether the training ends here; the last step is always measured.

        Returns:
            What this step shows and the steps before did not.

        Raises:
            ValueError: If the first measurement fails, or the weights are shards of several processes.
        """
        if _rank() or not self._curves.is_due(step, last=last):
            return []
        _check_whole(self._backbone.module)
        return self._curves.measure(step, self._backbone)

    def plot(self) -> Figure:
        """Draws layer by step: quality at each noise level, CKA with the start, effective rank, and the pairs."""
        return layer_step_heatmaps(self.table, self.findings)

    def close(self) -> None:
        """Draws the figure, tells what measuring has cost, and closes the trackers that were opened by name."""
        if not _rank():
            self._curves.close()
        self._close_trackers()

    def __enter__(self) -> ProbeEvery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def for_lightning(self) -> Any:
        """Returns a callback for the Trainer of Lightning, which measures at its optimizer steps and closes at the end.

        Raises:
            ModuleNotFoundError: If lightning is not installed.
        """
        probe = self

        class Callback(import_optional("lightning", "examples").Callback):  # type: ignore[misc]
            def on_train_start(self, trainer: Any, module: Any) -> None:
                probe(trainer.global_step)

            def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
                probe(trainer.global_step)

            def on_train_end(self, trainer: Any, module: Any) -> None:
                probe(trainer.global_step, last=True)
                probe.close()

        return Callback()

    def for_transformers(self) -> Any:
        """Returns a callback for the Trainer of transformers, which measures at its steps and closes at the end.

        Raises:
            ModuleNotFoundError: If transformers is not installed.
        """
        probe = self

        class Callback(import_optional("transformers", "diffusers").TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                probe(state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                probe(state.global_step)

            def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                probe(state.global_step, last=True)
                probe.close()

        return Callback()


def _opened(model: Model | Backbone | nn.Module, options: dict[str, Any]) -> Backbone:
    if isinstance(model, Model):
        if options:
            raise ValueError(f"a model that is open carries its {', '.join(options)}; pass them to lp.open")
        return model.backbone
    if isinstance(model, Backbone):
        return open(model, **options).backbone
    network = unwrapped(model)
    with evaluating(network):  # Opening sets the mode, which is the training's.
        return open(network, **options).backbone


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


def _check_whole(module: nn.Module) -> None:
    """Refuses sharded weights: one process alone would wait for the others for ever."""
    kinds = {type(part).__name__ for part in [*module.modules(), *module.parameters()]}
    if kinds & {"DTensor", "FullyShardedDataParallel"} or any(hasattr(p, "ds_id") for p in module.parameters()):
        raise ValueError(
            "the weights are shards of several processes, which one process cannot measure; pass a whole copy of the "
            "network, or train with layerprobe train --fsdp --probe-every, which gathers one"
        )


def _print(line: str) -> None:
    print(f"layerprobe: {line}", file=sys.stderr, flush=True)
