"""Fine-tuning of ours against transformers' Trainer, in real tokens per second: padding does not count.

    python tests/benchmarks/finetune_step.py                                  # all data, small BERT and ModernBERT
    python tests/benchmarks/finetune_step.py --family bert --data sick --rounds 5
    python tests/benchmarks/finetune_step.py --size base --steps 3 --precision bf16

Three arms train one model on the same encoded rows, once through, in batches of 32: ours (packed), and the Trainer
with DataCollatorWithPadding, with rows as they come and grouped by length. They alternate, forwards and backwards. Time
runs from the end of the first step to the end of the last: that of the process, which other programs disturb little,
and beside it that of the clock. Shown are sums over the rounds, and the ratio of process times round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import io
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import pretrain
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.data.tables import read_table
from pretrain.data.task_rows import TaskRows
from pretrain.data.tokenizer import train_from_texts
from pretrain.models import build
from pretrain.objectives.classification import Classification
from pretrain.training.trainer import Trainer

SIZES = {"small": (4, 256, 4), "base": (12, 768, 12)}
BATCH = 32
ARMS = ("packed", "padded", "grouped")


@dataclass
class Clock:
    """Process seconds, seconds and real tokens between the first and the last step of one run."""

    marks: list[tuple[float, float, int]] = field(default_factory=list)

    def mark(self, tokens: int) -> None:
        """A step has ended; so many real tokens have been read until now."""
        self.marks.append((time.process_time(), time.perf_counter(), tokens))

    @property
    def taken(self) -> tuple[float, float, int]:
        """Differences between the ends."""
        (a, b, c), (d, e, f) = self.marks[0], self.marks[-1]
        return d - a, e - b, f - c


def rows_of(name: str, folder: Path) -> list[dict[str, Any]]:
    """Labelled rows of a data set, shuffled once so that any part is a sample."""
    if name == "ag_news":
        with (folder / name / "train.csv").open(encoding="utf-8", newline="") as file:
            made = [{"text": " ".join(r[1:]), "label": r[0]} for r in csv.reader(file)]
    elif name == "sick":
        with (folder / name / "train.txt").open(encoding="utf-8", newline="") as file:
            made = [
                {
                    "text": r["sentence_A"],
                    "pair": r["sentence_B"],
                    "label": r["entailment_judgment"],
                }
                for r in csv.DictReader(file, delimiter="\t")
            ]
    else:
        with gzip.open(folder / name / "reviews.jsonl.gz", "rt", encoding="utf-8") as file:
            read = map(json.loads, file)
            made = [{"text": r["text"], "label": str(r["label"])} for r in read]
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(0))
    return [made[i] for i in order.tolist()]


class Bench:
    """One model on one data set.

    Args:
        family, data: names.
        args: of the command line.
        out: a directory for models and runs.
    """

    def __init__(self, family: str, data: str, args: argparse.Namespace, out: Path) -> None:
        self.args, self.out = args, out
        rows = rows_of(data, args.folder)[: BATCH * args.steps]
        layers, hidden, heads = SIZES[args.size]
        labels = sorted({row["label"] for row in rows})
        model = build(
            family, None, tokenizer=args.tokenizer, head="sequence-classification", labels=labels, num_layers=layers,
            hidden_size=hidden, num_heads=heads, max_positions=512, vocab_size=len(args.tokenizer),
        )  # fmt: skip
        self.path = model.save(out / f"{family}-{data}")
        self.task = self.open_task()
        self.rows: TaskRows = self.task.encode(read_table(rows))
        self.theirs = [
            {key: value.tolist() for key, value in example.items()} for example in self.rows
        ]
        for row in self.theirs:
            row["attention_mask"] = [1] * len(row["input_ids"])

    def open_task(self) -> Classification:
        """The task around fresh weights."""
        return Classification(pretrain.load(self.path, quiet=True), max_length=512)

    def ours(self) -> Clock:
        """Train with this package."""
        clock = Clock()
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            trainer = Trainer(
                self.open_task(),
                self.rows,
                optim=OptimConfig(lr=1e-4, schedule="linear", betas=(0.9, 0.999), min_lr=0.0),
                train=TrainConfig(
                    out=folder, limit=f"{self.args.steps} steps", batch_rows=BATCH, precision=self.args.precision,
                    eval_every="0 steps", save_every="0 steps", best=False,
                ),
                parallel=ParallelConfig(device="cpu"),
                hooks=[lambda _: clock.mark(trainer.state.tokens)],
                quiet=True,
            )  # fmt: skip
            trainer.fit()
        return clock

    def peer(self, grouped: bool) -> Clock:
        """Train with transformers."""
        clock, read = Clock(), [0]
        model = transformers.AutoModelForSequenceClassification.from_pretrained(self.path)

        def count(module: Any, args: Any, kwargs: Any) -> None:
            read[0] += int(kwargs["attention_mask"].sum())

        class Marks(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.mark(read[0])

        model.register_forward_pre_hook(count, with_kwargs=True)
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            arguments = transformers.TrainingArguments(
                folder, per_device_train_batch_size=BATCH, max_steps=self.args.steps, learning_rate=1e-4,
                weight_decay=0.1, warmup_steps=0, lr_scheduler_type="linear", save_strategy="no", report_to="none",
                use_cpu=True, bf16=self.args.precision == "bf16", disable_tqdm=True, logging_strategy="no",
                train_sampling_strategy="group_by_length" if grouped else "random", dataloader_pin_memory=False,
            )  # fmt: skip
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.path)
            transformers.Trainer(
                model, arguments, train_dataset=self.theirs, callbacks=[Marks()],
                data_collator=transformers.DataCollatorWithPadding(tokenizer),
            ).train()  # fmt: skip
        return clock


def compare(bench: Bench, rounds: int) -> dict[str, list[tuple[float, float, int]]]:
    """Run the arms in turn."""
    arms: dict[str, Callable[[], Clock]] = {
        "packed": bench.ours,
        "padded": lambda: bench.peer(False),
        "grouped": lambda: bench.peer(True),
    }
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ARMS}
    for number in range(rounds):
        for name in ARMS if number % 2 == 0 else reversed(ARMS):
            with contextlib.redirect_stdout(io.StringIO()):
                taken[name].append(arms[name]().taken)
    return taken


def show(
    head: str, taken: dict[str, list[tuple[float, float, int]]], filled: dict[str, float]
) -> None:
    """One line for each arm."""
    ours = [tokens / seconds for seconds, _, tokens in taken["packed"]]
    for name in ARMS:
        seconds, clock = (sum(run[k] for run in taken[name]) for k in (0, 1))
        tokens = sum(run[2] for run in taken[name])
        pace = [n / s for s, _, n in taken[name]]
        ratios = [a / b for a, b in zip(ours, pace, strict=True)]
        text = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(
            f"{head:<26}{name:<9}{seconds:>9.2f}{clock:>9.2f}{tokens / seconds:>12,.0f}"
            f"{filled.get(name, 1.0):>8.0%}  {'' if name == 'packed' else text}",
            flush=True,
        )


def filling(rows: TaskRows) -> dict[str, float]:
    """Share of a batch that is no padding, when rows come as they stand."""
    lengths = rows.lengths
    boxes = sum(
        len(part) * max(part)
        for part in (lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH))
    )
    ordered = sorted(lengths)
    grouped = sum(
        len(part) * max(part)
        for part in (ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH))
    )
    return {"padded": sum(lengths) / boxes, "grouped": sum(lengths) / grouped}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", default=["bert", "modernbert"])
    parser.add_argument("--data", nargs="+", default=["ag_news", "sick", "movie_reviews"])
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--profile", action="store_true", help="show where the time of ours goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    root = Path(__file__).resolve().parents[2]
    args.folder = Path(os.environ.get("PRETRAIN_TEST_DATA", root.parent / "shared" / "data"))
    texts = [row["text"] for row in rows_of("ag_news", args.folder)[:4000]]
    args.tokenizer = train_from_texts(texts, "wordpiece", vocab_size=args.vocab)
    load = os.getloadavg()[0]
    print(
        f"{args.size} {SIZES[args.size]}, {args.precision}, {args.steps} steps of {BATCH} rows, {args.rounds} rounds, "
        f"{args.threads} threads, load {load:.1f}; torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(
        f"{'':<26}{'arm':<9}{'cpu s':>9}{'clock s':>9}{'tokens/s':>12}{'filled':>8}  packed is faster by"
    )
    with tempfile.TemporaryDirectory() as folder:
        for family in args.family:
            for data in args.data:
                bench = Bench(family, data, args, Path(folder))
                if args.profile:
                    profiled(bench)
                    continue
                show(f"{family}, {data}", compare(bench, args.rounds), filling(bench.rows))


def profiled(bench: Bench) -> None:
    """Operators and functions of one run of ours."""
    import cProfile
    import pstats

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        bench.ours()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
    profile = cProfile.Profile()
    profile.runcall(bench.ours)
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
