"""Partial reads of tensors in safetensors files, and collective hashing of the files.

A rank that reads only parts of a file cannot hash it in the same pass. Instead, the files are divided among the ranks,
which hash them and share the result. A file that changes between hashing and reading is detected by its size,
modification time, device and inode.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint import manifest
from pretrain.checkpoint.peers import Peers, errors_on_all_ranks
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.nn.layout import ShardSlice, whole
from pretrain.utils import files
from pretrain.utils.files import CHUNK, Record, open_regular
from pretrain.utils.memory_info import total_memory
from pretrain.utils.tensors import (
    TensorInfo,
    parse_header,
    read_header_bytes,
    tensor_bytes,
)

__all__ = ["StoredTensors", "hash_together"]

_BLOCK = 64 << 20  # bytes; block size in which two tensors are compared


def hash_together(directory: Path, records: Mapping[str, Record], peers: Peers) -> None:
    """Compare files with a manifest; every file is hashed by one rank, the largest files first.

    Raises:
        CheckpointCorrupt: a file differs. On all ranks, whichever rank found it.
    """
    load = [0] * peers.size
    mine = []
    for name, record in sorted(records.items(), key=lambda item: (-item[1].size, item[0])):
        rank = load.index(min(load))
        load[rank] += record.size
        if rank == peers.rank:
            mine.append(name)
    with errors_on_all_ranks(peers), files.reading(directory):
        for name in mine:
            manifest.check_hash(directory / name, records[name])


@dataclass(frozen=True)
class _Place:
    """Location of a tensor: its file, the offset of the data section in that file, and its entry in the header."""

    path: Path
    descriptor: int
    data: int
    info: TensorInfo


class StoredTensors:
    """The tensors of several files, open for reading; a context manager.

    Args:
        paths: name of a file, as used in `holds` -> its path.
        slashes: allow "/" in the names of tensors.

    Raises:
        CheckpointCorrupt: a file is not a valid safetensors file, or two files hold the same tensor.
    """

    def __init__(self, paths: Mapping[str, Path], *, slashes: bool = False) -> None:
        self.holds: dict[str, list[str]] = {}
        self._places: dict[str, _Place] = {}
        self._opened: list[tuple[Path, int, tuple[int, ...]]] = []
        self._last: tuple[str, int, int, Tensor] | None = None
        try:
            for name, path in paths.items():
                self._open(name, path, slashes)
        except BaseException:
            self.close()
            raise

    def _open(self, name: str, path: Path, slashes: bool) -> None:
        descriptor, size = open_regular(path)
        self._opened.append((path, descriptor, _identity(descriptor)))
        head = read_header_bytes(path, descriptor, size)
        infos = parse_header(path, size, head, slashes)
        self.holds[name] = list(infos)
        for key, info in infos.items():
            if key in self._places:
                other = self._places[key].path.name
                raise CheckpointCorrupt(path, f"tensor {key!r} in one file", f"it in {other} too")
            self._places[key] = _Place(path, descriptor, len(head), info)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def info(self, key: str) -> TensorInfo:
        """Return the header entry (dtype, shape and offsets) of a tensor."""
        return self._places[key].info

    def path(self, key: str) -> Path:
        """Return the path of the file that holds a tensor."""
        return self._places[key].path

    def read(self, key: str) -> Tensor:
        """Read a whole tensor."""
        return self.box(key, whole(self.info(key).shape))

    def box(self, key: str, region: ShardSlice) -> Tensor:
        """Read a region of a tensor, by reading all of its rows.

        Returns:
            The region in the dtype of the file. It may be a view of a buffer that the next call with the same rows also
            returns a view of.
        """
        info = self.info(key)
        if not info.shape or math.prod(region.shape) == 0:
            return (
                self._rows(key, 0, 1).reshape(())
                if not info.shape
                else torch.empty(region.shape, dtype=info.dtype)
            )
        rows = self._rows(key, region.start[0], region.shape[0])
        return rows[(slice(None), *region.slices()[1:])]

    def _rows(self, key: str, start: int, count: int) -> Tensor:
        # If one matrix on disk holds several parameters, consecutive calls read different columns of the same rows.
        if self._last is not None and self._last[:3] == (key, start, count):
            return self._last[3]
        self._last = None
        place = self._places[key]
        shape = (count, *place.info.shape[1:])
        size = math.prod(shape) * place.info.dtype.itemsize
        if size > (total := total_memory()):
            raise CheckpointError(
                f"{place.path}: {key!r} takes {size:,} bytes; this machine has {total:,.0f} bytes of memory."
            )
        tensor = torch.empty(shape, dtype=place.info.dtype)
        row = math.prod(place.info.shape[1:]) * place.info.dtype.itemsize
        _fill_at(
            place.path,
            place.descriptor,
            place.data + place.info.start + start * row,
            tensor_bytes(tensor),
        )
        if tensor.dtype == torch.bool and int(tensor.view(torch.uint8).max()) > 1:
            raise CheckpointCorrupt(place.path, f"0 or 1 in every byte of {key!r}", "another value")
        self._last = (key, start, count, tensor)
        return tensor

    def same(self, one: str, two: str, peers: Peers) -> bool:
        """Whether two tensors are equal; a collective call, in which every rank compares a part of the rows."""
        first, second = self.info(one), self.info(two)
        if first.shape != second.shape:
            return False
        if not first.shape:
            return bool(torch.equal(self.read(one).float(), self.read(two).float()))
        count = first.shape[0]
        begin, end = (count * rank // peers.size for rank in (peers.rank, peers.rank + 1))
        width = max(math.prod(first.shape[1:]), 1) * first.dtype.itemsize
        step = max(_BLOCK // width, 1)
        equal = True
        with errors_on_all_ranks(peers), files.reading(self.path(one)):
            for start in range(begin, end, step):
                rows = min(step, end - start)
                here = self._rows(one, start, rows)
                equal = equal and torch.equal(here.float(), self._rows(two, start, rows).float())
            self._last = None
        return all(peers.all_gather_object(equal))

    def check_unchanged(self) -> None:
        """Raise CheckpointCorrupt if a file was modified or replaced since it was opened."""
        for path, descriptor, identity in self._opened:
            try:
                named = os.stat(path, follow_symlinks=False)
            except FileNotFoundError:
                raise CheckpointCorrupt(path, "a file", "nothing any more") from None
            same_file = (named.st_dev, named.st_ino) == identity[:2]
            if not same_file or _identity(descriptor) != identity:
                raise CheckpointCorrupt(path, "a file that nobody writes to", "one that changed")

    def close(self) -> None:
        """Close the files."""
        self._last = None
        while self._opened:
            os.close(self._opened.pop()[1])

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(descriptor: int) -> tuple[int, ...]:
    info = os.fstat(descriptor)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _fill_at(path: Path, descriptor: int, offset: int, view: memoryview) -> None:
    while view:
        count = os.preadv(descriptor, [view[:CHUNK]], offset)
        if count == 0:
            raise CheckpointCorrupt(path, f"{len(view):,} bytes more", "the end of the file")
        view, offset = view[count:], offset + count
