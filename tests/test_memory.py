"""Memory that runs out halves a batch and says so; it never becomes a result, and no other failure is taken for it."""

from __future__ import annotations

import ast
import copy
import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pictures import encode, write_parquet
from PIL import Image
from places import REPOSITORY
from tiny import tiny_samples, tiny_sit, tiny_splits
from torch import Tensor, nn

from layerprobe.analyses.figures.style import changed_style
from layerprobe.analyses.generation.encoders import open_encoder
from layerprobe.analyses.generation.extractors import Extractor, all_features
from layerprobe.analyses.selection.trainer_configs import read_settings
from layerprobe.backbones.base import Backbone
from layerprobe.backbones.diffusers.lora import merge_lora
from layerprobe.backbones.diffusers.null_text import read_null_text
from layerprobe.backbones.trial import tried
from layerprobe.checkpoints.convention import check_convention
from layerprobe.checkpoints.conversion import convert_checkpoint
from layerprobe.checkpoints.opening import resolve_device
from layerprobe.checkpoints.user_code import run_user_code
from layerprobe.checkpoints.weight_sets import read_weights
from layerprobe.data.arrays import load_array
from layerprobe.data.contents import check_npy
from layerprobe.data.images import load_images
from layerprobe.data.latents import vae as autoencoders
from layerprobe.data.latents.samples import load_npy, open_shard
from layerprobe.data.samples import TensorSamples
from layerprobe.extraction.ablation import ablate_layers
from layerprobe.extraction.feature_files import stored_arrays
from layerprobe.extraction.features import is_whole
from layerprobe.extraction.forward import extract
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.files import atomic_write
from layerprobe.memory import BatchSize, failure_in, failure_line, is_out_of_memory, pass_on
from layerprobe.sampling.plan import SamplingPlan
from layerprobe.sampling.solvers import sample
from layerprobe.training.losses import held_out_loss
from layerprobe.training.state import read_checkpoint

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"
TOLD = "rows at a time do not fit into memory; continuing with"
LEVELS = (0.2, 0.7)


def refuse(num_rows: int, most: int) -> None:
    if num_rows > most:
        raise torch.OutOfMemoryError(FULL)


def small_card(backbone: Backbone, most: int, error: Exception | None = None) -> Backbone:
    """The network on a card whose memory has room for so many rows."""

    def forward(module: nn.Module, x_t: Tensor, *arguments: Tensor | None) -> Tensor:
        if error is not None:
            raise error
        refuse(len(x_t), most)
        return backbone.forward(module, x_t, *arguments)

    return replace(backbone, forward=forward)


class Autoencoder:
    """Encodes and decodes at most so many images at once."""

    def __init__(self, most: int) -> None:
        self.most = most

    def encode(self, x: Tensor) -> Any:
        refuse(len(x), self.most)
        distribution = type("Distribution", (), {"mean": x * 2, "std": x * 0 + 1})
        return type("Output", (), {"latent_dist": distribution})

    def decode(self, z: Tensor) -> Any:
        refuse(len(z), self.most)
        return type("Output", (), {"sample": z / 2})


def features(backbone: Backbone, folder: Path) -> Any:
    store = extract(backbone, tiny_splits(), ExtractionPlan(backbone.layers, LEVELS, token_samples=2), folder)
    return [part(layer, 0.7) for layer in backbone.layers for part in (store.features, store.tokens)]


def ablation(backbone: Backbone, folder: Path) -> Any:
    skipped = ablate_layers(backbone, tiny_samples(), LEVELS, split="test")
    return [skipped.velocity_change, skipped.loss_increase]


def convention(backbone: Backbone, folder: Path) -> Any:
    check = check_convention(backbone, tiny_samples(8))
    return [fit.ratios for fit in check.fits] + [[*check.condition.values()]]


def losses(backbone: Backbone, folder: Path) -> Any:
    return [[*held_out_loss(backbone, tiny_samples()).values()]]


def samples(backbone: Backbone, folder: Path) -> Any:
    return [sample(backbone, range(6), plan=SamplingPlan(steps=2), labels=torch.arange(6) % 3)]


@pytest.mark.parametrize("job", [features, ablation, convention, losses, samples], ids=lambda job: job.__name__)
def test_a_job_on_a_small_card_gives_the_same_in_smaller_batches(
    tmp_path: Path, job: Callable[[Backbone, Path], Any]
) -> None:
    wanted = job(tiny_sit(), tmp_path / "large")
    with pytest.warns(UserWarning, match=TOLD):
        got = job(small_card(tiny_sit(), 3), tmp_path / "small")
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


