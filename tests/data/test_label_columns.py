"""Further label columns, from the rows of a data set to the table, the figure and the page of a run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from figure_tables import quality_table, title_of
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file
from tiny import SHAPE, tiny_sit

from layerprobe.analyses.figures.label_columns import knowledge_curves
from layerprobe.analyses.measures.dense_probes import dense_probe
from layerprobe.analyses.measures.linear_probes import linear_probe
from layerprobe.analyses.report.page import write_report
from layerprobe.analyses.runs import figures, probe
from layerprobe.analyses.runs import folder as folder_module
from layerprobe.analyses.runs import text as text_module
from layerprobe.analyses.runs.folder import RunFolder
from layerprobe.analyses.tables.measurements import frame_probes, headlines, spatial
from layerprobe.analyses.tables.quality import measure, recoverability_table
from layerprobe.checkpoints.saving import save_checkpoint
from layerprobe.checkpoints.source import CheckpointSource
from layerprobe.data import Splits, TensorSamples, load
from layerprobe.data.embedded_digits import digits
from layerprobe.data.images import load_images
from layerprobe.data.samples import MISSING, LabelColumn, Subset
from layerprobe.data.sequences.motion import load_motion
from layerprobe.data.sources import DataSource
from layerprobe.data.splits import for_probing, split
from layerprobe.extraction.controls import RAW_INPUT_WIDTH, raw_input, raw_pool_cells
from layerprobe.extraction.features import (
    SPLITS,
    FeatureStore,
    begin_store,
    column_key,
    shard_path,
    token_path,
    write_tensors,
)
from layerprobe.extraction.forward import extract
from layerprobe.extraction.plan import ExtractionPlan

Array = NDArray[Any]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is thrown away."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def clips(path: Path, n: int = 20, *, bad: int | None = None, **columns: list[Any]) -> Path:
    """Rows of motion, 4 frames of 3 numbers that tell the row; the one that is bad holds a NaN."""
    frames = [[[float(row)] * 3] * 4 for row in range(n)]
    if bad is not None:
        frames[bad] = [[float("nan")] * 3] * 4
    pq.write_table(pa.table({"motion": frames, "label": [row % 2 for row in range(n)], **columns}), path)
    return path


def column(samples: Any, name: str) -> LabelColumn:
    return next(column for column in samples.columns if column.name == name)


def named(one: LabelColumn) -> list[str | None]:
    return [None if label == MISSING else one.class_names[label] for label in one.labels.tolist()]


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        (["eve", "ann"] * 10, ["eve", "ann"] * 10),
        ([*["b"] * 10, *["a"] * 7, None, "", None], [*["b"] * 10, *["a"] * 7, None, None, None]),
        ([30, 4] * 10, ["30", "4"] * 10),
        ([7, -1, 8, 7] * 5, ["7", None, "8", "7"] * 5),
        ([1.0, float("nan")] * 10, ["1", None] * 10),
        ([True, False] * 10, ["1", "0"] * 10),
    ],
)
def test_a_further_column_keeps_every_row_and_says_where_there_is_no_label(
    tmp_path: Path, values: list[Any], seen: list[str | None]
) -> None:
    samples = load_motion(clips(tmp_path / "x.parquet", who=values), probe_labels="who")["train"]
    assert named(column(samples, "who")) == seen
    assert len(samples) == 20


def test_further_columns_change_neither_class_nor_split_nor_fingerprint(tmp_path: Path) -> None:
    path = clips(tmp_path / "x.parquet", who=["ann", "eve", "joe", None] * 5, style=list(range(20)))
    plain, probed = load(path), load(path, probe_labels="who, style")
    for (_, without), (_, with_columns) in zip(plain.items(), probed.items(), strict=True):
        assert without.columns == ()
        assert [one.name for one in with_columns.columns] == ["who", "style"]
        assert without.fingerprint == with_columns.fingerprint
        assert torch.equal(without.ids, with_columns.ids)
        rows = with_columns.ids.tolist()
        assert named(column(with_columns, "who")) == [["ann", "eve", "joe", None][row % 4] for row in rows]
        assert named(column(with_columns, "style")) == [str(row) for row in rows]
    assert column(probed.train, "who").class_names == ("ann", "eve", "joe")


def test_an_item_that_is_left_out_takes_its_label_with_it(tmp_path: Path) -> None:
    path = clips(tmp_path / "x.parquet", bad=3, who=[str(row) for row in range(20)])
    samples = load_motion(path, probe_labels="who", skip_bad=1)["train"]
    assert named(column(samples, "who")) == [str(row) for row in range(20) if row != 3]


def test_images_have_columns_too(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int64"), "hue": datasets.ClassLabel(names=["red", "blue"])}
    )
    images = [np.full((4, 4), shade, np.uint8) for shade in range(4)]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1], "hue": [1, -1, 0, 1]}, features=features)
    rows.save_to_disk(tmp_path / "s")
    samples = load_images(tmp_path / "s", probe_labels="hue", label_column="label")["train"]
    assert named(column(samples, "hue")) == ["blue", None, "red", "blue"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("speaker", "train has no column 'speaker'; pass one of .*who.* as --probe-labels"),
        ("who,,style", "train has no column ''"),
        ("who,who", "'who' in --probe-labels occurs twice; name it once"),
        ("label", "'label' in --probe-labels is the --label-column, which is probed anyway"),
        ("nobody", r"no row has a label in 'nobody' \(empty or negative\); leave it out of --probe-labels"),
        ("pitch", "column 'pitch' contains 0.5, which is not a class; pass another --probe-labels"),
        ("motion", "column 'motion' contains .*, which is not a class; pass another --probe-labels"),
    ],
)
def test_a_column_that_cannot_be_probed_is_named_in_one_line(tmp_path: Path, names: str, message: str) -> None:
    columns: dict[str, list[Any]] = {"who": ["a", "b"] * 10, "style": [0, 1] * 10}
    path = clips(tmp_path / "x.parquet", **columns, nobody=[-1, None] * 10, pitch=[0.5, 1.0] * 10)
    with pytest.raises(ValueError, match=f"^{message}.*$"):
        load_motion(path, probe_labels=names)


def test_labels_that_are_no_classes_are_refused() -> None:
    with pytest.raises(
        ValueError, match="'who' has label 2 but names 2 classes; pass 0 to 1, or -1 for a missing label"
    ):
        LabelColumn("who", torch.tensor([0, 2]), ("a", "b"))
    with pytest.raises(ValueError, match="3 samples but 2 labels in 'who'; pass one label per sample"):
        TensorSamples(torch.zeros(3, *SHAPE), columns=(LabelColumn("who", torch.tensor([0, 1]), ("a", "b")),))


def labeled(n: int, who: list[int], names: tuple[str, ...] = ("ann", "eve", "joe"), first: int = 0) -> TensorSamples:
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(first)) - 0.5
    columns = (LabelColumn("who", torch.tensor(who), names),)
    return TensorSamples(x, torch.arange(n) % 3, ids=torch.arange(first, first + n), columns=columns)


def test_a_column_must_leave_something_to_fit_to_choose_and_to_score() -> None:
    def splits(*who: list[int]) -> Splits:
        return Splits(*(labeled(6, labels, first=10 * i) for i, labels in enumerate(who)))

    good = splits([0, 1, 0, 1, -1, 0], [2, 2, 2, 2, 2, 0], [-1, 1, -1, -1, -1, -1])
    assert for_probing(good, given={}) is not None
    one_class = splits([1, 1, -1, 1, -1, 1], [0] * 6, [0] * 6)
    with pytest.raises(ValueError, match="'who' has one class in the training split, and a probe needs two"):
        for_probing(one_class, given={})
    unseen = splits([0, 1, 0, 1, 0, 1], [0] * 6, [2, -1, 2, -1, 2, -1])
    with pytest.raises(
        ValueError, match="no label of 'who' in the test split has a class that occurs in the training split"
    ):
        for_probing(unseen, given={})


def test_parts_with_other_columns_do_not_belong_together() -> None:
    train, test = labeled(12, [0, 1] * 6), labeled(6, [0, 1] * 3, names=("ann", "eve"), first=50)
    with pytest.raises(ValueError, match="train and test have different extra label columns or classes"):
        split({"train": train, "test": test})


class TestMetadata:
    @staticmethod
    def folder(root: Path, text: str, names: tuple[str, ...] = ("a/0.npy", "a/1.npy", "b/0.npy", "b/1.npy")) -> Path:
        for i, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(root / name, np.full((4, 3), float(i)))
        (root / "metadata.csv").write_text(text, encoding="utf-8")
        return root

    def test_labels_lie_beside_the_files(self, tmp_path: Path) -> None:
        text = "file_name,who,take\na/0.npy,ann,2\nb/1.npy,eve,\nb/0.npy,ann,10\n"
        samples = load_motion(self.folder(tmp_path, text), probe_labels="who,take")["train"]
        assert named(column(samples, "who")) == ["ann", None, "ann", "eve"]
        assert named(column(samples, "take")) == ["2", None, "10", None]
        assert samples.class_names == ("a", "b")
        assert samples.labels is not None
        assert samples.labels.tolist() == [0, 0, 1, 1]

    def test_each_part_may_have_its_own(self, tmp_path: Path) -> None:
        names = ("train/0.npy", "train/1.npy", "test/0.npy")
        self.folder(tmp_path, "file_name,label\ntrain/0.npy,x\ntrain/1.npy,y\n", names)
        (tmp_path / "test" / "metadata.csv").write_text("file_name,label\n0.npy,y\n", encoding="utf-8")
        parts = load_motion(tmp_path)
        found = {name: [part.class_names[label] for label in part.labels] for name, part in parts.items()}
        assert found == {"test": ["y"], "train": ["x", "y"]}

    def test_images_keep_their_classes_and_all_are_read(self, tmp_path: Path) -> None:
        """Where `datasets` would leave out those that the file does not name, and the classes of their folders."""
        for i, name in enumerate(("a/0.png", "a/1.png", "b/0.png", "b/1.png")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((4, 4), 60 * i, np.uint8)).save(tmp_path / name)
        (tmp_path / "metadata.csv").write_text("file_name,who\nb/0.png,ann\na/1.png,eve\n", encoding="utf-8")
        samples = load_images(tmp_path, probe_labels="who")["train"]
        assert named(column(samples, "who")) == [None, "eve", "ann", None]
        assert samples.labels is not None
        assert [samples.class_names[label] for label in samples.labels] == ["a", "a", "b", "b"]
        shades = ((samples.batch(range(4)).x.flatten(1).mean(1) + 1) * 127.5).round()
        assert shades.tolist() == [0, 60, 120, 180]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("file_name,who\na/9.npy,ann\n", "metadata.csv names 9.npy, which does not exist; fix or remove that row"),
            ("who\nann\n", "metadata.csv has a row without file_name or with too many cells; fix it"),
            ("file_name,who\na/0.npy,ann,eve\n", "metadata.csv has a row without file_name or with too many cells"),
        ],
    )
    def test_a_row_that_fits_no_file_is_named(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_motion(self.folder(tmp_path, text))


class TestStore:
    PLAN = ExtractionPlan(("blocks.0", "blocks.1"), (0.3,), shard_size=5)

    def splits(self, who: list[int] | None = None) -> Splits:
        samples = labeled(12, who or [0, 1, 2, -1] * 3)
        parts = (range(6), range(6, 9), range(9, 12))
        return Splits(*(Subset(samples, rows, name=str(i)) for i, rows in enumerate(parts)))

    def test_columns_are_kept_row_by_row_and_decide_no_feature(self, tmp_path: Path) -> None:
        extract(tiny_sit(), self.splits(), self.PLAN, tmp_path / "a")
        store = FeatureStore.open(tmp_path / "a")
        assert store.columns["who"].tolist() == [0, 1, 2, -1] * 3
        assert store.manifest["columns"]["who"]["class_names"] == ["ann", "eve", "joe"]
        samples = labeled(12, [0] * 12)
        without = TensorSamples(samples.x, samples.labels, ids=samples.ids)
        plain = Splits(*(Subset(without, rows, name="x") for rows in (range(6), range(6, 9), range(9, 12))))
        other = extract(tiny_sit(), plain, self.PLAN, tmp_path / "b")
        assert other.columns == {}
        # So that stores from before there were columns go on.
        assert "columns" not in other.manifest
        np.testing.assert_array_equal(store["blocks.1", 0.3], other["blocks.1", 0.3])

    def test_a_store_of_other_labels_is_another_store(self, tmp_path: Path) -> None:
        extract(tiny_sit(), self.splits(), self.PLAN, tmp_path)
        with pytest.raises(ValueError, match="columns"):
            extract(tiny_sit(), self.splits([0, 1, 2, 2] * 3), self.PLAN, tmp_path)

    def test_every_split_has_the_same_columns(self, tmp_path: Path) -> None:
        splits = self.splits()
        bare = TensorSamples(torch.zeros(3, *SHAPE), torch.arange(3), ids=torch.arange(90, 93))
        with pytest.raises(ValueError, match="the train and the test splits have different extra label columns"):
            extract(tiny_sit(), Splits(splits.train, splits.validation, bare), self.PLAN, tmp_path)


NUM, LAYERS, LEVELS = 240, ("blocks.0", "blocks.1"), (0.1, 0.5)


def planted(folder: Path, *, who: Array | None = None, flat: bool = False, seed: int = 0) -> FeatureStore:
    """The first layer tells who speaks, the second the class; each is blind to the other."""
    rng = np.random.default_rng(seed)
    labels, speaker = rng.integers(0, 3, NUM), np.random.default_rng(9).integers(0, 3, NUM)
    centers = 3 * rng.normal(size=(3, 5))
    tensors = {
        layer: np.stack([centers[told][None] * (1 - level) + rng.normal(size=(1, NUM, 5)) for level in LEVELS])
        for layer, told in zip(LAYERS, (speaker, labels), strict=True)
    }
    if flat:
        tensors["blocks.0"][:] = 1.0
    who = speaker if who is None else who
    manifest = {"plan": {"layers": LAYERS, "noise_levels": LEVELS, "draws": 1}, "num_shards": 1}
    manifest["columns"] = {"who": {"class_names": ["ann", "eve", "joe"], "labels_hash": "0", "axis": 0}}
    splits = np.arange(NUM) // (NUM // 3)
    begin_store(folder, manifest, {"ids": np.arange(NUM), "splits": splits, "labels": labels, column_key("who"): who})
    write_tensors(shard_path(folder, 0), {name: tensor.astype(np.float32) for name, tensor in tensors.items()})
    return FeatureStore.open(folder)


def rows_of(quality: pd.DataFrame, **where: Any) -> pd.DataFrame:
    return quality[(quality[list(where)] == pd.Series(where)).all(axis=1)]


def one(quality: pd.DataFrame, **where: Any) -> Any:
    (row,) = rows_of(quality, **where).itertuples(index=False)
    return row


class TestTable:
    def test_each_layer_is_asked_for_each_column(self, tmp_path: Path) -> None:
        quality, _ = measure({"model": planted(tmp_path)})
        told = {
            (metric, layer): one(quality, metric=metric, layer=layer, noise_level=0.1, split="test").value
            for metric in ("probe accuracy", "probe accuracy of who")
            for layer in LAYERS
        }
        assert told["probe accuracy of who", "blocks.0"] > 0.9 > 0.55 > told["probe accuracy of who", "blocks.1"]
        assert told["probe accuracy", "blocks.1"] > 0.9 > 0.55 > told["probe accuracy", "blocks.0"]
        assert headlines(quality["metric"])[:2] == ["probe accuracy", "probe accuracy of who"]

    def test_values_are_those_of_a_probe_of_the_rows_that_count(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(3)
        who = rng.integers(0, 2, NUM)
        who[rng.permutation(NUM)[:40]] = MISSING
        who[[170, 180, 200]] = 2  # nobody whom the training split knows
        store = planted(tmp_path, who=who)
        quality, _ = measure({"model": store})
        known = (who == 0) | (who == 1)
        x = store["blocks.0", 0.5]
        parts = [
            (x[rows], who[rows]) for s in ("train", "validation", "test") for rows in [known & (store.splits == s)]
        ]
        expected = linear_probe(*(array for part in parts for array in part))
        found = one(quality, metric="probe accuracy of who", layer="blocks.0", noise_level=0.5, split="test")
        assert found.value == expected.test_accuracy
        assert found.low < found.value < found.high
        missing = int((who[160:] == MISSING).sum())
        assert (
            f"left out of 80: {missing} without a label, 3 of a class that is missing in the training split"
            in found.note
        )
        chosen = one(quality, metric="probe accuracy of who", layer="blocks.0", noise_level=0.5, split="validation")
        assert chosen.value == expected.validation_accuracy
        assert "training split has not" not in chosen.note

    def test_all_labels_known_are_no_caution(self, tmp_path: Path) -> None:
        quality, _ = measure({"model": planted(tmp_path)})
        assert not rows_of(quality, metric="probe accuracy of who")["note"].str.contains("left out").any()

    def test_a_representation_that_says_nothing_has_no_number(self, tmp_path: Path) -> None:
        quality, _ = measure({"model": planted(tmp_path, flat=True)})
        rows = rows_of(quality, metric="probe accuracy of who", layer="blocks.0")
        assert rows["value"].isna().all()
        assert (rows["note"] != "").all()

    def test_a_column_without_anything_to_score_is_refused(self, tmp_path: Path) -> None:
        who = np.where(np.arange(NUM) < 80, np.arange(NUM) % 2, 2)
        with pytest.raises(
            ValueError, match="no label of 'who' in the validation split has a class that occurs in the training split"
        ):
            measure({"model": planted(tmp_path, who=who)})


def with_column(name: str, *, drop: float = 0.3) -> pd.DataFrame:
    """The planted table of the figures' tests, and a second column that is read less well."""
    table = quality_table()
    second = table[table["metric"] == "probe accuracy"].copy()
    second["metric"] = f"probe accuracy of {name}"
    of_model = second["source"] == "model"
    second.loc[of_model, ["value", "low", "high"]] -= drop * second.loc[of_model, ["layer_index"]].to_numpy() / 8
    return pd.concat([table, second], ignore_index=True)


