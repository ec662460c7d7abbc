"""A run: its set-up, its training loop and its checkpoints, independent of model families and objectives.

Order, masking and dropout are functions of (seed, position) and (seed, step), so a resumed run needs no random state.
What a step computes is in `pretrain.training.step`.

Which method of `Trainer` sets an attribute, and when (a test holds the code against this table). Other modules read a
trainer and set nothing on it; `take_step`, `run_validation` and `Plan.replan` change fields of its ``state``.

| attribute | set by | when |
|---|---|---|
| objective, train_data, eval_data, optim, train, parallel, lr_reason | __init__ | once |
| out, world, origin | __init__ | once |
| hooks, quiet | __init__ | once; a caller may set them before ``fit`` |
| device, journal, _stop | fit | once, before the set-up |
| setup | _set_up | once, a frozen `TrainSetup` of all parts |
| planned | _set_up | once |
| _began, _evaluation_time | _loop | once, after the set-up |
| changed, _run_directory | __init__, fit | empty, then once |
| state | __init__, _set_up | new, then replaced by that of the resumed checkpoint |
| metrics | __init__, fit, _evaluate | empty, then those of the log, then those of each evaluation |
| peak | __init__, _set_up, _evaluate | 0, then measured, also with each evaluation |
| about | __init__, _evaluate | given, then with the n-gram baseline of the last evaluation |
| _checkpoint | __init__, _set_up, _save | None, then the resumed one, then the last one saved |
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from pretrain import training
from pretrain.checkpoint import Saver
from pretrain.checkpoint.result import write_result
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig, parse_every
from pretrain.data.loader import Examples
from pretrain.data.row_source import hash_rows
from pretrain.distributed.world import World, current_world
from pretrain.errors import ConfigError, PretrainError, TrainingError, out_of_memory
from pretrain.nn.buffers import changing_buffers
from pretrain.objectives.base import Batch, Objective
from pretrain.training.baseline import ngram_baseline
from pretrain.training.evaluate import probe_loss
from pretrain.training.logging import Journal
from pretrain.training.optim import resolve_lr
from pretrain.training.parallelize import enter_world, run_lock
from pretrain.training.peak import peak_flops
from pretrain.training.plan import resolve_amounts
from pretrain.training.preflight import frozen_beside, numel, preflight
from pretrain.training.restore import origin, restore, training_state
from pretrain.training.run_directory import NewRunDirectory, RunDirectory
from pretrain.training.schedule import lr_factor
from pretrain.training.setup import TrainSetup, build_setup
from pretrain.training.state import (
    Changed,
    Run,
    RunState,
    StopRequest,
    catch_signals,
    freed_memory_kept,
    garbage_collection_paused,
    isolated_torch_state,
    last_metrics,
)
from pretrain.training.step import take_step
from pretrain.training.validation import EvaluationTime, run_validation
from pretrain.utils.memory_info import hardware, peak_memory
from pretrain.utils.run_log import read_log

__all__ = ["Hook", "Trainer"]

# Rows per micro-batch from which batch statistics are estimated, as in published code of detectors.
_ROWS_OF_STATISTICS = 16
# Work of a row in a step, in forward passes: a backward pass is about two.
_STEP_WORK = 3
# A change of the learning rate from one step to the next, as a share of it, that is said.
_JUMP = 0.05


@dataclass(frozen=True)
class Hook:
    """A function called on rank zero after every ``every``-th step with a read-only record of that step."""

    fn: Callable[[Mapping[str, Any]], None]
    every: int = 1

    def __post_init__(self) -> None:
        """Raise ConfigError if ``fn`` cannot be called or ``every`` is no number of steps."""
        if not callable(self.fn):
            raise ConfigError(
                f"hooks are functions of one record, in a list; found {self.fn!r}, which cannot be called."
            )
        if type(self.every) is not int or self.every < 1:
            raise ConfigError(f"a hook is called every 1 step or more, found {self.every!r}.")


class Trainer:
    """Train an objective on rows.

    Args:
        objective: the model and its loss.
        train_data: rows, a sequence of mappings of arrays, in any order; the trainer shuffles.
        optim, train, parallel: sections of the configuration; defaults where None.
        eval_data: held-out rows, or None for no evaluation.
        hooks: ``Hook`` objects or plain functions of one record.
        about: description of the data for ``config.json`` (fingerprint, sources); any plain values. Without a
            ``fingerprint`` up to 64 training rows are hashed, by which a resumed run notices other rows.
        base: hash of the weights that the run starts from, which a resumed run compares; None does not.
        quiet: print nothing and show no progress bar; ``log.jsonl`` is still written.
        world: the ranks of the run; None uses those that a launcher started.

    Raises:
        TrainingError: in ``fit``: the data do not fit the model, have no targets, or the loss or gradient stays
            non-finite.
        CheckpointError: in ``fit``: the output directory cannot be written or is in use.
    """

    # Which method sets what, and when: see the table of this module.
    objective: Final[Objective]
    train_data: Final[Examples]
    eval_data: Final[Examples | None]
    optim: Final[OptimConfig]
    train: Final[TrainConfig]
    parallel: Final[ParallelConfig]
    lr_reason: Final[str]  # how the rate was derived, for the first lines; "" if it was set
    out: Final[Path]
    world: Final[World]
    origin: Final[dict[str, Any]]
    hooks: list[Hook]
    quiet: bool

    device: torch.device
    journal: Journal
    setup: TrainSetup
    planned: int  # total steps before this start, of a run that is resumed
    _stop: StopRequest
    _began: float
    _evaluation_time: EvaluationTime

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
        base: str | None = None,
        quiet: bool = False,
        world: World | None = None,
    ) -> None:
        self.objective, self.train_data = objective, train_data
        self.train = resolve_amounts(train or TrainConfig(), train_data)
        self.parallel = parallel or ParallelConfig()
        self.eval_data = eval_data if eval_data is not None and len(eval_data) else None
        listed = [hooks] if callable(hooks) or isinstance(hooks, Hook) else hooks
        self.hooks = [hook if isinstance(hook, Hook) else Hook(hook) for hook in listed]
        self.about = dict(about or {})
        if not self.train.out:
            raise ConfigError("train.out is empty; name the directory of the run.")
        self.out = Path(os.path.expanduser(self.train.out))
        self.quiet, self.world = quiet, world or current_world()
        self.optim, self.lr_reason = resolve_lr(optim or OptimConfig(), objective, self.out)
        self.state = RunState(recut=self.train.recut)
        self.metrics: dict[str, float] = {}
        self._checkpoint: Path | None = None
        self.changed: Changed = {}  # settings of a resumed run -> old and new value
        self._run_directory: RunDirectory | None = None  # on rank zero only, which writes the log
        objective.train(
            objective.training
        )  # puts the frozen modules of the objective into evaluation mode
        objective.train_rows = train_data
        self.origin = origin(objective, base)
        if objective.unit_name != "tokens":
            self.about["unit"] = objective.unit_name
        if objective.frozen:
            self.about["frozen"] = {
                name: {
                    "path": getattr(objective.get_submodule(name), "source", None),
                    "sha256": self.origin[name],
                }
                for name in objective.frozen
            }
        self.peak = 0.0

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """Hash that tells the training rows from others: as ``about`` states it, else of up to 64 of them.

        None for rows that are drawn anew each time, by augmentation for example.
        """
        stated = self.about.get("fingerprint")
        if stated is not None:
            return str(stated)
        digest, digest_again = (hash_rows(self.train_data).hexdigest() for _ in range(2))
        return digest if digest == digest_again else None

    def fit(
        self,
        begin: Callable[[], Changed | None] | None = None,
        end: Callable[[Run], None] | None = None,
        resume: Callable[[], None] | None = None,
        *,
        locked: bool = False,
    ) -> Run:
        """Train until the limit, resuming from the newest checkpoint in the output directory if there is one.

        Gradients are computed inside ``torch.no_grad()`` too, and torch's global random state is that of before at the
        end.

        Args:
            begin: called on rank zero when the directory is locked for this run, before anything is read from it;
                returns the settings of a resumed run that have changed, with their old and new values.
            end: called on all ranks when everything is saved, while the watchdog still runs.
            resume: called on rank zero when a checkpoint has been read and found to be one of this run.
            locked: the caller holds the lock of the run directory already.

        Raises:
            Interrupted: SIGINT, SIGTERM or SIGHUP during the start-up of a single process, which has nothing to save.
                Later such a signal ends the run as its limit does, with a checkpoint.
        """
        world = self.world
        new_directory = NewRunDirectory(self.out, world.is_rank_zero)
        with contextlib.ExitStack() as stack:
            stack.enter_context(new_directory.removed_on_failure())
            self.device = stack.enter_context(enter_world(self))
            stack.enter_context(isolated_torch_state(self.device))
            self._stop = stack.enter_context(catch_signals())
            if not locked:
                stack.enter_context(run_lock(self.out, world))
            stack.enter_context(new_directory.emptied_on_failure())
            if begin is not None:
                self.changed = world.broadcast_object(world.on_rank_zero(begin)) or {}
            self.journal = Journal(
                self.out,
                self.train.loggers,
                self.about,
                self.quiet,
                is_rank_zero=world.is_rank_zero,
                unit=self.objective.unit_name,
                loss_unit=self.objective.loss_unit,
            )
            if self.train.precision == "fp8":
                stack.callback(training.end_float8, self.objective)
            with contextlib.closing(self.journal), self._memory():
                with self._stopped_at_once():
                    resumed = self._set_up()
                self.journal.open_log(self.state.step if resumed else None, self.state.log)
                if resumed and resume is not None:
                    world.on_rank_zero(resume)
                if world.is_rank_zero:
                    self._run_directory = stack.enter_context(
                        contextlib.closing(RunDirectory(self.out))
                    )
                self.metrics = last_metrics(self._history())
                run = self._loop()
                if end is not None:
                    end(run)
                return run

    def _set_up(self) -> bool:
        """Build the set-up, restore the newest checkpoint into it, and run all checks.

        Returns:
            True if a checkpoint is resumed.
        """
        setup = self.setup = build_setup(self)
        checkpoint, plan, feed = setup.checkpoint, setup.plan, setup.feed
        self.journal.epoch_rows = plan.epoch_rows
        if checkpoint is not None:
            with self.journal.starting(f"reading {checkpoint.name}"):
                self.state, self._checkpoint = restore(self, checkpoint), checkpoint
            plan.keep(self.state)
        if plan.limit.kind != "minutes":
            feed.total_rows = plan.total_steps() * self.train.batch_rows
        feed.loader.recut = self.state.recut
        self._keep_micro_rows()
        self._fix_statistics(new=checkpoint is None)
        seconds = preflight(self, checkpoint)
        self.planned = self.state.total_steps  # before, of a run that is resumed
        total = plan.first_total(self.state, seconds)
        self.state.total_steps = self.world.broadcast_object(total)
        if checkpoint is not None:
            self._say_schedule()
        if self.optim.unfreeze:
            setup.layers.unfreeze(self.state)  # DDP must not wait for gradients of frozen layers
        setup.strategy.wrap()
        self.state.limit, self.peak = self.train.limit, peak_flops(setup.precision)
        self.state.facts |= {
            "parameters": numel(self) - numel(self, frozen_beside(self)),
            "trained": numel(self, setup.params),
            "hardware": hardware(self.device, self.world.size),
            "precision": setup.precision.name,
        }
        return checkpoint is not None

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch: chosen, then resumed, measured, or halved when memory ran out."""
        return self.setup.feed.micro_rows

    def _keep_micro_rows(self) -> None:
        """Keep the micro-batches of the steps before, if they were measured or memory ran out with larger ones."""
        rows, alone = self.state.micro_rows, self.world.size == 1
        automatic = not self.train.micro_rows
        # A larger size than that of the rule may not fit here; only a single process can reduce it again.
        usable = (alone and automatic) if rows > self.micro_rows else (alone or automatic)
        if rows and usable and self.setup.feed.share_rows % rows == 0:
            self.split(rows)

    def _fix_statistics(self, *, new: bool) -> None:
        """Keep the running statistics of a trained model if micro-batches are too small to estimate them."""
        if new:
            counts = {
                name: buffer
                for name, buffer in changing_buffers(self.objective).items()
                if name.endswith("num_batches_tracked")
            }
            trained = any(int(buffer) > 0 for buffer in counts.values())
            self.state.fixed_statistics = trained and self.micro_rows < _ROWS_OF_STATISTICS
            if self.state.fixed_statistics:
                self.say(
                    f"the running statistics of the model are kept: {self.micro_rows} rows at a time would estimate "
                    f"them poorly (from {_ROWS_OF_STATISTICS} on they are trained: train.micro_rows, train.batch_rows)"
                )
        self.objective.fixed_statistics = self.state.fixed_statistics

    def _stopped_at_once(self) -> contextlib.AbstractContextManager[None]:
        """Let a signal end the start-up at once; several processes go on to the first step, and stop together."""
        if self.world.size > 1:
            return contextlib.nullcontext()
        return self._stop.at_once(
            "No step was made since the start, so there is nothing of the run to save. The same command starts again."
        )

    @contextlib.contextmanager
    def _memory(self) -> Iterator[None]:
        """Turn out-of-memory errors into a TrainingError that says how to use less memory."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            rows = f" with {self.micro_rows} rows at a time" if hasattr(self, "setup") else ""
            raise TrainingError(
                f"There is not enough memory on {self.device} for step {self.state.step + 1:,}{rows}. "
                f"{self.less_memory()} shorter rows or a smaller model, or set "
                "parallel.activation_checkpointing=full. Checkpoints are untouched: the same command goes on from the "
                "newest."
            ) from error

    def _loop(self) -> Run:
        state, stop, stopped = self.state, self._stop, "limit"
        self._began = time.monotonic() - state.seconds  # the start-up does not count as training
        self._evaluation_time = EvaluationTime()
        steps = self.setup.feed.steps(state.rows)
        self.objective.train()
        with garbage_collection_paused(), freed_memory_kept(), self.setup.saver:
            try:
                # A resumed run may have been shortened to a step that it has passed.
                pending = state.eval_pending or state.last_eval < state.step >= state.total_steps
                if pending and self.eval_data is not None:
                    self._evaluate(last=state.step >= state.total_steps)
                    state.last_save = -1  # the next checkpoint must record this evaluation
                while state.step < state.total_steps:
                    began = time.perf_counter()
                    shared = self._fetch(steps)
                    if stop.agreed is not None or self._out_of_patience():
                        stopped = stop.agreed or "patience"
                        break
                    record = take_step(self, *shared, factor=self.lr_factor(), began=began)
                    self._after_step(record)
            finally:
                steps.close()
                self.setup.layers.unfreeze_from(0)  # undo gradual unfreezing for the caller
                self.setup.strategy.release()
            return self._finish(stopped)

    def _fetch(self, steps: Iterator[list[Batch]]) -> tuple[list[Batch], float, int]:
        """Return this rank's micro-batches of the next step, and the targets and units of the global batch.

        The same all-reduce tells all ranks about failures, a lost run directory and stop requests.
        """
        self.world.mark("data", self.state.step)
        failure, batches, counts = None, [], [0.0, 0.0]
        try:
            batches = next(steps)
            if self.world.tp_rank == 0:
                counts[0] = sum(float(self.objective.count(batch)) for batch in batches)
                counts[1] = float(sum(self.objective.units(batch) for batch in batches))
        except PretrainError as error:
            failure = error
        failing = self.setup.saver.failed
        lost = self._run_directory is not None and self._run_directory.lost(now=failing)
        flags = [
            float(failure is not None),
            float(failing),
            float(lost),
            float(self.setup.saver.written),
        ]
        count, tokens, failed, save_failed, directory_lost, written, *asked = (
            self.world.all_reduce_sum([*counts, *flags, *self._stop.flags()])
        )
        if failed:
            self.world.raise_on_all_ranks(failure)
        if directory_lost:
            self._save_to_fallback()
        if save_failed or written == self.world.size:
            self.world.mark("save", self.state.step)
        if save_failed:
            self.setup.saver.wait()  # raises on all ranks, some of which may still be writing
        if written == self.world.size:
            self.setup.saver.publish()
        self._stop.agree(asked)
        return batches, count, int(tokens)

    @property
    def micro_rows_matter(self) -> bool:
        """Whether a step depends on the size of its micro-batches: running statistics, ``parallel.reproducible``."""
        return self.parallel.reproducible or bool(changing_buffers(self.objective))

    def less_memory(self) -> str:
        """Say how the batch of a step can take less memory, as the start of a sentence."""
        if self.micro_rows_matter or self.objective.couples_examples:
            return "Use"
        return "Lower train.micro_rows (the result stays the same), use"

    def halve_micro_rows(self) -> bool:
        """Make the micro-batches smaller after memory ran out; return False if that is not possible.

        Not with several processes, whose collectives cannot be taken back, nor where the size of a micro-batch is part
        of the result: losses that compare rows, running statistics, ``parallel.reproducible``.
        """
        before = self.micro_rows
        must_stay = self.world.size > 1 or self.objective.couples_examples or self.micro_rows_matter
        if must_stay or before == 1:
            return False
        fewer = [r for r in range(1, before // 2 + 1) if self.train.batch_rows % r == 0]
        self.split(max(fewer), record=True)
        self.setup.optimizers.zero_grad()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        step = self.state.step + 1
        self.say(
            f"step {step:,}: memory does not suffice for {before} rows at a time; it is repeated with "
            f"{self.micro_rows}, and so are all later steps; the global batch stays as it is"
        )
        self.journal.write({"event": "memory", "step": step, "micro_rows": self.micro_rows})
        return True

    def split(self, micro_rows: int, *, record: bool = False) -> None:
        """Set the rows of a micro-batch, a divisor of the rows of this rank; recorded, a resumed run keeps them."""
        if record:
            self.state.micro_rows = micro_rows
        self.setup.feed.micro_rows = micro_rows

    def _say_schedule(self) -> None:
        """Say if another length of a resumed run changes its learning rate at once, or ends it before the rate has."""
        state, planned = self.state, self.planned
        step, total, now = state.step, state.total_steps, self.lr_factor()
        state.step, state.total_steps = max(min(step, planned - 1), 0), planned
        before = self.lr_factor()
        state.step, state.total_steps = step, total
        peak, about = float(self.optim.lr), "about " * (self.setup.plan.limit.kind == "minutes")
        if total <= step < planned and self.optim.schedule != "constant":
            self.say(
                f"{step:,} of {planned:,} steps have been made, so none follows: the run ends before its learning "
                f"rate, {before * peak:.3g}, has come to the end of its schedule"
            )
        elif step < total != planned and abs(now - before) > _JUMP * before:
            self.say(
                f"the learning rate of the next step is {now * peak:.3g} and no longer {before * peak:.3g}, because "
                f"the length of the run was changed: its schedule is now one of {about}{total:,} steps, and was one "
                f"of {planned:,}"
            )

    def lr_factor(self) -> float:
        """Return the learning rate of this step, as a multiple of that of the settings."""
        return lr_factor(
            self.state.step,
            self.state.total_steps,
            schedule=self.optim.schedule,
            warmup=self.optim.warmup,
            decay=self.optim.decay,
            min_lr=self.optim.min_lr,
        )

    def _after_step(self, record: dict[str, Any]) -> None:
        """Log, evaluate, save and call hooks, each at its own interval."""
        state = self.state
        state.seconds = time.monotonic() - self._began
        state.total_steps = self.setup.plan.replan(state, self.world.broadcast_int)
        last = state.step >= state.total_steps
        if last or state.step <= 10 or state.step % self.train.log_every == 0:
            flops = self.objective.flops(
                state.window_tokens, int(state.window_count), self.setup.row_length
            )
            self.journal.steps(
                record,
                state,
                flops,
                self.peak * self.world.size,
                show_mfu=self.device.type == "cuda",  # elsewhere the peak is measured, not known
            )
        improved = False
        if self.eval_data is not None and (last or self._due("eval", state.last_eval)):
            improved = self._evaluate(last=last)
        if last or improved or self._due("save", state.last_save):
            self.save()
        read_only = MappingProxyType(record)
        for hook in self.hooks:
            if state.step % hook.every == 0 and self.world.is_rank_zero:
                hook.fn(read_only)

    def _evaluate(self, *, last: bool) -> bool:
        """Evaluate on the held-out rows and log the figures; return True if they are to be saved as the best so far."""
        began = time.monotonic()
        validation = run_validation(self, last=last)
        if validation is None:
            return False
        self.metrics, self.peak = dict(validation.figures), peak_flops(self.setup.precision)
        self.setup.plan.reserve = 1.0 + 1.2 * validation.seconds
        self._restore_files()
        self.journal.evaluation(self.state, self.metrics, validation.samples, validation.note)
        if remark := self._evaluation_time.add(time.monotonic() - began, self):
            self.say(remark)
        if last:
            self.about |= ngram_baseline(self)
        return validation.improved and self.train.best

    def _evaluation_work(self) -> float:
        """Return the work of one evaluation in steps; 0 where each is worth its cost, as of figures that scatter."""
        if (
            self.train.monitor != "loss" or self.eval_data is None
        ):  # usually the last loss is the best
            return 0.0
        rows = len(self.eval_data)
        return min(self.train.eval_rows or rows, rows) / (_STEP_WORK * self.train.batch_rows)

    def _due(self, name: str, last: int) -> bool:
        interval = self.interval(name, self.state.total_steps)
        return interval > 0 and self.state.step - last >= interval

    def interval(self, name: str, total: int) -> int:
        """Return the steps between evaluations (``eval``) or saves (``save``) of a run of ``total``; 0 is never."""
        every = self.train.eval_every if name == "eval" else self.train.save_every
        epoch = self.setup.plan.epoch_rows / self.train.batch_rows
        work = self._evaluation_work() if name == "eval" else 0.0
        return parse_every(every, total, f"train.{name}_every", epoch, work)

    def _out_of_patience(self) -> bool:
        return 0 < self.train.patience <= self.state.evals_since_best

    def probe(self) -> float | None:
        """Return the loss on fixed rows, by which a resumed run verifies its weights; None without a finite loss."""
        rows = self.eval_data if self.eval_data is not None else self.train_data
        return probe_loss(self.objective, rows, self.setup.precision, self.setup.strategy)

    def save(self) -> Path:
        """Write a checkpoint of this step; earlier checkpoints are kept until the new one is durable.

        Raises:
            TrainingError: the run directory is gone; the checkpoint is written beside it.
        """
        self._check_run_directory()
        return self._save(self.setup.saver)

    def _save(self, saver: Saver) -> Path:
        state = self.state
        self.world.mark("save", state.step)
        state.last_save = state.step
        state.scale = self.setup.scaler.state()
        state.seconds = time.monotonic() - self._began
        self.journal.sync()
        state.log, state.lr = self.journal.last, float(self.optim.lr)
        state.facts["peak_memory"] = max(
            peak_memory(self.device), state.facts.get("peak_memory", 0.0)
        )
        with self.setup.average.applied():
            state.probe_loss = self.probe()
            measured = {} if state.eval_pending or state.last_eval != state.step else self.metrics
            about = {"objective": self.objective.record(), "metrics": measured}
            self._checkpoint = saver.save(
                self.objective.model,
                step=state.step,
                tokens=state.tokens,
                pretrain_block=self.about | about,
                training=training_state(self),
                keep=self.train.keep,
                protect={state.best_step} if self.train.best and state.best_step else set(),
            )
        gc.collect()  # cheap, because the heap is frozen; automatic collection is off
        return self._checkpoint

    def _check_run_directory(self) -> None:
        """Save the run to a fallback directory and end it if its own one is lost; a collective."""
        lost = float(self._run_directory is not None and self._run_directory.lost(now=True))
        if any(self.world.all_reduce_sum([lost])):
            self._save_to_fallback()
        self._restore_files()

    def _restore_files(self) -> None:
        """Write log and settings again if another program removed them from the run directory."""
        if self._run_directory is not None and not self._run_directory.lost(now=True):
            self._run_directory.restore()
            self.journal.restore_log()

    def _save_to_fallback(self) -> None:
        """Save the run to a fallback directory, because its own one was deleted, emptied or renamed, and end it.

        Raises:
            TrainingError: always; the message names both directories.
        """
        happened, fallback = self.world.broadcast_object(
            ["", ""]
            if self._run_directory is None
            else [self._run_directory.what_happened(), str(self._run_directory.fallback_path())]
        )
        self.world.mark("save", self.state.step)
        with contextlib.suppress(PretrainError):
            self.setup.saver.wait()  # it may have failed to write to the lost directory
        layout = self.setup.strategy.layout if self.world.size > 1 else None
        self._save(Saver(fallback, layout=layout, peers=self.world))

        def keep() -> str:
            assert self._run_directory is not None
            self._run_directory.write_settings_and_log(Path(fallback), self.journal.records)
            return self._run_directory.way_back(Path(fallback))

        raise TrainingError(
            f"The run directory {self.out} was {happened} while the run was going on, so it ends here. Step "
            f"{self.state.step:,} is saved with settings and log in {fallback}. To go on, give it the old name and "
            f"start the same command again: {self.world.broadcast_result(keep)}"
        )

    def asked_to_stop(self) -> bool:
        """Whether any rank has been asked to stop; must be called by all ranks, which get the same answer."""
        self._stop.agree(self.world.all_reduce_sum(self._stop.flags()))
        return self._stop.agreed is not None

    def _finish(self, stopped: str) -> Run:
        """Save a last checkpoint if needed, make the best one the result, print its path and return the run."""
        state = self.state
        if state.last_save != state.step or self._checkpoint is None:
            self.save()
        self.world.mark("save", state.step)
        self.setup.saver.wait()
        self._check_run_directory()
        if self.asked_to_stop():  # a signal may have arrived during the save
            stopped = self._stop.agreed or stopped
        best = state.best_kept(self.out, self._checkpoint)
        chosen = best or self._checkpoint
        assert chosen is not None
        result = self.world.broadcast_result(lambda: str(write_result(self.out, chosen)))
        run = Run(
            path=self.out,
            step=state.step,
            stopped=stopped,
            metrics=self.metrics,
            history=self._history(),
            checkpoint=self._checkpoint,
            best=best,
            result=Path(result),
        )
        self.say(
            f"{'stopped by ' + stopped if stopped != 'limit' else 'done'} at step {state.step:,}: {run.result}"
        )
        return run

    def _history(self) -> list[dict[str, Any]]:
        """Return the records of the log; rank zero writes it, the other ranks read the file."""
        return (
            list(self.journal.records)
            if self.world.is_rank_zero
            else read_log(self.out / "log.jsonl")
        )

    def say(self, line: str) -> None:
        """Print a line above the progress bar, unless the run is quiet."""
        self.journal.say(line)
