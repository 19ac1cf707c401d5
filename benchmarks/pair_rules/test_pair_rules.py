"""Planted effects in small tables are found, absent ones are not, and no rule sees the model that it is tested on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from scipy import stats

from layerprobe.analyses.experiments import FRECHET, HELD_OUT, PAIR_SWEEP_COLUMNS
from layerprobe.analyses.selection import RULE, rank_pairs
from layerprobe.analyses.tables import CAPPED_DISTANCE, CKA, NEARNESS, PROBE_GAP, PairEvidence, Quantity
from layerprobe.layersync import LayerPair

sys.path.insert(0, str(Path(__file__).parent))
from pair_rules import (
    Fitter,
    PairScorer,
    Rule,
    as_selected,
    chosen,
    fixed,
    judged,
    known_criteria,
    learned,
    leave_one_model_out,
    predict,
    rank_average,
    ridge,
    same_depths,
    scores,
    single,
)
from rule_figures import criteria_figure, expectations_figure, picks_figure
from sweep_cases import (
    DEPTHS,
    Case,
    by_model,
    ceiling,
    correlations,
    execution_order,
    false_alarms,
    noise,
    pooled,
    rank_correlation,
    read_case,
    worth,
)

Floats = NDArray[np.float64]
DOCS = Path(__file__).parents[2] / "docs" / "atlas"


def ends_of(depth: int) -> NDArray[np.int64]:
    return np.array(list(combinations(range(depth), 2)))


def planted(
    gains: Floats, criteria: dict[str, Floats] | None = None, *, name: str = "m", model: str | None = None
) -> Case:
    """Makes a case with all pairs of the number of layers that fits gains of shape (P, seeds)."""
    depth = round((1 + np.sqrt(1 + 8 * len(gains))) / 2)
    layers = tuple(f"blocks.{i}" for i in range(depth))
    pairs = tuple(LayerPair(*names) for names in combinations(layers, 2))
    return Case(name, model or name, FRECHET, 10, layers, pairs, gains, pd.DataFrame(criteria or {"a": gains[:, 0]}))


def models(
    rng: np.random.Generator,
    count: int = 4,
    *,
    weights: Sequence[float] = (1, -1, 0),
    depths: Sequence[int] = (8, 6),
    level: float = 0.1,
    seeds: int = 2,
) -> list[Case]:
    """Makes models whose gains are the sum of criteria a, b, c by `weights`, and of seed noise a third as large."""
    cases = []
    for index in range(count):
        num = len(ends_of(depths[index % len(depths)]))
        x = rng.standard_normal((num, 3))
        truth = x @ np.array(weights, float)
        gains = level + 0.05 * (truth[:, None] + 0.3 * rng.standard_normal((num, seeds)))
        criteria = {name: np.exp(x[:, i]) for i, name in enumerate("abc")}  # any monotonous scale must do
        cases.append(planted(gains, criteria, name=f"m{index}"))
    return cases


# ------------------------------------------------------------------------------------------------------ reading tables


def write_atlas(path: Path, rows: list[tuple[str, str, int, int, str, float, float]]) -> Path:
    pd.DataFrame(rows, columns=list(PAIR_SWEEP_COLUMNS)).to_csv(path, index=False)
    return path


def small_atlas(path: Path, *, seeds: Sequence[int] = (0, 1), leave_out: Sequence[tuple[str, int]] = ()) -> Path:
    """Writes a sweep of layers b.9, b.10, b.11 with benefits seed + distance / 10; `leave_out` is (student, seed)."""
    rows: list[tuple[str, str, int, int, str, float, float]] = []
    for seed in seeds:
        for step in (5, 10):
            rows.append(("", "", seed, step, FRECHET, 2.0, 0.0))
            for student, teacher in (("b.10", "b.11"), ("b.9", "b.11"), ("b.9", "b.10")):
                benefit = step / 10 * (seed + (int(teacher[2:]) - int(student[2:])) / 10)
                if (student, seed) not in leave_out:
                    rows.append((student, teacher, seed, step, FRECHET, 2 * (1 - benefit), benefit))
    return write_atlas(path, rows)


def quantity(values: Sequence[Sequence[float]], half: float = 0.01) -> Quantity:
    value = np.array(values, np.float64)
    return Quantity.from_ends(value, value - half, value + half, [[""] * value.shape[1]] * len(value))


def evidence_of(
    by_pair: dict[str, Quantity],
    layers: Sequence[str],
    by_layer: dict[str, Quantity] | None = None,
    levels: tuple[float, ...] = (0.1,),
) -> PairEvidence:
    ends = ends_of(len(layers))
    return PairEvidence(tuple(layers), levels, ends[:, 0], ends[:, 1], by_layer or {}, by_pair)


def written(path: Path, evidence: PairEvidence) -> Path:
    evidence.write_csv(path)
    return path


def test_a_case_has_the_pairs_in_execution_order_and_the_gains_of_the_last_step(tmp_path: Path) -> None:
    case = read_case(small_atlas(tmp_path / "small-steps-5-10.csv"), None)
    assert (case.name, case.model, case.step) == ("small-steps-5-10", "small", 10)
    assert case.layers == ("b.9", "b.10", "b.11")  # 9 before 10, though not in the alphabet
    assert case.pairs == (LayerPair("b.9", "b.10"), LayerPair("b.9", "b.11"), LayerPair("b.10", "b.11"))
    assert case.gains == pytest.approx(np.array([[0.1, 1.1], [0.2, 1.2], [0.1, 1.1]]))
    assert case.gain == pytest.approx([0.6, 0.7, 0.6])
    assert read_case(tmp_path / "small-steps-5-10.csv", None, step=5).gain == pytest.approx([0.3, 0.35, 0.3])


def test_an_atlas_in_its_folder_has_the_name_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    assert read_case(small_atlas(tmp_path / "mnist" / "atlas.csv"), None).name == "mnist"


def test_a_seed_counts_once_all_its_pairs_are_there(tmp_path: Path) -> None:
    case = read_case(small_atlas(tmp_path / "x.csv", leave_out=[("b.10", 1)]), None)
    assert case.gains[:, 0] == pytest.approx([0.1, 0.2, 0.1])
    assert case.num_seeds == 1
    # Of the one seed that there is, half-finished, there is what there is.
    assert len(read_case(small_atlas(tmp_path / "y.csv", seeds=[0], leave_out=[("b.10", 0)]), None).pairs) == 2


def test_without_evidence_there_are_the_depths(tmp_path: Path) -> None:
    criteria = read_case(small_atlas(tmp_path / "x.csv"), None).criteria
    assert tuple(criteria.columns) == DEPTHS
    assert criteria.to_numpy() == pytest.approx(np.array([[0, 0.5, 0.5], [0, 1, 1], [0.5, 1, 0.5]]))


def test_criteria_are_means_over_noise_levels_of_the_pairs_that_were_trained(tmp_path: Path) -> None:
    nan = np.nan
    evidence = evidence_of(
        {
            PROBE_GAP: quantity([[3, 1, nan, 1, 1, 1], [9, 1, 1, 1, 1, 1]]),
            CKA: quantity([[0.2, 1, 1, 1, 1, 1], [0.4, 1, 1, 1, 1, 1]]),
            "cosine": quantity([[nan] * 6] * 2),  # tokens were not kept, say
        },
        ("b.9", "b.10", "b.11", "b.77"),
        levels=(0.1, 0.5),
    )
    case = read_case(small_atlas(tmp_path / "x.csv"), written(tmp_path / "e.csv", evidence))
    first = case.criteria.iloc[0]
    assert first[PROBE_GAP] == 6
    assert first[CKA] == pytest.approx(0.3)
    assert case.needs_labels == {PROBE_GAP}
    assert known_criteria([case], labels=False) == (CKA, CAPPED_DISTANCE, NEARNESS, *DEPTHS)
    assert first["distance"] == pytest.approx(1 / 3)


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    atlas = small_atlas(tmp_path / "x.csv")
    with pytest.raises(ValueError, match=r"x has no gains in 'FID' at step None \(it has metrics Frechet distance; "):
        read_case(atlas, None, metric="FID")
    with pytest.raises(ValueError, match=r"at step 7 .* steps \[5, 10\]"):
        read_case(atlas, None, step=7)
    other = written(tmp_path / "e.csv", evidence_of({CKA: quantity([[0.2]])}, ("up.0", "up.1")))
    with pytest.raises(ValueError, match="contains none of the pairs of the sweep"):
        read_case(atlas, other)
    with pytest.raises(
        ValueError,
        match=r"no execution order has every student before its teacher \((a before b before a|b before a before b)\)",
    ):
        execution_order([("a", "b"), ("b", "a")])


def test_the_published_cifar_atlas_speaks_against_distance() -> None:
    """The figures of docs/cifar10-scratch.md, by scipy's Spearman."""
    path = DOCS / "cifar10-sit8x64-steps-1000-1400.csv"
    rows = pd.read_csv(path, keep_default_na=False)
    for metric, expected in ((FRECHET, -0.80), (HELD_OUT, -0.95)):
        pairs = rows[(rows["metric"] == metric) & (rows["student"] != "")]
        distance = pairs["teacher"].str[7:].astype(int) - pairs["student"].str[7:].astype(int)
        reference = stats.spearmanr(distance, pairs["benefit"].astype(float)).statistic
        found = correlations([read_case(path, None, metric=metric)]).set_index("criterion").loc["distance"]
        assert found["rho"] == pytest.approx(reference, abs=1e-12)
        assert found["rho"] == pytest.approx(expected, abs=0.005)
        assert found["significant"]


