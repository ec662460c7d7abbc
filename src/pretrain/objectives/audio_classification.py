"""Classification of audio, with one class each or any number of classes (AST, arXiv 2104.01778).

It is the classification of images with another medium: a recording becomes a spectrogram, which is changed at random in
training by shifts and masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pretrain.data.audio.augment import SpectrogramChanges
from pretrain.data.audio.rows import AUDIO, CLIP, mel_vectors
from pretrain.data.images.rows import Medium
from pretrain.data.labelled import Role
from pretrain.objectives.classification import Classification
from pretrain.objectives.image_classification import ImageClassification

if TYPE_CHECKING:
    from pretrain.data.task_rows import TaskRows
    from pretrain.models.base import Model

__all__ = ["AudioClassification"]


class AudioClassification(ImageClassification):
    """Predict the class or classes of a recording.

    Args:
        model: a model with an audio-classification head and ``labels``.
        shift: largest random shift of a training spectrogram in time, as a share of its frames.
        mask_time: widest random mask in time, as a share of the frames; see ``SpectrogramChanges``.
        mask_bands: widest random mask of mel bands, as a share of them.
        problem, class_weights, label_smoothing, threshold, codes, label_separator, label_form: see
            ``Classification``.
        max_length: of texts only; None.

    Raises:
        ModelError: the model has no audio processor, or one that does not fit.
    """

    name: ClassVar[str] = "audio-classification"
    roles: ClassVar[tuple[Role, ...]] = (CLIP, *AUDIO.beside, Classification.roles[-1])
    head_kind: ClassVar[str | None] = "audio-classification"
    figures: ClassVar[tuple[str, ...] | None] = Classification.figures
    medium: ClassVar[Medium] = AUDIO
    baseline: ClassVar[str | None] = "log-mel"
    vectors: ClassVar[Callable[..., Any]] = staticmethod(mel_vectors)

    def __init__(
        self,
        model: Model,
        *,
        shift: float = 0.1,
        mask_time: float = 0.1,
        mask_bands: float = 0.1,
        problem: str = "single_label",
        class_weights: Any = None,
        label_smoothing: float = 0.0,
        threshold: float = 0.5,
        codes: Mapping[str, int] | None = None,
        label_separator: str | None = None,
        label_form: str | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__(
            model,
            problem=problem,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            threshold=threshold,
            codes=codes,
            label_separator=label_separator,
            label_form=label_form,
            max_length=max_length,
        )
        self.augmentation = SpectrogramChanges(shift, mask_time, mask_bands)

    @property
    def reading(self) -> str:
        return (
            f"A recording is resampled to {self.processor.rate:,} Hz, and cut after {self.processor.seconds:.2f} "
            "seconds."
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.processor.shape)

    def remark(self, stored: Any) -> str | None:
        """Return a remark on a recording that is longer than what the model reads."""
        processor = self.processor
        # What fills no frame at the end is left out of every recording.
        if processor.frames(stored.seconds(processor.rate)) <= processor.shape[0]:
            return None
        return f"longer than {processor.seconds:.2f} seconds, of which the beginning is read"

    def sizes(self, rows: TaskRows) -> str:
        frames, bands = self.processor.shape
        return (
            f"recordings are read as {frames} frames of {bands} mel bands ({self.processor.seconds:.2f} seconds at "
            f"{self.processor.rate:,} Hz), {rows.size} {self.unit_name} each"
        )
