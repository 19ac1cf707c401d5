from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerprobe.data.latents import samples as module
from layerprobe.data.latents import vae as vae_module
from layerprobe.data.latents.layouts import latent_format, load_latents
from layerprobe.data.latents.vae import decoder, encode, latent_shape
from layerprobe.data.loading import encode_splits, load
from layerprobe.data.samples import Batch, Samples, TensorSamples
from layerprobe.data.splits import split
from layerprobe.noise.random_stream import RandomStream

SHAPE = (4, 3, 2)


def numbers(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def write_repa(folder: Path, mean: Tensor, deviation: Tensor, *, labels: bool = True) -> Path:
    """As REPA's preprocessing: files in numbered folders, beside the images that its training also reads."""
    entries = []
    for i, moments in enumerate(torch.cat([mean, deviation], 1)):
        name = f"{i // 4:05}/img-mean-std-{i:08}.npy"
        (folder / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vae-sd" / name, moments.numpy())
        entries.append([name, i % 3])
    record = {"labels": entries[::-1] if labels else None}
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps(record))
    (folder / "images").mkdir(exist_ok=True)
    return folder


def write_lightningdit(folder: Path, z: Tensor, sizes: Sequence[int], *, stats: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    labels = torch.arange(len(z)) % 3
    for i, (part, classes) in enumerate(zip(z.split(list(sizes)), labels.split(list(sizes)), strict=True)):
        tensors = {"latents": part.contiguous(), "latents_flip": part.flip(-1).contiguous(), "labels": classes.clone()}
        save_file(tensors, folder / f"latents_rank{i:02}_shard000.safetensors")
    if stats:
        mean, std = z.float().mean([0, 2, 3], keepdim=True), z.float().std([0, 2, 3], keepdim=True)
        torch.save({"mean": mean, "std": std}, folder / "latents_stats.pt")
    return folder


def write_fast_dit(folder: Path, z: Tensor) -> Path:
    for kind in ("features", "labels"):
        (folder / f"imagenet256_{kind}").mkdir(parents=True, exist_ok=True)
    for i, latent in enumerate(z):
        np.save(folder / "imagenet256_features" / f"{i}.npy", latent[None].numpy())
        np.save(folder / "imagenet256_labels" / f"{i}.npy", np.array([i % 3]))
    return folder


def everything(samples: Samples) -> Batch:
    return samples.batch(range(len(samples)))


# Values


def test_repa_latents_are_drawn_and_scaled(tmp_path: Path) -> None:
    mean, deviation = numbers(9, *SHAPE), numbers(9, *SHAPE, seed=1).exp()
    folder = write_repa(tmp_path, mean, deviation)
    assert latent_format(folder) == latent_format(folder / "vae-sd") == "vae-sd"
    samples = load_latents(folder, seed=5)
    eps = RandomStream(5, "latent").normal(torch.arange(9), SHAPE)
    batch = everything(samples)
    assert torch.allclose(batch.x, (mean + deviation * eps) * 0.18215, rtol=1e-6)
    assert batch.labels is not None
    assert (batch.ids.tolist(), batch.labels.tolist()) == (list(range(9)), [i % 3 for i in range(9)])
    assert (samples.shape, samples.num_classes, batch.x.dtype) == (SHAPE, 3, torch.float32)
    # The folder itself holds the same, and so does every access in any company.
    same = load_latents(folder / "vae-sd", seed=5)
    assert same.fingerprint == samples.fingerprint
    assert torch.equal(same.batch([7, 2, 7]).x, batch.x[[7, 2, 7]])
    assert not torch.equal(load_latents(folder, seed=6).batch([0]).x, batch.x[:1])


def test_draws_follow_the_posterior(tmp_path: Path) -> None:
    mean, deviation = torch.full((400, *SHAPE), 3.0), torch.full((400, *SHAPE), 0.5)
    x = everything(load_latents(write_repa(tmp_path, mean, deviation), scale=2)).x
    # 9600 draws: the standard errors are 0.01 and 0.007.
    assert float(x.mean()) == pytest.approx(6, abs=0.05)
    assert float(x.std()) == pytest.approx(1, abs=0.04)
    assert abs(np.corrcoef(x.flatten(1)[::2].flatten(), x.flatten(1)[1::2].flatten())[0, 1]) < 0.05


def test_the_posterior_noise_is_not_the_noise_of_probing(tmp_path: Path) -> None:
    """Else x_t would hold its own noise twice."""
    samples = load_latents(write_repa(tmp_path, torch.zeros(3, *SHAPE), torch.ones(3, *SHAPE)), scale=1)
    assert not torch.allclose(everything(samples).x, RandomStream(0).normal(samples.ids, SHAPE))


def test_unlabeled_repa_latents(tmp_path: Path) -> None:
    samples = load_latents(write_repa(tmp_path, numbers(3, *SHAPE), torch.zeros(3, *SHAPE), labels=False))
    assert samples.labels is everything(samples).labels is None
    assert samples.num_classes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lightningdit_latents_are_normalized_over_all_shards(tmp_path: Path, dtype: torch.dtype) -> None:
    z = (numbers(10, *SHAPE) * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1) + 7).to(dtype)
    folder = write_lightningdit(tmp_path, z, [4, 1, 5])
    assert latent_format(folder) == "lightningdit"
    samples = load_latents(folder)
    batch = everything(samples)
    assert torch.allclose(batch.x.mean([0, 2, 3]), torch.zeros(4), atol=1e-5)
    assert torch.allclose(batch.x.std([0, 2, 3]), torch.ones(4), atol=1e-5)
    z = z.float()
    expected = (z - z.mean([0, 2, 3], keepdim=True)) / z.std([0, 2, 3], keepdim=True)
    assert torch.allclose(batch.x, expected, atol=1e-5)
    order = [9, 3, 4, 5, 0, 9]  # over the borders of the shards
    mixed = samples.batch(order)
    assert torch.equal(mixed.x, batch.x[order])
    assert mixed.ids.tolist() == order
    assert mixed.labels is not None
    assert mixed.labels.tolist() == [i % 3 for i in order]
    assert torch.allclose(everything(load_latents(folder, scale=0.5)).x, expected / 2, atol=1e-5)


def test_lightningdit_latents_of_a_model_trained_without_statistics(tmp_path: Path) -> None:
    z = numbers(5, *SHAPE)
    folder = write_lightningdit(tmp_path, z, [5], stats=False)
    assert torch.equal(everything(load_latents(folder, scale=0.25)).x, z * 0.25)


def test_fast_dit_files_are_sorted_as_strings_and_scaled_already(tmp_path: Path) -> None:
    z = numbers(12, *SHAPE)
    folder = write_fast_dit(tmp_path, z)
    assert latent_format(folder) == "fast-dit"
    batch, order = everything(load_latents(folder)), [0, 1, 10, 11, *range(2, 10)]
    assert torch.equal(batch.x, z[order])
    assert batch.labels is not None
    assert batch.labels.tolist() == [i % 3 for i in order]
    assert torch.equal(everything(load_latents(folder, scale=3)).x, z[order] * 3)


WRITERS: dict[str, Callable[[Path, Tensor], Path]] = {
    "vae-sd": lambda folder, z: write_repa(folder, z, torch.full_like(z, 0.1)),
    "lightningdit": lambda folder, z: write_lightningdit(folder, z, [len(z) - 2, 2]),
    "fast-dit": write_fast_dit,
}
every_format = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@every_format
def test_the_fingerprint_changes_with_what_a_model_would_see(
    tmp_path: Path, write: Callable[[Path, Tensor], Path]
) -> None:
    z = numbers(6, *SHAPE)
    samples = load_latents(write(tmp_path / "a", z))
    assert load_latents(shutil.copytree(tmp_path / "a", tmp_path / "copy")).fingerprint == samples.fingerprint
    other = z.clone()
    other[5, 3, 2, 1] += 1e-6
    found = {samples.fingerprint, load_latents(write(tmp_path / "b", other)).fingerprint}
    found |= {
        load_latents(tmp_path / "a", scale=0.7).fingerprint,
        load_latents(write(tmp_path / "c", z[:5])).fingerprint,
    }
    assert len(found) == 4


@every_format
def test_of_much_data_the_time_of_change_stands_for_the_content(
    tmp_path: Path, write: Callable[[Path, Tensor], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, numbers(6, *SHAPE))
    monkeypatch.setattr(module, "MOST_HASHED_BYTES", 100)
    before = load_latents(folder).fingerprint
    assert load_latents(folder).fingerprint == before
    path = sorted(path for path in folder.rglob("*") if path.suffix in (".npy", ".safetensors"))[0]
    os.utime(path, ns=(1, 1))
    assert load_latents(folder).fingerprint != before


@every_format
def test_only_what_is_asked_for_is_read(tmp_path: Path, write: Callable[[Path, Tensor], Path]) -> None:
    samples = load_latents(write(tmp_path, numbers(8, *SHAPE)))
    first = samples.batch([0, 1]).x
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".npy", ".safetensors")]
    last = sorted(path for path in files if "label" not in path.parent.name)[-1]
    last.unlink()
    assert torch.equal(samples.batch([0, 1]).x, first)
    with pytest.raises((OSError, ValueError), match=last.name):
        everything(samples)


