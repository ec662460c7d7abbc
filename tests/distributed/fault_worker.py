"""One process of a training run to which something happens at a named place; torchrun starts it.

    torchrun --nproc-per-node 2 tests/distributed/fault_worker.py train --config run.yaml

It is ``pretrain`` with the same words, in which ``{rank}`` stands for the rank, and the environment tells what shall
happen:

- ``FAULTS``: JSON, a list of ``{"rank": 1, "phase": "forward", "step": 5, "signal": 9}``; that process sends itself the
  signal ``into`` seconds (0.3) after it has marked the phase, and again after each of ``again`` (seconds). ``"rank":
  "all"`` is every process, and ``attempt`` says how often torchrun has started them again by then (0).
- ``OWN``: a folder in which every process gets a folder of its own to work in;
- ``EVENTS``: a file that gets a line of JSON for what every process saw.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pretrain.cli.main import main
from pretrain.distributed.processes import Processes
from pretrain.training.trainer import Trainer

PHASES = ("start", "data", "forward", "backward", "update", "evaluate", "save")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
FAULTS: list[dict[str, Any]] = []


def tell(what: str, **more: Any) -> None:
    """Add a line to the events; one write, so that lines of several processes do not mix."""
    if path := os.environ.get("EVENTS"):
        rank = int(os.environ.get("RANK", "0"))
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        line = {"what": what, "rank": rank, "attempt": attempt, "pid": os.getpid()}
        line |= {"time": time.time()} | more
        to = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(to, json.dumps(line).encode() + b"\n")
        os.close(to)


def reached(rank: int, phase: str, step: int) -> None:
    """Do what was ordered for this place."""
    for fault in list(FAULTS):
        if fault["rank"] in (rank, "all") and (fault["phase"], fault["step"]) == (phase, step):
            FAULTS.remove(fault)
            tell("reached", phase=phase)
            time.sleep(fault.get("into", 0.3))
            tell("signal", number=fault["signal"])
            for seconds in fault.get("again", []):
                again = threading.Timer(seconds, os.kill, (os.getpid(), fault["signal"]))
                again.daemon = True
                again.start()
            os.kill(os.getpid(), fault["signal"])


def prepare() -> None:
    """Watch the trainer; called once in a process."""
    # Whatever ends the launcher: nothing of a test is left behind.
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    faults = json.loads(os.environ.get("FAULTS", "[]"))
    FAULTS.extend(fault for fault in faults if fault.get("attempt", 0) == attempt)
    if "OWN" in os.environ:
        own = Path(os.environ["OWN"], os.environ["RANK"])
        own.mkdir(parents=True, exist_ok=True)
        os.chdir(own)
    mark, set_up = Processes.mark, Trainer._set_up

    def marked(world: Processes, phase: str, step: int) -> None:
        mark(world, phase, step)
        reached(world.rank, phase, step)

    def with_start(trainer: Trainer) -> bool:
        reached(trainer.world.rank, "start", 0)
        resumed = set_up(trainer)
        tell("began", step=trainer.state.step)
        return resumed

    Processes.mark, Trainer._set_up = marked, with_start  # type: ignore[method-assign]


if __name__ == "__main__":
    prepare()
    code = main([word.replace("{rank}", os.environ.get("RANK", "0")) for word in sys.argv[1:]])
    tell("left", code=code)
    sys.exit(code)
