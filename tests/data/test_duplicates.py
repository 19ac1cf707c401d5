"""Equal samples: counted against a comparison of all pairs, kept in one split, and left out where they do harm."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encode, labeled, noise, write_parquet

from layerprobe.data import duplicates, images
from layerprobe.data.duplicates import digests, groups, without_copies
from layerprobe.data.images import load_images
from layerprobe.data.latents.layouts import load_latents
from layerprobe.data.loading import load
from layerprobe.data.samples import Copies, Samples, Splits, Subset, TensorSamples
from layerprobe.data.splits import for_probing, keyed_order, split


def repeated(num: int, contents: int, *, first_id: int = 0, seed: int = 0, classes: int = 3) -> TensorSamples:
    """Samples that repeat a few contents, with labels drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(contents, (num,), generator=generator)
    labels = torch.randint(classes, (num,), generator=generator)
    x = torch.rand(contents, 2, 3, 3, generator=torch.Generator().manual_seed(9))[which]
    return TensorSamples(x, labels, ids=torch.arange(first_id, first_id + num), class_names=("a", "b", "c")[:classes])


def equal_pairs(samples: Samples) -> list[tuple[int, int]]:
    x = samples.batch(range(len(samples))).x
    return [(i, j) for i, j in combinations(range(len(x)), 2) if bool((x[i] == x[j]).all())]


def test_copies_are_counted_as_a_comparison_of_all_pairs_counts_them() -> None:
    parts = [repeated(30, 25, seed=1), repeated(20, 25, seed=2, first_id=100), repeated(20, 25, seed=3, first_id=200)]
    splits = without_copies(Splits(*parts))
    names = ("train", "validation", "test")
    content = [(name, row) for name, part in zip(names, parts, strict=True) for row in part.x]
    labels = torch.cat([part.labels for part in parts if part.labels is not None]).tolist()
    expected: dict[tuple[str, str], int] = {}
    other_class: dict[tuple[str, str], int] = {}
    left: dict[str, int] = {}
    for i, (name, row) in enumerate(content):
        first, before = next(((j, other) for j, (other, x) in enumerate(content[:i]) if torch.equal(x, row)), (i, None))
        if before is not None:
            expected[name, before] = expected.get((name, before), 0) + 1
            other_class[name, before] = other_class.get((name, before), 0) + (labels[i] != labels[first])
        if before is None or name == "train":
            left[name] = left.get(name, 0) + 1
    assert {(copies.split, copies.of): copies.num for copies in splits.copies} == expected
    assert len(expected) >= 5
    assert {name: len(samples) for name, samples in splits.items()} == left
    assert {(copies.split, copies.of): copies.num_contradictions for copies in splits.copies} == other_class
    assert sum(other_class.values()) > 0
    test = ("test", "train")
    assert Copies(*test, expected[test], 20, is_left_out=True, num_contradictions=other_class[test]) in splits.copies
    train = ("train", "train")
    assert (
        Copies(*train, expected[train], 30, is_left_out=False, num_contradictions=other_class[train]) in splits.copies
    )
    kept = torch.cat([splits.validation.batch(range(len(splits.validation))).x, splits.test.batch(range(2)).x])
    assert not any(torch.equal(x, y) for x in kept for y in parts[0].x)


def test_data_without_copies_stay_as_they_are() -> None:
    splits = split(labeled([30, 30]))
    assert without_copies(splits) == splits
    assert without_copies(splits).copies == ()


def test_equal_samples_are_in_one_split_and_the_shares_are_those_of_different_samples() -> None:
    data = repeated(300, 100)
    assert len(equal_pairs(data)) > 200
    splits = split(data)
    where = {int(i): name for name, samples in splits.items() for i in samples.ids}
    assert len(where) == 300
    assert all(where[i] == where[j] for i, j in equal_pairs(data))
    different = {name: len(np.unique(groups(samples))) for name, samples in splits.items()}
    total = sum(different.values())
    assert different == {"train": round(0.6 * total), "validation": round(0.8 * total) - round(0.6 * total)} | {
        "test": total - round(0.8 * total)
    }
    # Nothing is left to leave out across splits.
    assert all(copies.split == copies.of for copies in for_probing(splits, given={}).copies)


def test_validation_is_divided_from_a_train_part_without_copies() -> None:
    splits = split({"train": repeated(200, 60), "test": repeated(40, 60, first_id=10**9)})
    train, validation = (samples.batch(range(len(samples))).x for samples in (splits.train, splits.validation))
    assert not any(torch.equal(x, y) for x in validation for y in train)


def test_without_copies_the_division_is_that_of_the_order_alone() -> None:
    data = labeled([40, 60])
    order = keyed_order(data, seed=5)
    splits = split(data, seed=5)
    assert splits.train.ids.tolist() == order[:60].tolist()
    assert splits.validation.ids.tolist() == order[60:80].tolist()
    assert splits.test.ids.tolist() == order[80:].tolist()


