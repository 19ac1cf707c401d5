"""The command line as a shell would use it, in this process where that changes nothing."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from started import Started
from tiny import tiny_sit
from undrawn import undrawn

from layerprobe import memory
from layerprobe.analyses.experiments import Verdict
from layerprobe.analyses.generation import classifier_extractor
from layerprobe.analyses.wording import short_answer
from layerprobe.checkpoints import save_checkpoint
from layerprobe.checkpoints.opening import embedded_checkpoint
from layerprobe.cli.main import run
from layerprobe.options import option_fields
from layerprobe.ranks import processes

TRAIN = shlex.split(
    "train --data digits --steps 12 --width 16 --depth 6 --heads 2 --batch-size 32 --learning-rate 1e-3"
)
COUNTS = shlex.split("--num-train 200 --num-validation 100 --num-test 100 --noise-levels 0.2,0.6")


@pytest.fixture
def refused(cli):
    """Runs a command that must be refused: exit code 2, one line on standard error, nothing on standard output."""

    def call(*arguments: object, code: int = 2) -> str:
        exit_code, out, err = cli(*arguments)
        lines = [line for line in err.splitlines() if not line.startswith(("reading", "measuring", "training"))]
        assert (exit_code, out) == (code, ""), err
        assert len(lines) == 1, err
        return lines[0]

    return call


@pytest.fixture(autouse=True, scope="module")
def quick_extractor() -> Iterator[None]:
    """The classifier behind the distances of a confirmation, hardly trained: nothing here looks at their values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(classifier_extractor.__kwdefaults__, "steps", 3)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: a tiny SiT, trained, probed."""
    folder = tmp_path_factory.mktemp("cli")
    argv = sys.argv
    try:
        sys.argv = ["layerprobe", *TRAIN, "--out", str(folder / "training")]
        assert run() == 0
        checkpoint = str(folder / "training" / "model.safetensors")
        sys.argv = ["layerprobe", "probe", checkpoint, "--data", "digits", "--out", str(folder / "run"), *COUNTS]
        with undrawn():
            assert run() == 0
    finally:
        sys.argv = argv
    return folder


def test_help_is_quick_and_needs_no_torch() -> None:
    began = time.perf_counter()
    code = "import sys; sys.argv = ['layerprobe', '--help']\nfrom layerprobe.cli.main import run\nrun()\n"
    code += "assert not {'torch', 'pandas', 'sklearn', 'matplotlib', 'datasets', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout
    assert time.perf_counter() - began < 10  # 0.3 s on an idle machine; the imports above are what makes it slow


def test_a_checkpoint_is_opened_without_the_compiler_of_torch() -> None:
    """It would take longer to load than all the rest together."""
    code = "import sys; sys.argv = ['layerprobe', 'inspect', 'digits']\nfrom layerprobe.cli.main import run\nrun()\n"
    code += "assert 'torch' in sys.modules\n"
    code += "assert not {'torch._dynamo', 'sympy', 'pandas', 'sklearn', 'matplotlib', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_train_warns_of_a_pair_that_its_checks_find(tmp_path: Path, cli) -> None:
    code, _, err = cli(*TRAIN, "--out", tmp_path, "--pair", "3:5", "--pair", "1:4", "--dry-run")
    warnings = [line for line in err.splitlines() if "warning: LP" in line]
    assert (code, [line.split()[2] for line in warnings]) == (0, ["LP002", "LP004"])
    assert "the student blocks.3 is at 0.67 of the depth" in warnings[0]


def test_train_takes_a_pair_of_other_modules_than_blocks(tmp_path: Path, cli) -> None:
    pair = "blocks.1.attn:blocks.3.attn"
    code, out, err = cli(*TRAIN, "--out", tmp_path, "--pair", pair, "--dry-run")
    assert (code, "LP0" in err) == (0, False)
    assert "blocks.1.attn <- blocks.3.attn" in out


def test_run_folder_is_whole(trained: Path) -> None:
    run_folder = trained / "run"
    expected = ["environment.json", "evidence.csv", "features", "figures", "plan.json"]
    expected += ["probe-scores.safetensors", "quality.csv", "report.html"]
    expected += ["selection.json"]
    expected = [
        "ablation.csv",
        "checksums.json",
        "convention.json",
        "data.json",
        *expected,
        "similarity.csv",
        "times.json",
    ]
    assert sorted(p.name for p in run_folder.iterdir()) == expected
    figures = {p.stem for p in (run_folder / "figures").glob("*.png")}
    assert figures == {p.stem for p in (run_folder / "figures").glob("*.svg")}
    assert {"probe-accuracy-curves", "probe-accuracy-heatmap", "cka"} <= figures
    quality = pd.read_csv(run_folder / "quality.csv")
    assert set(quality["source"]) == {"model", "random weights", "raw input"}
    assert set(quality["noise_level"]) == {0.2, 0.6}
    # Layer ablation refuses teachers, so the test split takes no part in it.
    assert set(pd.read_csv(run_folder / "ablation.csv")["split"]) == {"validation"}


def test_a_finished_run_is_not_measured_again(trained: Path, cli) -> None:
    table = trained / "run" / "quality.csv"
    shard = trained / "run" / "features" / "model" / "shard-00000.safetensors"
    before = table.stat().st_mtime_ns, shard.stat().st_mtime_ns
    checkpoint = trained / "training" / "model.safetensors"
    with undrawn():
        code, out, _ = cli("probe", checkpoint, "--data", "digits", "--out", trained / "run", *COUNTS, "--json")
    assert code == 0
    assert "pick" in json.loads(out)
    assert before == (table.stat().st_mtime_ns, shard.stat().st_mtime_ns)


def test_a_wrong_convention_is_refused_before_anything_is_written(trained: Path, tmp_path: Path, cli, refused) -> None:
    """The embedded weights as an official file, which cannot say what its time means."""
    official = tmp_path / "official.safetensors"
    save_file(load_file(embedded_checkpoint()), official)
    wrong = ["probe", official, "--family", "dit", "--num-heads", 4, "--data", "digits", "--out", tmp_path / "run"]
    line = refused(*wrong, *COUNTS)
    assert "the weights do not fit --schedule ddpm-linear --prediction eps" in line
    assert re.search(r"but 0\.5\d* times under --schedule sit --prediction velocity;", line)
    assert not (tmp_path / "run").exists()

    code, out, _ = cli("inspect", official, "--family", "dit", "--num-heads", 4, "--data", "digits", "--json")
    assert (code, json.loads(out)["convention"]["verdict"]) == (0, "misfit")
    code, out, _ = cli("inspect", official, "--family", "sit", "--num-heads", 4, "--data", "digits")
    assert "assumed        no file states the number of classes: the last of the 11 rows" in out
    assert (code, "--schedule sit --prediction velocity (declared)" in out) == (0, True)

    with undrawn():
        code, out, err = cli(*wrong, *COUNTS, "--trust-convention", "--layers", "blocks.2,blocks.5")
    assert (code, out.startswith("weights  the weights do not fit")) == (0, True)
    record = json.loads((tmp_path / "run" / "convention.json").read_text())
    assert record["verdict"] == "misfit"
    assumed = "no file states the number of classes: the last of the 11 rows"
    assert record["assumptions"][0].startswith(assumed)
    assert err.splitlines()[0].startswith(f"layerprobe: assumed: {assumed}")
    assert err.count("assumed:") == 1
    assert assumed in html.unescape((tmp_path / "run" / "report.html").read_text())


def test_select_plot_report_sample(trained: Path, tmp_path: Path, cli) -> None:
    code, out, _ = cli("select", trained / "run", "--label-free", "--json")
    assert code == 0
    assert json.loads(out)["label_free"] is True
    code, out, _ = cli("select", trained / "run", "--min-distance", "3")
    assert code == 0
    assert "pick" in out
    assert ("trust    A pick is a hypothesis" in out) == ("pick     none" not in out)
    code, out, _ = cli("select", trained / "run", "--max-cka", "-1")
    assert (code, "pick     none. No pair is admissible" in out) == (0, True)
    code, out, _ = cli("plot", trained / "run")
    with undrawn():
        code_of_report, page, _ = cli("report", trained / "run")
    assert (code, code_of_report) == (0, 0)
    assert all(Path(line).is_file() for line in (out + page).splitlines())
    code, out, _ = cli("plot", trained / "run", "--only", "cka", "--format", "pdf", "--no-title", "--tables")
    first, *tables = [Path(line).name for line in out.splitlines()]
    assert (code, first, {"probe-accuracy.csv", "probe-accuracy.tex"} <= set(tables)) == (0, "cka.pdf", True)
    code, _, err = cli("plot", trained / "run", "--only", "ckaa")
    assert (code, "has no figure 'ckaa'; it has " in err) == (2, True)
    checkpoint = trained / "training" / "model.safetensors"
    code, out, _ = cli("sample", checkpoint, "--out", tmp_path / "s", "--num", 4, "--steps", 2)
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "checksums.json",
        "samples.json",
        "samples.npy",
        "samples.png",
        "samples.svg",
        "times.json",
    ]


def test_confirm_writes_verdict_and_report(trained: Path, cli) -> None:
    short = shlex.split("--steps 4 --num-seeds 2 --num-evaluations 2 --num-samples 20")
    arguments = ["confirm", trained / "run", *short]
    code, out, _ = cli(*arguments, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["seeds"] == [0, 1]
    assert not (trained / "run" / "confirmation").exists()
    with undrawn():
        code, out, _ = cli(*arguments, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["answer"] in ("helps", "hurts", "no difference found", "too early to tell")
    verdict = json.loads((trained / "run" / "verdict.json").read_text())
    assert (verdict["answer"], verdict["arms"][0]["name"]) == (told["answer"], "baseline")
    assert (trained / "run" / "figures" / "confirmation.png").is_file()
    pick = json.loads((trained / "run" / "selection.json").read_text())["pick"]
    page = html.unescape((trained / "run" / "report.html").read_text())
    answer = short_answer(Verdict.from_dict(verdict)).capitalize()
    assert f'<span class="chip">{answer if pick else "No pick"}</span>' in page
    assert ("the present selection has no pick" in page) == (pick is None)


def test_confirm_refuses_other_data_and_other_options(trained: Path, tmp_path: Path, cli) -> None:
    """Its arms are trained on the data by which the pick was chosen, and are continued as they were begun."""
    run, arguments = trained / "run", shlex.split("--steps 4 --num-seeds 2 --num-evaluations 2 --num-samples 20")
    if not (run / "verdict.json").is_file():  # if the test before this one did not run
        cli("confirm", run, *arguments)
    code, _, err = cli("confirm", run, *arguments, "--weight", "0.7")
    assert (code, err.splitlines()[-1]) == (
        2,
        f"layerprobe: {run / 'confirmation'} holds a confirmation of other options (different: plan.training.weight); "
        "pass the options it was begun with, or use a copy of the run without confirmation/, confirmation.csv and "
        "verdict.json",
    )
    table = pd.read_csv(run / "confirmation.csv").replace({"negative control": "depth heuristic"})
    copy = shutil.copytree(run, tmp_path / "old")
    for sums in list(copy.rglob("checksums.json")):
        sums.unlink()  # records are changed by hand below
    table.to_csv(copy / "confirmation.csv", index=False)
    code, _, err = cli("confirm", copy, *arguments)
    assert code == 2
    assert "was confirmed by an earlier version, whose arm 'depth heuristic'" in err.splitlines()[-1]
    table.replace({"depth heuristic": "negative control"}).to_csv(copy / "confirmation.csv", index=False)
    (copy / "confirmation" / "confirmation.json").write_text("[" * 100_000)
    code, _, err = cli("confirm", copy, *arguments)
    assert (code, "confirmation.json is damaged" in err.splitlines()[-1]) == (2, True)
    for name in ("confirmation", "confirmation.csv", "verdict.json"):
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    manifest = next((copy / "features" / "model").glob("manifest*.json"))
    record = json.loads(manifest.read_text())
    record["data"]["test"] = "other"
    manifest.write_text(json.dumps(record))
    code, _, err = cli("confirm", copy, *arguments)
    assert (code, err.splitlines()[-1]) == (
        2,
        f"layerprobe: the test data are not those that {copy} measured, by which its pick was chosen; restore them, or "
        "probe the new data into another folder",
    )
    assert not (copy / "confirmation").exists()


def test_a_continued_training_is_forecast_from_its_newest_checkpoint_on(
    tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without times.json, which tells that it was begun."""
    timed: list[int] = []
    monkeypatch.setattr("layerprobe.analyses.runs.train_run", lambda *_, **__: None)
    monkeypatch.setattr("layerprobe.analyses.runs.rough_seconds", lambda *args: timed.append(args[2].steps) or 0.0)
    monkeypatch.setattr("layerprobe.training.check_training", lambda *_: None)  # There is nothing but a checkpoint.
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-0000005.pt").touch()
    assert cli(*TRAIN, "--out", tmp_path)[0] == 0
    assert timed == [7]


