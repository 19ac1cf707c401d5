from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pictures import all_ids, labeled, noise, write_folder

from layerprobe.data import Subset, TensorSamples
from layerprobe.data.loading import load
from layerprobe.data.splits import for_probing, keyed_order, split, take


def test_single_part_is_divided_60_20_20() -> None:
    splits = split(labeled([50, 30, 20]))
    ids = all_ids(splits)
    assert {name: len(part) for name, part in ids.items()} == {"train": 60, "validation": 20, "test": 20}
    assert set.union(*ids.values()) == set(range(100))
    for samples, counts in zip(
        (splits.train, splits.validation, splits.test), ([30, 18, 12], [10, 6, 4], [10, 6, 4]), strict=True
    ):
        assert samples.labels is not None
        assert (samples.labels.bincount(minlength=3) - torch.tensor(counts)).abs().max() <= 1


def test_report_comes_from_the_test_part() -> None:
    train, test, validation = labeled([50, 50]), labeled([30, 30], first=10**9), labeled([9, 9], first=2 * 10**9)
    for parts, held_out in (
        ({"train": train, "test": test}, test),
        ({"validation": validation, "train": train, "test": test}, test),
        ({"train": train, "val": validation}, validation),
    ):
        splits = split(parts)
        assert set(splits.test.ids.tolist()) == set(held_out.ids.tolist())
        assert len(splits.train) == 80
        assert set(splits.train.ids.tolist()) | set(splits.validation.ids.tolist()) == set(train.ids.tolist())
    assert len(split({"train": train, "other": test}).test) == 20  # of train


def test_probing_takes_no_more_than_it_needs_unless_told() -> None:
    owned = split({"train": labeled([30_000, 20_000]), "test": labeled([6000, 4000], first=10**9)})
    assert [len(samples) for _, samples in owned.items()] == [40_000, 10_000, 10_000]
    assert len(for_probing(take(owned, num_train=9000), given={"num_train": 9000}).train) == 9000
    splits = for_probing(owned, given={})
    assert [len(samples) for _, samples in splits.items()] == [8000, 2000, 5000]
    assert [samples.labels.bincount().tolist() for _, samples in splits.items() if samples.labels is not None] == [
        [4800, 3200],
        [1200, 800],
        [3000, 2000],
    ]


def test_same_sample_stays_on_its_side_whatever_the_counts() -> None:
    data = labeled([40, 60])
    every = all_ids(split(data))
    for num_train, num_validation, num_test in ((10, 5, 5), (60, 20, 20), (33, 7, 19)):
        some = all_ids(split(data, num_train=num_train, num_validation=num_validation, num_test=num_test))
        assert all(some[name] <= every[name] for name in every)
        assert [len(part) for part in some.values()] == [num_train, num_validation, num_test]
        assert sum(map(len, some.values())) == len(set.union(*some.values()))


def test_splits_depend_on_ids_and_seed_and_not_on_the_order() -> None:
    data = labeled([40, 60])
    shuffled = Subset(data, torch.randperm(100, generator=torch.Generator().manual_seed(0)), name="shuffled")
    first, again, other = split(data, num_train=20), split(shuffled, num_train=20), split(data, num_train=20, seed=1)
    for (_, a), (_, b), (_, c) in zip(first.items(), again.items(), other.items(), strict=True):
        assert a.ids.tolist() == b.ids.tolist() != c.ids.tolist()
    assert first.train.fingerprint == split(data, num_train=20).train.fingerprint != other.train.fingerprint


def test_order_is_that_of_splitmix64() -> None:
    # Another release, platform or numpy must divide the same data in the same way.
    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    golden = 0x9E3779B97F4A7C15
    assert mix(golden) == 0xE220A8397B1DCDAF  # the first number of the published generator from seed 0
    ids = [0, 1, 2, 3, 10**9, 2 * 10**9, 2**40, 2**62]
    samples = TensorSamples(torch.zeros(8, 1, 1, 1), ids=torch.tensor(ids))
    for seed in (0, 1, 2**63 - 1):
        keys = [mix((mix((seed + golden) % 2**64) + i * golden) % 2**64) for i in ids]
        assert keyed_order(samples, seed=seed).tolist() == sorted(range(8), key=keys.__getitem__)