def test_labels_at_random_are_not_learned_from_copies() -> None:
    """Nearest neighbor on copies with their class: it knows all of them if a copy is in training, else only chance."""
    generator = torch.Generator().manual_seed(0)
    x, classes = torch.rand(100, 1, 4, 4, generator=generator), torch.randint(3, (100,), generator=generator)
    data = TensorSamples(x.repeat(3, 1, 1, 1), classes.repeat(3), class_names=("a", "b", "c"))

    def accuracy(splits: Splits) -> tuple[float, int]:
        train, test = (samples.batch(range(len(samples))) for samples in (splits.train, splits.test))
        assert train.labels is not None
        assert test.labels is not None
        nearest = torch.cdist(test.x.flatten(1), train.x.flatten(1)).argmin(1)
        return float((train.labels[nearest] == test.labels).float().mean()), len(test.x)

    order = keyed_order(data, seed=0)
    apart = Splits(
        *(Subset(data, order[part], name=str(part)) for part in (slice(180), slice(180, 240), slice(240, 300)))
    )
    assert accuracy(apart)[0] > 0.85
    known, num = accuracy(for_probing(split(data), given={}))
    majority = float(classes.bincount().max()) / 100
    # Four standard errors of a binomial at the share of the most frequent class.
    assert known < majority + 4 * (majority * (1 - majority) / num) ** 0.5
    assert accuracy(for_probing(apart, given={}))[1] < 10


def test_a_split_of_copies_alone_is_refused() -> None:
    train = labeled([20, 20])
    copies = TensorSamples(train.x[:10], torch.arange(10) % 2, ids=torch.arange(10) + 10**9)
    with pytest.raises(
        ValueError, match="all test samples are copies of samples in other splits; pass data whose sampl"
    ):
        for_probing(split({"train": train, "test": copies}), given={})


def test_too_few_different_samples_are_divided_and_not_probed() -> None:
    splits = split(TensorSamples(torch.zeros(20, 1, 2, 2)))
    assert [len(samples) for _, samples in splits.items()] == [12, 4, 4]
    with pytest.raises(ValueError, match="all validation samples are copies of samples in other splits; pass data"):
        for_probing(splits, given={})


def test_hashes_do_not_depend_on_the_chunk_and_equal_numbers_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    data = repeated(20, 8)
    whole = digests(data)
    monkeypatch.setattr(duplicates, "_CHUNK_BYTES", 100)
    assert digests(data) == whole
    zero, minus, one = digests(TensorSamples(torch.tensor([0.0, -0.0, 1.0]).view(3, 1, 1, 1)))
    assert zero == minus != one


def test_files_of_equal_bytes_stay_together_and_equal_pixels_are_left_out(tmp_path: Path) -> None:
    images = noise(40)
    files = [encode(image) for image in images for _ in range(2)]
    splits = load(write_parquet(tmp_path / "a" / "data.parquet", files, label=[i % 2 for i in range(80)]))
    where = {int(i): name for name, samples in splits.items() for i in samples.ids}
    assert all(where[2 * i] == where[2 * i + 1] for i in range(40))
    # The same pixels in another format: only reading them shows it.
    files = [encode(image, kind) for kind in ("PNG", "BMP") for image in images]
    splits = for_probing(load(write_parquet(tmp_path / "b" / "data.parquet", files)), given={})
    assert any(copies.split == "test" and copies.of == "train" for copies in splits.copies)
    x = [samples.batch(range(len(samples))).x for _, samples in splits.items()]
    assert not any(torch.equal(one, other) for one in torch.cat(x[1:]) for other in x[0])
    # Pixels of files and samples that are numbers.
    numbers = TensorSamples(x[0][:5], torch.arange(5) % 2, ids=torch.arange(5) + 10**9)
    mixed = without_copies(Splits(splits.train, Subset(splits.train, [], name="none"), numbers))
    assert [(copies.of, copies.num) for copies in mixed.copies if copies.split == "test"] == [("train", 5)]


def test_files_are_hashed_once_and_again_only_where_they_look_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, digest_of = [], images.digest_of
    monkeypatch.setattr(images, "digest_of", lambda content: hashed.append(content) or digest_of(content))
    files = [encode(image, "BMP") for image in noise(12)]
    middle = len(files[3]) // 2
    files[4] = files[3][:middle] + bytes([files[3][middle] ^ 1]) + files[3][middle + 1 :]  # seen in no few bytes
    files[9] = files[3]
    (data,) = load_images(write_parquet(tmp_path / "data.parquet", files)).values()
    assert hashed == []
    assert groups(data).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 10, 11]
    assert hashed == [files[3], files[4], files[3]]


def test_clips_of_equal_content_stay_together(tmp_path: Path) -> None:
    for i in range(20):
        values = np.random.default_rng(i // 2).normal(size=(4, 3))
        np.save(tmp_path / f"{i:02}.npy", values)
    splits = load(tmp_path)
    where = {int(i): name for name, samples in splits.items() for i in samples.ids}
    assert all(where[2 * i] == where[2 * i + 1] for i in range(10))


def test_a_clip_is_one_sample_so_its_frames_are_in_one_split(tmp_path: Path) -> None:
    for i in range(10):
        np.save(tmp_path / f"{i:02}.npy", np.random.default_rng(i).normal(size=(50, 3)))
    splits = load(tmp_path, length=8)
    assert sum(len(samples) for _, samples in splits.items()) == 10


def test_copies_of_latents_are_found_before_they_are_drawn(tmp_path: Path) -> None:
    """Each draw from the posterior is another, so the drawn latents of one image differ."""
    folder = tmp_path / "vae-sd"
    folder.mkdir()
    for i in range(10):
        moments = np.random.default_rng(i // 2).random((4, 2, 2)).astype(np.float32)
        np.save(folder / f"{i}.npy", moments)
    (folder / "dataset.json").write_text('{"labels": null}')
    samples = load_latents(folder)
    x = samples.batch(range(10)).x
    assert not torch.equal(x[0], x[1])
    assert groups(samples).tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
