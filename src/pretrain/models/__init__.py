"""Families of models, one file each, and the one function that builds them by name.

``FAMILIES`` is data, resolved on demand; a class of your own is named by its path, ``"package.module:Class"``.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from pretrain.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pretrain.models.backbone import Backbone
    from pretrain.models.base import Model

__all__ = ["FAMILIES", "build", "family_class"]

FAMILIES = {
    "gpt2": "pretrain.models.gpt2:GPT2",
    "llama": "pretrain.models.llama:Llama",
    "mistral": "pretrain.models.llama:Mistral",
    "qwen2": "pretrain.models.qwen:Qwen2",
    "qwen3": "pretrain.models.qwen:Qwen3",
    "bert": "pretrain.models.bert:Bert",
    "roberta": "pretrain.models.bert:Roberta",
    "modernbert": "pretrain.models.modernbert:ModernBert",
}


def family_class(family: str, *, path_allowed: bool = True) -> type[Backbone]:
    """The backbone class of a family.

    Args:
        family: a key of ``FAMILIES``, or ``"package.module:Class"``.
        path_allowed: False where the name comes from a file, which must never choose code.

    Raises:
        ConfigError: there is no such family, or the path names no backbone.
    """
    from pretrain.models.backbone import Backbone

    path = FAMILIES.get(family, family if path_allowed else "")
    module, _, name = path.partition(":")
    if not name:
        raise ConfigError(f"There is no model family {family!r}." + did_you_mean(family, FAMILIES))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"The model family {family!r} cannot be imported: {error}.") from error
    if not (inspect.isclass(found) and issubclass(found, Backbone)):
        raise ConfigError(
            f"The model family {family!r} is not a subclass of pretrain.models.base.Backbone."
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
        size: a key of ``pretrain.models.config.SIZES``; without one the family's defaults hold.
        head: one of ``HEAD_KINDS``, None for the backbone alone; ``"auto"`` is the family's language-model head.
        seed: of the initial weights.
        tokenizer: kept beside the model; sets ``vocab_size`` and the special ids where they are not overridden.
        labels: class names of a classification head, or their number.
        device: where its weights are made; on ``"meta"`` they take no memory until a trainer has shared them out.
        **overrides: fields of the family's config.

    Raises:
        ConfigError: an unknown family, size or field, or impossible sizes.
        ModelError: the family has no such head.
    """
    from pretrain.models.base import Model

    cls = family_class(family)
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
        head = "causal-lm" if cls.causal else "masked-lm"
    model = Model.build(cls, config, head=head, labels=labels, tokenizer=tokenizer)
    if device != "meta":
        return model.materialize(seed, device)
    model.start = lambda shared: shared.init_weights(seed)
    return model
