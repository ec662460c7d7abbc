"""Sources of documents: files, globs, folders, rows in memory, hub names and the built-in ``python`` corpus.

A source can be read any number of times, yields the same documents in the same order each time, holds at most a block
of text in memory, and has a fingerprint that changes with its content.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pretrain.config.spelling import option, option_name
from pretrain.data.encodings import check_encoding
from pretrain.data.paths import FileHashes, cache_home, find_files, skipped_files_note
from pretrain.data.readers import (
    Piece,
    Reading,
    cell_text,
    file_format,
    has_transform,
    needs_encoding,
    no_column,
    read_file,
)
from pretrain.data.shard_folders import pattern_of, shards_of
from pretrain.errors import DataError
from pretrain.utils.files import note, replacing

__all__ = [
    "DatasetSource", "FileHashes", "FileSource", "HubSource", "MemorySource", "PythonSource", "Sample", "Source",
    "options_read", "resolve_sources", "sized_pieces", "unused_options",
]  # fmt: skip

PIECE_CHARS = 32_768


@runtime_checkable
class Source(Protocol):
    """A source of documents. Any object with these members can be passed to :func:`pretrain.prepare`."""

    name: str
    notes: list[str]

    def pieces(self) -> Iterator[Piece]:
        """Yield ``(text, end)``; the last piece of every document has ``end`` True."""
        ...

    def fingerprint(self, hashes: FileHashes) -> str:
        """Return a string that changes whenever the documents change."""
        ...


# It is an error if more than this share of the documents of a source cannot be decoded.
_FEW = 0.05


@dataclass(eq=False)
class FileSource:
    """Files read in sequence; see :func:`pretrain.data.readers.read_file`.

    Args:
        name: the source as the user spelt it.
        files: paths, in reading order.
        text: column of the text in tables, or columns by file; see :func:`column_of`.
        separator, encoding: see :class:`pretrain.data.readers.Reading`.
        remark: a sentence about files that were skipped, kept in ``notes``.
        legacy: without ``encoding``, that of ``legacy_files``, which are those that are not UTF-8.
    """

    name: str
    files: Sequence[Path]
    text: str | Mapping[str, str] = "text"
    separator: str | None = None
    encoding: str | None = None
    remark: str = ""
    legacy: str | None = None
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Raise DataError if Python does not know an encoding."""
        self.legacy = check_encoding(self.legacy) if self.encoding is None else None
        self.encoding = check_encoding(self.encoding)

    def pieces(self) -> Iterator[Piece]:
        """Yield the documents of all files in pieces; documents that cannot be decoded are skipped and counted.

        Raises:
            DataError: a file cannot be read, or more than 5 % of the documents cannot be decoded.
        """
        self.notes[:] = [self.remark] if self.remark else []
        left_out: list[Callable[[], DataError]] = []
        count = undivided = 0
        for file in self.files:
            how = Reading(
                column_of(self.text, file, self.name), self.separator,
                self.legacy if file in self.legacy_files else self.encoding, self.notes.append, left_out.append,
            )  # fmt: skip
            before = count
            for piece, end in read_file(file, how):
                count += end
                yield piece, end
            undivided += _is_plain(file) and count == before + 1
        if left_out:
            error = left_out[0]()
            if len(left_out) > _FEW * (count + len(left_out)):
                total = count + len(left_out)
                raise DataError(f"{error} {len(left_out):,} of {total:,} documents are like this.")
            self.notes.append(
                f"{len(left_out):,} documents cannot be decoded and are left out: {error}"
            )
        if self.separator is not None and 0 < undivided == sum(map(_is_plain, self.files)):
            self.notes.append(
                f"{option('separator', self.separator)} occurs in no text file of {self.name}: each is one document"
                + (
                    "; backslashes are ordinary characters (a shell writes $'\\n\\n')"
                    * ("\\" in self.separator)
                )
            )

    @functools.cached_property
    def legacy_files(self) -> frozenset[Path]:
        """The files that are read in ``legacy``; see :func:`pretrain.data.readers.needs_encoding`."""
        if (legacy := self.legacy) is None:
            return frozenset()
        texts = (file for file in self.files if file_format(file) != "parquet")
        return frozenset(file for file in texts if needs_encoding(file, legacy))

    @property
    def used_options(self) -> set[str]:
        """The options that change how one of the files is read."""
        kinds = {file_format(file) or "text" for file in self.files}
        used = {
            "separator": {"text"} & kinds,
            "text": kinds - {"text", "html"},
            "encoding": kinds - {"parquet"},
        }
        return {name for name, formats in used.items() if formats}

    def fingerprint(self, hashes: FileHashes) -> str:
        """Hash the contents and formats of the files in their order; names and locations do not matter."""
        return "files:" + ",".join(
            f"{file_format(file)}={hashes.of(file)}"
            + f"@{self.legacy}" * (file in self.legacy_files)
            for file in self.files
        )


