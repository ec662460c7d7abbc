"""The later passes of ``prepare``: tokenising, packing and the unigram baseline.

Tokenising appends to flat files and writes a journal every few seconds; a restart resumes from the last journal.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.data.encoding import Encoder
from pretrain.data.packing import pack
from pretrain.data.scan import Progress, Scan
from pretrain.data.shards import read_sealed, token_dtype, write_sealed
from pretrain.data.sources import Source, sized_pieces
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import DataError
from pretrain.utils.files import open_writable

__all__ = ["SPLITS", "Progressed", "pack_split", "tokenise", "unigram_baseline"]

SPLITS = ("train", "valid")
_JOURNAL_SECONDS = 5.0
_BATCH_CHARS = 1 << 20
_BATCH_PIECES = 16_384
# With less text than this, starting child processes takes longer than they save.
_SMALL_BYTES = 16 << 20


@dataclass
class _Tally:
    """Counts of one split and one source."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0


@dataclass
class Progressed:
    """The journal of tokenising: the output of the first ``pieces`` pieces is on disk."""

    pieces: int = 0
    text_bytes: int = 0
    inside: bool = False
    tallies: list[list[_Tally]] = field(default_factory=list)
    longest: list[int] = field(default_factory=lambda: [0, 0])
    open_tokens: list[int] = field(default_factory=lambda: [0, 0])
    unknown: list[int] = field(default_factory=lambda: [0, 0])
    max_id: int = 0
    written: dict[str, list[Any]] = field(default_factory=dict)  # file -> [size, SHA-256]

    @classmethod
    def load(cls, path: Path, sources: int) -> Progressed:
        """Return the journal, or a new one if there is none or the files on disk do not match it."""
        try:
            raw = read_sealed(path)
            journal = cls(**raw)
            journal.tallies = [[_Tally(**entry) for entry in split] for split in raw["tallies"]]
            for name, (size, digest) in journal.written.items():
                if _hash_of(path.with_name(name), size).hexdigest() != digest:
                    raise ValueError(name)
        except (OSError, ValueError, TypeError, KeyError):
            journal = cls()
            journal.tallies = [[_Tally() for _ in range(sources)] for _ in SPLITS]
        return journal

    def total(self, split: int) -> _Tally:
        """Return the counts of a split over all sources."""
        result = _Tally()
        for entry in self.tallies[split]:
            for name, value in asdict(entry).items():
                setattr(result, name, getattr(result, name) + value)
        return result


@dataclass
class _Batch:
    """A batch of pieces to encode."""

    texts: list[str] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    first: list[bool] = field(default_factory=list)
    end: list[bool] = field(default_factory=list)
    characters: int = 0


def planned(sources: Sequence[Source], scan: Scan) -> Iterator[tuple[str, int, int, bool]]:
    """Yield ``(text, split, source, end)`` for the pieces of all kept documents, in order."""
    states = scan.states
    document, passed = 0, 0
    for number, source in enumerate(sources):
        for text, end in sized_pieces(source.pieces()):
            if document >= len(states):
                raise DataError(
                    f"source {source.name!r} grew while it was read; run prepare again."
                )
            state = int(states[document])
            document += end
            if not state:
                continue
            if scan.cut < 0:
                yield text, state - 1, number, end
                continue
            left = scan.cut - passed
            passed += len(text)
            if left <= 0:
                yield text, 1, number, end
            elif left >= len(text):
                # If the cut coincides with the end of this piece, the training part of the document ends here.
                yield text, 0, number, end or left == len(text)
            else:
                yield text[:left], 0, number, True
                yield text[left:], 1, number, end
        if document != scan.ends[number]:
            raise DataError(f"source {source.name!r} changed while it was read; run prepare again.")


def _batches(
    pieces: Iterator[tuple[str, int, int, bool]], inside: bool, chars: int
) -> Iterator[_Batch]:
    batch = _Batch()
    for text, split, source, end in pieces:
        batch.texts.append(text)
        batch.split.append(split)
        batch.source.append(source)
        batch.first.append(not inside)
        batch.end.append(end)
        batch.characters += len(text)
        inside = not end
        if batch.characters >= chars or len(batch.texts) >= _BATCH_PIECES:
            yield batch
            batch = _Batch()
    if batch.texts:
        yield batch


