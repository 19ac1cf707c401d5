"""The front door on a tiny network: what it returns equals what the commands store."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
from tiny import tiny_samples, tiny_sit, tiny_splits

import layerprobe as lp
from layerprobe import ranks
from layerprobe.analyses.front import PairMatrix
from layerprobe.analyses.runs import RunFolder
from layerprobe.analyses.selection.records import RankedPair, Selection, SelectionBasis
from layerprobe.backbones import SiT
from layerprobe.extraction import ExtractionPlan, extract

BACKBONE = tiny_sit()
SAMPLES = tiny_samples(60)
LEVELS = (0.2, 0.6)


OPTIONS = {"noise_levels": LEVELS, "trust_convention": True}


@pytest.fixture(scope="module")
def run() -> lp.Run:
    return lp.probe(BACKBONE, SAMPLES.x, SAMPLES.labels, **OPTIONS)


def test_features_are_those_that_an_extraction_stores(tmp_path: Path) -> None:
    splits = tiny_splits(12)
    store = extract(BACKBONE, splits, ExtractionPlan(BACKBONE.layers, LEVELS, token_samples=99), tmp_path / "features")
    model, x = lp.open(BACKBONE), tiny_samples(12).x
    read = model.features(x, noise_level=LEVELS)
    tokens = model.features(x, noise_level=LEVELS, per_token=True)
    assert list(read) == list(tokens) == [(layer, level) for layer in BACKBONE.layers for level in LEVELS]
    for layer, level in read:
        assert np.array_equal(read[layer, level].numpy(), store[layer, level])
        assert np.array_equal(tokens[layer, level].numpy(), store.tokens(layer, level))


def test_one_layer_at_one_level_is_an_array() -> None:
    model = lp.open(BACKBONE)
    one = model.features(SAMPLES.x, "blocks.1", 0.2)
    assert torch.equal(one, model.features(SAMPLES.x, "blocks.*", [0.2])["blocks.1", 0.2])
    assert one.shape == (60, 16)
    for level in (np.float64(0.2), torch.tensor(0.2, dtype=torch.float64)):
        assert torch.equal(model.features(SAMPLES.x, "blocks.1", level), one)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"layers are named, got 1; pass a name such as 'blocks\.0'"):
        model.features(SAMPLES.x, 1, 0.2)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="a batch needs at least 1 row, got 0"):
        model.features(SAMPLES.x, "blocks.1", 0.2, batch_size=0)


def test_parts_of_blocks_are_read_by_name() -> None:
    model, attention = lp.open(BACKBONE), BACKBONE.module.get_submodule("blocks.1.attn")
    inputs = model.features(SAMPLES.x, "blocks.1.attn:input", 0.2, per_token=True)
    keys = model.features(SAMPLES.x, "blocks.1.attn.k", 0.2, per_token=True)
    weight, bias = (parameter.detach()[16:32] for parameter in (attention.qkv.weight, attention.qkv.bias))
    torch.testing.assert_close(keys, torch.nn.functional.linear(inputs, weight, bias))
    both = model.features(SAMPLES.x, ["blocks.*.attn.q", "blocks.2.mlp"], 0.2)
    assert [layer for layer, _ in both] == [*(f"blocks.{i}.attn.q" for i in range(3)), "blocks.2.mlp"]


def test_noise_belongs_to_the_id_and_the_label_to_the_condition() -> None:
    model = lp.open(BACKBONE)
    whole = model.features(SAMPLES.x, "blocks.2", 0.6)
    part = model.features(SAMPLES.x[7:9], "blocks.2", 0.6, ids=[7, 8])
    assert torch.allclose(part, whole[7:9], atol=1e-6)
    assert not torch.allclose(model.features(SAMPLES.x[7:9], "blocks.2", 0.6), whole[7:9], atol=1e-3)
    labeled = model.features(SAMPLES.x, "blocks.2", 0.6, labels=SAMPLES.labels)
    assert not torch.allclose(labeled, whole, atol=1e-3)
    last = model.backbone.num_classes - 1
    rows = torch.nonzero(SAMPLES.labels == last)[:2, 0]
    with warnings.catch_warnings(action="ignore"):  # two samples may have no value below 0
        few = model.features(SAMPLES.x[rows], "blocks.2", 0.6, ids=rows, labels=[last] * len(rows))
    assert torch.allclose(few, labeled[rows], atol=1e-6)
    for labels in ([9] * 7, ["cat"] * 7):
        with pytest.raises(ValueError, match=r"the labels condition .* classes; pass their numbers, counted from 0"):
            model.features(SAMPLES.x[:7], "blocks.2", 0.6, labels=labels)


def test_a_module_is_opened_with_what_it_does_not_say() -> None:
    said = {"layers": "blocks.*", "schedule": "sit", "prediction": "velocity", "shape": (1, 4, 4)}
    assert isinstance(BACKBONE.module, SiT)
    assert lp.open(BACKBONE.module, **said, num_classes=3).layers == BACKBONE.layers
    with pytest.raises(ValueError, match="a module does not say its layers"):
        lp.open(BACKBONE.module, schedule="sit")
    with pytest.raises(ValueError, match="a model cannot be opened from a dict; pass the path of a checkpoint"):
        lp.open(dict(BACKBONE.module.state_dict()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a backbone carries its shape"):
        lp.open(BACKBONE, shape=(1, 4, 4))
    with pytest.raises(ValueError, match=r"blocks\.9 is not in SiT"):
        lp.open(BACKBONE).features(SAMPLES.x, "blocks.9", 0.2)


def test_a_model_tells_what_it_is_and_whether_it_denoises() -> None:
    model = lp.open("digits")
    assert len(repr(model).splitlines()) <= 10
    assert "blocks.0, blocks.1, ..., blocks.7" in repr(model)
    assert "<td>8 (blocks.0, blocks.1, blocks.2" in model._repr_html_()
    assert "does not denoise" in lp.open(BACKBONE).check(SAMPLES.x[:9])


def test_a_run_in_memory_has_all_tables(run: lp.Run) -> None:
    assert run.report.is_file()
    assert run.quality["metric"].eq("probe accuracy").any()
    assert list(run.cka.index) == list(run.cka.columns) == list(BACKBONE.layers)
    assert np.allclose(np.diag(run.cka), 1)
    assert np.allclose(run.cka, run.cka.T)
    assert run.features("blocks.1", 0.2, split="test").shape[1] == 16
    assert run.pick is None or run.pairs.iloc[0][["student", "teacher"]].tolist() == [*vars(run.pick).values()]


def test_best_layers_are_chosen_on_validation_and_reported_on_test(run: lp.Run) -> None:
    best = run.best_layers(2)
    rows = run.quality[(run.quality["metric"] == "probe accuracy") & (run.quality["source"] == "model")]
    by_split = {split: part.set_index(["layer", "noise_level"])["value"] for split, part in rows.groupby("split")}
    chosen = (best["layer"].iloc[0], best["noise_level"].iloc[0])
    assert by_split["validation"][chosen] == by_split["validation"].max()
    assert best["probe accuracy"].iloc[0] == by_split["test"][chosen]
    assert best["layer"].is_unique
    assert {"random weights", "raw input"} <= set(best.columns)
    with pytest.raises(ValueError, match="the run has no 'accuracy'; use one of probe accuracy"):
        run.best_layers(metric="accuracy")
    error = "probe calibration error"
    errors = run.quality[(run.quality["metric"] == error) & (run.quality["source"] == "model")]
    least = errors[errors["split"] == "validation"].sort_values("value").iloc[0]
    first = run.best_layers(1, metric=error).iloc[0]
    assert (first["layer"], first["noise_level"]) == (least["layer"], least["noise_level"])


def test_a_run_without_labels_tells_its_best_layers_too(run: lp.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    labeled = run.quality["metric"].str.contains("probe|knn")
    monkeypatch.setattr(run, "quality", run.quality[~labeled])
    best = run.best_layers(len(BACKBONE.layers))
    assert best["effective rank"].is_monotonic_decreasing
    assert "effective rank" in str([axes.get_ylabel() for axes in run.plot().axes]).lower()
    assert sorted(best["layer"]) == sorted(BACKBONE.layers)
    assert f"richest: {best['layer'][0]} at noise level {best['noise_level'][0]:g}: effective rank" in repr(run)


def test_a_run_shows_itself(run: lp.Run) -> None:
    assert len(repr(run).splitlines()) <= 10
    assert "in memory: 60 samples" in repr(run)
    assert "<table" in run._repr_html_()
    for figure in (run.plot(), run.plot(kind="heatmap"), run.plot("cka")):
        assert isinstance(figure, matplotlib.figure.Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows, without pyplot
    with pytest.raises(ValueError, match="no confirmation; run `layerprobe confirm"):
        run.plot("confirmation")
    with pytest.raises(ValueError, match="the run has no 'gap'"):
        run.plot("gap")
    with pytest.raises(ValueError, match="unknown kind 'heat'; use curves or heatmap"):
        run.plot(kind="heat")  # type: ignore[arg-type]


def test_other_objects_are_refused_in_a_folder_and_objects_are_not_opened_again(run: lp.Run) -> None:
    with pytest.raises(ValueError, match="another run"):
        lp.probe(tiny_sit(seed=1), SAMPLES, out=run.path, **OPTIONS)
    plan = RunFolder(run.path).plan()
    with pytest.raises(ValueError, match=r"this run's network was passed as an object .* make a run from files"):
        plan.open()
    with pytest.raises(ValueError, match="this run's data set was passed as an object"):
        plan.data.load()


def test_a_temporary_run_goes_with_its_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerprobe.analyses.front.probing.probe_run", lambda plan, folder, **options: None)
    monkeypatch.setattr("layerprobe.analyses.front.run.Run", lambda folder: RunFolder(folder))
    run = lp.probe(BACKBONE, SAMPLES, noise_levels=LEVELS)
    folder = run.path
    assert folder.is_dir()
    del run
    assert not folder.exists()


def test_selection_and_pair_matrix_fit_ten_lines_and_escape_names() -> None:
    layers = tuple(f"<b>.{i}" for i in range(14))
    pair = RankedPair("", "", 1.0, 0.5, 1.5, (), 0.9, 0.5, 0.4, True, 0.3, 2, True, False)
    ranked = tuple(
        replace(pair, student=layers[s], teacher=layers[t], score=float(-s), ties_with_first=t == 13)
        for s in range(12)
        for t in (12, 13)
    )
    basis = SelectionBasis("probe accuracy", "validation", (0.1,), layers, (), (), (), 2, 0.95, 0.1, ())
    selection = Selection(basis, False, ranked, (), (), ())
    matrix = PairMatrix.of(selection)
    assert matrix.scores.shape == (12, 2)
    assert matrix.scores.loc[layers[3], layers[12]] == -3
    for shown in (selection, matrix):
        assert len(repr(shown).splitlines()) <= 11
        html = shown._repr_html_()
        assert 2 < html.count("<tr>") <= 10
        assert "<b>.1" not in html and "&lt;b&gt;.1" in html
    assert "24 pairs by probe accuracy, 0 refused" in repr(selection)
    assert selection._repr_html_().count(">yes<") == 4
    none = Selection(basis, False, (), (), (), ())
    assert PairMatrix.of(none)._repr_html_() == "<b>no admissible pair</b>"
    assert "<table>" not in none._repr_html_()
    assert "no pair" in repr(PairMatrix.of(none))


def test_features_in_memory_are_measured_as_those_of_a_run(
    run: lp.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = lp.open(BACKBONE).features(SAMPLES.x, noise_level=list(LEVELS))
    own = lp.analyze(features, SAMPLES.labels, ids=SAMPLES.ids)
    rows = ["layer", "noise_level", "metric", "split"]
    measured = [one.quality[one.quality["source"] == "model"].set_index(rows)["value"] for one in (run, own)]
    common = measured[1].index.intersection(measured[0].index)
    assert {"probe accuracy", "knn accuracy", "effective rank"} <= set(common.get_level_values("metric"))
    assert np.array_equal(measured[0][common].to_numpy(), measured[1][common].to_numpy(), equal_nan=True)
    assert own.cka.round(6).equals(run.cka.round(6))
    assert set(own.quality["source"]) == {"model"}
    assert {"no controls", "layers named"} <= {caution.code for caution in own.selection.cautions}
    assert own.report.is_file()
    assert (own.path / "figures" / "cka.png").is_file()
    assert len(repr(own).splitlines()) <= 10

    monkeypatch.setattr("layerprobe.analyses.runs.own_features.draw_figures", lambda run: None)  # seen above
    monkeypatch.setattr("layerprobe.analyses.runs.own_features.write_report", lambda run: None)
    np.savez(tmp_path / "own.npz", **{f"{layer}@{level}": x for (layer, level), x in features.items()})
    unlabeled = lp.analyze(tmp_path / "own.npz", out=tmp_path / "run")
    assert "probe accuracy" not in set(unlabeled.quality["metric"])
    with pytest.raises(ValueError, match="a file of features carries its labels and ids; store them in it"):
        lp.analyze(tmp_path / "own.npz", SAMPLES.labels)
    with pytest.raises(ValueError, match=r"run (holds|belongs)"):
        lp.analyze(features, out=tmp_path / "run")


def test_several_processes_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_block", ranks.Ranks(0, 2))
    with pytest.raises(ValueError, match=r"^several processes need a folder that all of them reach; pass out=$"):
        lp.probe("digits", "digits")
