"""The main jobs, each from start to finish in a run folder; the command line and library users call the same functions.

A run folder holds `plan.json`, `convention.json`, `environment.json`, `features/`, `quality.csv`, `similarity.csv`,
`selection.json`, `figures/`, `report.html` and, after a confirmation, `confirmation/`, `confirmation.csv` and
`verdict.json`.
"""

from __future__ import annotations

import json
import math
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from layerprobe import __version__
from layerprobe.analyses import plots
from layerprobe.analyses.arms import Arm, ConfirmationPlan, arms_for
from layerprobe.analyses.confirmation import confirm, kept_spread
from layerprobe.analyses.evidence import (
    ScoreKeeper,
    extract_evidence,
    pair_evidence,
    pair_layers,
    read_evidence,
    write_evidence,
)
from layerprobe.analyses.label_plots import CLASS, knowledge_curves
from layerprobe.analyses.map_plots import token_maps
from layerprobe.analyses.maps import pca_rgb
from layerprobe.analyses.measurements import ANALYSES, PROBE, Analysis, headlines, probed_column
from layerprobe.analyses.power import Resolution, Spread, resolution
from layerprobe.analyses.quality import (
    MODEL,
    RANDOM_WEIGHTS,
    RAW_INPUT,
    encoder_rows,
    measure,
    read_quality,
    read_similarity,
    recoverability_table,
    write_table,
)
from layerprobe.analyses.report import write_report
from layerprobe.analyses.sample_runs import draw_samples
from layerprobe.analyses.selection import HYPOTHESIS, Selection, cautions, rank_pairs
from layerprobe.analyses.verdict import Verdict
from layerprobe.backbones.base import Backbone, layer_shapes
from layerprobe.backbones.sit import fresh_sit
from layerprobe.checkpoints import open_checkpoint, training_record
from layerprobe.contribution import contribution
from layerprobe.convention import ConventionCheck, check_convention
from layerprobe.data.base import Samples, Splits, Subset
from layerprobe.data.latents import latent_shape
from layerprobe.data.sources import encode_splits, load
from layerprobe.data.splits import for_probing, take
from layerprobe.extract import RAW_INPUT_WIDTH, extract, random_weights, raw_input, raw_pool_cells
from layerprobe.features import ExtractionPlan, FeatureStore
from layerprobe.fidelity import Extractor, all_features
from layerprobe.files import claim, write_text
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan

PACKAGES = ("torch", "numpy", "scikit-learn", "pandas", "matplotlib", "safetensors", "datasets")

QUICKSTART_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)

# (what is running, done, in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RunPlan:
    """What a run is of; enough to open checkpoint and data again.

    Attributes:
        checkpoint: Path or "digits".
        checkpoint_options: Of `open_checkpoint`.
        data: Source of the data, as `data.load` takes it.
        data_options: Of `data.load`.
        token_samples: See `ExtractionPlan`, like the fields around it.
    """

    checkpoint: str
    data: str
    noise_levels: tuple[float, ...]
    checkpoint_options: Mapping[str, Any] = field(default_factory=dict)
    data_options: Mapping[str, Any] = field(default_factory=dict)
    draws: int = 1
    pool_cells: int = 1
    token_samples: int = 0
    condition: str = "null"
    precision: str = "float32"
    seed: int = 0

    def open(
        self, *, device: str = "auto", encode: bool = True, progress: Progress | None = None
    ) -> tuple[Backbone, Splits]:
        """The checkpoint and the data; with a VAE its latents, unless `encode` is off."""
        backbone = open_checkpoint(self.checkpoint, device=device, **self.checkpoint_options)
        reading, encoding = _divided(self.data_options)
        shape = None if encoding else backbone.shape
        splits = for_probing(load(self.data, expect_shape=shape, **reading), given=reading)
        if encoding and encode:
            splits = _encoded(splits, encoding, backbone.shape, progress)
        return backbone, splits

    def extraction(self, backbone: Backbone) -> ExtractionPlan:
        """What is read from this backbone."""
        return ExtractionPlan(
            layers=backbone.layers,
            noise_levels=self.noise_levels,
            draws=self.draws,
            pool_cells=self.pool_cells,
            token_samples=self.token_samples,
            condition=self.condition,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            seed=self.seed,
        )


