"""The tokenizer in the metadata of a GGUF file: byte-level BPE with the splitting that llama.cpp is told by name.

llama.cpp does not read how a tokenizer splits texts before it merges; it has a list of named splittings. The name is
found by comparing what the tokenizer does to many texts with what each of the splittings does.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from pretrain.data.pretokenize import GPT2, gpt4
from pretrain.errors import TokenizerError
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.models.base import Model

__all__ = ["SPLITTINGS", "splitting_of", "tokenizer_fields"]

_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5  # types of tokens
# Name in llama.cpp -> the patterns, each applied to the pieces of the one before, and whether a piece that is a token
# is taken whole, without merges.
SPLITTINGS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((GPT2,), False),
    "smollm": ((r"\p{N}", GPT2), False),
    "qwen2": ((gpt4(r"\p{N}"),), False),
    "dbrx": ((gpt4(r"\p{N}{1,3}"),), False),
    "llama-bpe": ((gpt4(r"\p{N}{1,3}"),), True),
}
_PROBES = 1500
_PARTS = (
    "a", "B", "the", "Word", "é", "ß", "漢字", "かな", "한국", "ا", "न", "\u0301", "1", "23", "4567", "²", "Ⅷ", " ",
    "  ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u3000", "'", "'s", "'S", "'re", "'LL", "'d", "’s", ".", ",",
    "!?", "...", "-", "_", "(", '"', "#", "$", "€", "😀", "👩\u200d💻", "\u200b", "\\", "/", "<b>",
)  # fmt: skip


@cache
def _probes() -> tuple[str, ...]:
    draw = random.Random(0)
    return tuple("".join(draw.choices(_PARTS, k=draw.randint(1, 9))) for _ in range(_PROBES))


@cache
def _pieces(patterns: tuple[str, ...]) -> tuple[list[str], ...]:
    """Return the pieces of all probes, in the letters of byte-level BPE."""
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    chain = pre_tokenizers.Sequence([*splits, letters])
    return tuple(_split(chain, text) for text in _probes())


def _split(splitting: Any, text: str) -> list[str]:
    return [piece for piece, _ in splitting.pre_tokenize_str(text)]


def splitting_of(tokenizer: Tokenizer) -> str:
    """Return llama.cpp's name of the way in which a tokenizer splits texts.

    Raises:
        TokenizerError: it is no byte-level BPE, or splits as no entry of `SPLITTINGS`.
    """
    backend = tokenizer.backend
    model = json.loads(backend.to_str())["model"]
    if tokenizer.kind != "bpe" or backend.pre_tokenizer is None:
        raise TokenizerError(
            f"The export to GGUF needs a tokenizer of byte-level BPE, as `--tokenizer bpe` trains it, and that of this "
            f"model is {tokenizer.kind}."
        )
    odd = [
        key
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get(key)
    ]
    if odd:
        raise TokenizerError(
            f"llama.cpp has no byte-level BPE with {', '.join(odd)}, as this tokenizer has, so the model is not "
            "exported to GGUF."
        )
    found = [_split(backend.pre_tokenizer, text) for text in _probes()]
    whole = bool(model.get("ignore_merges"))
    for name, (patterns, takes_whole) in SPLITTINGS.items():
        if takes_whole == whole and list(_pieces(patterns)) == found:
            return name
    raise TokenizerError(
        f"This tokenizer splits texts in none of the ways of llama.cpp that are known here ({', '.join(SPLITTINGS)}), "
        "so the model would see other tokens there, and is not exported to GGUF."
    )


def _check_normalizer(tokenizer: Tokenizer) -> None:
    normalizer = tokenizer.backend.normalizer
    if normalizer is None:
        return
    if not isinstance(normalizer, normalizers.NFC):
        raise TokenizerError(
            f"This tokenizer changes texts before it splits them ({type(normalizer).__name__}), and llama.cpp does not "
            "for BPE, so the model is not exported to GGUF."
        )
    note(
        "llama.cpp does not compose letters and accents that are written apart (NFC), as this tokenizer does: such "
        "texts get other tokens there"
    )


def tokenizer_fields(model: Model) -> dict[str, Any]:
    """Return the metadata of a model's tokenizer.

    Raises:
        TokenizerError: there is none, or llama.cpp cannot do what it does.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise TokenizerError(
            "The model has no tokenizer, which a GGUF file contains. Put one beside its weights."
        )
    name = splitting_of(tokenizer)
    _check_normalizer(tokenizer)
    stored = json.loads(tokenizer.backend.to_str())["model"]
    added = tokenizer.backend.get_added_tokens_decoder()
    tokens = [f"[UNUSED{index}]" for index in range(len(tokenizer))]
    types = [_UNUSED] * len(tokens)
    for text, index in tokenizer.vocab.items():
        tokens[index], types[index] = text, _NORMAL
    for index, token in added.items():
        tokens[index], types[index] = token.content, _CONTROL if token.special else _USER
    for index in tokenizer.special_ids:
        types[index] = _CONTROL
    before, after = _frame(tokenizer)
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in stored["merges"]
        ],
        "tokenizer.ggml.add_bos_token": before,
        "tokenizer.ggml.add_eos_token": after,
    }
    ends = _ends(model, tokenizer)
    ids = {
        "bos": tokenizer.bos_id,
        "eos": ends[0] if ends else None,
        "eot": ends[1] if len(ends) > 1 else None,
        "unknown": tokenizer.unk_id,
        "padding": tokenizer.pad_id,
        "mask": tokenizer.mask_id,
    }
    found |= {f"tokenizer.ggml.{role}_token_id": i for role, i in ids.items() if i is not None}
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    # Names are letters and digits there, as in llama.cpp's own files.
    named = {
        re.sub("[^a-zA-Z0-9]", "_", k): text for k, text in tokenizer.named_templates.items() if k
    }
    if named:
        found["tokenizer.chat_templates"] = list(named)
    return found | {f"tokenizer.chat_template.{name}": text for name, text in named.items()}


def _ends(model: Model, tokenizer: Tokenizer) -> list[int]:
    """Return the ids at which generation ends, the tokenizer's own one last."""
    own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return list(dict.fromkeys(model.end_ids() + own))


def _frame(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Return whether a prompt begins with bos and whether it ends with eos.

    Raises:
        TokenizerError: prompts have another frame.
    """
    plain, framed = tokenizer.encode("a"), tokenizer.frame_prompts(["a"])[0]
    for bos in (False, True):
        for eos in (False, True):
            before = [tokenizer.bos_id] if bos else []
            after = [tokenizer.eos_id] if eos else []
            if framed == [*before, *plain, *after]:
                return bos, eos
    raise TokenizerError(
        "This tokenizer frames a prompt by other tokens than bos and eos, which llama.cpp cannot be told, so the model "
        "is not exported to GGUF."
    )
