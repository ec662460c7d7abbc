"""Classification of images, with one class each or any number of classes (arXiv 2010.11929, section 4).

Labels, weights, metrics and answers are those of the classification of texts. As an objective of pre-training it reads
the rows of ``pretrain.data.images.source``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from pretrain.config.spelling import option
from pretrain.data.images import ImageProcessor
from pretrain.data.images.augment import Augmentation
from pretrain.data.images.given import given_images
from pretrain.data.images.rows import decoded, parts_of, pictures, read_images
from pretrain.data.images.source import IMAGE
from pretrain.data.labelled import Role
from pretrain.data.tables import Table
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, DataError
from pretrain.objectives.base import Batch, ExampleList, Loss, Rngs
from pretrain.objectives.classification import Classification
from pretrain.objectives.row_pixels import check_processor, pixel_values
from pretrain.objectives.tasks import Learned
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.data.loader import Examples
    from pretrain.models.base import Model

__all__ = ["ImageClassification"]


class ImageClassification(Classification):
    """Predict the class or classes of an image.

    Args:
        model: a model with an image-classification head and ``labels``.
        crop: smallest share of the area that a random crop of a training image keeps; 1 for no crops. The default is
            measured on digits (docs/images.md); photos and a pre-trained model usually get 0.3 or less.
        flip: mirror half of the training images; not for letters, digits or whatever has a left and a right.
        randaugment: strength, 1 to 30, of two random operations on every training image; 0 for none.
        problem, class_weights, label_smoothing, threshold, codes: see ``Classification``.
        max_length: of texts only; None.

    Raises:
        ModelError: the model has no image processor, or one that does not fit.
    """

    name: ClassVar[str] = "image-classification"
    roles: ClassVar[tuple[Role, ...]] = (IMAGE, Classification.roles[-1])
    recorded: ClassVar[tuple[str, ...]] = ("problem", "threshold")
    head_kind: ClassVar[str | None] = "image-classification"
    figures: ClassVar[tuple[str, ...] | None] = Classification.figures

    def __init__(
        self,
        model: Model,
        *,
        crop: float = 0.8,
        flip: bool = False,
        randaugment: int = 0,
        problem: str = "single_label",
        class_weights: Any = None,
        label_smoothing: float = 0.0,
        threshold: float = 0.5,
        codes: Mapping[str, int] | None = None,
        max_length: int | None = None,
    ) -> None:
        if max_length is not None:
            raise ConfigError(
                f"{option('max_length', max_length)} counts the tokens of a text, and the task {self.name} reads "
                "images. Leave it out; the size of images is that in preprocessor_config.json."
            )
        super().__init__(
            model,
            problem=problem,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            threshold=threshold,
            codes=codes,
            pack=False,
        )
        self.augmentation = Augmentation(crop, flip, randaugment)

    def check_processor(self) -> None:
        """Check that the model has an image processor that fits; a model without any gets that of its sizes.

        Raises:
            ModelError: it does not fit.
        """
        model = self.model
        if model.processor is None:
            model.processor = model.backbone.default_processor(model.backbone.config)
            if model.processor is not None:
                note(
                    f"the model has no preprocessor_config.json; its images are read by {model.processor}"
                )
        check_processor(model, f"The task {self.name}")

    @property
    def processor(self) -> ImageProcessor:
        """The image processor of the model."""
        found: ImageProcessor = self.model.processor
        return found

    @property
    def limits(self) -> list[str]:
        size = self.processor.size or (0, 0)
        known = ["It knows no other labels, and names one of them for any image."]
        read = f"An image is scaled to {size[0]} x {size[1]} pixels."
        return [read, *known * (len(self.labels) > 1)]

    # ------------------------------------------------------------------ rows

    @classmethod
    def read(cls, source: Any, *, name: str = "data", **options: Any) -> Table:
        return read_images(source, name=name, **options)

    @classmethod
    def parts(cls, source: Any) -> Sequence[str]:
        return parts_of(source)

    @classmethod
    def tidy(cls, table: Table, learned: Learned, options: Mapping[str, Any]) -> Table:
        """As for texts; and every image becomes a ``Picture``, whose content tells duplicates and fingerprints."""
        tidied = super().tidy(table, learned, options)
        columns = {**tidied.columns, "image": pictures(tidied)}
        return tidied.with_columns(columns, tidied.label_names)

    def encode_inputs(self, table: Table, *, targets: bool) -> tuple[TaskRows, list[int]]:
        """Decode every image once, so that a broken one is counted and named before the first step."""
        rows, kept = TaskRows(size=self._patches()), []
        for i, image, text in decoded(table, required=targets):
            if image is None:
                rows.drop(i, text or "no image")
                continue
            if text is not None:
                rows.remark(i, text)
            rows.add(i, {"image": image})  # type: ignore[dict-item]
            kept.append(i)
        return rows, kept

    def _patches(self) -> int:
        """What one image costs, in the unit of the model."""
        size, model = self.processor.size or (1, 1), self.model
        shape = (1, self.processor.channels, *size)
        return model.backbone.units({"pixel_values": torch.empty(shape, device="meta")})

    def collate_inputs(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool) -> Batch:
        """Change training images at random, each by its own generator, and normalise; see ``Augmentation``."""
        found = pixel_values(
            self.model, self.augmentation, examples, rngs, evaluation=evaluation, what=self.name
        )
        return {"pixel_values": found}

    # ------------------------------------------------------------------ rows of pre-training

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Collate as for texts, after checking the labels of rows that no table was encoded to.

        Raises:
            DataError: a label is no number of a class, or not one zero or one for each class.
        """
        classes = len(self.labels)
        for example in examples if "labels" in examples[0] else ():
            label = np.asarray(example["labels"])
            if self.single:
                right = label.shape == () and label.dtype.kind in "iu" and 0 <= int(label) < classes
            else:
                right = label.shape == (classes,)
            if not right:
                wanted = (
                    f"a whole number from 0 to {classes - 1}"
                    if self.single
                    else f"{classes} numbers, 0 or 1 for each class"
                )
                raise DataError(
                    f"labels of a row are {label.tolist()}; with problem={self.problem} and {classes} labels of the "
                    f"model they must be {wanted}."
                )
        return super().collate(examples, rngs, evaluation=evaluation)

    def count(self, batch: Batch) -> torch.Tensor:
        if "labels" not in batch:
            raise DataError(
                "The rows have no labels, from which an image is classified. Give each row labels, the number of its "
                "class; data.source images reads them unless data.source_args.labels is false."
            )
        return super().count(batch)

    def forward(self, batch: Batch) -> Loss:
        self.count(batch)  # raises if there are no labels
        return super().forward(batch)

    def survey(self, rows: Examples) -> list[str]:
        """Compute balanced weights from the rows of pre-training; those of fine-tuning have given them already."""
        if self.unbalanced:
            self.balance([int(rows[i]["labels"]) for i in range(len(rows))])
        return super().survey(rows)

    def sizes(self, rows: TaskRows) -> str:
        size = self.processor.size or (0, 0)
        return (
            f"images are read as {self.processor.channels} x {size[0]} x {size[1]} values, {rows.size} "
            f"{self.unit_name} each"
        )

    # ------------------------------------------------------------------ answers

    def inputs(self, inputs: Any) -> tuple[Table, bool] | None:
        return given_images(inputs, self.processor.channels)
