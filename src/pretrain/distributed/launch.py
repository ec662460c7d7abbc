"""Launching of several processes on this machine from a notebook, a script, or `--devices` on the command line.

The processes are started by `torchrun`, inside a keeper process (this module, run as a program). The keeper's standard
input is a pipe from the launching process, so that all processes end when that one does, however it ends. The keeper
also records the order in which processes failed. Output of the processes goes to files; that of rank 0 is followed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pretrain.distributed.watch import EXIT_LOST
from pretrain.errors import ConfigError, DistributedError, PretrainError, named_error

__all__ = ["SCREEN", "Launched", "count_devices"]

# Environment variable with the path of the file to which the run relays its screen instead of drawing it.
SCREEN = "PRETRAIN_SCREEN"
_GRACE = 600  # seconds within which a run that was asked to stop must save
_HURRY = 30  # seconds for the remaining processes to end after one has failed
_TAIL = 25  # last lines of output that are shown for a failure
_NOISE = re.compile(
    r"^(\[rank\d+\]:)?\[?[WIE]\d{3,} |^\[[WI]\d|^\*{5,}|^W\d{4} |socket\.cpp|^\[Gloo\]|OMP_NUM_THREADS"
    r"|resource_tracker\.py:|^Exception ignored "
)
_OURS = re.compile(r"^(\[rank\d+\]: )?pretrain\.errors\.(\w+): ")
_RANK = re.compile(r"^\[rank\d+\]: ?", re.M)  # before traceback lines if there is a process group
_RAISED = "Traceback (most recent call last):"
# Exit codes of processes that were asked to stop: they saved and ended, or had not installed their handlers yet.
_STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP, -signal.SIGTERM}
_PROC = Path("/proc")  # exists on Linux only


def count_devices(devices: int | str, device: str = "auto") -> int:
    """Return the number of processes that ``devices`` asks for.

    Args:
        devices: a number, or ``"auto"``: one process for each GPU, at least one.
        device: where they will run; on GPUs there cannot be more processes than GPUs.

    Raises:
        ConfigError: ``devices`` is not a number of at least 1, is more than the number of GPUs, or asks for several
            processes on Apple's GPU.
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
    if devices > 1 and not gpus and device in ("auto", "mps") and torch.backends.mps.is_available():
        raise ConfigError(
            f"devices is {devices}, but this machine has one GPU, Apple's (mps), on which only one process can train. "
            "Leave devices out, or set parallel.device=cpu."
        )
    return devices


