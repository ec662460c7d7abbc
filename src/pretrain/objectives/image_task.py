"""Base class of fine-tuning tasks that read images or recordings: rows, processor, sizes, inputs of ``predict``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pretrain.config.spelling import option
from pretrain.data.images import ImageProcessor, Picture
from pretrain.data.images.augment import View
from pretrain.data.images.given import given_images, is_one
from pretrain.data.images.rows import (
    IMAGES,
    Medium,
    decoded,
    parts_of,
    pictures,
    pixel_vectors,
    read_images,
)
from pretrain.data.tables import Table
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, ModelError
from pretrain.objectives.base import Batch, ExampleList, Rngs
from pretrain.objectives.row_pixels import check_processor, values_key
from pretrain.objectives.tasks import Task
from pretrain.utils.files import note

__all__ = ["ImageTask", "class_figures"]

_JUDGED = 60  # rows among which those of the report are chosen
_SHOWN = 24  # classes up to which each has its own figure


class ImageTask(Task):
    """Base class of the tasks of images or of another ``medium``; a subclass tells what is answered.

    Class attributes:
        medium: what the files of the rows hold.
        vectors: function from tables to the vectors of a classical baseline, and the rows that can be read.
        closed: sentence for the model card on classes that the model does not know; by default the usual one.

    Attributes:
        augmentation: changes of training images, an ``Augmentation``, or those of another medium.
    """

    medium: ClassVar[Medium] = IMAGES
    vectors: ClassVar[Callable[..., Any]] = staticmethod(pixel_vectors)
    reads_files: ClassVar[bool] = True
    closed: ClassVar[str | None] = None
    augmentation: Any

    @classmethod
    def refuse_length(cls, max_length: int | None) -> None:
        """Raise ``ConfigError`` if the maximum length of a text is given."""
        if max_length is not None:
            raise ConfigError(
                f"{option('max_length', max_length)} counts the tokens of a text, and the task {cls.name} reads "
                f"{cls.medium.many}. Leave it out; their size is that in preprocessor_config.json."
            )

    def check_processor(self) -> None:
        """Check that the model has an image processor that fits; a model without any gets that of its sizes."""
        model = self.model
        if model.processor is None:
            model.processor = model.backbone.default_processor(model.backbone.config)
            if model.processor is not None:
                note(
                    f"the model has no preprocessor_config.json; its {self.medium.many} are read by {model.processor}"
                )
        check_processor(model, f"The task {self.name}")

    def check_whole(self) -> None:
        """Make the processor scale whole images, if it cuts out their middle: what lies outside has targets too."""
        settings, size = self.processor.settings, self.processor.size
        whole = {"height": size[0], "width": size[1]} if size else {}
        if settings["do_resize"] and not settings["do_center_crop"] and settings["size"] == whole:
            return
        kept = {k: settings[k] for k in ("resample", "image_mean", "image_std", "rescale_factor")}
        switches = {k: settings[k] for k in ("do_rescale", "do_normalize")}
        self.model.processor = ImageProcessor(size=whole, **kept, **switches)
        note(f"the image processor cut out the middle of an image; {self.name} reads whole images")

    @property
    def processor(self) -> Any:
        """What reads the inputs: for images an ``ImageProcessor``, also that of a processor of images and texts."""
        return getattr(self.model.processor, "images", self.model.processor)

    @property
    def limits(self) -> list[str]:
        usual = f"It knows no other labels, and names one of them for any {self.medium.column}."
        return [self.reading, *[self.closed or usual] * (len(self.model.labels or ()) > 1)]

    @property
    def reading(self) -> str:
        """A sentence for the model card on how an input is read."""
        size = self.processor.size or (0, 0)
        return f"An image is scaled to {size[0]} x {size[1]} pixels."

    @classmethod
    def read(cls, source: Any, *, name: str = "data", **options: Any) -> Table:
        return read_images(source, name=name, medium=cls.medium, **options)

    @classmethod
    def baseline_columns(cls, *tables: Table) -> list[Any]:
        columns: list[Any] = []
        for table, (vectors, rows) in zip(tables, cls.vectors(*tables), strict=True):
            columns += [vectors, [table.columns["label"][i] for i in rows]]
        return columns

    @classmethod
    def parts(cls, source: Any) -> Sequence[str]:
        own = parts_of(source, cls.medium)
        folder = isinstance(source, str | Path) and os.path.isdir(os.path.expanduser(source))
        return own if own or folder else super().parts(source)

    def encode_inputs(
        self,
        table: Table,
        *,
        targets: bool,
        target: Callable[[TaskRows, int, Any], Any] | None = None,
    ) -> tuple[TaskRows, list[int]]:
        """Decode every image once, so that a broken one is counted and named before the first step.

        Args:
            table: the rows.
            targets: whether a file that does not exist is an error.
            target: given the rows so far, the number of a row and its image, returns further values of its example,
                or as a text the reason why it has none.
        """
        rows, kept = TaskRows(size=self._patches()), []
        for i, image, text in decoded(table, required=targets, medium=self.medium):
            if image is None:
                rows.drop(i, text or f"no {self.medium.column}")
                continue
            more = {} if target is None else target(rows, i, image)
            if isinstance(more, str):
                rows.drop(i, more)
                continue
            for remark in (text, self.remark(image)):
                if remark is not None:
                    rows.remark(i, remark)
            rows.add(i, {self.medium.column: image, **more}, getattr(image, "size", None))
            kept.append(i)
        return rows, kept

    def seen(
        self, examples: ExampleList, rngs: Rngs, *, evaluation: bool
    ) -> tuple[Batch, list[View]]:
        """Return ``pixel_values`` of images, changed at random in training, and the view of each.

        In evaluation ``sizes`` (B, 2), the height and width of the images, stand beside them.
        """
        held: Any = [example["image"] for example in examples]
        pixels, views = self.augmentation.seen(held, self.processor, rngs, evaluation=evaluation)
        batch = {"pixel_values": torch.from_numpy(pixels)}
        if evaluation:
            batch["sizes"] = torch.tensor([image.size[::-1] for image in held])
        return batch, views

    def map_scores(self, batch: Batch) -> torch.Tensor:
        """Return the scores at the places of the map, (B, scores, h, w)."""
        scores: torch.Tensor = self.model({"pixel_values": batch["pixel_values"]}).float()
        return scores

    def remark(self, stored: Any) -> str | None:
        """Return a remark on a decoded input, such as on what of it is not read."""
        return None

    def _patches(self) -> int:
        """What one image costs, in the unit of the model."""
        values = torch.empty(self.shape, device="meta")
        found = self.model.backbone.units({values_key(self.model): values})
        if not found:
            raise ModelError(
                f"The {self.medium.many} are read as {' x '.join(map(str, self.shape[2:]))} values, which is less than "
                f"one of the {self.unit_name} of this model. Set a larger size in preprocessor_config.json."
            )
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values of one image, with a dimension for the batch."""
        return (1, self.processor.channels, *(self.processor.size or (1, 1)))

    def sizes(self, rows: TaskRows) -> str:
        size = self.processor.size or (0, 0)
        patch = getattr(self.model.backbone.config, "patch_size", 1)
        left = [side % patch for side in size]
        unread = f"; the last {left[0]} rows and {left[1]} columns of pixels fill no patch and are not seen"
        return (
            f"images are read as {self.processor.channels} x {size[0]} x {size[1]} values, {rows.size} "
            f"{self.unit_name} each" + unread * any(left)
        )

    # ------------------------------------------------------------------ answers

    def is_one(self, value: Any) -> bool:
        return is_one(value, self.medium)

    def inputs(self, inputs: Any) -> tuple[Table, bool] | None:
        channels = getattr(self.processor, "channels", 0)
        return given_images(inputs, channels, self.medium, self.read)

    def compared_pictures(
        self,
        table: Table,
        count: int,
        judge: Callable[[int, dict[str, Any]], tuple[float, Any, Any] | None],
        draw: Callable[[Picture, Any], str],
    ) -> list[dict[str, Any]]:
        """Return rows with their targets and answers as pictures; see ``Task.pictures``.

        Args:
            table: see there; at most ``_JUDGED`` rows are predicted, spread evenly over it.
            count: see there; the rows are chosen from the lowest score to the highest, evenly by rank.
            judge: given the number of a row and its answer, returns the score, the target and what was found; None to
                leave the row out.
            draw: returns a picture with a target, or with what was found, over its image.
        """
        size = min(len(table), _JUDGED)
        asked = [k * len(table) // size for k in range(size)]
        judged = []
        for i, answer in zip(asked, self.predict(table.take(asked)), strict=True):
            if answer and (found := judge(i, answer)) is not None:
                judged.append((i, *found))
        judged.sort(key=lambda row: (math.isfinite(row[1]), row[1]))
        if (last := len(judged) - 1) >= count:
            judged = [judged[round(k * last / max(1, count - 1))] for k in range(count)]
        of_rows = pictures(table.take([row[0] for row in judged]))
        return [
            {
                "right": draw(picture, truth),
                "predicted": draw(picture, found),
                "score": score,
                "where": table.where(i),
            }
            for (i, score, truth, found), picture in zip(judged, of_rows, strict=True)
            if picture is not None
        ]


def class_figures(name: str, labels: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Return a figure of each class, called by its label; none if there are very many classes."""
    if len(labels) > _SHOWN:
        return {}
    return {f"{name}_{label}": value for label, value in zip(labels, values.tolist(), strict=True)}