def _is_plain(file: Path) -> bool:
    return file_format(file) in ("text", None)


def column_of(text: str | Mapping[str, str], file: Path | str, source: str = "") -> str:
    """Return the name of the text column of a file.

    Args:
        text: one column for all files, or a mapping from a file, a pattern of files (``"news/*.csv"``) or a source to
            its column; the first matching key is used, and the column is ``text`` if no key matches.
        file: path of the file.
        source: the name of the source that the file belongs to.
    """
    if isinstance(text, str):
        return text
    path = str(file)
    for key, name in text.items():
        if key == source or fnmatch.fnmatchcase(path, key) or fnmatch.fnmatchcase(path, f"*/{key}"):
            return name
    return "text"


def check_columns(text: Any, sources: Sequence[Source]) -> None:
    """Raise DataError unless ``text`` is a column name, or a mapping whose keys all match a file or a source."""
    if isinstance(text, str):
        return
    if not isinstance(text, Mapping) or not all(
        isinstance(key, str) and isinstance(name, str) for key, name in text.items()
    ):
        raise DataError(
            f"{option_name('text')} must be the name of a column, or a mapping from files to names, as in "
            f"{option('text', {'a.csv': 'body'})}; found {text!r}."
        )
    named = [
        (str(file), source.name) for source in sources for file in getattr(source, "files", [""])
    ]
    for key in text:
        if not any(column_of({key: "\0"}, file, source) == "\0" for file, source in named):
            files = [Path(file).name for file, _ in named[:5] if file]
            raise DataError(
                f"{option_name('text')} gives a column for {key!r}, but no file or source has this name; known are "
                f"{', '.join(files or [name for _, name in named[:5]])}. Give a name, a path or a pattern such as "
                "'*.csv'."
            )


def options_read(sources: Sequence[Source]) -> set[str]:
    """Return the names of the options (text, separator, encoding) that at least one of the sources is read with."""
    return {name for source in sources for name in getattr(source, "used_options", ())}


def unused_options(
    sources: Sequence[Source],
    text: str | Mapping[str, str],
    separator: str | None,
    encoding: str | None,
) -> list[str]:
    """Return a sentence for each option that was given and that no source is read with."""
    used = options_read(sources)
    options = (
        ("text", None if text == "text" else text, "a table or rows, which have columns"),
        ("separator", separator, "a plain text file"),
        ("encoding", encoding, "a file of text or a table of text"),
    )
    return [
        f"{option(name, value)} has no effect: no source is {what}"
        for name, value, what in options
        if value is not None and name not in used
    ]


class DatasetSource:
    """A ``datasets.Dataset``, which has random access and can therefore be read twice."""

    used_options = frozenset({"text"})

    def __init__(self, dataset: Any, text: str = "text", name: str = "dataset") -> None:
        self.name = name
        self.text = text
        self.notes: list[str] = []
        computed = has_transform(dataset)  # other formats only change the type of the values
        names = list(dataset[:1] if computed else dataset.column_names)
        if text not in names:
            raise no_column(f"the data set {name!r}", text, names)
        self.dataset = dataset if computed else dataset.with_format(None).select_columns([text])

    def pieces(self) -> Iterator[Piece]:
        """Yield the rows of the text column, as a transform of the data set makes them."""
        step = 256
        for first in range(0, len(self.dataset), step):
            values = self.dataset[first : first + step][self.text]
            for number, value in enumerate(values, start=first):
                yield cell_text({self.text: value}, self.text, f"{self.name}, row {number}"), True

    def fingerprint(self, hashes: FileHashes) -> str:
        """Hash the text column: the library's own fingerprint differs between in-memory copies of the same data."""
        digest = hashlib.blake2b(digest_size=16)
        for text, _ in self.pieces():
            digest.update(f"{len(text)}:".encode() + text.encode("utf-8"))
        return f"dataset:{digest.hexdigest()}"


