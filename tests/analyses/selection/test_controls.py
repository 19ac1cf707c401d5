"""What the accuracy of a teacher is compared with, from tables with planted numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from layerprobe.analyses.selection.controls import control_accuracies, probe_cautions
from layerprobe.analyses.selection.records import Caution
from layerprobe.analyses.tables.measurements import LAST_PENALTY, PROBE, UNFINISHED
from layerprobe.analyses.tables.quality import QUALITY_COLUMNS

LEVELS = (0.1, 0.5)
LAYERS = tuple(f"blocks.{i}" for i in range(8))


def quality_table(value: float, source: str, *, split: str = "validation", layers: tuple[str, ...] = LAYERS) -> Any:
    rows: list[Any] = [
        (source, layer, i, level, PROBE, split, value + shift, value, value, "C=1")
        for i, layer in enumerate(layers)
        for level, shift in zip(LEVELS, (0.05, -0.05), strict=True)
    ]
    return pd.DataFrame(rows, columns=list(QUALITY_COLUMNS))


def test_controls_are_the_best_layer_the_input_and_the_most_frequent_class() -> None:
    quality = pd.concat(
        [
            quality_table(0.5, "model"),
            quality_table(0.3, "random weights"),
            quality_table(0.34, "random weights", layers=LAYERS[:1]).replace("blocks.0", "blocks.9"),
            quality_table(0.9, "random weights", split="test"),
            quality_table(0.55, "raw input", layers=("input",)),
        ]
    )
    labels = np.array([0, 1, 1, 2, 1, 0])
    controls = control_accuracies(quality, labels, LEVELS)
    assert controls == pytest.approx({"majority class": 0.5, "random weights": 0.34, "raw input": 0.55})
    assert control_accuracies(quality, labels, LEVELS[:1])["raw input"] == pytest.approx(0.6)
    assert control_accuracies(quality, None, LEVELS) == {}
    assert control_accuracies(quality_table(0.5, "model"), labels, LEVELS) == {"majority class": 0.5}


def test_probes_that_may_be_too_bad_are_a_caution_for_the_model_and_for_each_control() -> None:
    quality = pd.concat([quality_table(0.5, "model"), quality_table(0.3, "raw input")], ignore_index=True)
    assert probe_cautions(quality, PROBE, "validation") == []
    quality.loc[3, "note"] = f"C=1, gradient norm 1e-02; 1 of 1 fits {UNFINISHED}"
    quality.loc[[17, 18], "note"] = f"C=1e+06, gradient norm 1e-09; 1 of 1 fits {LAST_PENALTY}"
    assert probe_cautions(quality, PROBE, "validation") == [
        Caution("probes not converged", "model", value=1, limit=16),
        Caution("probes at the end of the search", "raw input", value=2, limit=16),
    ]
    assert probe_cautions(quality, PROBE, "test") == []
