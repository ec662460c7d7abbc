"""Creation of a model by the name of its family."""

from __future__ import annotations

from typing import Any

from pretrain.models import family_class
from pretrain.models.base import Model
from pretrain.models.config import placeholders
from pretrain.models.heads import pretraining_head

__all__ = ["build"]


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
        labels = placeholders(labels)
    if head == "auto":
        head = pretraining_head(cls.architectures, causal=cls.causal)
    model = Model.build(cls, config, head=head, labels=labels, tokenizer=tokenizer)
    if tokenizer is None:
        model.processor = cls.default_processor(config)
    if device != "meta":
        return model.materialize(seed, device)
    model.start = lambda shared: shared.init_weights(seed)
    return model