# --------------------------------------------------------------------------------------------------- rank correlations


def test_spearman_with_ties_and_gaps_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 28).astype(float), rng.standard_normal(28)
    x[[3, 7]], y[11] = np.nan, np.nan
    found = rank_correlation(x, y, ends_of(8))
    known = np.isfinite(x) & np.isfinite(y)
    assert found.rho == pytest.approx(stats.spearmanr(x[known], y[known]).statistic, abs=1e-12)
    assert found.num_pairs == 25
    assert found.low < found.rho < found.high


def test_the_partial_correlation_is_that_of_the_inverse_matrix_of_ranks() -> None:
    rng = np.random.default_rng(1)
    ends = ends_of(8)
    x, y = rng.standard_normal(28) + ends[:, 0], rng.standard_normal(28) + ends[:, 0] - ends[:, 1]
    ranks = np.column_stack([stats.rankdata(v) for v in (x, y, ends[:, 0], ends[:, 1])])
    inverse = np.linalg.inv(np.corrcoef(ranks.T))
    expected = -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])
    assert rank_correlation(x, y, ends, controls=ends.astype(float)).rho == pytest.approx(expected, abs=1e-10)
    # A quantity that the depths explain fully has no residual to correlate.
    assert np.isnan(rank_correlation(ends[:, 0].astype(float), y, ends, controls=ends.astype(float)).rho)


