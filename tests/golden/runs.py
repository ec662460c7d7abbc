"""Golden runs: tiny trainings through the public interface, and what each of them leaves on the disk as JSON.

    folder = Path("somewhere")
    make(folder, ["gpt2", "ddp"])      # trains them into somewhere/runs, and what they start from
    figures = record(folder, "gpt2")   # log, names of files, tensors, config.json, inspect

A run is named in `RUNS`. Only ``pretrain.prepare``, ``train``, ``finetune`` and ``inspect`` are used, as a user would,
so that this file stays as it is while the package is renamed and moved about. Started by torchrun the module is the
worker of the runs on several processes: ``runs.py FOLDER NAME ...``.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open

import pretrain
from pretrain.training import update_rules

# ------------------------------------------------------------------------------------------ texts and rows

SIZES, ANIMALS, PLACES = ("red", "old", "big", "sly"), ("cat", "dog", "fox"), ("mat", "log", "box")
TEXTS = [
    f"the {size} {animal} sat on the {place} and looked" + " at the owl" * (number % 3)
    for number, (size, animal, place) in enumerate(
        (size, animal, place) for size in SIZES for animal in ANIMALS for place in PLACES
    )
]
TALKS = [
    f"User: who is {size}? Assistant: it is the {size} {animal}, and no other."
    for size in SIZES
    for animal in ANIMALS
]
CLASSES = [
    {"text": f"the {size} {animal} sat on the {place}", "label": animal}
    for size in SIZES
    for animal in ANIMALS
    for place in PLACES
]
SEVERAL = [{"text": row["text"], "label": row["text"].split()[1:6:4]} for row in CLASSES]
SCORES = [{"text": row["text"], "score": float(ANIMALS.index(row["label"]))} for row in CLASSES]
WORDS = [
    {
        "tokens": row["text"].split(),
        "label": ["B-ANIMAL" if word in ANIMALS else "O" for word in row["text"].split()],
    }
    for row in CLASSES
]
QUESTIONS = [
    {
        "question": "who sat?",
        "context": row["text"],
        "answers": {"text": [row["label"]], "answer_start": [row["text"].index(row["label"])]},
    }
    for row in CLASSES
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"who is {size}?"},
            {"role": "assistant", "content": f"it is the {size} {animal}"},
        ]
    }
    for size in SIZES
    for animal in ANIMALS
]
PREFERENCES = [
    {"prompt": f"who is {size}?", "chosen": f"it is the {size} {animal}", "rejected": "no other"}
    for size in SIZES
    for animal in ANIMALS
]
PAIRS = [
    {
        "anchor": f"the {size} {animal} sat",
        "positive": f"and looked at the {size} {animal}",
        "negative": "the box is red",
    }
    for size in SIZES
    for animal in ANIMALS
]


def picture(number: int) -> dict[str, Any]:
    """An image of 8 x 8 grey pixels, brighter on the left or on the right by its class."""
    side = number % 2
    pixels = [
        [(number * 37 + x * 11 + y * 23) % 128 + 100 * (x // 4 == side) for x in range(8)]
        for y in range(8)
    ]
    return {"image": np.array(pixels, np.uint8), "label": ("left", "right")[side]}


PICTURES = [picture(number) for number in range(24)]
MASKS = [{"image": row["image"], "mask": (row["image"] > 127).astype(np.uint8)} for row in PICTURES]
BOXES = [
    {"image": row["image"], "boxes": [[4 * (n % 2), 0, 4 * (n % 2) + 4, 8]], "label": ["half"]}
    for n, row in enumerate(PICTURES)
]


CAPTIONS = [{"image": row["image"], "text": f"the big cat sat {row['label']}"} for row in PICTURES]


def recording(number: int) -> dict[str, Any]:
    """A quarter of a second at 8 kHz: a tone that is low or high by its class, and grows louder or softer."""
    side = number % 2
    time = np.arange(2000) / 8000
    wave = np.sin(2 * np.pi * (300 + 23 * number + 2000 * side) * time)
    samples = np.round(8000 * wave * (1 + (1 - 2 * (number % 3)) * time)).astype(np.int16)
    return {"audio": {"array": samples, "sampling_rate": 8000}, "label": ("low", "high")[side]}


RECORDINGS = [recording(number) for number in range(24)]

# ------------------------------------------------------------------------------------------ the runs


@dataclass(frozen=True)
class GoldenRun:
    """One run.

    Attributes:
        settings: sections of ``pretrain.train`` or, with a task, keywords of ``pretrain.finetune``.
        task: of a fine-tuning run.
        rows: of a fine-tuning run; every third of them is held out.
        base: name of the run that it starts from.
        start: arguments of ``pretrain.build`` for a model that it starts from where there is no base.
        stop: step after which it is stopped as by Ctrl-C, and then started again.
        processes: how many it runs in.
        precision: which tolerance its figures have on another machine.
        slow: left to ``pytest -m slow``.
    """

    settings: Mapping[str, Any]
    task: str = ""
    rows: Sequence[Mapping[str, Any]] = ()
    base: str = ""
    start: Mapping[str, Any] = field(default_factory=dict)
    stop: int = 0
    processes: int = 1
    precision: str = "fp32"
    slow: bool = False


SHAPE = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
DEVICE = {"device": "cpu", "threads": 1}
MESHES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "tp": {"tp": 2},
}


def pretraining(
    family: str,
    *,
    model: Mapping[str, Any] | None = None,
    optim: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    parallel: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    **others: Any,
) -> GoldenRun:
    """A run of `pretrain.train`: six steps on four rows, with evaluations after the third and the last."""
    masked = family in ("bert", "modernbert")
    shape = {**SHAPE, "max_positions": 64, **(overrides or {})}
    settings = {
        "data": {"train": "pieces" if masked else "bytes"},
        "model": model or {"family": family, "size": "tiny", "overrides": shape},
        "objective": {"class_path": "MaskedLM" if masked else "NextToken"},
        "optim": {"lr": 1e-2, **(optim or {})},
        "train": {
            "limit": "6 steps",
            "batch_rows": 4,
            "eval_every": "3 steps",
            "save_every": "3 steps",
            "log_every": 1,
            "precision": "fp32",
            **(train or {}),
        },
        "parallel": {**DEVICE, **(parallel or {})},
    }
    precision = str(settings["train"]["precision"])
    return GoldenRun(settings, precision=precision, **others)


def finetuning(
    task: str,
    rows: Sequence[Mapping[str, Any]],
    base: str = "",
    *,
    start: Mapping[str, Any] | None = None,
    stop: int = 0,
    slow: bool = False,
    **settings: Any,
) -> GoldenRun:
    """A run of `pretrain.finetune`: four steps on eight rows, with evaluations after the second and the last."""
    common = {
        "limit": "4 steps",
        "eval_every": "2 steps",
        "log_every": 1,
        "batch_rows": 8,
        "lr": 1e-2,
        "precision": "fp32",
    }
    settings = {**common, "parallel": DEVICE, **settings}
    precision = str(settings["precision"])
    begin = {"base": base, "start": start or {}}
    return GoldenRun(settings, task, rows, **begin, stop=stop, precision=precision, slow=slow)


RUNS: dict[str, GoldenRun] = {
    "gpt2": pretraining("gpt2"),
    "gpt2-resumed": pretraining("gpt2", stop=4),
    "bert": pretraining("bert", overrides={"dropout": 0.1}),
    "bert-resumed": pretraining("bert", overrides={"dropout": 0.1}, stop=4, slow=True),
    "modernbert": pretraining("modernbert", overrides={"num_layers": 3}),
    "modernbert-resumed": pretraining("modernbert", overrides={"num_layers": 3}, stop=2, slow=True),
    "qwen3": pretraining("qwen3", optim={"schedule": "wsd"}, overrides={"num_kv_heads": 1}),
    "qwen3-resumed": pretraining(
        "qwen3", optim={"schedule": "wsd"}, overrides={"num_kv_heads": 1}, stop=2, slow=True
    ),
    "llama": pretraining("llama", train={"limit": "2 epochs", "eval_every": "50%"}),
    "accumulation": pretraining("gpt2", train={"batch_rows": 6, "micro_rows": 2}),
    "muon": pretraining("qwen3", optim={"name": "muon"}),
    "ema": pretraining("bert", optim={"ema": 0.9}),
    "ema-resumed": pretraining("bert", optim={"ema": 0.9}, stop=4, slow=True),
    "bf16": pretraining("gpt2", train={"precision": "bf16"}),
    "checkpointing": pretraining(
        "gpt2",
        overrides={"dropout": 0.1, "num_layers": 2},
        parallel={"activation_checkpointing": "full"},
    ),
    "continued": pretraining(
        "gpt2",
        base="gpt2",
        model={"checkpoint": "gpt2"},
        optim={"layer_decay": 0.5, "l2_sp": 0.1, "unfreeze": 0.5},
    ),
    "classification": finetuning("classification", CLASSES, "bert"),
    "classification-resumed": finetuning("classification", CLASSES, "bert", stop=2, slow=True),
    "several-labels": finetuning("classification", SEVERAL, "gpt2", layer_decay=0.5),
    "regression": finetuning("regression", SCORES, "bert", label="score"),
    "token-classification": finetuning("token-classification", WORDS, "bert"),
    "question-answering": finetuning("question-answering", QUESTIONS, "bert"),
    "chat": finetuning("chat", CHATS, "llama"),
    "preference": finetuning("preference", PREFERENCES, "llama"),
    "embedding": finetuning("embedding", PAIRS, "bert"),
    "language-modelling": finetuning("language-modelling", CLASSES, "gpt2"),
    "lora": finetuning("classification", CLASSES, "gpt2", lora=4),
    "dora-bf16": finetuning(
        "classification", CLASSES, "bert", lora=2, dora=True, precision="bf16", slow=True
    ),
}
_SHARED = RUNS["gpt2"].settings
RUNS["vit"] = GoldenRun(
    {
        **_SHARED,
        "data": {"source": "images", "source_args": {"train": "pictures.npz", "channels": 1}},
        "model": {"family": "vit", "size": "tiny", "overrides": SHAPE},
        "objective": {"class_path": "ImageClassification"},
    }
)
RUNS["lejepa"] = GoldenRun(
    {
        **RUNS["vit"].settings,
        # It normalises over the batch, in which the features of a usual new model are nearly the same and rounding is
        # large; and AdamW takes the rounding of small gradients for a direction.
        "model": {
            "family": "vit",
            "size": "tiny",
            "overrides": {**SHAPE, "initializer_range": 0.3},
        },
        "optim": {**_SHARED["optim"], "eps": 1e-3},
        "data": {
            "source": "images",
            "source_args": {"train": "pictures.npz", "channels": 1, "labels": False},
        },
        "objective": {"class_path": "LeJEPA", "init_args": {"crop": 0.5}},
        "train": {**_SHARED["train"], "batch_rows": 8},
    }
)
RUNS["image-classification"] = finetuning("image-classification", PICTURES, "vit")
RUNS["segmentation"] = finetuning("segmentation", MASKS, "vit")
RUNS["object-detection"] = finetuning("object-detection", BOXES, "vit")
_TINY = {**SHAPE, "max_positions": 24, "image_size": 8, "patch_size": 4}
RUNS["captioning"] = finetuning("captioning", CAPTIONS, start={"family": "git", **_TINY})
RUNS["clip"] = GoldenRun(
    {
        **_SHARED,
        "data": {"source": "image_text", "source_args": {"train": "pairs", "valid": 0.25}},
        "model": {
            "family": "clip",
            "size": "tiny",
            "overrides": {k: v for k, v in _TINY.items() if k != "image_size"},
        },
        "objective": {"class_path": "Contrastive"},
    }
)
RUNS["image-text-retrieval"] = finetuning("image-text-retrieval", CAPTIONS, "clip")
RUNS["spectrograms"] = GoldenRun(
    {
        **_SHARED,
        "data": {
            "source": "audio",
            "source_args": {
                "train": "recordings.npz", "labels": False, "sampling_rate": 8000, "bands": 16, "patch": 4,
            },
        },
        "model": {
            "family": "audio-spectrogram-transformer",
            "size": "tiny",
            "overrides": {**SHAPE, "decoder_hidden_size": 16, "decoder_num_heads": 2},
        },
        "objective": {"class_path": "MaskedImage"},
    }
)  # fmt: skip
RUNS["audio-classification"] = finetuning("audio-classification", RECORDINGS, "spectrograms")
for _name, _parallel in MESHES.items():
    _options: dict[str, Any] = {"overrides": {"dropout": 0.1}, "parallel": _parallel}
    RUNS[_name] = pretraining("gpt2", processes=2, **_options)
    RUNS[f"{_name}-resumed"] = pretraining("gpt2", processes=2, stop=4, slow=True, **_options)


def needed(names: Sequence[str]) -> list[str]:
    """The names of runs, each behind the one that it starts from."""
    ordered: dict[str, None] = {}
    for name in names:
        for before in filter(None, (RUNS[name].base, name)):
            ordered[before] = None
    return list(ordered)


# ------------------------------------------------------------------------------------------ making them


def prepare_data(folder: Path) -> None:
    """Write the texts and prepare them twice: with word pieces for BERT, with bytes for the others."""
    texts = folder / "texts.txt"
    if texts.exists():
        return
    images = np.stack([row["image"] for row in PICTURES])
    labels = np.array([row["label"] for row in PICTURES])
    np.savez(folder / "pictures.npz", images=images, labels=labels)
    (folder / "pairs").mkdir()
    for number, row in enumerate(CAPTIONS):
        Image.fromarray(row["image"]).save(folder / "pairs" / f"{number:02}.png")
        (folder / "pairs" / f"{number:02}.txt").write_text(f"{row['text']} {TEXTS[number % 8]}")
    audio = np.stack([row["audio"]["array"] for row in RECORDINGS])
    np.savez(folder / "recordings.npz", audio=audio, sampling_rate=8000)
    for name, kind, vocab_size in (("pieces", "wordpiece", 120), ("bytes", "bpe", 340)):
        texts.write_text("\n\n".join(TEXTS + TALKS) + "\n", encoding="utf-8")
        pretrain.prepare(
            str(texts),
            folder / name,
            tokenizer=kind,
            vocab_size=vocab_size,
            row_length=32,
            separator="\n\n",
            valid=0.1,
            workers=1,
            cache_dir=folder / "cache",
            quiet=True,
        )


def make(
    folder: Path,
    names: Sequence[str],
    launch: Callable[..., Any] | None = None,
) -> None:
    """Train the runs that are not there yet.

    Args:
        folder: absolute path of a place for the data and the runs; made if absent.
        names: keys of `RUNS`.
        launch: starts this file in several processes, ``launch(file, processes, *words)``; needed for runs on meshes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prepare_data(folder)
    missing = [name for name in needed(names) if not (folder / "runs" / name).exists()]
    for name in missing:
        if RUNS[name].processes == 1:
            train(folder, name)
    several = [name for name in missing if RUNS[name].processes > 1]
    if several:
        if launch is None:
            raise ValueError(f"{', '.join(several)} run in several processes; give launch")
        launch(Path(__file__), 2, str(folder), *several)


