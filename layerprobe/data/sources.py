"""One way in to every data set, as the command line uses it."""

from __future__ import annotations

from pathlib import Path

from layerprobe.data.base import Samples, Splits
from layerprobe.data.digits import digits
from layerprobe.data.images import load_images
from layerprobe.data.splits import split as divide
from layerprobe.data.splits import take


def load(
    source: str | Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_fit: int | None = None,
    num_choose: int | None = None,
    num_report: int | None = None,
    seed: int = 0,
    expect_shape: tuple[int, ...] | None = None,
    require_labels: bool = False,
) -> Splits:
    """Reads a data set and divides it.

    Args:
        source: "digits" for the embedded scans (a folder of that name is "./digits"), else what `load_images` takes.
        size: As in `load_images`, like the next four.
        channels: 1 or 3.
        split: The only part to read.
        image_column: Where the images are.
        label_column: Where the labels are.
        num_fit: As in `splits.split`, like the next two.
        num_choose: Samples to choose penalties and layers with.
        num_report: Samples for the numbers that are shown.
        seed: Decides which sample falls to which split, except for the digits, whose splits are fixed.
        expect_shape: Shape (C, H, W) that the model takes.
        require_labels: Refuse unlabelled data.

    Raises:
        ValueError: If the data cannot be read or divided, or is not what was expected.
    """
    counts = {"num_fit": num_fit, "num_choose": num_choose, "num_report": num_report}
    options = {
        "size": size,
        "channels": channels,
        "split": split,
        "image_column": image_column,
        "label_column": label_column,
    }
    if source == "digits":
        given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
        if given:
            raise ValueError(f"the embedded digits are 1x8x8 and labelled as they are; leave out {' '.join(given)}")
        embedded = digits()
        _check_shape(embedded.fit, expect_shape, source)
        return take(embedded, **counts)
    parts = load_images(
        source, size=size, channels=channels, split=split, image_column=image_column, label_column=label_column
    )
    for samples in parts.values():
        _check_shape(samples, expect_shape, source)
        if require_labels and samples.labels is None:
            raise ValueError(f"{source} has no labels; pass --label-column, or put the images in one folder per class")
    return divide(parts, **counts, seed=seed)


def _check_shape(samples: Samples, expected: tuple[int, ...] | None, source: str | Path) -> None:
    if expected is None or samples.shape == tuple(expected):
        return
    channels, height, width = samples.shape
    seen = f"{height}x{width} with {channels} channel{'s' * (channels > 1)}"
    wanted = "x".join(map(str, expected))
    raise ValueError(f"images are {seen} but the model takes {wanted}; {_remedy(samples.shape, expected, source)}")


def _remedy(shape: tuple[int, ...], expected: tuple[int, ...], source: str | Path) -> str:
    if source == "digits":
        return "pass other data than the embedded digits"
    if len(expected) != 3 or expected[0] not in (1, 3):
        return "encode them as the model's training did first"
    if expected[1] != expected[2]:
        return f"resize them to {expected[1]}x{expected[2]} first"
    options = [f"--size {expected[1]}"] * (shape[1:] != tuple(expected[1:]))
    options += [f"--channels {expected[0]}"] * (shape[0] != expected[0])
    return f"pass {' '.join(options)}"
