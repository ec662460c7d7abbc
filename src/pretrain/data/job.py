"""The checked arguments of ``prepare``: sources, split, tokenizer and a fingerprint of all of them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.data.encodings import check_encoding
from pretrain.data.paths import FileHashes
from pretrain.data.prepared import FORMAT
from pretrain.data.sources import Source, check_columns, resolve_sources
from pretrain.data.tokenizer import SAMPLE_BYTES, Tokenizer
from pretrain.data.tokenizer_build import KINDS
from pretrain.errors import DataError, TokenizerError
from pretrain.printing import printable

__all__ = ["Job", "understand"]


@dataclass(frozen=True)
class Job:
    """One call of ``prepare`` with its arguments checked and resolved."""

    sources: list[Source]
    training: int
    weights: list[float] | None
    valid: float
    last: bool
    tokenizer: Tokenizer | None
    options: dict[str, Any]
    fingerprint: str
    workers: int
    say: Callable[[str], None]
    quiet: bool


def understand(
    sources: Any, tokenizer: Any, vocab_size: int, row_length: int, valid: Any, text: Any, separator: str | None,
    seed: int, workers: int | None, cache: Path, hashes: FileHashes, quiet: bool, lowercase: bool = False,
    encoding: str | None = None,
) -> Job:  # fmt: skip
    """Check the arguments, find the sources and compute the fingerprint."""
    if row_length < 2:
        raise DataError(f"row_length must be at least 2, found {row_length}.")
    spool = cache / "hub"
    resolve = partial(
        resolve_sources, text=text, separator=separator, encoding=encoding, spool=spool
    )
    train, weights = resolve(sources)
    share, last, held = _understand_valid(valid, resolve)
    check_columns(text, [*train, *held])
    given = _understand_tokenizer(tokenizer)
    if lowercase and tokenizer != "wordpiece":
        raise TokenizerError(
            "lowercase goes with tokenizer='wordpiece' only: the other kinds give every text back as it was, and a "
            "tokenizer that exists already has its own rule."
        )
    options = {
        "tokenizer": given.kind if given else str(tokenizer),
        "vocab_size": given.vocab_size if given else vocab_size,
        "row_length": row_length,
        "valid": valid if isinstance(valid, int | float | str) else "source",
        "text": text,
        "separator": separator,
        "seed": seed,
        "weights": weights,
        "sources": [source.name for source in train],
    }
    # Recorded only if set, so that data prepared before these options existed keep their fingerprint.
    if lowercase:
        options["lowercase"] = True
    if (encoding := check_encoding(encoding)) is not None:
        options["encoding"] = encoding
    content = {
        "format": FORMAT,
        "options": {
            name: value for name, value in options.items() if name not in ("sources", "valid")
        },
        "share": [share, last],
        "sources": [source.fingerprint(hashes) for source in train],
        "valid": [source.fingerprint(hashes) for source in held],
        "tokenizer": given.fingerprint if given else SAMPLE_BYTES,
    }
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def say(line: str) -> None:
        if not quiet:
            print(printable(line), file=sys.stderr)

    return Job(
        sources=[*train, *held], training=len(train), weights=weights, valid=share, last=last, tokenizer=given,
        options=options, fingerprint=fingerprint, workers=workers or os.cpu_count() or 1, say=say, quiet=quiet,
    )  # fmt: skip


def _understand_valid(
    valid: Any, resolve: Callable[[Any], tuple[list[Source], list[float] | None]]
) -> tuple[float, bool, list[Source]]:
    last = isinstance(valid, str) and valid.startswith("last:")
    number = valid.removeprefix("last:") if last else valid
    if isinstance(number, str) and not last:
        try:
            number = float(number)
        except ValueError:
            return 0.0, False, resolve(valid)[0]
    if isinstance(number, int | float | str) and not isinstance(number, bool):
        try:
            share = float(number)
        except ValueError as error:
            raise DataError(
                f"valid={valid!r}: expected a number after 'last:', as in 'last:0.1'."
            ) from error
        if not 0 <= share < 1:
            raise DataError(f"valid={valid!r}: the share held out must be at least 0 and below 1.")
        return share, last and share > 0, []
    if valid is None or isinstance(valid, bool):
        return 0.0, False, []
    return 0.0, False, resolve(valid)[0]


def _understand_tokenizer(tokenizer: Any) -> Tokenizer | None:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, str) and tokenizer in KINDS:
        return None
    if isinstance(tokenizer, str | Path):
        return Tokenizer.open(tokenizer)
    raise TokenizerError(
        f"{type(tokenizer).__name__} is not a tokenizer; give a kind {KINDS}, a path or a Tokenizer."
    )
