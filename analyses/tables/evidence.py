"""The evidence on layers and layer pairs: everything that is measured before a training and used for a selection.

Quantities of layers (probe accuracy, noise-LiDAR, loss increase when the layer is skipped, ...) and quantities of pairs
(gaps between teacher and student, CKA, recoverability gap, ...) are kept apart, each at every noise level and averaged
over the levels, each with its 95 % interval. A gap is teacher minus student. A depth is a layer's number among the
layers, counted from 1, over their number, as papers count: the last layer is at 1.

A criterion assigns such a quantity to a pair: that of its student, that of its teacher, or that of the pair itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from layerprobe.analyses.measures import Estimate, Floats
from layerprobe.analyses.tables.csv_files import read_table, write_table
from layerprobe.analyses.tables.measurements import KNN, PROBE
from layerprobe.extraction import LOSS_INCREASE, VELOCITY_CHANGE
from layerprobe.files import one_line
from layerprobe.records import damaged

NOISE_LIDAR, SPATIAL_CONTRAST, DEPTH = "noise-LiDAR", "spatial contrast", "depth"
PROBE_GAP, KNN_GAP = "probe accuracy gap", "knn accuracy gap"
LIDAR_GAP, RANK_GAP, SPATIAL_GAP = "noise-LiDAR gap", "effective rank gap", "spatial structure gap"
CKA, CKNNA, COSINE, RECOVERABILITY = "CKA", "CKNNA", "cosine", "recoverability gap"
TEACHER_PROBE, TEACHER_LIDAR = "teacher probe accuracy", "teacher noise-LiDAR"
STUDENT_CHANGE, TEACHER_CHANGE = "student velocity change", "teacher velocity change"
STUDENT_NEED, TEACHER_NEED = "student loss increase", "teacher loss increase"
STUDENT_DEPTH, TEACHER_DEPTH, DISTANCE = "student depth", "teacher depth", "distance"
CAPPED_DISTANCE, NEARNESS = "distance up to 0.4", "nearness to published depths"

# Depths of student and teacher: about where most of the published gain is, and what SRA's author advises
# (docs/published-pairs.md).
PRIOR_DEPTHS = (0.25, 0.70)
# Published pairs that are further apart than 0.4 of the depth gain no more for it.
_ENOUGH_DISTANCE = 0.4

MEAN = "mean"  # in the place of a noise level in the CSV file: the mean over all levels
COLUMNS = ("quantity", "layer", "student", "teacher", "noise_level", "value", "low", "high", "note")

_NO_ANSWER = "there is no estimate: the two differ by a constant, or the samples are too few"


@dataclass(frozen=True)
class Criterion:
    """A quantity by which a rule ranks pairs.

    Attributes:
        of: Layer whose quantity is taken: "student" or "teacher"; "pair" for a quantity of the pair, "places" for a
            quantity that the two depths determine.
        quantity: Name of the quantity.
        needs_labels: Whether labels are needed to measure it.
        smaller_is_better: Whether `equal_weights` gives it a negative weight.
    """

    of: Literal["student", "teacher", "pair", "places"]
    quantity: str
    needs_labels: bool = False
    smaller_is_better: bool = False


CRITERIA: Mapping[str, Criterion] = {
    TEACHER_PROBE: Criterion("teacher", PROBE, needs_labels=True),
    PROBE_GAP: Criterion("pair", PROBE_GAP, needs_labels=True),
    KNN_GAP: Criterion("pair", KNN_GAP, needs_labels=True),
    TEACHER_LIDAR: Criterion("teacher", NOISE_LIDAR),
    LIDAR_GAP: Criterion("pair", LIDAR_GAP),
    RANK_GAP: Criterion("pair", RANK_GAP),
    CKA: Criterion("pair", CKA, smaller_is_better=True),
    CKNNA: Criterion("pair", CKNNA, smaller_is_better=True),
    COSINE: Criterion("pair", COSINE),
    RECOVERABILITY: Criterion("pair", RECOVERABILITY),
    SPATIAL_GAP: Criterion("pair", SPATIAL_GAP),
    STUDENT_CHANGE: Criterion("student", VELOCITY_CHANGE),
    TEACHER_CHANGE: Criterion("teacher", VELOCITY_CHANGE),
    STUDENT_NEED: Criterion("student", LOSS_INCREASE),
    TEACHER_NEED: Criterion("teacher", LOSS_INCREASE),
    STUDENT_DEPTH: Criterion("student", DEPTH, smaller_is_better=True),
    TEACHER_DEPTH: Criterion("teacher", DEPTH),
    DISTANCE: Criterion("places", DISTANCE),
    CAPPED_DISTANCE: Criterion("places", CAPPED_DISTANCE),
    NEARNESS: Criterion("places", NEARNESS),
}
_BY_PLACES: Mapping[str, Callable[[Floats, Floats], Floats]] = {
    DISTANCE: lambda student, teacher: teacher - student,
    CAPPED_DISTANCE: lambda student, teacher: np.minimum(teacher - student, _ENOUGH_DISTANCE),
    NEARNESS: lambda student, teacher: -np.hypot(student - PRIOR_DEPTHS[0], teacher - PRIOR_DEPTHS[1]),
}
LABEL_QUANTITIES = (PROBE, KNN, PROBE_GAP, KNN_GAP)


class Number(NamedTuple):
    """A value with its 95 % interval; nan where the value or the interval is missing.

    Attributes:
        value: Value.
        low: Lower end of the interval.
        high: Upper end of the interval.
        note: Reason for a missing value, otherwise "".
    """

    value: float
    low: float
    high: float
    note: str = ""

    @property
    def lower_bound(self) -> float:
        """Lower end of the interval, or the value if there is no interval."""
        return self.value if math.isnan(self.low) else self.low

    @property
    def upper_bound(self) -> float:
        """Upper end of the interval, or the value if there is no interval."""
        return self.value if math.isnan(self.high) else self.high

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Both ends of the interval, (None, None) if there is no interval."""
        return (None, None) if math.isnan(self.low) or math.isnan(self.high) else (self.low, self.high)