class MemorySource(DatasetSource):
    """Rows in memory: a list of dicts, a frame of pandas or polars, or an arrow table."""

    def __init__(self, rows: Any, text: str = "text", name: str = "rows") -> None:
        self.name = name
        self.text = text
        self.notes: list[str] = []
        if isinstance(rows, list | tuple):
            if not any(text in row for row in rows):
                raise no_column(name, text, list(rows[0]))
            self.values = [row.get(text) for row in rows]
            return
        names = list(rows.column_names if hasattr(rows, "column_names") else rows.columns)
        if text not in names:
            raise no_column(name, text, [str(column) for column in names])
        column = rows[text]
        self.values = column.to_pylist() if hasattr(column, "to_pylist") else column.to_list()

    def pieces(self) -> Iterator[Piece]:
        """Yield the texts; a missing one (None, or the NaN or NA of a frame) is an empty document."""
        for number, value in enumerate(self.values):
            missing = type(value).__name__ == "NAType" or (
                isinstance(value, float) and value != value
            )
            row = {self.text: None if missing else value}
            yield cell_text(row, self.text, f"{self.name}, row {number}"), True


class HubSource:
    """A data set of the hub, streamed once into a local file.

    Spelling: ``hub:owner/name``, optionally ``@config`` and ``:split`` (default ``train``).
    """

    used_options = frozenset({"text"})

    def __init__(self, spec: str, text: str, spool: Path) -> None:
        self.name = f"hub:{spec}"
        body, _, split = spec.partition(":")
        self.repository, _, self.config = body.partition("@")
        self.split = split or "train"
        self.text = text
        self.notes: list[str] = []
        key = hashlib.sha256(f"{spec}\n{text}".encode()).hexdigest()[:16]
        self.file = spool / f"hub-{key}.jsonl"

    def pieces(self) -> Iterator[Piece]:
        """Yield the rows of the local copy, which is downloaded first if it does not exist."""
        self._fetch()
        yield from read_file(self.file, Reading(notes=self.notes.append))

    def fingerprint(self, hashes: FileHashes) -> str:
        """Hash the local copy; delete that file to download the data set again."""
        self._fetch()
        return f"hub:{hashes.of(self.file)}"

    def _fetch(self) -> None:
        if self.file.is_file():
            return
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"{self.name} needs the datasets package: pip install datasets"
            ) from error
        # Two processes may download the same data set: each writes its own temporary file, and the last rename wins.
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.file.parent}, the cache directory of data sets from the hub, cannot be created: "
                f"{error.strerror or error}. Set $PRETRAIN_CACHE to a directory that you can write to."
            ) from error
        try:
            stream = datasets.load_dataset(
                self.repository, self.config or None, split=self.split, streaming=True
            )
            with replacing(self.file) as out:
                for number, row in enumerate(stream):
                    text = cell_text(row, self.text, f"{self.name}, row {number}")
                    out.write(json.dumps({"text": text}).encode() + b"\n")
        except DataError:
            raise
        except Exception as error:  # many types, for a missing name, split or network
            raise DataError(
                f"{self.name} cannot be streamed ({type(error).__name__}: {error}). Check the name, the config after "
                "'@', the split after ':', and the network."
            ) from error


