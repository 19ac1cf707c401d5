"""Tables as CSV files, with every digit of a float32 and nan where a value is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from layerprobe.files import write_text


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Writes a table as CSV, whole or not at all; numbers keep all digits, nan is empty."""
    write_text(Path(path), table.to_csv(index=False))


def read_table(path: str | Path, columns: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    # Everything as text first: a layer may be called "null", and the quick float parser loses the last digit.
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}; it is no such table, run `layerprobe analyze` again")
    for column in numbers:
        table[column] = np.array([float(text or "nan") for text in table[column]])
    return table.astype({"layer_index": np.int64}) if "layer_index" in numbers else table
