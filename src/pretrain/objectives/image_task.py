"""Base class of fine-tuning tasks that read images: rows, image processor, sizes, and the inputs of ``predict``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pretrain.config.spelling import option
from pretrain.data.images import ImageProcessor, Picture
from pretrain.data.images.rows import decoded, is_image_source, parts_of, read_images
from pretrain.data.tables import Table
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, DataError
from pretrain.objectives.row_pixels import check_processor
from pretrain.objectives.tasks import Task
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.data.images.decode import Stored

__all__ = ["ImageTask", "shown_answers", "spread"]

_JUDGED = 60  # rows among which those of the report are chosen


class ImageTask(Task):
    """Base class of the tasks of images; a subclass tells what is answered.

    Class attributes:
        closed: sentence for the model card on classes that the model does not know.
    """

    closed: ClassVar[str] = "It knows no other labels, and names one of them for any image."

    @classmethod
    def refuse_length(cls, max_length: int | None) -> None:
        """Refuse the maximum length of a text.

        Raises:
            ConfigError: it is given.
        """
        if max_length is not None:
            raise ConfigError(
                f"{option('max_length', max_length)} counts the tokens of a text, and the task {cls.name} reads "
                "images. Leave it out; the size of images is that in preprocessor_config.json."
            )

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
    def processor(self) -> ImageProcessor:
        """The image processor of the model."""
        found: ImageProcessor = self.model.processor
        return found

    @property
    def limits(self) -> list[str]:
        size = self.processor.size or (0, 0)
        read = f"An image is scaled to {size[0]} x {size[1]} pixels."
        return [read, *[self.closed] * (len(self.model.labels or ()) > 1)]

    @classmethod
    def read(cls, source: Any, *, name: str = "data", **options: Any) -> Table:
        return read_images(source, name=name, **options)

    @classmethod
    def parts(cls, source: Any) -> Sequence[str]:
        return parts_of(source)

    def encode_inputs(
        self, table: Table, *, targets: bool, target: Callable[[int, Stored], Any] | None = None
    ) -> tuple[TaskRows, list[int]]:
        """Decode every image once, so that a broken one is counted and named before the first step.

        Args:
            table: the rows.
            targets: whether a file that does not exist is an error.
            target: returns further values of the example of a row, or as a text the reason why it has none.
        """
        rows, kept = TaskRows(size=self._patches()), []
        for i, image, text in decoded(table, required=targets):
            if image is None:
                rows.drop(i, text or "no image")
                continue
            more = {} if target is None else target(i, image)
            if isinstance(more, str):
                rows.drop(i, more)
                continue
            if text is not None:
                rows.remark(i, text)
            rows.add(i, {"image": image, **more}, image.size)  # type: ignore[dict-item]
            kept.append(i)
        return rows, kept

    def _patches(self) -> int:
        """What one image costs, in the unit of the model."""
        size, model = self.processor.size or (1, 1), self.model
        shape = (1, self.processor.channels, *size)
        return model.backbone.units({"pixel_values": torch.empty(shape, device="meta")})

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
        path = Path(inputs) if isinstance(inputs, str | Path) else None
        if path is not None and is_image_source(path) and path.suffix.lower() not in (".npz",):
            table = self.read(path, name="data")
            return table, not path.is_dir() and len(table) == 1
        if path is not None:
            if path.suffix.lower() == ".npz":
                return read_images(path), False
            if not path.suffix:  # neither an image nor a table
                _check_paths([path])
            return None
        channels = array == 3 and (
            inputs.shape[0] == self.processor.channels == 3 or inputs.shape[-1] in (1, 3, 4)
        )
        if array == 2 or channels or hasattr(inputs, "getbands"):
            return _table([inputs]), True
        if array in (3, 4):
            return _table(list(inputs)), False
        if isinstance(inputs, bytes):
            return _table([inputs]), True
        several = isinstance(inputs, list | tuple) and len(inputs)
        if several and not isinstance(inputs[0], Mapping):
            return _table(list(inputs)), False
        return None


def shown_answers(task: Task, table: Table) -> list[tuple[int, dict[str, Any]]]:
    """Return index and answer of at most ``_JUDGED`` rows, spread evenly over a table."""
    rows = range(len(table))
    chosen = (
        [rows[k * len(rows) // _JUDGED] for k in range(_JUDGED)] if len(rows) > _JUDGED else rows
    )
    return list(zip(chosen, task.predict(table.take(list(chosen))), strict=True))


def spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return ``count`` rows from the lowest score to the highest, evenly by rank."""
    order = sorted(rows, key=lambda row: (math.isfinite(row["score"]), row["score"]))
    if len(order) <= count:
        return order
    return [order[round(k * (len(order) - 1) / (count - 1))] for k in range(count)]


def _check_paths(images: Sequence[Any]) -> None:
    """Refuse paths of a caller that do not exist, because one wrong folder makes all of them wrong."""
    for i, path in enumerate(images, start=1):
        named = isinstance(path, str | Path) and str(path).strip() and "://" not in str(path)
        if named and not Path(path).expanduser().exists():
            raise DataError(f"image {i}: there is no file {str(path)[:200]!r}.")


def _table(images: Sequence[Any]) -> Table:
    """Return images of a caller as a table."""
    _check_paths(images)
    held = [
        Picture(v.numpy() if hasattr(v, "numpy") else v, f"image {i}")
        if hasattr(v, "dtype") or hasattr(v, "getbands")
        else v
        for i, v in enumerate(images, start=1)
    ]
    return Table("inputs", {"image": held}, origin="the inputs", unit="index")
