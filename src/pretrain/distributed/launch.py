"""Several processes of this machine, started from one: from a notebook, a script, or `--devices` on the command line.

The processes are `torchrun`'s. Between it and us stands a keeper (this module, run as a program): its standard input
is a pipe from us, so that everything ends when we do, however we end; and it writes down which process failed first.
What the processes print goes to files, of which those of rank 0 are followed.
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

# Names the file to which the run's screen is relayed, in place of being drawn.
SCREEN = "PRETRAIN_SCREEN"
_GRACE = 600  # seconds in which a run that was asked to stop must have saved
_HURRY = 30  # seconds for those that are left when one has failed
_TAIL = 25  # lines of a failure
_NOISE = re.compile(
    r"^(\[rank\d+\]:)?\[?[WIE]\d{3,} |^\[[WI]\d|^\*{5,}|^W\d{4} |socket\.cpp|^\[Gloo\]|OMP_NUM_THREADS"
    r"|resource_tracker\.py:|^Exception ignored "
)
_OURS = re.compile(r"^(\[rank\d+\]: )?pretrain\.errors\.(\w+): ")
_RANK = re.compile(r"^\[rank\d+\]: ?", re.M)  # before every line of what a member of a group raised
_RAISED = "Traceback (most recent call last):"
# Exit codes of those that were asked to stop: they agreed on it and saved, or had not learned to listen yet.
_STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP, -signal.SIGTERM}
_PROC = Path("/proc")  # Linux alone has it


def count_devices(devices: int | str, device: str = "auto") -> int:
    """How many processes ``devices`` asks for: a number, or ``"auto"``, one for each GPU, at least one.

    Args:
        devices: see there.
        device: where they will run; on GPUs there are no more processes than GPUs.

    Raises:
        ConfigError: not a number of at least 1, more than there are GPUs, or several on Apple's GPU.
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
    """``pretrain`` on several processes; a context manager, at whose end none of them is left.

    Args:
        words: of the command line after ``pretrain``.
        devices: how many processes.
        threads: CPU threads of each; 0 is an equal share of the cores.

    Attributes:
        folder: holds what the processes print, until the end; ``keep`` leaves it there.
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
        # Without an address of ours it is what the host's name resolves to, which may lead nowhere.
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
                start_new_session=True,  # Ctrl-C is ours to pass on
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
        """Whether the processes are there; remembers them, should their keeper be killed."""
        if self._keeper.poll() is not None:
            return False
        if time.monotonic() - self._looked > 1.0:
            self._looked = time.monotonic()
            self._workers |= _children(self._keeper.pid)
        return True

    def stop(self) -> None:
        """Ask the run to save and to end."""
        self._asked = True
        with contextlib.suppress(ProcessLookupError):
            self._keeper.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End whatever still runs, at once."""
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
        """Exit code of the whole, once it has ended."""
        return int(self._keeper.wait())

    def told(self) -> Iterator[dict[str, Any]]:
        """What rank 0 has relayed of its screen since the last call."""
        for line in self._follow("screen", self.screen):
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def said(self) -> Iterator[str]:
        """What rank 0 has printed since the last call, without the noise of libraries; what it raised comes later."""
        for name in ("stdout", "stderr"):
            path = self._log(0, name)
            for line in () if path is None else self._follow(name, path):
                self._raised |= line.startswith(_RAISED)
                if line.strip() and not (self._raised or _RANK.match(line) or _NOISE.search(line)):
                    yield line

    def stopped(self) -> str | None:
        """The signal that all processes were asked to stop by, if somebody else asked them."""
        codes = {int(failure["code"]) for failure in self._failures()}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # The launcher asks those again that were not quite done.
            if 128 + number in codes and codes <= {128 + number, -signal.SIGTERM}:
                return number.name
        return None

    def broke(self) -> bool:
        """Whether a run that was asked to stop did not just stop: nothing was saved, say, for want of space."""
        codes = {int(failure["code"]) for failure in self._failures()}
        others = codes - _STOPPED
        if -signal.SIGTERM in codes and all(code > 0 for code in others):
            # Who was asked before it could listen is missed by the others; that is no news.
            return any(not isinstance(error, DistributedError) for error in self._own_errors())
        return bool(others)

    def failure(self) -> PretrainError:
        """The error that ended the run, in the words of the process that failed first."""
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
        """The errors of ours that processes ended with, the most telling first."""
        own = [error for r in range(self.devices) if (error := self._raised_by(r)) is not None]
        # That another process failed is what the others say of the one that knows more.
        return sorted(own, key=lambda error: isinstance(error, DistributedError))

    def _raised_by(self, rank: int) -> PretrainError | None:
        """The error of ours that a process ended with."""
        path = self._log(rank, "stderr")
        if path is None:
            return None
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [(n, match) for n, line in enumerate(lines) if (match := _OURS.match(line))]
        if not found:
            return None
        start, match = found[-1]
        before, said = match[1] or "", [lines[start][match.end() :]]
        for line in lines[start + 1 :]:  # libraries have their last words after it
            if not line.startswith(before) or _NOISE.search(line):
                break
            said.append(line.removeprefix(before))
        return named_error(match[2], "\n".join(said).strip())

    def _failures(self) -> list[dict[str, Any]]:
        """Rank and exit code of the processes that failed, in the order in which they did."""
        try:
            return list(json.loads((self.folder / "failures.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return []

    def _first_failure(self) -> Mapping[str, Any] | None:
        failures = self._failures()
        # Who was killed is the cause; those who then lost their connection are not.
        killed = [f for f in failures if f["code"] < 0 and -f["code"] != signal.SIGTERM]
        told = [f for f in failures if f["code"] > 0]
        # A survivor leaves more quickly than who has an error to raise; who did as asked has none.
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
    """Whole lines of a growing file."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115 - until close
        self._rest = ""

    def lines(self) -> list[str]:
        *whole, self._rest = (self._rest + self._file.read()).split("\n")
        return whole

    def close(self) -> None:
        self._file.close()


def _environment(devices: int, threads: int, screen: Path) -> dict[str, str]:
    """Ours, with a share of the cores for each process, our paths of modules, and loopback as the only network."""
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
        env.setdefault("GLOO_SOCKET_IFNAME", loopback)  # else that of the host's name
    standard = {os.path.realpath(path) for path in sysconfig.get_paths().values()}
    paths = [os.path.abspath(path) for path in sys.path if path and os.path.isdir(path)]
    own = [p for p in paths if not any(os.path.realpath(p).startswith(s) for s in standard)]
    env["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([*own, *env.get("PYTHONPATH", "").split(os.pathsep)])
    ).strip(os.pathsep)
    return env


def _children(pid: int) -> set[int]:
    """Processes that a process has started; each leads a session of its own."""
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
    """Whether the number still belongs to a process that we started: it may have been given to another."""
    with contextlib.suppress(OSError):
        if (_PROC / "self" / "stat").exists():
            words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
        else:
            words = " ".join(_ps("-ww", "-o", "args=", "-p", str(pid))).encode().split()
        return b"pretrain" in words and os.getpgid(pid) == pid
    return False


def _ps(*options: str) -> list[str]:
    """What ``ps`` prints, which every Unix has."""
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
    with contextlib.suppress(OSError):  # the disk may be full, which is what the processes say
        (folder / "failures.json").write_text(json.dumps(failures), encoding="utf-8")


def _keep(folder: Path, words: Sequence[str]) -> int:
    """Run torchrun in this process until the run ends or standard input does."""
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
        # A signal is named when the run is asked to stop, and torchrun then tells nobody how the processes ended.
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
