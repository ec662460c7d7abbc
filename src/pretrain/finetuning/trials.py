"""Trials of a job: the scores of short runs that choose its learning rate or compare it, kept in the run directory."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import finetuning
from pretrain.checkpoint.best import COMPARISON, TRIALS, rates_of_run, write_choice
from pretrain.distributed.world import current_world
from pretrain.errors import CheckpointCorrupt, CheckpointError, Interrupted
from pretrain.training.resuming import resumable, run_key
from pretrain.utils.files import note, read_bytes
from pretrain.utils.strict_json import unsealed, without_nan

if TYPE_CHECKING:
    from pretrain.finetuning.compare import Comparison
    from pretrain.finetuning.job import Job

__all__ = ["ScoreFile", "kept_comparison", "kept_trials_named", "trials_key"]


class ScoreFile:
    """File of the scores of trials in a run directory, from which an interrupted sweep or comparison continues.

    The file holds a digest of itself, the key of what is tried, the scores of every finished trial and, in the end,
    the comparison, from which a later report is made. A damaged file is reported and not used; one with another key
    is replaced by the next trials. All ranks call the methods, and rank zero reads and writes.

    Args:
        path: the file, ``trials.json`` or ``comparison.json``.
        scores: how many scores each trial has.

    Attributes:
        body: content of the file: ``key``, ``trials``, and ``comparison`` with ``lr`` (and ``muon_lr``) once all trials
            of one are finished; empty if there is none.
    """

    def __init__(self, path: Path, scores: int = 2) -> None:
        self.path, self._scores = path, scores
        self.body: dict[str, Any] = current_world().broadcast_result(self._read)

    def _read(self) -> dict[str, Any]:
        if not os.path.lexists(self.path):
            return {}
        try:
            body = unsealed(read_bytes(self.path), self.path)
            trials = body.get("trials")
            if not isinstance(trials, dict) or not all(map(self._is_trial, trials.values())):
                raise CheckpointCorrupt(self.path, "the scores of trials", repr(trials)[:60])
        except CheckpointError as error:
            note(f"{error} This file holds the scores of trials; they are not used.")
            return {}
        return body

    def begin(self, key: str) -> None:
        """Drop the scores of trials with another key."""
        if self.body.get("key") != key:
            self.body = {"key": key, "trials": {}}

    def trial(self, name: str, train: Callable[[], list[float]]) -> tuple[list[float], float]:
        """Return the scores of a trial and its seconds; ``train`` is called if the file has none.

        Raises:
            Interrupted: see `interrupts_explained`.
        """
        recorded = self.body["trials"].get(name)
        if recorded is None:
            began = time.monotonic()
            with self.interrupts_explained():
                scores = train()
            recorded = self.body["trials"][name] = [*scores, time.monotonic() - began]
            self._write()
        *scores, seconds = (math.nan if value is None else float(value) for value in recorded)
        return scores, seconds

    def end(self, comparison: dict[str, Any], rates: Mapping[str, float]) -> None:
        """Keep the finished comparison and the learning rates that it chose for the run."""
        self.body |= {"comparison": comparison, **rates}
        self._write()

    def _write(self) -> None:
        current_world().on_rank_zero(lambda: write_choice(self.path, without_nan(self.body)))

    def _is_trial(self, value: object) -> bool:
        """Whether a value is the scores of a trial, of which None is no number, and the seconds."""
        return (
            isinstance(value, list)
            and len(value) == self._scores + 1
            and all(score is None or isinstance(score, int | float) for score in value)
        )

    @contextlib.contextmanager
    def interrupts_explained(self) -> Iterator[None]:
        """Say in an interruption inside the block what is kept.

        Raises:
            Interrupted: in the place of every KeyboardInterrupt.
        """
        try:
            yield
        except KeyboardInterrupt as error:
            code = error.code if isinstance(error, Interrupted) else 128 + signal.SIGINT
            text, done = "No trial was finished, so nothing is kept.", len(self.body["trials"])
            if done:
                text = f"{self.path} keeps the scores of finished trials ({done:,}); the same command goes on."
            raise Interrupted(code, text) from error


@contextlib.contextmanager
def kept_trials_named(out: Path) -> Iterator[None]:
    """Say in an interruption inside the block, before the run has made a step, which scores of trials it keeps.

    Raises:
        Interrupted: in the place of another one, with more text.
    """
    try:
        yield
    except Interrupted as error:
        kept = [str(out / name) for name in (TRIALS, COMPARISON) if (out / name).is_file()]
        if not kept:
            raise
        text = f"{error} The learning rate need not be searched again: its trials are kept in {' and '.join(kept)}."
        raise Interrupted(error.code, text.strip()) from error


def trials_key(job: Job) -> str:
    """Hash of what all trials have in common: rows, weights, and settings that change a result."""
    if job.weights is None:
        job.build(seed=0)
    # The weights and the fingerprint stand for the places of the model and of the rows.
    left_out = {"model.checkpoint", "data.train", "data.valid", "data.test", "optim.lrs"}
    left_out |= resumable(job.settings)
    settings = {
        f"{section}.{name}": value
        for section, values in job.settings.to_dict().items()
        for name, value in values.items()
        if f"{section}.{name}" not in left_out and value is not None
    }
    return run_key({**settings, "weights": job.weights}, job.data.fingerprint)


def kept_comparison(job: Job) -> Comparison | None:
    """Return the comparison in the run directory of a job; None if it is of other settings or another run."""
    out = Path(job.settings.train.out)
    body = ScoreFile(out / COMPARISON).body
    if (
        "comparison" not in body
        or body["key"] != trials_key(job)
        or body["lr"] != rates_of_run(out).get("lr")
    ):
        return None
    return finetuning.Comparison.from_json(body["comparison"])
