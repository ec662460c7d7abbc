"""Row 13: steps of a vision transformer beside timm and transformers, and of a masked autoencoder."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.loader import row_rngs
from pretrain.models import build
from pretrain.objectives import build_objective

from .harness import Case, Contender, Settings, Stepper
from .pretraining import Made, arithmetic, our_stepper, timed, unchecked

CLASSES = 100
NORM_EPS = 1e-6  # of timm


@dataclass(frozen=True)
class Shape:
    """Of a model and its batch; sizes are those of ViT-S/16 but in a tiny run."""

    rows: int
    layers: int = 12
    width: int = 384
    heads: int = 6
    image: int = 224
    patch: int = 16

    def __str__(self) -> str:
        return f"L{self.layers} d{self.width} {self.image}/{self.patch} B{self.rows}"

    def model(self, family: str = "vit", **options: Any) -> Any:
        """A fresh model of ours."""
        return build(
            family, None, num_layers=self.layers, hidden_size=self.width, num_heads=self.heads,
            image_size=self.image, patch_size=self.patch, norm_eps=NORM_EPS, **options,
        )  # fmt: skip


SHAPES = {"cpu": Shape(4), "cuda": Shape(256), "tiny": Shape(2, 1, 32, 2, 16, 8)}
# Names of timm for the parts of a block; queries, keys and values are one matrix there.
_TIMM = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def timm_names(ours: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Our tensors under the names of timm."""
    pairs = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        **{
            f"{theirs}.{leaf}": f"{name}.{leaf}"
            for theirs, name in (
                ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
                ("norm", "vit.layernorm"),
                ("head", "classifier"),
            )
            for leaf in ("weight", "bias")
        },
    }
    state = {theirs: ours[name] for theirs, name in pairs.items()}
    for n in range(layers):
        block = f"vit.encoder.layer.{n}."
        for leaf in ("weight", "bias"):
            for name, theirs in _TIMM.items():
                state[f"blocks.{n}.{theirs}.{leaf}"] = ours[f"{block}{name}.{leaf}"]
            parts = [f"{block}attention.attention.{p}.{leaf}" for p in ("query", "key", "value")]
            state[f"blocks.{n}.attn.qkv.{leaf}"] = torch.cat([ours[part] for part in parts])
    return state


class Classifiers:
    """Contenders that train one ViT to classify one batch, of ``more`` times the usual rows."""

    def __init__(self, settings: Settings, more: int = 1) -> None:
        self.settings = settings
        shape = SHAPES["tiny" if settings.tiny else settings.device.type]
        self.shape = shape = replace(shape, rows=more * shape.rows)
        self.dtype, self.within, self.type_name = arithmetic(settings)
        first = shape.model(head="image-classification", labels=CLASSES)
        self.tensors = {name: tensor.clone() for name, tensor in first.disk_state().items()}
        self.folder = tempfile.TemporaryDirectory()
        first.save(self.folder.name)
        rng = np.random.default_rng(0)
        side = (3, shape.image, shape.image)
        self.rows = [
            {
                "pixel_values": rng.standard_normal(side, np.float32),
                "labels": np.asarray(k % CLASSES),
            }
            for k in range(shape.rows)
        ]
        self.pixels = torch.from_numpy(np.stack([row["pixel_values"] for row in self.rows]))
        self.pixels = self.pixels.to(settings.device)
        self.labels = (torch.arange(shape.rows) % CLASSES).to(settings.device)

    def made(self, stepper: Stepper) -> Made:
        work = stepper.check(self.shape.rows)
        return timed(stepper.all, self.settings), work

    def ours(self, *, compiled: bool = False) -> Made:
        model = self.shape.model(head="image-classification", labels=CLASSES)
        model.load_disk_state(self.tensors)
        if compiled:
            model.backbone.compile_blocks(**self.settings.compiler)
        objective = build_objective("ImageClassification", {"crop": 1.0}, model)
        objective = objective.to(self.settings.device).train()
        batch = objective.collate(self.rows, row_rngs(0, "collate", 0, len(self.rows)))
        return self.made(our_stepper(objective, [batch], self.dtype, self.settings.device))

    def timm(self, *, compiled: bool = False) -> Made:
        from timm.models.vision_transformer import VisionTransformer

        shape = self.shape
        net = VisionTransformer(
            img_size=shape.image, patch_size=shape.patch, embed_dim=shape.width,
            depth=shape.layers, num_heads=shape.heads, num_classes=CLASSES,
        )  # fmt: skip
        net.load_state_dict(timm_names(self.tensors, shape.layers))
        net.to(self.settings.device).train()
        if compiled:
            net.compile(**self.settings.compiler)
        return self.step(net, lambda _: F.cross_entropy(net(self.pixels).float(), self.labels))

    def transformers(self) -> Made:
        import transformers

        net = transformers.ViTForImageClassification.from_pretrained(
            self.folder.name, attn_implementation="sdpa", dtype=torch.float32
        )
        net.to(self.settings.device).train()
        loss = lambda _: F.cross_entropy(net(self.pixels).logits.float(), self.labels)  # noqa: E731
        return self.step(net, loss)

    def step(self, module: Any, loss: Callable[[Any], Tensor]) -> Made:
        return self.made(Stepper(module, loss, [[None]], self.dtype, self.settings.device))


