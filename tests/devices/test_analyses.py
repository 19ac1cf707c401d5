"""The analyses on a second device: the tables of the CPU, with the same certificates, one representation at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pretend_device import NAME, watched

from layerprobe.analyses.measures import spectrum
from layerprobe.analyses.measures.logistic import search
from layerprobe.analyses.measures.logistic.fits import FEW_SAMPLES, fit_logistic, fit_multilabel_path
from layerprobe.analyses.tables.measurements import Measurement, Representation
from layerprobe.analyses.tables.quality import encoder_rows, measure, recoverability_table
from layerprobe.extraction.features import FeatureStore, begin_store, shard_path, token_path, write_tensors

pytestmark = pytest.mark.devices

LAYERS, LEVELS, WIDTH, TOKENS = ("blocks.0", "blocks.1"), (0.5,), 5, 3


def planted(folder: Path, *, num_train: int = FEW_SAMPLES + 100, num_other: int = 60, draws: int = 1) -> FeatureStore:
    """Two layers that show three classes, the second better; tokens of twenty samples a split."""
    rng = np.random.default_rng(0)
    splits = np.repeat([0, 1, 2], [num_train, num_other, num_other])
    n = len(splits)
    labels = rng.integers(0, 3, n)
    centers = rng.normal(size=(3, WIDTH))
    features, tokens = {}, {}
    for i, layer in enumerate(LAYERS):
        features[layer] = (centers[labels] * (i + 1) / 2 + rng.normal(size=(1, draws, n, WIDTH))).astype(np.float32)
        tokens[layer] = rng.normal(size=(1, draws, 60, TOKENS, WIDTH)).astype(np.float32)
    plan = {"layers": LAYERS, "noise_levels": LEVELS, "draws": draws, "token_samples": 20}
    kept = {"shards": [0], "grids": dict.fromkeys(LAYERS, (TOKENS,))}
    begin_store(
        folder,
        {"plan": plan, "num_shards": 1, "tokens": kept},
        {"ids": np.arange(n), "splits": splits, "labels": labels},
    )
    write_tensors(shard_path(folder, 0), features)
    write_tensors(token_path(folder, 0), tokens)
    return FeatureStore.open(folder)


def same(got: pd.DataFrame, wanted: pd.DataFrame) -> None:
    """Equal in every word, and in every number up to the order of sums; gradient norms are equally small."""
    notes = [
        table["note"].str.replace(r"gradient norm \S+", "", regex=True) for table in (got, wanted) if "note" in table
    ]
    for column in wanted.columns:
        if column == "note":
            assert list(notes[0]) == list(notes[1])
        elif wanted[column].dtype == float:
            np.testing.assert_allclose(got[column], wanted[column], rtol=1e-6, atol=1e-8, err_msg=column)
        else:
            assert list(got[column]) == list(wanted[column])


def test_the_tables_are_those_of_the_cpu(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, penalties in (("INVERSE_PENALTIES", (0.1, 1.0)), ("WEAKER", ()), ("STRONGER", ())):
        monkeypatch.setattr(search, name, penalties)  # Two fits each take long enough on a device in Python.
    store = planted(tmp_path)
    there = torch.device(device)
    with watched() as ledger:
        tables = measure({"model": store}, device=there)
    for got, wanted in zip(tables, measure({"model": store}), strict=True):
        same(got, wanted)
    # Fits, neighbors, spectra and CKA have run there.
    assert device != NAME or {"mm", "topk", "linalg_qr", "linalg_vector_norm"} <= set(ledger.kernels)
    probes = tables[0][tables[0]["metric"] == "probe accuracy"]
    assert not probes["note"].str.contains("did not converge").any()
    same(recoverability_table(store, device=there), recoverability_table(store))
    outside = store.features("blocks.1", 0.5, split="validation")
    same(encoder_rows(store, outside, "mine", device=there), encoder_rows(store, outside, "mine"))


def test_a_gpu_holds_one_representation_at_a_time(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = planted(tmp_path, num_train=30, num_other=10)
    threads: set[int] = set()

    def thread(_: Representation) -> list[Measurement]:
        threads.add(threading.get_ident())
        return []

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    measure({"model": store}, analyses=[thread], device=torch.device(device))
    assert threads == {threading.get_ident()}


def test_fits_of_few_samples_stay_on_the_cpu(device: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 4)), np.arange(40) % 2
    with watched() as ledger:
        fit = fit_logistic(torch.from_numpy(x).to(device), y)
    assert "mm" not in ledger.kernels
    assert fit.objective == pytest.approx(fit_logistic(x, y).objective, rel=1e-12)
    labels = np.stack([y, 1 - y], 1)
    several, wanted = (fit_multilabel_path(each, labels, (1.0,)) for each in (torch.from_numpy(x).to(device), x))
    assert several[0][0].objective == pytest.approx(wanted[0][0].objective, rel=1e-12)


def test_many_classes_and_wide_features_are_fitted_there(device: str) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(FEW_SAMPLES + 90) % 26  # more than have a factorized Hessian
    x = rng.normal(size=(26, 6))[y] + rng.normal(size=(len(y), 6))
    fits = [fit_logistic(each, y, inverse_penalty=10.0) for each in (torch.from_numpy(x).to(device), x)]
    assert all(fit.converged for fit in fits)
    assert fits[0].objective == pytest.approx(fits[1].objective, rel=1e-9)
    assert list(fits[0].predict(torch.from_numpy(x).to(device))) == list(fits[1].predict(x))
    wide = rng.normal(size=(7, 20)).astype(np.float32)
    got, wanted = spectrum(torch.from_numpy(wide).to(device)), spectrum(wide)
    np.testing.assert_allclose(got.singular_values, wanted.singular_values, rtol=1e-9, atol=1e-9)


def test_analyses_of_ones_own_get_arrays(device: str, tmp_path: Path) -> None:
    store = planted(tmp_path, num_train=30, num_other=10)

    def mine(representation: Representation) -> list[Measurement]:
        return [
            Measurement("mean", "test", float(np.mean(representation.draws[0])), type(representation.draws[0]).__name__)
        ]

    quality, _ = measure({"model": store}, analyses=[mine], device=torch.device(device))
    assert list(quality["note"]) == ["ndarray"] * 2
