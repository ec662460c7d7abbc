"""Registry of model families (one module each) and ``build``, which creates a model by family name.

``FAMILIES`` maps names to import paths, which are imported on first use. A class outside this package is named by its
path, ``"package.module:Class"``.
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
    """Return the backbone class of a family.

    Args:
        family: a key of ``FAMILIES``, or ``"package.module:Class"``.
        path_allowed: False if the name comes from a file, because a file must never select code to import.

    Raises:
        ConfigError: there is no such family, or the path does not name a backbone.
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
        size: a key of ``pretrain.models.config.SIZES``; None uses the defaults of the family.
        head: one of ``HEAD_KINDS``, None for the backbone alone; ``"auto"`` is the family's language-model head.
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
