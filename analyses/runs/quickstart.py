"""The whole pipeline on the embedded checkpoint and data."""

from __future__ import annotations

from pathlib import Path

from layerprobe.analyses.experiments import Verdict
from layerprobe.analyses.runs.confirm import confirm_run, confirmation_job, confirmation_training
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
QUICKSTART_ARMS = ("none", "pick", "prior", "bad")


@holding("run")
def quickstart_run(
    run: str | Path,
    *,
    steps: int = 90,
    num_seeds: int = 2,
    seed: int = 0,
    device: str = "auto",
    progress: TaskProgress | None = None,
) -> tuple[Selection, Verdict]:
    """Runs the whole pipeline on the embedded checkpoint and data: probe, pick, samples, confirmation, report.

    Args:
        run: Run folder; a finished part is not repeated.
        steps: Number of optimizer steps of each arm.
        num_seeds: Number of seeds of the confirmation.
        seed: Seed of the run, and the first seed of the confirmation.
        device: Device of the models.
        progress: Called with (task name, steps done, steps in total).
    """
    figures = RunFolder(run).figures
    extraction = ExtractionPlan(noise_levels=QUICKSTART_LEVELS, pool_cells=2, seed=seed)
    plan = RunPlan(CheckpointSource("digits"), DataSource("digits"), extraction)
    selection = measure_run(plan, run, device=device, progress=progress)
    if not (figures / "samples.png").is_file():
        draw_samples(plan.checkpoint.open(device=device), figures)
    job = confirmation_job(
        run,
        confirmation_training(run, steps=steps),
        seeds=tuple(range(seed, seed + num_seeds)),
        arms=QUICKSTART_ARMS,
        num_evaluations=3,
        num_samples=300,
        sampling=SamplingPlan(solver="heun", steps=6),  # Enough for 8 x 8 pixels; sampling takes most of the time.
        device=device,
    )
    return selection, confirm_run(job, progress=progress)
