"""Made-up text in many scripts, and a tokenizer of every kind trained on it."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pretrain.data.tokenizer import Tokenizer, train_from_texts

# First and last character of a range of letters, and letters in a word; 0 where no blanks stand between words.
SCRIPTS = {
    "latin": ("a", "z", 6), "greek": ("α", "ω", 6), "cyrillic": ("а", "я", 7), "arabic": ("ؠ", "ي", 5),
    "hebrew": ("א", "ת", 5), "devanagari": ("\u0904", "\u0939", 5), "tamil": ("\u0b95", "\u0bb9", 8),
    "georgian": ("ა", "ჰ", 9), "ethiopic": ("ሀ", "ሎ", 4), "korean": ("가", "강", 4), "han": ("一", "侀", 0),
    "hiragana": ("ぁ", "ゖ", 0), "katakana": ("ァ", "ヺ", 0), "thai": ("ก", "ฮ", 0), "lao": ("ກ", "ດ", 0),
    "khmer": ("ក", "អ", 0), "burmese": ("က", "အ", 0), "tibetan": ("ཀ", "ཨ", 0), "yi": ("ꀀ", "ꁟ", 0),
    "tangut": ("\U00017000", "\U00017040", 0), "adlam": ("\U0001e922", "\U0001e943", 7),
    "unwritten": ("\U00013000", "\U00013040", 90),  # letters whose script is in no list of ours
}  # fmt: skip
TOKENIZERS = ("bpe", "wordpiece", "char", "unigram", "byte_fallback")


def letters(script: str) -> list[str]:
    """The letters of a script."""
    first, last, _ = SCRIPTS[script]
    return [char for code in range(ord(first), ord(last) + 1) if (char := chr(code)).isalpha()]


@cache
def documents(script: str, count: int = 40, seed: int = 0) -> list[str]:
    """Documents of words drawn with falling frequency, with marks and stops, and without blanks where none are used."""
    rng = np.random.default_rng(seed)
    known, size = letters(script), SCRIPTS[script][2]
    marks = {"devanagari": "\u093f", "thai": "\u0e34", "burmese": "\u102f", "arabic": "\u064f"}
    words = [
        "".join(rng.choice(known, max(1, rng.poisson(size or 3)))) + marks.get(script, "") * (k % 3)
        for k in range(400)
    ]
    share = 1 / np.arange(3, 403)
    made = []
    for _ in range(count):
        drawn = rng.choice(words, 90, p=share / share.sum())
        blank, stop = ("", "。") if not size else (" ", ". ")
        made.append(stop.join(blank.join(drawn[k : k + 15]) for k in range(0, 90, 15)))
    return made


@cache
def tokenizer(kind: str, script: str, vocab_size: int = 400) -> Tokenizer:
    """A tokenizer of a kind, trained on the documents of a script."""
    texts = documents(script)
    if kind in ("bpe", "wordpiece", "char"):
        return train_from_texts(texts, kind, vocab_size=vocab_size)
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>"]
    if kind == "unigram":
        backend = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:  # as Llama 2 has it: a small BPE, all bytes behind it, blanks written as a sign of their own
        backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size + 20, special_tokens=special + every_byte, show_progress=False, limit_alphabet=40
        )  # fmt: skip
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(texts, trainer)
    # The trainer takes the bytes as special tokens only; in Llama 2 they are ordinary tokens of the vocabulary.
    file = json.loads(backend.to_str())
    file["added_tokens"] = [t for t in file["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(file)))
