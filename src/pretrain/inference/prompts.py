"""Input preparation for inference: encoding of prompts and texts, padding, checks, and evaluation mode.

Letters: B prompts, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pretrain.errors import ModelError

if TYPE_CHECKING:
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.models.base import Model

__all__ = [
    "Prompts",
    "as_texts",
    "check_finite",
    "check_ids",
    "evaluating",
    "fill_id",
    "hidden_states",
    "pad",
    "tokenizer_of",
]


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # dtypes of ids


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[torch.device]:
    """Disable dropout and gradients, yield the device, and restore every module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield model.device
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass
class Prompts:
    """Prompts as ids, and the form in which the answer is returned.

    Attributes:
        ids: one list per prompt.
        texts: the prompts if they were texts, or None.
        form: ``one`` text or list of ids, ``many`` of them, a ``row`` (T,) or a ``tensor`` (B, T).
    """

    ids: list[list[int]]
    texts: list[str] | None
    form: Literal["one", "many", "row", "tensor"]

    @classmethod
    def read(cls, model: Model, prompts: Any) -> Prompts:
        """Convert prompts of any accepted form.

        Raises:
            ModelError: another form, or texts without a tokenizer.
        """
        if isinstance(prompts, str):
            tokenizer = tokenizer_of(model, "read text")
            return cls(tokenizer.frame_prompts([prompts]), [prompts], "one")
        if isinstance(prompts, Tensor):
            if prompts.ndim not in (1, 2) or prompts.dtype not in _WHOLE:
                raise ModelError(
                    f"Prompts must be ids of shape (T,) or (B, T), not {tuple(prompts.shape)} {prompts.dtype}."
                )
            rows = prompts.tolist()
            return cls([rows], None, "row") if prompts.ndim == 1 else cls(rows, None, "tensor")
        listed = isinstance(prompts, Iterable) and not isinstance(prompts, bytes | bytearray)
        items = list(prompts) if listed else []
        if items and all(isinstance(item, str) for item in items):
            return cls(tokenizer_of(model, "read text").frame_prompts(items), items, "many")
        if items and all(type(item) is int for item in items):
            return cls([items], None, "one")
        lists = [_id_list(item) for item in items]
        ids = [row for row in lists if row is not None]
        if items and len(ids) == len(items):
            return cls(ids, None, "many")
        raise ModelError(
            "Prompts must be a text, a list of texts, a list of ids (whole numbers), a list of such lists, or a "
            f"tensor of ids; found {type(prompts).__name__} {repr(prompts)[:60]}."
        )


def _id_list(row: Any) -> list[int] | None:
    """Return a list of ids, or None if it is not one: strings and fractions must not be taken as tokens."""
    if isinstance(row, Tensor):
        return [int(i) for i in row.tolist()] if row.ndim == 1 and row.dtype in _WHOLE else None
    if not isinstance(row, Sequence) or isinstance(row, str | bytes | bytearray):
        return None
    return list(row) if all(type(i) is int for i in row) else None


def as_texts(texts: Any) -> list[str]:
    """Return one text or several as a list.

    Raises:
        ModelError: an item is not a text.
    """
    if isinstance(texts, str):
        return [texts]
    found: list[Any] = list(texts) if isinstance(texts, Iterable) else [None]
    if not all(isinstance(text, str) for text in found):
        raise ModelError(
            f"A text or a list of texts is needed; found {type(texts).__name__} {repr(texts)[:60]}."
        )
    return found


def tokenizer_of(model: Model, purpose: str) -> Tokenizer:
    """Return the model's tokenizer.

    Raises:
        ModelError: it has none; the message names the ``purpose`` that needs it.
    """
    if model.tokenizer is None:
        cure = "Give ids, or set model.tokenizer."
        if model.processor is not None:
            probe = ", and pretrain.probe for what its vectors tell" * hasattr(
                model.processor, "channels"
            )
            cure = f"It reads no texts: see predict{probe}."
        raise ModelError(f"This model has no tokenizer, so it cannot {purpose}. {cure}")
    return model.tokenizer


def check_ids(model: Model, ids: list[list[int]], what: str = "Prompt") -> None:
    """Check that the model can read the rows.

    Raises:
        ModelError: a row without tokens, with ids outside the vocabulary, or longer than the model's positions.
    """
    size, room = model.backbone.vocab_size, model.backbone.max_length
    for i, row in enumerate(ids):
        if not row:
            raise ModelError(
                f"{what} {i} is empty, and the tokenizer has no token that begins a text. Give some text."
            )
        wrong = max(row) if max(row) >= size else min(row)
        if not 0 <= wrong < size:
            raise ModelError(
                f"{what} {i} holds the token id {wrong}, but the model has the ids 0 to {size - 1}. "
                "They come from another tokenizer."
            )
        if len(row) > room:
            raise ModelError(
                f"{what} {i} has {len(row)} tokens, but the model has {room} positions. Shorten it."
            )


def check_finite(values: Tensor) -> Tensor:
    """Return scores or vectors of a model as they are.

    Raises:
        ModelError: one of them is NaN or infinite.
    """
    if not bool(values.isfinite().all()):
        raise ModelError(
            "The model's scores are not finite: its weights are damaged, or the values overflow their data "
            "type. Copy the weights again, or load the model in float32."
        )
    return values


def fill_id(model: Model) -> int:
    """Return the id for padding; padding is masked, so any id works."""
    pad = None if model.tokenizer is None else model.tokenizer.pad_id
    return pad if pad is not None else next(iter(model.end_ids()), 0)


def pad(
    rows: list[list[int]], fill: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return rows as one tensor (B, T), and the mask of real tokens or None if all rows have the same length."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    real = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        real[i, where] = 1
    return ids.to(device), None if all(len(row) == width for row in rows) else real.to(device)


def hidden_states(
    model: Model, rows: list[list[int]], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return the last hidden states (B, T, D) of rows, padded on the right, and the mask of their real tokens."""
    ids, real = pad(rows, fill_id(model), device)
    masked = {} if real is None else {"attention_mask": real}
    hidden: Tensor = model.backbone({"input_ids": ids, **masked})
    return hidden, real
