"""Durable file operations: all writes of a checkpoint go through the few calls of `FileIO`.

A rename alone is not durable: a file is written and flushed to disk before it is renamed, and its directory is flushed
as well. Tests replace `IO` by an object that kills the process at the n-th call or makes that call fail, so that every
point of a save is tested. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import os
import secrets
import stat
import threading
from collections import deque
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.errors import CheckpointCorrupt, CheckpointError, ConfigError, DataError
from pretrain.printing import printable, show

__all__ = [
    "BackgroundDigest",
    "FileIO",
    "HashingFile",
    "Record",
    "Sink",
    "check_output",
    "fsync_directory",
    "hash_file",
    "is_muted",
    "known_as",
    "muted",
    "note",
    "open_regular",
    "open_writable",
    "printable",
    "read_bytes",
    "reading",
    "replace_file",
    "replacing",
    "sync_file",
    "temporary_name",
    "write_file",
    "write_shown",
    "writing",
]

CHUNK = 4 << 20  # bytes per write, read and hash update
THREADED = 1 << 20  # bytes that are gathered before a thread hashes them
SMALL = 64 << 20  # bytes; largest file that `read_bytes` reads by default
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NAME_BYTES = 255  # longest file name that file systems allow


class FileIO:
    """The system calls of a save, collected in one class so that tests can replace them."""

    def open(self, path: str | Path, flags: int, mode: int = 0o666) -> int:
        """Open `path`; the mode of a new file comes from the umask."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write a part of `data` and return its length in bytes."""
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        """Flush a file (or the entries of a directory) to disk."""
        full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone stops at the drive's cache
        if full is not None:
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, full)
                return
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or directory atomically."""
        os.rename(source, target)

    def exchange(self, first: Path, second: Path) -> bool:
        """Swap the names of two directories in one step; False where the system cannot."""
        renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
        if renameat2 is None:
            return False
        names = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
        return bool(renameat2(*names, _RENAME_EXCHANGE) == 0)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name."""
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        """Remove one file."""
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        """Remove one empty directory."""
        os.rmdir(path)

    def mkdir(self, path: Path) -> None:
        """Create one directory; its mode comes from the umask."""
        os.mkdir(path)


IO = FileIO()


_MUTED: ContextVar[bool] = ContextVar("muted", default=False)


_PRINTED: set[str] = set()  # lines that were printed once


def note(text: str, *, once: bool = False) -> None:
    """Print one line to the console, unless `muted`; see `pretrain.printing.show`.

    Args:
        text: the line.
        once: print it only the first time in this process, as it holds for every call.
    """
    if not is_muted() and not (once and text in _PRINTED):
        show(printable(text))
        if once:
            _PRINTED.add(text)


@contextlib.contextmanager
def muted(on: bool = True) -> Iterator[None]:
    """Suppress the output of `note` inside the block if ``on`` is set."""
    token = _MUTED.set(on or _MUTED.get())
    try:
        yield
    finally:
        _MUTED.reset(token)


def is_muted() -> bool:
    """Return whether the output of `note`, and with it that of progress, is suppressed."""
    return _MUTED.get()


# ------------------------------------------------------------------------------------------------ reading


def open_regular(path: Path) -> tuple[int, int]:
    """Open a regular file for reading and return (descriptor, size in bytes); links, fifos and devices are refused.

    Raises:
        CheckpointCorrupt: the file is missing or not a regular file.
        CheckpointError: the file cannot be opened.
    """
    try:  # O_NONBLOCK: opening a fifo must not wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointCorrupt(path, "a file", "nothing") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENOTDIR):
            hint = "Links to files are not followed: copy the file here." * (
                error.errno == errno.ELOOP
            )
            raise CheckpointCorrupt(path, "a regular file", "a link or device", hint) from None
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        raise CheckpointCorrupt(path, "a regular file", "a directory, pipe or device")
    return descriptor, info.st_size


def _named(error: OSError, path: str | Path) -> str:
    """Return the file name of the error in parentheses if it is not ``path`` itself, else an empty string."""
    other = isinstance(error.filename, str | Path) and str(error.filename) != str(path)
    return f" ({error.filename})" if other else ""


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn an OSError inside the block into a CheckpointError that names the path."""
    try:
        yield
    except BrokenPipeError:  # the reader of stdout has closed it; no file is the cause
        raise
    except OSError as error:
        named = _named(error, path)
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}{named}. Check the name and its permissions."
        ) from error


@dataclass(frozen=True)
class Record:
    """The manifest entry of a file: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str

    def check(self, path: Path, size: int, sha256: str | None = None, hint: str = "") -> None:
        """Raise CheckpointCorrupt unless the size and, if given, the hash agree; ``hint`` says what may be done."""
        if size != self.size:
            raise CheckpointCorrupt(path, f"{self.size:,} bytes", f"{size:,} bytes", hint)
        if sha256 is not None and sha256 != self.sha256:
            expected, found = (f"SHA-256 {value[:16]}..." for value in (self.sha256, sha256))
            raise CheckpointCorrupt(path, expected, found, hint)


