"""Pictures of samples: bodies seen from where they can be told, sound where it is, films as long as their samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bodies import NAMES, walk
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from layerprobe.analyses.figures.samples import FILM_COLUMNS, FILM_SIDE, NUM_FRAMES, NUM_POSES, SIDE_COLORS, film, strip
from layerprobe.analyses.figures.style import save_figure
from layerprobe.data.rendering import Rendering
from layerprobe.data.sequences.audio import AudioDecoder
from layerprobe.data.sequences.items import Normalization
from layerprobe.data.sequences.skeleton import find_skeleton

VIDEO = Rendering("video", 1, rate=5.0)
AUDIO = Rendering("audio", 2, rate=62.5, audio=AudioDecoder(8000))


def moved(clips: list[np.ndarray]) -> tuple[Tensor, Rendering]:
    """Clips of one length as samples, and the rendering of the data that they are of."""
    rendering = Rendering("motion", 1, skeleton=find_skeleton([walk(30, seed=i) for i in range(8)]))
    return torch.stack([torch.from_numpy(clip.reshape(len(clip), -1).T.copy()).float() for clip in clips]), rendering


def poses(figure: Figure, panel: int = 0) -> list[np.ndarray]:
    """Bones of each pose that is drawn, shape (bones, 2, 2)."""
    lines = [artist for artist in figure.axes[panel].collections if isinstance(artist, LineCollection)]
    return [np.array(artist.get_segments()) for artist in lines]


def turned(clip: np.ndarray, degrees: float) -> np.ndarray:
    """About the axis of the height."""
    angle = np.deg2rad(degrees)
    rotation = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    return clip @ np.array(rotation).T


def test_a_body_is_seen_alike_wherever_it_stands_and_goes() -> None:
    clip = walk(25)
    x, rendering = moved([clip, turned(clip, 77) + np.array([5, 0, -3])])
    figure = strip(x, rendering, ["as it is", "elsewhere"])
    first, second = poses(figure, 0), poses(figure, 1)
    assert len(first) == len(second) == NUM_POSES
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_bodies_walk_upright_to_the_right() -> None:
    clip = walk(25)
    x, rendering = moved([clip])
    drawn = poses(strip(x, rendering, ["walk"]))
    height = [pose[..., 1].max() - pose[..., 1].min() for pose in drawn]
    assert min(height) > 1.3
    # Who has one foot ahead in space has it to the right in the picture.
    assert rendering.skeleton is not None
    feet = [NAMES.index("foot1"), NAMES.index("foot2")]
    shown = np.linspace(0, 24, NUM_POSES).round().astype(int)
    ahead = clip[shown, feet[0], 2] - clip[shown, feet[1], 2]
    bones = sorted(
        rendering.skeleton.bones,
        key=lambda bone: -(rendering.skeleton.sides[bone[0]] or rendering.skeleton.sides[bone[1]]),
    )
    rows = [next(i for i, bone in enumerate(bones) if foot in bone) for foot in feet]
    seen = [pose[rows[0], :, 0].mean() - pose[rows[1], :, 0].mean() for pose in drawn]
    wide = np.abs(ahead) > 0.5
    assert wide.sum() >= 3
    assert (np.sign(ahead[wide]) == np.sign(np.array(seen)[wide])).all()


def test_left_and_right_have_colors_that_everybody_tells_apart() -> None:
    x, rendering = moved([walk(25)])
    colors = strip(x, rendering, ["walk"]).axes[0].collections[0].get_colors()
    assert {tuple(np.round(color[:3] * 255).astype(int)) for color in colors} == {
        tuple(int(value[i : i + 2], 16) for i in (1, 3, 5)) for value in SIDE_COLORS.values()
    }


def test_only_what_is_real_is_drawn(tmp_path: Path) -> None:
    clip = walk(20)
    x, rendering = moved([clip])
    mask = rendering.mask(torch.tensor([12]), tuple(x.shape[1:]))
    cut, whole = strip(x, rendering, ["a"], mask=mask), strip(x[..., :12], rendering, ["a"])
    np.testing.assert_array_equal(poses(cut), poses(whole))
    assert cut.axes[0].get_title(loc="left") == "a (12 frames)"
    assert strip(x, replace(rendering, rate=10.0), ["a"], mask=mask).axes[0].get_title(loc="left") == "a (1.2 s)"
    png, svg = save_figure(cut, tmp_path, "walk")
    assert png.stat().st_size > 5000
    assert "a (12 frames)" in svg.read_text()


def test_one_body_thrown_into_the_air_does_not_shrink_the_others() -> None:
    clips = [walk(25, seed=i) for i in range(5)]
    x, rendering = moved(clips)
    limits = strip(x, rendering, list("abcde")).axes[0].get_ylim()
    x[4, 1::3, 7] += 50
    thrown = strip(x, rendering, list("abcde")).axes[0].get_ylim()
    assert thrown[1] - thrown[0] < 1.5 * (limits[1] - limits[0])


def test_movements_without_a_body_show_their_channels() -> None:
    figure = strip(torch.randn(2, 7, 20), Rendering("motion", 1), ["a", "b"])
    image = figure.axes[0].images[0]
    assert image.get_array().shape == (7, 20)
    assert "no joint positions" in figure.get_suptitle()


def tone(hertz: float, seconds: float) -> Tensor:
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(round(8000 * seconds)) / 8000)


def test_a_tone_is_bright_at_its_frequency_and_lasts_as_long_as_it_sounds() -> None:
    decoder = AudioDecoder(8000)
    values = decoder.log_mel(tone(1000, 0.4))
    x = torch.zeros(1, 1, 32, 40)
    x[0, ..., : values.shape[2]] = (values + 3) / 2
    rendering = replace(AUDIO, normalization=Normalization(torch.tensor([-3.0]), torch.tensor([2.0])))
    mask = rendering.mask(torch.tensor([values.shape[2]]), (1, 32, 40))
    axes = strip(x, rendering, ["beep"], mask=mask).axes[0]
    picture = axes.images[0]
    assert picture.get_extent()[1] == pytest.approx(0.4, abs=0.02)
    assert float(picture.get_array().max()) == 0
    row = float(np.asarray(picture.get_array()).mean(1).argmax()) + 0.5
    ticks = dict(zip([tick.get_text() for tick in axes.get_yticklabels()], axes.get_yticks(), strict=True))
    assert row == pytest.approx(ticks["1"], abs=1)
    assert list(ticks) == ["0.25", "1", "3"]


def test_frames_of_a_waveform_make_the_same_picture_as_the_recording() -> None:
    wave = tone(700, 0.5)[: 128 * 31]
    framed = replace(AUDIO, time_axis=1, audio=AudioDecoder(8000, "waveform"))
    figure = strip(wave.view(-1, 128).T.unsqueeze(0), framed, ["a"])
    picture = np.asarray(figure.axes[0].images[0].get_array())
    expected = AudioDecoder(8000).log_mel(wave)[0].numpy() * 20 / np.log(10)
    np.testing.assert_allclose(picture, expected - expected.max(), atol=1e-3)


def test_frames_of_a_clip_stand_side_by_side_in_order() -> None:
    brightness = torch.linspace(-1, 1, 15).view(1, 1, 15, 1, 1).expand(1, 1, 15, 6, 6)
    mask = VIDEO.mask(torch.tensor([8]), (1, 15, 6, 6))
    figure = strip(brightness, VIDEO, ["fades"], mask=mask)
    row = np.asarray(figure.axes[0].images[0].get_array())[3, :, 0].astype(int)
    assert np.abs(row[3::7] - (np.linspace(-1, 1, 15)[:NUM_FRAMES] + 1) * 127.5).max() <= 0.5
    assert figure.axes[0].get_title(loc="left") == "fades (1.6 s)"


def test_a_film_lasts_as_long_as_its_samples(tmp_path: Path) -> None:
    x = torch.full((7, 3, 10, 4, 4), -1.0)
    x[:, 0, 5:] = 1.0  # they turn red
    mask = VIDEO.mask(torch.tensor([10, 3, 10, 10, 10, 10, 10]), (3, 10, 4, 4))
    film(x, VIDEO, [f"no {i}" for i in range(7)], tmp_path / "a.gif", mask=mask)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size[0] >= FILM_COLUMNS * FILM_SIDE
        shown = 0
        for frame in range(gif.n_frames):
            gif.seek(frame)
            shown += gif.info["duration"]
        last = np.asarray(gif.convert("RGB"))
    assert shown == 2000  # milliseconds: 10 frames at 5 a second
    assert last[60, 60].tolist() == [255, 0, 0]
    assert last[60, 200].tolist() == [0, 0, 0]  # the second ended before it turned red
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


def test_a_film_of_bodies_moves(tmp_path: Path) -> None:
    x, rendering = moved([walk(30), walk(30, seed=1)])
    film(x, rendering, ["a", "b"], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 15  # of 30 frames a second no more than 15
        assert gif.info["duration"] == 70
        pages = []
        for frame in (0, 3):
            gif.seek(frame)
            pages.append(np.asarray(gif.convert("RGB")).astype(int))
    assert (np.abs(pages[0] - pages[1]).sum(2) > 100).mean() > 0.005
    orange = (np.abs(pages[0] - [0xD5, 0x5E, 0]).sum(2) < 60).sum()
    assert orange > 50


def test_images_make_a_grid() -> None:
    figure = strip(torch.zeros(3, 1, 4, 4), None, ["a", "b", "c"])
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c"]


def test_what_cannot_be_drawn_is_said() -> None:
    x = torch.zeros(2, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="2 samples and 1 titles; pass at least one sample and a title for each"):
        strip(x, VIDEO, ["a"])
    with pytest.raises(ValueError, match="0 samples and 0 titles"):
        strip(x[:0], VIDEO, [])
    x[1, 0, 2, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="1 of 2 samples are not finite; leave them out"):
        strip(x, VIDEO, ["a", "b"])
