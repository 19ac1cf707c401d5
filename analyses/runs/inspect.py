"""Description of a data set before a training or a probe: counts, classes, lengths, unreadable items, a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerprobe.analyses.wording import copy_sentences
from layerprobe.backbones import SMALL_PRESETS, SiTConfig
from layerprobe.data import (
    FILE,
    MISSING,
    AudioDecoder,
    DataSource,
    ImageSamples,
    MediaSamples,
    Reading,
    Samples,
    Splits,
    Subset,
    guess_modality,
    label_column,
    latent_format,
    read_columns,
    read_table,
    reading_lines,
    rendering_of,
    without_copies,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure

# A column with more different values, or with a different value in most rows, is taken for names, not classes.
MOST_CLASSES = 100
PICTURES = 10
SHOWN = 12  # classes and bad items that are listed
_AXES = {
    "image": "channels x height x width",
    "motion": "channels x frames",
    "video": "channels x frames x height x width",
}


def examine_data(source: DataSource) -> tuple[dict[str, Any], Splits]:
    """Reads every item of a data set once and describes it.

    Problems that would stop a training are counted instead: unreadable items are left out, and the first of several
    columns of classes is taken as the label, unless `source` says otherwise.

    Args:
        source: Data set, and how it is read.

    Returns:
        The description, as JSON values, and the data.

    Raises:
        ValueError: If the data cannot be read at all.
    """
    table: dict[str, Dataset] = {}
    notes: list[str] = []
    if source.source != "digits" and latent_format(source.source) is None:
        source, table = _completed(source, notes)
    splits = source.load()
    model_shape = source.model_shape(splits)
    whole = list(_whole(splits))
    item = next((column for column in map(_item_column, whole) if column), None)
    uses = {item: "item", source.label_column: "label"}
    uses |= dict.fromkeys((column.name for column in splits.train.columns), "further labels")
    first = next(iter(table.values()), None)
    record: dict[str, Any] = {
        "data": source.source,
        "modality": splits.train.modality,
        "columns": {} if first is None else {name: _column(name, kind, uses) for name, kind in first.features.items()},
        "parts": {name: len(rows) for name, rows in table.items()},
        "reading": None if splits.train.reading is None else splits.train.reading.to_dict(),
        "bad": {name: problem for samples in whole for name, problem in _bad(samples).items()},
        "splits": {name: len(samples) for name, samples in splits.items()},
        "shape": list(splits.train.shape),
        "axes": _axes(whole[0]),
        "lengths": _lengths(whole),
        "classes": _classes(splits),
        "copies": [asdict(copies) for copies in without_copies(splits).copies],
        "normalization": _normalization(whole[0]),
        "presets": _presets(model_shape),
        "notes": notes,
    }
    if model_shape != splits.train.shape:
        record["latents"] = list(model_shape)
    return record, splits


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """Returns the description of `examine_data` as readable lines."""
    lines = {"data": f"{record['data']} ({record['modality']})"}
    if record["data"] == "digits":
        lines["data"] += ", the embedded scans; a folder of that name is ./digits"
    if record["reading"] is not None:
        lines |= reading_lines(Reading.from_dict(record["reading"]))
    lines["rows"] = ", ".join(f"{count} in {name}" for name, count in record["parts"].items())
    lines |= {
        f"column {name}": column["type"] + (f", taken as {column['taken_as']}" if column["taken_as"] else "")
        for name, column in record["columns"].items()
    }
    lines["splits"] = ", ".join(f"{name} {count}" for name, count in record["splits"].items())
    lines["sample"] = f"{_times(record['shape'])} ({record['axes']})"
    lines["latents"] = _times(record.get("latents", ()))
    lines["lengths"] = _length_line(record["lengths"])
    lines |= {f"classes of {name}": _class_line(counts) for name, counts in record["classes"].items()}
    lines["values"] = _value_line(record["normalization"], record["modality"])
    lines |= {f"--preset {name}": text for name, text in record["presets"].items()}
    lines["cannot be read"] = _bad_line(record["bad"]) if record["bad"] else "nothing" * bool(record["parts"])
    width = max(map(len, lines)) + 2
    shown = [f"{name:<{width}}{text}" for name, text in lines.items() if text]
    return [*shown, *(f"{'copies':<{width}}{text}" for text in copy_sentences(record["copies"])), *record["notes"]]


def peek(splits: Splits) -> Figure:
    """Returns a figure of the first samples of the training split, of as many classes as possible.

    Raises:
        ValueError: If the samples are latents, which have no picture.
    """
    from layerprobe.analyses.figures import strip

    samples = splits.train
    if samples.modality == "image" and samples.shape[0] not in (1, 3):
        raise ValueError("latents have no picture; leave out --out, or pass the images that were encoded")
    chosen = _one_of_each(samples.labels, len(samples))
    batch = samples.batch(chosen)
    return strip(batch.x, rendering_of(samples), [_title(samples, index) for index in chosen], mask=batch.mask)


def _completed(source: DataSource, notes: list[str]) -> tuple[DataSource, dict[str, Dataset]]:
    """Returns the source with the options that `examine_data` decides, and the table."""
    modality = source.modality or guess_modality(source.source, split=source.split, data_root=source.data_root)
    table = read_table(source.source, modality, split=source.split, data_root=source.data_root)
    skip_bad = sum(map(len, table.values())) if source.skip_bad is None else source.skip_bad
    source = replace(source, modality=modality, skip_bad=skip_bad)
    try:
        label = label_column(table, source.label_column)
    except ValueError as error:
        if source.label_column is not None:
            raise
        notes.append(f"note: {error}")
        label = next(iter(_class_columns(table, without=None)))
    if label is None:
        return source, table
    probe_labels = source.probe_labels
    if probe_labels is None:
        probe_labels = ",".join(_class_columns(table, without=label))
    return replace(source, label_column=label, probe_labels=probe_labels), table


def _class_columns(table: Mapping[str, Dataset], *, without: str | None) -> list[str]:
    """Returns the columns that contain classes, by their types and the number of their values."""
    rows = next(iter(table.values()))
    columns = []
    for name, kind in rows.features.items():
        # webdataset's own columns begin with two underscores.
        if name in (without, FILE) or name.startswith("__") or "," in name or not _is_discrete(kind):
            continue
        if 2 <= len(rows.unique(name)) <= min(MOST_CLASSES, len(rows) // 2) and _are_labels(table, name):
            columns.append(name)
    return columns


def _is_discrete(kind: Any) -> bool:
    from datasets import ClassLabel, Value

    named = isinstance(kind, Value) and (kind.dtype == "string" or kind.dtype.startswith(("int", "uint")))
    return named or isinstance(kind, ClassLabel)


def _are_labels(table: Mapping[str, Dataset], name: str) -> bool:
    try:
        return bool(read_columns(table, [name]))
    except ValueError:
        return False


def _whole(splits: Splits) -> Iterator[Samples]:
    """Yields the samples that the splits are subsets of, each once."""
    yielded: list[int] = []
    for _, samples in splits.items():
        while isinstance(samples, Subset):
            samples = samples.samples
        if id(samples) not in yielded:
            yielded.append(id(samples))
            yield samples


def _item_column(samples: Samples) -> str | None:
    if isinstance(samples, MediaSamples):
        return samples.items.column
    return samples.images.column if isinstance(samples, ImageSamples) else None


def _bad(samples: Samples) -> dict[str, str]:
    if isinstance(samples, MediaSamples):
        return samples.items.bad
    return samples.images.bad if isinstance(samples, ImageSamples) else {}


def _column(name: str, kind: Any, uses: Mapping[str | None, str]) -> dict[str, str | None]:
    return {"type": _type_name(kind), "taken_as": uses.get(name)}


def _type_name(kind: Any) -> str:
    if hasattr(kind, "decode"):  # Image, Audio, Video
        return type(kind).__name__
    if isinstance(kind, dict):
        return f"record of {', '.join(kind)}"
    if hasattr(kind, "feature"):
        return f"list of {_type_name(kind.feature)}"
    names = getattr(kind, "names", None)
    return f"{len(names)} classes" if names is not None else str(getattr(kind, "dtype", "") or type(kind).__name__)


def _axes(samples: Samples) -> str:
    if isinstance(samples, MediaSamples) and isinstance(samples.items.decoder, AudioDecoder):
        return "channels x mels x columns" if samples.items.decoder.form == "log-mel" else "samples x frames"
    return _AXES[samples.modality]


def _lengths(whole: Sequence[Samples]) -> dict[str, Any] | None:
    """Returns the lengths of the items before they were cut or padded to one length."""
    media = [samples for samples in whole if isinstance(samples, MediaSamples)]
    if not media:
        return None
    decoder = media[0].items.decoder
    kept = media[0].shape[decoder.time_axis]
    lengths = torch.cat([samples.items.shapes[:, decoder.time_axis] for samples in media])
    padding = (kept - lengths).clamp(min=0).double() / kept
    unit = f"columns of {1000 * decoder.hop / decoder.rate:.3g} ms" if isinstance(decoder, AudioDecoder) else "frames"
    return {
        "unit": unit,
        "shortest": int(lengths.min()),
        "median": float(lengths.double().quantile(0.5)),
        "longest": int(lengths.max()),
        "kept": kept,
        "cut": int((lengths > kept).sum()),
        "padded": int((lengths < kept).sum()),
        "padding": round(float(padding.mean()), 4),
    }


def _classes(splits: Splits) -> dict[str, dict[str, dict[str, int]]]:
    """Samples of each class by label column and split; "(none)" are those without a label."""
    named: dict[str, dict[str, dict[str, int]]] = {}
    for split, samples in splits.items():
        columns = [(column.name, column.labels, column.class_names) for column in samples.columns]
        if samples.labels is not None:
            names = samples.class_names or tuple(map(str, range(samples.num_classes)))
            columns.insert(0, ("label", samples.labels, names))
        for name, labels, class_names in columns:
            named.setdefault(name, {})[split] = _counts(labels, class_names)
    return named


def _counts(labels: Tensor, class_names: Sequence[str]) -> dict[str, int]:
    counts = torch.bincount(labels[labels != MISSING], minlength=len(class_names)).tolist()
    missing = int((labels == MISSING).sum())
    return dict(zip(class_names, counts, strict=True)) | ({"(none)": missing} if missing else {})


def _normalization(samples: Samples) -> dict[str, list[float]] | None:
    statistics = samples.normalization if isinstance(samples, MediaSamples) else None
    return None if statistics is None else statistics.to_dict()


def _presets(shape: tuple[int, ...]) -> dict[str, str]:
    """Returns the tokens of a sample in each of the networks for small machines."""
    presets = {}
    for name in SMALL_PRESETS:
        try:
            config = SiTConfig.preset(name, shape=shape)
        except ValueError as error:
            presets[name] = str(error)
        else:
            grid = f" ({_times(config.grid)})" if len(config.grid) > 1 else ""
            presets[name] = f"{math.prod(config.grid)} tokens{grid}, patches of {config.patch_name}"
    return presets


def _length_line(lengths: Mapping[str, Any] | None) -> str:
    if lengths is None:
        return ""
    if lengths["shortest"] == lengths["longest"] == lengths["kept"]:
        return f"all {lengths['kept']} {lengths['unit']}"
    spread = f"{lengths['shortest']} to {lengths['longest']} {lengths['unit']}, median {lengths['median']:g}"
    if not lengths["cut"] and not lengths["padded"]:
        return spread
    return (
        f"{spread}; as {lengths['kept']}, {lengths['cut']} are cut and {lengths['padded']} padded "
        f"({lengths['padding']:.0%} of all is padding)"
    )


def _class_line(splits: Mapping[str, Mapping[str, int]]) -> str:
    train = splits["train"]
    classes = {name: count for name, count in train.items() if name != "(none)"}
    shown = ", ".join(f"{name} {count}" for name, count in list(train.items())[:SHOWN])
    more = f", and {len(train) - SHOWN} more" if len(train) > SHOWN else ""
    absent = [
        f"{name} has none in {split}"
        for split, counts in splits.items()
        for name, count in counts.items()
        if not count and name != "(none)"
    ]
    spread = " to ".join(map(str, sorted({min(classes.values()), max(classes.values())})))
    text = f"{len(classes)}, {spread} samples each in train: {shown}{more}"
    return text + (f"; {'; '.join(absent[:3])}" + ("; ..." if len(absent) > 3 else "") if absent else "")


def _value_line(normalization: Mapping[str, Sequence[float]] | None, modality: str) -> str:
    if normalization is None:
        return "pixels, as -1 to 1" if modality in ("image", "video") else ""
    spans = {name: " to ".join(f"{x:.3g}" for x in sorted({min(of), max(of)})) for name, of in normalization.items()}
    return f"mean {spans['mean']} and standard deviation {spans['std']} per channel become 0 and 1"


def _bad_line(bad: Mapping[str, str]) -> str:
    shown = "; ".join(f"{name}: {problem}" for name, problem in list(bad.items())[:SHOWN])
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return f"{len(bad)}, pass --skip-bad {len(bad)} to leave them out: {shown}{more}"


def _one_of_each(labels: Tensor | None, num: int) -> list[int]:
    """Returns the positions of samples to show: the first of every class, then the second, and so on."""
    if labels is None:
        return list(range(min(num, PICTURES)))
    counts: dict[int, int] = {}
    ranked = []
    for position, label in enumerate(labels.tolist()):
        ranked.append((counts.setdefault(label, 0), label, position))
        counts[label] += 1
    return [position for _, _, position in sorted(ranked)[:PICTURES]]


def _title(samples: Samples, index: int) -> str:
    labels = [] if samples.labels is None else [(int(samples.labels[index]), samples.class_names)]
    labels += [(int(column.labels[index]), column.class_names) for column in samples.columns]
    texts = [names[label] if names else str(label) for label, names in labels[:2] if label != MISSING]
    return ", ".join(texts) or f"sample {int(samples.ids[index])}"


def _times(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))
