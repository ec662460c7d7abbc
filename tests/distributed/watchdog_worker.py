"""Processes for the tests of the watchdog: they mark their phases and meet each other in a gloo all-reduce.

What a process does comes as JSON. Keys, all optional, where ``[rank, step]`` says who and when:

- ``steps``, ``seconds``: how many steps, and how long each takes;
- ``hang`` loops for ever, ``raise`` raises a RuntimeError, ``refuse`` a TrainingError (rank "all": everybody), ``odd``
  waits in a barrier of its own, ``leave`` ends without a goodbye;
- ``fork``: leave a child behind that outlives this process;
- ``signal``: [rank, step, phase, number] sends itself a signal, ``into`` seconds later, having printed the time;
- ``only``: {phase: rank} marks an own phase at the end of every step and stays there for a moment;
- ``options``: of `Watchdog`;  ``run_dir``.

One process by hand: ``RANK=0 WORLD_SIZE=2 MASTER_PORT=... python tests/distributed/watchdog_worker.py '{...}'``.
With ``--serve`` it imports torch once and forks a process for every line that it reads; see ``Crew``.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.distributed.watchdog import Watchdog
from pretrain.errors import PretrainError, TrainingError

PHASES = ("data", "forward", "backward", "update", "evaluate", "save")
SRC = Path(__file__).parents[2] / "src"

# ------------------------------------------------------------------------------------------ the process


def looping() -> None:
    """What the stack of the one that hangs must show."""
    while True:
        time.sleep(0.05)


def reached(orders: dict[str, Any], rank: int, number: int, phase: str) -> None:
    """Send the signal that was ordered for this place."""
    *place, signal_number = orders.get("signal", [None])
    if place == [rank, number, phase]:
        time.sleep(orders.get("into", 0.0))
        print(f"signal {time.time()}", flush=True)
        os.kill(os.getpid(), signal_number)


def step(orders: dict[str, Any], rank: int, number: int, watchdog: Watchdog) -> None:
    """Data, forward, backward with the meeting of all, update, and what was ordered."""
    here = [rank, number]
    seconds = orders.get("seconds", 0.05)
    for phase in PHASES:
        watchdog.mark(phase, number)
        reached(orders, rank, number, phase)
        if phase == "forward":
            if orders.get("hang") == here:
                looping()
            if orders.get("raise") == here:
                raise RuntimeError("the bolt is loose")
            if orders.get("refuse") in (here, ["all", number]):
                raise TrainingError(f"no rows are left on rank {rank}")
            if orders.get("leave") == here:
                os._exit(3)
        if phase == "backward":
            if orders.get("odd") == here:
                dist.barrier()
            dist.all_reduce(torch.ones(8))
        time.sleep(seconds / 6)
    for phase, who in orders.get("only", {}).items():
        if rank == who:
            watchdog.mark(phase, number)
            time.sleep(seconds)


def work(orders: dict[str, Any]) -> None:
    """A whole small run."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=60),
    )
    store = dist.PrefixStore(orders.get("attempt", "0"), store)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=limit
    )
    options = orders.get("options", {})
    with Watchdog(
        dist.PrefixStore("life", store), rank, size, run_dir=orders.get("run_dir"), **options
    ) as watchdog:
        if orders.get("fork") and os.fork() == 0:
            os.close(1)
            os.close(2)
            time.sleep(6)
            os._exit(0)
        reached(orders, rank, 0, "start")
        for number in range(orders.get("steps", 5)):
            step(orders, rank, number, watchdog)
            print(f"step {number} {time.time():.3f}", flush=True)
    print("done", flush=True)
    dist.destroy_process_group()


def main(orders: dict[str, Any]) -> int:
    """Exit code as the command line has it: 2 for an error of ours, 1 for any other."""
    torch.set_num_threads(1)
    try:
        work(orders)
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


# ------------------------------------------------------------------------------------------ the server


