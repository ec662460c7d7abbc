"""Registry of model families (one module each) and ``build``, which creates a model by family name.

``FAMILIES`` maps names to import paths, which are imported on first use. A class outside this package is named by its
path, ``"package.module:Class"``.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from pretrain.config.spelling import either
from pretrain.errors import ConfigError, did_you_mean
from pretrain.models.backbone import Backbone
from pretrain.utils.imports import import_named
from pretrain.utils.on_use import on_use

if TYPE_CHECKING:
    from pretrain.models.building import build

__all__ = ["FAMILIES", "build", "family_class", "own_family"]

__getattr__ = on_use(__name__, {"pretrain.models.building": ("build",)})

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
