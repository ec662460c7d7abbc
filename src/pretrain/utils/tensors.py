"""The safetensors format: strict reading of untrusted files, and durable writing.

The format: 8 bytes with the length of the header (little-endian), a JSON header `name -> dtype, shape, data_offsets`,
then the bytes of all tensors without gaps. This module exists because the reader of the safetensors library accepts
duplicate keys and any name and maps the file (a later truncation then crashes the process), and its writer never
flushes to disk. Names may hold letters, digits, dot, underscore and hyphen.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.utils.files import (
    CHUNK,
    BackgroundDigest,
    HashingFile,
    Record,
    hash_file,
    known_as,
    open_regular,
)
from pretrain.utils.memory_info import total_memory
from pretrain.utils.strict_json import parse_json

__all__ = [
    "LazyTensors",
    "TensorInfo",
    "checked_tensors",
    "hash_tensors",
    "in_huge_pages",
    "parse_header",
    "read_header",
    "read_header_bytes",
    "read_tensor",
    "read_tensors",
    "tensor_bytes",
    "write_order",
    "write_tensors",
]

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_READ = {**DTYPES, "F64": torch.float64}  # written by no code here
_NOT_READ = (  # the other types of the format
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"),
    *("C64", "U16", "U32", "U64"),
)
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,256}")
_SLASHED = re.compile(r"[A-Za-z0-9._/-]{1,256}")  # training files: `exp_avg/blocks.0.weight`
HEADER_LIMIT = 8 << 20  # bytes
HEADER_SHARE = 0.05  # largest fraction of the file for a header above 1 MiB
TENSOR_LIMIT = 100_000
DIM_LIMIT = 8
_HUGE = 2 << 20  # bytes of a huge page


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header; `start` and `stop` are byte offsets into the data section."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are computed on access, and whose shapes are known in advance.

    Args:
        layout: name -> shape and dtype, as a tensor on the meta device.
        make: function that computes the tensor of a name; the result is not cached.
    """

    def __init__(self, layout: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
        self.layout = dict(layout)
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layout:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages for a new tensor on the CPU, which is often filled much faster in them; return the tensor."""
    if tensor.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        start = -(-tensor.data_ptr() // _HUGE) * _HUGE
        length = (tensor.data_ptr() + tensor.nbytes - start) // _HUGE * _HUGE
        if length > 0:
            # A system without huge pages refuses, and nothing is lost.
            advise = ctypes.CDLL(None).madvise
            advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, types, shapes and values of tensors, whatever their order."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def write_order(layout: Mapping[str, Tensor]) -> list[str]:
    """Return the names in file order: largest element size first, like in the safetensors library.

    Every tensor then starts at a multiple of its element size.
    """
    return sorted(layout, key=lambda name: (-layout[name].element_size(), name))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, slashes: bool = False) -> Record:
    """Write a new file durably, tensor by tensor in the order of `write_order`, hashed while it is written.

    The file is created only after the whole header has been validated.

    Args:
        path: path of the file, which must not exist yet.
        tensors: name -> tensor of an allowed dtype, on any device; lazy tensors are computed once, when they are
            written.
        slashes: allow "/" in names; for files that only pretrain reads.

    Returns:
        Size and SHA-256 of the file.

    Raises:
        CheckpointError: the format does not allow a name, dtype or number of dimensions, or a lazy tensor differs from
            its layout.
    """
    lazy = isinstance(tensors, LazyTensors)
    layout = tensors.layout if isinstance(tensors, LazyTensors) else tensors
    order = write_order(layout)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = layout[name]
        if not (_SLASHED if slashes else _NAME).fullmatch(name):
            raise CheckpointError(
                f"{path.name} cannot hold a tensor named {name[:80]!r}: letters, digits, '.', '_' and '-' are allowed, "
                f"at most 256 of them. Rename the module."
            )
        known = tensor.dtype in _CODES and tensor.layout == torch.strided
        if not known or tensor.dim() > DIM_LIMIT or (tensor.is_meta and not lazy):
            raise _cannot_store(path, name, tensor)
        stop = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = _header_text(header)
    with HashingFile(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            if layout[name].numel():
                tensor = tensors[name]
                same = tensor.dtype == layout[name].dtype and tensor.shape == layout[name].shape
                if tensor.is_meta or not same:
                    raise _cannot_store(path, name, tensor)
                file.write(tensor_bytes(tensor))
                del tensor  # before the next one is made
        return file.finish()


def _cannot_store(path: Path, name: str, tensor: Tensor) -> CheckpointError:
    about = f"{tensor.dtype}, {tensor.dim()} dimensions, on {tensor.device}"
    return CheckpointError(
        f"{path.name} cannot hold the tensor {name!r} ({about}). A safetensors file holds {', '.join(DTYPES)} with at "
        f"most {DIM_LIMIT} dimensions, and the values must be in memory."
    )


def _header_text(header: dict[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header only: names, dtypes, shapes, and the length of the data.

    Raises:
        CheckpointCorrupt: the header is invalid; the error names the file, what was expected and what was found.
        CheckpointError: a tensor has a type of the format that is not read here.
    """
    descriptor, size = open_regular(path)
    try:
        return parse_header(path, size, read_header_bytes(path, descriptor, size))
    finally:
        os.close(descriptor)


def read_tensors(
    path: Path, record: Record | None = None, *, floats_to_fp32: bool = False, slashes: bool = False
) -> dict[str, Tensor]:
    """Read all tensors of a file into memory, and check size and SHA-256; see `checked_tensors`."""
    with checked_tensors(path, record, floats_to_fp32=floats_to_fp32, slashes=slashes) as tensors:
        return tensors


@contextlib.contextmanager
def checked_tensors(
    path: Path, record: Record | None = None, *, floats_to_fp32: bool = False, slashes: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Read all tensors of a file into memory; their SHA-256 is computed while the block runs, and checked at its end.

    Args:
        path: a regular file.
        record: the manifest entry of the file; None for a directory without a manifest.
        floats_to_fp32: convert bfloat16, float16 and float64 to float32.
        slashes: allow "/" in names.

    Yields:
        name -> tensor on the CPU, owning its memory. The block must not change them.

    Raises:
        CheckpointCorrupt: the file differs from its record or violates the format.
        CheckpointError: the file is larger than the memory of this machine, or a tensor has a type of the format that
            is not read here.
    """
    descriptor, size = open_regular(path)
    with contextlib.closing(BackgroundDigest()) as digest:
        try:
            if record is not None:
                record.check(path, size)
            head = read_header_bytes(path, descriptor, size)
            try:
                infos = parse_header(path, size, head, slashes)
            except CheckpointCorrupt:
                raise
            except CheckpointError:  # a type that is not read, unless the header is damaged
                if record is not None:
                    record.check(path, size, hash_file(path).sha256)
                raise
            _fits_memory(path, size)
            digest.update(head)
            tensors = {}
            for name, info in infos.items():
                offset, hasher = len(head) + info.start, digest if record else None
                tensors[name] = read_tensor(
                    path, descriptor, offset, name, info.shape, info.dtype, hasher
                )
                if floats_to_fp32 and info.dtype.is_floating_point:
                    converted = tensors[name].float()
                    if converted is not tensors[name]:
                        digest.wait()  # frees what was converted
                    tensors[name] = converted
        finally:
            os.close(descriptor)

        def check() -> None:
            if record is not None:
                record.check(path, size, digest.hexdigest())

        try:
            yield tensors
        except Exception:
            check()  # what is wrong with the tensors may come from damage
            raise
        check()


def read_tensor(
    path: Path,
    descriptor: int,
    offset: int,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    digest: BackgroundDigest | None = None,
) -> Tensor:
    """Read a tensor, or whole rows of one, whose bytes begin at ``offset`` of an open file, and update a digest."""
    tensor = in_huge_pages(torch.empty(shape, dtype=dtype))
    for piece in _fill(path, descriptor, offset, tensor_bytes(tensor)):
        if digest is not None:
            digest.update(piece)
    if dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise CheckpointCorrupt(path, f"0 or 1 in every byte of {name!r}", "another value")
    return tensor


def _fill(path: Path, descriptor: int, offset: int, view: memoryview) -> Iterator[memoryview]:
    while view:
        count = os.preadv(descriptor, [view[:CHUNK]], offset)
        if count == 0:
            raise CheckpointCorrupt(path, f"{len(view):,} bytes more", "the end of the file")
        yield view[:count]
        view, offset = view[count:], offset + count


def read_header_bytes(path: Path, descriptor: int, size: int) -> bytes:
    """Read the length field and the header as raw bytes."""
    start = os.read(descriptor, 8)
    if len(start) < 8:
        raise CheckpointCorrupt(
            path, "a safetensors file", f"{size:,} bytes", "The file was cut or never written."
        )
    length = struct.unpack("<Q", start)[0]
    limit = min(HEADER_LIMIT, size - 8, max(1 << 20, int(size * HEADER_SHARE)))
    if length > limit:
        found = f"{length:,}"
        hint = known_as(os.pread(descriptor, 64, 0))
        raise CheckpointCorrupt(
            path, f"a safetensors header of at most {limit:,} bytes", found, hint
        )
    text = bytearray(length)
    for _ in _fill(path, descriptor, len(start), memoryview(text)):
        pass
    return start + bytes(text)


def parse_header(
    path: Path, size: int, head: bytes, slashes: bool = False
) -> dict[str, TensorInfo]:
    """Parse and check a header; return its entries in the order of their data."""
    header = parse_json(head[8:], path, limit=HEADER_LIMIT)
    if not isinstance(header, dict):
        raise CheckpointCorrupt(path, "a header object", type(header).__name__)
    header.pop("__metadata__", None)
    if len(header) > TENSOR_LIMIT:
        raise CheckpointCorrupt(path, f"at most {TENSOR_LIMIT:,} tensors", f"{len(header):,}")
    for name in header:
        if not (_SLASHED if slashes else _NAME).fullmatch(name):
            raise CheckpointCorrupt(
                path, "tensor names of letters, digits, '.', '_', '-'", repr(name[:80])
            )
    infos = {name: _parse_entry(path, name, entry) for name, entry in header.items()}
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, info in infos.items():
        if info.start != end:
            raise CheckpointCorrupt(
                path, f"tensor {name!r} at byte {end:,} of the data", f"{info.start:,}"
            )
        end = info.stop
    if len(head) + end != size:
        raise CheckpointCorrupt(path, f"{len(head) + end:,} bytes", f"{size:,} bytes")
    return infos


def _parse_entry(path: Path, name: str, entry: object) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointCorrupt(
            path, f"dtype, shape and data_offsets of {name!r}", str(entry)[:120]
        )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if code in _NOT_READ:
        raise CheckpointError(
            f"{path}: the tensor {name!r} has the type {code}, which is not read here. Convert the model to one of "
            f"{', '.join(_READ)} first, for example with transformers: from_pretrained(DIR, dtype='bfloat16') and "
            "save_pretrained(NEW_DIR)."
        )
    if not isinstance(code, str) or code not in _READ:
        raise CheckpointCorrupt(path, f"{name!r} as one of {', '.join(_READ)}", str(code)[:40])
    if (
        not _naturals(shape)
        or len(shape) > DIM_LIMIT
        or math.prod(max(size, 1) for size in shape) >= 2**56
    ):
        raise CheckpointCorrupt(
            path, f"a shape of at most {DIM_LIMIT} dims for {name!r}", str(shape)[:80]
        )
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointCorrupt(path, f"two offsets for {name!r}", str(offsets)[:80])
    dtype, (start, stop) = _READ[code], offsets
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointCorrupt(
            path, f"{math.prod(shape) * dtype.itemsize:,} bytes for {name!r}", f"{stop - start:,}"
        )
    return TensorInfo(dtype, tuple(shape), start, stop)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**62 for item in value
    )


def _fits_memory(path: Path, size: int) -> None:
    if size > (total := total_memory()):
        raise CheckpointError(
            f"{path} holds {size:,} bytes; this machine has {total:,.0f} bytes of memory."
        )
