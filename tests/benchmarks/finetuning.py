"""Rows 4 and 5: full fine-tuning and LoRA of an encoder by whole trainers, ours beside the Trainer of transformers.

Everybody reads the same encoded rows once; what is measured is CPU time from the end of the first step to the end of
the last but one, for each token that is no padding: our last step writes a checkpoint, and the peers write none.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pretrain
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.data.tables import read_table
from pretrain.data.tokenizer import train_from_texts
from pretrain.lora import LoraConfig, apply_lora, save_adapter
from pretrain.models import build
from pretrain.objectives.classification import Classification
from pretrain.objectives.embedding import Embedding
from pretrain.objectives.tasks import Task
from pretrain.training.precision import choose_precision
from pretrain.training.trainer import Trainer

from .harness import FP32, Case, Contender, Settings, Tolerance, Work, moved

Made = tuple[Callable[[], float], Work]
BETAS, LR = (0.9, 0.999), 2e-5
# Trainers shuffle, each by itself: after the same rows in another order losses and updates are near, not equal.
WITHIN = Tolerance(FP32.first, 0.25, 0.4)
SCORED = 160  # rows on which losses are compared before and after
SIZES = {"cpu": (6, 320, 5), "cuda": (12, 768, 12), "tiny": (2, 64, 2)}


def texts(count: int) -> list[dict[str, Any]]:
    """Labelled rows of words by Zipf's law, of lognormal length."""
    rng = np.random.default_rng(0)
    words = np.array(
        [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "")]
    )
    rows = []
    for i in range(count):
        size = int(np.clip(rng.lognormal(np.log(32), 0.7), 4, 200))
        chosen = words[np.minimum(rng.zipf(1.3, size) - 1, len(words) - 1)]
        chosen[: 1 + size // 8] = words[
            -1 - i % 2
        ]  # what the label is, so that every order learns the same
        rows.append({"text": " ".join(chosen), "label": "ab"[i % 2]})
    return rows


def run_ours(
    task: Task,
    rows: Any,
    batch: int,
    steps: int,
    settings: Settings,
    out: Path,
    marks: list[tuple[float, int]],
) -> None:
    """Train by our trainer as `pretrain.finetune` sets it up; ``marks`` gets clock and tokens after each step."""

    def mark(record: Any) -> None:
        marks.append((settings.clock(), trainer.state.tokens))

    with tempfile.TemporaryDirectory(dir=out) as folder:
        trainer = Trainer(
            task, rows, hooks=[mark], quiet=True,
            optim=OptimConfig(lr=LR, schedule="linear", betas=BETAS, min_lr=0.0, warmup=0.0, weight_decay=0.0),
            train=TrainConfig(
                out=folder, limit=f"{steps} steps", batch_rows=batch, best=False, precision="auto",
                eval_every="0 steps", save_every="0 steps",
            ),
            parallel=ParallelConfig(device=settings.device.type, threads=1),
        )  # fmt: skip
        trainer.fit()


def cost_of(marks: list[tuple[float, int]]) -> float:
    """Cost of a token between the ends of the first step and of the last but one."""
    (first, skipped), (last, read) = marks[0], marks[-2]
    return (last - first) / (read - skipped)


