"""Layer quality as curves over a training: the measurements, their files, their cost.

A folder gets `layer_curves.csv` (`CURVE_COLUMNS`), `layer_findings.jsonl`, the figure `layer_curves.png` and `.svg`,
and `layer_start/`, the features that later steps are compared with. Measuring changes nothing in the training: the
network keeps the mode of each submodule, its gradients and buffers; the generators of torch keep their state.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from layerprobe.analyses.tables import (
    CURVE_COLUMNS,
    CurveFinding,
    StepQuality,
    curve_findings,
    measure_step,
    read_table,
    write_table,
)
from layerprobe.analyses.wording import curve_finding_text
from layerprobe.backbones import Backbone
from layerprobe.checkpoints import weights_hash
from layerprobe.data import Samples, Splits, Subset
from layerprobe.extraction import ExtractionPlan, FeatureStore, extract, extract_tokens
from layerprobe.files import write_text
from layerprobe.layersync import LayerPair
from layerprobe.noise import RandomStream

LEAST_SAMPLES = 12  # of each half
CURVES, FINDINGS, FIGURE, START = "layer_curves.csv", "layer_findings.jsonl", "layer_curves", "layer_start"

Say = Callable[[str], None]
Log = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class CurvePlan:
    """When and how the layers are measured during a training.

    Attributes:
        every: Number of steps between measurements.
        noise_levels: Noise levels to measure at, ascending.
        num_samples: Number of samples; half fit the probes and half score them.
        max_share: Largest share of the time that measuring may take; further steps are left out. 1 leaves out none.
        seed: Seed of the noise.

    Raises:
        ValueError: If a number is out of its range.
    """

    every: int = 1000
    noise_levels: tuple[float, ...] = (0.1, 0.3)
    num_samples: int = 512
    max_share: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_levels", tuple(self.noise_levels))
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share must be above 0 and at most 1, got {self.max_share}")
        if self.num_samples < 2 * LEAST_SAMPLES:
            raise ValueError(
                f"{self.num_samples} samples are too few to measure layers; pass num_samples of {2 * LEAST_SAMPLES} or "
                "more"
            )


class LayerCurves:
    """Measures the layers of a network at steps of its training, as often as the bound on the time allows.

    Call `measure` where `is_due`. The first and the last step are always measured. In between, a due step is left out
    as long as measuring it and the last step would take more than `plan.max_share` of the time since this object was
    made.

    Args:
        splits: Data: probes are fitted on samples of the training split, and scored on the validation split.
        folder: Folder of the files; an interrupted training continues its curves in the same folder.
        plan: Steps, noise levels, samples and bound.
        pairs: Layer pairs that are aligned.
        drift_from: Model to compare each layer with; the model of the first call if None.
        log: Called with (step, values by name), such as `Trackers`.
        say: Called with a line: findings, the first step left out, a failed measurement, the cost at the end.
        clock: Function that returns the time in seconds.

    Attributes:
        findings: What was found so far, the oldest first.
        spent_s: Seconds that measuring took in this process.
        num_measured: Number of steps measured in this process.
    """

    def __init__(
        self,
        splits: Splits,
        folder: str | Path,
        plan: CurvePlan,
        *,
        pairs: Sequence[LayerPair] = (),
        drift_from: Backbone | None = None,
        log: Log | None = None,
        say: Say,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.folder, self.plan, self.pairs = Path(folder), plan, tuple(pairs)
        half = plan.num_samples // 2
        train, held_out = _some(splits.train, half, plan.seed), _some(splits.validation, half, plan.seed)
        if min(len(train), len(held_out)) < LEAST_SAMPLES:
            raise ValueError(
                f"{len(train)} training and {len(held_out)} validation samples are too few to measure layers; "
                f"pass {LEAST_SAMPLES} or more of each"
            )
        self._splits = Splits(train, held_out, Subset(held_out, [], name="none"))
        self._drift_from, self._log, self._say, self._clock = drift_from, log, say, clock
        self._began, self.spent_s, self._last_s, self.num_measured, self._num_left_out = clock(), 0.0, 0.0, 0, 0
        self._called: int | None = None  # step of the latest call
        self._measured: int | None = None
        rows = _lines(self.folder / FINDINGS)
        self.findings = [CurveFinding.from_dict(row) for row in rows]
        self._start: FeatureStore | None = None

    @property
    def table(self) -> pd.DataFrame:
        """All measurements so far, with `CURVE_COLUMNS`."""
        path = self.folder / CURVES
        if not path.is_file():
            return pd.DataFrame(columns=list(CURVE_COLUMNS))
        numbers = [name for name in CURVE_COLUMNS if name not in ("layer", "metric")]
        return read_table(path, CURVE_COLUMNS, numbers).astype({"step": int})

    def is_due(self, step: int, *, last: bool = False) -> bool:
        """Whether to measure at this step; a due step that does not fit the bound is counted, and the first one told.

        Args:
            step: Number of steps done; a multiple of `plan.every` may be passed over, as the next call is due then.
            last: Whether this is the last step of the training.
        """
        before, self._called = self._called, step
        if before is None:
            return True
        if last:
            return step != self._measured
        if step // self.plan.every == before // self.plan.every:
            return False
        elapsed = self._clock() - self._began
        # Of the second one: the last step is measured too.
        if self.plan.max_share == 1 or self.spent_s + 2 * self._last_s <= self.plan.max_share * elapsed:
            return True
        if not self._num_left_out:
            self._say(
                f"layers are not measured at step {step}: at {self._last_s:.1f} s for each measurement it would be "
                f"more than {self.plan.max_share:.0%} of the time so far; later steps are measured as far as they fit"
            )
        self._num_left_out += 1
        return False

    def measure(self, step: int, backbone: Backbone) -> list[CurveFinding]:
        """Measures the layers, writes the files, and returns what is new.

        Args:
            step: Number of steps done.
            backbone: The network at this step.

        Raises:
            ValueError: If the first measurement fails, because the data or the layers do not fit. Later failures, such
                as weights that are not finite, are told, and the training goes on.
        """
        began = self._clock()
        found: list[CurveFinding] = []
        try:
            found = self._measured_at(step, backbone)
        except ValueError as error:
            if not self.num_measured:
                raise
            self._say(f"the layers could not be measured at step {step}: {error}")
        self._last_s, self._measured = self._clock() - began, step
        self.spent_s += self._last_s
        self.num_measured += 1
        return found

    def close(self) -> None:
        """Draws the figure, and tells what measuring has cost."""
        from layerprobe.analyses.figures import layer_step_heatmaps, save_figure

        table = self.table
        if table.empty or not self.num_measured:
            return
        save_figure(layer_step_heatmaps(table, self.findings), self.folder, FIGURE)
        elapsed = max(self._clock() - self._began, 1e-9)
        left_out = f", {self._num_left_out} left out for their cost" if self._num_left_out else ""
        self._say(
            f"layers measured at {self.num_measured} steps{left_out}: {self.spent_s:.1f} s, "
            f"{self.spent_s / elapsed:.1%} of the time"
        )

    def _measured_at(self, step: int, backbone: Backbone) -> list[CurveFinding]:
        with unnoticed(backbone.module), tempfile.TemporaryDirectory() as folder:
            store = self._extract(backbone, Path(folder) / "layers", draws=self._draws)
            tokens = None
            if self.pairs:
                aligned = dict.fromkeys(layer for pair in self.pairs for layer in (pair.student, pair.teacher))
                levels, seed = self.plan.noise_levels, self.plan.seed
                tokens = extract_tokens(
                    backbone, self._splits, tuple(aligned), levels, Path(folder) / "tokens", seed=seed
                )
            pairs = [(pair.student, pair.teacher) for pair in self.pairs]
            quality = measure_step(store, self._reference(step, backbone), pairs, tokens)
        # An interrupted training repeats the steps after its checkpoint.
        table = self.table
        table = table[table["step"] < step]
        earlier = [finding for finding in self.findings if finding.step < step]
        found = curve_findings(step, quality, table, earlier)
        self.findings = [*earlier, *found]
        rows = pd.DataFrame(quality.rows(step))
        write_table(pd.concat([table, rows]) if len(table) else rows, self.folder / CURVES, digits=6)
        write_text(self.folder / FINDINGS, "".join(json.dumps(asdict(finding)) + "\n" for finding in self.findings))
        if self._log:
            self._log(step, tracked_values(quality))
        for finding in found:
            self._say(f"step {step}: {curve_finding_text(finding, quality.metric)}")
        return found

    @property
    def _draws(self) -> int:
        labels = self._splits.train.labels
        return 1 if labels is not None and len(set(labels.tolist())) > 1 else 2  # noise-LiDAR compares draws

    def _extract(self, backbone: Backbone, folder: Path, *, draws: int) -> FeatureStore:
        aligned = (layer for pair in self.pairs for layer in (pair.student, pair.teacher))
        layers = tuple(dict.fromkeys([*backbone.layers, *aligned]))
        plan = ExtractionPlan(layers, self.plan.noise_levels, draws=draws, seed=self.plan.seed)
        return extract(backbone, self._splits, plan, folder)

    def _reference(self, step: int, backbone: Backbone) -> FeatureStore:
        """The features of the start, which are extracted at the first measurement."""
        if self._start is None:
            folder = self.folder / START
            if not folder.is_dir():
                partial = self.folder / f"{START}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                start = self._drift_from or backbone
                with unnoticed(start.module):
                    self._extract(start, partial, draws=1)
                partial.rename(folder)
                if step and self._drift_from is None:
                    self._say(f"later steps are compared with step {step}, the first one that is measured")
            self._start = FeatureStore.open(folder)
            if self._drift_from and self._start.manifest["model_hash"] != weights_hash(self._drift_from.module):
                raise ValueError(
                    f"the curves in {self.folder} compare with other weights than these; compare with the same ones, "
                    "or measure into another folder"
                )
            self._drift_from = None  # Its memory is the training's.
        return self._start


@contextmanager
def unnoticed(module: nn.Module) -> Iterator[None]:
    """Keeps the generators of torch, the caller's autocast and gradient mode and compiled graphs out of the block.

    All are as before afterwards. Graphs that were compiled without hooks would run without them.

    Args:
        module: Network that runs in the block; extraction keeps the mode of its submodules itself.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    compiled = [(part, graph) for part in module.modules() if (graph := part._compiled_call_impl) is not None]
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
        torch.no_grad(),
    ):
        try:
            for part, _ in compiled:
                part._compiled_call_impl = None
            yield
        finally:
            for part, graph in compiled:
                part._compiled_call_impl = graph


def tracked_values(quality: StepQuality) -> dict[str, float]:
    """Returns the finite numbers of a step by name, such as "probe accuracy/blocks.3 at 0.1"."""
    return {
        f"{row['metric']}/{row['layer']} at {row['noise_level']:g}": row["value"]
        for row in quality.rows(0)
        if math.isfinite(row["value"])
    }


def _some(samples: Samples, count: int, seed: int) -> Samples:
    # The first samples of a data set may be of one class.
    return Subset(samples, RandomStream(seed, "order").permutation(len(samples))[:count], name="layer curves")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
