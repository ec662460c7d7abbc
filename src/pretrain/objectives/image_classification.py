"""Classification of images, with one class each or any number of classes (arXiv 2010.11929, section 4).

Labels, weights, metrics and answers are those of the classification of texts. As an objective of pre-training it reads
the rows of ``pretrain.data.images.source``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch

from pretrain.config.spelling import option
from pretrain.data.images import Picture
from pretrain.data.images.augment import Augmentation, Mixing
from pretrain.data.images.draw import with_light
from pretrain.data.images.rows import pictures
from pretrain.data.images.source import IMAGE
from pretrain.data.labelled import Role
from pretrain.data.tables import Table
from pretrain.errors import ConfigError, DataError
from pretrain.models.image_backbone import ImageBackbone
from pretrain.objectives.base import Batch, ExampleList, Loss, Rngs
from pretrain.objectives.classification import Classification
from pretrain.objectives.image_task import ImageTask
from pretrain.objectives.row_pixels import pixel_values, values_key
from pretrain.objectives.tasks import Learned

if TYPE_CHECKING:
    from pretrain.data.loader import Examples
    from pretrain.models.base import Model

__all__ = ["ImageClassification"]


class ImageClassification(ImageTask, Classification):
    """Predict the class or classes of an image.

    Args:
        model: a model with an image-classification head and ``labels``.
        crop: smallest share of the area that a random crop of a training image keeps; 1 for no crops. The default is
            measured on digits (docs/images.md); photos and a pre-trained model usually get 0.3 or less.
        flip: mirror half of the training images; not for letters, digits or whatever has a left and a right.
        randaugment: strength, 1 to 30, of two random operations on every training image; 0 for none.
        jitter: how far the brightness, contrast and colour of a training image change, as a share; 0 for not at all.
        mixup: parameter of the beta distribution by which every training image is averaged with another one, and its
            target with the other's; 0 for none.
        cutmix: the same for a box of the image that is replaced by that of another one; 0 for none.
        pooling: what the classifier of a ViT reads: ``first``, the class token, or the ``mean`` of the patches, as in
            the fine-tuning of MAE; by default as the config of the model says. It is recorded there.
        problem, class_weights, label_smoothing, threshold, codes, label_separator, label_form: see
            ``Classification``.
        max_length: of texts only; None.

    Raises:
        ModelError: the model has no image processor, or one that does not fit.
    """

    name: ClassVar[str] = "image-classification"
    roles: ClassVar[tuple[Role, ...]] = (IMAGE, Classification.roles[-1])
    baseline: ClassVar[str | None] = "pixels"
    head_kind: ClassVar[str | None] = "image-classification"
    figures: ClassVar[tuple[str, ...] | None] = Classification.figures

    def __init__(
        self,
        model: Model,
        *,
        crop: float = 0.8,
        flip: bool = False,
        randaugment: int = 0,
        jitter: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        pooling: str | None = None,
        problem: str = "single_label",
        class_weights: Any = None,
        label_smoothing: float = 0.0,
        threshold: float = 0.5,
        codes: Mapping[str, int] | None = None,
        label_separator: str | None = None,
        label_form: str | None = None,
        max_length: int | None = None,
    ) -> None:
        self.refuse_length(max_length)
        super().__init__(
            model,
            problem=problem,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            threshold=threshold,
            codes=codes,
            label_separator=label_separator,
            label_form=label_form,
            pack=False,
        )
        self.augmentation: Any = Augmentation(crop, flip, randaugment, jitter)
        self.mixing = Mixing(mixup, cutmix)
        config, head = model.backbone.config, cast(Any, model.head)
        if pooling is not None and "pooling" not in model.backbone.hf_keys:
            both = "class token beside the mean of the patches"
            same = both if head.pool == "both" else "mean of all places"
            raise ConfigError(
                f"{option('pooling', pooling)}: the classifier of a {model.backbone.model_type} model always reads the "
                f"{same}. Leave it out."
            )
        if pooling is not None:
            model.backbone.config = replace(config, pooling=pooling)
            head.pool = model.backbone.build_head(str(model.head_kind), len(self.labels)).pool

    # ------------------------------------------------------------------ rows

    @classmethod
    def tidy(cls, table: Table, learned: Learned, options: Mapping[str, Any]) -> Table:
        """As for texts; and every image becomes an item, whose content tells duplicates and fingerprints.

        It then knows what the columns beside it say of it, such as the sampling rate of a recording.
        """
        tidied = super().tidy(table, learned, options)
        columns = {**tidied.columns, cls.medium.column: pictures(tidied, medium=cls.medium)}
        for role in cls.medium.beside:
            columns.pop(role.name, None)
        return tidied.with_columns(columns, tidied.label_names)

    def collate_inputs(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool) -> Batch:
        """Change training images at random, each by its own generator, and normalise; see ``Augmentation``."""
        found = pixel_values(self, examples, rngs, evaluation=evaluation)
        batch = {values_key(self.model): found}
        if lead := getattr(self.model.head, "lead", 0):
            # The last block need not compute the tokens that the head does not read.
            batch["keep_index"] = torch.arange(lead).repeat(len(found), 1)
        return batch

    # ------------------------------------------------------------------ rows of pre-training

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Collate as for texts, after checking labels of rows that no table was encoded to, and mix training rows."""
        self._check_labels(examples)
        batch = super().collate(examples, rngs, evaluation=evaluation)
        if self.mixing and not evaluation and "labels" in batch:
            self._mix(batch, rngs)
        return batch

    def _check_labels(self, examples: ExampleList) -> None:
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

    def _mix(self, batch: Batch, rngs: Rngs) -> None:
        """Mix every row of a training batch with another training row: its image, and its target.

        A target of one class each becomes a distribution under ``targets``, (N, C); its class weight is that of the
        distribution. ``labels`` stay those of the rows, except that several labels each become shares.
        """
        rows, pixels = self.train_rows, batch["pixel_values"]
        if rows is None:
            raise ConfigError(
                "mixup and cutmix mix a row with other training rows, and this objective has none. A Trainer sets "
                "them; elsewhere set its train_rows."
            )
        mixtures = [self.mixing.draw(rng, len(rows), *pixels.shape[2:]) for rng in rngs]
        partners = [rows[mixture.partner] for mixture in mixtures]
        self._check_labels(partners)
        others = super().collate(partners, rngs)
        parts = zip(mixtures, pixels, others["pixel_values"], strict=True)
        batch["pixel_values"] = torch.stack([mixture(own, other) for mixture, own, other in parts])
        share = torch.tensor([mixture.share for mixture in mixtures], dtype=torch.float32)[:, None]
        targets = []
        for found in (batch, others):
            labels = found["labels"]
            if self.single:
                labels = torch.nn.functional.one_hot(labels, len(self.labels)).float()
                if "weights" in found:
                    labels = labels * found["weights"][:, None]
            targets.append(labels)
        mixed = share * targets[0] + (1 - share) * targets[1]
        if not self.single:
            batch["labels"] = mixed
            return
        weights = mixed.sum(1)
        batch["targets"] = mixed / weights[:, None]
        if "weights" in batch:
            batch["weights"] = weights

    def attended(self, table: Table) -> list[str | None]:
        """Return every image as it is read, dark where the last block attends little; None without attention."""
        backbone, found = self.model.backbone, list[str | None]()
        for picture in pictures(table, medium=self.medium):
            light = None
            if isinstance(backbone, ImageBackbone) and isinstance(picture, Picture):
                with contextlib.suppress(DataError):  # the file has been moved since
                    read = self.processor.fitted(picture.read()[0])
                    values = torch.from_numpy(self.processor.values(read)[None])
                    light = backbone.attention_map(values.to(self.model.device))
            found.append(
                None if light is None else with_light(read, light[0].float().cpu().numpy())
            )
        return found

    def count(self, batch: Batch) -> torch.Tensor:
        if "labels" not in batch:
            raise DataError(
                f"The rows have no labels, from which {self.medium.many} are classified. Give each row labels, the "
                "number of its class; data.source reads them unless data.source_args.labels is false."
            )
        return super().count(batch)

    def forward(self, batch: Batch) -> Loss:
        self.count(batch)  # raises an error if there are no labels
        return super().forward(batch)

    def survey(self, rows: Examples) -> list[str]:
        """Compute balanced weights from the rows of pre-training; those of fine-tuning have given them already."""
        if self.unbalanced:
            self.balance([int(rows[i]["labels"]) for i in range(len(rows))])
        return super().survey(rows)
