"""Audio processor: samples to normalised log-mel spectrograms, by ``preprocessor_config.json`` as in transformers.

The values equal those of ``ASTFeatureExtractor`` (arXiv 2104.01778), computed as in Kaldi: windows of 25 ms at 16 kHz,
triangular filters on the mel scale, the logarithm of their energies.

Letters: B clips, T frames, M mel bands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pretrain.data.audio.decode import Clip, Sound, resampled
from pretrain.data.images.decode import in_numpy
from pretrain.data.images.processor import FILE, NESTED, SavedProcessor
from pretrain.errors import ConfigError
from pretrain.utils.files import note, read_bytes
from pretrain.utils.strict_json import parse_json

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["RATE_NAMES", "AudioProcessor", "clip_of", "whole_rate"]

# Names of the rate of an array, in a mapping and as columns.
RATE_NAMES = ("sampling_rate", "sample_rate", "samplerate", "sr")
_KIND = "ASTFeatureExtractor"
_WINDOW, _HOP, _FFT = 400, 160, 512  # samples, whatever the rate
_LOWEST, _FLOOR, _EMPHASIS = 20.0, 1.192092955078125e-07, 0.97
_DEFAULTS: dict[str, Any] = {
    "sampling_rate": 16000,
    "num_mel_bins": 128,
    "max_length": 1024,
    "do_normalize": True,
    "mean": -4.2677393,
    "std": 4.5689974,
}
# Keys that are accepted with these values only.
_ONLY: dict[str, tuple[Any, ...]] = {
    "feature_size": (1,),
    "padding_value": (0, 0.0),
    "padding_side": ("right",),
    "return_attention_mask": (False, None),
}
_WITHOUT_EFFECT = {"feature_extractor_type", "processor_class", "transformers_version", "auto_map"}
_RANGES = {"sampling_rate": (1_000, 768_000), "num_mel_bins": (2, 512), "max_length": (1, 1 << 17)}


class AudioProcessor(SavedProcessor):
    """Turns recordings into log-mel spectrograms of one length, by the keys of ``preprocessor_config.json``.

    Args:
        **settings: keys of the file: ``sampling_rate``, ``num_mel_bins`` (M), ``max_length`` (T: further frames are cut
            off, missing ones are zeros), ``do_normalize`` with ``mean`` and ``std``.

    Attributes:
        settings: all keys with their values.

    Raises:
        ConfigError: an unknown key, or a value that is not possible.
    """

    only = _ONLY
    makes = "spectrograms"
    column: ClassVar[str] = "audio"  # of rows
    key: ClassVar[str] = "input_values"  # of batches

    def __init__(self, **settings: Any) -> None:
        self.settings = dict(_DEFAULTS)
        for key, value in settings.items():
            if key not in _WITHOUT_EFFECT and self.check_key(key, value):
                self.settings[key] = value
        for key, (low, high) in _RANGES.items():
            value = self.settings[key]
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(
                    f"{FILE}: {key} is {value!r}; it must be a whole number from {low:,} to {high:,}."
                )
        for key in ("mean", "std"):
            value = self.settings[key]
            if (
                type(value) not in (int, float)
                or not abs(value) < 1e6
                or (key == "std" and not value > 0)
            ):
                raise ConfigError(
                    f"{FILE}: {key} is {value!r}; it must be a number{' above 0' * (key == 'std')}."
                )
        if type(self.settings["do_normalize"]) is not bool:
            raise ConfigError(
                f"{FILE}: do_normalize is {self.settings['do_normalize']!r}; it must be true or false."
            )

    @property
    def rate(self) -> int:
        """Samples per second."""
        found: int = self.settings["sampling_rate"]
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """Frames and mel bands of a spectrogram, (T, M)."""
        return self.settings["max_length"], self.settings["num_mel_bins"]

    @property
    def seconds(self) -> float:
        """Length of the audio that fits into a spectrogram."""
        return float(((self.shape[0] - 1) * _HOP + _WINDOW) / self.rate)

    def frames(self, seconds: float) -> int:
        """Return the frames of a recording: windows of 400 samples every 160 at the rate of this processor."""
        samples = math.ceil(round(seconds * self.rate, 6))
        return max(0, samples - _WINDOW) // _HOP + 1

    # ------------------------------------------------------------------ files

    @classmethod
    def from_directory(cls, directory: str | Path) -> AudioProcessor | None:
        """Read ``preprocessor_config.json``, or the audio part of ``processor_config.json``; None without both.

        Raises:
            ConfigError: another feature extractor, or a key or a value that is not supported.
            CheckpointCorrupt: the file is no JSON object.
        """
        for name in (FILE, NESTED):
            path = Path(directory) / name
            if not path.is_file():
                continue
            found = parse_json(read_bytes(path, limit=1 << 20), path)
            if isinstance(found, dict) and name == NESTED:
                found = found.get("feature_extractor")
            if not isinstance(found, dict):
                raise ConfigError(f"{path} holds no settings of a feature extractor.")
            kind = found.get("feature_extractor_type", _KIND)
            if kind != _KIND:
                raise ConfigError(
                    f"{path}: the feature extractor {kind!r} is not implemented; supported: {_KIND}. "
                    "load(..., tokenizer=False) opens the model without it."
                )
            return cls(**{str(key): value for key, value in found.items()})
        return None

    def to_dict(self) -> dict[str, Any]:
        fixed = {key: values[0] for key, values in _ONLY.items()}
        return {"feature_extractor_type": _KIND, **fixed, **self.settings}

    def __repr__(self) -> str:
        frames, bands = self.shape
        return f"AudioProcessor({self.rate:,} Hz: {frames} frames of {bands} mel bands)"

    # ------------------------------------------------------------------ spectrograms

    def __call__(self, clips: Any) -> dict[str, torch.Tensor]:
        """Return ``input_values`` (B, T, M), float32.

        Args:
            clips: a list of recordings, or one: paths, bytes of files, arrays (n,) at the rate of this processor,
                mappings with ``array`` and ``sampling_rate``, or ``Clip`` objects.

        Raises:
            DataError: a recording cannot be read.
        """
        import torch

        listed = clips if isinstance(clips, list | tuple) else [clips]
        found = []
        for number, given in enumerate(listed, start=1):
            clip = clip_of(given, f"clip {number}")
            sound, remark = clip.read()
            if remark:
                note(f"{clip}: {remark}")
            found.append(self.values(sound))
        return {self.key: torch.from_numpy(np.stack(found))}

    def log_mel(self, sound: Sound) -> NDArray[np.float32]:
        """Return the log-mel energies of a recording, (frames, M); a part of a window at the end is left out."""
        samples = resampled(sound.samples, sound.rate or self.rate, self.rate)
        samples = samples[: (self.shape[0] - 1) * _HOP + _WINDOW].astype(np.float64)
        if len(samples) < _WINDOW:
            samples = np.pad(samples, (0, _WINDOW - len(samples)))
        frames = np.lib.stride_tricks.sliding_window_view(samples, _WINDOW)[::_HOP]
        frames = frames - frames.mean(1, keepdims=True)
        first = frames[:, :1] * (1 - _EMPHASIS)
        frames = np.concatenate((first, frames[:, 1:] - _EMPHASIS * frames[:, :-1]), axis=1)
        spectrum = np.fft.rfft(frames * np.hanning(_WINDOW), _FFT)
        energies = (spectrum.real**2 + spectrum.imag**2) @ _mel_filters(self.rate, self.shape[1])
        return np.log(np.maximum(energies, _FLOOR)).astype(np.float32)

    def values(self, sound: Sound) -> NDArray[np.float32]:
        """Return the normalised spectrogram of a recording, (T, M)."""
        return self.padded(self.log_mel(sound))

    def padded(self, energies: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return log-mel energies (frames, M), of at most T frames, as a normalised spectrogram (T, M)."""
        found = np.zeros(self.shape, np.float32)
        found[: len(energies)] = energies
        if self.settings["do_normalize"]:
            found -= np.float32(self.settings["mean"])
            found /= np.float32(2 * self.settings["std"])
        return found


