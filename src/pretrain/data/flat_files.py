"""Flat files of numbers, read in ranges; the checksum of each block is verified when it is first read.

Files are not memory-mapped: truncating a mapped file kills the process with SIGBUS, while a read raises an error.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import DataError
from pretrain.utils.files import replace_file

__all__ = ["IN_MEMORY", "PADDING", "FlatFile", "sums_name", "write_sums"]

# Files up to this size are read into memory, and hashed completely whenever prepared data are opened.
IN_MEMORY = 64 << 20
BLOCK = 1 << 16  # bytes per checksum
PADDING = -1  # start of a range that is in no file
_SUM = 8  # bytes of a checksum
_AGAIN = "Copy the file again, or prepare the data again (delete the directory first)."


def sums_name(name: str) -> str:
    """Return the name of the checksum file of a file: ``train.tokens.blocks.bin``."""
    return f"{name.removesuffix('.bin')}.blocks.bin"


def _sum(block: bytes | memoryview) -> bytes:
    return hashlib.blake2b(block, digest_size=_SUM).digest()


def write_sums(path: Path) -> None:
    """Write the block checksums of a file beside it, if it is too large to be hashed whenever it is opened."""
    if path.stat().st_size <= IN_MEMORY:
        return
    sums = []
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            sums.append(_sum(block))
    replace_file(path.with_name(sums_name(path.name)), b"".join(sums))


class FlatFile:
    """A flat array of items of one type in a file.

    Args:
        path: the file.
        dtype: type of the items.

    Raises:
        DataError: the file cannot be read, its size is not a multiple of the item size, or its checksum file has
            another number of blocks.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype
        self._whole: NDArray[Any] | None = None
        try:
            self._stream = path.open("rb", buffering=0)
            self._size = os.fstat(self._stream.fileno()).st_size
            sums = path.with_name(sums_name(path.name))
            self._sums = sums.read_bytes() if self._size > IN_MEMORY and sums.is_file() else b""
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
        blocks = -(-self._size // BLOCK)
        if self._size % dtype.itemsize or (self._sums and len(self._sums) != blocks * _SUM):
            raise DataError(
                f"{path} has {self._size} bytes, which is not a whole number of entries, or does not match the number "
                f"of its checksums. {_AGAIN}"
            )
        self._verified = np.full(blocks, not self._sums)
        if self._size <= IN_MEMORY:
            self._whole = np.frombuffer(self._pread(0, self._size, ""), dtype=dtype)
            self._stream.close()

    def __len__(self) -> int:
        return self._size // self.dtype.itemsize

    def read(
        self,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rows: Sequence[int] | NDArray[np.int64],
    ) -> NDArray[Any]:
        """Return the concatenated items of several ranges.

        Args:
            starts: (N,) first item of each range; the caller has checked that the ranges are within the file. A range
                that starts at PADDING is not in the file, and its items are arbitrary.
            lengths: (N,) number of items of each range.
            rows: (N,) number of the row that each range belongs to, for error messages.

        Raises:
            DataError: the file was truncated or changed since it was prepared.
        """
        if self._whole is not None:
            before = np.cumsum(lengths) - lengths
            index = np.repeat(starts - before, lengths)
            index += np.arange(len(index))
            return self._whole.take(index, mode="wrap")
        item = self.dtype.itemsize
        parts = [
            bytes(length * item)
            if start == PADDING
            else self._bytes(start * item, length * item, row)
            for start, length, row in zip(starts.tolist(), lengths.tolist(), rows, strict=True)
        ]
        return np.frombuffer(b"".join(parts), dtype=self.dtype)

    def range(self, start: int, length: int, row: int) -> NDArray[Any]:
        """Return the items of one range, as ``read`` does."""
        if self._whole is not None:
            return self._whole[start : start + length]
        item = self.dtype.itemsize
        return np.frombuffer(self._bytes(start * item, length * item, row), dtype=self.dtype)

    def _bytes(self, offset: int, size: int, row: int) -> bytes | memoryview:
        first, last = offset // BLOCK, (offset + size - 1) // BLOCK
        where = f" (needed for row {int(row)})"
        if self._verified[first : last + 1].all():
            return self._pread(offset, size, where)
        begin, end = first * BLOCK, min((last + 1) * BLOCK, self._size)
        data = memoryview(self._pread(begin, end - begin, where))
        for k in range(first, last + 1):
            at = (k - first) * BLOCK
            if (
                not self._verified[k]
                and _sum(data[at : at + BLOCK]) != self._sums[k * _SUM : (k + 1) * _SUM]
            ):
                raise DataError(
                    f"{self.path} is damaged: its bytes {k * BLOCK:,} to {min((k + 1) * BLOCK, self._size) - 1:,}"
                    f"{where} do not match their checksum. {_AGAIN}"
                )
        self._verified[first : last + 1] = True
        return data[offset - begin : offset - begin + size]

    def _pread(self, offset: int, size: int, where: str) -> bytes:
        try:
            data = os.pread(self._stream.fileno(), size, offset)
            while len(data) < size and (
                more := os.pread(self._stream.fileno(), size - len(data), offset + len(data))
            ):
                data += more
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        if len(data) < size:
            raise DataError(
                f"{self.path} was cut while it was read: it had {self._size:,} bytes and ends at {offset + len(data):,}"
                f"{where}. {_AGAIN}"
            )
        return data