def read_bytes(
    path: Path, record: Record | None = None, *, limit: int = SMALL, hint: str = ""
) -> bytes:
    """Read a regular file of at most `limit` bytes; if `record` is given, its size and hash must agree.

    An error about that ends with ``hint``.

    Raises:
        CheckpointCorrupt: the file is too large or differs from `record`; see also `open_regular`.
    """
    descriptor, size = open_regular(path)
    with open(descriptor, "rb") as file:
        if size > limit:
            raise CheckpointCorrupt(path, f"at most {limit:,} bytes", f"{size:,} bytes")
        data = file.read(limit + 1)
    if record is not None:
        record.check(path, len(data), hashlib.sha256(data).hexdigest(), hint)
    return data


def known_as(data: bytes) -> str:
    """Return a sentence that says what stands in place of a file, from its first bytes; empty if it is not known."""
    if data.startswith(b"version https://git-lfs"):
        return (
            "It is a pointer of Git LFS, and the file itself has not been fetched: `git lfs pull` in that directory "
            "fetches it."
        )
    if data.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "It is a web page, as a failed download leaves: download the file again."
    if data.startswith(b"PK\x03\x04"):
        return (
            "It is a zip archive. One of torch.save holds pickles, which can run any code when they are opened, "
            "so pretrain never opens them."
        )
    if data.startswith((b"\x80\x02", b"\x80\x04")):
        return (
            "It is a pickle, which can run any code when it is opened, so pretrain never opens one."
        )
    return ""


class BackgroundDigest:
    """SHA-256 of pieces in their order, computed by a thread while the caller reads, converts or writes on."""

    def __init__(self, start: bytes = b"") -> None:
        self._digest = hashlib.sha256(start)
        self._pieces, self._gathered = deque[bytes | memoryview](), 0
        self._hasher: threading.Thread | None = None
        self._error: BaseException | None = None

    def update(self, piece: bytes | memoryview) -> None:
        """Hash a piece, which must not change, and is held in memory, until `wait` returns."""
        self._pieces.append(piece)
        self._gathered += len(piece)
        hashing = self._hasher is not None and self._hasher.is_alive()
        if self._gathered >= THREADED and not hashing:
            # hashlib releases the GIL, and hashing takes longer than reading or writing.
            self._hasher, self._gathered = threading.Thread(target=self._hash_in_thread), 0
            self._hasher.start()

    def _hash_in_thread(self) -> None:
        try:
            self._hash()
        except BaseException as error:
            self._error = error  # raised by `wait`: a piece is missing in the hash

    def _hash(self) -> None:
        with contextlib.suppress(IndexError):  # no piece is left
            while True:
                self._digest.update(self._pieces.popleft())

    def wait(self) -> None:
        """Wait until all pieces are hashed."""
        if self._hasher is not None:
            self._hasher.join()
            self._hasher = None
        if self._error is not None:
            raise self._error
        self._hash()  # what came after the thread had ended
        self._gathered = 0

    def hexdigest(self) -> str:
        """Return the hash of all pieces."""
        self.wait()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Hash no more pieces."""
        self._pieces.clear()


def hash_file(path: Path) -> Record:
    """Return the size and SHA-256 of a regular file, read in chunks."""
    descriptor, expected = open_regular(path)
    digest, size = BackgroundDigest(), 0
    with open(descriptor, "rb", buffering=0) as file:
        room = min(expected + 1, CHUNK)
        buffer, other = memoryview(bytearray(room)), memoryview(bytearray(room))
        while count := file.readinto(buffer):
            digest.wait()  # for the bytes of the other buffer
            digest.update(buffer[:count])
            size += count
            buffer, other = other, buffer
    return Record(size, digest.hexdigest())


# ------------------------------------------------------------------------------------------------ writing


class HashingFile:
    """A new file that is hashed while it is written and is durable once `finish` returns."""

    def __init__(self, path: Path, *, buffer: int = CHUNK) -> None:
        self._room = buffer  # bytes; small writes are buffered up to this size
        self.descriptor = IO.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        self._digest, self._size, self._buffer = BackgroundDigest(), 0, bytearray()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`; small writes are buffered, large ones are written without a copy."""
        view = memoryview(data).cast("B")
        if len(view) + len(self._buffer) < self._room:
            self._buffer += view
            return
        self._flush()
        self._put(view)

    def _flush(self) -> None:
        if self._buffer:
            full, self._buffer = self._buffer, bytearray()
            self._put(memoryview(full))

    def _put(self, view: memoryview) -> None:
        self._size += len(view)
        self._digest.update(view)
        try:
            while view:
                view = view[IO.write(self.descriptor, view[:CHUNK]) :]
        finally:
            self._digest.wait()  # the caller may change the bytes now

    def finish(self) -> Record:
        """Flush the file to disk, close it and return its size and hash."""
        self._flush()
        IO.fsync(self.descriptor)
        self.close()
        return Record(self._size, self._digest.hexdigest())

    def close(self) -> None:
        """Close the file without flushing it; the content may be incomplete."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sink(io.RawIOBase):
    """A stream of Python that appends to a `HashingFile`, for libraries that write to one."""

    def __init__(self, file: HashingFile) -> None:
        self._target = file

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes and return their number."""
        self._target.write(data)
        return len(data)


