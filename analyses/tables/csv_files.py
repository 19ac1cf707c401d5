"""Tables as CSV files, with every digit of a float32 and nan where a value is missing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from layerprobe.checksums import write_recorded_text
from layerprobe.files import one_line
from layerprobe.records import damaged, read_bounded

MAX_BYTES = 2**30
_WHOLE = frozenset({"layer_index", "seed", "step"})


def write_table(table: pd.DataFrame, path: str | Path, *, digits: int | None = None) -> None:
    """Writes a table as CSV, whole or not at all; nan is empty.

    Args:
        table: Table to write.
        path: Path of the file.
        digits: Number of significant digits; all digits if None.
    """
    write_recorded_text(Path(path), table.to_csv(index=False, float_format=None if digits is None else f"%.{digits}g"))


def read_table(
    path: str | Path,
    columns: Sequence[str],
    numbers: Sequence[str] | None,
    *,
    remedy: str = "run `layerprobe analyze` again",
) -> pd.DataFrame:
    """Reads a table from a CSV file; an empty number is nan.

    Args:
        path: Path of the file.
        columns: Names of the columns that the table must have.
        numbers: Names of the columns that hold numbers, all if None; other columns stay text.
        remedy: What to do about a damaged table.

    Raises:
        FileNotFoundError: If there is no such file.
        Damaged: If the file is damaged or another table: it ends within a row, or a column or number is missing.
    """
    path = Path(path)
    text = read_bounded(path, remedy=remedy, max_bytes=MAX_BYTES)
    try:
        # Everything as text first: a layer may be called "null", and the quick float parser loses the last digit.
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        if missing := [column for column in columns if column not in table.columns]:
            raise ValueError(f"it has no column {missing[0]}")
        if not text.endswith("\n") or table.isna().to_numpy().any() or not isinstance(table.index, pd.RangeIndex):
            raise ValueError("rows are cut off")
        found = list(table.columns) if numbers is None else numbers
        whole = _WHOLE.intersection(found)
        for column in found:
            table[column] = np.array([float(text or "nan") for text in table[column]])
        for column in whole:
            if not (table[column] == table[column].round()).all() or table[column].abs().max() > 2**53:
                raise ValueError(f"{column} is no whole number")
        if "noise_level" in found and not table["noise_level"].dropna().between(0, 1).all():
            raise ValueError("a noise level is not between 0 and 1")
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise damaged(path, one_line(error), remedy) from error
    return table.astype(dict.fromkeys(whole, np.int64))
