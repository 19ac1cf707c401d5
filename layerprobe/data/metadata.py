"""Columns of single files, from metadata.csv and metadata.jsonl files beside or above them.

Source: the folders of Hugging Face `datasets`, whose column `file_name` contains paths relative to the metadata file.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from layerprobe.data.contents import read_text
from layerprobe.files import one_line

NAMES = ("metadata.csv", "metadata.jsonl")
_FILE_NAME = "file_name"
_INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")  # longer ones are names, and do not fit into 64 bits


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
            if None in row or not isinstance(row.get(_FILE_NAME), str) or not row[_FILE_NAME]:
                raise ValueError(f"{path} has a row without {_FILE_NAME} or with too many cells; fix it")
            file = Path(os.path.normpath(path.parent / row.pop(_FILE_NAME)))
            if file not in files:
                raise ValueError(f"{path} names {file.name}, which does not exist; fix or remove that row")
            before = cells.setdefault(file, {})
            twice = next((column for column in row if column in before and before[column] != row[column]), None)
            if twice is not None:
                raise ValueError(f"{path} tells {twice} of {file.name} twice, with different values; keep one row")
            before.update(row)
    return cells


def _csv_rows(path: Path) -> list[dict[Any, Any]]:
    text = read_text(path, encoding="utf-8-sig")
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path} is not a table of commas and quotes ({one_line(error)}, a cell has at most "
            f"{csv.field_size_limit()} characters); fix it"
        ) from error
    for column in {column for row in rows for column in row} - {_FILE_NAME, None}:
        # Integers are numbered by value, as in other tables, not as strings with 10 before 2.
        if all(_INTEGER.fullmatch(row.get(column) or "0") for row in rows):
            for row in rows:
                row[column] = int(row[column]) if row.get(column) else None
    return rows


def _json_rows(path: Path) -> Iterator[dict[Any, Any]]:
    for number, line in enumerate(read_text(path, encoding="utf-8-sig").splitlines(), 1):
        try:
            if line.strip():
                yield dict(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} is not a JSON object ({one_line(error)}); fix it") from error
