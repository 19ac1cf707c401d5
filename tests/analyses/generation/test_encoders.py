"""External encoders: folders of transformers, and functions of the user's."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.analyses.generation.encoders import open_encoder
from layerprobe.analyses.measures.cka import linear_cka
from layerprobe.analyses.runs import folder, probe
from layerprobe.analyses.tables.measurements import spectra
from layerprobe.analyses.tables.quality import read_quality
from layerprobe.checkpoints.source import CheckpointSource
from layerprobe.data.embedded_digits import digits
from layerprobe.data.sources import DataSource
from layerprobe.extraction.features import FeatureStore
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.files import MissingWeights


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    transformers.Dinov2Model(config).eval().save_pretrained(tmp_path / "tiny-dinov2")
    return tmp_path / "tiny-dinov2"


def test_a_folder_of_transformers_gives_the_mean_of_its_patch_tokens(dinov2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = open_encoder(dinov2)
    assert encoder.name == "tiny-dinov2"
    x = torch.rand(2, 3, 20, 20) * 2 - 1
    model = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    pixels = F.interpolate((x + 1) / 2, (28, 28), mode="bicubic", antialias=True)
    normal = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    with torch.inference_mode():
        wanted = model(pixel_values=normal).last_hidden_state[:, 1:].mean(1)
        assert torch.allclose(encoder.features(x), wanted, atol=1e-5)
        gray = x[:, :1]
        assert torch.allclose(encoder.features(gray), encoder.features(gray.repeat(1, 3, 1, 1)), atol=1e-6)
        (dinov2 / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
        wanted = model(pixel_values=2 * pixels - 1).last_hidden_state[:, 1:].mean(1)
        assert torch.allclose(open_encoder(dinov2).features(x), wanted, atol=1e-5)


def test_bad_folders_are_refused_in_one_line(dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"^--encoder \S+none does not exist; pass a folder saved by transformers, a TorchScript",
    ):
        open_encoder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"are not images; pass a file\.py:function as the encoder"):
        open_encoder(dinov2).features(torch.zeros(2, 4, 8, 8))
    config = json.loads((dinov2 / "config.json").read_text())
    (dinov2 / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ValueError, match="requires custom code, which is refused"):
        open_encoder(dinov2)
    (dinov2 / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="without image_size and patch_size"):
        open_encoder(dinov2)
    (dinov2 / "config.json").write_text(json.dumps(config))
    weights = dinov2 / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"transformers cannot open the model in .* \(.*\); check the folder"
    ) as caught:
        open_encoder(dinov2)
    assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(MissingWeights, match="contains no safetensors weights"):
        open_encoder(dinov2)


def test_a_function_of_the_users_is_compared_with_every_layer(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def flat(x):\n    return x.flatten(1)\nnumber = 3\n")
    with pytest.raises(ValueError, match=r"mine.py:number is not a function; name one from samples"):
        open_encoder(f"{tmp_path / 'mine.py'}:number")
    encoder = open_encoder(f"{tmp_path / 'mine.py'}:flat")
    plan = folder.RunPlan(
        CheckpointSource("digits", layers=("blocks.0", "blocks.6")),
        DataSource("digits", num_train=60, num_validation=50, num_test=30),
        ExtractionPlan(noise_levels=(0.1, 0.9)),
    )
    probe.extract_run(plan, tmp_path / "run")
    probe.analyze_run(tmp_path / "run", analyses=[spectra], encoder=encoder)
    table = read_quality(tmp_path / "run" / "quality.csv")
    rows = table[table["metric"] == "CKA with flat"].set_index(["layer", "noise_level"])["value"]
    assert len(rows) == 4
    store = FeatureStore.open(tmp_path / "run" / "features" / "model")
    split = digits().validation
    position = {int(i): row for row, i in enumerate(split.ids)}
    x: Tensor = split.batch([position[int(i)] for i in store.ids[store.splits == "validation"]]).x
    wanted = linear_cka(store.features("blocks.6", 0.1, split="validation"), np.asarray(x.flatten(1)))
    assert rows["blocks.6", 0.1] == pytest.approx(wanted, abs=1e-6)
    assert rows["blocks.0", 0.1] > rows["blocks.0", 0.9]


# ---------------------------------------------------------------------------------------------------------- TorchScript


class Means(nn.Module):
    """Channel means by a convolution, with a buffer and a helper module in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x)).mean((2, 3))


