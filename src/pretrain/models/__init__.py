"""Registry of model families (one module each) and ``build``, which creates a model by family name.

``FAMILIES`` maps names to import paths, which are imported on first use. A class outside this package is named by its
path, ``"package.module:Class"``.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from pretrain.config.spelling import either
from pretrain.errors import ConfigError, did_you_mean
from pretrain.utils.imports import import_named

if TYPE_CHECKING:
    from pretrain.models.backbone import Backbone
    from pretrain.models.base import Model

__all__ = ["FAMILIES", "build", "family_class", "own_family"]

FAMILIES = {
    "gpt2": "pretrain.models.gpt2:GPT2",
    "llama": "pretrain.models.llama:Llama",
    "mistral": "pretrain.models.llama:Mistral",
    "qwen2": "pretrain.models.qwen:Qwen2",
    "qwen3": "pretrain.models.qwen:Qwen3",
    "bert": "pretrain.models.bert:Bert",
    "roberta": "pretrain.models.bert:Roberta",
    "modernbert": "pretrain.models.modernbert:ModernBert",
    "vit": "pretrain.models.vit:ViT",
    "dinov2": "pretrain.models.dinov2:Dinov2",
    "dinov2_with_registers": "pretrain.models.dinov2:Dinov2WithRegisters",
    "clip": "pretrain.models.clip:CLIP",
    "siglip": "pretrain.models.siglip:Siglip",
    "git": "pretrain.models.git:Git",
    "resnet": "pretrain.models.resnet:ResNet",
    "alexnet": "pretrain.models.alexnet:AlexNet",
    "vit_mae": "pretrain.models.vit_mae:ViTMAE",
    "audio-spectrogram-transformer": "pretrain.models.audio_spectrogram_transformer:AST",
}


# model_type -> class of the families that the caller of this process has named: files with that model_type open as it.
_OWN: dict[str, type[Backbone]] = {}


def family_class(family: str | type[Backbone], *, path_allowed: bool = True) -> type[Backbone]:
    """Return the backbone class of a family.

    An own class becomes known to this process: directories whose config.json has its ``model_type`` open as that class.

    Args:
        family: a key of ``FAMILIES``, ``"package.module:Class"``, or a class.
        path_allowed: False if the name comes from a file, because a file must never select code to import.

    Raises:
        ConfigError: there is no such family, or the path does not name a backbone.
    """
    from pretrain.models.backbone import Backbone

    if isinstance(family, str):
        if family in _OWN:
            return _OWN[family]
        path = FAMILIES.get(family, family if path_allowed else "")
        if ":" not in path:
            raise ConfigError(
                f"There is no model family {family!r}."
                + did_you_mean(family, FAMILIES)
                + " A family of your own is named by its class: "
                + either("--family package.module:Class.", 'family="package.module:Class".')
            )
        found = import_named(path, "model.family")
    else:
        found = family
    if not (inspect.isclass(found) and issubclass(found, Backbone)):
        raise ConfigError(
            f"The model family {family!r} is not a subclass of pretrain.models.backbone.Backbone."
        )
    if found.model_type not in FAMILIES:
        _OWN[found.model_type] = found
    return found


def own_family(family: str | type[Backbone]) -> type[Backbone]:
    """Register a family of the caller, so that its directories can be opened; see `family_class`.

    Raises:
        ConfigError: as `family_class`, or its ``model_type`` is that of another family.
    """
    found = family_class(family)
    usual = FAMILIES.get(found.model_type)
    if usual is not None and usual != f"{found.__module__}:{found.__qualname__}":
        raise ConfigError(
            f"{found.__name__} has the model_type {found.model_type!r} of {usual.partition(':')[2]}: a config.json "
            f"cannot tell them apart. Give the class a model_type of its own, and save the model again."
        )
    return found


def build(
    family: str,
    size: str | None = None,
    *,
    head: str | None = "auto",
    seed: int = 0,
    tokenizer: Any = None,
    labels: Any = None,
    device: str = "cpu",
    **overrides: Any,
) -> Model:
    """Build and initialise a model.

    Args:
        family: a key of ``FAMILIES``, or ``"package.module:Class"`` of your own backbone.
        size: a key of ``pretrain.models.config.SIZES``; None uses the defaults of the family.
        head: one of ``HEAD_KINDS``, None for the backbone alone; ``"auto"`` is the one that the family is pre-trained
            with, or none if it has no such head.
        seed: seed of the initial weights.
        tokenizer: stored as ``model.tokenizer``; sets ``vocab_size`` and the special ids unless they are overridden.
        labels: class names of a classification head, or their number.
        device: device of the weights; on ``"meta"`` they take no memory until a trainer has sharded the model.
        **overrides: fields of the family's config.

    Raises:
        ConfigError: unknown family, size or field, or inconsistent sizes.
        ModelError: the family has no such head.
    """
    from pretrain.models.base import Model
    from pretrain.models.heads import pretraining_head

    cls = family_class(family)
    if head is not None and head in cls.successors:
        cls = family_class(cls.successors[head])
    if tokenizer is not None:
        known = {"vocab_size": len(tokenizer)}
        known |= {
            k: v
            for k in ("pad_id", "bos_id", "eos_id")
            if (v := getattr(tokenizer, k, None)) is not None
        }
        overrides = {**known, **overrides}
    config = cls.config_class.from_size(size, **overrides)
    if isinstance(labels, int):
        labels = tuple(f"LABEL_{i}" for i in range(labels))
    if head == "auto":
        head = pretraining_head(cls.architectures, causal=cls.causal)
    model = Model.build(cls, config, head=head, labels=labels, tokenizer=tokenizer)
    if tokenizer is None:
        model.processor = cls.default_processor(config)
    if device != "meta":
        return model.materialize(seed, device)
    model.start = lambda shared: shared.init_weights(seed)
    return model
