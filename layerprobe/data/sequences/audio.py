"""Audio: one channel at one sampling rate, as a log-mel picture or as frames of the waveform.

A log-mel sample is (1, mels, T), a 2-D grid of frequency and time; a waveform sample is (frame, T), a 1-D grid whose
channels are the values within a frame. Several channels are averaged. What a model makes can be turned back into a
waveform: exactly from frames, and by Griffin & Lim from log-mel pictures.

Source: the mel scale of O'Shaughnessy 1987 (the "HTK" formula); Griffin & Lim 1984, "Signal estimation from modified
short-time Fourier transform".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.data import tables
from layerprobe.data.samples import Samples
from layerprobe.data.sequences.items import Decoder, file_bytes, load_media, read_items, undecoded
from layerprobe.files import needed

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
COLUMNS = ("audio", "sound", "wav", "file")
# Below the quantization of 16 bits in any band; the logarithm needs a floor.
FLOOR = 1e-5

AudioForm = Literal["log-mel", "waveform"]


@dataclass(frozen=True)
class AudioDecoder(Decoder):
    """Recordings as log-mel pictures or frames.

    Attributes:
        rate: Samples per second; other rates are resampled to it.
        form: "log-mel" or "waveform".
        mels: Bands of the picture.
        hop: Samples from one column or frame to the next.
    """

    rate: int
    form: AudioForm = "log-mel"
    mels: int = 32
    hop: int = 128
    modality = "audio"

    def __post_init__(self) -> None:
        if self.rate < 1 or self.mels < 1 or self.hop < 1:
            raise ValueError(f"rate, mels and hop count from 1, got {self.rate}, {self.mels}, {self.hop}")
        if self.form not in ("log-mel", "waveform"):
            raise ValueError(f"unknown form {self.form!r} of audio; use log-mel or waveform")

    @property
    def time_axis(self) -> int:  # type: ignore[override]
        """Columns of the picture, or frames."""
        return 2 if self.form == "log-mel" else 1

    @property
    def window(self) -> int:
        """Samples under one column of the picture: four hops."""
        return 4 * self.hop

    def __call__(self, item: Any) -> Tensor:
        """Shape (1, mels, T) or (hop, T)."""
        wave, rate = read_audio(item)
        wave = resampled(wave, rate, self.rate)
        if self.form == "waveform":
            whole = np.pad(wave, (0, -len(wave) % self.hop))
            return torch.from_numpy(whole.reshape(-1, self.hop).T.copy())
        return self.log_mel(torch.from_numpy(wave))

    def log_mel(self, wave: Tensor) -> Tensor:
        """The picture of a waveform (samples,): the logarithm of amplitudes, shape (1, mels, T)."""
        power = self._spectrum(wave).abs().square()
        return (mel_filters(self.rate, self.window, self.mels) @ power).clamp(min=FLOOR**2).log().unsqueeze(0) / 2

    def waveform(self, values: Tensor, *, iterations: int = 60) -> Tensor:
        """A recording that looks like these values (before normalization), shape (samples,).

        Args:
            values: As the decoder gives them.
            iterations: Of Griffin & Lim, which finds phases for a picture that has none.
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
        # Reflection at the ends needs more samples than half a window; shorter recordings get silence.
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
    split: str | None = None,
    column: str | None = None,
    label_column: str | None = None,
    probe_labels: str = "",
    skip_bad: int = 0,
) -> dict[str, Samples]:
    """The parts of an audio data set.

    Args:
        source: What `tables.read_items` takes: sound files in a folder per class, or rows with a column of encoded
            sound.
        rate: Samples per second; that of the data where not given, if all have one.
        form: "log-mel" or "waveform".
        mels: Bands of the log-mel picture.
        hop: Samples between columns; 16 ms where not given.
        length: Columns or frames of a sample.
        split: The only part to read.
        column: Where the sound is; found by name where not given.
        label_column: Where the labels are.
        probe_labels: Further label columns, see `load_media`.
        skip_bad: See `load_media`.

    Raises:
        ValueError: If the data cannot be read, or has several sampling rates and none is given.
        ModuleNotFoundError: If soundfile is not installed.
    """
    needed("soundfile", "audio")
    parts = tables.read_items(source, suffixes=SUFFIXES, split=split)
    found = tables.item_column(parts, column, usual=COLUMNS, what="audio", fits=tables.holds_bytes)
    if rate is None:
        rate = _common_rate(parts, found)
    decoder = AudioDecoder(rate, form, mels, hop or max(round(0.016 * rate), 1))
    return load_media(
        parts, found, decoder, label_column=label_column, probe_labels=probe_labels, length=length, skip_bad=skip_bad
    )


def read_audio(item: Any) -> tuple[NDArray[np.float32], int]:
    """An encoded recording as one channel in [-1, 1], shape (samples,), and its sampling rate."""
    soundfile = needed("soundfile", "audio")
    wave, rate = soundfile.read(file_bytes(item), dtype="float32", always_2d=True)
    if not len(wave):
        raise ValueError("it has no length")
    return np.ascontiguousarray(wave.mean(1)), int(rate)


def write_wav(path: str | Path, wave: Tensor, rate: int) -> None:
    """A waveform (samples,) as a 16-bit file, scaled down where it is louder than full scale."""
    soundfile = needed("soundfile", "audio")
    soundfile.write(str(path), (wave / max(1.0, float(wave.abs().max()))).numpy(), rate, subtype="PCM_16")


def resampled(wave: NDArray[np.float32], rate: int, to: int) -> NDArray[np.float32]:
    """The waveform at another sampling rate, band-limited."""
    if rate == to:
        return wave
    from scipy.signal import resample_poly

    common = math.gcd(rate, to)
    out: NDArray[np.float32] = resample_poly(wave, to // common, rate // common).astype(np.float32)
    return out


def mel_filters(rate: int, window: int, mels: int) -> Tensor:
    """Triangles of equal width on the mel scale, from 0 to half the rate, each with sum 1; (mels, window // 2 + 1)."""
    frequencies = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64) / 2595) - 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    # Low bands may lie between two frequencies: such a band takes the nearest one.
    empty = triangles.sum(1) == 0
    nearest = (frequencies - edges[1:-1, None]).abs().argmin(1)
    triangles[empty, nearest[empty]] = 1.0
    return (triangles / triangles.sum(1, keepdim=True)).float()


def _common_rate(parts: dict[str, Any], column: str) -> int:
    soundfile = needed("soundfile", "audio")
    rates: dict[int, str] = {}
    for name, rows in parts.items():
        for row, item in read_items(undecoded(rows.select_columns(column), column), column):
            try:
                rates.setdefault(int(soundfile.info(file_bytes(item)).samplerate), f"item {row} of {name}")
            except Exception:
                continue  # It is named when it is decoded.
    if not rates:
        raise ValueError("no item has a readable sampling rate; pass sound files")
    if len(rates) > 1:
        seen = ", ".join(f"{rate} ({where})" for rate, where in rates.items())
        raise ValueError(f"the recordings have several sampling rates: {seen}; pass --rate {min(rates)} or another")
    return next(iter(rates))
