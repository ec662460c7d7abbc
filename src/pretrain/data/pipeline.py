"""The passes of ``prepare`` over the text: scanning, tokenising, packing and the unigram baseline.

The scan finds empty and duplicate documents, determines the validation split and draws a sample for the tokenizer. It
keeps an 8-byte hash, an 8-byte length and a flag for each document, and a bounded sample of text. Tokenising appends to
flat files and writes a journal every few seconds; a restart resumes from the last journal.
"""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.config.spelling import option
from pretrain.data.manifests import read_sealed, write_sealed
from pretrain.data.order import mix64
from pretrain.data.packing import pack
from pretrain.data.shards import SPLITS, token_dtype
from pretrain.data.sources import PIECE_CHARS, Sample, Source, options_read, sized_pieces
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.workers import encode_batches
from pretrain.errors import DataError
from pretrain.utils.files import open_writable, replace_file

__all__ = [
    "Scan",
    "TokeniseJournal",
    "pack_split",
    "sample_filter",
    "scan_sources",
    "tokenise",
    "unigram_baseline",
]

_JOURNAL_SECONDS = 5.0
_BATCH_CHARS = 1 << 20
_BATCH_PIECES = 16_384
# With less text than this, starting child processes takes longer than they save.
_SMALL_BYTES = 16 << 20
Progress = Callable[[int], Any]


@dataclass
class Scan:
    """Result of the first pass.

    Attributes:
        ends: number of documents up to the end of each source.
        documents, empty, duplicates, contaminated: numbers of documents; contaminated are training documents that also
            occur in the validation source.
        text_bytes: UTF-8 bytes of all text, duplicates included.
        cut: characters of kept text before the validation part, or -1 if whole documents are held out.
        cut_document, cut_inside: the document that contains the cut, and its number of characters before the cut.
        sampled: bytes of text that the tokenizer was trained on, 0 if it was given.
        notes: sentences about skipped documents and automatic decisions.
        states: for each document 1 for training, 2 for validation, 0 for dropped.
    """

    ends: list[int] = field(default_factory=list)
    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    contaminated: int = 0
    text_bytes: int = 0
    cut: int = -1
    cut_document: int = -1
    cut_inside: int = 0
    sampled: int = 0
    tokenizer: str = ""  # fingerprint of the tokenizer for the second pass
    notes: list[str] = field(default_factory=list)
    states: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))

    def save(self, folder: Path) -> None:
        """Write the result; the JSON file is written last and marks it as complete."""
        replace_file(folder / "states.bin", self.states.tobytes())
        kept = {name: value for name, value in self.__dict__.items() if name != "states"}
        kept["states_sha256"] = hashlib.sha256(self.states.tobytes()).hexdigest()
        write_sealed(folder / "scan.json", kept)

    @classmethod
    def load(cls, folder: Path) -> Scan | None:
        """Return a complete earlier result, or None."""
        try:
            kept = read_sealed(folder / "scan.json")
            wanted = kept.pop("states_sha256")
            scan = cls(**kept)
            scan.states = np.fromfile(folder / "states.bin", dtype=np.uint8)
            if hashlib.sha256(scan.states.tobytes()).hexdigest() != wanted:
                return None
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return scan if len(scan.states) == scan.documents else None


def scan_sources(
    sources: Sequence[Source],
    training: int,
    *,
    valid: float,
    last: bool,
    seed: int,
    sample: Sample | None,
    progress: Progress,
    keep_duplicates: bool = False,
    marks: Sequence[str] = (),
) -> Scan:
    """Read all sources once: find empty and duplicate documents, determine the split, draw the sample.

    Args:
        sources: all sources, training sources first.
        training: number of training sources; the others are for validation.
        valid: share to hold out (0 if there are validation sources).
        last: hold out the end of the text instead of whole documents.
        seed: determines which documents are held out.
        sample: filled with text to train the tokenizer on; None if a tokenizer is given.
        progress: called with the number of bytes of each piece that is read.
        keep_duplicates: keep documents that occur again.
        marks: special tokens; documents in which they are typed are counted in a note.
    """
    scan = Scan()
    typed: Counter[str] = Counter()
    inside: set[str] = set()
    digests, lengths = array("Q"), array("Q")
    blank = bytearray()
    for number, source in enumerate(sources):
        hasher = hashlib.blake2b(digest_size=8)
        length, empty = 0, True
        for text, end in sized_pieces(source.pieces()):
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"source {source.name!r} holds text that cannot be encoded as UTF-8: {error}."
                ) from error
            hasher.update(data)
            if sample is not None and number < training:
                sample.add(text, len(digests), length)
            length += len(text)
            empty = empty and (not text or text.isspace())
            for mark in marks:
                if mark in text:
                    inside.add(mark)
            scan.text_bytes += len(data)
            progress(len(data))
            if end:
                digests.append(int.from_bytes(hasher.digest(), "little"))
                lengths.append(length)
                blank.append(empty)
                if inside:
                    typed.update(inside)
                    inside.clear()
                hasher = hashlib.blake2b(digest_size=8)
                length, empty = 0, True
        scan.ends.append(len(digests))
        scan.notes += source.notes
    between = "separator" in options_read(sources)
    for mark, count in typed.items():
        cure = f"; if it stands between documents: {option('separator', mark)}" if between else ""
        held = f"{count:,} of {len(digests):,} documents"
        scan.notes.append(f"{mark!r} is typed into {held} and read as letters{cure}")
    scan.documents = len(digests)
    hashes = np.asarray(digests, dtype=np.uint64)
    _choose(
        scan, hashes, np.frombuffer(blank, dtype=bool), scan.ends[training - 1], keep_duplicates
    )
    if valid:
        _split(scan, hashes, np.asarray(lengths, dtype=np.int64), valid, last, seed)
    return scan


