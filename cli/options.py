"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from layerprobe.layersync import SyncOptions


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the defaults of this command: command line > environment > file > built-in default."""
    if path is None:
        return None
    # Keys are the names of the options as typed, with - or _.
    known = {flag.lstrip("-").replace("-", "_"): p.name for p in context.command.params for flag in p.opts}
    values = {key.replace("-", "_"): value for key, value in _parse(path).items()}
    unknown = sorted(set(values) - set(known) | {"config"} & set(values))
    if unknown:
        names = ", ".join(sorted(set(known) - {"config", "help"}))
        raise ValueError(
            f"{path} has the key {unknown[0]!r}, which {context.info_name} does not know; it knows {names}"
        )
    context.default_map = dict(context.default_map or {}) | {known[key]: value for key, value in values.items()}
    return path


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}; pass a .toml or .yaml file")
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            content = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML ({' '.join(str(error).split())[:120]})") from error
    elif path.suffix == ".toml":
        import tomllib

        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML ({error})") from error
    else:
        raise ValueError(f"{path} is neither .toml nor .yaml; pass one of these")
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, as in `seed = 1`")
    return content


def flag(panel: str, text: str, *names: str, **limits: Any) -> Any:
    """An option of one of the panels that long lists of options are told apart by."""
    # Without the variables of the environment, which would make the help twice as long.
    return typer.Option(*names, help=text, rich_help_panel=panel, show_envvar=False, **limits)


Config = Annotated[
    Path | None,
    typer.Option(help="TOML or YAML file with options of this command.", is_eager=True, callback=_read_config),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the input, say what would be done, write nothing.")]
Seed = Annotated[int, typer.Option(help="Of every random number.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Run = Annotated[Path, typer.Argument(help="A run folder made by `layerprobe probe` or `quickstart`.")]

Checkpoint = Annotated[
    str,
    typer.Argument(help="A weight file or a folder of them, a diffusers folder, or 'digits' for the embedded one."),
]
# What a command is given of a group of options.
Given = dict[str, Any]
# How a checkpoint is opened.
OPENING = {
    "weights": Annotated[str | None, typer.Option(help="Which weights of the file: ema, model, ...")],
    "family": Annotated[
        str | None,
        typer.Option(help="For files that leave it open: sit, layersync, disploss, dit, repa, sra, ..."),
    ],
    "num_heads": Annotated[int | None, typer.Option(help="Attention heads, for widths that are no preset's.")],
    "model": Annotated[str | None, typer.Option(help="Your own network: file.py:factory or package.module:Class.")],
    "subfolder": Annotated[str | None, typer.Option(help="Of a diffusers pipeline, where it is not the usual one.")],
    "lora": Annotated[str | None, typer.Option(help="Adapter on top of a diffusers model.")],
    "layers": Annotated[
        str | None, typer.Option(help="Names or patterns, comma-separated: 'blocks.*,mid'; 'blocks.*.attn:input'.")
    ],
    "schedule": Annotated[
        str | None,
        typer.Option(help="sit, sit-gvp, sit-vp, flow, flow-1000, edm, ddpm-linear, -scaled_linear or -cosine."),
    ],
    "prediction": Annotated[str | None, typer.Option(help="velocity, eps, x0, v or score.")],
    "shape": Annotated[str | None, typer.Option(help="Shape of one input, where the file does not tell: 3,32,32.")],
    "num_classes": Annotated[int | None, typer.Option(help="Classes, where the file does not tell; 0 for none.")],
}
# How a data set is read.
READING = {
    "size": Annotated[int | None, typer.Option(help="Resize images to this many pixels square.")],
    "channels": Annotated[int | None, typer.Option(help="1 (gray) or 3 (color).")],
    "split": Annotated[str | None, typer.Option(help="The only part of the data to read.")],
    "image_column": Annotated[str | None, typer.Option(help="Where the images are.")],
    "modality": Annotated[str | None, typer.Option(help="image, audio, motion or video, where unclear.")],
    "column": Annotated[str | None, typer.Option("--item-column", help="Where the audio, motion or video is.")],
    "length": Annotated[int | None, typer.Option(help="Frames of a sample; longer ones are cut, shorter ones padded.")],
    "stride": Annotated[int | None, typer.Option(help="Keep every so many-th frame of motion or video.")],
    "root_joint": Annotated[
        int | None, typer.Option(help="Joint of motion that the others are relative to in every frame, from 0.")
    ],
    "rate": Annotated[int | None, typer.Option(help="Resample audio to so many samples per second.")],
    "form": Annotated[str | None, typer.Option("--audio-form", help="log-mel or waveform.")],
    "mels": Annotated[int | None, typer.Option(help="Bands of a log-mel picture.")],
    "hop": Annotated[int | None, typer.Option(help="Samples of audio from one frame to the next.")],
    "skip_bad": Annotated[int | None, typer.Option(help="Leave out up to so many items that cannot be read.")],
    "vae": Annotated[str | None, typer.Option(help="Encode the images with this folder's diffusers AutoencoderKL.")],
    "latent_scale": Annotated[float | None, typer.Option(help="Factor of the latents, where not the usual one.")],
    "label_column": Annotated[str | None, typer.Option(help="Where the labels are.")],
    "probe_labels": Annotated[str | None, typer.Option(help="Further label columns to probe: speaker,style.")],
}
# What is read of a model; a value beside the type is the default.
EXTRACTION = {
    "noise_levels": (Annotated[str, typer.Option(help="0 is clean, 1 is pure noise.")], "0.1,0.2,0.3,0.5,0.7,0.9"),
    "draws": (Annotated[int, typer.Option(min=1, help="Noise draws per sample and level.")], 1),
    "pool_cells": (
        Annotated[int, typer.Option(min=1, help="Cells per grid axis to average tokens over; 1 averages over all.")],
        1,
    ),
    "token_samples": (
        Annotated[
            int,
            typer.Option(
                min=0, help="Keep all tokens of so many samples a split, for spatial analyses and labels of frames."
            ),
        ],
        0,
    ),
    "batch_size": (Annotated[int, typer.Option(min=1, help="Rows per forward pass.")], 128),
    "precision": (Annotated[str, typer.Option(help="float32 or bfloat16.")], "float32"),
    "true_labels": (Annotated[bool, typer.Option("--true-labels", help="Condition on the labels; leaks them.")], False),
    "trust_convention": (
        Annotated[
            bool, typer.Option("--trust-convention", help="Go on where the weights fit another schedule or prediction.")
        ],
        False,
    ),
}
ALIGNMENT = "LayerSync"
# The options of `SyncOptions`, without the `sync_` before each.
SYNC = {
    "sync_warmup_steps": Annotated[int | None, flag(ALIGNMENT, "Steps in which the weight rises from 0.", min=0)],
    "sync_decay": Annotated[
        str | None, flag(ALIGNMENT, "How it falls to 0 at the stop step: constant, linear or cosine.")
    ],
    "sync_stop_step": Annotated[int | None, flag(ALIGNMENT, "From this step on nothing is aligned.", min=1)],
    "sync_noise_range": Annotated[
        str | None, flag(ALIGNMENT, "Noise levels of the samples that are aligned: 0.2,0.8.")
    ],
    "sync_centered": (
        Annotated[bool, flag(ALIGNMENT, "Subtract the mean token before the cosine.", "--sync-centered")],
        False,
    ),
    "sync_projector_width": Annotated[
        int | None, flag(ALIGNMENT, "Hidden width of an MLP after the student; 0 is none.", min=0)
    ],
    "sync_teacher_decay": Annotated[
        float | None, flag(ALIGNMENT, "A teacher of averaged weights, in a second pass; 0 is none.")
    ],
    "sync_noise_gap": Annotated[
        float | None, flag(ALIGNMENT, "By how much less noise the teacher may see, in a second pass.")
    ],
}
# How many samples a probe uses.
COUNTS = {
    "num_train": Annotated[int | None, typer.Option(help="Samples that fit probes; at most 8000 where not given.")],
    "num_validation": Annotated[
        int | None, typer.Option(help="Samples that choose penalties and layers; at most 2000.")
    ],
    "num_test": Annotated[int | None, typer.Option(help="Samples for the numbers that are shown; at most 5000.")],
}

Data = Annotated[
    str,
    typer.Option(
        help="'digits', a .parquet, .arrow or .tar file, a folder of these, of images, audio, motion, video or "
        "latents, or owner/name on the Hub."
    ),
]

Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
Weight = Annotated[float, typer.Option(help="Of the alignment.")]


def given(**options: Any) -> Given:
    """The options that were given a value."""
    return {name: value for name, value in options.items() if value is not None}


def spread(**groups: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command every option of a group; the function gets them in one dictionary, without what was not given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name in groups:
                for name, kind in groups[parameter.name].items():
                    annotation, default = kind if isinstance(kind, tuple) else (kind, None)
                    parameters.append(parameter.replace(name=name, annotation=annotation, default=default))
            else:
                parameters.append(parameter)

        def call(**values: Any) -> None:
            for name, group in groups.items():
                values[name] = given(**{option: values.pop(option) for option in group})
            command(**values)

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        )
        return call

    return decorate


def numbers(text: str, option: str) -> tuple[float, ...]:
    """ "0.1,0.5" -> (0.1, 0.5)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text} is not a list of numbers; write them as 0.1,0.5,0.9") from None


