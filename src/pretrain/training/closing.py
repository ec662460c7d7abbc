"""Closing lines of a pre-training run: its time and tokens, its best loss, and the commands to try next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.config.spelling import either
from pretrain.errors import DataError
from pretrain.objectives.base import Objective, TokenObjective
from pretrain.printing import clock
from pretrain.report.history import sort_records
from pretrain.report.remarks import compare_with_unigram, overfitted
from pretrain.report.run_report import write
from pretrain.training.state import Run
from pretrain.utils.run_log import NATS

__all__ = ["closing_lines", "reported", "time_and_units"]

# Task with a class for each row -> example name of its rows, in the commands that are suggested.
_LABELLED = {"image-classification": "photos", "audio-classification": "recordings"}


def closing_lines(run: Run, objective: Objective, unigram: float | None) -> list[str]:
    """Write the report of a run and return the lines that are printed at its end.

    Args:
        run: the run, with everything saved.
        objective: what was trained.
        unigram: unigram baseline of the data in nats per token, or None.
    """
    if run.exit_code:
        return ["run the same command again to continue from here"]
    page = reported(lambda: write(run.path))
    return [*_reached(run, objective, unigram), *page, *_next(run.path, objective)]


def time_and_units(run: Run) -> str:
    """Return the wall time of a run and the tokens (or other units) that it has seen; "" for a run without a step."""
    last = next((r for r in reversed(run.history) if "tokens" in r), None)
    if last is None:
        return ""
    seconds = clock(float(last["seconds"]))
    return f"{seconds} for {int(last['tokens']):,} {last.get('unit', 'tokens')}"


def _reached(run: Run, objective: Objective, unigram: float | None) -> list[str]:
    history, words = sort_records(run.history), [time_and_units(run)]
    losses = [(y, x) for x, y in history.eval_points(alike=True) if math.isfinite(y)]
    if losses:
        loss, step = min(losses)
        best = "best " * (len(losses) == len(history.evals))
        words.append(
            f"{best}validation loss {loss:.4g} (step {int(step):,}{'' if best else ', all rows'})"
        )
        if unigram and isinstance(objective, TokenObjective) and objective.loss_unit == NATS:
            words.append(compare_with_unigram(loss, unigram))
    remark = overfitted(history)
    return [", ".join(filter(None, words)), *([remark] if remark else [])]


def reported(write: Callable[[], Path]) -> list[str]:
    """Return the line that names the report of a run, or why there is none: the run is complete without it."""
    try:
        return [f"report: {write()}"]
    except DataError as error:
        return [str(error)]


def _next(path: Path, objective: Objective) -> list[str]:
    """Return what can be done with the model, in the spelling of the interface in use."""
    model: Any = objective.model
    backbone, kind, words = model.backbone, model.head_kind, model.tokenizer
    heads = {*backbone.architectures, *backbone.successors}
    quoted, loaded = shlex.quote(str(path)), f"pretrain.load({str(path)!r})"
    task, rows = next(
        (way for way in _LABELLED.items() if way[0] in heads), ("TASK", "labelled.csv")
    )
    if backbone.default_task is not None:
        task, rows = backbone.default_task, "pairs.csv"
    ways = []
    if words is not None and kind == "causal-lm":
        ways.append(
            (f'pretrain generate {quoted} "Once upon a time"', f'{loaded}.generate("Once upon a time")')
        )  # fmt: skip
    elif words is not None and kind == "masked-lm":
        text = f'"The {words.decode([words.mask_id], skip_special=False)} of the day."'
        ways.append((f"pretrain fill-mask {quoted} {text}", f"{loaded}.fill_mask({text})"))
    elif kind == task:
        ways.append((f"pretrain predict {quoted} {rows}", f"{loaded}.predict(FILES)"))
    elif backbone.default_task is not None:
        ways.append(
            (f"pretrain predict {quoted} photos --labels [cat,dog]",
             f'{loaded}.predict(FILES, labels=["cat", "dog"])')
        )  # fmt: skip
    if words is not None or task != "TASK":
        ways.append(
            (
                f"pretrain finetune --model {quoted} --data {rows} --task {task}",
                f"pretrain.finetune({str(path)!r}, {rows!r}, {'TASK' if task == 'TASK' else repr(task)})",
            )
        )
    if "image-classification" in heads:
        ways.append((f"pretrain probe {quoted} photos", f"pretrain.probe({str(path)!r}, 'photos')"))
    return ["next:", *(f"    {either(*way)}" for way in ways)] if ways else []
