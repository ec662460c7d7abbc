"""Masked-language modelling: hide some tokens, predict them from both sides (BERT, arXiv 1810.04805).

The rate is 30 % by default, as in MosaicBERT and ModernBERT (the case for more than 15 % is made in arXiv
2202.08005); evaluation is always at the conventional 15 % and always with the same masks, so that figures of
different runs can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from pretrain.errors import ConfigError, ModelError, TokenizerError
from pretrain.nn.loss import IGNORE
from pretrain.objectives.base import Batch, Example, TokenObjective, drop_plain_documents, stack

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["MaskedLM"]


class MaskedLM(TokenObjective):
    """Predict hidden tokens.

    Args:
        model: a bidirectional model with a masked-LM head and a tokenizer that has a mask token.
        rate: share of the maskable tokens of a row that become targets while training.
        eval_rate: the same while evaluating.
        mask_share: share of the targets that are replaced by the mask token.
        random_share: share of the targets that are replaced by a random ordinary token; the rest stay.
        whole_word: choose whole words; each of their pieces is still predicted alone.

    Raises:
        ConfigError: a rate or share lies outside its range.
        ModelError: the model is causal or has no masked-LM head.
        TokenizerError: the tokenizer has no mask token.
    """

    head_kind: ClassVar[str | None] = "masked-lm"

    def __init__(
        self,
        model: Model,
        rate: float = 0.3,
        eval_rate: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        whole_word: bool = False,
    ) -> None:
        super().__init__(model)
        for name, value in (("rate", rate), ("eval_rate", eval_rate)):
            if not 0 < value < 1:
                raise ConfigError(
                    f"MaskedLM.{name} is {value}; it is a share of tokens, between 0 and 1."
                )
        if min(mask_share, random_share) < 0 or mask_share + random_share > 1:
            raise ConfigError(
                f"MaskedLM: mask_share {mask_share} and random_share {random_share} must be >= 0 and sum to <= 1."
            )
        if model.head_kind != "masked-lm":
            raise ModelError(
                f"MaskedLM needs a bidirectional model with a masked-LM head; this "
                f"{model.backbone.model_type} model has the head {model.head_kind!r}. Train it with NextToken, "
                "or build an encoder family (bert, roberta, modernbert)."
            )
        tokenizer: Any = model.tokenizer
        if tokenizer is None or tokenizer.mask_id is None:
            raise TokenizerError(
                "MaskedLM needs a tokenizer with a mask token, and this model has none. Prepare the data with "
                "pretrain's own tokenizer, or add a mask token to yours."
            )
        self.rate, self.eval_rate = rate, eval_rate
        self.mask_share, self.random_share, self.whole_word = mask_share, random_share, whole_word
        self._mask_id = int(tokenizer.mask_id)
        # Rows of the embedding beyond the tokenizer are padding: never a target, never a replacement.
        ordinary = np.zeros(max(len(tokenizer), model.backbone.vocab_size), dtype=bool)
        ordinary[: len(tokenizer)] = True
        ordinary[sorted(tokenizer.special_ids)] = False
        self._maskable = ordinary
        self._ordinary_ids = np.flatnonzero(ordinary)
        self._continues = np.asarray(tokenizer.continues, dtype=bool) if whole_word else None

    def collate(
        self,
        examples: Sequence[Example],
        rngs: Sequence[np.random.Generator],
        *,
        evaluation: bool = False,
    ) -> Batch:
        """Hide tokens of each row with the row's own generator; special tokens and padding are never targets."""
        batch = stack(
            examples,
            ("input_ids", "document_ids", "position_ids", "attention_mask", "token_type_ids"),
        )
        ids = batch["input_ids"].numpy()  # (B, T), a copy made by stacking
        documents = batch.get("document_ids", batch.get("attention_mask"))
        real = np.ones(ids.shape, dtype=bool) if documents is None else documents.numpy() != 0
        labels = np.full(ids.shape, IGNORE, dtype=np.int64)
        rate = self.eval_rate if evaluation else self.rate
        for row, rng in enumerate(rngs):
            chosen = self._choose(ids[row], real[row], rate, rng)
            labels[row, chosen] = ids[row, chosen]
            ids[row, chosen] = self._corrupt(ids[row, chosen], rng)
        batch["labels"] = torch.from_numpy(labels)
        batch["target_index"] = torch.from_numpy(np.flatnonzero(labels.reshape(-1) != IGNORE))
        return drop_plain_documents(batch)

    def _choose(
        self, ids: np.ndarray, real: np.ndarray, rate: float, rng: np.random.Generator
    ) -> np.ndarray:
        """Positions of the targets of one row, (T,) -> (n,)."""
        candidates = np.flatnonzero(
            self._maskable[np.clip(ids, 0, len(self._maskable) - 1)] & (ids >= 0) & real
        )
        if candidates.size == 0:
            return candidates
        wanted = max(1, round(rate * candidates.size))
        if self._continues is None:
            return np.sort(rng.choice(candidates, wanted, replace=False))
        # A word starts where a piece does not continue the piece right before it.
        follows = np.zeros(candidates.size, dtype=bool)
        follows[1:] = np.diff(candidates) == 1
        word = np.cumsum(~(follows & self._continues[ids[candidates]])) - 1
        sizes = np.bincount(word)
        order = rng.permutation(sizes.size)
        # Words are taken while they fit, the first one always.
        taken = order[np.maximum(np.cumsum(sizes[order]) <= wanted, np.arange(order.size) == 0)]
        return candidates[np.isin(word, taken)]

    def _corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Replace target ids by the mask token, a random ordinary token, or themselves, (n,) -> (n,)."""
        draw = rng.random(ids.size)
        noise = self._ordinary_ids[rng.integers(self._ordinary_ids.size, size=ids.size)]
        random_end = self.mask_share + self.random_share
        return np.where(
            draw < self.mask_share, self._mask_id, np.where(draw < random_end, noise, ids)
        )

    def preview(self, examples: Sequence[Example], prompt: str, seed: int) -> list[str]:
        """Show masked words of a held-out row with the guess and the truth."""
        model: Any = self.model
        rng = np.random.Generator(np.random.Philox(seed))
        batch = self.collate(examples[:1], [rng], evaluation=True)
        device = next(model.parameters()).device
        inputs = {k: v.to(device) for k, v in batch.items() if k not in ("labels", "target_index")}
        training = model.training
        model.eval()
        with torch.inference_mode():
            guesses = model(inputs)[0].argmax(-1).cpu()  # (T,)
        model.train(training)
        ids, labels, lines = batch["input_ids"][0], batch["labels"][0], []
        for position in batch["target_index"][:5].tolist():
            left = model.tokenizer.decode(ids[max(0, position - 8) : position].tolist())
            right = model.tokenizer.decode(ids[position + 1 : position + 6].tolist())
            guess = model.tokenizer.decode([int(guesses[position])])
            truth = model.tokenizer.decode([int(labels[position])])
            lines.append(f"{left} [{guess.strip()} | {truth.strip()}] {right}".replace("\n", " "))
        return lines

    def describe(self) -> dict[str, Any]:
        """Name and masking rates."""
        return {
            "name": "MaskedLM",
            "rate": self.rate,
            "eval_rate": self.eval_rate,
            "mask_share": self.mask_share,
            "random_share": self.random_share,
            "whole_word": self.whole_word,
        }
