"""Which data set is read, and how."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from layerprobe.data.names import AudioForm, Modality
from layerprobe.files import absolute_source, check_there, is_no_path, refuse_memory
from layerprobe.options import DATA_PANEL, MEDIA_PANEL, check_ranges, option, to_record

if TYPE_CHECKING:
    from layerprobe.data.samples import Splits
    from layerprobe.progress import StepProgress

# Fields that encode images rather than read them.
_ENCODING = ("vae", "latent_scale")


@dataclass(frozen=True)
class DataSource:
    """A data set and how it is read. Fields that are None take the default of the loader of the data's modality.

    Attributes:
        source: Data set: 'digits' for the embedded scans, a .parquet, .arrow or .tar file, a folder of these or of
            images, audio, motion, video or latents, or owner/name on the Hub.
        size: Side in pixels to which images and video frames are resized, as squares.
        channels: Number of color channels: 1 (gray) or 3 (color).
        split: Only part of the data to read, such as train.
        data_root: Folder that links and tables of the data may name files in, beside the folder of the data.
        image_column: Column of the images.
        modality: Kind of the data, if files and columns leave it open: image, audio, motion or video.
        column: Column of the audio, motion or video.
        length: Number of frames of a sample; longer items are cut, shorter ones padded.
        stride: Distance between the frames of motion or video that are kept; 1 keeps all.
        root_joint: Joint of motion, counted from 0, to which the other joints are relative in every frame.
        rate: Sampling rate in Hz to which audio is resampled.
        form: Form of audio samples: log-mel or waveform.
        mels: Number of bands of a log-mel picture.
        hop: Number of audio samples from one frame to the next.
        skip_bad: Largest number of unreadable items that are left out of each part of the data.
        vae: Folder of the diffusers AutoencoderKL that encodes the images.
        latent_scale: Factor of the latents, in place of the usual one.
        label_column: Column of the labels; 'folder' for class folders, 'none' for no labels.
        probe_labels: Further label columns to probe, separated by commas: speaker,style.
        min_per_class: Smallest number of samples of a class in the training part; smaller classes are left out.
        num_train: Number of samples that fit the probes; at most 8000 if not given.
        num_validation: Number of samples that choose penalties and layers; at most 2000 if not given.
        num_test: Number of samples for the reported numbers; at most 5000 if not given.
    """

    source: str = field(metadata=option("data", panel=DATA_PANEL))
    size: int | None = field(default=None, metadata=option(panel=DATA_PANEL, maximum=2**14))
    channels: int | None = field(default=None, metadata=option(panel=DATA_PANEL))
    split: str | None = field(default=None, metadata=option(panel=DATA_PANEL))
    data_root: str | None = field(default=None, metadata=option(panel=DATA_PANEL))
    image_column: str | None = field(default=None, metadata=option(panel=DATA_PANEL))
    modality: Modality | None = field(default=None, metadata=option(panel=MEDIA_PANEL))
    column: str | None = field(default=None, metadata=option(flag="--item-column", panel=MEDIA_PANEL))
    length: int | None = field(default=None, metadata=option(panel=MEDIA_PANEL, maximum=10**7))
    stride: int | None = field(default=None, metadata=option(panel=MEDIA_PANEL, maximum=10**6))
    root_joint: int | None = field(default=None, metadata=option(panel=MEDIA_PANEL, maximum=10**6))
    rate: int | None = field(default=None, metadata=option(panel=MEDIA_PANEL, maximum=10**6))
    form: AudioForm | None = field(default=None, metadata=option(flag="--audio-form", panel=MEDIA_PANEL))
    mels: int | None = field(default=None, metadata=option(panel=MEDIA_PANEL, maximum=4096))
    hop: int | None = field(default=None, metadata=option(panel=MEDIA_PANEL, maximum=10**6))
    skip_bad: int | None = field(default=None, metadata=option(panel=DATA_PANEL))
    vae: str | None = field(default=None, metadata=option(panel=DATA_PANEL))
    latent_scale: float | None = field(default=None, metadata=option(panel=DATA_PANEL))
    label_column: str | None = field(default=None, metadata=option(panel=DATA_PANEL))
    probe_labels: str | None = field(default=None, metadata=option(panel=DATA_PANEL))
    min_per_class: int | None = field(default=None, metadata=option(panel=DATA_PANEL, minimum=1))
    num_train: int | None = field(default=None, metadata=option(panel=DATA_PANEL))
    num_validation: int | None = field(default=None, metadata=option(panel=DATA_PANEL))
    num_test: int | None = field(default=None, metadata=option(panel=DATA_PANEL))

    def __post_init__(self) -> None:
        check_ranges(self)

    def options(self) -> dict[str, Any]:
        """Returns the options that `layerprobe.data.load` takes, without those of the autoencoder."""
        options = to_record(self)
        del options["source"]
        return {name: value for name, value in options.items() if self.vae is None or name not in _ENCODING}

    def absolute(self) -> DataSource:
        """Returns the same source with absolute paths, so that it can be read from any working directory."""
        fields = ("source", "vae", "data_root")
        places = {name: place for name in fields if (place := getattr(self, name)) is not None}
        changed: dict[str, Any] = {name: absolute_source(place) for name, place in places.items()}
        return replace(self, **changed)

    def check(self) -> None:
        """Checks that there is something to read, without importing what would read it.

        Raises:
            FileNotFoundError: If the path does not exist.
        """
        if not is_no_path(self.source):
            check_there(self.source, "file or folder", "pass a path, digits, or owner/name on the Hugging Face Hub")

    def load(self, *, expect_shape: tuple[int, ...] | None = None) -> Splits:
        """Reads the data set, without encoding it.

        Args:
            expect_shape: Shape (C, *grid) that the model takes; with an autoencoder `encode` checks it.

        Raises:
            ValueError: If the data cannot be read or divided, or has another shape.
        """
        from layerprobe.data.loading import load

        refuse_memory(self.source, "data set")
        return load(self.source, expect_shape=None if self.vae else expect_shape, **self.options())

    def encode(
        self, splits: Splits, *, expect_shape: tuple[int, ...] | None = None, progress: StepProgress | None = None
    ) -> Splits:
        """Returns the latents of splits if there is an autoencoder, else the splits themselves.

        Args:
            splits: Splits of this data set.
            expect_shape: Shape (C, h, w) that the model takes.
            progress: Called with (images done, images in total), for one split after another.

        Raises:
            ValueError: If images, autoencoder and model do not fit together.
        """
        from layerprobe.data.loading import encode_splits

        if self.vae is None:
            return splits
        return encode_splits(
            splits, self.vae, latent_scale=self.latent_scale, expect_shape=expect_shape, progress=progress
        )

    def model_shape(self, splits: Splits) -> tuple[int, ...]:
        """Returns the shape (C, *grid) of one input of a model: of a latent, if there is an autoencoder."""
        from layerprobe.data.latents.vae import latent_shape

        return splits.train.shape if self.vae is None else latent_shape(splits.train.shape, self.vae)

    def probing_splits(self, *, expect_shape: tuple[int, ...] | None = None) -> Splits:
        """Reads the samples that a probing run uses, without encoding them; see `for_probing`."""
        from layerprobe.data.splits import for_probing

        return for_probing(self.load(expect_shape=expect_shape), given=self.options())

    def training_splits(self, shape: tuple[int, ...]) -> Splits:
        """Returns the data for a training, not encoded: the whole training split, and the run's other splits.

        Args:
            shape: Shape (C, *grid) that the model takes.
        """
        from layerprobe.data.splits import for_probing, take

        whole = replace(self, num_train=None, num_validation=None, num_test=None).load(expect_shape=shape)
        counted = take(whole, num_validation=self.num_validation, num_test=self.num_test)
        probed = for_probing(counted, given=self.options())
        return replace(probed, train=whole.train)