class Writer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "canary")
        return x.flatten(1)


def script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(path)
    return path


def edited(path: Path, name: str, change: tuple[bytes, bytes], out: Path) -> Path:
    """The archive with one thing replaced in the files of this ending."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as copy:
        for entry in archive.namelist():
            content = archive.read(entry)
            if entry.endswith(name):
                assert change[0] in content
                content = content.replace(*change)
            copy.writestr(entry, content)
    return out


def test_a_torchscript_file_gives_what_its_module_gave_in_evaluation_mode(tmp_path: Path) -> None:
    module = Means()
    module(torch.randn(8, 1, 6, 6))  # in training mode; statistics move
    encoder = open_encoder(script(module.train(), tmp_path / "means.pt"))
    x = torch.randn(5, 1, 6, 6)
    assert encoder.name == "means.pt"
    with torch.inference_mode():
        assert torch.allclose(encoder.features(x), module.eval()(x), atol=1e-6)
    with pytest.raises(
        ValueError, match=r"means.pt does not accept samples of shape \(5, 2, 6, 6\) \(.*channels.*\)$"
    ) as error:
        encoder.features(x.repeat(1, 2, 1, 1))
    assert "\n" not in str(error.value)


def test_a_torchscript_file_that_would_do_more_than_arithmetic_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = script(Means(), tmp_path / "good.pt")
    mean, code = b"torch.mean(", f"code/__torch__/{__name__.replace('.', '/')}.py"
    with zipfile.ZipFile(good) as archive:
        assert any(name.endswith(code) for name in archive.namelist())
    hostile = {
        "operators that touch files": [
            script(Writer(), tmp_path / "writer.pt"),
            edited(good, code, (mean, b"torch.from_file("), tmp_path / "reader.pt"),
            edited(good, code, (mean, b"ops.aten.save("), tmp_path / "operator.pt"),
        ],
        "operators of other libraries": [
            edited(good, code, (mean, b"ops.mine.run("), tmp_path / "library.pt"),
            edited(good, code, (mean, b"ops .mine.run("), tmp_path / "space.pt"),
        ],
        "C\\+\\+ classes": [
            edited(good, code, (mean, b"__torch__.torch.classes.mine.Class("), tmp_path / "class.pt"),
            edited(good, "data.pkl", (b"__torch__.torch", b"__torch__.torch.classes"), tmp_path / "pickled.pt"),
        ],
    }
    monkeypatch.setattr(torch.jit, "load", None)
    monkeypatch.chdir(tmp_path)
    for what, files in hostile.items():
        for file in files:
            with pytest.raises(
                ValueError, match=rf"{file.name} uses {what}, which is refused; pass a file.py:function"
            ):
                open_encoder(file)
    assert not (tmp_path / "canary").exists()


def test_code_that_another_zip_reader_would_see_is_checked_too(tmp_path: Path) -> None:
    """Of two entries of one name readers choose differently, and PyTorch's ignores case."""
    good = script(Means(), tmp_path / "good.pt")
    with zipfile.ZipFile(good) as archive:
        (name,) = [entry for entry in archive.namelist() if entry.endswith("test_encoders.py")]
        content = archive.read(name)
    hostile = content.replace(b"torch.mean(", b"torch.from_file(")
    for other, refused in ((name, False), (name[:-3] + ".PY", True)):
        path = tmp_path / f"{refused}.pt"
        with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, "w") as copy, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            copy.writestr(other, hostile)
            for entry in archive.namelist():
                copy.writestr(entry, archive.read(entry))
        if refused:
            with pytest.raises(ValueError, match="operators that touch files"):
                open_encoder(path)
        else:  # What was not read is not loaded either.
            assert open_encoder(path).features(torch.zeros(2, 1, 6, 6)).shape == (2, 4)


def test_files_that_are_no_torchscript_are_refused_in_one_line(tmp_path: Path) -> None:
    good = script(Means(), tmp_path / "good.pt")
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    for name in ("cut", "empty", "weights"):
        with pytest.raises(
            ValueError, match=rf"{name}.pt is not a TorchScript file.*; pass one saved by torch.jit.save$"
        ) as error:
            open_encoder(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)
    broken = edited(good, "test_encoders.py", (b"torch.mean(", b"torch.mean(("), tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"broken.pt cannot be opened as TorchScript \(.*\); save it again$") as error:
        open_encoder(broken)
    assert "\n" not in str(error.value)
