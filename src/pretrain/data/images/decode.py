"""Decoding of image files, bytes and arrays with Pillow: upright, 8 bits, without transparency, in grey or RGB.

Files are untrusted: only formats whose decoders run no other program are read, and an image of very many pixels is
refused before its pixels are decoded.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from pretrain.errors import DataError
from pretrain.utils.imports import pillow

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = [
    "MOST_PIXELS",
    "SUFFIXES",
    "BrokenFile",
    "BrokenImage",
    "FileItem",
    "Picture",
    "Slice",
    "Stored",
    "flat",
    "in_numpy",
    "in_threads",
    "to_channels",
]

T = TypeVar("T")
R = TypeVar("R")

# The decoders that may be used. That of EPS, for one, would run Ghostscript on the content of the file.
_FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "WEBP",
    "AVIF",
    "PPM",
    "ICO",
    "TGA",
    "JPEG2000",
)
# Those that return the values that were written; the others change the numbers of a mask, or may.
_EXACT = (None, "PNG", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "TGA")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp", "tiff_sgilog", "tiff_sgilog24")
# File names that are taken for images in a folder.
SUFFIXES = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".jpe", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".avif"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".tga", ".jp2"),
    }
)  # fmt: skip
MOST_PIXELS = 1 << 26  # 8,192 x 8,192; a small file may claim, and decode to, any number
# How Pillow calls colours of 16 bits in a PNG, TIFF or PPM file; BGR;16 are 16 bits for all three.
_WIDE = re.compile(r"\(?'?(RGB|LA)\w*;16|\('RGB', 65535\)")
_DARK = "16 bits of which at most 12 are used, so it is read as dark; scale the values first"
_BLACK = (
    "black, for all colours are zero in the upper 8 of 16 bits; if the lower ones hold the image, convert it to 8 bits "
    "first"
)
_NARROWEST = 100  # longer side of an image, in units of the shorter


@dataclass(frozen=True)
class Slice:
    """The bytes of an image inside a larger file, which are read when they are needed.

    Attributes:
        path: the file.
        offset: the first byte.
        size: number of bytes.
    """

    path: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Return the bytes; fewer if the file is cut off."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class BrokenFile(DataError):
    """An item that cannot be decoded.

    Args:
        name: what messages call the image.
        cause: why, in a few words that hold for other images too, by which they are counted.
        detail: the rest of the sentence; the cause if empty.
    """

    what: ClassVar[str]

    def __init__(self, name: str, cause: str, detail: str = "") -> None:
        super().__init__(f"{name} cannot be read as {self.what}: {detail or cause}.")
        self.cause = cause


class BrokenImage(BrokenFile):
    """An image that cannot be decoded."""

    what: ClassVar[str] = "an image"


@dataclass(frozen=True, eq=False)
class FileItem:
    """One item of a source, such as an image; it is decoded by ``read`` only.

    Attributes:
        source: path of a file, the bytes of one, a part of one, or its content in memory, such as an array.
        name: what messages call it.
    """

    source: Any
    name: str
    broken: ClassVar[type[BrokenFile]]

    def __str__(self) -> str:
        return self.name

    @property
    def is_file(self) -> bool:
        """Whether it is a file, the bytes of one or a part of one, which are decoded; else it is in memory."""
        return isinstance(self.source, bytes | str | Path | Slice)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the content: the bytes of the file, or shape, type and values of the array or decoded image.

        One that cannot be read has that of its path or name: ``read`` says what is wrong with it.
        """
        source = self.source
        try:
            if self.is_file:
                content = self._bytes()
                self.check_kind(content)
                return hashlib.sha256(content).hexdigest()
            if (known := getattr(source, "digest", None)) is not None:
                return str(known)  # of prepared images
            array = self._content()
        except BrokenFile:
            called = source if isinstance(source, str | Path) else self.name
            return hashlib.sha256(f"unreadable {called}".encode("utf-8", "replace")).hexdigest()
        head = f"{array.dtype.str} {array.shape} ".encode()
        return hashlib.sha256(head + array.tobytes()).hexdigest()

    def check_kind(self, content: bytes) -> None:
        """Raise ``BrokenFile`` if the first bytes already show that the content cannot be decoded: it is no duplicate.

        Raises:
            BrokenFile: the content is empty, or a text or page in place of the item.
        """
        head = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if not head or head.startswith((b"<!doctype", b"<html", b"<?xml")):
            raise self.broken(self.name, "empty" if not head else "a page in place of a file")

    def _bytes(self) -> bytes:
        """Return the content of an item that is a file."""
        if isinstance(self.source, bytes):
            return self.source
        source = self.source if isinstance(self.source, Slice) else Path(self.source)
        try:
            return source.read_bytes()
        except (OSError, ValueError) as error:  # the latter of a path with a null character
            why = getattr(error, "strerror", None) or str(error)
            raise self.broken(self.name, why[0].lower() + why[1:]) from error

    def _content(self) -> NDArray[Any]:
        """Return the content in memory, by which two items are compared."""
        return np.ascontiguousarray(self.source)

    def read(self) -> tuple[Any, str | None]:
        """Decode the item; return it with a remark on what was left out, or None.

        Raises:
            BrokenFile: it cannot be decoded.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Picture(FileItem):
    """One image of a source: a file, its bytes, an array, or an image of Pillow.

    Attributes:
        mode: mode of Pillow that a file is converted to before anything else, as ``datasets.Image(mode=...)`` does; a
            mask keeps its numbers.
    """

    mode: str | None = None
    broken: ClassVar[type[BrokenFile]] = BrokenImage

    def _content(self) -> NDArray[Any]:
        # The values of a palette are no colours, so an image of Pillow is compared as it is read.
        image = hasattr(self.source, "getbands")
        return np.ascontiguousarray(self.read()[0] if image else self.source)

    def thumbnail(self, side: int = 96) -> str:
        """Return a small copy as the address of an image in a page, ``data:image/png;base64,...``."""
        image = self.read()[0].copy()
        image.thumbnail((side, side))
        file = io.BytesIO()
        image.save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

    def read(self) -> tuple[Image, str | None]:
        """Decode the image.

        Returns:
            The image, of mode ``L`` or ``RGB``; and a remark on what was left out (further frames), or None.

        Raises:
            DataError: there is no such file, it is no image, is damaged or too large; the message names it.
        """
        if self.is_file or hasattr(self.source, "getbands"):
            image, remark = self._decoded()
            return image, remark
        image, remark = _from_array(np.asarray(self.source), self.name)
        _check_size(image, self.name)
        return flat(image, self.name)[0], remark

    def numbers(self) -> NDArray[Any]:
        """Decode the image as a mask: the number of every pixel, (H, W); that of a palette, not its colour.

        Raises:
            BrokenImage: as for ``read``; it is in a format like JPEG, whose values are not exact; or it has colours.
        """
        decodes = self.is_file or hasattr(self.source, "getbands")
        found: Any = self._decoded(self._exact) if decodes else np.asarray(self.source)
        if found.ndim == 3 and found.shape[-1] == 1:
            found = found[..., 0]
        if found.ndim != 2 or not found.size or found.dtype.kind not in "bui":
            raise BrokenImage(
                self.name,
                "the shape or type is not that of a mask",
                f"a mask has one whole number for each pixel, (height, width); this is an array of {found.dtype} with "
                f"the shape {found.shape}",
            )
        values: NDArray[Any] = found.astype(np.uint8) if found.dtype == bool else found
        return values

    def _exact(self, image: Image) -> Any:
        kind = f"{image.format} file"
        if lossy := image.format == "TIFF" and image.info.get("compression") in _LOSSY_TIFF:
            kind += f" with compression {image.info['compression']}"
        elif lossy := image.format == "GIF" and image.mode == "P":  # Writers renumber it.
            kind += " with a palette"
        if lossy or image.format not in _EXACT:
            raise BrokenImage(
                self.name,
                "a mask in a lossy format",
                f"it is a {kind}, which may not hold the numbers that were written. Store masks as PNG",
            )
        values = np.asarray(_upright(image))
        if image.mode in ("RGB", "RGBA", "LA"):
            colours = values[..., :3] if image.mode != "LA" else values[..., :1]
            if (colours != colours[..., :1]).any():
                raise BrokenImage(
                    self.name,
                    "a mask in colours",
                    "its pixels are colours, and a mask holds the number of a class for each pixel. Store it in grey "
                    "or with a palette",
                )
            values = colours[..., 0]
        return values

    def _decoded(self, then: Callable[[Image], Any] | None = None) -> Any:
        """Decode a file, or an image of Pillow, whose file may not have been read yet.

        Args:
            then: what is made of the image; by default ``read`` returns it.
        """
        content = self._bytes() if self.is_file else None
        if content == b"":
            raise BrokenImage(self.name, "the file is empty")
        module = pillow()
        module.init()
        known = [name for name in _FORMATS if name in module.OPEN]
        try:
            image = self.source
            if content is not None:
                image = module.open(io.BytesIO(content), formats=known)
            _check_size(image, self.name)
            frames = None
            # The further pictures of an MPO file are previews, which cameras add.
            if content and getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                frames = "several frames or pages, of which the first is read"
            wide = _WIDE.match(str(next((tile[3] for tile in getattr(image, "tile", ())), "")))
            image.load()
            if wide and then is not None:
                raise BrokenImage(
                    self.name,
                    "a mask in colours of 16 bits",
                    "its colours have 16 bits each, of which only the upper ones are read. Store it in grey or with a "
                    "palette",
                )
            if then is not None:
                return then(image)
            narrow = _upper_bits(image) if wide else None
            upright = _upright(image)
            decoded, remark = flat(upright.convert(self.mode) if self.mode else upright, self.name)
            return decoded, "; ".join(filter(None, (frames, narrow, remark))) or None
        except DataError:
            raise
        except module.DecompressionBombError as error:
            raise BrokenImage(self.name, "too many pixels", str(error)) from error
        # Decoders of damaged files raise nearly everything: OSError, SyntaxError, ValueError, struct.error, ...
        except Exception as error:
            if "cannot identify" in str(error):
                raise BrokenImage(self.name, "it is no image of a known format") from error
            what = str(error) or type(error).__name__
            raise BrokenImage(
                self.name, "the file is damaged", f"it is damaged ({what})"
            ) from error


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the results in order; Pillow decodes and scales without holding the interpreter's lock.

    Few more are under way than there are threads, because decoded images are large.
    """
    count = min(16, os.cpu_count() or 1)
    pool, waiting = _pool(os.getpid(), count), deque[Future[R]]()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > count + 2:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@cache
