"""Last words of a pre-training run: what it took, what it reached, and the commands that go on from it."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from pretrain.config.spelling import either
from pretrain.errors import DataError
from pretrain.objectives.base import Objective, TokenObjective
from pretrain.printing import clock
from pretrain.report.history import sort_records
from pretrain.report.remarks import beside_frequencies, overfitted
from pretrain.report.run_report import write
from pretrain.training.state import Run

__all__ = ["last_words", "taken"]


def last_words(run: Run, objective: Objective, unigram: float | None) -> list[str]:
    """Write the report of a run and return the lines that are printed at its end.

    Args:
        run: the run, with everything saved.
        objective: what was trained.
        unigram: unigram baseline of the data in nats per token, or None.
    """
    if run.exit_code:
        return ["the same command again goes on from here"]
    return [*_reached(run, objective, unigram), *_report(run.path), *_next(run.path, objective)]


def taken(run: Run) -> str:
    """Return the time that a run took and the tokens that it has seen, "" if it has no step."""
    last = next((r for r in reversed(run.history) if "tokens" in r), None)
    if last is None:
        return ""
    seconds = clock(float(last["seconds"]))
    return f"{seconds} for {int(last['tokens']):,} {last.get('unit', 'tokens')}"


def _reached(run: Run, objective: Objective, unigram: float | None) -> list[str]:
    history, words = sort_records(run.history), [taken(run)]
    losses = [(loss, step) for step, loss in history.eval_points() if math.isfinite(loss)]
    if losses:
        loss, step = min(losses)
        words.append(f"best validation loss {loss:.4g} (step {int(step):,})")
        if unigram and isinstance(objective, TokenObjective):
            words.append(beside_frequencies(loss, unigram))
    remark = overfitted(run.history)
    return [", ".join(filter(None, words)), *([remark] if remark else [])]


def _report(path: Path) -> list[str]:
    try:
        return [f"report: {write(path)}"]
    except DataError as error:  # the run is complete without it
        return [str(error)]


def _next(path: Path, objective: Objective) -> list[str]:
    """Return what can be done with the model, in the spelling of the interface in use."""
    model: Any = objective.model
    quoted, loaded = shlex.quote(str(path)), f"pretrain.load({str(path)!r})"
    ways = []
    if model.tokenizer is not None and model.head_kind == "causal-lm":
        ways.append(
            (f'pretrain generate {quoted} "Once upon a time"', f'{loaded}.generate("Once upon a time")')
        )  # fmt: skip
    elif model.tokenizer is not None and model.head_kind == "masked-lm":
        text = f'"The {model.tokenizer.decode([model.tokenizer.mask_id], skip_special=False)} of the day."'
        ways.append((f"pretrain fill-mask {quoted} {text}", f"{loaded}.fill_mask({text})"))
    if model.tokenizer is not None:
        ways.append(
            (
                f"pretrain finetune --model {quoted} --data labelled.csv --task TASK",
                f'pretrain.finetune({str(path)!r}, "labelled.csv", TASK)',
            )
        )
    return ["next:", *(f"    {either(*way)}" for way in ways)] if ways else []
