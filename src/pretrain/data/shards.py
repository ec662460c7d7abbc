"""Prepared rows on disk: flat files of tokens, documents, pieces and rows.

Each split has four files: ``tokens`` (uint16 or uint32, all documents concatenated, with their special tokens),
``documents`` (int64 token offsets), ``segments`` (int64 pairs: first token and length of every piece of a document, in
row order) and ``rows`` (int64 offsets into the segments).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.data import flat_files
from pretrain.data.flat_files import FlatFile
from pretrain.data.order import MixtureOrder, Order
from pretrain.errors import DataError
from pretrain.utils.files import replace_file

__all__ = ["Example", "Rows", "check_files", "file_record", "token_dtype", "write_json"]

Ints = NDArray[np.int64]
Example = Mapping[str, NDArray[Any]]  # one row

# The names that a manifest may list: an untrusted manifest must not make us read files outside its directory.
_NAMES = re.compile(
    r"(train|valid)\.(tokens|documents|segments|rows)(\.blocks)?\.bin|tokenizer/[A-Za-z0-9_-][A-Za-z0-9._-]*"
)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds every id of a vocabulary."""
    if vocab_size > 2**32:
        raise DataError(f"a vocabulary of {vocab_size} tokens does not fit 32-bit ids.")
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: after a crash the file is either the old or the new one."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    # File names that are not UTF-8 contain lone surrogates, which are valid JSON when escaped as \\udcXX.
    replace_file(path, text.encode("utf-8", errors="backslashreplace"))


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object together with its digest; see ``read_sealed``."""
    write_json(path, {**value, "digest": _digest(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the object in a file that ``write_sealed`` wrote.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the file is damaged.
    """
    return unsealed(json.loads(path.read_text(encoding="utf-8")))


def unsealed(value: Any) -> dict[str, Any]:
    """Return the object without its digest, given the parsed content of a file of ``write_sealed``.

    Raises:
        ValueError: the content is no object, or does not match its digest.
    """
    if not isinstance(value, dict) or value.pop("digest", None) != _digest(value):
        raise ValueError("the content does not agree with its digest")
    return value


