"""Retrieval of texts by images and of images by texts, and zero-shot classification by prompts (arXiv 2103.00020)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.config.spelling import option
from pretrain.data.images.augment import Augmentation
from pretrain.data.images.captions import (
    CAPTION,
    caption_fields,
    captions_by_row,
    one_row_for_each_image,
)
from pretrain.data.images.rows import decoded
from pretrain.data.images.source import IMAGE
from pretrain.data.labelled import Role, text_id
from pretrain.data.tables import Table
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError
from pretrain.objectives.base import Batch, checked_smoothing
from pretrain.objectives.classification import best_classes
from pretrain.objectives.contrastive import Contrastive, SigmoidContrastive, padded_texts
from pretrain.objectives.image_task import ImageTask
from pretrain.objectives.row_pixels import check_processor
from pretrain.objectives.tasks import Learned, Task
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["ImageTextRetrieval"]

_PROMPT = "This is a photo of {}."  # that of the pipeline of transformers


class ImageTextRetrieval(ImageTask, Contrastive):
    """Train on images with their texts, and choose among texts for images.

    The loss is that of the model: InfoNCE for clip, the sigmoid loss of pairs for siglip.

    Args:
        model: a model with two towers, a tokenizer and an image processor.
        crop: smallest share of the area that a random crop of a training image keeps; 1 for no crops.
        flip: mirror half of the training images; not if texts tell left from right.
        randaugment: strength, 1 to 30, of two random operations on every training image; 0 for none.
        jitter: how far the brightness, contrast and colour of a training image change, as a share; 0 for not at all.
        label_smoothing: see ``Contrastive``; for clip only.
        max_length: see ``Task``.

    Raises:
        ModelError: the model has no towers, no tokenizer or no image processor that fits.
    """

    name: ClassVar[str] = "image-text-retrieval"
    roles: ClassVar[tuple[Role, ...]] = (IMAGE, replace(CAPTION, target=True))
    metric: str = "image_to_text"
    trivial_name: ClassVar[str] = "chance"
    figures: ClassVar[tuple[str, ...] | None] = Contrastive.figures

    def __init__(
        self,
        model: Model,
        *,
        crop: float = 0.9,
        flip: bool = False,
        randaugment: int = 0,
        jitter: float = 0.0,
        label_smoothing: float = 0.0,
        max_length: int | None = None,
    ) -> None:
        super().__init__(model, max_length=max_length, pack=False)
        self.augmentation = Augmentation(crop, flip, randaugment, jitter)
        self.label_smoothing = checked_smoothing(label_smoothing)
        # A model whose scores have a bias is trained on single decisions.
        self.loss: Any = (
            SigmoidContrastive if hasattr(model.backbone, "logit_bias") else Contrastive
        )
        if label_smoothing and self.loss is SigmoidContrastive:
            raise ConfigError(
                "label_smoothing is for models of the family clip. A siglip model decides for each pair alone; leave "
                "it out."
            )

    def check_processor(self) -> None:
        """Check that the model has a tokenizer and an image processor that fits."""
        Task.check_processor(self)
        check_processor(self.model, f"The task {self.name}")

    @property
    def limits(self) -> list[str]:
        side = self.processor.size or (0, 0)
        return [
            f"An image is scaled to {side[0]} x {side[1]} pixels, and a text is cut after {self.max_length} tokens."
        ]

    # ------------------------------------------------------------------ rows

    @classmethod
    def tidy(cls, table: Table, learned: Learned, options: Mapping[str, Any]) -> Table:
        return one_row_for_each_image(table)

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        """Decode every image once, so that a broken one is counted and named before the first step."""
        rows = TaskRows(size=self._patches())
        owners, fields = list(range(len(table))), list[dict[str, Any]]()
        if targets:
            several = captions_by_row(table)
            owners, table = list(several), table.take(list(several))
            fields, cut = caption_fields(list(several.values()), self.tokenizer, self.max_length)
            rows.cut = [owners[k] for k in cut]
        for k, image, text in decoded(table, required=targets):
            if image is None:
                rows.drop(owners[k], text or "no image")
                continue
            if text is not None:
                rows.remark(owners[k], text)
            example: Any = {"image": image, **(fields[k] if targets else {})}
            rows.add(owners[k], example)
        return rows

    def sizes(self, rows: TaskRows) -> str:
        images, size = self.processor, self.processor.size or (0, 0)
        return (
            f"images are read as {images.channels} x {size[0]} x {size[1]} values, {rows.size} patches each, texts as "
            f"at most {self.max_length} tokens"
        )

    # ------------------------------------------------------------------ loss

    def compare(
        self, images: Tensor, texts: Tensor, every_image: Tensor, every_text: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.loss.compare(
            self, images, texts, every_image, every_text, first
        )
        return found

    def after_step(self) -> None:
        self.loss.after_step(self)

    def trivial(self, train: Table, held_out: Table) -> dict[str, float]:
        """Return the shares that guessing finds."""
        held = [[*map(text_id, texts)] for texts in captions_by_row(held_out).values()]
        having = Counter(text for texts in held for text in set(texts))  # images with each text
        right = {  # for each image (text) the number of texts (images) that are its own, and of all
            "image_to_text": [(len(set(texts)), len(having)) for texts in held],
            "text_to_image": [(having[text], len(held)) for texts in held for text in texts],
        }
        return {
            f"{name}{at}": float(np.mean([_chance(*pair, count) for pair in pairs or [(0, 1)]]))
            for name, pairs in right.items()
            for at, count in (("", 1), ("@5", 5))
        }

    # ------------------------------------------------------------------ answers

    def outputs(self, batch: Batch) -> list[Any]:
        return list(self.model({"pixel_values": batch["pixel_values"]}).float().cpu())

    def decode(
        self,
        outputs: Sequence[Any],
        infos: Sequence[Any],
        *,
        labels: Sequence[str] | None = None,
        template: str | Sequence[str] = _PROMPT,
        top_k: int | str | None = "best",
    ) -> dict[str, Any]:
        """Return ``label`` and ``score`` of the likeliest class; without labels ``embedding``, the vector of the image.

        Args:
            outputs: unit vectors of images.
            infos: see ``Task.decode``.
            labels: names of the classes, which are described by prompts.
            template: a prompt with ``{}`` for the name of a class, or several, whose vectors are averaged.
            top_k: ``"best"``; or a number for lists of that many classes and their scores, or None for all. Scores are
                probabilities of the classes for clip, and of each class by itself for siglip.

        Raises:
            ConfigError: there are no labels, one stands twice, or they are no list; or a template has no ``{}``.
        """
        if labels is None:
            return {"embedding": [float(value) for value in outputs[0]]}
        labels = _listed("labels", labels, ["cat", "dog"])
        template = [template] if isinstance(template, str) else template
        template = _listed("template", template, ["a photo of a {}.", "a drawing of a {}."])
        scores = self._class_scores(outputs[0], tuple(labels), tuple(template))
        return best_classes(labels, scores, top_k)

    @torch.inference_mode()
    def _class_scores(
        self, image: Tensor, labels: tuple[str, ...], templates: tuple[str, ...]
    ) -> np.ndarray:
        if self._classes is None or self._classes[0] != (labels, templates):
            self._classes = ((labels, templates), self._class_vectors(labels, templates))
        vectors = self._classes[1]
        scores = self.towers.scores(image[None].to(vectors), vectors)[0]
        found = scores.sigmoid() if self.loss is SigmoidContrastive else scores.softmax(-1)
        return found.cpu().numpy()

    # Classes and templates of the last call, with their vectors, which are the same for all images of a call.
    _classes: tuple[Any, Tensor] | None = None

    def _class_vectors(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        """Return one unit vector for each class, (C, P): the mean of those of its prompts."""
        if not labels or not all(isinstance(label, str) and label.strip() for label in labels):
            raise ConfigError("labels must be the names of the classes, at least one.")
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ConfigError(
                f"labels names the class {twice!r} twice, which would divide its score: give each name once."
            )
        if not templates:
            raise ConfigError(
                f"template is an empty list: give prompts with {{}} for the name of a class, "
                f"{option('template', ['a photo of a {}.'])}, or leave it out."
            )
        if wrong := [text for text in templates if "{}" not in str(text)]:
            raise ConfigError(f"template is {wrong!r}; it must hold {{}} for the name of a class.")
        texts = [text.replace("{}", label) for label in labels for text in templates]
        encodings = self.tokenizer.frame_texts(texts, max_length=self.max_length)
        if cut := sum(bool(encoding.overflowing) for encoding in encodings):
            note(
                f"{cut} of {len(texts)} prompts have more than {self.max_length} tokens and are cut"
            )
        batch = padded_texts(self.towers, [np.asarray(e.ids) for e in encodings])
        moved = {key: value.to(self.model.device) for key, value in batch.items()}
        vectors = self.model(moved).view(len(labels), len(templates), -1)
        return F.normalize(vectors.mean(1), dim=-1)


def _chance(right: int, every: int, count: int) -> float:
    """Return how probably one of the right ones is among ``count`` different ones that are drawn of all."""
    count = min(count, every)
    draws = math.comb(every, count)
    return (draws - math.comb(every - right, count)) / draws


def _listed(name: str, value: Any, example: list[str]) -> Sequence[str]:
    """Return an option as a sequence.

    Raises:
        ConfigError: it is none, such as a set, whose order is by chance, or one text.
    """
    found = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ConfigError(
            f"{name} is {type(value).__name__} {str(value)[:40]!r}; give a list: {option(name, example)}."
        )
    return found
