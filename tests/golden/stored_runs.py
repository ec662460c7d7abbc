"""Run directories as an earlier version of the package wrote them, in ``stored/``, and what is done with them.

    text/         prepared data
    gpt2/         next-token run, stopped after three of six steps
    bert-ema/     masked-LM run with a moving average of its weights, stopped likewise
    classifier/   bert-ema fine-tuned on animals.csv, stopped after two of four steps
    adapter/      gpt2 fine-tuned on the same rows by LoRA, stopped likewise
    figures.json  what `USES` gave when the directories were written

`store` wrote all of it. Commands name directories relative to the folder that holds them, so that they go on after the
folder was copied to another place: `USES` are called in it.
"""

from __future__ import annotations

import contextlib
import csv
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretrain
from golden import runs
from golden.compare import as_lines

STORED = Path(__file__).with_name("stored")
SHAPE = {**runs.SHAPE, "max_positions": 32}


def _pretrain(family: str, out: str, optim: dict[str, Any]) -> dict[str, Any]:
    """Settings of a pre-training run on the stored data."""
    return {
        "data": {"train": "text"},
        "model": {"family": family, "size": "tiny", "overrides": SHAPE},
        "objective": {"class_path": "MaskedLM" if family == "bert" else "NextToken"},
        "optim": {"lr": 1e-2, **optim},
        "train": {
            "out": out,
            "limit": "6 steps",
            "batch_rows": 4,
            "eval_every": "3 steps",
            "save_every": "0 steps",
            "log_every": 1,
            "precision": "fp32",
        },
        "parallel": runs.DEVICE,
    }


def _finetune(base: str, out: str, **more: Any) -> dict[str, Any]:
    """Keywords of a fine-tuning run on the stored rows."""
    return {
        "model": base,
        "data": "animals.csv",
        "task": "classification",
        "valid": 0.25,
        "out": out,
        "limit": "4 steps",
        "eval_every": "2 steps",
        "log_every": 1,
        "batch_rows": 8,
        "lr": 1e-2,
        "precision": "fp32",
        "parallel": runs.DEVICE,
        "quiet": True,
        **more,
    }


PRETRAINED = {
    "gpt2": _pretrain("gpt2", "gpt2", {}),
    "bert-ema": _pretrain("bert", "bert-ema", {"ema": 0.5}),
}
FINETUNED = {
    "classifier": _finetune("bert-ema", "classifier"),
    "adapter": _finetune("gpt2", "adapter", lora=4),
}
NAMES = (*PRETRAINED, *FINETUNED)
SENTENCE = "the sly fox sat on the log"


def go_on(name: str, hooks: list[Any] | None = None) -> None:
    """Start a run, or give the command of a stopped one again."""
    if name in PRETRAINED:
        pretrain.train(PRETRAINED[name], hooks=hooks or [])
    else:
        pretrain.finetune(hooks=hooks or [], **FINETUNED[name])


# ------------------------------------------------------------------------------------------ what is done with them


def resumed(name: str) -> Any:
    """Lines of the log of a run that has gone on to its end, without generated texts."""
    go_on(name)
    lines = runs.log_lines(Path(name))
    return [{key: value for key, value in line.items() if key != "samples"} for line in lines]


def loaded(name: str) -> Any:
    """Number and norm of the weights; of a classifier also its answer to a sentence."""
    model = pretrain.load(name, quiet=True)
    weights = [parameter.detach().double() for parameter in model.parameters()]
    found: dict[str, Any] = {
        "parameters": sum(weight.numel() for weight in weights),
        "norm": math.sqrt(sum(float((weight**2).sum()) for weight in weights)),
    }
    if name in FINETUNED:
        found["answers"] = model.predict([SENTENCE])
    return found


def evaluated(name: str) -> Any:
    """Figures on the held-out rows of the run."""
    return pretrain.evaluate(name, device="cpu")


def inspected(name: str) -> Any:
    """What ``pretrain inspect`` says."""
    return runs.inspected(Path(name))


def trained_on(name: str) -> Any:
    """Losses of a new run on the prepared data of a directory."""
    settings = _pretrain("llama", f"new-{name}", {})
    settings["data"] = {"train": name}
    run = pretrain.train(settings)
    return [line["loss"] for line in run.history if "grad_norm" in line]


USES: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "loaded": (loaded, NAMES),
    "evaluated": (evaluated, NAMES),
    "inspected": (inspected, NAMES),
    "resumed": (resumed, NAMES),
    "trained_on": (trained_on, ("text",)),
}


@contextlib.contextmanager
def moved(place: Path) -> Any:
    """Copy the stored directories into a new folder, and work there."""
    shutil.copytree(STORED, place)
    with contextlib.chdir(place):
        yield place


# ------------------------------------------------------------------------------------------ writing them


def store(folder: Path) -> None:
    """Write the directories, and the figures of all uses, into a new folder."""
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        Path("texts.txt").write_text("\n\n".join(runs.TEXTS) + "\n", encoding="utf-8")
        with open("animals.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(runs.CLASSES)
        pretrain.prepare(
            "texts.txt",
            "text",
            tokenizer="wordpiece",
            vocab_size=90,
            row_length=32,
            separator="\n\n",
            valid=0.1,
            workers=1,
            quiet=True,
        )
        for name in NAMES:
            go_on(name, [runs.ctrl_c_after(3 if name in PRETRAINED else 2)])
    figures: dict[str, dict[str, Any]] = {}
    for use, (call, names) in USES.items():
        figures[use] = {}
        for name in names:
            with tempfile.TemporaryDirectory() as place:
                shutil.copytree(folder, place, dirs_exist_ok=True)
                with contextlib.chdir(place):
                    figures[use][name] = call(name)
    (folder / "figures.json").write_text(as_lines(figures, 3) + "\n", encoding="utf-8")
