"""Training and inspection of tokenizer backends of the ``tokenizers`` library.

:class:`pretrain.data.tokenizer.Tokenizer` wraps such a backend.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from pretrain.config.check import check_count
from pretrain.errors import TokenizerError, did_you_mean

KINDS = ("bpe", "wordpiece", "char")
ROLES = ("pad", "bos", "eos", "mask", "unk")
# The order of the special tokens of a tokenizer for captions: transformers reads a CLIP model whose end token has the
# id 2 in another way, for the sake of old files.
_CAPTION_ROLES = ("pad", "bos", "mask", "eos", "unk")
_TAGS = {role: f"<{role}>" for role in ROLES}
_BERT_TAGS = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]", "unk": "[UNK]"}
# Special tokens of the tokenizers trained by this package, in the order of ROLES; their ids count from 0.
TRAINED = [[tags[role] for role in ROLES] for tags in (_TAGS, _BERT_TAGS)]
# Recognised spellings for roles that the files of a tokenizer do not name; the first match is used.
KNOWN = {
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "bos": ("<bos>", "<s>", "[CLS]", "<|begin_of_text|>"),
    "eos": ("<eos>", "</s>", "[SEP]", "<|endoftext|>", "<|end_of_text|>"),
    "mask": ("<mask>", "[MASK]"),
    "unk": ("<unk>", "[UNK]"),
}
# Bytes of the longest BPE token; longer ones would only memorise horizontal rules and runs of spaces.
_MAX_TOKEN = 32
# Words are split into parts of at most 100 characters, the limit of the WordPiece model in the ``tokenizers`` library.
WORDPIECE_CUT = ".{1,100}"


@contextmanager
def library_errors(what: str, fix: str = "") -> Iterator[None]:
    """Convert errors of the ``tokenizers`` library into TokenizerError.

    The library raises bare Exception for input that it cannot parse, and its panics derive from BaseException only.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, TokenizerError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{what} ({type(error).__name__}: {error}). {fix}".rstrip()) from error


def sibling(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer with the same rules, added tokens and shared vocabulary, without padding and truncation."""
    made = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        rule = getattr(backend, part)
        if rule is not None:
            setattr(made, part, rule)
    for _, token in sorted(backend.get_added_tokens_decoder().items()):
        (made.add_special_tokens if token.special else made.add_tokens)([token])
    return made


def trained_here(vocab: Mapping[str, int]) -> bool:
    """Whether a vocabulary begins with the special tokens of tokenizers trained by this package."""
    return any(all(vocab.get(name) == i for i, name in enumerate(names)) for names in TRAINED)


def kind_of(backend: tokenizers.Tokenizer) -> str:
    """Return ``bpe``, ``wordpiece``, ``char`` or the lower-case name of another model."""
    model = backend.model
    if isinstance(model, models.WordPiece):
        return "wordpiece"
    if isinstance(model, models.BPE):
        whole = model.byte_fallback and backend.pre_tokenizer is None
        return (
            "char" if whole and not json.loads(backend.to_str())["model"].get("merges") else "bpe"
        )
    return type(model).__name__.lower()


@dataclass(frozen=True)
class Decoding:
    """What the decoder of a tokenizer does to the end of a text when further tokens follow.

    Attributes:
        bytes: ids of the tokens that are single bytes, which are decoded in runs.
        opaque: the decoder is of a kind that may change any part of the text.
    """

    bytes: frozenset[int] = frozenset()
    opaque: bool = False


def decoding_of(backend: tokenizers.Tokenizer, vocab: Mapping[str, int]) -> Decoding:
    """Return what is known of the decoder of a tokenizer."""
    if backend.decoder is None:
        return Decoding()
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    plain = all(
        kind in ("ByteLevel", "WordPiece", "Metaspace", "BPEDecoder", "ByteFallback", "Fuse")
        or (kind == "Strip" and step["stop"] == 0)
        or (kind == "Replace" and len(step["pattern"].get("String", "..")) == 1)
        for kind, step in zip(kinds, steps, strict=True)
    )
    single = frozenset(
        index for name, index in vocab.items() if re.fullmatch("<0x[0-9A-F]{2}>", name)
    )
    return Decoding(single if "ByteFallback" in kinds else frozenset(), not plain)


def train_backend(
    texts: Iterable[str], kind: str, *, vocab_size: int, lowercase: bool, captions: bool = False
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Train on texts; return the backend and the token of each role.

    With ``captions`` a text is framed by bos and eos, whatever the kind, and eos has not the id 2.
    """
    check_count("vocab_size", vocab_size, None)
    if kind not in KINDS:
        raise TokenizerError(f"unknown kind of tokenizer {kind!r}.{did_you_mean(kind, KINDS)}")
    tags = _BERT_TAGS if kind == "wordpiece" else _TAGS
    special = [tags[role] for role in (_CAPTION_ROLES if captions else ROLES)]
    last = tags["eos"] if captions else ""
    least = len(special) + (256 if kind == "bpe" else 32)
    if kind != "char" and vocab_size < least:
        raise TokenizerError(
            f"vocab_size {vocab_size} is too small for a {kind} tokenizer; it needs at least {least}."
        )
    if kind == "char":
        return _characters(texts, special, last), tags
    if kind == "wordpiece":
        return _train_wordpiece(list(texts), special, vocab_size, lowercase), tags
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        show_progress=False,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=_MAX_TOKEN,
    )
    backend.train_from_iterator(texts, trainer)
    _begin(backend, tags["bos"], last)
    # Tokens include the space before a word, so the mask token absorbs it too, as in RoBERTa.
    mask = tokenizers.AddedToken(tags["mask"], lstrip=True, special=True)
    backend.add_special_tokens([mask])
    return backend, tags