def integers(text: str, option: str) -> tuple[int, ...]:
    """ "3,32,32" -> (3, 32, 32)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text} is not a list of whole numbers; write them as 3,32,32") from None


def names(text: str) -> list[str]:
    """ "a,b" -> ["a", "b"]."""
    return [part.strip() for part in text.split(",")]


def layer_pairs(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """ "2:5" or "blocks.2:blocks.5" (student, then teacher, counted from 0) -> (("blocks.2", "blocks.5"),)."""
    pairs = []
    for text in texts:
        parts = text.split(":")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"--pair {text} is not student:teacher; write it as 2:5 or blocks.2:blocks.5")
        student, teacher = (f"blocks.{part}" if part.isdigit() else part for part in parts)
        pairs.append((student, teacher))
    return tuple(pairs)


def locate(source: str) -> str:
    """A local path in full, so that a run folder can be opened from anywhere; other sources as they are."""
    return str(Path(source).resolve()) if Path(source).exists() and source != "digits" else source


def located_vae(reading: Given) -> Given:
    """The options of `READING`, with the autoencoder's folder in full."""
    return reading | ({"vae": locate(reading["vae"])} if "vae" in reading else {})


def checkpoint_options(opening: Given) -> Given:
    """The options of `OPENING` as `open_checkpoint` takes them."""
    options = dict(opening)
    if "model" in options:
        place, colon, name = options["model"].rpartition(":")
        options["model"] = f"{locate(place)}{colon}{name}"
    if "lora" in options:
        options["lora"] = locate(options["lora"])
    if "layers" in options:
        options["layers"] = names(options["layers"])
    if "shape" in options:
        options["shape"] = integers(options["shape"], "--shape")
    return options


def sync_options(given: Given, factors: tuple[float, ...] = ()) -> SyncOptions:
    """What was given of `SYNC`, with a factor for each pair."""
    from layerprobe.layersync import SyncOptions

    values = {name.removeprefix("sync_"): value for name, value in given.items()}
    if "noise_range" in values:
        values["noise_range"] = numbers(values["noise_range"], "--sync-noise-range")
    return SyncOptions(pair_weights=factors, **values)