@dataclass(frozen=True, eq=False)
class Quantity:
    """A quantity of N layers or N pairs at V noise levels, and its mean over the levels.

    Attributes:
        value: Values, shape (V, N); nan where a value is missing.
        low: Lower ends of the 95 % intervals, shape (V, N); nan where there is no interval.
        high: Upper ends of the 95 % intervals, shape (V, N).
        mean: Means over the noise levels, shape (N,); nan where a level is missing.
        mean_low: Lower ends of the intervals of the means, shape (N,).
        mean_high: Upper ends of the intervals of the means, shape (N,).
        notes: Reasons for missing values, V rows of N strings, "" where the value is there.
    """

    value: Floats
    low: Floats
    high: Floats
    mean: Floats
    mean_low: Floats
    mean_high: Floats
    notes: tuple[tuple[str, ...], ...]

    @classmethod
    def from_estimate(cls, estimate: Estimate, notes: Sequence[Sequence[str]]) -> Quantity:
        """Makes a quantity from estimates (V, N).

        All levels use the same samples, and the interval of the mean takes that into account.
        """
        mean = estimate.mean(0)
        half, mean_half = estimate.half_width, mean.half_width
        return cls(
            estimate.value,
            estimate.value - half,
            estimate.value + half,
            mean.value,
            mean.value - mean_half,
            mean.value + mean_half,
            _completed(estimate.value, notes),
        )

    @classmethod
    def from_ends(cls, value: Floats, low: Floats, high: Floats, notes: Sequence[Sequence[str]]) -> Quantity:
        """Makes a quantity from values and interval ends (V, N).

        The interval of the mean is the mean of the intervals, which is never too narrow.
        """
        return cls(value, low, high, value.mean(0), low.mean(0), high.mean(0), _completed(value, notes))

    @classmethod
    def missing(cls, num_levels: int, num: int, reason: str) -> Quantity:
        """Makes a quantity that could not be measured, with the reason as the note of every value."""
        values = np.full((num_levels, num), np.nan)
        return cls.from_ends(values, values, values, [[reason] * num] * num_levels)

    def number(self, index: int, noise_levels: Sequence[float]) -> Number:
        """Returns the mean of one layer or pair; its note names the first level at which the value is missing."""
        notes = (f"at noise level {level:g}, {row[index]}" for level, row in zip(noise_levels, self.notes, strict=True))
        missing = next((note for note, row in zip(notes, self.notes, strict=True) if row[index]), "")
        return Number(float(self.mean[index]), float(self.mean_low[index]), float(self.mean_high[index]), missing)


