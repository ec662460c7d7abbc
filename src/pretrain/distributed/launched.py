"""Launched processes: how many of them, whether this is one, and which of them prints an error.

Run as a program by `pretrain.distributed.launch`, it is ``python -m pretrain`` for one process of a launch: it leaves
the error that ends it in a file, and stops when the launching process ends, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import signal
import threading
import time
from pathlib import Path

from pretrain import distributed
from pretrain.errors import ConfigError, PretrainError

__all__ = [
    "ERROR",
    "GRACE",
    "SCREEN",
    "cores",
    "count_devices",
    "launched",
    "launcher_number",
    "prints_error",
]

SCREEN = "PRETRAIN_SCREEN"
"""Environment variable with the path of the file to which the run relays its screen instead of drawing it."""
ERROR = "error.json"
GRACE = 600
"""Seconds within which a run that was asked to stop must save."""

_PROCESSES = 64  # most processes that are started on a CPU


def launched() -> bool:
    """Return whether a launcher such as torchrun started this process as one of several.

    Raises:
        ConfigError: a variable that launchers set holds no number.
    """
    return (launcher_number("WORLD_SIZE") or 1) > 1 and launcher_number("RANK") is not None


def launcher_number(variable: str) -> int | None:
    """Return the number in an environment variable of a launcher; None if it is not set, or empty.

    Some programs set -1 for a process that runs alone.

    Raises:
        ConfigError: it holds no number.
    """
    text = os.environ.get(variable, "").strip()
    if text and not re.fullmatch("-?[0-9]+", text):
        raise ConfigError(
            f"The environment variable {variable} is {text!r} and no whole number. Launchers such as torchrun set it "
            f"for each of several processes; if this one runs alone, unset it: unset {variable}"
        )
    return int(text) if text else None


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_devices(devices: int | str, device: str = "auto") -> int:
    """Return the number of processes that ``devices`` asks for.

    Args:
        devices: a number, or ``"auto"``: one process for each GPU, at least one.
        device: where they will run; on GPUs there cannot be more processes than GPUs.

    Raises:
        ConfigError: ``devices`` is not a number of at least 1, is more than the number of GPUs, far more than that of
            cores, or asks for several processes on Apple's GPU.
    """
    import torch

    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if devices == "auto":
        return max(1, gpus)
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise ConfigError(
            f'devices is {devices!r}; write a number of processes, or "auto" for one on each GPU.'
        )
    if gpus and devices > gpus:
        raise ConfigError(
            f"devices is {devices}, but this machine has {gpus} GPU{'s' * (gpus > 1)}, and each process needs one "
            "of its own. Ask for fewer, or set parallel.device=cpu."
        )
    if not gpus and devices > (most := max(_PROCESSES, 4 * cores())):
        raise ConfigError(
            f"devices is {devices}, but this machine has {cores()} cores, and each process needs one: {most} are the "
            "most that are started here. On the cores of several machines, start them with torchrun."
        )
    if devices > 1 and not gpus and device in ("auto", "mps") and torch.backends.mps.is_available():
        raise ConfigError(
            f"devices is {devices}, but this machine has one GPU, Apple's (mps), on which only one process can train. "
            "Leave devices out, or set parallel.device=cpu."
        )
    return devices


def prints_error(error: PretrainError) -> bool:
    """Return whether this process prints the error that ends its command: the lowest rank with that error does.

    Under a launcher it waits for other failing processes, for 2 seconds at most, and ignores SIGTERM from here on:
    when the first process has ended, the launcher sends SIGTERM to the others, which may not have printed theirs yet.
    """
    try:
        several = launched()
    except ConfigError:  # which is then what ends the command
        return True
    if not several:
        return True
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank = int(os.environ["RANK"])
    # Every process asks, because the others wait for its error.
    return distributed.is_first_error(error, rank) and not (rank > 0 and error.everywhere)


# ---------------------------------------------------------------------------------------------------- the program


def _stop_with_parent() -> None:
    """Stop this process when its standard input, a pipe from the launching process, is closed."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def _main() -> None:
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        runpy.run_module("pretrain", run_name="__main__", alter_sys=True)
    except PretrainError as error:
        path = Path(os.environ[SCREEN]).parent / os.environ["RANK"] / ERROR
        with contextlib.suppress(OSError):  # a full disk
            path.write_text(json.dumps([type(error).__name__, str(error)]), encoding="utf-8")
        raise


if __name__ == "__main__":
    _main()
