"""Semantic segmentation: a class for every pixel of an image (Long et al., 2015, arXiv 1411.4038).

A light convolutional decoder of the token grid scores the classes at places of a few pixels; the scores are
interpolated to the pixels. Training compares them at the size that the model reads, and an evaluation at the size of
the masks, in bands of rows, so that its memory does not grow with C x H x W.

Letters: B images, C classes, h x w places of the map, H x W pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain import metrics as figures_of
from pretrain.config.spelling import option
from pretrain.data.images.augment import Augmentation
from pretrain.data.images.decode import BrokenImage
from pretrain.data.images.draw import colour, with_mask
from pretrain.data.images.masks import (
    MASK,
    UNLABELLED,
    Mask,
    pixel_features,
    read_masked,
    read_numbers,
)
from pretrain.data.images.rows import pictures
from pretrain.data.images.source import IMAGE
from pretrain.data.labelled import Role, label_strata
from pretrain.data.labels import LabelMap, number_in
from pretrain.data.task_rows import TaskRows
from pretrain.errors import DataError
from pretrain.nn.loss import IGNORE
from pretrain.objectives.base import Batch, ExampleList, Loss, Rngs
from pretrain.objectives.image_task import ImageTask, class_figures
from pretrain.objectives.tasks import ClassTask, Learned, class_codes

if TYPE_CHECKING:
    from pretrain.data.images.decode import Stored
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["Segmentation"]

_BINARY = ("background", "foreground")
_BAND = 1 << 23  # scores that are interpolated to the size of an image at once


_ONE_CLASS = (
    f"pixels of the masks that are {UNLABELLED} have no class and do not count, and all others have one class; if "
    f"{UNLABELLED} stands for a class, write the number that it has in the training masks"
)


class Segmentation(ImageTask, ClassTask):
    """Predict the class of every pixel of an image.

    Args:
        model: a model with a segmentation head and ``labels``.
        crop: smallest share of the area that a random crop of a training image keeps; 1 for no crops.
        flip: mirror half of the training images; not where left and right have a meaning.
        jitter: how far the brightness, contrast and colour of a training image change, as a share; 0 for not at all.
        class_weights, label_smoothing: see ``ClassTask``; a target is a pixel.
        codes: class number of every number in the masks; by default the numbers count the labels from 0. The number
            255 is a pixel without a class, unless it has a code. Answers are in these numbers, not in class numbers.
        max_length: of texts only; None.

    Row options: ``labels``, the class names in the order of their numbers.
    """

    name: ClassVar[str] = "segmentation"
    roles: ClassVar[tuple[Role, ...]] = (IMAGE, MASK)
    metric: str = "miou"
    baseline: ClassVar[str | None] = "colours"
    trivial_name: ClassVar[str] = "commonest class"
    recorded: ClassVar[tuple[str, ...]] = ("codes",)
    head_kind: ClassVar[str | None] = "segmentation"
    figures: ClassVar[tuple[str, ...] | None] = None  # each class has one
    closed: ClassVar[str] = "It knows no other classes, and gives one of them to every pixel."

    def __init__(
        self,
        model: Model,
        *,
        crop: float = 0.5,
        flip: bool = False,
        jitter: float = 0.0,
        class_weights: Any = None,
        label_smoothing: float = 0.0,
        codes: Mapping[str, int] | None = None,
        max_length: int | None = None,
    ) -> None:
        self.refuse_length(max_length)
        super().__init__(model, class_weights, label_smoothing, None, False)
        self.augmentation = Augmentation(crop, flip, jitter=jitter)
        numbered = {str(k): k for k in range(len(self.labels))}
        self.codes = class_codes(codes or numbered, self.labels)
        self.numbers = _mask_numbers(self.codes, len(self.labels))
        self.check_whole()

    # ------------------------------------------------------------------ rows

    @classmethod
    def read(cls, source: Any, *, name: str = "data", **options: Any) -> Table:
        return read_masked(source, name=name, **options)

    @classmethod
    def learn(cls, table: Table, options: Mapping[str, Any]) -> Learned:
        first, rows, broken = dict[int, str](), list[list[int]](), ""
        for i, found in read_numbers(table):
            broken = broken or (str(found) if isinstance(found, BrokenImage) else "")
            numbers = _numbers(found)
            rows.append([n for n in numbers if n != UNLABELLED])
            for number in numbers:
                first.setdefault(number, table.where(i))
        if not first:
            raise DataError(
                f"{table.name}: none of the {len(table):,} rows has a mask that can be read. {broken}".strip()
            )
        numbers, notes = sorted(first), list[str]()
        given, checkpoint = options.get("labels"), options.get("checkpoint_labels")
        if (low := numbers[0]) < 0 and str(low) not in map(str, given or ()):
            count, every = sum(low in row for row in rows), [*map(str, numbers[:2]), ...]
            raise DataError(
                f"{first[low]}: the mask has pixels of the number {low}, as {count:,} of {len(table):,} masks have. "
                f"Classes are numbered from 0, and pixels without a class are {UNLABELLED}: write "
                f"numpy.where(mask < 0, {UNLABELLED}, mask). If it is a class, list all: {option('labels', every)}."
            )
        names = table.label_names.get("mask")
        coded = str(UNLABELLED) in {str(key).strip() for key in given or ()}  # as a class
        if binary := numbers == [0, UNLABELLED] and not coded:
            notes.append(
                "the masks hold 0 and 255 only, so 255 is taken for the second class and not for pixels without one"
            )
            numbers, names = [0, 1], names or (None if given or checkpoint else list(_BINARY))
        elif numbers == [UNLABELLED] and not coded:
            raise DataError(
                f"{table.name}: all pixels of the masks are {UNLABELLED}, which is no class. Give masks with the "
                "numbers of the classes."
            )
        elif UNLABELLED in numbers and not coded:
            numbers.remove(UNLABELLED)
            notes.append("pixels of the masks that are 255 have no class, and are not trained on")
        places = [first[UNLABELLED if binary and n else n] for n in numbers]
        if len(numbers) == 1 and not (given or checkpoint or names):
            raise DataError(
                f"{table.name}: the masks hold the number {numbers[0]} only; training needs at least two classes. If "
                f"another one is missing here by chance, name them all: {option('labels', [...])}."
            )
        known = LabelMap.learn(
            numbers, given, names=names, checkpoint=checkpoint, where=places.__getitem__,
            column="mask",
        )  # fmt: skip
        if len(known.labels) >= UNLABELLED:
            raise DataError(
                f"The masks of {table.name} have {len(known.labels):,} classes; at most {UNLABELLED - 1} are trained. "
                "Numbers of single objects are no classes: write 1 for all of one kind."
            )
        codes = {str(key): k for key, k in known.codes.items() if str(key).lstrip("-").isdigit()}
        renamed = {c: k for c, k in known.codes.items() if c not in (*codes, *known.labels)}
        if names is not None:
            codes = {str(n): k for n, k in enumerate(known.named(names)) if k is not None}
        if binary:
            codes = {"0": codes["0"], str(UNLABELLED): codes["1"]}
        codes |= renamed
        strata = label_strata([[str(n) for n in row] for row in rows])
        return Learned(known.labels, strata, {"codes": codes}, notes)

    @classmethod
    def tidy(cls, table: Table, learned: Learned, options: Mapping[str, Any]) -> Table:
        """Replace every image by a ``Picture``, and every mask by a ``Mask`` of class numbers."""
        columns = {**table.columns, "image": pictures(table)}
        if "mask" in table.names:
            columns["mask"] = _classes(
                table, learned.labels or (), learned.options["codes"], bool(options.get("labels"))
            )
        return table.with_columns(columns, {})

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        if not targets:
            return self.encode_inputs(table, targets=False)[0]
        masks, counts = self._masks(table), np.zeros(UNLABELLED + 1, np.int64)
        unlabelled: list[int] = []

        def target(rows: TaskRows, i: int, image: Stored) -> Any:
            mask = masks[i]
            if not isinstance(mask, Mask):
                return "no mask" if mask is None else f"broken mask ({mask.cause})"
            if mask.shape != image.size[::-1]:
                raise DataError(
                    f"{table.where(i)}: the image has {image.size[1]} x {image.size[0]} pixels (height x width, "
                    f"upright) and its mask {mask.shape[0]} x {mask.shape[1]}. They must have one size; check that "
                    "they belong together, and that neither was scaled or turned alone."
                )
            inside = np.bincount(mask.values.reshape(-1), minlength=len(counts))
            counts[:] += inside
            if inside[UNLABELLED]:
                unlabelled.append(i)
            return {"mask": mask}

        rows, _ = self.encode_inputs(table, targets=True, target=target)
        # Such are masks of 0 and 255, which training reads as two classes.
        if np.count_nonzero(counts[:UNLABELLED]) == 1:
            for i in unlabelled:
                rows.remark(i, _ONE_CLASS)
        self.balance_counts(counts[: len(self.labels)])
        return rows

    def _masks(self, table: Table) -> list[Any]:
        """Return the masks of a table, whether it has been tidied or not."""
        held = table.columns["mask"]
        tidied = all(isinstance(value, Mask | BrokenImage | None) for value in held)
        return held if tidied else _classes(table, self.labels, self.codes, self.labels_given)

    def trivial(self, train: Table, held_out: Table) -> dict[str, float]:
        """Majority baseline: every pixel has the class of most pixels of the training rows."""
        classes = len(self.labels)
        parts = [
            sum(
                (
                    np.bincount(mask.values.reshape(-1), minlength=UNLABELLED + 1)[:classes]
                    for mask in self._masks(table)
                    if isinstance(mask, Mask)
                ),
                start=np.zeros(classes, np.int64),
            )
            for table in (train, held_out)
        ]
        if not parts[1].sum():
            return {}
        matrix = np.zeros((classes, classes), np.int64)
        matrix[:, parts[0].argmax()] = parts[1]
        return self._figures(matrix)

    # ------------------------------------------------------------------ batches and loss

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Change training images at random together with their masks; in evaluation masks keep their own sizes.

        ``labels`` are (B, H, W). In evaluation they are padded to the largest mask and stay uint8, ``UNLABELLED`` where
        there is no class; ``sizes`` (B, 2) are those of the images.
        """
        batch, views = self.seen(examples, rngs, evaluation=evaluation)
        masks: Any = [example["mask"].values for example in examples if "mask" in example]  # type: ignore[attr-defined]
        if not masks:
            return batch
        if evaluation:
            sizes = batch["sizes"].amax(0).tolist()
            whole = np.full((len(masks), *sizes), UNLABELLED, np.uint8)
            for labels, mask in zip(whole, masks, strict=True):
                labels[: mask.shape[0], : mask.shape[1]] = mask
            return batch | {"labels": torch.from_numpy(whole)}
        seen = [view.mask(mask) for view, mask in zip(views, masks, strict=True)]
        batch["labels"] = _as_targets(torch.from_numpy(np.stack(seen)))
        return batch | self.weights_of(batch["labels"])

    def count(self, batch: Batch) -> Tensor:
        """Number of pixels with a class, or the sum of their weights.

        In training an image without any counts as one: a crop may hold none, and a step of such crops is no error.
        """
        if "sizes" in batch:
            return (batch["labels"] != UNLABELLED).sum()
        return super().count(batch) + (batch["labels"] == IGNORE).flatten(1).all(1).sum()

    def forward(self, batch: Batch) -> Loss:
        labels, scores = batch["labels"], self.map_scores(batch)
        if "sizes" not in batch:
            total = self.cross_entropy(self._to_pixels(scores, batch), labels, batch.get("weights"))
            return Loss(total, self.count(batch))
        classes = len(self.labels)
        total = torch.zeros((), device=labels.device)
        matrix = torch.zeros(classes**2, dtype=torch.int64, device=labels.device)
        for bands, of_image in zip(self._at_sizes(scores, batch), labels, strict=True):
            for rows, band in bands:
                truth = _as_targets(of_image[rows, : band.shape[2]])
                total = total + self.cross_entropy(band[None], truth[None], None)
                known = truth != IGNORE
                pairs = truth[known] * classes + band.argmax(0)[known]
                matrix += torch.bincount(pairs, minlength=classes**2)
        return Loss(total, self.count(batch), {"confusion": matrix.view(classes, classes)})

    def _to_pixels(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return scores (B, C, h, w) at every pixel that the model reads, (B, C, H, W)."""
        head: Any = self.model.head
        found: Tensor = head.to_pixels(scores, *batch["pixel_values"].shape[2:])
        return found

    def _at_sizes(self, scores: Tensor, batch: Batch) -> Iterator[Iterator[tuple[slice, Tensor]]]:
        """Yield for each image the ``row_bands`` of scores (B, C, h, w) at every pixel of its own size."""
        for of_image, (height, width) in zip(scores, batch["sizes"].tolist(), strict=True):
            yield row_bands(self._to_pixels(of_image[None], batch)[0], height, width)

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """Mean intersection over union, accuracy of pixels, and the intersection over union of every class."""
        figures = {"loss": total / count if count else math.nan}
        return figures | self._figures(np.asarray(metrics["confusion"]))

    def _figures(self, matrix: np.ndarray) -> dict[str, float]:
        figures = {"miou": figures_of.mean_iou(matrix), "accuracy": figures_of.accuracy(matrix)}
        return figures | class_figures("iou", self.labels, figures_of.iou(matrix))

    def expected_first_loss(self) -> float | None:
        """The log of the number of classes: an untrained head predicts a uniform distribution."""
        return math.log(len(self.labels))

    def head_weights(self) -> int:
        head: Any = self.model.head
        weights: float = head.weights_per_pixel()
        return round(weights)

    # ------------------------------------------------------------------ answers

    def outputs(self, batch: Batch) -> list[Any]:
        """The number of every pixel's class, and the highest score, which is NaN if any is."""
        scores = self.map_scores(batch)
        masks = [
            torch.cat([band.argmax(0).to(torch.uint8) for _, band in bands]).cpu().numpy()
            for bands in self._at_sizes(scores, batch)
        ]
        return list(zip(masks, scores.flatten(1).amax(1).tolist(), strict=True))

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """Return ``mask``, (H, W), in the numbers of the masks that the model learned from; and ``share``.

        ``share`` is that of the pixels of each class. The number of a class is the smallest one that has its code; that
        of a class which no training mask could hold, the smallest free one. Where a PNG file cannot hold a number
        (below 0, above 65535), they are the class numbers 0, 1, ... in the order of the labels.
        """
        mask, _ = outputs[0]
        counts = np.bincount(mask.reshape(-1), minlength=len(self.labels)) / mask.size
        share = dict.fromkeys(self.labels, 0.0)
        for label, part in zip(self.labels, counts.tolist(), strict=True):
            share[label] += part  # several classes of a published model may have one name
        return {"mask": self.numbers[mask], "share": share}

    def choices(self, answer: Mapping[str, Any]) -> list[Any]:
        return [label for label, share in answer.get("share", {}).items() if share]

    @classmethod
    def baseline_columns(cls, *tables: Table) -> list[Any]:
        """Features and classes of pixels that are drawn from all images."""
        return [column for pair in pixel_features(*tables) for column in pair]

    @property
    def colours(self) -> dict[str, str]:
        """The first class has no colour."""
        return {label: colour(k) for k, label in enumerate(self.labels[1:])}

    def pictures(self, table: Table, count: int) -> list[dict[str, Any]]:
        """Masks and predicted masks over their images; the score is the mean intersection over union of the image."""
        masks, order = self._masks(table), np.argsort(self.numbers).astype(np.uint8)

        def judge(i: int, answer: dict[str, Any]) -> Any:
            if not isinstance(masks[i], Mask):
                return None
            truth = masks[i].values
            predicted = order[np.searchsorted(self.numbers, answer["mask"], sorter=order)]
            known = truth != UNLABELLED
            matrix = figures_of.confusion_matrix(truth[known], predicted[known], len(self.labels))
            return figures_of.mean_iou(matrix), truth, predicted

        return self.compared_pictures(table, count, judge, with_mask)


def row_bands(scores: Tensor, height: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Interpolate scores (C, h, w) to H x W pixels, as ``F.interpolate`` does (bilinear, corners not aligned), by rows.

    Yields:
        The rows of a band, at most ``_BAND`` scores unless one row has more, and their scores (C, rows, W).
    """
    step = max(1, _BAND // (len(scores) * max(width, scores.shape[2])))
    # Where the centre of a pixel lies between two rows of the scores. torch rounds the ratio to fp32, and the place
    # only once; by another order of rounding, the scores would differ in their fifth digit.
    ratio, last = float(np.float32(scores.shape[1] / height)), scores.shape[1] - 1
    places = ((torch.arange(height).double() + 0.5) * ratio - 0.5).clamp(0, last).to(scores.dtype)
    upper = places.long()
    share = (places - upper)[:, None].to(scores.device)
    upper = upper.to(scores.device)
    lower = (upper + 1).clamp(max=last)
    for first in range(0, height, step):
        rows = slice(first, min(first + step, height))
        band = scores[:, upper[rows]] * (1 - share[rows]) + scores[:, lower[rows]] * share[rows]
        size = (band.shape[1], width)
        yield rows, F.interpolate(band[None], size, mode="bilinear", align_corners=False)[0]


def _as_targets(masks: Tensor) -> Tensor:
    """Return classes as int64, with ``IGNORE`` where there is none."""
    labels = masks.to(torch.int64)
    return labels.masked_fill_(labels == UNLABELLED, IGNORE)


def _mask_numbers(codes: Mapping[str, int], count: int) -> np.ndarray:
    """Return the number of each class in the masks of answers, (classes,) of 8 or 16 bits; see ``decode``."""
    found = [(int(text), k) for text, k in codes.items() if text.lstrip("-").isdecimal()]
    of_class = {k: n for n, k in sorted(found, reverse=True)}
    taken = {UNLABELLED, *(n for n, _ in found)}
    free = (n for n in itertools.count() if n not in taken)
    numbers = [of_class[k] if k in of_class else next(free) for k in range(count)]
    if not 0 <= min(numbers) <= max(numbers) < 1 << 16:
        numbers = list(range(count))
    return np.asarray(numbers, np.uint8 if max(numbers) <= UNLABELLED else np.uint16)


def _numbers(found: Any) -> list[int]:
    """Return the different numbers of a mask; none of one that cannot be read."""
    if found is None or isinstance(found, BrokenImage):
        return []
    values = found.values if isinstance(found, Mask) else found
    return [int(n) for n in np.unique(values)]


def _classes(
    table: Table, labels: Sequence[str], codes: Mapping[str, int], chosen: bool
) -> list[Any]:
    """Return the masks of a table as ``Mask``; None, or a ``BrokenImage``, where there is none.

    Where the table names the classes of its numbers, their names count, and else the codes; see ``LabelMap`` for
    ``chosen``.

    Raises:
        DataError: a mask has a number that is not among the codes, or whose name is no label; names the row.
    """
    masks = list[Any]()
    known = dict[int, int | None]()  # the classes of the numbers that occurred so far
    own_names = {label: k for k, label in enumerate(labels) if number_in(label) is None}
    names, binary = table.label_names.get("mask"), str(UNLABELLED) in codes
    second = {"1": codes[str(UNLABELLED)]} if binary else {}
    known_as = LabelMap(tuple(labels), {**own_names, **codes, **second}, chosen)
    for i, found in read_numbers(table):
        if isinstance(found, Mask | BrokenImage | None):
            masks.append(found)
            continue
        numbers = _numbers(found)
        new = [n for n in numbers if n not in known]
        known |= {n: codes.get(str(n), UNLABELLED if n == UNLABELLED else None) for n in new}
        own = [] if names is None else [n for n in new if binary or n != UNLABELLED]
        if own:
            cells = [1 if n == UNLABELLED else n for n in own]
            where = ([table.where(i)] * len(own)).__getitem__
            ids = known_as.ids(cells, names=names, where=where, column="class of the mask")
            known |= dict(zip(own, ids, strict=True))
        if wrong := [n for n in new if known[n] is None]:
            without = ", and 255 for pixels without a class" * (str(UNLABELLED) not in codes)
            raise DataError(
                f"{table.where(i)}: the mask has pixels of the number {wrong[0]}, which stands for no class; the "
                f"numbers are {', '.join(list(codes)[:20])}{without}."
            )
        classes = np.asarray([known[n] for n in numbers], np.uint8)
        masks.append(Mask(classes[np.searchsorted(numbers, found)]))
    return masks
