"""Opening of files, plain or compressed and in any encoding, as UTF-8 bytes; detection of likely encodings."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from pretrain.config.spelling import option, reads_with
from pretrain.errors import DataError

__all__ = [
    "COMPRESSIONS", "check_encoding", "compressing", "encoding_of_pages", "likely_encoding", "not_decodable",
    "open_packed", "open_text",
]  # fmt: skip

COMPRESSIONS = (".gz", ".zst")
_BLOCK = 1 << 20
# Compressed bytes that are decompressed at once; small, so that a decompression bomb cannot fill the memory.
_PACKED_BLOCK = 4096
_HEAD = 8192
_MAGIC = {b"\x1f\x8b": "gzip data (name it .gz)", b"(\xb5/\xfd": "zstandard data (name it .zst)",
          b"PAR1": "parquet data (name it .parquet)",
          b"PK\x03\x04": "a zip archive, as .xlsx and .docx files are (unpack it, or save it as text)"}  # fmt: skip
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
          codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
# Replaces undecodable bytes; it becomes the byte 0xff, which never occurs in UTF-8, so the readers detect it.
_UNKNOWN = "\udcff"


def _as_in_pages(error: UnicodeError) -> tuple[str, int]:
    """Return the control character that a browser shows for a byte that an encoding of Windows leaves undefined."""
    fault = cast(UnicodeDecodeError, error)
    byte = fault.object[fault.start]
    return chr(byte) if fault.encoding == "charmap" and 0x80 <= byte < 0xA0 else _UNKNOWN, fault.end


codecs.register_error("pretrain-unknown", lambda error: (_UNKNOWN, cast(Any, error).end))
codecs.register_error("pretrain-page", _as_in_pages)


class _Translated(io.RawIOBase):
    """The bytes of another stream, passed block by block through a function, which gets b"" at the end."""

    def __init__(
        self, raw: BinaryIO, translate: Callable[[bytes], bytes], block: int = _BLOCK
    ) -> None:
        self._raw, self._translate, self._block = raw, translate, block
        self._ready, self._ended = memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            block = self._raw.read(self._block)
            self._ended = not block
            self._ready = memoryview(self._translate(block))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _zstandard() -> Callable[[bytes], bytes]:
    """Return a function that decompresses the blocks of a zstandard file of any number of frames.

    It raises EOFError on a truncated frame, which the library's own stream reader treats as complete.
    """
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            "reading .zst files needs the zstandard package: pip install zstandard"
        ) from error
    decompressor, frame = zstandard.ZstdDecompressor(), None

    def unpack(block: bytes) -> bytes:
        nonlocal frame
        if not block and frame is not None:
            raise EOFError("it ends inside a frame")
        parts = []
        while block:
            frame = frame or decompressor.decompressobj()
            parts.append(frame.decompress(block))
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        return b"".join(parts)

    return unpack


@contextmanager
def open_packed(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressing it according to its suffix; errors of the disk and the archive become DataError."""
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as raw:
            if suffix == ".gz":
                with gzip.open(raw, "rb") as unpacked:
                    yield cast(BinaryIO, io.BufferedReader(cast(Any, unpacked), _BLOCK))
            elif suffix == ".zst":
                frames = _Translated(raw, _zstandard(), _PACKED_BLOCK)
                yield cast(BinaryIO, io.BufferedReader(frames, _BLOCK))
            else:
                yield raw
    except Exception as error:
        damaged = isinstance(error, EOFError | gzip.BadGzipFile | zlib.error)
        if damaged or type(error).__name__ == "ZstdError":
            kind = "zstandard" if suffix == ".zst" else "gzip"
            raise DataError(
                f"{path} is a damaged or cut {kind} file ({error}); fetch or write it again."
            ) from error
        if isinstance(error, OSError):
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
        raise