class TestFigure:
    def test_it_shows_what_each_layer_adds_to_the_higher_control(self) -> None:
        table = with_column("who")
        figure = knowledge_curves(table)
        titles = [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes]
        assert titles[:2] == ["Class", "Who"]
        gains = {name: [] for name in ("probe accuracy", "probe accuracy of who")}
        for metric, found in gains.items():
            for layer in (f"blocks.{i}" for i in range(8)):
                at = [
                    {s: one(table, metric=metric, split="test", noise_level=p, source=s, layer=q).value for s, q in of}
                    for p in (0.1, 0.3, 0.5)
                    for of in [(("model", layer), ("random weights", layer), ("raw input", "input"))]
                ]
                found.append(np.mean([v["model"] - max(v["random weights"], v["raw input"]) for v in at]))
        curves = [line.get_ydata() for line in figure.axes[-1].lines if len(line.get_ydata()) == 8]
        np.testing.assert_allclose(curves, list(gains.values()), atol=1e-12)
        best = [int(np.argmax(gain)) for gain in gains.values()]
        assert best[0] != best[1]
        says = [
            f"best above the controls at blocks.{i} (+{max(g):.2f})" for i, g in zip(best, gains.values(), strict=True)
        ]
        assert title_of(figure) == f"Class {says[0]}; who {says[1]}"

    def test_a_column_below_its_controls_is_called_so(self) -> None:
        table = with_column("who")
        lower = (table["metric"] == "probe accuracy of who") & (table["source"] == "model")
        table.loc[lower, "value"] = 0.1
        assert title_of(knowledge_curves(table)).endswith("; who nowhere above the controls")

    def test_columns_without_controls_or_numbers_are_still_drawn(self) -> None:
        table = with_column("who")
        table = table[table["source"] == "model"].assign(value=np.nan)
        figure = knowledge_curves(table)
        assert title_of(figure) == "Class could not be compared; who could not be compared"
        assert figure.axes[0].get_title(loc="left") == "Class\nnothing measured"

    def test_a_table_without_probes_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no probe accuracy; probe data with labels, or pass --probe-labels"):
            knowledge_curves(quality_table(metrics=("effective rank",)))


