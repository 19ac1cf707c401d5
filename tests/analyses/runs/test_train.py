from __future__ import annotations

import json
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from layerprobe.analyses.figures import training as training_plots
from layerprobe.analyses.runs import train as training_runs
from layerprobe.analyses.runs.layer_curves import CurvePlan
from layerprobe.analyses.runs.network import NewNetwork
from layerprobe.backbones.sit import SiTConfig
from layerprobe.checkpoints.opening import open_checkpoint
from layerprobe.data.sources import DataSource
from layerprobe.data.splits import take
from layerprobe.layersync.options import SyncOptions
from layerprobe.layersync.pair import LayerPair
from layerprobe.training.plan import TrainingPlan

TINY = {"width": 16, "depth": 6, "heads": 2}
PLAN = TrainingPlan(steps=20, batch_size=16, learning_rate=1e-3, checkpoint_every=5, log_every=2)
PAIR = (LayerPair("blocks.1", "blocks.4"),)


@pytest.fixture(scope="module")
def digits():
    return take(DataSource("digits").load(), num_train=120, num_validation=40)


def _start(**options):
    return training_runs.training_start(None, NewNetwork(**TINY, **options), (1, 8, 8), 10, seed=0, device="cpu")


@pytest.mark.parametrize(
    ("path", "prediction"), [("linear", "velocity"), ("gvp", "eps"), ("vp", "score"), ("gvp", "v")]
)
def test_a_checkpoint_remembers_its_path_and_prediction(path, prediction, digits, tmp_path) -> None:
    backbone = _start(path=path, prediction=prediction)
    level = torch.tensor([0.2, 0.6], dtype=torch.float64)
    # What SiT's paths are at these noise levels: alpha / sigma = (1 - level) / level on each, the time differs.
    time = {"linear": 1 - level, "gvp": 1 - torch.atan2(level, 1 - level) * 2 / torch.pi}.get(path)
    if time is not None:
        torch.testing.assert_close(backbone.schedule.native_time(level), time)
    training_runs.train_run(backbone, digits, replace(PLAN, steps=1), tmp_path / "t", warn=pytest.fail)
    opened = open_checkpoint(tmp_path / "t" / "model.safetensors", device="cpu")
    assert (opened.schedule.name, opened.prediction) == (backbone.schedule.name, prediction)
    torch.testing.assert_close(opened.schedule.native_time(level), backbone.schedule.native_time(level))


def test_a_checkpoint_is_trained_on_its_own_path(tmp_path) -> None:
    with pytest.raises(ValueError, match="digits has a path and a prediction; leave out --path and --prediction"):
        training_runs.training_start("digits", NewNetwork(path="linear"), (1, 8, 8), 10, seed=0)
    with pytest.raises(ValueError, match="unknown path 'cosine'; use linear, gvp or vp"):
        _start(path="cosine")
    with pytest.raises(ValueError, match="unknown prediction 'noise'"):
        _start(prediction="noise")


def test_sizes_beside_a_preset_replace_its_own() -> None:
    def new(shape: tuple[int, ...], num_classes: int, **sizes: object) -> SiTConfig:
        return NewNetwork(**sizes).config(shape, num_classes)

    assert new((1, 8, 8), 10) == SiTConfig((1, 8, 8), 2, 128, 8, 4, 10)
    assert new((1, 8, 8), 10, width=64) == SiTConfig((1, 8, 8), 2, 64, 8, 4, 10)
    assert new((3, 16, 32, 32), 0, preset="tiny") == SiTConfig((3, 16, 32, 32), (4, 8, 8), 64, 8, 4, 0)
    changed = new((3, 16, 32, 32), 0, preset="tiny", patch_size=(1, 8, 8), depth=3, heads=2)
    assert changed == SiTConfig((3, 16, 32, 32), (1, 8, 8), 64, 3, 2, 0)
    # What a preset would choose does not matter where it is replaced: 509 is prime.
    assert new((66, 509), 0, preset="tiny", patch_size=(1,)).grid == (509,)


def test_layers_are_measured_and_the_training_is_the_same(digits, tmp_path) -> None:
    plan, lines = replace(PLAN, steps=6, pairs=PAIR, checkpoint_every=3), []
    curves = CurvePlan(every=2, num_samples=48, max_share=1)
    training_runs.train_run(_start(), digits, plan, tmp_path / "plain", warn=pytest.fail)
    for steps in (5, 6):  # step 6 comes after an interruption
        training_runs.train_run(
            _start(), digits, replace(plan, steps=steps), tmp_path / "t", curves=curves, warn=pytest.fail,
            say=lines.append,
        )  # fmt: skip
    plain, measured = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "t"))
    assert plain == measured
    table = pd.read_csv(tmp_path / "t" / "layer_curves.csv")
    assert sorted(set(table["step"])) == [0, 2, 4, 5, 6]
    assert "blocks.1 <- blocks.4" in set(table["layer"])
    assert (tmp_path / "t" / "layer_curves.png").is_file()
    assert [line for line in lines if line.startswith("layers measured at 4 steps: ")]


