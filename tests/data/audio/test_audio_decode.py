"""Decoding of .wav files of all widths, arrays, and everything that is refused; resampling against scipy's."""

from __future__ import annotations

import base64
import io
import struct
import wave
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.audio import decode
from pretrain.data.audio.decode import BrokenAudio, Clip, resampled
from pretrain.data.audio.processor import clip_of

RNG = np.random.default_rng(0)
WAVE = (0.5 * np.sin(np.arange(2000) / 7)).astype(np.float64)


def wav(samples: np.ndarray, width: int = 2, rate: int = 16000, channels: int = 1) -> bytes:
    """The bytes of a file of PCM; ``samples`` are from -1 to 1, (n * channels,)."""
    whole = np.round(samples * (1 << (8 * width - 1)))
    whole = np.clip(whole, -(1 << (8 * width - 1)), (1 << (8 * width - 1)) - 1).astype(np.int64)
    if width == 1:
        data = (whole + 128).astype(np.uint8).tobytes()
    else:
        data = b"".join(int(v).to_bytes(width, "little", signed=True) for v in whole)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", ""))
        out.writeframes(data)
    return file.getvalue()


def broken(source: object, **options: int) -> str:
    with pytest.raises(BrokenAudio) as found:
        Clip(source, "x.wav", **options).read()
    assert str(found.value).startswith("x.wav cannot be read as audio: ")
    return found.value.cause


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_all_widths_are_fractions_of_the_full_scale(width: int, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(WAVE, width, 22050))
    (samples, rate), remark = Clip(tmp_path / "a.wav", "a").read()
    assert rate == 22050 and remark is None and samples.dtype == np.float32
    assert np.abs(samples - WAVE).max() <= 0.51 / (1 << (8 * width - 1)) + 1e-7
    extremes = wav(np.array([-1.0, 1.0] * 300), width)
    found = Clip(extremes, "b").read()[0].samples
    assert found.min() == -1 and 0.99 < found.max() <= 1


def test_channels_become_their_mean() -> None:
    left, right = RNG.uniform(-0.5, 0.5, (2, 500))
    found = Clip(wav(np.stack((left, right), 1).ravel(), channels=2), "a").read()[0].samples
    assert np.allclose(found, (left + right) / 2, atol=1e-4)
    for array in (np.stack((left, right)), np.stack((left, right), 1)):
        assert np.allclose(Clip(array, "a").read()[0].samples, (left + right) / 2)


def test_pcm_in_the_extensible_form_is_read() -> None:
    plain = wav(WAVE, 3)
    guid = struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
    head = plain[20:36] + struct.pack("<HHI", 22, 24, 4) + guid
    head = struct.pack("<H", 0xFFFE) + head[2:]
    size = struct.pack("<I", struct.unpack("<I", plain[4:8])[0] + 24)
    content = plain[:4] + size + plain[8:16] + struct.pack("<I", len(head)) + head + plain[36:]
    assert np.array_equal(Clip(content, "a").read()[0].samples, Clip(plain, "a").read()[0].samples)


def test_a_file_from_a_pipe_is_read_to_its_end() -> None:
    content = bytearray(wav(WAVE))
    for length in (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x7FFFF024):
        content[40:44] = struct.pack("<I", length)
        (samples, _), remark = Clip(bytes(content), "a").read()
        assert len(samples) == 2000 and "no length in the header" in str(remark)