def read_plan(run: str | Path) -> RunPlan:
    """The plan of a run folder.

    Raises:
        FileNotFoundError: If the folder holds no run.
    """
    place = Path(run) / "plan.json"
    if not place.is_file():
        raise FileNotFoundError(f"{run} holds no run (no plan.json); pass a folder that `layerprobe probe` has made")
    record = json.loads(place.read_text(encoding="utf-8"))
    return RunPlan(**record | {"noise_levels": tuple(record["noise_levels"])})


def probe(plan: RunPlan, run: str | Path, *, progress: Progress | None = None, **options: Any) -> Selection:
    """The main job: reads the layers of the model and its controls, measures them, picks a pair, draws and reports.

    Interrupted work continues when the call is repeated, and a finished run is only drawn again.

    Args:
        plan: What to look at.
        run: The run folder.
        progress: Called with (what is running, done, in all).
        options: As in `extract_run`.

    Raises:
        ValueError: If checkpoint, data and plan do not fit, or the folder holds another run.
    """
    selection = measure_run(plan, run, progress=progress, **options)
    draw_figures(run)
    write_report(run)
    return selection


def measure_run(plan: RunPlan, run: str | Path, *, progress: Progress | None = None, **options: Any) -> Selection:
    """What `probe` does before it draws: convention check, features, tables, selection; what is done is kept."""
    extract_run(plan, run, progress=progress, **options)
    return choose_layers(run) if (Path(run) / "quality.csv").is_file() else analyze_run(run, progress=progress)


def extract_run(
    plan: RunPlan,
    run: str | Path,
    *,
    trust_convention: bool = False,
    device: str = "auto",
    batch_size: int = 128,
    progress: Progress | None = None,
) -> None:
    """All that needs the model: convention check, features of it and its controls, and what skipping a layer does.

    Args:
        plan: What to look at.
        run: The run folder.
        trust_convention: Go on where the weights fit another schedule or prediction than the declared one.
        device: Where the model runs.
        batch_size: Rows per forward pass.
        progress: Called with (what is running, done, in all).

    Raises:
        ValueError: As `probe` does.
    """
    run = Path(run)
    backbone, splits = plan.open(device=device, progress=progress)
    plan.extraction(backbone)  # refuses a bad plan before the folder is made
    _check_frames(plan, splits)
    checked = (run / "convention.json").is_file()
    convention = None if checked else check_convention(backbone, splits.fit, seed=plan.seed)
    if convention is not None and convention.verdict == "misfit" and not trust_convention:
        raise ValueError(convention.message)
    claim(run, "plan.json", asdict(plan), what="the results")
    if convention is not None:
        write_text(run / "convention.json", json.dumps(convention.to_dict(), indent=1))
    write_environment(run)
    extract_all(backbone, splits, plan, run / "features", batch_size=batch_size, progress=progress)
    extract_evidence(backbone, splits, plan.extraction(backbone), run / "features" / "evidence", batch_size=batch_size)
    if not (run / "contribution.csv").is_file():
        skipped = contribution(
            backbone,
            splits.report,
            plan.noise_levels,
            seed=plan.seed,
            batch_size=batch_size,
            progress=_named(progress, "skipping layers"),
        )
        write_table(pd.DataFrame(skipped.rows(source=MODEL, seed=plan.seed)), run / "contribution.csv")