def test_half_an_atlas_is_read_by_the_layers_of_its_evidence(tmp_path: Path) -> None:
    """While a sweep runs, layers without a finished pair are known from the evidence."""
    cka = quantity([[s / t for s, t in combinations(range(12), 2)]])
    evidence = evidence_of({CKA: cka}, [f"b.{i}" for i in range(12)])
    case = read_case(small_atlas(tmp_path / "x.csv"), written(tmp_path / "e.csv", evidence))
    assert case.layers == tuple(f"b.{i}" for i in range(12))
    assert case.criteria["CKA"].tolist() == pytest.approx([9 / 10, 9 / 11, 10 / 11], rel=1e-5)
    assert case.criteria["student depth"].tolist() == pytest.approx([9 / 11, 9 / 11, 10 / 11])


@pytest.mark.parametrize("x", [np.ones(28), np.full(28, np.nan)])
def test_a_criterion_that_tells_nothing_has_no_correlation(x: Floats) -> None:
    found = rank_correlation(x, np.arange(28.0), ends_of(8))
    assert np.isnan([found.rho, found.low, found.high]).all()
    assert not found.significant


def test_too_few_layers_have_a_correlation_but_no_interval() -> None:
    found = rank_correlation(np.arange(6.0), np.arange(6.0), ends_of(4))
    assert found.rho == 1
    assert np.isnan(found.low) and not found.significant


def test_perfect_agreement_has_a_finite_interval() -> None:
    for depth in (6, 8):
        x = np.arange(len(ends_of(depth)), dtype=float)
        found = rank_correlation(x, x, ends_of(depth))
        assert (found.rho, found.significant) == (1, True)
        assert 0.5 < found.low < found.high <= 1


@pytest.mark.parametrize("depth", [6, 8])
def test_intervals_hold_where_gains_follow_layers_and_a_bootstrap_over_pairs_does_not(depth: int) -> None:
    """The quantities are gaps between independent numbers of the layers: the true correlation is 0."""
    rng, ends, ours, plain = np.random.default_rng(depth), ends_of(depth), 0, 0
    for _ in range(150):
        x, y = (values[ends[:, 1]] - values[ends[:, 0]] for values in rng.standard_normal((2, depth)))
        found = rank_correlation(x, y, ends)
        ours += found.low <= 0 <= found.high
        drawn = rng.integers(0, len(x), (100, len(x)))
        ranks = [stats.rankdata(v[drawn], axis=1) for v in (x, y)]
        centered = [v - v.mean(axis=1, keepdims=True) for v in ranks]
        scale = np.sqrt((centered[0] ** 2).sum(axis=1) * (centered[1] ** 2).sum(axis=1))
        low, high = np.quantile((centered[0] * centered[1]).sum(axis=1) / scale, [0.025, 0.975])
        plain += low <= 0 <= high
    assert ours / 150 >= 0.90
    assert plain / 150 <= 0.80


