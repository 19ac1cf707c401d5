"""The main job: extract features, measure layers, select a pair, draw figures and write the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from layerprobe.analyses.generation import Extractor, all_features
from layerprobe.analyses.measures import FEW_SAMPLES
from layerprobe.analyses.report import write_report
from layerprobe.analyses.runs.costing import analysis_cost, forecast_cost, rough_probe_seconds
from layerprobe.analyses.runs.figures import draw_figures
from layerprobe.analyses.runs.folder import RunFolder, RunPlan
from layerprobe.analyses.runs.stages import (
    CONTROLS,
    CONVENTION,
    ENCODING,
    EVIDENCE,
    EXTRACTION,
    FIGURES,
    MODEL_FEATURES,
    PAIRS,
    PROBES,
    SIMILARITY,
    STAGES,
    Cost,
    StageClock,
)
from layerprobe.analyses.runs.timing import encoding_seconds, row_seconds
from layerprobe.analyses.selection import (
    Answers,
    Caution,
    Objection,
    PairLimits,
    Selection,
    control_accuracies,
    equal_weights,
    probe_cautions,
    rank_pairs,
    single_answers,
)
from layerprobe.analyses.tables import (
    ANALYSES,
    CRITERIA,
    MODEL,
    PROBE,
    RANDOM_WEIGHTS,
    RAW_INPUT,
    Analysis,
    KeptMeasurements,
    PairEvidence,
    ScoreKeeper,
    encoder_rows,
    measure,
    measure_evidence,
    recoverability_table,
    write_table,
)
from layerprobe.analyses.wording import copy_sentences
from layerprobe.backbones import Backbone, layer_shapes
from layerprobe.checkpoints import (
    ConventionCheck,
    check_convention,
    convention_message,
    convention_name,
    resolve_device,
)
from layerprobe.checksums import recorded_digest
from layerprobe.data import Reading, Splits, reading_lines
from layerprobe.extraction import (
    RAW_INPUT_WIDTH,
    FeatureStore,
    ablate_layers,
    evidence_of,
    extract_part,
    random_weights,
    raw_input,
    raw_pool_cells,
    rounding_error,
)
from layerprobe.messages import as_written
from layerprobe.progress import TaskProgress, named_progress
from layerprobe.ranks import ALONE, Ranks, current, together
from layerprobe.records import write_record

LEAST_COMPARED = 4  # samples that debiased CKA needs
_EVIDENCE = "evidence"  # the small extraction beside the model and its controls


@together("run")
def probe_run(plan: RunPlan, run: str | Path, *, progress: TaskProgress | None = None, **options: Any) -> Selection:
    """Runs the main job: features of the model and its controls, tables, selection, figures and report.

    An interrupted run continues when the call is repeated; a finished run is only drawn again. The processes of
    torchrun or srun share the work, and the first one writes; all get the result, which is the same for any number.

    Args:
        plan: Checkpoint, data and extraction of the run.
        run: Run folder.
        progress: Called with (task name, steps done, steps in total).
        **options: Options of `extract_run`.

    Raises:
        ValueError: If checkpoint, data and plan do not fit, or the folder holds another run.
    """
    selection = measure_run(plan, run, progress=progress, **options)
    if current().is_first:
        clock = StageClock(run, writes=True)
        clock.begin(FIGURES)
        draw_figures(run)
        write_report(run)
        clock.end()
    return selection


@together("run")
def measure_run(
    plan: RunPlan, run: str | Path, *, device: str = "auto", progress: TaskProgress | None = None, **options: Any
) -> Selection:
    """Runs the part of `probe_run` before the figures: convention check, features, tables and selection."""
    extract_run(plan, run, device=device, stages=STAGES, progress=progress, **options)
    folder, ranks = RunFolder(run), current()
    if not ranks.once(lambda: folder.is_measured):
        return analyze_run(run, device=device, progress=progress)
    return ranks.once(lambda: _kept_selection(folder))


def _kept_selection(folder: RunFolder) -> Selection:
    folder.drop_measured()  # if the call that wrote the tables was killed right after them
    replaced = folder.has_selection and _is_mistrusted(folder.selection())
    folder.keep_selection(choose_layers(folder.path), replace=replaced)
    return folder.selection()


def _is_mistrusted(selection: Selection) -> bool:
    """Whether the convention check alone withholds the pick; --trust-convention may have come since."""
    return any(objection.code == "network does not denoise" for objection in selection.refusal[1])


@together("run")
def extract_run(
    plan: RunPlan,
    run: str | Path,
    *,
    opened: tuple[Backbone, Splits] | None = None,
    trust_convention: bool = False,
    device: str = "auto",
    batch_size: int = 128,
    on_assumption: Callable[[str], None] | None = None,
    on_reading: Callable[[Reading | None], None] | None = None,
    on_forecast: Callable[[Cost], None] | None = None,
    stages: Sequence[str] = EXTRACTION,
    progress: TaskProgress | None = None,
) -> None:
    """Runs the part that needs the model: convention check, features of the model and its controls, layer ablation.

    Args:
        plan: Checkpoint, data and extraction of the run.
        run: Run folder.
        opened: Model and splits, if they are open already or were passed as objects; the plan is their record.
        trust_convention: Whether to continue if the weights fit another schedule or prediction than the declared one,
            and to pick if they fit none.
        device: Device of the model, if it is not open yet.
        batch_size: Rows per forward pass.
        on_assumption: Called with each assumption about the network, as in `Backbone`, before the extraction.
        on_reading: Called with what was read of the data, before the model runs.
        on_forecast: Called with what the run will cost, if it begins and the extraction takes longer than a minute.
        stages: Stages to forecast.
        progress: Called with (task name, steps done, steps in total).

    Raises:
        ValueError: As `probe_run` does.
    """
    folder, ranks = RunFolder(run), current()
    backbone, splits = opened or plan.open(device=device)
    backbone = backbone.in_precision(plan.extraction.precision)
    plan = _in_precision_of(backbone, plan)
    if ranks.is_first:
        folder.check_claim(plan)
    _check_frames(plan, splits)
    check_samples(splits)
    if on_reading:
        on_reading(splits.train.reading)
    clock = StageClock(folder.path)
    if on_forecast and ranks.is_first:
        clock.foretell(
            CONVENTION,
            lambda: encoding_seconds(splits, plan.data.vae) + _passes_s(backbone, splits, plan, batch_size),
            lambda: _cost(backbone, splits, plan, batch_size, stages, ranks.world_size),
            on_forecast,
        )
    if plan.data.vae is not None and opened is None:
        clock.begin(ENCODING)
        encoding = named_progress(progress, "encoding images")
        splits = plan.data.encode(splits, expect_shape=backbone.shape, progress=encoding)
    clock.begin(CONVENTION)
    convention, trusted = _convention(folder, backbone, splits, plan, batch_size)
    trusted = trusted or trust_convention
    if convention.verdict == "misfit" and not trusted:
        raise ValueError(convention_message(convention))
    if on_assumption:
        for assumption in backbone.assumptions:
            on_assumption(assumption)
    if ranks.is_first:
        folder.claim(plan)
        clock.writes = True  # The folder is the run's own only now.
        folder.write_convention(convention, trusted=trusted, assumptions=backbone.assumptions)
        if backbone.precision != "float32" and not backbone.is_narrow and not folder.is_intact(folder.rounding):
            error = rounding_error(backbone, splits.validation, plan.extraction_from(backbone), batch_size=batch_size)
            write_record(folder.rounding, error.to_dict())
    extract_all(backbone, splits, plan, folder, batch_size=batch_size, ranks=ranks, clock=clock, progress=progress)
    if ranks.is_first:
        folder.write_data(splits)  # Only now is it sure that the features are of this data.
    if not ranks.once(lambda: folder.is_intact(folder.ablation)):
        skipped = ablate_layers(
            backbone,
            splits.validation,
            plan.extraction.noise_levels,
            split="validation",
            seed=plan.seed,
            batch_size=batch_size,
            ranks=ranks,
            progress=named_progress(progress, "skipping layers"),
        )
        if ranks.is_first:
            write_table(pd.DataFrame(skipped.rows(source=MODEL, seed=plan.seed)), folder.ablation)
    clock.end()


def _convention(
    folder: RunFolder, backbone: Backbone, splits: Splits, plan: RunPlan, batch_size: int
) -> tuple[ConventionCheck, bool]:
    """The convention check of the run, and whether it was trusted, from the folder if it was done before."""
    ranks = current()
    known = ranks.once(lambda: folder.convention_check() if folder.is_intact(folder.convention) else None)
    if known is not None:
        return known
    check = check_convention(backbone, splits.train, seed=plan.seed, batch_size=batch_size, ranks=ranks)
    return check, False


@together("run")
def analyze_run(
    run: str | Path,
    *,
    analyses: Sequence[Analysis] = ANALYSES,
    encoder: Extractor | None = None,
    device: str = "auto",
    on_forecast: Callable[[Cost], None] | None = None,
    progress: TaskProgress | None = None,
) -> Selection:
    """Measures the features of a run: writes its tables, and its selection if it has none yet.

    What earlier calls measured by other analyses stays in the quality table. Several processes share the work, as in
    `probe_run`.

    Args:
        run: Run folder with features.
        analyses: Analyses to run on every layer and noise level.
        encoder: External encoder to compare all layers with; it sees the clean samples of the validation split.
        device: Device of the measures. Few samples are measured on the CPU, which takes less time for them.
        on_forecast: Called with what the measures will cost, if they are the run's first and take longer than a minute.
        progress: Called with (task name, steps done, steps in total).

    Raises:
        FileNotFoundError: If there are no features.
        ValueError: If the device is not available.
    """
    folder, ranks = RunFolder(run), current()
    plan = folder.plan()
    stores = _measured_stores(folder)
    model = stores[MODEL]
    on = _measuring_device(device, model)
    keeper, clock = ScoreKeeper(), StageClock(folder.path, writes=ranks.is_first)
    kept = _kept_measurements(folder, stores, analyses, on)
    if on_forecast and ranks.is_first:
        clock.foretell(
            PROBES,
            lambda: rough_probe_seconds(stores.values()),
            lambda: analysis_forecast(run, device=device, num_processes=ranks.world_size),
            on_forecast,
        )
    report = named_progress(progress, "measuring layers")

    def measured(done: int, total: int) -> None:
        if done == total - stores[MODEL].draws:  # The last steps compare all layers, a step for each draw.
            clock.begin(SIMILARITY)
        if report:
            report(done, total)

    clock.begin(PROBES)
    quality, similarity = measure(
        stores,
        analyses=analyses,
        seed=plan.seed,
        device=on,
        ranks=ranks,
        kept=kept,
        listener=keeper.listen,
        progress=measured,
    )
    clock.begin(PAIRS)
    if _is_given(model):
        ablation, small = pd.DataFrame(columns=quality.columns), model
    else:
        ablation, small = folder.ablation_table(), folder.store(_EVIDENCE)
    evidence = measure_evidence(small, scores=keeper.scores, ablation=ablation, ranks=ranks)
    has_tokens = len(model.token_rows)
    recoverability = recoverability_table(model, device=on, ranks=ranks) if has_tokens else None

    def conclude() -> Selection:
        tables = [table for table in (quality, ablation) if len(table)]
        if encoder is not None:
            outside = _encoder_features(plan, model, encoder)
            tables.append(encoder_rows(model, outside, encoder.name, device=on))
        if folder.is_intact(folder.path / "quality.csv"):
            # Measurements of these same features by analyses or encoders that are not asked for now.
            before = folder.quality()
            tables.append(before[~before["metric"].isin(pd.concat(tables)["metric"])])
        if keeper.probe_scores:
            folder.write_probe_scores(keeper.probe_scores)
        folder.write_tables(pd.concat(tables, ignore_index=True), similarity, evidence, recoverability)
        folder.drop_measured()
        selection = choose_layers(run)
        folder.keep_selection(selection)
        return selection

    selection = ranks.once(conclude)
    clock.end()
    return selection


def analysis_forecast(run: str | Path, *, device: str = "auto", num_processes: int = 1) -> Cost:
    """Returns what the rest of `analyze_run` will cost, by its own analyses and without an encoder.

    Args:
        run: Run folder with features.
        device: Device of the measures.
        num_processes: Number of processes that will share the work.

    Raises:
        FileNotFoundError: If there are no features.
    """
    folder = RunFolder(run)
    stores = _measured_stores(folder)
    model = stores[MODEL]
    on = _measuring_device(device, model)
    cost = analysis_cost(model, stores.get(RAW_INPUT, model), on, processes=num_processes)
    kept = _kept_measurements(folder, stores, ANALYSES, on)
    if kept is None:
        return cost
    left = 1 - kept.count() / sum(len(store.layers) * len(store.noise_levels) for store in stores.values())
    return replace(cost, seconds=cost.seconds | {PROBES: left * cost.seconds[PROBES]})


def _measured_stores(folder: RunFolder) -> dict[str, FeatureStore]:
    """The features that are measured: those of the model and, unless it is unknown, of its controls."""
    model = folder.store(MODEL)
    controls = () if _is_given(model) else (RANDOM_WEIGHTS, RAW_INPUT)
    return {MODEL: model} | {source: folder.store(source) for source in controls}


def _kept_measurements(
    folder: RunFolder, stores: Mapping[str, FeatureStore], analyses: Sequence[Analysis], device: torch.device
) -> KeptMeasurements | None:
    """Where measurements are kept until the tables are written.

    None for an analysis of the caller's own, whose code may change between two calls, and for features of an earlier
    version without checksums, which may change too.
    """
    is_certain = set(analyses) <= set(ANALYSES) and all(recorded_digest(store.folder) for store in stores.values())
    return KeptMeasurements(folder.measured, stores, analyses, device) if is_certain else None


def _is_given(store: FeatureStore) -> bool:
    """Whether another program computed the features, so that there is nothing but them."""
    return "given" in store.manifest


def _measuring_device(device: str, store: FeatureStore) -> torch.device:
    """The device that measures: with few training samples the CPU, whose threads then measure side by side."""
    has_few = int((store.splits == "train").sum()) <= FEW_SAMPLES
    return torch.device("cpu") if has_few else resolve_device(device)


def _encoder_features(plan: RunPlan, store: FeatureStore, encoder: Extractor) -> NDArray[np.float32]:
    """The encoder's features of the samples in the store's validation split, shape (n, D)."""
    samples = plan.data.probing_splits().validation
    if not np.array_equal(samples.ids.numpy(), store.ids[store.splits == "validation"]):
        raise ValueError(f"{plan.data.source} no longer has the samples that the features are of; extract them again")
    return all_features(encoder, samples, batch_size=64)


def extract_all(
    backbone: Backbone,
    splits: Splits,
    plan: RunPlan,
    folder: RunFolder,
    *,
    batch_size: int = 128,
    ranks: Ranks = ALONE,
    clock: StageClock | None = None,
    progress: TaskProgress | None = None,
) -> dict[str, FeatureStore]:
    """Extracts the features of the model and of its two controls, and the few that the evidence is measured on."""
    turn, clock = 0, clock or StageClock(folder.path, writes=ranks.is_first)
    frames = bool(_frame_columns(splits))
    readers: Mapping[str, AbstractContextManager[Backbone]] = {
        MODEL: nullcontext(backbone),
        RANDOM_WEIGHTS: random_weights(backbone, seed=plan.seed),
        RAW_INPUT: nullcontext(raw_input(backbone, places=frames)),
    }
    for source, reading in readers.items():
        clock.begin(MODEL_FEATURES if source == MODEL else CONTROLS)
        with reading as reader:
            extraction = plan.extraction_from(reader)
            if source == RAW_INPUT and frames:
                extraction = replace(extraction, pool_cells=raw_pool_cells(backbone.shape))
            elif source == RAW_INPUT:
                extraction = replace(extraction, token_samples=0)  # It has no tokens of its own.
            turn = extract_part(
                reader,
                splits,
                extraction,
                folder.store_folder(source),
                batch_size=batch_size,
                ranks=ranks,
                turn=turn,
                progress=named_progress(progress, f"reading layers ({source})"),
            )
    clock.begin(EVIDENCE)
    small = evidence_of(splits, plan.extraction_from(backbone))
    extract_part(backbone, *small, folder.store_folder(_EVIDENCE), batch_size=batch_size, ranks=ranks, turn=turn)
    ranks.barrier()
    return {source: folder.store(source) for source in readers}


def _frame_columns(splits: Splits) -> list[str]:
    """The names of the further label columns that label every frame."""
    return [column.name for column in splits.train.columns if column.labels.ndim > 1]


def _check_frames(plan: RunPlan, splits: Splits) -> None:
    frames = _frame_columns(splits)
    if frames and not plan.extraction.token_samples:
        raise ValueError(
            f"{frames[0]!r} labels every frame, which the kept tokens are probed for; pass --token-samples 200 or so"
        )


def check_samples(splits: Splits) -> None:
    """Refuses before the extraction what cannot be measured after it.

    Raises:
        ValueError: If samples are too few, or all training samples are of one class.
    """
    if len(splits.validation) < LEAST_COMPARED:
        raise ValueError(
            f"the validation split has {len(splits.validation)} samples, and comparing layers needs {LEAST_COMPARED}; "
            "pass more data"
        )
    labels = splits.train.labels
    if labels is not None and bool((labels == labels[0]).all()):
        raise ValueError(
            "the training split has one class only, and a probe needs two; pass data with two classes or more, or "
            "without labels"
        )


def choose_layers(
    run: str | Path,
    *,
    criteria: Sequence[str] | None = None,
    label_free: bool | None = None,
    limits: PairLimits | None = None,
    num_pairs: int | None = None,
) -> Selection:
    """Ranks the layer pairs of a run by its evidence; the run's own selection stays as it is.

    Args:
        run: Folder of an analyzed run.
        criteria: Criteria to rank by, with equal weights; the rule of `rank_pairs` if None.
        label_free: Whether to use only criteria that need no labels; if None, only if the run has no probes.
        limits: Limits that an admissible pair must keep; the defaults of `PairLimits` if None.
        num_pairs: Number of ranked pairs to keep; all if None.

    Raises:
        FileNotFoundError: If the run has not been analyzed.
        ValueError: If a criterion is unknown or was not measured.
    """
    folder = RunFolder(run)
    quality, evidence = folder.quality(), folder.evidence()
    criteria = [as_written(name, CRITERIA) for name in criteria or ()]
    if label_free is None:
        label_free = PROBE not in evidence.by_layer
    rule = equal_weights(criteria, label_free=label_free) if criteria else None
    if missing := [name for name in criteria if not evidence.has(name)]:
        raise ValueError(f"the evidence has no {missing[0]}; name other criteria, or extract more")
    store = folder.store(MODEL)
    labels = None if label_free or store.labels is None else store.labels[store.splits == "validation"]
    against_all, cautions = _by_convention(folder)
    if _is_given(store):
        cautions = (
            *cautions,
            Caution("no controls"),
            Caution("layers named", value=len(evidence.layers), note="given"),
        )
    return rank_pairs(
        evidence,
        label_free=label_free,
        rule=rule,
        limits=limits or PairLimits(),
        num_pairs=num_pairs,
        shapes=store.manifest["layer_shapes"],
        controls=control_accuracies(quality, labels, evidence.noise_levels),
        against_all=against_all,
        cautions=(
            *cautions,
            *_by_layers(folder, evidence),
            *(() if label_free else probe_cautions(quality, PROBE, "validation")),
        ),
    )


def _by_layers(folder: RunFolder, evidence: PairEvidence) -> tuple[Caution, ...]:
    """A caution if the user named single layers, since depths are counted through these alone."""
    named = folder.plan().checkpoint.layers or ()
    return () if all("*" in name for name in named) else (Caution("layers named", value=len(evidence.layers)),)


def _by_convention(folder: RunFolder) -> tuple[tuple[Objection, ...], tuple[Caution, ...]]:
    """What the convention check says against every pick, and against a pick that the user's trust allows."""
    if not folder.convention.is_file():
        return (), ()
    check, trusted = folder.convention_check()
    if check.verdict == "fits":
        return (), ()
    best = check.fits[0]
    if trusted:
        return (), (Caution("convention trusted", note=check.verdict),)
    return (Objection("network does not denoise", value=math.exp(best.score), note=convention_name(best)),), ()