def train(folder: Path, name: str) -> None:
    """Train one run; the processes of a mesh all call this."""
    run = RUNS[name]
    # Where a CPU is good at bf16, Muon multiplies in it, which is another run.
    with patch.object(update_rules, "multiplies_bf16_fast", return_value=False):
        if run.stop:
            _start(folder, name, run, [ctrl_c_after(run.stop)])
        _start(folder, name, run, [])


def _start(folder: Path, name: str, run: GoldenRun, hooks: list[Any]) -> None:
    out = str(folder / "runs" / name)
    if run.task:
        model: Any = str(folder / "runs" / run.base)
        if run.start:
            tokenizer = pretrain.Tokenizer.from_directory(folder / "pieces" / "tokenizer")
            model = pretrain.build(tokenizer=tokenizer, **run.start)
        pretrain.finetune(
            model,
            [dict(row) for row in run.rows],
            run.task,
            valid=[dict(row) for row in run.rows[::3]],
            out=out,
            hooks=hooks,
            quiet=True,
            **run.settings,
        )
        return
    settings = {section: dict(values) for section, values in run.settings.items()}
    data = settings["data"]
    if "source" in data:
        arguments = data["source_args"]
        data["source_args"] = {**arguments, "train": str(folder / arguments["train"])}
    else:
        data["train"] = str(folder / data["train"])
    settings["train"]["out"] = out
    if "checkpoint" in settings["model"]:
        settings["model"]["checkpoint"] = str(folder / "runs" / settings["model"]["checkpoint"])
    pretrain.train(settings, hooks=hooks)


