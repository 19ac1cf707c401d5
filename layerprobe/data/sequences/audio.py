"""Audio: mono recordings at one sampling rate, as log-mel spectrograms or as frames of the waveform.

A log-mel sample has shape (1, mels, T), a 2-D grid of frequency and time. A waveform sample has shape (hop, T), a 1-D
grid whose channels are the values of a frame. Recordings with several channels are averaged. Generated samples can be
converted back to a waveform: exactly from frames, and by the Griffin-Lim algorithm from log-mel spectrograms.

Source: the mel scale of O'Shaughnessy 1987 (the "HTK" formula); Griffin & Lim 1984, "Signal estimation from modified
short-time Fourier transform".
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.data import tables
from layerprobe.data.contents import with_content
from layerprobe.data.kind import DataKind
from layerprobe.data.listing import list_files
from layerprobe.data.samples import Samples
from layerprobe.data.sequences.items import MAX_VALUES, Decoder, file_bytes, load_media, read_items, undecoded
from layerprobe.data.sequences.whole import check_end
from layerprobe.files import import_optional
from layerprobe.memory import pass_on
from layerprobe.messages import unknown

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
COLUMNS = ("audio", "sound", "wav", "file")
# Lower bound of amplitudes for the logarithm, below the 16-bit quantization in every band.
FLOOR = 1e-5
MAX_RATE = 1_000_000  # resampling from one rate to another takes a filter of this length

AudioForm = Literal["log-mel", "waveform"]


@dataclass(frozen=True)
class AudioDecoder(Decoder):
    """Decoder of recordings to log-mel spectrograms or waveform frames.

    Attributes:
        rate: Sampling rate in Hz; recordings with other rates are resampled.
        form: Form of the samples: "log-mel" or "waveform".
        mels: Number of mel bands of a spectrogram.
        hop: Hop in samples between two spectrogram columns or frames.
    """

    rate: int
    form: AudioForm = "log-mel"
    mels: int = 32
    hop: int = 128
    modality = "audio"

    def __post_init__(self) -> None:
        if self.rate < 1 or self.mels < 1 or self.hop < 1:
            raise ValueError(f"rate, mels and hop must be at least 1, got {self.rate}, {self.mels}, {self.hop}")
        if self.form not in ("log-mel", "waveform"):
            raise ValueError(unknown("audio form", self.form, ("log-mel", "waveform")))

    @property
    def time_axis(self) -> int:  # type: ignore[override]
        """The axis of the spectrogram columns or of the frames."""
        return 2 if self.form == "log-mel" else 1

    @property
    def window(self) -> int:
        """The window length of a spectrogram column in samples: four hops."""
        return 4 * self.hop

    def __call__(self, item: Any) -> Tensor:
        """Decodes a recording, shape (1, mels, T) or (hop, T)."""
        wave, rate = read_audio(item)
        wave = resampled(wave, rate, self.rate)
        if self.form == "waveform":
            padded = np.pad(wave, (0, -len(wave) % self.hop))
            return torch.from_numpy(padded.reshape(-1, self.hop).T.copy())
        return self.log_mel(torch.from_numpy(wave))

    def log_mel(self, wave: Tensor) -> Tensor:
        """Returns the log-mel spectrogram (log amplitudes) of a waveform (samples,), shape (1, mels, T)."""
        power = self._spectrum(wave).abs().square()
        return (mel_filters(self.rate, self.window, self.mels) @ power).clamp(min=FLOOR**2).log().unsqueeze(0) / 2

    def waveform(self, values: Tensor, *, iterations: int = 60) -> Tensor:
        """Converts decoded values back to a waveform, shape (samples,).

        Args:
            values: Values as returned by the decoder, without normalization.
            iterations: Number of iterations of Griffin-Lim, which estimates the phases of a spectrogram.
        """
        if self.form == "waveform":
            return values.T.reshape(-1)
        filters = mel_filters(self.rate, self.window, self.mels)
        power = (torch.linalg.pinv(filters) @ values[0].mul(2).exp()).clamp(min=0)
        magnitude, phase = power.sqrt(), torch.ones(power.shape, dtype=torch.complex64)
        length = self.hop * (values.shape[2] - 1)
        for _ in range(iterations):
            wave = torch.istft(magnitude * phase, self.window, self.hop, window=self._taper(), length=length)
            spectrum = self._spectrum(wave)
            phase = spectrum / spectrum.abs().clamp(min=1e-9)
        return torch.istft(magnitude * phase, self.window, self.hop, window=self._taper(), length=length)

    def _spectrum(self, wave: Tensor) -> Tensor:
        # Reflection padding needs more samples than half a window; shorter recordings are padded with zeros.
        mode = "reflect" if len(wave) > self.window // 2 else "constant"
        return torch.stft(
            wave, self.window, self.hop, window=self._taper(), center=True, pad_mode=mode, return_complex=True
        )

    def _taper(self) -> Tensor:
        return torch.hann_window(self.window)


def load_audio(
    source: str | Path,
    *,
    rate: int | None = None,
    form: AudioForm = "log-mel",
    mels: int = 32,
    hop: int | None = None,
    length: int | None = None,
    data_root: str | Path | None = None,
    split: str | None = None,
    column: str | None = None,
    label_column: str | None = None,
    probe_labels: str = "",
    skip_bad: int = 0,
) -> dict[str, Samples]:
    """Loads the parts of an audio data set.

    Args:
        source: Source as in `list_files`: audio files with a folder per class, or rows with a column of encoded
            audio.
        rate: Sampling rate in Hz; None for the common rate of all recordings.
        form: Form of the samples: "log-mel" or "waveform".
        mels: Number of mel bands.
        hop: Hop in samples between columns or frames; None for 16 ms.
        length: Number of columns or frames of a sample; None for the longest recording.
        data_root: Folder that links and tables of the data may name files in, beside that of the data.
        split: Name of the only part to read; None for all parts.
        column: Column of the audio; None finds it by name and type.
        label_column: Column of the class labels; None finds it as in `labels.label_column`.
        probe_labels: Extra label columns, as in `load_media`.
        skip_bad: Maximum number of unreadable recordings per part, which are left out.

    Returns:
        Samples by part name.

    Raises:
        ValueError: If the data cannot be read, or has several sampling rates and `rate` is None.
        ModuleNotFoundError: If soundfile is not installed.
    """
    import_optional("soundfile", "audio")
    listing = list_files(source, SUFFIXES, data_root=data_root)
    parts = tables.read(listing, split=split)
    item_column = tables.item_column(parts, column, usual=COLUMNS, what="audio", fits=tables.holds_bytes)
    if rate is None:
        rate = _common_rate(parts, item_column, listing.folders)
    decoder = AudioDecoder(rate, form, mels, hop or max(round(0.016 * rate), 1))
    return load_media(
        listing,
        parts,
        item_column,
        decoder,
        label_column=label_column,
        probe_labels=probe_labels,
        length=length,
        skip_bad=skip_bad,
    )


def read_audio(item: Any) -> tuple[NDArray[np.float32], int]:
    """Decodes a recording to one channel in [-1, 1], shape (samples,), and its sampling rate in Hz."""
    content = file_bytes(item)
    check_end(content.getvalue())
    with _opened(content) as file:
        rate = file.samplerate
        if not 1 <= rate <= MAX_RATE:
            raise ValueError(f"it has {rate} samples per second, more than {MAX_RATE}")
        if file.frames * file.channels > MAX_VALUES:
            raise ValueError(f"it has {file.frames} samples of {file.channels} channels, more than {MAX_VALUES:.3g}")
        wave = file.read(dtype="float32", always_2d=True)
        if len(wave) < file.frames:
            raise ValueError(f"it has {len(wave)} of the {file.frames} samples that it declares: it is cut")
    if not len(wave):
        raise ValueError("it has length 0")
    return np.ascontiguousarray(wave.mean(1)), int(rate)


def _opened(content: io.BytesIO) -> Any:
    soundfile = import_optional("soundfile", "audio")
    try:
        return soundfile.SoundFile(content)
    except soundfile.LibsndfileError as error:  # its message names an object in memory
        raise ValueError(f"it is no recording that libsndfile reads ({error.error_string.strip()})") from None


def write_wav(path: str | Path, wave: Tensor, rate: int) -> None:
    """Writes a waveform (samples,) to a 16-bit file, scaled down if it exceeds full scale.

    Args:
        path: The file to write.
        wave: Waveform in [-1, 1].
        rate: Sampling rate in Hz.
    """
    soundfile = import_optional("soundfile", "audio")
    soundfile.write(str(path), (wave / max(1.0, float(wave.abs().max()))).numpy(), rate, subtype="PCM_16")


def resampled(wave: NDArray[np.float32], rate: int, to: int) -> NDArray[np.float32]:
    """Resamples a waveform from one sampling rate to another, with band limiting."""
    if rate == to:
        return wave
    from scipy.signal import resample_poly

    common = math.gcd(rate, to)
    out: NDArray[np.float32] = resample_poly(wave, to // common, rate // common).astype(np.float32)
    return out


def mel_filters(rate: int, window: int, mels: int) -> Tensor:
    """Returns triangular filters of equal width on the mel scale, each with sum 1, shape (mels, window // 2 + 1)."""
    frequencies = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64) / 2595) - 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    # A low band may lie between two frequencies; it then gets the nearest one.
    empty = triangles.sum(1) == 0
    nearest = (frequencies - edges[1:-1, None]).abs().argmin(1)
    triangles[empty, nearest[empty]] = 1.0
    return (triangles / triangles.sum(1, keepdim=True)).float()


def _common_rate(parts: dict[str, Any], column: str, folders: Sequence[Path]) -> int:
    soundfile = import_optional("soundfile", "audio")
    rates: dict[int, str] = {}
    for name, rows in parts.items():
        for row, item in read_items(undecoded(rows.select_columns(column), column), column):
            try:
                content = file_bytes(with_content(item, folders))
                check_end(content.getvalue())
                rates.setdefault(int(soundfile.info(content).samplerate), f"item {row} of {name}")
            except Exception as error:
                pass_on(error)
                continue  # reported when the item is decoded
    if not rates:
        raise ValueError("no item has a readable sampling rate; pass audio files")
    if len(rates) > 1:
        examples = ", ".join(f"{rate} ({item})" for rate, item in rates.items())
        raise ValueError(f"the recordings have several sampling rates: {examples}; pass --rate {min(rates)} or another")
    return next(iter(rates))


def _holds_audio(name: str, feature: Any) -> bool:
    # Webdatasets name columns after the endings of files.
    named = name in COLUMNS or f".{name}" in SUFFIXES
    return type(feature).__name__ == "Audio" or (named and tables.holds_bytes(feature))


KIND = DataKind(load_audio, SUFFIXES, telling=SUFFIXES, holds=_holds_audio)
