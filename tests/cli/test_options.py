"""Every option stands once: what a command shows is what the dataclass says."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import typer

from layerprobe.analyses.runs.network import NewNetwork
from layerprobe.analyses.selection.limits import PairLimits
from layerprobe.checkpoints.source import CheckpointSource
from layerprobe.cli.fields import Given, Unset, changed, from_dataclasses, groups_of, only, without
from layerprobe.cli.main import COMMANDS, app
from layerprobe.data.loading import load
from layerprobe.data.sources import DataSource
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.layersync.options import SyncOptions
from layerprobe.options import attribute_entries, check_ranges, flags, option, option_fields, to_record
from layerprobe.records import parse
from layerprobe.sampling.plan import SamplingPlan
from layerprobe.training.plan import TrainingPlan

CLASSES = (
    CheckpointSource,
    DataSource,
    ExtractionPlan,
    NewNetwork,
    PairLimits,
    SamplingPlan,
    SyncOptions,
    TrainingPlan,
)
DOCS = Path(__file__).parents[2] / "docs"
COMMAND_LINE = typer.main.get_command(app)


@dataclass(frozen=True)
class Box:
    """A box for these tests.

    Attributes:
        width: Width in cm,
            without the lid.
        edge_range: Shortest and longest edge.
        color: red or blue.
        label: Text on the lid.
        open: Whether the lid is open.
        parts: Names of the parts.
        finish: Kind of paint.
        material: Material, which is no option.

    Raises:
        ValueError: If the width is negative.
    """

    width: int = field(metadata=option(minimum=-5))
    edge_range: tuple[float, float] = field(default=(0.0, 1.5), metadata=option(panel="Edges"))
    color: Literal["red", "blue"] = field(default="red", metadata=option("blue", value="blue", help="Paint it blue."))
    label: str | None = field(default=None, metadata=option(flag="--lid-label"))
    open: bool = field(default=False, metadata=option())
    parts: tuple[str, ...] | None = field(default=None, metadata=option())
    finish: Literal["matt", "gloss", "satin"] = field(default="matt", metadata=option())
    material: str = "wood"

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ValueError(f"a width of {self.width} is not in edge_range")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command of one parameter `box` and returns what it got."""

    def call(annotation: Any, *arguments: str) -> Any:
        received = []

        def command(box: Any) -> None:
            received.append(box)

        command.__annotations__ = {"box": annotation}
        small = typer.Typer()
        small.command()(from_dataclasses()(command))
        typer.main.get_command(small).main(list(arguments), standalone_mode=False, auto_envvar_prefix="BOX")
        return received[0]

    return call


def test_a_command_gets_the_object(run) -> None:
    assert run(Box, "--width", "3") == Box(3)
    arguments = ("--edge-range", "0.5,1", "--blue", "--lid-label", "tea", "--open", "--parts", "lid, floor")
    assert run(Box, "--width", "3", *arguments) == Box(3, (0.5, 1.0), "blue", "tea", True, ("lid", "floor"))