def test_what_cannot_be_read_is_named() -> None:
    good = wav(WAVE)
    assert broken(b"") == "the file is empty"
    assert broken("no/such/file.wav") == "no such file or directory"
    assert broken(b"ID3 an mp3 file") == "it is no .wav file"
    assert broken(good[:30]) == broken(good[:12]) == "the file is damaged"
    assert broken(good[:-100]) == "the file is cut off"
    for form in (b"RF64", b"BW64"):
        assert f"its form is {form.decode()}" in broken(form + good[4:])
    for tag, words in ((3, "floats"), (0x55, "compressed (format 0x0055)"), (7, "compressed")):
        cause = broken(good[:20] + struct.pack("<H", tag) + good[22:])
        assert words in cause and "ffmpeg" in cause
    assert broken(good[:32] + struct.pack("<HH", 5, 40) + good[36:]).startswith(("its form", "the"))
    assert broken(wav(WAVE[:300])) == "it is shorter than 25 ms"
    assert (
        broken(good[:24] + struct.pack("<I", 1) + good[28:]) == "the sampling rate is not possible"
    )
    for rate in (-1, 16000.5, "16k"):
        clip = clip_of({"array": np.zeros(2000), "sampling_rate": rate}, "x.wav")
        with pytest.raises(BrokenAudio, match=f"its sampling rate is {rate}; it must be a whole"):
            clip.read()
    for rate in (16000.0, np.float32(16000), np.int64(16000)):
        clip = clip_of({"array": np.zeros(2000), "sampling_rate": rate}, "x.wav")
        assert clip.read()[0].rate == 16000
    assert broken(np.full(2000, 3000.0)).startswith("the samples are far above 1")
    assert "no numbers" in broken(np.full(2000, np.nan))
    assert "uint8" in broken(np.zeros(2000, np.uint8))
    assert "shape" in broken(np.zeros((200, 200))) and "shape" in broken(np.zeros(0))


def test_long_recordings_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "_MOST_SAMPLES", 1999)
    assert broken(wav(WAVE)) == broken(WAVE) == "too long"
    piped = bytearray(wav(WAVE))
    piped[40:44] = struct.pack("<I", 0xFFFFFFFF)
    assert broken(bytes(piped)) == "too long"


def test_a_thumbnail_shows_low_tones_at_the_bottom() -> None:
    image = pytest.importorskip("PIL.Image")
    tone = np.sin(np.arange(16000) / 16000 * 2 * np.pi * 200)
    address = Clip(tone, "a").thumbnail(32)
    kind, _, content = address.partition(",")
    pixels = np.asarray(image.open(io.BytesIO(base64.b64decode(content))))
    assert kind == "data:image/png;base64" and pixels.shape == (32, 98)
    assert pixels[24:].mean() < pixels[:16].mean() - 100  # dark is loud


def test_the_content_tells_two_recordings_apart(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(WAVE))
    same = [Clip(tmp_path / "a.wav", "a"), Clip(wav(WAVE), "b")]
    assert same[0].digest == same[1].digest != Clip(WAVE, "c").digest
    assert Clip(WAVE, "c").digest == Clip(WAVE.copy(), "d").digest != Clip(WAVE / 2, "d").digest


@pytest.mark.parametrize(
    ("rate", "wanted"), [(22050, 16000), (8000, 16000), (44100, 16000), (16001, 11999)]
)
def test_resampling_keeps_a_tone_and_removes_what_has_no_place(rate: int, wanted: int) -> None:
    time, inside = np.arange(rate // 2) / rate, slice(100, -100)
    for frequency in (100, min(rate, wanted) * 0.4):
        tone = np.sin(2 * np.pi * frequency * time).astype(np.float32)
        found = resampled(tone, rate, wanted)
        assert len(found) == -(-len(tone) * wanted // rate)
        right = np.sin(2 * np.pi * frequency * np.arange(len(found)) / wanted)
        assert np.abs(found - right)[inside].max() < 2e-3
    if rate > wanted:
        tone = np.sin(2 * np.pi * wanted * 0.6 * time).astype(np.float32)
        assert np.abs(resampled(tone, rate, wanted))[inside].max() < 2e-3


def test_resampling_is_as_good_as_scipys() -> None:
    signal = pytest.importorskip("scipy.signal")
    smooth = np.convolve(RNG.normal(size=8000), np.hanning(21), "same").astype(np.float32)
    ours, theirs = resampled(smooth, 22050, 16000), signal.resample_poly(smooth, 320, 441)
    assert len(ours) == len(theirs)
    assert np.abs(ours - theirs)[100:-100].max() < 0.01 * np.abs(theirs).max()
    assert resampled(smooth, 16000, 16000) is smooth
