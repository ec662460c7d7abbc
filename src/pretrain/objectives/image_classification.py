"""Classification of images, with one class each or any number of classes (arXiv 2010.11929, section 4).

Labels, weights, metrics and answers are those of the classification of texts. As an objective of pre-training it reads
the rows of ``pretrain.data.images.source``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from pretrain.config.spelling import option
from pretrain.data.images.augment import Augmentation
from pretrain.data.images.rows import (
    IMAGES,
    Medium,
    decoded,
    is_image_source,
    parts_of,
    pictures,
    read_images,
)
from pretrain.data.images.source import IMAGE
from pretrain.data.labelled import Role
from pretrain.data.tables import Table
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, DataError
from pretrain.objectives.base import Batch, ExampleList, Loss, Rngs
from pretrain.objectives.classification import Classification
from pretrain.objectives.row_pixels import check_processor, pixel_values, values_key
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
    medium: ClassVar[Medium] = IMAGES

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
                f"{self.medium.many}. Leave it out; their size is that in preprocessor_config.json."
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
        self.augmentation: Any = Augmentation(crop, flip, randaugment)

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
                    f"the model has no preprocessor_config.json; its {self.medium.many} are read by {model.processor}"
                )
        check_processor(model, f"The task {self.name}")

    @property
    def processor(self) -> Any:
        """The processor of the model, for images an ``ImageProcessor``."""
        return self.model.processor

    @property
    def limits(self) -> list[str]:
        known = [f"It knows no other labels, and names one of them for any {self.medium.column}."]
        return [self.reading, *known * (len(self.labels) > 1)]

    @property
    def reading(self) -> str:
        """A sentence for the model card on how an input is read."""
        size = self.processor.size or (0, 0)
        return f"An image is scaled to {size[0]} x {size[1]} pixels."

    # ------------------------------------------------------------------ rows

    @classmethod
    def read(cls, source: Any, *, name: str = "data", **options: Any) -> Table:
        return read_images(source, name=name, medium=cls.medium, **options)

    @classmethod
    def parts(cls, source: Any) -> Sequence[str]:
        return parts_of(source, cls.medium)

    @classmethod
    def tidy(cls, table: Table, learned: Learned, options: Mapping[str, Any]) -> Table:
        """As for texts; and every image becomes an item, whose content tells duplicates and fingerprints."""
        tidied = super().tidy(table, learned, options)
        columns = {**tidied.columns, cls.medium.column: pictures(tidied, medium=cls.medium)}
        return tidied.with_columns(columns, tidied.label_names)

    def encode_inputs(self, table: Table, *, targets: bool) -> tuple[TaskRows, list[int]]:
        """Decode every image once, so that a broken one is counted and named before the first step."""
        rows, kept = TaskRows(size=self._patches()), []
        for i, image, text in decoded(table, required=targets, medium=self.medium):
            if image is None:
                rows.drop(i, text or f"no {self.medium.column}")
                continue
            for remark in (text, self.remark(image)):
                if remark is not None:
                    rows.remark(i, remark)
            rows.add(i, {self.medium.column: image})
            kept.append(i)
        return rows, kept

    def remark(self, stored: Any) -> str | None:
        """Return a remark on a decoded input, such as on what of it is not read."""
        return None

    def _patches(self) -> int:
        """What one image costs, in the unit of the model."""
        shape = torch.empty(self.shape, device="meta")
        return self.model.backbone.units({values_key(self.model): shape})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values of one image, with a dimension for the batch."""
        return (1, self.processor.channels, *(self.processor.size or (1, 1)))

    def collate_inputs(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool) -> Batch:
        """Change training images at random, each by its own generator, and normalise; see ``Augmentation``."""
        found = pixel_values(
            self.model, self.augmentation, examples, rngs, evaluation=evaluation, what=self.name
        )
        return {values_key(self.model): found}

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
                f"The rows have no labels, from which {self.medium.many} are classified. Give each row labels, the "
                "number of its class; data.source reads them unless data.source_args.labels is false."
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
        """One image (a path, an array (H, W) or (H, W, C), an image of Pillow), or several in a list or an array."""
        array = getattr(inputs, "ndim", 0) if hasattr(inputs, "dtype") else 0
        if isinstance(inputs, str | Path):
            return self._of_path(Path(inputs))
        channels = array == 3 and (
            inputs.shape[0] == self.processor.channels == 3 or inputs.shape[-1] in (1, 3, 4)
        )
        if array == 2 or channels or hasattr(inputs, "getbands") or isinstance(inputs, bytes):
            return self._table([inputs]), True
        if array in (3, 4):
            return self._table(list(inputs)), False
        several = isinstance(inputs, list | tuple) and len(inputs)
        if several and not isinstance(inputs[0], Mapping):
            return self._table(list(inputs)), False
        return None

    def _of_path(self, path: Path) -> tuple[Table, bool] | None:
        """Return the rows of a folder or file; None for a table with one row for each."""
        if is_image_source(path, self.medium):
            table, many = read_images(path, medium=self.medium), path.suffix.lower() == ".npz"
            return table, not many and not path.is_dir() and len(table) == 1
        if not path.suffix:  # neither an image nor a table
            self._check_paths([path])
        return None

    def _check_paths(self, given: Sequence[Any]) -> None:
        """Refuse paths of a caller that do not exist, because one wrong folder makes all of them wrong."""
        for i, path in enumerate(given, start=1):
            named = isinstance(path, str | Path) and str(path).strip() and "://" not in str(path)
            if named and not Path(path).expanduser().exists():
                column = self.medium.column
                raise DataError(f"{column} {i}: there is no file {str(path)[:200]!r}.")

    def _table(self, given: Sequence[Any]) -> Table:
        """Return images of a caller as a table."""
        self._check_paths(given)
        medium = self.medium
        held = [
            medium.make(v, f"{medium.column} {i}") if hasattr(v, "dtype") or medium.holds(v) else v
            for i, v in enumerate(given, start=1)
        ]
        return Table("inputs", {medium.column: held}, origin="the inputs", unit="index")
