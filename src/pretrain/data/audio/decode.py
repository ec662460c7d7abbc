"""Decoding of audio: ``.wav`` files of PCM by the standard library, their bytes, and arrays; mono, from -1 to 1.

Files are untrusted: what a header announces is compared with the bytes that follow it, and very long files are refused
before they are decoded.
"""

from __future__ import annotations

import base64
import io
import struct
import wave
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

import pretrain.data.audio
from pretrain.data.images.decode import BrokenFile, FileItem

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RATES", "SUFFIXES", "BrokenAudio", "Clip", "Sound", "is_rate", "resampled"]

SUFFIXES = frozenset({".wav", ".wave"})
_MOST_SAMPLES = 1 << 26  # of all channels: 35 minutes of stereo at 16 kHz
_LEAST_SECONDS = 0.025  # one window of the spectrogram
_RATES = (1_000, 768_000)  # samples per second that a header may name
RATES = f"a whole number from {_RATES[0]:,} to {_RATES[1]:,}"
_MOST_CHANNELS = 8
# Floats above 1 are clipped by players; far above it, they are integers in another type.
_LOUDEST = 4.0
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
# Programs that write to a pipe leave the length of the data at its greatest value, or, like sox, a page below it; whole
# samples of all channels may be a few bytes less.
_UNKNOWN_SIZE = 0x7FFFF000 - 64
_LOBES = 16  # zero crossings of the sinc on either side, at the lower rate
_ROLLOFF = 0.97  # cut-off frequency in units of the Nyquist frequency
_PHASES = 4096  # up to so many filters are kept as a table
_ADVICE = "convert it to PCM of 16 bits (ffmpeg -i in.wav -c:a pcm_s16le out.wav)"


class Sound(NamedTuple):
    """Decoded audio: mono samples (n,) in float32, and samples per second (None: the rate of the model)."""

    samples: NDArray[np.float32]
    rate: int | None


def is_rate(value: Any) -> bool:
    """Whether a value is a sampling rate that can be read, a whole number in its type too; ``RATES`` says which."""
    return isinstance(value, int | np.integer) and _RATES[0] <= int(value) <= _RATES[1]


class BrokenAudio(BrokenFile):
    """A recording that cannot be decoded."""

    what: ClassVar[str] = "audio"


