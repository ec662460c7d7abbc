"""Images of every kind that turns up in folders come out upright, in 8 bits and grey or RGB, or are refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL")

from PIL import Image

from pretrain.data.images import ImageProcessor, Picture
from pretrain.data.images.decode import SUFFIXES, BrokenImage, Stored
from pretrain.errors import ConfigError


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(content: Any) -> Image.Image:
    return Picture(content, "it").read()[0]


RED = Image.new("RGB", (6, 4), (250, 10, 20))


def test_modes() -> None:
    grey = Image.new("L", (6, 4), 100)
    assert read(stored(grey)).mode == "L"
    assert read(stored(Image.new("1", (6, 4), 1))).getpixel((0, 0)) == 255
    palette = RED.quantize(4)
    assert palette.mode == "P" and read(stored(palette)).getpixel((0, 0)) == (250, 10, 20)
    cmyk = read(stored(RED.convert("CMYK"), "JPEG", quality=100))
    assert (
        cmyk.mode == "RGB" and np.abs(np.subtract(cmyk.getpixel((2, 2)), (250, 10, 20))).max() < 8
    )
    ycbcr = read(stored(RED.convert("YCbCr"), "JPEG", quality=100))
    assert ycbcr.mode == "RGB"


def test_what_is_transparent_becomes_white() -> None:
    clear = Image.new("RGBA", (6, 4), (250, 10, 20, 0))
    assert read(stored(clear)).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (6, 4), (0, 0, 0, 128))
    assert abs(read(stored(half)).getpixel((0, 0))[0] - 127) <= 1
    assert read(stored(Image.new("LA", (6, 4), (9, 255)))).getpixel((0, 0)) == (9, 9, 9)
    palette = RED.quantize(4)
    index = palette.getpixel((0, 0))
    assert read(stored(palette, transparency=index)).getpixel((0, 0)) == (255, 255, 255)


def test_16_bits_are_scaled_and_not_cut_off() -> None:
    array = np.array([[0, 256, 32768], [65535, 300, 65280]], np.uint16)
    image = read(stored(Image.fromarray(array)))
    assert np.array_equal(np.asarray(image), array >> 8)
    assert np.array_equal(np.asarray(read(array)), array >> 8)
    with pytest.raises(BrokenImage, match="floating-point"):
        read(stored(Image.fromarray(array.astype(np.float32)), "TIFF"))


@pytest.mark.parametrize(
    ("kind", "high", "told"),
    [(np.int32, 199, "read as 8"), (np.uint16, 255, "read as 8"), (np.uint16, 4000, "dark"), (np.uint16, 9000, None)],
)  # fmt: skip
def test_wide_types_of_few_values_are_told(kind: Any, high: int, told: str | None) -> None:
    array = np.array([[0, 1], [high // 2, high]], kind)
    given = [stored(Image.fromarray(array), "TIFF"), Image.fromarray(array)]
    for source in given + [array] * (kind is np.uint16):
        image, remark = Picture(source, "it").read()
        assert np.array_equal(np.asarray(image), array >> 8 if high > 255 else array)
        assert (told or "") in (remark or "") and bool(told) == bool(remark)


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    """Return a PNG of rows of pixels as they stand before compression."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def wide_png(values: np.ndarray) -> bytes:
    """Return a PNG of 16 bits a channel, which Pillow does not write: (H, W, C) with C 2, 3 or 4."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, 16, {2: 4, 3: 2, 4: 6}[channels], rows)


def wide_ppm(values: np.ndarray) -> bytes:
    """Return a PPM of 16 bits a channel, (H, W, 3)."""
    height, width, _ = values.shape
    return b"P6 %d %d 65535\n" % (width, height) + values.astype(">u2").tobytes()


@pytest.mark.parametrize(
    ("write", "channels"), [(wide_png, 2), (wide_png, 3), (wide_png, 4), (wide_ppm, 3)]
)
def test_colours_of_16_bits_do_not_become_black_without_a_word(
    write: Callable[[np.ndarray], bytes], channels: int
) -> None:
    array = np.random.default_rng(0).integers(0, 256, (4, 6, channels)).astype(np.uint16)
    array[0, 0] = 255
    if channels != 3:
        array[..., -1] = 65535  # opaque
    colours = np.s_[..., : 3 if channels > 2 else 1]
    for factor, told in ((0.5, "zero in the upper 8"), (16, "dark"), (256, "")):
        scaled = array.copy()
        scaled[colours] = (scaled[colours] * factor).astype(np.uint16)
        content = write(scaled)
        for source in (content, Image.open(io.BytesIO(content))):
            image, remark = Picture(source, "it").read()
            cut = np.asarray(image)[colours] == scaled[colours] >> 8
            assert cut.all() or (write is wide_ppm and told != "zero in the upper 8")  # it rounds
            assert told in (remark or "") and bool(told) == bool(remark)
        with pytest.raises(BrokenImage, match="in grey"):
            Picture(content, "it").numbers()
    thin = Image.new("RGB", (4, 4), (3, 3, 3))  # 16 bits for all three colours, or 8 for each
    assert Picture(stored(thin, "BMP"), "it").read()[1] is None


def test_a_photo_is_turned_upright() -> None:
    image = Image.new("RGB", (6, 4))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = read(stored(image, "PNG", exif=exif))
    assert turned.size == (4, 6) and turned.getpixel((3, 0)) == (255, 0, 0)
    opened = Image.open(io.BytesIO(stored(image, "PNG", exif=exif)))
    assert np.array_equal(np.asarray(read(opened)), np.asarray(turned))


def test_an_image_of_pillow_that_is_cut_off_is_refused_by_name() -> None:
    content = stored(RED.resize((200, 200)), "JPEG")[:900]
    assert Picture(Image.open(io.BytesIO(content)), "it").digest
    with pytest.raises(BrokenImage, match="it cannot be read"):
        read(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("shape", [(1, 6000), (6000, 1), (3, 301)])
def test_narrow_images_are_refused(shape: tuple[int, int]) -> None:
    array = np.zeros(shape, np.uint8)
    for source in (array, stored(Image.fromarray(array)), Image.fromarray(array)):
        with pytest.raises(BrokenImage, match="100 times as long"):
            read(source)
    assert read(np.zeros((3, 300), np.uint8)).size == (300, 3)


def test_of_an_animation_the_first_frame_is_read_and_said() -> None:
    frames = [Image.new("RGB", (6, 4), (c, 0, 0)) for c in (200, 100)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    image, remark = Picture(file.getvalue(), "it").read()
    assert image.getpixel((0, 0))[0] == 200 and remark is not None and "first" in remark


def bomb(side: int) -> bytes:
    """A valid PNG of a few bytes that claims many pixels."""
    return png(side, side, 8, 0, b"\0" * 1000)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "empty"),
        (b"not an image", "no image of a known format"),
        (stored(RED)[:40], "damaged|no image"),
        (stored(RED.resize((200, 200)), "JPEG")[:400], "damaged"),
        (bomb(9000), "too many pixels"),
        (bomb(60000), "too many pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_read_is_named(content: bytes, cause: str, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(BrokenImage, match=r"photo\.png cannot be read as an image") as caught:
        Picture(tmp_path / "photo.png", "photo.png").read()
    import re

    assert re.search(cause, caught.value.cause)


def samples() -> list[bytes]:
    image = RED.resize((24, 18))
    kinds = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
    return [stored(image, kind) for kind in kinds] + [stored(image.quantize(8)), bomb(40)]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(samples()),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6),
    st.integers(1, 4000),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_an_image_or_one_kind_of_error(
    content: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(content[:length])
    for place, value in changes:
        damaged[place % len(damaged)] = value
    told, mode = "it cannot be read as an image", "RGB"
    try:
        mode = read(bytes(damaged)).mode
    except BrokenImage as error:
        told = str(error)
    assert told.startswith("it cannot be read as an image") and mode in ("L", "RGB")


def test_arrays() -> None:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(read(colour)), colour)
    assert np.array_equal(np.asarray(read(colour.transpose(2, 0, 1))), colour)
    assert np.array_equal(np.asarray(read(colour[..., :1])), colour[..., 0])
    assert np.array_equal(np.asarray(read(colour[..., 0] > 9)), (colour[..., 0] > 9) * 255)
    for wrong in (colour / 255, colour[None], colour[..., :2], colour[:0]):
        with pytest.raises(BrokenImage, match="it cannot be read"):
            read(wrong)


def test_a_missing_file_and_a_missing_pillow_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BrokenImage, match=r"no\.png .*no such file"):
        Picture(tmp_path / "no.png", "no.png").read()
    import sys

    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match="pip install pillow"):
        read(stored_before)


stored_before = stored(RED)


def test_content_tells_images_apart(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(stored(RED))
    (tmp_path / "b.png").write_bytes(stored(RED))
    one, two = (Picture(tmp_path / name, name) for name in ("a.png", "b.png"))
    assert one.digest == two.digest != Picture(np.zeros((4, 6), np.uint8), "c").digest
    assert (
        Picture(np.zeros((6, 4), np.uint8), "c").digest
        != Picture(np.zeros((4, 6), np.uint8), "c").digest
    )


def test_the_colours_of_palettes_tell_images_apart() -> None:
    blue = Image.new("RGB", RED.size, (0, 0, 255))
    one, two = (Picture(image.quantize(2), "it") for image in (RED, blue))
    assert np.array_equal(np.asarray(one.source), np.asarray(two.source))
    assert one.digest != two.digest and one.digest == Picture(RED, "it").digest


def test_a_decoded_image_may_be_kept_or_read_again() -> None:
    picture = Picture(stored(RED), "red")
    image = picture.read()[0]
    kept, again = Stored(picture, image), Stored(picture, image, keep=False)
    assert kept.size == again.size == image.size
    assert np.array_equal(np.asarray(kept), np.asarray(again))
    assert kept.image().tobytes() == RED.tobytes() == again.image().tobytes()
    size = ImageProcessor(size=4)
    assert np.array_equal(size.fitted(kept.image()), size.fitted(RED))


def test_suffixes_are_of_formats_that_are_read() -> None:
    assert ".png" in SUFFIXES and ".eps" not in SUFFIXES and ".pdf" not in SUFFIXES


def test_masks_are_read_from_formats_that_keep_their_numbers() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[10:40, 10:50], mask[20:30, 20:60], mask[45:60, 5:20] = 1, 2, 7
    exact: list[tuple[str, dict[str, Any]]] = [
        ("PNG", {}), ("BMP", {}), ("PPM", {}), ("TGA", {}), ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ]  # fmt: skip
    for kind, options in exact:
        file = io.BytesIO()
        Image.fromarray(mask).save(file, kind, **options)
        assert np.array_equal(Picture(file.getvalue(), kind).numbers(), mask), kind
    lossy: list[tuple[str, dict[str, Any]]] = [
        ("WEBP", {}), ("JPEG", {}), ("TIFF", {"compression": "jpeg"}), ("GIF", {}),
    ]  # fmt: skip
    for kind, options in lossy:
        file = io.BytesIO()
        Image.fromarray(mask).save(file, kind, **options)
        with pytest.raises(BrokenImage, match=f"it is a {kind} file.*Store masks as PNG"):
            Picture(file.getvalue(), "a mask").numbers()
