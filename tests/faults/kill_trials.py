"""kill -9 at random moments of a training run, restarts included, against the run that was left alone.

    python tests/faults/kill_trials.py --objective NextToken --trials 30

Every trial is a chain of real processes, each killed by SIGKILL at a random moment of its life (while it prepares,
trains, evaluates or saves), until one is let finish. Then every byte of the final weights, every optimizer tensor
and every line of the loss log must equal those of one run that was never touched. A failure prints its seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import pretrain
from pretrain.checkpoint import latest
from pretrain.utils.run_log import read_log


def config(out: Path, text: Path, cache: Path, objective: str) -> dict[str, Any]:
    """A run of 16 steps over several epochs, with accumulation, dropout, evaluations and many checkpoints."""
    family = {"NextToken": "gpt2", "MaskedLM": "bert"}[objective]
    return {
        "data": {
            "train": str(text),
            "cache": str(cache),
            "tokenizer": "bpe",
            "vocab_size": 400,
            "row_length": 64,
            "valid": "last:0.2",
            "workers": 1,
        },
        "model": {
            "family": family,
            "size": "tiny",
            "overrides": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "max_positions": 64,
                "dropout": 0.1,
            },
        },
        "objective": {"class_path": objective},
        "optim": {"name": "muon", "lr": 3e-3},
        "train": {
            "out": str(out),
            "limit": "16 steps",
            "batch_rows": 8,
            "micro_rows": 4,
            "eval_every": "5 steps",
            "eval_rows": 4,
            "save_every": "2 steps",
            "log_every": 2,
        },
        "parallel": {"device": "cpu", "threads": 1},
    }


def in_child(settings: dict[str, Any], kill_after: float | None) -> bool:
    """Run training in a process of its own; True if it finished before it was killed."""
    pid = os.fork()
    if pid == 0:
        # The child leaves by os._exit on every path: it must never return into the parent's code.
        code = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
                pretrain.train(settings)
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return _finished(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return _finished(status)


def _finished(status: int) -> bool:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return True
    raise SystemExit(f"a training process failed with status {status}; run it by hand to see why")


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of the final weights and moments, and of every loss, evaluation and gradient norm of the log."""
    checkpoint = latest(run)
    assert checkpoint is not None
    files = {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "training/optimizer.safetensors")
    }
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "rows", "eval", "samples")
    lines = [{k: r[k] for k in keys if k in r} for r in read_log(run / "log.jsonl") if "step" in r]
    return files | {
        "step": checkpoint.name,
        "log": hashlib.sha256(json.dumps(lines).encode()).hexdigest(),
        "lines": str(len(lines)),
    }


def trials(objective: str, count: int, seed: int, work: Path) -> tuple[int, int]:
    """Run ``count`` trials; returns how many were identical and how many processes were killed."""
    torch.set_num_threads(1)
    text = work / "text.txt"
    draw = random.Random(0)
    words = ["sea", "ship", "wind", "salt", "rope", "sail", "deck", "mast", "gull", "tide"]
    text.write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(300)))
    cache = work / "cache"
    began = time.monotonic()
    whole = config(work / f"{objective}-whole", text, cache, objective)
    in_child(whole, None)
    expected, length = fingerprint(Path(whole["train"]["out"])), time.monotonic() - began
    same = kills = 0
    for trial in range(count):
        chance = random.Random(f"{seed}/{objective}/{trial}")
        settings = config(work / f"{objective}-{trial}", text, cache, objective)
        finished = False
        for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 5))):
            finished = in_child(settings, chance.uniform(0.0, length))
            if finished:
                break
            kills += 1
        if not finished:
            in_child(settings, None)
        found = fingerprint(Path(settings["train"]["out"]))
        if found == expected:
            same += 1
            shutil.rmtree(settings["train"]["out"])
        else:
            print(
                f"{objective} trial {trial} of seed {seed} differs: {found} instead of {expected}",
                file=sys.stderr,
            )
    return same, kills


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", choices=("NextToken", "MaskedLM"), action="append")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as work:
        for objective in args.objective or ("NextToken", "MaskedLM"):
            same, kills = trials(objective, args.trials, args.seed, Path(work))
            print(
                f"{objective}: {same} of {args.trials} bit-identical after {kills} kills",
                flush=True,
            )
            failed |= same != args.trials
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
