"""torchrun that starts at once: its agent is the real one, its processes are forked where torch is imported already.

    with Torchrun(folder) as launcher:
        launcher.start(["--nproc-per-node", "2", "worker.py"], EVENTS=...)
        code = launcher.wait(60)

    printed = launch(Path("worker.py"), 2, "argument")  # by a launcher that all tests of this process share

A process of its own serves, imports torch once, and forks an agent for every start; the agent has forked its future
workers before it has any threads. Started by a prefix (``ip netns exec ...``) all of that happens there. When the
server ends, however it does, everything it started is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import json
import os
import random
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # What a run needs is there when its processes are forked.
    import torch
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

else:
    import pytest

    from distributed.cluster import environment

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


# ------------------------------------------------------------------------------------------ the workers


class Forked:
    """A future worker, which looks like a `Popen` once it is told what to do."""

    ready: list[Forked] = []

    def __init__(self) -> None:
        reads, self._tell = os.pipe()
        self.pid, self.returncode = os.fork(), None
        if self.pid == 0:
            os.close(self._tell)
            for other in Forked.ready:
                os.close(other._tell)
            _work(reads)
        os.close(reads)
        self._rank = ""
        self._events = ""

    def begin(self, args: tuple[str, ...], env: dict[str, str], outs: list[str | None]) -> Forked:
        self._rank, self._events = env["RANK"], env.get("EVENTS", "")
        self._attempt = env["TORCHELASTIC_RESTART_COUNT"]
        data = json.dumps({"args": list(args), "env": env, "outs": outs}).encode()
        os.write(self._tell, len(data).to_bytes(8, "big") + data)
        os.close(self._tell)
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                self._ended(self.returncode)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (1e9 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def _ended(self, code: int) -> None:
        if self._events:
            line = {"what": "exit", "rank": int(self._rank), "attempt": int(self._attempt)}
            line |= {"time": time.time(), "code": code}
            with open(self._events, "ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")


def _work(reads: int) -> None:
    """Wait to be told, then be ``python script args``."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        data = b""
        while len(data) < 8 or len(data) < 8 + int.from_bytes(data[:8], "big"):
            piece = os.read(reads, 1 << 16)
            if not piece:
                os._exit(0)
            data += piece
        told = json.loads(data[8:])
        os.setsid()
        for number, out in zip((1, 2), told["outs"], strict=True):
            if out is not None:
                _redirect(number, out)
        os.environ.clear()
        os.environ.update(told["env"])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        script = next(i for i, word in enumerate(told["args"]) if word.endswith(".py"))
        code = _run(told["args"][script:])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _run(words: list[str]) -> int:
    """Be ``python script args`` in this process; the exit code."""
    random.seed()
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


# ------------------------------------------------------------------------------------------ the server


def _redirect(number: int, path: str) -> None:
    to = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(to, number)
    os.close(to)


def _agent(told: dict[str, Any]) -> None:
    """Be torchrun, with workers that are there already."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.setsid()
    for number in (1, 2):
        _redirect(number, f"{told['out']}.{number}")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(told["env"])
    if not told["workers"]:
        os._exit(_run(told["words"]))
    for _ in range(told["workers"]):
        Forked.ready.append(Forked())

    def popen(handler: Any, args: tuple[str, ...], env: dict[str, str]) -> Forked:
        outs = [None if to is None else to.name for to in (handler._stdout, handler._stderr)]
        return Forked.ready.pop(0).begin(args, env, outs)

    close = SubprocessContext._close

    def close_soon(context: Any, death_sig: Any, timeout: int = 30) -> None:
        close(context, death_sig, min(timeout, told["grace"]))

    SubprocessHandler._popen = popen  # type: ignore[method-assign]
    SubprocessContext._close = close_soon  # type: ignore[method-assign]
    code = 1
    try:
        torchrun.main(told["words"])
        code = 0
    except SignalException as error:
        code = 128 + int(error.sigval)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """For every line of JSON fork an agent; print ``started PID``, and ``ended PID CODE`` later."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported is not looked through again by each garbage collection of each worker
    running: set[int] = set()
    print("ready", flush=True)
    while True:
        if select.select([0], [], [], 0.02)[0]:
            line = b""
            while not line.endswith(b"\n"):
                byte = os.read(0, 1)
                if not byte:
                    return
                line += byte
            pid = os.fork()
            if pid == 0:
                _agent(json.loads(line))
            running.add(pid)
            print(f"started {pid}", flush=True)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            running.discard(pid)
            print(f"ended {pid} {os.waitstatus_to_exitcode(status)}", flush=True)


