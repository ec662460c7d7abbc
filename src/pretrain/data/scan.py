"""The first pass of ``prepare``: empty and duplicate documents, the validation split, a sample for the tokenizer.

It keeps an 8-byte hash, an 8-byte length and a flag for each document, and a bounded sample of text.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.config.spelling import option
from pretrain.data.order import mix64
from pretrain.data.shards import read_sealed, write_sealed
from pretrain.data.sources import PIECE_CHARS, Source, sized_pieces
from pretrain.errors import DataError
from pretrain.utils.files import replace_file

__all__ = ["Progress", "Sample", "Scan", "sample_filter", "scan_sources"]

Progress = Callable[[int], Any]


class Sample:
    """A deterministic uniform sample of at most ``limit`` bytes of text: the pieces with the lowest hash."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._top = 1 << 32
        self._kept: list[tuple[int, int, int, str, int]] = []

    def add(self, text: str, document: int, start: int) -> None:
        """Add a piece, which begins at character ``start`` of ``document``, if its hash is low enough."""
        data = text.encode("utf-8")
        key = zlib.crc32(data)
        if not data or key >= self._top:
            return
        self._kept.append((key, document, start, text, len(data)))
        self.size += len(data)
        if self.size > self.limit + (self.limit >> 2):
            self._trim()

    def _trim(self) -> None:
        self._kept.sort()
        while self.size > self.limit and len(self._kept) > 1:
            self._top = self._kept[-1][0]
            self.size -= self._kept.pop()[4]

    def texts(
        self, keep: Callable[[int, int], int] = lambda document, start: PIECE_CHARS
    ) -> list[str]:
        """Return the first ``keep(document, start)`` characters of each piece, in reading order."""
        if self.size > self.limit:
            self._trim()
        chosen = sorted(self._kept, key=lambda entry: entry[1:3])
        kept = (entry[3][: max(0, keep(entry[1], entry[2]))] for entry in chosen)
        return [text for text in kept if text]


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
    """
    scan = Scan()
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
                    f"source {source.name!r} gave text that UTF-8 cannot hold: {error}."
                ) from error
            hasher.update(data)
            if sample is not None and number < training:
                sample.add(text, len(digests), length)
            length += len(text)
            empty = empty and (not text or text.isspace())
            scan.text_bytes += len(data)
            progress(len(data))
            if end:
                digests.append(int.from_bytes(hasher.digest(), "little"))
                lengths.append(length)
                blank.append(empty)
                hasher = hashlib.blake2b(digest_size=8)
                length, empty = 0, True
        scan.ends.append(len(digests))
        scan.notes += source.notes
    scan.documents = len(digests)
    first_valid = scan.ends[training - 1]
    _choose(
        scan, np.asarray(digests, dtype=np.uint64), np.frombuffer(blank, dtype=bool), first_valid
    )
    if valid:
        _split(
            scan,
            np.asarray(digests, dtype=np.uint64),
            np.asarray(lengths, dtype=np.uint64),
            valid,
            last,
            seed,
        )
    return scan


def _choose(
    scan: Scan, digests: NDArray[np.uint64], blank: NDArray[np.bool_], first_valid: int
) -> None:
    """Set ``scan.states``: 1 for training, 2 for validation, 0 for empty, duplicate and contaminated documents."""
    states = np.zeros(len(digests), dtype=np.uint8)
    scan.empty = int(blank.sum())
    full = np.flatnonzero(~blank)
    valid = full[full >= first_valid]
    _, kept = np.unique(digests[valid], return_index=True)
    states[valid[kept]] = 2
    train = full[full < first_valid]
    _, kept = np.unique(digests[train], return_index=True)
    chosen = train[kept]
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
    lengths: NDArray[np.uint64],
    valid: float,
    last: bool,
    seed: int,
) -> None:
    kept = np.flatnonzero(scan.states == 1)
    if len(kept) == 1 and not last:
        scan.notes.append(
            f"there is one document only, so its last {valid:.3g} (by characters) is held out, as with "
            f"{option('valid', f'last:{valid:.3g}')}; if it holds several documents, say what stands between them: "
            f"{option('separator')}"
        )
        last = True
    if last:
        ends = np.cumsum(lengths[kept].astype(np.int64))
        scan.cut = int(int(ends[-1]) * (1 - valid)) if len(ends) else 0
        if len(ends):
            place = min(int(np.searchsorted(ends, scan.cut, side="right")), len(ends) - 1)
            scan.cut_document = int(kept[place])
            scan.cut_inside = scan.cut - int(ends[place - 1] if place else 0)
        return
    if not len(kept):
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