def test_options_from_the_environment(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOX_WIDTH", "4")
    monkeypatch.setenv("BOX_LABEL", "tea")
    assert run(Box) == Box(4, label="tea")
    assert run(Box, "--width", "3") == Box(3, label="tea")


def test_errors_name_the_flag(run) -> None:
    with pytest.raises(ValueError, match=r"^a width of -1 is not in --edge-range$"):
        run(Box, "--width", "-1")
    with pytest.raises(ValueError, match=r"^--edge-range 1 is not 2 numbers; write them as 0.2,0.7$"):
        run(Box, "--width", "1", "--edge-range", "1")
    with pytest.raises(ValueError, match=r"^--edge-range x is not a list of numbers; write them as 0.1,0.5,0.9$"):
        run(Box, "--width", "1", "--edge-range", "x")
    with pytest.raises(ValueError, match=r"^unknown --finish 'dull'; use matt, gloss or satin$"):
        run(Annotated[Given, only(Box, "finish")], "--finish", "dull")  # although no object is built that would refuse


def test_a_choice_may_be_written_in_capitals(run) -> None:
    assert run(Box, "--width", "3", "--finish", "Gloss").finish == "gloss"


def test_an_object_that_need_not_be_given(run) -> None:
    assert run(Box | None) is None
    assert run(Box | None, "--width", "3") == Box(3)
    with pytest.raises(ValueError, match=r"^--lid-label has no effect without --width; pass --width too, or leave out"):
        run(Box | None, "--lid-label", "tea")


def test_some_options_of_an_object(run) -> None:
    with pytest.raises(Exception, match="No such option: --open"):
        run(Annotated[Box, without("open", "label")], "--width", "3", "--open")
    some = Annotated[Given, only(Box, "width", "label", "edge_range", width=7, edge_range=Unset("as it was built"))]
    assert run(some) == {"width": 7}
    assert run(some, "--lid-label", "tea", "--edge-range", "1,2") == {
        "width": 7,
        "label": "tea",
        "edge_range": (1.0, 2.0),
    }


def test_a_field_without_a_description_is_refused() -> None:
    @dataclass
    class Undescribed:
        """A class."""

        width: int = field(default=1, metadata=option())

    with pytest.raises(TypeError, match="the docstring of Undescribed does not describe width; add it to Attributes"):
        option_fields(Undescribed)


def test_descriptions_come_from_the_docstring() -> None:
    assert attribute_entries(Box)["width"] == "Width in cm, without the lid."
    assert list(attribute_entries(Box)) == [one.name for one in dataclasses.fields(Box)]
    assert flags(Box, ["label", "edge_range", "unknown_name"]) == ["--lid-label", "--edge-range", "--unknown-name"]


def test_errors_of_the_loaders_name_the_flags_of_the_source() -> None:
    names = [one.field for one in option_fields(DataSource) if one.field != "source"]
    with pytest.raises(ValueError, match="the embedded digits are") as refused:
        load("digits", **{name: 1 for name in names if not name.startswith("num_") and name != "latent_scale"})
    unknown = [flag for flag in str(refused.value).split() if flag.startswith("--")]
    assert set(unknown) == {one.flag for one in option_fields(DataSource)} - {
        *("--data", "--num-train", "--num-validation", "--num-test", "--latent-scale")
    }


def test_changed_options_have_the_names_of_the_command_line() -> None:
    assert changed(SyncOptions()) == {}
    assert changed(SyncOptions(stop_step=5, noise_range=(0.2, 0.8))) == {
        "sync_stop_step": 5,
        "sync_noise_range": (0.2, 0.8),
    }


@pytest.mark.parametrize(
    "source",
    [
        DataSource("digits", size=8, probe_labels="a,b", num_test=3),
        CheckpointSource("m.pt", layers=("blocks.1", "blocks.2"), shape=(3, 8, 8), num_classes=0),
        ExtractionPlan(noise_levels=(0.1, 0.2), condition="label"),
    ],
)
def test_records_of_sources_and_plans(source: Any) -> None:
    record = json.loads(json.dumps(to_record(source)))
    assert parse(type(source), record) == source
    assert None not in record.values()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_options_are_those_of_the_dataclasses(command: Any) -> None:
    shown = {parameter.name: parameter for parameter in COMMAND_LINE.commands[command.__name__].params}
    declared = inspect.signature(command).parameters
    for group in groups_of(command):
        for one in group.options:
            parameter = shown.pop(one.name)  # Two groups with an option of one name fail here.
            kind, information = get_args(declared[one.name].annotation)
            assert one.help == attribute_entries(group.cls)[one.field] or one.value is not None
            assert information.help == one.help
            assert parameter.opts == [one.name if one.is_argument else one.flag]
            if not one.is_argument:
                assert (information.min, information.max) == (one.minimum, one.maximum)
            if one.field in group.defaults:
                assert not parameter.required
                continue
            assert parameter.required == (one.required and not group.optional)
            expected = bool if one.is_switch else str if get_origin(one.type) is tuple else one.type
            optional = parameter.default is None and not parameter.required
            assert kind == (expected | None if optional else expected)
            if not one.required:
                assert parameter.default == (False if one.is_switch else _as_typed(one.default))


def _as_typed(default: Any) -> Any:
    if isinstance(default, tuple):
        return ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in default) or None
    return default


def test_options_of_dataclasses_are_declared_nowhere_else() -> None:
    """An option with the name of a field is the field's, but for these."""
    fields = {one.name for cls in CLASSES for one in option_fields(cls)}
    own = {}
    for command in COMMANDS:
        names = {parameter.name for parameter in COMMAND_LINE.commands[command.__name__].params}
        taken = {one.name for group in groups_of(command) for one in group.options}
        own[command.__name__] = (names - taken) & fields
    assert {name: sorted(options) for name, options in own.items() if options} == {
        "probe": ["batch_size"],  # of the extraction, not of a training
        "extract": ["batch_size"],
        "sample": ["batch_size", "vae"],  # of the archive; the decoder
        "analyze": ["layers"],  # of a file of features
        "score": ["num_test"],
        "plot": ["width"],  # of the figures
    }


def test_the_help_of_every_command_needs_no_torch() -> None:
    names = [command.__name__ for command in COMMANDS]
    code = f"""
import sys
from layerprobe.cli.main import run
for name in {names}:
    sys.argv = ["layerprobe", name, "--help"]
    assert run() == 0
assert not {{"torch", "pandas", "sklearn", "matplotlib", "datasets", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: layerprobe") == len(names)


def test_the_page_of_options_has_every_option_of_every_command() -> None:
    specification = importlib.util.spec_from_file_location("option_tables", DOCS / "option_tables.py")
    tables = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tables)
    page = tables.with_tables((DOCS / "options.md").read_text(encoding="utf-8"))
    assert "<!--" not in page
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    described = {row[0].removesuffix("{.flag}").strip("| `"): row[2] for row in rows}
    for name, command in COMMAND_LINE.commands.items():
        for parameter in command.params:
            flag = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper()
            assert flag in described or flag in ("--help", "RUN"), (name, flag)
    assert described["--checkpoint-every"] == "Number of steps between checkpoints. |"
    assert ["| `--sync-noise-range`{.flag}", "0,1"] in [row[:2] for row in rows]


def test_ranges_of_options_hold_in_python_too() -> None:
    from layerprobe.extraction import ExtractionPlan
    from layerprobe.training import TrainingPlan

    check_ranges(ExtractionPlan(draws=10_000))
    with pytest.raises(ValueError, match="draws must be at most 10000, got 1000000000"):
        ExtractionPlan(draws=10**9)
    with pytest.raises(ValueError, match="size must be at most 16384, got 10000000"):
        DataSource("digits", size=10**7)
    for decay in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="weight_decay must be at least 0, got"):
            TrainingPlan(steps=1, weight_decay=decay)
