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
import torch

import pretrain
from pretrain.data.audio.decode import resampled
from pretrain.data.audio.rows import AUDIO, mel_vectors
from pretrain.data.images.rows import read_images
from pretrain.finetuning.baseline import vector_baseline
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
SIZES: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 96, "num_heads": 3, "intermediate_size": 192,
    "decoder_num_layers": 2, "decoder_hidden_size": 64, "decoder_num_heads": 2,
}  # fmt: skip
GRID = {"num_mel_bins": 32, "max_length": 80, "patch_size": 8}
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
            "overrides": SIZES,
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


def linear(parts: Any, tables: Any, seeds: int, per_class: int) -> list[float]:
    """Test accuracy of logistic regression on vectors of the same subsets, chosen on the same rows."""
    labels, found = [table.columns["label"] for table in tables], []
    for seed in range(seeds):
        chosen = stratified_subset(labels[0], per_class * len(DIGITS), seed)
        few = [parts[0][i] for i in chosen], [labels[0][i] for i in chosen]
        columns = (*few, parts[1], labels[1], parts[2], labels[2])
        grid = (0.01, 0.1, 1.0, 10.0)
        score = vector_baseline("log-mel", *columns, grid=grid, seed=seed)["score_test"]
        found.append(round(score, 4))
    return found


def under_linear_models(clips: Path, run: Path, seeds: int, per_class: int) -> dict[str, Any]:
    """Log-mel energies, and the frozen patches of the encoder and of a random one, under logistic regression."""
    tables = [read_images(clips / part, medium=AUDIO) for part in ("train", "val", "test")]
    found: dict[str, Any] = {}
    for parts in (1, 8):
        vectors = [vector for vector, _ in mel_vectors(*tables, parts=parts)]
        found[f"log-mel, {parts} parts"] = linear(vectors, tables, seeds, per_class)
    trained = pretrain.load(run, quiet=True)
    random = pretrain.build(trained.backbone.model_type, **SIZES, **GRID)
    for name, model in (("encoder", trained), ("random encoder", random)):
        model.eval()
        vectors = []
        for table in tables:
            values = trained.processor(table.columns["audio"])["input_values"]
            with torch.inference_mode():
                hidden = [
                    model.backbone({"input_values": some})[:, 2:].unflatten(1, (4, 10))
                    for some in values.split(64)
                ]
            # The mean over fifths of the time, so that the order of the sounds is kept.
            patches = torch.cat(hidden).unflatten(2, (5, 2)).mean(3).flatten(1)
            vectors.append(list(patches.numpy()))
        found[f"frozen {name}"] = linear(vectors, tables, seeds, per_class)
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
    found["linear"] = under_linear_models(clips, run, args.seeds, args.per_class)
    found["pre-training seconds"] = round(spent)
    (args.out / "audio.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(result.comparison)
    print(json.dumps(found["linear"], indent=1))


if __name__ == "__main__":
    main()
