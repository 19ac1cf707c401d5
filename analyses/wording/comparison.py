"""Sentences about several runs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from layerprobe.analyses.tables import BEST


def difference_sentences(differences: pd.DataFrame) -> list[str]:
    """Returns a sentence for each noise level: the best layers of two runs, and whether they differ.

    Args:
        differences: Result of `quality_differences`.
    """
    return [_difference(row) for row in differences[differences["compared"] == BEST].to_dict("records")]


def _difference(row: Mapping[Hashable, Any]) -> str:
    values = f"{row['value_a']:.3f} at {row['layer_a']} of {row['run_a']}, {row['value_b']:.3f} at {row['layer_b']} of "
    values = f"noise level {row['noise_level']:g}: {values}{row['run_b']}"
    low, high = row["low"], row["high"]
    if pd.isna(low):
        return f"{values}; the difference has no interval"
    better = row["run_b"] if low > 0 else row["run_a"] if high < 0 else None
    sign = f"{better} is higher" if better else "no difference found"
    interval = f"{row['difference']:+.3f} ({low:+.3f} to {high:+.3f}, {row['interval']} by sample)"
    return f"{values}; difference {interval}: {sign}"


def block_map_sentences(table: pd.DataFrame, *, kept_order: bool) -> list[str]:
    """Returns a sentence for each layer of the first network, and one about the order of the matches.

    Args:
        table: Result of `block_map`.
        kept_order: Whether the matches never go back.
    """
    lines = []
    for row in table.to_dict("records"):
        tie = f"; as alike within the interval: {row['as_alike']}" if row["as_alike"] else ""
        pair = f"{row['layer_a']} of {row['run_a']} is most like {row['layer_b']} of {row['run_b']}"
        lines.append(f"{pair} (CKA {row['cka']:.3f}, {row['low']:.3f} to {row['high']:.3f}){tie}")
    if not kept_order and lines:
        run = table["run_a"].iloc[0]
        lines.append(
            f"the matches of {run} do not keep the order of the layers: this map is no correspondence of depth"
        )
    return lines