def test_training_with_the_pick_of_a_run(trained: Path, tmp_path: Path, cli) -> None:
    code, out, _ = cli(*TRAIN, "--out", tmp_path / "t", "--pair", "1:3", "--json")
    assert code == 0
    assert json.loads(out)["pairs"] == ["blocks.1 <- blocks.3"]
    aligned, plain = (load_file(p / "model.safetensors") for p in (tmp_path / "t", trained / "training"))
    assert any(not torch.equal(aligned[name], plain[name]) for name in plain)


def test_inspect_and_doctor(cli) -> None:
    code, out, _ = cli("inspect", "digits", "--json")
    record = json.loads(out)
    assert code == 0
    assert len(record["layers"]) >= 8
    assert record["layers"]["blocks.0"] == [16, 64]
    rows = cli("inspect", "digits", "--value-range", "0,1")[1].splitlines()
    assert {"heads          4", "classes        10, and the null label 10"} <= set(rows)
    assert "input values   0 to 1 for -1 to 1 of the data" in rows
    inside = next(row for row in rows if row.startswith("blocks.*"))
    assert inside.split(maxsplit=1)[1] == "attn.q, attn.k, attn.v, attn.out, attn, mlp"
    named = json.loads(cli("inspect", "digits", "--layers", "blocks.*.attn.k,blocks.2.mlp", "--json")[1])["layers"]
    assert named == {**{f"blocks.{i}.attn.k": [16, 64] for i in range(3)}, "blocks.2.mlp": [16, 64]} | named
    assert len(named) == len(record["layers"]) + 1
    code, out, _ = cli("doctor", "--json")
    assert code == 0
    assert "torch" in json.loads(out)["packages"]


