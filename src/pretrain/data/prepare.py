"""``prepare``: sources to packed rows on disk; a later call with the same input finds them by their fingerprint.

The result is a directory: ``manifest.json`` (written last), ``tokenizer/`` and four flat files for each split
(see :mod:`pretrain.data.shards`). The data are built in a hidden directory beside it, which a later run resumes if
this one is killed, and renamed into place at the end, so the target never holds partial data.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.config.check import check_count
from pretrain.config.spelling import option
from pretrain.data.encodings import check_encoding
from pretrain.data.flat_files import write_sums
from pretrain.data.manifests import MANIFEST, file_record, write_sealed
from pretrain.data.paths import FileHashes, cache_home
from pretrain.data.pipeline import (
    Scan,
    TokeniseJournal,
    pack_split,
    sample_filter,
    scan_sources,
    tokenise,
    unigram_baseline,
)
from pretrain.data.shards import FORMAT, SPLITS, Prepared, read_manifest
from pretrain.data.sources import Sample, Source, check_columns, resolve_sources, unused_options
from pretrain.data.tokenizer import SAMPLE_BYTES, Tokenizer
from pretrain.data.tokenizer_build import KINDS
from pretrain.data.workdir import build, disk_errors, foreign, sweep
from pretrain.data.workers import train_apart
from pretrain.errors import ConfigError, DataError, TokenizerError
from pretrain.printing import console, in_notebook, printable, show
from pretrain.utils.imports import import_named

__all__ = ["Prepared", "prepare"]

_IMAGES = "pretrain.data.images.prepare"  # which preparing text does not load
_ARRAYS = (".npz", ".tar", "ubyte", "ubyte.gz")
_END_OF_TEXT = "<|endoftext|>"  # stands between the documents of many published files
_MARKS = 32  # special tokens that the text is searched for


def prepare(
    sources: Any,
    out: str | Path | None = None,
    *,
    tokenizer: str | Path | Tokenizer = "bpe",
    vocab_size: int = 8192,
    row_length: int = 512,
    valid: Any = 0.01,
    text: str | Mapping[str, str] = "text",
    separator: str | None = None,
    encoding: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    cache_dir: str | Path | None = None,
    quiet: bool = False,
    lowercase: bool = False,
    keep_duplicates: bool = False,
    source: str | None = None,
    size: int | None = None,
    channels: int | None = None,
) -> Any:
    """Turn text into packed rows of token ids, or decode images; a second call with the same input reuses the result.

    Args:
        sources: path, glob, folder, ``"python"``, ``"hub:NAME"``, a ``datasets.Dataset``, a frame of pandas or polars,
            a list of these or of rows (dicts), a dict of columns, or a mapping from these to their share of the rows.
            Each text file and each table row is one document.
        out: directory to write; default: a directory in the cache, named after the fingerprint.
        tokenizer: a kind to train (``"bpe"``, ``"wordpiece"``, ``"char"``), a file, directory or checkpoint, or the
            name of one on the Hub (``"org/name"``), whose commit the manifest records.
        vocab_size: upper bound for a trained vocabulary.
        row_length: tokens in a row.
        valid: share of documents held out, chosen by a hash of their content; or ``"last:0.1"`` for the last tenth
            of the text by characters; or a source; or 0.
        text: column of the text in tables; a mapping sets the column per file (by name, path or pattern).
        separator: text between documents in plain text files, whose line ends are all read as a line feed.
        encoding: encoding of text files and tables; default UTF-8, or the encoding of the byte order mark.
        seed: determines which documents are held out.
        workers: number of encoding processes; default: one per core.
        cache_dir: default ``$PRETRAIN_CACHE``, else ``~/.cache/pretrain``.
        quiet: print nothing.
        lowercase: train a WordPiece tokenizer that drops case and accents.
        keep_duplicates: keep documents that occur again, to measure a loss on all of the text.
        source: what the sources hold: ``"text"`` or ``"images"``, of which there is one source: what ``data.source:
            images`` reads. Not given: images if it is an archive or arrays of them, or a folder of them without text.
        size: of images: height and width that all are scaled to; by default they keep their own.
        channels: of images: 3 for RGB, 1 for grey; by default those of each.

    Returns:
        ``Prepared``, or ``PreparedImages``. Only ``out``, ``size``, ``channels``, ``cache_dir`` and ``quiet`` are for
        images.

    Raises:
        DataError: a source cannot be read (with file, line and byte), there is no text, or the disk is full.
        TokenizerError: the tokenizer cannot be opened or trained.
        CheckpointError: the tokenizer is on the Hub, and cannot be fetched.
        ConfigError: an option is for the other kind of source.
    """
    given, cache = {**locals()}, _place(cache_dir) if cache_dir is not None else cache_home()
    if _of_images(source, sources, given):
        return _images(sources, out, cache, size, channels, quiet)
    with disk_errors(cache):
        hashes = FileHashes(cache / "files.json")
        job = _understand(
            sources, tokenizer, vocab_size, row_length, valid, text, separator, seed, workers, cache, hashes,
            quiet, lowercase, encoding, keep_duplicates,
        )  # fmt: skip
        hashes.save()
    target = _place(out) if out is not None else cache / "prepared" / job.fingerprint[:20]
    with disk_errors(target):
        sweep(Path(os.path.realpath(target)), job.say)
        found = _existing(target, job)
    if found is not None:
        job.say(f"prepared data found in {target}: nothing to do")
        return found
    with disk_errors(target), _stoppable():
        prepared = _build(target, job)
    if not quiet:
        show(prepared.table())
    return prepared


def _printer(quiet: bool) -> Callable[[str], None]:
    """Return a function that shows a line, or nothing if quiet."""
    return (lambda line: None) if quiet else (lambda line: show(printable(line)))


# ------------------------------------------------------------------------------------------------ images


def _of_images(source: str | None, sources: Any, given: Mapping[str, Any]) -> bool:
    """Return whether the sources are of images, and check that no option of the other kind is given."""
    if source not in (None, "text", "images"):
        raise ConfigError(f"{option('source', source)}: prepare knows text and images.")
    one = isinstance(sources, str | Path)
    if (
        source is None
        and one
        and (os.path.isdir(os.path.expanduser(sources)) or str(sources).endswith(_ARRAYS))
    ):
        source = "images" if import_named(f"{_IMAGES}:holds_images", "source")(sources) else "text"
    images = source == "images"
    both, of_images = ("sources", "out", "source", "cache_dir", "quiet"), ("size", "channels")
    for name, parameter in inspect.signature(prepare).parameters.items():
        other_kind = name not in both and (name in of_images) != images
        if other_kind and given[name] != parameter.default:
            kind, other = ("images", "text") if images else ("text", "images")
            raise ConfigError(
                f"{option(name, given[name])} is for {other}, and {sources} is prepared as {kind}. Leave it out, or "
                f"set {option('source', other)}."
            )
    return images


def _images(
    source: Any, out: str | Path | None, cache: Path, size: Any, channels: Any, quiet: bool
) -> Any:
    say = _printer(quiet)
    place = os.path.abspath(os.path.expanduser(str(source)))
    name = hashlib.sha256(f"{place} {size} {channels}".encode()).hexdigest()
    target = _place(out) if out is not None else cache / "prepared" / f"images-{name[:20]}"
    with disk_errors(target), _stoppable():
        sweep(Path(os.path.realpath(target)), say)
        make = import_named(f"{_IMAGES}:prepare_images", "source")
        prepared = make(source, target, size=size, channels=channels, say=say)
    if not quiet:
        show(prepared.table())
    return prepared


# ------------------------------------------------------------------------------------------------ the arguments


@dataclass(frozen=True)
class _Job:
    """One call of ``prepare`` with its arguments checked and resolved."""

    sources: list[Source]
    training: int
    weights: list[float] | None
    valid: float
    last: bool
    tokenizer: Tokenizer | None
    options: dict[str, Any]
    fingerprint: str
    notes: list[str]
    workers: int
    say: Callable[[str], None]
    quiet: bool


def _understand(
    sources: Any, tokenizer: Any, vocab_size: int, row_length: int, valid: Any, text: Any, separator: str | None,
    seed: int, workers: int | None, cache: Path, hashes: FileHashes, quiet: bool, lowercase: bool = False,
    encoding: str | None = None, keep_duplicates: bool = False,
) -> _Job:  # fmt: skip
    """Check the arguments, find the sources and compute the fingerprint."""
    row_length = check_count("row_length", row_length, None)
    vocab_size, seed = check_count("vocab_size", vocab_size, None), check_count("seed", seed, None)
    if workers is not None:
        workers = check_count("workers", workers, 0)
    if row_length < 2:
        raise DataError(f"row_length must be at least 2, found {row_length}.")
    spool = cache / "hub"
    resolve = partial(
        resolve_sources, text=text, separator=separator, encoding=encoding, spool=spool
    )
    train, weights = resolve(sources)
    share, last, held = _understand_valid(valid, resolve)
    check_columns(text, [*train, *held])
    notes = unused_options([*train, *held], text, separator, encoding)
    given = _understand_tokenizer(tokenizer)
    if lowercase and tokenizer != "wordpiece":
        raise TokenizerError(
            "lowercase works with tokenizer='wordpiece' only: the other kinds reproduce every text exactly, and an "
            "existing tokenizer has its own setting. Leave lowercase out."
        )
    options = {
        "tokenizer": (given.source or given.kind) if given else str(tokenizer),
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
    if keep_duplicates:
        options["keep_duplicates"] = True
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
    return _Job(
        sources=[*train, *held], training=len(train), weights=weights, valid=share, last=last, tokenizer=given,
        options=options, fingerprint=fingerprint, notes=notes,
        workers=workers or os.cpu_count() or 1, say=_printer(quiet), quiet=quiet,
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
                f"{option('valid', valid)}: expected a number after 'last:', as in 'last:0.1'."
            ) from error
        if not 0 <= share < 1:
            raise DataError(
                f"{option('valid', valid)}: the share held out must be at least 0 and below 1."
            )
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


# ------------------------------------------------------------------------------------------------ the directory


def _place(name: str | Path) -> Path:
    try:
        if "\0" in str(name):
            raise ValueError("it holds a NUL character")
        return Path(name).expanduser()
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{str(name)!r} is not a valid directory name: {error}") from error


def _existing(target: Path, job: _Job) -> Prepared | None:
    """Return the prepared data in ``target`` if they match the job.

    Prepared data that do not match are reported, and None is returned: they will be replaced.

    Raises:
        DataError: ``target`` is something else, which must not be overwritten.
    """
    if target.exists() and not target.is_dir():
        raise DataError(f"{target} is a file; `out` must be a directory.")
    strange = foreign(target) if target.is_dir() else None
    if strange is not None:
        raise DataError(
            f"{target} exists and is not prepared data: {strange!r} in it was not written by prepare, and would be "
            "lost. Choose another `out`."
        )
    try:
        manifest = read_manifest(target)
    except DataError as error:
        # Only directories that prepare() wrote are replaced; other programs write a manifest.json too.
        if not (target / "train.tokens.bin").is_file():
            raise
        job.say(f"{error} Preparing it again.")
        return None
    if manifest is None:
        if target.is_dir() and any(target.iterdir()):
            raise DataError(
                f"{target} exists and is not prepared data; choose another `out`, or empty this directory."
            )
        return None
    if manifest["fingerprint"] == job.fingerprint:
        return _ready(target, job)
    old, new = manifest["options"], job.options
    changed = [
        f"{name} {old.get(name)!r} -> {new[name]!r}" for name in new if old.get(name) != new[name]
    ]
    reason = "; ".join(changed) or "the content of a source or the tokenizer changed"
    job.say(f"{target} was prepared from other sources or options ({reason}): preparing it again")
    return None


def _ready(target: Path, job: _Job) -> Prepared | None:
    """Return the prepared data in ``target`` if they are intact and have the fingerprint of the job, else None."""
    try:
        manifest = read_manifest(target)
        if manifest is not None and manifest["fingerprint"] == job.fingerprint:
            return Prepared.open(target)
    except (DataError, TokenizerError) as error:
        job.say(f"{error} Preparing it again.")
    return None


def _build(out: Path, job: _Job) -> Prepared:
    place = build(
        out, job.fingerprint, job.say, lambda target: _ready(target, job),
        lambda work: _scan(work, job), lambda work, begun: _fill(work, job, *begun),
    )  # fmt: skip
    return Prepared.open(place)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Make SIGTERM raise SystemExit(143), so that temporary files are cleaned up, unless a handler is set already."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _bar(label: str, total: int | None, quiet: bool) -> Iterator[Callable[[int], Any]]:
    from tqdm import tqdm

    # In a log file a progress bar would print a line per update; a notebook has no terminal but renders the bar.
    quiet = quiet or not (console().isatty() or in_notebook())
    with tqdm(
        total=total,
        desc=label,
        unit="B",
        unit_scale=True,
        disable=quiet,
        leave=False,
        file=console(),
    ) as bar:
        yield bar.update


def _scan(work: Path, job: _Job) -> tuple[Scan, Tokenizer]:
    """Return the result of the first pass and the tokenizer, loaded if an interrupted run completed them."""
    scan = Scan.load(work)
    if scan is not None:
        with suppress(TokenizerError):
            tokenizer = Tokenizer.from_directory(work / "tokenizer")
            if tokenizer.fingerprint == scan.tokenizer:
                return scan, tokenizer
    for name in ("journal.json", "scan.json"):
        (work / name).unlink(missing_ok=True)
    sample = Sample(SAMPLE_BYTES) if job.tokenizer is None else None
    with _bar("reading", None, job.quiet) as progress:
        scan = scan_sources(
            job.sources, job.training, valid=job.valid, last=job.last, seed=job.options["seed"], sample=sample,
            progress=progress, keep_duplicates=job.options.get("keep_duplicates", False),
            marks=sorted({_END_OF_TEXT, *(job.tokenizer.typed_names if job.tokenizer else ())})[:_MARKS],
        )  # fmt: skip
    if not (scan.states == 1).any():
        names = ", ".join(source.name for source in job.sources[: job.training])
        raise DataError(
            f"there is no text to train on in {names}: {scan.documents} documents, {scan.empty} of them empty, "
            f"{scan.contaminated} also in the validation source. Check the path, and "
            f"{option('text', job.options['text'])}."
        )
    if sample is not None:
        texts = sample.texts(sample_filter(scan)) or sample.texts()
        scan.sampled = sum(len(text.encode("utf-8")) for text in texts)
        job.say(
            f"training a {job.options['tokenizer']} tokenizer on {scan.sampled / 1e6:,.1f} MB of the text"
        )
        tokenizer = train_apart(
            texts, job.options["tokenizer"], vocab_size=job.options["vocab_size"],
            lowercase=job.options.get("lowercase", False),
        )  # fmt: skip
    else:
        assert job.tokenizer is not None
        tokenizer = job.tokenizer
    tokenizer.save(work / "tokenizer")
    # Fingerprint the tokenizer as reloaded, since parts of it may not be stored in its files.
    scan.tokenizer = Tokenizer.from_directory(work / "tokenizer").fingerprint
    scan.save(work)
    return scan, tokenizer


def _fill(work: Path, job: _Job, scan: Scan, tokenizer: Tokenizer) -> None:
    """Write tokens, packed rows, checksums and the manifest into the work directory."""
    with _bar("encoding", scan.text_bytes, job.quiet) as progress:
        done = tokenise(work, job.sources, scan, tokenizer, workers=job.workers, progress=progress)
    row_length = job.options["row_length"]
    splits: dict[str, Any] = {}
    notes = [*job.notes, *scan.notes]
    for index, split in enumerate(SPLITS):
        tallies = done.tallies[index]
        rows = pack_split(work, split, [tally.documents for tally in tallies], row_length)
        total = done.total(index)
        listed = range(job.training if split == "train" else len(tallies))
        splits[split] = {
            **asdict(total),
            "targets": total.tokens - total.documents,
            "longest": done.longest[index],
            "unknown": done.unknown[index],
            "rows": sum(rows),
            "padding": 1 - total.tokens / (sum(rows) * row_length) if sum(rows) else 0.0,
            "sources": [_source_entry(job, k, index, asdict(tallies[k]), rows) for k in listed],
        }
        if sum(rows) == 1:
            notes.append(f"the {split} text fills less than one row of {row_length} tokens")
    if not splits["valid"]["documents"]:
        notes.append("no validation rows: a run on these data cannot measure a validation loss")
    notes += _vocabulary_notes(job, tokenizer, done)
    for kind in ("tokens", "segments", "rows"):  # the files that training reads
        for split in SPLITS:
            write_sums(work / f"{split}.{kind}.bin")
    names = sorted(
        p
        for p in work.rglob("*")
        if p.is_file() and (p.suffix == ".bin" or p.parent.name == "tokenizer")
    )
    files = {
        p.relative_to(work).as_posix(): file_record(p) for p in names if p.name != "states.bin"
    }
    manifest = {
        "format": FORMAT,
        "fingerprint": job.fingerprint,
        "options": job.options,
        "tokenizer": {
            "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint,
            "max_id": done.max_id, "trained_on_bytes": scan.sampled,
        },
        "documents": scan.documents,
        "duplicates": scan.duplicates,
        "empty": scan.empty,
        "contaminated": scan.contaminated,
        "splits": splits,
        "unigram": unigram_baseline(work, tokenizer),
        "notes": notes,
        "files": files,
    }  # fmt: skip
    write_sealed(work / MANIFEST, manifest)


def _vocabulary_notes(job: _Job, tokenizer: Tokenizer, done: TokeniseJournal) -> list[str]:
    """Return notes on a vocabulary that is smaller than requested or that does not cover the text."""
    notes = []
    asked = job.options["vocab_size"]
    if job.tokenizer is None and tokenizer.kind != "char" and tokenizer.vocab_size < 0.9 * asked:
        notes.append(
            f"the vocabulary has {tokenizer.vocab_size:,} of the {asked:,} entries asked for: the text holds no other "
            "piece of a word that occurs twice"
        )
    tokens = sum(done.total(split).tokens for split in range(len(SPLITS)))
    unknown = sum(done.unknown)
    if unknown > 0.01 * tokens:
        notes.append(
            f"{100 * unknown / tokens:.1f} % of the tokens are {tokenizer.roles['unk']}: the vocabulary lacks these "
            "characters or words, and nothing is learned of them. Take tokenizer 'bpe', which knows every text, or a "
            "larger vocab_size"
        )
    return notes


def _source_entry(
    job: _Job, k: int, split: int, tally: dict[str, int], rows: list[int]
) -> dict[str, Any]:
    weights = job.weights if split == 0 else None
    if weights is None:
        weight, share = None, rows[k] / max(1, sum(rows))
    else:
        weight = weights[k]
        usable = sum(w for i, w in enumerate(weights) if rows[i])
        share = weight / usable if rows[k] else 0.0
    return {"name": job.sources[k].name, "weight": weight, "share": share, "rows": rows[k], **tally}