def test_what_cannot_end_an_alignment_or_measure_is_refused(cli, digits, tmp_path) -> None:
    told = ["train", "--data", "digits", "--steps", 2, "--out", tmp_path / "t"]
    for options, said in (
        (["--stop-sync", "9"], "unknown --stop-sync '9'; write --stop-sync auto, or a step as --sync-stop-step"),
        (["--stop-sync", "auto", "--sync", "auto"], "and --stop-sync auto ends it; pass one of them"),
        (["--probe-share", "0.1"], "--probe-share has no effect without --probe-every; pass it too, or leave out"),
        (["--drift-from", "digits"], "--drift-from has no effect without --probe-every"),
    ):
        code, _, err = cli(*told, *options)
        assert (code, said in err, err.count("\n")) == (2, True, 1), err
    with pytest.raises(ValueError, match="ends the alignment of given layers; pass --pair or --selection too"):
        training_runs.auto_stop(digits, PLAN, tmp_path, every=5)
    plan = replace(PLAN, pairs=PAIR, sync=SyncOptions(projector_width=8))
    with pytest.raises(ValueError, match="leave out --sync-projector-width or --stop-sync"):
        training_runs.auto_stop(digits, plan, tmp_path, every=5)
    stop = training_runs.auto_stop(digits, replace(PLAN, pairs=PAIR), tmp_path, every=5)
    assert stop.direct_at(20) == (0, 5, 10, 15)


def test_patches_by_axis_from_the_shell(cli, tmp_path) -> None:
    told = ["train", "--data", "digits", "--steps", 2, "--batch-size", 4, "--depth", 2, "--width", 16, "--heads", 2]
    code, out, err = cli(*told, "--out", tmp_path / "t", "--patch-size", "2,4", "--pair", "0:1", "--json")
    assert code == 0, err
    assert json.loads(out)["model"] == "SiT with 2 blocks of width 16, patch 2x4"
    opened = open_checkpoint(tmp_path / "t" / "model.safetensors", device="cpu")
    assert (opened.module.config.patch_size, opened.token_grid) == ((2, 4), (4, 2))
    # A training that goes on, and one that starts from it, take its network.
    code, out, err = cli(*told, "--out", tmp_path / "t", "--patch-size", "2,4", "--pair", "0:1")
    assert code == 0, err
    code, out, err = cli(*told, "--out", tmp_path / "u", "--from", tmp_path / "t" / "model.safetensors", "--json")
    assert (code, json.loads(out)["tokens"]) == (0, "8 of width 16")
    for wrong, said in (
        ("2,4,4", "a patch of 2x4x4 does not fit the grid (8, 8); pass one edge for all axes, or one edge per axis"),
        ("2,3", "the grid (8, 8) does not divide into patches of 2x3; change one of them"),
        ("two", "--patch-size two is not a list of whole numbers"),
        ("0", "must be at least 1"),
    ):
        code, out, err = cli(*told, "--out", tmp_path / "v", "--patch-size", wrong)
        assert (code, said in err, err.count("\n")) == (2, True, 1), err
    code, out, err = cli(*told[:7], "--out", tmp_path / "v", "--preset", "small", "--dry-run")
    assert "model: SiT with 8 blocks of width 128, patch 1\n" in out
    assert "tokens: 64 of width 128\n" in out


def test_tokens_narrower_than_their_patches_are_warned_of(cli, tmp_path) -> None:
    # A network of such tokens learned nothing of 66 x 4 numbers at width 32, and made noise of 192 at width 96.
    network = ("--width", 8, "--depth", 1, "--heads", 2, "--steps", 1, "--dry-run", "--out", tmp_path / "run")
    _, _, narrow = cli("train", "--data", "digits", "--patch-size", 4, *network)
    assert "a patch of 4 has 16 values but a token only 8" in narrow and "--width 16 or more" in narrow
    assert cli("train", "--data", "digits", "--patch-size", 2, *network)[2] == ""


def test_the_size_counts_what_is_trained(digits) -> None:
    plan = replace(PLAN, pairs=(*PAIR, LayerPair("blocks.2", "blocks.5")), sync=SyncOptions(pair_weights=(1.0, 0.5)))
    backbone = _start()
    forecast = training_runs.training_size(backbone, digits, plan, num_processes=2)
    # The positions are fixed and not learned.
    sizes = {name: tensor.numel() for name, tensor in backbone.module.named_parameters() if tensor.requires_grad}
    assert forecast["parameters"] == sum(sizes.values())
    assert forecast["tokens"] == "16 of width 16"
    assert forecast["epochs"] == round(20 * 16 / len(digits.train), 2)
    assert (forecast["pairs"], forecast["weights"]) == (["blocks.1 <- blocks.4", "blocks.2 <- blocks.5"], [0.3, 0.15])
    assert forecast["processes"] == 2


