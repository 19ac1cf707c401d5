"""The files of a run folder come back as they were written, or are said to be damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.checksums import Damaged, recorded_write


def test_probe_scores_are_read_whole_or_refused(tmp_path: Path) -> None:
    folder, path = RunFolder(tmp_path), tmp_path / "probe-scores.safetensors"
    assert folder.probe_scores() == {}
    scores = {("blocks.1", 0.3): np.array([0.0, 1.0, 1.0]), ("a b", 0.1): np.array([1.0, 0.0, 1.0])}
    folder.write_probe_scores(scores)
    found = folder.probe_scores()
    assert found.keys() == scores.keys() and all((found[key] == scores[key]).all() for key in scores)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Damaged, match=r"probe-scores.safetensors is damaged \(its content .*; run `layerprobe analyze"):
        folder.probe_scores()
    assert not folder.is_measured
    for tensors in ({"blocks.1": np.ones(3, np.float32)}, {"0.3 blocks.1": np.full(3, np.nan, np.float32)}):
        with recorded_write(path) as partial:
            save_file(tensors, partial)
        with pytest.raises(Damaged, match=r"is damaged \(.*; run `layerprobe analyze"):
            folder.probe_scores()
