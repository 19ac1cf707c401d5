"""The scores of all layer pairs of a run as a table that a notebook shows."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd

from layerprobe.analyses.selection import Selection

_SHOWN = 9  # rows and columns in a notebook, below the line of names


@dataclass(frozen=True, eq=False)
class PairMatrix:
    """Scores of the admissible pairs, students x teachers.

    Attributes:
        scores: Score of each pair, students as rows and teachers as columns, in execution order; nan where a pair is
            refused.
    """

    scores: pd.DataFrame

    @classmethod
    def of(cls, selection: Selection) -> PairMatrix:
        """Returns the matrix of a selection."""
        layers = list(selection.basis.layers)
        scores = pd.DataFrame(np.nan, index=layers, columns=layers, dtype=np.float64)
        for pair in selection.ranked:
            scores.loc[pair.student, pair.teacher] = pair.score
        return cls(scores.dropna(axis=0, how="all").dropna(axis=1, how="all"))

    def __repr__(self) -> str:
        students, teachers = self.scores.shape
        kept = self._kept()
        text = kept.to_string(na_rep="-", float_format="{:.2f}".format, max_cols=6) if len(kept) else "no pair"
        return f"PairMatrix of {students} students x {teachers} teachers\n{text}"

    def _repr_html_(self) -> str:
        kept = self._kept()
        if kept.empty:
            return "<b>no admissible pair</b>"
        values = kept.to_numpy()
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        head = "".join(f"<th>{escape(teacher)}</th>" for teacher in kept.columns)
        rows = "".join(
            f"<tr><th>{escape(student)}</th>{''.join(_cell(score, low, high) for score in row)}</tr>"
            for student, row in zip(kept.index, values, strict=True)
        )
        hidden = self.scores.size - kept.size
        more = f"; the {_SHOWN} best students and teachers are shown, all are in .scores" if hidden else ""
        note = f"<p>Score of student (row) and teacher (column); – is refused{more}.</p>"
        return f"<table><tr><th></th>{head}</tr>{rows}</table>{note}"

    def _kept(self) -> pd.DataFrame:
        """The students and the teachers with the best pairs, in execution order."""
        students = self.scores.max(axis=1).nlargest(_SHOWN).index
        teachers = self.scores.max(axis=0).nlargest(_SHOWN).index
        return self.scores.loc[self.scores.index.isin(students), self.scores.columns.isin(teachers)]


def _cell(score: float, low: float, high: float) -> str:
    if np.isnan(score):
        return "<td>–</td>"
    share = (score - low) / (high - low) if high > low else 1.0
    return f'<td style="background: rgba(31, 119, 180, {0.6 * share:.2f})">{score:.2f}</td>'
