"""The first run of a newcomer: no download, no setting, a few minutes on a laptop's CPU.

It prepares the built-in ``python`` corpus (documentation and source of the standard library of the running Python),
pre-trains a small GPT-like model, shows what it writes, and says where everything lies and what to type next. It is
`pretrain.prepare`, `pretrain.train` and `pretrain.load` in a row and nothing else: what it does, a user can do.
"""

from __future__ import annotations

import math
import os
import shlex
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.training.state import Run

__all__ = ["MINUTES", "PROMPTS", "config", "quickstart"]

MINUTES = 4.0
"""Budget of the whole story, in minutes, when neither the caller nor PRETRAIN_QUICKSTART_MINUTES says otherwise."""
PROMPTS = ("def __init__(self", "import", "The")
"""What the trained model is asked to continue."""

_SOURCE, _VOCAB_SIZE, _ROW_LENGTH = "python", 4096, 256
# Evaluating, sampling, saving and the report are no training, and a slow disk must not break the promise.
_RESERVE_SECONDS, _SHARE_FOR_TRAINING = 12.0, 0.92


def config(out: str, minutes: float, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The settings of the quickstart run, as ``pretrain train`` takes them.

    Args:
        out: run directory.
        minutes: time for training.
        seed: of weights, order and samples.
    """
    return {
        "data": {"train": _SOURCE, "vocab_size": _VOCAB_SIZE, "row_length": _ROW_LENGTH},
        "model": {"family": "qwen3", "size": "mini", "overrides": {"zero_init_outputs": True}},
        "objective": {"class_path": "NextToken"},
        "optim": {"name": "muon", "lr": 3e-3, "muon_lr": 0.02, "schedule": "wsd", "warmup": 0.02},
        "train": {
            "out": out,
            "limit": f"{minutes:.4f} minutes",
            "batch_rows": 16,
            "eval_every": "20%",
            "eval_rows": 64,
            "save_every": "50%",
            "log_every": 5,
            "sample": PROMPTS[0],
            "seed": seed,
        },
    }


def quickstart(
    out: str | os.PathLike[str] = "runs/quickstart",
    minutes: float | None = None,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Prepare, train, sample and report; every step is said in plain lines.

    Args:
        out: run directory. The same call again continues what is there.
        minutes: budget of the whole story; by default the environment variable PRETRAIN_QUICKSTART_MINUTES, else
            ``MINUTES``.
        seed: of weights, order and samples.
        say: where the lines go; ``print`` by default.

    Returns:
        ``run``, ``checkpoint``, ``report`` (paths as text), ``metrics`` of the last evaluation, ``samples`` (prompt ->
        text), ``seconds``, and ``exit_code``, which is not 0 when a signal stopped the training.

    Raises:
        ConfigError: the budget is not a positive number of minutes.
    """
    began = time.monotonic()
    budget = _budget(minutes)
    tell = say or _print
    import pretrain
    from pretrain import report

    tell(
        f"pretrain quickstart: a small GPT learns Python from the standard library on this computer.\n"
        f"No download, about {budget:g} minute{'' if budget == 1 else 's'} in all. "
        "Ctrl-C stops it and keeps what was learned.\n"
    )
    tell(
        "1. Data: the documentation and source of Python's standard library, cut into tokens (kept for next time)."
    )
    data = pretrain.prepare(_SOURCE, vocab_size=_VOCAB_SIZE, row_length=_ROW_LENGTH)
    left = budget * 60 - (time.monotonic() - began) - _RESERVE_SECONDS
    training = max(left * _SHARE_FOR_TRAINING, budget * 60 * 0.2) / 60
    tell(f"\n2. Training for {_duration(training * 60)}: predict every token from those before it.")
    run = pretrain.train(config(os.fspath(out), training, seed))
    path = Path(run.path)
    if run.exit_code:
        tell(
            f"\nStopped by {run.stopped}; what was learned is in {run.checkpoint}. The same command goes on from there."
        )
        return _result(run, report.write(path), {}, began)

    tell("\n3. What it writes after a few minutes of reading (Python-shaped, not yet Python):")
    model = pretrain.load(path)
    samples = {}
    for index, prompt in enumerate(PROMPTS):
        samples[prompt] = model.generate(
            prompt, max_new_tokens=60, temperature=0.7, top_k=50, seed=seed + index
        )
        lines = [line for line in samples[prompt].splitlines() if line.strip()]
        tell(textwrap.indent("\n".join(lines), "   | ") + "\n")

    written = report.write(path)
    result = _result(run, written, samples, began)
    tell(_ending(result, data.unigram_entropy))
    return result


def _print(text: str) -> None:
    print(text, flush=True)


def _budget(minutes: float | None) -> float:
    """The time for everything, in minutes."""
    where = "minutes"
    text: object = minutes
    if minutes is None:
        where = "the environment variable PRETRAIN_QUICKSTART_MINUTES"
        text = os.environ.get("PRETRAIN_QUICKSTART_MINUTES", MINUTES)
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value <= 1e5:
        raise ConfigError(
            f"{where} is {text!r}; give a positive number of minutes, e.g. {MINUTES:g}."
        )
    return value


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60} s"


def _result(run: Run, report: Path, samples: dict[str, str], began: float) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "checkpoint": str(Path(run.path) / run.checkpoint.name) if run.checkpoint else "",
        "report": str(report),
        "metrics": dict(run.metrics),
        "samples": samples,
        "seconds": time.monotonic() - began,
        "exit_code": run.exit_code,
    }


def _ending(result: dict[str, Any], unigram: float | None) -> str:
    """What came of it, where it lies, what to type next."""
    metrics, figures = result["metrics"], ""
    if "loss" in metrics:
        figures = f"On held-out text: loss {metrics['loss']:.3f} nats per token"
        if unigram is not None:
            figures += f" ({unigram:.3f} would be knowing only how often each token occurs)"
        figures += ".\n"
    place, ask = shlex.quote(result["run"]), shlex.quote(PROMPTS[0])
    return (
        f"Done in {_duration(result['seconds'])}. {figures}\n"
        f"Checkpoint  {result['checkpoint']}\n"
        f"            a Hugging Face directory: transformers' AutoModelForCausalLM opens it as it is\n"
        f"Report      {result['report']}\n"
        f"            open it in a browser: curves, evaluations, samples, settings\n\n"
        f"What to type next:\n"
        f"  pretrain generate {place} {ask} --max_new_tokens 80 --temperature 0.7\n"
        f"  pretrain inspect {place}\n"
        f"  pretrain prepare 'my-texts/*.txt' --out data/mine --vocab_size 8192\n"
        f"  pretrain train --data.train data/mine --model.size small --train.out runs/mine --train.limit '10 minutes'"
    )
