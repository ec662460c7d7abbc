"""Object detection: boxes with classes, found by their centres (CenterNet, arXiv 1904.07850; TTFNet, 1909.00700).

A map of places has a score of each class, high at the centres of its objects, and the distances to the four sides of
the box around each place. The scores are trained by the focal loss of CenterNet against a bump around each centre, the
distances by the overlap of the boxes (generalised intersection over union, arXiv 1902.09630) within the bump, as in
TTFNet. There is no matching of predictions to objects in training. An answer is the boxes at the local maxima, without
those that overlap a better one of their class.

Letters: B images, C classes, N boxes, h x w places of the map, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain import metrics as figures_of
from pretrain.config.spelling import option, trains
from pretrain.data.images.augment import Augmentation, View
from pretrain.data.images.boxes import (
    BOXES,
    SIZE,
    BoxTable,
    Corners,
    DatasetsBox,
    Extent,
    gathered_boxes,
    read_boxes,
    stated_size,
)
from pretrain.data.images.decode import FileItem, Picture
from pretrain.data.images.draw import colour, with_boxes
from pretrain.data.images.rows import pictures
from pretrain.data.images.source import IMAGE
from pretrain.data.labelled import Role, label_strata, make_tag_map
from pretrain.data.labels import LabelMap, exact_number, flattened, unprinted
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, DataError
from pretrain.objectives.base import Batch, ExampleList, Loss, Rngs
from pretrain.objectives.image_task import ImageTask, class_figures
from pretrain.objectives.regions import region_boxes
from pretrain.objectives.tasks import Learned, class_codes
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.data.images.decode import Stored
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["ObjectDetection"]

LABEL = Role(
    "label",
    ("label", "labels", "class", "classes", "category", "categories", "name"),
    help="the class of each box",
    target=True,
)
_FORMATS = ("xyxy", "xywh")  # of boxes in a column; the first is the default
_THRESHOLDS = tuple(0.5 + 0.05 * k for k in range(10))
_BUMP = 0.54  # size of the bump in units of the box (TTFNet)
_SIDES_WEIGHT = 5.0  # of the overlap beside the focal loss (TTFNet)
_MOST = 100  # boxes of an image
_SURE = 0.3  # score of a box that is an answer, unless told otherwise
_LEAST = 0.01  # score of a box that is evaluated
_VISIBLE = 0.3  # share of a box that a crop must keep
# Held-out images times classes that the classical baseline reads; 60 take a second.
_MOST_SCENES = 600


class ObjectDetection(ImageTask):
    """Predict boxes with classes.

    Args:
        model: a model with an object-detection head and ``labels``.
        crop: smallest share of the area that a random crop of a training image keeps; 1 for no crops.
        flip: mirror half of the training images; not where left and right have a meaning.
        jitter: how far the brightness, contrast and colour of a training image change, as a share; 0 for not at all.
        codes: class number of every spelling of a label; by default the labels themselves.
        box_format: ``xyxy`` (left, top, right, bottom) or ``xywh`` (left, top, width, height) of boxes in a column. Not
            given, it is ``xyxy``, and ``xywh`` for the column ``objects`` of the datasets library; those of COCO and
            Pascal VOC are read as they are defined.
        max_length: of texts only; None.

    Row options: ``labels``, the class names in order.
    """

    name: ClassVar[str] = "object-detection"
    roles: ClassVar[tuple[Role, ...]] = (IMAGE, BOXES, LABEL, SIZE)
    drawn: ClassVar[str] = f"Predicted boxes are those with a score of at least {_SURE}."
    metric: str = "ap50"
    baseline: ClassVar[str | None] = "regions of pixels"
    trivial_name: ClassVar[str] = "boxes of one training image"
    recorded: ClassVar[tuple[str, ...]] = ("codes",)
    head_kind: ClassVar[str | None] = "object-detection"
    figures: ClassVar[tuple[str, ...] | None] = None  # each class has one
    closed: ClassVar[str] = "It finds no objects of other classes, or takes them for one of these."

    def __init__(
        self,
        model: Model,
        *,
        crop: float = 0.5,
        flip: bool = False,
        jitter: float = 0.0,
        codes: Mapping[str, int] | None = None,
        box_format: str | None = None,
        max_length: int | None = None,
    ) -> None:
        self.refuse_length(max_length)
        super().__init__(model, pack=False)
        self.labels: tuple[str, ...] = tuple(model.labels or ())
        self.augmentation = Augmentation(crop, flip, jitter=jitter)
        self.box_format = box_format
        own = {label: k for k, label in enumerate(self.labels)}
        self.codes = class_codes(codes, self.labels) if codes else own
        self._map = LabelMap(self.labels, {**own, **self.codes})
        self.check_whole()

    # ------------------------------------------------------------------ rows

    @classmethod
    def read(cls, source: Any, *, name: str = "data", **options: Any) -> Table:
        return read_boxes(source, name=name, **options)

    @classmethod
    def gathered(cls, table: Table, columns: Mapping[str, Any]) -> Table:
        return gathered_boxes(table, columns, {role.name: role.known for role in cls.roles})

    def written(self, table: Table) -> Table:
        """Give boxes whose source defines their numbers in the box format of the run, in which they are read again."""
        if self.box_format is None or "boxes" not in table.names:
            return table
        form = self.box_format
        boxes = [
            [_as_extent(box) if form == "xywh" else _as_given(box, form) for box in row or ()]
            for row in table.columns["boxes"]
        ]
        return table.with_columns({**table.columns, "boxes": boxes}, table.label_names)

    @classmethod
    def learn(cls, table: Table, options: Mapping[str, Any]) -> Learned:
        rows = _lists(table, "label")
        given, checkpoint = options.get("labels"), options.get("checkpoint_labels")
        names = table.label_names.get("label")
        different = list(dict.fromkeys(str(label).strip() for row in rows for label in row))
        if not different:
            raise DataError(f"{table.name}: none of the {len(table):,} rows has a box.")
        unused: list[str] = []
        if isinstance(table, BoxTable) and not (given or checkpoint):
            # Classes without a box are learned too, but not by a run that an earlier version began without them.
            begun = options.get("begun_labels")
            classes = dict.fromkeys(map(str.strip, table.categories))
            unused = [c for c in classes if c not in different and (begun is None or c in begun)]
            different += unused
        one = given or different
        if len(one) == 1 and not isinstance(one, str) and not checkpoint and not names:
            # One class is enough here, because a place may also be no object. A list names the class or its number;
            # ``tidy`` refuses rows of any other.
            ((key, name),) = one.items() if isinstance(one, Mapping) else [(one[0], one[0])]
            if not isinstance(one, Mapping) and len(different) == 1 and different[0].isdigit():
                key = different[0]
            known = LabelMap((str(name).strip(),), {str(key).strip(): 0})
        elif unused:
            numbers = {name: exact_number(name) for name in different}
            by_size = None not in numbers.values()
            labels = tuple(sorted(different, key=lambda c: (numbers[c] if by_size else 0, c)))
            known = LabelMap(labels, {label: k for k, label in enumerate(labels)})
        else:
            known, _ = make_tag_map(
                rows, given, names=names, checkpoint=checkpoint, where=table.where, column="label"
            )
        strata = label_strata([[str(label) for label in row] for row in rows])
        boxes = sum(map(len, rows))
        notes = [f"{boxes:,} boxes in {len(table):,} images"]
        if empty := sum(not row for row in rows):
            notes.append(f"{empty:,} of {len(table):,} images have no box")
        return Learned(known.labels, strata, {"codes": dict(known.codes)}, notes)

    @classmethod
    def tidy(cls, table: Table, learned: Learned, options: Mapping[str, Any]) -> Table:
        """Replace every image by a ``Picture``, boxes by four numbers each, and labels by names."""
        columns, form = {**table.columns, "image": pictures(table)}, options.get("box_format")
        # A run that only starts from a checkpoint of the task has no begun_labels.
        begun = options["begun_objective"] if "begun_labels" in options else {}
        if begun.get("name") and _is_earlier(form, begun):
            form = None
        if isinstance(table, BoxTable) and form == "xyxy":
            note(
                f"{table.name}: {option('box_format', 'xyxy')} is not used, because COCO defines its boxes as left, "
                "top, width and height"
            )
        if {"boxes", "label"} <= set(table.names):
            labels = learned.labels or ()
            own = {label: k for k, label in enumerate(labels)}
            chosen = bool(options.get("labels"))
            known = LabelMap(labels, {**own, **learned.options["codes"]}, chosen)
            found, numbers = _boxes_of(table, known, form)
            columns["boxes"] = [[Corners(box) for box in row] for row in found]
            columns["label"] = [[labels[k] for k in row] for row in numbers]
        return table.with_columns(columns, {})

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        if not targets:
            return self.encode_inputs(table, targets=False)[0]
        boxes, numbers = _boxes_of(table, self.label_map, self.box_format)

        def target(rows: TaskRows, i: int, image: Stored) -> Any:
            width, height = image.size
            stated = stated_size(table.columns[SIZE.name][i]) if SIZE.name in table.names else None
            if stated not in (None, (width, height)):
                raise DataError(
                    f"{table.where(i)}: the boxes are for an image of {stated[0]} x {stated[1]} pixels (width x "
                    f"height), and the image has {width} x {height}. Either the image was scaled or turned alone (also "
                    "by the orientation that a camera stored), or the annotation states a wrong size: correct it, and "
                    "the boxes."
                )
            found = np.asarray(boxes[i], np.float64).reshape(-1, 4)
            if len(found) and (
                found[:, :2].min() < -1 or (found[:, 2:] > np.asarray(image.size) + 1).any()
            ):
                rows.remark(i, "boxes reach beyond the image, and are cut at its border")
            inside = found.clip(0, [width, height, width, height])
            kept = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
            if not kept.all():
                rows.remark(i, "boxes without an area in the image, which are left out")
            return {
                "boxes": inside[kept].astype(np.float32),
                "labels": np.asarray(numbers[i], np.int64)[kept],
            }

        return self.encode_inputs(table, targets=True, target=target)[0]

    def describe(self) -> dict[str, Any]:
        given = {} if self.box_format is None else {"box_format": self.box_format}
        return super().describe() | given

    def continue_from(self, record: Mapping[str, Any]) -> None:
        super().continue_from(record)
        if _is_earlier(self.box_format, record):
            self.box_format = None

    def same_argument(self, key: str, then: Any, now: Any, labels: Sequence[str]) -> bool:
        """Compare ``box_format``, which earlier versions left out where it was ``xyxy``; rows are compared anyway."""
        if key == "box_format":
            return bool((then or _FORMATS[0]) == (now or _FORMATS[0]))
        return super().same_argument(key, then, now, labels)

    def trivial(self, train: Table, held_out: Table) -> dict[str, float]:
        """The boxes of the training image with the median number of them, for every image."""
        parts = [
            [
                np.column_stack([np.asarray(b, np.float64).reshape(-1, 4), np.asarray(k)])
                for b, k in zip(*_boxes_of(table, self.label_map, self.box_format), strict=True)
            ]
            for table in (train, held_out)
        ]
        if not parts[0] or not parts[1]:
            return {}
        usual = sorted(parts[0], key=len)[len(parts[0]) // 2]
        said = np.insert(usual, 4, 0.5, axis=1)
        return self._figures([(truth, said) for truth in parts[1]])

    # ------------------------------------------------------------------ batches and loss

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Change training images at random together with their boxes, and draw the targets of the map.

        ``bumps`` (B, C, h, w) are the targets of the scores, ``sides`` (B, 4, h, w) the box of each place in pixels
        that the model reads, ``weights`` (B, h, w) its weight, which sums to 1 over the places of an object, and
        ``counts`` (B,) the number of boxes. In evaluation also ``sizes`` (B, 2) and the boxes with their classes,
        ``truth`` (B, N, 5),
        whose rows beyond those of an image have the class -1.
        """
        batch, views = self.seen(examples, rngs, evaluation=evaluation)
        if "boxes" not in examples[0]:
            return batch
        targets = [
            self._targets(example["boxes"], example["labels"], view)
            for example, view in zip(examples, views, strict=True)
        ]
        for name, values in zip(
            ("bumps", "sides", "weights"), zip(*targets, strict=True), strict=False
        ):
            batch[name] = torch.from_numpy(np.stack(values))
        counts = [max(1, len(example["labels"])) for example in examples]
        batch["counts"] = torch.tensor(counts)
        if evaluation:
            most = max(counts)
            truth = np.full((len(examples), most, 5), -1.0, np.float32)
            for rows, example in zip(truth, examples, strict=True):
                rows[: len(example["labels"]), :4] = example["boxes"]
                rows[: len(example["labels"]), 4] = example["labels"]
            batch["truth"] = torch.from_numpy(truth)
        return batch

    def _targets(
        self, boxes: np.ndarray, labels: np.ndarray, view: View
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return bumps, sides and weights of one image; large objects are drawn first."""
        head: Any = self.model.head
        rows, columns = head.places(*view.size)
        bumps = np.zeros((len(self.labels), rows, columns), np.float32)
        sides = np.zeros((4, rows, columns), np.float32)
        weights = np.zeros((rows, columns), np.float32)
        owners = np.zeros((rows, columns), np.int64)  # the object of each place
        height, width = view.size
        whole = view.boxes(boxes)
        seen = whole.clip(0, [width, height, width, height])
        areas = [np.clip(b[:, 2:] - b[:, :2], 0, None).prod(1) for b in (whole, seen)]
        for i in np.argsort(-areas[1], kind="stable"):
            if areas[1][i] < _VISIBLE * areas[0][i] or not areas[1][i]:
                continue
            box, k = seen[i] / head.cell, labels[i]
            middle = (box[:2] + box[2:]) / 2
            place = np.minimum(middle.astype(int), [columns - 1, rows - 1])
            # The bump ends at radius cells from the centre, which is three standard deviations.
            radius = np.maximum(0, (box[2:] - box[:2]) / 2 * _BUMP).astype(int)
            low = np.maximum(0, place - radius)
            high = np.minimum([columns, rows], place + radius + 1)
            x, y = (np.arange(low[d], high[d]) - place[d] for d in (0, 1))
            across, down = ((2 * r + 1) / 6 for r in radius)
            bump = np.exp(-((x / across) ** 2)[None] / 2 - ((y / down) ** 2)[:, None] / 2)
            part = np.s_[low[1] : high[1], low[0] : high[0]]
            bumps[k][part] = np.maximum(bumps[k][part], bump)
            sides[(slice(None), *part)] = seen[i][:, None, None]
            weights[part], owners[part] = bump, i
        # A place belongs to the last object that was drawn there, so the sums are known at the end.
        sums = np.bincount(owners.ravel(), weights.ravel())
        return bumps, sides, weights / np.where(sums > 0, sums, 1).astype(np.float32)[owners]

    def count(self, batch: Batch) -> Tensor:
        """Number of boxes; an image without any counts as one, because its places are trained too."""
        return batch["counts"].sum()

    def forward(self, batch: Batch) -> Loss:
        scores = self.map_scores(batch)  # logits of the classes, distances to the four sides
        logits, sides = scores[:, : len(self.labels)], scores[:, len(self.labels) :]
        total = _focal(logits, batch["bumps"])
        overlap = _generalised_iou(self._corners(sides), batch["sides"])
        total = total + _SIDES_WEIGHT * ((1 - overlap) * batch["weights"]).sum()
        if "truth" not in batch:
            return Loss(total, self.count(batch))
        truth = batch["truth"].cpu().numpy()
        found = self._found(scores, batch)
        images = [(t[t[:, 4] >= 0], f) for t, f in zip(truth, found, strict=True)]
        return Loss(total, self.count(batch), {"images": images})

    def _corners(self, sides: Tensor) -> Tensor:
        """Return the boxes of all places, left, top, right, bottom in pixels, of their distances; (B, 4, h, w)."""
        head: Any = self.model.head
        rows, columns = (
            (torch.arange(n, device=sides.device) + 0.5) * head.cell for n in sides.shape[2:]
        )
        middle = torch.stack(
            (columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns)))
        )
        return torch.cat((middle - sides[:, :2], middle + sides[:, 2:]), 1)

    def _found(self, scores: Tensor, batch: Batch) -> list[np.ndarray]:
        """Return the boxes of each image in its own pixels, best first: (N, 6), with score and class."""
        chances = scores[:, : len(self.labels)].sigmoid()
        peaks = chances * (chances == F.max_pool2d(chances, 3, stride=1, padding=1))
        best, places = peaks.flatten(1).topk(min(_MOST, peaks[0].numel()))
        boxes = self._corners(scores[:, len(self.labels) :]).flatten(2)
        cells = boxes.shape[2]
        index = (places % cells)[:, None].expand(-1, 4, -1)
        corners = boxes.gather(2, index).transpose(1, 2)
        read = torch.tensor(batch["pixel_values"].shape[2:], device=corners.device)
        sizes = batch["sizes"]
        corners = corners * (sizes / read).flip(1).repeat(1, 2)[:, None]
        corners = corners.clamp(min=0).minimum(sizes.flip(1).repeat(1, 2)[:, None])
        classes = places // cells
        rows = torch.cat((corners, best[..., None], classes[..., None].to(corners)), -1)
        return [
            # What is not a number is kept, and refused as an answer.
            figures_of.without_overlap(found[~(found[:, 4] < _LEAST)])
            for found in rows.detach().cpu().numpy()
        ]

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """Average precision at an overlap of 0.5, its mean over 0.5 to 0.95, and that at 0.5 of every class."""
        return {"loss": total / count if count else math.nan} | self._figures(metrics["images"])

    def _figures(self, images: Sequence[Any]) -> dict[str, float]:
        found = figures_of.detection_precision(images, len(self.labels), _THRESHOLDS)
        known = np.isfinite(found[0])
        figures = {
            "ap50": float(found[0, known].mean()) if known.any() else math.nan,
            "ap": float(found[:, known].mean()) if known.any() else math.nan,
        }
        return figures | class_figures("ap50", self.labels, found[0])

    def head_weights(self) -> int:
        """Weights for each target: those of all places of an image, of which one object has about a tenth."""
        head: Any = self.model.head
        size = self.processor.size or (0, 0)
        weights: float = head.weights_per_pixel() * size[0] * size[1] / 10
        return round(weights)

    # ------------------------------------------------------------------ answers

    def outputs(self, batch: Batch) -> list[Any]:
        return self._found(self.map_scores(batch), batch)

    def decode(
        self, outputs: Sequence[Any], infos: Sequence[Any], *, threshold: float = _SURE
    ) -> dict[str, Any]:
        """Return ``label``, ``score`` and ``box`` (left, top, right, bottom in pixels) of the objects, best first.

        Args:
            outputs: the boxes of the image.
            infos: see ``Task.decode``.
            threshold: smallest score of an object.

        Raises:
            ConfigError: the threshold is no probability.
        """
        if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise ConfigError(f"{option('threshold', threshold)}: it must be from 0 to 1.")
        found = outputs[0][outputs[0][:, 4] >= threshold]
        return {
            "label": [self.labels[int(k)] for k in found[:, 5]],
            "score": [float(score) for score in found[:, 4]],
            "box": [[round(float(x), 2) for x in box] for box in found[:, :4]],
        }

    def choices(self, answer: Mapping[str, Any]) -> list[Any]:
        """Classes and boxes together: a model of one class has learnt where its objects are."""
        return [[*zip(answer["label"], answer["box"], strict=True)]] if "label" in answer else []

    @classmethod
    def baseline_outputs(cls, train: Table, held: Table, labels: Sequence[str]) -> Any:
        """True boxes and those of regions of likely pixels; None if that would take more than a few seconds."""
        if len(held) * len(labels) > _MOST_SCENES:
            return None
        images = region_boxes(train, held, labels)
        return {"images": images} if images else None

    @property
    def colours(self) -> dict[str, str]:
        return {label: colour(k) for k, label in enumerate(self.labels)}

    def pictures(self, table: Table, count: int) -> list[dict[str, Any]]:
        """Boxes and predicted boxes over their images; the score is the mean overlap of an object with its best box."""
        boxes, numbers = _boxes_of(table, self.label_map, self.box_format)

        def judge(i: int, answer: dict[str, Any]) -> Any:
            said = [self.labels.index(label) for label in answer["label"]]
            overlap = figures_of.box_iou(boxes[i], answer["box"])
            overlap *= np.asarray(numbers[i])[:, None] == np.asarray(said)[None]
            missed = overlap.max(1).tolist() if said else [0.0] * len(boxes[i])
            extra = overlap.max(0).tolist() if boxes[i] else [0.0] * len(said)
            both = [*missed, *extra]
            score = float(np.mean(both)) if both else 1.0
            return score, (boxes[i], numbers[i]), (answer["box"], said)

        def draw(picture: Picture, found: Any) -> str:
            return with_boxes(picture, *found)

        return self.compared_pictures(table, count, judge, draw)


def _lists(table: Table, role: str) -> list[list[Any]]:
    """Return the lists of a column, also printed ones; an empty cell is an image without boxes.

    Raises:
        DataError: a cell is no list; names the row.
    """
    found = []
    for i, value in enumerate(table.columns[role]):
        if isinstance(value, FileItem):  # an array of two dimensions, which was taken for an image
            value = value.source
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, str):
            value = unprinted(value) if value.strip() else None
        if value is not None and not isinstance(value, list | tuple):
            raise DataError(
                f"{table.where(i)}: {role} is {type(value).__name__} {str(value)[:40]!r}, not a list with one entry "
                "for each box. Files with one box in a row need columns called xmin, ymin, xmax and ymax."
            )
        found.append(list(value or ()))
    return found


def _as_extent(box: Any) -> Any:
    """Return left, top, width and height of the numbers of ``Corners``; any other box as it is."""
    if not isinstance(box, Corners) or len(box) != 4:
        return box
    left, top, right, bottom = map(float, box)
    return [left, top, right - left, bottom - top]


def _is_earlier(form: str | None, record: Mapping[str, Any]) -> bool:
    """Whether a run began when ``xyxy`` was not recorded, and meant no more than not to give a format."""
    return form == "xyxy" and "box_format" not in record


def _as_given(box: Any, form: str | None) -> Any:
    """Return the numbers of a box of the datasets library as they stand, if they are corners already."""
    return box.given if form == "xyxy" and isinstance(box, DatasetsBox) else box


def _numbers_of(box: Any) -> str:
    """Return what the numbers of a box are in its source, if it says so."""
    return "left, top, width, height" if isinstance(box, Extent) else "left, top, right, bottom"


def _read_as(box: Any, form: str | None) -> str:
    """Return what the numbers of a box are taken for, and who says so."""
    if isinstance(box, Corners):
        return f"Its source says that these are {_numbers_of(box)}; correct the box."
    if form == "xywh":
        return f"By the box_format {form!r} boxes are left, top, width, height."
    if trains():
        other = option("box_format", "xywh")
        return (
            f"Boxes are left, top, right, bottom; if these are left, top, width, height: {other}."
        )
    if form is not None:
        return f"By the box_format {form!r} boxes are left, top, right, bottom."
    return "The model records no box_format, so left, top, right, bottom is assumed; convert other boxes."


def _boxes_of(
    table: Table, known: LabelMap, form: str | None
) -> tuple[list[list[list[float]]], list[list[int]]]:
    """Return the boxes of every row, as left, top, right, bottom, and their classes.

    Raises:
        ConfigError: ``form`` is none that is known.
        DataError: a box or a label that cannot be used; names the row.
    """
    if form is not None and form not in _FORMATS:
        raise ConfigError(f"box_format is {form!r}; it must be {' or '.join(map(repr, _FORMATS))}.")
    labels, boxes = _lists(table, "label"), list[list[list[float]]]()
    shares: list[bool] = []  # of the rows with a box
    for i, cell in enumerate(_lists(table, "boxes")):
        row = [_as_given(box, form) for box in cell]
        if len(row) != len(labels[i]):
            raise DataError(
                f"{table.where(i)} has {len(row)} boxes and {len(labels[i])} labels; each box needs one."
            )
        try:
            array = np.asarray(row, np.float64).reshape(-1, 4)
        except (TypeError, ValueError):
            array = np.full((1, 4), np.nan)
        if not np.isfinite(array).all() or len(array) != len(row):
            raise DataError(
                f"{table.where(i)}: a box is four numbers, {_numbers_of(row[0])} in pixels; found {str(row)[:80]}."
            )
        if array.any():
            shares.append(_are_shares(array))
        if form == "xywh":
            own = [not isinstance(box, Corners) for box in row]
            array[own, 2:] += array[own, :2]
        if len(wrong := np.flatnonzero((array[:, 2:] < array[:, :2]).any(1))):
            box = row[wrong[0]]
            numbers = [round(n, 3) for n in _as_extent(box)] if isinstance(box, Extent) else box
            raise DataError(
                f"{table.where(i)}: the box {numbers} ends before it begins. {_read_as(box, form)}"
            )
        boxes.append(array.tolist())
    if shares and all(shares):
        raise DataError(
            f"{table.name}: all coordinates of the boxes lie between 0 and 1, so they look like shares of the image, "
            "and boxes are in pixels. Multiply left and right by the width of the image, top and bottom by its height."
        )
    flat, inside = flattened(labels, table.where)
    ids = iter(known.ids(flat, names=table.label_names.get("label"), where=inside))
    return boxes, [[next(ids) for _ in row] for row in labels]


def _are_shares(boxes: np.ndarray) -> bool:
    """Whether the numbers of a row, in whatever form, look like shares of the image: a box of it ends within 2 pixels.

    Shares may exceed 1 a little, and up to 2 where corners were taken for left, top, width and height.
    """
    fractions = bool((boxes != np.round(boxes)).any())
    low, high = (-1, 2) if fractions else (0, 1)
    return bool(boxes.min() >= low and boxes.max() <= high)


def _focal(logits: Tensor, bumps: Tensor) -> Tensor:
    """Return the summed focal loss against bumps, whose centres are 1 (arXiv 1904.07850, equation 1)."""
    chance, centre = logits.sigmoid(), bumps == 1
    hit = (1 - chance) ** 2 * F.logsigmoid(logits)
    rest = (1 - bumps) ** 4 * chance**2 * F.logsigmoid(-logits)
    return -torch.where(centre, hit, rest).sum()


def _generalised_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalised intersection over union, (B, 4, h, w), (B, 4, h, w) -> (B, h, w) (arXiv 1902.09630)."""

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(1)

    one, two = (boxes[:, :2], boxes[:, 2:]), (others[:, :2], others[:, 2:])
    shared = area(torch.maximum(one[0], two[0]), torch.minimum(one[1], two[1]))
    union = area(*one) + area(*two) - shared
    around = area(torch.minimum(one[0], two[0]), torch.maximum(one[1], two[1]))
    return shared / union.clamp(min=1e-6) - (around - union) / around.clamp(min=1e-6)
