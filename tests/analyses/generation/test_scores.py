"""Scores of samples: against plain formulas, on planted cases, on real data, and as the shell asks for them."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import cdist
from tiny import tiny_samples

from layerprobe.analyses.generation.distances import frechet_distance, gaussian
from layerprobe.analyses.generation.extractors import classifier_extractor, sample_features
from layerprobe.analyses.generation.scores import (
    EXTRAPOLATED,
    FRECHET,
    GROUPS,
    KERNEL,
    METRICS,
    Neighborhoods,
    Score,
    jackknife,
    neighborhoods,
    score_features,
)
from layerprobe.analyses.runs import score as score_runs
from layerprobe.analyses.runs.score import open_comparison
from layerprobe.data.arrays import load_array
from layerprobe.data.embedded_digits import digits
from layerprobe.data.loading import load
from layerprobe.data.sources import DataSource
from layerprobe.records import write_record


def plain(x: NDArray[Any], reference: NDArray[Any], k: int) -> Neighborhoods:
    """The definitions, from all distances at once."""
    own_real, own_fake, across = cdist(reference, reference), cdist(x, x), cdist(reference, x)
    real, fake = (np.sort(own, axis=1)[:, k] for own in (own_real, own_fake))
    in_real = across <= real[:, None]
    return Neighborhoods(
        precision=in_real.any(0).mean(),
        recall=(across <= fake[None, :]).any(1).mean(),
        density=in_real.sum() / (k * len(x)),
        coverage=(across.min(1) <= real).mean(),
    )


def clusters(n: int, centers: int, seed: int, *, spread: float = 0.5, width: int = 6) -> NDArray[np.float64]:
    """n samples around the first `centers` of six far points."""
    rng = np.random.default_rng(seed)
    means = 8 * np.eye(6, width)[rng.integers(centers, size=n)]
    return means + spread * rng.normal(size=(n, width))


def scored(x: NDArray[Any], reference: NDArray[Any], **options: Any) -> dict[str, Score]:
    scores, _ = score_features(x, reference, extractor="mine", **options)
    return {score.metric: score for score in scores}


# ---------------------------------------------------------------------------------------------------------- definitions


@pytest.mark.parametrize(("n", "m", "width", "k"), [(60, 90, 8, 5), (120, 50, 2, 1), (40, 40, 200, 3)])
def test_neighborhoods_equal_their_definitions(n: int, m: int, width: int, k: int) -> None:
    rng = np.random.default_rng(0)
    x, reference = 0.9 * rng.normal(size=(n, width)) + 1000.1, rng.normal(size=(m, width)) + 1000
    expected = plain(x, reference, k)
    assert expected.recall > 0
    for size in (1, 4096, 2**24):  # one sample at a time, some, all
        assert neighborhoods(x, reference, k=k, tile_bytes=size) == expected


def test_ties_and_duplicates_count_as_inside() -> None:
    rng = np.random.default_rng(0)
    x, reference = (rng.integers(0, 3, size=(n, 3)).astype(np.float64) for n in (90, 70))
    assert neighborhoods(x, reference) == plain(x, reference, 5)
    same = np.ones((30, 4), np.float32)
    assert neighborhoods(same, same) == Neighborhoods(1.0, 1.0, 6.0, 1.0)
    apart = neighborhoods(same + np.float32(1e-6), same)  # radii are 0: the next float is outside
    assert (apart.precision, apart.coverage) == (0.0, 0.0)


def test_neighborhoods_decide_what_float32_cannot() -> None:
    """Distances that differ in the tenth digit from the radius, and a sample too large for float32."""
    reference = np.zeros((3, 2))
    reference[:, 0] = [0.0, 1.0, 2.0]
    inside, outside = (np.array([[3.0 + step, 0.0], [9.0, 0.0]]) for step in (-1e-10, 1e-10))
    assert neighborhoods(inside, reference, k=1).precision == 0.5
    assert neighborhoods(outside, reference, k=1).precision == 0.0
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30, 3))
    x[0] = 1e30
    assert neighborhoods(x, y, k=3) == plain(x, y, 3)


def test_neighborhoods_do_not_change_with_scale_rotation_and_shift() -> None:
    x, reference = clusters(90, 4, 0), clusters(80, 6, 1)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0]
    expected = neighborhoods(x, reference)
    for change in (lambda z: 1e-12 * z, lambda z: 1e12 * z, lambda z: z @ turn, lambda z: z + 1000):
        assert neighborhoods(change(x), change(reference)) == expected
    # The Fréchet distance goes with the square of the scale; the kernel distance has a scale of its own.
    options = {"metrics": ("frechet", "kernel")}
    one, ten = scored(x, reference, **options), scored(10 * x, 10 * reference, **options)
    assert ten[FRECHET].value == pytest.approx(100 * one[FRECHET].value, rel=1e-9)
    assert ten[KERNEL].value > 1000 * one[KERNEL].value


def test_the_jackknife_extrapolates_a_bias_of_order_one_over_n() -> None:
    assert jackknife(2 + 5 / 100, [2 + 5 / 90] * 10) == pytest.approx((2, 0))


def test_the_jackknife_of_a_mean_is_its_t_interval_over_groups() -> None:
    x = np.random.default_rng(0).normal(size=(10, 30)) + 3
    value, half = jackknife(x.mean(), [np.delete(x, group, 0).mean() for group in range(10)])
    low, high = stats.t.interval(0.95, 9, x.mean(), stats.sem(x.mean(1)))
    assert (value - half, value, value + half) == pytest.approx((low, x.mean(), high))


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.4, 1.2)])
def test_intervals_hold_what_many_samples_would_give(shift: float, scale: float) -> None:
    """Of 60 draws of 150 samples, 95 % intervals hold the truth at least 50 times; the plain distance is biased."""
    width, true = 8, 8 * (shift**2 + (scale - 1) ** 2)
    rng = np.random.default_rng(0)
    drawn = [
        scored(
            scale * rng.normal(size=(150, width)) + shift,
            rng.normal(size=(150, width)),
            metrics=("frechet", "kernel"),
            seed=seed,
        )
        for seed in range(60)
    ]
    held = {
        name: sum(s[name].low <= t <= s[name].high for s in drawn) for name, t in ((EXTRAPOLATED, true), (KERNEL, 0))
    }
    found = {name: np.array([scores[name].value for scores in drawn]) for name in (FRECHET, EXTRAPOLATED)}
    error = 4 * found[EXTRAPOLATED].std() / np.sqrt(60)
    assert held[EXTRAPOLATED] >= 50
    assert found[EXTRAPOLATED].mean() == pytest.approx(true, abs=error)
    assert found[FRECHET].mean() > true + error
    assert held[KERNEL] >= 50 if shift == 0 else held[KERNEL] < 30


# --------------------------------------------------------------------------------------------------------------- cases


def test_samples_of_the_same_distribution() -> None:
    scores = scored(clusters(300, 6, 0), clusters(300, 6, 1))
    assert list(scores) == [FRECHET, EXTRAPOLATED, KERNEL, "precision", "recall", "density", "coverage"]
    assert scores[KERNEL].low < 0 < scores[KERNEL].high
    assert scores[EXTRAPOLATED].low < 0 < scores[EXTRAPOLATED].high
    assert min(scores[name].value for name in ("precision", "recall", "coverage")) > 0.9
    assert scores["density"].value == pytest.approx(1, abs=0.15)
    for score in scores.values():
        assert (score.num_samples, score.num_reference, score.extractor) == (300, 300, "mine")
        assert score.low <= score.value <= score.high
        assert score.better == ("lower" if score.metric in (FRECHET, EXTRAPOLATED, KERNEL) else "higher")


def test_a_dropped_mode_lowers_recall_and_coverage_and_not_precision() -> None:
    whole, dropped = (scored(clusters(300, modes, 0), clusters(300, 6, 1)) for modes in (6, 3))
    assert dropped["precision"].value > 0.9
    for name in ("recall", "coverage"):
        assert dropped[name].high < 0.6 < whole[name].low
    assert dropped[KERNEL].low > whole[KERNEL].high


def test_noise_lowers_precision_and_density_and_not_recall() -> None:
    clean, noisy = (scored(clusters(300, 6, 0, spread=spread), clusters(300, 6, 1)) for spread in (0.5, 2.0))
    for name in ("precision", "density"):
        assert noisy[name].high < clean[name].low
    assert noisy["recall"].value > 0.9
    assert noisy[FRECHET].low > clean[FRECHET].high


def test_one_sample_many_times_has_precision_and_no_coverage() -> None:
    reference = clusters(200, 6, 1)
    scores = scored(np.repeat(reference[:1], 50, axis=0), reference)
    assert scores["precision"].value == 1
    assert scores["coverage"].value < 0.1
    assert scores["recall"].value <= 1 / 200  # balls of radius 0


def test_scores_depend_on_the_seed_in_their_intervals_only_and_not_on_the_order() -> None:
    x, reference = clusters(200, 5, 0), clusters(150, 6, 1)
    first, again, other = (scored(x, reference, seed=seed) for seed in (0, 0, 1))
    assert first == again
    for name, score in first.items():
        if name not in (KERNEL, EXTRAPOLATED):
            assert other[name].value == score.value
    assert other["recall"].low != first["recall"].low
    assert scored(x[::-1], reference[::-1])[FRECHET].value == pytest.approx(first[FRECHET].value, rel=1e-9)


def test_the_frechet_distance_is_that_of_the_engine() -> None:
    x, reference = clusters(200, 5, 0).astype(np.float32), clusters(150, 6, 1).astype(np.float32)
    assert scored(x, reference)[FRECHET].value == frechet_distance(gaussian(x), gaussian(reference))


def test_too_few_samples_for_the_width_are_told() -> None:
    rng = np.random.default_rng(0)
    scores, warnings = score_features(rng.normal(size=(60, 40)), rng.normal(size=(500, 40)), extractor="mine")
    assert EXTRAPOLATED not in [score.metric for score in scores]
    assert [w.startswith("60 samples are too few for the Frechet distance of 40 features") for w in warnings] == [True]
    _, warnings = score_features(rng.normal(size=(200, 40)), rng.normal(size=(500, 40)), extractor="mine")
    assert "of the Frechet distance is the bias of 200 and 500 samples" in warnings[0]
    _, warnings = score_features(rng.normal(size=(500, 4)) + 3, rng.normal(size=(500, 4)), extractor="mine")
    assert warnings == ()


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.zeros((19, 3)), {}, r"samples have features of shape \(19, 3\); pass \(n, D\) with n at least 20"),
        (np.zeros((30, 4)), {}, "features of width 4 and 3 cannot be compared"),
        (
            np.full((30, 3), np.inf),
            {},
            "features of samples are not finite; the samples or the extractor have diverged",
        ),
        (np.zeros((30, 3)), {"metrics": ("fid",)}, "unknown score 'fid'; use frechet, kernel, precision"),
        (np.zeros((30, 3)), {"metrics": ()}, "unknown score ''"),
        (np.zeros((30, 3)), {"k": 0}, "k is 0 for 27 and 36 samples; pass k between 1 and 26"),
        (np.zeros((30, 3)), {"k": 27}, "k is 27 for 27 and 36 samples; pass k between 1 and 26"),
    ],
)
def test_features_that_cannot_be_scored_are_refused(x: NDArray[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scored(x, np.random.default_rng(0).normal(size=(40, 3)), **options)


def test_progress_ends_at_its_total() -> None:
    steps: list[tuple[int, int]] = []
    scored(clusters(40, 6, 0), clusters(40, 6, 1), progress=lambda *at: steps.append(at))
    assert steps == [(i + 1, GROUPS + 3) for i in range(GROUPS + 3)]


# ----------------------------------------------------------------------------------------------------------- files


def pixels(n: int = 30, shape: tuple[int, ...] = (8, 8, 1)) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, size=(n, *shape)).astype(np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 6, 3)])
def test_an_npz_is_read_as_images(save: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    images = pixels(shape=shape)
    save(tmp_path / "x.npz", images, labels=np.arange(30))  # something else stands beside them
    samples = load_array(tmp_path / "x.npz")
    assert samples.shape == (shape[2], *shape[:2])
    assert (len(samples), samples.num_classes, samples.modality) == (30, 0, "image")
    batch = samples.batch([3, 1])
    expected = images[[3, 1]].transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(batch.x.numpy(), expected, atol=1e-6)
    assert batch.x.is_contiguous()
    assert batch.ids.tolist() == [3, 1]
    assert samples.value_range == pytest.approx((images.min() / 127.5 - 1, images.max() / 127.5 - 1))


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2"])
@pytest.mark.parametrize("shape", [(2, 9), (1, 4, 4), (1, 2, 3, 4)])
def test_an_npy_is_read_as_samples_of_any_grid(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(25, *shape)).astype(dtype)
    for name, array in (("c.npy", x), ("fortran.npy", np.asfortranarray(x))):
        np.save(tmp_path / name, array)
        samples = load_array(tmp_path / name)
        assert samples.shape == shape
        got = samples.batch([5, 0])
        assert got.x.dtype == torch.float32
        np.testing.assert_array_equal(got.x.numpy(), x[[5, 0]].astype(np.float32))
    assert load_array(tmp_path / "c.npy").fingerprint == load_array(tmp_path / "fortran.npy").fingerprint
    x[24] += 1
    np.save(tmp_path / "other.npy", x)
    assert load_array(tmp_path / "other.npy").fingerprint != samples.fingerprint


def test_a_large_npz_stays_on_disk(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pixels())
    assert isinstance(load_array(tmp_path / "x.npz")._array, np.memmap)


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def cli(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a command in a folder of its own, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine.py").write_text("def flat(x):\n    return x.flatten(1)[:, 20:30]\ndef images(x):\n    return x\n")
    return cli


@pytest.fixture
def refused(cli):
    """Runs a command that must be refused: exit code 2, one line on standard error, nothing on standard output."""

    def call(*arguments: object) -> str:
        code, out, err = cli(*arguments)
        lines = [line for line in err.splitlines() if not line.startswith(("training", "features"))]
        assert (code, out, len(lines)) == (2, "", 1), err
        return lines[0]

    return call


def digits_npz(path: Path) -> None:
    x = digits().validation.batch(range(100)).x.numpy()
    np.savez(path, ((x + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1))


def test_the_command_prints_and_writes_its_table(tmp_path: Path, cli) -> None:
    digits_npz(tmp_path / "x.npz")
    command = ["score", "x.npz", "--data", "digits", "--extractor", "mine.py:flat", "--out", "scores"]
    code, out, err = cli(*command)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["score", "value", "95", "%", "interval", "better", "samples", "reference"]
    assert [line.startswith(name) for line, name in zip(lines[1:], (FRECHET, EXTRAPOLATED, KERNEL), strict=False)]
    assert lines[8] == "extractor: flat"
    table = pd.read_csv(tmp_path / "scores" / "scores.csv")
    assert table["metric"].tolist() == [FRECHET, EXTRAPOLATED, KERNEL, *METRICS[2:]]
    assert set(table["extractor"]) == {"flat"}
    assert set(table["num_samples"]) == {100}
    assert set(table["num_reference"]) == {400}
    record = json.loads((tmp_path / "scores" / "scores.json").read_text())
    times = tmp_path / "scores" / "times.json"
    write_record(times, {"seconds": {"scores": 1000.0}, "memory_bytes": 1, "device_bytes": None})
    code, out, _ = cli(*command, "--json")
    assert json.loads(out) == record
    assert json.loads(times.read_text())["seconds"]["scores"] < 1000
    expected, _ = score_features(
        load_array(tmp_path / "x.npz").batch(range(100)).x.flatten(1)[:, 20:30].numpy(),
        digits().test.batch(range(400)).x.flatten(1)[:, 20:30].numpy(),
        extractor="flat",
    )
    assert [row["value"] for row in record["scores"]] == [score.value for score in expected]


def test_metrics_neighbors_and_counts_are_passed_on(tmp_path: Path, cli) -> None:
    digits_npz(tmp_path / "x.npz")
    command = ["score", "x.npz", "--data", "digits", "--extractor", "mine.py:flat", "--json"]
    code, out, _ = cli(*command, "--metrics", "recall, precision", "--neighbors", 3, "--num-test", 100)
    rows = json.loads(out)["scores"]
    assert code == 0
    assert [(row["metric"], row["num_reference"]) for row in rows] == [("precision", 100), ("recall", 100)]
    x = load_array(tmp_path / "x.npz").batch(range(100)).x.flatten(1)[:, 20:30].numpy()
    expected = plain(x, digits().test.batch(range(100)).x.flatten(1)[:, 20:30].numpy(), 3)
    assert [row["value"] for row in rows] == [expected.precision, expected.recall]


def test_the_embedded_extractor_is_trained_once_and_named(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(classifier_extractor.__kwdefaults__, "steps", 3)
    digits_npz(tmp_path / "x.npz")
    command = ["score", "x.npz", "--data", "digits", "--metrics", "frechet", "--json"]
    code, out, err = cli(*command)
    assert code == 0, err
    assert json.loads(out)["extractor"] == "64 features of a classifier trained 3 steps on the labels"
    assert "training the extractor: 3 of 3" in err
    assert len(list((tmp_path / "cache" / "layerprobe" / "extractors").iterdir())) == 1
    code, again, err = cli(*command)
    assert (code, again) == (0, out)
    assert "training" not in err


def test_an_archive_of_gray_images_is_scored_as_gray(tmp_path: Path) -> None:
    gray = (digits().validation.batch(range(40)).x * 127.5 + 127.5).round().to(torch.uint8).movedim(1, -1).numpy()
    np.savez(tmp_path / "gray.npz", arr_0=np.repeat(gray, 3, axis=-1))
    generated, _ = open_comparison(tmp_path / "gray.npz", DataSource("digits"))
    assert generated.shape == (1, 8, 8)
    np.testing.assert_array_equal(generated.batch([3]).x[0, 0], gray[3, ..., 0].astype(np.float32) / 127.5 - 1)
    tinted = np.repeat(gray, 3, axis=-1)
    tinted[7, 0, 0, 0] += 1
    np.savez(tmp_path / "tinted.npz", arr_0=tinted)
    with pytest.raises(ValueError, match=r"tinted.npz contains color images but the data is gray; pass --channels 3"):
        open_comparison(tmp_path / "tinted.npz", DataSource("digits"))


def test_a_folder_of_samples_and_a_file_as_reference(tmp_path: Path, cli) -> None:
    samples = tiny_samples(60).x.numpy()
    (tmp_path / "drawn").mkdir()
    np.save(tmp_path / "drawn" / "samples.npy", samples)
    np.savez(tmp_path / "drawn" / "samples.npz", pixels())  # the .npy is the finer one
    np.save(tmp_path / "real.npy", tiny_samples(80, seed=1).x.numpy())
    (tmp_path / "all.py").write_text("def flat(x):\n    return x.flatten(1)\n")
    code, out, err = cli("score", "drawn", "--data", "real.npy", "--extractor", "all.py:flat", "--json")
    assert code == 0, err
    rows = json.loads(out)["scores"]
    assert {(row["num_samples"], row["num_reference"]) for row in rows} == {(60, 80)}
    (tmp_path / "drawn" / "samples.npy").unlink()
    np.savez(tmp_path / "real.npz", pixels(40))
    assert cli("score", "drawn", "--data", "real.npz", "--extractor", "mine.py:flat", "--metrics", "kernel")[0] == 0


def test_a_dry_run_checks_and_writes_nothing(tmp_path: Path, cli, refused) -> None:
    digits_npz(tmp_path / "x.npz")
    before = sorted(tmp_path.iterdir())
    code, out, _ = cli("score", "x.npz", "--data", "digits", "--out", "scores", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["num_reference"] == 400
    assert json.loads(out)["extractor"] == "trained on the data"
    (tmp_path / "score.toml").write_text('data = "digits"\nmetrics = "kernel"\nnum-test = 50\n')
    code, out, _ = cli("score", "x.npz", "--config", "score.toml", "--dry-run", "--json")
    assert (json.loads(out)["metrics"], json.loads(out)["num_reference"]) == (["kernel"], 50)
    (tmp_path / "score.toml").unlink()
    assert "k is" not in refused("score", "none.npz", "--data", "digits", "--dry-run")
    far = ("score", "x.npz", "--data", "digits", "--neighbors", 90, "--dry-run")
    assert "k is 90 for 90 and 360 samples; pass k between 1 and 89" in refused(*far)
    (tmp_path / "scores").mkdir()
    write_record(tmp_path / "scores" / "scores.json", {"samples": "y.npz"})
    arguments = ("score", "x.npz", "--data", "digits", "--out", "scores", "--dry-run")
    assert "scores holds scores of another command (different: data, metrics" in refused(*arguments)
    shutil.rmtree(tmp_path / "scores")
    assert sorted(tmp_path.iterdir()) == before


def write_bad(folder: Path) -> None:
    x = digits().validation.batch(range(60)).x.numpy()
    broken = x.copy()
    broken[7, 0, 0, 0] = np.nan
    np.save(folder / "real.npy", x)
    np.save(folder / "nan.npy", broken)
    np.save(folder / "few.npy", x[:19])
    np.save(folder / "none.npy", x[:0])
    np.save(folder / "wide.npy", np.zeros((30, 1, 8, 9), np.float32))
    np.save(folder / "integers.npy", pixels())
    np.save(folder / "flat.npy", np.zeros((30, 64), np.float32))
    np.save(folder / "objects.npy", np.array([{}] * 30), allow_pickle=True)
    (folder / "empty.npy").write_bytes(b"")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "cut.npy").write_bytes((folder / "few.npy").read_bytes()[:500])
    np.savez(folder / "other.npz", images=pixels())
    np.savez(folder / "float.npz", x)
    np.savez(folder / "no-images.npz", pixels()[:, 0])
    np.savez(folder / "objects.npz", np.array([{}] * 30, object))
    np.savez(folder / "none.npz", pixels(0))
    (folder / "cut.npz").write_bytes((folder / "other.npz").read_bytes()[:-40])
    stored = bytearray((folder / "no-images.npz").read_bytes())
    stored[stored.index(b"PK\1\2") + 10] = 99  # the way it is compressed
    (folder / "method.npz").write_bytes(stored)
    with zipfile.ZipFile(folder / "text.npz", "w") as archive:
        archive.writestr("arr_0.npy", "no array at all")
    (folder / "folder").mkdir()


BAD = {
    "absent.npz": "there is no file or folder of samples absent.npz; pass an .npz, an .npy or a folder",
    "nan.npy": "sample 7 of nan.npy has NaN or infinite values; remove or redraw it",
    "few.npy": "19 samples are too few; pass at least 20",
    "none.npy": r"none.npy contains no samples \(shape \(0, 1, 8, 8\)\)",
    "wide.npy": "samples are 1x8x9 but the data is 1x8x8; pass data of the samples' shape",
    "integers.npy": r"contains uint8 of shape \(30, 8, 8, 1\); an .npy must contain floating point \(n, C, \*grid\)",
    "flat.npy": r"contains float32 of shape \(30, 64\); an .npy must contain floating point",
    "objects.npy": "objects.npy is not a complete .npy of numbers",
    "empty.npy": "empty.npy is empty; write it again",
    "empty.npz": "empty.npz is empty; write it again",
    "cut.npy": r"cut.npy is not a complete .npy of numbers \(.*\); write it again",
    "method.npz": r"method.npz is not a complete .npz of numbers \(.*\); write it again",
    "other.npz": r"other.npz has no array arr_0; pass images as uint8 \(n, H, W, C\) under that name",
    "float.npz": r"contains float32 of shape \(60, 1, 8, 8\); an .npz must contain images as uint8 \(n, H, W, C\)",
    "no-images.npz": r"contains uint8 of shape \(30, 8, 1\); an .npz must contain images",
    "objects.npz": "objects.npz is not a complete .npz of numbers",
    "none.npz": "none.npz contains no samples",
    "cut.npz": "cut.npz is not a complete .npz of numbers",
    "text.npz": "text.npz is not a complete .npz of numbers",
    "folder": "folder contains no samples.npy; pass a folder made by `layerprobe sample`",
}


def test_samples_that_cannot_be_scored_are_refused_in_one_line(tmp_path: Path, refused) -> None:
    write_bad(tmp_path)
    for name, message in BAD.items():
        line = refused("score", name, "--data", "real.npy", "--extractor", "mine.py:flat")
        assert re.search(message, line), line


def test_options_that_cannot_be_are_refused_in_one_line(tmp_path: Path, refused) -> None:
    digits_npz(tmp_path / "x.npz")
    (tmp_path / "file").write_text("precious")
    score = ["score", "x.npz", "--data", "digits"]
    flat = ["--extractor", "mine.py:flat"]
    assert "unknown score 'fid'" in refused(*score, "--metrics", "kernel,fid")
    assert "file is a file, not a folder" in refused(*score, *flat, "--out", "file")
    assert "--extractor none does not exist" in refused(*score, "--extractor", "none")
    assert "--extractor mine.py:none: mine.py has no none; it has flat, images" in refused(
        *score, "--extractor", "mine.py:none"
    )
    line = refused(*score, "--extractor", "mine.py:images")
    assert "images returns shape (100, 1, 8, 8) for 100 samples; it must return features (B, D)" in line
    assert "k is 91 for 90 and 360 samples" in refused(*score, *flat, "--neighbors", 91)
    assert "10 samples to compare with are too few" in refused(*score, *flat, "--num-test", 10)
    against = ["score", "x.npz", "--data", "x.npz", *flat]
    assert "x.npz is used as it is; leave out --size" in refused(*against, "--size", 8)
    assert "leave out --num-test" in refused(*against, "--num-test", 30)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x, False),
        (lambda x: 1.2 * x, False),
        (lambda x: (x + 1) / 2, True),
        (lambda x: (x + 1) * 127.5, True),
        (lambda x: x - 1.5, True),
    ],
)
def test_samples_of_another_scale_are_told(change: Any, told: bool, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", change(digits().validation.batch(range(100)).x.numpy()))
    warnings = score_runs.range_warnings(load_array(tmp_path / "x.npy"), digits().test)
    assert [warning.startswith("samples range from") for warning in warnings] == [True] * told


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.slow  # 300 steps of training, 15 to 30 s
def test_faults_of_real_images_show_in_the_score_that_is_made_for_them(shared_data: Path) -> None:
    splits = load(shared_data / "mnist", num_train=2000, num_validation=600, num_test=600, size=14)
    extractor = classifier_extractor(splits.train)
    batch = splits.validation.batch(range(600))
    assert batch.labels is not None
    noise = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(0))
    reference = sample_features(extractor, splits.test.batch(range(600)).x)
    good, dropped, noisy = (
        scored(sample_features(extractor, x), reference)
        for x in (batch.x, batch.x[batch.labels < 5], batch.x + 0.6 * noise)
    )
    assert good[KERNEL].low < 0 < good[KERNEL].high
    assert min(good[name].value for name in ("precision", "recall", "coverage")) > 0.8
    assert dropped["precision"].value > 0.8
    for name in ("recall", "coverage"):
        assert dropped[name].value < good[name].low
    assert noisy["precision"].value < good["precision"].low
    for bad in (dropped, noisy):
        assert bad[FRECHET].low > good[FRECHET].high
        assert bad[KERNEL].low > good[KERNEL].high