class Launched:
    """A ``pretrain`` command in several processes; a context manager that ends all of them on exit.

    Args:
        words: arguments of the command line after ``pretrain``.
        devices: number of processes.
        threads: CPU threads of each process; 0 is an equal share of the cores.

    Attributes:
        folder: directory of the output of the processes; removed on exit unless ``keep`` is True.
        screen: file to which rank 0 relays its screen.
    """

    def __init__(self, words: Sequence[str], devices: int, threads: int = 0) -> None:
        self.devices, self.keep = devices, False
        self.folder = Path(tempfile.mkdtemp(prefix="pretrain-"))
        self.screen = self.folder / "screen.jsonl"
        self._readers: dict[str, _Tail] = {}
        self._workers: set[int] = set()
        self._looked, self._raised, self._asked = 0.0, False, False
        command = [sys.executable, "-m", "pretrain.distributed.launch", str(self.folder)]
        # Without --local-addr, torchrun uses the address that the host name resolves to, which may be unreachable.
        command += ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(devices)]
        command += ["--log-dir", str(self.folder), "--redirects", "3"]
        command += ["-m", "pretrain", *words]
        with open(self.folder / "launcher.log", "wb") as log:
            self._keeper = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(devices, threads, self.screen),
                start_new_session=True,  # Ctrl-C must reach this process only, which passes it on
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for tail in self._readers.values():
            tail.close()
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def running(self) -> bool:
        """Return whether the processes run; records their ids, so that they can be killed without their keeper."""
        if self._keeper.poll() is not None:
            return False
        if time.monotonic() - self._looked > 1.0:
            self._looked = time.monotonic()
            self._workers |= _children(self._keeper.pid)
        return True

    def stop(self) -> None:
        """Ask the run to save and end."""
        self._asked = True
        with contextlib.suppress(ProcessLookupError):
            self._keeper.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill all processes that still run."""
        if self._keeper.poll() is None:
            self._workers |= _children(self._keeper.pid)
            self._keeper.kill()
        for pid in self._workers:
            if _is_ours(pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
        self._keeper.wait()
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()

    @property
    def code(self) -> int:
        """Wait for the keeper to end, and return its exit code."""
        return int(self._keeper.wait())

    def told(self) -> Iterator[dict[str, Any]]:
        """Yield the screen updates that rank 0 has relayed since the last call."""
        for line in self._follow("screen", self.screen):
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def said(self) -> Iterator[str]:
        """Yield the lines that rank 0 has printed since the last call, without library noise and tracebacks."""
        for name in ("stdout", "stderr"):
            path = self._log(0, name)
            for line in () if path is None else self._follow(name, path):
                self._raised |= line.startswith(_RAISED)
                if line.strip() and not (self._raised or _RANK.match(line) or _NOISE.search(line)):
                    yield line

    def stopped(self) -> str | None:
        """Return the name of the signal by which all processes were asked to stop from outside, or None."""
        codes = {int(failure["code"]) for failure in self._failures()}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # torchrun sends SIGTERM to the processes that have not ended yet.
            if 128 + number in codes and codes <= {128 + number, -signal.SIGTERM}:
                return number.name
        return None

    def broke(self) -> bool:
        """Return whether a run that was asked to stop failed instead, e.g. could not save because the disk is full."""
        codes = {int(failure["code"]) for failure in self._failures()}
        others = codes - _STOPPED
        if -signal.SIGTERM in codes and all(code > 0 for code in others):
            # A process that SIGTERM ended before it had a handler causes a DistributedError in the others: no failure.
            return any(not isinstance(error, DistributedError) for error in self._own_errors())
        return bool(others)

    def failure(self) -> PretrainError:
        """Return the error that ended the run, as raised by the process that failed first."""
        found = self._first_failure()
        if (found is None or found["code"] > 0) and (own := self._own_errors()):
            return own[0]
        self.keep = True
        if found is None:
            text = _last(self.folder / "launcher.log")
            return DistributedError(
                f"The processes could not be started (exit code {self.code}). The launcher said:\n{text}"
            )
        rank, code = int(found["rank"]), int(found["code"])
        path = self._log(rank, "stderr")
        return DistributedError(
            f"Process {rank} of {self.devices} {_ended(code, self._asked)}. Its last lines:\n{_last(path)}\nThe "
            f"output of all processes lies in {self.folder}."
        )

    def _own_errors(self) -> list[PretrainError]:
        """Return the PretrainErrors that processes ended with, the most informative first."""
        own = [error for r in range(self.devices) if (error := self._raised_by(r)) is not None]
        # A DistributedError often only reports the failure of another process, whose own error says more.
        return sorted(own, key=lambda error: isinstance(error, DistributedError))

    def _raised_by(self, rank: int) -> PretrainError | None:
        """Return the PretrainError that a process ended with, or None."""
        path = self._log(rank, "stderr")
        if path is None:
            return None
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [(n, match) for n, line in enumerate(lines) if (match := _OURS.match(line))]
        if not found:
            return None
        start, match = found[-1]
        before, said = match[1] or "", [lines[start][match.end() :]]
        for line in lines[start + 1 :]:  # libraries may print further lines after the message
            if not line.startswith(before) or _NOISE.search(line):
                break
            said.append(line.removeprefix(before))
        return named_error(match[2], "\n".join(said).strip())

    def _failures(self) -> list[dict[str, Any]]:
        """Return rank and exit code of the processes that failed, in the order in which they failed."""
        try:
            return list(json.loads((self.folder / "failures.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return []

    def _first_failure(self) -> Mapping[str, Any] | None:
        failures = self._failures()
        # A process that was killed is the cause; the others then lost their connection to it.
        killed = [f for f in failures if f["code"] < 0 and -f["code"] != signal.SIGTERM]
        told = [f for f in failures if f["code"] > 0]
        # A survivor (EXIT_LOST) may end before the process that raised the error; a process that stopped as asked has
        # no error.
        told.sort(key=lambda f: (f["code"] in _STOPPED, f["code"] == EXIT_LOST))
        return next(iter([*killed, *told, *failures]), None)

    def _log(self, rank: int, name: str) -> Path | None:
        found = sorted(self.folder.glob(f"*/attempt_*/{rank}/{name}.log"))
        return found[-1] if found else None

    def _follow(self, name: str, path: Path) -> Iterator[str]:
        if name not in self._readers:
            if not path.exists():
                return
            self._readers[name] = _Tail(path)
        yield from self._readers[name].lines()


class _Tail:
    """Reader of the complete lines of a growing file."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115 - until close
        self._rest = ""

    def lines(self) -> list[str]:
        *whole, self._rest = (self._rest + self._file.read()).split("\n")
        return whole

    def close(self) -> None:
        self._file.close()