def _train_wordpiece(
    texts: list[str], special: list[str], vocab_size: int, lowercase: bool
) -> tokenizers.Tokenizer:
    """Train WordPiece deterministically: the same text always gives the same vocabulary.

    The library numbers the single-character pieces inside words ("##a") in the order of a hash table that differs from
    run to run, and therefore breaks ties between merges differently each time. A first training run finds these pieces;
    the second run is given them in sorted order.
    """
    unknown = special[ROLES.index("unk")]

    def pipeline(model: models.WordPiece) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
        )
        backend.decoder = decoders.WordPiece(prefix="##")
        # A longer word, such as a URL or a sentence in a script without spaces, would become a single [UNK].
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.BertPreTokenizer(),
                pre_tokenizers.Split(tokenizers.Regex(WORDPIECE_CUT), "isolated"),
            ]
        )
        return backend

    normalize = pipeline(models.WordPiece(unk_token=unknown)).normalizer.normalize_str
    alphabet = _alphabet(texts, normalize, vocab_size - len(special))

    def train(size: int, first: list[str]) -> dict[str, int]:
        backend = pipeline(models.WordPiece(unk_token=unknown))
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            special_tokens=first,
            show_progress=False,
            min_frequency=2,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
        )
        backend.train_from_iterator(texts, trainer)
        return dict(backend.get_vocab())

    inside = sorted(name for name in train(1, special) if len(name) == 3 and name[:2] == "##")
    vocab = train(vocab_size, special + inside)
    backend = pipeline(models.WordPiece(vocab, unk_token=unknown))
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    return backend


def _alphabet(texts: list[str], normalize: Callable[[str], str], room: int) -> list[str]:
    """Return the characters of a WordPiece vocabulary, most frequent first.

    A word with a character that is not included becomes [UNK]. Characters get half of the available entries, and more
    where that is needed to omit less than one in 2,000 characters of the text, as in scripts of thousands of
    characters. A character takes one entry, and a second one if it occurs inside words, which Chinese characters do
    not.
    """
    counts, inside = np.zeros(0x110000, dtype=np.int64), np.zeros(0x110000, dtype=bool)
    for start in range(0, len(texts), 64):
        block = normalize("\n".join(texts[start : start + 64]))
        codes = np.frombuffer(block.encode("utf-32-le"), dtype="<u4")
        found = np.bincount(codes)
        counts[: len(found)] += found
        divides = np.zeros(len(found), dtype=bool)
        for code in np.flatnonzero(found).tolist():
            divides[code] = _divides_words(chr(code))
        within = ~divides[codes]
        inside[codes[1:][within[1:] & within[:-1]]] = True
    counts[[code for code in np.flatnonzero(counts).tolist() if chr(code).isspace()]] = 0
    known = np.flatnonzero(counts)
    known = known[np.argsort(-counts[known], kind="stable")]
    places = np.cumsum(1 + inside[known])
    missed = 1 - (np.cumsum(counts[known]) - counts[known]) / max(1, int(counts.sum()))
    taken = (places <= room // 2) | ((missed > 1 / 2000) & (places <= room))
    return [chr(code) for code in known[taken].tolist()]


def _divides_words(char: str) -> bool:
    """Whether BERT's pre-tokenizer splits at a character."""
    return char.isspace() or char in string.punctuation or unicodedata.category(char)[0] == "P"


def _begin(backend: tokenizers.Tokenizer, first: str, last: str) -> None:
    """Set a post-processor that prepends the bos token, so that a text is framed like the start of a document.

    A caption is a whole text, so one for captions also appends the eos token, ``last``.
    """
    names = [first, *[last] * bool(last)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}".rstrip(),
        pair=f"{first} $A $B:1",
        special_tokens=[(name, backend.token_to_id(name)) for name in names],
    )


def _characters(texts: Iterable[str], special: list[str], last: str) -> tokenizers.Tokenizer:
    """Build a tokenizer of all characters in the texts, with byte fallback for all others."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    seen -= {chr(code) for code in range(0xD800, 0xE000)}
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(seen)]
    vocab = {name: index for index, name in enumerate(names)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token=special[-1])
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(special)
    _begin(backend, special[1], last)
    return backend
