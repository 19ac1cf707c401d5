"""Archives of samples: the format that is scored, the same from any number of processes and after any interruption."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bodies import walk
from started import Started
from tiny import SHAPE, tiny_sit

from layerprobe.analyses import runs
from layerprobe.analyses.runs import sample as sample_runs
from layerprobe.analyses.runs.sample import Meaning, draw_archive, draw_samples, find_meaning, pixels, sample_mask
from layerprobe.analyses.runs.stages import SAMPLING, Cost, StageClock, cost_record
from layerprobe.checkpoints.opening import open_checkpoint
from layerprobe.cli import sample as sample_cli
from layerprobe.cli.main import run
from layerprobe.data.rendering import Rendering
from layerprobe.data.sequences.audio import AudioDecoder
from layerprobe.data.sequences.items import Normalization
from layerprobe.data.sources import DataSource
from layerprobe.records import write_record
from layerprobe.sampling import SamplingPlan, sample

PLAN = SamplingPlan(steps=2, seed=1)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_runs, "PART", 4)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices that are drawn, as they are drawn."""
    indices: list[int] = []

    def spy(backbone: Any, chosen: Sequence[int], **options: Any) -> torch.Tensor:
        indices.extend(chosen)
        return sample(backbone, chosen, **options)

    monkeypatch.setattr(sample_runs, "sample", spy)
    return indices


def test_an_archive_is_in_the_format_of_adms_evaluation(tmp_path: Path) -> None:
    place = draw_archive(tiny_sit(), tmp_path / "out", num=10, plan=PLAN)
    files = ["checksums.json", "samples.npz", "sampling.json", "times.json"]
    assert sorted(path.name for path in place.parent.iterdir()) == files
    with np.load(place) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        images, labels = archive["arr_0"], archive["arr_1"]
    assert (images.shape, images.dtype) == ((10, *SHAPE[1:], 3), np.uint8)
    assert labels.tolist() == [i % 3 for i in range(10)]
    assert zipfile.ZipFile(place).testzip() is None
    x = sample(tiny_sit(), range(10), labels=torch.arange(10) % 3, plan=PLAN)
    # Matrix products of other sizes round otherwise, which may turn a pixel over.
    assert np.abs(images.astype(int) - pixels(x)).max() <= 1
    assert len(np.unique(images)) > 50
    assert json.loads((tmp_path / "out" / "sampling.json").read_text())["plan"]["steps"] == 2


def test_a_model_without_classes_gives_no_labels(tmp_path: Path) -> None:
    with np.load(draw_archive(tiny_sit(num_classes=0), tmp_path / "out", num=3, plan=PLAN)) as archive:
        assert archive.files == ["arr_0"]


def test_pixels_are_rounded_and_clipped_as_sit_stores_them() -> None:
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    stored = pixels(values.view(7, 1, 1, 1))[:, 0, 0]
    assert stored[:, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]
    assert (stored[:, :1] == stored).all()  # gray three times over
    colors = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    assert pixels(colors).shape == (1, 2, 4, 3)
    assert pixels(colors)[0, 1, 2].tolist() == [0, 128, 255]


def test_an_interruption_keeps_the_finished_parts(tmp_path: Path, drawn: list[int]) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(what: str, done: int, total: int) -> None:
        assert total == 3
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        draw_archive(tiny_sit(), tmp_path / "out", num=10, plan=PLAN, progress=interrupt)
    assert drawn == list(range(8))
    (tmp_path / "out" / "parts" / "000002.npy.partial").write_bytes(b"half")
    drawn.clear()
    place = draw_archive(tiny_sit(), tmp_path / "out", num=10, plan=PLAN, batch_size=3)
    assert drawn == [8, 9]
    whole = draw_archive(tiny_sit(), tmp_path / "whole", num=10, plan=PLAN)
    assert np.abs(np.load(place)["arr_0"].astype(int) - np.load(whole)["arr_0"]).max() <= 1
    drawn.clear()
    assert draw_archive(tiny_sit(), tmp_path / "out", num=10, plan=PLAN) == place
    assert drawn == []  # a finished archive is not made again
    assert not (tmp_path / "out" / "parts").exists()


def test_other_samples_do_not_go_into_the_same_folder(tmp_path: Path) -> None:
    draw_archive(tiny_sit(), tmp_path, num=3, plan=PLAN)
    for other in ({"plan": replace(PLAN, guidance=2.0)}, {"num": 4}, {"plan": replace(PLAN, solver="euler")}):
        with pytest.raises(ValueError, match="holds samples of another run"):
            draw_archive(tiny_sit(), tmp_path, **{"num": 3, "plan": PLAN} | other)
    with pytest.raises(ValueError, match=r"another run \(different: weights\)"):
        draw_archive(tiny_sit(seed=1), tmp_path, num=3, plan=PLAN)


