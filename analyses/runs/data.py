"""Opening the data of a run, for probing and for training, encoded by an autoencoder where the run names one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerprobe.data import Splits, encode_splits, for_probing, latent_shape, load, take
from layerprobe.progress import TaskProgress, named_progress


def training_splits(
    source: str, shape: tuple[int, ...], options: Mapping[str, Any], *, progress: TaskProgress | None = None
) -> Splits:
    """The data for training: everything that the training split owns, and the test samples of the probing run."""
    reading, encoding = split_options(options)
    every = {name: value for name, value in reading.items() if not name.startswith("num_")}
    owned = load(source, expect_shape=None if encoding else shape, **every)
    counts = {name: value for name, value in reading.items() if name in ("num_validation", "num_test")}
    probed = for_probing(take(owned, **counts), given=reading)
    splits = Splits(owned.train, probed.validation, probed.test)
    return encoded_splits(splits, encoding, shape, progress) if encoding else splits


def load_splits(source: str, options: Mapping[str, Any]) -> tuple[Splits, tuple[int, ...]]:
    """A data set as it is read, not yet encoded, and the shape (C, *grid) that a model of it takes."""
    reading, encoding = split_options(options)
    splits = load(source, **reading)
    return splits, latent_shape(splits.train.shape, encoding["vae"]) if encoding else splits.train.shape


def encoded(splits: Splits, options: Mapping[str, Any], *, progress: TaskProgress | None = None) -> Splits:
    """The latents of a data set where the options name an autoencoder, else the data set itself."""
    encoding = split_options(options)[1]
    return encoded_splits(splits, encoding, None, progress) if encoding else splits


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that read a data set, and those that encode it; none of these without a VAE."""
    names = ("vae", "latent_scale") if "vae" in options else ()
    encoding = {name: value for name, value in options.items() if name in names}
    return {name: value for name, value in options.items() if name not in names}, encoding


def encoded_splits(
    splits: Splits, encoding: Mapping[str, Any], shape: tuple[int, ...] | None, progress: TaskProgress | None
) -> Splits:
    return encode_splits(splits, **encoding, expect_shape=shape, progress=named_progress(progress, "encoding images"))