def answer_run(run: str | Path, selection: Selection) -> Answers:
    """Answers single questions of a run: richest features, gain by training, separable classes, encoder, pruning."""
    folder = RunFolder(run)
    return single_answers(folder.quality(), folder.evidence(), selection)


def _passes_s(backbone: Backbone, splits: Splits, plan: RunPlan, batch_size: int) -> float:
    """Seconds of reading the model."""
    extraction = plan.extraction_from(backbone)
    rows = sum(len(samples) for _, samples in splits.items()) * len(extraction.noise_levels) * extraction.draws
    return rows * row_seconds(backbone, extraction, min(batch_size, rows))


def _cost(
    backbone: Backbone, splits: Splits, plan: RunPlan, batch_size: int, stages: Sequence[str], processes: int
) -> Cost:
    return forecast_cost(
        backbone,
        splits,
        plan.extraction_from(backbone),
        vae=plan.data.vae,
        batch_size=batch_size,
        measuring=torch.device("cpu") if len(splits.train) <= FEW_SAMPLES else backbone.device,
        processes=processes,
        stages=stages,
    )


def _in_precision_of(backbone: Backbone, plan: RunPlan) -> RunPlan:
    return replace(plan, extraction=replace(plan.extraction, precision=backbone.precision or plan.extraction.precision))


