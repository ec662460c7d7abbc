"""Random changes of training spectrograms: shifts in time, and masked bands and times (SpecAugment, arXiv 1904.08779).

Each clip has its own generator, keyed by its position in the run, so that the changes depend on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.audio.decode import Clip, Sound
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pretrain.data.audio.processor import AudioProcessor

__all__ = ["SpectrogramChanges", "StoredClip"]


class StoredClip:
    """A recording of the training rows that has been read once; its energies are kept from the first use on.

    Args:
        clip: the recording.
        sound: its decoded form.
        keep: keep the log-mel energies in memory; otherwise the recording is decoded again whenever it is used.

    Attributes:
        nbytes: memory of what is kept, at most, for a model that reads up to 160 mel bands at 16 kHz or at the rate of
            the recording.
    """

    def __init__(self, clip: Clip, sound: Sound, *, keep: bool = True) -> None:
        self.clip, self.count, self.rate, self.keep = clip, len(sound.samples), sound.rate, keep
        # A frame for every 160 samples, of 160 bands in fp32; a recording of a lower rate is resampled first.
        self.nbytes = int(4 * self.count * max(1.0, 16_000 / (self.rate or 16_000))) if keep else 0
        self._kept: tuple[str, NDArray[np.float32]] | None = None

    def seconds(self, rate: int) -> float:
        """Return the length of the recording in seconds; ``rate`` is used if the recording names none."""
        return self.count / (self.rate or rate)

    def values(self, processor: AudioProcessor) -> NDArray[np.float32]:
        """Return the spectrogram, (T, M).

        Raises:
            BrokenAudio: the file has changed since, and can no longer be read.
        """
        name = processor.fingerprint if self.keep else ""
        if self._kept is not None and self._kept[0] == name:
            return processor.padded(self._kept[1])
        # What is kept has no padding, which may be far larger than a short recording.
        found = processor.log_mel(self.clip.read()[0])
        if self.keep:
            self._kept = name, found
        return processor.padded(found)

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[np.float32]:
        return np.asarray(self.clip.read()[0].samples, dtype=dtype)


@dataclass(frozen=True)
class SpectrogramChanges:
    """Random changes of a normalised training spectrogram.

    Attributes:
        shift: largest shift in time, as a share of the frames; what leaves at one end comes in at the other, where
            padding or silence usually is.
        mask_time, mask_bands: widest masks, as a share of the frames and of the mel bands; each spectrogram gets one of
            either, of a width from 0 to that, filled with 0, the mean.

    Raises:
        ConfigError: a value is out of range.
    """

    shift: float = 0.0
    mask_time: float = 0.0
    mask_bands: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in vars(self).items():
            if not 0 <= value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 0 (none) and below 1.")

    def __call__(
        self, values: NDArray[np.float32], rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Return the changed spectrogram, (T, M) -> (T, M)."""
        frames, bands = values.shape
        most = int(self.shift * frames)
        values = np.roll(values, int(rng.integers(-most, most + 1)), axis=0)
        for axis, length, share in ((0, frames, self.mask_time), (1, bands, self.mask_bands)):
            width = int(rng.integers(int(share * length) + 1))
            start = int(rng.integers(length - width + 1))
            hidden = slice(start, start + width)
            values[(hidden, slice(None)) if axis == 0 else (slice(None), hidden)] = 0.0
        return values

    def values(
        self,
        held: Sequence[Any],
        processor: AudioProcessor,
        rngs: Sequence[np.random.Generator],
        *,
        evaluation: bool,
    ) -> NDArray[np.float32]:
        """Return the spectrograms of a batch, (B, T, M); in evaluation nothing is changed.

        What is held are recordings, ``StoredClip`` or whatever a ``Clip`` is made from, each with its generator.
        """
        found = [
            item.values(processor)
            if isinstance(item, StoredClip)
            else processor.values(Clip(item, "a recording").read()[0])
            for item in held
        ]
        if evaluation or self == SpectrogramChanges():
            return np.stack(found)
        return np.stack([self(values, rng) for values, rng in zip(found, rngs, strict=True)])
