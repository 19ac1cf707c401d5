"""Evaluation of criteria and rules on the pair sweeps of a folder: tables, and figures with `--out`.

FOLDER contains NAME.csv beside NETWORK-evidence.csv, where NAME begins with NETWORK, as docs/atlas does, or folders
NAME with atlas.csv and evidence.csv. Sweeps without evidence only have depths as criteria. Names that differ only after
"-steps-" are stages of one model and are left out together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from pair_rules import (
    Fitter,
    PairScorer,
    Rule,
    RulePrediction,
    as_selected,
    chosen,
    fixed,
    judged,
    known_criteria,
    learned,
    leave_one_model_out,
    rank_average,
    ridge,
    same_depths,
    scores,
    single,
)
from rule_figures import criteria_figure, expectations_figure, picks_figure
from scipy import stats
from sweep_cases import (
    DEPTHS,
    Case,
    by_model,
    ceiling,
    correlations,
    false_alarms,
    noise,
    pooled,
    rank_correlation,
    read_case,
    worth,
)

from layerprobe.analyses.experiments import FRECHET, HELD_OUT, read_pair_sweep
from layerprobe.analyses.figures import save_figure
from layerprobe.analyses.selection import RULE
from layerprobe.analyses.tables import CKA, RECOVERABILITY

CHOSEN = "chosen among these"


def main() -> None:
    options = parsed()
    if options.folder is None:
        show("coverage of 95 % intervals of a planted rank correlation", coverage(options.draws))
        return
    paths = [(atlas, evidence) for atlas, evidence in sweep_files(options.folder) if options.only in str(atlas)]
    for metric in options.metrics:
        print(f"\n# {metric}")
        report(read(paths, metric, options), options)
    if options.out:
        cases = [case for metric in options.metrics for case in read(paths, metric, options, quiet=True)]
        if cases:
            save_figure(criteria_figure(cases), options.out, "calibration-criteria")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="folder of pair sweeps; without it, coverage of a planted truth"
    )
    parser.add_argument("--metrics", nargs="+", default=[FRECHET, HELD_OUT])
    parser.add_argument("--only", default="", help="text in the names of the sweeps to read, such as from-scratch")
    parser.add_argument("--first", action="store_true", help="use the first scores of each sweep instead of the last")
    parser.add_argument("--draws", type=int, default=100, help="number of planted or noise criteria")
    parser.add_argument("--out", type=Path, help="folder of the figures")
    return parser.parse_args()


def sweep_files(folder: Path) -> list[tuple[Path, Path | None]]:
    """Returns the tables of the pair sweeps in a folder, each with its evidence."""
    evidence = {path.stem.removesuffix("-evidence"): path for path in sorted(folder.glob("*-evidence.csv"))}
    flat = [path for path in sorted(folder.glob("*.csv")) if path not in evidence.values()]
    networks = {
        path: max((name for name in evidence if path.stem.startswith(name)), key=len, default="") for path in flat
    }
    pairs = [(path, evidence.get(networks[path])) for path in flat]
    for path in sorted(folder.glob("*/atlas.csv")):
        beside = path.with_name("evidence.csv")
        pairs.append((path, beside if beside.is_file() else None))
    return pairs


def read(
    paths: Sequence[tuple[Path, Path | None]], metric: str, options: argparse.Namespace, *, quiet: bool = False
) -> list[Case]:
    cases = []
    for atlas, evidence in paths:
        try:
            step = int(read_pair_sweep(atlas)["step"].min()) if options.first else None
            cases.append(read_case(atlas, evidence, metric=metric, step=step))
        except ValueError as error:
            if not quiet:
                print(f"left out: {error}")
    return cases


# Planted quantities of pairs, from random numbers of the L layers and of the pairs (s, t).
PLANTED: dict[str, Callable[[np.random.Generator, int, np.ndarray, np.ndarray], np.ndarray]] = {
    "by pair": lambda rng, n, s, t: rng.standard_normal(len(s)),
    "gap of layers": lambda rng, n, s, t: np.subtract(*rng.standard_normal(n)[[t, s]]),
    "sum of layers": lambda rng, n, s, t: np.add(*rng.standard_normal(n)[[t, s]]),
    "student and teacher": lambda rng, n, s, t: rng.standard_normal(n)[s] + rng.standard_normal(n)[t],
    "gap and pair": lambda rng, n, s, t: (
        np.subtract(*rng.standard_normal(n)[[t, s]]) / 2**0.5 + rng.standard_normal(len(s))
    ),
}


def coverage(draws: int) -> pd.DataFrame:
    """Computes how often intervals of a correlation contain the truth: ours, and those for independent pairs."""
    rng, rows = np.random.default_rng(0), []
    for layers, (kind, make), shared in product((6, 8), PLANTED.items(), (0.0, 0.6)):

        def drawn(
            n: int, make: Callable[..., np.ndarray] = make, shared: float = shared
        ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            s, t = np.triu_indices(n, 1)
            first, second, both = (make(rng, n, s, t) for _ in range(3))
            parts = [(1 - shared) ** 0.5 * one + shared**0.5 * both for one in (first, second)]
            return parts[0], parts[1], np.column_stack([s, t])

        # With many layers the correlation hardly varies.
        truth = np.mean([stats.spearmanr(*drawn(40)[:2]).statistic for _ in range(60)]) if shared else 0.0
        ours = [rank_correlation(*drawn(layers)) for _ in range(draws)]
        plain = [
            abs(np.arctanh(one.rho) - np.arctanh(truth)) <= 1.96 * ((1 + one.rho**2 / 2) / (one.num_pairs - 3)) ** 0.5
            for one in ours
        ]
        covered = [one.low <= truth <= one.high for one in ours]
        rows.append((layers, kind, truth, np.mean(covered), np.mean(plain)))
    return pd.DataFrame(rows, columns=["layers", "noise", "truth", "ours", "independent pairs"])


def report(cases: Sequence[Case], options: argparse.Namespace) -> None:
    if not cases:
        print("no pair sweep")
        return
    show("pair sweeps", pd.DataFrame([described(case) for case in cases]))
    table = correlations(cases)
    show("criteria: mean rank correlation over models, 95 % interval", pooled(table))
    show("controlled for the depths of both layers", pooled(table, column="partial"))
    show("by pair sweep (* interval excludes 0)", by_atlas(table, "rho", "significant"))
    rng = np.random.default_rng(0)
    kinds = {kind: false_alarms(cases, rng, kind=kind, draws=options.draws) for kind in ("pairs", "layers", "smooth")}
    alarms = pd.DataFrame(kinds, index=["plain", "controlled for depths"]).T
    show("false alarms: share of noise criteria that are significant in one sweep (nominal: 0.05)", alarms)
    if len(by_model(cases)) < 2:
        print("\none model: rules cannot be evaluated on another")
        return
    predictions = leave_one_model_out(cases, rules(cases))
    verdicts = judged(predictions)
    show("rules, each fitted on the other models", summary(verdicts))
    show("picks", verdicts.drop(columns=["model", "low", "high"]).set_index(["atlas", "rule"]).sort_index())
    show_weights(cases)
    if options.out:
        draw(predictions, options.out)


def described(case: Case) -> dict[str, object]:
    value, spread, top = worth(case), noise(case), ceiling(case)
    return {
        "atlas": case.name,
        "pairs": len(case.pairs),
        "seeds": case.num_seeds,
        "step": case.step,
        "best": value.best,
        "best elsewhere": value.best_elsewhere,
        "random": value.random,
        "prior": value.prior,
        "error": value.error,
        "noise from": "seeds" if spread.from_seeds else "layer effects",
        "pays": value.pays,
        "two seeds": top.between_seeds,
        "ceiling": top.of_mean,
    }


def rules(cases: Sequence[Case]) -> dict[str, Fitter]:
    """Returns the rules to compare by name; those that are fitted exist with all and with label-free criteria."""
    everything, free = known_criteria(cases), known_criteria(cases, labels=False)
    candidates = {
        "ridge": ridge(everything),
        "rank average": rank_average(everything),
        "best criterion": single(everything),
        "ridge, label-free": ridge(free),
        "rank average, label-free": rank_average(free),
        "best criterion, label-free": single(free),
        "ridge, depths only": ridge(DEPTHS),
        "same depths elsewhere": same_depths,
    }
    return candidates | {
        CHOSEN: chosen(candidates),
        "RARE's signs": fixed({RECOVERABILITY: 1.0, CKA: -1.0}),
        "select's weights": fixed(RULE),
        "select's order, refused pairs last": refused_last(label_free=False),
        "select's order, label-free": refused_last(label_free=True),
        "select": as_selected(fixed(RULE)),
        "select, label-free": as_selected(fixed(RULE), label_free=True),
        "ridge within select's limits": as_selected(ridge(everything)),
        "ridge within select's limits, label-free": as_selected(ridge(free), label_free=True),
    }


def refused_last(*, label_free: bool) -> Fitter:
    """Returns the fitter of select's order of all pairs: admissible ones by score, then refused ones by score."""
    selected = as_selected(fixed(RULE), label_free=label_free)

    def fit(cases: Sequence[Case]) -> PairScorer:
        within = selected(cases)
        assert callable(within)
        return lambda case: scores(Rule(RULE), case) - 1000 * np.isnan(within(case))

    return fit