def clip_of(value: Any, name: str) -> Clip:
    """Return a value as a ``Clip``; a path is its own name."""
    if isinstance(value, Clip):
        return value
    if isinstance(value, Mapping):
        array = value["array"] if value.get("array") is not None else value.get("raw")
        if array is None:
            return clip_of(value.get("bytes") or value.get("path"), name)
        rate = next((value[n] for n in (*RATE_NAMES, "rate") if value.get(n) is not None), None)
        if isinstance(array, Sequence):
            array = np.asarray(array)
        return Clip(in_numpy(array), name, whole_rate(rate))
    if isinstance(value, str | Path):
        return Clip(value, str(value))
    return Clip(in_numpy(value), name)


def whole_rate(rate: Any) -> Any:
    """Return a sampling rate as a whole number where it is one in another type; others are refused when it is read."""
    if getattr(rate, "ndim", None) == 0:  # a number of numpy, or an array or tensor of one
        rate = rate.item()
    return int(rate) if isinstance(rate, float) and rate.is_integer() else rate


@lru_cache(maxsize=8)
def _mel_filters(rate: int, bands: int) -> NDArray[np.float64]:
    """Return the filters of Kaldi, (257, M): triangles on the mel scale, from 20 Hz to half the rate."""

    def mel(frequency: Any) -> Any:
        return 1127.0 * np.log(1.0 + frequency / 700.0)

    edges = np.linspace(mel(_LOWEST), mel(rate // 2), bands + 2)
    place = mel(np.arange(_FFT // 2 + 1) * (rate / _FFT))[:, None]
    rising = (place - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - place) / np.diff(edges)[1:]
    filters: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    return filters
