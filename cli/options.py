"""Options that several commands share and that are not fields of a dataclass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli.config import read_config
from layerprobe.cli.fields import Unset
from layerprobe.cli.parsing import check_device, existing
from layerprobe.files import PASS_CHECKPOINT
from layerprobe.options import OPTIMIZER_PANEL, OUTPUT_PANEL, TRIAL_PANEL
from layerprobe.precision import compute_deterministically

existing_run = existing("run", "pass a folder that `layerprobe probe` has made")
existing_checkpoint = existing("checkpoint file", PASS_CHECKPOINT)


def _if_deterministic(value: bool) -> bool:
    if value:
        compute_deterministically()
    return value


Config = Annotated[
    Path | None,
    typer.Option(help="TOML or YAML file with options of this command.", is_eager=True, callback=read_config),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON on standard output.", rich_help_panel=OUTPUT_PANEL),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only the answer, and no progress.", rich_help_panel=OUTPUT_PANEL),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print also how the pick is ranked.", rich_help_panel=OUTPUT_PANEL),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the input and describe the work, but write nothing.")]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Give equal bits for equal commands on a GPU too, with slower kernels; a CPU does without.",
        callback=_if_deterministic,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Device = Annotated[str, typer.Option(help="Device of the model: auto, cpu, cuda, cuda:1, ...", callback=check_device)]
MeasuringDevice = Annotated[
    str, typer.Option(help="Device of the measures: auto, cpu, cuda, cuda:1, ...", callback=check_device)
]
Run = Annotated[
    Path, typer.Argument(help="Run folder made by `layerprobe probe` or `quickstart`.", callback=existing_run)
]
FromScratch = Annotated[
    bool,
    typer.Option(
        "--from-scratch",
        help="Train from fresh weights in the same network, not from the checkpoint's.",
        rich_help_panel=OPTIMIZER_PANEL,
    ),
]
NumEvaluations = Annotated[
    int,
    typer.Option(min=1, help="Number of evaluations, evenly spaced over the steps.", rich_help_panel=TRIAL_PANEL),
]
NumSamples = Annotated[
    int,
    typer.Option(min=2, help="Number of samples drawn for each Fréchet distance.", rich_help_panel=TRIAL_PANEL),
]

# Fields of `DataSource` that count the samples of a probing run.
COUNTS = ("num_train", "num_validation", "num_test")
AS_TRAINED = Unset("as the checkpoint was trained")
