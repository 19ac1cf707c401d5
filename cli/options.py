"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer


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


Config = Annotated[
    Path | None,
    typer.Option(help="TOML or YAML file with options of this command.", is_eager=True, callback=_read_config),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the input, say what would be done, write nothing.")]
Seed = Annotated[int, typer.Option(help="Of every random number.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Run = Annotated[Path, typer.Argument(help="A run folder made by `layerprobe probe` or `quickstart`.")]

Checkpoint = Annotated[str, typer.Argument(help="A .safetensors or .pt file, or 'digits' for the embedded one.")]
Family = Annotated[str | None, typer.Option(help="sit, layersync or dit, for files that do not say it.")]
NumHeads = Annotated[int | None, typer.Option(help="Attention heads, for widths that are no preset's.")]
Model = Annotated[str | None, typer.Option(help="Your own network: file.py:factory or package.module:Class.")]
Layers = Annotated[str | None, typer.Option(help="Names or patterns, comma-separated: 'blocks.*,mid'.")]
Schedule = Annotated[
    str | None, typer.Option(help="sit, flow, flow-1000, ddpm-linear, ddpm-scaled_linear, ddpm-cosine or edm.")
]
Prediction = Annotated[str | None, typer.Option(help="velocity, eps, x0 or v.")]
Shape = Annotated[str | None, typer.Option(help="Shape of one input of your own network: 3,32,32.")]
NumClasses = Annotated[int | None, typer.Option(help="Classes of your own network; 0 for none.")]

Data = Annotated[
    str,
    typer.Option(help="'digits', a .parquet or .arrow file, a folder of these or of images, or owner/name on the Hub."),
]
Size = Annotated[int | None, typer.Option(help="Resize images to this many pixels square.")]
Channels = Annotated[int | None, typer.Option(help="1 (grey) or 3 (colour).")]
Split = Annotated[str | None, typer.Option(help="The only part of the data to read.")]
ImageColumn = Annotated[str | None, typer.Option(help="Where the images are.")]
LabelColumn = Annotated[str | None, typer.Option(help="Where the labels are.")]
NumFit = Annotated[int | None, typer.Option(help="Samples that fit probes; at most 8000 where not given.")]
NumChoose = Annotated[int | None, typer.Option(help="Samples that choose penalties and layers; at most 2000.")]
NumReport = Annotated[int | None, typer.Option(help="Samples for the numbers that are shown; at most 5000.")]

Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
Weight = Annotated[float, typer.Option(help="Of the alignment.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given a value."""
    return {name: value for name, value in options.items() if value is not None}


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


def names(text: str | None) -> list[str] | None:
    """ "a,b" -> ["a", "b"]."""
    return None if text is None else [part.strip() for part in text.split(",")]


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


def checkpoint_options(
    *,
    family: str | None = None,
    num_heads: int | None = None,
    model: str | None = None,
    layers: str | None = None,
    schedule: str | None = None,
    prediction: str | None = None,
    shape: str | None = None,
    num_classes: int | None = None,
) -> dict[str, Any]:
    """What `open_checkpoint` takes, without what was not given."""
    if model is not None:
        place, colon, name = model.rpartition(":")
        model = f"{locate(place)}{colon}{name}"
    return given(
        family=family,
        num_heads=num_heads,
        model=model,
        layers=names(layers),
        schedule=schedule,
        prediction=prediction,
        shape=None if shape is None else integers(shape, "--shape"),
        num_classes=num_classes,
    )