@dataclass(frozen=True, eq=False)
class Clip(FileItem):
    """One recording of a source: a file, its bytes, or an array (n,), (n, channels) or (channels, n).

    Attributes:
        rate: samples per second of an array; None for that of the model.
    """

    rate: int | None = None
    broken: ClassVar[type[BrokenFile]] = BrokenAudio

    def read(self) -> tuple[Sound, str | None]:
        """Decode the recording.

        Returns:
            Mono samples with their rate, and a remark on what was left out, or None.

        Raises:
            BrokenAudio: there is no such file, or it is no audio, compressed, damaged, too short or too long.
        """
        remark: str | None = None
        rate = self.rate
        if self.is_file:  # which names its own rate
            samples, rate, remark = _decode(self._bytes(), self.name)
        else:
            samples = _from_array(np.asarray(self.source), self.name)
        if rate is not None and not is_rate(rate):
            raise BrokenAudio(
                self.name,
                "the sampling rate is not possible",
                f"its sampling rate is {rate!s:.40}; it must be {RATES}",
            )
        if len(samples) < _LEAST_SECONDS * (rate or 16_000):
            raise BrokenAudio(self.name, "it is shorter than 25 ms")
        return Sound(samples, None if rate is None else int(rate)), remark

    def thumbnail(self, side: int = 96) -> str:
        """Return the spectrogram as the address of an image in a page; low frequencies are at the bottom.

        Args:
            side: rows of the image, the mel bands; it is at most four times as wide.
        """
        processor = pretrain.data.audio.AudioProcessor(
            num_mel_bins=side, max_length=1 << 14, do_normalize=False
        )
        energies = processor.log_mel(self.read()[0])
        energies = energies[:: -(-len(energies) // (4 * side))].T[::-1]
        low, high = np.quantile(energies, (0.05, 0.995))
        grey = np.clip((high - energies) / max(high - low, 1e-6), 0, 1) * 255
        encoded = base64.b64encode(_png(grey.astype(np.uint8))).decode()
        return f"data:image/png;base64,{encoded}"


def _png(grey: NDArray[np.uint8]) -> bytes:
    """Return an image (H, W) as a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _decode(content: bytes, name: str) -> tuple[NDArray[np.float32], int, str | None]:
    """Decode the bytes of a ``.wav`` file.

    Returns:
        Samples, their rate, and a remark or None.
    """
    if not content:
        raise BrokenAudio(name, "the file is empty")
    content = _plain(content, name)
    try:
        with wave.open(io.BytesIO(content)) as file:
            channels, width, rate, count = file.getparams()[:4]
            _check_size(count * channels if count * channels * width < _UNKNOWN_SIZE else 0, name)
            data = file.readframes(count)
    except BrokenAudio:
        raise
    # The module raises its own error, EOFError and struct.error for damaged files.
    except Exception as error:
        what = str(error) or "it ends within its header"
        raise BrokenAudio(name, "the file is damaged", f"it is damaged ({what})") from error
    if not 1 <= width <= 4 or not 1 <= channels <= _MOST_CHANNELS:
        raise BrokenAudio(
            name,
            "its form is not supported",
            f"it has {channels} channels of {8 * width} bits; 1 to {_MOST_CHANNELS} channels of 8 to 32 bits are read",
        )
    size, remark = channels * width, None
    found = len(data) // size
    if found < count and count * size < _UNKNOWN_SIZE:
        raise BrokenAudio(
            name, "the file is cut off", f"it is cut off: {found:,} of {count:,} samples are there"
        )
    if found < count:
        remark = "no length in the header, so all that follows it is read"
    _check_size(found * channels, name)
    return _mono(_integers(data[: found * size], width).reshape(found, channels)), rate, remark


def _check_size(samples: int, name: str) -> None:
    if samples > _MOST_SAMPLES:
        raise BrokenAudio(
            name,
            "too long",
            f"it has {samples:,} samples; at most {_MOST_SAMPLES:,} are decoded. Cut it into pieces",
        )


def _plain(content: bytes, name: str) -> bytes:
    """Return the file with the format tag of plain PCM if it is PCM in the extensible form, which `wave` refuses.

    Raises:
        BrokenAudio: it is no ``.wav`` file, or its samples are floats or compressed.
    """
    if content[:4] in (b"RF64", b"BW64") and content[8:12] == b"WAVE":
        form = content[:4].decode()
        raise BrokenAudio(name, f"its form is {form}, that of very long files; {_ADVICE}")
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise BrokenAudio(
            name,
            "it is no .wav file",
            "it is no .wav file; convert other formats first (ffmpeg -i in.mp3 out.wav)",
        )
    place = 12
    while place + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, place)
        if kind == b"fmt " and size >= 16 and place + 8 + size <= len(content):
            (tag,) = struct.unpack_from("<H", content, place + 8)
            extended = tag == _EXTENSIBLE and size >= 26
            real = struct.unpack_from("<H", content, place + 8 + 24)[0] if extended else tag
            if real != _PCM:
                what = "floats" if real == _FLOAT else f"compressed (format {real:#06x})"
                raise BrokenAudio(name, f"its samples are {what}; {_ADVICE}")
            at = place + 8
            return (
                content[:at] + struct.pack("<H", _PCM) + content[at + 2 :] if extended else content
            )
        place += 8 + size + size % 2
    raise BrokenAudio(name, "the file is damaged", "it is damaged (it has no format)")


def _integers(data: bytes, width: int) -> NDArray[np.float32]:
    """Return the samples of bytes as fractions of the full scale: 8 bits are unsigned, others signed."""
    if width == 1:
        return ((np.frombuffer(data, np.uint8) - 128.0) / 128).astype(np.float32)
    if width == 3:  # the three bytes become the upper ones of four
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = wide.tobytes(), 4
    values = np.frombuffer(data, f"<i{width}")
    return (values / float(1 << (8 * width - 1))).astype(np.float32)


def _mono(frames: NDArray[Any]) -> NDArray[np.float32]:
    """Return the mean of the channels, (n, channels) -> (n,)."""
    return np.ascontiguousarray(
        frames[:, 0] if frames.shape[1] == 1 else frames.mean(1), np.float32
    )


def _from_array(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    """Return mono samples of an array of floats, or of integers, whose full scale is that of their type.

    Raises:
        BrokenAudio: another shape, type or range.
    """
    if array.ndim == 2 and array.shape[0] <= _MOST_CHANNELS < array.shape[1]:
        array = array.T
    if array.ndim not in (1, 2) or not array.size or (array.ndim == 2 and array.shape[1] > 8):
        raise BrokenAudio(
            name,
            "the shape is not that of audio",
            f"it is an array of the shape {array.shape}; audio has the shape (samples,), (samples, channels) or "
            f"(channels, samples) with at most {_MOST_CHANNELS} channels",
        )
    _check_size(array.size, name)
    if array.dtype in (np.int16, np.int32):
        array = (array / float(1 << (8 * array.dtype.itemsize - 1))).astype(np.float32)
    elif array.dtype.kind != "f":
        raise BrokenAudio(
            name,
            f"the samples are {array.dtype}, and must be floats from -1 to 1, int16 or int32",
        )
    if not np.isfinite(array).all():
        raise BrokenAudio(name, "some samples are no numbers (NaN or infinite)")
    if (peak := float(np.abs(array).max())) > _LOUDEST:
        raise BrokenAudio(
            name,
            "the samples are far above 1; those of 16 bits become right by samples / 32768",
            f"its samples reach {peak:,.0f}, and the full scale of floats is 1; those of 16 bits become right by "
            "samples / 32768",
        )
    return _mono(array.reshape(len(array), -1))


def resampled(samples: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    """Return samples at another rate, by a windowed sinc whose cut-off is the lower Nyquist frequency.

    Args:
        samples: (n,).
        rate: samples per second.
        wanted: samples per second of the result.

    Returns:
        ``ceil(n * wanted / rate)`` samples.
    """
    if rate == wanted:
        return samples
    common = int(np.gcd(rate, wanted))
    up, down = wanted // common, rate // common
    count = -(-len(samples) * up // down)
    places = np.arange(count, dtype=np.int64) * down  # in units of 1 / up input samples
    reach = _reach(up, down)
    padded = np.pad(samples, (reach, reach + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    found = np.empty(count, np.float32)
    table = _filters(up, down) if up <= _PHASES else None
    for start in range(0, count, 1 << 15):
        part = places[start : start + (1 << 15)]
        phase = part % up
        weights = _weights(phase / up, up, down) if table is None else table[phase]
        found[start : start + len(part)] = np.einsum("nk,nk->n", windows[part // up], weights)
    return found


def _reach(up: int, down: int) -> int:
    """Return how many input samples on either side a filter reads."""
    return int(np.ceil(_LOBES / (_ROLLOFF * min(1.0, up / down))))


@lru_cache(maxsize=8)
def _filters(up: int, down: int) -> NDArray[np.float32]:
    return _weights(np.arange(up) / up, up, down)


def _weights(phases: NDArray[Any], up: int, down: int) -> NDArray[np.float32]:
    """Return the filter of every phase (a place between two input samples), (phases, 2 * reach + 1); sum 1."""
    cutoff, reach = _ROLLOFF * min(1.0, up / down), _reach(up, down)
    distance = cutoff * (np.arange(-reach, reach + 1) - phases[:, None])
    window = np.where(np.abs(distance) < _LOBES, np.cos(np.pi * distance / (2 * _LOBES)) ** 2, 0.0)
    weights = np.sinc(distance) * window
    found: NDArray[np.float32] = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return found
