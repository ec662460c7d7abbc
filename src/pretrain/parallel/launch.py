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
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pretrain.errors import ConfigError, DistributedError, PretrainError, named_error
from pretrain.parallel.watch import EXIT_LOST

__all__ = ["SCREEN", "Launched", "count_devices"]

# Names the file to which the run's screen is relayed, in place of being drawn.
SCREEN = "PRETRAIN_SCREEN"
_GRACE = 600  # seconds in which a run that was asked to stop must have saved
_TAIL = 25  # lines of a failure
_NOISE = re.compile(
    r"^(\[rank\d+\]:)?\[?[WIE]\d{3,} |^\[[WI]\d|^\*{5,}|^W\d{4} |socket\.cpp|^\[Gloo\]|OMP_NUM_THREADS"
)
_OURS = re.compile(r"^pretrain\.errors\.(\w+): ", re.M)
_RANK = re.compile(r"^\[rank\d+\]: ?", re.M)  # before every line of what a member of a group raised
_RAISED = "Traceback (most recent call last):"


def count_devices(devices: int | str, device: str = "auto") -> int:
    """How many processes ``devices`` asks for: a number, or ``"auto"``, one for each GPU, at least one.

    Args:
        devices: see there.
        device: where they will run; on GPUs there are no more processes than GPUs.

    Raises:
        ConfigError: not a number of at least 1, or more than there are GPUs.
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
        self._looked, self._raised = 0.0, False
        command = [
            sys.executable,
            "-m",
            "pretrain.parallel.launch",
            str(self.folder),
            "--standalone",
        ]
        command += [
            "--nproc-per-node",
            str(devices),
            "--log-dir",
            str(self.folder),
            "--redirects",
            "3",
        ]
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

    def failure(self) -> PretrainError:
        """The error that ended the run, in the words of the process that failed first."""
        found = self._first_failure()
        if found is None:
            self.keep = True
            text = _last(self.folder / "launcher.log")
            return DistributedError(
                f"The processes could not be started (exit code {self.code}). The launcher said:\n{text}"
            )
        rank, code = int(found["rank"]), int(found["code"])
        if code > 0:
            own = [error for r in range(self.devices) if (error := self._raised_by(r)) is not None]
            # That another process failed is what the others say of the one that knows more.
            own.sort(key=lambda error: isinstance(error, DistributedError))
            if own:
                return own[0]
        path = self._log(rank, "stderr")
        self.keep = True
        return DistributedError(
            f"Process {rank} of {self.devices} {_ended(code)}. Its last lines:\n{_last(path)}\nThe output of all "
            f"processes lies in {self.folder}."
        )

    def _raised_by(self, rank: int) -> PretrainError | None:
        """The error of ours that a process ended with."""
        path = self._log(rank, "stderr")
        text = "" if path is None else path.read_text(encoding="utf-8", errors="replace")
        found = list(_OURS.finditer(text := _RANK.sub("", text)))
        return named_error(found[-1][1], text[found[-1].end() :].strip()) if found else None

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
        # A survivor leaves more quickly than who has an error to raise.
        told.sort(key=lambda failure: failure["code"] == EXIT_LOST)
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
    """Ours, with an equal share of the cores for each process, and our own paths of modules."""
    env = {**os.environ, SCREEN: str(screen), "PRETRAIN_DEBUG": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if threads or "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(threads or max(1, cores // devices))
    standard = {os.path.realpath(path) for path in sysconfig.get_paths().values()}
    paths = [os.path.abspath(path) for path in sys.path if path and os.path.isdir(path)]
    own = [p for p in paths if not any(os.path.realpath(p).startswith(s) for s in standard)]
    env["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([*own, *env.get("PYTHONPATH", "").split(os.pathsep)])
    ).strip(os.pathsep)
    return env


def _children(pid: int) -> set[int]:
    """Processes that a process has started (Linux); each leads a session of its own."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(path.parent.name))
    return found


def _is_ours(pid: int) -> bool:
    """Whether the number still belongs to a process that we started: it may have been given to another."""
    with contextlib.suppress(OSError):
        return (
            b"\0pretrain\0" in Path(f"/proc/{pid}/cmdline").read_bytes() and os.getpgid(pid) == pid
        )
    return False


def _ended(code: int) -> str:
    if code >= 0:
        return f"failed with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
    why = " (probably the memory of the machine ran out)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{why}"


def _last(path: Path | None) -> str:
    if path is None or not path.exists():
        return "    (nothing)"
    lines = _RANK.sub("", path.read_text(encoding="utf-8", errors="replace")).splitlines()
    kept = [line for line in lines if line.strip() and not _NOISE.search(line)]
    return "\n".join(f"    {line[:400]}" for line in kept[-_TAIL:]) or "    (nothing)"


# ---------------------------------------------------------------------------------------------------- keeper


def _keep(folder: Path, words: Sequence[str]) -> int:
    """Run torchrun in this process until the run ends or standard input does."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, main

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    patient = ["--shutdown-timeout", str(_GRACE)] if "--shutdown-timeout" in known else []
    try:
        main([*patient, *words])
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        plain = [{"rank": rank, "code": failure.exitcode} for rank, failure in failures]
        (folder / "failures.json").write_text(json.dumps(plain), encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_keep(Path(sys.argv[1]), sys.argv[2:]))