def write_file(path: Path, data: bytes) -> Record:
    """Write a new file durably and return its record."""
    with HashingFile(path) as file:
        file.write(data)
        return file.finish()


def temporary_name(target: Path, kind: str) -> Path:
    """Return a sibling path of `target` with an unpredictable name that `sweep` recognises."""
    prefix = f".pretrain-{kind}-{os.getpid()}-{secrets.token_hex(4)}-"
    name = target.name
    if kind == "new":  # for the other kinds the full name is needed later
        while len(os.fsencode(prefix + name)) > _NAME_BYTES:
            name = name[:-1]
    return target.parent / (prefix + name)


@contextlib.contextmanager
def replacing(path: Path, *, buffer: int = CHUNK) -> Iterator[HashingFile]:
    """Write a file under a temporary name and rename it when the block ends; after an exception it is removed.

    All files that are created or replaced outside the temporary directory of a save are written this way: an existing
    link is replaced and its target not touched, and a reader sees either the old or the new content.

    Raises:
        OSError: a system call failed, or `path` is a directory, a device or a pipe.
    """
    refuse_irregular(path)
    temporary = temporary_name(path, "new")
    try:
        with HashingFile(temporary, buffer=buffer) as file:
            yield file
            file.finish()
        IO.rename(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    fsync_directory(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Write or replace a small file atomically; see `replacing`."""
    with replacing(path) as file:
        file.write(data)


def open_writable(path: Path, *, keep: bool = False) -> BinaryIO:
    """Open a file for reading and writing, never through a link.

    Args:
        path: the file.
        keep: keep the existing file, if any; otherwise it is replaced by a new one.
    """
    if not keep:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (0 if keep else os.O_EXCL)
    return os.fdopen(IO.open(path, flags), "r+b")


def refuse_irregular(path: Path) -> None:
    """Raise OSError if the path is a directory, a device or a pipe, which must not be replaced by a file."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # the path does not exist, or is a dangling link
        return
    if not stat.S_ISREG(mode):
        what = "it is a directory" if stat.S_ISDIR(mode) else "it is a device or a pipe, not a file"
        raise OSError(errno.EINVAL, what, str(path))


def sync_file(path: Path) -> Record:
    """Flush a file written by other code to disk and return its record."""
    descriptor = IO.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        IO.fsync(descriptor)
    finally:
        os.close(descriptor)
    return hash_file(path)


def fsync_directory(path: Path) -> None:
    """Flush the entries of a directory to disk."""
    descriptor = IO.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        IO.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a directory, and need not.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ errors of writing


def check_output(target: Path, endings: Collection[str]) -> None:
    """Check before the work that a file of results can be written, as far as its name tells.

    Raises:
        ConfigError: the path is empty, or its ending is none of ``endings``.
        DataError: the path is a directory, or lies in a directory that does not exist.
    """
    if not target.name:  # an empty path, or a directory such as "." or "/"
        raise ConfigError(
            "The name of the output is empty or names a directory. Name a file that ends in "
            f"{', '.join(endings)}."
        )
    if not target.suffix or not target.name.lower().endswith(tuple(endings)):
        raise ConfigError(f"The output {target} must end in {', '.join(endings)}.")
    if target.is_dir() or not target.parent.is_dir():
        what = "is a directory" if target.is_dir() else "lies in a directory that does not exist"
        raise DataError(f"The output {target} {what}. Name a file.")


def write_shown(path: Path, text: str, what: str) -> None:
    """Write a text file for people, such as a picture, atomically; what UTF-8 cannot express is escaped.

    Raises:
        DataError: the file cannot be written; ``what`` is named.
    """
    try:
        replace_file(path, text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise DataError(
            f"Cannot write the {what} {path}: {error.strerror or error}. Choose another path, or check permissions and "
            "free space."
        ) from error


def free_bytes(path: Path) -> int:
    """Return the free bytes for unprivileged users on the file system of `path`."""
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


@contextlib.contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an OSError inside the block into a CheckpointError with the path, and with sizes if the disk is full."""
    try:
        yield
    except OSError as error:
        where = path
        while not os.path.exists(where) and where != where.parent:
            where = where.parent
        if error.errno in _FULL:
            wanted = f"needs at least {needed:,} bytes" if needed else "does not fit"
            raise CheckpointError(
                f"The disk is full: {path} {wanted}, {free_bytes(where):,} bytes are free in "
                f"{where}. Earlier checkpoints are untouched; free some space, or lower `keep`, and run again."
            ) from error
        named = _named(error, path)
        if error.errno in _DENIED:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror}{named}. Choose another output "
                f"directory or change its permissions."
            ) from error
        raise CheckpointError(
            f"Writing {path} failed: {error.strerror or error}{named}. "
            f"Earlier checkpoints are untouched; check the disk and run again."
        ) from error
