"""The tables that the analyses are gathered in, on stores with planted content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from layerprobe.analyses.measures import effective_rank, lidar, spectrum
from layerprobe.analyses.measures.cka import linear_cka
from layerprobe.analyses.measures.knn import knn_accuracy
from layerprobe.analyses.measures.linear_probes import linear_probe
from layerprobe.analyses.measures.logistic import search
from layerprobe.analyses.measures.neighbor_graphs import cknna, mutual_knn, neighbor_graph
from layerprobe.analyses.tables import measurements as measurements_module
from layerprobe.analyses.tables.csv_files import write_table
from layerprobe.analyses.tables.measurements import Measurement, Representation
from layerprobe.analyses.tables.quality import QUALITY_COLUMNS, bootstrap_interval, measure, read_quality
from layerprobe.analyses.tables.similarity import SIMILARITY_COLUMNS, read_similarity
from layerprobe.extraction.features import SPLITS, FeatureStore, begin_store, shard_path, write_tensors

Array = NDArray[Any]
NUM = 150
LAYERS = ("blocks.0", "blocks.1", "blocks.2")
LEVELS = (0.0, 0.5)


def make_store(
    folder: Path,
    *,
    layers: tuple[str, ...] = LAYERS,
    draws: int = 1,
    labeled: bool = True,
    splits: Array | None = None,
    changes: dict[tuple[str, float], Any] | None = None,
    seed: int = 0,
) -> FeatureStore:
    """Three layers of width 6, of which the second shows three classes best, and everything less with noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, NUM)
    centers = rng.normal(size=(3, 6))
    strength = dict(zip(layers, (0.5, 3.0, 1.0), strict=False))
    tensors = {}
    for layer in layers:
        levels = []
        for level in LEVELS:
            shape = (draws, NUM, 6)
            x = centers[labels] * strength[layer] * (1 - level) + rng.normal(size=shape)
            change = (changes or {}).get((layer, level))
            levels.append(x if change is None else change(x))
        tensors[layer] = np.stack(levels).astype(np.float32)
    manifest = {"plan": {"layers": layers, "noise_levels": LEVELS, "draws": draws}, "num_shards": 1}
    splits = np.arange(NUM) // 50 if splits is None else splits
    samples = {"ids": np.arange(NUM), "splits": splits} | ({"labels": labels} if labeled else {})
    begin_store(folder, manifest, samples)
    write_tensors(shard_path(folder, 0), tensors)
    return FeatureStore.open(folder)


def value(table: pd.DataFrame, **where: Any) -> Any:
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    assert len(table) == 1
    return table["value"].item()


def test_tables_hold_every_row_once_and_the_agreed_columns(tmp_path: Path) -> None:
    stores = {
        "model": make_store(tmp_path / "model"),
        "random weights": make_store(tmp_path / "random", seed=1),
        "raw input": make_store(tmp_path / "raw", layers=("input",)),
    }
    quality, similarity = measure(stores)
    assert tuple(quality.columns) == QUALITY_COLUMNS
    assert tuple(similarity.columns) == SIMILARITY_COLUMNS
    # (3 + 3 + 1) layers at 2 noise levels; four metrics on two splits and five on one.
    assert len(quality) == 7 * 2 * (4 * 2 + 5)
    assert not quality.duplicated(["source", "layer", "noise_level", "metric", "split"]).any()
    assert set(quality[quality["source"] == "raw input"]["layer_index"]) == {-1}
    indices = quality[quality["source"] == "model"].groupby("layer")["layer_index"].first()
    assert indices.to_dict() == {"blocks.0": 0, "blocks.1": 1, "blocks.2": 2}
    assert len(similarity) == (3 * 2) ** 2
    assert SPLITS == ("train", "validation", "test")


