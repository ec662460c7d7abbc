"""Contrastive learning of images with their texts.

The losses are InfoNCE (CLIP, arXiv 2103.00020; 1807.03748), with smoothed targets for noisy pairs (ALIGN, 2102.05918),
and the sigmoid loss of pairs (SigLIP, 2303.15343). Every
image is compared with all texts of the global batch, and with InfoNCE every text with all images. The scores are
computed in chunks that the backward pass computes again, so memory grows linearly with the batch.

Letters: n pairs on this rank, N in the whole batch, T tokens, P size of a vector, M texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pretrain.data.images.augment import Augmentation
from pretrain.data.loader import Examples
from pretrain.errors import DataError, ModelError
from pretrain.models.clip import TwoTowers
from pretrain.nn.device import local
from pretrain.objectives.base import (
    Batch,
    ExampleList,
    Loss,
    Objective,
    Rngs,
    checked_smoothing,
)
from pretrain.objectives.row_pixels import pixel_values

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["Contrastive", "SigmoidContrastive", "padded_texts", "recalls"]

_CHUNK = 512  # rows that are compared with the whole batch at once
_AT = 5  # places among which a text or an image counts as found, beside the first
_MOST = math.log(100.0)  # of the logarithm of the scale, as in CLIP


def padded_texts(towers: TwoTowers, texts: Sequence[np.ndarray]) -> Batch:
    """Return the ids of texts, padded on the right, with the mask of a model that does not read padding.

    Raises:
        DataError: a text is longer than the positions of the model, or lacks the end token at which it is read.
    """
    config = towers.config
    longest, most = max(len(ids) for ids in texts), config.max_positions
    if longest > most:
        raise DataError(
            f"A text of {longest} tokens is longer than the {most} positions of the model. Cut the texts and keep "
            f"their end token (data.source_args.max_length={most}), or build the model with a larger "
            "max_positions."
        )
    end = towers.end_id
    # Padding may have the same id, so this is checked before it is there.
    if end is not None and (cut := [ids for ids in texts if end not in ids]):
        raise DataError(
            f"{len(cut)} of {len(texts)} texts have no end token (eos_id {end}), whose hidden state is the vector "
            f"of a text; the first has the ids {cut[0][:8].tolist()}. Encode the texts with the tokenizer of the "
            "model, and keep the end token when cutting them."
        )
    columns = most if towers.padded else longest
    ids = np.full((len(texts), columns), config.pad_id or 0, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    found = {"input_ids": torch.from_numpy(ids)}
    return found if towers.padded else found | {"attention_mask": torch.from_numpy(mask)}


class Contrastive(Objective):
    """Find the text of every image among those of the batch, and the image of every text.

    Rows have ``image``, or ``pixel_values`` (C, H, W), and ``input_ids`` (tokens), framed by the tokenizer of the
    model. Rows with several texts have them one after another, and their ``lengths``; training draws one of them. More
    rows in a batch mean more negatives; gradient accumulation would mean fewer, and is refused.

    Args:
        model: a model with two towers, such as clip.
        crop: smallest share of the area that a random crop of a training image keeps; 1 for no crops. Like the two
            below for rows of images, not for rows of pixel values.
        flip: mirror half of the training images; not if texts tell left from right.
        randaugment: strength, 1 to 30, of two random operations on every training image; 0 for none.
        jitter: how far the brightness, contrast and colour of a training image change, as a share; 0 for not at all.
        label_smoothing: share of a target that is spread over all pairs of the batch, for texts that often do not
            belong to their image; in training only.

    Raises:
        ModelError: the model has no towers, or reads padding and has no ``pad_id``.
        ConfigError: an option is out of range.
    """

    couples_examples: ClassVar[bool] = True
    _counts_copies = False  # the run began with an earlier version
    figures: ClassVar[tuple[str, ...] | None] = (
        "loss", "image_to_text", "text_to_image", f"image_to_text@{_AT}", f"text_to_image@{_AT}",
    )  # fmt: skip

    def __init__(
        self,
        model: Model,
        crop: float = 1.0,
        flip: bool = False,
        randaugment: int = 0,
        label_smoothing: float = 0.0,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(model)
        self.augmentation = Augmentation(crop, flip, randaugment, jitter)
        self.label_smoothing = checked_smoothing(label_smoothing)
        if not isinstance(model.backbone, TwoTowers):
            raise ModelError(
                f"Contrastive needs a model with a tower for images and one for texts; this one is a "
                f"{model.backbone.model_type} model. Build the family clip."
            )
        if model.backbone.padded and model.backbone.config.pad_id is None:
            raise ModelError(
                f"A {model.backbone.model_type} model reads the padding of a text like any token, and this one has no "
                "pad_id. Set it to that of the tokenizer: model.overrides.pad_id."
            )

    @property
    def towers(self) -> TwoTowers:
        """The backbone."""
        found = self.model.backbone
        assert isinstance(found, TwoTowers)
        return found

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Read the images, draw a text of each, and pad the texts on the right.

        In evaluation the further texts of all rows stand after the first of each, and ``owners`` (M - n,) says to which
        row of the batch they belong; ``text_ids`` (M,) are equal for texts that are alike. See also ``padded_texts``.
        """
        pixels = pixel_values(self, examples, rngs, evaluation=evaluation)
        if "input_ids" not in examples[0]:  # images whose texts are to be found
            return {"pixel_values": pixels}
        texts, further, owners = list[np.ndarray](), list[np.ndarray](), list[int]()
        first_ids, further_ids = list[int](), list[int]()
        for row, example in enumerate(examples):
            ids = np.asarray(example["input_ids"]).reshape(-1)
            lengths = example.get("lengths", [len(ids)])
            several = np.split(ids, np.cumsum(lengths)[:-1])
            drawn = 0 if evaluation or len(several) == 1 else int(rngs[row].integers(len(several)))
            texts.append(several[drawn])
            if evaluation:
                further += several[1:]
                owners += [row] * (len(several) - 1)
                first_ids += list(example.get("text_ids", ()))[:1]
                further_ids += list(example.get("text_ids", ()))[1:]
        batch = {"pixel_values": pixels, **padded_texts(self.towers, texts + further)}
        if len(ids_of_texts := first_ids + further_ids) == len(texts) + len(further):
            batch["text_ids"] = torch.tensor(ids_of_texts)
        return batch | ({"owners": torch.tensor(owners)} if owners else {})

    def count(self, batch: Batch) -> Tensor:
        """Number of pairs."""
        return torch.tensor(len(batch["pixel_values"]))

    def forward(self, batch: Batch) -> Loss:
        images, every = self.towers.vectors(batch)
        assert images is not None and every is not None
        texts = every[: len(images)]
        every_image, first = self.whole_batch(images)
        every_text, _ = self.whole_batch(texts)
        total, right = self.compare(images, texts, every_image, every_text, first)
        metrics: dict[str, Any] = {}
        if self.training:
            metrics["accuracy"] = right
        else:
            owners = batch["owners"].tolist() if "owners" in batch else []
            metrics["images"] = list(images)
            metrics["texts"] = _by_row(every, len(images), owners)
            if "text_ids" in batch:
                metrics["text_ids"] = _by_row(batch["text_ids"], len(images), owners)
        return Loss(total, self.count(batch).to(total.device), metrics)

    def compare(
        self, images: Tensor, texts: Tensor, every_image: Tensor, every_text: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss of this rank's pairs, and how many of its images find their text.

        Args:
            images: (n, P) unit vectors of this rank.
            texts: the same of its texts.
            every_image: (N, P) those of the images of all ranks.
            every_text: those of the texts of all ranks.
            first: place of the first pair of this rank in the batch.
        """
        there, right = self._entropy(images, every_text, first)
        back, _ = self._entropy(texts, every_image, first)
        return (there + back) / 2, right

    def _entropy(self, rows: Tensor, others: Tensor, first: int) -> tuple[Tensor, Tensor]:
        smoothing = self.label_smoothing if self.training else 0.0

        def chunk(part: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.towers.scores(part, others)
            right = (scores.detach().argmax(-1) == targets).sum()
            loss = F.cross_entropy(scores, targets, reduction="sum", label_smoothing=smoothing)
            return loss, right

        return self.chunked(chunk, rows, first)

    def chunked(self, function: Any, rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Sum a function of chunks of rows and their places in the batch, computed again in the backward pass."""
        places = torch.arange(first, first + len(rows), device=rows.device)
        total, right = rows.new_zeros(()), places.new_zeros(())
        for part, target in _parts(rows, places):
            loss, found = checkpoint(function, part, target, use_reentrant=False)
            total, right = total + loss, right + found
        return total, right

    def after_step(self) -> None:
        """Keep the scale of the scores at 100 or less, as CLIP does."""
        local(self.towers.logit_scale).clamp_(max=_MOST)

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, Any], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """How often the nearest of all held-out texts is one of the image, and the nearest image that of the text.

        A text that several images have belongs to all of them, because nothing tells which one is meant; images choose
        among different texts.
        Those with ``@5`` say how often it is among the five nearest. Only the loss is computed within batches, so it
        depends on the batch size: smaller batches have a lower loss.
        """
        figures = {"loss": total / count if count else math.nan}
        if metrics.get("images"):
            images, texts = torch.stack(list(metrics["images"])), list(metrics["texts"])
            ids = metrics.get("text_ids")
            figures |= recalls(images.float(), [text.float() for text in texts], ids)
        return figures

    def describe(self) -> dict[str, Any]:
        """Name, and the changes of the images and the smoothing if there are any."""
        given = vars(self.augmentation) | {"label_smoothing": self.label_smoothing}
        usual = vars(Augmentation()) | {"label_smoothing": 0.0}
        return super().describe() | {k: v for k, v in given.items() if v != usual[k]}

    def record(self) -> dict[str, Any]:
        return super().record() | {"distinct_texts": True}

    def continue_from(self, record: Mapping[str, Any]) -> None:
        super().continue_from(record)
        self._counts_copies = "distinct_texts" not in record

    def figures_changed(self, rows: Examples) -> bool:
        """Earlier versions counted the copies of a text as wrong."""
        if not self._counts_copies:
            return False
        ids = [number for i in range(len(rows)) for number in rows[i].get("text_ids", ())]
        return len(set(map(int, ids))) < len(ids)

    def head_weights(self) -> int:
        """0, because there is no head."""
        return 0

    def flops(self, units: int, targets: int, row_length: int) -> float:
        """Operations of the image tower on patches and of the text tower on tokens."""
        towers, config = self.towers, self.towers.config
        patches: int = targets * config.num_patches
        image = self._tower(towers.image.layers, config.vision_hidden_size, config.num_patches)
        words = max(0, units - patches)
        text = self._tower(towers.text.layers, config.hidden_size, words // max(1, targets))
        return 6.0 * (patches * image + words * text)

    def _tower(self, layers: nn.ModuleList, width: int, length: int) -> int:
        weights = self._numel(p for p in layers.parameters() if p.ndim == 2)
        return weights + 2 * len(layers) * width * length


class SigmoidContrastive(Contrastive):
    """Decide for every image and every text of the batch whether they belong together.

    The sum over all decisions is divided by the number of pairs, as in SigLIP.

    Args:
        model: a siglip model, whose scores have a bias.
        crop, flip, randaugment, jitter: see ``Contrastive``.

    Raises:
        ModelError: the scores of the model have no bias: almost all decisions are "no", and would all begin wrong.
    """

    figures: ClassVar[tuple[str, ...] | None] = Contrastive.figures

    def __init__(
        self,
        model: Model,
        crop: float = 1.0,
        flip: bool = False,
        randaugment: int = 0,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(model, crop, flip, randaugment, jitter=jitter)
        if not hasattr(model.backbone, "logit_bias"):
            raise ModelError(
                f"SigmoidContrastive needs a model whose scores have a bias, and this {model.backbone.model_type} "
                "model has none. Build the family siglip, or train it with Contrastive."
            )

    def compare(
        self, images: Tensor, texts: Tensor, every_image: Tensor, every_text: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss of this rank's images with all texts, and how many find their text."""

        def chunk(part: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.towers.scores(part, every_text)
            right = (scores.detach().argmax(-1) == places).sum()
            own = places[:, None]
            # -log sigmoid of the score of a pair, and of the negative score of all others.
            wrong = scores.scatter(1, own, -scores.gather(1, own))
            return F.softplus(wrong).sum(), right

        return self.chunked(chunk, images, first)

    def after_step(self) -> None:
        """Leave the scale free, as in the paper."""


def recalls(
    images: Tensor, texts: Sequence[Tensor], ids: Sequence[Tensor] | None = None
) -> dict[str, float]:
    """Return how often the own text of an image, and the image of a text, is the nearest, or among the five nearest.

    Args:
        images: (N, P) unit vectors.
        texts: for each image those of its texts, (its texts, P).
        ids: for each image a number of each of its texts, which is the same for texts that are alike; those belong to
            all images that have one of them, and images choose among the first of each. None: all texts differ.
    """
    owners = torch.repeat_interleave(torch.arange(len(images)), torch.tensor([*map(len, texts)]))
    every = torch.cat(list(texts))
    numbers = range(len(every)) if ids is None else torch.cat(list(ids)).tolist()
    first: dict[int, int] = {}  # number -> place of the first text that has it
    kinds = torch.tensor([first.setdefault(number, i) for i, number in enumerate(numbers)])
    places = torch.tensor([*first.values()])
    distinct = every if len(first) == len(every) else every[places]

    def of_images(part: slice) -> Tensor:
        here = (owners >= part.start) & (owners < part.stop)
        held = torch.zeros(part.stop - part.start, len(every), dtype=torch.bool)
        held[owners[here] - part.start, kinds[here]] = True
        return held[:, places]

    def of_texts(part: slice) -> Tensor:
        rows, alike = (kinds[part, None] == kinds).nonzero(as_tuple=True)
        held = torch.zeros(part.stop - part.start, len(images), dtype=torch.bool)
        held[rows, owners[alike]] = True
        return held

    figures = {}
    for name, ranks in (
        ("image_to_text", _ranks(images, distinct, of_images)),
        ("text_to_image", _ranks(every, images, of_texts)),
    ):
        figures[name] = float((ranks < 1).double().mean())
        figures[f"{name}@{_AT}"] = float((ranks < _AT).double().mean())
    return figures


def _ranks(rows: Tensor, others: Tensor, owned: Callable[[slice], Tensor]) -> Tensor:
    """Number of others that are not owned and are as near as the best of those that are; ties count against it.

    Args:
        rows: (R, P) unit vectors.
        others: (O, P) unit vectors.
        owned: for a slice of the rows which of the others belong to each, (its rows, O).
    """
    found = []
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, min(start + _CHUNK, len(rows)))
        scores, own = rows[part] @ others.T, owned(part)
        best = scores.masked_fill(~own, -math.inf).max(dim=1, keepdim=True).values
        found.append(((scores >= best) & ~own).sum(1))
    return torch.cat(found)


def _by_row(values: Tensor, count: int, owners: Sequence[int]) -> list[Tensor]:
    """Return for each row its own value and the further ones, which stand behind the first ``count``."""
    found = [[value] for value in values[:count]]
    for row, value in zip(owners, values[count:], strict=True):
        found[row].append(value)
    return [torch.stack(own) for own in found]


def _parts(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, _CHUNK) for tensor in tensors), strict=True)
