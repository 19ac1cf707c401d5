"""Tables as CSV files, with every digit of a float32 and nan where a value is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from layerprobe.files import write_text


def write_table(table: pd.DataFrame, path: str | Path, *, digits: int | None = None) -> None:
    """Writes a table as CSV, whole or not at all; nan is empty.

    Args:
        table: Table to write.
        path: Path of the file.
        digits: Number of significant digits; all digits if None.
    """
    write_text(Path(path), table.to_csv(index=False, float_format=None if digits is None else f"%.{digits}g"))


def read_table(path: str | Path, columns: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    """Reads a table from a CSV file; an empty number is nan.

    Args:
        path: Path of the file.
        columns: Names of the columns that the table must have.
        numbers: Names of the columns that hold numbers; all other columns stay text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column is missing.
    """
    # Everything as text first: a layer may be called "null", and the quick float parser loses the last digit.
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}, so it is another table; run `layerprobe analyze` again")
    for column in numbers:
        table[column] = np.array([float(text or "nan") for text in table[column]])
    return table.astype({"layer_index": np.int64}) if "layer_index" in numbers else table
