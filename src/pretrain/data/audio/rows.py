"""Rows of audio: folders of ``.wav`` files by class, arrays in ``.npz`` files, and columns of paths, bytes or arrays.

They are read as rows of images are, see ``pretrain.data.images.rows``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.audio.augment import StoredClip
from pretrain.data.audio.decode import RATES, SUFFIXES, Clip, Sound, is_rate
from pretrain.data.audio.processor import AudioProcessor, clip_of, whole_rate
from pretrain.data.images.decode import FileItem
from pretrain.data.images.rows import Medium, read_all
from pretrain.data.labelled import Role
from pretrain.errors import DataError
from pretrain.utils.files import note

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pretrain.data.tables import Table

__all__ = ["AUDIO", "mel_vectors"]

_RATE = Role(
    "sampling_rate",
    ("sampling_rate", "sample_rate"),
    False,
    "samples per second of an array; files say it themselves",
)
_SHORTEST = 64  # values of an array that is taken for audio; labels have fewer
_PARTS, _BANDS = 8, 64  # of a clip, whose means a classical method reads, and mel bands


class _Audio(Medium):
    def holds(self, value: Any) -> bool:
        if isinstance(value, Mapping):
            return value.get("array") is not None
        return isinstance(value, Clip) or (
            super().holds(value) and value.size >= _SHORTEST and value.dtype.kind in "fiu"
        )

    def make(self, value: Any, name: str) -> FileItem:
        return clip_of(value, name)

    def from_mapping(self, value: Mapping[str, Any], name: str) -> FileItem | str | None:
        if value.get("array") is None:
            return super().from_mapping(value, name)
        return clip_of(value, f"the audio in {name}")

    def completed(self, item: FileItem, cell: Any, row: Mapping[str, Any]) -> FileItem:
        rate = whole_rate(row.get(_RATE.name))
        if rate is None or not isinstance(item, Clip) or item.rate is not None or item.is_file:
            return item
        if not is_rate(rate):
            raise DataError(
                f"{item.name}: the column for {_RATE.name} says {rate!r:.40}, which is no sampling rate. It must be "
                f"{RATES}; correct the column, or rename it if it holds something else."
            )
        return Clip(item.source, item.name, rate)

    def column_of(
        self, path: Path, arrays: Mapping[str, Any], roles: Mapping[str, str]
    ) -> list[Any]:
        given = next((arrays[name] for name in (*_RATE.known, "rate") if name in arrays), None)
        clips = super().column_of(path, arrays, roles)
        rates: list[Any] = [None] * len(clips)
        if given is None:
            note(f"{path}: no sampling_rate, so that of the model is assumed")
        elif given.shape == (len(clips),) and len(given) > 1:
            rates = [whole_rate(rate) for rate in given.tolist()]
        elif given.size != 1 or given.dtype.kind not in "iu":
            raise DataError(f"{path}: sampling_rate is {given}; it must be one whole number.")
        else:
            rates = [int(given.reshape(-1)[0])] * len(clips)
        return [Clip(c.source, c.name, rate) for c, rate in zip(clips, rates, strict=True)]


AUDIO = _Audio(
    "audio", "recordings", Clip, StoredClip, SUFFIXES,
    ("audio", "waveforms", "clips", "signals", "recordings", "x", "data", "arr_0"), (1, 2),
    "(rows, samples) or (rows, samples, channels), and sampling_rate",
    "a path or the bytes of a .wav file, an array (samples,) of floats from -1 to 1, or a mapping with array and "
    "sampling_rate",
    (_RATE,),
)  # fmt: skip


def mel_vectors(
    *tables: Table, parts: int = _PARTS
) -> list[tuple[list[NDArray[np.float32]], list[int]]]:
    """Return, for each table, the mean log-mel energies of equal parts of its clips, and the rows that can be read.

    Args:
        *tables: have the column ``audio``.
        parts: of a clip; 1 for the mean over the whole clip.
    """
    processor = AudioProcessor(num_mel_bins=_BANDS, max_length=1 << 16, do_normalize=False)

    def means(sound: Sound) -> NDArray[np.float32]:
        energies = processor.log_mel(sound)
        edges = np.linspace(0, len(energies), parts + 1)
        cuts = [(int(a), max(int(b), int(a) + 1)) for a, b in zip(edges, edges[1:], strict=False)]
        return np.concatenate([energies[a:b].mean(0) for a, b in cuts])

    result = []
    for table in tables:
        read = [
            (i, found[0])
            for i, _, found in read_all(table, means, AUDIO)
            if isinstance(found, tuple)
        ]
        result.append(([vector for _, vector in read], [i for i, _ in read]))
    return result
