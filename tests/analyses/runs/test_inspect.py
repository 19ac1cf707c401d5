"""`inspect --data` says what is in a data set, counted independently here; and refuses what is none in one line."""

from __future__ import annotations

import io
import json
import tarfile
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image

from layerprobe.analyses.runs.inspect import lines_of
from layerprobe.data.loading import guess_modality, load
from layerprobe.data.sequences.video import load_video

RATE = 8000


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of `datasets` that is thrown away; and no bars where these tests write data, among our own lines."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def wav(samples: int, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((1000 * np.sin(np.arange(samples))).astype("<i2").tobytes())
    return file.getvalue()


def png(value: int, edge: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("L", (edge, edge), value).save(file, "PNG")
    return file.getvalue()


def clips(lengths: list[int], channels: int = 6) -> list[list[list[float]]]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(length, channels)).tolist() for length in lengths]


@pytest.fixture
def inspected(cli):
    """Runs `inspect --data` and gives what it found, and what it says to people."""

    def call(*arguments: object) -> tuple[dict[str, Any], str]:
        code, out, err = cli("inspect", "--data", *arguments, "--json")
        assert code == 0, err
        record = json.loads(out)
        return record, "\n".join(lines_of(record))

    return call


@pytest.fixture
def refused(cli):
    """Runs a command on data that must be refused: exit code 2 and one line on standard error."""

    def call(data: object, *arguments: object, command: str = "inspect") -> str:
        code, out, err = cli(command, "--data", data, *arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("layerprobe: ")
        assert err.count("\n") == 1, err
        return err

    return call


class TestWhatIsFound:
    def test_embedded_digits(self, inspected, cli, tmp_path: Path) -> None:
        record, text = inspected("digits", "--out", tmp_path / "p")
        assert cli("inspect", "--data", "digits") == (0, f"{text}\n", "")
        assert (record["modality"], record["shape"]) == ("image", [1, 8, 8])
        assert sum(record["classes"]["label"]["train"].values()) == record["splits"]["train"]
        assert set(record["classes"]["label"]["train"]) == set("0123456789")
        assert "patches of 1" in text
        with Image.open(tmp_path / "p" / "peek.png") as picture:
            assert min(picture.size) > 100

    def test_a_checkpoint_stands_beside_what_was_read_of_the_data_on_one_screen(self, cli, tmp_path: Path) -> None:
        for i in range(40):
            place = tmp_path / ("bus", "train")[i % 2] / f"street_test_{i}.png"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(png(i))
        (tmp_path / "bus" / "notes.txt").touch()
        given = ("inspect", "digits", "--data", tmp_path, "--size", 8, "--channels", 1)
        code, out, err = cli(*given)
        assert (code, err) == (0, "")
        assert len(out.splitlines()) <= 50
        for text in ("heads          4", "and the null label 10", "-1 to 1 for -1 to 1", "data files     40 of 41"):
            assert text in out
        assert "2 classes" in next(line for line in out.splitlines() if line.startswith("data labels"))
        assert "blocks.0 ... blocks.7    16 x 64 each, 8 layers" in out
        record = json.loads(cli(*given, "--json")[1])
        assert record["reading"]["files_read"] == 40
        assert len(record["layers"]) == 8

    def test_files_and_the_source_of_labels(self, inspected, tmp_path: Path) -> None:
        for i in range(40):
            place = tmp_path / ("bus", "train")[i % 2] / f"street_test_{i}.png"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(png(i))
        for name in ("a.txt", "b.txt", "c.md"):
            (tmp_path / "bus" / name).touch()
        record, text = inspected(tmp_path)
        assert record["reading"]["files_read"] == len(list(tmp_path.rglob("*.png"))) == sum(record["splits"].values())
        assert record["reading"]["files_left"] == {".txt": 2, ".md": 1}
        assert record["classes"]["label"]["train"].keys() == {"bus", "train"}
        found = dict(line.split(maxsplit=1) for line in text.splitlines())
        assert (found["files"], found["labels"]) == ("40 of 43 read; left: 2 .txt, 1 .md", "top folder, 2 classes")
        _, text = inspected(tmp_path, "--label-column", "none")
        assert "none, as --label-column none asks" in text

    def test_motion_lengths_classes_and_values(self, inspected, tmp_path: Path) -> None:
        lengths = [5, 9, 7, 12] * 5
        rows = {
            "motion": clips(lengths),
            "label": ["run", "walk"] * 10,
            "style": ["calm", "angry", "sad", "sad"] * 5,
            "clip": [f"clip {i}" for i in range(20)],  # a name for each row is no class
        }
        Dataset.from_dict(rows).to_parquet(tmp_path / "m.parquet")
        record, text = inspected(tmp_path / "m.parquet", "--length", 8)
        assert {name: found["taken_as"] for name, found in record["columns"].items()} == {
            "motion": "item",
            "label": "label",
            "style": "further labels",
            "clip": None,
        }
        assert record["parts"] == {"train": 20}
        assert record["lengths"] == {
            "unit": "frames",
            "shortest": 5,
            "median": 8.0,
            "longest": 12,
            "kept": 8,
            "cut": 10,
            "padded": 10,
            "padding": pytest.approx((3 / 8 + 1 / 8) / 4),
        }
        counts = {
            name: sum(split.get(name, 0) for split in record["classes"]["style"].values()) for name in ("sad", "calm")
        }
        assert counts == {"sad": 10, "calm": 5}
        assert sum(map(sum, (split.values() for split in record["classes"]["label"].values()))) == 20
        assert "median 8; as 8, 10 are cut and 10 padded (12% of all is padding)" in text
        assert text.endswith("cannot be read    nothing")
        assert len(record["normalization"]["mean"]) == 6

    def test_audio(self, inspected, tmp_path: Path) -> None:
        pytest.importorskip("soundfile")
        for i in range(12):
            place = tmp_path / "d" / ("high" if i % 2 else "low") / f"{i}.wav"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(wav(1280 if i < 6 else 2560))
        record, _ = inspected(tmp_path / "d")
        assert (record["modality"], record["axes"]) == ("audio", "channels x mels x columns")
        assert record["lengths"]["unit"] == "columns of 16 ms"
        assert (record["lengths"]["shortest"], record["lengths"]["longest"]) == (11, 21)
        assert record["columns"]["file"]["taken_as"] == "item"
        assert set(record["classes"]["label"]["train"]) == {"high", "low"}
        waves, _ = inspected(tmp_path / "d", "--audio-form", "waveform", "--hop", 80)
        assert (waves["axes"], waves["shape"], waves["lengths"]["unit"]) == (
            "samples x frames",
            [80, 32],
            "columns of 10 ms",
        )

    def test_video_with_two_columns_of_classes(self, inspected, refused, tmp_path: Path) -> None:
        """The columns of `datasets` own types: lists of images that it would decode itself."""
        features = Features(
            {
                "video": Sequence(ImageFeature()),
                "digit": ClassLabel(names=["a", "b"]),
                "way": ClassLabel(names=["l", "r"]),
            }
        )
        rows = [
            {"video": [{"bytes": png(40 * i), "path": None} for i in range(n)], "digit": n % 2, "way": n // 5 % 2}
            for n in [2, 3, 5] * 4
        ]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "v.parquet")
        record, text = inspected(tmp_path / "v.parquet", "--size", 4, "--channels", 1, "--out", tmp_path / "p")
        assert (record["modality"], record["shape"]) == ("video", [1, 5, 4, 4])
        assert (record["columns"]["digit"]["taken_as"], record["columns"]["way"]["taken_as"]) == (
            "label",
            "further labels",
        )
        assert "the columns digit, way all contain classes; pass one as --label-column" in text
        # A training asks.
        line = refused(tmp_path / "v.parquet", "--size", 4, "--out", tmp_path / "t", "--steps", 1, command="train")
        assert "pass one as --label-column" in line
        named, text = inspected(tmp_path / "v.parquet", "--size", 4, "--label-column", "way", "--probe-labels", "digit")
        assert named["columns"]["way"]["taken_as"] == "label"
        assert "note:" not in text

    def test_images_that_cannot_be_read_are_counted_and_may_be_left_out(
        self, inspected, refused, tmp_path: Path
    ) -> None:
        values = {row: 20 * row for row in range(11)}
        items = [png(value) for value in values.values()]
        items[3], items[6], items[10] = b"no image", items[6][:-30], b""
        rows = {"image": [{"bytes": item, "path": None} for item in items], "label": [0, 1] * 5 + [1]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "i.parquet")
        record, text = inspected(tmp_path / "i.parquet")
        assert list(record["bad"]) == [f"image {row} of train" for row in (3, 6, 10)]
        assert sum(record["splits"].values()) == 8
        assert "3, pass --skip-bad 3 to leave them out: image 3 of train: " in text
        assert "image 3 of train cannot be read" in refused(tmp_path / "i.parquet", "--skip-bad", 0)
        line = refused(tmp_path / "i.parquet", "--skip-bad", 2)
        assert "3 images cannot be read, --skip-bad allows 2; the last: image 10 of train" in line
        # Ids, labels and pixels are those of the rows that are left.
        for _, samples in load(tmp_path / "i.parquet", skip_bad=3).items():
            batch = samples.batch(range(len(samples)))
            for x, label, row in zip(batch.x, batch.labels, batch.ids.tolist(), strict=True):
                assert round((float(x[0, 0, 0]) + 1) * 127.5) == values[row]
                assert label == rows["label"][row]

    def test_bad_items_of_motion_are_counted(self, inspected, tmp_path: Path) -> None:
        items = clips([4] * 12)
        items[2][1][3] = float("nan")
        Dataset.from_dict({"motion": items, "label": [0, 1] * 6}).to_parquet(tmp_path / "m.parquet")
        record, text = inspected(tmp_path / "m.parquet")
        assert record["bad"] == {"item 2 of train": "it contains NaN or infinite values"}
        assert "1, pass --skip-bad 1 to leave them out: item 2 of train: it contains NaN" in text

    def test_unlabeled_data_and_a_class_that_a_split_lacks(self, inspected, tmp_path: Path) -> None:
        Dataset.from_dict({"motion": clips([4] * 10)}).to_parquet(tmp_path / "m.parquet")
        record, text = inspected(tmp_path / "m.parquet")
        assert record["classes"] == {}
        rows = {"motion": clips([4] * 20), "label": [0, 1] * 10, "who": ["rare"] * 2 + ["often", "else"] * 9}
        Dataset.from_dict(rows).to_parquet(tmp_path / "n.parquet")
        record, text = inspected(tmp_path / "n.parquet")
        lacking = [split for split, counts in record["classes"]["who"].items() if not counts["rare"]]
        assert lacking
        assert f"rare has none in {lacking[0]}" in text


class TestSources:
    @staticmethod
    def shard(path: Path, records: dict[str, bytes]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in records.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))

    def test_webdataset_of_images(self, inspected, tmp_path: Path) -> None:
        for shard in range(2):
            records = {}
            for i in range(10):
                records |= {f"{shard}{i}.png": png(10 * i), f"{shard}{i}.cls": str(i % 2).encode()}
            self.shard(tmp_path / "d" / f"train-{shard}.tar", records)
        for source in (tmp_path / "d", tmp_path / "d" / "train-1.tar"):
            record, _ = inspected(source)
            count = 20 if source.is_dir() else 10
            assert (record["parts"], record["shape"]) == ({"train": count}, [1, 8, 8])
            assert (record["columns"]["png"]["taken_as"], record["columns"]["cls"]["taken_as"]) == ("item", "label")
            assert set(record["classes"]) == {"label"}
        assert set(load(tmp_path / "d").train.labels.tolist()) == {0, 1}

    def test_webdataset_of_sound(self, inspected, tmp_path: Path) -> None:
        pytest.importorskip("soundfile")
        records = {}
        for i in range(10):
            records |= {f"{i}.wav": wav(1000), f"{i}.cls": str(i % 2).encode()}
        self.shard(tmp_path / "s.tar", records)
        assert guess_modality(tmp_path / "s.tar") == "audio"
        record, _ = inspected(tmp_path / "s.tar")
        assert (record["modality"], record["splits"]) == ("audio", {"train": 6, "validation": 2, "test": 2})

    def test_webdataset_of_motion(self, inspected, tmp_path: Path) -> None:
        records = {}
        for i in range(10):
            file = io.BytesIO()
            np.save(file, np.random.default_rng(i).normal(size=(4 + i, 6)))
            records |= {f"{i}.npy": file.getvalue(), f"{i}.cls": str(i % 2).encode()}
        self.shard(tmp_path / "m" / "a.tar", records)
        record, _ = inspected(tmp_path / "m")
        assert (record["modality"], record["lengths"]["longest"]) == ("motion", 13)

    @pytest.mark.parametrize("modality", ["audio", "motion", "video"])
    def test_what_save_to_disk_wrote(self, modality: str, inspected, tmp_path: Path) -> None:
        if modality == "audio":
            pytest.importorskip("soundfile")
        made: dict[str, list[Any]] = {
            "audio": [{"bytes": wav(800 + 100 * i), "path": None} for i in range(10)],
            "motion": clips([4] * 10),
            "video": [[{"bytes": png(i), "path": None}] * 2 for i in range(10)],
        }
        rows = {modality: made[modality], "label": [0, 1] * 5}
        Dataset.from_dict(rows).save_to_disk(tmp_path / "s")
        options = ["--size", 8] if modality == "video" else []
        record, _ = inspected(tmp_path / "s", *options)
        assert (record["modality"], sum(record["splits"].values())) == (modality, 10)

    def test_lists_of_images_are_read_without_a_copy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`datasets` would decode them, and a cast would write the data anew."""
        rows = [{"video": [{"bytes": png(9), "path": None}] * 2, "label": i % 2} for i in range(8)]
        features = Features({"video": Sequence(ImageFeature()), "label": Value("int64")})
        Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "s")
        monkeypatch.setattr(Dataset, "cast", lambda *_, **__: pytest.fail("the data was cast"))
        monkeypatch.setattr(Dataset, "map", lambda *_, **__: pytest.fail("the data was copied"))
        samples = load_video(tmp_path / "s", size=8, channels=1)["train"]
        assert float(samples.batch([0]).x.unique()) == pytest.approx(9 / 127.5 - 1)


class TestRefusals:
    """One line and exit code 2, from `inspect` and from `train`."""

    @pytest.fixture
    def both(self, refused, tmp_path: Path):
        def call(said: str, data: object, *options: object) -> None:
            assert said in refused(data, *options)
            assert said in refused(data, *options, "--out", tmp_path / "t", "--steps", 1, command="train")
            assert not (tmp_path / "t").exists()

        return call

    def test_nothing_to_inspect(self, cli) -> None:
        code, _, err = cli("inspect")
        assert (code, "nothing to inspect; pass a checkpoint, or a data set as --data" in err) == (2, True)
        code, _, err = cli("inspect", "--data", "digits", "--num-heads", 4)
        assert code == 2
        assert "--num-heads has no effect without CHECKPOINT; pass CHECKPOINT too, or leave out --num-heads" in err
        code, _, err = cli("inspect", "digits", "--data", "digits", "--out", "x")
        assert (code, "--out is for pictures of --data without a checkpoint" in err) == (2, True)

    def test_a_directory_of_the_wrong_thing(self, both, refused, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "notes.txt").write_text("no data")
        both("file but notes.txt; pass the folder of the data", tmp_path / "d")
        both("file but notes.txt; pass the folder of the data", tmp_path / "d", "--modality", "motion")
        both("file but notes.txt; pass the folder of the data", tmp_path / "d", "--modality", "video", "--size", 8)

    def test_a_directory_without_sound(self, both, tmp_path: Path) -> None:
        pytest.importorskip("soundfile")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "notes.txt").write_text("no data")
        both("file but notes.txt; pass the folder of the data", tmp_path / "d", "--modality", "audio")

    def test_sound_files_that_are_none(self, both, refused, tmp_path: Path) -> None:
        pytest.importorskip("soundfile")
        (tmp_path / "d").mkdir()
        for i in range(6):
            (tmp_path / "d" / f"{i}.wav").write_text("no sound")
        both("readable sampling rate", tmp_path / "d")
        assert "has no readable item; the first is item 0 of train" in refused(tmp_path / "d", "--rate", 8000)

    def test_zero_length_audio_and_mixed_rates(self, both, refused, tmp_path: Path) -> None:
        pytest.importorskip("soundfile")
        (tmp_path / "d").mkdir()
        for i in range(6):
            (tmp_path / "d" / f"{i}.wav").write_bytes(wav(0))
        both("it has length 0", tmp_path / "d")
        for i in range(6):
            (tmp_path / "d" / f"{i}.wav").write_bytes(wav(900, rate=RATE * (1 + i % 2)))
        both("several sampling rates: 8000 (item 0 of train), 16000", tmp_path / "d")

    def test_motion_of_nan_alone(self, both, refused, tmp_path: Path) -> None:
        Dataset.from_dict({"motion": [[[float("nan")] * 3] * 4] * 6}).to_parquet(tmp_path / "m.parquet")
        both("it contains NaN or infinite values", tmp_path / "m.parquet")

    @pytest.mark.parametrize(("frames", "said"), [(0, "no frames"), (1, "one frame"), (3, "one frame")])
    def test_video_without_several_frames_or_size(self, frames: int, said: str, both, refused, tmp_path: Path) -> None:
        rows = [[{"bytes": png(9), "path": None}] * (frames if i == 4 else 9) for i in range(8)]
        Dataset.from_dict({"frames": rows}).to_parquet(tmp_path / "v.parquet")
        both("pass --size", tmp_path / "v.parquet")
        options = ["--size", 4, *(["--stride", 3] if frames == 3 else [])]
        line = refused(tmp_path / "v.parquet", *options, "--skip-bad", 0)
        line += refused(tmp_path / "v.parquet", *options, "--out", tmp_path / "t", "--steps", 1, command="train")
        assert line.count(f"item 4 of train cannot be read: it has {said}, but a video needs at least two") == 2

    def test_missing_labels(self, both, refused, tmp_path: Path) -> None:
        rows = {"motion": clips([4] * 6), "label": [0, 1, None, 1, 0, 1]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "m.parquet")
        both("1 of 6 rows of train have no label in 'label'", tmp_path / "m.parquet")
        both("has no column 'style'", tmp_path / "m.parquet", "--label-column", "style")

    def test_a_table_without_items(self, both, refused, tmp_path: Path) -> None:
        Dataset.from_dict({"text": ["a"] * 6, "label": [0, 1] * 3}).to_parquet(tmp_path / "t.parquet")
        both("none of the columns text, label contains encoded images", tmp_path / "t.parquet")
        for modality, extra in (("audio", []), ("motion", []), ("video", ["--size", 8])):
            if modality == "audio":
                pytest.importorskip("soundfile")
            both(
                f"none of the columns text, label contains {modality}; pass {modality} data, or --item-column",
                tmp_path / "t.parquet",
                "--modality",
                modality,
                *extra,
            )

    def test_a_tar_of_something_else(self, both, refused, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_bytes(b"not a tar")
        both("ends before the end of its archive, or is damaged", tmp_path / "a.tar")
