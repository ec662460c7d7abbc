"""Prepared data: opening, checking and summarising a directory that ``prepare`` wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.data.pipeline import SPLITS
from pretrain.data.shards import Rows, check_files, unsealed
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import CheckpointCorrupt, DataError
from pretrain.utils.files import printable
from pretrain.utils.strict_json import JSON_LIMIT, parse_json

__all__ = ["FORMAT", "MANIFEST", "Prepared", "read_manifest"]

FORMAT = 1
MANIFEST = "manifest.json"
# Licences of built-in sources; that of other text is known to the user only.
_LICENCES = {"python": "PSF-2.0"}


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
        folder = Path(path)
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
        return {
            "fingerprint": self.fingerprint,
            "sources": sources,
            "left_out": {
                key: self.manifest[key] for key in ("duplicates", "empty", "contaminated")
            },
            "unigram_nats": self.unigram_entropy,
            "row_length": self.row_length,
        }

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
        manifest = parse_json(data, file)
        if isinstance(manifest, dict) and "digest" in manifest and "format" in manifest:
            manifest = unsealed(manifest)
    except CheckpointCorrupt as error:
        raise _damaged(file, f"expected {error.expected}, found {error.found}") from error
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(manifest, dict) or "format" not in manifest or "schema" in manifest:
        what = (
            "a checkpoint"
            if isinstance(manifest, dict) and "schema" in manifest
            else "something else"
        )
        raise DataError(
            f"{folder} is not prepared data: its {MANIFEST} belongs to {what}. Give a directory that `pretrain "
            "prepare` wrote."
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
    for split in SPLITS:
        stats = manifest["splits"].get(split)
        _check(file, f"splits.{split}", stats, _SPLIT_SHAPE)
        if "unknown" in stats:  # absent from data prepared by older releases
            _check(file, f"splits.{split}", stats, {"unknown": _COUNT})
        for entry in stats["sources"]:
            _check(file, f"splits.{split}.sources", entry, _SOURCE_SHAPE)
            if entry.get("weight") is not None:
                _check(
                    file, f"splits.{split}.sources", entry, {"weight": _Range(float, 1e-300, 1e300)}
                )
        if sum(entry["rows"] for entry in stats["sources"]) != stats["rows"]:
            raise _damaged(file, f"the sources of splits.{split} do not have {stats['rows']} rows")
    _check(file, "options", manifest["options"], {"row_length": _Range(int, 2, 1 << 24)})
    if "vocab_size" in manifest["options"]:
        _check(file, "options", manifest["options"], {"vocab_size": _Range(int, 1, 1 << 32)})
    _check(file, "tokenizer", manifest["tokenizer"], _TOKENIZER_SHAPE)
    if manifest["unigram"]:
        _check(file, "unigram", manifest["unigram"], {"nats": _Range(float, 0, 1e6)})
    for name, record in manifest["files"].items():
        _check(file, f"files.{name[:80]}", record, {"size": _COUNT, "sha256": str})
    if any(not isinstance(note, str) for note in manifest["notes"]):
        raise _damaged(file, "notes holds something that is no text")


@dataclass(frozen=True)
class _Range:
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
    "longest": _COUNT, "rows": _COUNT, "padding": _SHARE, "sources": list,
}  # fmt: skip
_SOURCE_SHAPE: dict[str, Any] = {"name": str, "share": _SHARE, "rows": _COUNT}
_TOKENIZER_SHAPE: dict[str, Any] = {
    "kind": str, "vocab_size": _Range(int, 1, 1 << 32), "trained_on_bytes": _COUNT,
}  # fmt: skip


def _damaged(file: Path, fault: str) -> DataError:
    return DataError(
        f"{file} is damaged ({fault}); prepare the data again, or copy the file again."
    )


def _check(file: Path, where: str, value: Any, shape: dict[str, Any]) -> None:
    """Raise DataError unless a part of the manifest has the required keys, types and ranges."""
    if not isinstance(value, dict):
        raise _damaged(file, f"{where} is missing or not an object")
    for key, kind in shape.items():
        name = f"{where}.{key}".lstrip(".")
        if key not in value:
            raise _damaged(file, f"{name} is missing")
        found: Any = value[key]
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
    if name and all("unknown" in splits[split] for split in SPLITS):
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
