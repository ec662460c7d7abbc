"""Log-mel spectrograms against ``ASTFeatureExtractor`` of transformers, and the file of the processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ASTFeatureExtractor

from pretrain.data.audio import AudioProcessor, Clip
from pretrain.data.audio.decode import resampled
from pretrain.data.audio.processor import RATE_NAMES
from pretrain.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
NOISE = (0.1 * RNG.normal(size=9000)).astype(np.float32)


@pytest.mark.filterwarnings("ignore:At least one mel filter")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_mel_bins": 64, "max_length": 40},
        {"sampling_rate": 8000, "num_mel_bins": 23, "max_length": 60, "do_normalize": False},
        {"mean": -6.5, "std": 3.25, "max_length": 55},
    ],
)
def test_the_values_are_those_of_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = ASTFeatureExtractor(**settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AudioProcessor.from_directory(tmp_path / "theirs")
    assert ours is not None
    clips = [NOISE, np.zeros(4000, np.float32), NOISE[:400]]
    wanted = theirs(clips, sampling_rate=theirs.sampling_rate, return_tensors="np")["input_values"]
    found = ours(clips)["input_values"].numpy()
    assert found.shape == wanted.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-6 * max(1.0, np.abs(wanted).max()))
    ours.save(tmp_path / "ours")
    again = ASTFeatureExtractor.from_pretrained(tmp_path / "ours")
    assert again.to_dict() == theirs.to_dict()


def test_every_form_of_a_recording_has_one_spectrogram() -> None:
    processor = AudioProcessor(max_length=50, num_mel_bins=16)
    wanted = processor(NOISE)["input_values"]
    assert wanted.shape == (1, 50, 16)
    rate = {"sampling_rate": 16000}
    for form in (
        [NOISE],
        Clip(NOISE, "a"),
        {"array": NOISE.tolist()} | rate,
        {"raw": NOISE} | rate,
    ):
        assert np.array_equal(processor(form)["input_values"], wanted)
    short = torch.from_numpy(NOISE).bfloat16()  # NumPy has no such type
    assert torch.equal(processor(short)["input_values"], processor(short.float())["input_values"])
    other = processor(resampled(NOISE, 22050, 16000))["input_values"]
    for name in (
        *RATE_NAMES,
        "rate",
    ):  # of datasets, torchaudio, soundfile, librosa, and of archives
        assert np.array_equal(processor({"array": NOISE, name: 22050})["input_values"], other)
    for one in (22050.0, np.int64(22050), np.array(22050), torch.tensor(22050)):
        found = processor({"array": NOISE, "sampling_rate": one})["input_values"]
        assert np.array_equal(found, other)
    with pytest.raises(DataError, match="sampling rate is fast"):
        processor({"array": NOISE, "sampling_rate": "fast"})
    assert processor.seconds == pytest.approx(0.515)


def test_what_would_change_the_values_is_refused(tmp_path: Path) -> None:
    for wrong, words in (
        ({"num_mel_bin": 64}, "did you mean 'num_mel_bins'"),
        ({"padding_value": 1.0}, "not implemented"),
        ({"max_length": 0}, "max_length is 0"),
        ({"std": 0.0}, "std is 0.0; it must be a number above 0"),
        ({"mean": True}, "mean is True"),
        ({"do_normalize": 1}, "true or false"),
    ):
        with pytest.raises(ConfigError, match=f"(?i){words}"):
            AudioProcessor(**wrong)
    assert AudioProcessor.from_directory(tmp_path) is None
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"feature_extractor_type": "WhisperFeatureExtractor"}))
    with pytest.raises(ConfigError, match="'WhisperFeatureExtractor' is not implemented"):
        AudioProcessor.from_directory(tmp_path)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="holds no settings"):
        AudioProcessor.from_directory(tmp_path)
    file.unlink()
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"feature_extractor": {"num_mel_bins": 80}})
    )
    nested = AudioProcessor.from_directory(tmp_path)
    assert nested is not None and nested.shape == (1024, 80)