def test_several_threads_read_the_files_in_the_order_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = load_latents(write_fast_dit(tmp_path, numbers(70, *SHAPE)))
    order, read = torch.randperm(70, generator=torch.Generator().manual_seed(0)).tolist(), []
    for threads in (1, 3):
        monkeypatch.setattr("layerprobe.threads.num_threads", lambda threads=threads: threads)
        read.append(samples.batch(order).x)
    assert torch.equal(*read)


@every_format
def test_latents_divide_and_travel_to_other_processes(tmp_path: Path, write: Callable[[Path, Tensor], Path]) -> None:
    samples = load_latents(write(tmp_path, numbers(30, *SHAPE)))
    splits = split(pickle.loads(pickle.dumps(samples)))
    ids = torch.cat([part.ids for _, part in splits.items()])
    assert sorted(ids.tolist()) == list(range(30))
    assert torch.equal(splits.test.batch([2]).x, samples.batch([int(splits.test.ids[2])]).x)
    assert len(samples.batch([]).x) == 0
    assert samples.batch([-1]).ids.tolist() == [29]


def test_other_folders_are_not_taken_for_latents(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").touch()
    (tmp_path / "features").mkdir()  # a class of images
    (tmp_path / "dataset.json").write_text("{}")
    assert latent_format(tmp_path) is None
    assert latent_format(tmp_path / "dataset.json") is None
    assert latent_format(tmp_path / "nothing") is None
    assert latent_format("digits") is None
    with pytest.raises(ValueError, match="contains no latents; pass a folder as REPA"):
        load_latents(tmp_path)


# Bad input


def repa_without_labels(folder: Path) -> None:
    write_repa(folder, numbers(3, *SHAPE), numbers(3, *SHAPE))
    (folder / "vae-sd" / "dataset.json").unlink()


def repa_with_record(record: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_repa(folder, numbers(3, *SHAPE), numbers(3, *SHAPE))
        (folder / "vae-sd" / "dataset.json").write_text(record)

    return write


def repa_with_file(save: Callable[[Path], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_repa(folder, numbers(3, *SHAPE), numbers(3, *SHAPE))
        save(folder / "vae-sd" / "00000" / "img-mean-std-00000001.npy")

    return write


def repa_empty(folder: Path) -> None:
    (folder / "vae-sd").mkdir()


def lightningdit_with(**tensors: Tensor) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_lightningdit(folder, numbers(4, *SHAPE), [4])
        save_file(tensors, folder / "latents_rank01_shard000.safetensors")

    return write


def lightningdit_with_stats(stats: dict[str, Tensor] | None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_lightningdit(folder, numbers(4, *SHAPE), [4], stats=False)
        if stats is not None:
            torch.save(stats, folder / "latents_stats.pt")

    return write


def lightningdit_without(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_lightningdit(folder, numbers(6, *SHAPE), [2, 2, 2])
        last = folder / "latents_rank02_shard000.safetensors"
        shutil.copy(last, folder / "latents_rank02_shard001.safetensors")
        (folder / f"latents_rank{name}.safetensors").unlink()

    return write


def lightningdit_cut(folder: Path) -> None:
    write_lightningdit(folder, numbers(4, *SHAPE), [2, 2])
    path = folder / "latents_rank01_shard000.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def fast_dit_without(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_fast_dit(folder, numbers(4, *SHAPE))
        for name in names:
            place = folder / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()

    return write


def fast_dit_twice(folder: Path) -> None:
    write_fast_dit(folder, numbers(4, *SHAPE))
    shutil.copytree(folder / "imagenet256_features", folder / "imagenet512_features")


def fast_dit_with_labels(label: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_fast_dit(folder, numbers(4, *SHAPE))
        np.save(folder / "imagenet256_labels" / "2.npy", label)

    return write


ONES = torch.ones(1, 4, 1, 1)
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no labels file": (repa_without_labels, r"the labels file .*dataset\.json is missing; copy it"),
    "damaged labels": (
        repa_with_record('{"labels": [['),
        r"dataset\.json contains no labels of the form \[file, label\]",
    ),
    "other labels": (repa_with_record('["a"]'), r"dataset\.json contains no labels of the form"),
    "a file without label": (
        repa_with_record('{"labels": [["00000/img-mean-std-00000000.npy", 1]]}'),
        r"no class for 2 of 3 files \(first: 00000/img-mean-std-00000001\.npy\)",
    ),
    "mixed shapes": (
        repa_with_file(lambda path: np.save(path, np.zeros((8, 3, 3), np.float32))),
        r"00000001\.npy has shape \(8, 3, 3\), not \(8, 3, 2\) like img-mean-std-00000000\.npy",
    ),
    "odd channels": (
        lambda folder: [
            write_repa(folder, numbers(1, *SHAPE), numbers(1, *SHAPE)),
            np.save(folder / "vae-sd" / "00000" / "img-mean-std-00000000.npy", np.zeros((7, 3, 2))),
        ],
        "has 7 channels, which cannot be a mean and a standard deviation",
    ),
    "cut": (
        repa_with_file(lambda path: path.write_bytes(path.read_bytes()[:-5])),
        r"00000001\.npy is not a complete \.npy file",
    ),
    "objects": (
        repa_with_file(lambda path: np.save(path, np.array([{"a": 1}]), allow_pickle=True)),
        r"00000001\.npy is not a complete \.npy file of numbers",
    ),
    "NaN": (
        repa_with_file(lambda path: np.save(path, np.full((8, 3, 2), np.nan, np.float32))),
        r"00000001\.npy has NaN or infinite values; encode that image again",
    ),
    "empty": (repa_empty, "vae-sd contains no .npy file"),
    "no statistics": (lightningdit_with_stats(None), r"latents_stats\.pt is missing.*or pass --latent-scale"),
    "other statistics": (lightningdit_with_stats({"mean": ONES}), "contains no mean and std of 4 channels"),
    "fewer channels": (
        lightningdit_with_stats({"mean": ONES[:, :3], "std": ONES[:, :3]}),
        "contains no mean and std of 4 channels",
    ),
    "no spread": (lightningdit_with_stats({"mean": ONES, "std": 0 * ONES}), "or a std of 0"),
    "mixed shards": (
        lightningdit_with(latents=torch.zeros(2, 4, 3, 3), labels=torch.zeros(2)),
        r"rank01_shard000\.safetensors contains latents of shape \(2, 4, 3, 3\), not \(n, 4, 3, 2\) like latents_rank",
    ),
    "labels of other shards": (
        lightningdit_with(latents=torch.zeros(2, *SHAPE), labels=torch.zeros(3)),
        "rank01_shard000.safetensors has 2 latents but 3 labels; encode its images again",
    ),
    "weights": (
        lightningdit_with(weight=torch.zeros(1)),
        "lacks labels and latents; pass a folder as LightningDiT",
    ),
    "NaN in a shard": (
        lightningdit_with(latents=torch.full((2, *SHAPE), torch.nan), labels=torch.zeros(2)),
        r"latent 0 of .*rank01_shard000\.safetensors has NaN or infinite values",
    ),
    "negative": (
        lightningdit_with(latents=torch.zeros(1, *SHAPE), labels=torch.tensor([-1])),
        "label -1 is negative; labels count from 0",
    ),
    "cut shard": (lightningdit_cut, r"rank01_shard000\.safetensors is not a complete safetensors file; copy it again"),
    "shard of a process": (
        lightningdit_without("01_shard000"),
        "has no latents_rank01_shard000.safetensors but later",
    ),
    "shard between": (
        lightningdit_without("02_shard000"),
        "has no latents_rank02_shard000.safetensors but later",
    ),
    "no labels folder": (fast_dit_without("imagenet256_labels"), "the labels folder .*imagenet256_labels is missing"),
    "no partner": (
        fast_dit_without("imagenet256_labels/3.npy"),
        r"1 files have no counterpart: 3\.npy is in imagenet256_features but not in imagenet256_labels",
    ),
    "two resolutions": (
        fast_dit_twice,
        "contains both imagenet256_features and imagenet512_features; move one of them",
    ),
    "half a class": (fast_dit_with_labels(np.array([0.5])), "not one class"),
    "two classes": (fast_dit_with_labels(np.array([1, 2])), "contains 2 numbers of type int64, not one class"),
}


@pytest.mark.parametrize(("write", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        everything(load_latents(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(tmp_path: Path, scale: float) -> None:
    write_fast_dit(tmp_path, numbers(2, *SHAPE))
    with pytest.raises(ValueError, match=r"--latent-scale is .*; pass a positive number"):
        load_latents(tmp_path, scale=scale)


# Encoding


@pytest.fixture(scope="session")
def vae_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny autoencoders of random weights that halve each side: two of the usual kind, and two with other factors."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    kinds = {
        "plain": {},
        "other": {},
        "shifted": {"scaling_factor": 1.5, "shift_factor": 0.25},
        "per channel": {"scaling_factor": 2.0, "latents_mean": [1.0, 2, 3, 4], "latents_std": [0.5, 1, 2, 4]},
    }
    folders = {}
    for i, (name, options) in enumerate(kinds.items()):
        torch.manual_seed(i)
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            sample_size=8,
            **options,
        )
        folders[name] = tmp_path_factory.mktemp("vae") / name
        vae.save_pretrained(folders[name])
    return folders


def images(n: int = 7, *, seed: int = 0) -> TensorSamples:
    return TensorSamples(
        numbers(n, 3, 8, 4, seed=seed).clamp(-1, 1),
        torch.arange(n) % 3,
        ids=torch.arange(n) + 50,
        class_names=("a", "b", "c"),
    )


def moments(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    from diffusers import AutoencoderKL

    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(folder).eval().encode(x).latent_dist
    return posterior.mean, posterior.std


FACTORS: dict[str, tuple[Any, Any]] = {
    "plain": (0.0, 0.18215),
    "shifted": (0.25, 1.5),
    "per channel": (
        torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1),
        2 / torch.tensor([0.5, 1, 2, 4]).view(4, 1, 1),
    ),
}


@pytest.mark.parametrize("kind", FACTORS)
def test_encoded_images_are_the_scaled_draws_of_the_autoencoder(
    tmp_path: Path, vae_folders: dict[str, Path], kind: str
) -> None:
    samples, (shift, scale) = images(), FACTORS[kind]
    encoded = encode(samples, vae_folders[kind], tmp_path, seed=3, batch_size=3)
    mean, std = moments(vae_folders[kind], samples.x)
    z = mean + std * RandomStream(3, "latent").normal(samples.ids, (4, 4, 2))
    batch = everything(encoded)
    # Convolutions round otherwise in batches of another size.
    assert torch.allclose(batch.x, (z - shift) * scale, atol=1e-4)
    assert encoded.shape == latent_shape(samples.shape, vae_folders[kind]) == (4, 4, 2)
    assert torch.equal(batch.ids, samples.ids)
    assert torch.equal(encoded.labels, samples.labels)
    assert (encoded.num_classes, encoded.class_names) == (3, ("a", "b", "c"))


@pytest.mark.parametrize("kind", FACTORS)
def test_decoding_takes_the_factors_off_again(vae_folders: dict[str, Path], kind: str) -> None:
    from diffusers import AutoencoderKL

    z, (shift, scale) = numbers(3, 4, 4, 2), FACTORS[kind]
    decoded = decoder(vae_folders[kind], batch_size=2)((z - shift) * scale)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(vae_folders[kind]).eval().decode(z).sample.clamp(-1, 1)
    assert decoded.shape == (3, 3, 8, 4)
    assert torch.allclose(decoded, expected, atol=1e-4)
    if kind == "plain":
        assert torch.equal(*(decoder(vae_folders[kind], scale=scale)(z * scale) for scale in (2, 0.5)))


def test_a_given_scale_stands_for_the_configured_one(tmp_path: Path, vae_folders: dict[str, Path]) -> None:
    ours, configured = (encode(images(), vae_folders["plain"], tmp_path, scale=scale) for scale in (1, None))
    assert torch.allclose(everything(ours).x * 0.18215, everything(configured).x, rtol=1e-6)
    assert ours.fingerprint != configured.fingerprint
    assert len(list(tmp_path.iterdir())) == 1  # encoded once


def test_a_pipeline_folder_will_do(tmp_path: Path, vae_folders: dict[str, Path]) -> None:
    shutil.copytree(vae_folders["plain"], tmp_path / "pipeline" / "vae")
    a = encode(images(), tmp_path / "pipeline", tmp_path / "cache")
    assert a.fingerprint == encode(images(), vae_folders["plain"], tmp_path / "cache").fingerprint


class Counted(Samples):
    """Samples that count what is read, and stop before a given row."""

    def __init__(self, samples: Samples, *, stop: int | None = None) -> None:
        self.__dict__ |= vars(samples)
        self.samples, self.stop, self.read = samples, stop, []

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int]) -> Batch:
        if self.stop in indices:
            raise KeyboardInterrupt
        self.read += list(indices)
        return self.samples.batch(indices)


def test_an_interrupted_encoding_goes_on_and_a_finished_one_is_not_repeated(
    tmp_path: Path, vae_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, seen = images(), []
    monkeypatch.setattr(vae_module, "PART", 2)
    with pytest.raises(KeyboardInterrupt):
        encode(Counted(samples, stop=5), vae_folders["plain"], tmp_path / "a", batch_size=2)
    assert not list((tmp_path / "a").rglob("moments.npy"))
    rest = Counted(samples)
    resumed = encode(rest, vae_folders["plain"], tmp_path / "a", batch_size=2, progress=lambda *done: seen.append(done))
    assert rest.read == [4, 5, 6]
    assert seen == [(6, 7), (7, 7)]
    whole = encode(samples, vae_folders["plain"], tmp_path / "b", batch_size=2)
    assert torch.equal(everything(resumed).x, everything(whole).x)
    assert resumed.fingerprint == whole.fingerprint
    # At once, and without diffusers.
    monkeypatch.setitem(sys.modules, "diffusers", None)
    finished = Counted(samples)
    assert torch.equal(everything(encode(finished, vae_folders["plain"], tmp_path / "a")).x, everything(whole).x)
    assert finished.read == []
    assert sorted(path.name for path in (tmp_path / "a").rglob("*") if path.is_file()) == [
        "checksums.json",
        "latents.json",
        "moments.npy",
    ]


def test_other_weights_and_other_images_are_encoded_anew(tmp_path: Path, vae_folders: dict[str, Path]) -> None:
    arguments = [(images(), "plain"), (images(), "other"), (images(seed=1), "plain")]
    encoded = [encode(samples, vae_folders[kind], tmp_path) for samples, kind in arguments]
    assert len({samples.fingerprint for samples in encoded}) == len(list(tmp_path.iterdir())) == 3
    for (samples, kind), found in zip(arguments, encoded, strict=True):
        mean, std = moments(vae_folders[kind], samples.x)
        z = mean + std * RandomStream(0, "latent").normal(samples.ids, (4, 4, 2))
        assert torch.allclose(everything(found).x, z * 0.18215, atol=1e-4)


def test_without_diffusers_it_is_asked_for(
    tmp_path: Path, vae_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs diffusers: pip install 'layerprobe\[diffusers\]'"):
        encode(images(), vae_folders["plain"], tmp_path)
    with pytest.raises(ModuleNotFoundError, match="needs diffusers"):
        decoder(vae_folders["plain"])(torch.zeros(1, 4, 2, 2))


def test_images_that_do_not_fit_the_autoencoder(tmp_path: Path, vae_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"images of 3 channels but these have shape \(1, 8, 8\); pass --channels"):
        encode(TensorSamples(torch.zeros(2, 1, 8, 8)), vae_folders["plain"], tmp_path)
    with pytest.raises(ValueError, match="multiples of 2 but the images have 8x7; pass --size"):
        encode(TensorSamples(torch.zeros(2, 3, 8, 7)), vae_folders["plain"], tmp_path)
    with pytest.raises(
        ValueError, match=r"latents have shape \(1, 3, 2, 2\) but the autoencoder decodes \(B, 4, h, w\)"
    ):
        decoder(vae_folders["plain"])(torch.zeros(1, 3, 2, 2))
    assert not list(tmp_path.iterdir())


def test_autoencoders_that_cannot_be_used(tmp_path: Path, vae_folders: dict[str, Path]) -> None:
    def folder(name: str) -> Path:
        return shutil.copytree(vae_folders["plain"], tmp_path / name)

    def check(place: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message) as caught:
            encode(images(), place, tmp_path / "cache")
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "cache").rglob("moments.npy"))

    check(tmp_path / "nothing", FileNotFoundError, "nothing contains no config.json")
    place = folder("class")
    (place / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    check(place, ValueError, "contains a AutoencoderDC but only AutoencoderKL is supported")
    for text, message in (
        ("[1", "is not valid JSON"),
        ("[1]", "holds a list, not keys and values"),
        ("{}", "is not a configuration of a diffusers model"),
    ):
        (place / "config.json").write_text(text)
        check(place, ValueError, message)
    for entry in (
        '"latent_channels": "four"', '"latents_std": 2', '"latents_mean": [0, 0, 0, "0"]', '"scaling_factor": "big"'
    ):  # fmt: skip
        (place / "config.json").write_text(f'{{"_class_name": "AutoencoderKL", {entry}}}')
        check(place, ValueError, "is not a configuration of an AutoencoderKL")
    place = folder("weights")
    weights = place / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    check(place, ValueError, "is not a complete AutoencoderKL .*encoder.conv_in.weight")
    weights.write_bytes(weights.read_bytes()[:1000])
    check(place, ValueError, "is not a complete AutoencoderKL")
    weights.unlink()
    check(place, FileNotFoundError, "contains no diffusion_pytorch_model")


def test_an_autoencoder_that_gives_nan_is_refused(tmp_path: Path, vae_folders: dict[str, Path]) -> None:
    place = shutil.copytree(vae_folders["plain"], tmp_path / "vae")
    path = place / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["quant_conv.bias"][:] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="values that are not finite for image 50; remove it"):
        encode(images(), place, tmp_path / "cache")


# One way in


@every_format
def test_a_folder_of_latents_is_data_like_any_other(tmp_path: Path, write: Callable[[Path, Tensor], Path]) -> None:
    folder = write(tmp_path, numbers(30, *SHAPE))
    splits = load(folder, expect_shape=SHAPE, num_train=6, latent_scale=2, require_labels=True)
    assert len(splits.train) == 6
    samples = load_latents(folder, scale=2)
    assert torch.equal(everything(splits.test).x, samples.batch(splits.test.ids.tolist()).x)
    with pytest.raises(ValueError, match="latents are 4x3x2 but the model takes 4x8x8; pass those that it was trained"):
        load(folder, expect_shape=(4, 8, 8))
    with pytest.raises(ValueError, match="holds latents, which are read as they are; leave out --size --channels"):
        load(folder, size=8, channels=3)


def test_latents_that_must_have_labels(tmp_path: Path) -> None:
    write_repa(tmp_path, numbers(9, *SHAPE), numbers(9, *SHAPE), labels=False)
    assert load(tmp_path).train.labels is None
    with pytest.raises(ValueError, match="has no labels; write them where"):
        load(tmp_path, require_labels=True)


def test_a_latent_scale_for_other_data_has_no_effect() -> None:
    with pytest.raises(ValueError, match="leave out --latent-scale"):
        load("digits", latent_scale=1.0)
    with pytest.raises(ValueError, match="holds no latents, so --latent-scale has no effect"):
        load("nothing", latent_scale=1.0)


def test_splits_of_images_are_encoded_into_the_cache(
    tmp_path: Path, vae_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    splits = split(images(30))
    encoded = encode_splits(splits, vae_folders["plain"], expect_shape=(4, 4, 2), latent_scale=1)
    for (_, before), (_, after) in zip(splits.items(), encoded.items(), strict=True):
        mean, _ = moments(vae_folders["plain"], everything(before).x)
        assert torch.equal(after.ids, before.ids)
        # Of random weights the deviation is about 1; drawn the same for the same id whatever the split.
        assert float((everything(after).x - mean).std()) == pytest.approx(1, abs=0.3)
    assert len(list((tmp_path / "layerprobe" / "latents").iterdir())) == 3
    with pytest.raises(ValueError, match=r"makes latents of 4x4x2 but the model takes 4x8x8; pass --size, or another"):
        encode_splits(splits, vae_folders["plain"], expect_shape=(4, 8, 8))


def test_labels_of_latents_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", np.zeros((8, 2, 2), np.float32))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[f"{i}.npy", i % 2] for i in range(6)]}))
    with pytest.raises(ValueError, match=r"2 of the 6 files that .*dataset.json names are not there \(first: 4.npy\)"):
        load_latents(tmp_path)


def test_what_was_read_of_latents(tmp_path: Path) -> None:
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", np.zeros((8, 2, 2), np.float32))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[f"{i}.npy", i % 2] for i in range(4)]}))
    (tmp_path / "README.md").touch()
    reading = load_latents(tmp_path).reading
    assert reading is not None
    assert (reading.files_read, reading.files_left, reading.num_classes) == (5, {".md": 1}, 2)


def test_a_file_with_two_classes_is_refused(tmp_path: Path) -> None:
    write_repa(tmp_path, numbers(4, *SHAPE), numbers(4, *SHAPE))
    (record,) = tmp_path.rglob("dataset.json")
    entries = json.loads(record.read_text())["labels"]
    record.write_text(json.dumps({"labels": [*entries, [entries[0][0], 1]]}))
    with pytest.raises(ValueError, match=r"names 1 files twice \(first: .*\.npy\); keep one entry of each"):
        load_latents(tmp_path)
