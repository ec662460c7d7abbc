"""Several random views of each image, which a model is to see alike: LeJEPA, SimCLR and MoCo v3.

LeJEPA (arXiv 2511.08544) predicts the mean of the views of an image and keeps projections distributed like a normal
distribution; SimCLR (2002.05709) and MoCo v3 (2104.02057) tell the other view of an image from those of other images.
Inputs of the projector are normalised over the global batch, as by the BatchNorm of the papers, because the features of
a new model are nearly equal for all images; between its layers stands LayerNorm, which needs no other image. The loss
therefore leaves mean and scale of each feature free; after each step the last norm of the backbone takes them over, so
that what is saved has features of mean 0 and variance 1, from which a classifier learns faster.

Letters: n images of this rank, N of the whole batch, V views of each, P size of a projection, M directions, K knots.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.data.images.augment import Augmentation
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.models.base import Model
from pretrain.models.image_backbone import ImageBackbone
from pretrain.nn.device import local
from pretrain.nn.patches import PatchEmbedding
from pretrain.objectives.base import Batch, ExampleList, Loss, Objective, Rngs
from pretrain.objectives.row_pixels import pixel_values, reads_audio

if TYPE_CHECKING:
    from pretrain.data.loader import Examples

__all__ = ["LeJEPA", "MoCo", "SimCLR", "gaussian_distance"]

_EPS = 1e-5  # added to the variance of a feature over the batch, as by BatchNorm
_WIDER = 4  # width of a projector in units of the model's
_SHARE = 0.1  # of the way to mean 0 and variance 1 that the last norm goes after a step


class Views(Objective):
    """Base class: reads random views of every image, and projects the vectors that a classifier would read.

    Rows hold an ``image``, or ``pixel_values`` (V, C, H, W) of views that the source of the rows has made.

    Args:
        model: a model of images without a head.
        views: views of an image, V.
        crop: smallest share of the area of an image that a view shows.
        flip: mirror half of the views.
        randaugment: strength, 1 to 30, of two random operations on every view; 0 for none.
        jitter: how far the brightness, contrast and colour of a view change, as a share; 0 for not at all.
        projection: size of a projection, P.
        pooling: what is projected, see ``ImageBackbone.pooled``.

    Raises:
        ModelError: the model has a head, or reads no images.
        ConfigError: a number is out of range.
    """

    couples_examples: ClassVar[bool] = True
    figures: ClassVar[tuple[str, ...] | None] = ("loss",)
    described: ClassVar[tuple[str, ...]] = ("projection", "pooling")

    def __init__(
        self,
        model: Model,
        views: int,
        crop: float,
        flip: bool,
        randaugment: int,
        projection: int,
        pooling: str | None,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(model)
        name = type(self).__name__
        images = isinstance(model.backbone, ImageBackbone) and not reads_audio(model)
        if not images or model.head is not None:
            raise ModelError(
                f"{name} needs a model of images without a head; this is a {model.backbone.model_type} model with the "
                f"head {model.head_kind!r}. Build the family vit."
            )
        if views < 2 or projection < 1:
            raise ConfigError(
                f"views is {views} and projection {projection}; there must be two views or more to compare, and one "
                "value or more in a projection."
            )
        self.views, self.projection, self.pooling = views, projection, pooling
        self.augmentation = Augmentation(crop, flip, randaugment, jitter)
        self.projector = _perceptron(model.backbone.config.hidden_size, projection)
        self._seen: tuple[Tensor, Tensor] | None = None  # mean and variance of the features
        self.centred = True  # not in runs that an earlier version began
        # Counted now, because sharded parameters have fewer.
        self._weights = sum(p.numel() for p in self.projector.parameters())

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Draw the views of each row with the row's own generator, in evaluation too: ``views`` (n, V, C, H, W)."""
        if "pixel_values" in examples[0]:
            pixels = pixel_values(self, examples, rngs, evaluation=True)
            if pixels.ndim != 5 or pixels.shape[1] != self.views:
                raise DataError(
                    f"pixel_values of a row have the shape {tuple(pixels.shape[1:])}; {type(self).__name__} reads "
                    f"({self.views}, channels, height, width), {self.views} views of an image. Give rows with image "
                    "instead, of which views are drawn."
                )
            return {"views": pixels}
        drawn = [pixel_values(self, examples, rngs, evaluation=False) for _ in range(self.views)]
        return {"views": torch.stack(drawn, dim=1)}

    def count(self, batch: Batch) -> Tensor:
        """Number of images."""
        return torch.tensor(len(batch["views"]))

    def units(self, batch: Batch) -> int:
        return super().units({"pixel_values": batch["views"].flatten(0, 1)})

    def projected(self, batch: Batch, backbone: Any, projector: nn.Module) -> Tensor:
        """Return the projections of all views in fp32, (n, V, P)."""
        views = batch["views"]
        inputs = {"pixel_values": views.flatten(0, 1)}
        if "visible_index" in batch:
            inputs["visible_index"] = batch["visible_index"].flatten(0, 1)
        hidden = backbone(inputs)
        pooled = backbone.pooled(hidden, self.pooling).float().reshape(*views.shape[:2], -1)
        every, _ = self.whole_batch(pooled)
        variance, mean = torch.var_mean(every, dim=(0, 1), correction=0)
        if self.training and backbone is self.model.backbone:
            self._seen = mean.detach(), variance.detach()
        found: Tensor = projector((pooled - mean) * (variance + _EPS).rsqrt())
        return found.float()

    def after_step(self) -> None:
        """Move the last norm of the backbone towards features of mean 0 and variance 1; the loss stays as it is."""
        norm: Any = self.model.backbone.output_norm if self.centred else None
        if norm is None or self._seen is None or not norm.weight.requires_grad:
            return
        mean, variance = self._seen
        weight, bias = norm.weight, norm.bias
        factor = _like(weight, (variance + _EPS) ** (-_SHARE / 2))
        local(weight).mul_(factor)
        local(bias).sub_(_like(bias, _SHARE * mean)).mul_(factor)

    def head_weights(self) -> int:
        """Weights that each view is multiplied with behind the backbone, for all views of an image."""
        return self.views * self._weights

    def survey(self, rows: Examples) -> list[str]:
        return [f"{self.views} random views of every image are compared"]

    def describe(self) -> dict[str, Any]:
        """Name, changes that make the views, and the arguments that ``described`` names."""
        own = {name: getattr(self, name) for name in self.described}
        return {**super().describe(), **vars(self.augmentation), **own}

    def record(self) -> dict[str, Any]:
        return super().record() | {"centred": self.centred}

    def same_argument(self, key: str, then: Any, now: Any, labels: Sequence[str]) -> bool:
        return key == "centred" or super().same_argument(key, then, now, labels)

    def continue_from(self, record: Mapping[str, Any]) -> None:
        self.centred = bool(record.get("centred"))