def _environment(devices: int, threads: int, screen: Path) -> dict[str, str]:
    """Return the environment of the processes: that of this process, a share of the cores, its module paths, loopback.

    Rank and rendezvous variables of an outer launcher are removed.
    """
    env = {**os.environ, SCREEN: str(screen), "PRETRAIN_DEBUG": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if threads or "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(threads or max(1, cores // devices))
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", loopback)  # default: interface of the host name
    standard = {os.path.realpath(path) for path in sysconfig.get_paths().values()}
    paths = [os.path.abspath(path) for path in sys.path if path and os.path.isdir(path)]
    own = [p for p in paths if not any(os.path.realpath(p).startswith(s) for s in standard)]
    env["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([*own, *env.get("PYTHONPATH", "").split(os.pathsep)])
    ).strip(os.pathsep)
    return env


def _children(pid: int) -> set[int]:
    """Return the ids of the child processes of a process; torchrun starts each in its own session."""
    found = set()
    if not (_PROC / "self" / "stat").exists():
        pairs = [line.split() for line in _ps("-A", "-o", "pid=", "-o", "ppid=")]
        return {int(child) for child, parent in pairs if int(parent) == pid}
    for path in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(path.parent.name))
    return found


def _is_ours(pid: int) -> bool:
    """Return whether a process id still belongs to a process of this launch: ids are reused."""
    with contextlib.suppress(OSError):
        if (_PROC / "self" / "stat").exists():
            words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
        else:
            words = " ".join(_ps("-ww", "-o", "args=", "-p", str(pid))).encode().split()
        return b"pretrain" in words and os.getpgid(pid) == pid
    return False


def _ps(*options: str) -> list[str]:
    """Return the lines that ``ps`` prints, which every Unix has."""
    with contextlib.suppress(OSError):
        done = subprocess.run(["ps", *options], capture_output=True, text=True, errors="replace")
        return done.stdout.splitlines()
    return []


def _ended(code: int, asked: bool) -> str:
    if code >= 0:
        return f"failed with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
    why = ""
    if -code == signal.SIGKILL:
        late = f", or it had not saved {_GRACE} s after it was asked to stop" if asked else ""
        why = f" (probably the memory of the machine ran out{late})"
    return f"was killed by {name}{why}"


def _last(path: Path | None) -> str:
    if path is None or not path.exists():
        return "    (nothing)"
    lines = _RANK.sub("", path.read_text(encoding="utf-8", errors="replace")).splitlines()
    kept = [line for line in lines if line.strip() and not _NOISE.search(line)]
    return "\n".join(f"    {line[:400]}" for line in kept[-_TAIL:]) or "    (nothing)"


# ---------------------------------------------------------------------------------------------------- keeper


def _tell(folder: Path, failures: Sequence[Mapping[str, int]]) -> None:
    with contextlib.suppress(OSError):  # a full disk, which the processes report themselves
        (folder / "failures.json").write_text(json.dumps(failures), encoding="utf-8")


def _keep(folder: Path, words: Sequence[str]) -> int:
    """Run torchrun in this process until the run ends, or stop it when standard input is closed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    close = SubprocessContext.close

    def close_and_tell(self: Any, death_sig: Any = None, timeout: int = _HURRY) -> None:
        # ``death_sig`` is given when the run was asked to stop; torchrun then does not report the exit codes itself.
        close(self, death_sig, timeout if death_sig is None else _GRACE)
        codes = {rank: one.proc.poll() for rank, one in self.subprocess_handlers.items()}
        _tell(folder, [{"rank": rank, "code": code} for rank, code in codes.items() if code])

    SubprocessContext.close = close_and_tell  # type: ignore[method-assign]
    try:
        main([*words])
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        _tell(folder, [{"rank": rank, "code": failure.exitcode} for rank, failure in failures])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_keep(Path(sys.argv[1]), sys.argv[2:]))
