"""The training loop. There is one, it knows no model family and no objective, and a step can be read top down.

The loss of a step is a sum over its targets divided once by their number in the whole global batch, known before
the first backward pass. Order, masking and dropout are functions of (seed, position) and (seed, step), so a
resumed run needs no random state. A step whose numbers are not finite changes nothing.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from pretrain.checkpoint import RunLock, TrainingState, latest, save_checkpoint
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig, parse_every
from pretrain.data.loader import Examples, Loader
from pretrain.errors import TrainingError
from pretrain.objectives.base import Batch, Objective
from pretrain.training.ema import WeightAverage
from pretrain.training.evaluate import evaluate_rows, probe_loss
from pretrain.training.feed import Feed, check_targets, hash_seed, real_tokens, to_device
from pretrain.training.journal import Journal
from pretrain.training.layers import Layers
from pretrain.training.monitor import improves
from pretrain.training.optim import build_optimizers
from pretrain.training.plan import Plan, choose_micro_rows, mean_length
from pretrain.training.precision import LossScale, choose_device, choose_precision, peak_flops
from pretrain.training.preflight import check_rows, preflight
from pretrain.training.restore import identity, other_tensors, restore
from pretrain.training.schedule import lr_factor
from pretrain.training.state import Run, RunState, StopRequest, catch_signals, heap_at_rest

__all__ = ["Hook", "Trainer"]

_MAX_SKIPPED_IN_ROW = 3
_PEAK_SECONDS = 60.0  # between two measurements of what the device can do, which take 0.1 s


@dataclass(frozen=True)
class Hook:
    """A plain function called after every ``every``-th step with a read-only record of that step."""

    fn: Callable[[Mapping[str, Any]], None]
    every: int = 1


class Trainer:
    """Train an objective on rows.

    Args:
        objective: the model and its loss.
        train_data: rows, a sequence of mappings of arrays, in any order; the trainer shuffles.
        optim, train, parallel: sections of the configuration; defaults where None.
        eval_data: held-out rows, or None for no evaluation.
        hooks: ``Hook`` objects or plain functions of one record.
        about: what ``config.json`` shall say about the data (fingerprint, sources); any plain values.
        quiet: print nothing and show no progress bar; ``log.jsonl`` is written all the same.

    Raises:
        TrainingError: at ``fit``: the data do not fit the model, nothing can be learned from them, or numbers
            stay non-finite.
        CheckpointError: at ``fit``: the output directory cannot be written or is in use.
    """

    def __init__(
        self,
        objective: Objective,
        train_data: Examples,
        *,
        optim: OptimConfig | None = None,
        train: TrainConfig | None = None,
        parallel: ParallelConfig | None = None,
        eval_data: Examples | None = None,
        hooks: Sequence[Hook | Callable[[Mapping[str, Any]], None]] = (),
        about: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.objective, self.train_data = objective, train_data
        self.optim, self.train = optim or OptimConfig(), train or TrainConfig()
        self.parallel = parallel or ParallelConfig()
        self.eval_data = eval_data if eval_data is not None and len(eval_data) else None
        self.hooks = [hook if isinstance(hook, Hook) else Hook(hook) for hook in hooks]
        self.about = dict(about or {})
        self.out, self.quiet = Path(self.train.out), quiet
        self.state = RunState()
        self.metrics: dict[str, float] = {}
        self.checkpoint: Path | None = None

    def fit(self, begin: Callable[[], None] | None = None) -> Run:
        """Train until the limit, from the newest checkpoint in the output directory if there is one.

        Args:
            begin: called once the directory is locked for this run, before anything is read from it.
        """
        began = time.monotonic()
        with RunLock(self.out), catch_signals() as stop:
            if begin is not None:
                begin()
            self.journal = Journal(self.out, self.train.loggers, self.about, self.quiet)
            with contextlib.closing(self.journal):
                resumed = self._set_up()
                self._began = began - self.state.seconds
                self.journal.open_log(self.state.step if resumed else None)
                evals = [r["eval"] for r in self.journal.records if "eval" in r]
                # The log holds what is not finite as a string.
                self.metrics = {key: float(value) for key, value in (evals or [{}])[-1].items()}
                return self._loop(stop)

    def _set_up(self) -> bool:
        """Device, precision, optimizers, state and the checks before step 0; True when resuming."""
        check_rows(self.train_data, self.train.batch_rows)
        if self.parallel.threads:
            torch.set_num_threads(self.parallel.threads)
        self.device = choose_device(self.parallel.device)
        self.precision = choose_precision(self.train.precision, self.device)
        self.scaler = LossScale(self.precision.name == "fp16")
        self.objective.to(self.device)
        model = self.objective.model
        model.backbone.activation_checkpointing = self.parallel.activation_checkpointing
        if self.parallel.compile:
            for block in model.backbone.blocks():
                block.compile()
        if any(p.dtype is not torch.float32 for p in self.objective.parameters()):
            self.say("the weights are converted to fp32: half-precision weights lose small updates")
            self.objective.float()
        self.params = [p for p in self.objective.parameters() if p.requires_grad]
        self.layers = Layers(self.objective, self.optim)
        self.optimizers = build_optimizers(
            self.objective,
            self.optim,
            model.backbone.blocks(),
            self.device,
            scales=self.layers.scales,
            fresh=self.layers.fresh,
        )
        self.average = WeightAverage(model, self.optim.ema)
        self.micro_rows = choose_micro_rows(
            self.train, self.train_data, self.objective, self.device
        )
        loader = Loader(self.train_data, seed=self.train.seed)
        self.feed = Feed(
            self.objective, loader, batch_rows=self.train.batch_rows, micro_rows=self.micro_rows
        )
        self.plan = Plan(self.train, self.train_data, loader.epoch_length)
        self.journal.epoch_rows = self.plan.epoch_rows
        self._row_length = round(mean_length(self.train_data))
        checkpoint = latest(self.out)
        if checkpoint is not None:
            restore(self, checkpoint)
        seconds = preflight(self, checkpoint)
        self.state.total_steps = self.plan.first_total(self.state, seconds)
        self.state.limit = self.train.limit
        self._peak = 0.0
        self._measure_peak()
        return checkpoint is not None

    def _measure_peak(self) -> None:
        """On a busy machine the first measurement is too low; the best one seen is what the device can do."""
        self._peak = max(self._peak, peak_flops(self.precision))
        self._peak_measured = time.monotonic()

    def _loop(self, stop: StopRequest) -> Run:
        state, stopped = self.state, "limit"
        steps = self.feed.steps(state.rows)
        self.objective.train()
        with heap_at_rest():
            try:
                while state.step < state.total_steps:
                    if stop.name is not None or self._out_of_patience():
                        stopped = stop.name or "patience"
                        break
                    began = time.perf_counter()
                    self._after_step(self._step(next(steps), began))
            finally:
                steps.close()
                self.layers.release(0)  # the caller gets the model as it was given
        return self._finish(stop.name or stopped)

    def _step(self, batches: list[Batch], began: float) -> dict[str, Any]:
        """One optimizer step over the micro-batches of a global batch; ``began`` includes the wait for them."""
        state = self.state
        count = sum(float(self.objective.count(batch)) for batch in batches)
        check_targets(count, state.step, state.rows, self.train.batch_rows)
        if self.optim.unfreeze:
            self._release()
        factor = lr_factor(
            state.step,
            state.total_steps,
            schedule=self.optim.schedule,
            warmup=self.optim.warmup,
            decay=self.optim.decay,
            min_lr=self.optim.min_lr,
        )
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for index, batch in enumerate(batches):
            torch.manual_seed(hash_seed(self.train.seed, state.step, index))
            with self.precision.autocast():
                loss = self.objective(to_device(batch, self.device))
            (loss.total * (self.scaler.scale / count)).backward()
            total += loss.total.detach()
        grads = [p.grad for p in self.params if p.grad is not None]
        self.scaler.unscale(grads)
        norm = torch.nn.utils.get_total_norm(grads)
        # The one wait for the device in a step.
        nll, grad_norm = torch.stack([total, norm]).tolist()
        finite = math.isfinite(nll) and math.isfinite(grad_norm)
        if finite:
            if self.optim.clip:
                torch.nn.utils.clip_grads_with_norm_(self.params, self.optim.clip, norm)
            self.optimizers.set_factor(factor)
            self.optimizers.step()
            self.average.update(state.step)
        self.optimizers.zero_grad()
        self._count_skips(finite, nll, grad_norm)
        if math.isfinite(nll):  # the loss itself is never scaled, and says nothing about the scale
            self.scaler.update(finite)
        tokens = sum(real_tokens(batch) for batch in batches)
        state.step += 1
        state.rows += self.train.batch_rows
        state.tokens += tokens
        if finite:
            state.window_total += nll
            state.window_count += count
        state.window_tokens += tokens
        state.window_seconds += time.perf_counter() - began
        return {
            "step": state.step,
            "loss": nll / count,
            "lr": self.optim.lr * factor,
            "grad_norm": grad_norm,
            "targets": count,
            "skipped": not finite,
        }

    def _release(self) -> None:
        """Let the layers learn whose turn it is; none goes back, also if the run becomes longer meanwhile."""
        state, lowest = self.state, self.layers.lowest(self.state.step, self.state.total_steps)
        state.lowest = lowest if state.lowest is None else min(lowest, state.lowest)
        self.layers.release(state.lowest)

    def _count_skips(self, finite: bool, nll: float, grad_norm: float) -> None:
        """Skip, name the rows, and give up after a few in a row; moments and weights stay as they were."""
        state, step = self.state, self.state.step + 1
        if finite:
            state.skipped_in_row = 0
            return
        # The loss itself is never scaled, so only a gradient can be the scale's doing.
        if math.isfinite(nll) and self.scaler.explains():
            self.say(f"step {step}: fp16 overflow at scale {self.scaler.scale:g}, skipped")
            return
        state.skipped += 1
        state.skipped_in_row += 1
        rows = self.feed.indices(state.rows)
        named = f"training rows {', '.join(map(str, rows[:16]))}{', ...' * (len(rows) > 16)}"
        self.say(f"step {step}: loss {nll}, gradient norm {grad_norm}: skipped; {named}")
        self.journal.write({"event": "skipped", "step": step, "rows": rows, "loss": nll})
        if state.skipped_in_row >= _MAX_SKIPPED_IN_ROW:
            raise TrainingError(
                f"{state.skipped_in_row} steps in a row gave a non-finite loss or gradient, the last at step {step} "
                f"({named}). Weights and moments are those of the last good step. Likely causes: a learning rate too "
                "high, broken rows, or fp16 range; lower optim.lr or set train.precision=fp32."
            )

    def _after_step(self, record: dict[str, Any]) -> None:
        """Log, evaluate, save and call hooks, each at its own interval."""
        state = self.state
        state.seconds = time.monotonic() - self._began
        state.total_steps = self.plan.replan(state)
        last = state.step >= state.total_steps
        if last or state.step <= 10 or state.step % self.train.log_every == 0:
            flops = self.objective.flops(
                state.window_tokens, int(state.window_count), self._row_length
            )
            self.journal.steps(record, state, flops, self._peak)
        improved = False
        if self.eval_data is not None and (
            last or self._due(self.train.eval_every, state.last_eval, "eval")
        ):
            improved = self.evaluate(last=last)
        if last or improved or self._due(self.train.save_every, state.last_save, "save"):
            self.save()
        read_only = MappingProxyType(record)
        for hook in self.hooks:
            if state.step % hook.every == 0:
                hook.fn(read_only)

    def _due(self, every: str, last: int, name: str) -> bool:
        epoch = self.plan.epoch_rows / self.train.batch_rows
        interval = parse_every(every, self.state.total_steps, f"train.{name}_every", epoch)
        return interval > 0 and self.state.step - last >= interval

    def evaluate(self, *, last: bool = False) -> bool:
        """Evaluate on the held-out rows and log it; True when it is the best so far.

        With ``train.eval_rows`` the best is chosen on that sample, and the last evaluation is also made on all
        rows.
        """
        assert self.eval_data is not None
        state, limit = self.state, self.train.eval_rows
        figures = self._figures(limit)
        state.last_eval = state.step
        improved = improves(state, figures, self.train.monitor)
        note = " (best)" if improved else ""
        if last and 0 < limit < len(self.eval_data):
            figures, note = self._figures(0), " on all rows"
        with self.average.applied():
            samples = self.objective.preview(
                [self.eval_data[0]], self.train.sample, self.train.seed
            )
        self.metrics = figures
        if time.monotonic() - self._peak_measured > _PEAK_SECONDS:
            self._measure_peak()
        self.journal.evaluation(state, figures, samples, note)
        return improved and self.train.best

    def _figures(self, limit: int) -> dict[str, float]:
        assert self.eval_data is not None
        began = time.monotonic()
        with self.average.applied():
            figures = evaluate_rows(
                self.objective,
                self.eval_data,
                self.precision,
                batch_rows=self.micro_rows,
                limit=limit,
            )
        share = min(1.0, limit / len(self.eval_data)) if limit else 1.0
        self.plan.reserve = 1.0 + 1.2 * (time.monotonic() - began) / share
        return figures

    def _out_of_patience(self) -> bool:
        return 0 < self.train.patience <= self.state.evals_since_best

    def probe(self) -> float | None:
        """Loss on a few fixed rows, by which a resumed run recognises its own weights; None if they have none."""
        rows = self.eval_data if self.eval_data is not None else self.train_data
        return probe_loss(self.objective, rows, self.precision)

    def save(self) -> Path:
        """Write a checkpoint of this step; what was there stays until the new one is durable."""
        state = self.state
        state.last_save = state.step
        state.scale = self.scaler.state()
        state.seconds = time.monotonic() - self._began
        self.journal.sync()
        with self.average.applied():
            state.probe_loss = self.probe()
            tensors = {"optimizer": self.optimizers.state()}
            if self.average.decay:
                tensors["weights"] = self.average.other()
            others = other_tensors(self.objective)
            if others:
                tensors["objective"] = others
            about = {"objective": self.objective.describe(), "metrics": self.metrics}
            self.checkpoint = save_checkpoint(
                self.out,
                self.objective.model,
                step=state.step,
                tokens=state.tokens,
                pretrain_block=self.about | about,
                training=TrainingState(
                    tensors=tensors, state={"run": state.to_json(), "identity": identity(self)}
                ),
                keep=self.train.keep,
                protect={state.best_step} if self.train.best and state.best_step else set(),
            )
        gc.collect()  # cheap behind a freeze, and nothing else collects while training
        return self.checkpoint

    def _finish(self, stopped: str) -> Run:
        """Save what is not saved yet and say where everything lies."""
        state = self.state
        if state.last_save != state.step or self.checkpoint is None:
            self.save()
        best = self.out / f"checkpoint-{state.best_step}" if state.best_step else self.checkpoint
        run = Run(
            path=self.out,
            step=state.step,
            stopped=stopped,
            metrics=self.metrics,
            history=list(self.journal.records),
            checkpoint=self.checkpoint,
            best=best if best is not None and best.exists() else None,
        )
        self.say(
            f"{'stopped by ' + stopped if stopped != 'limit' else 'done'} at step {state.step:,}: {self.checkpoint}"
        )
        return run

    def say(self, line: str) -> None:
        """Print a line where the user looks."""
        self.journal.say(line)
