"""How long the survivors need after each signal to each rank in each phase: a table for the documentation.

    PYTHONPATH=src:tests python tests/distributed/watchdog_table.py --ranks 3 --silence 5

Each cell is a run of real processes (gloo, this host); the rank sends the signal to itself, 0.4 s into that phase. A
time is that from the signal to the end of the last survivor; for SIGSTOP it contains the silence. "named" counts runs
in which all survivors ended with exit code 75 and named that rank, "exact phase" those that named the phase as well.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import tempfile
from pathlib import Path

import torch.distributed as dist

from distributed.watchdog_worker import PHASES, Crew
from pretrain.distributed.watchdog import EXIT_LOST

SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)


def trial(
    crew: Crew, size: int, lost: int, phase: str, number: int, silence: float
) -> tuple[float, bool, bool]:
    """Seconds until the last survivor has left; all have named the right rank; and the right phase."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    step = 0 if phase == "start" else 1
    orders = {
        "steps": 100,
        "into": 0.4,
        "run_dir": str(crew.folder),
        "signal": [lost, step, phase, number],
        "options": {"silence": silence},
    }
    crew.start(list(range(size)), size, store.port, orders)
    others = [rank for rank in range(size) if rank != lost]
    codes = crew.wait(silence + 40, others)
    at = float(crew.out(lost).split("signal ")[1].split()[0])
    late = max((crew.ended[rank][1] for rank in others if rank in codes), default=at + 999) - at
    named, placed = True, True
    for rank in others:
        lines = [line for line in crew.err(rank).splitlines() if line.startswith("first failure: ")]
        found = json.loads(lines[0].partition(": ")[2]) if lines else {}
        named &= codes.get(rank) == EXIT_LOST and found.get("rank") == lost
        placed &= (found.get("phase"), found.get("step")) == (phase, step)
    crew.kill()
    return late, named, placed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--silence", type=float, default=5.0)
    args = parser.parse_args()
    crew = Crew(Path(tempfile.mkdtemp()))
    ranks = range(args.ranks)
    print(f"| signal | phase | {' | '.join(f'rank {r}' for r in ranks)} | named | exact phase |")
    print("|---|---|" + "---|" * (args.ranks + 2))
    everything: dict[str, list[float]] = {}
    for number in SIGNALS:
        for phase in ("start", *PHASES):
            row = [trial(crew, args.ranks, r, phase, number, args.silence) for r in ranks]
            everything.setdefault(number.name, []).extend(one[0] for one in row)
            times = " | ".join(f"{one[0]:.2f} s" for one in row)
            named, placed = (sum(one[k] for one in row) for k in (1, 2))
            print(
                f"| {number.name} | {phase} | {times} | {named}/{len(row)} | {placed}/{len(row)} |",
                flush=True,
            )
    for name, times in everything.items():
        print(f"{name}: median {statistics.median(times):.2f} s, worst {max(times):.2f} s")
    crew.close()


if __name__ == "__main__":
    main()