def forecast(
    plan: RunPlan,
    run: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 128,
    stages: Sequence[str] = STAGES,
    num_processes: int = 1,
) -> tuple[dict[str, Any], Cost]:
    """Returns the size of the work of `probe_run`, after checking checkpoint and data and timing a batch of it.

    Args:
        plan: Checkpoint, data and extraction of the run.
        run: Run folder, which must be free or the run's own.
        device: Device of the model and of the measures.
        batch_size: Rows per forward pass.
        stages: Stages of the run, see `forecast_cost`.
        num_processes: Number of processes that will share the work.

    Returns:
        The size as JSON values, and the cost.

    Raises:
        ValueError: As `probe_run` before it computes.
    """
    backbone, splits = plan.open(device=device)
    RunFolder(run).check_claim(_in_precision_of(backbone, plan))
    extraction = plan.extraction_from(backbone)
    _check_frames(plan, splits)
    check_samples(splits)
    shapes = layer_shapes(backbone)
    reading = splits.train.reading
    num = sum(len(samples) for _, samples in splits.items())
    rows = num * len(extraction.noise_levels) * extraction.draws
    record = {
        "model": backbone.name,
        "layers": len(shapes),
        "assumed": list(backbone.assumptions),
        "noise_levels": list(extraction.noise_levels),
        "samples": {name: len(samples) for name, samples in splits.items()},
        **({} if reading is None else reading_lines(reading)),
        "copies": copy_sentences([asdict(copies) for copies in splits.copies]),
        "forward_passes": 2 * rows,
        "feature_bytes": 4
        * rows
        * (2 * sum(width for _, width in shapes.values()) + min(math.prod(backbone.shape), RAW_INPUT_WIDTH)),
        "device": str(backbone.device),
        "precision": backbone.precision,
        "processes": num_processes,
    }
    return record, _cost(backbone, splits, plan, batch_size, stages, num_processes)
