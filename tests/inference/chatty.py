"""A tiny model that answers conversations, and that says what a test tells it to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.inference import generate as generation
from pretrain.models import build
from pretrain.models.base import Model

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> Tokenizer:
    """Bytes, so that ids are easy to count; the template costs some for the name of the role."""
    made = train_from_texts(["a b"], "bpe", vocab_size=262)
    made.chat_template = TEMPLATE
    return made


def talker(positions: int = 256) -> Model:
    """A model with random weights and a chat template."""
    return build(
        "gpt2", None, tokenizer=tokenizer(), num_layers=1, hidden_size=8, num_heads=1,
        intermediate_size=8, max_positions=positions,
    )  # fmt: skip


def say(patch: pytest.MonkeyPatch, *answers: str, before: Any = None) -> list[list[int]]:
    """Let every model give these answers, one after another, and then the last one again.

    Args:
        patch: undoes it.
        answers: texts; the end-of-text token follows each of them.
        before: called before every token.

    Returns:
        The prompts that were read, as they come.
    """
    asked: list[list[int]] = []
    spoken = tokenizer()
    scripts = [[*spoken.encode(text), spoken.eos_id] for text in answers]

    def scores(self: Any, *_: Any) -> torch.Tensor:
        if before is not None:
            before()
        if not hasattr(self, "script"):
            self.script = iter(scripts[min(len(asked), len(scripts) - 1)])
            asked.append(self.prompts[0])
        row = torch.zeros(1, self.model.backbone.vocab_size)
        row[0, next(self.script)] = 99.0
        return row

    patch.setattr(generation._Decoder, "_scores", scores)
    return asked


def texts(asked: list[list[int]]) -> list[str]:
    """The prompts as texts."""
    return [tokenizer().decode(ids, skip_special=False) for ids in asked]
