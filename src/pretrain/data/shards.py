"""Prepared data on disk: a manifest, a tokenizer, and flat files of tokens, documents, pieces and rows.

Each split has four files: ``tokens`` (uint16 or uint32, all documents concatenated, with their special tokens),
``documents`` (int64 token offsets), ``segments`` (int64 pairs: first token and length of every piece of a document, in
row order) and ``rows`` (int64 offsets into the segments).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.data.flat_files import PADDING, FlatFile
from pretrain.data.manifests import MANIFEST, check_files, unsealed
from pretrain.data.order import MixtureOrder, Order
from pretrain.data.recut import Pieces, recut
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import CheckpointCorrupt, DataError
from pretrain.utils.files import printable
from pretrain.utils.strict_json import JSON_LIMIT, parse_json

__all__ = [
    "FORMAT",
    "SPLITS",
    "Example",
    "Prepared",
    "Rows",
    "read_manifest",
    "token_dtype",
]

FORMAT = 1
# Licences of built-in sources; that of other text is known to the user only.
_LICENCES = {"python": "PSF-2.0"}
SPLITS = ("train", "valid")

Ints = NDArray[np.int64]
Example = Mapping[str, NDArray[Any]]  # one row


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds every id of a vocabulary."""
    if vocab_size > 2**32:
        raise DataError(f"a vocabulary of {vocab_size} tokens does not fit 32-bit ids.")
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


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

    Attributes:
        num_tokens: stored tokens, special tokens included and padding excluded.
        num_targets: tokens that are predicted when a model sees whole documents: all but the first of each.
        num_bytes, num_characters: UTF-8 bytes and characters of the text.
        num_documents: documents.
        padding: share of positions without a token.
        source_rows: rows of each source; the rows of the sources are concatenated.
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
        self.num_tokens, self.num_targets = int(stats["tokens"]), int(stats["targets"])
        self.num_bytes, self.num_characters = int(stats["bytes"]), int(stats["characters"])
        self.num_documents, self.padding = int(stats["documents"]), float(stats["padding"])
        self.source_rows = [int(source["rows"]) for source in stats["sources"]]
        self._tokens = FlatFile(folder / f"{split}.tokens.bin", token_dtype(vocab_size))
        self._segments = FlatFile(folder / f"{split}.segments.bin", np.dtype("<i8"))
        self._rows = FlatFile(folder / f"{split}.rows.bin", np.dtype("<i8"))
        self._documents = FlatFile(folder / f"{split}.documents.bin", np.dtype("<i8"))
        self._bounds: Ints | None = None  # all of the documents, once they are needed
        found = {
            "tokens": len(self._tokens), "rows": len(self._rows) - 1, "segments": len(self._segments) // 2,
        }  # fmt: skip
        recorded = {"tokens": self.num_tokens, "rows": int(stats["rows"])}
        if any(found[name] != count for name, count in recorded.items()) or len(self._segments) % 2:
            raise DataError(
                f"{folder} holds {found} in its {split} split, but its manifest says {recorded}; they do not belong "
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

    @property
    def tokens_per_row(self) -> float:
        """Mean tokens of the rows that training visits, without padding; in a mixture by the shares of the sources."""
        order = self.order()
        if isinstance(order, Order):
            return self.num_tokens / len(self)
        visited = zip(order.counts, self.stats["sources"], strict=True)
        tokens = sum(
            count * source["tokens"] / source["rows"] for count, source in visited if count
        )
        return float(tokens / order.epoch_length)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {name: values[0] for name, values in self.gather([index % len(self)]).items()}

    def gather(
        self, indices: Sequence[int] | Ints, cuts: NDArray[np.uint64] | None = None
    ) -> dict[str, Ints]:
        """Return B rows as one batch: ``input_ids``, ``document_ids`` and ``position_ids``, each (B, T) int64.

        Args:
            indices: numbers of the rows.
            cuts: (B,) numbers by which the documents that are longer than a row are cut, see ``pretrain.data.recut``;
                0 and None leave the pieces as they were prepared.

        Raises:
            DataError: an offset points outside the file it refers to, or a row has more tokens than its length.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        bounds = self._rows.read(chosen, np.full(len(chosen), 2), chosen).reshape(-1, 2)
        first, counts = bounds[:, 0], np.diff(bounds, axis=1)[:, 0]  # pieces of each row
        wrong = (first < 0) | (counts < 0) | (2 * bounds[:, 1] > len(self._segments))
        if wrong.any():
            raise self._inconsistent("rows", int(chosen[wrong.argmax()]))
        pieces = self._segments.read(2 * first, 2 * counts, chosen).reshape(-1, 2)
        starts, lengths = pieces[:, 0], pieces[:, 1]
        row = np.repeat(np.arange(len(chosen)), counts)  # of each piece
        used = np.bincount(row, lengths, len(chosen)).astype(np.int64)  # tokens of each row
        outside = (pieces < 0).any(axis=1) | (pieces > len(self._tokens)).any(axis=1)
        outside |= (starts + lengths > len(self._tokens)) | (used > self.row_length)[row]
        if outside.any():
            raise self._inconsistent("segments", int(chosen[row[outside.argmax()]]))
        if cuts is not None and cuts.any():
            whole = (starts, lengths, row)
            starts, lengths, row = recut(whole, cuts, *self._document_bounds(whole, chosen))
            counts = np.bincount(row, minlength=len(chosen))
        # The pieces of a row stand side by side from its first column on. Behind them is one of padding, of document 0.
        ends, every = np.cumsum(counts), np.arange(len(row))
        table = np.zeros((3, len(row) + len(chosen)), dtype=np.int64)
        table[:, every + row] = starts, lengths, every - (ends - counts)[row] + 1
        last = ends + np.arange(len(chosen))
        table[0, last], table[1, last] = PADDING, self.row_length - used
        starts, lengths, number = table
        shape = (len(chosen), self.row_length)
        document = np.repeat(number, lengths).reshape(shape)
        begin = (np.cumsum(lengths) - lengths) % self.row_length  # first column of each piece
        position = np.arange(self.row_length) - np.repeat(begin, lengths).reshape(shape)
        tokens = self._tokens.read(starts, lengths, np.repeat(chosen, counts + 1))
        ids = tokens.astype(np.int64).reshape(shape)
        if len(padding := np.flatnonzero(document == 0)):
            ids.flat[padding], position.flat[padding] = self.pad_id, 0
        return {"input_ids": ids, "document_ids": document, "position_ids": position}

    def _document_bounds(self, pieces: Pieces, chosen: Ints) -> tuple[Ints, Ints]:
        """Return of each piece the first token of its document, and the one after its last."""
        if self._bounds is None:
            whole = np.array([0]), np.array([len(self._documents)])
            self._bounds = self._documents.read(*whole, chosen[:1])
        starts, lengths, row = pieces
        last = np.searchsorted(self._bounds, starts, side="right").clip(1, len(self._bounds) - 1)
        first, end = self._bounds[last - 1], self._bounds[last]
        outside = (starts < first) | (starts + lengths > end)
        if outside.any():
            raise self._inconsistent("documents", int(chosen[row[outside.argmax()]]))
        return first, end

    def _inconsistent(self, kind: str, row: int) -> DataError:
        return DataError(
            f"{self.folder}/{self.split}.{kind}.bin is damaged: row {row} refers to positions that do not exist. "
            "Prepare the data again (delete the directory first)."
        )


# ------------------------------------------------------------------------------------------------ the directory


class Prepared:
    """Packed rows of a training and a validation split, with their tokenizer.

    Attributes:
        path: the directory.
        manifest: its manifest: ``fingerprint``, ``options``, ``splits``, ``unigram``, ``notes``, ``files``.
        tokenizer: the tokenizer that the rows were encoded with.
        row_length: tokens in a row.
        train, valid: the rows of each split.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.path, self.manifest, self.tokenizer = path, manifest, tokenizer
        self.row_length: int = manifest["options"]["row_length"]
        pad = tokenizer.pad_id if tokenizer.pad_id is not None else 0
        shape = {"row_length": self.row_length, "vocab_size": tokenizer.vocab_size, "pad_id": pad}
        self.train, self.valid = (
            Rows(path, split, manifest["splits"][split], **shape) for split in SPLITS
        )

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Prepared:
        """Open a prepared directory.

        Args:
            path: a directory that :func:`prepare` wrote.
            verify: hash files over 64 MiB completely now; otherwise each of their blocks is verified when it is
                first read. Smaller files are always hashed.

        Raises:
            DataError: there are no prepared data, or a file is missing, truncated or changed.
        """
        folder = Path(os.path.expanduser(path))
        manifest = read_manifest(folder)
        if manifest is None:
            raise DataError(
                f"{folder} holds no prepared data ({MANIFEST} is missing). Make it with: pretrain prepare SOURCES "
                f"--out {folder}"
            )
        check_files(folder, manifest["files"], full=verify)
        tokenizer = Tokenizer.from_directory(folder / "tokenizer")
        if tokenizer.vocab_size != manifest["tokenizer"]["vocab_size"]:
            raise _damaged(
                folder / MANIFEST,
                f"tokenizer.vocab_size is {manifest['tokenizer']['vocab_size']}, but the tokenizer beside it has "
                f"{tokenizer.vocab_size} tokens",
            )
        try:
            return cls(folder, manifest, tokenizer)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise _damaged(folder / MANIFEST, f"{type(error).__name__}: {error}") from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 over sources, options and tokenizer."""
        return str(self.manifest["fingerprint"])

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per predicted token, on the validation rows if there are any."""
        rows = self.valid if self.valid.num_targets else self.train
        return rows.num_bytes / max(1, rows.num_targets)

    @property
    def unigram_entropy(self) -> float | None:
        """Unigram baseline: nats per token of the validation rows, given only the frequency of each token."""
        value = self.manifest["unigram"].get("nats")
        return None if value is None else float(value)

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Name, requested share, actual share, documents, tokens, bytes and rows of each training source."""
        found: list[dict[str, Any]] = self.manifest["splits"]["train"]["sources"]
        return found

    @property
    def processor(self) -> Tokenizer:
        """The tokenizer, as what a model reads its inputs with."""
        return self.tokenizer

    def about(self) -> dict[str, Any]:
        """Return what a checkpoint records about the rows; names of sources, without their paths on this machine."""
        sources = [
            {
                "name": source["name"]
                if str(source["name"]).startswith("hub:")
                else Path(source["name"]).name,
                "licence": _LICENCES.get(source["name"]),
                "documents": source["documents"],
                "tokens": source["tokens"],
                "share": source["share"],
            }
            for source in self.sources
        ]
        tokenizer = str(self.manifest["options"].get("tokenizer", ""))
        return {
            "fingerprint": self.fingerprint,
            "sources": sources,
            "left_out": {
                key: self.manifest[key] for key in ("duplicates", "empty", "contaminated")
            },
            "unigram_nats": self.unigram_entropy,
            "row_length": self.row_length,
        } | ({"tokenizer": tokenizer} if tokenizer.startswith("hub:") else {})

    def table(self) -> str:
        """Return the closing table of ``prepare`` as text."""
        # File names need not be UTF-8, and may hold control characters: escape both.
        text = _table(self).encode("utf-8", "backslashreplace").decode("utf-8")
        return "\n".join(map(printable, text.split("\n")))

    def __repr__(self) -> str:
        return (
            f"Prepared({str(self.path)!r}: {len(self.train):,} training and {len(self.valid):,} validation rows of "
            f"{self.row_length} tokens, {self.tokenizer.kind} vocabulary of {self.tokenizer.vocab_size})"
        )

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(self.table())}</pre>"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a prepared directory, or None if there is none.

    Raises:
        DataError: the manifest is damaged, belongs to something else, or has another format.
    """
    file = folder / MANIFEST
    try:
        with file.open("rb") as stream:
            data = stream.read(JSON_LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
    try:
        found = parse_json(data, file)
        manifest: dict[str, Any] = found if isinstance(found, dict) else {}
        if {"digest", "format"} <= manifest.keys():
            manifest = unsealed(manifest)
    except CheckpointCorrupt as error:
        raise _damaged(file, f"expected {error.expected}, found {error.found}") from error
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    if "format" not in manifest or "schema" in manifest:
        what = "a checkpoint" if "schema" in manifest else "something else"
        raise DataError(
            f"{folder} is not prepared data: its {MANIFEST} belongs to {what}. Give a directory that `pretrain "
            "prepare` wrote."
        )
    if (kind := manifest.get("kind")) is not None:
        raise DataError(
            f"{folder} is not prepared data of text, but of {kind}. Train on it with data.source {kind} and "
            f"data.source_args.train {folder}, or give a directory of text."
        )
    if manifest["format"] != FORMAT:
        raise DataError(
            f"{file} has format {manifest['format']!r}, this release reads {FORMAT}; prepare the data again."
        )
    _check_manifest(file, manifest)
    return manifest


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    """Check the types and ranges of all manifest fields that are read, since a manifest is untrusted input."""
    _check(file, "", manifest, _SHAPE)
    _check(file, "options", manifest["options"], _OPTIONS, optional=("vocab_size",))
    _check(file, "tokenizer", manifest["tokenizer"], _TOKENIZER_SHAPE)
    if manifest["unigram"]:
        _check(file, "unigram", manifest["unigram"], {"nats": _Range(float, 0, 1e6)})
    for split in SPLITS:
        where, stats = f"splits.{split}", manifest["splits"].get(split)
        # Data prepared by older releases do not count unknown tokens.
        _check(file, where, stats, _SPLIT_SHAPE, optional=("unknown",))
        for entry in stats["sources"]:
            _check(file, f"{where}.sources", entry, _SOURCE_SHAPE, optional=("weight",))
        if sum(entry["rows"] for entry in stats["sources"]) != stats["rows"]:
            raise _damaged(file, f"the sources of {where} do not have {stats['rows']} rows")
    for name, record in manifest["files"].items():
        _check(file, f"files.{name[:80]}", record, {"size": _COUNT, "sha256": str})
    if any(not isinstance(note, str) for note in manifest["notes"]):
        raise _damaged(file, "an entry of notes is not a string")


class _Range(NamedTuple):
    """An allowed range of numbers, bounds included."""

    kind: type
    low: float
    high: float

    def holds(self, value: Any) -> bool:
        """Whether a number lies within the range."""
        return bool(self.low <= value <= self.high)


_COUNT = _Range(int, 0, 1 << 60)
_SHARE = _Range(float, 0, 1)
_SHAPE: dict[str, Any] = {
    "fingerprint": str, "options": dict, "splits": dict, "files": dict, "unigram": dict, "tokenizer": dict,
    "notes": list, "duplicates": _COUNT, "empty": _COUNT, "contaminated": _COUNT,
}  # fmt: skip
_SPLIT_SHAPE: dict[str, Any] = {
    "documents": _COUNT, "bytes": _COUNT, "tokens": _COUNT, "characters": _COUNT, "targets": _COUNT,
    "longest": _COUNT, "rows": _COUNT, "padding": _SHARE, "sources": list, "unknown": _COUNT,
}  # fmt: skip
_SOURCE_SHAPE: dict[str, Any] = {
    "name": str, "share": _SHARE, "rows": _COUNT, "tokens": _COUNT, "weight": _Range(float, 1e-300, 1e300),
}  # fmt: skip
_OPTIONS: dict[str, Any] = {
    "row_length": _Range(int, 2, 1 << 24),
    "vocab_size": _Range(int, 1, 1 << 32),
}
_TOKENIZER_SHAPE: dict[str, Any] = {
    "kind": str, "vocab_size": _Range(int, 1, 1 << 32), "trained_on_bytes": _COUNT,
}  # fmt: skip


def _damaged(file: Path, fault: str) -> DataError:
    return DataError(
        f"{file} is damaged ({fault}); prepare the data again, or copy the file again."
    )


def _check(
    file: Path, where: str, value: Any, shape: dict[str, Any], optional: Sequence[str] = ()
) -> None:
    """Raise DataError unless a part of the manifest has these keys, types and ranges; ``optional`` may be absent."""
    if not isinstance(value, dict):
        raise _damaged(file, f"{where} is missing or not an object")
    for key, kind in shape.items():
        name = f"{where}.{key}".lstrip(".")
        found: Any = value.get(key)
        if key in optional and (key not in value or (found is None and key == "weight")):
            continue
        if key not in value:
            raise _damaged(file, f"{name} is missing")
        types = (int, kind.kind) if isinstance(kind, _Range) else kind
        if not isinstance(found, types) or isinstance(found, bool):
            raise _damaged(file, f"{name} holds {type(found).__name__}")
        if isinstance(kind, _Range) and not kind.holds(found):
            allowed = f"{kind.low:g} to {kind.high:g}"
            raise _damaged(file, f"{name} is {str(found)[:40]}, outside {allowed}")


def _tokenizer_line(prepared: Prepared) -> str:
    manifest = prepared.manifest
    tokenizer, splits = manifest["tokenizer"], manifest["splits"]
    line = f"{tokenizer['kind']} tokenizer of {tokenizer['vocab_size']:,} tokens"
    if trained := tokenizer["trained_on_bytes"]:
        asked = manifest["options"].get("vocab_size", tokenizer["vocab_size"])
        of = f" ({asked:,} asked for)" if tokenizer["kind"] != "char" else ""
        line += f"{of}, trained on {trained / 1e6:,.1f} MB"
    name = prepared.tokenizer.roles.get("unk")
    if name and all(splits[split].get("unknown") is not None for split in SPLITS):
        tokens = sum(splits[split]["tokens"] for split in SPLITS)
        unknown = sum(splits[split]["unknown"] for split in SPLITS)
        line += f"; {100 * unknown / max(1, tokens):.2f} % of the tokens are {name}"
    return line


def _table(prepared: Prepared) -> str:
    manifest = prepared.manifest
    lines = [f"prepared {prepared.path}", f"{'':<16}{'train':>16}{'valid':>16}"]
    splits = [manifest["splits"][split] for split in SPLITS]

    def add(label: str, value: Callable[[dict[str, Any]], str]) -> None:
        lines.append(f"{label:<16}" + "".join(f"{value(split):>16}" for split in splits))

    add("documents", lambda s: f"{s['documents']:,}")
    add("bytes", lambda s: f"{s['bytes']:,}")
    add("tokens", lambda s: f"{s['tokens']:,}")
    add("bytes per token", lambda s: f"{s['bytes'] / s['targets']:.3f}" if s["targets"] else "-")
    add("longest", lambda s: f"{s['longest']:,}")
    add("rows", lambda s: f"{s['rows']:,}")
    add("padding", lambda s: f"{100 * s['padding']:.2f} %")
    dropped = (
        f"{manifest['duplicates']:,} duplicates, {manifest['empty']:,} empty documents left out"
    )
    if manifest["contaminated"]:
        dropped += f", {manifest['contaminated']:,} training documents that also occur in validation left out"
    lines.append(dropped)
    lines.append(_tokenizer_line(prepared))
    if manifest["unigram"]:
        lines.append(
            f"unigram baseline: {manifest['unigram']['nats']:.4f} nats per validation token"
        )
    if len(prepared.sources) > 1:
        lines += [
            f"mixture: {100 * s['share']:.1f} % {s['name']} ({s['rows']:,} rows)"
            for s in prepared.sources
        ]
    lines += [f"note: {note}" for note in manifest["notes"]]
    return "\n".join(lines)