def ctrl_c_after(step: int) -> Callable[[Mapping[str, Any]], None]:
    def hook(line: Mapping[str, Any]) -> None:
        if line["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return hook


# ------------------------------------------------------------------------------------------ recording them

TIMED = ("seconds", "tokens_per_second", "mfu", "chain")  # a chain is a digest over the others


def record(folder: Path, name: str) -> dict[str, Any]:
    """What a run has left, without times, versions and the place where it lies."""
    run = folder / "runs" / name
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    config = read_json(last / "config.json")
    config["pretrain"].pop("versions")
    state = read_json(last / "training" / "state.json")
    state["run"] = {
        key: value
        for key, value in state["run"].items()
        if key not in ("seconds", "log", "facts") and not key.startswith("window_")
    }
    with open(run / "run.yaml", encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    found = {
        "log": log_lines(run),
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()),
        "config": config,
        "inspect": inspected(last),
        "tensors": tensors(last.glob("*.safetensors")),
        "training": tensors((last / "training").glob("*.safetensors")),
        "settings": settings,
        "state": state,
        "texts": {
            path.name: path.read_text(encoding="utf-8")
            for path in sorted(last.iterdir())
            if path.is_file()
            and path.suffix != ".safetensors"
            and path.name not in ("manifest.json", "config.json")
        },
    }
    placeless: dict[str, Any] = json.loads(json.dumps(found).replace(str(folder), "FOLDER"))
    return placeless


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def log_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a log without what a clock has a part in."""
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def inspected(run: Path) -> dict[str, Any]:
    """What ``pretrain inspect`` says, without the place, and the size, in which the digits of times are counted."""
    return {
        key: value for key, value in pretrain.inspect(run).items() if key not in ("path", "bytes")
    }


def tensors(files: Any) -> dict[str, Any]:
    """Type, shape, norm and SHA-256 of every tensor of some safetensors files, by the file's stem and its name."""
    found: dict[str, Any] = {}
    for path in sorted(files):
        with safe_open(path, framework="pt") as opened:
            for key in sorted(opened.keys()):
                tensor = opened.get_tensor(key)
                found[f"{path.stem}/{key}"] = {
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "norm": float(tensor.double().norm()),
                    "sha256": hashlib.sha256(
                        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    ).hexdigest(),
                }
    return found


def main() -> None:
    folder, *names = sys.argv[1:]
    for name in names:
        train(Path(folder), name)


if __name__ == "__main__":
    main()