NO_MEMORY, NO_DEVICE = torch.OutOfMemoryError(FULL), RuntimeError("CUDA error: device-side assert triggered")


@pytest.mark.filterwarnings("ignore:.*do not fit into memory")
@pytest.mark.parametrize(
    ("job", "error"),
    [
        (features, NO_MEMORY),
        (convention, NO_MEMORY),
        (losses, NO_MEMORY),
        (ablation, NO_DEVICE),
        (convention, NO_DEVICE),
    ],
    ids=("features", "convention", "losses", "ablation on a broken card", "convention on a broken card"),
)
def test_what_no_batch_mends_goes_on_to_the_user(
    tmp_path: Path, job: Callable[[Backbone, Path], Any], error: Exception
) -> None:
    with pytest.raises(type(error), match=r"^CUDA (out of memory|error)"):
        job(small_card(tiny_sit(), 0, error), tmp_path)


def shown(folder: Path) -> Path:
    """A file of each kind, whose readers are broken."""
    path = folder / "a.npy"
    np.save(path, np.zeros((2, 1, 4, 4), np.float32))
    return path


def written(folder: Path) -> None:
    with atomic_write(folder / "a.txt"):
        shutil.copyfileobj(None, None)  # type: ignore[arg-type]


def style_sheet(folder: Path) -> None:
    (folder / "a.mplstyle").write_text("font.size: 8")
    with changed_style(sheet=folder / "a.mplstyle"):
        pass


def shard_of_latents(folder: Path) -> None:
    with open_shard(folder / "a.safetensors"):
        pass


def adapter(folder: Path) -> object:
    (folder / "a.safetensors").write_bytes(b"")
    return merge_lora(nn.Linear(1, 1), folder / "a.safetensors", component="unet")


def empty_prompt(folder: Path) -> object:
    pipeline: Any = SimpleNamespace(pipeline=folder, index={})
    family: Any = SimpleNamespace(text=lambda _: (1, 1, 0), zeros_as_text=False)
    module: Any = SimpleNamespace(config={})
    return read_null_text(pipeline, family, module)


def conversion(folder: Path) -> object:
    torch.save(tiny_sit().module.state_dict(), folder / "a.pt")
    return convert_checkpoint(folder / "a.pt", folder / "b.safetensors")


def torchscript(folder: Path) -> object:
    (folder / "a.pt").write_bytes(b"")
    return open_encoder(folder / "a.pt")


def pictures(folder: Path) -> object:
    return load_images(write_parquet(folder / "a.parquet", [encode(Image.new("L", (4, 4)))]), skip_bad=1)


# What reads files or calls code of others, and what fails in it.
PLACES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "the weights of a checkpoint": (
        "layerprobe.checkpoints.weight_sets.file_content",
        lambda folder: read_weights(folder / "a.pt"),
    ),
    "the checkpoint of a training": ("torch.load", lambda folder: read_checkpoint(folder / "a.pt")),
    "a conversion": ("layerprobe.checkpoints.conversion.save_file", conversion),
    "code of the user": ("copy.copy", lambda _: run_user_code(lambda: copy.copy(1), "a.py:f", "it fails", "mend it")),
    "a network in its trial": ("layerprobe.backbones.sit.SiT.forward", lambda _: tried(tiny_sit())),
    "the empty prompt": ("layerprobe.backbones.diffusers.null_text._encode_empty", empty_prompt),
    "an adapter": ("layerprobe.backbones.diffusers.lora._merged", adapter),
    "an encoder in TorchScript": ("zipfile.ZipFile", torchscript),
    "an image": ("layerprobe.data.images.decode_image", pictures),
    "a table": ("layerprobe.data.tables._rows", pictures),
    "an array": ("layerprobe.data.arrays.load_npy_file", lambda folder: load_array(shown(folder))),
    "the header of an array": ("numpy.lib.format.read_magic", lambda folder: check_npy(shown(folder).open("rb"), 9)),
    "latents": ("layerprobe.data.latents.samples.load_npy_file", lambda folder: load_npy(shown(folder))),
    "a shard of latents": ("layerprobe.data.latents.samples.safe_open", shard_of_latents),
    "features in a file": (
        "layerprobe.extraction.feature_files._in_npz",
        lambda folder: stored_arrays(shown(folder).rename(folder / "a.npz")),
    ),
    "features of a run": ("layerprobe.extraction.features.safe_open", lambda folder: is_whole(shown(folder))),
    "a file on a full disk": ("shutil.copyfileobj", written),
    "a style sheet": ("matplotlib.rc_params_from_file", style_sheet),
    "the options of a trainer": ("tomllib.loads", lambda _: read_settings("a = 1", ".toml")),
}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 2.00 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        NO_DEVICE,
        dist.DistBackendError("NCCL error in: a.cpp:1, unhandled system error\nLast error:\nsocketStartConnect"),
    ],
    ids=("memory", "memory of the system", "device", "NCCL"),
)
@pytest.mark.parametrize(("broken", "job"), PLACES.values(), ids=PLACES)
def test_no_failure_is_taken_for_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, job: Callable[[Path], object], error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(broken, fail)
    if job is written:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(type(error)) as raised:
        job(tmp_path)
    assert raised.value is error