# ------------------------------------------------------------------------------------------ its client


class Torchrun:
    """Starts one torchrun after the other.

    Args:
        folder: what they print goes to ``agent-N.1`` and ``agent-N.2`` there.
        prefix: words before the command of the server.
    """

    def __init__(self, folder: Path, *prefix: str) -> None:
        self.folder, self.pid, self._code, self._runs = folder, 0, -1, 0
        self._lines = b""
        self.server = subprocess.Popen(
            [*prefix, sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        )
        self._expect("ready", 120)

    def start(self, words: list[str], *, workers: int = 4, grace: int = 30, **env: str) -> None:
        """Start torchrun with these words.

        Args:
            words: of its command line.
            workers: how many processes it may start in all; none if the words are a script and its arguments, which
                then runs alone, without torchrun.
            grace: seconds after which it kills those that do not end by SIGTERM.
            env: added to the environment.
        """
        self._runs += 1
        told = {"words": words, "env": env, "workers": workers, "out": str(self._out)}
        told["grace"] = grace
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(told).encode() + b"\n")
        self.server.stdin.flush()
        self.pid, self._code = int(self._expect("started", 30)[0]), -1

    def wait(self, seconds: float) -> int:
        """Exit code of torchrun.

        Raises:
            TimeoutError: it has not ended within the limit.
        """
        if self._code < 0:
            self._code = int(self._expect("ended", seconds)[1])
        return self._code

    def said(self) -> str:
        """What torchrun, and what has no file of its own, has printed: to stdout, then to stderr."""
        return "".join(self.printed(number) for number in (1, 2))

    def printed(self, number: int) -> str:
        """The same, to file descriptor 1 or 2."""
        return Path(f"{self._out}.{number}").read_text(errors="replace")

    def kill(self) -> None:
        """End what runs, at once."""
        if self.pid and self._code < 0:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(self.pid, signal.SIGKILL)
            self._expect("ended", 10)
            self._code = 137

    def close(self) -> None:
        """End the server and whatever it started."""
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait(10)
        self.server.stdout.close()

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _out(self) -> Path:
        return self.folder / f"agent-{self._runs}"

    def _expect(self, word: str, seconds: float) -> list[str]:
        assert self.server.stdout is not None
        end = time.monotonic() + seconds
        while True:
            line, found, rest = self._lines.partition(b"\n")
            if found:
                self._lines = rest
                first, *words = line.decode().split()
                if first == word:
                    return words
                continue
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.server.stdout], [], [], left)[0]:
                raise TimeoutError(f"torchrun has not {word} within {seconds:g} seconds")
            data = os.read(self.server.stdout.fileno(), 65536)
            if not data:
                raise RuntimeError("the server has ended")
            self._lines += data


@functools.cache
def _shared() -> Torchrun:
    folder = Path(tempfile.mkdtemp(prefix="pretrain-tests-"))
    launcher = Torchrun(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(launcher.close)
    return launcher


def launch(script: Path, processes: int, *args: str, timeout: float = 480.0) -> str:
    """Run a script in so many processes that know of each other; what they printed, or a failed test."""
    launcher, words = _shared(), [str(script), *args]
    if processes > 1:
        words = ["--standalone", f"--nproc-per-node={processes}", *words]
    launcher.start(words, workers=processes if processes > 1 else 0)
    try:
        code = launcher.wait(timeout)
    except BaseException:
        launcher.kill()
        raise
    if code:
        said = launcher.said()[-6000:]
        pytest.fail(f"{script.name} in {processes} processes: {said}", pytrace=False)
    return launcher.printed(1)


if __name__ == "__main__":
    serve()
