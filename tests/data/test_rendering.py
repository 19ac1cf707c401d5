"""What a sample stands for: bodies found in their movements, lengths as the data has them, values turned back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bodies import BONES, NAMES, walk
from torch import Tensor

from layerprobe.data.rendering import Rendering, rendering_of
from layerprobe.data.samples import Subset, TensorSamples
from layerprobe.data.sequences.audio import AudioDecoder
from layerprobe.data.sequences.items import MediaSamples, Normalization
from layerprobe.data.sequences.motion import load_motion
from layerprobe.data.sequences.skeleton import Skeleton, find_skeleton

# Proper rotations of the axes: data with y, z or -y up.
TURNS = {
    "y up": np.eye(3),
    "z up": np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]]),
    "y down": np.diag([1, -1, -1]),
}


def walks(n: int = 12, **options: float) -> list[np.ndarray]:
    return [walk(30 + i % 3, seed=i, **options) for i in range(n)]


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("noise", [0.0, 0.001])
def test_the_bones_of_a_walker_are_found_whatever_the_order_of_its_joints(turn: str, noise: float) -> None:
    random = np.random.default_rng(1)
    order = random.permutation(len(NAMES))
    clips = [(clip + noise * random.standard_normal(clip.shape))[:, order] @ TURNS[turn].T for clip in walks()]
    found = find_skeleton(clips)
    assert found is not None
    names = [NAMES[joint] for joint in order]
    assert {frozenset((names[a], names[b])) for a, b in found.bones} == BONES
    assert np.array_equal(found.up, TURNS[turn] @ [0, 1, 0])
    assert found.head is not None
    assert names[found.head] == "head"
    # Left is where it is because the body walks ahead: 1 for all joints of the left arm and leg, 0 for the trunk.
    sides = {"1": 1, "2": -1}
    assert list(found.sides) == [sides.get(name[-1], 0) for name in names]


def test_bodies_of_other_sizes_and_a_fixed_origin_change_nothing() -> None:
    clips = walks()
    alone = find_skeleton(clips)
    fixed = [np.concatenate([np.zeros((len(clip), 1, 3)), clip * (1 + 0.02 * i)], 1) for i, clip in enumerate(clips)]
    found = find_skeleton(fixed)
    assert alone is not None
    assert found is not None
    assert [(a - 1, b - 1) for a, b in found.bones] == list(alone.bones)
    assert found.sides[1:] == alone.sides
    assert found.joints == list(range(1, 17))


def test_what_are_no_positions_has_no_body() -> None:
    random = np.random.default_rng(0)
    assert find_skeleton([random.standard_normal((40, 10, 3)) for _ in range(8)]) is None
    assert find_skeleton([random.standard_normal((40, 1, 3))]) is None
    assert find_skeleton([random.standard_normal((1, 2, 3))]) is None  # one frame, two joints
    assert find_skeleton([np.zeros((5, 4, 3))]) is None


def test_one_frame_still_makes_a_body() -> None:
    found = find_skeleton([walk(1)])
    assert found is not None
    assert found.joints == list(range(len(NAMES)))


def saved_walks(folder: Path, n: int = 10) -> list[np.ndarray]:
    """Two classes of arrays in files, in the order in which they are read."""
    clips = [walk(8 + i, seed=i) + np.array([i, 0, 2 * i]) for i in range(n)]
    for i, clip in enumerate(clips):
        place = folder / "ab"[i >= n // 2] / f"{i:02d}.npy"
        place.parent.mkdir(exist_ok=True, parents=True)
        np.save(place, clip)
    return clips


@pytest.mark.parametrize("root", [None, 0])
def test_positions_come_back_from_what_the_model_sees(tmp_path: Path, root: int | None) -> None:
    clips = saved_walks(tmp_path)
    samples = load_motion(tmp_path, root_joint=root)["train"]
    rendering, batch = rendering_of(samples), samples.batch(range(len(samples)))
    assert rendering is not None
    assert batch.mask is not None
    kept = Rendering.from_dict(json.loads(json.dumps(rendering.to_dict())))
    for x, length, clip in zip(batch.x, rendering.lengths_of(batch.mask).tolist(), clips, strict=True):
        found = kept.positions(x, length)
        assert found.shape == clip.shape
        # Relative to where the pelvis stood, on the floor.
        np.testing.assert_allclose(found, clip - clip[0, 0] * [1, 0, 1], atol=1e-5)
    assert kept.skeleton == rendering.skeleton
    assert kept.to_dict() == rendering.to_dict()


def test_limbs_about_a_root_do_not_vary_with_the_place(tmp_path: Path) -> None:
    saved_walks(tmp_path)
    spread = [rendering_of(load_motion(tmp_path, root_joint=root)["train"]).normalization.std for root in (None, 0)]  # type: ignore[union-attr]
    ahead = torch.arange(5, 48, 3)  # of every joint but the pelvis
    assert float(spread[1][ahead].mean()) < 0.5 * float(spread[0][ahead].mean())
    assert torch.equal(spread[0][:3], spread[1][:3])


def test_a_root_that_is_not_there_is_named(tmp_path: Path) -> None:
    saved_walks(tmp_path)
    with pytest.raises(ValueError, match="it has 48 channels, which do not include the 3 coordinates of joint 16"):
        load_motion(tmp_path, root_joint=16)
    with pytest.raises(ValueError, match="--root-joint needs a vertical axis"):
        load_motion(tmp_path, root_joint=1, up_axis=None)


def test_the_form_outlives_a_subset_and_images_have_none(tmp_path: Path) -> None:
    saved_walks(tmp_path)
    samples = load_motion(tmp_path)["train"]
    assert isinstance(samples, MediaSamples)
    whole, part = rendering_of(samples), rendering_of(Subset(Subset(samples, range(4), name="a"), [1], name="b"))
    assert part is not None
    assert part.to_dict() == whole.to_dict()
    assert rendering_of(TensorSamples(torch.zeros(2, 1, 4, 4))) is None


def lengths_rendering(*rows: tuple[int, ...]) -> Rendering:
    return Rendering("motion", 1, lengths=rows)


def test_lengths_are_drawn_as_each_class_has_them(tmp_path: Path) -> None:
    saved_walks(tmp_path)
    rendering = rendering_of(load_motion(tmp_path)["train"])
    assert rendering is not None
    assert [(row[0], row[-1]) for row in rendering.lengths] == [(8, 12), (13, 17)]
    labels = torch.arange(400) % 2
    drawn = rendering.draw_lengths(torch.arange(400), labels, seed=0)
    for label, low in ((0, 8), (1, 13)):
        own = drawn[labels == label]
        assert (int(own.min()), int(own.max())) == (low, low + 4)
        assert float(own.double().mean()) == pytest.approx(low + 2, abs=0.3)
    either = rendering.draw_lengths(torch.arange(400), torch.full((400,), 2), seed=0)  # no label
    assert (int(either.min()), int(either.max())) == (8, 17)
    assert float(either.double().mean()) == pytest.approx(12.5, abs=0.6)
    assert torch.equal(rendering.draw_lengths(torch.arange(400), None, seed=0), either)


def test_a_length_depends_on_the_sample_and_not_on_the_batch() -> None:
    rendering = lengths_rendering((1, 5, 30), (2, 2, 9))
    labels = torch.tensor([0, 1, 1, 0, 2])
    together = rendering.draw_lengths(torch.arange(5), labels, seed=3)
    alone = [rendering.draw_lengths(torch.tensor([i]), labels[i : i + 1], seed=3) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, rendering.draw_lengths(torch.arange(5), labels, seed=4))


def test_data_of_one_length_has_none_to_draw(tmp_path: Path) -> None:
    saved_walks(tmp_path)
    rendering = rendering_of(load_motion(tmp_path, length=8)["train"])
    assert rendering is not None
    assert rendering.lengths == ()


@pytest.mark.parametrize(("shape", "axis"), [((2, 7), 1), ((1, 4, 7), 2), ((3, 7, 2, 2), 1)])
def test_lengths_and_masks_are_the_same_thing(shape: tuple[int, ...], axis: int) -> None:
    lengths = torch.tensor([1, 7, 3])
    rendering = Rendering("x", axis)
    mask = rendering.mask(lengths, shape)
    assert mask.shape == (3, *shape[1:])
    assert torch.equal(rendering.lengths_of(mask), lengths)
    for row, length in zip(mask, lengths.tolist(), strict=True):
        real = row.movedim(axis - 1, 0)
        assert bool(real[:length].all())
        assert not bool(real[length:].any())


def test_forms_of_every_modality_are_json() -> None:
    forms = [
        Rendering(
            "audio", 2, Normalization(torch.tensor([1.5]), torch.tensor([2.0])), ((1, 2),), 62.5, AudioDecoder(8000)
        ),
        Rendering("motion", 1, skeleton=Skeleton(((0, 1),), (0, 0), (0.0, 0.0, 1.0), None), root=(0, 2)),
        Rendering("video", 1, rate=10.0),
    ]
    for rendering in forms:
        kept = Rendering.from_dict(json.loads(json.dumps(rendering.to_dict())))
        assert kept.to_dict() == rendering.to_dict()
        assert (kept.audio, kept.skeleton, kept.root, kept.lengths) == (
            rendering.audio,
            rendering.skeleton,
            rendering.root,
            rendering.lengths,
        )
    x = torch.randn(1, 4, 5)
    turned_back: Tensor = forms[0].values(x, 3)
    torch.testing.assert_close(turned_back, x[..., :3] * 2 + 1.5)


def test_the_body_of_real_motion_capture_is_found(shared_data: Path) -> None:
    rendering = rendering_of(next(iter(load_motion(shared_data / "motion" / "test.parquet", stride=8).values())))
    assert rendering is not None
    assert rendering.skeleton is not None
    # Joints as the data set lists them: a fixed origin, the trunk to the head, two arms, two legs.
    assert list(rendering.skeleton.sides) == [0] * 6 + [1] * 4 + [-1] * 4 + [1] * 4 + [-1] * 4
    assert (rendering.skeleton.head, rendering.skeleton.up) == (5, (0.0, 1.0, 0.0))
    assert rendering.skeleton.joints == list(range(1, 22))
