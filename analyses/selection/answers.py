"""Single answers that people ask of a run, each measured: numbers and codes, from the tables of a finished run.

- **features**: the layer and noise level with the highest probe accuracy.
- **training**: where training added most: the accuracy of a layer above that of the better control at the same noise
  level, the best layer with random weights or the raw input.
- **encoder**: the layer to align with an outside encoder, as REPA does: of the depths where published trainings gained
  most, the layer that knows surely least; where the own curve cannot tell, the published depth decides.
- **pruning**: the layers without which the network does as well, each alone.
- **separable**: the highest noise level at which the classes can be told apart: the best layer is surely above every
  control, and surely keeps half of the largest gain over the most frequent class.

Layers and levels are chosen on the validation split and reported on the test split. Intervals are 95 % intervals. That
of a difference adds the squares of both ends, as if the two were independent; the same samples make it too wide, not
too narrow. Without labels a label-free measure stands in for the first, and the others that need labels are None.

`layerprobe.analyses.wording` turns the records into sentences.

Source: interval of a difference, Newcombe 1998, method 10; published depths, see `published`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from layerprobe.analyses.selection.controls import MAJORITY
from layerprobe.analyses.selection.published import encoder_share
from layerprobe.analyses.selection.records import Selection
from layerprobe.analyses.tables import (
    MODEL,
    NOISE_LIDAR,
    PROBE,
    RANDOM_WEIGHTS,
    RANK,
    RAW_INPUT,
    PairEvidence,
    Quantity,
)
from layerprobe.extraction import LOSS_INCREASE, VELOCITY_CHANGE

# Objections to a run whose features mean nothing, for whatever purpose.
_MEANINGLESS = ("network does not denoise", "nothing but noise")
NEGLIGIBLE = 0.01  # change of the velocity, relative to its square, below which a layer hardly does anything
_NEAR_BEST = 0.9  # of the largest published share; published depths above it count as equally good
LevelEnd = Literal["", "lowest", "highest"]


@dataclass(frozen=True)
class Cell:
    """A layer at one noise level, or averaged over all, with a value and its 95 % interval.

    Attributes:
        layer: Name of the layer.
        noise_level: Noise level; None for the mean over all levels.
        value: Value.
        low: Lower end of the interval; None without an interval.
        high: Upper end of the interval; None without an interval.
    """

    layer: str
    noise_level: float | None
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def lower_bound(self) -> float:
        """Lower end of the interval, or the value if there is no interval."""
        return self.value if self.low is None else self.low

    @property
    def upper_bound(self) -> float:
        """Upper end of the interval, or the value if there is no interval."""
        return self.value if self.high is None else self.high


@dataclass(frozen=True)
class ControlGain:
    """A layer at one noise level beside the better control there, on the test split.

    Attributes:
        cell: Probe accuracy of the layer.
        control: Name of the control with the higher accuracy on the validation split.
        control_cell: Its accuracy.
        gain: Accuracy of the layer above that of the control.
    """

    cell: Cell
    control: str
    control_cell: Cell
    gain: Cell

    @property
    def is_certain(self) -> bool:
        """Whether the interval of the gain lies above 0."""
        return self.gain.lower_bound > 0


@dataclass(frozen=True)
class RichestFeatures:
    """The richest features.

    Attributes:
        metric: Metric by which they are judged; a label-free one stands in where there are no labels.
        best: Layer and noise level with the largest value, on the validation split.
        tied: Those that the data cannot tell from it, by falling value.
        over_control: The same layer and level on the test split beside the better control; None where it is missing.
        level_end: Whether the level is the lowest or highest measured one, so that one beyond it may be better; "" if
            it lies between others, or is 0 or 1.
    """

    metric: str
    best: Cell
    tied: tuple[Cell, ...]
    over_control: ControlGain | None
    level_end: LevelEnd = ""

    @property
    def is_label_free(self) -> bool:
        """Whether a label-free measure stands in for the probe."""
        return self.metric != PROBE


@dataclass(frozen=True)
class EncoderDepth:
    """The layer to align with an outside encoder.

    Attributes:
        layer: Name of the layer.
        depth: Its depth, in (0, 1].
        by: What decided among the depths where published trainings gained most: "curve" or "depth".
        published: Depths of this network's first and last layer where published trainings gained most.
        share: Gain of published trainings at the depth, over the best one of their study.
        metric: Metric of the own curve; "" if nothing was measured.
        quality: Quality of the layer, averaged over noise levels; None where it is missing.
        richest: The richest layer by the same metric.
        similarity: Mean CKA of the layer with outside encoders that were measured, by metric.
        one_shape: Whether all layers have one shape, as those of the published networks have.
    """

    layer: str
    depth: float
    by: Literal["curve", "depth"]
    published: tuple[float, float]
    share: float
    metric: str
    quality: Cell | None
    richest: Cell | None
    similarity: tuple[tuple[str, float], ...]
    one_shape: bool


@dataclass(frozen=True)
class Pruning:
    """Which layers the network does as well without, each alone.

    Attributes:
        spare: Layers that can be left out: at no noise level does the loss surely rise, and either it surely does not
            rise on average, or the velocity surely changes by less than `NEGLIGIBLE` at each level.
        undecided: Layers of which the data cannot say whether the loss rises.
        least_needed: The layer with the smallest rise of the loss, averaged over noise levels; None if no layer can be
            skipped.
        num_layers: Number of layers that were skipped.
    """

    spare: tuple[Cell, ...]
    undecided: tuple[Cell, ...]
    least_needed: Cell | None
    num_layers: int


@dataclass(frozen=True)
class Separable:
    """The highest noise level at which classes can be told apart.

    Attributes:
        best: Best layer at that level beside the better control, on the test split; None if no level qualifies.
        next_level: The next higher measured level, which does not qualify; None if there is none.
        levels: Lowest and highest measured level.
    """

    best: ControlGain | None
    next_level: float | None
    levels: tuple[float, float]


@dataclass(frozen=True)
class Answers:
    """The single answers of a run; None for a question that the run's measurements do not answer.

    Attributes:
        has_labels: Whether the run has probes of the class.
        features: The richest features.
        training: Where training added most over the better control.
        encoder: The layer to align with an outside encoder.
        pruning: The layers that could be pruned.
        separable: The noise level at which classes are separable.
        is_meaningless: Whether the features of the run mean nothing; then all answers are None.
    """

    has_labels: bool
    features: RichestFeatures | None = None
    training: ControlGain | None = None
    encoder: EncoderDepth | None = None
    pruning: Pruning | None = None
    separable: Separable | None = None
    is_meaningless: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as JSON values."""
        return asdict(self)