def serve() -> None:
    """For every line of JSON fork a process; print ``started NAME PID``, and ``ended NAME CODE TIME`` later."""
    names: dict[int, str] = {}
    while True:
        if select.select([0], [], [], 0.02)[0]:
            line = b""
            while not line.endswith(b"\n"):
                byte = os.read(0, 1)
                if not byte:
                    for pid in names:
                        os.kill(pid, signal.SIGKILL)
                    return
                line += byte
            told = json.loads(line)
            pid = os.fork()
            if pid == 0:
                os.environ.update(told["env"])
                os.chdir(told.get("cwd", "."))
                for number in (1, 2):
                    to = os.open(f"{told['out']}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(to, number)
                null = os.open(os.devnull, os.O_RDONLY)
                os.dup2(null, 0)
                code = 1
                try:
                    code = main(told["orders"])
                except SystemExit as end:
                    code = int(end.code or 0)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    sys.stderr.flush()
                finally:
                    os._exit(code)
            names[pid] = told["name"]
            print(f"started {told['name']} {pid}", flush=True)
        while names:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            code = os.waitstatus_to_exitcode(status)
            print(f"ended {names.pop(pid)} {code} {time.time()}", flush=True)


class Crew:
    """The ranks of one run, forked by a server; ``prefix`` starts a server elsewhere, e.g. in a network namespace."""

    def __init__(self, folder: Path, *prefix: str) -> None:
        self.folder = folder
        env = os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [*prefix, sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        self.pids: dict[int, int] = {}
        self.ended: dict[int, tuple[int, float]] = {}
        self._runs = 0
        self._lines = b""

    def start(
        self, ranks: list[int], size: int, port: int, orders: dict[str, Any], **env: str
    ) -> None:
        """Start some ranks of a world; forgets the run before."""
        self._runs += 1
        self.pids, self.ended = {}, {}
        for rank in ranks:
            for number in (1, 2):  # of a run before
                (self.folder / f"rank{rank}.{number}").unlink(missing_ok=True)
            here = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port), **env}
            here.setdefault("LOCAL_WORLD_SIZE", str(size))
            told = {"name": f"{self._runs}:{rank}", "env": here, "orders": orders}
            self._tell(told | {"out": str(self.folder / f"rank{rank}")})
        while len(self.pids) < len(ranks):
            self._read(10.0)

    def _tell(self, told: dict[str, Any]) -> None:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(told).encode() + b"\n")
        self.server.stdin.flush()

    def _read(self, seconds: float) -> None:
        assert self.server.stdout is not None
        if select.select([self.server.stdout], [], [], max(0.0, seconds))[0]:
            data = os.read(self.server.stdout.fileno(), 65536)
            if not data:
                raise RuntimeError("the server has ended")
            *lines, self._lines = (self._lines + data).split(b"\n")
            for line in lines:
                word, name, *rest = line.decode().split()
                run, rank = map(int, name.split(":"))
                if run == self._runs and word == "started":
                    self.pids[rank] = int(rest[0])
                elif run == self._runs:
                    self.ended[rank] = int(rest[0]), float(rest[1])

    def wait(self, seconds: float, ranks: list[int] | None = None) -> dict[int, int]:
        """Exit codes of those that ended within the limit, or until the given ones have."""
        wanted, end = set(self.pids if ranks is None else ranks), time.time() + seconds
        while not wanted <= set(self.ended) and time.time() < end:
            self._read(min(0.5, end - time.time()))
        return {rank: code for rank, (code, _) in sorted(self.ended.items())}

    def until(self, rank: int, text: str, seconds: float = 20.0) -> None:
        """Wait for a line of a rank's output."""
        end = time.time() + seconds
        while text not in self.out(rank):
            if time.time() > end or rank in self.ended:
                raise AssertionError(f"no {text!r} from rank {rank}: {self.err(rank)}")
            self._read(0.02)

    def out(self, rank: int) -> str:
        """Standard output of a rank so far."""
        path = self.folder / f"rank{rank}.1"
        return path.read_text() if path.exists() else ""

    def err(self, rank: int) -> str:
        """Standard error of a rank so far."""
        path = self.folder / f"rank{rank}.2"
        return path.read_text(errors="replace") if path.exists() else ""

    def signal(self, rank: int, number: int) -> float:
        """Send a signal and return the time."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)
        return time.time()

    def kill(self) -> None:
        """End whatever is left of the run."""
        for rank in set(self.pids) - set(self.ended):
            self.signal(rank, signal.SIGKILL)
        self.wait(5.0)

    def close(self) -> None:
        """End the server and all of its processes."""
        self.kill()
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(10)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main(json.loads(sys.argv[1])))
