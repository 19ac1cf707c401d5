"""Dense probes: interpolation against torch, scores against scikit-learn, planted regions, real street scenes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

from layerprobe.analyses.measures.dense_probes import SegmentationScore, area_shares, dense_probe, interpolated
from layerprobe.backbones.sit import SiTConfig, new_sit
from layerprobe.capture import capture

Array = NDArray[Any]
Split = dict[str, Array]
SIZES = {"train": 30, "validation": 10, "test": 12}
VOID = 11


def planted(
    grid: tuple[int, ...],
    size: tuple[int, ...],
    *,
    num_classes: int = 3,
    noise: float = 0.3,
    sizes: dict[str, int] = SIZES,
    seed: int = 0,
) -> tuple[Split, Split]:
    """Labels in blocks of one grid cell, and tokens that say which class theirs is."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(num_classes, 6)) * 2
    tokens, labels = {}, {}
    for split, n in sizes.items():
        classes = rng.integers(0, num_classes, size=(n, *grid))
        tokens[split] = directions[classes.reshape(n, -1)] + noise * rng.normal(size=(n, int(np.prod(grid)), 6))
        for axis, (cells, length) in enumerate(zip(grid, size, strict=True), 1):
            classes = classes.repeat(length // cells, axis=axis)
        labels[split] = classes
    return tokens, labels


# --------------------------------------------------------------------------------- interpolation, areas


@pytest.mark.parametrize(
    ("grid", "size"), [((5,), (13,)), ((9, 12), (36, 48)), ((3, 4), (10, 7)), ((2, 3, 4), (4, 9, 4))]
)
def test_interpolation_equals_torch(grid: tuple[int, ...], size: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=(2, *grid, 3))
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(grid)]
    moved = torch.from_numpy(np.moveaxis(values, -1, 1).copy())
    expected = torch.nn.functional.interpolate(moved, size=size, mode=mode, align_corners=False)
    np.testing.assert_allclose(interpolated(values, size), np.moveaxis(expected.numpy(), 1, -1), atol=1e-12)


def test_interpolation_to_the_same_size_changes_nothing() -> None:
    values = np.random.default_rng(0).normal(size=(2, 4, 5, 3))
    np.testing.assert_array_equal(interpolated(values, (4, 5)), values)


def test_area_shares_of_even_patches_are_means_of_pixels() -> None:
    labels = np.random.default_rng(1).integers(0, 3, size=(2, 6, 8))
    shares = area_shares(labels, np.arange(3), (3, 2)).reshape(2, 3, 2, 3)
    patches = labels.reshape(2, 3, 2, 2, 4)
    for label in range(3):
        np.testing.assert_allclose(shares[..., label], (patches == label).mean(axis=(2, 4)), atol=1e-12)


def test_pixels_on_a_border_count_for_both_sides() -> None:
    # Three pixels on two cells: the middle one is half left, half right.
    shares = area_shares(np.array([[0, 1, 1]]), np.array([0, 1]), (2,))
    np.testing.assert_allclose(shares[0], [[2 / 3, 1 / 3], [0, 1]], atol=1e-12)


def test_ignored_area_is_nobodys() -> None:
    shares = area_shares(np.array([[0, VOID, VOID, VOID]]), np.array([0, 1]), (2,))
    np.testing.assert_allclose(shares[0], [[0.5, 0], [0, 0]], atol=1e-12)


# --------------------------------------------------------------------------------------------- scores


def test_scores_equal_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 4, size=(5, 60))
    result = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 4, size=truth.shape))
    confusions = np.stack([confusion_matrix(t, f, labels=range(4)) for t, f in zip(truth, result, strict=True)])
    score = SegmentationScore(np.arange(4), confusions)
    assert score.iou == pytest.approx(jaccard_score(truth.ravel(), result.ravel(), average=None))
    assert score.mean_iou == pytest.approx(jaccard_score(truth.ravel(), result.ravel(), average="macro"))
    assert score.pixel_accuracy == pytest.approx(accuracy_score(truth.ravel(), result.ravel()))


def test_a_class_that_never_occurs_has_no_iou_and_does_not_count() -> None:
    confusions = np.zeros((1, 3, 3), np.int64)
    confusions[0, 0, 0], confusions[0, 1, 0] = 3, 1
    score = SegmentationScore(np.arange(3), confusions)
    assert score.iou[:2].tolist() == [0.75, 0.0]
    assert np.isnan(score.iou[2])
    assert score.mean_iou == 0.375


