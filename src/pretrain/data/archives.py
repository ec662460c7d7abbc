"""Opening of plain, gzip and zstandard files, with all read errors converted into DataError."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from pretrain.errors import DataError

__all__ = ["COMPRESSIONS", "open_packed"]

COMPRESSIONS = (".gz", ".zst")
# Compressed bytes that are decompressed at once; small, so that a decompression bomb cannot fill the memory.
_PACKED_BLOCK = 4096


class _Frames(io.RawIOBase):
    """The decompressed bytes of a zstandard file of any number of frames; raises EOFError on a truncated frame.

    The library's own stream reader treats a file that ends inside a frame as complete.
    """

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._packed or self._raw.read(_PACKED_BLOCK)
            self._packed = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(packed))
            if self._frame.eof:
                self._packed = self._frame.unused_data
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


@contextmanager
def open_packed(path: Path, block: int) -> Iterator[BinaryIO]:
    """Open a file, decompressing it according to its suffix; errors of the disk and the archive become DataError."""
    suffix = path.suffix.lower()
    kind = "zstandard" if suffix == ".zst" else "gzip"
    try:
        with path.open("rb") as raw:
            if suffix == ".gz":
                with gzip.open(raw, "rb") as unpacked:
                    yield cast(BinaryIO, io.BufferedReader(cast(Any, unpacked), block))
            elif suffix == ".zst":
                frames = _Frames(raw, _zstandard().ZstdDecompressor())
                yield cast(BinaryIO, io.BufferedReader(frames, block))
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is a damaged or cut {kind} file ({error}); fetch or write it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise DataError(
                f"{path} is a damaged or cut zstandard file ({error}); fetch or write it again."
            ) from error
        raise


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            "reading .zst files needs the zstandard package: pip install zstandard"
        ) from error
    return zstandard
