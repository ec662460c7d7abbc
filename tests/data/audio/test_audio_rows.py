"""Rows of audio from folders, arrays and tables, their sizes for a new model, and random changes of spectrograms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.audio.test_audio_decode import wav
from pretrain.data.audio import AudioProcessor, Clip
from pretrain.data.audio.augment import SpectrogramChanges, StoredClip
from pretrain.data.audio.rows import AUDIO, labelled_audio, mel_vectors
from pretrain.data.images.rows import decoded, parts_of, pictures, read_images
from pretrain.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
CLIPS = RNG.uniform(-0.5, 0.5, (6, 3000)).astype(np.float32)


def filled(folder: Path) -> Path:
    for i, clip in enumerate(CLIPS):
        file = folder / ("ab"[i % 2]) / f"{i}.WAV"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(wav(clip))
    return folder


def test_a_folder_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "x")
    (tmp_path / "x" / "a" / "song.mp3").write_bytes(b"ID3")
    table = read_images(tmp_path / "x", medium=AUDIO)
    assert table.columns["label"] == ["a"] * 3 + ["b"] * 3 and table.where(0).endswith("0.WAV")
    assert "1 files are no recordings by their names" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no recordings \(\.wav, \.wave\)"):
        read_images(tmp_path / "empty", medium=AUDIO)
    filled(tmp_path / "parts" / "train"), filled(tmp_path / "parts" / "test")
    assert parts_of(tmp_path / "parts", AUDIO) == ["test", "train"]


def test_tables_and_memory(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"audio": "a/0.WAV", "label": 1}) + "\n"
        + json.dumps({"audio": {"array": CLIPS[1].tolist(), "sampling_rate": 8000}, "label": 2})
    )  # fmt: skip
    clips = pictures(read_images(tmp_path / "rows.jsonl", medium=AUDIO), medium=AUDIO)
    assert np.abs(clips[0].read()[0].samples - CLIPS[0]).max() < 1e-4
    assert clips[1].read()[0].rate == 8000 and np.allclose(clips[1].read()[0].samples, CLIPS[1])
    decoded_by_datasets = {"array": CLIPS[1], "sampling_rate": 8000}
    memory = [
        {"audio": {"bytes": wav(CLIPS[0]), "path": "a.wav"}},
        {"audio": decoded_by_datasets},
        {"audio": CLIPS[2]},
    ]
    for source in (memory, {"audio": [row["audio"] for row in memory]}):
        found = pictures(read_images(source, medium=AUDIO), medium=AUDIO)
        assert [clip.read()[0].rate for clip in found] == [16000, 8000, None]
    columns = {"audio": CLIPS, "label": np.arange(6)}
    assert len(pictures(read_images(columns, medium=AUDIO), medium=AUDIO)) == 6
    with pytest.raises(DataError, match=r"is no audio\. Give a path or the bytes of a \.wav"):
        pictures(read_images([{"audio": 3.5}], medium=AUDIO), medium=AUDIO)


def test_data_sets_of_the_datasets_library_without_decoding(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    filled(tmp_path)
    files = [str(tmp_path / "a" / "0.WAV"), str(tmp_path / "b" / "1.WAV")]
    rows = datasets.Dataset.from_dict({"audio": files, "label": [0, 1]})
    rows = rows.cast_column("audio", datasets.Audio(decode=False))
    found = pictures(read_images(rows, medium=AUDIO), medium=AUDIO)
    assert [len(clip.read()[0].samples) for clip in found] == [3000, 3000]


def test_arrays_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.arange(6) % 2
    np.savez(
        tmp_path / "a.npz", audio=CLIPS, labels=labels, sampling_rate=8000, class_names=["x", "y"]
    )
    table = read_images(tmp_path / "a.npz", medium=AUDIO)
    assert (
        table.columns["audio"][2].read()[0].rate == 8000
        and table.columns["label"] == labels.tolist()
    )
    rates = [8000, 16000] * 3
    for name in ("sampling_rate", "rate"):
        np.savez(tmp_path / "rates.npz", audio=CLIPS, labels=labels, **{name: rates})
        found = labelled_audio(str(tmp_path / "rates.npz"), valid=0.34)
        given = [row["audio"].clip.rate for row in (*found.train, *found.valid)]
        assert sorted(given) == sorted(rates)
    capsys.readouterr()
    np.savez(tmp_path / "b.npz", waveforms=CLIPS)
    assert read_images(tmp_path / "b.npz", medium=AUDIO).columns["audio"][0].rate is None
    assert "that of the model is assumed" in capsys.readouterr().err
    np.savez(tmp_path / "c.npz", audio=CLIPS, sampling_rate=np.array([1.5]))
    with pytest.raises(DataError, match="one whole number"):
        read_images(tmp_path / "c.npz", medium=AUDIO)


def test_broken_recordings_are_told_and_missing_ones_are_errors(tmp_path: Path) -> None:
    (tmp_path / "song.mp3").write_bytes(b"ID3")
    with pytest.raises(DataError, match=r"no known suffix.*recordings the endings \.wav, \.wave"):
        read_images(tmp_path / "song.mp3", medium=AUDIO)
    (tmp_path / "song.mp3").unlink()
    (tmp_path / "a.wav").write_bytes(b"")
    found = list(decoded(read_images(tmp_path, medium=AUDIO), required=True, medium=AUDIO))
    assert found == [(0, None, "broken audio (the file is empty)")]
    rows = read_images([{"audio": "nowhere.wav"}], medium=AUDIO)
    with pytest.raises(DataError, match=r"there is no file nowhere\.wav"):
        list(decoded(rows, required=True, medium=AUDIO))


def test_rows_of_pre_training_are_normalised_by_themselves(tmp_path: Path) -> None:
    rows = labelled_audio(str(filled(tmp_path)), 0.34, bands=16, patch=4)
    assert rows.overrides["labels"] == ("a", "b") and rows.overrides["max_length"] % 4 == 0
    assert rows.processor.seconds > 3000 / 16000 - 0.02
    values = np.concatenate(
        [SpectrogramChanges().values([r["audio"]], rows.processor, [], evaluation=True)[0, :16] for r in rows.train]
    )  # fmt: skip
    assert abs(values.mean()) < 0.1 and values.std() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_the_whole_of_the_longest_recording_is_read(
    tmp_path: Path, rate: int, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = RNG.uniform(-0.5, 0.5, (4, 48000 // 2)).astype(np.float32)
    np.savez(tmp_path / "a.npz", audio=noise, labels=[0, 1] * 2, sampling_rate=48000)
    options = {"sampling_rate": rate, "bands": 8, "patch": 4, "valid": 0.5}
    processor = labelled_audio(str(tmp_path / "a.npz"), **options).processor
    said = capsys.readouterr().err
    assert processor.seconds >= 0.5 - 160 / rate and "longer than" not in said
    assert ("25 ms every 10 ms" in said) == (rate != 16000)  # what transformers does otherwise
    whole = AudioProcessor(**processor.settings | {"max_length": 4096})
    count = len(whole.log_mel(Clip(noise[0], "a", 48000).read()[0]))
    assert whole.frames(0.5) == count and count <= processor.shape[0] < count + 4
    labelled_audio(str(tmp_path / "a.npz"), **options, frames=count // 4 * 4 - 4)
    assert "2 of 2 training recordings are longer than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch": 0}, "patch is 0"),
        ({"patch": 16, "frames": 50}, "frames is 50.*multiple of the patch, 16"),
        ({"frames": 0}, "frames is 0"),
        ({"patch": 16, "bands": 60}, "bands is 60.*multiple"),
    ],
)
def test_sizes_of_which_a_part_would_not_be_read_are_refused(
    tmp_path: Path, options: dict[str, int], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        labelled_audio(str(filled(tmp_path)), **options)


def test_long_recordings_are_cut_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in ("a", 160 * 1023 + 400), ("b", 160 * 1024 + 399), ("c", 160 * 1024 + 400):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / f"{name}.wav").write_bytes(wav(np.zeros(count)))
    rows = labelled_audio(str(tmp_path / "x"), 0.0, bands=8, patch=4, labels=False)
    assert rows.processor.shape == (1024, 8)
    said = capsys.readouterr().err
    assert "1 of 3 training recordings are longer than 10.26 seconds" in said and "1,025" in said


def test_vectors_of_classical_methods(tmp_path: Path) -> None:
    table = read_images(
        {"audio": [*CLIPS, CLIPS[0] * np.nan], "label": list("abababa")}, medium=AUDIO
    )
    ((eight, rows),) = mel_vectors(table)
    ((one, _),) = mel_vectors(table, parts=1)
    assert rows == list(range(6)) and eight[0].shape == (8 * 64,) and one[0].shape == (64,)
    assert np.allclose(eight[0].reshape(8, 64).mean(0), one[0], atol=0.5)


def test_what_is_kept_is_as_small_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for rate, seconds in (8000, 0.2), (16000, 0.2), (48000, 0.2), (8000, 20.0):
        clip = Clip(np.full(int(rate * seconds), 0.1, np.float32), "a", rate)
        stored, processor = StoredClip(clip, clip.read()[0]), AudioProcessor()
        values = stored.values(processor)
        with monkeypatch.context() as patch:  # the second time nothing is computed
            patch.setattr(AudioProcessor, "log_mel", None)
            assert np.array_equal(stored.values(processor), values)
        assert np.array_equal(values, processor.values(clip.read()[0]))
        held = [v for v in stored._kept or () if isinstance(v, np.ndarray)]
        assert 0 < sum(array.nbytes for array in held) <= stored.nbytes


def test_changes_move_and_hide_and_leave_the_stored_values() -> None:
    processor = AudioProcessor(max_length=20, num_mel_bins=10)
    stored = StoredClip(Clip(CLIPS[0], "a"), Clip(CLIPS[0], "a").read()[0])
    plain = stored.values(processor).copy()
    seen = {"moved": 0, "times": 0, "bands": 0}
    changes = SpectrogramChanges(shift=0.3, mask_time=0.5, mask_bands=0.5)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        (found,) = changes.values([stored], processor, [rng], evaluation=False)
        hidden = found == 0
        seen["times"] += int(hidden.all(1).any())
        seen["bands"] += int(hidden.all(0).any())
        rolls = [np.roll(plain, k, axis=0) for k in range(-6, 7)]
        assert any(np.array_equal(np.where(hidden, 0, roll), found) for roll in rolls)
        seen["moved"] += not np.array_equal(np.where(hidden, 0, plain), found)
        assert hidden.mean() < 0.8
    assert min(seen.values()) > 20
    assert np.array_equal(stored.values(processor), plain)
    again = StoredClip(Clip(CLIPS[0], "a"), Clip(CLIPS[0], "a").read()[0], keep=False)
    assert again.nbytes == 0 and np.array_equal(again.values(processor), plain)
    with pytest.raises(ConfigError, match="shift is -1"):
        SpectrogramChanges(shift=-1)