class TestFrames:
    """A column with a label for every frame of its item."""

    @staticmethod
    def rows(path: Path, lengths: list[int], phases: list[Any], **columns: list[Any]) -> Path:
        motion = [[[float(100 * row + frame)] * 3 for frame in range(n)] for row, n in enumerate(lengths)]
        pq.write_table(pa.table({"motion": motion, "phase": phases, **columns}), path)
        return path

    def test_labels_go_with_their_frames_through_stride_cut_and_padding(self, tmp_path: Path) -> None:
        lengths = [3, 8, 10, 13, 4]
        # The number of the frame as its label, so that a value names its label; the last item has no labels.
        phases: list[Any] = [[f"{frame:02d}" for frame in range(n)] for n in lengths[:-1]]
        phases[1][6] = None
        path = self.rows(tmp_path / "x.parquet", lengths, [*phases, None])
        for stride in (1, 2):
            parts = load_motion(path, probe_labels="phase", length=4, stride=stride, up_axis=None)
            (samples,) = parts.values()
            batch = samples.batch(range(5))
            assert samples.normalization is not None
            frames = [samples.normalization.invert(x)[0].round().long() % 100 for x in batch.x]
            phase = column(samples, "phase")
            assert phase.labels.shape == (5, 4)
            told = [
                [None if label == MISSING else int(phase.class_names[label]) for label in row]
                for row in phase.labels.tolist()
            ]
            expected = [
                [
                    int(f) if real and i < 4 and (i, int(f)) != (1, 6) else None
                    for f, real in zip(row, there, strict=True)
                ]
                for i, (row, there) in enumerate(zip(frames, batch.real, strict=True))
            ]
            assert told == expected

    def test_every_frame_needs_a_label(self, tmp_path: Path) -> None:
        path = self.rows(tmp_path / "x.parquet", [4, 4], [[0, 1, 0, 1], [0, 1, 0]])
        with pytest.raises(
            ValueError, match="item 1 of train has 4 frames but 3 labels in 'phase'; pass a label for ev"
        ):
            load_motion(path, probe_labels="phase")

    def test_the_raw_input_is_read_place_by_place(self, tmp_path: Path) -> None:
        backbone = tiny_sit(shape=(3, 8))
        x = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))
        parts = [TensorSamples(x[i : i + 2], torch.tensor([0, 1]), ids=torch.tensor([i, i + 1])) for i in (0, 2, 4)]
        plan = ExtractionPlan(("input",), (0.0,), token_samples=2, pool_cells=raw_pool_cells((3, 8)))
        store = extract(raw_input(backbone, places=True), Splits(*parts), plan, tmp_path)
        np.testing.assert_allclose(store.tokens("input", 0.0), x.transpose(1, 2), atol=1e-6)
        np.testing.assert_allclose(store["input", 0.0], x.flatten(1), atol=1e-6)
        assert store.grid("input") == (8,)

    @pytest.mark.parametrize("shape", [(3, 8), (66, 64), (1, 32, 64), (3, 16, 32, 32), (4000, 9)])
    def test_the_raw_input_stays_narrow(self, shape: tuple[int, ...]) -> None:
        def width(cells: int) -> int:
            return shape[0] * int(np.prod([min(cells, edge) for edge in shape[1:]]))

        cells = raw_pool_cells(shape)
        assert width(cells) <= RAW_INPUT_WIDTH or cells == 1
        assert cells == max(shape[1:]) or width(cells + 1) > RAW_INPUT_WIDTH

    @staticmethod
    def splits(told: str = "sign") -> Splits:
        """Samples whose first channel switches its sign at a random frame; labels tell the sign, or nothing."""
        rng = np.random.default_rng(0)
        n, frames = 90, 8
        sign = np.where(np.arange(frames) < rng.integers(1, frames, n)[:, None], 1, -1)
        x = rng.normal(0, 0.3, (n, 2, frames))
        x[:, 0] += sign
        labels = (sign > 0).astype(np.int64) if told == "sign" else rng.integers(0, 2, (n, frames))
        labels[::3, 0] = MISSING
        labels[80:, 1] = 2  # of a class that is missing in the training split
        phase = LabelColumn("phase", torch.from_numpy(labels), ("down", "up", "gone"))
        every = TensorSamples(torch.from_numpy(x).float(), torch.arange(n) % 3, modality="motion", columns=(phase,))
        return Splits(*(Subset(every, range(i, i + 30), name=str(i)) for i in (0, 30, 60)))

    def test_frames_are_read_from_tokens_beside_both_controls(self, tmp_path: Path) -> None:
        extraction = ExtractionPlan(noise_levels=(0.1,), token_samples=30)
        plan = folder_module.RunPlan(CheckpointSource("-"), DataSource("-"), extraction)
        found = {}
        for told in ("sign", "nothing"):
            stores = probe.extract_all(tiny_sit(shape=(2, 8)), self.splits(told), plan, RunFolder(tmp_path / told))
            quality, _ = measure(stores, analyses=(frame_probes,))
            assert set(quality["source"]) == {"model", "random weights", "raw input"}
            found[told] = rows_of(quality, metric="probe accuracy of phase", split="test").set_index("source")
        assert found["sign"].loc["raw input", "value"] > 0.95
        assert float(found["sign"].loc["model", "value"].max()) > 0.7
        assert found["nothing"]["value"].max() < 0.65

    def test_a_number_is_that_of_the_dense_probe(self, tmp_path: Path) -> None:
        plan = ExtractionPlan(("blocks.1",), (0.1,), token_samples=25)
        store = extract(tiny_sit(shape=(2, 8)), self.splits(), plan, tmp_path)
        quality, _ = measure({"model": store}, analyses=(frame_probes,))
        assert len(quality) == 2
        kept = {split: store.columns["phase"][store.splits == split][:25] for split in SPLITS}
        known = {split: np.where(labels == 2, MISSING, labels) for split, labels in kept.items()}
        tokens = {split: store.tokens("blocks.1", 0.1, split=split) for split in SPLITS}
        result = dense_probe(tokens, known, (4,), ignore=MISSING).test
        shares = [np.trace(c) / c.sum() for c in result.confusions]
        row = one(quality, metric="probe accuracy of phase", split="test")
        assert row.value == pytest.approx(np.mean(shares), abs=1e-12)
        unlabeled, unseen = int((kept["test"] == MISSING).sum()), int((kept["test"] == 2).sum())
        assert min(unlabeled, unseen) > 0
        counts = (
            f"left out of 200: {unlabeled} without a label, {unseen} of a class that is missing in the training split"
        )
        assert row.note.endswith(counts)
        assert re.match(r"C=[\d.e+-]+, gradient norm ", row.note)

    def test_padding_never_counts(self, tmp_path: Path) -> None:
        whole = self.splits().train.samples
        lengths = torch.arange(90) % 3 * 2 + 4
        mask = torch.arange(8) < lengths[:, None]
        phase = whole.columns[0]
        phase = replace(phase, labels=phase.labels.where(mask, MISSING))
        every = TensorSamples(whole.x, whole.labels, mask=mask, modality="motion", columns=(phase,))
        splits = Splits(*(Subset(every, range(i, i + 30), name=str(i)) for i in (0, 30, 60)))
        plan = ExtractionPlan(("blocks.1", "blocks.2"), (0.1,), token_samples=30)
        store = extract(tiny_sit(shape=(2, 8)), splits, plan, tmp_path)
        before, _ = measure({"model": store}, analyses=(frame_probes, spatial))
        assert set(before["metric"]) == {"probe accuracy of phase"}  # and nothing that padding would decide
        assert recoverability_table(store).empty
        kept = load_file(token_path(tmp_path, 0))
        of_padding = (np.arange(4) * 2 >= lengths.numpy()[:, None])[None, None, ..., None]
        write_tensors(token_path(tmp_path, 0), {name: np.where(of_padding, 1e3, x) for name, x in kept.items()})
        after, _ = measure({"model": FeatureStore.open(tmp_path)}, analyses=(frame_probes,))
        pd.testing.assert_frame_equal(before, after)

    def test_a_grid_is_read_along_time(self, tmp_path: Path) -> None:
        """A picture of sound: the label of a column of tokens, whatever its height."""
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 2, (60, 6))
        x = rng.normal(0, 0.2, (60, 1, 4, 6)) + labels[:, None, None]
        when = LabelColumn("when", torch.from_numpy(labels), ("a", "b"), axis=1)
        every = TensorSamples(torch.from_numpy(x).float(), modality="audio", columns=(when,))
        splits = Splits(*(Subset(every, range(i, i + 20), name=str(i)) for i in (0, 20, 40)))
        plan = ExtractionPlan(("input",), (0.0,), token_samples=20)
        store = extract(raw_input(tiny_sit(shape=(1, 4, 6)), places=True), splits, plan, tmp_path)
        quality, _ = measure({"model": store}, analyses=(frame_probes,))
        assert quality["value"].min() > 0.98

    def test_without_tokens_a_run_says_what_to_pass(self, tmp_path: Path, cli: Any) -> None:
        checkpoint = tmp_path / "model.safetensors"
        model = tiny_sit(shape=(3, 8))
        save_checkpoint(checkpoint, model, model.module.state_dict(), training={})
        phases: list[Any] = [[0, 1] * 4] * 20
        path = self.rows(tmp_path / "x.parquet", [8] * 20, phases, label=[0, 1] * 10)
        command = ("probe", checkpoint, "--data", path, "--probe-labels", "phase", "--out", tmp_path / "r")
        code, _, err = cli(*command)
        assert (code, err.strip()) == (
            2,
            "layerprobe: 'phase' labels every frame, which the kept tokens are probed for; "
            "pass --token-samples 200 or so",
        )
        assert not (tmp_path / "r").exists()
        assert cli(*command, "--dry-run")[0] == 2
        store = extract(tiny_sit(shape=(2, 8)), self.splits(), ExtractionPlan(("blocks.1",), (0.1,)), tmp_path / "s")
        quality, _ = measure({"model": store}, analyses=(frame_probes,))
        assert quality["value"].isna().all()
        assert set(quality["note"]) == {"no tokens were kept; pass --token-samples"}


