"""Spoken digits with 10 labels a class: masked pre-training on recordings without labels against random weights.

    pip install espeakng-loader scikit-learn
    python docs/audio.py

The digits are spoken by espeak-ng 1.52 with three accents of English, at random speed, pitch and loudness, in white
noise. Voices are held out: those of the test recordings are heard neither in pre-training nor in fine-tuning. One CPU
thread. The result goes to ``--out``/audio.json, and pre-training is kept there and not repeated.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np

import pretrain
from pretrain.data.audio.decode import resampled
from pretrain.data.audio.rows import AUDIO, mel_vectors
from pretrain.data.images.rows import read_images
from pretrain.finetuning.baseline import mel_baseline
from pretrain.finetuning.compare import stratified_subset

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland")
VOICES = {
    "train": ("m1", "m2", "m3", "m5", "m6", "m7", "f1", "f3", "f5", "Alicia", "Gene", "Lee"),
    "val": ("m8", "Michael"),
    "test": ("m4", "f2", "f4", "Denis"),
}
COUNTS = {"train": 16, "val": 5, "test": 10}  # recordings of a digit by a voice
RATE = 16000
PITCH, SPEED, LOUDNESS = 3, 1, 2  # parameters of espeak


class Espeak:
    """The synthesiser, through its C interface."""

    def __init__(self) -> None:
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate = self.library.espeak_Initialize(
            2, 0, espeakng_loader.get_data_path().encode(), 0
        )
        self.pieces: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self.callback = kind(self._receive)
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if count > 0 and samples:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, word: str, voice: str, **parameters: int) -> np.ndarray:
        """Samples of a word, without the silence around it, at 16 kHz and from -1 to 1."""
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f"espeak-ng has no voice {voice}")
        for name, value in parameters.items():
            self.library.espeak_SetParameter(globals()[name], value, 0)
        self.pieces.clear()
        self.library.espeak_Synth(word.encode(), len(word) + 1, 0, 1, 0, 1, None, None)
        self.library.espeak_Synchronize()
        samples = np.concatenate(self.pieces).astype(np.float32) / 32768
        loud = np.flatnonzero(np.abs(samples) > 0.01)
        return resampled(samples[loud[0] : loud[-1] + 1], self.rate, RATE)


def synthesise(folder: Path) -> None:
    """Write the recordings as folders by part and class; what is spoken is a function of the seed 0."""
    espeak, rng = Espeak(), np.random.default_rng(0)
    for part, voices in VOICES.items():
        for voice in voices:
            for word in DIGITS:
                (folder / part / word).mkdir(parents=True, exist_ok=True)
                for k in range(COUNTS[part]):
                    spoken = espeak.say(
                        word,
                        f"{ACCENTS[k % len(ACCENTS)]}+{voice}",
                        SPEED=int(rng.integers(110, 220)),
                        PITCH=int(rng.integers(25, 76)),
                        LOUDNESS=int(rng.integers(50, 101)),
                    )
                    before, after = rng.integers(0, RATE // 8, 2)
                    samples = np.pad(spoken, (int(before), int(after)))
                    noise = spoken.std() * 10 ** (-rng.uniform(10, 30) / 20)
                    samples = samples + rng.normal(0, noise, len(samples))
                    with wave.open(str(folder / part / word / f"{voice}-{k}.wav"), "wb") as file:
                        file.setparams((1, 2, RATE, 0, "NONE", ""))
                        whole = np.clip(samples * 32768, -32768, 32767).astype("<i2")
                        file.writeframes(whole.tobytes())


def pre_train(clips: Path, out: Path, steps: int, norm_pixels: bool) -> float:
    """Masked pre-training on the training recordings without their labels; CPU seconds that it took."""
    began = time.process_time()
    pretrain.train(
        data={
            "source": "audio",
            "source_args": {
                "train": str(clips / "train"), "valid": str(clips / "val"), "labels": False,
                "bands": 32, "frames": 80, "patch": 8,
            },
        },
        model={
            "family": "audio-spectrogram-transformer",
            "overrides": {
                "num_layers": 3, "hidden_size": 96, "num_heads": 3, "intermediate_size": 192,
                "decoder_num_layers": 2, "decoder_hidden_size": 64, "decoder_num_heads": 2,
            },
        },
        objective={"class_path": "MaskedImage", "init_args": {"norm_pixels": norm_pixels}},
        optim={"lr": 2e-3, "schedule": "cosine", "warmup": 0.1, "weight_decay": 0.05},
        train={
            "out": str(out), "limit": f"{steps} steps", "batch_rows": 64, "eval_every": "25%",
            "save_every": "0 steps",
        },
        parallel={"threads": 1, "device": "cpu"},
    )  # fmt: skip
    return time.process_time() - began


def classical(clips: Path, seeds: int, per_class: int) -> dict[str, list[float]]:
    """Test accuracy of logistic regression on log-mel energies of the same subsets, chosen on the same rows."""
    train, valid, test = (
        read_images(clips / part, medium=AUDIO) for part in ("train", "val", "test")
    )
    found: dict[str, list[float]] = {}
    for parts in (1, 8):
        vectors = [vector for vector, _ in mel_vectors(train, valid, test, parts=parts)]
        labels = [table.columns["label"] for table in (train, valid, test)]
        for seed in range(seeds):
            chosen = stratified_subset(labels[0], per_class * len(DIGITS), seed)
            few = [vectors[0][i] for i in chosen], [labels[0][i] for i in chosen]
            columns = (*few, vectors[1], labels[1], vectors[2], labels[2])
            score = mel_baseline(*columns, grid=(0.01, 0.1, 1.0, 10.0), seed=seed)["score_test"]
            found.setdefault(f"{parts} parts", []).append(score)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pre-steps", type=int, default=600, help="of pre-training")
    parser.add_argument("--norm-pixels", action="store_true", help="normalise target patches")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning")
    parser.add_argument("--out", type=Path, default=Path("runs/audio"))
    args = parser.parse_args()
    clips, run = args.out / "clips", args.out / "masked"
    if not clips.exists():
        synthesise(clips)
    spent = pre_train(clips, run, args.pre_steps, args.norm_pixels)
    result = pretrain.finetune(
        run,
        clips,
        task="audio-classification",
        out=args.out / "all",
        limit=f"{args.steps} steps",
        batch_rows=16,
        lrs=[1e-3, 3e-3],
        threads=1,
        device="cpu",
        compare="scratch",
        label_counts=[args.per_class * len(DIGITS)],
        seeds=args.seeds,
    )
    found = json.loads(result.comparison.to_json())
    found["log-mel"] = classical(clips, args.seeds, args.per_class)
    found["pre-training seconds"] = round(spent)
    (args.out / "audio.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(result.comparison)
    print(found["log-mel"])


if __name__ == "__main__":
    main()