def test_values_are_those_of_the_analyses(tmp_path: Path) -> None:
    store = make_store(tmp_path / "model")
    quality, similarity = measure({"model": store})
    x, y = store["blocks.1", 0.5], store.labels
    assert y is not None
    fit, choose, report = (store.splits == split for split in SPLITS)
    probe = linear_probe(x[fit], y[fit], x[choose], y[choose], x[report], y[report])
    knn = knn_accuracy(x[fit], y[fit], x[report], y[report], k=10)
    at: dict[str, Any] = {"layer": "blocks.1", "noise_level": 0.5}
    assert value(quality, metric="probe accuracy", split="validation", **at) == probe.validation_accuracy
    assert value(quality, metric="probe accuracy", split="test", **at) == probe.test_accuracy
    assert value(quality, metric="knn accuracy", split="test", **at) == knn.accuracy
    assert value(quality, metric="effective rank", split="train", **at) == effective_rank(x[fit])
    pair = similarity[
        (similarity["layer_a"] == "blocks.1")
        & (similarity["noise_level_a"] == 0.5)
        & (similarity["layer_b"] == "blocks.0")
        & (similarity["noise_level_b"] == 0.0)
    ]
    expected = linear_cka(x[choose], store.features("blocks.0", 0.0, split="validation"))
    assert pair["cka"].item() == pytest.approx(expected, abs=1e-6)
    graphs = [neighbor_graph(z, k=10) for z in (x[choose], store.features("blocks.0", 0.0, split="validation"))]
    assert pair["mutual_knn"].item() == pytest.approx(mutual_knn(graphs).values[0, 1])
    assert pair["cknna"].item() == pytest.approx(cknna(graphs).values[0, 1])
    assert value(quality, metric="participation ratio", **at) == spectrum(x[fit]).participation_ratio
    assert value(quality, metric="balanced probe accuracy", split="test", **at) == probe.test.balanced_accuracy
    note = quality[(quality["layer"] == "blocks.1") & (quality["metric"] == "probe accuracy")]["note"].iloc[0]
    assert note.startswith("C=")
    assert "gradient norm" in note


def test_finds_the_layer_with_the_planted_labels(tmp_path: Path) -> None:
    quality, _ = measure({"model": make_store(tmp_path / "model")})
    for metric in ("probe accuracy", "knn accuracy"):
        rows = quality[(quality["metric"] == metric) & (quality["split"] == "test") & (quality["noise_level"] == 0.0)]
        assert rows.set_index("layer")["value"].idxmax() == "blocks.1"


def test_intervals_hold_the_value_and_only_accuracies_have_one(tmp_path: Path) -> None:
    quality, _ = measure({"model": make_store(tmp_path / "model")})
    accuracies = quality["metric"].isin(["probe accuracy", "knn accuracy"])
    scored = quality[accuracies]
    assert ((scored["low"] <= scored["value"]) & (scored["value"] <= scored["high"])).all()
    assert quality[~accuracies][["low", "high"]].isna().all(axis=None)


def test_draws_are_averaged(tmp_path: Path) -> None:
    store = make_store(tmp_path / "model", draws=2)
    quality, similarity = measure({"model": store})
    y = store.labels
    assert y is not None
    fit, choose, report = (store.splits == split for split in SPLITS)
    draws = [store.features("blocks.2", 0.5, draw=d) for d in (0, 1)]
    assert not np.array_equal(*draws)
    probes = [linear_probe(x[fit], y[fit], x[choose], y[choose], x[report], y[report]) for x in draws]
    at: dict[str, Any] = {"layer": "blocks.2", "noise_level": 0.5}
    expected = np.mean([p.test_accuracy for p in probes])
    assert value(quality, metric="probe accuracy", split="test", **at) == pytest.approx(expected)
    expected = np.mean([effective_rank(x[fit]) for x in draws])
    assert value(quality, metric="effective rank", **at) == pytest.approx(expected)
    expected = np.mean(
        [
            linear_cka(x[choose], store.features("blocks.0", 0.0, draw=d, split="validation"))
            for d, x in enumerate(draws)
        ]
    )
    rows = similarity.set_index(["layer_a", "noise_level_a", "layer_b", "noise_level_b"])["cka"]
    assert rows["blocks.2", 0.5, "blocks.0", 0.0] == pytest.approx(expected)
    ranked = lidar(np.stack([x[fit] for x in draws], axis=1)).rank
    assert value(quality, metric="LiDAR", **at) == pytest.approx(ranked)


def test_without_labels_only_what_needs_none(tmp_path: Path) -> None:
    quality, similarity = measure({"model": make_store(tmp_path / "model", labeled=False)})
    unlabeled = {"effective rank", "RankMe", "participation ratio", "spectrum exponent", "anisotropy"}
    assert set(quality["metric"]) == unlabeled
    assert len(similarity) == 36


