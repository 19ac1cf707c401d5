"""A confirmation that was trained beforehand and is shown where none has been trained yet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from layerprobe.analyses.experiments.verdict import Verdict


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
            curves = pd.read_csv(folder / "confirmation.csv")
            verdict = Verdict.from_json((folder / "verdict.json").read_text(encoding="utf-8"))
            commands = json.loads((folder / "recorded.json").read_text(encoding="utf-8"))["commands"]
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{folder} holds no whole recorded trial ({error}); delete it") from error
        return cls(curves, verdict, tuple(commands))