def _pool(process: int, count: int) -> ThreadPoolExecutor:
    """Return the thread pool of a process; a forked child cannot use the threads of its parent."""
    return ThreadPoolExecutor(count, thread_name_prefix=f"pretrain-images-{process}")


class Stored:
    """A picture of the training rows that has been read once, so that it can be decoded.

    Args:
        picture: the picture.
        image: its decoded form.
        keep: keep the decoded form in memory; otherwise it is decoded again whenever it is used.

    Attributes:
        size: width and height.
        nbytes: memory of the decoded form that is kept.
    """

    def __init__(self, picture: Picture, image: Image, *, keep: bool = True) -> None:
        self.picture, self.size = picture, image.size
        self.pixels = np.asarray(image) if keep else None
        self.nbytes = 0 if self.pixels is None else self.pixels.nbytes

    def image(self) -> Image:
        """Return the decoded image.

        Raises:
            BrokenImage: the file has changed since, and can no longer be read.
        """
        return self.picture.read()[0] if self.pixels is None else _as_image(self.pixels)

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[np.uint8]:
        return np.asarray(self.image(), dtype=dtype)


def _check_size(image: Image, name: str) -> None:
    """Refuse images of very many pixels, and those so narrow that scaling the short side makes the other huge.

    Raises:
        BrokenImage: it is one of them.
    """
    size = f"it has {image.width:,} x {image.height:,} pixels"
    if image.width * image.height > MOST_PIXELS:
        raise BrokenImage(
            name,
            "too many pixels",
            f"{size}, and at most {MOST_PIXELS:,} are decoded, because a small file that claims so many would fill "
            "the memory. Scale it down first",
        )
    if max(image.size) > _NARROWEST * min(image.size):
        raise BrokenImage(
            name,
            "too narrow",
            f"{size}, and one side may be at most {_NARROWEST} times as long as the other",
        )