class PythonSource:
    """The standard library of the running Python: its reference topics and the source of every module."""

    name = "python"
    # Tests, other packages, and tables of characters.
    _SKIPPED = frozenset((
        "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings",
    ))  # fmt: skip

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.root = Path(sysconfig.get_path("stdlib"))

    def files(self) -> list[Path]:
        """Return the modules, sorted by name."""
        found = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = sorted(name for name in folders if name not in self._SKIPPED)
            paths = (Path(folder) / name for name in names if name.endswith(".py"))
            found += [path for path in paths if path.is_file()]  # skips dangling links
        return sorted(found, key=lambda path: path.relative_to(self.root).as_posix())

    def pieces(self) -> Iterator[Piece]:
        """Yield the reference topics, then one document per module."""
        from pydoc_data.topics import topics

        self.notes.clear()
        for _, text in sorted(topics.items()):
            yield text, True
        for file in self.files():
            try:
                with tokenize.open(file) as stream:
                    yield stream.read(), True
            except (OSError, SyntaxError, UnicodeDecodeError):
                self.notes.append(f"{file}: not readable as Python source; left out")

    def fingerprint(self, hashes: FileHashes) -> str:
        """Hash the Python version and the names and sizes of the modules, which are fixed for one Python release."""
        files = self.files()
        if not files:
            raise DataError(
                f"the source 'python' needs the standard library as .py files, and {self.root} has none (a frozen or "
                "zipped Python). Give text files instead."
            )
        listing = [
            f"{file.relative_to(self.root).as_posix()}:{file.stat().st_size}" for file in files
        ]
        digest = hashlib.sha256("\n".join([sys.version, *listing]).encode()).hexdigest()
        return f"python:{digest}"


def sized_pieces(pieces: Iterator[Piece], limit: int = PIECE_CHARS) -> Iterator[Piece]:
    """Split documents into pieces of at most ``limit`` characters, independently of the blocks they arrive in.

    A document is split before a space or line feed that follows a non-space character. Byte-level and WordPiece
    pre-tokenizers split there too, so the tokens are those of the whole document. Text without such a place in the
    second half of a piece is split at ``limit``.
    """
    rest = ""
    for text, end in pieces:
        if not rest and end and len(text) <= limit:
            yield text, True
            continue
        rest = rest + text if rest else text
        place = 0
        while len(rest) - place > limit:
            cut = _boundary(rest, place, place + limit)
            yield rest[place:cut], False
            place = cut
        rest = rest[place:]
        if end:
            yield rest, True
            rest = ""


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


def _boundary(text: str, first: int, last: int) -> int:
    """Return the last place in the second half of ``text[first:last]`` where a split keeps all tokens, or ``last``."""
    middle = first + (last - first) // 2
    end = last
    while True:
        place = max(text.rfind(" ", middle, end), text.rfind("\n", middle, end))
        if place < 0:
            return last
        if not text[place - 1].isspace():
            return place
        end = place


def resolve_sources(
    sources: Any,
    *,
    text: str | Mapping[str, str] = "text",
    separator: str | None = None,
    encoding: str | None = None,
    spool: Path | None = None,
    legacy: str | None = None,
) -> tuple[list[Source], list[float] | None]:
    """Turn the ``sources`` argument of a user into source objects and, for a mapping, their shares.

    Args:
        sources: path, glob, folder, ``"python"``, ``"hub:NAME"``, ``datasets.Dataset``, a frame, a source object, a
            list of these or of rows (dicts), a dict of columns, or a mapping from these to their share of the rows.
        text: column of the text in tables, or columns by file; see :func:`column_of`.
        separator: text between documents in plain text files.
        encoding: encoding of text files and tables; None is UTF-8.
        spool: directory for local copies of hub data sets.
        legacy: without ``encoding``, that of the files that are not UTF-8.

    Raises:
        DataError: nothing was found (the nearest name is suggested), or a column or type is wrong.
    """
    if separator == "":
        raise DataError(
            f"separator is empty; give the text between documents, for example {option('separator', chr(10) * 2)}."
        )
    spool = spool or cache_home() / "hub"
    weights: list[float] | None = None
    if isinstance(sources, Mapping) and sources and all(map(_is_column, sources.values())):
        column = column_of(text, "rows")
        if column not in sources:
            raise no_column("rows", column, [*map(str, sources)])
        items: list[Any] = [MemorySource([{column: cell} for cell in sources[column]], column)]
    elif isinstance(sources, Mapping):
        if sources and all(map(_is_split, sources.values())):
            splits = ", ".join(map(str, sources))
            raise DataError(
                f"a {type(sources).__name__} holds several splits ({splits}); give one, as data['train']."
            )
        try:
            weights = [float(weight) for weight in sources.values()]
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the shares of a mixture must be numbers, found {list(sources.values())}."
            ) from error
        if any(not 0 < weight < float("inf") for weight in weights):
            raise DataError(f"the shares of a mixture must be positive numbers, found {weights}.")
        items = list(sources)
    elif isinstance(sources, list | tuple) and sources and isinstance(sources[0], Mapping):
        if not all(isinstance(row, Mapping) for row in sources):
            raise DataError(
                "a list of rows holds dicts only; give other sources in a list of their own."
            )
        items = [MemorySource(sources, column_of(text, "rows"))]
    elif isinstance(sources, list | tuple):
        items = list(sources)
    else:
        items = [sources]
    if not items:
        raise DataError("no source given; name files, a folder, a data set or 'python'.")
    return [_resolve(item, text, separator, encoding, spool, legacy) for item in items], weights


