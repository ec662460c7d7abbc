"""Last words of a fine-tuning run: its figures, its report, and the commands that go on from it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from pretrain.config.spelling import either
from pretrain.errors import DataError
from pretrain.finetuning.card import example_call
from pretrain.training.closing import taken

if TYPE_CHECKING:
    from pretrain.finetuning.result import Finetuned

__all__ = ["follow_up", "last_words"]


def last_words(result: Finetuned) -> list[str]:
    """Write the report of a run that has come to its end, and return the lines that are printed then."""
    comparison = result.comparison
    return [
        *repr(result).splitlines(),
        taken(result.run),
        *(comparison.table().splitlines() if comparison is not None else []),
        *(_report(result) if not result.run.exit_code else []),
        *follow_up(result),
    ]


def _report(result: Finetuned) -> list[str]:
    try:
        return [f"report: {result.report()}"]
    except DataError as error:  # the run is complete without it
        return [str(error)]


def follow_up(result: Finetuned) -> list[str]:
    """Return what can be done with the model, in the spelling of the interface in use."""
    path, task, kind = str(result.path), result.task.name, result.model.head_kind
    place = shlex.quote(path)
    call = example_call(result)
    ways = [(f"pretrain predict {place} FILE", call)]
    if task in ("chat", "preference"):
        ways = [(f"pretrain chat {place}", call), (f'pretrain generate {place} "Hello" --chat', "")]
    elif task == "language-modelling":
        name = "generate" if kind == "causal-lm" else "fill-mask"
        ways = [(f"pretrain {name} {place} TEXT", call)]
    elif task == "embedding":
        ways = [(f"pretrain embed {place} FILE --out vectors.npy", call)]
    lines = [either(way, f"pretrain.load({path!r}).{call}" if call else "") for way, call in ways]
    evaluate = (f"pretrain evaluate {place} --data FILE", f"pretrain.evaluate({path!r}, ROWS)")
    return ["next:", *(f"    {line}" for line in [*lines, either(*evaluate)] if line)]
