"""The examples of the docs run as they stand, and do what the page beside them says."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerprobe as lp
from layerprobe.data import load

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture(autouse=True)
def _as_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python puts a script's folder first; what examples write goes to a folder of the test."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    if "plain_loop" in sys.modules:
        monkeypatch.delitem(sys.modules, "plain_loop")


# Lightning's own: of the newest torch, and advice about workers and sets to validate on.
lightning_warns = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning", "ignore:.*many workers", "ignore:.*val_dataloader"
)


def run(name: str) -> dict[str, Any]:
    """What a script leaves in its names."""
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def num_hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def differ(one: nn.Module, other: nn.Module) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run("plain_loop.py")
    assert "effective rank blocks.1" in capsys.readouterr().out
    assert sum(ran["losses"][-5:]) / 5 < 0.6 * ran["losses"][0]
    assert num_hooks(ran["model"]) == 0
    without, _, cosines = ran["train"](weight=0.0)
    assert sum(ran["cosines"][-5:]) > sum(cosines[-5:]) + 5 * 0.005
    assert differ(ran["model"], without)
    assert ran["cosines"][0] == cosines[0]  # of the same start


def test_wan_lora_trains_and_saves_nothing_but_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    from safetensors.torch import load_file

    ran = run("wan_lora.py")
    tuned = ran["transformer"]
    assert "adapter with" in capsys.readouterr().out
    assert num_hooks(tuned) == 0
    assert min(ran["losses"][-5:]) < ran["losses"][0]

    torch.manual_seed(0)
    base = ran["narrow_wan"]()
    fresh, trained = weights(base), weights(tuned)
    frozen = {name.replace(".base_layer", ""): x for name, x in trained.items() if "lora" not in name}
    assert frozen.keys() == fresh.keys()
    assert all(torch.equal(x, fresh[name]) for name, x in frozen.items())
    assert not any(parameter.requires_grad for name, parameter in tuned.named_parameters() if "lora" not in name)
    moved = [name for name, x in trained.items() if "lora_B" in name and x.any()]
    assert len(moved) == 18 * 8  # queries, keys, values, outputs of self- and cross-attention in every block

    file = tmp_path / "wan-lora" / "pytorch_lora_weights.safetensors"
    assert all("lora" in name for name in load_file(file))
    base.load_lora_adapter(load_file(file), prefix=None)
    torch.manual_seed(1)
    inputs = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": torch.randn(1, 8, 12), "return_dict": False}
    x_t = torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(base.eval()(x_t, **inputs)[0], tuned.eval()(x_t, **inputs)[0])

    short = [ran["fine_tune"]("short", weight=weight, steps=2)[0] for weight in (0.0, 0.002)]
    assert differ(*short)


def test_wan_lora_gradients_reach_the_student_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """The regularizer by itself: blocks up to the student are pulled, those after it, so the teacher, are not."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from layerprobe.layersync import LayerSync

    example = runpy.run_path(str(EXAMPLES / "wan_lora.py"))
    torch.manual_seed(0)
    transformer = example["narrow_wan"]().requires_grad_(False)
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    transformer.enable_gradient_checkpointing()
    transformer.train()
    with LayerSync(transformer, example["PAIRS"], weight=0.002) as sync:
        example["flow_matching_loss"](transformer, torch.randn(1, 4, 1, 4, 4), torch.randn(1, 4, 12))
        sync.loss().backward()
    reached = {name for name, p in transformer.named_parameters() if p.grad is not None and p.grad.any()}
    assert {int(name.split(".")[1]) for name in reached} == set(range(9))
    assert all("lora" in name for name in reached)