def _is_split(value: Any) -> bool:
    """Whether a value of a mapping holds the rows of a split, and is no share of a mixture."""
    rows = isinstance(value, list | tuple) and value and isinstance(value[0], Mapping)
    return bool(rows) or hasattr(value, "column_names") or hasattr(value, "columns")


def _is_column(value: Any) -> bool:
    return (isinstance(value, list | tuple) or hasattr(value, "tolist")) and not (
        _is_split(value) or getattr(value, "ndim", 1) != 1
    )


def _saved(folder: Path) -> Any:
    """Return what ``save_to_disk`` of the datasets library wrote to a folder, of several splits ``train``; else None.

    Raises:
        DataError: there is no split ``train``, or the folder cannot be read.
    """
    if not os.path.isdir(folder):
        return None
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in folder.glob("*/state.json"))
        if "train" not in splits:
            raise DataError(
                f"{str(folder)!r} holds the splits {', '.join(splits)}, and none called train. Name the folder of one: "
                f"{str(folder / (splits or ['train'])[0])!r}."
            )
        others = [str(folder / split) for split in splits if split != "train"]
        if others:
            note(
                f"{folder}: the split 'train' is read; others have folders of their own: {', '.join(others)}"
            )
        folder = folder / "train"
    if not all((folder / name).is_file() for name in ("state.json", "dataset_info.json")):
        return None
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise DataError(
            f"{str(folder)!r} was saved by the datasets library: pip install datasets"
        ) from error
    try:
        return load_from_disk(str(folder))
    except Exception as error:  # many types, for files that are damaged or missing
        raise DataError(
            f"{str(folder)!r} was saved by the datasets library and cannot be read ({type(error).__name__}: {error}). "
            "Copy or save it again."
        ) from error


def _remark(name: str) -> str:
    """Return what a user should know about the files of a folder that are read and those that are not."""
    told = skipped_files_note(name)
    if len(shards := shards_of(name)) > 1:
        pattern = next(pattern_of(s, shards[s]) for s in ("train", *shards) if s in shards)
        several = f"{name} has the splits {', '.join(shards)}, and all are read; {pattern!r} names one of them"
        told = f"{told}; {several}" if told else several
    return told


def _resolve(
    item: Any,
    text: str | Mapping[str, str],
    separator: str | None,
    encoding: str | None,
    spool: Path,
    legacy: str | None,
) -> Source:
    if isinstance(item, str | Path):
        name = str(item)
        # "python" always names the built-in corpus; "./python" names a file or folder of the current directory.
        if name == "python" and (isinstance(item, str) or not item.exists()):
            return PythonSource()
        if name.startswith("hub:"):
            return HubSource(name.removeprefix("hub:"), column_of(text, name), spool)
        if (saved := _saved(Path(os.path.expanduser(name)))) is not None:
            return DatasetSource(saved, column_of(text, name), name)
        return FileSource(name, find_files(name), text, separator, encoding, _remark(name), legacy)
    if hasattr(item, "column_names") and hasattr(item, "select_columns"):
        if hasattr(item, "__len__"):
            return DatasetSource(item, column_of(text, "dataset"))
        raise DataError(
            "a streamed datasets.IterableDataset can be read only once; give the name as 'hub:NAME' (it is copied to "
            "a local file first) or load it without streaming."
        )
    if isinstance(item, Source):
        return item
    if hasattr(item, "column_names") or hasattr(item, "columns"):
        return MemorySource(item, column_of(text, "frame"), "frame")
    raise DataError(
        f"{type(item).__name__} is not a source; give a path, a glob, a folder, a datasets.Dataset, a frame, a list of "
        "rows [{'text': '...'}, ...], or 'python'."
    )