# -------------------------------------------------------------------------------------------- the probe


@pytest.mark.parametrize(
    ("grid", "size"), [((10,), (10,)), ((10,), (40,)), ((4, 5), (16, 20)), ((2, 3, 3), (2, 12, 12))]
)
def test_planted_labels_are_found_and_shuffled_ones_are_not(grid: tuple[int, ...], size: tuple[int, ...]) -> None:
    tokens, labels = planted(grid, size)
    result = dense_probe(tokens, labels, grid, inverse_penalties=(0.1, 1.0))
    assert result.converged
    assert result.test.mean_iou == pytest.approx(result.ceiling.mean_iou, abs=0.08)
    if grid == size:
        assert result.ceiling.mean_iou == 1.0
        assert result.test.mean_iou > 0.98
    rng = np.random.default_rng(3)
    shuffled = {split: x[rng.permutation(len(x))] for split, x in tokens.items()}
    chance = dense_probe(shuffled, labels, grid, inverse_penalties=(0.1,))
    assert chance.test.pixel_accuracy < 0.45
    assert chance.test.mean_iou < 0.3


def test_labels_per_frame_equal_a_probe_of_frames_by_scikit_learn() -> None:
    """On a grid as fine as the labels nothing is interpolated: audio and motion with a label per frame."""
    tokens, labels = planted((16,), (16,), noise=3.0)
    result = dense_probe(tokens, labels, (16,), inverse_penalties=(1.0,))
    fit = tokens["train"].reshape(-1, 6)
    mean, scale = fit.mean(axis=0), fit.std(axis=0)
    reference = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000)
    reference.fit((fit - mean) / scale, labels["train"].ravel())
    predicted = reference.predict((tokens["test"].reshape(-1, 6) - mean) / scale).reshape(12, 16)
    for i in range(12):
        expected = confusion_matrix(labels["test"][i], predicted[i], labels=range(3))
        np.testing.assert_array_equal(result.test.confusions[i], expected)


def test_ignored_pixels_are_neither_learned_nor_scored() -> None:
    tokens, labels = planted((4, 4), (8, 8))
    expected = dense_probe(tokens, labels, (4, 4), inverse_penalties=(0.1,))
    masked = {split: y.copy() for split, y in labels.items()}
    for y in masked.values():
        y[:, :2] = VOID  # the first row of tokens
    result = dense_probe(tokens, masked, (4, 4), ignore=VOID, inverse_penalties=(0.1,))
    assert result.test.classes.tolist() == [0, 1, 2]
    assert result.test.confusions.sum() == 12 * 8 * 6
    assert result.test.mean_iou == pytest.approx(expected.test.mean_iou, abs=0.05)


def test_a_class_that_was_not_learned_is_never_predicted_and_counts_as_missed() -> None:
    tokens, labels = planted((4, 4), (8, 8))
    labels["test"][0, :2, :2] = 7
    result = dense_probe(tokens, labels, (4, 4), inverse_penalties=(0.1,))
    assert result.test.classes.tolist() == [0, 1, 2, 7]
    assert result.test.confusions[..., 3].sum() == 0
    assert result.test.iou[3] == 0.0
    assert np.isnan(result.validation.iou[3])


def test_the_penalty_is_the_best_on_the_validation_split() -> None:
    tokens, labels = planted((4, 4), (4, 4), noise=6.0, sizes={"train": 3, "validation": 20, "test": 5})
    scores = {
        c: dense_probe(tokens, labels, (4, 4), inverse_penalties=(c,)).validation.mean_iou for c in (1e-3, 1e-1, 1e2)
    }
    result = dense_probe(tokens, labels, (4, 4), inverse_penalties=(1e2, 1e-1, 1e-3))
    assert result.validation.mean_iou == max(scores.values())
    assert scores[result.inverse_penalty] == max(scores.values())


