"""Records of a run in lines for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from planted_evidence import of_pairs, planted_evidence, quantity

from layerprobe.analyses.runs.text import describe_decisions, describe_labels
from layerprobe.analyses.selection.while_training import decide
from layerprobe.analyses.tables import evidence as e
from layerprobe.analyses.tables.csv_files import write_table
from layerprobe.analyses.tables.measurements import LAST_PENALTY, PROBE, UNFINISHED, probe_of
from layerprobe.analyses.tables.quality import QUALITY_COLUMNS


def test_the_decisions_of_a_training_are_told_step_by_step(tmp_path: Path) -> None:
    assert describe_decisions(tmp_path) == []
    by_pair = {
        e.LIDAR_GAP: quantity([of_pairs(lambda s, t: 0.1 * (t - s))]),
        e.CKA: quantity([of_pairs(lambda s, t: 1 - 0.1 * (t - s))]),
    }
    record = decide(planted_evidence({e.NOISE_LIDAR: quantity([[1.0 + i for i in range(8)]])}, by_pair)).record
    nothing = decide(planted_evidence({}, {}, layers=("a", "b"), pairs=())).record
    rows = [{"step": 5, "pairs": [], "record": nothing}, {"step": 10, "pairs": [["x", "y"]], "record": record}]
    (tmp_path / "decisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = describe_decisions(tmp_path)
    assert (
        first == "step 5: No pair yet. No pair is admissible. Closest to it is a <- b: the evidence has no such pair."
    )
    assert second.startswith(
        "step 10: blocks.1 <- blocks.6 is picked. The teacher blocks.6 is the best layer that may teach: noise-"
    )


def test_probes_of_a_column_that_may_be_too_bad_are_told_with_it(tmp_path: Path) -> None:
    signs = {"model": f"; 1 of 1 fits {LAST_PENALTY}", "random weights": "", "raw input": f"; 1 of 1 fits {UNFINISHED}"}
    rows: list[Any] = [
        (source, "blocks.0", 0, 0.1, metric, split, 0.5, 0.4, 0.6, f"C=1{sign}")
        for source, sign in signs.items()
        for metric in (PROBE, probe_of("style"))
        for split in ("validation", "test")
    ]
    write_table(pd.DataFrame(rows, columns=list(QUALITY_COLUMNS)), tmp_path / "quality.csv")
    assert [line for line in describe_labels(tmp_path) if line.startswith("caution")] == [
        "caution  style: 1 of 1 probes of 'model' took the last penalty of the search; with another one they may know "
        "more.",
        "caution  style: 1 of 1 probes of 'raw input' did not converge.",
    ]
