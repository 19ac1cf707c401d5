"""What a kind of data is: how it is loaded, and how it is recognized.

A new kind is a file of its own with a `DataKind` in it, and one line in `loading.KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe.data import tables
from layerprobe.data.listing import list_files
from layerprobe.data.samples import Samples

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class DataKind:
    """A kind of data.

    Attributes:
        load: Loads a source as samples by part; its keyword arguments are the options of this kind.
        suffixes: Endings of its files.
        telling: Endings that a folder of this kind is recognized by; empty if any other folder may be of this kind.
        holds: Tests from a column's name and type whether it is of this kind; None if any other column may be.
    """

    load: Callable[..., dict[str, Samples]]
    suffixes: tuple[str, ...]
    telling: tuple[str, ...] = ()
    holds: Callable[[str, Any], bool] | None = None

    def read(
        self, source: str | Path, *, split: str | None = None, data_root: str | Path | None = None
    ) -> dict[str, Dataset]:
        """Returns the rows of a data set by part, as the loader reads them.

        Raises:
            ValueError: If they cannot be read.
        """
        return tables.read(list_files(source, self.suffixes, data_root=data_root), split=split)
