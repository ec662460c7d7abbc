"""The ``quickstart`` command: a first run without downloads or settings, in a few minutes on a laptop's CPU.

It prepares the built-in ``python`` corpus (documentation and source of the standard library of the running Python),
pre-trains a small GPT-like model and prints samples of it, pre-trains a small BERT-like model and fine-tunes it to
classify pieces of code by the package that they come from, reports whether pre-training helped compared with the same
model from random weights, and prints commands to try next. It only calls `pretrain.prepare`, `pretrain.train`,
`pretrain.load` and `pretrain.finetune`, as a user can. The modules of the held-out pieces of code are excluded from
pre-training, so neither their text nor their labels have been seen before the test.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.data.snippets import PythonWithout, Snippets, snippets
from pretrain.errors import ConfigError, Interrupted
from pretrain.printing import Console, printable
from pretrain.utils.files import replace_file

if TYPE_CHECKING:
    from pretrain.data.sources import Source
    from pretrain.finetuning.result import Finetuned
    from pretrain.training.state import Run

__all__ = ["MINUTES", "PROMPTS", "config", "quickstart", "task", "write_rows"]

MINUTES = 5.0
"""Default time budget in minutes, if neither the caller nor PRETRAIN_QUICKSTART_MINUTES sets one."""
PROMPTS = ("def __init__(self", "import")
"""Prompts that the trained model continues."""

_VOCAB_SIZE, _ROW_LENGTH = 4096, 256
_COUNTS = (64, 15, 40)  # labelled rows per package: training, validation, test
_LABELS, _SEEDS = (128, 512), 3  # numbers of labelled rows and seeds of the comparison
_LRS = (1e-3, 3e-3)  # learning rates that both arms try
_BATCH, _MAX_LENGTH = 16, 160
_FEWEST_STEPS, _MOST_STEPS = 8, 80
_SECONDS_FOR_ALL_LABELS = 45.0  # with less left, compare at the largest number only
# Seconds reserved for evaluation, sampling, saving, reports and a slow disk; shares of the rest for pre-training.
_RESERVE_SECONDS, _SHARES = 20.0, {"gpt": 0.22, "bert": 0.5}
# A fine-tuning run also opens the model, reads the rows and scores: a constant number of seconds, and forward passes
# over the scored rows, each of which costs a third of a training pass.
_SECONDS_PER_RUN, _SHARE_OF_BACKWARD = 0.5, 3


def config(kind: str, data: str, out: str, minutes: float, seed: int = 0) -> dict[str, Any]:
    """Return the settings of a pre-training run, as ``pretrain train`` takes them.

    The model is ``"gpt"``, which predicts the next token, or ``"bert"``, which fills in masked ones.
    """
    kinds: dict[str, dict[str, Any]] = {
        "gpt": {
            "model": {"family": "qwen3", "size": "tiny", "overrides": {"zero_init_outputs": True}},
            "objective": {"class_path": "NextToken"},
        },
        "bert": {
            "model": {"family": "modernbert", "size": "tiny"},
            "objective": {"class_path": "MaskedLM", "init_args": {"rate": 0.3}},
        },
    }
    return {
        **kinds[kind],
        "data": {"train": data, "vocab_size": _VOCAB_SIZE, "row_length": _ROW_LENGTH},
        "optim": {"name": "muon", "lr": 3e-3, "muon_lr": 0.02, "schedule": "wsd", "warmup": 0.02},
        "train": {
            "out": out,
            "limit": f"{minutes:.4f} minutes",
            "batch_rows": 16,
            "eval_every": "34%",
            "eval_rows": 64,
            "save_every": "50%",
            "log_every": 5,
            "seed": seed,
        },
    }


def task(steps: int, counts: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Return the keyword arguments of ``pretrain.finetune``: the task, and its comparison with random weights.

    From the checkpoint and from random weights, every run has these steps, at these numbers of labelled rows.
    """
    return {
        "task": "classification",
        "compare": "scratch",
        "label_counts": counts,
        "seeds": _SEEDS,
        "lr": _LRS[0],
        "lrs": list(_LRS),
        "limit": f"{steps} steps",
        "batch_rows": _BATCH,
        "max_length": _MAX_LENGTH,
        "max_cut": 1.0,
        "eval_every": "25%",
        "seed": seed,
        "quiet": True,
    }


