"""Audio for pre-training: the rows that ``data.source: audio`` names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.audio.processor import AudioProcessor
from pretrain.data.audio.rows import AUDIO
from pretrain.data.images.source import rows_by_class
from pretrain.data.labelled import Role
from pretrain.data.row_source import RowSource
from pretrain.errors import ConfigError
from pretrain.utils.files import note

__all__ = ["CLIP", "fitted_processor", "labelled_audio"]

CLIP = Role(
    "audio",
    (
        *("audio", "sound", "recording", "clip", "speech", "wav", "file_name", "filename", "file"),
        *("path", "audio_path", "filepath", "file_path", "audio_file", "wav_path"),
    ),
    help="the recording: a path, bytes or an array",
)
_LONGEST = 1024  # frames of a new model: ten seconds at 16 kHz, the rate of the published models
_USUAL_RATE = 16_000
_MEASURED = 1000  # recordings from which mean and standard deviation are computed


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
        valid: held-out rows: such a source, or a fraction of the rows, stratified by class. None: the part ``val`` of
            the source, if it has one, else a tenth.
        sampling_rate: samples per second that the model reads; recordings of other rates are resampled.
        bands: mel bands of a spectrogram; a multiple of ``patch``.
        frames: frames of a spectrogram, one for every 160 samples, so 100 a second at 16 kHz; None: those of the
            longest training recording, at most 1,024. Recordings with more are cut, and counted in a line.
        patch: side of a patch, in bands and in frames.
        seed: seed of the split.
        labels: whether the rows have classes; False reads the recordings alone, for ``MaskedImage``. A list names the
            classes in the order of a checkpoint that is trained on.

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