def quieten() -> None:
    """Let transformers print nothing."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


class Tuning:
    """Contenders that fine-tune one checkpoint on one set of rows.

    Args:
        settings: of the run.
        batch: rows of a step.
        steps: of a measurement.
        lora: rank of an adapter; 0 for full fine-tuning.
    """

    def __init__(self, settings: Settings, batch: int, steps: int, lora: int = 0) -> None:
        self.settings, self.batch, self.steps, self.lora = settings, batch, steps, lora
        self.bf16 = choose_precision("auto", settings.device).name == "bf16"
        self.folder = tempfile.TemporaryDirectory()
        self.out = Path(self.folder.name)
        rows = texts(batch * steps)
        tokenizer = train_from_texts([row["text"] for row in rows], "wordpiece", vocab_size=400)
        layers, width, heads = SIZES["tiny" if settings.tiny else settings.device.type]
        torch.manual_seed(0)
        model = build(
            "bert", None, tokenizer=tokenizer, head="sequence-classification", labels=["a", "b"], num_layers=layers,
            hidden_size=width, num_heads=heads, max_positions=512, vocab_size=512 if settings.tiny else 8192,
            dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0,
        )  # fmt: skip
        self.base = model.save(self.out / "base")
        if lora:
            self.adapter = save_adapter(
                apply_lora(
                    pretrain.load(self.base, quiet=True), LoraConfig(r=lora, alpha=2 * lora)
                ),
                self.out / "adapter",
            )
        self.rows = self.task(0).encode(read_table(rows))
        self.theirs = [{key: value.tolist() for key, value in row.items()} for row in self.rows]
        for row in self.theirs:
            row["attention_mask"] = [1] * len(row["input_ids"])
        self.tokens = sum(len(row["input_ids"]) for row in self.theirs)

    def task(self, lora: int) -> Classification:
        """The task around the same weights."""
        task = Classification(pretrain.load(self.base, quiet=True), max_length=512)
        if lora:
            apply_lora(
                task.model, LoraConfig(r=lora, alpha=2 * lora)
            )  # drawn by the seed, as in self.adapter
        return task

    def ours(self, lora: int) -> Made:
        """Our trainer, as `pretrain.finetune` sets it up."""
        device = self.settings.device

        def train(check: bool) -> tuple[float, Work]:
            task, marks = self.task(lora), []
            params = [p for p in task.parameters() if p.requires_grad]
            before, losses = (
                [p.detach().clone() for p in params],
                [self.score(task)] if check else [],
            )

            run_ours(task, self.rows, self.batch, self.steps, self.settings, self.out, marks)
            task.to(device)
            losses += [self.score(task)] if check else []
            work = Work(marks[-1][1], losses, moved([p.cpu() for p in params], before))
            return cost_of(marks), work

        work = train(True)[1]
        return lambda: train(False)[0], work

    def score(self, task: Classification) -> float:
        """Our mean loss over the scored rows."""
        rows = list(self.rows)[:SCORED]
        task.eval()
        with torch.no_grad():
            batch = {
                k: v.to(task.model.device)
                for k, v in task.collate(rows, [None] * len(rows)).items()
            }
            loss = float(task(batch).total) / len(rows)
        task.train()
        return loss

    def peer(self, sampling: str, lora: int) -> Made:
        """The Trainer of transformers, with peft for an adapter."""
        import transformers

        quieten()
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.base)
        collator = transformers.DataCollatorWithPadding(tokenizer)
        parts = 4 if sampling == "batch_rebalance" and self.batch >= 8 else 1

        def train(check: bool) -> tuple[float, Work]:
            model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
                self.base, dtype=torch.float32
            )
            if lora:
                import peft

                model = peft.PeftModel.from_pretrained(model, self.adapter, is_trainable=True)
            params = [p for p in model.parameters() if p.requires_grad]
            before, read, marks = [p.detach().clone() for p in params], [0], []

            def score() -> float:
                model.eval()
                with torch.no_grad():
                    batch = collator(self.theirs[:SCORED]).to(model.device)
                    loss = float(model(**batch).loss)
                model.train()
                return loss

            losses = [score()] if check else []

            def count(module: Any, args: Any, kwargs: Any) -> None:
                read[0] += int(kwargs["attention_mask"].sum())

            class Marks(transformers.TrainerCallback):
                def on_step_end(this, *args: Any, **kwargs: Any) -> None:
                    marks.append((self.settings.clock(), read[0]))

            handle = model.register_forward_pre_hook(count, with_kwargs=True)
            with tempfile.TemporaryDirectory(dir=self.out) as folder:
                arguments = transformers.TrainingArguments(
                    folder, per_device_train_batch_size=self.batch // parts, gradient_accumulation_steps=parts,
                    max_steps=self.steps, learning_rate=LR, weight_decay=0.0, warmup_steps=0,
                    lr_scheduler_type="linear",
                    adam_beta1=BETAS[0], adam_beta2=BETAS[1], save_strategy="no", report_to="none",
                    use_cpu=self.settings.device.type == "cpu", bf16=self.bf16,
                    disable_tqdm=True, logging_strategy="no", train_sampling_strategy=sampling, seed=0,
                    dataloader_pin_memory=self.settings.device.type == "cuda",
                )  # fmt: skip
                with contextlib.redirect_stdout(io.StringIO()):
                    transformers.Trainer(
                        model,
                        arguments,
                        train_dataset=self.theirs,
                        callbacks=[Marks()],
                        data_collator=collator,
                    ).train()
            handle.remove()
            losses += [score()] if check else []
            work = Work(marks[-1][1], losses, moved([p.cpu() for p in params], before))
            return cost_of(marks), work

        work = train(True)[1]
        return lambda: train(False)[0], work


class Embeddings:
    """Contenders that train sentence embeddings on pairs, by a softmax over the positives of the batch.

    Args:
        settings: of the run.
        batch: pairs of a step.
        steps: of a measurement.
    """

    def __init__(self, settings: Settings, batch: int, steps: int) -> None:
        self.settings, self.batch, self.steps = settings, batch, steps
        self.folder = tempfile.TemporaryDirectory()
        self.out = Path(self.folder.name)
        rows = texts(2 * batch * steps)
        words = [row["text"] for row in rows]
        pairs = zip(words[: len(words) // 2], words[len(words) // 2 :], strict=True)
        self.pairs = [{"anchor": a, "positive": b} for a, b in pairs]
        tokenizer = train_from_texts(words, "wordpiece", vocab_size=400)
        layers, width, heads = SIZES["tiny" if settings.tiny else settings.device.type]
        torch.manual_seed(0)
        model = build(
            "bert", None, tokenizer=tokenizer, num_layers=layers, hidden_size=width, num_heads=heads, max_positions=512,
            vocab_size=512 if settings.tiny else 8192, dropout=0.0, attention_dropout=0.0,
        )  # fmt: skip
        self.base = Embedding(model).model.save(self.out / "base")

    def ours(self) -> Made:
        """Our trainer with the task `embedding`."""

        def train(check: bool) -> tuple[float, Work]:
            task, marks = Embedding(pretrain.load(self.base, quiet=True)), []
            rows = task.encode(read_table(self.pairs))
            tokens = sum(
                len(e) for row in rows for key, e in row.items() if key.endswith("input_ids")
            )
            losses = []
            if check:
                with torch.no_grad():
                    loss = task(task.collate(list(rows)[: self.batch], [None] * self.batch))
                losses = [float(loss.total / loss.count)]
            run_ours(task, rows, self.batch, self.steps, self.settings, self.out, marks)
            return cost_of(marks), Work(tokens, losses)

        work = train(True)[1]
        return lambda: train(False)[0], work

    def peer(self, sampling: str) -> Made:
        """The trainer of sentence-transformers."""
        import datasets
        import sentence_transformers as library
        import transformers
        from sentence_transformers import losses as losses_of

        quieten()
        bf16 = choose_precision("auto", self.settings.device).name == "bf16"

        def train(check: bool) -> tuple[float, Work]:
            model = library.SentenceTransformer(str(self.base), device=self.settings.device.type)
            loss = losses_of.MultipleNegativesRankingLoss(model, scale=20.0)
            first = self.pairs[: self.batch]
            losses = []
            if check:
                with torch.no_grad():
                    parts = [
                        model.preprocess([row[key] for row in first])
                        for key in ("anchor", "positive")
                    ]
                    moved_parts = [
                        transformers.BatchEncoding(part).to(model.device).data for part in parts
                    ]
                    losses = [float(loss(moved_parts, None))]
            read, marks = [0], []

            def count(module: Any, args: Any) -> None:
                read[0] += sum(int(part["attention_mask"].sum()) for part in args[0])

            class Marks(transformers.TrainerCallback):
                def on_step_end(this, *args: Any, **kwargs: Any) -> None:
                    marks.append((self.settings.clock(), read[0]))

            loss.register_forward_pre_hook(count)
            with tempfile.TemporaryDirectory(dir=self.out) as folder:
                arguments = library.SentenceTransformerTrainingArguments(
                    folder, per_device_train_batch_size=self.batch, max_steps=self.steps, learning_rate=LR,
                    weight_decay=0.0, warmup_steps=0, lr_scheduler_type="linear", adam_beta1=BETAS[0],
                    adam_beta2=BETAS[1], save_strategy="no", report_to="none", disable_tqdm=True,
                    use_cpu=self.settings.device.type == "cpu", bf16=bf16,
                    logging_strategy="no", seed=0, dataloader_pin_memory=self.settings.device.type == "cuda",
                    train_sampling_strategy=sampling,
                )  # fmt: skip
                with contextlib.redirect_stdout(io.StringIO()):
                    library.SentenceTransformerTrainer(
                        model,
                        arguments,
                        datasets.Dataset.from_list(self.pairs),
                        loss=loss,
                        callbacks=[Marks()],
                    ).train()
            return cost_of(marks), Work(read[0], losses)

        work = train(True)[1]
        return lambda: train(False)[0], work


def sizes(settings: Settings) -> list[tuple[int, int]]:
    """(rows of a step, steps); ``group_by_length`` sorts a quarter of the steps at a time, at most 50 of them."""
    if settings.tiny:
        return [(8, 3)]
    return [(8, 49), (32, 25)] if settings.device.type == "cpu" else [(8, 60), (32, 60)]


def finetune(settings: Settings) -> list[Callable[[], Case]]:
    """Row 4: all weights."""

    precision = choose_precision("auto", settings.device).name

    def case(batch: int, steps: int) -> Case:
        t = Tuning(settings, batch, steps)
        part = functools.partial
        return Case(
            f"BERT {shape_name(settings)}, rows of 4 to 200 words, {batch} a step, {precision}",
            f"{settings.unit} a token",
            [
                Contender("pretrain", "ours", part(t.ours, 0)),
                Contender("Trainer", "default", part(t.peer, "random", 0), "transformers"),
                Contender("Trainer, group_by_length", "best", part(t.peer, "group_by_length", 0), "transformers"),
                Contender("Trainer, batch_rebalance", "best", part(t.peer, "batch_rebalance", 0), "transformers"),
            ],
            {"default": 2.0, "best": 1.3}, WITHIN, rounds=(2, 5),
        )  # fmt: skip

    def embedding(batch: int, steps: int) -> Case:
        e = Embeddings(settings, batch, steps)
        part = functools.partial
        return Case(
            f"sentence embeddings, BERT {shape_name(settings)}, {batch} pairs a step, {precision}",
            f"{settings.unit} a token",
            [
                Contender("pretrain", "ours", e.ours),
                Contender("sentence-transformers", "default", part(e.peer, "random"), "sentence_transformers"),
            ],
            {"default": 2.0}, Tolerance(FP32.first, 0.25, 0.4), rounds=(2, 5),
        )  # fmt: skip

    cases = [functools.partial(case, *size) for size in sizes(settings)]
    return [*cases, functools.partial(embedding, 8, 3 if settings.tiny else 9)]


def shape_name(settings: Settings) -> str:
    layers, width, _ = SIZES["tiny" if settings.tiny else settings.device.type]
    return f"L{layers} d{width}"


def lora(settings: Settings) -> list[Callable[[], Case]]:
    """Row 5: adapters of rank 16 on all linear layers, and our own full fine-tuning beside them."""

    def case(batch: int, steps: int) -> Case:
        t = Tuning(settings, batch, steps, lora=16)
        part = functools.partial

        def full() -> Made:
            cost, work = t.ours(0)
            return cost, replace(work, losses=work.losses[:1], update=None)

        return Case(
            f"BERT {shape_name(settings)}, LoRA 16, rows of 4 to 200 words, {batch} a step", f"{settings.unit} a token",
            [
                Contender("pretrain, LoRA", "ours", part(t.ours, 16)),
                Contender("pretrain, full fine-tuning", "variant", full, loose=True),
                Contender("peft + Trainer", "default", part(t.peer, "random", 16), "peft"),
                Contender("peft + Trainer, group_by_length", "best", part(t.peer, "group_by_length", 16), "peft"),
                Contender("peft + Trainer, batch_rebalance", "best", part(t.peer, "batch_rebalance", 16), "peft"),
            ],
            {"default": 1.2, "best": 1.2, "variant": 1.0}, WITHIN, rounds=(2, 5),
        )  # fmt: skip

    return [functools.partial(case, *sizes(settings)[-1])]