def single_answers(
    quality: pd.DataFrame, evidence: PairEvidence | None = None, selection: Selection | None = None
) -> Answers:
    """Answers the single questions from the tables of a run.

    Args:
        quality: Quality table of the run.
        evidence: Evidence of the run; without it no label-free measure can stand in for the probe.
        selection: Selection of the run: its controls, and whether the run's features mean anything. If it used no
            labels, the answers use none either.
    """
    has_labels = not (selection and selection.label_free) and PROBE in set(quality["metric"])
    if selection and any(objection.code in _MEANINGLESS for objection in selection.refusal[1]):
        return Answers(has_labels, is_meaningless=True)
    probes = _Probes(quality) if has_labels else None
    majority = dict(selection.basis.controls).get(MAJORITY) if selection else None
    metric, cells = _curve(probes, evidence, selection)
    return Answers(
        has_labels=has_labels,
        features=_features(metric, cells, probes),
        training=None if probes is None else _training(probes),
        encoder=_encoder(quality, evidence, metric, cells),
        pruning=_pruning(quality),
        separable=None if probes is None else _separable(probes, majority or 0.0),
    )


# ---------------------------------------------------------------------------------------------------------- the tables


class _Probes:
    """Probe accuracies of a run."""

    def __init__(self, quality: pd.DataFrame) -> None:
        rows = quality[quality["metric"] == PROBE].dropna(subset="value")
        self._cells = {
            (str(source), str(split)): {(cell.layer, cell.noise_level): cell for cell in _cells(of)}
            for (source, split), of in rows.groupby(["source", "split"], sort=False)
        }

    @property
    def chosen_on(self) -> list[Cell]:
        """Accuracies of the model on the validation split."""
        return list(self._cells.get((MODEL, "validation"), {}).values())

    def above_control(self, cell: Cell, split: str) -> ControlGain | None:
        """A layer at a level beside the better control there, which the validation split chooses; None without one."""
        controls = [
            (control, source)
            for source in (RANDOM_WEIGHTS, RAW_INPUT)
            for (_, level), control in self._cells.get((source, "validation"), {}).items()
            if level == cell.noise_level
        ]
        if not controls:
            return None
        chosen, source = max(controls, key=lambda control: control[0].value)
        own = self._cells.get((MODEL, split), {}).get((cell.layer, cell.noise_level))
        control = self._cells.get((source, split), {}).get((chosen.layer, chosen.noise_level))
        if own is None or control is None:
            return None
        return ControlGain(own, source, control, _difference(own, control))


