"""The record of evidence: columns of criteria, numbers of layers and pairs, and its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from planted_evidence import planted_evidence, quantity

from layerprobe.analyses.measures.jackknife import Z95, Estimate
from layerprobe.analyses.tables import evidence as e
from layerprobe.analyses.tables.evidence import CRITERIA, PairEvidence, Quantity
from layerprobe.extraction.ablation import LOSS_INCREASE

LAYERS = ("null", "b, c", "d")
ACCURACY = quantity([[0.1, 0.2, 0.4], [0.3, 0.4, np.nan]], 0.01, {(1, 2): "the features hold nan or inf"})
GAP = quantity([[0.1, 0.3, 0.2], [0.1, np.nan, np.nan]], 0.02, {(1, 1): "d: nan", (1, 2): "d: nan"})


def evidence() -> PairEvidence:
    by_layer = {"probe accuracy": ACCURACY, LOSS_INCREASE: quantity([[1 / 3, 2e-7, -3.0]] * 2, np.nan)}
    return planted_evidence(by_layer, {e.PROBE_GAP: GAP, e.CKA: GAP}, layers=LAYERS, noise_levels=(0.1, 0.55))


def test_criteria_are_columns_of_the_student_the_teacher_or_the_pair() -> None:
    found = evidence()
    assert found.pairs == (("null", "b, c"), ("null", "d"), ("b, c", "d"))
    np.testing.assert_array_equal(found.columns(e.TEACHER_PROBE)[0], ACCURACY.mean[[1, 2, 2]])
    np.testing.assert_array_equal(found.columns(e.STUDENT_NEED)[0], found.by_layer[LOSS_INCREASE].mean[[0, 0, 1]])
    np.testing.assert_array_equal(found.columns(e.PROBE_GAP)[1], GAP.mean_low)
    np.testing.assert_allclose(found.columns(e.DISTANCE)[0], [1 / 3, 2 / 3, 1 / 3])
    np.testing.assert_array_equal(found.columns(e.STUDENT_DEPTH)[2], [1 / 3, 1 / 3, 2 / 3])
    np.testing.assert_allclose(found.columns(e.CAPPED_DISTANCE)[0], [1 / 3, 0.4, 1 / 3])
    expected = -np.hypot(np.array([1, 1, 2]) / 3 - 0.25, np.array([2, 3, 3]) / 3 - 0.7)
    np.testing.assert_allclose(found.columns(e.NEARNESS)[0], expected)
    np.testing.assert_allclose(found.number(e.NEARNESS, 0)[:3], expected[0])
    assert np.isnan(found.columns(e.COSINE)[0]).all()
    assert (found.has(e.PROBE_GAP), found.has(e.COSINE)) == (True, False)
    for name in CRITERIA:
        for index in range(3):
            np.testing.assert_array_equal(found.number(name, index)[:3], [of[index] for of in found.columns(name)])


def test_a_missing_value_has_a_reason_and_no_other_value_has_one() -> None:
    found = evidence()
    assert found.layer_number("probe accuracy", "d").note == "d: at noise level 0.55, the features hold nan or inf"
    assert found.layer_number("probe accuracy", "null") == pytest.approx((0.2, 0.19, 0.21, ""))
    assert found.number(e.PROBE_GAP, 1).note == "at noise level 0.55, d: nan"
    assert found.number(e.COSINE, 0).note == "the evidence has no cosine"
    assert found.number(e.STUDENT_CHANGE, 0).note == "the evidence has no student velocity change"
    assert Quantity.missing(2, 3, "why").number(1, (0.1, 0.2)).note == "at noise level 0.1, why"
    unsaid = Quantity.from_ends(*(np.full((1, 1), np.nan),) * 3, [[""]])
    assert unsaid.notes == (("there is no estimate: the two differ by a constant, or the samples are too few",),)


def test_the_interval_of_a_mean_is_paired_where_samples_are_the_same() -> None:
    """Two levels whose errors cancel: each is unsure, their mean is not."""
    influence = np.random.default_rng(0).standard_normal(50)
    influence -= influence.mean()
    found = Quantity.from_estimate(Estimate(np.ones((2, 1)), np.stack([influence, -influence])[:, None]), [[""], [""]])
    width = Z95 * np.sqrt(np.square(influence).sum() / (50 * 49))
    np.testing.assert_allclose(found.high - found.value, width)
    np.testing.assert_allclose(found.mean_high, found.mean)


def test_evidence_survives_its_file_to_six_digits(tmp_path: Path) -> None:
    """Layers may be called "null" or hold a comma; what has no value and what has no interval stays so."""
    written = evidence()
    written.write_csv(tmp_path / "evidence.csv")
    read = PairEvidence.read_csv(tmp_path / "evidence.csv")
    assert (read.layers, read.noise_levels, read.pairs) == (written.layers, written.noise_levels, written.pairs)
    for ours, theirs in ((read.by_layer, written.by_layer), (read.by_pair, written.by_pair)):
        assert list(ours) == list(theirs)
        for name, of in ours.items():
            for part in ("value", "low", "high", "mean", "mean_low", "mean_high"):
                np.testing.assert_allclose(getattr(of, part), getattr(theirs[name], part), rtol=1e-5)
            assert of.notes == theirs[name].notes
    assert "nan" not in (tmp_path / "evidence.csv").read_text().replace("nan or inf", "").replace("d: nan", "")


def test_evidence_without_pairs_survives_its_file(tmp_path: Path) -> None:
    alone = planted_evidence({"probe accuracy": quantity([[0.5]])}, {}, layers=("a",), pairs=())
    alone.write_csv(tmp_path / "evidence.csv")
    read = PairEvidence.read_csv(tmp_path / "evidence.csv")
    assert (read.layers, read.pairs, read.by_pair) == (("a",), (), {})
    assert read.layer_number("probe accuracy", "a").value == 0.5


def test_other_tables_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evidence.csv"
    path.write_text("student,teacher\na,b\n")
    with pytest.raises(ValueError, match=r"has no column quantity.*; run `layerprobe analyze`"):
        PairEvidence.read_csv(path)
    with pytest.raises(FileNotFoundError):
        PairEvidence.read_csv(tmp_path / "none.csv")
    evidence().write_csv(path)
    lines = path.read_text().splitlines(keepends=True)
    for damage in (lines[:1], [*lines[:-1]], [line.replace("0.55", "much") for line in lines], [lines[0], *lines[2:]]):
        path.write_text("".join(damage))
        with pytest.raises(ValueError, match=r"evidence.csv is damaged \(.*\); run `layerprobe analyze` again"):
            PairEvidence.read_csv(path)
