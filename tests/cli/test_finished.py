"""What a finished run prints, on a terminal and on a pipe, from a run folder with planted tables."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from planted_evidence import of_pairs, planted_evidence, quantity

from layerprobe import __version__
from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.runs.summary import LevelGrid, level_grid
from layerprobe.analyses.selection import Answers
from layerprobe.analyses.selection.ranking import rank_pairs
from layerprobe.analyses.tables.csv_files import write_table
from layerprobe.analyses.tables.evidence import CKA, LIDAR_GAP, NOISE_LIDAR, PROBE, PROBE_GAP
from layerprobe.analyses.tables.quality import QUALITY_COLUMNS
from layerprobe.cli.finished import show_run
from layerprobe.cli.heatmap import heatmap

LEVELS = (0.1, 0.5, 0.9)
LAYERS = tuple(f"blocks.{i}" for i in range(12))
COLORED = re.compile(r"\x1b\[[0-9;]*48;[0-9;]*m")
CODES = re.compile(r"\x1b\[[0-9;]*m")


def accuracy(i: int, level: float) -> float:
    return 0.2 + (0.04 * min(i, 8)) * (1 - level)


def planted_run(folder: Path, *, labels: bool = True) -> RunFolder:
    """A run whose accuracy rises up to `blocks.8` and falls with noise."""
    rows: list[Any] = [
        ("model", layer, i, level, PROBE if labels else "RankMe", split, value := accuracy(i, level), value, value, "")
        for i, layer in enumerate(LAYERS)
        for level in LEVELS
        for split in ("validation", "test")
    ]
    rows += [
        ("raw input", "input", -1, level, PROBE, split, 0.3, 0.29, 0.31, "")
        for level in (LEVELS if labels else ())
        for split in ("validation", "test")
    ]
    folder.mkdir()
    write_table(pd.DataFrame(rows, columns=list(QUALITY_COLUMNS)), folder / "quality.csv")
    values = [[accuracy(i, level) for i in range(12)] for level in LEVELS]
    gap = of_pairs(lambda s, t: sum(accuracy(t, level) - accuracy(s, level) for level in LEVELS) / 3, 12)
    evidence = planted_evidence(
        {PROBE: quantity(values), NOISE_LIDAR: quantity(values)},
        {name: quantity([gap] * 3) for name in (PROBE_GAP, LIDAR_GAP)}
        | {CKA: quantity([of_pairs(lambda s, t: 0.5, 12)] * 3)},
        layers=LAYERS,
        noise_levels=LEVELS,
    )
    evidence.write_csv(folder / "evidence.csv")
    run = RunFolder(folder)
    controls = {"majority class": 0.1, "raw input": 0.3}
    run.keep_selection(rank_pairs(evidence, label_free=not labels, controls=controls))
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return planted_run(tmp_path / "run")


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the captured standard output a terminal of 80 columns that shows all colours."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for name, value in (("COLUMNS", "80"), ("TERM", "xterm-256color"), ("COLORTERM", "truecolor")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)


def shown(run: RunFolder, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    show_run(run.path, run.selection(), **options)
    return capsys.readouterr().out


def test_a_terminal_shows_coloured_numbers_answers_and_the_pick_within_its_width(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch)
    out = shown(run, capsys)
    lines = CODES.sub("", out).splitlines()
    assert len(COLORED.findall(out)) == (12 + 1) * 3
    assert "blocks.8    0.488*+0.360  0.232" in [line.rstrip() for line in lines]
    commands = [line for line in lines if line.startswith("  layerprobe")]
    assert [line.split()[1] for line in commands] == ["confirm", "select"]
    assert max(len(line) for line in lines if str(run.path) not in line) <= 80
    why = next(i for i, line in enumerate(lines) if line.startswith("why      blocks.8 is as rich as any"))
    assert next(n for n, line in enumerate(lines[why + 1 :], 1) if not line.startswith("         ")) <= 3
    assert "Probe accuracy: the share of test samples" in lines[1]


def test_no_color_keeps_the_numbers(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    out = shown(run, capsys)
    assert not COLORED.search(out)
    assert "0.488*+" in out


def test_a_pipe_gets_the_same_in_whole_lines(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(run, capsys)
    assert "\x1b" not in out
    assert "\nraw input   0.300  0.300  0.300\n" in out
    assert re.search(
        r"^training added most  blocks\.8 at noise level 0\.1: \+0\.188 .* on the test split\)\.$", out, re.M
    )
    assert "\npick     blocks." in out


def test_quiet_is_the_answer_alone_and_verbose_the_ranking_too(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    pick = run.selection().pick
    assert shown(run, capsys, quiet=True) == f"{pick}\n"
    assert "rank     student" in shown(run, capsys, verbose=True)
    record = json.loads(shown(run, capsys, quiet=True, as_json=True))
    assert record["answers"]["features"]["best"]["layer"] == "blocks.8"


def test_without_labels_the_grid_shows_the_measure_that_stands_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(planted_run(tmp_path / "free", labels=False), capsys)
    assert "Noise-LiDAR: the number of directions in which samples differ more than noise moves them." in out
    assert "Controls" not in out
    assert "training added most  What training added is measured only with labels" in out
    assert level_grid(tmp_path / "free", Answers(has_labels=False)) is None


def test_a_narrow_terminal_keeps_the_marked_cells_and_counts_what_it_leaves_out(run: RunFolder) -> None:
    from layerprobe.analyses.runs import answer_run

    grid = level_grid(run.path, answer_run(run.path, run.selection()))
    assert grid is not None
    text = heatmap(grid, 30).plain
    assert max(len(line) for line in text.splitlines()[:-1]) <= 30
    assert "0.488*+" in text
    assert text.endswith("2 of 3 noise levels are shown; all are in quality.csv")


def test_all_cells_have_the_decimals_of_the_largest() -> None:
    for values, texts in (((40.0, 7.25, 40.4), ["40.0", "7.2", "40.4"]), ((0.5, 1234.5, 12.0), ["0", "1234", "12"])):
        grid = LevelGrid("effective rank", "", (0.1, 0.5, 0.9), (("a", values),), (), ("a", 0.1), None)
        assert heatmap(grid, 80).plain.splitlines()[1].replace("*", "").split() == ["a", *texts]


def test_text_is_legible_on_every_colour() -> None:
    """Contrast of at least 4.5 (WCAG 2.1)."""
    from layerprobe.cli.heatmap import cell_style

    def lightness(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for value in range(11):
        lights = sorted(lightness(color) for color in cell_style(value, 0, 10).split(" on "))
        assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5


def test_the_version_and_the_help_have_short_names(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--version") == (0, f"layerprobe {__version__}\n", "")
    assert "Usage" in cli("probe", "-h")[1]
    sys.argv = ["layerprobe", "--version"]
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("layerprobe", run_name="__main__")
    assert capsys.readouterr().out == f"layerprobe {__version__}\n"