def quickstart(
    out: str | os.PathLike[str] = "runs/quickstart",
    minutes: float | None = None,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Prepare, pre-train, sample, fine-tune and compare with training from scratch, reporting every step.

    Args:
        out: run directory. The same call again resumes it.
        minutes: time budget of everything; by default the environment variable PRETRAIN_QUICKSTART_MINUTES, else
            ``MINUTES``.
        seed: seed of weights, order, samples, and of the choice of labelled rows.
        say: function that prints the lines; ``print`` by default.

    Returns:
        ``run``, ``checkpoint``, ``report`` (paths as text) and ``metrics`` of the GPT-like model, ``samples``
        (prompt -> text), ``encoder``, ``rows`` and ``finetuned`` (paths as text; empty if not reached),
        ``comparison`` (a ``Comparison`` or None), ``seconds``, and ``exit_code``, which is nonzero if a signal
        stopped it.

    Raises:
        ConfigError: the budget is not a positive number of minutes.
    """
    run = _Quickstart(os.fspath(out), _budget(minutes), seed, say or _printer())
    return run.run()


class _Quickstart:
    """One quickstart: its results so far and its time budget."""

    def __init__(self, out: str, budget: float, seed: int, say: Callable[[str], None]) -> None:
        self.out, self.budget, self.seed, self.say = out, budget, seed, say
        self.began = time.monotonic()
        self.result: dict[str, Any] = {
            "run": out, "checkpoint": "", "report": "", "metrics": {}, "samples": {}, "encoder": "", "rows": "",
            "finetuned": "", "comparison": None, "seconds": 0.0, "exit_code": 0,
        }  # fmt: skip

    @property
    def left(self) -> float:
        """Seconds of the budget that are left for training."""
        return self.budget * 60 - (time.monotonic() - self.began) - self.reserve

    @property
    def reserve(self) -> float:
        return min(_RESERVE_SECONDS, self.budget * 60 * 0.15)

    def run(self) -> dict[str, Any]:
        """Run all steps, or those before a signal; return the results."""
        import pretrain

        self.say(
            f"pretrain quickstart: two small models learn Python from the standard library on this computer.\n"
            f"No download, about {self.budget:g} minute{'' if self.budget == 1 else 's'} in all. "
            "Ctrl-C stops it and keeps what was learned."
        )
        try:
            rows = snippets(_COUNTS, seed=self.seed, source=_library())
            self.say(
                "1. Data: documentation and source of the standard library, cut into tokens (kept for next time), "
                f"without\n   the {len(rows.held_out)} modules of the validation and test rows of step 4."
            )
            data = pretrain.prepare(
                _corpus(rows), vocab_size=_VOCAB_SIZE, row_length=_ROW_LENGTH, quiet=True
            )
            gpt = self.pretrain("gpt", str(data.path))
            if not gpt.exit_code:
                self.sample(Path(gpt.path), data.unigram_entropy)
                bert = self.pretrain("bert", str(data.path))
                if not bert.exit_code:
                    self.finetune(bert, rows)
        except KeyboardInterrupt as error:
            code = error.code if isinstance(error, Interrupted) else 128 + signal.SIGINT
            self.stopped(signal.Signals(code - 128).name, code)
        self.result["seconds"] = time.monotonic() - self.began
        if not self.result["exit_code"]:
            self.say(self.closing_lines())
        return self.result

    def stopped(self, name: str, code: int) -> None:
        """Report what was kept when a signal ended the quickstart, and set the exit code."""
        kept = self.result["finetuned"] or self.result["encoder"] or self.result["checkpoint"]
        where = f"what was learned is in {kept}" if kept else "there is nothing to keep yet"
        self.say(f"\nStopped by {name}; {where}. The same command goes on from there.")
        self.result["exit_code"] = code

    def pretrain(self, kind: str, data: str) -> Run:
        """Train one of the two models for its share of the remaining time."""
        import pretrain
        from pretrain.report import write

        seconds = max(self.left * _SHARES[kind], self.budget * 60 * 0.1)
        what = {
            "gpt": "2. A GPT-like model learns to predict every token from those before it",
            "bert": "3. A BERT-like model learns to fill in hidden tokens",
        }
        self.say(f"{what[kind]}: {_duration(seconds)}.")
        out = self.out if kind == "gpt" else f"{self.out}-bert"
        run: Run = pretrain.train(config(kind, data, out, seconds / 60, self.seed))
        path = Path(run.path)
        written = str(write(path))
        checkpoint = str(path / run.checkpoint.name) if run.checkpoint else ""
        if kind == "gpt":
            found = {"run": str(path), "checkpoint": checkpoint, "report": written}
            self.result |= {**found, "metrics": dict(run.metrics)}
        else:
            self.result["encoder"] = checkpoint
        if run.exit_code:
            self.stopped(run.stopped, run.exit_code)
        return run

    def sample(self, path: Path, unigram: float | None) -> None:
        """Print the held-out loss of the GPT-like model and its continuations of the prompts."""
        import pretrain

        if "loss" in self.result["metrics"]:
            known = f" (unigram baseline {unigram:.3f})"
            loss = f"Held-out text: loss {self.result['metrics']['loss']:.3f} nats per token"
            self.say(f"   {loss}{known if unigram else ''}. What it writes so far:")
        model = pretrain.load(path, quiet=True)
        for index, prompt in enumerate(PROMPTS):
            text = model.generate(
                prompt, max_new_tokens=48, temperature=0.7, top_k=50, seed=self.seed + index
            )
            self.result["samples"][prompt] = text
            lines = [line[:110] for line in text.splitlines() if line.strip()]
            self.say(textwrap.indent("\n".join(lines[:4]), "   | "))

    def finetune(self, run: Run, rows: Snippets) -> None:
        """Fine-tune the checkpoint to classify packages, and the same model from random weights for comparison."""
        import pretrain

        folder = write_rows(rows, Path(self.out) / "rows")
        self.result["rows"] = str(folder)
        counts = _LABELS if self.left > _SECONDS_FOR_ALL_LABELS else _LABELS[-1:]
        steps = self.steps(run, rows, len(counts))
        self.say(
            f"4. Fine-tuning it on {len(rows.train)} labelled rows: from which of "
            f"{len(rows.packages)} packages are these lines?\n"
            f"   ({', '.join(rows.packages)}; their names are masked, test rows come from modules "
            f"never read.)\n"
            f"   Then the same from random weights: {steps} steps each, {_SEEDS} seeds, two learning rates; "
            f"{_duration(max(self.left, 0))} or so."
        )
        assert run.checkpoint is not None
        place = Path(run.path) / f"packages-from-{run.step}"
        try:
            result = pretrain.finetune(
                Path(run.path) / run.checkpoint.name,
                str(folder / "train.jsonl"),
                valid=str(folder / "valid.jsonl"),
                test=str(folder / "test.jsonl"),
                out=place,
                text="text",
                label="label",
                **task(steps, counts, self.seed),
            )
        finally:  # also report what an interrupt during the comparison leaves
            if any(place.glob("checkpoint-*")):
                self.result["finetuned"] = str(place)
        if result.run.exit_code:
            self.stopped(result.run.stopped, result.run.exit_code)
            return
        self.print_comparison(result)

    def print_comparison(self, result: Finetuned) -> None:
        """Print the test accuracy and the table of the comparison."""
        assert result.comparison is not None
        self.result["comparison"] = result.comparison
        tested, chance = result.test_metrics or {}, result.trivial.get("accuracy")
        by_chance = f"; always the same answer gives {chance:.0%}" if chance is not None else ""
        self.say(
            f"   It names the right package for {tested.get('accuracy', math.nan):.0%} of the test rows{by_chance}."
        )
        shown = [line for line in result.comparison.table().splitlines() if line]
        self.say(textwrap.indent("\n".join(shown), "   "))
        if not result.comparison.baselines:
            self.say("   (to compare with a bag-of-words model too: pip install scikit-learn)")

    def steps(self, run: Run, rows: Snippets, counts: int) -> int:
        """Return the steps per fine-tuning run that fit into the remaining time at the pace of pre-training."""
        paces = [
            r["tokens"] / r["seconds"] for r in run.history if r.get("tokens") and r.get("seconds")
        ]
        runs = 1 + 2 * len(_LRS) * counts * _SEEDS
        if not paces or paces[-1] <= 0:
            return _FEWEST_STEPS
        scored = (len(rows.valid) + len(rows.test)) / _SHARE_OF_BACKWARD
        tokens = (self.left / runs - _SECONDS_PER_RUN) * paces[-1]
        length = _MAX_LENGTH / 2  # approximately the mean
        steps = int((tokens / length - scored) / _BATCH)
        return min(max(steps, _FEWEST_STEPS), _MOST_STEPS)

    def closing_lines(self) -> str:
        """Return the closing lines: the paths of the results, and commands to try next."""
        result = self.result
        place, tuned = shlex.quote(result["run"]), shlex.quote(result["finetuned"])
        ask, rows = shlex.quote(PROMPTS[0]), shlex.quote(str(Path(result["rows"]) / "test.jsonl"))
        return (
            f"Done in {_duration(result['seconds'])}. Both are Hugging Face directories, which transformers opens as "
            f"they are:\n"
            f"  {result['checkpoint']}   (writes)    report: {result['report']}\n"
            f"  {result['finetuned']}   (classifies) report: {Path(result['finetuned']) / 'report.html'}\n"
            f"What to type next:\n"
            f"  pretrain generate {place} {ask} --max_new_tokens 80 --temperature 0.7\n"
            f"  pretrain predict {tuned} {rows} --out answers.csv\n"
            f"  pretrain train --data.train 'my-texts/*.txt' --model.size small --train.out runs/mine "
            f"--train.limit '10 minutes'\n"
            f"  pretrain finetune --model runs/mine --task classification --data reviews.csv --compare scratch "
            f"--data.columns '{{text: review, label: stars}}'"
        )


def write_rows(rows: Snippets, folder: Path) -> Path:
    """Write the labelled rows as train.jsonl, valid.jsonl and test.jsonl; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "valid", "test"):
        text = "".join(json.dumps(row) + "\n" for row in getattr(rows, name))
        replace_file(folder / f"{name}.jsonl", text.encode())
    return folder


def _library() -> Any:
    """Return the source of the labelled rows; None is the standard library of the running Python."""
    return None


def _corpus(rows: Snippets) -> Source | str:
    """Return the source of pre-training."""
    return PythonWithout(rows.held_out)


def _printer() -> Callable[[str], None]:
    """Return a function that prints lines on stdout, whose reader may leave while the models are trained."""
    screen = Console(sys.stdout)
    return lambda text: print(printable(text, lines=True), file=screen, flush=True)


def _budget(minutes: float | None) -> float:
    """Return the time budget in minutes.

    Raises:
        ConfigError: it is not a positive number.
    """
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