def summary(verdicts: pd.DataFrame) -> pd.DataFrame:
    pool = pooled(verdicts, by="rule")[["rho", "low", "high"]]
    columns = ["regret", "regret_elsewhere", "gain", "taken", "none", "harm", "ties", "ties_within", "covered"]
    means = verdicts.groupby("rule", sort=False)[columns].mean()
    return pool.reindex(means.index).join(means)  # a rule without any ranked pair has no correlation


def by_atlas(table: pd.DataFrame, value: str, mark: str) -> pd.DataFrame:
    cells = table[value].map("{:+.2f}".format) + table[mark].map({True: "*", False: ""})
    cells = cells.where(table[value].notna())
    return table.assign(cells=cells).pivot(index="criterion", columns="atlas", values="cells")


def show_weights(cases: Sequence[Case]) -> None:
    """Prints the weights and calibrations of rules that are fitted on all models."""
    for name, labels in (("with labels", True), ("label-free", False)):
        names = known_criteria(cases, labels=labels)
        for key, fitter in {"ridge": ridge(names), "rank average": rank_average(names)}.items():
            rule = learned(fitter, cases)
            print(f"\n## {key}, {name}, of all models\n{rule.calibration}")
            print(", ".join(f"{criterion} {weight:+.3f}" for criterion, weight in rule.weights.items()))


def show(title: str, table: pd.DataFrame) -> None:
    print(f"\n## {title}\n{table.to_string(float_format='{:.3f}'.format, na_rep='-')}")


def draw(predictions: Sequence[RulePrediction], out: Path) -> None:
    metric = predictions[0].case.metric.replace(" ", "-").lower()
    save_figure(picks_figure(predictions), out, f"calibration-picks-{metric}")
    of_chosen = [one for one in predictions if one.rule == CHOSEN]
    save_figure(expectations_figure(of_chosen), out, f"calibration-expected-{metric}")


if __name__ == "__main__":
    main()
