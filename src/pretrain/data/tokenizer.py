"""Tokenizers: one class around Hugging Face's ``tokenizers``, saved so that transformers opens it.

Kinds trained here: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), WordPiece (Schuster & Nakajima
2012; Devlin et al. 2019) and characters with the 256 bytes behind them. Byte-level BPE and characters give every
text back byte for byte; WordPiece normalises blanks and control characters, and case if asked to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray

from pretrain.data.tokenizer_build import (
    KINDS,
    KNOWN,
    kind_of,
    library_errors,
    sibling,
    train_backend,
    trained_here,
)
from pretrain.data.tokenizer_files import open_directory, open_file
from pretrain.data.word_boundaries import WordFinder, token_bytes
from pretrain.errors import TokenizerError, did_you_mean
from pretrain.utils.files import replace_file

__all__ = ["KINDS", "Tokenizer", "train_from_texts", "train_tokenizer"]
SAMPLE_BYTES = 32_000_000
_TEMPLATE, _TEMPLATE_BYTES = "chat_template.jinja", 1_000_000
_UNENCODABLE = (
    "Give strings without halves of surrogate pairs, and a vocabulary with an unknown token."
)
_ROOM = " Choose a max_length that leaves room for text beside the special tokens, and more than the overlap."
# How transformers joins what WordPiece has cut apart, where the files ask for it.
_JOINED = [(f" {mark}", mark) for mark in (".", "?", "!", ",")] + [(" ' ", "'")]
_JOINED += [(f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")]
_BATCH = 1024  # texts that are encoded at once
_SIBLINGS = 16  # ways of reading and cutting that a tokenizer keeps ready


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: the wrapped tokenizer of the ``tokenizers`` library.
        roles: which token is ``pad``, ``bos``, ``eos``, ``mask`` and ``unk``; guessed from spelling if absent.
        config: other keys of ``tokenizer_config.json`` that are to be kept.

    Attributes:
        chat_template: the Jinja program that writes a conversation as text, or None; it is carried, never run here.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        roles: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        # Padding and truncation that a file stores are instructions of another program's batches. They are kept for
        # ``save`` and never act here: a text has the same ids alone and among others.
        self.stored_padding, self.stored_truncation = backend.padding, backend.truncation
        self.backend = sibling(backend)
        self.config = dict(config or {})
        self.chat_template = _template_in(self.config.pop("chat_template", None))
        self.vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        if not self.vocab:
            raise TokenizerError("the tokenizer has an empty vocabulary.")
        self.vocab_size = max(self.vocab.values()) + 1
        # Tables have a place for every id up to the largest; a stray id must not take gigabytes.
        if self.vocab_size > 2 * len(self.vocab) + 1024:
            name = max(self.vocab, key=self.vocab.__getitem__)
            raise TokenizerError(
                f"the tokenizer gives {name!r} the id {self.vocab_size - 1}, but has only {len(self.vocab)} tokens; "
                "its file is damaged. Number the tokens without large gaps."
            )
        self.roles = {role: name for role, name in (roles or {}).items() if name in self.vocab}
        for role, names in KNOWN.items():
            found = next((name for name in names if name in self.vocab), None)
            if role not in self.roles and found and found not in self.roles.values():
                self.roles[role] = found
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(
            [index for index, token in added.items() if token.special]
            + [self.vocab[name] for name in self.roles.values()]
        )
        self.kind = kind_of(backend)
        self._siblings: dict[tuple[Any, ...], tokenizers.Tokenizer] = {}
        self._words: WordFinder | None = None

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        names = ", ".join(f"{role}={name!r}" for role, name in self.roles.items())
        return f"Tokenizer({self.kind}, {self.vocab_size} tokens, {names})"

    def _id(self, role: str) -> int | None:
        name = self.roles.get(role)
        return None if name is None else self.vocab[name]

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token."""
        return self._id("pad")

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a document (``[CLS]`` in BERT)."""
        return self._id("bos")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a document (``[SEP]`` in BERT)."""
        return self._id("eos")

    @property
    def mask_id(self) -> int | None:
        """Id of the token that hides another one."""
        return self._id("mask")

    @property
    def unk_id(self) -> int | None:
        """Id of the token for what the vocabulary does not know."""
        return self._id("unk")

    @property
    def plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer reading every text as text: ``"<eos>"`` in a document is five characters, not an end."""
        return self._sibling(special=False)

    def _sibling(self, *, special: bool, **cut: Any) -> tokenizers.Tokenizer:
        """The tokenizer with one way of reading and cutting; it shares the vocabulary and is never changed again."""
        key = (special, *sorted(cut.items()))
        if key not in self._siblings:
            made = sibling(self.backend)
            made.encode_special_tokens = (
                not special or self.config.get("split_special_tokens") is True
            )
            if cut:
                with library_errors(f"texts cannot be cut to {cut['max_length']} tokens", _ROOM):
                    made.enable_truncation(direction=self.truncation_side, **cut)
            if len(self._siblings) >= _SIBLINGS:
                self._siblings.clear()
            self._siblings[key] = made
        return self._siblings[key]

    @property
    def segments(self) -> bool:
        """Whether the model is told which text of a pair a token belongs to, as the tokenizer's files say."""
        names = self.config.get("model_input_names")
        return not isinstance(names, list) or "token_type_ids" in names

    @property
    def truncation_side(self) -> str:
        """The end of a text that is cut off, ``left`` or ``right``, as the tokenizer's files say."""
        stored = (self.stored_truncation or {}).get("direction", "right")
        side = self.config.get("truncation_side", stored)
        return side if side in ("left", "right") else "right"

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of ``text`` without framing.

        Args:
            text: any string.
            special: read special tokens written in the text (``"<mask>"``) as such; documents are read without.
        """
        with library_errors("the text cannot be encoded", _UNENCODABLE):
            backend = self._sibling(special=special)
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Return the ids of many texts without framing; all cores are used."""
        with library_errors("the texts cannot be encoded", _UNENCODABLE):
            backend = self._sibling(special=special)
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def frame_texts(
        self,
        texts: Sequence[str] | Sequence[Sequence[str]],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        strategy: Literal["longest_first", "only_first", "only_second"] = "longest_first",
        stride: int = 0,
        special: bool = True,
        framed: bool = True,
        words: bool = False,
    ) -> list[tokenizers.Encoding]:
        """Encode texts, or pairs of texts, as a model reads them: what ``AutoTokenizer`` gives for the same files.

        The frame (``[CLS] a [SEP] b [SEP]`` and its relatives) is the post-processor of the tokenizer's own file. A
        text that is cut keeps it.

        Args:
            texts: one for each example; with ``words``, lists of words.
            pairs: the second text of each example.
            max_length: tokens that an example may have, frame included; None cuts nothing.
            strategy: which text of a pair is cut; ``longest_first`` cuts the longer one.
            stride: tokens by which the pieces of a text that was cut overlap.
            special: read special tokens written in a text (``"<mask>"``) as such.
            framed: put the frame around the texts.
            words: the texts come as lists of words.

        Returns:
            For each example an ``Encoding`` of the ``tokenizers`` library: ``ids``, ``type_ids``, ``offsets``
            (characters of the text, empty for the frame), ``special_tokens_mask``, ``word_ids``, ``sequence_ids``, and
            in ``overflowing`` what did not fit.

        Raises:
            TokenizerError: a text that cannot be encoded, or no room for a text beside its frame.
        """
        cut: dict[str, Any] = (
            {}
            if max_length is None
            else {"max_length": max_length, "strategy": strategy, "stride": stride}
        )
        if (
            framed
            and max_length is not None
            and max_length < self.frame_size(pair=pairs is not None)
        ):
            raise TokenizerError(
                f"max_length {max_length} is less than the {self.frame_size(pair=pairs is not None)} tokens of the "
                f"frame that this tokenizer puts around texts.{_ROOM}"
            )
        backend = self._sibling(special=special, **cut)
        inputs: list[Any] = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        if words and pairs is None:
            inputs = [list(sentence) for sentence in inputs]
        room = "" if max_length is None else f" in {max_length} tokens"
        encodings: list[tokenizers.Encoding] = []
        with library_errors(f"the texts cannot be encoded{room}", _UNENCODABLE + _ROOM * bool(cut)):
            for i in range(0, len(inputs), _BATCH):
                encodings += backend.encode_batch(
                    inputs[i : i + _BATCH], is_pretokenized=words, add_special_tokens=framed
                )
        return encodings

    def frame_size(self, *, pair: bool = False) -> int:
        """Tokens that the frame of a text, or of a pair, takes."""
        return int(self.backend.num_special_tokens_to_add(pair))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ``ids``; ids beyond the vocabulary raise :class:`TokenizerError`."""
        numbers = [int(index) for index in ids]
        wrong = next((index for index in numbers if not 0 <= index < self.vocab_size), None)
        if wrong is not None:
            raise TokenizerError(
                f"token id {wrong} is outside the vocabulary of {self.vocab_size} tokens; the ids come from another "
                "tokenizer, or from the padded rows of an embedding that must be masked when sampling."
            )
        text: str = self.backend.decode(numbers, skip_special_tokens=skip_special)
        cleaned = self.config.get("clean_up_tokenization_spaces") is True
        if cleaned and self.kind not in ("bpe", "char"):
            for apart, joined in _JOINED:
                text = text.replace(apart, joined)
        return text

    def frame_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that a causal model is to continue.

        They are those of ``frame_texts``, so a tokenizer whose own post-processor ends every text with a special token
        ends a prompt with it too, as ``AutoTokenizer`` does. A tokenizer that was trained by this package is the
        exception: its models have read documents framed by role, so a prompt begins like a document and stays open.
        An empty prompt begins with the beginning or the end of a text.
        """
        start = self.prefix or self.suffix
        if self.trained_here:
            return [
                [*self.prefix, *ids] if ids else list(start) for ids in self.encode_batch(texts)
            ]
        return [list(encoding.ids) or list(start) for encoding in self.frame_texts(texts)]

    @property
    def trained_here(self) -> bool:
        """Whether the tokenizer was trained by this package: its first tokens are the roles in their order."""
        return trained_here(self.vocab)

    def frame(self, ids: Sequence[int]) -> list[int]:
        """Return a whole document, its beginning and its end around ``ids``.

        Both are by role for a tokenizer that was trained by this package, and the frame of its post-processor for any
        other.
        """
        before, after = self._frame_ids()
        return [*before, *ids, *after]

    def frame_document(self, ids: Sequence[int]) -> list[int]:
        """Return a document to learn from, which always has an end that a model can learn to stop at."""
        framed = self.frame(ids)
        return framed if framed[-1:] == self.suffix else [*framed, *self.suffix]

    def _frame_ids(self) -> tuple[list[int], list[int]]:
        """The ids before and after a text."""
        if self.trained_here:
            return self.prefix, self.suffix
        encoding = self.frame_texts(["a"])[0]
        marks = encoding.special_tokens_mask
        inside = [k for k, mark in enumerate(marks) if not mark] or [len(marks), len(marks) - 1]
        return encoding.ids[: inside[0]], encoding.ids[inside[-1] + 1 :]

    @property
    def prefix(self) -> list[int]:
        """Ids before every document of pre-training: bos, if it exists and differs from eos."""
        return [self.bos_id] if self.bos_id is not None and self.bos_id != self.eos_id else []

    @property
    def suffix(self) -> list[int]:
        """Ids after every document of pre-training: eos, if it exists."""
        return [self.eos_id] if self.eos_id is not None else []

    def word_starts(self, ids: NDArray[np.integer[Any]] | Sequence[int]) -> NDArray[np.bool_]:
        """Return (T,) True where a token begins a word; see :mod:`pretrain.data.word_boundaries`."""
        if self._words is None:
            self._words = WordFinder(
                token_bytes(self.backend, self.vocab, self.special_ids, self.vocab_size)
            )
        return self._words.starts(np.asarray(ids, dtype=np.int64))

    def word_ids(self, ids: NDArray[np.integer[Any]] | Sequence[int]) -> NDArray[np.int64]:
        """Return (T,) the number of the word of every token, counted from 0."""
        return np.cumsum(self.word_starts(ids)) - 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 over vocabulary, rules and roles."""
        text = self._stored().to_str() + json.dumps(self.roles, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _stored(self) -> tokenizers.Tokenizer:
        """The tokenizer as its file holds it, with the padding and truncation that were found there."""
        stored = sibling(self.backend)
        if self.stored_truncation is not None:
            stored.enable_truncation(**self.stored_truncation)
        if self.stored_padding is not None:
            stored.enable_padding(**self.stored_padding)
        return stored

    def save(self, directory: str | Path, *, max_length: int | None = None) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``; transformers 4 and 5 open the directory.

        Args:
            directory: created if missing.
            max_length: positions of the model, written as ``model_max_length``.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(self.config)
        for role, name in self.roles.items():
            config[f"{role}_token"] = name
        if "bos" in self.roles and "eos" in self.roles:
            config.setdefault("cls_token", self.roles["bos"])
            config.setdefault("sep_token", self.roles["eos"])
        named = {value for value in config.values() if isinstance(value, str)}
        inverse = {index: name for name, index in self.vocab.items()}
        others = [
            inverse[index] for index in sorted(self.special_ids) if inverse[index] not in named
        ]
        if others:  # one spelling for each major version of transformers
            config["extra_special_tokens"] = config["additional_special_tokens"] = others
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config.setdefault("clean_up_tokenization_spaces", False)
        if max_length is not None:
            config["model_max_length"] = max_length
        if self.chat_template is not None:  # older readers look for it here, newer ones in its file
            config["chat_template"] = self.chat_template
            replace_file(folder / _TEMPLATE, self.chat_template.encode())
        # Written by Python so that the files get the mode that the umask asks for.
        replace_file(folder / "tokenizer.json", self._stored().to_str(pretty=True).encode())
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        replace_file(folder / "tokenizer_config.json", f"{text}\n".encode())

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Open a file of the ``tokenizers`` library; a ``tokenizer.json`` with the small files beside it."""
        file = Path(path)
        return (
            cls.from_directory(file.parent)
            if file.name == "tokenizer.json"
            else cls(open_file(file))
        )

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Open the tokenizer of a directory as ``AutoTokenizer`` of transformers 5 does.

        That is ``tokenizer.json``, or BERT's ``vocab.txt``, or ``vocab.json`` with ``merges.txt``, with the class and
        the tokens that the small files beside them name.
        """
        folder = Path(path)
        backend, roles, config = open_directory(folder)
        if (template := _read_template(folder)) is not None:
            config["chat_template"] = template
        return cls(backend, roles, config)

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Open a file or a directory."""
        try:
            place = Path(path).expanduser()
            nested = place / "tokenizer"
            folder, inner, file = place.is_dir(), nested.is_dir(), place.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a NUL inside
            raise TokenizerError(f"{str(path)[:100]!r} names no tokenizer: {error}.") from error
        if folder:
            return cls.from_directory(nested if inner else place)
        if file:
            return cls.from_file(place)
        raise TokenizerError(
            f"no tokenizer file or directory {str(place)!r}, and no kind of that name.{did_you_mean(str(path), KINDS)}"
        )