def _upright(image: Image) -> Image:
    """Apply the orientation that cameras write beside the pixels."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _from_array(array: NDArray[Any], name: str) -> tuple[Image, str | None]:
    """Return an image of an array (H, W), (H, W, C) or (C, H, W) of bytes, C 1, 3 or 4, and a remark on its values.

    Raises:
        DataError: another shape or type.
    """
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if not fits or not array.size:
        raise BrokenImage(
            name,
            "the shape is not that of an image",
            f"it is an array of the shape {array.shape}; an image has the shape (height, width), or (height, width, "
            "channels) with 1, 3 or 4 channels",
        )
    remark = None
    if array.dtype == np.uint16:
        array, remark = _narrowed(array, name)
    elif array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255:
        array = array.astype(np.uint8)  # numpy makes integers of 64 bits unless it is told not to
    if array.dtype == np.uint8 and array.max() == 1:
        # An image of bits, which as brightness would be black; the same in whatever it is given.
        array, remark = array * np.uint8(255), "values 0 and 1, which are read as black and white"
    if array.dtype != np.uint8:
        real = array.dtype.kind == "f" and bool((array > 1).any())
        advice = (
            "round them: array.round().clip(0, 255).astype('uint8')"
            if real
            else "values from 0 to 1 become that by (array * 255).round().astype('uint8')"
        )
        raise BrokenImage(
            name,
            f"the values are no whole numbers from 0 to 255 (uint8); {advice}",
            f"it is an array of {array.dtype}; the values of an image are whole numbers from 0 to 255 (uint8), and "
            f"{advice}",
        )
    return _as_image(np.ascontiguousarray(array)), remark


def _narrowed(values: NDArray[Any], name: str) -> tuple[NDArray[np.uint8], str | None]:
    """Return values of 16 or 32 bits as bytes, and a remark if nothing says which of the bits are used.

    Raises:
        BrokenImage: the values are below 0 or exceed 16 bits.
    """
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0 or high > 65535:
        raise BrokenImage(
            name,
            "the values exceed 16 bits",
            f"it holds values from {low} to {high}. Convert it to 8 bits first",
        )
    if high <= 255:
        return values.astype(np.uint8), "values up to 255 in more than 8 bits, which are read as 8"
    return (values.astype(np.int64) >> 8).astype(np.uint8), _DARK if high < 4096 else None


def _upper_bits(image: Image) -> str | None:
    """Return a remark on an image whose colours had 16 bits in the file, of which Pillow keeps the upper 8."""
    extremes: Any = image.getextrema()
    bands = zip(image.getbands(), extremes, strict=True)
    high = max(int(highest) for band, (_, highest) in bands if band != "A")
    if not high:
        return _BLACK
    # 12 bits are below 16 of 255; those of PPM files are rounded instead of cut off.
    return _DARK if high < 16 + (image.format == "PPM") else None


def in_numpy(value: Any) -> Any:
    """Return a tensor of any device, type and history as an array, and other values as they are."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype).startswith(("torch.bfloat16", "torch.float8")):  # which NumPy lacks
            value = value.float()
    return value.numpy() if hasattr(value, "numpy") else value


def flat(image: Image, name: str = "the image") -> tuple[Image, str | None]:
    """Return the image in mode ``L`` or ``RGB``, and a remark: 16 bits become 8, and what is transparent white.

    Raises:
        DataError: the values are floating-point numbers, or exceed 16 bits.
    """
    if image.mode.startswith("I"):
        values, remark = _narrowed(np.asarray(image), name)
        return _as_image(values), remark
    if image.mode == "F":
        raise BrokenImage(
            name,
            "the values are no bytes",
            "it holds floating-point values, whose range nobody knows. Convert it to 8 bits first",
        )
    if "A" in image.getbands() or "a" in image.mode or image.info.get("transparency") is not None:
        full = image.convert("RGBA")
        white = pillow().new("RGBA", full.size, (255, 255, 255, 255))
        image = pillow().alpha_composite(white, full).convert("RGB")
    if image.mode in ("1", "L"):
        return image.convert("L"), None
    return image.convert("RGB"), None


def _as_image(array: NDArray[np.uint8]) -> Image:
    image: Image = pillow().fromarray(array)
    return image


def to_channels(image: Image, channels: int) -> Image:
    """Return the image with 1 channel (grey) or 3 (RGB)."""
    return image.convert("L" if channels == 1 else "RGB")