def _cells(rows: pd.DataFrame) -> list[Cell]:
    records: list[Any] = list(rows.itertuples())
    return [
        Cell(str(row.layer), float(row.noise_level), float(row.value), _end(row.low), _end(row.high)) for row in records
    ]


def _end(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _curve(
    probes: _Probes | None, evidence: PairEvidence | None, selection: Selection | None
) -> tuple[str, list[Cell]]:
    """The metric that tells how much a layer knows, and its value for every layer and level."""
    if probes is not None:
        return PROBE, probes.chosen_on
    for metric in (selection.basis.metric,) if selection else (RANK, NOISE_LIDAR):
        if evidence is not None and metric in evidence.by_layer:
            return metric, _quantity_cells(evidence, evidence.by_layer[metric])
    return "", []


def _quantity_cells(evidence: PairEvidence, quantity: Quantity) -> list[Cell]:
    ends = (quantity.value, quantity.low, quantity.high)
    cells = []
    for v, level in enumerate(evidence.noise_levels):
        for i, layer in enumerate(evidence.layers):
            value, low, high = (float(of[v, i]) for of in ends)
            cells.append(Cell(layer, level, value, _end(low), _end(high)))
    return [cell for cell in cells if not math.isnan(cell.value)]


def _means(cells: Iterable[Cell]) -> list[Cell]:
    """Means over noise levels of the layers that have all levels; mean ends, which are never too narrow."""
    cells = list(cells)
    levels = {cell.noise_level for cell in cells}
    by_layer: dict[str, list[Cell]] = {}
    for cell in cells:
        by_layer.setdefault(cell.layer, []).append(cell)
    return [
        Cell(
            layer,
            None,
            float(np.mean([cell.value for cell in of_layer])),
            float(np.mean([cell.lower_bound for cell in of_layer])),
            float(np.mean([cell.upper_bound for cell in of_layer])),
        )
        for layer, of_layer in by_layer.items()
        if {cell.noise_level for cell in of_layer} == levels
    ]


def _difference(cell: Cell, other: Cell) -> Cell:
    """The value of a cell above that of another one."""
    value = cell.value - other.value
    below = math.hypot(cell.value - cell.lower_bound, other.upper_bound - other.value)
    above = math.hypot(cell.upper_bound - cell.value, other.value - other.lower_bound)
    return Cell(cell.layer, cell.noise_level, value, value - below, value + above)


# --------------------------------------------------------------------------------------------------------- the answers


def _features(metric: str, cells: Sequence[Cell], probes: _Probes | None) -> RichestFeatures | None:
    if not cells:
        return None
    best, *others = sorted(cells, key=lambda cell: -cell.value)
    return RichestFeatures(
        metric,
        best,
        tuple(cell for cell in others if cell.value >= best.lower_bound),
        None if probes is None else probes.above_control(best, "test"),
        _level_end(best, cells),
    )


def _level_end(best: Cell, cells: Sequence[Cell]) -> LevelEnd:
    levels = sorted({cell.noise_level for cell in cells if cell.noise_level is not None})
    if len(levels) < 2:
        return ""
    if best.noise_level == levels[0] > 0:
        return "lowest"
    return "highest" if best.noise_level == levels[-1] < 1 else ""


def _training(probes: _Probes) -> ControlGain | None:
    gains = [gain for cell in probes.chosen_on if (gain := probes.above_control(cell, "validation"))]
    chosen = max(gains, key=lambda gain: gain.gain.value, default=None)
    return chosen and probes.above_control(chosen.cell, "test")


def _encoder(
    quality: pd.DataFrame, evidence: PairEvidence | None, metric: str, cells: Sequence[Cell]
) -> EncoderDepth | None:
    model = quality[quality["source"] == MODEL].sort_values("layer_index", kind="stable")
    layers = evidence.layers if evidence is not None else tuple(dict.fromkeys(model["layer"]))
    depths = {layer: (place + 1) / len(layers) for place, layer in enumerate(layers)}
    shares = {layer: share for layer, depth in depths.items() if (share := encoder_share(depth)) is not None}
    if len(layers) < 2 or not shares:
        return None
    good = [layer for layer, share in shares.items() if share >= _NEAR_BEST * max(shares.values())]
    means = {cell.layer: cell for cell in _means(cells)}
    known = [means[layer] for layer in good if layer in means]
    least = min(known, key=lambda cell: cell.value) if known else None
    # The own curve decides only if the layers can be compared, and one knows surely less than each other one.
    one_shape = evidence is None or 2 * len(evidence.pairs) == len(layers) * (len(layers) - 1)
    decides = (
        one_shape
        and least is not None
        and len(known) == len(good) > 1
        and all(cell is least or _difference(cell, least).lower_bound > 0 for cell in known)
    )
    layer = least.layer if decides and least is not None else max(good, key=lambda name: shares[name])
    rows = model[model["metric"].str.startswith("CKA with ") & (model["layer"] == layer)].dropna(subset="value")
    return EncoderDepth(
        layer=layer,
        depth=depths[layer],
        by="curve" if decides else "depth",
        published=(depths[good[0]], depths[good[-1]]),
        share=shares[layer],
        metric=metric if means else "",
        quality=means.get(layer),
        richest=max(means.values(), key=lambda cell: cell.value) if means else None,
        similarity=tuple((str(name), float(of["value"].mean())) for name, of in rows.groupby("metric", sort=False)),
        one_shape=one_shape,
    )


def _pruning(quality: pd.DataFrame) -> Pruning | None:
    rows = quality[(quality["source"] == MODEL) & (quality["split"] == "validation")].dropna(subset="value")
    rises = _cells(rows[rows["metric"] == LOSS_INCREASE])
    if not rises:
        return None
    changes = _cells(rows[rows["metric"] == VELOCITY_CHANGE])
    means = sorted(_means(rises), key=lambda cell: cell.value)
    needed = {cell.layer for cell in rises if cell.lower_bound > 0} | {c.layer for c in means if c.lower_bound > 0}
    changing = {cell.layer for cell in changes if cell.upper_bound > NEGLIGIBLE}
    idle = {cell.layer for cell in changes} - changing
    spare = tuple(c for c in means if c.layer not in needed and (c.upper_bound <= 0 or c.layer in idle))
    undecided = tuple(c for c in means if c.layer not in needed and c not in spare)
    return Pruning(spare, undecided, means[0] if means else None, len(means))


def _separable(probes: _Probes, majority: float) -> Separable | None:
    best: dict[float, Cell] = {}
    for cell in sorted(probes.chosen_on, key=lambda cell: cell.value):
        best[_level(cell)] = cell
    if not best:
        return None
    half = (max(cell.value for cell in best.values()) - majority) / 2

    def qualifies(cell: Cell) -> bool:
        gain = probes.above_control(cell, "validation")
        return gain is not None and gain.is_certain and cell.lower_bound - majority >= half > 0

    levels = sorted(best)
    highest = max((level for level in levels if qualifies(best[level])), default=None)
    found = None if highest is None else probes.above_control(best[highest], "test")
    beyond = min((level for level in levels if highest is not None and level > highest), default=None)
    return Separable(found, beyond, (levels[0], levels[-1]))


def _level(cell: Cell) -> float:
    assert cell.noise_level is not None
    return cell.noise_level
