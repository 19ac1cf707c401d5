"""Labeled video made from MNIST: one handwritten digit per clip, moving in one of eight directions.

    python moving_digits.py MNIST moving-digits --clips 4000

The digit moves one pixel per frame and passes near the middle of the picture halfway through the clip. The picture
wraps around: what leaves it on one side returns on the other. The parts "train" and "test" use the digits of the same
parts of MNIST.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Sequence, disable_progress_bars, load_dataset
from PIL import Image as Pillow

FRAMES, SIZE = 16, 32  # frames of a clip, pixels of a side
MIDDLE = 2  # row and column at which a digit of 28 pixels is centered
# Rows and columns of a step, in clockwise order.
DIRECTIONS = {
    "up": (-1, 0),
    "up-right": (-1, 1),
    "right": (0, 1),
    "down-right": (1, 1),
    "down": (1, 0),
    "down-left": (1, -1),
    "left": (0, -1),
    "up-left": (-1, -1),
}
FEATURES = Features(
    {
        "video": Sequence(Image()),
        "digit": ClassLabel(names=[str(digit) for digit in range(10)]),
        "direction": ClassLabel(names=list(DIRECTIONS)),
    }
)


def moving_digits(mnist: Dataset, clips: int, *, seed: int) -> Dataset:
    """Makes clips of digits from `mnist`: all digits before any is repeated, all directions equally often.

    Args:
        mnist: Rows with a column "image" of at most 32 x 32 pixels and a column "label", 0 to 9.
        clips: Number of clips.
        seed: Seed of digits, directions and positions; a larger number of clips does not change the first ones.
    """
    digits = np.random.default_rng([seed, 0]).permutation(len(mnist))
    directions = np.random.default_rng([seed, 1])
    places = np.random.default_rng([seed, 2])
    rows = []
    for clip in range(clips):
        if clip % len(DIRECTIONS) == 0:
            order = directions.permutation(len(DIRECTIONS))
        digit, direction = mnist[int(digits[clip % len(digits)])], int(order[clip % len(DIRECTIONS)])
        step = list(DIRECTIONS.values())[direction]
        frames = moved(np.asarray(digit["image"].convert("L")), step, place=MIDDLE + places.integers(-1, 2, size=2))
        rows.append({"video": [png(frame) for frame in frames], "digit": digit["label"], "direction": direction})
    return Dataset.from_list(rows, features=FEATURES)


def moved(digit: Any, step: tuple[int, int], *, place: Any) -> list[Any]:
    """Returns frames (32, 32) of a digit that moves by `step` per frame and is at `place` (row, column) halfway."""
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    canvas[: digit.shape[0], : digit.shape[1]] = digit
    halfway = FRAMES // 2
    return [np.roll(canvas, np.add(place, np.multiply(i - halfway, step)), axis=(0, 1)) for i in range(FRAMES)]


def png(frame: Any) -> dict[str, Any]:
    """Encodes pixels as PNG, in the form in which `datasets` stores an image."""
    content = io.BytesIO()
    Pillow.fromarray(frame).save(content, format="png")
    return {"bytes": content.getvalue(), "path": None}


def main() -> None:
    """Writes OUT/train.parquet and OUT/test.parquet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("mnist", help="folder with train.parquet and test.parquet, or a name on the Hugging Face Hub")
    parser.add_argument("out", type=Path, help="folder to write train.parquet and test.parquet to")
    parser.add_argument(
        "--clips", type=int, default=4000, help="number of training clips; the test part has a tenth as many"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.clips < 80:
        parser.error(f"--clips is {arguments.clips}; pass at least 80, so that the test part has every direction once")
    disable_progress_bars()
    parts = load_dataset(arguments.mnist)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part, clips in (("train", arguments.clips), ("test", arguments.clips // 10)):
        moving_digits(parts[part], clips, seed=arguments.seed).to_parquet(arguments.out / f"{part}.parquet")
        print(f"{arguments.out / f'{part}.parquet'}: {clips} clips")


if __name__ == "__main__":
    main()