def test_an_error_that_others_made_of_a_failure_is_that_failure() -> None:
    full = torch.OutOfMemoryError(FULL)

    def library(*, told: bool) -> None:
        try:
            raise full
        except Exception as error:
            if told:
                raise OSError("the file is damaged") from error
            raise OSError("the file is damaged")  # noqa: B904  (as libraries do)

    for told in (False, True):
        with pytest.raises(OSError, match="damaged") as raised:
            library(told=told)
        assert failure_in(raised.value) is full
        with pytest.raises(torch.OutOfMemoryError):
            pass_on(raised.value)


def test_what_a_caller_was_handling_is_no_part_of_a_later_error() -> None:
    def again() -> Exception:
        try:
            raise TypeError("a second attempt fails for a reason of its own")
        except TypeError as error:
            return error

    try:
        raise torch.OutOfMemoryError(FULL)
    except torch.OutOfMemoryError:
        later = again()
    assert isinstance(later.__context__, torch.OutOfMemoryError)
    assert failure_in(later) is None


def test_a_device_that_is_not_there_is_wrong_input_and_a_full_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(torch, "empty", fail)
    text = "CUDA error: invalid device ordinal"
    with pytest.raises(ValueError, match=rf"^--device cuda:7 is not available \({text}\); pass cpu") as raised:
        resolve_device("cuda:7")
    assert failure_in(raised.value) is None
    text = FULL
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory"):
        resolve_device("cuda:0")


def test_a_failure_is_told_by_the_line_that_says_it() -> None:
    script = "The following operation failed in the TorchScript interpreter.\nTraceback:\nRuntimeError: CUDA error: bad"
    assert failure_line(RuntimeError(script)) == "RuntimeError: CUDA error: bad"
    assert (
        failure_line(RuntimeError("CUDA error: bad\nCUDA kernel errors might be reported later")) == "CUDA error: bad"
    )
    assert failure_line(MemoryError()) == "MemoryError"


# Handlers that catch failures and tell them as what they are, or that do nothing but ask the system about names.
EXEMPT = {
    "layerprobe/memory.py": "batches become smaller, and the others go on",
    "layerprobe/extraction/forward.py": "inputs stay on the host when the device has no room for them",
    "layerprobe/ranks.py": "ends all processes and tells the failure",
    "layerprobe/checkpoints/opening.py": "asks whether a device is there, and tells what it says",
    "layerprobe/precision.py": "reads a setting of torch",
    "layerprobe/training/trackers.py": "tells why a tracker gets no more rows; the training goes on",
    "layerprobe/files.py": "locks and names of files",
    "layerprobe/checksums.py": "locks",
    "layerprobe/records.py": "reads the version for a message about another error",
    "analyses/runs/machine.py": "asks the system for its memory",
    "cli/main.py": "tells every failure in one line",
}
BROAD = {"Exception", "BaseException", "RuntimeError", "OSError", "MemoryError"}


def test_whatever_catches_more_than_wrong_input_passes_failures_on() -> None:
    careless = {
        str(path.relative_to(REPOSITORY))
        for building in ("layerprobe", "analyses", "cli")
        for path in (REPOSITORY / building).rglob("*.py")
        if re.search(r"\bexcept\b|suppress", code := path.read_text(encoding="utf-8"))
        if any(careless_handlers(ast.parse(code)))
    }
    assert careless == set(EXEMPT)


@pytest.mark.parametrize(
    ("code", "careless"),
    [
        ("try: f()\nexcept Exception as e: raise ValueError(str(e))", True),
        ("KINDS = (KeyError, OSError)\ntry: f()\nexcept KINDS: pass", True),
        ("try: f()\nexcept torch.cuda.OutOfMemoryError: pass\nexcept: pass", True),
        ("with suppress(Exception): f()", True),
        ("try: f()\nexcept Exception as e:\n    if g(e): raise\n    h()", True),
        ("try: f()\nexcept Exception as e:\n    pass_on(e)\n    raise ValueError(str(e))", False),
        ("try: f()\nexcept BaseException:\n    g()\n    raise", False),
        ("try: f()\nexcept ValueError: pass", False),
    ],
)
def test_careless_handlers_are_found(code: str, careless: bool) -> None:
    assert any(careless_handlers(ast.parse(code))) == careless


