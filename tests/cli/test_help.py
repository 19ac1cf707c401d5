"""The help pages: panels, defaults, widths, and examples that the command line takes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer

from layerprobe import __version__
from layerprobe.cli.fields import groups_of
from layerprobe.cli.help import ARGUMENTS, examples_of, panel_of
from layerprobe.cli.main import COMMANDS, app
from layerprobe.options import PANELS

COMMAND_LINE = typer.main.get_command(app)
EXAMPLES = [(command, example) for command in COMMANDS for example in examples_of(command)]


def page(name: str, width: int, monkeypatch: pytest.MonkeyPatch, cli: Any) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = cli(*([name] if name else []), "-h")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    return [line.rstrip() for line in out.splitlines()]


@pytest.mark.parametrize("name", ["", *COMMAND_LINE.commands])
def test_a_page_keeps_to_the_width_and_tells_no_variables(name: str, monkeypatch, cli) -> None:
    for width in (80, 120):
        lines = page(name, width, monkeypatch, cli)
        assert max(len(line) for line in lines[: lines.index("Examples")]) <= width
        assert not re.search("LAYERPROBE_|env var", "\n".join(lines))
    assert max(map(len, page(name, 400, monkeypatch, cli))) <= 120  # as wide as one still reads


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_option_stands_in_its_panel_with_its_default(command, monkeypatch, cli) -> None:
    lines = page(command.__name__, 120, monkeypatch, cli)
    text = " ".join(" ".join(lines).split())
    titles = [line for line in lines if line in (ARGUMENTS, *PANELS)]
    assert titles == sorted(titles, key=(ARGUMENTS, *PANELS).index)
    assert titles[-1] == "Running"
    parameters = COMMAND_LINE.commands[command.__name__].params
    assert {panel_of(parameter) for parameter in parameters} <= set(titles)
    for parameter in parameters:
        rows = [line for line in lines if re.match(rf"  {re.escape(parameter.opts[0])}[ ,.]", line, re.IGNORECASE)]
        assert len(rows) == 1, parameter.opts
        if not isinstance(parameter.default, bool | None) and parameter.default != "":
            shown = f"{parameter.default:g}" if isinstance(parameter.default, float) else str(parameter.default)
            assert f"default: {shown}]" in text, parameter.opts


def test_the_page_of_train_in_parts(monkeypatch, cli) -> None:
    lines = page("train", 120, monkeypatch, cli)
    assert lines[0].endswith("train --data TEXT --out PATH --steps INT [OPTIONS]")
    text = " ".join(" ".join(lines).split())
    assert "--weight-decay FLOAT Weight decay of AdamW. [at least 0; default: 0]" in text
    assert "--label-drop FLOAT Share of labels replaced by the null label, so that guidance works. [0 to 1;" in text
    assert "--steps INT Number of optimizer steps. [required; at least 1]" in text
    assert "--pair TEXT... Pair to align" in text
    assert "[default: as the checkpoint was trained, else 128]" not in text


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_command_has_two_examples_of_itself(command, monkeypatch, cli) -> None:
    lines = page(command.__name__, 80, monkeypatch, cli)
    below = lines[lines.index("Examples") + 1 :]
    shown = [line.strip() for line in below if line.strip() and not line.startswith("  #")]
    assert shown == examples_of(command)  # whole, however narrow the terminal
    assert len([one for one in shown if one.split()[1] == command.__name__]) >= 2


@pytest.mark.parametrize(("command", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_an_example_is_taken_by_the_command_line(command: Any, example: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in shlex.split(example)[2:]:  # what the example takes as given
        if re.fullmatch(r"[\w./-]+", word) and not word.startswith("-") and word != "digits":
            place = tmp_path / word
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch() if place.suffix else place.mkdir()
    program, name, *words = shlex.split(example)
    assert program == "layerprobe"
    named = {one.__name__: one for one in COMMANDS}[name]
    context = COMMAND_LINE.commands[name].make_context(name, words)
    values = dict(context.params)
    for group in groups_of(named):
        group.value(values)


@pytest.mark.parametrize(
    "example",
    [one for _, one in EXAMPLES if " digits" in one or one.endswith(("quickstart", "doctor"))],
)
def test_an_example_that_needs_no_file_runs(example: str, tmp_path, monkeypatch, cli) -> None:
    monkeypatch.chdir(tmp_path)
    _, name, *words = shlex.split(example)
    dry = ["--dry-run"] * any(one.name == "dry_run" for one in COMMAND_LINE.commands[name].params)
    code, out, err = cli(name, *words, *dry)
    assert (code, bool(out)) == (0, True), err


MISTAKES = {
    "probe digits --data digits --out x --precision flaot32": "unknown --precision 'flaot32'; "
    "use auto, float32, tf32 or bfloat16; did you mean float32?",
    "probe digits --data digits --out x --schedule sitt": "unknown --schedule 'sitt'; .* did you mean sit?",
    "probe digits --data digits --out x --prediction velocty": "unknown --prediction .* did you mean velocity?",
    "inspect digits --data digits --modality vido": "unknown --modality .* did you mean video?",
    "probe digits --data digits --out x --device gpu": "unknown --device 'gpu'; use auto, cpu or cuda, or cuda:1",
    "inspect model_fnal.safetensors": "there is no checkpoint file model_fnal.safetensors; .* did you mean model_final",
    "probe digts --data digits --out x": "there is no checkpoint file digts; .* did you mean digits?",
    "probe digits --data imges/ --out x": "there is no file or folder imges/; .* did you mean images?",
    "select runs/mne": "there is no run runs/mne; pass a folder that .*; did you mean runs/mine?",
    "compare runs/mine runs/mime": "there is no run runs/mime; .* did you mean runs/mine?",
    "train --data digits --steps 2 --out y --path lnear": "unknown --path 'lnear'; .* did you mean linear?",
    "train --data digits --steps 2 --out y --from model_fin.safetensors": "there is no checkpoint file model_fin.safe",
    "train --data digits --steps 2 --out y --selection runs/minr": "there is no run .* did you mean runs/mine?",
    "check confg.toml": "there is no configuration confg.toml; .* did you mean config.toml?",
    "score sample.npz --data digits": "there is no file or folder of samples sample.npz; .* did you mean samples.npz?",
    "convert lst.ckpt --out y": "there is no checkpoint file lst.ckpt; .* did you mean last.ckpt?",
}


def test_a_mistyped_word_or_path_is_told_before_torch_is_imported(tmp_path) -> None:
    for name in ("images", "runs/mine"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("model_final.safetensors", "config.toml", "samples.npz", "last.ckpt"):
        (tmp_path / name).touch()
    code = f"""