def _digest(value: dict[str, Any]) -> str:
    # Hash the value as it is read back: JSON turns tuples into lists and keys into strings.
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames within a folder durable with fsync; a no-op on Windows."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """Return the size and SHA-256 of a file for the manifest."""
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def check_files(folder: Path, files: dict[str, Any], *, full: bool = False) -> None:
    """Compare the files of a directory with its manifest.

    Args:
        folder: the prepared directory.
        files: the size and SHA-256 of each file by name.
        full: hash the large files too.

    Raises:
        DataError: a file is missing, truncated or changed, or the manifest has an invalid name or record.
    """
    again = "Prepare the data again (delete the directory first)."
    for name, record in files.items():
        if not _NAMES.fullmatch(name):
            raise DataError(
                f"{folder}/manifest.json lists {name!r}, which is no file of prepared data; it was not written by "
                f"this package or was changed. {again}"
            )
        if not isinstance(record, dict) or not {"size", "sha256"} <= set(record):
            raise DataError(
                f"{folder}/manifest.json does not give size and SHA-256 of {name!r}; it is damaged. {again}"
            )
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing from the prepared data. {again}")
        size = path.stat().st_size
        if size != record["size"]:
            raise DataError(
                f"{path} has {size} bytes, its manifest says {record['size']}; it was cut or changed. {again}"
            )
        if (full or size <= flat_files.IN_MEMORY) and _sha256(path) != record["sha256"]:
            raise DataError(
                f"{path} does not have the SHA-256 of its manifest; it was changed or damaged. {again}"
            )


class Rows:
    """The packed rows of one split.

    ``rows[i]`` is a dict of ``input_ids``, ``document_ids`` (1..k, 0 is padding) and ``position_ids`` (from 0 in
    each piece), each (T,) int64.

    Args:
        folder: the prepared directory.
        split: ``"train"`` or ``"valid"``.
        stats: the manifest's entry of this split.
        row_length: T.
        vocab_size: determines the type of the stored ids.
        pad_id: id of the padding positions.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        stats: dict[str, Any],
        *,
        row_length: int,
        vocab_size: int,
        pad_id: int,
    ) -> None:
        self.folder, self.split, self.stats = folder, split, stats
        self.row_length, self.vocab_size, self.pad_id = row_length, vocab_size, pad_id
        self._tokens = FlatFile(folder / f"{split}.tokens.bin", token_dtype(vocab_size))
        self._segments = FlatFile(folder / f"{split}.segments.bin", np.dtype("<i8"))
        self._rows = FlatFile(folder / f"{split}.rows.bin", np.dtype("<i8"))
        found = {
            "tokens": len(self._tokens), "rows": len(self._rows) - 1, "segments": len(self._segments) // 2,
        }  # fmt: skip
        told = {"tokens": int(stats["tokens"]), "rows": int(stats["rows"])}
        if any(found[name] != count for name, count in told.items()) or len(self._segments) % 2:
            raise DataError(
                f"{folder} holds {found} in its {split} split, but its manifest says {told}; they do not belong "
                "together. Prepare the data again."
            )

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __repr__(self) -> str:
        return f"Rows({self.split}: {len(self):,} rows of {self.row_length}, {self.num_tokens:,} tokens)"

    def __getstate__(self) -> dict[str, Any]:
        keep = ("folder", "split", "stats", "row_length", "vocab_size", "pad_id")
        return {name: getattr(self, name) for name in keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def num_tokens(self) -> int:
        """Number of stored tokens, special tokens included and padding excluded."""
        return int(self.stats["tokens"])

    @property
    def num_targets(self) -> int:
        """Number of tokens that are predicted when a model sees whole documents: all but the first of each."""
        return int(self.stats["targets"])

    @property
    def num_bytes(self) -> int:
        """Number of UTF-8 bytes of the text."""
        return int(self.stats["bytes"])

    @property
    def num_characters(self) -> int:
        """Number of characters of the text."""
        return int(self.stats["characters"])

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return int(self.stats["documents"])

    @property
    def padding(self) -> float:
        """Share of positions without a token."""
        return float(self.stats["padding"])

    @property
    def source_rows(self) -> list[int]:
        """Number of rows of each source; the rows of the sources are concatenated."""
        return [int(source["rows"]) for source in self.stats["sources"]]

    @property
    def weights(self) -> list[float] | None:
        """Shares of the sources in the mixture, or None if every row is visited once per epoch."""
        found = [source.get("weight") for source in self.stats["sources"]]
        return (
            None if any(weight is None for weight in found) else [float(weight) for weight in found]
        )

    def order(self, seed: int = 0) -> Order | MixtureOrder:
        """Return the order in which training visits these rows."""
        weights = self.weights
        if weights is None or len(weights) == 1:
            return Order(len(self), seed)
        return MixtureOrder(self.source_rows, weights, seed)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Convert a mean loss in nats per predicted token into bits per byte of text."""
        return nats_per_token / float(np.log(2)) * self.num_targets / max(1, self.num_bytes)

    def tokens_in(self, index: int) -> int:
        """Return the number of tokens in a row, padding excluded."""
        self._check(index)
        return int(self._pieces(np.array([index % len(self)]))[1][:, 1].sum())

    def _check(self, index: int) -> None:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")

    def _pieces(self, chosen: Ints) -> tuple[Ints, Ints]:
        """Return (B,) the number of pieces of each row, and (N, 2) first token and length of all of them.

        Raises:
            DataError: an offset points outside the file it refers to, or a row has more tokens than its length.
        """
        pairs = self._rows.read(chosen, np.full(len(chosen), 2), chosen).reshape(-1, 2)
        counts = np.diff(pairs, axis=1)[:, 0]
        wrong = (pairs[:, 0] < 0) | (counts < 0) | (2 * pairs[:, 1] > len(self._segments))
        if wrong.any():
            raise self._inconsistent("rows", int(chosen[wrong.argmax()]))
        pieces = self._segments.read(2 * pairs[:, 0], 2 * counts, chosen).reshape(-1, 2)
        row = np.repeat(np.arange(len(chosen)), counts)
        outside = (pieces < 0).any(axis=1) | (pieces > len(self._tokens)).any(axis=1)
        outside |= pieces.sum(axis=1) > len(self._tokens)
        if not outside.any():
            used = np.bincount(row, weights=pieces[:, 1], minlength=len(chosen))
            outside = (used > self.row_length)[row]
        if outside.any():
            raise self._inconsistent("segments", int(chosen[row[outside.argmax()]]))
        return counts, pieces

    def _inconsistent(self, kind: str, row: int) -> DataError:
        return DataError(
            f"{self.folder}/{self.split}.{kind}.bin is damaged: for row {row} it points at what is not there. Prepare "
            "the data again (delete the directory first)."
        )

    def __getitem__(self, index: int) -> Example:
        self._check(index)
        return {name: values[0] for name, values in self.gather([index % len(self)]).items()}

    def gather(self, indices: Sequence[int] | Ints) -> dict[str, Ints]:
        """Return rows as one batch.

        Args:
            indices: B row numbers.

        Returns:
            ``input_ids``, ``document_ids`` and ``position_ids``, each (B, T) int64.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        counts, pieces = self._pieces(chosen)
        row = np.repeat(np.arange(len(chosen)), counts)
        before = np.cumsum(counts) - counts
        rank = np.arange(len(row)) - before[row]
        starts, lengths = pieces[:, 0], pieces[:, 1]
        ends = np.cumsum(lengths)
        position = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        # Start of each piece in its row: the number of tokens before it minus the tokens of all earlier rows.
        row_tokens = np.bincount(row, weights=lengths, minlength=len(chosen)).astype(np.int64)
        offset = (ends - lengths) - (np.cumsum(row_tokens) - row_tokens)[row]
        place = np.repeat(row * self.row_length + offset, lengths) + position
        shape = (len(chosen), self.row_length)
        batch = {
            "input_ids": np.full(shape, self.pad_id, dtype=np.int64),
            "document_ids": np.zeros(shape, dtype=np.int64),
            "position_ids": np.zeros(shape, dtype=np.int64),
        }
        batch["input_ids"].reshape(-1)[place] = self._tokens.read(starts, lengths, chosen[row])
        batch["document_ids"].reshape(-1)[place] = np.repeat(rank + 1, lengths)
        batch["position_ids"].reshape(-1)[place] = position
        return batch