def _completed(value: Floats, notes: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Every missing value gets a reason, and no other value has one."""
    return tuple(
        tuple((note or _NO_ANSWER) if np.isnan(v) else "" for v, note in zip(values, row, strict=True))
        for values, row in zip(value, notes, strict=True)
    )


@dataclass(frozen=True, eq=False)
class PairEvidence:
    """Quantities of L layers, and of the P pairs of an earlier and a later layer of the same shape.

    Attributes:
        layers: Layer names in execution order.
        noise_levels: Noise levels, ascending.
        students: Positions of the students among the layers, shape (P,).
        teachers: Positions of the teachers among the layers, shape (P,).
        by_layer: Quantities of layers by name, each with L columns.
        by_pair: Quantities of pairs by name, each with P columns.
    """

    layers: tuple[str, ...]
    noise_levels: tuple[float, ...]
    students: NDArray[np.intp]
    teachers: NDArray[np.intp]
    by_layer: Mapping[str, Quantity]
    by_pair: Mapping[str, Quantity]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Names of (student, teacher), in the order of the arrays."""
        return tuple((self.layers[s], self.layers[t]) for s, t in zip(self.students, self.teachers, strict=True))

    @property
    def depths(self) -> Floats:
        """Depths of the layers, in (0, 1], shape (L,)."""
        return np.arange(1, len(self.layers) + 1) / max(len(self.layers), 1)

    def distance(self, student: str, teacher: str) -> int:
        """Returns the number of layers from the student to the teacher."""
        return self.layers.index(teacher) - self.layers.index(student)

    def has(self, criterion: str) -> bool:
        """Returns whether any pair has a value of the criterion."""
        return bool(np.isfinite(self.columns(criterion)[0]).any())

    def columns(self, criterion: str) -> tuple[Floats, Floats, Floats]:
        """Returns a criterion's means over noise levels and the ends of their intervals, three arrays of shape (P,).

        All values are nan if the evidence does not contain the criterion.
        """
        kind = CRITERIA[criterion]
        students, teachers = self.students, self.teachers
        if kind.of == "places":
            value = _BY_PLACES[criterion](self.depths[students], self.depths[teachers])
            return value, value, value
        places = {"student": students, "teacher": teachers, "pair": np.arange(len(students))}[kind.of]
        if kind.quantity == DEPTH:
            depths = self.depths[places]
            return depths, depths, depths
        quantity = (self.by_pair if kind.of == "pair" else self.by_layer).get(kind.quantity)
        if quantity is None:
            missing = np.full(len(students), np.nan)
            return missing, missing, missing
        return quantity.mean[places], quantity.mean_low[places], quantity.mean_high[places]

    def number(self, criterion: str, index: int) -> Number:
        """Returns the mean over noise levels of a criterion of one pair.

        Args:
            criterion: Name of the criterion.
            index: Position of the pair in the arrays.
        """
        kind = CRITERIA[criterion]
        if kind.of == "places" or kind.quantity == DEPTH:
            value, low, high = (float(column[index]) for column in self.columns(criterion))
            return Number(value, low, high)
        if kind.of == "pair":
            quantity = self.by_pair.get(kind.quantity)
            number = quantity and quantity.number(index, self.noise_levels)
        else:
            layer = self.layers[(self.students if kind.of == "student" else self.teachers)[index]]
            number = self.layer_number(kind.quantity, layer) if kind.quantity in self.by_layer else None
        return number or Number(math.nan, math.nan, math.nan, f"the evidence has no {criterion}")

    def layer_number(self, quantity: str, layer: str) -> Number:
        """Returns the mean over noise levels of a quantity of one layer."""
        if quantity not in self.by_layer:
            return Number(math.nan, math.nan, math.nan, f"the evidence has no {quantity}")
        number = self.by_layer[quantity].number(self.layers.index(layer), self.noise_levels)
        return number._replace(note=number.note and f"{layer}: {number.note}")

    def write_csv(self, path: str | Path) -> None:
        """Writes one row per quantity, layer or pair, and noise level or "mean", with six digits."""
        depth = Quantity(*(np.empty((0, len(self.layers))),) * 3, *(self.depths,) * 3, ())
        names = [(layer, "", "") for layer in self.layers]
        tables = [self._rows(name, names, of) for name, of in {DEPTH: depth, **self.by_layer}.items()]
        names = [("", *pair) for pair in self.pairs]
        tables += [self._rows(name, names, of) for name, of in self.by_pair.items()]
        write_table(pd.concat(tables, ignore_index=True), path, digits=6)

    def _rows(self, quantity: str, names: Sequence[tuple[str, str, str]], of: Quantity) -> pd.DataFrame:
        levels = [*map(repr, self.noise_levels[: len(of.value)]), MEAN]
        numbers = [np.vstack(parts).ravel() for parts in _stacked(of)]
        missing = (
            [number.note for number in (of.number(i, self.noise_levels) for i in range(len(names)))]
            if len(of.value)
            else [""] * len(names)
        )
        columns = {
            "quantity": quantity,
            **{
                column: [name[i] for name in names] * len(levels)
                for i, column in enumerate(("layer", "student", "teacher"))
            },
            "noise_level": np.repeat(levels, len(names)),
            **dict(zip(("value", "low", "high"), numbers, strict=True)),
            "note": [note for row in (*of.notes, missing) for note in row],
        }
        return pd.DataFrame(columns, columns=list(COLUMNS))

    @classmethod
    def read_csv(cls, path: str | Path) -> PairEvidence:
        """Reads the evidence from a file that `write_csv` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is another table, or damaged.
        """
        table = read_table(path, COLUMNS, ())
        try:
            return cls._from_table(table)
        except (KeyError, ValueError, IndexError) as error:
            raise damaged(Path(path), one_line(error), "run `layerprobe analyze` again") from error

    @classmethod
    def _from_table(cls, table: pd.DataFrame) -> PairEvidence:
        for column in ("value", "low", "high"):
            table[column] = np.array([float(text or "nan") for text in table[column]])
        layers = tuple(table["layer"][table["quantity"] == DEPTH])
        if not layers or len(set(layers)) < len(layers):
            raise ValueError("the depths of the layers are missing")
        levels = sorted({float(level) for level in table["noise_level"].unique() if level != MEAN})
        of_pairs = table[table["layer"] == ""]
        pairs = list(dict.fromkeys(zip(of_pairs["student"], of_pairs["teacher"], strict=True)))
        positions = {layer: i for i, layer in enumerate(layers)}
        ends = np.array([[positions[layer] for layer in pair] for pair in pairs], np.intp).reshape(-1, 2)
        by_layer = {
            str(name): _quantity(rows, [(layer, "", "") for layer in layers], levels)
            for name, rows in table[(table["layer"] != "") & (table["quantity"] != DEPTH)].groupby(
                "quantity", sort=False
            )
        }
        by_pair = {
            str(name): _quantity(rows, [("", *pair) for pair in pairs], levels)
            for name, rows in of_pairs.groupby("quantity", sort=False)
        }
        return cls(layers, tuple(levels), ends[:, 0], ends[:, 1], by_layer, by_pair)


def _stacked(of: Quantity) -> list[tuple[Floats, Floats]]:
    return [(of.value, of.mean), (of.low, of.mean_low), (of.high, of.mean_high)]


def _quantity(rows: pd.DataFrame, names: Sequence[tuple[str, str, str]], levels: Sequence[float]) -> Quantity:
    """One quantity from its rows; every name must be there at every level and as the mean."""
    keys = zip(rows["layer"], rows["student"], rows["teacher"], rows["noise_level"], strict=True)
    records: dict[tuple[Any, ...], Any] = {
        (*key[:3], MEAN if key[3] == MEAN else float(key[3])): row
        for key, row in zip(keys, rows.itertuples(), strict=True)
    }
    by_level = [[records[(*name, level)] for name in names] for level in levels]
    means = [records[(*name, MEAN)] for name in names]

    def numbers(column: str) -> tuple[Floats, Floats]:
        values = np.array([[getattr(row, column) for row in level] for level in by_level], np.float64)
        return values.reshape(len(levels), len(names)), np.array([getattr(row, column) for row in means], np.float64)

    (value, mean), (low, mean_low), (high, mean_high) = map(numbers, ("value", "low", "high"))
    notes = tuple(tuple(row.note for row in level) for level in by_level)
    return Quantity(value, low, high, mean, mean_low, mean_high, notes)