def _template_in(value: Any) -> str | None:
    """The chat template of tokenizer_config.json: a text, or the default one of several named ones."""
    if isinstance(value, list):
        named = [item for item in value if isinstance(item, dict)]
        value = next((n.get("template") for n in named if n.get("name") == "default"), None)
    return value if isinstance(value, str) and value.strip() else None


def _read_template(folder: Path) -> str | None:
    """The chat template in its own file, which goes before the one in tokenizer_config.json."""
    file = folder / _TEMPLATE
    if not file.is_file():
        return None
    try:
        with open(file, "rb") as opened:
            data = opened.read(_TEMPLATE_BYTES + 1)
        if len(data) > _TEMPLATE_BYTES:
            raise TokenizerError(
                f"{file} has more than {_TEMPLATE_BYTES:,} bytes; no chat template has. Replace or remove it."
            )
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"{file} cannot be read: {error}. Copy it again from its origin, or remove it."
        ) from error


def train_from_texts(
    texts: Iterable[str], kind: str = "bpe", *, vocab_size: int = 8192, lowercase: bool = False
) -> Tokenizer:
    """Train a tokenizer on an iterable of texts; see :func:`train_tokenizer`."""
    backend, roles = train_backend(texts, kind, vocab_size=vocab_size, lowercase=lowercase)
    return Tokenizer(backend, roles)