class _Writer:
    """Appends encoded batches to the token and document files of both splits."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, journal: Progressed, stack: ExitStack
    ) -> None:
        self.folder, self.journal = folder, journal
        self.vocab_size, self.dtype = tokenizer.vocab_size, token_dtype(tokenizer.vocab_size)
        self.unk_id = tokenizer.unk_id
        self.prefix = np.array(tokenizer.prefix, dtype=np.int64)
        self.suffix = np.array(tokenizer.suffix, dtype=np.int64)
        self.totals = [journal.total(split).tokens for split in range(2)]
        self.tokens, self.documents = [], []
        for split, name in enumerate(SPLITS):
            count = journal.total(split).documents
            self.tokens.append(
                stack.enter_context(
                    _Appended(
                        folder / f"{name}.tokens.bin", self.totals[split] * self.dtype.itemsize
                    )
                )
            )
            self.documents.append(
                stack.enter_context(
                    _Appended(folder / f"{name}.documents.bin", (count + 1) * 8 if count else 0)
                )
            )
            if not count:
                self.documents[split].write(np.zeros(1, dtype="<i8").tobytes())

    def write(self, batch: _Batch, ids: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        journal = self.journal
        if ids.size:
            top = int(ids.max())
            if top >= self.vocab_size:
                raise DataError(
                    f"the tokenizer gave id {top}, but its vocabulary has {self.vocab_size} tokens; its files do not "
                    "belong together. Train it again or copy it again."
                )
            journal.max_id = max(journal.max_id, top)
        first, end = np.array(batch.first), np.array(batch.end)
        before, after = first * len(self.prefix), end * len(self.suffix)
        sizes = lengths + before + after
        stops = np.cumsum(sizes)
        starts = stops - sizes
        out = np.empty(int(stops[-1]), dtype=self.dtype)
        shift = np.repeat(starts + before - (np.cumsum(lengths) - lengths), lengths)
        out[np.arange(len(ids)) + shift] = ids
        for k, token in enumerate(self.prefix):
            out[starts[first] + k] = token
        for k, token in enumerate(self.suffix):
            out[stops[end] - len(self.suffix) + k] = token
        split = np.array(batch.split)
        for number in range(2):
            chosen = split == number
            if not chosen.any():
                continue
            part = out if chosen.all() else out[np.repeat(chosen, sizes)]
            self.tokens[number].write(part.tobytes())
            if self.unk_id is not None:
                journal.unknown[number] += int(np.count_nonzero(part == self.unk_id))
            ends = self.totals[number] + np.cumsum(sizes[chosen])[end[chosen]]
            self.documents[number].write(ends.astype("<i8").tobytes())
            opened = self.totals[number] - journal.open_tokens[number]
            self.totals[number] += len(part)
            if len(ends):
                journal.longest[number] = max(
                    journal.longest[number], int(np.diff(ends, prepend=opened).max())
                )
                opened = int(ends[-1])
            journal.open_tokens[number] = self.totals[number] - opened
        for text, s, k, size, last in zip(
            batch.texts, batch.split, batch.source, sizes.tolist(), batch.end, strict=True
        ):
            tally = journal.tallies[s][k]
            tally.documents += last
            tally.tokens += size
            tally.characters += len(text)
            count = len(text) if text.isascii() else len(text.encode("utf-8"))
            tally.bytes += count
            journal.text_bytes += count
        journal.pieces += len(batch.texts)
        journal.inside = not batch.end[-1]

    def commit(self) -> None:
        """Sync everything written so far to disk, then record it in the journal."""
        for stream in (*self.tokens, *self.documents):
            stream.flush()
            os.fsync(stream.fileno())
        self.journal.written = {
            stream.path.name: [stream.size, stream.digest.hexdigest()]
            for stream in (*self.tokens, *self.documents)
        }
        write_sealed(self.folder / "journal.json", asdict(self.journal))


class _Appended:
    """A file opened for appending after its first ``size`` bytes, with a running SHA-256.

    Bytes beyond ``size``, written by an interrupted run, are truncated.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.digest = path, size, _hash_of(path, size)
        self._stream = open_writable(path, keep=True)
        self._stream.truncate(size)
        self._stream.seek(size)
        self.flush, self.fileno = self._stream.flush, self._stream.fileno

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self.digest.update(data)
        self.size += len(data)

    def __enter__(self) -> _Appended:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _hash_of(path: Path, size: int) -> Any:
    """Return the SHA-256 hash object of the first ``size`` bytes of a file."""
    digest = hashlib.sha256()
    if size:
        with path.open("rb") as stream:
            while size and (block := stream.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
    return digest


def tokenise(
    folder: Path,
    sources: Sequence[Source],
    scan: Scan,
    tokenizer: Tokenizer,
    *,
    workers: int,
    progress: Progress,
) -> Progressed:
    """Encode all kept documents into ``folder``, resuming an interrupted run from its journal.

    Args:
        folder: directory of the token files and the journal.
        sources: the sources of the scan.
        scan: result of the first pass.
        tokenizer: encodes the documents; special tokens spelt in a document are read as plain text.
        workers: number of processes.
        progress: called with the number of bytes done since the last call.
    """
    journal = Progressed.load(folder / "journal.json", len(sources))
    progress(journal.text_bytes)
    pieces = planned(sources, scan)
    for _ in range(journal.pieces):
        next(pieces, None)
    waiting: deque[tuple[_Batch, Future[tuple[NDArray[Any], NDArray[np.int64]]]]] = deque()
    with ExitStack() as stack:
        writer = _Writer(folder, tokenizer, journal, stack)
        small = scan.text_bytes < _SMALL_BYTES
        encoder = stack.enter_context(Encoder(tokenizer, 1 if small else workers))
        pool = stack.enter_context(ThreadPoolExecutor(encoder.lanes))
        saved = time.monotonic()

        def finish() -> None:
            nonlocal saved
            batch, future = waiting.popleft()
            ids, lengths = future.result()
            before = journal.text_bytes
            writer.write(batch, ids, lengths)
            progress(journal.text_bytes - before)
            if time.monotonic() - saved > _JOURNAL_SECONDS:
                writer.commit()
                saved = time.monotonic()

        for batch in _batches(pieces, journal.inside, _BATCH_CHARS):
            waiting.append((batch, pool.submit(encoder.encode, batch.texts)))
            if len(waiting) > encoder.lanes + 1:
                finish()
        while waiting:
            finish()
        writer.commit()
    return journal


def pack_split(folder: Path, split: str, documents: Sequence[int], row_length: int) -> list[int]:
    """Pack the documents of one split, each source separately; return the number of rows of each source.

    Args:
        folder: directory of ``{split}.documents.bin``; segments and rows are written there too.
        split: ``"train"`` or ``"valid"``.
        documents: number of documents of each source.
        row_length: tokens in a row.
    """
    offsets = np.fromfile(folder / f"{split}.documents.bin", dtype="<i8")
    counts, segments, done = [], 0, 0
    with (
        open_writable(folder / f"{split}.segments.bin") as pieces,
        open_writable(folder / f"{split}.rows.bin") as rows,
    ):
        rows.write(np.zeros(1, dtype="<i8").tobytes())
        for count in documents:
            packing = pack(offsets[done : done + count + 1], row_length)
            pieces.write(packing.segments.astype("<i8").tobytes())
            rows.write((packing.rows[1:] + segments).astype("<i8").tobytes())
            counts.append(len(packing.rows) - 1)
            segments += len(packing.segments)
            done += count
        for stream in (pieces, rows):
            stream.flush()
            os.fsync(stream.fileno())
    return counts


def unigram_baseline(folder: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """Return the unigram baseline: loss and accuracy of a model without context on the validation tokens.

    ``nats``: cross-entropy of the validation tokens under the training counts plus one; ``most_frequent``: accuracy of
    always predicting the most frequent training token. Tokens that are never predicted (the prefix) are not counted.
    """
    counts = [_count(folder / f"{split}.tokens.bin", tokenizer) for split in SPLITS]
    train, valid = counts
    total = int(valid.sum())
    if not total:
        return {}
    logs = np.log((train + 1) / (train.sum() + len(train)))
    return {
        "nats": float(-(valid * logs).sum() / total),
        "most_frequent": float(valid[int(train.argmax())] / total),
    }


def _count(path: Path, tokenizer: Tokenizer) -> NDArray[np.int64]:
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            counts += np.bincount(
                np.frombuffer(block, token_dtype(tokenizer.vocab_size)), minlength=len(counts)
            )
    counts[tokenizer.prefix] = 0
    return counts
