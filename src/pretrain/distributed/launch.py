"""Launching of several processes on this machine from a notebook, a script, or `--devices` on the command line.

The launching process starts and ends them itself, with the environment that `torchrun` would give them, because it must
know their exit codes in order and let them save for longer than torchrun waits. Their standard input is a pipe from
it, so that all of them stop when it ends, however it ends. Their output goes to files; that of rank 0 is followed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.distributed.launched import ERROR, GRACE, SCREEN, cores
from pretrain.distributed.watchdog import EXIT_LOST
from pretrain.errors import DistributedError, PretrainError, named_error

__all__ = ["Launched"]

_HURRY = 30  # seconds for the remaining processes to end after one has failed
_TAIL = 25  # last lines of output that are shown for a failure
_NOISE = re.compile(
    r"^(\[rank\d+\]:)?\[?[WIE]\d{3,} |^\[[WI]\d|socket\.cpp|^\[Gloo\]|resource_tracker\.py:|^Exception ignored "
)
_RANK = re.compile(r"^\[rank\d+\]: ?", re.M)  # before traceback lines if there is a process group
_RAISED = "Traceback (most recent call last):"
# Exit codes of processes that were asked to stop: they saved and ended, or had not installed their handlers yet.
_STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP, -signal.SIGTERM}


class Launched:
    """A ``pretrain`` command in several processes; a context manager that ends all of them on exit.

    Args:
        words: arguments of the command line after ``pretrain``.
        devices: number of processes.
        threads: CPU threads of each process; 0 is an equal share of the cores.

    Attributes:
        folder: directory of the output of the processes; removed on exit unless ``keep`` is True.
        failures: rank -> exit code of the processes that failed, in the order in which they ended.

    Raises:
        DistributedError: the system refuses to start them.
    """

    def __init__(self, words: Sequence[str], devices: int, threads: int = 0) -> None:
        self.devices, self.keep = devices, False
        self.folder = Path(tempfile.mkdtemp(prefix="pretrain-"))
        self.failures: dict[int, int] = {}
        self._asked = self._raised = False
        self._deadline = math.inf
        self._processes: list[subprocess.Popen[bytes]] = []
        screen = self.folder / "screen.jsonl"
        screen.touch()
        command = [sys.executable, "-m", "pretrain.distributed.launched", *words]
        env = _environment(devices, threads, screen)
        try:
            for rank in range(devices):
                self._processes.append(self._start(rank, command, env))
        except OSError as error:
            self.__exit__()
            raise DistributedError(
                f"Process {rank} of {devices} could not be started: {error.strerror or error}."
            ) from error
        self._screen = _Tail(screen)
        self._output = [_Tail(self.folder / "0" / name) for name in ("stdout.log", "stderr.log")]

    def _start(self, rank: int, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        logs = self.folder / str(rank)
        logs.mkdir()
        with open(logs / "stdout.log", "wb") as out, open(logs / "stderr.log", "wb") as err:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closed when this process ends
                stdout=out,
                stderr=err,
                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,  # Ctrl-C must reach this process only, which passes it on
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def running(self) -> bool:
        """Return whether a process still runs. When one has failed, the others are ended within half a minute."""
        hurried = not self._asked and bool(self.failures)
        for rank, process in enumerate(self._processes):
            code = process.poll()
            # A process that this one has ended by a signal did not fail.
            if code and rank not in self.failures and not (hurried and code < 0):
                self.failures[rank] = code
        if self.failures and self._deadline == math.inf:
            self._end(_HURRY)
        elif time.monotonic() > self._deadline:
            self._signal(signal.SIGKILL)
        return any(process.returncode is None for process in self._processes)

    def stop(self) -> None:
        """Ask the run to save and end."""
        if not self.failures:
            self._asked = True
            self._end(GRACE)

    def _end(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        """Send a signal to the processes that still run, and to those that they have started."""
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)

    def screen_updates(self) -> Iterator[dict[str, Any]]:
        """Yield the screen updates that rank 0 has relayed since the last call."""
        for line in self._screen.lines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def printed_lines(self) -> Iterator[str]:
        """Yield the lines that rank 0 has printed since the last call, without library noise and tracebacks."""
        for tail in self._output:
            for line in tail.lines():
                self._raised |= line.startswith(_RAISED)
                if line.strip() and not (self._raised or _RANK.match(line) or _NOISE.search(line)):
                    yield line

    def stopped(self) -> str | None:
        """Return the name of the signal by which all processes were asked to stop from outside, or None."""
        codes = set(self.failures.values())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # A process without a handler yet is ended by the SIGTERM that follows the end of the first one.
            if 128 + number in codes and codes <= {128 + number, -signal.SIGTERM}:
                return number.name
        return None

    def failed_to_stop(self) -> bool:
        """Return whether a run that was asked to stop failed instead, e.g. could not save because the disk is full."""
        codes = set(self.failures.values())
        others = codes - _STOPPED
        if -signal.SIGTERM in codes and all(code > 0 for code in others):
            # A process that SIGTERM ended before it had a handler causes a DistributedError in the others: no failure.
            return any(not isinstance(error, DistributedError) for error in self._own_errors())
        return bool(others)

    def failure(self) -> PretrainError:
        """Return the error that ended the run, as raised by the process that failed first."""
        rank, code = min(self.failures.items(), key=lambda item: _blame(item[1]))
        if code > 0 and (own := self._own_errors()):
            return own[0]
        self.keep = True
        return DistributedError(
            f"Process {rank} of {self.devices} {_ended(code, self._asked)}. Its last lines:\n"
            f"{_last(self.folder / str(rank) / 'stderr.log')}\nThe output of all processes lies in {self.folder}."
        )

    def _own_errors(self) -> list[PretrainError]:
        """Return the PretrainErrors that processes ended with, the most informative first."""
        errors = []
        for rank in range(self.devices):
            with contextlib.suppress(OSError, ValueError):
                path = self.folder / str(rank) / ERROR
                errors.append(named_error(*json.loads(path.read_text(encoding="utf-8"))))
        # A DistributedError often only reports the failure of another process, whose own error says more.
        return sorted(errors, key=lambda error: isinstance(error, DistributedError))


class _Tail:
    """Reader of the complete lines of a growing file; each state of a progress bar is one."""

    def __init__(self, path: Path) -> None:
        self._path, self._position, self._rest = path, 0, b""

    def lines(self) -> list[str]:
        with open(self._path, "rb") as file:
            file.seek(self._position)
            *whole, self._rest = (self._rest + file.read().replace(b"\r", b"\n")).split(b"\n")
            self._position = file.tell()
        return [line.decode("utf-8", "replace") for line in whole]


def _environment(devices: int, threads: int, screen: Path) -> dict[str, str]:
    """Return the environment of the started processes: that of this process, with what torchrun sets on one host.

    The processes get a share of the cores, the module paths of this process, and loopback as their network. Variables
    of an outer launcher are replaced.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    env |= {"WORLD_SIZE": str(devices), "LOCAL_WORLD_SIZE": str(devices)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    env |= {SCREEN: str(screen), "PRETRAIN_DEBUG": "1", "PYTHONUNBUFFERED": "1"}
    if threads or "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(threads or max(1, cores() // devices))
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", loopback)  # default: interface of the host name
    standard = {os.path.realpath(path) for path in sysconfig.get_paths().values()}
    paths = [os.path.abspath(path) for path in sys.path if path and os.path.isdir(path)]
    added = [p for p in paths if not any(os.path.realpath(p).startswith(s) for s in standard)]
    env["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([*added, *env.get("PYTHONPATH", "").split(os.pathsep)])
    ).strip(os.pathsep)
    return env


def _free_port() -> int:
    """Return a free port of this host below those that the system gives to connections (Linux, macOS)."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise DistributedError("No port between 20000 and 32000 is free on this machine.")


def _blame(code: int) -> int:
    """Return the place of an exit code in the search for the first failure; lower ones are likelier the cause."""
    if code < 0:  # the others have lost their connection to a process that was killed
        return 4 if code == -signal.SIGTERM else 0
    # A survivor may end before the process that raised the error; a process that stopped as asked has none.
    return 3 if code in _STOPPED else 2 if code == EXIT_LOST else 1


def _ended(code: int, asked: bool) -> str:
    if code >= 0:
        return f"failed with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
    why = ""
    if -code == signal.SIGKILL:
        late = f", or it had not saved {GRACE} s after it was asked to stop" if asked else ""
        why = f" (probably the memory of the machine ran out{late})"
    return f"was killed by {name}{why}"


def _last(path: Path) -> str:
    try:
        lines = _RANK.sub("", path.read_text(encoding="utf-8", errors="replace")).splitlines()
    except OSError:
        lines = []
    shown = [line for line in lines if line.strip() and not _NOISE.search(line)]
    return "\n".join(f"    {line[:400]}" for line in shown[-_TAIL:]) or "    (nothing)"