def train_tokenizer(
    sources: Any,
    kind: str = "bpe",
    *,
    vocab_size: int = 8192,
    lowercase: bool = False,
    text: str | Mapping[str, str] = "text",
    separator: str | None = None,
    encoding: str | None = None,
    sample_bytes: int = SAMPLE_BYTES,
) -> Tokenizer:
    """Train a tokenizer with distinct pad, eos, bos, mask and unk tokens.

    Args:
        sources: what :func:`pretrain.prepare` takes: files, globs, folders, a ``datasets.Dataset``, ``"python"``.
        kind: ``"bpe"`` (byte level), ``"wordpiece"`` or ``"char"``.
        vocab_size: upper bound, special tokens included; characters take what the text has.
        lowercase: WordPiece only: forget the case and the accents.
        text: column of the text in tables.
        separator: what stands between documents in plain text files.
        encoding: of text files and tables; default UTF-8.
        sample_bytes: the tokenizer sees at most this much text, drawn evenly from all sources.

    Raises:
        TokenizerError: unknown kind, or too small a vocabulary.
        DataError: a source cannot be read, or holds no text.
    """
    from pretrain.data.scan import Sample
    from pretrain.data.sources import resolve_sources, sized_pieces
    from pretrain.errors import DataError

    sample = Sample(sample_bytes)

    def read() -> Iterator[None]:
        for source in resolve_sources(sources, text=text, separator=separator, encoding=encoding)[
            0
        ]:
            for piece, _ in sized_pieces(source.pieces()):
                sample.add(piece, 0, 0)
                yield

    for _ in read():
        pass
    texts = sample.texts()
    if not texts:
        raise DataError("there is no text to train a tokenizer on: every document is empty.")
    return train_from_texts(texts, kind, vocab_size=vocab_size, lowercase=lowercase)
