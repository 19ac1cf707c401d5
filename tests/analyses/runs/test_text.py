"""Records of a run in lines for people."""

from __future__ import annotations

import json
from pathlib import Path

from planted_evidence import of_pairs, planted_evidence, quantity

from layerprobe.analyses.runs.text import describe_decisions
from layerprobe.analyses.selection.while_training import decide
from layerprobe.analyses.tables import evidence as e


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
        "step 10: blocks.0 <- blocks.6 is picked. blocks.6 is the best layer that may teach: noise-"
    )