@pytest.mark.parametrize("kind", ["pairs", "layers"])
def test_criteria_of_noise_are_seldom_significant(kind: str) -> None:
    rng = np.random.default_rng(2)
    cases = models(rng, 2)
    half = rng.permutation(28)[:14]
    some = replace(cases[0], pairs=tuple(cases[0].pairs[i] for i in half), gains=cases[0].gains[half])
    plain, partial = false_alarms([*cases, some], rng, kind=kind, draws=60)
    assert plain <= 0.08  # 5 % and two standard errors of 180 draws
    assert partial <= 0.08


def test_smooth_criteria_are_significant_by_chance_more_often_and_that_is_told() -> None:
    """So a significant criterion in a single pair sweep is not yet a finding."""
    rng, ends = np.random.default_rng(3), ends_of(8)
    cases = [planted(-((ends[:, :1] - peak) ** 2.0) - (ends[:, 1:] - 5) ** 2) for peak in range(4)]
    rates = {kind: false_alarms(cases, rng, kind=kind, draws=40)[0] for kind in ("pairs", "smooth")}
    assert rates["pairs"] <= 0.05
    assert 0.07 <= rates["smooth"] <= 0.25
    with pytest.raises(ValueError, match="unknown kind of noise 'white'; pass pairs, layers or smooth"):
        false_alarms(cases, rng, kind="white")


def test_a_planted_criterion_is_found_and_its_sign() -> None:
    rng = np.random.default_rng(4)
    table = correlations([case for _ in range(8) for case in models(rng, 2, weights=(1, -0.15, 0))])
    found = table.groupby("criterion")
    assert found["significant"].mean()["a"] >= 0.9
    assert found["rho"].mean()["a"] > 0.8
    assert found["rho"].mean()["b"] < 0
    assert found["significant"].mean()["c"] <= 0.15


def test_models_are_the_sample_of_the_pooled_correlation() -> None:
    table = pd.DataFrame(
        {
            "criterion": ["x"] * 4 + ["y"],
            "atlas": ["1a", "1b", "2", "3", "1a"],
            "model": ["1", "1", "2", "3", "1"],
            "rho": [0.3, 0.5, 0.6, 0.8, -0.9],
        }
    )
    z = np.arctanh([0.3, 0.5, 0.6, 0.8])
    values = np.array([z[:2].mean(), z[2], z[3]])
    interval = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    found = pooled(table)
    assert list(found.index) == ["y", "x"]
    assert found.loc["x", ["rho", "low", "high"]].tolist() == pytest.approx(np.tanh([values.mean(), *interval]))
    assert found.loc["x", ["models", "smallest", "largest"]].tolist() == [3, 0.3, 0.8]
    assert np.isnan(found.loc["y", "low"])


# -------------------------------------------------------------------------------------------------------------- noise


def test_the_noise_is_what_seeds_do_not_share() -> None:
    rng = np.random.default_rng(5)
    truth, of_seed = rng.standard_normal((1000 - 10, 1)), np.array([[3.0, -2.0, 0.0]])
    found = noise(planted(truth + of_seed + 0.2 * rng.standard_normal((990, 3))))
    assert found.sd == pytest.approx(0.2, rel=0.05)
    assert (found.dof, found.from_seeds) == (989 * 2, True)


def test_one_seed_gives_a_noise_that_is_on_average_too_large() -> None:
    rng, ends = np.random.default_rng(6), ends_of(8)
    without, beyond = [], []
    for _ in range(200):
        effects = rng.standard_normal((2, 8))
        additive = effects[0][ends[:, 0]] + effects[1][ends[:, 1]]
        drawn = 0.2 * rng.standard_normal(28)
        without.append(noise(planted((additive + drawn)[:, None])).sd ** 2)
        beyond.append(noise(planted((additive * additive + drawn)[:, None])).sd ** 2)
    assert np.mean(without) == pytest.approx(0.04, rel=0.1)
    assert np.mean(beyond) > 0.08
    found = noise(planted(rng.standard_normal((28, 1))))
    assert (found.dof, found.from_seeds) == (28 - 13, False)
    assert np.isnan(noise(planted(np.ones((3, 1)))).sd)


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_ceiling_is_what_the_truth_itself_would_reach(seeds: int) -> None:
    rng = np.random.default_rng(7)
    found, reached = [], []
    for _ in range(30):
        truth = rng.standard_normal((28, 1))
        case = planted(truth + rng.standard_normal((28, seeds)))
        found.append(ceiling(case).of_mean)
        reached.append(stats.spearmanr(truth[:, 0], case.gain).statistic)
    assert np.mean(found) == pytest.approx(np.mean(reached), abs=0.06)