def masked(settings: Settings, shape: Shape, ratio: float, decoder: int) -> Made:
    """Steps of MAE that hide ``ratio`` of the patches; the encoder computes the others."""
    model = shape.model("vit_mae", decoder_num_layers=decoder, mask_ratio=ratio)
    objective = build_objective("MaskedImage", {"crop": 1.0}, model).to(settings.device).train()
    rng = np.random.default_rng(0)
    side = (3, shape.image, shape.image)
    rows = [{"pixel_values": rng.standard_normal(side, np.float32)} for _ in range(shape.rows)]
    batch = objective.collate(rows, row_rngs(0, "collate", 0, shape.rows))
    stepper = our_stepper(objective, [batch], arithmetic(settings)[0], settings.device)
    return timed(stepper.all, settings), stepper.check(shape.rows, least=1)


def images(settings: Settings) -> list[Callable[[], Case]]:
    """Row 13: ViT-S/16 eager, and MAE beside an encoder of all patches."""

    def classifier() -> Case:
        c = Classifiers(settings)
        cuda = settings.device.type == "cuda"
        contenders = [
            Contender("pretrain", "ours", c.ours),
            Contender("timm", "best", c.timm, "timm"),
            Contender("transformers, sdpa", "best", c.transformers, "transformers"),
        ]
        if cuda:
            compiled = functools.partial(c.ours, compiled=True)
            contenders += [
                Contender("pretrain, compiled blocks", "variant", compiled),
                Contender(
                    "timm, compiled", "best", functools.partial(c.timm, compiled=True), "timm"
                ),
            ]
        return Case(
            f"ViT {c.shape}, {c.type_name}, eager", f"{settings.unit} a step", contenders,
            {"best": 1.10}, c.within,
        )  # fmt: skip

    def autoencoder(more: int) -> Case:
        c = Classifiers(settings, more)
        # A ratio near zero hides one patch, so that there is a loss, and encodes all others.
        patches = (c.shape.image // c.shape.patch) ** 2
        whole = functools.partial(masked, settings, c.shape, 1.001 / patches, 1)
        visible = functools.partial(masked, settings, c.shape, 0.75, 1)
        return Case(
            f"MAE {c.shape}, {c.type_name}, one block of decoder, 3 of 4 patches hidden",
            f"{settings.unit} a step", [
                Contender("pretrain, visible patches", "ours", visible),
                Contender("pretrain, all patches but one", "default", unchecked(whole)),
                Contender("pretrain, a classifier of all patches", "default", unchecked(c.ours)),
            ],
            {"default": 3.0}, c.within,
        )  # fmt: skip

    # The optimizer costs the same for a quarter of the patches, and is a tenth of a step of few images.
    return [classifier, *(functools.partial(autoencoder, more) for more in (1, 4))]
