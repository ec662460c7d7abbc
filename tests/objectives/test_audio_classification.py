"""Classification of audio by the mechanism of images: training, resuming, answers, files, and transformers' answers."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pretrain
from contract import check_objective, check_row_randomness, check_sums
from pretrain.cli.main import main
from pretrain.data.audio import AudioProcessor
from pretrain.data.audio.rows import labelled_audio
from pretrain.data.loader import row_rngs
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.finetuning.measure import labelled
from pretrain.inference.predict import predict_file
from pretrain.objectives.audio_classification import AudioClassification
from pretrain.objectives.masked_image import MaskedImage

FAMILY = "audio-spectrogram-transformer"
RATE, NAMES = 8000, ("high", "low", "rising")
TINY = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_mel_bins": 16, "max_length": 16, "patch_size": 8,
}  # fmt: skip
SHORT: dict[str, Any] = {
    "limit": "40 steps", "lr": 3e-3, "batch_rows": 16, "device": "cpu", "quiet": True, "shift": 0.0,
}  # fmt: skip


def tones(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy tones that are high, low or rising, (count, 2000) in int16."""
    rng = np.random.default_rng(seed)
    time, labels = np.arange(2000) / RATE, np.arange(count) % 3
    clips = []
    for label in labels:
        low = rng.uniform(300, 500)
        phase = 2 * np.pi * (low + 2500 * (label == 0)) * time + 2 * np.pi * 5000 * time**2 * (
            label == 2
        )
        clips.append(0.3 * np.sin(phase) + 0.02 * rng.standard_normal(2000))
    return (np.stack(clips) * 32767).astype(np.int16), labels


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder by class, the same rows in .npz and a table, other rows for tests, and a random model."""
    home = tmp_path_factory.mktemp("audio")
    clips, labels = tones(60)
    lines = ["file,kind"]
    for k, (clip, label) in enumerate(zip(clips, labels, strict=True)):
        file = home / "folder" / NAMES[label] / f"{k}.wav"
        write(file, clip)
        lines.append(f"{file.relative_to(home)},{NAMES[label]}")
    (home / "rows.csv").write_text("\n".join(lines))
    more, wanted = tones(24, seed=1)
    np.savez(
        home / "rows.npz", train_audio=clips, train_labels=labels, test_audio=more, test_labels=wanted,
        val_audio=more[:12], val_labels=wanted[:12], class_names=NAMES, sampling_rate=RATE,
    )  # fmt: skip
    model = pretrain.build(FAMILY, **TINY)
    model.processor = AudioProcessor(sampling_rate=RATE, num_mel_bins=16, max_length=16)
    model.save(home / "model")
    return home


@pytest.fixture(scope="module")
def tuned(place: Path) -> Any:
    return pretrain.finetune(
        place / "model", place / "folder", task="audio-classification", valid=0.2, test=place / "rows.npz",
        out=place / "tuned", **SHORT,
    )  # fmt: skip


def task(**options: Any) -> AudioClassification:
    model = pretrain.build(FAMILY, head="audio-classification", labels=NAMES, **TINY)
    model.processor = AudioProcessor(sampling_rate=RATE, num_mel_bins=16, max_length=16)
    return AudioClassification(model, **options)


def test_the_contract_of_objectives(place: Path, tmp_path: Path) -> None:
    rows = labelled_audio(str(place / "rows.npz"), sampling_rate=RATE, bands=16, patch=8, frames=16)
    assert rows.processor.shape == (16, 16) and len(rows.valid) == 12
    # That it learns and resumes is tested below, by whole runs.
    check_sums(task(shift=0.2, mask_time=0.2), rows.train)
    check_row_randomness(task(shift=0.2, mask_time=0.2), rows.train)
    clips = [{"audio": row["audio"]} for row in list(rows.train)[:16]]

    def masked() -> MaskedImage:
        model = pretrain.build(FAMILY, **TINY | {"patch_size": 4})
        model.processor = rows.processor
        return MaskedImage(model)

    check_objective(masked, clips, tmp_path / "masked")


def test_a_model_learns_and_is_measured_beside_baselines(tuned: Any) -> None:
    assert tuned.test_metrics["accuracy"] > 0.9 and tuned.confusion().matrix.sum() == 24
    assert tuned.trivial["accuracy"] == pytest.approx(1 / 3)
    assert tuned.counts == {"train": 48, "valid": 12, "test": 24}
    assert any("longer than 0.35 seconds" in n for n in tuned.notes) is False
    card = tuned.model.card
    assert "pipeline_tag: audio-classification" in card and 'answer("recording.wav")' in card
    assert "resampled to 8,000 Hz, and cut after 0.35 seconds" in card
    assert "Confusion" in tuned.report().read_text()


def test_every_form_of_input_has_one_answer(tuned: Any, place: Path) -> None:
    file = place / "folder" / "low" / "1.wav"
    samples = tones(2)[0][1]
    answer = tuned.predict(file)
    assert answer["label"] == "low"
    rows = {"array": samples / 32768, "sampling_rate": RATE}
    stereo = np.repeat(samples[:, None], 2, axis=1)  # as soundfile reads it
    for form in (
        str(file),
        np.array([str(file)])[0],
        samples,
        samples / 32768,
        file.read_bytes(),
        {"bytes": file.read_bytes(), "path": str(place / "folder" / "high" / "1.wav")},
        {"bytes": file.read_bytes(), "path": None},
        {"bytes": None, "path": str(file)},
        bytearray(file.read_bytes()),
        io.BytesIO(file.read_bytes()),
        rows,
        torch.tensor(samples),
        torch.tensor(samples / 32768).requires_grad_(),
        stereo,
        torch.tensor(stereo),
    ):
        found = tuned.predict(form)
        assert found["label"] == "low" and found["score"] == pytest.approx(
            answer["score"], abs=1e-6
        )
    for many in (
        [file],
        [rows],
        [samples],
        samples[None],
        [{"audio": str(file)}],
        [stereo],
        [{"audio": rows}],
        pd.Series([str(file)], index=[7]),
        np.array([str(file)]),
        np.array([str(file), str(file)], dtype=object),
    ):
        assert tuned.predict(many)[0]["score"] == pytest.approx(answer["score"], abs=1e-6)
    assert len(tuned.predict(place / "folder")) == 60
    assert len(tuned.predict(place / "rows.csv", columns={"audio": "file"})) == 60
    for wrong in ("nowhere", ["nowhere.wav"]):
        with pytest.raises(DataError, match=r"audio \d: there is no file 'nowhere"):
            tuned.predict(wrong)
    with pytest.raises(DataError, match="no audio"):
        tuned.predict([3])
    # Two recordings are not the channels of one.
    for two in ([samples, samples], [torch.tensor(samples)] * 2):
        with pytest.raises(DataError, match="'sampling_rate' holds int .*a list for every column"):
            tuned.predict({"audio": two, "sampling_rate": RATE})
        for rows in ({"audio": two}, [{"audio": one} for one in two]):
            assert [found["label"] for found in tuned.predict(rows)] == ["low", "low"]


def test_a_column_beside_arrays_names_their_rate(tuned: Any, tmp_path: Path) -> None:
    """In every form of rows, to train on, to evaluate and to answer; files name their own."""
    samples, rates = tones(6)[0] / 32768, [RATE, RATE // 2, RATE // 3] * 2
    clips = [clip[:: RATE // rate] for clip, rate in zip(samples, rates, strict=True)]
    held = [{"array": clip, "sampling_rate": rate} for clip, rate in zip(clips, rates, strict=True)]

    def scores(answers: Any) -> list[float]:
        return [answer["score"] for answer in answers]

    wanted = pytest.approx(scores(tuned.predict(held)), abs=1e-5)
    assert scores(tuned.predict(clips)) != wanted
    labels = ["low", "high", "rising"] * 2
    rows = [
        {"audio": c, "sampling_rate": r, "class": k}
        for c, r, k in zip(clips, rates, labels, strict=True)
    ]
    lists = [{**row, "audio": row["audio"].tolist()} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    columns = {"audio": clips, "sample_rate": np.array(rates, float)}
    for source in (rows, lists, columns, tmp_path / "rows.jsonl"):
        assert scores(tuned.predict(source)) == wanted
    assert scores(map(tuned.predict, rows)) == wanted
    out = predict_file(tuned.model, tmp_path / "rows.jsonl", device="cpu", progress=False)
    assert scores(map(json.loads, out.read_text().splitlines())) == wanted
    opened = labelled(rows, tuned.task, {})
    learned = AudioClassification.learn(opened, {"labels": NAMES})
    for table in (opened, AudioClassification.tidy(opened, learned, {})):
        seen = tuned.task.encode(table)
        assert [e["audio"].clip.rate for e in seen] == rates
    for other in (3.5, "slow", 9):  # a column of something else
        assert scores(tuned.predict([{"audio": clips[0], "rate": other}])) == scores(
            tuned.predict(clips[:1])
        )
        for column in ("sampling_rate", "sample_rate"):
            with pytest.raises(
                DataError, match=f"sampling_rate says {other!r}, which is no sampling"
            ):
                tuned.predict([{"audio": clips[0], column: other}])
    file = tmp_path / "a.wav"
    write(file, tones(1)[0][0])
    assert tuned.predict({"audio": str(file), "sampling_rate": 9}) == tuned.predict(file)


def test_transformers_opens_the_directory_and_answers_alike(tuned: Any, place: Path) -> None:
    from transformers import pipeline

    tuned.model.save(place / "saved")
    pipe = pipeline("audio-classification", model=str(place / "saved"))
    clips = tones(6, seed=3)[0].astype(np.float32) / 32768
    for mine, theirs in zip(tuned.predict(list(clips), top_k=None), pipe(list(clips)), strict=True):
        assert mine["label"] == [t["label"] for t in theirs]
        np.testing.assert_allclose(mine["score"], [t["score"] for t in theirs], atol=1e-5)


def test_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "answers.jsonl")
    words = ["finetune", "--model", str(place / "model"), "--task", "audio-classification"]
    words += ["--data", str(place / "folder"), "--data.valid", "0.2", "--train.out", run]
    words += ["--train.limit", "20 steps", "--optim.lr", "3e-3", "--train.batch_rows", "16"]
    assert main([*words, "--parallel.device", "cpu"]) == 0
    assert main(["predict", run, str(place / "folder"), "--out", out]) == 0
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert len(rows) == 60 and rows[0]["audio"].endswith(".wav")
    assert sum(row["predicted_label"] == row["label"] for row in rows) > 45
    assert main(["predict", run, str(place / "rows.npz"), "--out", str(tmp_path / "a.csv")]) == 0
    assert main(["evaluate", run]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_masked_pre_training_is_fine_tuned(place: Path, tmp_path: Path) -> None:
    words = ["train", "--data.source", "audio", "--data.source_args.train", str(place / "folder")]
    words += ["--data.source_args.labels", "false", "--data.source_args.sampling_rate", str(RATE)]
    words += ["--data.source_args.bands", "16", "--data.source_args.patch", "8"]
    words += ["--model.family", FAMILY, "--objective.class_path", "MaskedImage"]
    words += ["--model.overrides.hidden_size", "32", "--model.overrides.num_layers", "1"]
    words += ["--train.out", str(tmp_path / "run"), "--train.batch_rows", "8"]
    words += ["--parallel.device", "cpu", "--train.limit", "4 steps"]
    assert main(words) == 0
    found = pretrain.finetune(
        tmp_path / "run", place / "folder", task="audio-classification", out=tmp_path / "tuned", lora=2,
        **SHORT | {"limit": "3 steps"},
    )  # fmt: skip
    file = place / "folder" / "low" / "1.wav"
    found.save(tmp_path / "saved")
    opened = pretrain.load(tmp_path / "saved", quiet=True, base=pretrain.load(tmp_path / "run"))
    assert opened.predict(file) == found.predict(file)
    mistakes = found.errors(3)
    assert mistakes and found.report().read_text().count('src="data:image/png') == len(
        found.errors(20)
    )
    assert found.model.processor.settings == pretrain.load(tmp_path / "run").processor.settings
    assert all(name.startswith("classifier") or "head" in name for name in found.model.fresh)


def test_resuming_is_bit_exact_and_evaluation_is_never_changed(place: Path, tmp_path: Path) -> None:
    runs = []
    for name, limits in (("whole", ["6 steps"]), ("cut", ["3 steps", "6 steps"])):
        for limit in limits:
            found = pretrain.finetune(
                place / "model", place / "rows.csv", task="audio-classification", audio="file", label="kind",
                out=tmp_path / name, schedule="constant", warmup=0, **SHORT | {"limit": limit, "shift": 0.3},
            )  # fmt: skip
        runs.append((found.run.checkpoint / "model.safetensors").read_bytes())
    assert runs[0] == runs[1]
    goal = task(shift=0.3, mask_time=0.5, mask_bands=0.5)
    rows = goal.encode(AudioClassification.read(place / "folder").take(range(6)), targets=False)
    together = goal.collate([rows[i] for i in range(6)], row_rngs(0, "x", 0, 6))["input_values"]
    alone = goal.collate([rows[4]], row_rngs(0, "x", 4, 1))["input_values"]
    assert torch.equal(together[4], alone[0])
    plain = goal.collate([rows[i] for i in range(6)], row_rngs(0, "x", 9, 6), evaluation=True)
    files = AudioClassification.read(place / "folder").columns["audio"][:6]
    assert torch.equal(plain["input_values"], goal.processor(files)["input_values"])
    assert not torch.equal(together, plain["input_values"])


def test_several_labels_and_long_or_broken_recordings(place: Path, tmp_path: Path) -> None:
    clips, labels = tones(24)
    rows: list[dict[str, Any]] = [
        {
            "audio": {"array": clip, "sampling_rate": RATE},
            "labels": [NAMES[label], *["x"] * (k % 2)],
        }
        for k, (clip, label) in enumerate(zip(clips, labels, strict=True))
    ]
    rows[0]["audio"] = {"array": np.tile(clips[0], 3), "sampling_rate": RATE}
    rows[1]["audio"] = {"array": clips[1] * np.nan, "sampling_rate": RATE}
    found = pretrain.finetune(
        place / "model", rows, task="audio-classification", valid=0.0, out=tmp_path / "run",
        **SHORT | {"limit": "3 steps"},
    )  # fmt: skip
    assert set(found.labels) == {"x", *NAMES} and isinstance(found.predict(clips[0])["label"], list)
    told = "\n".join(found.notes)
    assert "longer than 0.35 seconds, of which the beginning is read" in told
    assert "1 training rows left out, broken audio (some samples are no numbers" in told
    again = pretrain.load(tmp_path / "run", quiet=True)
    assert again.hf_config()["problem_type"] == "multi_label_classification"


def test_models_that_do_not_fit_are_refused() -> None:
    model = pretrain.build(FAMILY, head="audio-classification", labels=NAMES, **TINY)
    model.processor = None
    assert AudioClassification(model).processor.shape == (16, 16)
    model.processor = AudioProcessor(max_length=20, num_mel_bins=16)
    with pytest.raises(ModelError, match="reads 16 frames of 16 mel bands.* returns 20 of 16"):
        AudioClassification(model)
    model.processor = object()
    with pytest.raises(ModelError, match="no audio processor"):
        AudioClassification(model)
    with pytest.raises(ConfigError, match=r"mask_time is 1\.5"):
        task(mask_time=1.5)
    with pytest.raises(ConfigError, match="reads recordings"):
        task(max_length=5)
    with pytest.raises(ConfigError, match="are for images"):
        MaskedImage(pretrain.build(FAMILY, **TINY), flip=True)


def test_comparison_with_scratch_and_log_mel(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    found = pretrain.finetune(
        place / "model", place / "rows.npz", task="audio-classification", compare="scratch", seeds=2,
        label_counts=[30], lrs=[3e-3], out=tmp_path / "run",
        **{k: v for k, v in SHORT.items() if k != "lr"} | {"limit": "2 steps"},
    )  # fmt: skip
    assert set(found.comparison.arms) == {"pretrained", "scratch", "mel"}
    assert found.comparison.arms["mel"][30][0] > 0.9
    assert "log-mel + logistic regression" in found.comparison.verdict(30)