def test_flux_lora_aligns_the_image_and_trains_the_adapter_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("diffusers", "peft", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    ran = run("flux_lora.py")
    tuned, log = ran["transformer"], ran["log"]
    assert num_hooks(tuned) == 0
    assert "transformer_blocks.0 <- single_transformer_blocks.2: 16 tokens of width 32" in capsys.readouterr().err
    assert all(row["layersync_loss"] == pytest.approx(-0.3 * row["layersync_similarity"]) for row in log)
    torch.manual_seed(0)
    fresh = weights(ran["narrow_flux"]())
    frozen = {name.replace(".base_layer", ""): x for name, x in weights(tuned).items() if "lora" not in name}
    assert all(torch.equal(x, fresh[name]) for name, x in frozen.items())
    assert differ(tuned, ran["fine_tune"](weight=0.0)[0])


def test_accelerate_accumulates_logs_and_ends_at_a_cosine(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    ran = run("accelerate_loop.py")
    model, log = ran["model"], ran["log"]
    assert num_hooks(model) == 0
    assert sum(row["loss"] for row in log[-5:]) / 5 < 0.6 * log[0]["loss"]
    without, other = ran["train"](weight=0.0)
    assert log[-1]["layersync_similarity"] > other[-1]["layersync_similarity"] + 0.005
    assert differ(model, without)
    capsys.readouterr()
    _, ended = ran["train"](weight=0.3, steps=8, stop_cosine=0.5)
    assert "blocks.1 <- blocks.4: the cosine has reached" in capsys.readouterr().err
    assert all(row["layersync_loss"] == 0 for row in ended[1:])


@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.py")) if "digits" not in path.name])
def test_a_trainer_takes_ten_lines_of_layerprobe_at_most(name: str) -> None:
    code = (EXAMPLES / name).read_text(encoding="utf-8").split('"""', 2)[2]
    assert 1 < len(re.findall(r"^.*(?:sync\b|LayerSync|layerprobe|\blp\.|\bprobe\().*$", code, re.MULTILINE)) <= 10


@lightning_warns
def test_lightning() -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    ran = run("lightning_loop.py")
    module, trainer = ran["model"], ran["trainer"]
    assert trainer.global_step == 30
    assert trainer.callback_metrics["loss"] < 2.5
    assert trainer.callback_metrics["effective rank blocks.1"] > 1
    assert num_hooks(module) == 0
    without, _ = ran["train"](weight=0.0)
    assert _cosine(module) > _cosine(without) + 0.005
    assert differ(module, without)


@lightning_warns
def test_lightning_removes_the_hooks_after_an_exception() -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    example = runpy.run_path(str(EXAMPLES / "lightning_loop.py"))
    seen: list[nn.Module] = []

    def fails(self: Any, x: Tensor) -> Tensor:
        assert num_hooks(self) > 0
        seen.append(self)
        raise RuntimeError("on purpose")

    example["Model"].training_step = fails
    with pytest.raises(RuntimeError, match="on purpose"):
        example["train"](weight=0.3, steps=1)
    assert num_hooks(seen[0]) == 0


def test_probe_every(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run("probe_every.py")
    assert sorted(set(ran["probe"].table["step"])) == [0, 20, 40]
    assert "is the richest layer: probe accuracy" in capsys.readouterr().err
    assert Path("runs/curves/layer_curves.png").is_file()
    assert ran["model"].training


def _probed(network: nn.Module) -> Any:
    options = {"layers": "blocks.*", "schedule": "flow", "prediction": "velocity", "shape": (1, 8, 8)}
    return lp.ProbeEvery(network, load("digits"), every=2, max_share=1, num_samples=48, say=lambda _: None, **options)


@lightning_warns
def test_probe_every_in_lightning() -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    example = runpy.run_path(str(EXAMPLES / "lightning_loop.py"))
    module = example["Model"](weight=0.3)
    probe = _probed(module.network)
    switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    callbacks = [example["HoldHooks"](), probe.for_lightning()]
    quiet = dict.fromkeys(switches, False)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_steps=3, callbacks=callbacks, **quiet)
    trainer.fit(module, example["DataLoader"](example["digits"](), batch_size=8))
    assert sorted(set(probe.table["step"])) == [0, 2, 3]
    assert num_hooks(module) == 0


def test_probe_every_in_the_trainer_of_transformers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    example = runpy.run_path(str(EXAMPLES / "huggingface_trainer.py"))
    model = example["Model"]()
    probe = _probed(model.network)
    arguments = example["TrainingArguments"](
        "runs/probed", max_steps=3, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"x": x} for x in example["digits"]()]
    example["Trainer"](model, arguments, train_dataset=data, callbacks=[probe.for_transformers()]).train()
    assert sorted(set(probe.table["step"])) == [0, 2, 3]


def test_huggingface_trainer() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    ran = run("huggingface_trainer.py")
    trainer = ran["trainer"]
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert all("cosine network.blocks.1 <- network.blocks.4" in row for row in rows)
    assert num_hooks(trainer.model) == 0
    without = ran["train"]("runs/huggingface", weight=0.0)
    assert _cosine(trainer.model) > _cosine(without.model) + 0.005
    assert differ(trainer.model, without.model)


def _cosine(model: Any) -> float:
    """Of the pair, at noise level a half."""
    from plain_loop import PAIRS, digits

    from layerprobe.capture import capture

    x, (student, teacher) = digits()[:64], PAIRS[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), capture(model.network, [student, teacher]) as found:
        model.network((x + noise) / 2, torch.full((64,), 0.5))
    return float(torch.cosine_similarity(found[student], found[teacher], dim=-1).mean())


def own_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any, steps: int | None = None) -> list[str]:
    """Runs every command of the page's examples in a copy of their folder; returns what `inspect` printed."""
    shutil.copytree(EXAMPLES / "own_network", tmp_path, dirs_exist_ok=True)
    if steps is not None:
        parts = tmp_path / "parts.py"
        parts.write_text(re.sub(r"steps: int = \d+", f"steps: int = {steps}", parts.read_text()))
    monkeypatch.syspath_prepend(tmp_path)
    page = (EXAMPLES.parent / "own-model.md").read_text(encoding="utf-8")
    examples = page.partition("## Four examples")[2].partition("## What the messages")[0].replace("\\\n", " ")
    commands = [shlex.split(line[2:]) for line in examples.splitlines() if line.startswith("$ ")]
    assert [command[0] for command in commands] == ["python", "layerprobe"] * 3
    printed = []
    for program, *arguments in commands:
        if program == "python":
            runpy.run_path(arguments[0], run_name="__main__")
            del sys.modules["parts"]
        else:
            code, out, err = cli(*arguments)
            assert (code, err) == (0, "")
            assert "parts" not in sys.modules
            printed.append(out)
    return printed