def careless_handlers(tree: ast.Module) -> Iterator[bool]:
    """Whether each handler of a module catches failures of the machine and keeps them."""
    tuples = {
        target.id: caught(node.value, {})
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            yield bool(caught(node.type, tuples) & BROAD) and not goes_on(node.body)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            yield any(caught(argument, tuples) & BROAD for argument in node.args)


def caught(kinds: ast.expr | None, tuples: dict[str, set[str]]) -> set[str]:
    """The names of the types that a handler catches."""
    if kinds is None:
        return {"BaseException"}
    if isinstance(kinds, ast.Tuple):
        return {name for kind in kinds.elts for name in caught(kind, tuples)}
    if isinstance(kinds, ast.Starred):
        return caught(kinds.value, tuples)
    name = ast.unparse(kinds).rpartition(".")[2]
    return tuples.get(name, {name})


def goes_on(body: list[ast.stmt]) -> bool:
    """Whether a handler begins with `pass_on`, or ends in a bare `raise` that nothing comes before."""
    raises = [node for statement in body for node in ast.walk(statement) if isinstance(node, (ast.Raise, ast.Return))]
    return ast.unparse(body[0]).startswith("pass_on(") or (ast.unparse(body[-1]) == "raise" and len(raises) == 1)


def test_an_autoencoder_on_a_small_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "latent_channels": 3}')
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    images = TensorSamples(torch.rand(5, 3, 4, 4))
    latents, decoded = [], []
    for most in (9, 2):
        monkeypatch.setattr(autoencoders, "_autoencoder", lambda *_, most=most: Autoencoder(most))
        with warned(most < 5):
            encoded = autoencoders.encode(images, tmp_path, tmp_path / str(most), batch_size=8)
            latents.append(encoded.batch(range(5)).x)
        with warned(most < 5):
            decoded.append(autoencoders.decoder(tmp_path)(latents[-1]))
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(decoded[0], decoded[1])


@contextmanager
def warned(expected: bool) -> Iterator[None]:
    if not expected:
        yield
        return
    with pytest.warns(UserWarning, match=TOLD):
        yield


def test_an_encoder_on_a_small_card() -> None:
    def encode(x: Tensor) -> Tensor:
        refuse(len(x), 4)
        return x.flatten(1)

    with pytest.warns(UserWarning, match=TOLD):
        encoded = all_features(Extractor("mine", encode), tiny_samples())
    np.testing.assert_array_equal(encoded, tiny_samples().x.flatten(1))


def test_the_smaller_batch_is_kept_and_every_row_comes_once() -> None:
    size, asked = BatchSize(8), []

    def compute(rows: range) -> list[int]:
        asked.append(len(rows))
        refuse(len(rows), 3)
        return [*rows]

    with pytest.warns(UserWarning, match=TOLD) as told:
        parts = [*size.batches(9, compute, start=1)]
    assert [row for _, result in parts for row in result] == [*range(1, 9)]
    assert [str(each.message).split(" (")[0] for each in told] == [f"8 {TOLD} 4", f"4 {TOLD} 2"]
    assert asked == [8, 4, 2, 2, 2, 2]
    assert [rows for rows, _ in size.batches(3, compute)] == [range(2), range(2, 3)]


def test_other_failures_are_not_taken_for_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("Allocation on device failed"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    for text in (
        "CUDA error: an illegal memory access was encountered",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "Triton Error [CUDA]: device kernel image is invalid",
        "HIPBLAS_STATUS_INTERNAL_ERROR when calling `hipblasCreate(handle)`",
        "NCCL Error 2: unhandled system error",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5",
        "cumsum_cuda_kernel does not have a deterministic implementation",
    ):
        assert failure_in(RuntimeError(text)), text
    assert failure_in(dist.DistNetworkError("the client socket has timed out"))
    for text in (
        "mat1 and mat2 shapes cannot be multiplied",
        "Expected all tensors to be on the same device, but found cuda:0 and cpu!",
        "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same",
        "/data/igloo/weights.pt: bad magic",
        "HTTP connection reset by peer",
        'Missing key(s) in state_dict: "current_status_embedding.weight"',
        "relationship error: a node has two parents",
    ):
        assert failure_in(RuntimeError(text)) is None, text
