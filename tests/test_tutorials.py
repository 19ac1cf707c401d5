"""The tutorials' commands run as they are written, on a hundred items and for a few steps."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
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


@pytest.mark.tutorial
def test_every_command_of_the_first_tutorial_runs(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    for words in commands("first-checkpoint.md"):
        if words[0] == "cp":
            shutil.copy(DOCS.parent / words[1], words[2])
            continue
        code, out, err = cli(*small(words[1:]))
        assert code == 0, f"{' '.join(words)}\n{out}{err}"


def notebooks():
    return sorted((DOCS / "notebooks").glob("*.ipynb"))


@pytest.mark.tutorial
@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_every_cell_of_a_notebook_runs(path, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [[output.get("data", {}) for output in cell["outputs"]] for cell in cells]
    plots = [shown for cell, shown in zip(cells, outputs, strict=True) if ".plot(" in "".join(cell["source"])]
    assert plots
    assert all(any("image/png" in data for data in shown) for shown in plots)


@pytest.mark.tutorial
def test_the_recipes_in_python_run(tmp_path, monkeypatch):
    """In order, as one script; `torch` and the front door are there, as the page says."""
    import torch

    import layerprobe as lp

    monkeypatch.chdir(tmp_path)
    probe = lp.probe
    monkeypatch.setattr(lp, "probe", lambda *words, **options: probe(*words, **options, noise_levels=(0.3,)))
    names = {"lp": lp, "torch": torch}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "recipes.md").read_text(encoding="utf-8"), re.DOTALL):
        assert len(block.splitlines()) <= 10
        exec(block, names)
    assert names["features"].shape == (4, 64)