def _choose(
    scan: Scan,
    digests: NDArray[np.uint64],
    blank: NDArray[np.bool_],
    first_valid: int,
    keep_duplicates: bool,
) -> None:
    """Set ``scan.states``: 1 for training, 2 for validation, 0 for empty, duplicate and contaminated documents."""

    def kept(documents: NDArray[np.intp]) -> NDArray[np.intp]:
        firsts = np.unique(digests[documents], return_index=True)[1]
        return documents if keep_duplicates else documents[firsts]

    states = np.zeros(len(digests), dtype=np.uint8)
    scan.empty = int(blank.sum())
    full = np.flatnonzero(~blank)
    valid = full[full >= first_valid]
    states[kept(valid)] = 2
    chosen = kept(full[full < first_valid])
    scan.duplicates = len(full) - len(chosen) - int((states == 2).sum())
    if len(valid):
        leaked = np.isin(digests[chosen], digests[valid])
        scan.contaminated = int(leaked.sum())
        chosen = chosen[~leaked]
    states[chosen] = 1
    scan.states = states


def _split(
    scan: Scan,
    digests: NDArray[np.uint64],
    lengths: NDArray[np.int64],
    valid: float,
    last: bool,
    seed: int,
) -> None:
    kept = np.flatnonzero(scan.states == 1)
    if not len(kept):  # prepare refuses such text
        return
    if len(kept) == 1 and not last:
        scan.notes.append(
            f"there is one document only, so its last {valid:.3g} (by characters) is held out, as with "
            f"{option('valid', f'last:{valid:.3g}')}; if it holds several documents, say what stands between them: "
            f"{option('separator')}"
        )
        last = True
    if last:
        ends = np.cumsum(lengths[kept])
        scan.cut = int(int(ends[-1]) * (1 - valid))
        place = min(int(np.searchsorted(ends, scan.cut, side="right")), len(ends) - 1)
        scan.cut_document = int(kept[place])
        scan.cut_inside = scan.cut - int(ends[place - 1] if place else 0)
        return
    keys = mix64(digests[kept] ^ mix64(np.array([seed & (2**64 - 1)], dtype=np.uint64)))
    held = keys < np.uint64(min(int(valid * 2.0**64), 2**64 - 1))
    if not held.any():
        held[np.argmin(keys)] = True
        scan.notes.append(
            f"{len(kept)} documents are too few for a share of {valid:.3g}: one of them is held out"
        )
    elif held.all():
        held[np.argmax(keys)] = False
        scan.notes.append(
            f"a share of {valid:.3g} would hold out all {len(kept)} documents: one is left for training"
        )
    scan.states[kept[held]] = 2


def sample_filter(scan: Scan) -> Callable[[int, int], int]:
    """Return a function that gives the number of characters of a sampled piece that are training text.

    Dropped documents (duplicates, for example) are excluded, as are validation documents and text after the cut.
    """
    states, cut, inside = scan.states, scan.cut_document, scan.cut_inside

    def keep(document: int, start: int) -> int:
        if states[document] != 1 or (scan.cut >= 0 and document > cut):
            return 0
        return inside - start if scan.cut >= 0 and document == cut else PIECE_CHARS

    return keep


# ------------------------------------------------------------------------------------------------ tokenising


