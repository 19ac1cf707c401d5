"""The pipeline on the embedded checkpoint and data, with a recorded trial, or a short one on request."""

from __future__ import annotations

import shutil
from pathlib import Path

from layerprobe.analyses.experiments import RecordedTrial, Verdict
from layerprobe.analyses.report import write_report
from layerprobe.analyses.runs.confirm import confirm_run, confirmation_job, confirmation_training
from layerprobe.analyses.runs.figures import draw_figures
from layerprobe.analyses.runs.folder import RunFolder, RunPlan
from layerprobe.analyses.runs.probe import measure_run
from layerprobe.analyses.runs.sample import draw_samples
from layerprobe.analyses.selection import Selection
from layerprobe.checkpoints import CheckpointSource
from layerprobe.data import DataSource
from layerprobe.extraction import ExtractionPlan
from layerprobe.files import holding
from layerprobe.progress import TaskProgress
from layerprobe.sampling import SamplingPlan

QUICKSTART_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
RECORDED = Path(__file__).with_name("recorded")


@holding("run")
def quickstart_run(
    run: str | Path, *, seed: int = 0, device: str = "auto", progress: TaskProgress | None = None
) -> tuple[Selection, RecordedTrial]:
    """Probes the embedded checkpoint on the embedded data, and puts the recorded trial of its pick beside the answer.

    Args:
        run: Run folder; a finished part is not repeated.
        seed: Seed of the run.
        device: Device of the model.
        progress: Called with (task name, steps done, steps in total).
    """
    folder = RunFolder(run)
    extraction = ExtractionPlan(noise_levels=QUICKSTART_LEVELS, pool_cells=2, seed=seed)
    plan = RunPlan(CheckpointSource("digits"), DataSource("digits"), extraction)
    selection = measure_run(plan, run, device=device, progress=progress)
    if not (folder.figures / "samples.png").is_file():
        draw_samples(plan.checkpoint.open(device=device), folder.figures)
    shutil.copytree(RECORDED, folder.recorded, dirs_exist_ok=True)
    draw_figures(run)
    write_report(run)
    return selection, RecordedTrial.read(folder.recorded)


def quickstart_trial(
    run: str | Path,
    *,
    steps: int,
    num_seeds: int,
    seed: int = 0,
    device: str = "auto",
    progress: TaskProgress | None = None,
) -> Verdict:
    """Trains the pick of a quickstart and the baseline from scratch, for as long as a demonstration may take.

    Args:
        run: Folder of `quickstart_run`.
        steps: Number of optimizer steps of each arm.
        num_seeds: Number of seeds.
        seed: First seed.
        device: Device of the models.
        progress: Called with (name of the running arm, steps done, steps in total).
    """
    job = confirmation_job(
        run,
        confirmation_training(run, steps=steps, from_scratch=True),
        seeds=tuple(range(seed, seed + num_seeds)),
        arms=("none", "pick"),
        from_scratch=True,
        num_evaluations=2,
        num_samples=300,
        sampling=SamplingPlan(solver="heun", steps=6),  # Enough for 8 x 8 pixels; sampling takes much of the time.
        device=device,
    )
    return confirm_run(job, progress=progress)