def analyze_run(
    run: str | Path,
    *,
    analyses: Sequence[Analysis] = ANALYSES,
    encoder: Extractor | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Tables and selection from the features of a run.

    Args:
        run: A run folder with features.
        analyses: What to run on every layer and noise level.
        encoder: An outside encoder to compare all layers with; it sees the clean samples of the choose split.
        progress: Called with (what is running, done, in all).

    Raises:
        FileNotFoundError: If there are no features.
    """
    run, plan = Path(run), read_plan(run)
    stores = {source: FeatureStore.open(_store_folder(run, source)) for source in (MODEL, RANDOM_WEIGHTS, RAW_INPUT)}
    keeper = ScoreKeeper(stores[MODEL])
    quality, similarity = measure(
        stores,
        analyses=[keeper.listening(analysis) for analysis in analyses],
        seed=plan.seed,
        progress=_named(progress, "measuring layers"),
    )
    write_table(similarity, run / "similarity.csv")
    if len(stores[MODEL].token_rows):
        write_table(recoverability_table(stores[MODEL]), run / "recoverability.csv")
    contributions = read_quality(run / "contribution.csv")
    evidence = pair_evidence(_evidence_store(run), scores=keeper.scores, quality=contributions)
    write_evidence(evidence, run / "evidence.csv")
    tables = [quality, contributions]
    if encoder is not None:
        tables.append(encoder_rows(stores[MODEL], _encoder_features(plan, stores[MODEL], encoder), encoder.name))
    write_table(pd.concat(tables, ignore_index=True), run / "quality.csv")
    return choose_layers(run)


def _encoder_features(plan: RunPlan, store: FeatureStore, encoder: Extractor) -> NDArray[np.float32]:
    """What an encoder makes of the samples that the store's choose split has, shape (n, D)."""
    reading = _divided(plan.data_options)[0]
    samples = for_probing(load(plan.data, **reading), given=reading).choose
    if not np.array_equal(samples.ids.numpy(), store.ids[store.splits == "choose"]):
        raise ValueError(f"{plan.data} no longer has the samples that the features are of; extract them again")
    return all_features(encoder, samples, batch_size=64)


def _evidence_store(run: Path) -> FeatureStore:
    """The small extraction for evidence; runs of earlier versions have only the large one."""
    folder = run / "features" / "evidence"
    return FeatureStore.open(folder if folder.is_dir() else _store_folder(run, MODEL))


def _store_folder(run: Path, source: str) -> Path:
    return run / "features" / source.replace(" ", "-")


def examine_convention(plan: RunPlan, *, num_samples: int = 64, device: str = "auto") -> ConventionCheck:
    """Does what is declared of a checkpoint fit its weights and this data?"""
    backbone, splits = plan.open(device=device, encode=False)
    few: Samples = Subset(splits.fit, range(min(num_samples, len(splits.fit))), name="convention")
    encoding = _divided(plan.data_options)[1]
    if encoding:
        few = _encoded(Splits(few, few, few), encoding, backbone.shape, None).fit
    return check_convention(backbone, few, num_samples=num_samples, seed=plan.seed)


def extract_all(
    backbone: Backbone,
    splits: Splits,
    plan: RunPlan,
    folder: Path,
    *,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> dict[str, FeatureStore]:
    """Features of the model and of the two controls that stand beside every curve."""
    stores = {}
    frames = bool(_frame_columns(splits))
    readers = {
        MODEL: backbone,
        RANDOM_WEIGHTS: random_weights(backbone, seed=plan.seed),
        RAW_INPUT: raw_input(backbone, places=frames),
    }
    for source, reader in readers.items():
        extraction = plan.extraction(reader)
        if source == RAW_INPUT and frames:
            extraction = replace(extraction, pool_cells=raw_pool_cells(backbone.shape))
        elif source == RAW_INPUT:
            extraction = replace(extraction, token_samples=0)  # It has no tokens of its own.
        stores[source] = extract(
            reader,
            splits,
            extraction,
            folder / source.replace(" ", "-"),
            batch_size=batch_size,
            progress=_named(progress, f"reading layers ({source})"),
        )
    return stores


def _frame_columns(splits: Splits) -> list[str]:
    """The further columns that label every frame."""
    return [column.name for column in splits.fit.columns if column.labels.ndim > 1]


def _check_frames(plan: RunPlan, splits: Splits) -> None:
    frames = _frame_columns(splits)
    if frames and not plan.token_samples:
        raise ValueError(
            f"{frames[0]!r} labels every frame, which the kept tokens are probed for; pass --token-samples 200 or so"
        )


def choose_layers(run: str | Path, **options: Any) -> Selection:
    """Ranks layer pairs from the evidence of a run and writes `selection.json`; options as in `rank_pairs`.

    A run of an earlier version gets its evidence now, from the features that it has.
    """
    run = Path(run)
    quality, _ = _tables(run)
    store = FeatureStore.open(_store_folder(run, MODEL))
    if not (run / "evidence.csv").is_file():
        write_evidence(pair_evidence(_evidence_store(run), quality=quality), run / "evidence.csv")
    evidence = read_evidence(run / "evidence.csv")
    options.setdefault("label_free", PROBE not in set(quality["metric"]))
    layers, shapes = pair_layers(store.layers), store.manifest["layer_shapes"]
    selection = rank_pairs(evidence, layers=layers, shapes=shapes, **options)
    selection = replace(selection, warnings=(*selection.warnings, *cautions(selection, quality)))
    write_text(run / "selection.json", selection.to_json())
    return selection


def read_selection(run: str | Path) -> Selection:
    """The selection of a run."""
    place = Path(run) / "selection.json"
    if not place.is_file():
        raise FileNotFoundError(f"{run} holds no selection.json; run `layerprobe select {run}` first")
    return Selection.from_json(place.read_text(encoding="utf-8"))


def confirm_run(
    run: str | Path,
    training: TrainingPlan,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    arms: Sequence[str] | None = None,
    stop_early: bool = False,
    from_scratch: bool = False,
    num_evaluations: int = 4,
    num_samples: int = 1000,
    sampling: SamplingPlan | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Verdict:
    """Trains the arms that put the pick of a run to the test, and writes verdict, figures and report.

    Args:
        run: A folder with a selection.
        training: Steps, batch size, learning rate and weight; shared by all arms.
        seeds: At least two.
        arms: See `arms_for`.
        stop_early: See `ConfirmationPlan`.
        from_scratch: Fresh weights for every seed instead of branching from the checkpoint.
        num_evaluations: See `ConfirmationPlan`, like the next two.
        num_samples: Drawn for each Fréchet distance.
        sampling: How samples are drawn.
        device: Where the models run.
        progress: Called with (what is running, steps done, steps in all).
    """
    run, plan = Path(run), read_plan(run)
    selection = read_selection(run)
    backbone = open_checkpoint(plan.checkpoint, device=device, **plan.checkpoint_options)
    confirmation = ConfirmationPlan(
        training,
        seeds,
        num_evaluations,
        num_samples,
        sampling or SamplingPlan(solver="heun", steps=12),
        stop_early,
    )
    chosen = _arms(selection, _alignable(backbone), arms, seeds)
    splits = training_splits(plan.data, backbone.shape, plan.data_options, progress=progress)
    verdict = confirm(
        lambda seed: fresh_sit(backbone, seed) if from_scratch else backbone,
        splits,
        chosen,
        confirmation,
        run / "confirmation",
        start_name="from scratch" if from_scratch else "from the checkpoint",
        evidence=pd.read_csv(run / "evidence.csv") if (run / "evidence.csv").is_file() else None,
        progress=progress,
    )
    for name in ("confirmation.csv", "verdict.json"):
        shutil.copyfile(run / "confirmation" / name, run / name)
    draw_figures(run)
    write_report(run)
    return verdict


def _alignable(backbone: Backbone) -> tuple[str, ...]:
    """The layers of the commonest shape, in the order in which they run: only these can be aligned with one another.

    Raises:
        ValueError: If no two layers have a shape in common.
    """
    shapes = layer_shapes(backbone)
    commonest = max(shapes.values(), key=list(shapes.values()).count)
    alike = tuple(name for name, shape in shapes.items() if shape == commonest)
    if len(alike) < 2:
        raise ValueError(f"no two layers of {backbone.name} have tokens of one shape; pass other --layers to probe")
    return alike


def quickstart(
    run: str | Path,
    *,
    steps: int = 90,
    num_seeds: int = 2,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> tuple[Selection, Verdict]:
    """The whole chain on the embedded checkpoint and data: probe, pick, samples, confirmation, report."""
    run = Path(run)
    selection = measure_run(
        RunPlan("digits", "digits", QUICKSTART_LEVELS, pool_cells=2, seed=seed), run, device=device, progress=progress
    )
    if not (run / "figures" / "samples.png").is_file():
        draw_samples(open_checkpoint("digits", device=device), run / "figures")
    verdict = confirm_run(
        run,
        confirmation_training(run, steps=steps),
        seeds=tuple(range(seed, seed + num_seeds)),
        num_evaluations=3,
        num_samples=300,
        sampling=SamplingPlan(solver="heun", steps=6),  # enough for 8 x 8 pixels, and most of the time
        device=device,
        progress=progress,
    )
    return selection, verdict


def confirmation_training(run: str | Path, *, steps: int, from_scratch: bool = False, **given: Any) -> TrainingPlan:
    """How the arms of a run are trained: as its checkpoint was, where the checkpoint says so, unless given otherwise.

    The averaged weights look back over a tenth of the steps, so that they show what the arm has learned. A branch
    starts with an empty optimizer state, so its learning rate warms up over the first tenth. From scratch it warms up
    as the checkpoint's did: a longer warm-up is worse without alignment, and the gains would be too large.
    """
    path = read_plan(run).checkpoint
    trained = training_record(path)
    known: dict[str, Any] = {
        name: trained[name]
        for name in ("batch_size", "learning_rate", "weight_decay", "clip_norm", "label_drop")
        if name in trained
    }
    if from_scratch and "warmup_steps" in trained:
        known["warmup_steps"] = trained["warmup_steps"]
    default = {"steps": steps, "warmup_steps": steps // 10, "ema_decay": max(0.0, 1 - 10 / steps)}
    return TrainingPlan(**default | known | given)


def trained_steps(run: str | Path) -> int | None:
    """How long the checkpoint of a run was trained, where it says so."""
    steps: int | None = training_record(read_plan(run).checkpoint).get("steps")
    return steps


def _arms(
    selection: Selection, layers: Sequence[str], wanted: Sequence[str] | None, seeds: Sequence[int]
) -> tuple[Arm, ...]:
    ranked = [pair.pair for pair in selection.ranked]
    return arms_for(ranked, layers, wanted=wanted, advised=selection.pick is not None, seed=seeds[0])


def arm_names(run: str | Path, wanted: Sequence[str] | None = None, *, seed: int = 0) -> list[str]:
    """The arms that a confirmation of this run would train, with their pairs; see `arms_for`."""
    selection = read_selection(run)
    return [str(arm) for arm in _arms(selection, selection.criteria.layers, wanted, (seed,))]


def confirmation_resolution(
    run: str | Path,
    *,
    num_seeds: int,
    stop_early: bool = False,
    spread: float | None = None,
    pilot: str | Path | None = None,
) -> Resolution:
    """The difference that a confirmation of a run can be expected to find.

    Args:
        run: The run folder; what its confirmation has trained already tells the spread, if nothing else does.
        num_seeds: In all.
        stop_early: See `ConfirmationPlan`.
        spread: Standard deviation over seeds of a difference, as a share of the distance, where it is known.
        pilot: Another run that was confirmed with two seeds or more, or an atlas of them, whose spread to take.

    Raises:
        ValueError: If both are given, or the pilot tells no spread.
    """
    if spread is not None and pilot is not None:
        raise ValueError("both a spread and a pilot are given; pass one of them")
    if spread is not None:
        known: Spread | None = Spread(spread, None, "as stated")
    elif pilot is not None:
        inner = Path(pilot) / "confirmation"
        known = kept_spread(inner if inner.is_dir() else Path(pilot), "the pilot")
        if known is None:
            raise ValueError(f"{pilot} holds no arms of two seeds that differ; pass a confirmed run or an atlas")
    else:
        known = kept_spread(Path(run) / "confirmation", "this confirmation")
    return resolution(num_seeds, stop_early=stop_early, spread=known)


def training_splits(
    source: str, shape: tuple[int, ...], options: Mapping[str, Any], *, progress: Progress | None = None
) -> Splits:
    """The data for training: everything that the fit split owns, and the report samples of the probing run."""
    reading, encoding = _divided(options)
    every = {name: value for name, value in reading.items() if not name.startswith("num_")}
    owned = load(source, expect_shape=None if encoding else shape, **every)
    counts = {name: value for name, value in reading.items() if name in ("num_choose", "num_report")}
    probed = for_probing(take(owned, **counts), given=reading)
    splits = Splits(owned.fit, probed.choose, probed.report)
    return _encoded(splits, encoding, shape, progress) if encoding else splits


def load_splits(source: str, options: Mapping[str, Any]) -> tuple[Splits, tuple[int, ...]]:
    """A data set as it is read, not yet encoded, and the shape (C, *grid) that a model of it takes."""
    reading, encoding = _divided(options)
    splits = load(source, **reading)
    return splits, latent_shape(splits.fit.shape, encoding["vae"]) if encoding else splits.fit.shape


def encoded(splits: Splits, options: Mapping[str, Any], *, progress: Progress | None = None) -> Splits:
    """The latents of a data set where the options name an autoencoder, else the data set itself."""
    encoding = _divided(options)[1]
    return _encoded(splits, encoding, None, progress) if encoding else splits


def _divided(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that read a data set, and those that encode it; none of these without a VAE."""
    names = ("vae", "latent_scale") if "vae" in options else ()
    encoding = {name: value for name, value in options.items() if name in names}
    return {name: value for name, value in options.items() if name not in names}, encoding


def _encoded(
    splits: Splits, encoding: Mapping[str, Any], shape: tuple[int, ...] | None, progress: Progress | None
) -> Splits:
    return encode_splits(splits, **encoding, expect_shape=shape, progress=_named(progress, "encoding images"))


def forecast(plan: RunPlan, *, device: str = "auto") -> dict[str, Any]:
    """What `probe` would do, without doing it; checks checkpoint and data."""
    backbone, splits = plan.open(device=device, encode=False)
    extraction = plan.extraction(backbone)
    _check_frames(plan, splits)
    shapes = layer_shapes(backbone)
    num = sum(len(samples) for _, samples in splits.items())
    rows = num * len(extraction.noise_levels) * extraction.draws
    return {
        "model": backbone.name,
        "layers": len(shapes),
        "noise_levels": list(extraction.noise_levels),
        "samples": {name: len(samples) for name, samples in splits.items()},
        "forward_passes": 2 * rows,
        "feature_bytes": 4
        * rows
        * (2 * sum(width for _, width in shapes.values()) + min(math.prod(backbone.shape), RAW_INPUT_WIDTH)),
    }


def describe_convention(run: str | Path) -> list[str]:
    """What the convention check of a run found, in lines for people."""
    record = json.loads((Path(run) / "convention.json").read_text(encoding="utf-8"))
    return [
        f"{'weights' if i == 0 else 'caution':<8} {line}"
        for i, line in enumerate([record["message"], *record["notes"]])
    ]


def describe_labels(run: str | Path) -> list[str]:
    """What the model knows of each label column, in lines for people; none where there is only the class.

    The highest probe accuracy on the report split, and those of both controls at that noise level.
    """
    quality = read_quality(Path(run) / "quality.csv")
    columns = {probed_column(metric) or CLASS: metric for metric in quality["metric"].unique() if _is_probe(metric)}
    lines = []
    for column, metric in columns.items() if set(columns) - {CLASS} else ():
        rows = quality[(quality["metric"] == metric) & (quality["split"] == "report")].dropna(subset="value")
        of = {source: rows[rows["source"] == source] for source in (MODEL, RANDOM_WEIGHTS, RAW_INPUT)}
        if of[MODEL].empty:
            lines.append(f"knows    {column}: nothing could be measured")
            continue
        best = of[MODEL].loc[of[MODEL]["value"].idxmax()]
        beside = (
            f"{source} {part['value'].max():.2f}"
            for source in (RANDOM_WEIGHTS, RAW_INPUT)
            if not (part := of[source][of[source]["noise_level"] == best["noise_level"]]).empty
        )
        lines.append(
            f"knows    {column}: {best['value']:.2f} at {best['layer']}, noise level {best['noise_level']:g} "
            f"({', '.join(beside)})"
        )
        lines += [f"caution  {column}: {counts}" for counts in re.findall("left out of.*", best["note"])]
    return lines


def _is_probe(metric: str) -> bool:
    return metric == PROBE or probed_column(metric) != ""


def describe(selection: Selection, *, num_pairs: int = 3) -> list[str]:
    """A selection in lines for people."""
    pick = selection.pick
    lines = [f"pick     {f'{pick.student} should learn from {pick.teacher}' if pick else 'none'}"]
    lines += [f"         {selection.reason}"]
    if selection.ranked:
        lines += [f"{'rank':<8} {'student':<16} {'teacher':<16} {'score':>7} {'gap':>7} {'CKA':>7} {'gain':>7}"]
    lines += [
        f"{rank:<8} {pair.student:<16} {pair.teacher:<16} {pair.score:>7.2f} {pair.gap:>7.4f} {pair.mean_cka:>7.3f} "
        + f"{'' if pair.gain is None else f'{pair.gain:+.1%}':>7}"
        + ("  tie" if pair.ties_with_first else "")
        for rank, pair in enumerate(selection.ranked[:num_pairs], 1)
    ]
    lines += [f"caution  {warning}" for warning in selection.warnings]
    lines += [f"trust    {HYPOTHESIS}"] if pick else []
    return [line.rstrip() for line in lines]


def selection_record(selection: Selection) -> dict[str, Any]:
    """A selection as JSON."""
    record: dict[str, Any] = json.loads(selection.to_json())
    return record


def examine_machine() -> dict[str, Any]:
    """Versions, devices, and whether the embedded model runs here."""
    backbone = open_checkpoint("digits", device="auto")
    shapes = layer_shapes(backbone)
    return {
        "layerprobe": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "embedded model": f"{backbone.name}: {len(shapes)} layers read",
    }


def draw_figures(run: str | Path) -> list[Path]:
    """Draws every figure that the run's tables allow, as PNG and SVG, into `figures/`."""
    run = Path(run)
    quality, similarity = _tables(run)
    selection = read_selection(run)
    figures = {}
    metrics = list(dict.fromkeys(quality["metric"]))
    shown = headlines(metrics)
    if any(map(probed_column, metrics)):
        figures["what-each-layer-knows"] = knowledge_curves(quality)
    for metric in shown:
        name = re.sub(r"[^\w.]+", "-", metric)
        figures[f"{name}-curves"] = plots.layer_quality_curves(quality, metric, selection=selection)
        figures[f"{name}-heatmap"] = plots.quality_heatmap(quality, metric)
    if more := [metric for metric in metrics if metric not in shown]:
        figures["more-measures"] = plots.metric_panels(quality, more, selection=selection)
    figures["cka"] = plots.cka_heatmap(similarity, selection=selection)
    store = FeatureStore.open(_store_folder(run, MODEL))
    if len(store.token_rows) and not store.tokens_padded:
        figures["token-maps"] = _token_maps(store)
    if (run / "verdict.json").is_file():
        curves = pd.read_csv(run / "confirmation.csv")
        verdict = json.loads((run / "verdict.json").read_text(encoding="utf-8"))
        figures["confirmation"] = plots.confirmation_curves(curves, verdict)
    return [path for name, figure in figures.items() for path in plots.save(figure, run / "figures", name)]


def _token_maps(store: FeatureStore) -> Any:
    """Tokens of the first samples of the report split in colours, for the layers whose tokens lie on a grid."""
    grids = {layer: grid for layer in store.layers if (grid := store.grid(layer)) is not None}
    maps = {
        (layer, level): pca_rgb(store.tokens(layer, level, split="report"))
        for layer in grids
        for level in store.noise_levels
    }
    return token_maps(maps, grids, samples=range(min(3, int((store.token_splits == "report").sum()))))


def write_environment(run: Path) -> None:
    """Which software and machine the numbers come from."""
    record = {
        "layerprobe": __version__,
        "command": " ".join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in PACKAGES},
    }
    if not (run / "environment.json").is_file():
        write_text(run / "environment.json", json.dumps(record, indent=1))


def _tables(run: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    if not (run / "quality.csv").is_file():
        raise FileNotFoundError(f"{run} holds no quality.csv; run `layerprobe probe` first")
    return read_quality(run / "quality.csv"), read_similarity(run / "similarity.csv")


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)