def test_offsets_scales_and_constant_channels_change_nothing() -> None:
    tokens, labels = planted((4, 4), (8, 8), noise=2.0)
    # Multiples of 1/64 survive an offset of 1e4 in float32 exactly.
    tokens = {split: np.round(x * 64) / 64 for split, x in tokens.items()}
    expected = dense_probe(tokens, labels, (4, 4), inverse_penalties=(0.1,)).test.confusions
    factors = np.array([1000.0, 1000, 1, 1, 1, 1])
    for moved in (
        {split: (x + 1e4).astype(np.float32) for split, x in tokens.items()},
        {split: x * factors for split, x in tokens.items()},
        {split: np.concatenate([x, np.full_like(x[..., :1], 0.1)], axis=2) for split, x in tokens.items()},
    ):
        result = dense_probe(moved, labels, (4, 4), inverse_penalties=(0.1,)).test.confusions
        np.testing.assert_array_equal(result, expected)


def test_many_samples_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, labels = planted((4, 4), (8, 8))
    expected = dense_probe(tokens, labels, (4, 4), inverse_penalties=(0.1,)).test.confusions
    monkeypatch.setattr("layerprobe.analyses.measures.dense_probes._BATCH_SAMPLES", 5)
    result = dense_probe(tokens, labels, (4, 4), inverse_penalties=(0.1,)).test.confusions
    np.testing.assert_array_equal(result, expected)


def test_what_does_not_fit_is_refused() -> None:
    tokens, labels = planted((4, 4), (8, 8), sizes={"train": 3, "validation": 2, "test": 2})
    with pytest.raises(ValueError, match="no tokens or labels of the split 'test'"):
        dense_probe({k: v for k, v in tokens.items() if k != "test"}, labels, (4, 4))
    with pytest.raises(ValueError, match=r"tokens of the train split have shape \(3, 16, 6\), the grid \(5, 4\)"):
        dense_probe(tokens, labels, (5, 4))
    with pytest.raises(ValueError, match=r"labels of the validation split have shape \(2, 8\) for 2 samples on a grid"):
        dense_probe(tokens, labels | {"validation": labels["validation"][:, 0]}, (4, 4))
    with pytest.raises(ValueError, match="two classes or more"):
        dense_probe(tokens, {split: np.zeros_like(y) for split, y in labels.items()}, (4, 4))
    tokens["test"][0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="tokens of the test split hold 1 values"):
        dense_probe(tokens, labels, (4, 4))


# ----------------------------------------------------------------------------------------- street scenes


def street_scenes(path: Path, num: int) -> tuple[torch.Tensor, Array]:
    """Images (num, 3, 72, 96) in [-1, 1] and their masks (num, 144, 192)."""
    import pyarrow.parquet as pq

    table = pq.read_table(path).slice(0, num).to_pydict()
    images = [Image.open(io.BytesIO(row["bytes"])).resize((96, 72)) for row in table["image"]]
    masks = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["mask"]]
    x = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return x.float() / 127.5 - 1, np.stack(masks)


def test_street_scenes_are_read_from_raw_patches(shared_data: Path) -> None:
    """Even untrained tokens know sky from road; the masks line up with the image, or they would not."""
    backbone = new_sit(SiTConfig((3, 72, 96), 8, 32, 2, 2), seed=0)
    tokens, labels = {}, {}
    for split, name, num in (("train", "train", 60), ("validation", "val", 20), ("test", "test", 20)):
        x, labels[split] = street_scenes(shared_data / "camvid" / f"{name}.parquet", num)
        with torch.inference_mode(), capture(backbone.module, ["blocks.1"]) as outputs:
            backbone.predict(x, torch.full((num,), 0.05))
        tokens[split] = outputs["blocks.1"].numpy()
    result = dense_probe(tokens, labels, (9, 12), ignore=VOID, inverse_penalties=(1e-2,))
    assert result.converged
    assert result.test.classes.tolist() == list(range(11))
    sky, road = result.test.iou[[0, 3]]
    assert sky > 0.5
    assert road > 0.5
    majority = result.test.confusions.sum(axis=(0, 2)).max() / result.test.confusions.sum()
    assert result.test.pixel_accuracy > majority + 0.2
    assert result.test.mean_iou < result.ceiling.mean_iou < 1
    mirrored = {split: y[:, ::-1] for split, y in labels.items()}
    wrong = dense_probe(tokens, labels | {"test": mirrored["test"]}, (9, 12), ignore=VOID, inverse_penalties=(1e-2,))
    assert wrong.test.mean_iou < result.test.mean_iou / 2
