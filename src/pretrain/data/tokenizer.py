"""Tokenizers: one class around Hugging Face's ``tokenizers``, saved in a form that transformers opens.

Kinds that can be trained: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), WordPiece (Schuster & Nakajima
2012; Devlin et al. 2019) and characters with byte fallback. Byte-level BPE and characters reproduce every text byte
for byte; WordPiece normalises whitespace and control characters, and optionally case.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray

from pretrain import utils
from pretrain.data.paths import shortened_path
from pretrain.data.sources import Sample, resolve_sources, sized_pieces, unused_options
from pretrain.data.tokenizer_build import (
    KINDS,
    KNOWN,
    Decoding,
    decoding_of,
    kind_of,
    library_errors,
    sibling,
    train_backend,
    trained_here,
)
from pretrain.data.tokenizer_files import ROLE_KEYS, open_directory, open_file
from pretrain.data.word_boundaries import WordFinder, token_bytes
from pretrain.errors import DataError, TokenizerError, did_you_mean
from pretrain.utils.files import note, replace_file
from pretrain.utils.hub_names import hub_hint, hub_name

__all__ = ["HUB_FILES", "KINDS", "Tokenizer", "train_from_texts", "train_tokenizer"]

# What is fetched of a tokenizer on the Hub; config.json names the class of those whose own files do not.
HUB_FILES = (
    ".gitattributes",  # which every repository has: the library warns at length if nothing matches
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "chat_template.jinja", "config.json"),
    "additional_chat_templates/*.jinja",
)
SAMPLE_BYTES = 32_000_000
# Files of chat templates: the default one, and the folder of those with other names.
_TEMPLATE, _NAMED, _DEFAULT = "chat_template.jinja", "additional_chat_templates", "default"
_TEMPLATE_BYTES = 1_000_000
_LONE = re.compile("[\ud800-\udfff]")
_ROOM = " Choose a max_length that leaves room for text beside the special tokens, and more than the overlap."
# Replacements of transformers' clean_up_tokenization_spaces, applied to decoded text if the config enables them.
_JOINED = [(f" {mark}", mark) for mark in (".", "?", "!", ",")] + [(" ' ", "'")]
_JOINED += [(f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")]
# The replacements are made one after another, and each can change as many of the last characters as it reads, less one.
_JOINED_LENGTH = sum(len(apart) - 1 for apart, _ in _JOINED)
_BATCH = 1024  # texts encoded at once
_PADDING = "pretrain_padding"  # key of tokenizer_config.json: its pad_token, where that is ``Tokenizer.padding``
_SIBLINGS = 16  # cached backends per tokenizer, one for each combination of encoding options


class Tokenizer:
    """Converts text to token ids and back.

    Args:
        backend: the wrapped tokenizer of the ``tokenizers`` library.
        roles: the tokens that are ``pad``, ``bos``, ``eos``, ``mask`` and ``unk``; guessed from spelling if absent,
            and none if None. A guess at an ordinary token of another library's vocabulary is not saved.
        config: further keys of ``tokenizer_config.json`` to keep.
        class_tokens: named tokens, as in ``config``, that its ``tokenizer_class`` has without being told.

    Attributes:
        chat_template: the Jinja program that renders a conversation as text, or None; it is stored, not run here.
        padding: the token that other libraries pad with, named in what is saved where nothing states one; no role, and
            not in the fingerprint.
        named_templates: further ones by name, such as ``tool_use``, beside ``chat_template``, the default.
        source: name on the Hub with its commit, of one that was opened by such a name; else None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        roles: Mapping[str, str | None] | None = None,
        config: Mapping[str, Any] | None = None,
        class_tokens: Mapping[str, str] | None = None,
    ) -> None:
        # Padding and truncation stored in a file configure another program's batches. They are kept for ``save`` but
        # not applied, so that the ids of a text do not depend on the other texts of its batch.
        self.stored_padding, self.stored_truncation = backend.padding, backend.truncation
        self.backend = sibling(backend)
        self.config, self.class_tokens = dict(config or {}), dict(class_tokens or {})
        self.source: str | None = None
        self.named_templates = _templates_in(self.config.pop("chat_template", None))
        self.chat_template = self.named_templates.pop(_DEFAULT, None)
        self.vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        if not self.vocab:
            raise TokenizerError("the tokenizer has an empty vocabulary.")
        self.vocab_size = max(self.vocab.values()) + 1
        # Tables have an entry for every id up to the largest; a stray large id must not allocate gigabytes.
        if self.vocab_size > 2 * len(self.vocab) + 1024:
            name = max(self.vocab, key=self.vocab.__getitem__)
            raise TokenizerError(
                f"the tokenizer gives {name!r} the id {self.vocab_size - 1}, but has only {len(self.vocab)} tokens; "
                "its file is damaged. Token ids must have no large gaps."
            )
        given = dict(roles or {})
        self.roles = {role: name for role, name in given.items() if name in self.vocab}
        none = {role for role, name in given.items() if name is None}
        added = backend.get_added_tokens_decoder()
        special = {token.content: index for index, token in added.items() if token.special}
        # Role -> token that transformers would not take for it.
        self._guessed: dict[str, str] = {}
        for role, names in KNOWN.items():
            found = next((name for name in names if name in self.vocab), None)
            # A special token has its role although a file says that there is none: runs were begun with it.
            barred = role in none and found not in special
            if role not in self.roles and not barred and found and found not in self.roles.values():
                self.roles[role] = found
                ordinary = found not in special or role in ("bos", "eos")
                if ordinary and not self.trained_here:
                    self._guessed[role] = found
        self.special_ids = frozenset(
            [*special.values(), *(self.vocab[name] for name in self.roles.values())]
        )
        self.padding: str | None = None
        self.kind = kind_of(backend)
        self._siblings: dict[tuple[Any, ...], tokenizers.Tokenizer] = {}

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        names = ", ".join(f"{role}={name!r}" for role, name in self.roles.items())
        return f"Tokenizer({self.kind}, {self.vocab_size} tokens, {names})"

    def _id(self, role: str) -> int | None:
        name = self.roles.get(role)
        return None if name is None else self.vocab[name]

    @property
    def stated_roles(self) -> dict[str, str]:
        """The roles without guesses at ordinary tokens, which would be encoded otherwise, and at bos and eos."""
        return {r: name for r, name in self.roles.items() if self._guessed.get(r) != name}

    @property
    def named_tokens(self) -> dict[str, str]:
        """The named tokens as transformers has them, ``{"bos_token": "<s>", ...}``: those of files, class and roles."""
        found = self.class_tokens | _tokens_in(self.config)
        for role, name in self.stated_roles.items():
            if name not in [found.get(key) for key in ROLE_KEYS[role]]:
                found[f"{role}_token"] = name
        if self.padding is not None:
            found.setdefault("pad_token", self.padding)
        if self.trained_here and "bos" in self.roles and "eos" in self.roles:
            found.setdefault("cls_token", self.roles["bos"])
            found.setdefault("sep_token", self.roles["eos"])
        return found

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
        """Id of the mask token."""
        return self._id("mask")

    @property
    def unk_id(self) -> int | None:
        """Id of the token for text that is not in the vocabulary."""
        return self._id("unk")

    @property
    def plain(self) -> tokenizers.Tokenizer:
        """The backend without special tokens: ``"<eos>"`` in a document is encoded as five characters."""
        return self._sibling(special=False)

    def _sibling(self, *, special: bool, **cut: Any) -> tokenizers.Tokenizer:
        """Return the backend for a combination of encoding options; it shares the vocabulary and is never modified."""
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
        """Whether the model takes ``token_type_ids``, according to ``model_input_names`` in the tokenizer's files."""
        names = self.config.get("model_input_names")
        return not isinstance(names, list) or "token_type_ids" in names

    @property
    def truncation_side(self) -> str:
        """The side on which texts are truncated, ``left`` or ``right``, according to the tokenizer's files."""
        stored = (self.stored_truncation or {}).get("direction", "right")
        side = self.config.get("truncation_side", stored)
        return side if side in ("left", "right") else "right"

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of ``text`` without a frame of special tokens.

        Args:
            text: any string.
            special: recognise special tokens spelt in the text (``"<mask>"``); off for the documents of pre-training.
        """
        with _encoding([text], "the text cannot be encoded"):
            backend = self._sibling(special=special)
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def special_names(self) -> tuple[str, ...]:
        """The special tokens as they are spelt, in the order of their ids."""
        # `id_to_token` of the library gives them as its normalizer would change them.
        special = ((index, name) for name, index in self.vocab.items() if index in self.special_ids)
        return tuple(name for _, name in sorted(special))

    @property
    def typed_names(self) -> tuple[str, ...]:
        """The special tokens that a text hardly holds by chance: not ``!``, which pads in some directories."""
        return tuple(name for name in self.special_names if len(name) > 2)

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Return the ids of many texts without frames; uses all cores."""
        with _encoding(texts, "the texts cannot be encoded"):
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
        """Encode texts, or pairs of texts, for a model, exactly as ``AutoTokenizer`` does with the same files.

        The frame (special tokens as in ``[CLS] a [SEP] b [SEP]``) is added by the post-processor of the tokenizer's
        own file, also around truncated texts.

        Args:
            texts: one for each example; with ``words``, lists of words.
            pairs: the second text of each example.
            max_length: maximum tokens of an example, frame included; None disables truncation.
            strategy: which text of a pair is truncated; ``longest_first`` truncates the longer one.
            stride: tokens by which the pieces of a truncated text overlap.
            special: recognise special tokens spelt in a text (``"<mask>"``).
            framed: add the frame.
            words: the texts are lists of words.

        Returns:
            For each example an ``Encoding`` of the ``tokenizers`` library: ``ids``, ``type_ids``, ``offsets``
            (characters of the text, empty for the frame), ``special_tokens_mask``, ``word_ids``, ``sequence_ids``, and
            ``overflowing`` with the truncated parts.

        Raises:
            TokenizerError: a text cannot be encoded, or ``max_length`` leaves no room for text.
        """
        cut: dict[str, Any] = {}
        if max_length is not None:
            cut = {"max_length": max_length, "strategy": strategy, "stride": stride}
            frame = self.frame_size(pair=pairs is not None) if framed else 0
            if max_length < frame:
                raise TokenizerError(
                    f"max_length {max_length} is less than the {frame} special tokens that this tokenizer puts around "
                    f"texts.{_ROOM}"
                )
        backend = self._sibling(special=special, **cut)
        inputs: list[Any] = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        if words and pairs is None:
            inputs = [list(sentence) for sentence in inputs]
        room = "" if max_length is None else f" in {max_length} tokens"
        encodings: list[tokenizers.Encoding] = []
        with _encoding(inputs, f"the texts cannot be encoded{room}", _ROOM * bool(cut)):
            for i in range(0, len(inputs), _BATCH):
                encodings += backend.encode_batch(
                    inputs[i : i + _BATCH], is_pretokenized=words, add_special_tokens=framed
                )
        return encodings

    def frame_size(self, *, pair: bool = False) -> int:
        """Return the number of special tokens in the frame of a text, or of a pair."""
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
        if self._cleans:
            for apart, joined in _JOINED:
                text = text.replace(apart, joined)
        return text

    def continuation(self, ids: Sequence[int], new: Sequence[int]) -> str:
        """Return the text of ``new`` after ``ids``, without special tokens."""
        # Blanks between words, and characters of several tokens, depend on the tokens before.
        context = ids[self.run_start(ids, len(ids) - 8) :]
        before, whole = self.decode(context), self.decode([*context, *new])
        return whole[len(before) :] if whole.startswith(before) else self.decode(new)

    def run_start(self, ids: Sequence[int], place: int) -> int:
        """Return the last place up to ``place`` that is in no run of byte tokens, which are decoded as a whole."""
        place = max(place, 0)
        while place > 0 and ids[place - 1] in self._decoding.bytes:
            place -= 1
        return place

    def stable_text(self, ids: Sequence[int], new: Sequence[int]) -> str:
        """Return the beginning of ``continuation`` that no later tokens can change.

        Left out are bytes of an unfinished character, and blanks that punctuation would remove; with a decoder of an
        unknown kind, which may change anything, the whole text.
        """
        if self._decoding.opaque:
            return ""
        held = self.special_ids | self._decoding.bytes
        # A run of byte tokens is decoded as a whole, and each is a replacement character until all are characters.
        end = next((k for k in range(len(new), 0, -1) if new[k - 1] not in held), 0)
        text = self.continuation(ids, new[:end] if self._decoding.bytes else new)
        text = text.rstrip("\ufffd")
        return text[: max(0, len(text) - _JOINED_LENGTH)] if self._cleans else text

    @property
    def _cleans(self) -> bool:
        cleaned = self.config.get("clean_up_tokenization_spaces") is True
        return cleaned and self.kind not in ("bpe", "char")

    @functools.cached_property
    def _decoding(self) -> Decoding:
        return decoding_of(self.backend, self.vocab)

    def frame_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of prompts for a causal model.

        They are those of ``frame_texts``, so a tokenizer whose post-processor appends a special token to every text
        appends it to a prompt too, as ``AutoTokenizer`` does. Tokenizers trained by this package are the exception:
        their models were trained on documents between bos and eos, so a prompt begins like a document and has no eos.
        An empty prompt becomes the bos token, or eos if there is no bos.
        """
        start = self.prefix or self.suffix
        if self.trained_here:
            return [
                [*self.prefix, *ids] if ids else list(start) for ids in self.encode_batch(texts)
            ]
        return [list(encoding.ids) or list(start) for encoding in self.frame_texts(texts)]

    @property
    def trained_here(self) -> bool:
        """Whether the tokenizer was trained by this package: its first tokens are those of the roles, in order."""
        return trained_here(self.vocab)

    def frame(self, ids: Sequence[int]) -> list[int]:
        """Return ``ids`` as a whole document with its special tokens.

        These are bos and eos for a tokenizer trained by this package, and those of the post-processor for any other.
        """
        before, after = self._frame_ids()
        return [*before, *ids, *after]

    def frame_document(self, ids: Sequence[int]) -> list[int]:
        """Return ``ids`` as a training document, which always ends with eos so that a model can learn to stop."""
        framed = self.frame(ids)
        return framed if framed[-1:] == self.suffix else [*framed, *self.suffix]

    def _frame_ids(self) -> tuple[list[int], list[int]]:
        """Return the ids of the frame before and after a text."""
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
        return self._words.starts(np.asarray(ids, dtype=np.int64))

    @functools.cached_property
    def _words(self) -> WordFinder:
        return WordFinder(token_bytes(self.backend, self.vocab, self.special_ids, self.vocab_size))

    def word_ids(self, ids: NDArray[np.integer[Any]] | Sequence[int]) -> NDArray[np.int64]:
        """Return (T,) the number of the word that each token belongs to, counted from 0."""
        return np.cumsum(self.word_starts(ids)) - 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 over vocabulary, rules and roles."""
        text = self._stored().to_str() + json.dumps(self.roles, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def padded(self, *ids: int | None) -> Tokenizer:
        """Return a copy that names a token for padding when it is saved, if no file names one.

        It is the first of ``ids`` that is a special token; if none is, none is named.
        """
        made = copy.copy(self)
        added = self.backend.get_added_tokens_decoder()
        special = {index: token.content for index, token in added.items() if token.special}
        found = [special[index] for index in ids if index in special]
        made.padding = found[0] if found and "pad" not in self.stated_roles else None
        return made

    def _stored(self) -> tokenizers.Tokenizer:
        """Return the backend as it is saved, with the padding and truncation of the file it was opened from."""
        stored = sibling(self.backend)
        if self.stored_truncation is not None:
            stored.enable_truncation(**self.stored_truncation)
        if self.stored_padding is not None:
            stored.enable_padding(**self.stored_padding)
        return stored

    def save(self, directory: str | Path, *, max_length: int | None = None) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers 4 and 5 can open.

        Args:
            directory: created if missing.
            max_length: number of positions of the model, written as ``model_max_length``.
        """
        folder = Path(os.path.expanduser(directory))
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(self.config)
        for key, name in self.named_tokens.items():
            # A token of the class without a role, such as GPT-2's bos, would have one if it were read from the file.
            held = [self.roles.get(role) for role, keys in ROLE_KEYS.items() if key in keys]
            if key not in self.class_tokens or name in held:
                config[key] = name
        if self.padding is not None and "pad" not in self.stated_roles:
            config[_PADDING] = self.padding
        # A token that the file names and the vocabulary lacks would be added when the directory is opened again.
        for key, name in _tokens_in(config).items():
            if name not in self.vocab:
                del config[key]
        named = {*_tokens_in(config).values(), *self._guessed.values()}
        others = [name for name in self.special_names if name not in named]
        for key in ("extra_special_tokens", "additional_special_tokens"):  # of transformers 5 and 4
            if others:
                config[key] = others
            elif isinstance(config.get(key), list):  # it cannot open objects without their type
                config[key] = [name for name in config[key] if isinstance(name, str)]
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config.setdefault("clean_up_tokenization_spaces", False)
        if max_length is not None:
            config["model_max_length"] = max_length
        # Older releases of transformers read the template from the config, newer ones from its own file, which would
        # hide the named ones.
        for file in (folder / _NAMED).glob("*.jinja"):  # they would go before what is written now
            file.unlink()
        if self.named_templates:
            named_ones = self.named_templates | (
                {_DEFAULT: self.chat_template} if self.chat_template else {}
            )
            config["chat_template"] = [
                {"name": name, "template": source} for name, source in named_ones.items()
            ]
            (folder / _TEMPLATE).unlink(missing_ok=True)
        elif self.chat_template is not None:
            config["chat_template"] = self.chat_template
            replace_file(folder / _TEMPLATE, self.chat_template.encode())
        # Written by Python, not by the library, so that the file modes follow the umask.
        replace_file(folder / "tokenizer.json", self._stored().to_str(pretty=True).encode())
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        replace_file(folder / "tokenizer_config.json", f"{text}\n".encode())

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Open a file of the ``tokenizers`` library; a ``tokenizer.json`` together with its companion files."""
        file = Path(path)
        whole = file.name == "tokenizer.json"
        return cls.from_directory(file.parent) if whole else cls(open_file(file))

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Open the tokenizer of a directory as ``AutoTokenizer`` of transformers 5 does.

        It holds ``tokenizer.json``, or BERT's ``vocab.txt``, or ``vocab.json`` with ``merges.txt``; its class and
        special tokens come from the companion files (``tokenizer_config.json`` and others).
        """
        folder = Path(path)
        backend, roles, config, class_tokens = open_directory(folder)
        files = {path.stem: path for path in sorted((folder / _NAMED).glob("*.jinja"))}
        if (folder / _TEMPLATE).is_file():
            files[_DEFAULT] = folder / _TEMPLATE
        if files:  # they take precedence over those in tokenizer_config.json
            config["chat_template"] = {name: _read_template(file) for name, file in files.items()}
        padding = config.pop(_PADDING, None)
        padded = padding is not None and padding == config.get("pad_token")
        if padded:
            del config["pad_token"]
            roles = {role: name for role, name in roles.items() if role != "pad"}
        made = cls(backend, roles, config, class_tokens)
        made.padding = padding if padded else None
        return made

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Open a file, a directory, or a tokenizer of the Hub, of which only these small files are fetched.

        Raises:
            TokenizerError: there is no such file or directory, or it holds no tokenizer that can be opened.
            CheckpointError: the files cannot be fetched.
        """
        if (name := hub_name(path)) is not None:
            fetched = utils.hub_files.snapshot(name, HUB_FILES)
            made = cls.from_directory(fetched)
            made.source = str(replace(name, revision=fetched.name))
            if made.source != str(name):
                note(f"the tokenizer {made.source} is used")
            return made
        try:
            place = Path(os.path.expanduser(path))
            nested = place / "tokenizer"
            folder, inner, file = place.is_dir(), nested.is_dir(), place.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a NUL inside
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise TokenizerError(
                f"{shortened_path(path)!r} names no tokenizer: {reason}."
            ) from error
        if folder:
            return cls.from_directory(nested if inner else place)
        if file:
            return cls.from_file(place)
        raise TokenizerError(
            f"{str(place)!r} is no file, directory or kind of a tokenizer."
            f"{hub_hint(path) if '/' in str(path) else did_you_mean(str(path), KINDS)}"
        )


@contextmanager
def _encoding(inputs: Sequence[Any], what: str, fix: str = "") -> Iterator[None]:
    """Convert errors of the library, and name a lone surrogate, which it refuses, by its text and place.

    ``what`` and ``fix`` are the message and further advice on other errors.
    """
    try:
        with library_errors(what, f"Use a vocabulary with an unknown token.{fix}"):
            yield
    except TokenizerError as error:
        for number, given in enumerate(inputs, start=1):
            for text in given if isinstance(given, list | tuple) else [given]:
                if isinstance(text, str) and (found := _LONE.search(text)):
                    at = found.start()
                    raise TokenizerError(
                        f"text {number} of {len(inputs)} cannot be encoded: character {at} of it, counted from 0, is "
                        f"the lone surrogate U+{ord(text[at]):04X} ({text[max(0, at - 20) : at + 20]!r}), half of a "
                        "character. Remove it, or decode the text again from its bytes."
                    ) from error
        raise


def _tokens_in(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the named tokens of a tokenizer_config.json: ``{"bos_token": "<s>", ...}``."""
    return {
        key: name
        for key, name in config.items()
        if key.endswith("_token") and isinstance(name, str)
    }


def _templates_in(value: Any) -> dict[str, str]:
    """Return the chat templates by name of an entry of tokenizer_config.json: one, a list of named ones, a mapping."""
    if isinstance(value, list):
        named = [item for item in value if isinstance(item, dict)]
        value = {str(item.get("name")): item.get("template") for item in named}
    elif not isinstance(value, dict):
        value = {_DEFAULT: value}
    return {
        name: source for name, source in value.items() if isinstance(source, str) and source.strip()
    }


def _read_template(file: Path) -> str:
    """Return the chat template in a file of its own."""
    try:
        with open(file, "rb") as opened:
            data = opened.read(_TEMPLATE_BYTES + 1)
        if len(data) > _TEMPLATE_BYTES:
            raise TokenizerError(
                f"{file} has more than {_TEMPLATE_BYTES:,} bytes, the limit for a chat template. Replace or remove it."
            )
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"{file} cannot be read: {error}. Copy it again from its origin, or remove it."
        ) from error


def train_from_texts(
    texts: Iterable[str],
    kind: str = "bpe",
    *,
    vocab_size: int = 8192,
    lowercase: bool = False,
    captions: bool = False,
) -> Tokenizer:
    """Train a tokenizer on an iterable of texts; see :func:`train_tokenizer`.

    With ``captions`` it is one for a model of images and texts, which frames every text by bos and eos.
    """
    backend, roles = train_backend(
        texts, kind, vocab_size=vocab_size, lowercase=lowercase, captions=captions
    )
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
        sources: as for :func:`pretrain.prepare`: files, globs, folders, a ``datasets.Dataset``, ``"python"``.
        kind: ``"bpe"`` (byte level), ``"wordpiece"`` or ``"char"``.
        vocab_size: upper bound, special tokens included; ignored for ``"char"``, which has all characters of the text.
        lowercase: WordPiece only: drop case and accents.
        text: column of the text in tables.
        separator: text between documents in plain text files.
        encoding: encoding of text files and tables; default UTF-8.
        sample_bytes: the tokenizer is trained on at most this much text, sampled evenly from all sources.

    Raises:
        TokenizerError: the kind is unknown, or the vocabulary is too small.
        DataError: a source cannot be read, or there is no text.
    """
    sample = Sample(sample_bytes)
    found, _ = resolve_sources(sources, text=text, separator=separator, encoding=encoding)
    for line in unused_options(found, text, separator, encoding):
        note(line)
    for source in found:
        for piece, _ in sized_pieces(source.pieces()):
            sample.add(piece, 0, 0)
    texts = sample.texts()
    if not texts:
        raise DataError("there is no text to train a tokenizer on: every document is empty.")
    return train_from_texts(texts, kind, vocab_size=vocab_size, lowercase=lowercase)
