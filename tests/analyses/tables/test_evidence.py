"""The evidence table: its numbers are those of the analyses one by one, its intervals those of resampling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_samples, tiny_sit, tiny_splits

from layerprobe.analyses.measures.cka import cka_matrix
from layerprobe.analyses.measures.jackknife import Z95
from layerprobe.analyses.measures.neighbor_graphs import cknna, neighbor_graph
from layerprobe.analyses.measures.recoverability import TokenMoments, recoverability
from layerprobe.analyses.measures.spatial import spatial_structure
from layerprobe.analyses.measures.spectrum import effective_rank, lidar
from layerprobe.analyses.tables import evidence as e
from layerprobe.analyses.tables.evidence import (
    CRITERIA,
    EVIDENCE_COLUMNS,
    NEED_LABELS,
    ScoreKeeper,
    pair_evidence,
    read_evidence,
    write_evidence,
)
from layerprobe.analyses.tables.measurements import Representation, neighbors, probes
from layerprobe.analyses.tables.quality import measure
from layerprobe.data.samples import Splits, TensorSamples
from layerprobe.extraction.ablation import ablate_layers
from layerprobe.extraction.evidence import extract_evidence, pair_layers
from layerprobe.extraction.features import FeatureStore
from layerprobe.extraction.forward import extract
from layerprobe.extraction.plan import ExtractionPlan

LEVELS = (0.2, 0.6)
LAYERS = tuple(f"blocks.{i}" for i in range(4))
SHAPE = (1, 8, 8)
PAIR = ("blocks.1", "blocks.3")


def model(**options: Any) -> Any:
    return tiny_sit(depth=4, shape=SHAPE, **options)


def plan(**options: Any) -> ExtractionPlan:
    return ExtractionPlan(LAYERS, LEVELS, **options)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return tiny_splits(120, shape=SHAPE)


@pytest.fixture(scope="module")
def store(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return extract_evidence(model(), splits, plan(), tmp_path_factory.mktemp("evidence") / "store")


@pytest.fixture(scope="module")
def table(store: FeatureStore) -> pd.DataFrame:
    return pair_evidence(store)


def row(table: pd.DataFrame, criterion: str, level: float | None = None, pair: tuple[str, str] = PAIR) -> Any:
    found = table[(table["criterion"] == criterion) & (table["student"] == pair[0]) & (table["teacher"] == pair[1])]
    found = found[found["noise_level"].isna()] if level is None else found[found["noise_level"] == level]
    assert len(found) == 1
    return next(found.itertuples())


def samples_of(store: FeatureStore, layer: str, level: float) -> Any:
    """Choose, then fit, under both draws: (n, 2, D)."""
    draws = np.stack([store.features(layer, level, draw=d) for d in range(2)], axis=1)
    return np.concatenate([draws[store.splits == split] for split in ("validation", "train")])


def test_every_pair_has_every_criterion_at_every_level_once(table: pd.DataFrame) -> None:
    assert tuple(table.columns) == EVIDENCE_COLUMNS
    assert not table.duplicated(["student", "teacher", "criterion", "noise_level"]).any()
    of_pair = table[(table["student"] == PAIR[0]) & (table["teacher"] == PAIR[1])]
    known = [name for name in CRITERIA if name not in NEED_LABELS]
    fixed = [e.STUDENT_DEPTH, e.TEACHER_DEPTH, e.DISTANCE]
    assert sorted(of_pair["criterion"]) == sorted([*fixed, *(3 * [name for name in known if name not in fixed])])
    assert len(table[["student", "teacher"]].drop_duplicates()) == 6
    assert not table["needs_labels"].any()


def test_depths_are_positions_among_the_layers(table: pd.DataFrame) -> None:
    found = [row(table, name).value for name in (e.STUDENT_DEPTH, e.TEACHER_DEPTH, e.DISTANCE)]
    assert found == pytest.approx([1 / 3, 1.0, 2 / 3])


@pytest.mark.parametrize("level", LEVELS)
def test_the_values_are_those_of_the_analyses(store: FeatureStore, table: pd.DataFrame, level: float) -> None:
    student, teacher = (samples_of(store, layer, level) for layer in PAIR)
    ranks = [[lidar(x).debiased_rank, effective_rank(x[:, 0])] for x in (student, teacher)]
    ckas = [cka_matrix([student[:, d], teacher[:, d]]).values[0, 1] for d in range(2)]
    graphs = [[neighbor_graph(x[:, d], k=10) for x in (student, teacher)] for d in range(2)]
    expected = {
        e.TEACHER_LIDAR: ranks[1][0],
        e.LIDAR_GAP: np.log(ranks[1][0] / ranks[0][0]),
        e.RANK_GAP: np.log(ranks[1][1] / ranks[0][1]),
        e.CKA: np.mean(ckas),
        e.CKNNA: np.mean([cknna(of_draw).values[0, 1] for of_draw in graphs]),
    }
    tokens = {
        (layer, draw): store.tokens(layer, level, draw=draw, split="validation").astype(np.float64)
        for layer in PAIR
        for draw in range(2)
    }
    grid = tokens[PAIR[0], 0].shape[1:2]
    structure = {key: spatial_structure(x, grid, center=True).rmsc.mean() for key, x in tokens.items()}
    expected[e.SPATIAL_GAP] = np.mean([structure[PAIR[1], d] - structure[PAIR[0], d] for d in range(2)])
    cosines = [
        torch.cosine_similarity(torch.from_numpy(tokens[PAIR[0], d]), torch.from_numpy(tokens[PAIR[1], d]), dim=-1)
        for d in range(2)
    ]
    expected[e.COSINE] = float(torch.stack(cosines).mean())
    for criterion, value in expected.items():
        assert row(table, criterion, level).value == pytest.approx(value, rel=1e-6, abs=1e-7), criterion


def test_the_recoverability_gap_is_that_of_the_choose_split(store: FeatureStore, table: pd.DataFrame) -> None:
    """Three quarters of the training split fit, the rest of it chooses the penalty; all draws count."""
    moments = TokenMoments(LAYERS)
    cut = 3 * int((store.token_splits == "train").sum()) // 4
    for split, part, rows in (
        ("train", "train", slice(0, cut)),
        ("validation", "train", slice(cut, None)),
        ("test", "validation", ...),
    ):
        for draw in range(2):
            moments.update(split, [store.tokens(layer, 0.2, draw=draw, split=part)[rows] for layer in LAYERS])
    expected = recoverability(moments).gap[1, 3]
    assert row(table, e.RECOVERABILITY, 0.2).value == pytest.approx(expected, rel=1e-6)


def test_the_mean_over_levels_is_the_mean_and_is_surer_than_its_parts(table: pd.DataFrame) -> None:
    for criterion in (e.CKA, e.LIDAR_GAP, e.COSINE, e.RECOVERABILITY, e.SPATIAL_GAP):
        parts, mean = [row(table, criterion, level) for level in LEVELS], row(table, criterion)
        assert mean.value == pytest.approx(np.mean([part.value for part in parts]))
        assert mean.low < mean.value < mean.high
        assert mean.high - mean.low <= np.mean([part.high - part.low for part in parts]) * (1 + 1e-9)


def test_the_report_split_takes_no_part(splits: Splits, table: pd.DataFrame, tmp_path: Path) -> None:
    other = Splits(splits.train, splits.validation, tiny_samples(30, shape=SHAPE, first_id=1000, seed=5))
    again = pair_evidence(extract_evidence(model(), other, plan(), tmp_path / "store"))
    pd.testing.assert_frame_equal(table, again)


# --------------------------------------------------------------------------------------------------------- with labels


@pytest.fixture(scope="module")
def labeled(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, Any, pd.DataFrame]:
    """The large extraction, what a keeper overheard, and the quality table."""
    large = extract(model(), splits, plan(), tmp_path_factory.mktemp("run") / "model")
    keeper = ScoreKeeper(large)
    quality, _ = measure({"model": large}, analyses=[keeper.listening(a) for a in (probes, neighbors)])
    return large, keeper.scores, quality


def accuracy(quality: pd.DataFrame, metric: str, layer: str, level: float) -> float:
    rows = quality[(quality["metric"] == metric) & (quality["split"] == "validation") & (quality["layer"] == layer)]
    return float(rows[rows["noise_level"] == level]["value"].item())


def test_gaps_in_accuracy_are_those_of_the_quality_table(store: FeatureStore, labeled: Any) -> None:
    _, scores, quality = labeled
    table = pair_evidence(store, scores=scores)
    for level in LEVELS:
        for metric, gap in (("probe accuracy", e.PROBE_GAP), ("knn accuracy", e.KNN_GAP)):
            student, teacher = (accuracy(quality, metric, layer, level) for layer in PAIR)
            assert row(table, gap, level).value == pytest.approx(teacher - student)
        assert row(table, e.TEACHER_PROBE, level).value == accuracy(quality, "probe accuracy", PAIR[1], level)
    assert row(table, e.PROBE_GAP).needs_labels
    assert not row(table, e.CKA).needs_labels


def test_the_interval_of_a_gap_is_the_bootstrap_s_over_samples_that_both_layers_saw(store: FeatureStore) -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(300)
    right = {
        (metric, layer, level): (hard < 0.4 + 0.1 * i + generator.normal(0, 0.1, 300)).astype(np.float64)
        for metric in ("probe accuracy", "knn accuracy")
        for i, layer in enumerate(LAYERS)
        for level in LEVELS
    }
    found = row(pair_evidence(store, scores=right), e.PROBE_GAP)
    gaps = np.mean(
        [right["probe accuracy", PAIR[1], lv] - right["probe accuracy", PAIR[0], lv] for lv in LEVELS], axis=0
    )
    by_force = [gaps[generator.integers(0, 300, 300)].mean() for _ in range(2000)]
    low, high = np.quantile(by_force, [0.025, 0.975])
    assert found.value == pytest.approx(gaps.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_without_scores_by_sample_intervals_are_wider_and_values_the_same(store: FeatureStore, labeled: Any) -> None:
    _, scores, quality = labeled
    paired, alone = (pair_evidence(store, **given) for given in ({"scores": scores}, {"quality": quality}))
    for criterion in (e.PROBE_GAP, e.KNN_GAP):
        one, other = row(paired, criterion), row(alone, criterion)
        assert one.value == pytest.approx(other.value)
        assert one.high - one.low < other.high - other.low


def test_a_keeper_listens_to_its_own_store_and_changes_nothing(labeled: Any, tmp_path: Path, splits: Splits) -> None:
    large, scores, quality = labeled
    assert set(scores) == {(m, la, lv) for m in ("probe accuracy", "knn accuracy") for la in LAYERS for lv in LEVELS}
    plain, _ = measure({"model": large}, analyses=(probes, neighbors))
    pd.testing.assert_frame_equal(plain, quality)
    keeper = ScoreKeeper(large)
    other = extract(model(seed=1), splits, plan(), tmp_path / "other")
    keeper.listening(probes)(Representation(other, LAYERS[0], 0.2))
    assert keeper.scores == {}


def test_contributions_come_from_the_table_by_layer(store: FeatureStore, splits: Splits) -> None:
    skipped = ablate_layers(model(), splits.validation, LEVELS, split="validation", num_samples=20)
    table = pair_evidence(store, quality=pd.DataFrame(skipped.rows()))
    for criterion, scores, layer in (
        (e.STUDENT_CONTRIBUTION, skipped.velocity_change, 1),
        (e.TEACHER_CONTRIBUTION, skipped.velocity_change, 3),
        (e.STUDENT_NEED, skipped.loss_increase, 1),
        (e.TEACHER_NEED, skipped.loss_increase, 3),
    ):
        assert row(table, criterion, 0.6).value == pytest.approx(scores[layer, 1].mean())
        assert row(table, criterion).value == pytest.approx(scores[layer].mean())
        assert row(table, criterion).low < row(table, criterion).value < row(table, criterion).high


# --------------------------------------------------------------------------------------------- what is not there


def test_one_draw_and_no_tokens_leave_criteria_out_and_say_so(splits: Splits, tmp_path: Path) -> None:
    """As a run of an earlier version has them, with its test split and its pooled cells."""
    table = pair_evidence(extract(model(), splits, plan(pool_cells=2), tmp_path / "store"))
    for criterion in (e.TEACHER_LIDAR, e.LIDAR_GAP):
        assert np.isnan(row(table, criterion).value)
        assert "one noise draw" in row(table, criterion).note
    for criterion in (e.COSINE, e.RECOVERABILITY, e.SPATIAL_GAP):
        assert "no tokens were kept" in row(table, criterion, 0.2).note
    assert "there is no loss increase when skipped" in row(table, e.TEACHER_NEED).note
    for criterion in (e.CKA, e.CKNNA, e.RANK_GAP):
        assert np.isfinite(row(table, criterion).value)
        assert row(table, criterion).note == ""


def test_padded_samples_have_all_criteria(tmp_path: Path) -> None:
    x = tiny_samples(40, shape=SHAPE).batch(range(40)).x
    mask = torch.ones(40, 8, 8, dtype=torch.bool)
    mask[::2, :, 6:] = False
    parts = [
        TensorSamples(x[rows], ids=torch.arange(40)[rows], mask=mask[rows])
        for rows in (slice(0, 20), slice(20, 30), slice(30, 40))
    ]
    table = pair_evidence(extract_evidence(model(), Splits(*parts), plan(), tmp_path / "store"))
    for criterion in (e.RECOVERABILITY, e.SPATIAL_GAP, e.COSINE, e.CKA, e.LIDAR_GAP):
        assert np.isfinite(row(table, criterion).value)


def test_a_layer_that_tells_no_sample_from_another_is_named_and_the_others_keep_theirs(
    splits: Splits, table: pd.DataFrame, tmp_path: Path
) -> None:
    """Planted: the last block gives nothing but zeros."""
    network = model()
    network.module.blocks[3].register_forward_hook(lambda *call: torch.zeros_like(call[2]))
    found = pair_evidence(extract_evidence(network, splits, plan(), tmp_path / "store"))
    for criterion in (e.CKA, e.CKNNA, e.LIDAR_GAP, e.RECOVERABILITY, e.COSINE, e.SPATIAL_GAP, e.RANK_GAP):
        dead = row(found, criterion)
        assert np.isnan(dead.value)
        assert dead.note == "at noise level 0.2, blocks.3: the features are the same for all samples"
        alive, before = row(found, criterion, pair=LAYERS[:2]), row(table, criterion, pair=LAYERS[:2])
        # The layers' common whitening changes with their number.
        assert alive.value == pytest.approx(before.value, rel=0.2 if criterion == e.RECOVERABILITY else 1e-6)


def test_layers_of_unequal_shape_are_no_pair(store: FeatureStore, table: pd.DataFrame) -> None:
    shapes = dict(zip(LAYERS, ((16, 16), (16, 16), (4, 16), (1, 16)), strict=True))
    manifest = store.manifest | {"layer_shapes": shapes}
    other = FeatureStore.open(store.folder)
    other.manifest = manifest
    found = pair_evidence(other)
    assert set(zip(found["student"], found["teacher"], strict=True)) == {LAYERS[:2]}
    other.manifest = manifest | {"layer_shapes": {layer: (i, 16) for i, layer in enumerate(LAYERS)}}
    assert pair_evidence(other).empty


def test_too_few_samples_say_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="7 samples in the training and validation splits say nothing; extract 8 or more"
    ):
        pair_evidence(extract_evidence(model(), tiny_splits(10, shape=SHAPE), plan(), tmp_path / "store"))


# ------------------------------------------------------------------------------------------- one place, several names


def test_names_of_one_place_and_parts_of_a_block_count_once() -> None:
    names = (
        "blocks.0:input",
        "blocks.0.attn:input",
        "blocks.0.attn",
        "blocks.0",
        "blocks.1:input",
        "blocks.1",
        "blocks.10",
    )
    assert pair_layers(names) == ("blocks.0", "blocks.1", "blocks.10")
    assert pair_layers(("blocks.0:input", "blocks.1:input")) == ("blocks.0:input", "blocks.1:input")


def test_reading_inputs_and_parts_too_changes_no_evidence(splits: Splits, table: pd.DataFrame, tmp_path: Path) -> None:
    every = [name for i in range(4) for name in (f"blocks.{i}:input", f"blocks.{i}.mlp", f"blocks.{i}")]
    wide = replace(plan(), layers=tuple(every))
    pd.testing.assert_frame_equal(pair_evidence(extract_evidence(model(), splits, wide, tmp_path / "few")), table)
    # A run of an earlier version has them in its only store.
    large = replace(wide, draws=2, token_samples=100, tokens_per_sample=8)
    found = pair_evidence(extract(model(), splits, large, tmp_path / "large"))
    pd.testing.assert_frame_equal(found, table, rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------- files


def test_the_table_survives_its_file(table: pd.DataFrame, tmp_path: Path) -> None:
    write_evidence(table.replace({"student": {"blocks.0": "null"}}), tmp_path / "evidence.csv")
    found = read_evidence(tmp_path / "evidence.csv")
    assert set(found["student"]) == {"null", "blocks.1", "blocks.2"}
    assert found["needs_labels"].dtype == bool
    np.testing.assert_allclose(found["value"], table["value"], rtol=1e-5)
    assert list(found["note"]) == list(table["note"])


def test_another_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("student,teacher\na,b\n")
    with pytest.raises(ValueError, match="has no column criterion; it is no evidence table, run `layerprobe analyze`"):
        read_evidence(tmp_path / "other.csv")
    with pytest.raises(FileNotFoundError):
        read_evidence(tmp_path / "none.csv")


def test_a_second_look_finds_the_same(store: FeatureStore, table: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(pair_evidence(store), table)
    assert pytest.approx(1.96, abs=1e-3) == Z95