def test_two_seeds_agree_as_spearman_says_and_one_seed_says_nothing() -> None:
    case = planted(np.random.default_rng(8).standard_normal((28, 2)) + np.arange(28)[:, None] / 10)
    found = ceiling(case)
    assert found.between_seeds == pytest.approx(stats.spearmanr(*case.gains.T).statistic)
    assert found.low < found.between_seeds < found.high
    nothing = ceiling(planted(np.arange(28.0)[:, None]))
    assert np.isnan([nothing.between_seeds, nothing.low, nothing.high, nothing.of_mean]).all()
    assert ceiling(planted(np.array([[1.0, 3], [2, 2], [3, 1]]))).of_mean == 0


# ------------------------------------------------------------------------------------------------ what there is to gain


def test_the_true_best_gain_lies_between_the_two_that_are_told() -> None:
    rng = np.random.default_rng(9)
    truth = np.linspace(-1, 1, 28)[:, None]
    found = [worth(planted(truth + 0.5 * rng.standard_normal((28, 2)))) for _ in range(100)]
    assert np.mean([one.best_elsewhere for one in found]) < 1 < np.mean([one.best for one in found])


@pytest.mark.parametrize(("seeds", "gain", "low", "high"), [(1, 0.0, 0, 0.1), (2, 0.0, 0, 0.1), (2, 1.0, 0.95, 1)])
def test_an_atlas_pays_if_its_best_pair_is_beyond_the_luck_of_being_best(
    seeds: int, gain: float, low: float, high: float
) -> None:
    """The baseline of every seed is noisy too, and its noise changes all gains of that seed."""
    rng = np.random.default_rng(10)
    paying = []
    for _ in range(200):
        scores = 0.2 * rng.standard_normal((29, seeds))
        scores[1:5] -= gain
        paying.append(worth(planted(scores[0] - scores[1:])).pays)
    assert low <= np.mean(paying) <= high


def test_baselines_are_the_pairs_they_are_named_after() -> None:
    gains = np.arange(28.0)[::-1, None] / 100
    found = worth(planted(np.hstack([gains, gains + 0.02])))
    assert (found.best_pair, found.best) == (LayerPair("blocks.0", "blocks.1"), pytest.approx(0.28))
    assert found.best_elsewhere == pytest.approx(0.28)
    assert found.random == pytest.approx(0.145)
    case = planted(gains)
    assert found.prior == pytest.approx(gains[case.pairs.index(LayerPair("blocks.1", "blocks.5")), 0] + 0.01)
    few = replace(case, pairs=case.pairs[:3], gains=case.gains[:3])
    assert np.isnan(worth(few).prior)


# -------------------------------------------------------------------------------------------------------------- rules


def fitters(names: Sequence[str] = ("a", "b", "c")) -> dict[str, Fitter]:
    own: dict[str, Fitter] = {"ridge": ridge(names), "average": rank_average(names), "single": single(names)}
    return own | {"depths": same_depths, "chosen": chosen(own), "fixed": fixed({"a": 1})}


def test_ridge_solves_its_normal_equations_and_opposes_no_criterion() -> None:
    cases = models(np.random.default_rng(11), 3)
    rule = ridge("abc", penalty=0.5)(cases)
    assert isinstance(rule, Rule)
    among, with_gain = np.zeros((3, 3)), np.zeros(3)
    for case in cases:
        x = np.column_stack([stats.zscore(stats.rankdata(case.criteria[name])) for name in "abc"])
        among += x.T @ x / len(x) / 3
        with_gain += x.T @ stats.zscore(stats.rankdata(case.gain)) / len(x) / 3
    free = np.linalg.solve(among + 0.5 * np.eye(3), with_gain)
    for value, correlation, name in zip(free, with_gain, "abc", strict=True):
        if value * correlation > 0:
            assert rule.weights.get(name, 0) == pytest.approx(value, abs=0.03)
        assert rule.weights.get(name, 0) * correlation >= 0
    # A copy of a criterion that only suppresses the noise of another gets no weight of the other sign.
    doubled = [replace(case, criteria=case.criteria.assign(c=case.criteria["a"] ** 3)) for case in cases]
    assert min(np.sign(ridge("ac")(doubled).weights["a"]), np.sign(ridge("ac")(doubled).weights["c"])) == 1  # type: ignore[attr-defined]


def test_the_average_keeps_only_signs_on_which_models_agree() -> None:
    rng = np.random.default_rng(12)
    cases = [*models(rng, 2, weights=(1, -1, 0.5)), *models(rng, 2, weights=(1, -1, -0.5))]
    cases = [replace(case, model=str(i)) for i, case in enumerate(cases)]
    rule = rank_average("abc")(cases)
    assert isinstance(rule, Rule)
    assert dict(rule.weights) == {"a": 0.5, "b": -0.5}
    # A model in which a criterion was not measured does not speak against it.
    rule = rank_average("abc")([*cases, planted(cases[0].gains, {"b": cases[0].criteria["b"].to_numpy()}, name="new")])
    assert isinstance(rule, Rule)
    assert dict(rule.weights) == {"a": 0.5, "b": -0.5}