class LeJEPA(Views):
    """Draw the views of an image together, while all projections stay distributed like a normal distribution.

    The loss of an image is ``1 - weight`` times the mean squared distance of its views from their mean, plus ``weight``
    times SIGReg, the distance of the batch from the normal distribution (``gaussian_distance``), averaged over views.
    There is no teacher and no negative pair; the loss tells how good the features are.

    Args:
        model, views, crop, flip, randaugment, projection, pooling, jitter: see ``Views``.
        weight: share of SIGReg in the loss, λ of the paper.
        directions: random directions that each image of a batch adds to those along which SIGReg compares.
        mask_ratio: share of the patches of each view that is hidden, others in every view, so that a view is not seen
            whole; the encoder computes only the visible ones. For families that read parts of an image, such as vit.
    """

    figures: ClassVar[tuple[str, ...] | None] = ("loss", "distance", "sigreg")
    described: ClassVar[tuple[str, ...]] = (
        *Views.described, "views", "weight", "directions", "mask_ratio",
    )  # fmt: skip

    def __init__(
        self,
        model: Model,
        views: int = 2,
        crop: float = 0.3,
        flip: bool = False,
        randaugment: int = 0,
        projection: int = 16,
        weight: float = 0.02,
        directions: int = 1,
        mask_ratio: float = 0.0,
        pooling: str | None = None,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(model, views, crop, flip, randaugment, projection, pooling, jitter)
        if not 0 < weight < 1 or directions < 1:
            raise ConfigError(
                f"weight is {weight} and directions {directions}; weight must lie between 0 and 1, and directions be 1 "
                "or more."
            )
        if not 0 <= mask_ratio < 1:
            raise ConfigError(
                f"mask_ratio is {mask_ratio}; it must be from 0 to less than 1, a share of the patches."
            )
        if mask_ratio and not model.backbone.reads_parts:
            raise ConfigError(
                f"mask_ratio is {mask_ratio}, and a {model.backbone.model_type} model reads whole images only. Leave "
                "it out, or build the family vit."
            )
        self.weight, self.directions, self.mask_ratio = weight, directions, mask_ratio

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Add ``directions`` (n, directions, P): rows draw them for all, so that all ranks use the same.

        If patches are hidden, ``visible_index`` (n, V, K) names those of each view that are not, in ascending order.
        """
        batch = super().collate(examples, rngs, evaluation=evaluation)
        shape = (self.directions, self.projection)
        drawn = np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])
        batch["directions"] = torch.from_numpy(drawn)
        if self.mask_ratio:
            patches = super().units(batch) // batch["views"].shape[:2].numel()
            shown = max(1, int(patches * (1 - self.mask_ratio)))
            places = [[rng.permutation(patches)[:shown] for _ in range(self.views)] for rng in rngs]
            batch["visible_index"] = torch.from_numpy(np.sort(np.array(places), axis=-1))
        return batch

    def forward(self, batch: Batch) -> Loss:
        rows = self.projected(batch, self.model.backbone, self.projector)
        distance = (rows - rows.mean(1, keepdim=True)).square().mean((1, 2)).sum()
        every, _ = self.whole_batch(rows)
        directions, _ = self.whole_batch(batch["directions"])
        # Of the sum over the images of the batch this rank adds the share of its own.
        apart = len(rows) * gaussian_distance(every.transpose(0, 1), directions.flatten(0, 1))
        total = (1 - self.weight) * distance + self.weight * apart
        metrics: dict[str, Any] = {"distance": distance.detach(), "sigreg": apart.detach()}
        return Loss(total, self.count(batch).to(total.device), metrics)

    def flops(self, units: int, targets: int, row_length: int) -> float:
        """Operations on the patches that are visible."""
        share = 1 - self.mask_ratio
        return super().flops(round(units * share), targets, round(row_length * share))


def gaussian_distance(
    rows: Tensor, directions: Tensor, knots: int = 17, most: float = 3.0
) -> Tensor:
    """Return the distance of points from the standard normal distribution, along random directions (SIGReg).

    Along a direction it is the statistic of Epps and Pulley (1983), N ∫ |f(t) - exp(-t² / 2)|² exp(-t² / 2) dt, where
    f is the mean of exp(i t x) over the N projected points; the integral from -most to most is a trapezoidal sum. Its
    gradient is bounded, and it costs O(N M K).

    Args:
        rows: (..., N, P) points; computed in fp32.
        directions: (M, P), of any length but zero.
        knots: K, from 0 to ``most``.
        most: limit of the integral.

    Returns:
        A scalar, the mean over directions and leading dimensions.
    """
    with torch.autocast(rows.device.type, enabled=False):
        along = rows.float() @ F.normalize(directions.float(), dim=-1).T  # (..., N, M)
        t = torch.linspace(0, most, knots, device=rows.device)
        normal = (-t.square() / 2).exp()
        # The integrand is even, so each knot stands for t and -t; the first and last are those of half a step.
        steps = torch.full_like(t, 2 * most / (knots - 1))
        steps[0], steps[-1] = steps[0] / 2, steps[-1] / 2
        angles = along[..., None] * t  # (..., N, M, K)
        real, imaginary = angles.cos().mean(-3) - normal, angles.sin().mean(-3)
        statistic: Tensor = (real.square() + imaginary.square()) @ (steps * normal)
        return rows.shape[-2] * statistic.mean()


class SimCLR(Views):
    """Find the other view of an image among all views of the other images of the batch (NT-Xent).

    More rows in a batch mean more negatives; gradient accumulation would mean fewer, and is refused. The matrix of
    scores grows with the square of the batch.

    Args:
        model, crop, flip, randaugment, projection, pooling, jitter: see ``Views``.
        temperature: by which cosines are divided.
    """

    figures: ClassVar[tuple[str, ...] | None] = ("loss", "accuracy")
    described: ClassVar[tuple[str, ...]] = (*Views.described, "temperature")

    def __init__(
        self,
        model: Model,
        crop: float = 0.3,
        flip: bool = False,
        randaugment: int = 0,
        projection: int = 128,
        temperature: float = 0.2,
        pooling: str | None = None,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(model, 2, crop, flip, randaugment, projection, pooling, jitter)
        if not temperature > 0:
            raise ConfigError(f"temperature is {temperature}; it must be above 0.")
        self.temperature = temperature

    def forward(self, batch: Batch) -> Loss:
        own = F.normalize(self.projected(batch, self.model.backbone, self.projector), dim=-1)
        every, first = self.whole_batch(own)
        others = every.transpose(0, 1).flatten(0, 1)  # (2 N, P), first views first
        places = first + torch.arange(len(own), device=own.device)
        total, right = own.new_zeros(()), own.new_zeros(())
        for view in (0, 1):
            scores = own[:, view] @ others.T / self.temperature
            scores = scores.scatter(1, (view * len(every) + places)[:, None], -math.inf)
            targets = (1 - view) * len(every) + places
            total = total + F.cross_entropy(scores, targets, reduction="sum") / 2
            right = right + (scores.detach().argmax(-1) == targets).sum() / 2
        return Loss(total, self.count(batch).to(total.device), {"accuracy": right})


class MoCo(SimCLR):
    """Predict what a slowly moving average of the model computes for the other view of the image (MoCo v3).

    The projection of the patches stays as it was drawn, which keeps the training of ViTs stable (section 4 of the
    paper). The average is saved under ``training/``.

    Args:
        model, crop, flip, randaugment, projection, temperature, pooling, jitter: see ``SimCLR``.
        momentum: decay of the average after every step; smaller in the first steps, so that it begins at the model.
        freeze_patches: keep the projection of the patches as it is.
    """

    figures: ClassVar[tuple[str, ...] | None] = SimCLR.figures
    described: ClassVar[tuple[str, ...]] = (*SimCLR.described, "momentum", "freeze_patches")
    copies_model: ClassVar[bool] = True
    constant_buffers: ClassVar[tuple[str, ...]] = ("steps",)  # no forward pass changes it
    steps: Tensor

    def __init__(
        self,
        model: Model,
        crop: float = 0.3,
        flip: bool = False,
        randaugment: int = 0,
        projection: int = 128,
        temperature: float = 0.2,
        momentum: float = 0.99,
        freeze_patches: bool = True,
        pooling: str | None = None,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(
            model, crop, flip, randaugment, projection, temperature, pooling, jitter=jitter
        )
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum is {momentum}; it must be from 0 to less than 1.")
        self.momentum, self.freeze_patches = momentum, freeze_patches
        self.predictor = _perceptron(projection, projection)
        backbone = model.backbone
        average = Model.build(type(backbone), backbone.config, head=None).materialize()
        self.average_backbone = average.backbone.requires_grad_(False)
        self.average_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for module in backbone.modules() if freeze_patches else ():
            if isinstance(module, PatchEmbedding):
                module.projection.requires_grad_(False)

    def forward(self, batch: Batch) -> Loss:
        own = self.projected(batch, self.model.backbone, self.projector)
        own = F.normalize(self.predictor(own).float(), dim=-1)
        with torch.no_grad():
            keys = self.projected(batch, self.average_backbone, self.average_projector)
            every, first = self.whole_batch(F.normalize(keys, dim=-1))
        targets = first + torch.arange(len(own), device=own.device)
        total, right = own.new_zeros(()), own.new_zeros(())
        for view in (0, 1):
            scores = own[:, view] @ every[:, 1 - view].T / self.temperature
            # The factor keeps the size of the gradient whatever the temperature, as in the paper.
            entropy = F.cross_entropy(scores, targets, reduction="sum")
            total = total + self.temperature * entropy
            right = right + (scores.detach().argmax(-1) == targets).sum() / 2
        return Loss(total, self.count(batch).to(total.device), {"accuracy": right})

    def after_step(self) -> None:
        """Move the average towards the weights; in early steps by more, because it begins with other random ones."""
        super().after_step()
        early = (1 + self.steps) / (10 + self.steps)
        share = 1 - early.clamp(max=self.momentum)
        for average, module in (
            (self.average_backbone, self.model.backbone),
            (self.average_projector, self.projector),
        ):
            weights: Mapping[str, Tensor] = dict(module.named_parameters())
            for name, value in average.named_parameters():
                mine, theirs = local(value), local(weights[name].detach())
                mine.lerp_(theirs, share.to(mine))
        self.steps += 1


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """Return the part of ``values`` that this rank holds of a parameter of the same shape."""
    shared: Any = parameter
    if not hasattr(parameter, "placements"):
        return values
    from torch.distributed.tensor import distribute_tensor

    return local(distribute_tensor(values, shared.device_mesh, shared.placements))


def _perceptron(inputs: int, outputs: int) -> nn.Sequential:
    """Return three layers with LayerNorm and GELU between them."""
    width = _WIDER * inputs
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.LayerNorm(width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.LayerNorm(width),
        nn.GELU(),
        nn.Linear(width, outputs),
    )
