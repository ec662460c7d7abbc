"""Row 9: CPU seconds of an import, and of a process that takes the first step of a tiny model."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .harness import Case, Contender, Settings, Work

# What a script imports before it trains.
IMPORTS = {
    "pretrain": "import pretrain.training.run",
    "torch alone": "import torch",
    "transformers Trainer": "from transformers import AutoModelForCausalLM, Trainer",
    "lightning Trainer": "from lightning import Trainer",
}
MODEL = {"vocab_size": 300, "num_layers": 2, "hidden_size": 64, "num_heads": 2, "max_positions": 32}
OURS = f"""
import numpy as np, pretrain
from pretrain.config import TrainConfig, ParallelConfig
from pretrain.models import build
from pretrain.objectives import build_objective
from pretrain.training.trainer import Trainer
model = build("gpt2", None, **{MODEL})
rows = [{{"input_ids": np.arange(32) + i}} for i in range(64)]
Trainer(build_objective("NextToken", {{}}, model), rows, quiet=True, parallel=ParallelConfig(device="cpu", threads=1),
    train=TrainConfig(out=OUT, limit="1 steps", batch_rows=8, eval_every="0 steps", save_every="0 steps")).fit()
"""
THEIRS = """
import transformers
config = transformers.GPT2Config(vocab_size=300, n_layer=2, n_embd=64, n_head=2, n_positions=32)
model = transformers.GPT2LMHeadModel(config)
rows = [{"input_ids": list(range(i, i + 32)), "labels": list(range(i, i + 32))} for i in range(64)]
args = transformers.TrainingArguments(OUT, max_steps=1, per_device_train_batch_size=8, report_to="none", use_cpu=True,
    save_strategy="no", disable_tqdm=True)
transformers.Trainer(model, args, train_dataset=rows).train()
model.save_pretrained(OUT)
"""


def seconds(code: str) -> float:
    """CPU seconds of a fresh interpreter that runs the code, with bytecode kept, as an installed package has it."""
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before = os.times()
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [sys.executable, "-c", f"OUT = {out!r}\n{code}"], check=True, capture_output=True,
            env={**environment, "PYTHONPATH": paths},
        )  # fmt: skip
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


def startup(settings: Settings) -> list[Callable[[], Case]]:
    """Row 9: torch is the floor of an import, our import that of our first step with its checkpoint."""

    def contender(name: str, kind: str, code: str, needs: str) -> Contender:
        def make() -> tuple[Callable[[], float], Work]:
            seconds(code)  # compiles the modules that no process has imported before
            return functools.partial(seconds, code), Work(0)

        return Contender(name, kind, make, needs)

    def imports() -> Case:
        needs = {"pretrain": "torch", "torch alone": "torch"}
        kinds = {"pretrain": "ours", "torch alone": "floor"}
        return Case(
            "import of what trains", "CPU seconds of a process",
            [
                contender(name, kinds.get(name, "default"), code, needs.get(name, name.split()[0]))
                for name, code in IMPORTS.items()
            ],
            {"floor": 0.9, "default": 1.0}, rounds=(2, 3),
        )  # fmt: skip

    def first_step() -> Case:
        return Case(
            "process from start through one step of a tiny GPT-2 to its checkpoint", "CPU seconds of a process",
            [
                contender("pretrain", "ours", OURS, "torch"),
                contender("our import alone", "floor", IMPORTS["pretrain"], "torch"),
                contender("transformers Trainer", "default", THEIRS, "transformers"),
            ],
            {"floor": 0.7, "default": 1.0}, rounds=(2, 3),
        )  # fmt: skip

    return [imports, first_step]