@contextmanager
def compressing(path: Path, stream: io.RawIOBase) -> Iterator[io.IOBase]:
    """Yield what compresses into a stream according to the suffix of a path; the stream itself if by none.

    Raises:
        DataError: the library for the compression is missing.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        with gzip.GzipFile("", "wb", fileobj=cast(Any, stream), mtime=0) as packed:
            yield packed
    elif suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                "writing .zst files needs the zstandard package: pip install zstandard"
            ) from error
        with zstandard.ZstdCompressor().stream_writer(cast(Any, stream), closefd=False) as frames:
            yield cast(Any, frames)
    else:
        yield stream


def check_encoding(name: str | None) -> str | None:
    """Return the canonical name of an encoding, None for UTF-8.

    Raises:
        DataError: Python has no such text encoding.
    """
    if name is None:
        return None
    try:
        found = codecs.lookup(name)
        "".encode(name)
    except (LookupError, ValueError, TypeError) as error:
        raise DataError(
            f"{option('encoding', name)} is no encoding of text that Python knows; examples are utf-8, cp1252, "
            "utf-16, shift_jis, gb18030."
        ) from error
    return None if found.name in ("utf-8", "utf-8-sig") else found.name


# What pages call an encoding, by Python's name of it -> what browsers read: https://encoding.spec.whatwg.org.
_OF_PAGES = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874",
    "gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "shift_jis": "cp932", "euc_kr": "cp949",
}  # fmt: skip
_LABELS = {  # which Python does not know
    "windows-874": "cp874", "dos-874": "cp874", "windows-31j": "cp932", "windows-949": "cp949", "ksc_5601": "cp949",
    "ks_c_5601-1989": "cp949", "csgb2312": "gb18030", "gb_2312-80": "gb18030", "cn-big5": "big5hkscs",
    "iso-8859-8-i": "iso8859-8", "koi8": "koi8-r", "koi8-ru": "koi8-u",
}  # fmt: skip


def encoding_of_pages(label: str) -> str | None:
    """Return the encoding that browsers read an HTML page in that declares ``label``; None for UTF-8 and unknown ones.

    An encoding without ASCII, such as UTF-16, is none of a page whose declaration was found as ASCII.
    """
    label = label.lower().removeprefix("x-")
    try:
        name = check_encoding(_LABELS.get(label, label))
        name = name and _OF_PAGES.get(name, name)
        return name if name and label.encode().decode(name) == label else None
    except (DataError, UnicodeError):
        return None


@contextmanager
def open_text(
    path: Path, encoding: str | None = None, *, page: bool = False
) -> Iterator[io.BufferedReader]:
    """Open a text file, decompressed if necessary, as UTF-8 bytes.

    Without ``encoding``, a byte order mark of UTF-16 or UTF-32 selects it. If lines end with a carriage return only, as
    on old Macs and in some exports of spreadsheets, it is replaced by a line feed. In the conversion from another
    encoding, undecodable bytes become 0xff.

    Args:
        path: the file.
        encoding: see :func:`check_encoding`.
        page: whether it is HTML, in which bytes that an encoding of Windows leaves undefined are control characters.

    Raises:
        DataError: the file is binary, or cannot be read.
    """
    with open_packed(path) as opened:
        stream = cast(io.BufferedReader, opened)
        head = stream.peek(_HEAD)[:_HEAD]
        for magic, meaning in _MAGIC.items():
            if head.startswith(magic):
                raise DataError(f"{path} is not text: it holds {meaning}.")
        encoding = encoding or next(
            (name for mark, name in _MARKS.items() if head.startswith(mark)), None
        )
        if encoding is not None:
            decoder = codecs.getincrementaldecoder(encoding)(
                "pretrain-page" if page else "pretrain-unknown"
            )

            def recode(block: bytes) -> bytes:
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeError as error:  # UTF-16 and UTF-32 without a byte order mark
                    raise DataError(f"{path} is not {encoding}: {error}. {_correct()}") from error
                return text.encode("utf-8", "surrogateescape")

            stream = io.BufferedReader(_Translated(stream, recode), _BLOCK)
            head = stream.peek(_HEAD)[:_HEAD]
        place = head.find(b"\0")
        if place >= 0:
            raise DataError(
                f"{path} is a binary file: byte {place} is NUL. Give text files, or convert this one to UTF-8 text."
            )
        if b"\n" not in head and b"\r" in head[:-1]:
            stream = io.BufferedReader(
                _Translated(stream, lambda block: block.replace(b"\r", b"\n")), _BLOCK
            )
        yield stream


def _correct() -> str:
    other = (
        f"Choose another {option('encoding')}, or correct" if reads_with("encoding") else "Correct"
    )
    return f"{other} the file."


def not_decodable(
    path: Path, line: int, byte: int, value: int, encoding: str | None, *, offset: int | None = None
) -> DataError:
    """Return the error for an undecodable byte, with a guess of the encoding of the file.

    ``line`` and ``byte``, the place in the line, count from 1, ``offset`` is the place in the file, if known.
    """
    if encoding is not None:
        return DataError(
            f"{path}:{line} is not {encoding}: a byte of this line is invalid in this encoding. "
            f"{_correct()}"
        )
    of = f", offset {offset} of the file" if offset is not None else ""
    likely = likely_encoding(path)
    named = f"{option('encoding', likely)}, or " if reads_with("encoding") else ""
    cause = (
        f"It looks like {likely}: {named}convert it: iconv -f {likely} -t UTF-8."
        if likely
        else "The file is damaged, or is not a text file."
    )
    return DataError(
        f"{path}:{line}:{byte} is not UTF-8: byte 0x{value:02x} (byte {byte} of line {line}{of}). {cause}"
    )


_SCRIPTS = {
    "shift_jis": "\u3040-\u30ff", "euc_jp": "\u3040-\u30ff", "euc_kr": "\uac00-\ud7a3", "gb18030": "\u4e00-\u9fa5",
    "big5": "\u4e00-\u9fa5",
}  # fmt: skip
# These differ in the positions of the lower-case letters, which most letters of running text are.
_CYRILLIC = ("cp1251", "koi8_r", "cp866")


def likely_encoding(path: Path) -> str | None:
    """Guess the encoding of a file that is not UTF-8; None if no candidate fits."""
    with open_packed(path) as stream:
        data = stream.read(_BLOCK >> 2)
        if stream.read(1):  # end at a line feed, so that no character is truncated
            data = data[: data.rfind(b"\n") + 1] or data
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", data)]
    if not runs or data.count(b"\0"):
        return None
    if data.decode("utf-8", "replace").count("\ufffd") * 4 < sum(runs):
        return None  # nearly all bytes are valid UTF-8, so the file is damaged
    best, score = None, 0.0
    for name, script in _SCRIPTS.items():
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            continue
        foreign = [char for char in text if char > "\x7f"]
        share = len(re.findall(f"[{script}]", "".join(foreign))) / max(1, len(foreign))
        if name in ("gb18030", "big5"):
            # Any bytes decode to Chinese characters, but only the right encoding yields many of the frequent ones; many
            # kana indicate a Japanese encoding.
            kana = len(re.findall("[\u3040-\u30ff]", text)) * 5 > len(foreign)
            share *= (
                0.0 if kana else min(1.0, 4 * sum(c in _FREQUENT for c in foreign) / len(foreign))
            )
        if share > max(score, 0.3):
            best, score = name, share
    # Characters have two bytes, the second of which may be ASCII in shift_jis and big5.
    if best is not None and (best in ("shift_jis", "big5") or sum(runs) / len(runs) >= 2):
        return best
    if sum(runs) / len(runs) >= 3:
        small = {
            name: sum(c.islower() and c > "\x7f" for c in data.decode(name, "replace"))
            for name in _CYRILLIC
        }
        return max(small, key=small.__getitem__)
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252"


_FREQUENT = set(
    "的一是不了在人有我他这這个個们們中来來上大为為和国國地到以说說时時要就出"
    "会會可也你对對生能而子那得于於着著下自之年"
)
