"""Rows of audio: folders of ``.wav`` files by class, arrays in ``.npz`` files, and columns of paths, bytes or arrays.

They are read as rows of images are, see ``pretrain.data.images.rows``; ``data.source: audio`` names them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.audio.augment import StoredClip
from pretrain.data.audio.decode import RATES, SUFFIXES, Clip, Sound, is_rate
from pretrain.data.audio.processor import RATE_NAMES, AudioProcessor, clip_of, whole_rate
from pretrain.data.images.decode import FileItem
from pretrain.data.images.rows import Medium, read_all
from pretrain.data.images.source import rows_by_class
from pretrain.data.labelled import Role
from pretrain.data.row_source import RowSource
from pretrain.errors import ConfigError, DataError
from pretrain.utils.files import note

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pretrain.data.tables import Table

__all__ = ["AUDIO", "CLIP", "fitted_processor", "labelled_audio", "mel_vectors"]

CLIP = Role(
    "audio",
    (
        *("audio", "sound", "recording", "clip", "speech", "wav", "file_name", "filename", "file"),
        *("path", "audio_path", "filepath", "file_path", "audio_file", "wav_path"),
    ),
    help="the recording: a path, bytes or an array",
    file=True,
)
_RATE = Role(
    "sampling_rate",
    RATE_NAMES,
    False,
    "samples per second of an array; files say it themselves",
)
_SHORTEST = 64  # values of an array that is taken for audio; labels have fewer
_PARTS, _BANDS = 8, 64  # of a clip, whose means a classical method reads, and mel bands
_LONGEST = 1024  # frames of a new model: ten seconds at 16 kHz, the rate of the published models
_USUAL_RATE = 16_000
_MEASURED = 1000  # recordings from which mean and standard deviation are computed


class _Audio(Medium):
    def holds(self, value: Any) -> bool:
        if isinstance(value, Mapping):
            return value.get("array") is not None
        return isinstance(value, Clip) or (
            super().holds(value)
            and math.prod(value.shape) >= _SHORTEST
            and getattr(value.dtype, "kind", "f") in "fiu"  # tensors have none
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


def labelled_audio(
    train: str,
    valid: float | str | None = None,
    *,
    sampling_rate: int = 16000,
    bands: int = 64,
    frames: int | None = None,
    patch: int = 16,
    seed: int = 0,
    labels: bool | Sequence[str] = True,
) -> RowSource:
    """Return rows of recordings, with one class each for the objective ``AudioClassification``, or without for others.

    Args:
        train: a folder of ``.wav`` files by class, a ``.npz`` file, or a table with a column of paths.
        valid: as for ``labelled_images``.
        sampling_rate: samples per second that the model reads; recordings of other rates are resampled.
        bands: mel bands of a spectrogram; a multiple of ``patch``.
        frames: frames of a spectrogram, one for every 160 samples, so 100 a second at 16 kHz; None: those of the
            longest training recording, at most 1,024. Recordings with more are cut, and counted in a line.
        patch: side of a patch, in bands and in frames.
        seed: seed of the split.
        labels: as for ``labelled_images``.

    Returns:
        Rows with ``audio`` and, if asked for, ``labels``; the audio processor, which normalises by the training rows;
        and the labels and sizes that the model needs.

    Raises:
        DataError: no recordings, no labels, or a recording that does not exist.
        ConfigError: bands or frames are no multiple of ``patch``, so that some would never be read.
    """
    for name, value, step in (
        ("patch", patch, 1),
        ("bands", bands, patch),
        ("frames", frames, patch),
    ):
        if value is not None and (type(value) is not int or value < 1 or value % step):
            raise ConfigError(
                f"data.source_args.{name} is {value!r}; it must be a whole number above 0"
                f"{f' and a multiple of the patch, {patch}' * (step > 1)}."
            )
    rows, held, known = rows_by_class(train, valid, CLIP, AUDIO, seed=seed, labels=labels)
    clips = [row["audio"] for row in rows]
    processor = fitted_processor(clips, sampling_rate, bands, frames, patch)
    return RowSource(
        rows,
        held,
        processor=processor,
        overrides={
            **({} if known is None else {"labels": known.labels}),
            "num_mel_bins": bands,
            "max_length": processor.shape[0],
            "patch_size": patch,
            "frequency_stride": patch,
            "time_stride": patch,
        },
        name=Path(train).name,
    )


def fitted_processor(
    clips: Sequence[Any], rate: int, bands: int, frames: int | None, patch: int
) -> AudioProcessor:
    """Return the processor for recordings: as long as the longest of them, with their mean and standard deviation.

    Args:
        clips: ``StoredClip`` objects, the training rows.
        rate: samples per second of the model.
        bands: mel bands.
        frames: frames, or None.
        patch: side of a patch, of which the frames become a multiple.
    """
    given: dict[str, Any] = {"sampling_rate": rate, "num_mel_bins": bands, "do_normalize": False}
    any_length = AudioProcessor(**given)
    counts = [any_length.frames(clip.seconds(rate)) for clip in clips]
    if frames is None:
        frames = -(-min(_LONGEST, max(counts)) // patch) * patch
    plain = AudioProcessor(**given, max_length=frames)
    if longer := sum(count > frames for count in counts):
        note(
            f"{longer:,} of {len(counts):,} training recordings are longer than {plain.seconds:.2f} seconds, of which "
            f"the beginning is read; the longest has {max(counts):,} frames (data.source_args.frames)"
        )
    if rate != _USUAL_RATE:
        note(
            f"windows of 400 samples every 160 at {rate:,} Hz are {400 / rate * 1000:.1f} ms every "
            f"{160 / rate * 1000:.1f} ms. transformers computes the same without torchaudio; with it, its windows are "
            "25 ms every 10 ms, which is the same at 16,000 Hz alone (data.source_args.sampling_rate)"
        )
    step = -(-len(clips) // _MEASURED)
    total, squares, count = 0.0, 0.0, 0
    for clip in clips[::step]:
        energies = plain.log_mel(clip.clip.read()[0]).astype(np.float64)
        total, squares = total + float(energies.sum()), squares + float((energies**2).sum())
        count += energies.size
    mean = total / count
    std = max(float(np.sqrt(max(squares / count - mean**2, 0.0))), 1e-3)
    settings = {
        **plain.settings,
        "do_normalize": True,
        "mean": round(mean, 6),
        "std": round(std, 6),
    }
    return AudioProcessor(**settings)


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
        found = [(i, vector) for i, _, vector, _ in read_all(table, means, AUDIO)]
        read = [(i, vector) for i, vector in found if vector is not None]
        result.append(([vector for _, vector in read], [i for i, _ in read]))
    return result
