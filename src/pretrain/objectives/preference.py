"""Preference learning by direct preference optimisation (DPO, arXiv 2305.18290).

The reward of an answer is beta times the log-ratio of its probabilities under the model and under the reference model,
which is the model before training. Reference probabilities do not change, so they are computed once
(``prepare_reference``) and no second model is kept. With label smoothing it is the conservative loss of Mitchell (2023,
"A note on DPO with noisy preferences").

Letters: N pairs, M targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.chat import TOOLS, Message, as_messages, as_tools, content_text, typed_specials
from pretrain.data.chat_spans import SpansNotFound, readable
from pretrain.data.labelled import Role
from pretrain.data.tables import shortened
from pretrain.data.task_rows import TaskRows
from pretrain.errors import ConfigError, DataError
from pretrain.objectives.base import Batch, Example, ExampleList, Loss, Rngs
from pretrain.objectives.instruction import (
    TYPED,
    encode_conversation,
    note_unread,
    settled_template,
    shown_shifted,
    store_chat_template,
    token_batch,
)
from pretrain.objectives.likelihood import target_log_probs
from pretrain.objectives.tasks import Task

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.models.base import Model

__all__ = ["Preference"]

_REFERENCE = ("ref_chosen", "ref_rejected")


class Preference(Task):
    """Make chosen answers more probable than rejected ones.

    Args:
        model: a causal model with a language-model head. The chat template is stored in its tokenizer.
        beta: strength of the penalty on deviation from the reference model.
        label_smoothing: assumed share of wrong preferences.
        chat_template: Jinja template that replaces the tokenizer's own; of a run also the path of a file with one.
        max_length: maximum tokens of a prompt with its answer; pairs with a longer one are dropped.
        pack: see ``Task``.

    Raises:
        ConfigError: an option is out of range.
    """

    name: ClassVar[str] = "preference"
    roles: ClassVar[tuple[Role, ...]] = (
        Role(
            "prompt", ("prompt", "question", "instruction", "input", "query"), False,
            "a text, or messages; may be the common beginning of the two conversations",
        ),
        Role("chosen", ("chosen", "preferred", "accepted"), help="the better answer"),
        Role("rejected", ("rejected", "dispreferred"), help="the worse answer"),
        TOOLS,
    )  # fmt: skip
    metric: str = "loss"
    head_kind: ClassVar[str | None] = "causal-lm"
    figures: ClassVar[tuple[str, ...] | None] = ("loss", "accuracy", "margin")
    recorded: ClassVar[tuple[str, ...]] = ("beta", "label_smoothing")

    @classmethod
    def settled(cls, options: dict[str, Any]) -> dict[str, Any]:
        return settled_template(options)

    def __init__(
        self,
        model: Model,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        chat_template: str | None = None,
        max_length: int | None = None,
        pack: bool = True,
    ) -> None:
        super().__init__(model, max_length=max_length, pack=pack)
        if not (math.isfinite(beta) and beta > 0):
            raise ConfigError(f"beta is {beta}; it must be a positive number.")
        if not 0.0 <= label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {label_smoothing}; it must lie in [0, 0.5).")
        self.beta, self.label_smoothing = beta, label_smoothing
        self.template = store_chat_template(model, chat_template)

    def encode(self, table: Table, *, targets: bool = True) -> TaskRows:
        """Encode the prompt with either answer; the targets are the tokens of the last turn, its end included."""
        rows = TaskRows()
        for i, row in enumerate(table.rows()):
            where = table.where(i)
            tools = as_tools(row.get("tools"), where)
            both = [_conversation(row, side, where) for side in ("chosen", "rejected")]
            if typed_specials([both, tools or ()], self.template.specials) is not None:
                rows.drop(i, TYPED)
                continue
            if both[0] == both[1]:
                rows.drop(i, "both answers are the same")
                continue
            both = [readable(self.template, messages, tools) for messages in both]
            if not note_unread(rows, i, self.template, both[0], tools):
                continue
            try:
                sides = [
                    encode_conversation(
                        self.model, self.template, m, last_only=True, where=where, tools=tools
                    )
                    for m in both
                ]
            except SpansNotFound as error:
                rows.drop(i, error.reason)
                continue
            if not all((labels >= 0).any() for _, labels in sides):
                rows.drop(i, "no token to learn")
                continue
            if max(len(ids) for ids, _ in sides) > self.max_length:
                rows.cut.append(i)
                rows.drop(i, "an answer does not fit")
                continue
            rows.add(
                i,
                {
                    "input_ids": np.concatenate([ids for ids, _ in sides]),
                    "labels": np.concatenate([labels for _, labels in sides]),
                    "lengths": np.asarray([len(ids) for ids, _ in sides], dtype=np.int64),
                },
            )
        return rows

    def show(self, example: Example) -> list[tuple[str, bool]]:
        return shown_shifted(super().show(example))

    def collate(self, examples: ExampleList, rngs: Rngs, *, evaluation: bool = False) -> Batch:
        """Pack two documents per example, chosen before rejected; ``owner`` (M,) is the document of each target."""
        pieces = []
        for example in examples:
            middle = int(example["lengths"][0])
            for part in (slice(0, middle), slice(middle, None)):
                pieces.append({key: example[key][part] for key in ("input_ids", "labels")})
        batch = token_batch(self, pieces)
        order = torch.argsort(batch["first_index"])  # documents in the order of their positions
        place = torch.searchsorted(batch["first_index"][order], batch["target_index"], right=True)
        batch["owner"] = order[place - 1]
        for key in _REFERENCE:
            if all(key in example for example in examples):
                values = np.asarray([float(example[key]) for example in examples], dtype=np.float32)
                batch[key] = torch.from_numpy(values)
        return batch

    def count(self, batch: Batch) -> Tensor:
        """Number of pairs."""
        return torch.tensor(len(batch["first_index"]) // 2, device=batch["input_ids"].device)

    def log_probs(self, batch: Batch) -> Tensor:
        """Log-probability of each answer given its prompt, summed over its tokens, (N, 2): chosen, rejected."""
        keys = ("input_ids", "document_ids", "position_ids", "labels", "target_index")
        each = target_log_probs(self.model, {key: batch[key] for key in keys if key in batch})
        sums = each.new_zeros(len(batch["first_index"])).index_add(0, batch["owner"], each)
        return sums.view(-1, 2)

    def forward(self, batch: Batch) -> Loss:
        if any(key not in batch for key in _REFERENCE):
            raise DataError(
                "These pairs have no log-probabilities of the model before training. Call prepare_reference(rows) on "
                "the training rows and on the held-out rows before the first step."
            )
        before = torch.stack([batch[key] for key in _REFERENCE], dim=-1)
        rewards = self.beta * (self.log_probs(batch) - before)  # (N, 2)
        margin = rewards[:, 0] - rewards[:, 1]
        smooth = self.label_smoothing
        each = -(1 - smooth) * F.logsigmoid(margin) - smooth * F.logsigmoid(-margin)
        found = margin.detach()
        metrics: dict[str, Any] = {"accuracy": (found > 0).sum(), "margin": found.sum()}
        return Loss(each.sum(), self.count(batch), metrics)

    def expected_first_loss(self) -> float | None:
        """The value is ln 2, because the model equals the reference at the first step."""
        return math.log(2)

    @torch.no_grad()
    def prepare_reference(self, rows: TaskRows, batch_rows: int = 8) -> None:
        """Add the current log-probabilities of the answers to the examples: ``ref_chosen``, ``ref_rejected``, in nats.

        Call it before the first step, on the rows for training and on those for evaluation. A resumed run computes
        the same numbers again from its initial weights.

        Args:
            rows: rows from ``encode``.
            batch_rows: pairs in one forward pass.
        """
        was_training = self.training
        self.eval()
        try:
            for chosen, batch in self.batches(rows, batch_rows):
                log_probs = self.log_probs(batch).float().cpu().numpy()
                for i, pair in zip(chosen, log_probs, strict=True):
                    for key, value in zip(_REFERENCE, pair, strict=True):
                        rows.examples[i][key] = np.asarray(value, dtype=np.float32)
        finally:
            self.train(was_training)

    def outputs(self, batch: Batch) -> list[Any]:
        return list(self.log_probs(batch).cpu().numpy())

    def decode(self, outputs: Sequence[Any], infos: Sequence[Any]) -> dict[str, Any]:
        """Return ``logprob_chosen``, ``logprob_rejected`` in nats, and ``margin``, their difference."""
        chosen, rejected = (float(value) for value in outputs[0])
        return {"logprob_chosen": chosen, "logprob_rejected": rejected, "margin": chosen - rejected}

    def head_weights(self) -> int:
        head: Any = self.model.head
        return self._numel([head.weight()])


def _conversation(row: Mapping[str, Any], side: str, where: str) -> list[Message]:
    """The prompt and one of the answers, as messages of which the last is the assistant's.

    An answer of messages that holds all turns of the prompt is the whole conversation; any other continues it.

    Raises:
        DataError: a side is neither a text nor messages, there is no prompt, or it ends with a question and is none of
            the turns of a conversation that begins with another one.
    """
    prompt, answer = row.get("prompt"), row[side]
    start: list[Message] = []
    if isinstance(prompt, str):
        start = [{"role": "user", "content": prompt}]
    elif prompt is not None:
        start = as_messages(prompt, where)
    if isinstance(answer, str):
        end: list[Message] = [{"role": "assistant", "content": answer}]
    else:
        end = as_messages(answer, f"{where}, {side}")
        spoken = [*map(_spoken, end), ("user", "")]
        asks = any(turn["role"] == "user" for turn in end)
        if all(_spoken(turn) in spoken for turn in start):
            start = []
        elif start[-1]["role"] == "user" and asks and end[0]["role"] != "assistant":
            raise DataError(
                f"{where}: {side} is a conversation of its own, of which not every turn of the prompt "
                f"{shortened(prompt)} is one, so it would have two questions. Give whole conversations with the same "
                "prompt in them or without the column of prompts, or give the answers alone."
            )
    messages = start + end
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: {side} does not end in an answer of the assistant to a prompt. Give prompt, chosen and rejected "
            "as texts, or chosen and rejected as whole conversations."
        )
    return messages


def _spoken(turn: Message) -> tuple[str, Any]:
    """The role and the content of a turn, whatever its white space, its parts and other keys."""
    content = content_text(turn["content"])
    return turn["role"], " ".join(content.split()) if isinstance(content, str) else content
