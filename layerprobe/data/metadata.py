"""Columns of single files, from metadata.csv and metadata.jsonl files beside or above them.

Source: the folders of Hugging Face `datasets`, whose column `file_name` contains paths relative to the metadata file.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from layerprobe.files import one_line

NAMES = ("metadata.csv", "metadata.jsonl")
_FILE_NAME = "file_name"


def read_metadata(paths: Sequence[Path], files: Collection[Path]) -> dict[Path, dict[str, Any]]:
    """Reads the cells of metadata files, by file and column.

    Args:
        paths: Metadata files.
        files: Files that they may name.

    Raises:
        ValueError: If a metadata file is damaged, or names other files.
    """
    cells: dict[Path, dict[str, Any]] = {}
    for path in paths:
        for row in _csv_rows(path) if path.suffix == ".csv" else _json_rows(path):
            if None in row or not row.get(_FILE_NAME):
                raise ValueError(f"{path} has a row without {_FILE_NAME} or with too many cells; fix it")
            file = Path(os.path.normpath(path.parent / row.pop(_FILE_NAME)))
            if file not in files:
                raise ValueError(f"{path} names {file.name}, which does not exist; fix or remove that row")
            cells[file] = cells.get(file, {}) | row
    return cells


def _csv_rows(path: Path) -> list[dict[Any, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as text:
        rows = list(csv.DictReader(text))
    for column in {column for row in rows for column in row} - {_FILE_NAME, None}:
        # Integers are numbered by value, as in other tables, not as strings with 10 before 2.
        if all(re.fullmatch(r"0|-?[1-9]\d*", row.get(column) or "0") for row in rows):
            for row in rows:
                row[column] = int(row[column]) if row.get(column) else None
    return rows


def _json_rows(path: Path) -> Iterator[dict[Any, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        try:
            if line.strip():
                yield dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number} of {path} is not a JSON object ({one_line(error)}); fix it") from error