def test_doctor_tells_verified_families_and_what_another_class_needs(cli) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")
    code, out, err = cli("doctor", "--families")
    assert "torchvision" not in err
    lines = out.splitlines()
    assert code == 0
    assert re.match(r"^4\d classes of diffusers were verified with diffusers [\d.]+, torch [\d.]+", lines[0])
    assert any(line.startswith("Flux2Transformer2DModel ") and "0 data, 1 noise" in line for line in lines)
    assert re.search(r"no entry: .*; --entry CLASS prints one to fill in$", lines[-1])
    assert 'CLASSES["GlmImageTransformer2DModel"]' in cli("doctor", "--entry", "GlmImageTransformer2DModel")[1]
    code, _, error = cli("doctor", "--families", "--entry", "X")
    assert code == 2
    assert "--families and --entry are two questions; pass one of them" in error


def test_inspect_tells_what_of_a_file_is_read_and_what_is_not(tmp_path: Path, cli) -> None:
    weights = {f"model.net.{name}": tensor.bfloat16() for name, tensor in load_file(embedded_checkpoint()).items()}
    state = weights | {"first_stage_model.w": torch.zeros(3), "loss.a": torch.zeros(2), "loss.b": torch.zeros(2)}
    torch.save({"state_dict": state, "callback": Path("x")}, tmp_path / "last.ckpt")
    code, out, error = cli("inspect", tmp_path / "last.ckpt", "--family", "sit", "--num-heads", 4)
    assert code == 0, error
    rows = {
        "weights        state_dict",
        "prefix         model.net.",
        "left out       first_stage_model.* 1, loss.* 2",
        "stored types   bfloat16, read as float32",
    }
    assert rows <= set(out.splitlines())
    assert "left unbuilt   pathlib." in out
    assert not {"files", "assumptions"} & {line.split(" ")[0] for line in out.splitlines()}