def test_own_networks_are_called_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    ddpm, flow, other = own_networks(tmp_path, monkeypatch, cli, steps=4)
    assert all("trunk.blocks.0 ... trunk.blocks.3 1 x 128 each, 4 layers" in out for out in (ddpm, flow, other))
    assert "assumed        its forward gets x = noisy samples, t = time, y = label;" in ddpm
    assert "assumed        the null label is 10, the last of the 11 rows of labels;" in ddpm
    assert "assumed        its forward gets x = noisy samples, t = time;" in flow
    assert "its forward" not in other


@pytest.mark.tutorial
def test_own_networks_fit_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    for out in own_networks(tmp_path, monkeypatch, cli):
        assert "the weights fit --schedule" in out


def test_the_library_page_lists_every_module_that_a_room_exports_once() -> None:
    root = EXAMPLES.parents[1]
    pages = sorted((root / "docs" / "api").glob("*.md"))
    listed = re.findall(r"automodule:: (\S+)", "".join(page.read_text(encoding="utf-8") for page in pages))
    exported = {
        f"{building}.{stub.parent.name}.{module}"
        for building, folder in (("layerprobe", "layerprobe"), ("layerprobe.analyses", "analyses"))
        for stub in (root / folder).glob("*/__init__.pyi")
        for module in re.findall(r"^from \.(\S+) import", stub.read_text(encoding="utf-8"), re.MULTILINE)
    }
    files = {f"layerprobe.{path.stem}" for path in root.glob("layerprobe/*.py") if path.stem != "__init__"}
    assert sorted(listed) == sorted(exported | files)
