"""The run of features that another program has computed: everything behind the extraction."""

from __future__ import annotations

from pathlib import Path

from layerprobe.analyses.report import write_report
from layerprobe.analyses.runs.figures import draw_figures
from layerprobe.analyses.runs.folder import RunFolder, RunPlan
from layerprobe.analyses.runs.probe import analyze_run, check_samples
from layerprobe.analyses.selection import Selection
from layerprobe.analyses.tables import MODEL
from layerprobe.checkpoints import CheckpointSource
from layerprobe.data import DataSource
from layerprobe.extraction import ExtractionPlan, OwnFeatures, features_hash, own_splits, store_features
from layerprobe.files import FEATURES, holding
from layerprobe.progress import TaskProgress


@holding("run")
def features_run(
    features: OwnFeatures,
    run: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    progress: TaskProgress | None = None,
) -> Selection:
    """Measures features, picks a pair, draws the figures and writes the report, as `probe_run` does for a network.

    What needs the network or its samples is missing: controls, layer ablation, tokens, and the check of the convention.

    Args:
        features: The features.
        run: Run folder. Finished parts are not repeated.
        seed: Seed of the measures.
        device: Device of the measures, as for `analyze_run`.
        progress: Called with (task name, steps done, steps in total).

    Raises:
        ValueError: If the samples cannot be divided, a value is not finite, or the folder holds another run.
    """
    folder = RunFolder(run)
    splits = own_splits(features)
    check_samples(splits)
    source = f"{FEATURES}{Path(features.source).name}, {features_hash(features)}"
    plan = ExtractionPlan(noise_levels=features.noise_levels, seed=seed)
    folder.claim(RunPlan(CheckpointSource(source), DataSource(source), plan))
    store_features(features, splits, folder.store_folder(MODEL), seed=seed)
    folder.write_data(splits)
    selection = folder.selection() if folder.is_measured and folder.has_selection else None
    selection = selection or analyze_run(run, device=device, progress=progress)
    draw_figures(run)
    write_report(run)
    return selection
