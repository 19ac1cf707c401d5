"""A confirmation that was trained beforehand and is shown where none has been trained yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from layerprobe.analyses.experiments.confirmation import read_curves
from layerprobe.analyses.experiments.verdict import Verdict
from layerprobe.memory import pass_on
from layerprobe.records import read_record, typed

_REMEDY = "delete the folder and repeat `layerprobe quickstart`"


@dataclass(frozen=True)
class RecordedTrial:
    """Curves and verdict of a confirmation that was trained elsewhere, with what made them.

    Attributes:
        curves: Scores of the arms, with `CONFIRMATION_COLUMNS`.
        verdict: Verdict on these curves.
        commands: Commands that train it again, in order.
    """

    curves: pd.DataFrame
    verdict: Verdict
    commands: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> RecordedTrial:
        """Reads `confirmation.csv`, `verdict.json` and `recorded.json` of a folder.

        Raises:
            ValueError: If a file is missing or does not have the content that its name promises.
        """
        try:
            curves = read_curves(folder / "confirmation.csv")
            verdict = read_record(folder / "verdict.json", Verdict.from_dict, remedy=_REMEDY)
            commands = read_record(folder / "recorded.json", typed(dict[str, list[str]]), remedy=_REMEDY)["commands"]
        except (OSError, KeyError) as error:
            pass_on(error)
            raise ValueError(f"{folder} holds no whole recorded trial ({error}); {_REMEDY}") from error
        return cls(curves, verdict, tuple(commands))
