"""The pretend device notices what a GPU would: each planted mistake ends one of the jobs."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest
import torch
from tiny import SHAPE, tiny_samples, tiny_sit, tiny_splits

from layerprobe.analyses.measures import cka_matrix, neighbor_graph
from layerprobe.checkpoints import check_convention, weights_hash
from layerprobe.data import Splits, Subset, TensorSamples
from layerprobe.extraction import ExtractionPlan, ablate_layers, extract
from layerprobe.layersync import LayerPair, LayerSync, SyncOptions
from layerprobe.noise import schedule_from_name
from layerprobe.sampling import SamplingPlan, sample
from layerprobe.training import TrainingPlan, train

pytestmark = pytest.mark.devices

Job = Callable[[str, Path], object]


def extraction(device: str, folder: Path) -> None:
    backbone = tiny_sit()
    backbone.module.to(device)
    plan = ExtractionPlan(backbone.layers, (0.5,), token_samples=2, tokens_per_sample=2, condition="label")
    extract(backbone, tiny_splits(), plan, folder)


def null_label(device: str, folder: Path) -> None:
    backbone = tiny_sit()
    backbone.module.to(device)
    extract(backbone, tiny_splits(), ExtractionPlan(backbone.layers, (0.5,)), folder)


def padded_tokens(device: str, folder: Path) -> None:
    backbone, samples = tiny_sit(shape=(2, 12)), motions()
    backbone.module.to(device)
    splits = Splits(*(Subset(samples, rows, name=str(rows)) for rows in (range(2), range(2, 4), range(4, 6))))
    extract(backbone, splits, ExtractionPlan(backbone.layers, (0.5,), token_samples=2, tokens_per_sample=3), folder)


def checksum(device: str, folder: Path) -> None:
    weights_hash(tiny_sit().module.to(device))


def ablation(device: str, folder: Path) -> None:
    backbone = tiny_sit(schedule=schedule_from_name("ddpm-linear"), prediction="eps")
    backbone.module.to(device)
    ablate_layers(backbone, tiny_samples(), (0.5,), split="test")


def convention(device: str, folder: Path) -> None:
    backbone = tiny_sit()
    backbone.module.to(device)
    check_convention(backbone, tiny_samples(8))


def sampling(device: str, folder: Path) -> None:
    backbone = tiny_sit(shape=(2, 12))
    backbone.module.to(device)
    mask = torch.arange(12)[None] < torch.tensor([[6], [12]])
    sample(backbone, range(2), labels=torch.arange(2), mask=mask, plan=SamplingPlan(steps=2))


def motions() -> TensorSamples:
    mask = torch.arange(12)[None] < torch.arange(6, 12)[:, None]
    return TensorSamples(torch.randn(6, 2, 12), torch.arange(6) % 3, mask=mask, modality="motion")


def padded(device: str, folder: Path) -> None:
    backbone = tiny_sit(shape=(2, 12))
    backbone.module.to(device)
    ablate_layers(backbone, motions(), (0.5,), split="test")


def training(device: str, folder: Path) -> None:
    backbone = tiny_sit(shape=(2, 12))
    backbone.module.to(device)
    pairs = (LayerPair("blocks.0", "blocks.2"),)
    train(backbone, motions(), TrainingPlan(steps=1, batch_size=4, pairs=pairs), folder)


def own_loop(device: str, folder: Path) -> None:
    module = tiny_sit().module.to(device)
    with LayerSync(module, [("blocks.0", "blocks.2")], weight=0.3, options=SyncOptions(noise_range=(0.2, 0.8))) as sync:
        module(torch.randn(3, *SHAPE, device=device), torch.rand(3, device=device), torch.arange(3).to(device))
        sync.loss(noise_level=torch.linspace(0.1, 0.9, 3)).backward()


def measures(device: str, folder: Path) -> None:
    x = torch.randn(30, 4).to(device)
    cka_matrix([x, x])
    neighbor_graph(x, k=3)


MUTANTS: tuple[tuple[str, str, str, str, Job], ...] = (
    ("layerprobe.extraction.forward", "_on_device", "column.to(device)", "column", extraction),
    ("layerprobe.extraction.forward", "_on_device", "eps.to(device)", "eps", extraction),
    ("layerprobe.extraction.forward", "_kept_tokens", "kept.float().cpu().numpy()", "kept.float().numpy()", extraction),
    ("layerprobe.extraction.forward", "_select_tokens", "True))].to(tokens.device)", "True))]", padded_tokens),
    ("layerprobe.checkpoints.saving", "weights_hash", ".cpu()", "", checksum),
    ("layerprobe.noise.schedules", "DDPM.native_time", ".to(level.device)", "", ablation),
    ("layerprobe.backbones.base", "Backbone.null_condition", ", device=device", "", null_label),
    ("layerprobe.backbones.sit", "TimestepEmbedder.forward", ", device=t.device", "", extraction),
    ("layerprobe.extraction.ablation", "_skip_each", "level=level).to(device)", "level=level)", ablation),
    ("layerprobe.extraction.ablation", "_scores", ".cpu().numpy()", ".numpy()", ablation),
    ("layerprobe.checkpoints.convention", "_Passes._errors_of_batch", "condition).cpu()", "condition)", convention),
    ("layerprobe.sampling.solvers", "_drawn", "mask.to(backbone.device)", "mask", sampling),
    ("layerprobe.sampling.solvers", "_drawn", "labels.to(backbone.device)", "labels", sampling),
    ("layerprobe.backbones.base", "Backbone._real", "self.mask.to(x_t.device)", "self.mask", padded),
    ("layerprobe.layersync.alignment", "tokens_that_count", "samples.to(tokens.device)", "samples", own_loop),
    ("layerprobe.training.losses", "prediction_loss", "tensor.to(backbone.device)", "tensor.cpu()", training),
    ("layerprobe.analyses.measures.cka", "_roots", ", device=self_hsic.device", "", measures),
    ("layerprobe.analyses.measures.knn", "_Search.__call__", ", device=queries.device", "", measures),
)


@pytest.mark.parametrize(
    "job",
    [
        extraction,
        null_label,
        padded_tokens,
        checksum,
        ablation,
        padded,
        convention,
        sampling,
        training,
        own_loop,
        measures,
    ],
)
def test_each_job_runs_without_a_mistake(device: str, tmp_path: Path, job: Job) -> None:
    job(device, tmp_path)


@pytest.mark.parametrize(("module", "name", "right", "wrong", "job"), MUTANTS)
def test_a_mistake_is_noticed(
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
    right: str,
    wrong: str,
    job: Job,
) -> None:
    plant(monkeypatch, module, name, right, wrong)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r"same device|can't convert \S+ device type"):
        job(device, tmp_path)


def plant(monkeypatch: pytest.MonkeyPatch, module: str, name: str, right: str, wrong: str) -> None:
    """Changes the code of a function in place, so that all who have imported it run the mistake."""
    home = import_module(module)
    found: object = home
    for part in name.split("."):
        found = getattr(found, part)
    function = inspect.unwrap(found)  # type: ignore[arg-type]
    assert isinstance(function, FunctionType)
    source = textwrap.dedent(inspect.getsource(function))
    assert right in source
    lines = source.replace(right, wrong).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("def "))  # without its decorators
    made: dict[str, object] = {}
    code = compile("from __future__ import annotations\n" + "\n".join(lines[first:]), home.__file__ or "", "exec")
    exec(code, dict(vars(home)), made)
    changed = made[function.__name__]
    assert isinstance(changed, FunctionType)
    monkeypatch.setattr(function, "__code__", changed.__code__)