def digits_in_rows(path: Path) -> Path:
    """Some of the embedded digits as gray images, with two further columns."""
    samples = digits().train
    batch = samples.batch(range(120))
    assert batch.labels is not None
    images = ((batch.x[:, 0] + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    columns = {
        "image": list(images),
        "label": batch.labels.tolist(),
        "round": [None if i < 5 else "yes" if d in (0, 6, 8, 9) else "no" for i, d in enumerate(batch.labels.tolist())],
        "who": np.random.default_rng(0).integers(0, 3, 120).tolist(),
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.Value("int64"),
            "round": datasets.Value("string"),
            "who": datasets.Value("int64"),
        }
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(path)
    return path


def test_one_run_tells_what_every_layer_knows_of_every_column(
    tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = digits_in_rows(tmp_path / "data")
    reading = ("digits", "--data", data, "--label-column", "label", "--noise-levels", "0.1")
    asked = ("--layers", "blocks.1,blocks.4", "--probe-labels", "round,who")
    run = tmp_path / "r"
    code, _, err = cli("extract", *reading, *asked, "--out", run)
    assert code == 0, err
    assert json.loads((run / "plan.json").read_text())["data"]["probe_labels"] == "round,who"
    probe.analyze_run(run)
    quality = pd.read_csv(run / "quality.csv")
    for name in ("round", "who"):
        rows = rows_of(quality, metric=f"probe accuracy of {name}", split="test")
        assert set(rows["source"]) == {"model", "random weights", "raw input"}
    assert one(quality, metric="probe accuracy of round", source="model", layer="blocks.4", split="test").value > 0.7
    lines = text_module.describe_labels(run)
    assert [re.split(r"[ :]+", line)[1] for line in lines if line.startswith("knows")] == ["class", "round", "who"]
    assert all(re.search(r"random weights 0\.\d\d, raw input 0\.\d\d", line) for line in lines if "knows" in line)
    # Rendering takes most of the time, and other tests see to it.
    monkeypatch.setattr(figures, "save_figure", lambda figure, folder, name, **_: (Path(name),))
    drawn = {path.name for path in figures.draw_figures(run)}
    assert {"what-each-layer-knows", "probe-accuracy-of-round-curves", "probe-accuracy-of-who-heatmap"} <= drawn
    svg = '<svg viewBox="0 0 1 1"></svg>'
    monkeypatch.setattr("layerprobe.analyses.report.inline_svg.to_svg", lambda figure: svg)
    page = write_report(run).read_text(encoding="utf-8").partition("What each layer knows</h2>")[2]
    assert page.index("above the controls") < page.index("Probe accuracy peaks") < page.index("Probe accuracy of who")


def test_a_bad_choice_of_columns_is_one_line_and_no_folder(
    tmp_path: Path, cli: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = digits_in_rows(tmp_path / "data")
    capsys.readouterr()  # the bar of save_to_disk
    for source, names, message in (
        (data, "label", "which is probed anyway; name it once"),
        ("digits", "who", "leave out --probe-labels"),
    ):
        code, _, err = cli("probe", "digits", "--data", source, "--probe-labels", names, "--out", tmp_path / "q")
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert message in err
        assert not (tmp_path / "q").exists()
