"""The whole chain on the embedded checkpoint and data."""

from __future__ import annotations

from pathlib import Path

from layerprobe.analyses.experiments import Verdict
from layerprobe.analyses.runs.confirm import confirm_run, confirmation_training
from layerprobe.analyses.runs.folder import RunPlan
from layerprobe.analyses.runs.probe import measure_run
from layerprobe.analyses.runs.sample import draw_samples
from layerprobe.analyses.selection import Selection
from layerprobe.checkpoints import open_checkpoint
from layerprobe.progress import TaskProgress
from layerprobe.sampling import SamplingPlan

QUICKSTART_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def quickstart_run(
    run: str | Path,
    *,
    steps: int = 90,
    num_seeds: int = 2,
    seed: int = 0,
    device: str = "auto",
    progress: TaskProgress | None = None,
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