import sys
from layerprobe.cli.main import run
for line in {list(MISTAKES)}:
    sys.argv = ["layerprobe", *line.split()]
    assert run() == 2, line
assert not {{"torch", "pandas", "sklearn", "matplotlib", "datasets"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for told, (command, line) in zip(lines, MISTAKES.items(), strict=True):
        assert re.match("layerprobe: " + line.replace("?", r"\?"), told), (command, told)


def test_a_mistyped_command_or_option_is_told_in_plain_lines(cli) -> None:
    code, _, err = cli("prob")
    assert (code, "Error: No such command 'prob'. Did you mean 'probe'?" in err) == (2, True)
    code, _, err = cli("probe", "digits", "--nois-levels", "3")
    assert (code, "--noise-levels" in err, "─" in err) == (2, True, False)
    assert "layerprobe probe CHECKPOINT --data TEXT --out PATH [OPTIONS]" in " ".join(err.split())


def test_the_shell_completes_commands_and_options() -> None:
    code = """
import os, sys
from layerprobe.cli.main import run
for words in ("layerprobe quick", "layerprobe probe --noi"):
    sys.argv = ["layerprobe"]
    os.environ |= {"_LAYERPROBE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["quickstart", "--noise-levels"], done.stderr


def test_the_module_runs_as_the_command_does(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-m", "layerprobe", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"layerprobe {__version__}\n")
