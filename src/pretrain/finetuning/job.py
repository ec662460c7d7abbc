"""A fine-tuning job: rows, settings and all runs over them (the main one, a sweep, the arms of a comparison)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import distributed, finetuning
from pretrain.checkpoint.best import (
    BEST,
    SWEEP,
    TRIALS,
    rates_of_run,
    run_state,
    write_choice,
)
from pretrain.checkpoint.download import terms
from pretrain.checkpoint.manifest import run_checkpoints
from pretrain.checkpoint.resolve import models_of_run
from pretrain.config import parse_limit
from pretrain.config.spelling import option
from pretrain.distributed.world import current_world
from pretrain.errors import DataError, Interrupted
from pretrain.finetuning.measure import measure_as_in_run, measure_in_parts
from pretrain.finetuning.result import Finetuned
from pretrain.finetuning.rows import Data, encode, open_data
from pretrain.finetuning.settings import TuneConfig, rate_of_muon
from pretrain.finetuning.start import (
    automatic_lr,
    begun_as,
    check_fits,
    classes_of,
    earlier_lr,
    freeze,
    starting_model,
    used_unloaded_weights,
    write_counts,
)
from pretrain.finetuning.trials import ScoreFile, kept_comparison, kept_trials_named, trials_key
from pretrain.models import own_family
from pretrain.models.base import Model
from pretrain.objectives import check_monitor, check_options, task_class
from pretrain.objectives.tasks import Task
from pretrain.report.run_report import PAGE
from pretrain.training.logging import check_loggers
from pretrain.training.parallelize import run_lock
from pretrain.training.precision import choose_device, evaluation_setting
from pretrain.training.restore import load_weights
from pretrain.training.resuming import (
    check_same_run,
    has_begun,
    keep_settings,
    record_resume,
    resolve_checkpoint,
    run_key,
)
from pretrain.training.run_directory import NewRunDirectory
from pretrain.training.starting_model import began_with, hash_weights, origin, parent_step
from pretrain.training.trainer import Trainer
from pretrain.training.validation import LOWER_IS_BETTER
from pretrain.training.validation import score as lower_is_better
from pretrain.utils.files import note, temporary_name
from pretrain.utils.imports import call_named

if TYPE_CHECKING:
    from pretrain.data.tables import Table
    from pretrain.data.task_rows import TaskRows
    from pretrain.objectives.tasks import Learned
    from pretrain.training.state import Changed, Run

__all__ = ["Job"]

_MOST_EVALS = 20
# A run takes three epochs, or more if that is fewer than 500 steps: at most twenty, but at least 100 steps.
_EPOCHS, _FEW_STEPS, _EPOCHS_OF_FEW, _LEAST_STEPS = 3.0, 500, 20, 100
_SWEEP_STEPS = 250
_SWEEP = (1 / 3, 1.0, 3.0)
# Settings that earlier versions did not have. If not given, they are left out of the key of a run, so that the
# directories of earlier runs keep their names.
_LATER = {"data": ("delimiter", "quoting", "encoding", "group"), "model": ("family",)}


def automatic_steps(epoch: int) -> int:
    """Number of steps of a run whose length is not set; ``epoch`` is the number of steps of one pass over its rows."""
    few = min(_FEW_STEPS, max(_EPOCHS_OF_FEW * epoch, _LEAST_STEPS))
    return max(round(_EPOCHS * epoch), few)


def grid(middle: float) -> list[float]:
    """Grid of learning rates around ``middle``."""
    return [float(f"{middle * factor:.1e}") for factor in _SWEEP]


@dataclass
class Job:
    """The state that all runs over the same rows share.

    Attributes:
        source: checkpoint path or ``Model`` that runs start from.
        settings: settings of the main run.
        data: its rows.
        task: class of the task.
        quiet: print nothing.
        metric: metric of the task, set when it is built for these labels.
        unit: what the model counts, such as tokens; set likewise.
        compared_lr: learning rate that a comparison chose for the run, or None.
        weights: hash of the weights that the runs start from, see ``hash_weights``; of a checkpoint it is known when
            the first task is built.
    """

    source: Any
    settings: TuneConfig
    data: Data
    task: type[Task]
    quiet: bool = False
    metric: str = ""
    unit: str = "tokens"
    compared_lr: float | None = None
    weights: str | None = None

    @classmethod
    def open(
        cls, model: Any, settings: TuneConfig, objects: Mapping[str, Any], *, quiet: bool = False
    ) -> Job:
        """Read the rows and set the output directory."""
        task = task_class(settings.task.name)
        check_options(task, settings.task.options, settings.spell)
        settings.task.options = task.settled(settings.task.options)
        check_monitor(task, task.name, settings.train.monitor)
        choose_device(settings.parallel.device)
        check_loggers(settings.train.loggers)
        if settings.model.family is not None:
            own_family(settings.model.family)
        source, named = model, settings.model.checkpoint
        by_name = model is None or isinstance(model, str | os.PathLike)
        if by_name:
            source = settings.model.checkpoint = resolve_checkpoint(settings)
            if source and settings.train.out:
                source = began_with(source, Path(settings.train.out))
        check_fits(source, task)
        out = Path(settings.train.out) if settings.train.out else None
        data = open_data(
            settings, objects, task, classes_of(source, task), begun_as(out, task, source)
        )
        job = cls(source, settings, data, task, quiet)
        if isinstance(source, Model):  # all of its kind have one name in the settings
            job.weights = current_world().broadcast_result(
                lambda: hash_weights(source, opened=False)
            )
            named = f"{named} {job.weights}"
        if not settings.train.out:
            settings.train.out = f"runs/{task.name}-{job.key(named)}"
            out = Path(settings.train.out)
            if by_name and has_begun(out):
                # The run may have begun with an earlier commit of the model, which may name other classes.
                settings.model.checkpoint = named
                if resolve_checkpoint(settings) != source:
                    return cls.open(None, settings, objects, quiet=quiet)
                settings.model.checkpoint = source
                job.source = began_with(source, out)
            if (begun := begun_as(out, task)) and not _as_begun(data.learned, begun):
                return cls.open(model, settings, objects, quiet=quiet)
        return job

    def key(self, checkpoint: str) -> str:
        """Hash of settings and rows, eight hexadecimal digits; ``checkpoint`` is the name that was given."""
        plain = self.settings.to_dict()
        plain["model"]["checkpoint"] = checkpoint
        plain["train"].pop("out")
        for section, names in _LATER.items():
            for name in names:
                if plain[section][name] is None:
                    del plain[section][name]
        return run_key(plain, self.data.fingerprint)

    def build(
        self, *, seed: int, scratch: bool = False, quiet: bool = True, whole: bool = True
    ) -> Task:
        """Build the task around a model that is ready to train.

        Args:
            seed: seed of new weights.
            scratch: initialise all weights anew.
            quiet: do not print what was loaded.
            whole: read all weights; if False, several ranks may leave them on disk until the model is sharded.
        """
        settings, method, learned = self.settings, self.settings.method, self.data.learned
        # Reference outputs and the row norms of DoRA are computed from the weights before sharding.
        whole |= method.dora or self.task.prepare_reference is not Task.prepare_reference
        new: dict[str, Any] = {"seed": seed, "scratch": scratch}
        model = starting_model(
            self.source, self.task, learned.labels, whole=whole, quiet=quiet, **new
        )
        if not scratch:
            self.weights = self.weights or hash_weights(model, opened=True)
        before = write_counts(model)
        options = {**learned.options, **settings.task.options}
        # A class of the caller need not know how its rows were read.
        if not self.task.takes("label_form"):
            options.pop("label_form", None)
        options = {k: v for k, v in options.items() if k not in self.task.row_options}
        options["max_length"] = settings.data.max_length
        task: Task = call_named(self.task, options, settings.spell, model)
        task.labels_given = bool(settings.task.options.get("labels"))
        if used_unloaded_weights(task, before):
            return self.build(**new)
        self.metric, self.unit = task.metric, task.unit_name
        if method.lora and not scratch:
            finetuning.add_adapter(model, method, seed)
        if not scratch:
            freeze(model, method.freeze)
        return task

    @property
    def monitor(self) -> str:
        """Metric by which checkpoints and rates are chosen: the one in the settings, else the default of the task."""
        return self.settings.train.monitor or self.metric or self.task.metric

    def lr(self, task: Task) -> float:
        """Learning rate of the settings, or the automatic one."""
        lr = self.settings.optim.lr
        if isinstance(lr, str):
            return automatic_lr(task.model, adapter=bool(self.settings.method.lora))
        return lr

    def rates(self, task: Task, lr: float, out: Path | None = None) -> dict[str, float]:
        """Return the settings of a run at a chosen learning rate: that of Muon changes in proportion.

        If the run in the directory ``out`` has begun, it keeps its own rate of Muon: that of the settings in earlier
        versions.
        """
        optim = self.settings.optim
        if optim.name != "muon":
            return {"lr": lr}
        if out is not None and has_begun(out) and (before := rates_of_run(out)):
            return {"lr": lr, "muon_lr": before.get("muon_lr", optim.muon_lr)}
        return {"lr": lr, "muon_lr": optim.muon_lr * lr / self.lr(task)}

    def chosen(self, task: Task, lr: float | None, out: Path) -> dict[str, float]:
        """Return the learning rates of a run if it chose them on the held-out rows; empty if the settings give them."""
        configured = self.settings.optim.lr
        searched = configured == "sweep" or self.compared_lr is not None or (out / SWEEP).exists()
        return self.rates(task, lr, out) if lr and searched and isinstance(configured, str) else {}

    def fixed_lr(self, task: Task, out: Path) -> float | None:
        """Learning rate that is already fixed, by the settings or because the run began with it; else None."""
        lr = self.settings.optim.lr
        if not isinstance(lr, str):
            return lr
        before = rates_of_run(out).get("lr") if has_begun(out) else None
        if before is None and has_begun(out) and lr != "sweep":
            return earlier_lr(task.model, adapter=bool(self.settings.method.lora))
        return before

    def steps(self, examples: int) -> tuple[str, int]:
        """Limit of a run over so many examples, and the number of steps of one epoch."""
        train = self.settings.train
        batch = min(train.batch_rows, examples)
        epoch = math.ceil(examples / batch)
        if train.limit:
            return train.limit, epoch
        if train.epochs:
            return f"{max(1, math.ceil(round(train.epochs * examples / batch, 6)))} steps", epoch
        return f"{automatic_steps(epoch)} steps", epoch

    def choose_lr_and_limit(self, task: Task, examples: int, out: Path) -> tuple[float, str]:
        """Return learning rate and limit: as set, else as the run began, else by comparison, sweep or default."""
        settings = self.settings
        lr, (limit, epoch) = self.lr(task), self.steps(examples)
        fixed = self.fixed_lr(task, out)
        if fixed is not None:
            lr = fixed
        elif self.compared_lr is not None:
            lr = self.compared_lr
        elif settings.optim.lr == "sweep":
            lr = self.sweep(task)
        if has_begun(out) and not settings.train.limit:
            states, epochs = map(run_state, run_checkpoints(out)), settings.train.epochs
            lengths = [state["total_steps"] for state in states if state.get("total_steps")]
            # Earlier versions counted every epoch in whole steps; a run that began with that length keeps it.
            if lengths and (not epochs or lengths[0] == max(1, round(epochs * epoch))):
                limit = f"{lengths[0]} steps"
        return lr, limit

    def trainer(
        self,
        task: Task,
        rows: TaskRows,
        held_out: TaskRows | None,
        *,
        out: str | os.PathLike[str],
        rates: Mapping[str, float],
        limit: str,
        seed: int,
        save: bool = True,
        hooks: Sequence[Any] = (),
    ) -> Trainer:
        """Build the trainer over these examples."""
        settings = self.settings
        _, epoch = self.steps(len(rows))
        every = settings.train.eval_every
        amount = parse_limit(limit)
        if amount.kind == "steps" and every == "1 epochs":
            every = f"{max(epoch, math.ceil(amount.value / _MOST_EVALS))} steps"
        section = settings.train.at(os.fspath(out), limit, save=save)
        section = replace(
            section,
            batch_rows=min(section.batch_rows, len(rows)),
            micro_rows=min(section.micro_rows, len(rows)),
            eval_every=every if save else "0 steps",
            monitor=self.monitor,
            seed=seed,
        )
        return Trainer(
            task,
            rows,
            optim=settings.optim.at(rates),
            train=section,
            parallel=settings.parallel,
            eval_data=held_out,
            hooks=hooks,
            about=self.about(),
            base=self.weights,
            quiet=self.quiet or not save,
        )

    def about(self) -> dict[str, Any]:
        """Provenance that is recorded in checkpoints."""
        names, counts = self.data.names, self.data.counts
        return {
            "fingerprint": self.data.fingerprint,
            "sources": [{"name": Path(names["train"]).name, "rows": counts["train"], "share": 1.0}],
            "rows": counts,
            "columns": self.data.columns,
            **({"column_names": self.settings.data.names} if self.settings.data.names else {}),
            **self.measured_with(),
            "parent": origin(self.settings.model.checkpoint)
            if isinstance(self.source, str)
            else None,
            **(parent_step(self.source) if isinstance(self.source, str) else {}),
            **terms(self.source if isinstance(self.source, str) else self.source.source or ""),
        }

    def measured_with(self) -> dict[str, Any]:
        """What the metrics depend on: the precision and, for objectives that couple examples, the rows of a batch."""
        train = self.settings.train
        return {"batch_rows": train.batch_rows, "eval_precision": evaluation_setting(train)}

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of the run directory, for the trials before the run too; a new one without a run is removed.

        Raises:
            ConfigError: the directory holds a run of other settings, or something else.
            RunLocked: another process holds it.
        """
        out, world = Path(self.settings.train.out), current_world()
        check_same_run(self.settings, out)
        new_directory = NewRunDirectory(out, world.is_rank_zero)
        with (
            new_directory.removed_on_failure(),
            run_lock(out, world),
            new_directory.emptied_on_failure(),
        ):
            yield

    def train(self, hooks: Sequence[Any] = ()) -> Finetuned:
        """Train the main run inside of `alone`, restore the best evaluation and write all results."""
        settings, data = self.settings, self.data
        out, seed = Path(settings.train.out), settings.train.seed
        notes = list(data.notes)
        task = self.build(seed=seed, quiet=self.quiet, whole=False)
        rows = encode(task, data.train, "training", settings.data.max_cut, notes)
        task.prepare_reference(rows)
        held_out, tested = self.held_out(task, notes)
        lr, limit = self.choose_lr_and_limit(task, len(rows), out)
        chosen = self.chosen(task, lr, out)
        new = [line for line in notes if "recur" not in line]  # the others have been printed
        for line in (*self.overview(rows, task), *new, *chosen_rates_line(chosen)):
            note(line)
        rates = chosen or {"lr": lr}
        trainer = self.trainer(
            task, rows, held_out, out=out, rates=rates, limit=limit, seed=seed, hooks=hooks
        )

        def begin() -> Changed:
            changed = keep_settings(settings, out)
            if chosen:
                write_choice(out / SWEEP, chosen)
            return changed

        def resume() -> None:
            record_resume(trainer, settings)
            models_of_run(out)  # names a damaged file before it is removed
            for name in (BEST, PAGE):  # what they say may not hold at the end
                (out / name).unlink(missing_ok=True)

        figures: list[dict[str, float]] = []

        def end(run: Run) -> None:
            # A run that was asked to stop may have no time for the evaluation.
            if task.model.layout is not None and not run.exit_code:
                figures.extend(measure_in_parts(trainer, run, [held_out, tested]))

        with kept_trials_named(out):
            run = trainer.fit(begin, end, resume, locked=True)
        return self.finish(task, run, held_out, tested, notes, figures)

    def held_out(self, task: Task, notes: list[str]) -> tuple[TaskRows | None, TaskRows | None]:
        """Encode the validation and the test rows, with the reference outputs that a task may need; None for none."""
        valid = self.data.valid if len(self.data.valid) else None
        parts = []
        for table, name in ((valid, "validation"), (self.data.test, "test")):
            rows = None
            if table is not None:
                rows = encode(task, table, name, self.settings.data.max_cut, notes)
                task.prepare_reference(rows)
            parts.append(rows)
        return parts[0], parts[1]

    def finish(
        self,
        task: Task,
        run: Run,
        held_out: TaskRows | None,
        tested: TaskRows | None,
        notes: list[str],
        figures: Sequence[dict[str, float]] = (),
        write: bool = True,
    ) -> Finetuned:
        """Restore and evaluate the best checkpoint, and record it as the one that opening the run loads.

        ``figures`` are the metrics of the held-out and the test rows if they were computed on the sharded
        model, empty mappings for missing rows. Unless ``write``, the run directory is only read, because the
        run may still be going on.
        """
        chosen, world, shared = run.best or run.checkpoint, current_world(), task.model.layout
        if chosen is not None and write:
            world.on_rank_zero(lambda: write_choice(run.path / BEST, {"checkpoint": chosen.name}))

        task.model.fresh = frozenset()  # it has been trained

        def restored() -> Task:
            # A sharded model cannot be used on one rank alone, so a whole one is built when it is needed.
            task_restored = task if shared is None else self.build(seed=self.settings.train.seed)
            if chosen is not None:
                load_weights(task_restored, chosen, {})
                block = json.loads((chosen / "config.json").read_text(encoding="utf-8"))
                known = (
                    block.get("pretrain", {}) | self.measured_with()
                )  # may differ after a resumption
                task_restored.model.extra_config["pretrain"] = known
            return task_restored.eval()

        rates = self.chosen(task, rates_of_run(run.path).get("lr"), run.path)
        notes = [*notes, *chosen_rates_line(rates)]
        result = Finetuned(restored, run, self.settings, self.data, notes, self.build)
        result.rates = rates
        if shared is None:
            _ = result.task
            if held_out is not None:
                result.metrics = world.broadcast_result(lambda: result.measure(held_out))
            if tested is not None:
                result.test_metrics = world.broadcast_result(lambda: result.measure(tested))
        elif figures:
            result.metrics, result.test_metrics = figures[0] or result.metrics, figures[1] or None
        result.trivial = task.trivial(self.data.train, _measured(self.data.valid, held_out))
        if self.data.test is not None:
            result.trivial_test = task.trivial(self.data.train, _measured(self.data.test, tested))
        result.describe()
        if shared is None and write:  # else `report` keeps it: this rank has no whole model yet
            world.on_rank_zero(result.keep)
        return result

    def read_back(self, run: Run, *, write: bool = True) -> Finetuned:
        """Return the result of the job whose run is on disk, as if it had been trained here; see ``finish``."""
        silent, notes = replace(self, quiet=True), list(self.data.notes)
        task = silent.build(seed=self.settings.train.seed)
        held_out, tested = silent.held_out(task, notes)
        result = silent.finish(task, run, held_out, tested, notes, write=write)
        result.comparison = kept_comparison(self)
        return result

    def overview(self, rows: TaskRows, task: Task) -> list[str]:
        """Summarise rows, lengths, labels and trained parameters in a few lines."""
        data = self.data
        counts = ", ".join(f"{count:,} {name}" for name, count in data.counts.items())
        lines = [
            f"{task.name}: {counts} rows from {data.names['train']}",
            task.sizes(rows),
        ]
        lines += data.learned.classes
        trained = [p for p in task.model.parameters() if p.requires_grad]
        whole = task.model.num_parameters()
        part = sum(p.numel() for p in trained)
        if part < whole:
            lines.append(f"{part:,} of {whole:,} parameters are trained ({part / whole:.2%})")
        return lines

    def sweep(self, task: Task) -> float:
        """Try learning rates in short runs and return the best on the held-out rows.

        Trials that the run directory keeps are not trained again, see `ScoreFile`.

        Raises:
            DataError: there are no held-out rows to choose by.
        """
        train, valid = self.data.train, self.data.valid
        if not len(valid):
            raise DataError(
                f"{option('lr', 'sweep')} chooses by held-out rows, and there are none. "
                f"Give some: {option('valid', 0.1)}."
            )
        _, epoch = self.steps(len(train))
        limit = f"{max(50, min(4 * epoch, _SWEEP_STEPS))} steps"
        seed = self.settings.train.seed
        trials, scores = ScoreFile(Path(self.settings.train.out, TRIALS), scores=1), {}
        trials.begin(trials_key(self))
        for lr in self.settings.optim.lrs or grid(self.lr(task)):
            rates = self.rates(task, lr)
            trial = partial(self.score, train, valid, rates=rates, limit=limit, seed=seed)
            (scores[lr],), _ = trials.trial(f"lr {lr!r}{rate_of_muon(rates)}, {limit}", trial)
        best = max(scores, key=lambda lr: scores[lr] if math.isfinite(scores[lr]) else -math.inf)
        note(f"learning rates, {limit} each, by {self.monitor} on the held-out rows:")
        for lr, score in scores.items():
            muon = rate_of_muon(self.rates(task, lr))
            mark = "  <- chosen" if lr == best else ""
            note(f"  {lr:<8g} {self.figure(score):.4f}{muon}{mark}")
        return best

    def figure(self, score: float) -> float:
        """Return the monitored metric that belongs to a score of `score`."""
        return -score if self.monitor in LOWER_IS_BETTER else score

    def score(
        self,
        *parts: Table,
        rates: Mapping[str, float],
        limit: str,
        seed: int,
        scratch: bool = False,
    ) -> list[float]:
        """Train once on the first table without keeping the run, and evaluate on the others.

        Returns:
            The monitored metric on each of the others, with the sign that makes higher better.

        Raises:
            Interrupted: a signal asked the run to stop.
        """
        task = self.build(seed=seed, scratch=scratch)
        rows, *others = (encode(task, part, "trial", 1.0, []) for part in parts)
        for part in (rows, *others):
            task.prepare_reference(part)
        # In the directory that this job has locked, where the next one that locks it removes what a kill leaves.
        world, name = current_world(), temporary_name(Path(self.settings.train.out, "trial"), "new")
        out = Path(world.broadcast_result(lambda: os.fspath(name)))
        try:
            run = self.trainer(
                task, rows, None, out=out, rates=rates, limit=limit, seed=seed, save=False
            ).fit()
            # An interrupted trial has no valid score, and its signal is meant to stop all of them.
            if run.exit_code:
                raise Interrupted(run.exit_code)
        finally:
            if world.is_rank_zero:
                shutil.rmtree(out, ignore_errors=True)
        if task.model.layout is not None:
            whole = self.build(seed=seed, scratch=scratch)
            distributed.copy_whole(task.model, whole.model, world.with_process_group())
            task = whole
        task.eval()

        def measured() -> list[float]:
            figures_of_parts = [measure_as_in_run(task, part, self.settings) for part in others]
            return [-lower_is_better(figures, self.monitor) for figures in figures_of_parts]

        return world.broadcast_result(measured)


def chosen_rates_line(rates: Mapping[str, float]) -> list[str]:
    """Return a line with the learning rates that were chosen; an empty list if none were."""
    if not rates:
        return []
    muon = rate_of_muon(rates)
    return [f"the learning rate is {rates['lr']:g}{muon}, chosen on the held-out rows"]


def _measured(table: Table, rows: TaskRows | None) -> Table:
    """Return the rows of a table that have examples: a baseline is measured on what the model is."""
    if rows is None or not rows.dropped:
        return table
    return table.take(sorted(set(rows.owners)))


def _as_begun(learned: Learned, begun: Mapping[str, Any]) -> bool:
    """Whether the rows give what a run has begun with; an earlier version may have read them otherwise."""
    labels = begun.get("begun_labels")
    same = labels is None or tuple(labels) == tuple(learned.labels or labels)
    return same and bool(begun["begun_objective"].get("standard")) == bool(
        learned.options.get("standard")
    )
