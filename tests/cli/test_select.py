"""`select` as a question, and what a run keeps: its own selection, on which confirmation, figures and report stand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from layerprobe.analyses.runs import confirm, figures, probe
from layerprobe.analyses.runs.check import numbered_blocks
from layerprobe.analyses.runs.folder import RunFolder, RunPlan
from layerprobe.analyses.runs.text import describe_copies, describe_labels, describe_ownership, describe_selection
from layerprobe.analyses.selection import PairLimits
from layerprobe.analyses.tables import write_table
from layerprobe.checkpoints import CheckpointSource
from layerprobe.data import DataSource
from layerprobe.extraction import ExtractionPlan

Cli = Callable[..., tuple[int, str, str]]
PLAN = RunPlan(
    CheckpointSource("digits"),
    DataSource("digits", num_train=150, num_validation=100, num_test=40),
    ExtractionPlan(noise_levels=(0.3,)),
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded model, without its figures."""
    run = tmp_path_factory.mktemp("select") / "run"
    probe.measure_run(PLAN, run, device="cpu", batch_size=512)
    return run


@pytest.fixture
def run(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run; its figures are not rendered, which takes most of the time."""
    monkeypatch.setattr(figures, "save_figure", lambda figure, folder, name, **_: (Path(name),))
    monkeypatch.setattr("layerprobe.analyses.report.inline_svg.to_svg", lambda figure: '<svg viewBox="0 0 1 1"></svg>')
    copy = Path(shutil.copytree(measured, tmp_path / "run"))
    (copy / "checksums.json").unlink()  # tests change its records by hand
    return copy


def set_verdict(run: Path, verdict: str) -> None:
    path = run / "convention.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verdict": verdict}))


def test_a_what_if_leaves_the_selection_of_the_run(run: Path, cli: Cli) -> None:
    before = (run / "selection.json").read_bytes()
    own = RunFolder(run).selection()
    assert own.pick is not None
    code, out, _ = cli("select", run, "--max-cka", -1)
    assert code == 0
    assert out.startswith(f"what-if  the run keeps its own selection ({own.pick}); `layerprobe select --keep` replaces")
    assert "pick     none. No pair is admissible." in out
    for options in (("--criteria", "CKA"), ("--label-free",), ("--min-distance", 5)):
        code, out, _ = cli("select", run, *options, "--json")
        assert (code, json.loads(out)["is_kept"]) == (0, False)
    assert (run / "selection.json").read_bytes() == before
    code, out, _ = cli("select", run)
    assert (code, "what-if" in out) == (0, False)
    assert (run / "selection.json").read_bytes() == before


def test_a_selection_is_kept_on_request_and_stays_when_the_run_is_repeated(run: Path, cli: Cli) -> None:
    own = RunFolder(run).selection()
    code, out, _ = cli("select", run, "--min-distance", 7, "--keep", "--json")
    assert (code, json.loads(out)["is_kept"]) == (0, True)
    kept = RunFolder(run).selection()
    assert kept.basis.min_distance == 7
    assert kept != own
    assert "No pick" in (run / "report.html").read_text(encoding="utf-8")
    assert probe.measure_run(PLAN, run, device="cpu") == kept
    again = probe.choose_layers(run)
    RunFolder(run).keep_selection(again)
    assert RunFolder(run).selection() == kept
    assert describe_ownership(run, again)[0].startswith("what-if  the run keeps its own selection (no pick)")
    assert describe_ownership(run, kept) == []


def test_a_selection_that_a_confirmation_stands_on_is_not_replaced(run: Path, cli: Cli) -> None:
    (run / "confirmation").mkdir()
    before = (run / "selection.json").read_bytes()
    code, out, err = cli("select", run, "--max-cka", -1, "--keep")
    assert (code, out) == (2, "")
    assert re.search(
        r"confirmation tests the run's own selection \(blocks.1 <- blocks.\d\); to keep another, copy", err
    )
    assert (run / "selection.json").read_bytes() == before
    # The same pick for other reasons is no other pair.
    limits = PairLimits(max_cka=0.95)
    same = probe.choose_layers(run, limits=limits)
    assert same.pick == RunFolder(run).selection().pick
    RunFolder(run).keep_selection(same, replace=True)
    assert RunFolder(run).selection().basis.max_cka == 0.95


@pytest.mark.parametrize("verdict", ["unclear", "misfit"])
def test_without_a_fitting_convention_there_is_no_pick_unless_it_is_trusted(run: Path, verdict: str) -> None:
    folder = RunFolder(run)
    pick = folder.selection().pick
    set_verdict(run, verdict)
    selection = probe.choose_layers(run)
    assert selection.pick is None
    (objection,) = selection.refusal[1]
    assert objection.code == "network does not denoise"
    assert objection.value == pytest.approx(np.exp(folder.convention_check()[0].fits[0].score))
    assert describe_selection(selection)[0].startswith(
        "pick     none. No pair is admissible: the network does not deno"
    )
    record = json.loads(selection.to_json())
    assert (record["pick"], record["no_pick"][0]["code"]) == (None, "network does not denoise")
    folder.keep_selection(selection, replace=True)

    if verdict == "unclear":
        assert probe.measure_run(PLAN, run, device="cpu").pick is None
    trusting = probe.measure_run(PLAN, run, device="cpu", trust_convention=True)
    assert trusting.pick == pick
    assert f"The convention check says '{verdict}'" in describe_selection(trusting)[0]
    # Trust is given once.
    assert probe.measure_run(PLAN, run, device="cpu") == trusting == probe.choose_layers(run)


def test_a_verdict_is_not_replaced_by_one_on_fewer_arms_or_seeds(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = pd.DataFrame({"arm": ["baseline", "pick"] * 2, "seed": [0, 0, 1, 1]})
    monkeypatch.setattr(RunFolder, "verdict", lambda self: (curves, type("V", (), {"judged": "pick"})))
    training = confirm.confirmation_training(run, steps=2)
    for options, lost in (({"arms": ["none", "prior"]}, "the arm 'pick'"), ({"seeds": (1, 2)}, "seed 0")):
        with pytest.raises(
            ValueError, match=f"has a verdict on 'pick', and these options would .* without {lost}; ask"
        ):
            confirm.confirmation_job(run, training, device="cpu", num_evaluations=1, **options)
    assert not (run / "confirmation").exists()


def test_analyzing_again_keeps_what_was_measured_before(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(run)
    quality, selection = folder.quality(), folder.selection()
    own = quality.iloc[:3].assign(metric="a measure of my own")
    write_table(pd.concat([quality, own]), run / "quality.csv")
    selected = probe.analyze_run(run, analyses=())
    assert selected.label_free
    after = folder.quality()
    assert set(after["metric"]) == {*quality["metric"], "a measure of my own"}
    assert len(after) == len(quality) + 3
    assert folder.selection() == selection


def test_labels_are_told_by_the_test_accuracy_of_what_the_validation_split_chose(run: Path) -> None:
    quality = RunFolder(run).quality()
    row = quality[(quality["source"] == "model") & (quality["metric"] == "probe accuracy")].iloc[:1]
    told = pd.concat(
        [
            row.assign(metric="probe accuracy of who", layer=layer, split=split, value=value, source=source)
            for source, layer, split, value in (
                ("model", "blocks.1", "validation", 0.7),
                ("model", "blocks.2", "validation", 0.6),
                ("model", "blocks.1", "test", 0.5),
                ("model", "blocks.2", "test", 0.9),
                ("random weights", "blocks.1", "validation", 0.1),
                ("random weights", "blocks.2", "validation", 0.2),
                ("random weights", "blocks.1", "test", 0.4),
                ("random weights", "blocks.2", "test", 0.3),
            )
        ]
    )
    write_table(pd.concat([quality, told]), run / "quality.csv")
    (line,) = [line for line in describe_labels(run) if "who" in line]
    assert line == "knows    who: 0.50 at blocks.1, noise level 0.3 (random weights 0.30)"


def test_cka_of_a_pair_is_that_of_the_stated_samples(run: Path) -> None:
    """By the plain formula of the debiased HSIC, on the samples of the small extraction."""
    folder = RunFolder(run)
    pair = folder.selection().ranked[0]
    store = folder.store("evidence")
    assert len(store.splits) == store.manifest["num_samples"]

    def hsic(k: Any, m: Any) -> float:
        n = len(k)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        one = np.ones(n)
        first = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / (n - 1) / (n - 2)
        return float((first - 2 / (n - 2) * (one @ k @ m @ one)) / n / (n - 3))

    values = []
    for draw in range(store.draws):
        x, y = (store.features(layer, 0.3, draw=draw).astype(np.float64) for layer in (pair.student, pair.teacher))
        k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
        values.append(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)))
    # The evidence is kept with six digits.
    assert pair.mean_cka == pytest.approx(np.mean(values), abs=2e-6)


def test_what_cannot_be_measured_is_refused_before_the_extraction(tmp_path: Path) -> None:
    few = replace(PLAN, data=replace(PLAN.data, num_validation=3))
    with pytest.raises(
        ValueError, match="validation split has 3 samples, and comparing layers needs 4; pass more data"
    ):
        probe.extract_run(few, tmp_path / "few", device="cpu")
    splits = PLAN.data.probing_splits()
    splits.train.labels = torch.zeros(len(splits.train), dtype=torch.long)
    with pytest.raises(ValueError, match="training split has one class only, and a probe needs two"):
        probe.check_samples(splits)
    assert not (tmp_path / "few").exists()


def test_copies_are_told_with_their_numbers(run: Path) -> None:
    assert describe_copies(run) == []
    record = json.loads((run / "data.json").read_text())
    assert record["samples"] == {"train": 150, "validation": 100, "test": 40}
    record["copies"] = [{"split": "test", "of": "train", "num": 3, "total": 63, "is_left_out": True}]
    (run / "data.json").write_text(json.dumps(record))
    assert describe_copies(run)[0].startswith("copies   3 of 63 test samples are copies")


def set_layers(run: Path, layers: list[str] | None) -> None:
    path = run / "plan.json"
    record = json.loads(path.read_text())
    record["checkpoint"]["layers"] = layers
    path.write_text(json.dumps(record))


def test_the_pick_is_written_as_other_trainers_count(run: Path, cli: Cli) -> None:
    pick = RunFolder(run).selection().pick
    assert pick is not None
    student, teacher = (int(name.removeprefix("blocks.")) for name in (pick.student, pick.teacher))
    code, out, _ = cli("select", run, "--for", "sra")
    assert code == 0
    assert f"for      sra, of 8 blocks\n--block-out-s {student + 1} --block-out-t {teacher + 1}\nnote     SRA" in out
    code, out, _ = cli("select", run, "--for", "simpletuner-crepa", "--json")
    options = json.loads(json.loads(out)["for"]["options"])
    assert (options["crepa_block_index"], options["crepa_teacher_block_index"]) == (student, teacher)
    code, out, _ = cli("select", run, "--for", "repa")
    assert f"\n--encoder-depth {student + 1} --proj-coeff 0.5\nnote" in out
    code, out, _ = cli("select", run, "--for", "sra", "--max-cka", -1)
    assert (code, out.splitlines()[-1]) == (0, "for      sra: there is no pick to write")


def test_blocks_are_counted_through_all_of_the_network_or_the_pick_is_not_written(run: Path, cli: Cli) -> None:
    before = (run / "selection.json").read_bytes()
    set_layers(run, ["blocks.0", "blocks.4"])
    refused = cli("select", run, "--for", "sra", "--min-distance", 7, "--keep")
    assert refused[:2] == (2, "")
    assert "layers that --layers blocks.0,blocks.4 names, which need not be all blocks" in refused[2]
    assert (run / "selection.json").read_bytes() == before
    pick = RunFolder(run).selection().pick
    assert pick is not None
    student = int(pick.student.removeprefix("blocks."))
    code, out, _ = cli("select", run, "--for", "sra", "--blocks", "double_blocks:3,blocks:8")
    assert (code, f"--block-out-s {student + 4} " in out) == (0, True)
    for arguments, message in (
        (
            ("--for", "sra", "--blocks", 2),
            r"blocks\.\d of the pick is not among the 2 blocks blocks.0 to blocks.1",
        ),
        (("--for", "flux"), "unknown trainer 'flux'; use simpletuner,"),
        (("--blocks", 8), "--blocks counts the blocks for another trainer; pass --for too"),
    ):
        code, out, err = cli("select", run, *arguments)
        assert (code, out) == (2, "")
        assert re.search(message, err)


@pytest.mark.parametrize(
    ("layers", "is_counted"),
    [
        (("double.0", "double.1", "single.0", "single.1"), True),
        (("down.0", "down.1", "mid", "up.0"), False),
        (("blocks.1", "blocks.2", "blocks.3", "blocks.4"), False),
        (("double.0", "single.0", "double.1", "single.1"), False),
        (("blocks.0.attn", "blocks.1.attn", "blocks.2.attn", "blocks.3.attn"), False),
    ],
)
def test_layers_that_are_no_numbered_blocks_are_not_counted(
    run: Path, layers: tuple[str, ...], is_counted: bool
) -> None:
    own = RunFolder(run).selection()
    selection = replace(own, basis=replace(own.basis, layers=layers))
    if is_counted:
        assert numbered_blocks(run, selection) == layers
    else:
        with pytest.raises(ValueError, match=r"is no block of a numbered list, so other trainers cannot count it"):
            numbered_blocks(run, selection)


def test_the_checks_of_the_pick_are_told_with_their_codes(run: Path, cli: Cli) -> None:
    first = ("--skip-first", 0)
    out = cli("select", run, *first)[1]
    assert "caution  LP004: the student is at 0.12 of the depth; the earliest published one is at 0.14" in out
    record = json.loads(cli("select", run, *first, "--json")[1])
    assert [finding["code"] for finding in record["findings"]] == ["LP004"]
    assert "LP0" not in cli("select", run)[1]


def test_features_stand_beside_the_controls_and_are_not_recommended_where_they_mean_nothing(
    run: Path, cli: Cli
) -> None:
    features = json.loads(cli("select", run, "--json")[1])["answers"]["features"]
    over = features["over_control"]
    assert over["control"] == "raw input"
    assert over["gain"]["value"] == pytest.approx(over["cell"]["value"] - over["control_cell"]["value"])
    assert over["gain"]["high"] < 0
    assert "from the raw input, so it is surely below it." in cli("select", run)[1]
    free = json.loads(cli("select", run, "--label-free", "--json")[1])["answers"]
    assert (free["features"]["over_control"], free["training"], free["separable"]) == (None, None, None)
    set_verdict(run, "unclear")
    code, out, _ = cli("select", run)
    assert (code, "so its features mean nothing" in out, "richest features" in out) == (0, True, False)


def test_depths_through_single_layers_that_were_named_are_a_caution(run: Path, cli: Cli) -> None:
    sign = "caution  Depths are counted through the 8 layers that --layers names"
    for layers, is_told in ((None, False), (["blocks.*"], False), (["blocks.0", "blocks.4"], True)):
        set_layers(run, layers)
        assert (sign in cli("select", run)[1]) is is_told


def test_a_pick_is_not_silently_aligned_in_a_network_of_another_depth(run: Path, tmp_path: Path, cli: Cli) -> None:
    network = ("--width", 16, "--heads", 2, "--steps", 1, "--dry-run", "--out", tmp_path / "training")
    for depth, is_told in ((12, True), (8, False)):
        code, _, err = cli("train", "--data", "digits", *network, "--depth", depth, "--selection", run)
        assert code == 0
        assert (f"measured a network of 8 layers and this one has {depth}, so its pick lies" in err) is is_told