@pytest.mark.parametrize("shape", [(4, 4, 4), (3, 8), (3, 4, 4, 4)])
def test_latents_are_not_passed_off_as_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"makes samples of shape .*, which are not images; pass --vae") as refused:
        draw_archive(tiny_sit(shape=shape), tmp_path / "out", num=2)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_nothing_is_stored_of_samples_that_are_not_finite(tmp_path: Path) -> None:
    broken = tiny_sit()
    broken.module.final_layer.linear.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^samples 0 to 3 are not all finite; try more steps or less guidance$"):
        draw_archive(broken, tmp_path, num=8, plan=PLAN)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(ValueError, match=r"^cannot draw 0 samples in batches of 256; both count from 1$"):
        draw_archive(tiny_sit(), tmp_path, num=0)


def test_latents_are_decoded_by_their_autoencoder(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=4, **blocks
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    backbone = tiny_sit(shape=(4, 4, 4))
    z = sample(backbone, range(5), labels=torch.arange(5) % 3, plan=PLAN)
    with torch.no_grad():
        expected = pixels(vae.decode(z / vae.config.scaling_factor).sample)
    place = draw_archive(backbone, tmp_path / "npz", num=5, plan=PLAN, vae=tmp_path / "vae")
    got = np.load(place)["arr_0"]
    assert got.shape == (5, 8, 8, 3)
    assert np.abs(got.astype(int) - expected).max() <= 1
    draw_samples(backbone, tmp_path / "grid", num=5, plan=PLAN, keep=True, vae=tmp_path / "vae")
    assert np.load(tmp_path / "grid" / "samples.npy").shape == (5, 3, 8, 8)


def drawn_together(folder: Path) -> list[tuple[int, int]]:
    """An archive and pictures in parts of four, and what one process tells of its parts of the archive."""
    sample_runs.PART = sample_runs.FEW = 4
    plan, told = SamplingPlan("euler-maruyama", 3, seed=1), []
    draw_archive(tiny_sit(), folder / "npz", num=10, plan=plan, progress=lambda _, *seen: told.append(seen))
    draw_samples(tiny_sit(), folder / "png", num=10, plan=plan, keep=True)
    return told


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but the times, and the checksums that have theirs among them."""
    files = (path for path in folder.rglob("*") if path.is_file())
    own = (path for path in files if path.name not in ("times.json", "checksums.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in own}


def test_several_processes_draw_the_same_files(tmp_path: Path) -> None:
    files, told = {}, {}
    for num in (1, 2, 3):
        told[num] = Started(tmp_path, drawn_together, tmp_path / str(num), num=num).results()
        files[num] = files_of(tmp_path / str(num))
    assert told == {1: [[(1, 3), (2, 3), (3, 3)]], 2: [[(1, 2), (2, 2)], [(1, 1)]], 3: [[(1, 1)]] * 3}
    assert {"npz/samples.npz", "png/samples.png", "png/samples.svg", "png/samples.npy"} < files[1].keys()
    assert files[1] == files[2] == files[3]


def test_interrupted_pictures_go_on(tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    draw, spy = partial(draw_samples, tiny_sit(), num=10, plan=PLAN, keep=True), sample_runs.sample

    def stops(backbone: Any, chosen: range, **options: Any) -> torch.Tensor:
        if 8 in chosen:
            raise KeyboardInterrupt
        return spy(backbone, chosen, **options)

    monkeypatch.setattr(sample_runs, "FEW", 4)
    draw(tmp_path / "whole")
    monkeypatch.setattr(sample_runs, "sample", stops)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "out")
    monkeypatch.setattr(sample_runs, "sample", spy)
    (tmp_path / "out" / "parts-of-a-user").mkdir()
    write_record(tmp_path / "out" / "times.json", {"seconds": {SAMPLING: 500}, "memory_bytes": 1, "device_bytes": None})
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    for name, seed, rest in (("other", 2, [*range(10)]), ("out", PLAN.seed, [8, 9]), ("out", PLAN.seed, [*range(10)])):
        drawn.clear()
        clock = StageClock(tmp_path / name, writes=True)
        draw(tmp_path / name, plan=replace(PLAN, seed=seed), clock=clock)
        assert drawn == rest  # Parts of other samples are not taken.
        assert [path.name for path in (tmp_path / name).glob("parts*")] == ["parts-of-a-user"]
        took = cost_record(tmp_path / name)[1]
        assert took is not None
        assert (took["seconds"][SAMPLING] >= 500) == (len(rest) < 10)  # Nor are their times.
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("draw", [draw_samples, draw_archive])
def test_parts_of_another_autoencoder_are_not_taken(
    tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch, draw: Any
) -> None:
    """It lies where the other one lay."""

    def stops(x: torch.Tensor) -> torch.Tensor:
        if 8 in drawn:
            raise KeyboardInterrupt
        return x[:, :3]

    monkeypatch.setattr(sample_runs, "FEW", 4)
    monkeypatch.setattr(sample_runs, "decoder", lambda vae, device: stops)
    vae, backbone = tmp_path / "vae", tiny_sit(shape=(4, 4, 4))
    vae.mkdir()
    (vae / "config.json").write_text("{}")
    for weights in (b"a", b"b"):
        (vae / "diffusion_pytorch_model.safetensors").write_bytes(weights)
        drawn.clear()
        with pytest.raises(KeyboardInterrupt):
            draw(backbone, tmp_path / "out", num=10, plan=PLAN, vae=vae)
        assert drawn == [*range(10)]
    monkeypatch.setattr(sample_runs, "decoder", lambda vae, device: lambda x: x[:, :3])
    drawn.clear()
    draw(backbone, tmp_path / "out", num=10, plan=PLAN, vae=vae)
    assert drawn == [8, 9]
    assert not [*(tmp_path / "out").glob("parts*")]


@pytest.mark.usefixtures("untimed")
def test_the_command_draws_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["layerprobe", "sample", "digits", "--out", *map(str, arguments)])
        return (run(), *capsys.readouterr())

    options = ["--format", "npz", "--num", 5, "--steps", 2, "--guidance", 2, "--guidance-interval", "0.2,0.7"]
    assert call(tmp_path, *options, "--dry-run")[0] == 0
    assert not list(tmp_path.iterdir())
    code, out, err = call(tmp_path, *options, "--solver", "euler-maruyama", "--batch-size", 2, "--json")
    assert (code, json.loads(out)) == (0, {"samples": str(tmp_path / "samples.npz")})
    assert "samples: 2 of 2" in err
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (5, 8, 8, 3)
    code, out, err = call(tmp_path, *options, "--dry-run")
    assert (code, out) == (2, "")
    assert "holds samples of another run (different: plan.solver); choose another --out" in err
    record = json.loads((tmp_path / "sampling.json").read_text())["plan"]
    assert (record["solver"], record["guidance_interval"]) == ("euler-maruyama", [0.2, 0.7])
    for wrong, seen in (
        (["--format", "jpg"], "unknown format 'jpg'; use png or npz; did you mean png?"),
        (["--guidance-interval", "0.2"], "--guidance-interval 0.2 is not 2 numbers; write them as 0.2,0.7"),
        (["--solver", "rk4"], "unknown --solver 'rk4'; use euler, heun, dopri5 or euler-maruyama"),
    ):
        assert call(tmp_path / "x", *wrong) == (2, "", f"layerprobe: {seen}\n")


def test_lengths_are_those_of_the_data_or_the_one_that_is_asked_for() -> None:
    backbone = tiny_sit(shape=(6, 12))
    rendering = Rendering("motion", 1, lengths=((3, 5), (8, 9), (12, 12)))
    labels = torch.arange(30) % 3
    mask = sample_mask(backbone, rendering, 30, labels=labels, seed=0)
    assert mask is not None
    lengths = rendering.lengths_of(mask)
    for label, allowed in enumerate(({3, 4, 5}, {8, 9}, {12})):
        assert set(lengths[labels == label].tolist()) == allowed
    assert sample_mask(backbone, Rendering("motion", 1), 3, labels=None, seed=0) is None
    chosen = sample_mask(backbone, rendering, 3, labels=labels[:3], seed=0, length=7)
    assert chosen is not None
    assert rendering.lengths_of(chosen).tolist() == [7, 7, 7]
    assert sample_mask(backbone, rendering, 3, labels=None, seed=0, length=12) is None
    # A network that takes no mask draws what it can.
    assert sample_mask(replace(backbone, takes_mask=False), rendering, 3, labels=None, seed=0) is None
    for length in (0, 13):
        with pytest.raises(ValueError, match=rf"--frames is {length}, but SiT .* makes 1 to 12"):
            sample_mask(backbone, rendering, 3, labels=None, seed=0, length=length)
    with pytest.raises(ValueError, match="--frames has an effect on audio, motion and video only; leave it out"):
        sample_mask(backbone, None, 3, labels=None, seed=0, length=2)


def test_samples_of_something_unknown_are_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"makes samples of shape \(6, 12\), and the file does not say what"):
        draw_samples(tiny_sit(shape=(6, 12)), tmp_path, num=2)


def test_a_trained_model_says_itself_what_its_samples_are(
    tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(20):
        place = tmp_path / "walks" / ("slow", "fast")[i % 2] / f"{i}.npy"
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, walk(12 + i % 5, seed=i, speed=0.05 + 0.1 * (i % 2)))
    train = ["--depth", 2, "--width", 16, "--heads", 2, "--steps", 2, "--batch-size", 4, "--length", 16]
    assert cli("train", "--data", tmp_path / "walks", "--out", tmp_path / "t", *train)[0] == 0
    model = tmp_path / "t" / "model.safetensors"
    code, _, err = cli("sample", model, "--out", tmp_path / "s", "--num", 2, "--steps", 2)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "checksums.json",
        "lengths.npy",
        "samples.gif",
        "samples.json",
        "samples.npy",
        "samples.png",
        "samples.svg",
        "times.json",
    ]
    again = ("sample", model, "--out", tmp_path / "s", "--num", 2, "--steps", 2)
    for dry in ([], ["--dry-run"]):
        code, out, err = cli(*again, "--seed", 1, *dry)
        assert (code, out) == (2, "")
        assert "holds samples of another command (different: plan.seed); choose another --out" in err
    with monkeypatch.context() as patch:
        patch.setattr(sample_cli, "tell_forecast", lambda cost: told.append(cost))
        patch.setattr(runs, "rough_sampling_seconds", lambda *_: 100.0)
        patch.setattr(runs, "sampling_cost", lambda *_, **__: Cost({SAMPLING: 100.0}, 0, None, 0))
        patch.setattr(runs, "draw_samples", lambda *_, **__: tmp_path)
        told: list[Cost] = []
        assert cli(*again)[0] == 0
    assert len(told) == 1  # The times that lie there are of samples that were drawn before.
    x, lengths = np.load(tmp_path / "s" / "samples.npy"), np.load(tmp_path / "s" / "lengths.npy")
    assert x.shape == (2, 48, 16)
    assert [int((sample != 0).any(0).sum()) for sample in x] == lengths.tolist()
    assert set(lengths) <= set(range(12, 17))
    assert f"fast ({lengths[0]} frames)" in (tmp_path / "s" / "samples.svg").read_text()
    # What the training wrote down is what the data says, which serves models that nobody wrote it down for.
    backbone = open_checkpoint(model)
    walks = DataSource(str(tmp_path / "walks"))
    kept, said = (find_meaning(str(model), backbone, source) for source in (None, walks))
    assert kept.rendering is not None
    assert said.rendering is not None
    assert kept.rendering.to_dict() == said.rendering.to_dict()
    assert kept.class_names == said.class_names == ("fast", "slow")
    assert find_meaning("digits", tiny_sit()).rendering is None
    with pytest.raises(ValueError, match="motion samples are 48x15 but the model takes 48x16; pass the --length"):
        find_meaning(str(model), backbone, replace(walks, length=15))


def test_recordings_can_be_heard(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    decoder = AudioDecoder(8000, "waveform", hop=16)
    rendering = Rendering("audio", 1, Normalization(torch.zeros(16), torch.full((16,), 0.1)), audio=decoder)
    backbone = tiny_sit(shape=(16, 8))
    meaning = Meaning(rendering, ("zero", "one", "a/b"))
    draw_samples(backbone, tmp_path, num=3, plan=PLAN, keep=True, meaning=meaning, length=6)
    assert sorted(path.name for path in (tmp_path / "wav").iterdir()) == ["0-zero.wav", "1-one.wav", "2-a_b.wav"]
    wave, rate = soundfile.read(tmp_path / "wav" / "1-one.wav", dtype="float32")
    assert (len(wave), rate) == (96, 8000)
    made = np.load(tmp_path / "samples.npy")[1, :, :6] * 0.1
    np.testing.assert_allclose(wave, made.T.ravel(), atol=1e-4)  # 16 bits
    assert not (tmp_path / "samples.gif").exists()
