"""Evidence of pairs: its numbers are those of the analyses one by one, its intervals those of resampling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_samples, tiny_sit, tiny_splits

from layerprobe.analyses.measures import TokenMoments, effective_rank, lidar, recoverability
from layerprobe.analyses.measures.cka import cka_matrix
from layerprobe.analyses.measures.jackknife import Z95
from layerprobe.analyses.measures.neighbor_graphs import cknna, neighbor_graph
from layerprobe.analyses.measures.spatial import spatial_structure
from layerprobe.analyses.tables import evidence as e
from layerprobe.analyses.tables.evidence import CRITERIA, Number, PairEvidence
from layerprobe.analyses.tables.evidence_measures import ScoreKeeper, measure_evidence
from layerprobe.analyses.tables.measurements import PROBE, RANK, neighbors, probes
from layerprobe.analyses.tables.quality import measure
from layerprobe.data.samples import Splits, TensorSamples
from layerprobe.extraction.ablation import LOSS_INCREASE, VELOCITY_CHANGE, ablate_layers
from layerprobe.extraction.evidence import extract_evidence, pair_layers
from layerprobe.extraction.features import FeatureStore, begin_store, shard_path, write_tensors
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
def evidence(store: FeatureStore) -> PairEvidence:
    return measure_evidence(store)


def number(evidence: PairEvidence, criterion: str, level: float | None = None, pair: tuple[str, str] = PAIR) -> Number:
    """A criterion of one pair, at a noise level or averaged."""
    index = evidence.pairs.index(pair)
    if level is None:
        return evidence.number(criterion, index)
    kind = CRITERIA[criterion]
    place = {"pair": index, "student": LAYERS.index(pair[0]), "teacher": LAYERS.index(pair[1])}[kind.of]
    quantity, v = (evidence.by_pair if kind.of == "pair" else evidence.by_layer)[kind.quantity], LEVELS.index(level)
    ends = (float(of[v, place]) for of in (quantity.value, quantity.low, quantity.high))
    return Number(*ends, quantity.notes[v][place])


def assert_equal(one: PairEvidence, other: PairEvidence, *, rtol: float = 0) -> None:
    assert (one.layers, one.noise_levels, one.pairs) == (other.layers, other.noise_levels, other.pairs)
    for ours, theirs in ((one.by_layer, other.by_layer), (one.by_pair, other.by_pair)):
        assert set(ours) == set(theirs)
        for name, quantity in ours.items():
            for part in ("value", "low", "high", "mean", "mean_low", "mean_high"):
                pair = getattr(quantity, part), getattr(theirs[name], part)
                np.testing.assert_allclose(*pair, rtol=rtol, atol=rtol, err_msg=f"{name}, {part}")
            assert quantity.notes == theirs[name].notes


def samples_of(store: FeatureStore, layer: str, level: float) -> Any:
    """Choose, then fit, under both draws: (n, 2, D)."""
    draws = np.stack([store.features(layer, level, draw=d) for d in range(2)], axis=1)
    return np.concatenate([draws[store.splits == split] for split in ("validation", "train")])


def test_every_pair_of_an_earlier_and_a_later_layer_has_every_quantity_without_labels(evidence: PairEvidence) -> None:
    assert evidence.pairs == tuple((a, b) for i, a in enumerate(LAYERS) for b in LAYERS[i + 1 :])
    known = {name for name in CRITERIA if evidence.has(name)}
    ablation = {e.STUDENT_CHANGE, e.TEACHER_CHANGE, e.STUDENT_NEED, e.TEACHER_NEED}
    assert known == {name for name, of in CRITERIA.items() if not of.needs_labels} - ablation
    for quantity in evidence.by_layer.values():
        assert quantity.value.shape == (2, 4)
    for quantity in evidence.by_pair.values():
        assert quantity.value.shape == (2, 6)


def test_depths_are_positions_among_the_layers(evidence: PairEvidence) -> None:
    depths = [number(evidence, name).value for name in (e.STUDENT_DEPTH, e.TEACHER_DEPTH, e.DISTANCE)]
    assert depths == pytest.approx([0.5, 1.0, 0.5])
    assert evidence.distance(*PAIR) == 2


@pytest.mark.parametrize("level", LEVELS)
def test_the_values_are_those_of_the_analyses(store: FeatureStore, evidence: PairEvidence, level: float) -> None:
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
        assert number(evidence, criterion, level).value == pytest.approx(value, rel=1e-6, abs=1e-7), criterion


def test_the_recoverability_gap_is_that_of_the_validation_split(store: FeatureStore, evidence: PairEvidence) -> None:
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
    assert number(evidence, e.RECOVERABILITY, 0.2).value == pytest.approx(expected, rel=1e-6)


def test_the_mean_over_levels_is_the_mean_and_is_surer_than_its_parts(evidence: PairEvidence) -> None:
    for criterion in (e.CKA, e.LIDAR_GAP, e.TEACHER_LIDAR, e.COSINE, e.RECOVERABILITY, e.SPATIAL_GAP):
        parts, mean = [number(evidence, criterion, level) for level in LEVELS], number(evidence, criterion)
        assert mean.value == pytest.approx(np.mean([part.value for part in parts]))
        assert mean.low < mean.value < mean.high
        assert mean.high - mean.low <= np.mean([part.high - part.low for part in parts]) * (1 + 1e-9)


def test_the_test_split_takes_no_part(splits: Splits, evidence: PairEvidence, tmp_path: Path) -> None:
    other = Splits(splits.train, splits.validation, tiny_samples(30, shape=SHAPE, first_id=1000, seed=5))
    assert_equal(measure_evidence(extract_evidence(model(), other, plan(), tmp_path / "store")), evidence)


# --------------------------------------------------------------------------------------------------------- with labels


@pytest.fixture(scope="module")
def labeled(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, Any, pd.DataFrame]:
    """The large extraction, what a keeper overheard, and the quality table."""
    large = extract(model(), splits, plan(), tmp_path_factory.mktemp("run") / "model")
    keeper = ScoreKeeper()
    quality, _ = measure({"model": large}, analyses=(probes, neighbors), listener=keeper.listen)
    return large, keeper.scores, quality


def accuracy(quality: pd.DataFrame, metric: str, layer: str, level: float) -> float:
    rows = quality[(quality["metric"] == metric) & (quality["split"] == "validation") & (quality["layer"] == layer)]
    return float(rows[rows["noise_level"] == level]["value"].item())


def test_gaps_in_accuracy_are_those_of_the_quality_table(store: FeatureStore, labeled: Any) -> None:
    _, scores, quality = labeled
    evidence = measure_evidence(store, scores=scores)
    for level in LEVELS:
        for metric, gap in (("probe accuracy", e.PROBE_GAP), ("knn accuracy", e.KNN_GAP)):
            student, teacher = (accuracy(quality, metric, layer, level) for layer in PAIR)
            assert number(evidence, gap, level).value == pytest.approx(teacher - student)
        for layer in LAYERS:
            value = evidence.by_layer[PROBE].value[LEVELS.index(level), LAYERS.index(layer)]
            assert value == accuracy(quality, "probe accuracy", layer, level)


def test_the_interval_of_a_gap_is_the_bootstrap_s_over_samples_that_both_layers_saw(store: FeatureStore) -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(300)
    right = {
        (metric, layer, level): (hard < 0.4 + 0.1 * i + generator.normal(0, 0.1, 300)).astype(np.float64)
        for metric in ("probe accuracy", "knn accuracy")
        for i, layer in enumerate(LAYERS)
        for level in LEVELS
    }
    found = number(measure_evidence(store, scores=right), e.PROBE_GAP)
    gaps = np.mean(
        [right["probe accuracy", PAIR[1], lv] - right["probe accuracy", PAIR[0], lv] for lv in LEVELS], axis=0
    )
    by_force = [gaps[generator.integers(0, 300, 300)].mean() for _ in range(2000)]
    low, high = np.quantile(by_force, [0.025, 0.975])
    assert found.value == pytest.approx(gaps.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_a_layer_whose_probe_failed_leaves_the_others_their_evidence(store: FeatureStore, labeled: Any) -> None:
    """At one level of one layer there are no scores."""
    _, scores, _ = labeled
    whole = measure_evidence(store, scores=scores)
    part = measure_evidence(store, scores=scores | {(PROBE, "blocks.2", 0.6): None})
    assert part.layer_number(PROBE, "blocks.2").note == "blocks.2: at noise level 0.6, there is no probe accuracy"
    assert number(part, e.PROBE_GAP) == number(whole, e.PROBE_GAP)
    assert np.isnan(number(part, e.PROBE_GAP, pair=("blocks.1", "blocks.2")).value)
    assert number(part, e.KNN_GAP, pair=("blocks.1", "blocks.2")) == number(whole, e.KNN_GAP, pair=LAYERS[1:3])


def test_a_keeper_keeps_the_scores_of_the_model_alone(labeled: Any) -> None:
    large, scores, _ = labeled
    assert set(scores) == {(m, la, lv) for m in ("probe accuracy", "knn accuracy") for la in LAYERS for lv in LEVELS}
    keeper = ScoreKeeper()
    measure({"random weights": large}, analyses=(probes, neighbors), listener=keeper.listen)
    assert keeper.scores == keeper.probe_scores == {}


def test_what_skipping_a_layer_changes_comes_from_the_table(store: FeatureStore, splits: Splits) -> None:
    skipped = ablate_layers(model(), splits.validation, LEVELS, split="validation", num_samples=20)
    evidence = measure_evidence(store, ablation=pd.DataFrame(skipped.rows()))
    for criterion, scores, layer in (
        (e.STUDENT_CHANGE, skipped.velocity_change, 1),
        (e.TEACHER_CHANGE, skipped.velocity_change, 3),
        (e.STUDENT_NEED, skipped.loss_increase, 1),
        (e.TEACHER_NEED, skipped.loss_increase, 3),
    ):
        assert number(evidence, criterion, 0.6).value == pytest.approx(scores[layer, 1].mean())
        assert number(evidence, criterion).value == pytest.approx(scores[layer].mean())
        assert number(evidence, criterion).low < number(evidence, criterion).value < number(evidence, criterion).high


def test_ablations_on_the_test_split_are_not_read(store: FeatureStore, splits: Splits) -> None:
    skipped = ablate_layers(model(), splits.test, LEVELS, split="test", num_samples=20)
    evidence = measure_evidence(store, ablation=pd.DataFrame(skipped.rows()))
    for quantity in (VELOCITY_CHANGE, LOSS_INCREASE):
        assert np.isnan(evidence.by_layer[quantity].value).all()


def test_the_rank_of_a_wide_layer_is_not_that_of_the_directions_that_layers_share(tmp_path: Path) -> None:
    """Planted: a layer that varies in 130 directions, and one that varies in all 400, both evenly."""
    rng, n = np.random.default_rng(0), 320
    few = rng.normal(size=(n, 130)) @ np.linalg.qr(rng.normal(size=(400, 130)))[0].T
    tensors = {"a": few, "b": rng.normal(size=(n, 400))}
    manifest = {
        "plan": {"layers": list(tensors), "noise_levels": [0.5], "draws": 1},
        "num_shards": 1,
        "layer_shapes": {"a": [1, 400], "b": [1, 400]},
    }
    begin_store(tmp_path, manifest, {"ids": np.arange(n), "splits": np.arange(n) % 2})
    write_tensors(shard_path(tmp_path, 0), {name: x[None, None].astype(np.float32) for name, x in tensors.items()})
    found = measure_evidence(FeatureStore.open(tmp_path))
    assert found.by_layer[RANK].value[0] == pytest.approx([effective_rank(x) for x in tensors.values()], rel=1e-4)
    assert found.by_layer[RANK].value[0, 1] > 2 * found.by_layer[RANK].value[0, 0]


# --------------------------------------------------------------------------------------------- what is not there


def test_one_draw_and_no_tokens_leave_criteria_out_and_say_so(splits: Splits, tmp_path: Path) -> None:
    evidence = measure_evidence(extract(model(), splits, plan(pool_cells=2), tmp_path / "store"))
    for criterion in (e.TEACHER_LIDAR, e.LIDAR_GAP):
        assert np.isnan(number(evidence, criterion).value)
        assert "one noise draw" in number(evidence, criterion).note
    for criterion in (e.COSINE, e.RECOVERABILITY, e.SPATIAL_GAP):
        assert "no tokens were kept" in number(evidence, criterion, 0.2).note
    assert number(evidence, e.TEACHER_NEED).note == "the evidence has no teacher loss increase"
    for criterion in (e.CKA, e.CKNNA, e.RANK_GAP):
        assert np.isfinite(number(evidence, criterion).value)
        assert number(evidence, criterion).note == ""


def test_padded_samples_have_all_criteria(tmp_path: Path) -> None:
    x = tiny_samples(40, shape=SHAPE).batch(range(40)).x
    mask = torch.ones(40, 8, 8, dtype=torch.bool)
    mask[::2, :, 6:] = False
    parts = [
        TensorSamples(x[rows], ids=torch.arange(40)[rows], mask=mask[rows])
        for rows in (slice(0, 20), slice(20, 30), slice(30, 40))
    ]
    evidence = measure_evidence(extract_evidence(model(), Splits(*parts), plan(), tmp_path / "store"))
    for criterion in (e.RECOVERABILITY, e.SPATIAL_GAP, e.COSINE, e.CKA, e.LIDAR_GAP):
        assert np.isfinite(number(evidence, criterion).value)


def test_a_layer_that_tells_no_sample_from_another_is_named_and_the_others_keep_theirs(
    splits: Splits, evidence: PairEvidence, tmp_path: Path
) -> None:
    """Planted: the last block gives nothing but zeros."""
    network = model()
    network.module.blocks[3].register_forward_hook(lambda *call: torch.zeros_like(call[2]))
    found = measure_evidence(extract_evidence(network, splits, plan(), tmp_path / "store"))
    for criterion in (e.CKA, e.CKNNA, e.LIDAR_GAP, e.RECOVERABILITY, e.COSINE, e.SPATIAL_GAP, e.RANK_GAP):
        dead = number(found, criterion)
        assert np.isnan(dead.value)
        assert dead.note == "at noise level 0.2, blocks.3: the features are the same for all samples"
        alive, before = (number(of, criterion, pair=LAYERS[:2]) for of in (found, evidence))
        # The layers' common whitening changes with their number.
        assert alive.value == pytest.approx(before.value, rel=0.2 if criterion == e.RECOVERABILITY else 1e-6)


def test_layers_of_unequal_shape_are_no_pair(store: FeatureStore) -> None:
    shapes = dict(zip(LAYERS, ((16, 16), (16, 16), (4, 16), (1, 16)), strict=True))
    manifest = store.manifest | {"layer_shapes": shapes}
    other = FeatureStore.open(store.folder)
    other.manifest = manifest
    found = measure_evidence(other)
    assert found.pairs == (LAYERS[:2],)
    assert np.isfinite(found.layer_number("noise-LiDAR", "blocks.3").value)
    other.manifest = manifest | {"layer_shapes": {layer: (i, 16) for i, layer in enumerate(LAYERS)}}
    assert measure_evidence(other).pairs == ()


def test_too_few_samples_say_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="7 samples in the training and validation splits are too few; extract 8 or more"
    ):
        measure_evidence(extract_evidence(model(), tiny_splits(10, shape=SHAPE), plan(), tmp_path / "store"))


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


def test_reading_inputs_and_parts_too_changes_no_evidence(
    splits: Splits, evidence: PairEvidence, tmp_path: Path
) -> None:
    every = [name for i in range(4) for name in (f"blocks.{i}:input", f"blocks.{i}.mlp", f"blocks.{i}")]
    wide = replace(plan(), layers=tuple(every))
    assert_equal(measure_evidence(extract_evidence(model(), splits, wide, tmp_path / "few")), evidence)


def test_a_second_look_finds_the_same(store: FeatureStore, evidence: PairEvidence) -> None:
    assert_equal(measure_evidence(store), evidence)
    assert pytest.approx(1.96, abs=1e-3) == Z95