@dataclass
class _Tally:
    """Counts of one split and one source."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0


@dataclass
class TokeniseJournal:
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
    def load(cls, path: Path, sources: int) -> TokeniseJournal:
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
        counts = Counter[str]()
        for entry in self.tallies[split]:
            counts.update(asdict(entry))
        return _Tally(**counts)


class _PlannedPiece(NamedTuple):
    """A piece of a kept document, with the numbers of its split and its source; ``end`` for the last of a document."""

    text: str
    split: int
    source: int
    end: bool


def planned(sources: Sequence[Source], scan: Scan) -> Iterator[_PlannedPiece]:
    """Yield the pieces of all kept documents, in order."""
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
                yield _PlannedPiece(text, state - 1, number, end)
                continue
            left = scan.cut - passed
            passed += len(text)
            if left <= 0:
                yield _PlannedPiece(text, 1, number, end)
            elif left >= len(text):
                # If the cut coincides with the end of this piece, the training part of the document ends here.
                yield _PlannedPiece(text, 0, number, end or left == len(text))
            else:
                yield _PlannedPiece(text[:left], 0, number, True)
                yield _PlannedPiece(text[left:], 1, number, end)
        if document != scan.ends[number]:
            raise DataError(f"source {source.name!r} changed while it was read; run prepare again.")


def _batches(pieces: Iterator[_PlannedPiece]) -> Iterator[list[_PlannedPiece]]:
    batch: list[_PlannedPiece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends encoded batches to the token and document files of both splits."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, journal: TokeniseJournal, stack: ExitStack
    ) -> None:
        self.folder, self.journal = folder, journal
        self.vocab_size, self.dtype = tokenizer.vocab_size, token_dtype(tokenizer.vocab_size)
        self.unk_id = tokenizer.unk_id
        self.prefix = np.array(tokenizer.prefix, dtype=np.int64)
        self.suffix = np.array(tokenizer.suffix, dtype=np.int64)
        self.totals, self.tokens, self.documents = [], [], []

        def opened(name: str, size: int) -> _Appended:
            return stack.enter_context(closing(_Appended(folder / name, size)))

        for split, name in enumerate(SPLITS):
            done = journal.total(split)
            self.totals.append(done.tokens)
            self.tokens.append(opened(f"{name}.tokens.bin", done.tokens * self.dtype.itemsize))
            offsets = done.documents + 1 if done.documents else 0
            self.documents.append(opened(f"{name}.documents.bin", offsets * 8))
            if not offsets:
                self.documents[split].write(np.zeros(1, dtype="<i8").tobytes())

    def write(
        self, batch: list[_PlannedPiece], ids: NDArray[Any], lengths: NDArray[np.int64]
    ) -> None:
        journal = self.journal
        if ids.size:
            top = int(ids.max())
            if top >= self.vocab_size:
                raise DataError(
                    f"the tokenizer gave id {top}, but its vocabulary has {self.vocab_size} tokens; its files do not "
                    "belong together. Train it again or copy it again."
                )
            journal.max_id = max(journal.max_id, top)
        end = np.array([piece.end for piece in batch])
        first = np.concatenate([[not journal.inside], end[:-1]])
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
        split = np.array([piece.split for piece in batch])
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
        for piece, size in zip(batch, sizes.tolist(), strict=True):
            tally = journal.tallies[piece.split][piece.source]
            tally.documents += piece.end
            tally.tokens += size
            tally.characters += len(piece.text)
            count = len(piece.text) if piece.text.isascii() else len(piece.text.encode("utf-8"))
            tally.bytes += count
            journal.text_bytes += count
        journal.pieces += len(batch)
        journal.inside = not batch[-1].end

    def commit(self) -> None:
        """Sync everything written so far to disk, then record it in the journal."""
        for stream in (*self.tokens, *self.documents):
            stream.flush()
            os.fsync(stream.fileno())
            self.journal.written[stream.path.name] = [stream.size, stream.digest.hexdigest()]
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
        self.close = self._stream.close

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self.digest.update(data)
        self.size += len(data)


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
) -> TokeniseJournal:
    """Encode all kept documents into ``folder``, resuming an interrupted run from its journal.

    Args:
        folder: directory of the token files and the journal.
        sources: the sources of the scan.
        scan: result of the first pass.
        tokenizer: encodes the documents; special tokens spelt in a document are read as plain text.
        workers: number of processes.
        progress: called with the number of bytes done since the last call.
    """
    journal = TokeniseJournal.load(folder / "journal.json", len(sources))
    progress(journal.text_bytes)
    pieces = planned(sources, scan)
    for _ in range(journal.pieces):
        next(pieces, None)
    with ExitStack() as stack:
        writer = _Writer(folder, tokenizer, journal, stack)
        workers = workers if scan.text_bytes >= _SMALL_BYTES else 1
        encoded = encode_batches(
            tokenizer, _batches(pieces), lambda batch: [piece.text for piece in batch], workers
        )
        saved = time.monotonic()
        for batch, (ids, lengths) in stack.enter_context(closing(encoded)):
            before = journal.text_bytes
            writer.write(batch, ids, lengths)
            progress(journal.text_bytes - before)
            if time.monotonic() - saved > _JOURNAL_SECONDS:
                writer.commit()
                saved = time.monotonic()
        writer.commit()
    return journal


def pack_split(folder: Path, split: str, documents: Sequence[int], row_length: int) -> list[int]:
    """Pack the documents of one split, each source separately; return the number of rows of each source.

    ``documents`` are the numbers of documents of the sources; segments and rows are written beside the token offsets.
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
    train, valid = (_count(folder / f"{split}.tokens.bin", tokenizer) for split in SPLITS)
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
