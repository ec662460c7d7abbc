"""Checks before step 0: data, memory, metrics and checkpoints. Failing here is cheaper than failing in an hour."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.checkpoint import check_writable, estimated_size, save_model
from pretrain.checkpoint.result import check_result
from pretrain.checkpoint.sharded_loading import load_slices
from pretrain.config import OptimConfig
from pretrain.data.loader import Examples
from pretrain.data.order import MixtureOrder
from pretrain.data.shards import Rows
from pretrain.errors import ConfigError, DataError, TrainingError, out_of_memory
from pretrain.nn.buffers import stored_tensors
from pretrain.nn.device import local
from pretrain.printing import duration
from pretrain.training.dry_run import dry_run
from pretrain.training.evaluate import NoTargets, evaluate_rows
from pretrain.training.micro_rows import fastest_micro_rows, may_measure
from pretrain.training.plan import row_length
from pretrain.training.schedule import warmup_steps
from pretrain.training.validation import score
from pretrain.utils.directories import temporary_name
from pretrain.utils.memory_info import free_memory, peak_memory

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

__all__ = ["check_rows", "check_trainable", "frozen_beside", "numel", "preflight"]

# Steps below which a run is said to be short, readings of a text above which it is said to be learnt by heart (values
# up to 4 are as good as new text, and beyond 16 little is gained: arXiv 2305.16264, figure 5), and mean occurrences of
# a vocabulary entry below which the vocabulary is said to be large.
_FEW_STEPS, _MANY_EPOCHS, _FEW_OCCURRENCES = 50, 16, 50
_TINY_SHARE = 1e-3  # optim.min_lr below it may be meant as a rate, as in other libraries

# Between these numbers of epochs the recipe of `suggest` was measured to be better than the defaults; above the second
# one with weight decay and dropout.
FEW_EPOCHS, SEVERAL_EPOCHS, MANY_EPOCHS = 2.0, 10.0, 20.0


def preflight(trainer: Trainer, checkpoint: Path | None) -> float:
    """Check the data against the model, run the largest batch, save and reload, and print a summary of the run.

    Returns:
        Estimated seconds per optimizer step.

    Raises:
        DataError, TrainingError, CheckpointError: see the message.
    """
    train = trainer.train
    check_lengths(trainer)
    size = checkpoint_size(trainer) * (train.keep + 1)
    starting = trainer.journal.starting
    with starting("checking free space"):
        trainer.world.on_rank_zero(lambda: check_writable(trainer.out, size))
        trainer.world.on_rank_zero(lambda: check_result(trainer.out))
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    with starting("running the largest batch"):
        first_loss, seconds = first_pass(trainer)
    micro = ""
    if may_measure(trainer):
        with starting("measuring micro-batches"):
            seconds, micro = fastest_micro_rows(trainer, seconds)
    with starting("trying an evaluation"):
        check_monitor(trainer)
        trainer.probe()  # the first save needs it, so it must work now
    if checkpoint is None:
        with starting("saving and reloading"):
            check_round_trip(trainer)
    lines = describe(trainer, checkpoint, seconds, micro)
    with starting("surveying the rows"):
        lines += trainer.objective.survey(trainer.train_data)
    expected = trainer.objective.expected_first_loss()
    if checkpoint is None and expected is not None:
        verdict = ""
        if first_loss > 1.2 * expected + 0.5:
            verdict = "  <- far above: check initialisation and labels"
        elif first_loss < 0.5 * expected and not trainer.about.get("parent"):
            verdict = "  <- far below: the model may see its targets"
        lines.append(
            f"first loss {first_loss:.3f}, an untrained model has about {expected:.3f}{verdict}"
        )
    if checkpoint is None:
        lines += remarks(trainer, trainer.setup.plan.first_total(trainer.state, seconds))
    else:
        lines.append(check_resumed(trainer, checkpoint))
    trainer.journal.started()
    for line in lines:
        trainer.say(line)
    return seconds


def first_pass(trainer: Trainer) -> tuple[float, float]:
    """Run the dry run, with smaller micro-batches if memory does not suffice for the planned ones.

    Returns:
        Loss of the first batch, and estimated seconds per optimizer step.
    """
    batches = trainer.setup.feed.step_at(trainer.state.rows)
    try:
        loss, seconds = dry_run(trainer, batches)
        return loss, seconds * len(batches)
    except TrainingError as error:
        cause = error.__cause__
        if cause is None or not out_of_memory(cause) or not trainer.halve_micro_rows():
            raise
    return first_pass(trainer)


def checkpoint_size(trainer: Trainer) -> int:
    """Return the bytes of a checkpoint: weights, moments, L2-SP anchors, and the raw weights if an average is kept."""
    model, optim = trainer.objective.model, trainer.optim
    trained = numel(trainer, trainer.setup.params)
    floats = (2 if optim.ema else 1) * numel(trainer) + (3 if optim.l2_sp else 2) * trained
    # Divided by the local parameters of the model only, because `estimated_size` multiplies by that number.
    return estimated_size(model, copies=floats / max(1, model.num_parameters()))


def numel(trainer: Trainer, names: Iterable[str] | None = None) -> int:
    """Return the number of elements in the named parameters (default: all) of the objective, unsharded."""
    if names is None:
        names = [name for name, _ in trainer.objective.named_parameters()]
    return sum(math.prod(trainer.setup.strategy.layout.shapes[name]) for name in names)


def frozen_beside(trainer: Trainer) -> list[str]:
    """Return the names of the parameters of the objective that are outside the model and never trained (a teacher)."""
    named = trainer.objective.named_parameters()
    return [name for name, p in named if not (name.startswith("model.") or p.requires_grad)]


def check_monitor(trainer: Trainer) -> None:
    """Check that ``train.monitor`` is among the figures of an evaluation."""
    if trainer.eval_data is None or trainer.train.monitor == "loss":
        return
    setup = trainer.setup
    # The first few rows may have no targets; all rows are evaluated later.
    with contextlib.suppress(NoTargets):
        figures = evaluate_rows(
            trainer.objective,
            trainer.eval_data,
            setup.eval_precision,
            batch_rows=trainer.micro_rows,
            limit=trainer.micro_rows,
            strategy=setup.strategy,
            split=False,
        )
        score(figures, trainer.train.monitor)


def check_rows(data: Examples, batch_rows: int) -> None:
    """Check that there are enough rows for a batch without repeats."""
    if len(data) == 0:
        raise DataError(
            "There are no training rows. The source is empty, or all of it is held out for validation: check "
            "data.train and data.valid."
        )
    if len(data) < batch_rows:
        raise DataError(
            f"The data have {len(data)} rows and train.batch_rows is {batch_rows}: a batch would hold rows "
            f"twice. Set train.batch_rows to {len(data)} or less, use shorter rows (data.row_length) or more text."
        )


def check_trainable(module: torch.nn.Module) -> None:
    """Check that gradients can reach the weights of a module."""
    if any(tensor.is_inference() for tensor in (*module.parameters(), *module.buffers())):
        raise ConfigError(
            "The model was made inside torch.inference_mode(), and such weights cannot be trained. Build or load it "
            "outside."
        )


def check_lengths(trainer: Trainer) -> None:
    """Check that the rows are not longer than the positions of the model.

    Rows of other units, such as patches beside tokens, are checked by their objective.
    """
    backbone = trainer.objective.model.backbone
    if backbone.unit_name != "tokens":
        return
    for name, rows in (("training", trainer.train_data), ("held-out", trainer.eval_data or ())):
        # Positions restart with every document of a packed row.
        longest = getattr(rows, "longest_document", 0)
        if not longest and len(rows):
            longest = row_length(rows, trainer.objective)
        if backbone.max_length and longest > backbone.max_length:
            raise DataError(
                f"The {name} rows have {longest} {trainer.objective.unit_name}, but the model has "
                f"{backbone.max_length} positions. Prepare shorter rows (data.row_length) or build a model with more "
                "(model.overrides max_positions)."
            )


def check_round_trip(trainer: Trainer) -> None:
    """Save the model, reload it and compare, before any training."""
    model, world = trainer.objective.model, trainer.world
    layout = trainer.setup.strategy.layout if world.size > 1 else None
    folder = Path(
        world.broadcast_object(os.fspath(temporary_name(trainer.out / "preflight", "new")))
    )
    mine = {name: local(tensor.detach()) for name, tensor in stored_tensors(model).items()}
    seen = {}

    def compare(name: str, value: Tensor) -> None:
        seen[name] = torch.equal(value, mine[name].cpu())

    try:
        save_model(model, folder, layout=layout, peers=world)
        load_slices(model, folder, layout, world, compare, verified=True)
    finally:
        if world.is_rank_zero:
            shutil.rmtree(folder, ignore_errors=True)
    changed = [name for name, part in mine.items() if part.numel() and not seen.get(name, False)]
    failure = None
    if changed and model.adapter is None:
        failure = TrainingError(
            f"Saving the model and loading it again changes {changed[0]!r}. The family's name table is wrong; "
            "nothing was trained."
        )
    world.raise_on_all_ranks(failure)


def check_resumed(trainer: Trainer, checkpoint: Path) -> str:
    """Check that the probe loss is what it was when the checkpoint was written; return a line about it."""
    saved = trainer.state.probe_loss
    line = f"resuming {checkpoint.name}: row {trainer.state.rows:,} of the run"
    if saved is None:
        return line
    with trainer.setup.average.applied():
        now = trainer.probe()
    if now is None or not math.isclose(now, saved, rel_tol=1e-2, abs_tol=1e-3):
        raise TrainingError(
            f"{checkpoint} gives a loss of {now} on the probe rows, where it gave {saved} when it was "
            "saved. The weights, the data or the model's code have changed since; use a new train.out."
        )
    return f"{line}, probe loss {now:.4f}, was {saved:.4f}"


def describe(
    trainer: Trainer, checkpoint: Path | None, seconds: float, micro: str = ""
) -> list[str]:
    """Return the lines that are printed before the first step; ``micro`` says how the micro-batch was chosen."""
    train, optim, data = trainer.train, trainer.optim, trainer.train_data
    setup, precision, plan = trainer.setup, trainer.setup.precision, trainer.setup.plan
    steps = plan.first_total(trainer.state, seconds)
    in_all = f"{getattr(data, 'num_tokens', 0):,}"
    if in_all == "0":  # counting rows takes time, so only a limit that needs it does
        counted = plan.limit.kind == "tokens"
        each = plan.units_per_row if counted else row_length(data, trainer.objective)
        in_all = f"about {len(data) * each:,.0f}"
    epochs = steps * train.batch_rows / plan.epoch_rows
    choice, compiled = setup.strategy.choice, setup.strategy.compiled
    sizes, needed = choice.sizes, memory_needed(trainer, resumed=checkpoint is not None)
    accumulation = train.batch_rows // (trainer.micro_rows * sizes.dp)
    model_type = trainer.objective.model.backbone.model_type
    threads = torch.get_num_threads()
    size = f"{'up to ' * hasattr(data, 'longest')}{row_length(data, trainer.objective)}"
    timed = plan.limit.kind == "minutes"
    left = steps - trainer.state.step
    frozen = numel(trainer, frozen_beside(trainer))
    beside = f" and {frozen:,} frozen in the objective" if frozen else ""
    pace = f", about {duration(left * seconds)} on this machine" if left > 0 and not timed else ""
    lines = [
        f"device {trainer.device}, {precision.name} compute ({precision.reason}), fp32 weights, "
        f"evaluation in {setup.eval_precision.name}, {threads} thread{'s' * (threads != 1)}, "
        f"{'compiled' if compiled[0] else 'eager'} blocks ({compiled[1]})",
        f"model {model_type} with {numel(trainer) - frozen:,} parameters"
        f"{beside}, {type(trainer.objective).__name__}",
        f"data {len(data):,} rows of {size} {trainer.objective.unit_name}, {in_all} in all, {epochs:.2f} epochs in "
        f"{steps:,} steps{pace}",
        f"global batch {train.batch_rows} rows = {trainer.micro_rows} micro x {accumulation} accumulated x "
        f"{sizes.dp} rank{'s' * (sizes.dp > 1)}{micro}",
        f"schedule {optim.schedule}, {optim.name} lr {float(optim.lr):g}{trainer.lr_reason}"
        + (f", Muon lr {optim.muon_lr:g}" if optim.name == "muon" else "")
        + f", warm-up {optim.warmup:g}, limit {train.limit}"
        + (f", layer decay {optim.layer_decay:g}" if optim.layer_decay < 1 else "")
        + (f", unfreezing over {optim.unfreeze:.0%} of the steps" if optim.unfreeze else "")
        + (f", L2-SP {optim.l2_sp:g}" if optim.l2_sp else ""),
        f"memory about {needed / 2**30:.2f} GiB at the peak, {free_memory(trainer.device) / 2**30:.1f} GiB free"
        # With several ranks it was printed with the reason for the mesh.
        + (choice.advice if trainer.world.size == 1 else ""),
        f"output {trainer.out}",
    ]
    sources = trainer.about.get("sources", ())
    if len(sources) > 1:
        shares = ", ".join(f"{100 * s['share']:.1f} % {s['name']}" for s in sources[:8])
        lines.append(f"mixture {shares}{' and others' * (len(sources) > 8)}")
    if any((left_out := trainer.about.get("left_out", {})).values()):
        lines.append("left out " + ", ".join(f"{n:,} {what}" for what, n in left_out.items() if n))
    seen = epochs * most_repeated(data)[1]
    if checkpoint is None and (suggestion := suggest(trainer, seen)):
        lines.append(suggestion)
    if trainer.eval_data is None:
        lines.append("no held-out rows: nothing will be evaluated")
    if not timed and (idle := idle_patience(trainer, steps)):
        lines.append(idle)
    return lines + rate_remarks(optim, steps)


def idle_patience(trainer: Trainer, steps: int) -> str | None:
    """Return a line if ``train.patience`` cannot end a run of so many steps before its last one does."""
    patience, state = trainer.train.patience, trainer.state
    if not patience or state.step >= steps:
        return None
    if trainer.eval_data is None:
        return (
            f"train.patience {patience} stops nothing, because nothing is evaluated; leave it out, or hold out rows in "
            "a new run"
        )
    interval = trainer.interval("eval", steps)
    left = math.ceil((steps - state.last_eval) / interval) if interval else 1
    if patience - state.evals_since_best < left:  # after the last one there is nothing to stop
        return None
    return (
        f"train.patience {patience} cannot stop the run, which is evaluated {left:,} time{'s' * (left > 1)} until its "
        "end; lower it, or evaluate more often (train.eval_every)"
    )


def rate_remarks(optim: OptimConfig, steps: int) -> list[str]:
    """Return a line on each learning rate that is 0 or ends near it, and on a warm-up that does not end in the run."""
    rates = {"optim.lr": optim.lr} | (
        {"optim.muon_lr": optim.muon_lr} if optim.name == "muon" else {}
    )
    lines = [
        f"{key} is 0, so no step changes the weights that have this rate; set a rate above 0"
        for key, rate in rates.items()
        if not rate
    ]
    end, peak = optim.min_lr, optim.lr
    if (
        optim.schedule != "constant"
        and isinstance(peak, float)
        and 0 < end < min(peak, _TINY_SHARE)
        and peak < 1
    ):
        lines.append(
            f"optim.min_lr is a share of the peak, so the rate ends at {end * peak:.2g}; if {end:g} is the rate "
            f"itself, set optim.min_lr={end / peak:.3g}"
        )
    warm = warmup_steps(optim.warmup, steps)
    if warm > steps:
        lines.append(
            f"the warm-up of {warm:,} steps is longer than the run, whose rate ends at {steps / warm:.0%} of its peak; "
            "lower optim.warmup (below 1 it is a share of the steps), or raise train.limit"
        )
    return lines


def remarks(trainer: Trainer, steps: int) -> list[str]:
    """Return a line on each thing that keeps a run from learning, with the setting that changes it.

    Args:
        trainer: of the run.
        steps: steps of the whole run.
    """
    train, data, held_out = trainer.train, trainer.train_data, trainer.eval_data
    lines = []
    if steps < _FEW_STEPS:
        lines.append(
            f"{steps} steps are few: most models learn little in less than {_FEW_STEPS}; raise train.limit, or lower "
            f"train.batch_rows ({train.batch_rows})"
        )
    documents = getattr(data, "num_documents", 0)
    if not documents:  # of prepared text only
        return lines
    epochs = steps * train.batch_rows / trainer.setup.plan.epoch_rows
    which, repeats = most_repeated(data)
    if (readings := epochs * repeats) > _MANY_EPOCHS:
        lines.append(
            f"{which} is read {readings:.0f} times: beyond {_MANY_EPOCHS} or so a model learns it by heart; more text "
            f"(data.train), {'a smaller share of it, ' * (repeats != 1)}or fewer steps (train.limit)"
        )
    if documents > 1 and getattr(held_out, "num_documents", 0) == 1:
        lines.append(
            "the held-out text is a single document, so its loss says little about other texts; hold out more with "
            "data.valid"
        )
    entries, tokens = (
        trainer.objective.model.backbone.vocab_size,
        int(getattr(data, "num_tokens", 0)),
    )
    if not trainer.about.get("parent") and tokens < _FEW_OCCURRENCES * entries:
        smaller = max(256, 1 << (max(1, tokens // (2 * _FEW_OCCURRENCES)).bit_length() - 1))
        if smaller < entries:
            lines.append(
                f"the vocabulary of {entries:,} is large for {tokens:,} tokens: an entry occurs {tokens / entries:.0f} "
                f"times on average, too few to learn it; about data.vocab_size {smaller} fits, or more text"
            )
    return lines


def most_repeated(data: Any) -> tuple[str, float]:
    """Return the text that is read most often, in words, and how often in one epoch; a mixture repeats some of it."""
    order = data.order() if isinstance(data, Rows) else None
    if not isinstance(order, MixtureOrder):
        return "every text", 1.0
    visited = zip(order.counts, data.stats["sources"], strict=True)
    repeats, name = max((count / s["rows"], str(s["name"])) for count, s in visited if count)
    return f"the text of {name}", repeats


def suggest(trainer: Trainer, epochs: float) -> str | None:
    """Return the settings that did better where a new next-token model sees little text a few times, if not in use.

    Measured by ``docs/recipes.py``; see "Small text" in docs/training.md.
    """
    own_text = isinstance(trainer.train_data, Rows) and not trainer.about.get("parent")
    untouched = trainer.optim.name == "adamw" and bool(trainer.lr_reason)
    if not (
        own_text
        and untouched
        and trainer.objective.head_kind == "causal-lm"
        and FEW_EPOCHS <= epochs <= MANY_EPOCHS
    ):
        return None
    # In fewer epochs a text is not learnt by heart, and these two cost more than they gain.
    many = epochs > SEVERAL_EPOCHS
    more = ", optim.weight_decay=1, dropout=0.1 in model.overrides" if many else ""
    return (
        f"hint: of text that is seen {epochs:.1f} times Muon learnt more in trials (optim.name=muon, optim.min_lr=0"
        f"{more})"
    )


def memory_needed(trainer: Trainer, *, resumed: bool) -> float:
    """Return the peak memory of this process in bytes: that of the largest batch, plus what the optimizer will add.

    The former is measured, because an estimate from model sizes misses libraries and the allocator, which take more
    than a small model.
    """
    estimate = trainer.setup.strategy.choice.memory
    later = 0.0 if estimate is None or resumed else estimate.moments
    return peak_memory(trainer.device) + later