def test_without_the_model_there_is_no_similarity(tmp_path: Path) -> None:
    quality, similarity = measure({"random weights": make_store(tmp_path / "random")})
    assert set(quality["source"]) == {"random weights"}
    assert similarity.empty
    assert tuple(similarity.columns) == SIMILARITY_COLUMNS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: np.ones_like(x), "the features are the same for all samples"),
        (lambda x: np.where((np.arange(NUM) == 60)[:, None], np.nan, x), "the features hold nan or inf"),
    ],
)
def test_unusable_features_are_nan_with_a_reason_and_leave_the_rest_alone(
    tmp_path: Path, change: Any, reason: str
) -> None:
    expected, similar = measure({"model": make_store(tmp_path / "good")})
    store = make_store(tmp_path / "bad", changes={("blocks.0", 0.5): change})
    quality, similarity = measure({"model": store})
    bad = (quality["layer"] == "blocks.0") & (quality["noise_level"] == 0.5)
    assert bad.sum() == 4 * 2 + 1
    assert quality[bad]["value"].isna().all()
    assert set(quality[bad]["note"]) == {reason}
    same = (expected["layer"] != "blocks.0") | (expected["noise_level"] != 0.5)
    pd.testing.assert_frame_equal(quality[~bad].reset_index(drop=True), expected[same].reset_index(drop=True))
    bad = (similarity["layer_a"] == "blocks.0") & (similarity["noise_level_a"] == 0.5)
    bad |= (similarity["layer_b"] == "blocks.0") & (similarity["noise_level_b"] == 0.5)
    assert similarity[bad]["cka"].isna().all()
    np.testing.assert_allclose(similarity[~bad]["cka"], similar[~bad]["cka"], atol=1e-6)


def test_an_analysis_of_ones_own_adds_its_rows(tmp_path: Path) -> None:
    def largest(representation: Representation) -> list[Measurement]:
        x = representation.part(representation.draws[0], "test")
        return [Measurement("largest", "test", float(x.max()), "mine", x.max(axis=1))]

    store = make_store(tmp_path / "model")
    quality, _ = measure({"model": store}, analyses=[largest])
    assert set(quality["metric"]) == {"largest"}
    x = store.features("blocks.1", 0.5, split="test")
    assert value(quality, layer="blocks.1", noise_level=0.5) == x.max()
    assert quality[["low", "high"]].notna().all(axis=None)


def test_features_that_are_constant_where_they_are_fitted_are_unusable(tmp_path: Path) -> None:
    def constant_where_fitted(x: Array) -> Array:
        return np.where((np.arange(NUM) < 50)[:, None], 0.0, x)

    store = make_store(tmp_path / "model", changes={("blocks.2", 0.0): constant_where_fitted})
    quality, _ = measure({"model": store})
    rows = quality[(quality["layer"] == "blocks.2") & (quality["noise_level"] == 0.0)]
    assert rows["value"].isna().all()
    assert set(rows["note"]) == {"the features are the same for all samples"}


