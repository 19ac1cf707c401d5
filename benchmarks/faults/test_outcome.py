"""The classifier tells every kind of ending from the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from outcome import Case, classify, run_case

LINE = "layerprobe: x.npz is damaged; copy it again\n"


@pytest.mark.parametrize(
    ("code", "output", "kind"),
    [
        (0, "layers: 3\n", "ok"),
        (2, LINE, "refused"),
        (2, f"layerprobe: data: 3 rows\nextract: 1 of 3 (0 s)\n{LINE}", "refused"),
        (2, "Usage: layerprobe probe\n╭ Error ╮\n│ No such option │\n", "refused"),
        (3, LINE, "missing"),
        (2, "", "MUTE"),
        (2, f"UserWarning: something\n{LINE}", "NOISE"),
        (1, "Traceback (most recent call last)\nKeyError: 'x'\n", "TRACEBACK"),
        (1, "Traceback (most recent call last)\nMemoryError\n", "MEMORY"),
        (1, "layerprobe: out of memory (x)\n", "MEMORY"),
        (7, LINE, "TRACEBACK"),
        (2, LINE.replace("x", "x" * 1000), "LONG"),
        (2, LINE.replace("x", "\x1b[31mx"), "RAW"),
        (0, "name: \u202egnp.exe\n", "RAW"),
        (-11, "", "CRASH"),
        (None, "", "HANG"),
    ],
)
def test_kind(code: int | None, output: str, kind: str) -> None:
    assert classify(code, output, 1.0).kind == kind


def test_other_ending_than_the_right_one_is_wrong() -> None:
    case = Case("group", "no file", lambda folder: ["inspect", str(folder / "none")], right=("ok",))
    assert run_case(case).kind == "WRONG"
