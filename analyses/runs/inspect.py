"""What a data set is to a training or a probe, before either begins: what was found in it, counted and looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerprobe.analyses.runs import data as runs
from layerprobe.backbones import SMALL_PRESETS, SiTConfig
from layerprobe.data import (
    FILE,
    MISSING,
    AudioDecoder,
    ImageSamples,
    MediaSamples,
    Samples,
    Splits,
    Subset,
    guess_modality,
    label_column,
    latent_format,
    read_columns,
    read_table,
    rendering_of,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure

# A column of more different values, or where most rows have their own, is taken for names and not for classes.
MOST_CLASSES = 100
PICTURES = 10
SHOWN = 12  # classes and bad items that are listed
_AXES = {
    "image": "channels x height x width",
    "motion": "channels x frames",
    "video": "channels x frames x height x width",
}


def examine_data(source: str, reading: Mapping[str, Any]) -> tuple[dict[str, Any], Splits]:
    """Reads every item of a data set once and says what was found.

    What a training would stop for is counted instead: items that cannot be read are left out, and of several columns of
    classes the first is taken, unless `reading` says otherwise.

    Args:
        source: What `sources.load` takes.
        reading: Its options.

    Returns:
        The findings, as JSON, and the data.

    Raises:
        ValueError: If the data cannot be read at all.
    """
    reading = dict(reading)
    table: dict[str, Dataset] = {}
    notes: list[str] = []
    if source != "digits" and latent_format(source) is None:
        reading, table = _completed(source, reading, notes)
    splits, model_shape = runs.load_splits(source, reading)
    whole = list(_whole(splits))
    item = next((found for found in map(_item_column, whole) if found), None)
    taken = {item: "item", reading.get("label_column"): "label"}
    taken |= dict.fromkeys((column.name for column in splits.train.columns), "further labels")
    first = next(iter(table.values()), None)
    record: dict[str, Any] = {
        "data": source,
        "modality": splits.train.modality,
        "columns": {} if first is None else {name: _column(name, kind, taken) for name, kind in first.features.items()},
        "parts": {name: len(rows) for name, rows in table.items()},
        "bad": {name: said for samples in whole for name, said in _bad(samples).items()},
        "splits": {name: len(samples) for name, samples in splits.items()},
        "shape": list(splits.train.shape),
        "axes": _axes(whole[0]),
        "lengths": _lengths(whole),
        "classes": _classes(splits),
        "normalization": _normalization(whole[0]),
        "presets": _presets(model_shape),
        "notes": notes,
    }
    if model_shape != splits.train.shape:
        record["latents"] = list(model_shape)
    return record, splits


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """The findings for people."""
    told = {"data": f"{record['data']} ({record['modality']})"}
    told["rows"] = ", ".join(f"{count} in {name}" for name, count in record["parts"].items())
    told |= {
        f"column {name}": found["type"] + (f", taken as {found['taken_as']}" if found["taken_as"] else "")
        for name, found in record["columns"].items()
    }
    told["splits"] = ", ".join(f"{name} {count}" for name, count in record["splits"].items())
    told["sample"] = f"{_times(record['shape'])} ({record['axes']})"
    told["latents"] = _times(record.get("latents", ()))
    told["lengths"] = _length_line(record["lengths"])
    told |= {f"classes of {name}": _class_line(counts) for name, counts in record["classes"].items()}
    told["values"] = _value_line(record["normalization"], record["modality"])
    told |= {f"--preset {name}": said for name, said in record["presets"].items()}
    told["cannot be read"] = _bad_line(record["bad"]) if record["bad"] else "nothing" * bool(record["parts"])
    width = max(map(len, told)) + 2
    return [*(f"{name:<{width}}{said}" for name, said in told.items() if said), *record["notes"]]


def peek(splits: Splits) -> Figure:
    """The first samples of the training split, of as many classes as possible.

    Raises:
        ValueError: If they have no picture.
    """
    from layerprobe.analyses.figures import strip

    samples = splits.train
    if samples.modality == "image" and samples.shape[0] not in (1, 3):
        raise ValueError("latents have no picture; leave out --out, or pass the images that they were made of")
    chosen = _one_of_each(samples.labels, len(samples))
    batch = samples.batch(chosen)
    return strip(batch.x, rendering_of(samples), [_title(samples, index) for index in chosen], mask=batch.mask)


def _completed(source: str, given: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, Any], dict[str, Dataset]]:
    """The options with what `examine_data` decides, and the table."""
    reading = dict(given)
    reading["modality"] = reading.get("modality") or guess_modality(source, split=reading.get("split"))
    table = read_table(source, reading["modality"], split=reading.get("split"))
    reading.setdefault("skip_bad", sum(map(len, table.values())))
    try:
        label = label_column(table, reading.get("label_column"))
    except ValueError as error:
        if "label_column" in given:
            raise
        notes.append(f"note: {error}")
        label = next(iter(_class_columns(table, without=None)))
    if label is not None:
        reading["label_column"] = label
        if "probe_labels" not in given:
            reading["probe_labels"] = ",".join(_class_columns(table, without=label))
    return reading, table


def _class_columns(table: Mapping[str, Dataset], *, without: str | None) -> list[str]:
    """The columns that hold classes, by their types and the number of their values."""
    rows = next(iter(table.values()))
    found = []
    for name, kind in rows.features.items():
        # What begins with two underscores is webdataset's own.
        if name in (without, FILE) or name.startswith("__") or "," in name or not _is_discrete(kind):
            continue
        if 2 <= len(rows.unique(name)) <= min(MOST_CLASSES, len(rows) // 2) and _are_labels(table, name):
            found.append(name)
    return found


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
    """What the splits are parts of, each once."""
    seen: list[int] = []
    for _, samples in splits.items():
        while isinstance(samples, Subset):
            samples = samples.samples
        if id(samples) not in seen:
            seen.append(id(samples))
            yield samples


def _item_column(samples: Samples) -> str | None:
    if isinstance(samples, MediaSamples):
        return samples.items.column
    return samples.images.column if isinstance(samples, ImageSamples) else None


def _bad(samples: Samples) -> dict[str, str]:
    if isinstance(samples, MediaSamples):
        return samples.items.bad
    return samples.images.bad if isinstance(samples, ImageSamples) else {}


def _column(name: str, kind: Any, taken: Mapping[str | None, str]) -> dict[str, str | None]:
    return {"type": _type_name(kind), "taken_as": taken.get(name)}


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
    """Of the items, before they were cut or padded to one length."""
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
    """What the networks for small machines make of a sample."""
    found = {}
    for name in SMALL_PRESETS:
        try:
            config = SiTConfig.preset(name, shape=shape)
        except ValueError as error:
            found[name] = str(error)
        else:
            grid = f" ({_times(config.grid)})" if len(config.grid) > 1 else ""
            found[name] = f"{math.prod(config.grid)} tokens{grid}, patches of {config.patch_name}"
    return found


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
    fit = splits["train"]
    real = {name: count for name, count in fit.items() if name != "(none)"}
    shown = ", ".join(f"{name} {count}" for name, count in list(fit.items())[:SHOWN])
    more = f", and {len(fit) - SHOWN} more" if len(fit) > SHOWN else ""
    absent = [
        f"{name} has none in {split}"
        for split, counts in splits.items()
        for name, count in counts.items()
        if not count and name != "(none)"
    ]
    spread = " to ".join(map(str, sorted({min(real.values()), max(real.values())})))
    said = f"{len(real)}, {spread} samples each in train: {shown}{more}"
    return said + (f"; {'; '.join(absent[:3])}" + ("; ..." if len(absent) > 3 else "") if absent else "")


def _value_line(normalization: Mapping[str, Sequence[float]] | None, modality: str) -> str:
    if normalization is None:
        return "pixels, as -1 to 1" if modality in ("image", "video") else ""
    spans = {name: " to ".join(f"{x:.3g}" for x in sorted({min(of), max(of)})) for name, of in normalization.items()}
    return f"mean {spans['mean']} and standard deviation {spans['std']} per channel become 0 and 1"


def _bad_line(bad: Mapping[str, str]) -> str:
    shown = "; ".join(f"{name}: {said}" for name, said in list(bad.items())[:SHOWN])
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return f"{len(bad)}, pass --skip-bad {len(bad)} to leave them out: {shown}{more}"


def _one_of_each(labels: Tensor | None, num: int) -> list[int]:
    """Positions of samples to show: the first of every class, then the second, ..."""
    if labels is None:
        return list(range(min(num, PICTURES)))
    seen: dict[int, int] = {}
    ranked = []
    for position, label in enumerate(labels.tolist()):
        ranked.append((seen.setdefault(label, 0), label, position))
        seen[label] += 1
    return [position for _, _, position in sorted(ranked)[:PICTURES]]


def _title(samples: Samples, index: int) -> str:
    known = [] if samples.labels is None else [(int(samples.labels[index]), samples.class_names)]
    known += [(int(column.labels[index]), column.class_names) for column in samples.columns]
    told = [names[label] if names else str(label) for label, names in known[:2] if label != MISSING]
    return ", ".join(told) or f"sample {int(samples.ids[index])}"


def _times(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))
