"""Classical baseline of object detection: regions of likely pixels, and a linear model that tells what they are.

Two linear models, no learned features. The first tells for every pixel, by its colour and those of its surroundings,
whether it lies in a box of each class. Connected pixels above one of a few thresholds are a region, and so are their
cores, by which things that touch are told apart; its bounding box is a candidate. The second model tells by size, form,
colours and likelihoods of a region which class its box is of, or none.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain import metrics
from pretrain.data.images.decode import BrokenImage
from pretrain.data.images.masks import surroundings
from pretrain.data.images.rows import pictures
from pretrain.utils.imports import sklearn_module

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pretrain.data.tables import Table

__all__ = ["region_boxes"]

_SIDE = 160  # longer side to which images are scaled
_PIXELS = 400  # drawn from every training image
# Thresholds of the likelihood, and how far the core of a region is from its border.
_LEVELS = ((0.2, 0), (0.35, 0), (0.5, 0), (0.7, 0), (0.5, 3), (0.5, 6), (0.7, 3), (0.7, 6))
_LEAST = 6  # pixels of a region
_MOST = 1000  # likeliest regions of an image that are compared with each other
_MATCH = 0.5  # overlap from which the box of a region is one of the object


def region_boxes(
    train: Table, held: Table, labels: Sequence[str], *, images: int = 300
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return the true and the predicted boxes of every held-out image that can be read.

    Args:
        train: rows with ``image``, ``boxes`` (left, top, right, bottom) and ``label`` (names).
        held: held-out rows.
        labels: the classes.
        images: most training images times classes, but 10 images at least; they lie at even distances.

    Returns:
        For each image its boxes (N, 5), with their classes, and those found (M, 6), with score and class, best first;
        none if the training images have no regions of at least two kinds.
    """
    most = max(10, images // max(1, len(labels)))
    part = train.take(range(0, len(train), max(1, -(-len(train) // most))))
    own, rng, pixels, classes = _scenes(part, labels), np.random.default_rng(0), [], []
    for features, truth, shape, scale in own:
        drawn = rng.permutation(len(features))[:_PIXELS]
        pixels.append(features[drawn])
        classes.append(_inside(truth, shape, scale).reshape(-1)[drawn])
    of_pixels = _linear(pixels, classes)
    if of_pixels is None:
        return []
    vectors, kinds = [], []
    for scene in own:
        boxes, described = _regions(of_pixels, scene)
        overlap = metrics.box_iou(boxes, scene[1][:, :4])
        best = overlap.argmax(1) if overlap.size else np.zeros(len(boxes), int)
        right = overlap.max(1, initial=0.0) >= _MATCH
        vectors.append(described)
        kinds.append(np.where(right, scene[1][best, 4] + 1, 0) if len(scene[1]) else 0 * best)
    of_regions = _linear(vectors, kinds)
    if of_regions is None:
        return []
    known, found = of_regions.classes_.astype(int), []
    for scene in _scenes(held, labels):
        boxes, described = _regions(of_pixels, scene)
        chances = of_regions.predict_proba(described) if len(boxes) else np.zeros((0, len(known)))
        rows = [
            np.column_stack([boxes, chances[:, i], np.full(len(boxes), k - 1)])
            for i, k in enumerate(known)
            if k
        ]
        every = np.concatenate(rows)
        best = every[np.argsort(-every[:, 4], kind="stable")[:_MOST]]
        found.append((scene[1], metrics.without_overlap(best)))
    return found


def _scenes(table: Table, labels: Sequence[str]) -> list[Any]:
    """Return for each image the colours of its pixels, its boxes with their classes, its shape, and the scale."""
    found = []
    for picture, boxes, names in zip(
        pictures(table), table.columns["boxes"], table.columns["label"], strict=True
    ):
        try:
            image = picture.read()[0]
        except (BrokenImage, AttributeError):  # or there is none in the row
            continue
        scale = min(1.0, _SIDE / max(image.size))
        small = image.resize([max(1, round(side * scale)) for side in image.size], resample=2)
        numbers = [labels.index(name) for name in names]
        truth = np.column_stack([np.asarray(boxes, np.float64).reshape(-1, 4), numbers])
        found.append((surroundings(small), truth, small.size[::-1], scale))
    return found


def _inside(truth: NDArray[np.float64], shape: tuple[int, int], scale: float) -> NDArray[np.int64]:
    """Return which class every pixel is of, counted from 1; 0 outside of boxes, in several that of the smallest."""
    found = np.zeros(shape, np.int64)
    areas = (truth[:, 2:4] - truth[:, :2]).prod(1)
    for box in truth[np.argsort(-areas, kind="stable")]:
        left, top, right, bottom = np.round(box[:4] * scale).astype(int).clip(0)
        found[top:bottom, left:right] = box[4] + 1
    return found


def _linear(features: Sequence[Any], classes: Sequence[Any]) -> Any:
    """Fit logistic regression on scaled features; None if there are not two classes."""
    x, y = np.concatenate(features or [np.zeros((0, 1))]), np.concatenate(classes or [[]])
    if len(set(y.tolist())) < 2:
        return None
    steps = (
        sklearn_module("preprocessing").StandardScaler(),
        sklearn_module("linear_model").LogisticRegression(max_iter=1000),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sklearn_module("exceptions").ConvergenceWarning)
        return sklearn_module("pipeline").make_pipeline(*steps).fit(x, y)


def _regions(of_pixels: Any, scene: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the bounding boxes of the regions of an image in its own pixels, and what describes each region."""
    ndimage = importlib.import_module("scipy.ndimage")
    features, _, shape, scale = scene
    chances = of_pixels.predict_proba(features)
    known = of_pixels.classes_
    maps = [chances[:, i].reshape(shape) for i, k in enumerate(known) if k]
    maps += [1 - chances[:, list(known).index(0)].reshape(shape)] if 0 in known else []
    boxes, described = [], []
    for chance in maps:
        for threshold, depth in _LEVELS:
            whole = chance > threshold
            # Things that touch are told apart by their cores, which are then grown again.
            core = ndimage.distance_transform_edt(whole) > depth if depth else whole
            numbered, count = ndimage.label(core)
            inside = np.bincount(numbered.reshape(-1), minlength=count + 1)
            for k, (rows, columns) in enumerate(ndimage.find_objects(numbered), start=1):
                if inside[k] < _LEAST:
                    continue
                own = np.zeros(shape, bool)
                own[rows, columns] = numbered[rows, columns] == k
                own = own.reshape(-1)
                box = [
                    columns.start - depth,
                    rows.start - depth,
                    columns.stop + depth,
                    rows.stop + depth,
                ]
                box = np.clip(box, 0, [*shape[::-1]] * 2)
                width, height = box[2:] - box[:2]
                form = [
                    width,
                    height,
                    width / height,
                    inside[k] / (width * height),
                    threshold,
                    depth,
                ]
                form += [*np.log([width, height, inside[k]]), np.log(width / height) ** 2]
                colours = features[own]
                means = [*colours.mean(0), *colours.std(0)[:3], *chances[own].mean(0)]
                boxes.append(box / scale)
                described.append([*form, *means])
    width = 10 + 12 + chances.shape[1]
    return np.array(boxes).reshape(-1, 4), np.array(described).reshape(-1, width)