def test_inspect_tells_the_live_weights_beside_an_averaged_copy(tmp_path: Path, cli) -> None:
    weights = load_file(embedded_checkpoint())
    state = {f"{part}.{name}": tensor for part in ("model", "ema") for name, tensor in weights.items()}
    torch.save(state, tmp_path / "both.pt")
    code, out, _ = cli("inspect", tmp_path / "both.pt", "--family", "sit", "--num-heads", 4)
    assert code == 0
    assert {"weights        ema", "other weights  '' (the rest of the file)"} <= set(out.splitlines())


def test_inspect_cuts_a_long_value_of_a_record(tmp_path: Path, cli) -> None:
    backbone = tiny_sit()
    training = {"steps": 3, "note": "a" * 5000}
    save_checkpoint(tmp_path / "x.safetensors", backbone, backbone.module.state_dict(), training=training)
    code, out, error = cli("inspect", tmp_path / "x.safetensors")
    assert code == 0, error
    assert "trained: steps 3" in out.splitlines()
    assert max(map(len, out.splitlines())) == 600


def test_memory_that_runs_out_is_one_line(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr("layerprobe.checkpoints.weight_sets.file_content", full)
    told = "layerprobe: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); pass a smaller --batch-size"
    code, out, error = cli("inspect", "digits")
    assert (code, out, len(error.splitlines())) == (1, "", 1)
    assert error.startswith(told)


def test_a_device_that_fails_is_one_line(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nMore.")

    monkeypatch.setattr("layerprobe.checkpoints.source.CheckpointSource.describe", broken)
    told = "layerprobe: the device failed (CUDA error: an illegal memory access was encountered); repeat the command"
    code, out, error = cli("inspect", "digits")
    assert (code, out, len(error.splitlines())) == (1, "", 1)
    assert error.startswith(told)


@pytest.mark.filterwarnings("default")
def test_our_warnings_are_shown_at_once_and_those_of_libraries_not_before_an_error(
    cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(*_: object, **__: object) -> None:
        warnings.warn_explicit("8 rows do not fit", UserWarning, memory.__file__, 1)
        warnings.warn_explicit("old", FutureWarning, "torch/nn.py", 1)
        raise ValueError("it is wrong; mend it")

    monkeypatch.setattr("layerprobe.checkpoints.source.CheckpointSource.describe", warn)
    _, _, error = cli("inspect", "digits")
    assert error.splitlines() == ["layerprobe: warning: 8 rows do not fit", "layerprobe: it is wrong; mend it"]


def test_dry_run_writes_nothing(tmp_path: Path, cli) -> None:
    few = ("--num-train", 100, "--num-validation", 40, "--num-test", 30, "--noise-levels", "0.2,0.5")
    code, out, _ = cli("probe", "digits", "--data", "digits", "--out", tmp_path / "r", *few, "--dry-run", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["samples"] == {"train": 100, "validation": 40, "test": 30}
    assert (record["device"], record["precision"], record["processes"]) == ("cpu", "float32", 1)
    assert record["total_s"] == pytest.approx(sum(record["seconds"].values()), abs=0.2)
    assert json.loads(cli(*TRAIN, "--out", tmp_path / "t", "--dry-run", "--json")[1])["total_s"] == 300
    assert "in all             5 min" in cli("sample", "digits", "--num", 2, "--out", tmp_path / "s", "--dry-run")[1]
    assert cli("quickstart", "--out", tmp_path / "q", "--dry-run")[0] == 0
    assert "2 arms x 3 seeds" in cli("quickstart", "--confirm", "--out", tmp_path / "q", "--dry-run")[1]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_the_folder_that_the_run_refuses(trained: Path, refused) -> None:
    probe = ("probe", "digits", "--data", "digits", *COUNTS, "--out", trained / "run")
    train = (*TRAIN, "--learning-rate", 0.5, "--out", trained / "training")
    for dry in ([], ["--dry-run"]):
        assert "run holds the results of another run (different: checkpoint" in refused(*probe, *dry)
        assert "training holds a training of another run (different: plan.learning_rate" in refused(*train, *dry)


def test_configuration_precedence(tmp_path: Path, cli, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.toml"
    file.write_text('data = "digits"\nout = "unused"\nsteps = 5\nwidth = 16\nheads = 2\n')
    assert json.loads(cli("train", "--config", file, "--dry-run", "--json")[1])["steps"] == 5
    monkeypatch.setenv("LAYERPROBE_TRAIN_STEPS", "6")
    assert json.loads(cli("train", "--config", file, "--dry-run", "--json")[1])["steps"] == 6
    assert json.loads(cli("train", "--config", file, "--steps", 7, "--dry-run", "--json")[1])["steps"] == 7
    (tmp_path / "bad.yaml").write_text("stepz: 5\n")
    assert "the key 'stepz', which is not an option of train" in refused("train", "--config", tmp_path / "bad.yaml")
    for text, message in (
        ("steps: {a: 1}\n", "has a dict as steps; write a number, a text, true or false, or a list of these"),
        ("steps: [[1]]\n", "has a list of other things as steps"),
        ("1: 2\n", "the key '1', which is not an option of train"),
        ("steps: 1\nsteps: 2\n", "the key 'steps' occurs twice"),
        ('"\\e[31mx": 1\n', r"the key '\x1b[31mx', which"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        assert message in refused("train", "--config", tmp_path / "bad.yaml")


# Every option of `train` beside those that say where and how long, none at its default.
TRAINING = """
patch-size = 4
width = 48
depth = 7
heads = 3
path = "vp"
prediction = "v"
pair = ["1:4:0.5", "blocks.2:blocks.6"]
weight = 0.1
sync-warmup-steps = 3
sync-decay = "cosine"
sync-stop-step = 90
sync_noise_range = "0.2,0.8"
sync-centered = true
sync-projector-width = 8
sync-teacher-decay = 0.9
sync-noise-gap = 0.1
label-drop = 0.2
time-sampling = "logit-normal"
time-mean = -0.5
time-std = 1.5
loss-weighting = "min-snr"
snr-gamma = 4
batch-size = 16
accumulate = 2
learning-rate = 2e-4
warmup-steps = 5
weight-decay = 0.01
clip-norm = 1
ema-decay = 0.99
more-ema-decays = "0.9,0.5"
precision = "bfloat16"
compile = true
checkpoint-every = 7
keep-last = 3
log-every = 4
tracker = ["tensorboard"]
fsdp = true
seed = 3
"""


def test_every_option_of_a_training_can_come_from_a_file(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from layerprobe.cli.main import app
    from layerprobe.cli.options import COUNTS as COUNTS_OF_A_PROBE
    from layerprobe.data.sources import DataSource

    given: dict[str, object] = {}
    monkeypatch.setattr(
        "layerprobe.analyses.runs.train_run",
        lambda backbone, splits, plan, folder, **rest: given.update(rest, plan=plan),
    )
    monkeypatch.setattr("layerprobe.training.require", lambda names: None)
    (tmp_path / "train.toml").write_text(TRAINING)
    told = ["train", "--config", tmp_path / "train.toml", "--data", "digits", "--out", tmp_path / "t", "--steps", 100]
    code, out, err = cli(*told, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert (record["tokens"], record["path"], record["prediction"]) == ("4 of width 48", "sit-vp", "v")
    assert record["weights"] == [0.05, 0.1]
    assert (given["trackers"], given["fsdp"]) == (["tensorboard"], True)
    plan = dataclasses.asdict(given["plan"])
    default = dataclasses.asdict(type(given["plan"])(steps=0))
    same = [name for name in default if plan[name] == default[name]]
    same += [name for name in default["sync"] if plan["sync"][name] == default["sync"][name]]
    assert same == []
    assert plan["sync"]["noise_range"] == (0.2, 0.8)
    assert plan["more_ema_decays"] == (0.9, 0.5)

    command = typer.main.get_command(app).commands["train"]
    known = {flag.lstrip("-").replace("-", "_") for option in command.params for flag in option.opts}
    tested = {line.split(" = ")[0].replace("-", "_") for line in TRAINING.strip().splitlines()}
    elsewhere = {"data", "out", "steps", "from", "preset", "selection", "sync"}
    elsewhere |= {"probe_every", "probe_share", "drift_from", "stop_sync"}  # of the layer curves
    elsewhere |= {"sync_begin", "sync_every", "device", "deterministic", "dry_run", "json", "config"}
    reading = {option.flag.lstrip("-").replace("-", "_") for option in option_fields(DataSource)}
    assert known == tested | elsewhere | reading - set(COUNTS_OF_A_PROBE)


def test_bad_options_of_a_training_are_refused(tmp_path: Path, refused) -> None:
    def train(options: str, **code: int) -> str:
        line = refused(*TRAIN, "--out", tmp_path / "t", *options.split(), **code)
        assert not (tmp_path / "t").exists()
        return line

    assert "--pair, --selection and --sync each say what is aligned" in train("--pair 1:3 --sync auto")
    assert "unknown --sync 'always'" in train("--sync always")
    assert "--sync-every has no effect without --sync auto" in train("--pair 1:3 --sync-every 5")
    assert "the first pick at step 1000 is not before the end at step 12" in train("--sync auto")
    assert "--pair 1:3:half does not end with a number" in train("--pair 1:3:half")
    assert "is not student:teacher" in train("--pair 1:2:3:4")
    assert "blocks.9" in train("--pair 1:9")
    assert "a linear decay ends at the stop step" in train("--pair 1:3 --sync-decay linear")
    assert "--sync-noise-range 0.5 is not 2 numbers" in train("--pair 1:3 --sync-noise-range 0.5")
    assert "--sync-noise-range x is not a list of numbers" in train("--pair 1:3 --sync-noise-range x")
    assert "--sync-noise-gap in [0, 1]" in train("--pair 1:3 --sync-noise-gap 2")
    assert "unknown --time-sampling 'beta'" in train("--time-sampling beta")
    assert "unknown --loss-weighting 'sigma'" in train("--loss-weighting sigma")
    assert "cannot be cut into 5 equal parts" in train("--accumulate 5")
    assert "different decays in [0, 1), got 0.9999, 1.5" in train("--more-ema-decays 1.5")
    assert "unknown --path 'cosine'; use linear, gvp or vp" in train("--path cosine")
    assert "unknown --prediction 'noise'" in train("--prediction noise")
    assert "leave out --path and --prediction with --from" in train("--from digits --path vp")
    assert "unknown tracker 'mlflow'; use tensorboard, wandb or trackio" in train("--tracker mlflow")
    assert "--fsdp needs several processes to share the weights" in refused(*TRAIN, "--out", tmp_path / "t", "--fsdp")


def test_a_tracker_that_is_not_installed_is_exit_code_3(tmp_path: Path, refused, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    line = refused(*TRAIN, "--out", tmp_path / "t", "--tracker", "trackio", "--dry-run", code=3)
    assert "the tracker trackio needs a missing package" in line


def printed(*arguments: str) -> tuple[int, str]:
    """Runs a command in this process of several; gives its exit code and standard output."""
    sys.argv, sys.stdout = ["layerprobe", *arguments], io.StringIO()
    return run(), sys.stdout.getvalue()


def test_of_two_processes_one_prints(tmp_path: Path) -> None:
    train = [*TRAIN, "--steps", "2", "--log-every", "1", "--pair", "1:3", "--out", str(tmp_path / "t"), "--json"]
    started = Started(tmp_path / "two", printed, *train)
    (code, out), other = started.results()
    assert (code, other) == (0, (0, ""))
    record = json.loads(out)
    assert (record["processes"], record["checkpoint"]) == (2, str(tmp_path / "t" / "model.safetensors"))
    assert "".join(path.read_text() for path in started.stderr_files).count("training: 2 of 2") == 1
    assert (tmp_path / "t" / "curves.png").is_file()


def test_progress_on_a_pipe_and_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from layerprobe.cli import output

    now = 100.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with output.progress_bar({"training": 64}) as progress:
        for step in range(500, 1001, 50):  # a training that goes on from 500 steps
            progress("training", step, 1000)
            now += 10.0
        progress("reading layers", 1, 4000)
        now += 61
        progress("reading layers", 50, 4000)  # not a tenth, but a minute has passed
        for step in range(1, 11):  # done within five seconds
            progress("skipping layers", step, 10)
            now += 0.4
    assert capsys.readouterr().err.splitlines() == [
        "training: 550 of 1000 (10 s, 320 samples/s, 90 s left)",
        "training: 600 of 1000 (20 s, 320 samples/s, 80 s left)",
        "training: 700 of 1000 (40 s, 320 samples/s, 60 s left)",
        "training: 800 of 1000 (60 s, 320 samples/s, 40 s left)",
        "training: 900 of 1000 (80 s, 320 samples/s, 20 s left)",
        "training: 1000 of 1000 (100 s, 320 samples/s)",
        "reading layers: 50 of 4000 (61 s, 82 min left)",
        "skipping layers: 10 of 10 (4 s)",
    ]


def test_progress_of_a_terminal_shows_samples_per_second(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from layerprobe.cli import output

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with output.progress_bar({"training": 64}) as progress:
        for step in (500, 501, 502, 600):
            progress("training", step, 600)
            time.sleep(0.05)
        output.warn("a service is down")
    err = capsys.readouterr().err
    assert "layerprobe: warning: a service is down" in err
    last = [line for line in err.splitlines() if "600/600" in line][-1]
    rate = float(re.search(r"([0-9]+) samples/s", last).group(1))
    assert 64 * 100 / 10 < rate < 64 * 100 / 0.1  # 100 steps in 0.15 s or, on a busy machine, somewhat more


class _Payload:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.place}",)


def test_bad_checkpoints_are_refused(trained: Path, tmp_path: Path, refused) -> None:
    def probe(checkpoint: object) -> str:
        message = refused("probe", checkpoint, "--data", "digits", "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return message

    good = trained / "training" / "model.safetensors"
    assert "no checkpoint file" in probe(tmp_path / "absent.pt")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:5000])
    assert "not a valid safetensors file" in probe(tmp_path / "cut.safetensors")
    torch.save({"model": _Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    assert "holds no weights" in probe(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    weights = load_file(good)
    torch.save(weights, tmp_path / "foreign.pt")
    assert "pass --family" in probe(tmp_path / "foreign.pt")
    save_file({"a": torch.ones(2)}, tmp_path / "stranger.safetensors")
    assert "pass --model" in probe(tmp_path / "stranger.safetensors")


def test_a_shard_that_is_missing_is_exit_code_3(tmp_path: Path, refused) -> None:
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00001-of-00002.safetensors" in refused("inspect", tmp_path, code=3)


def test_bad_options_are_refused(trained: Path, tmp_path: Path, refused) -> None:
    def probe(*options: object) -> str:
        return refused("probe", "digits", "--data", "digits", "--out", tmp_path / "run", *options)

    assert "blocks.99 is not in SiT, which has" in probe("--layers", "blocks.99")
    assert "between 0 (clean) and 1" in probe("--noise-levels", "0.5,1.5")
    assert "not a list of numbers" in probe("--noise-levels", "low")
    assert "is not available" in probe("--device", "xpu")
    assert str(tmp_path / "no") in refused("probe", "digits", "--data", tmp_path / "no", "--out", tmp_path / "run")
    assert "unknown family" in refused("inspect", _foreign(trained, tmp_path), "--family", "gan")
    assert "comes after teacher" in refused(*TRAIN, "--out", tmp_path / "t", "--pair", "3:1")
    assert "is not student:teacher" in refused(*TRAIN, "--out", tmp_path / "t", "--pair", "3")
    assert "holds no run" in refused("confirm", tmp_path)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "t").exists()


def _foreign(trained: Path, folder: Path) -> Path:
    torch.save(load_file(trained / "training" / "model.safetensors"), folder / "foreign.pt")
    return folder / "foreign.pt"


def test_folders_of_other_runs_are_refused(trained: Path, tmp_path: Path, refused) -> None:
    checkpoint = trained / "training" / "model.safetensors"
    before = (trained / "run" / "quality.csv").read_bytes()
    others = [*COUNTS[:-1], "0.3,0.6"]
    message = refused("probe", checkpoint, "--data", "digits", "--out", trained / "run", *others)
    assert "results of another run (different: extraction.noise_levels)" in message
    assert (trained / "run" / "quality.csv").read_bytes() == before
    message = refused(*TRAIN, "--out", trained / "training", "--learning-rate", "0.5")
    assert "another run (different: plan.learning_rate)" in message
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "is not empty" in refused("probe", checkpoint, "--data", "digits", "--out", tmp_path / "mine", *COUNTS)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_images_are_encoded_once_and_a_dry_run_writes_nothing(
    tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers = pytest.importorskip("diffusers")
    from PIL import Image

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(in_channels=3, out_channels=3, **blocks, **kinds).save_pretrained(tmp_path / "vae")
    for i in range(40):
        folder = tmp_path / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (6 * i, 90, 30)).save(folder / f"{i}.png")
    train = [*TRAIN[:1], "--data", tmp_path / "images", "--vae", tmp_path / "vae", *TRAIN[3:], "--out", tmp_path / "t"]
    code, out, _ = cli(*train, "--dry-run")
    assert (code, "SiT with 6 blocks" in out) == (0, True)
    assert not (tmp_path / "cache" / "layerprobe").exists()
    assert cli(*train)[0] == 0
    assert len(list((tmp_path / "cache" / "layerprobe" / "latents").iterdir())) > 0
    code, out, _ = cli("inspect", tmp_path / "t" / "model.safetensors", "--json")
    assert json.loads(out)["shape"] == [4, 8, 8]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_command_that_shares_nothing_is_left_to_one_process(
    cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int
) -> None:
    def found(*_: object, **__: object) -> None:
        with processes() as ranks:  # Nobody is waited for.
            raise ValueError(f"{ranks}")

    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("layerprobe.analyses.report.write_report", found)
    code, out, error = cli("report", tmp_path)
    if rank:
        assert (code, out, error) == (0, "", "")
    else:
        assert code == 2
        assert error.splitlines() == [
            "layerprobe: report is the work of one process; the other 1 end at once",
            "layerprobe: Ranks(rank=0, world_size=1, local_rank=0)",
        ]