def test_order_is_uniform() -> None:
    unlabeled = TensorSamples(torch.zeros(20_000, 1, 1, 1))
    order = keyed_order(unlabeled, seed=3).double()
    assert sorted(order.tolist()) == list(range(20_000))
    # Correlations of permutations have standard deviation 1/sqrt(n) = 0.007: four of them.
    for lag in (1, 2, 7):
        assert abs(torch.corrcoef(torch.stack([order[:-lag], order[lag:]]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([order, torch.arange(20_000).double()]))[0, 1]) < 0.03
    other = keyed_order(unlabeled, seed=4).double()
    assert abs(torch.corrcoef(torch.stack([order, other]))[0, 1]) < 0.03


def test_every_beginning_holds_every_class() -> None:
    data = labeled([20] * 50)
    splits = split(data, num_train=50, num_validation=50, num_test=100)
    assert splits.train.labels is not None
    assert splits.test.labels is not None
    assert splits.train.labels.bincount().tolist() == [1] * 50
    assert splits.test.labels.bincount(minlength=50).tolist() == [2] * 50


def test_impossible_splits_are_refused() -> None:
    data, unlabeled = labeled([40, 60]), TensorSamples(torch.zeros(4, 1, 2, 2), ids=torch.arange(10**9, 10**9 + 4))
    for name, most in (("train", 60), ("validation", 20), ("test", 20)):
        with pytest.raises(
            ValueError, match=f"--num-{name} asks for {most + 1} samples but that split has {most}; pass at"
        ):
            split(data, **{f"num_{name}": most + 1})
        with pytest.raises(ValueError, match=f"--num-{name} is 0; pass at least 1"):
            split(data, **{f"num_{name}": 0})
    with pytest.raises(
        ValueError, match=r"training split of 3 samples lacks 7 of 10 classes \(first: .\); pass a larger --num-train"
    ):
        split(labeled([10] * 10), num_train=3)
    with pytest.raises(
        ValueError, match=r"2 of 3 classes have fewer than 2 samples \(first: 0\); pass --min-per-class"
    ):
        split(labeled([1, 30, 1]))
    named = TensorSamples(torch.zeros(9, 1, 2, 2), torch.tensor([0] * 8 + [1]), class_names=("cat", "dog", "emu"))
    with pytest.raises(ValueError, match=r"2 of 3 classes have fewer than 2 samples \(first: dog\)"):
        split(named)
    with pytest.raises(ValueError, match="2 samples are too few for three splits; pass at least 5"):
        split(TensorSamples(torch.zeros(2, 1, 2, 2)))
    with pytest.raises(
        ValueError, match="the data has the parts a, b, but none is named train; pass one of them as --sp"
    ):
        split({"a": data, "b": data})
    with pytest.raises(ValueError, match="the data has the parts nothing"):
        split({})
    with pytest.raises(ValueError, match="20 sample ids occur twice; give every sample a unique id"):
        split({"train": data, "test": Subset(split(data).train, range(20), name="leak")})
    with pytest.raises(ValueError, match="only train has labels; pass --split train"):
        split({"train": data, "test": unlabeled})
    with pytest.raises(ValueError, match=r"train has 2 classes and test has 3, or their names differ"):
        split({"train": data, "test": labeled([2, 2, 2], first=10**9)})
    with pytest.raises(ValueError, match=r"train has shape \(1, 2, 2\) but test has \(1, 4, 4\)"):
        split({"train": data, "test": TensorSamples(torch.zeros(4, 1, 4, 4), ids=torch.arange(10**9, 10**9 + 4))})
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"seed must be between 0 and .*, got {seed}"):
            split(data, seed=seed)


def test_five_samples_are_enough_and_taking_all_is_the_same() -> None:
    splits = split(TensorSamples(torch.arange(5.0).view(5, 1, 1, 1)))
    assert [len(samples) for _, samples in splits.items()] == [3, 1, 1]
    assert all_ids(take(splits)) == all_ids(splits)


def test_a_single_class_is_refused_before_a_probing_run() -> None:
    one = split(labeled([30]))
    with pytest.raises(ValueError, match=r"all samples are of one class \(0\), .* or --label-column none"):
        for_probing(one, given={})


def test_classes_that_only_the_held_out_part_has_are_refused(tmp_path: Path) -> None:
    for part, names in (("train", ("Cat", "dog")), ("test", ("cat", "dog"))):
        write_folder(tmp_path / part, noise(12), names)
    with pytest.raises(ValueError, match=r"1 of 3 classes have samples in the held-out part and none in train .*: cat"):
        load(tmp_path)
    assert load(tmp_path, min_per_class=2).train.class_names == ("Cat", "dog")
