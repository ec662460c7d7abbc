"""Next-token prediction: the causal language-model loss of GPT (Radford et al., 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pretrain.errors import ModelError
from pretrain.nn.loss import IGNORE
from pretrain.objectives.base import (
    Batch,
    ExampleList,
    Rngs,
    TokenObjective,
    drop_plain_documents,
    stack,
    target_places,
)
from pretrain.utils.run_log import NATS

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["NextToken"]


class NextToken(TokenObjective):
    """Predict every token from those before it in the same document.

    Args:
        model: a causal model with a language-model head.

    Raises:
        ModelError: the model's attention is bidirectional, or it has no vocabulary head.
    """

    head_kind: ClassVar[str | None] = "causal-lm"
    figures: ClassVar[tuple[str, ...] | None] = ("loss", "accuracy", "perplexity", "bits_per_byte")

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        if model.head_kind != "causal-lm":
            raise ModelError(
                f"NextToken needs a causal model with a language-model head; this {model.backbone.model_type} "
                f"model has the head {model.head_kind!r}. Train it with MaskedLM, or build a causal family "
                "(gpt2, llama, mistral, qwen2, qwen3)."
            )

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Collate rows of token ids; ``labels[:, t]`` is the token that follows position t.

        The last token of a document has no target, because its successor belongs to another document. Rows may bring
        ``labels`` as transformers has them, in the places of the tokens themselves: -100 is no target.
        """
        keys = ("input_ids", "document_ids", "position_ids", "attention_mask", "labels")
        batch = stack(examples, keys)
        ids = batch["input_ids"]  # (B, T)
        tokens = batch.get("labels", ids)
        documents = batch.get("document_ids", batch.get("attention_mask"))
        if documents is None:
            documents = torch.ones_like(ids)
        labels = torch.full_like(ids, IGNORE)
        inside = (documents[:, :-1] == documents[:, 1:]) & (documents[:, :-1] != 0)
        labels[:, :-1] = torch.where(inside, tokens[:, 1:], labels[:, :-1])
        batch["labels"] = labels
        batch["target_index"] = target_places(labels)
        return drop_plain_documents(batch)

    def summarize(
        self, total: float, count: float, metrics: Mapping[str, float], stats: Mapping[str, float]
    ) -> dict[str, float]:
        """Add bits per byte, which compares models with different tokenizers."""
        figures = super().summarize(total, count, metrics, stats)
        if self.loss_unit == NATS and "targets_per_byte" in stats:
            figures["bits_per_byte"] = figures["loss"] / math.log(2) * stats["targets_per_byte"]
        return figures

    def preview(self, examples: ExampleList, prompt: str, seed: int) -> list[str]:
        """Continue the prompt, or the first tokens of a held-out row."""
        model: Any = self.model
        if model.tokenizer is None:
            return []
        special = model.tokenizer.special_ids
        if not prompt:
            start = [int(i) for i in examples[0]["input_ids"][:12]]
            prompt = model.tokenizer.decode([i for i in start if i not in special])
        room = (
            model.backbone.max_length - len(model.tokenizer.encode(prompt)) - 2
        )  # the prompt may get two special tokens
        if not prompt or room < 1:
            return []
        text = model.generate(
            prompt, max_new_tokens=min(48, room), temperature=0.8, top_k=50, seed=seed
        )
        return [str(text)]
