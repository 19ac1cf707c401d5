"""The search for a penalty: where its choice lies at an end it goes on, and says where it had to stop."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ddpm_unet import DDPMUNet
from gaussian_classes import Array, clouds, searched

from layerprobe.analyses.measures.logistic import search
from layerprobe.analyses.measures.logistic.search import INVERSE_PENALTIES, STRONGER, WEAKER, choose_fit
from layerprobe.checkpoints.opening import open_checkpoint
from layerprobe.data.loading import load
from layerprobe.extraction.features import SPLITS
from layerprobe.extraction.forward import extract
from layerprobe.extraction.plan import ExtractionPlan


def near_twins(seed: int, *, n: int = 300, contrast: float = 0.03) -> tuple[Array, Array]:
    """Two features that are almost equal, and three classes that only their difference tells apart."""
    rng = np.random.default_rng(seed)
    y, common = rng.integers(0, 3, n), rng.normal(size=n)
    return np.stack([common, common + contrast * (y - 1 + 0.3 * rng.normal(size=n))], axis=1), y


def preferring(inverse_penalty: float) -> Any:
    """A score that is best at one penalty, and falls by the decade."""
    return lambda fit: 0.5 - abs(np.log10(fit.inverse_penalty / inverse_penalty)) / 100


@pytest.mark.parametrize("best", [1e-5, 1e-3, 1e-1, 1.0, 10.0, 1e4])
def test_the_best_decade_is_found_wherever_it_is(best: float) -> None:
    x, y, _ = clouds(0, n=60)
    chosen = choose_fit(x, y, preferring(best))
    assert chosen.fit.inverse_penalty == best
    assert chosen.end == ""
    assert chosen.fit.converged


@pytest.mark.parametrize(("best", "last", "end"), [(1e-9, STRONGER[-1], "strongest"), (1e9, WEAKER[-1], "weakest")])
def test_it_says_when_it_took_the_last_penalty(best: float, last: float, end: str) -> None:
    x, y, _ = clouds(0, n=60)
    chosen = choose_fit(x, y, preferring(best))
    assert (chosen.fit.inverse_penalty, chosen.end) == (last, end)


def test_only_as_many_penalties_are_fitted_as_are_needed() -> None:
    x, y, _ = clouds(0, n=60)
    tried: list[float] = []

    def score(fit: Any) -> float:
        tried.append(fit.inverse_penalty)
        return preferring(10.0)(fit)

    choose_fit(x, y, score)
    assert tried == [*INVERSE_PENALTIES, 10.0, 100.0, 1000.0]


@pytest.mark.parametrize(("score", "beyond"), [(0.5, STRONGER[:2]), (1.0, ())])
def test_of_equally_good_ones_the_strongest_of_the_grid_is_chosen(score: float, beyond: tuple[float, ...]) -> None:
    x, y, _ = clouds(0, n=60)
    tried: list[float] = []

    def equal(fit: Any) -> float:
        tried.append(fit.inverse_penalty)
        return score

    chosen = choose_fit(x, y, equal)
    assert (chosen.fit.inverse_penalty, chosen.end) == (INVERSE_PENALTIES[0], "")
    assert tried == [*INVERSE_PENALTIES, *beyond]  # nothing is better than 1


def test_beyond_a_fit_that_did_not_converge_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _ = clouds(0, n=60)
    original = search.logistic_path
    monkeypatch.setattr(search, "logistic_path", lambda *args, **options: original(*args, **options, max_passes=2))
    chosen = choose_fit(x, y, preferring(1e9))
    assert (chosen.fit.inverse_penalty, chosen.end) == (1.0, "weakest")
    assert not chosen.fit.converged


def test_given_penalties_are_not_left() -> None:
    x, y, _ = clouds(0, n=60)
    chosen = choose_fit(x, y, preferring(1e9), inverse_penalties=(1.0, 0.1))
    assert (chosen.fit.inverse_penalty, chosen.end) == (1.0, "weakest")
    assert choose_fit(x, y, preferring(1e9), inverse_penalties=(0.1,)).end == ""  # a single one is no search
    with pytest.raises(ValueError, match=r"inverse penalties C are \(\); pass finite numbers above 0"):
        choose_fit(x, y, preferring(1.0), inverse_penalties=())


def awkward(kind: str) -> tuple[Array, Array]:
    x, y, _ = clouds(1, distance=0.8)
    match kind:
        case "separable":
            x, y, _ = clouds(1, distance=20.0)
        case "constant features":
            x[:, 3:5] = 0.5, 0.0
        case "a class of two samples":
            y[y == 3] = 2
            y[:2] = 3
        case "more features than samples":
            x, y, _ = clouds(1, width=150, n=240, distance=0.3)
        case "every row twice":
            x, y = np.repeat(x, 2, axis=0), np.repeat(y, 2)
        case "near twins":
            x, y = near_twins(1)
        case "huge":
            x = x * 1e8
        case "tiny":
            x = x * 1e-8
        case "noise":
            y = np.random.default_rng(1).permutation(y)
    return x, y


@pytest.mark.parametrize(
    "kind",
    [
        "separable",
        "constant features",
        "a class of two samples",
        "more features than samples",
        "every row twice",
        "near twins",
        "huge",
        "tiny",
        "noise",
    ],
)
def test_penalty_and_accuracy_are_those_of_scikit_learn_over_the_same_search(kind: str) -> None:
    x, y = awkward(kind)
    x = (x - x.mean(0)) / np.where(x.std(0) == 0, 1, x.std(0))
    half = len(x) // 2
    chosen = choose_fit(x[:half], y[:half], lambda fit: float((fit.predict(x[half:]) == y[half:]).mean()))
    reference, accuracy = searched(x[:half], y[:half], x[half:], y[half:])
    assert chosen.fit.inverse_penalty == reference.C
    assert (chosen.fit.predict(x[half:]) == y[half:]).mean() == accuracy
    assert chosen.fit.converged


def test_near_twins_want_less_penalty_than_the_grid_has() -> None:
    x, y = near_twins(1)
    x = (x - x.mean(0)) / x.std(0)

    def accuracy(fit: Any) -> float:
        return float((fit.predict(x[150:]) == y[150:]).mean())

    chosen = choose_fit(x[:150], y[:150], accuracy)
    within = choose_fit(x[:150], y[:150], accuracy, inverse_penalties=INVERSE_PENALTIES)
    assert within.end == "weakest"
    assert chosen.fit.inverse_penalty > 10
    assert accuracy(chosen.fit) > accuracy(within.fit) + 0.2


def test_a_trained_bottleneck_is_read_as_scikit_learn_reads_it(
    shared_checkpoints: Path, shared_data: Path, tmp_path: Path
) -> None:
    """The narrowest stage of a DDPM that nobody here trained, 40 means over its positions."""
    network = f"{Path(str(inspect.getsourcefile(DDPMUNet)))}:DDPMUNet"
    backbone = open_checkpoint(
        shared_checkpoints / "ddpm_mnist.pt",
        model=network,
        layers=["b_mid"],
        schedule="ddpm-linear",
        prediction="eps",
        shape=(1, 28, 28),
    )
    splits = load(shared_data / "mnist", num_train=500, num_validation=500, num_test=1)
    store = extract(backbone, splits, ExtractionPlan(backbone.layers, (0.1,)), tmp_path)
    train, validation = (store.features("b_mid", 0.1, split=split).astype(np.float64) for split in SPLITS[:2])
    assert store.labels is not None
    labels = [store.labels[store.splits == split] for split in SPLITS[:2]]
    mean, spread = train.mean(0), np.where(train.std(0) == 0, 1, train.std(0))
    train, validation = (train - mean) / spread, (validation - mean) / spread

    def accuracy(fit: Any) -> float:
        return float((fit.predict(validation) == labels[1]).mean())

    chosen = choose_fit(train, labels[0], accuracy)
    reference, expected = searched(train, labels[0], validation, labels[1])
    assert (chosen.fit.inverse_penalty, accuracy(chosen.fit)) == (reference.C, expected)
    assert chosen.fit.converged
    assert chosen.fit.inverse_penalty > 10
    within = choose_fit(train, labels[0], accuracy, inverse_penalties=INVERSE_PENALTIES)
    assert within.end == "weakest"
    assert expected > accuracy(within.fit) + 0.1