@pytest.mark.parametrize("name", ["ridge", "average", "chosen"])
def test_a_planted_composition_is_found_on_models_it_was_not_fitted_on(name: str) -> None:
    cases = models(np.random.default_rng(13), 4)
    table = judged(leave_one_model_out(cases, {name: fitters()[name]}))
    assert table["rho"].min() > 0.7
    assert table["regret"].mean() < 0.2
    assert not table["harm"].any()
    alone = judged(leave_one_model_out(cases, {"single": single("abc")}))
    assert table["rho"].mean() > alone["rho"].mean() + 0.1


def test_where_nothing_is_planted_no_rule_ranks_other_models() -> None:
    rng = np.random.default_rng(14)
    found = [
        judged(leave_one_model_out(models(rng, 3, weights=(0, 0, 0)), {name: fitters()[name]}))
        for _ in range(8)
        for name in ("ridge", "average", "single", "depths")
    ]
    table = pd.concat(found)
    assert np.abs(table.groupby("rule")["rho"].mean()).max() < 0.15  # a mean of 24 has a standard error near 0.05
    assert (table["low"] > 0).mean() < 0.08


def test_gains_that_follow_depth_alone_are_told_by_the_depths_of_other_models() -> None:
    rng, cases = np.random.default_rng(15), []
    for index, depth in enumerate((8, 6, 8)):
        ends = ends_of(depth) / (depth - 1)
        gains = -((ends[:, 0] - 0.3) ** 2) - (ends[:, 1] - 0.6) ** 2
        criteria = {"a": rng.standard_normal(len(ends))}
        cases.append(planted(gains[:, None] + 0.01 * rng.standard_normal((len(ends), 2)), criteria, name=f"m{index}"))
    table = judged(leave_one_model_out(cases, {"depths": same_depths, "ridge": ridge("a")})).groupby("rule")["rho"]
    assert table.min()["depths"] > 0.8
    assert table.mean()["ridge"] < 0.5


@pytest.mark.parametrize("name", list(fitters()))
def test_no_rule_sees_the_model_it_is_judged_on(name: str) -> None:
    """The prediction does not depend on the gains of the model that is left out, or of its other stages."""
    rng = np.random.default_rng(16)
    cases = models(rng, 3)
    stage = replace(models(rng, 1)[0], name="m0-later", model="m0")
    other = [
        replace(case, gains=rng.standard_normal((len(case.pairs), 1))) if case.model == "m0" else case
        for case in (*cases, stage)
    ]
    found = [leave_one_model_out(one, {name: fitters()[name]}) for one in ((*cases, stage), other)]
    assert [prediction.case.name for prediction in found[0]] == ["m0", "m1", "m2", "m0-later"]
    for index in (0, 3):
        assert found[0][index].order == pytest.approx(found[1][index].order, abs=0)
        assert found[0][index].calibration == found[1][index].calibration
    assert not np.allclose(found[0][1].expected, found[1][1].expected)  # the others do see it


@pytest.mark.parametrize("wrap", [lambda fitter: fitter, lambda fitter: chosen({"x": fitter})])
def test_no_rule_is_calibrated_or_chosen_on_a_model_it_was_fitted_on(wrap: Callable[[Fitter], Fitter]) -> None:
    cases = models(np.random.default_rng(30), 3)
    cases += [replace(case, name=f"{case.name}-later") for case in cases]
    scored: list[tuple[frozenset[str], str]] = []

    def watched(known: Sequence[Case]) -> PairScorer:
        seen = frozenset(case.model for case in known)

        def order(case: Case) -> Floats:
            scored.append((seen, case.model))
            return case.gain

        return order

    leave_one_model_out(cases, {"watched": wrap(watched)})
    assert len(scored) >= 6 * 5
    assert not [model for seen, model in scored if model in seen]


def test_atlases_of_one_model_have_nothing_to_be_judged_on() -> None:
    cases = [replace(case, model="one") for case in models(np.random.default_rng(17), 2)]
    assert list(by_model(cases)) == ["one"]
    with pytest.raises(ValueError, match="all 2 pair sweeps are of one model; pass two models or more"):
        leave_one_model_out(cases, fitters())


def test_everything_runs_with_one_seed_and_with_evidence_missing(tmp_path: Path) -> None:
    rng = np.random.default_rng(18)
    cases = models(rng, 3, seeds=1)
    bare = read_case(DOCS / "cifar10-sit8x64-steps-1000-1400.csv", None)
    gappy = cases[1].criteria.copy()
    gappy.iloc[:5, 0] = np.nan
    cases = [cases[0], replace(cases[1], criteria=gappy), replace(cases[2], criteria=cases[2].criteria[["b"]]), bare]
    names = known_criteria(cases)
    assert names == ("a", "b", "c", *DEPTHS)
    table = judged(leave_one_model_out(cases, fitters(names)))
    assert len(table) == 4 * len(fitters())
    assert np.isfinite(table[["gain", "taken", "rank", "covered"]]).all(axis=None)
    assert table["regret_elsewhere"].isna().all()
    assert len(correlations(cases)) == 3 + 3 + 1 + 3


