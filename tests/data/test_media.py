"""Audio, motion and video through the data room: right values, right padding, and one line for whatever is wrong."""

from __future__ import annotations

import io
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from layerprobe.data import tables
from layerprobe.data.listing import list_files
from layerprobe.data.loading import guess_modality, load
from layerprobe.data.sequences import audio
from layerprobe.data.sequences.audio import AudioDecoder, load_audio, mel_filters, write_wav
from layerprobe.data.sequences.bvh import bvh_positions
from layerprobe.data.sequences.items import MediaSamples, Normalization, load_media
from layerprobe.data.sequences.motion import load_motion
from layerprobe.data.sequences.video import load_video

RATE = 8000


def tone(frequency: float, duration_s: float = 0.5, rate: int = RATE) -> NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(duration_s * rate)) / rate)


def wav_bytes(signal: NDArray[np.float64], rate: int = RATE) -> bytes:
    """Written by the standard library, not by what reads it."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        channels = 1 if signal.ndim == 1 else signal.shape[1]
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((signal * 32767).astype("<i2").tobytes())
    return file.getvalue()


def only(parts: dict[str, Any]) -> MediaSamples:
    (samples,) = parts.values()
    assert isinstance(samples, MediaSamples)
    return samples


def values(samples: MediaSamples, index: int) -> Tensor:
    """The real part of a sample, with its normalization undone."""
    batch = samples.batch([index])
    x = batch.x[0] if samples.normalization is None else samples.normalization.invert(batch.x[0])
    edges = [
        int(batch.real[0].any(tuple(a for a in range(x.ndim - 1) if a != axis)).sum()) for axis in range(x.ndim - 1)
    ]
    return x[(slice(None), *(slice(edge) for edge in edges))]


class TestMotion:
    @staticmethod
    def folder(path: Path, clips: dict[str, NDArray[Any]]) -> Path:
        for name, clip in clips.items():
            place = path / f"{name}.npy"
            place.parent.mkdir(parents=True, exist_ok=True)
            np.save(place, clip)
        return path

    def test_clips_of_unequal_length_are_padded_and_masked(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        clips = {f"walk/{i}": rng.normal(1e3, 2, (length, 4)) for i, length in enumerate((5, 9, 7))}
        samples = only(load_motion(self.folder(tmp_path, clips), up_axis=None))
        assert samples.shape == (4, 9)
        batch = samples.batch([0, 1, 2])
        assert batch.real.sum(1).tolist() == [5, 9, 7]
        assert float(batch.x[0, :, 5:].abs().max()) == 0
        for i in range(3):
            # Six digits of a float32 near 1000.
            np.testing.assert_allclose(values(samples, i).T.numpy(), clips[f"walk/{i}"], atol=1e-3)
        stacked = np.concatenate(list(clips.values()))
        assert samples.normalization is not None
        np.testing.assert_allclose(samples.normalization.mean, stacked.mean(0), rtol=1e-6)
        np.testing.assert_allclose(samples.normalization.std, stacked.std(0), rtol=1e-5)

    def test_long_clips_keep_their_middle_and_the_stride_counts_first(self, tmp_path: Path) -> None:
        ramp = np.arange(40.0)[:, None].repeat(2, axis=1)
        samples = only(load_motion(self.folder(tmp_path, {"a/0": ramp, "b/1": ramp}), length=10, stride=2))
        torch.testing.assert_close(values(samples, 0)[0], torch.arange(10.0, 30.0, 2))
        assert samples.batch([0]).mask is None  # nothing is padded anywhere

    def test_a_walk_looks_the_same_wherever_it_begins(self, tmp_path: Path) -> None:
        walk = np.random.default_rng(0).normal(size=(6, 2, 3))
        moved = walk + np.array([5.0, 0.0, -7.0])
        lifted = walk + np.array([0.0, 3.0, 0.0])
        samples = only(load_motion(self.folder(tmp_path, {"a/0": walk, "a/1": moved, "b/2": lifted})))
        torch.testing.assert_close(values(samples, 0), values(samples, 1), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            values(samples, 2) - values(samples, 0),
            torch.tensor([0.0, 3, 0, 0, 3, 0]).view(6, 1).expand(6, 6),
            atol=1e-5,
            rtol=0,
        )

    def test_folders_of_classes_and_parts(self, tmp_path: Path) -> None:
        clip = np.random.default_rng(0).normal(size=(6, 3))
        names = [f"{part}/{kind}/{i}" for part in ("train", "test") for kind in ("run", "walk") for i in range(3)]
        self.folder(tmp_path, {name: clip + i for i, name in enumerate(names)})
        parts = load_motion(tmp_path)
        assert set(parts) == {"train", "test"}
        assert parts["train"].class_names == ("run", "walk")
        assert parts["test"].labels is not None
        assert parts["test"].labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert not set(parts["train"].ids.tolist()) & set(parts["test"].ids.tolist())
        train, test = parts["train"], parts["test"]
        assert isinstance(train, MediaSamples)
        assert isinstance(test, MediaSamples)
        assert test.normalization is train.normalization

    def test_a_joint_that_never_moves_keeps_its_unit(self, tmp_path: Path) -> None:
        clip = np.random.default_rng(0).normal(size=(6, 2))
        clip[:, 1] = 1e4
        x = only(load_motion(self.folder(tmp_path, {"0": clip, "1": clip}))).batch([0]).x
        assert float(x[0, 1].abs().max()) == 0

    @pytest.mark.parametrize(
        ("clip", "said"),
        [
            (np.full((4, 3), np.nan), "it contains NaN or infinite values"),
            (np.zeros((0, 3)), r"it has shape \(0, 3\)"),
            (np.zeros(5), r"it has shape \(5,\), not \(frames, channels\)"),
            (np.array(["a", "b"]), "it contains values of type <U1"),
        ],
    )
    def test_a_bad_clip_is_named(self, tmp_path: Path, clip: NDArray[Any], said: str) -> None:
        self.folder(tmp_path, {"a": np.ones((4, 3)), "b": clip, "c": np.zeros((4, 3))})
        with pytest.raises(ValueError, match=rf"item 1 of train \(.*b\.npy\) cannot be read: {said}.*--skip-bad 1"):
            load_motion(tmp_path)
        samples = only(load_motion(tmp_path, skip_bad=1))
        assert samples.ids.tolist() == [0, 2]

    def test_pickles_stay_shut(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match="it contains Python objects, which are not read"):
            load_motion(tmp_path)

    def test_more_bad_items_than_allowed_stop_the_run(self, tmp_path: Path) -> None:
        bad = np.full((4, 3), np.inf)
        self.folder(tmp_path, {"a": np.ones((4, 3)), "b": bad, "c": bad})
        with pytest.raises(ValueError, match="2 items cannot be read, --skip-bad allows 1; the last: item 2 of train"):
            load_motion(tmp_path, skip_bad=1)

    def test_clips_of_different_skeletons_do_not_mix(self, tmp_path: Path) -> None:
        self.folder(tmp_path, {"a": np.ones((4, 3)), "b": np.ones((4, 6))})
        with pytest.raises(ValueError, match=r"item 1 of train \(.*b.npy\) is 6x4 but the first is 3x4"):
            load_motion(tmp_path)

    def test_nested_lists_in_parquet(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        clips = [rng.normal(size=(n, 6)).astype(np.float32) for n in (4, 7, 5)]
        rows = {"motion": [clip.tolist() for clip in clips], "label": ["a", "b", "a"], "style": [0, 1, 1]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "clips.parquet")
        assert guess_modality(tmp_path / "clips.parquet") == "motion"
        samples = only(load_motion(tmp_path / "clips.parquet", up_axis=None))
        torch.testing.assert_close(values(samples, 1), torch.from_numpy(clips[1].T), atol=1e-5, rtol=0)
        other = only(load_motion(tmp_path / "clips.parquet", label_column="style"))
        assert other.labels is not None
        assert other.labels.tolist() == [0, 1, 1]

    def test_real_motion(self, shared_data: Path) -> None:
        splits = load(shared_data / "motion", split="test", length=64)
        assert splits.train.modality == "motion"
        assert splits.train.shape == (66, 64)
        assert splits.train.num_classes == 10


BVH = """HIERARCHY
ROOT Hips
{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Knee
  {
    OFFSET 0 -2 0
    CHANNELS 3 Zrotation Xrotation Yrotation
    End Site
    {
      OFFSET 0 -1 0
    }
  }
}
MOTION
Frames: 2
Frame Time: 0.033
1 2 3 0 0 0 0 0 0
1 2 3 90 0 0 45 0 0
"""


class TestBvh:
    def test_a_quarter_turn_swings_the_knee(self) -> None:
        positions = bvh_positions(BVH)
        np.testing.assert_allclose(positions[0], [[1, 2, 3], [1, 0, 3]], atol=1e-12)
        # A quarter turn about z takes (0, -2, 0) to (2, 0, 0).
        np.testing.assert_allclose(positions[1], [[1, 2, 3], [3, 2, 3]], atol=1e-12)

    def test_rotations_apply_in_the_order_in_which_they_are_listed(self) -> None:
        from scipy.spatial.transform import Rotation

        angles = np.array([30.0, -50.0, 110.0])
        text = BVH.replace("1 2 3 90 0 0 45 0 0", "0 0 0 {} {} {} 0 0 0".format(*angles))
        wanted = Rotation.from_euler("ZXY", angles, degrees=True).apply([0, -2, 0])  # capitals: about the turned axes
        np.testing.assert_allclose(bvh_positions(text)[1, 1], wanted, atol=1e-12)

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("HIERARCHY", "SKELETON", "it is not a BVH file"),
            ("Frames: 2", "Frames: 3", "it declares 3 frames of 9 values but contains 18"),
            ("Xposition", "Wposition", "channel 'Wposition' is not a BVH channel"),
            ("  End Site", "  Hello", "its HIERARCHY contains 'Hello' in the wrong place"),
            ("MOTION", "} MOTION", "the braces of its HIERARCHY do not match"),
        ],
    )
    def test_damage_is_one_line(self, tmp_path: Path, old: str, new: str, said: str) -> None:
        (tmp_path / "a.bvh").write_text(BVH.replace(old, new, 1))
        with pytest.raises(ValueError, match=f"a.bvh.*{said}"):
            load_motion(tmp_path)


class TestAudio:
    @pytest.fixture(autouse=True)
    def needs_soundfile(self) -> None:
        pytest.importorskip("soundfile")

    @staticmethod
    def folder(path: Path, recordings: dict[str, bytes]) -> Path:
        for name, content in recordings.items():
            place = path / f"{name}.wav"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        return path

    def test_a_tone_lights_its_own_band(self, tmp_path: Path) -> None:
        self.folder(tmp_path, {f"{f}": wav_bytes(tone(f)) for f in (300, 1000, 2500)})
        samples = only(load_audio(tmp_path))
        assert samples.shape[:2] == (1, 32)
        filters = mel_filters(RATE, 4 * 128, 32)
        for index, frequency in enumerate(sorted((300, 1000, 2500), key=str)):
            band = int(values(samples, index)[0, :, 10].argmax())
            bin_of_tone = round(frequency / RATE * 4 * 128)
            assert band == int(filters[:, bin_of_tone].argmax())

    def test_the_picture_is_the_plain_formula(self, tmp_path: Path) -> None:
        signal = np.random.default_rng(0).normal(0, 0.1, 2000)
        found = AudioDecoder(RATE)(wav_bytes(signal))
        wave_16 = (signal * 32767).astype("<i2") / 32768
        padded = np.pad(wave_16, 256, mode="reflect")
        taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
        frames = np.stack([padded[i * 128 : i * 128 + 512] * taper for i in range(len(wave_16) // 128 + 1)], 1)
        power = np.abs(np.fft.rfft(frames, axis=0)) ** 2
        wanted = 0.5 * np.log(np.maximum(mel_filters(RATE, 512, 32).double().numpy() @ power, 1e-10))
        np.testing.assert_allclose(found[0].numpy(), wanted, atol=1e-3)

    def test_frames_give_the_waveform_back(self) -> None:
        decoder = AudioDecoder(RATE, "waveform", hop=100)
        signal = tone(440, 0.3)
        frames = decoder(wav_bytes(signal))
        assert frames.shape == (100, 24)
        np.testing.assert_allclose(decoder.waveform(frames).numpy(), signal, atol=1e-4)

    def test_a_picture_can_be_listened_to(self, tmp_path: Path) -> None:
        decoder = AudioDecoder(RATE)
        picture = decoder(wav_bytes(tone(700) * np.linspace(0, 1, 4000)))
        heard = decoder.waveform(picture)
        write_wav(tmp_path / "heard.wav", heard, RATE)
        again = decoder((tmp_path / "heard.wav").read_bytes())
        # The loud part of the picture, where the ear and the logarithm agree.
        loud = picture > picture.max() - 3
        assert float((again[..., : picture.shape[2]] - picture)[loud].abs().mean()) < 0.5
        unphased = decoder(wav_bytes(decoder.waveform(picture, iterations=0).double().numpy()))
        assert float((unphased[..., : picture.shape[2]] - picture)[loud].abs().mean()) > 1.5

    def test_other_rates_are_resampled_and_channels_averaged(self) -> None:
        stereo = np.stack([tone(500, rate=16000), np.zeros(8000)], 1)
        there, here = AudioDecoder(RATE)(wav_bytes(2 * stereo, 16000)), AudioDecoder(RATE)(wav_bytes(tone(500)))
        assert there.shape == here.shape
        middle = slice(8, -8)
        bright = here[..., middle] > here.max() - 4
        assert float((there - here)[..., middle][bright].abs().max()) < 0.05

    def test_several_rates_need_a_choice(self, tmp_path: Path) -> None:
        self.folder(tmp_path, {"a": wav_bytes(tone(500)), "b": wav_bytes(tone(500, rate=16000), 16000)})
        with pytest.raises(
            ValueError, match=r"several sampling rates: 8000 \(item 0 of train\), 16000.*pass --rate 8000"
        ):
            load_audio(tmp_path)
        assert only(load_audio(tmp_path, rate=RATE)).shape == (1, 32, 32)

    @pytest.mark.parametrize(
        ("content", "said"),
        [(b"", "it is empty"), (wav_bytes(np.zeros(0)), "it has length 0"), (b"RIFFgarbage", "cannot be read")],
    )
    def test_a_bad_recording_is_named(self, tmp_path: Path, content: bytes, said: str) -> None:
        self.folder(tmp_path, {"a": wav_bytes(tone(500)), "b": content})
        with pytest.raises(ValueError, match=rf"item 1 of train \(.*b.wav\).*{said}"):
            load_audio(tmp_path)
        assert len(only(load_audio(tmp_path, skip_bad=1))) == 1

    def test_a_sound_as_short_as_a_click(self) -> None:
        assert bool(AudioDecoder(RATE)(wav_bytes(np.array([0.5]))).isfinite().all())

    def test_what_does_not_fit_the_memory_is_decoded_again(self, tmp_path: Path) -> None:
        self.folder(tmp_path, {f"{f}": wav_bytes(tone(f)) for f in (300, 1000, 2500)})
        listing = list_files(tmp_path, audio.SUFFIXES)
        parts, decoder = tables.read(listing), AudioDecoder(RATE)
        loaded = [
            only(load_media(listing, parts, "file", decoder, memory_budget_bytes=budget)) for budget in (0, 2**30)
        ]
        assert torch.equal(loaded[0].batch([2, 0]).x, loaded[1].batch([2, 0]).x)
        assert loaded[0].fingerprint == loaded[1].fingerprint

    def test_a_column_of_paths_beside_the_audio_is_not_the_audio(self, tmp_path: Path) -> None:
        """As in LibriSpeech."""
        audio = [{"bytes": wav_bytes(tone(500)), "path": None}] * 2
        rows = Dataset.from_dict({"file": ["/far/0.flac", "/far/1.flac"], "audio": audio})
        rows.to_parquet(tmp_path / "x.parquet")
        assert only(load_audio(tmp_path / "x.parquet")).items.column == "audio"

    def test_real_digits(self, shared_data: Path) -> None:
        splits = load(shared_data / "spoken-digits", split="test", length=48, label_column="speaker")
        assert splits.train.shape == (1, 32, 48)
        assert splits.train.num_classes == 6


def clip_of(colors: list[int], edge: int = 8) -> list[bytes]:
    frames = []
    for color in colors:
        file = io.BytesIO()
        Image.new("RGB", (edge, edge), (color, 0, 255 - color)).save(file, "PNG")
        frames.append(file.getvalue())
    return frames


class TestVideo:
    def test_lists_of_images(self, tmp_path: Path) -> None:
        clips = [clip_of([0, 50, 100, 150, 200]), clip_of([10, 20, 30])]
        rows = {"frames": [[{"bytes": frame, "path": None} for frame in clip] for clip in clips], "label": [0, 1]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "clips.parquet")
        assert guess_modality(tmp_path / "clips.parquet") == "video"
        samples = only(load_video(tmp_path / "clips.parquet", size=4, stride=2))
        assert samples.shape == (3, 3, 4, 4)
        batch = samples.batch([0, 1])
        torch.testing.assert_close(batch.x[0, 0, :, 0, 0], torch.tensor([0.0, 100, 200]) / 127.5 - 1)
        assert batch.real[:, :, 0, 0].tolist() == [[True, True, True], [True, True, False]]
        assert float(batch.x[1, :, 2].abs().max()) == 0

    def test_files(self, tmp_path: Path) -> None:
        av = pytest.importorskip("av")
        for name, level in (("dark/0", 40), ("bright/1", 200)):
            path = tmp_path / f"{name}.mp4"
            path.parent.mkdir()
            with av.open(str(path), "w") as container:
                stream = container.add_stream("mpeg4", rate=10)
                stream.width = stream.height = 32
                stream.pix_fmt = "yuv420p"
                for _ in range(6):
                    frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), format="rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
        samples = only(load_video(tmp_path, size=8, channels=1))
        assert samples.shape == (1, 6, 8, 8)
        assert samples.class_names == ("bright", "dark")
        # The codec loses a little.
        torch.testing.assert_close(samples.batch([0]).x.mean(), torch.tensor(200 / 127.5 - 1), atol=0.05, rtol=0)

    def test_frames_of_a_gif_count_however_long_they_are_shown(self, tmp_path: Path) -> None:
        Image = pytest.importorskip("PIL.Image")
        for name in ("a", "b"):
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
                first, *others = map(Image.fromarray, pixels)
                (tmp_path / name).mkdir(exist_ok=True)
                first.save(tmp_path / name / f"{i}.gif", save_all=True, append_images=others)
        assert load_video(tmp_path, size=8)["train"].shape == (3, 4, 8, 8)

    def test_what_is_no_video_is_named(self, tmp_path: Path) -> None:
        pytest.importorskip("av")
        (tmp_path / "a.mp4").write_bytes(b"not a video at all")
        with pytest.raises(ValueError, match=r"item 0 of train \(.*a.mp4\) cannot be read"):
            load_video(tmp_path, size=8)

    def test_the_size_is_asked_for(self, tmp_path: Path) -> None:
        Dataset.from_dict({"frames": [[{"bytes": f, "path": None} for f in clip_of([0, 1])]] * 6}).to_parquet(
            tmp_path / "clips.parquet"
        )
        with pytest.raises(ValueError, match="holds video; pass --size"):
            load(tmp_path / "clips.parquet")
        assert load(tmp_path / "clips.parquet", size=4).train.shape == (3, 2, 4, 4)


def test_options_of_another_modality_are_refused(tmp_path: Path) -> None:
    for i in range(6):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).normal(size=(4, 3)))
    with pytest.raises(ValueError, match="holds motion data, for which --rate --mels has no effect"):
        load(tmp_path, rate=8000, mels=3)
    with pytest.raises(ValueError, match="unknown modality 'smell'; use image, audio, motion or video"):
        load(tmp_path, modality="smell")
    with pytest.raises(ValueError, match=r"motion samples are 3x4 but the model takes 3x8; pass the --length"):
        load(tmp_path, expect_shape=(3, 8))


@pytest.mark.parametrize(("option", "value"), [("length", 0), ("stride", 0), ("skip_bad", -1)])
def test_counts_are_checked(tmp_path: Path, option: str, value: int) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 3)))
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} is {value}"):
        load_motion(tmp_path, **{option: value})


def test_a_missing_package_is_not_the_items_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.wav").write_bytes(wav_bytes(tone(500)))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    listing = list_files(tmp_path, audio.SUFFIXES)
    with pytest.raises(ModuleNotFoundError, match=r"soundfile is not installed; install layerprobe\[audio\]"):
        load_media(listing, tables.read(listing), "file", AudioDecoder(RATE), skip_bad=1)


def test_normalization_comes_back_from_json() -> None:
    once = Normalization(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]))
    again = Normalization.from_dict(once.to_dict())
    x = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.invert(once.apply(x)), x)
