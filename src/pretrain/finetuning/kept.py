"""Scores of a comparison in its run directory: an interrupted one goes on, and a page made anew shows it.

``comparison.json`` holds a digest of itself, the key of what is compared, the scores of every finished trial and, in
the end, the comparison. A damaged file is named and not used; one of another key is replaced by the next comparison.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint.best import COMPARISON, write_choice
from pretrain.distributed.world import current_world
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.utils.files import note, read_bytes
from pretrain.utils.strict_json import unsealed, without_nan

__all__ = ["Kept"]


class Kept:
    """The file of one run directory; all ranks call the methods, and rank zero reads and writes.

    Args:
        out: the run directory.

    Attributes:
        body: content of the file: ``key``, ``trials``, and ``comparison`` with ``lr`` (and ``muon_lr``) once all trials
            are finished; empty if there is none.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / COMPARISON
        self.body: dict[str, Any] = current_world().broadcast_result(self._read)

    def _read(self) -> dict[str, Any]:
        if not os.path.lexists(self.path):
            return {}
        try:
            body = unsealed(read_bytes(self.path), self.path)
            trials = body.get("trials")
            if not isinstance(trials, dict) or not all(map(_is_trial, trials.values())):
                raise CheckpointCorrupt(self.path, "the scores of trials", repr(trials)[:60])
        except CheckpointError as error:
            note(f"{error} This file holds the scores of a comparison; they are not used.")
            return {}
        return body

    def begin(self, key: str) -> None:
        """Drop what is kept of another comparison."""
        if self.body.get("key") != key:
            self.body = {"key": key, "trials": {}}

    def trial(self, name: str, train: Callable[[], list[float]]) -> tuple[list[float], float]:
        """Return the scores of a trial and its seconds; ``train`` is called if they are not kept."""
        found = self.body["trials"].get(name)
        if found is None:
            began = time.monotonic()
            scores = train()
            found = self.body["trials"][name] = [*scores, time.monotonic() - began]
            self._write()
        *scores, seconds = (math.nan if value is None else float(value) for value in found)
        return scores, seconds

    def end(self, comparison: dict[str, Any], rates: Mapping[str, float]) -> None:
        """Keep the finished comparison and the learning rates that it chose for the run."""
        self.body |= {"comparison": comparison, **rates}
        self._write()

    def _write(self) -> None:
        current_world().on_rank_zero(lambda: write_choice(self.path, without_nan(self.body)))


def _is_trial(value: object) -> bool:
    """Whether a value is two scores, of which None is no number, and the seconds."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(one is None or isinstance(one, int | float) for one in value)
    )