def test_a_missing_similarity_alone_is_noted_at_the_effective_rank(tmp_path: Path) -> None:
    def constant_where_chosen(x: Array) -> Array:
        return np.where((np.arange(NUM) // 50 == 1)[:, None], 0.0, x)

    store = make_store(tmp_path / "model", changes={("blocks.2", 0.0): constant_where_chosen})
    quality, _ = measure({"model": store})
    notes = quality[(quality["metric"] == "effective rank") & quality["note"].str.contains("no CKA")]
    assert notes["layer"].tolist() == ["blocks.2"]
    assert notes["note"].item() == "at most 6; no CKA: the features are the same for all samples"


def test_a_fit_that_did_not_converge_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfinished(*args: Any, **kwargs: Any) -> Any:
        result = linear_probe(*args, **kwargs)
        object.__setattr__(result, "converged", False)
        return result

    monkeypatch.setattr(measurements_module, "linear_probe", unfinished)
    quality, _ = measure({"model": make_store(tmp_path / "model")})
    notes = quality[quality["metric"] == "probe accuracy"]["note"]
    assert notes.str.endswith("; 1 of 1 fits did not converge").all()


def test_a_choice_at_the_end_of_the_search_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "INVERSE_PENALTIES", (1e-6, 1e-1))
    monkeypatch.setattr(search, "WEAKER", ())
    monkeypatch.setattr(search, "STRONGER", ())
    quality, _ = measure({"model": make_store(tmp_path / "model", draws=2)})
    probed = quality[(quality["metric"] == "probe accuracy") & (quality["split"] == "validation")]
    at_end = probed["note"].str.endswith("; 2 of 2 fits took the last C of the search")
    assert (at_end == (probed["value"] < 1)).all()  # nothing is better than 1
    assert at_end.sum() == 5


def test_few_samples_have_few_neighbors(tmp_path: Path) -> None:
    """With all others as neighbors every two layers agree, and every vote is that of the commonest class."""
    splits = np.repeat([0, 1, 2], [8, 9, NUM - 17])
    quality, similarity = measure({"model": make_store(tmp_path / "model", splits=splits)})
    others = similarity["mutual_knn"][similarity["layer_a"] != similarity["layer_b"]]
    assert others.max() < 1
    assert set(quality[quality["metric"] == "knn accuracy"]["note"]) == {"k=4, cosine"}


def test_lidar_of_fewer_draws_than_directions_says_so(tmp_path: Path) -> None:
    splits = np.repeat([0, 1, 2], [6, 72, 72])
    few, _ = measure({"model": make_store(tmp_path / "few", draws=2, splits=splits)})
    enough, _ = measure({"model": make_store(tmp_path / "enough", draws=2)})
    notes = [set(quality[quality["metric"] == "LiDAR"]["note"]) for quality in (few, enough)]
    assert notes == [{"2 noise draws; depends on its ridge: too few draws for 6 directions"}, {"2 noise draws"}]


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    measure({"model": make_store(tmp_path / "model", draws=2)}, progress=lambda *at: seen.append(at))
    assert seen == [(i, 8) for i in range(1, 9)]


def test_same_seed_same_table(tmp_path: Path) -> None:
    store = make_store(tmp_path / "model")
    first, again, other = (
        measure({"model": store})[0],
        measure({"model": store})[0],
        measure({"model": store}, seed=1)[0],
    )
    pd.testing.assert_frame_equal(first, again)
    assert not first["low"].equals(other["low"])
    assert first["value"].equals(other["value"])


def test_bootstrap_interval_is_the_normal_one_for_many_samples() -> None:
    correct = np.random.default_rng(0).random((2, 4000)) < [[0.3], [0.9]]
    low, high = bootstrap_interval(correct, seed=0, resamples=5000)
    p = correct.mean(axis=1)
    half = 1.96 * np.sqrt(p * (1 - p) / 4000)
    # 5000 resamples know a 2.5 % quantile to about 2 % of the half-width; scores come in steps of 1/4000, 2 % of it
    # too.
    assert (np.abs(low - (p - half)) < 0.08 * half).all()
    assert (np.abs(high - (p + half)) < 0.08 * half).all()


def test_bootstrap_gives_a_row_the_same_interval_alone_and_among_others() -> None:
    correct = np.random.default_rng(0).random((3, 80)) < 0.5
    low, high = bootstrap_interval(correct, seed=5)
    alone_low, alone_high = bootstrap_interval(correct[1], seed=5)
    assert (alone_low, alone_high) == (low[1], high[1])


def test_tables_survive_the_file(tmp_path: Path) -> None:
    constant = {("blocks.0", 0.5): lambda x: np.ones_like(x)}
    quality, similarity = measure({"model": make_store(tmp_path / "model", changes=constant)})
    quality.loc[0, "layer"] = "null"
    write_table(quality, tmp_path / "quality.csv")
    write_table(similarity, tmp_path / "similarity.csv")
    pd.testing.assert_frame_equal(read_quality(tmp_path / "quality.csv"), quality)
    pd.testing.assert_frame_equal(read_similarity(tmp_path / "similarity.csv"), similarity)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "checksums.json",
        "quality.csv",
        "similarity.csv",
    ]


def test_refuses_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'model' has no samples in the split 'test'"):
        measure({"model": make_store(tmp_path / "two", splits=np.arange(NUM) // 75)})
    store = make_store(tmp_path / "one")
    store.labels = np.zeros(NUM, np.int64)
    with pytest.raises(ValueError, match="the training split of 'model' has one class only"):
        measure({"model": store})
    write_table(pd.DataFrame({"layer": ["a"]}), tmp_path / "other.csv")
    with pytest.raises(ValueError, match=r"other\.csv is damaged \(it has no column source"):
        read_quality(tmp_path / "other.csv")