def measured(rng: np.random.Generator) -> PairEvidence:
    """Makes evidence of 8 layers: probe accuracy rises with depth up to the last two layers."""
    knows = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.4, 0.3]) + 0.01 * rng.standard_normal(8)
    ends = ends_of(8)
    by_pair = {
        PROBE_GAP: quantity([knows[ends[:, 1]] - knows[ends[:, 0]]]),
        CKA: quantity([0.9 - 0.05 * (ends[:, 1] - ends[:, 0])]),
    }
    return evidence_of(by_pair, [f"blocks.{i}" for i in range(8)], {"probe accuracy": quantity([knows])})


def test_a_rule_as_selected_picks_what_the_command_picks_and_refuses_what_it_refuses() -> None:
    rng = np.random.default_rng(28)
    evidence, (case,) = measured(rng), models(rng, 1, depths=(8,))
    known = models(rng, 2)
    prediction = predict("select", as_selected(fixed(RULE)), known, replace(case, evidence=evidence))
    selection = rank_pairs(evidence)
    assert prediction.pick is not None
    assert case.pairs[prediction.pick] == selection.pick
    refused = {LayerPair(pair.student, pair.teacher) for pair in selection.rejected}
    assert {pair for pair, at in zip(case.pairs, prediction.order, strict=True) if np.isnan(at)} == refused
    assert len(refused) > 5
    for silent in (
        case,
        replace(case, evidence=replace(evidence, by_pair={CKA: evidence.by_pair[CKA]})),
    ):  # no evidence, no labels
        row = judged([predict("select", as_selected(fixed(RULE)), known, silent)]).iloc[0]
        assert (row["none"], row["taken"], row["student"]) == (True, 0, "")
    assert np.isfinite(row["regret"])


def test_what_is_learned_of_all_models_is_a_rule_that_selection_can_use() -> None:
    cases = models(np.random.default_rng(29), 3)
    rule = learned(ridge("abc"), cases)
    assert rule.calibration is not None
    assert rule.calibration.source == "m0, m1, m2"
    assert rule.calibration.level == pytest.approx(np.mean([case.gain.mean() for case in cases]))
    residual = [
        (np.diff(case.gain) - rule.calibration.slope * np.diff(stats.zscore(order)))
        for case in cases
        for order in [scores(ridge("abc")([other for other in cases if other is not case]), case)]  # type: ignore[arg-type]
    ]
    assert np.sqrt(np.mean(np.square(np.concatenate(residual)))) == pytest.approx(rule.calibration.error, rel=0.25)
    with pytest.raises(ValueError, match="no weighted sum of criteria; use a ridge or an average"):
        learned(same_depths, cases)


# ------------------------------------------------------------------------------------------- predictions and decisions


def test_a_verdict_is_the_arithmetic_of_its_pick() -> None:
    gains = np.array([[0.4, 0.2], [0.1, 0.3], [0.0, -0.2], [-0.3, -0.1]] + [[0.0, 0.0]] * 11)
    case = planted(gains, {"a": np.array([1.0, 9, 2, 0, *[0.5] * 11])}, name="m", model="m")
    known = models(np.random.default_rng(19), 2)
    prediction = predict("a", fixed({"a": 1}), known, case)
    row = judged([prediction]).iloc[0]
    assert (row["student"], row["teacher"], row["rank"]) == ("blocks.0", "blocks.2", 2)
    assert (row["gain"], row["taken"]) == (pytest.approx(0.2), pytest.approx(0.2))
    assert worth(case).pays
    assert row["regret"] == pytest.approx(1 - 0.2 / 0.3)
    assert worth(case).best_elsewhere == pytest.approx((0.1 + 0.2) / 2)  # each seed's best, read on the other one
    assert row["regret_elsewhere"] == pytest.approx(1 - 0.2 / 0.15)
    close = prediction.expected[prediction.pick] - prediction.expected < prediction.calibration.error
    assert row["ties"] == close.sum() - 1
    against = judged([predict("a", fixed({"a": -1}), known, case)]).iloc[0]
    assert (against["gain"], against["harm"]) == (pytest.approx(-0.2), True)


