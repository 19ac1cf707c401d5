"""The tutorials' commands run as they are written, on a hundred items and for a few steps."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

DOCS = Path(__file__).parents[1] / "docs"
# What a tutorial takes time by, and what is enough to see that it runs. All other words stay as they are.
SMALL = {
    "--steps": "4",
    "--checkpoint-every": "2",
    "--batch-size": "8",
    "--num": "4",
    "--num-samples": "20",
    "--num-evaluations": "1",
    "--num-train": "100",
    "--num-validation": "30",
    "--num-test": "16",
    "--clips": "160",
}


def commands(page: str) -> list[list[str]]:
    """What follows a `$` in the page's console blocks, as words."""
    blocks = re.findall(r"```console\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("$ ")]
    return [shlex.split(line[2:]) for line in lines]


def small(words: list[str]) -> list[str]:
    # A network needs a few more steps until its weights fit its convention.
    sizes = SMALL | ({"--steps": "60", "--warmup-steps": "10"} if words[0] == "train" else {})
    return [sizes.get(before, word) for before, word in zip(["", *words], words, strict=False)]


@pytest.mark.tutorial
@pytest.mark.parametrize(
    ("page", "source"),
    [("audio.md", "spoken-digits"), ("motion.md", "motion"), ("video.md", "mnist")],
)
def test_every_command_of_a_tutorial_runs(page, source, shared_data, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    Path(source).mkdir()
    for part, rows in (("train", 160), ("test", 60)):
        parquet.write_table(
            parquet.read_table(shared_data / source / f"{part}.parquet").slice(0, rows), f"{source}/{part}.parquet"
        )
    written = commands(page)
    assert {words[1] for words in written} >= {"train", "probe", "confirm"}
    for words in written:
        if words[0] == "python":
            monkeypatch.setattr(sys, "argv", small(words[1:]))
            runpy.run_path(str(DOCS.parent / words[1]), run_name="__main__")
            continue
        code, out, err = cli(*small(words[1:]))
        assert code == 0, f"{' '.join(words)}\n{out}{err}"
