"""Runs on several processes of this machine, launched and displayed by the calling process.

Rank zero relays its screen output as JSON lines, and the calling process draws it: in the cell of a notebook or as a
progress bar in a terminal. The result is read from the run directory.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain import distributed
from pretrain.checkpoint import latest
from pretrain.checkpoint.resolve import RESULT
from pretrain.distributed.launched import count_devices, launched
from pretrain.errors import ConfigError, Interrupted
from pretrain.training.live import open_screen
from pretrain.training.progress import Progress, Silence
from pretrain.training.relay import replay
from pretrain.training.state import Run, RunState, catch_signals, last_metrics
from pretrain.utils.files import note, printable
from pretrain.utils.run_log import open_log

__all__ = ["on_devices", "read_run"]

_PAUSE = 0.1  # seconds between two reads of the relayed output


def on_devices(
    command: str,
    settings: Any,
    devices: int | str,
    *,
    hooks: Sequence[Any] = (),
    quiet: bool = False,
) -> Run | None:
    """Run a command with these settings on several processes of this machine.

    Args:
        command: ``train`` or ``finetune``.
        settings: a ``RunConfig`` or a ``TuneConfig`` whose ``train.out`` is set.
        devices: number of processes, or ``"auto"``.
        hooks: hooks of the caller; must be empty, because other processes do not have these functions.
        quiet: show nothing.

    Returns:
        The run; None if the caller must run it: with one process only, or if a launcher started this process.

    Raises:
        ConfigError: that many processes cannot be started, or there are hooks.
        PretrainError: the run failed.
    """
    count = count_devices(devices, settings.parallel.device)
    if launched():
        started = int(os.environ["WORLD_SIZE"])
        if count in (1, started) or devices == "auto":
            return None
        raise ConfigError(
            f"devices is {count}, but this process is already one of {started} that a launcher started. Leave "
            "devices out: the launcher sets the number of processes."
        )
    if count == 1:
        return None
    if hooks:
        raise ConfigError(
            f"hooks are functions of this process, and devices={count} starts others, which cannot call them. Write "
            f"a script that calls pretrain.{command}(..., hooks=[...]) and start it with: torchrun --nproc-per-node "
            f"{count} script.py"
        )
    with tempfile.TemporaryDirectory(prefix="pretrain-") as folder:
        path = settings.save(Path(folder) / f"{command}.yaml")
        words = [command, "--config", os.fspath(path)]
        threads = settings.parallel.threads
        return _follow(words, Path(settings.train.out), count, threads, quiet)


def _follow(words: Sequence[str], out: Path, devices: int, threads: int, quiet: bool) -> Run:
    """Run ``pretrain`` with these arguments on several processes, show the progress, and return the run.

    The first SIGINT or SIGTERM makes the run save and stop; see ``catch_signals`` for a second one.

    Raises:
        PretrainError: the error or last output of the first process that failed, also if it failed while stopping.
    """
    with catch_signals() as stop, distributed.Launched(words, devices, threads) as group:
        screen = Silence() if quiet else open_screen()
        asked = False
        try:
            while group.running():
                if stop.name is not None and not asked:
                    asked = True
                    group.stop()
                    screen.write(
                        f"{stop.name}: the run saves and stops; a second signal after two seconds ends it at once"
                    )
                _pass_on(group, screen, out)
                time.sleep(_PAUSE)
            _pass_on(group, screen, out)
        finally:
            screen.close()
        stopped = stop.name or group.stopped()
        if group.failures and (stopped is None or group.failed_to_stop()):
            raise group.failure()
    return read_run(out, stopped if group.failures else None)


def _pass_on(group: distributed.Launched, screen: Progress, out: Path) -> None:
    """Show what rank zero has relayed or printed since the last call."""
    for update in group.screen_updates():
        replay(update, screen, out)
    for line in group.printed_lines():
        screen.write(printable(line))


def read_run(out: Path, stopped: str | None = None) -> Run:
    """Return the run in a directory, as ``fit`` would have returned it.

    Args:
        out: run directory.
        stopped: the signal that ended it; None takes the reason from its state.

    Raises:
        ConfigError: the directory has no complete checkpoint.
        Interrupted: the run was stopped by a signal before its first checkpoint.
    """
    checkpoint = latest(out)
    if checkpoint is None:
        if stopped is not None:
            raise Interrupted(128 + getattr(signal, stopped))
        raise ConfigError(f"{out} holds no complete checkpoint.")
    plain = json.loads((checkpoint / "training" / "state.json").read_text(encoding="utf-8"))
    state = RunState.from_json(plain.get("run", plain))
    found = open_log(out / "log.jsonl", state.log)
    if found.damage:
        note(f"{out / 'log.jsonl'} is damaged and shown in part: {found.damage}.", once=True)
    history = found.records
    ended = "limit" if state.step >= state.total_steps else "patience"
    return Run(
        path=out,
        step=state.step,
        stopped=stopped or ended,
        metrics=last_metrics(history),
        history=history,
        checkpoint=checkpoint,
        best=state.best_kept(out, checkpoint),
        result=out / RESULT if (out / RESULT).is_dir() else None,
    )