def test_a_rule_that_cannot_choose_gets_the_mean_of_what_it_cannot_choose_among() -> None:
    known, (case,) = models(np.random.default_rng(24), 2), models(np.random.default_rng(25), 1)
    assert predict("x", fixed({"absent": 1}), known, case).gain == pytest.approx(case.gain.mean())
    halves = replace(case, criteria=case.criteria.assign(a=np.arange(28) % 2))
    assert predict("x", fixed({"a": 1}), known, halves).gain == pytest.approx(case.gain[1::2].mean())


def test_stated_intervals_and_ties_hold_on_other_models() -> None:
    rng, tables = np.random.default_rng(20), []
    for _ in range(12):
        cases = models(rng, 4, weights=(1, -1, 0.8))
        cases = [replace(case, gains=case.gains + 0.1 * rng.standard_normal()) for case in cases]
        tables.append(judged(leave_one_model_out(cases, {"ridge": ridge("ab")})))
    table = pd.concat(tables)
    assert table["covered"].mean() >= 0.93
    assert table["ties"].mean() > 1
    assert 0.8 <= table["ties_within"].mean() <= 0.99


def test_no_pair_is_the_answer_where_all_known_models_lose_and_not_where_they_differ() -> None:
    rng = np.random.default_rng(21)
    losing = judged(leave_one_model_out(models(rng, 4, level=-1.0), {"ridge": ridge("ab")}))
    assert losing["none"].all()
    assert (losing["taken"] == 0).all()
    assert losing["regret"].isna().all()  # there is nothing to gain, so nothing to miss
    assert not judged(leave_one_model_out(models(rng, 4, level=1.0), {"ridge": ridge("ab")}))["none"].any()
    mixed = [*models(rng, 2, level=-1.0), *models(rng, 2, level=1.0)]
    mixed = [replace(case, model=str(i)) for i, case in enumerate(mixed)]
    assert not judged(leave_one_model_out(mixed, {"ridge": ridge("ab")}))["none"].any()


def test_one_known_model_never_makes_a_rule_sure() -> None:
    first, second = models(np.random.default_rng(22), 2, level=-1.0)
    prediction = predict("ridge", ridge("ab"), [first], second)
    assert prediction.calibration.half_width == np.inf
    assert not prediction.none


def test_a_rule_that_did_not_hold_on_known_models_calls_all_pairs_ties() -> None:
    """Its sign differs between models, so it expects the mean gain for every pair of a new model."""
    rng = np.random.default_rng(23)
    cases = [replace(case, model=str(i)) for i in range(4) for case in models(rng, 1, weights=((-1) ** i, 0, 0))]
    prediction = predict("a", fixed({"a": 1}), cases[:2], cases[3])
    assert np.ptp(prediction.expected) < prediction.calibration.error
    assert prediction.ties.sum() == len(cases[3].pairs) - 1


# ------------------------------------------------------------------------------------------------------------- figures


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_visible())


def test_figures_say_what_is_seen_and_draw_what_is_missing(tmp_path: Path) -> None:
    cases = models(np.random.default_rng(26), 3)
    bare = read_case(DOCS / "cifar10-sit8x64-steps-1000-1400.csv", None)
    cases = [replace(cases[0], needs_labels=frozenset("a")), *cases[1:], bare]
    cases[2] = replace(cases[2], criteria=cases[2].criteria.assign(constant=1.0))
    seen = texts(criteria_figure(cases))
    assert "a *" in seen and "distance" in seen and bare.name in seen
    assert "Frechet distance: distance -0.8" in seen or "Frechet distance: a +0." in seen
    predictions = leave_one_model_out(cases, {name: fitters(("a", "b"))[name] for name in ("ridge", "depths")})
    seen = texts(picks_figure(predictions))
    assert "cifar10-" in seen and "nothing to gain beyond" in seen.replace("\n", " ")
    assert "misses least of the best pair's gain" in seen
    own = [one for one in predictions if one.rule == "ridge"]
    seen = texts(expectations_figure(own))
    assert "gains expected by ridge for models that it was not fitted on" in seen
    assert "all pairs score the same" in seen  # the sweep without evidence
    expectations_figure(own).savefig(tmp_path / "expected.png", dpi=40)
    assert (tmp_path / "expected.png").stat().st_size > 5_000


def test_one_model_and_one_seed_can_be_drawn() -> None:
    bare = read_case(DOCS / "cifar10-sit8x64-steps-1000-1400.csv", None)
    assert "distance -0.80; one model" in texts(criteria_figure([bare]))


def test_figures_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no pair sweep to draw"):
        criteria_figure([])
    with pytest.raises(ValueError, match="there are no predictions to draw"):
        picks_figure([])
    predictions = leave_one_model_out(models(np.random.default_rng(27), 2), {"x": ridge("a"), "y": ridge("b")})
    with pytest.raises(ValueError, match="these are predictions of 2 rules; pass those of one"):
        expectations_figure(predictions)