@pytest.fixture(scope="module")
def interrupted(digits, tmp_path_factory):
    """A training with a tracker, stopped at step 13 and continued; the folder and what the tracker got."""
    folder, sent, patch = tmp_path_factory.mktemp("run") / "t", [], pytest.MonkeyPatch()
    service = type("Service", (), {"Settings": lambda **_: None, "finish": lambda: None})
    service.init = lambda **options: type("Run", (), {"log": lambda _, row, step: sent.append((step, row))})()
    patch.setitem(sys.modules, "wandb", service)
    plan = replace(PLAN, pairs=PAIR)

    def stop(what: str, step: int, steps: int) -> None:
        if step == 13:
            raise KeyboardInterrupt

    def run(**options) -> None:
        training_runs.train_run(_start(), digits, plan, folder, trackers=["wandb"], warn=pytest.fail, **options)

    try:
        with pytest.raises(KeyboardInterrupt):
            run(progress=stop)
        assert not (folder / "curves.png").exists()
        run()
        yield folder, sent, run
    finally:
        patch.undo()


def test_trackers_get_the_log_and_the_held_out_losses_once(interrupted) -> None:
    folder, sent, _ = interrupted
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    logged = [(step, row) for step, row in sent if "loss" in row]
    assert [step for step, _ in logged] == [row["step"] for row in log] == list(range(2, 21, 2))
    # Numbers of the steps that were done twice are the same both times, but for how fast they were.
    assert [row["loss"] for _, row in logged] == [row["loss"] for row in log]
    held_out = pd.read_csv(folder / "held_out.csv", index_col="step")
    observed = {step: row for step, row in sent if "held-out loss 0.5" in row}
    assert list(observed) == list(held_out.index) == list(range(0, 21, 2))
    assert observed[20]["held-out loss 0.5"] == pytest.approx(held_out.loc[20, "noise level 0.5"], abs=1e-6)


def test_curves_are_drawn_once(interrupted) -> None:
    folder, _, run = interrupted
    before = (folder / "curves.png").stat().st_mtime_ns
    run()
    assert (folder / "curves.png").stat().st_mtime_ns == before
    whole = (folder / "curves.svg").read_bytes()
    (folder / "curves.svg").unlink()  # as if the process had been killed while it drew
    run()
    assert (folder / "curves.svg").read_bytes() == whole


def test_a_tracker_that_is_down_ends_no_training(digits, tmp_path, monkeypatch) -> None:
    def refuse(**options: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "wandb", type("Down", (), {"Settings": lambda **_: None, "init": refuse}))
    warnings: list[str] = []
    plan = replace(PLAN, steps=1)
    training_runs.train_run(_start(), digits, plan, tmp_path / "t", trackers=["wandb"], warn=warnings.append)
    assert (tmp_path / "t" / "model.safetensors").is_file()
    assert len(warnings) == 1
    assert "wandb failed and gets no more rows (ConnectionError: no route to host)" in warnings[0]


def test_auto_decides_on_the_way(digits, tmp_path) -> None:
    plan = replace(PLAN, steps=7, log_every=50)
    auto = training_runs.auto_pick(digits, plan, tmp_path / "t", begin=4, every=2)
    assert training_runs.training_size(_start(), digits, plan, auto=auto)["decisions_at"] == [4, 6]
    training_runs.train_run(_start(), digits, plan, tmp_path / "t", auto=auto, warn=pytest.fail)
    decisions = [json.loads(line) for line in (tmp_path / "t" / "decisions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in decisions] == [4, 6]
    with pytest.raises(ValueError, match="the first pick at step 1000 is not before the end at step 7"):
        training_runs.auto_pick(digits, plan, tmp_path)


def _titles(figure) -> str:
    return " ".join([figure.get_suptitle(), *(axes.get_title("left") for axes in figure.axes)]).replace("\n", " ")


def test_the_figure_says_what_is_in_the_tables() -> None:
    log = pd.DataFrame({"step": [50, 100, 150], "loss": [1.0, 0.5, 0.4], "cosine a <- b": [None, 0.6, 0.754]})
    held_out = pd.DataFrame(
        {"step": [150, 0, 75], "noise level 0.1": [0.6, 2.0, 0.4], "noise level 0.9": [0.2, 1.0, 0.2]}
    )
    figure = training_plots.training_curves(log, held_out)
    assert "fell from 1.5 to 0.4 between steps 0 and 150, with its lowest value, 0.3, at step 75" in _titles(figure)
    assert "a <- b ended at a cosine of 0.75" in _titles(figure)
    assert len(figure.axes) == 3
    assert [axes.get_ylabel() for axes in figure.axes] == [*["loss (squared error)"] * 2, "cosine (1: same direction)"]
    assert figure.axes[-1].get_xlabel() == "training step"
    plain = training_plots.training_curves(log[["step", "loss"]], held_out.iloc[:2])
    assert (len(plain.axes), "lowest" in _titles(plain)) == (2, False)


def test_nothing_to_draw() -> None:
    empty = pd.DataFrame({"step": [], "loss": []})
    with pytest.raises(ValueError, match="the training has not logged anything yet"):
        training_plots.training_curves(empty, empty)
