"""What happens to a training run after each signal to each rank in each phase: a table for the documentation.

    PYTHONPATH=src:tests python tests/distributed/fault_table.py

Each cell is a real run (two processes on this host, gloo, torchrun with one restart). The rank sends the signal to
itself 0.3 s into the phase, at a step behind the checkpoint of step 4; torchrun then starts both processes again. A
row has a run for each rank. A time is that from the signal to the end of the last other process (for SIGTERM: of the
last process). Counted are runs in which the survivor and `failure.json` named the right rank, and the right phase and
step; "went on at step" is that of the checkpoint that was resumed, and "same bits" says that every loss, weight and
moment is that of a run to which nothing happened.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed.fault_worker import PHASES
from distributed.torchrun import Torchrun
from pretrain.checkpoint import latest
from pretrain.data.prepare import prepare
from pretrain.distributed.record import FILE
from pretrain.utils.run_log import read_log
from tiny import TEXTS

WORKER = Path(__file__).parent / "fault_worker.py"
STRATEGIES = ("ddp", "fsdp")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
SILENCE = 6.0  # seconds, also the limit on a hung process
GRACE = 3  # seconds after which torchrun kills a stopped process; 30 by itself
STEPS = 8
# The steps at which a phase comes; evaluation and saving come after step 6, when nothing newer than 4 is saved.
AT = {"start": 0, "evaluate": 6, "save": 6}


@dataclass
class Cell:
    """What was seen of one run."""

    named: bool
    placed: bool
    seconds: float
    codes: list[int]
    resumed: int
    exact: bool
    ended: int  # exit code of torchrun after the restart
    silence: float = SILENCE

    @property
    def good(self) -> bool:
        return self.named and self.placed and self.exact and self.ended == 0


class Stage:
    """Data and settings of the runs, and what comes out of those to which nothing happens.

    Args:
        folder: for everything.
        prefix: words before the command that starts the processes.
    """

    def __init__(self, folder: Path, *prefix: str) -> None:
        self.folder = folder
        text = folder / "text.txt"
        if not text.exists():
            text.write_text("\n\n".join(TEXTS * 4))
            prepare(
                text,
                folder / "data",
                tokenizer="wordpiece",
                vocab_size=90,
                row_length=16,
                valid=0.2,
                separator="\n\n",
                workers=1,
                quiet=True,
            )
        self.launcher = Torchrun(folder, *prefix)
        self._runs = itertools.count()
        self._wanted: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        self.launcher.close()

    def config(self, out: Path, strategy: str, **train: Any) -> Path:
        """Write the settings of a run beside it."""
        chosen = {
            "out": str(out),
            "limit": f"{STEPS} steps",
            "batch_rows": 8,
            "micro_rows": 2,
            "eval_every": "3 steps",
            "save_every": "2 steps",
            "log_every": 1,
            "best": False,
            "precision": "fp32",
        }
        shape = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
        plain = {
            "data": {"train": str(self.folder / "data")},
            "model": {
                "family": "gpt2",
                "overrides": shape | {"max_positions": 32, "dropout": 0.1},
            },
            "optim": {"lr": 1e-2, "ema": 0.9},
            "train": chosen | train,
            "parallel": {"device": "cpu", "threads": 1, "strategy": strategy, "timeout": SILENCE},
        }
        path = Path(f"{out}.yaml")
        path.write_text(json.dumps(plain))
        return path

    def run(
        self,
        strategy: str,
        faults: list[dict[str, Any]],
        *,
        processes: int = 2,
        restarts: int = 1,
        limit: float = 120.0,
        out: Path | None = None,
        **train: Any,
    ) -> tuple[Path, int]:
        """Train under torchrun with these faults; the run directory, and torchrun's exit code."""
        out = out or self.folder / f"run-{next(self._runs)}"
        self.begin(strategy, faults, processes=processes, restarts=restarts, out=out, **train)
        try:
            return out, self.launcher.wait(limit)
        except TimeoutError:
            self.launcher.kill()
            return out, -1

    def begin(
        self,
        strategy: str,
        faults: list[dict[str, Any]],
        *,
        out: Path,
        processes: int = 2,
        restarts: int = 1,
        **train: Any,
    ) -> None:
        """Start torchrun; ``launcher`` waits for it."""
        config = self.config(out, strategy, **train)
        self.start(config, out, faults, processes, restarts)

    def start(
        self,
        config: Path,
        out: Path,
        faults: list[dict[str, Any]],
        processes: int,
        restarts: int,
        **env: str,
    ) -> None:
        """Start torchrun with settings that are written already."""
        words = ["--standalone", "--nproc-per-node", str(processes)]
        words += ["--max-restarts", str(restarts), "--redirects", "3", "--log-dir", f"{out}.logs"]
        words += [str(WORKER), "train", "--config", str(config)]
        env |= {"FAULTS": json.dumps(faults), "EVENTS": f"{out}.events"}
        self.launcher.start(words, workers=processes * (restarts + 1), grace=GRACE, **env)

    def wanted(self, strategy: str, processes: int = 2, **train: Any) -> dict[str, Any]:
        """What a run gives to which nothing happens."""
        key = f"{strategy} {processes} {train}"
        if key not in self._wanted:
            out, code = self.run(strategy, [], processes=processes, restarts=0, **train)
            assert code == 0, self.errors(out) + self.launcher.said()
            self._wanted[key] = result(out)
            assert self._wanted[key]["steps"] == STEPS
        return self._wanted[key]

    def errors(self, out: Path) -> str:
        """What all processes of a run wrote to stderr."""
        return "".join(
            f"--- {path.relative_to(out.parent)}\n{path.read_text(errors='replace')[-3000:]}\n"
            for path in sorted(Path(f"{out}.logs").rglob("stderr.log"))
        )


def result(out: Path) -> dict[str, Any]:
    """Every loss and gradient norm of a run to the last bit, and the digest of its last weights."""
    lines = read_log(out / "log.jsonl") if (out / "log.jsonl").exists() else []
    steps = [
        (line["step"], float(line["loss"]).hex(), float(line["grad_norm"]).hex())
        for line in lines
        if "grad_norm" in line
    ]
    held_out = [(r["step"], float(r["eval"]["loss"]).hex()) for r in lines if "eval" in r]
    newest = latest(out)
    weights, training = hashlib.sha256(), hashlib.sha256()
    for path in sorted(newest.glob("model*.safetensors")) if newest is not None else ():
        weights.update(path.read_bytes())
    for path in sorted((newest / "training").glob("*.safetensors")) if newest is not None else ():
        training.update(path.read_bytes())
    return {
        "steps": len(steps),
        "losses": steps,
        "held_out": held_out,
        "weights": weights.hexdigest(),
        "moments": training.hexdigest(),
    }


def events(out: Path, what: str, attempt: int | None = None) -> list[dict[str, Any]]:
    """What the processes of a run told, in the order in which they did."""
    with contextlib.suppress(FileNotFoundError):
        lines = map(json.loads, Path(f"{out}.events").read_text().splitlines())
        return [e for e in lines if e["what"] == what and attempt in (None, e["attempt"])]
    return []


def found(logs: Path, rank: int) -> dict[str, Any]:
    """The loss that a survivor printed at the first attempt.

    Args:
        logs: of torchrun.
        rank: on its host.
    """
    for path in logs.glob(f"*/attempt_0/{rank}/stderr.log"):
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("first failure: "):
                return dict(json.loads(line.partition(": ")[2]))
    return {}


def trial(stage: Stage, strategy: str, rank: int, phase: str, number: int, **train: Any) -> Cell:
    """One run with one fault."""
    wanted = stage.wanted(strategy, **train)
    step = AT.get(phase, 5)
    fault = {"rank": rank, "phase": phase, "step": step, "signal": int(number)}
    out, ended = stage.run(strategy, [fault], **train)
    struck = events(out, "signal")
    exits = {e["rank"]: e for e in events(out, "exit", 0)}
    lost = number != signal.SIGTERM
    others = [r for r in range(2) if r != rank] if lost else [0, 1]
    began = [e["step"] for e in events(out, "began", 1)]
    placed = named = True
    if lost:
        told = [found(Path(f"{out}.logs"), r) for r in others]
        if (out / FILE).exists():
            told.append(json.loads((out / FILE).read_text()))
        named = all(one.get("rank") == rank for one in told)
        placed = all((one.get("phase"), one.get("step")) == (phase, step) for one in told)
    return Cell(
        named=named,
        placed=placed,
        seconds=max(exits[r]["time"] for r in others) - struck[0]["time"],
        codes=[exits[r]["code"] for r in range(2)],
        resumed=began[0] if began else -1,
        exact=ended == 0 and result(out) == wanted,
        ended=ended,
    )


def row(strategy: str, number: signal.Signals, phase: str, cells: list[Cell]) -> str:
    """Of the table: a signal to each rank in turn, in one phase."""
    lost = number != signal.SIGTERM

    def each(values: Iterable[object]) -> str:
        return ", ".join(map(str, values))

    columns = [
        strategy,
        number.name,
        phase,
        f"{sum(c.named for c in cells)}/{len(cells)}" if lost else "-",
        f"{sum(c.placed for c in cells)}/{len(cells)}" if lost else "-",
        each(f"{c.seconds:.2f}" for c in cells),
        each("/".join(map(str, c.codes)) for c in cells),
        each(dict.fromkeys(c.resumed for c in cells)),
        f"{sum(c.exact for c in cells)}/{len(cells)}",
    ]
    return f"| {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", choices=STRATEGIES, action="append")
    parser.add_argument("--phase", choices=PHASES, action="append")
    parser.add_argument("--signal", choices=[s.name for s in SIGNALS], action="append")
    args = parser.parse_args()
    signals = [signal.Signals[name] for name in args.signal or [s.name for s in SIGNALS]]
    began, everything = time.monotonic(), dict[str, list[Cell]]()
    print(
        "| strategy | signal | phase | rank named | phase named | seconds (to rank 0, to rank 1) | "
        "exit codes of rank 0/1 | went on at step | same bits |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        try:
            for strategy, number, phase in itertools.product(
                args.strategy or STRATEGIES, signals, args.phase or PHASES
            ):
                cells = []
                for rank in range(2):
                    cells.append(trial(stage, strategy, rank, phase, number))
                    if not cells[-1].good:
                        print(stage.launcher.said()[-4000:], file=sys.stderr)
                everything.setdefault(number.name, []).extend(cells)
                print(row(strategy, number, phase, cells), flush=True)
        finally:
            stage.close()
    print()
    for name, seen in everything.items():
        times = [cell.seconds for cell in seen]
        print(
            f"{name}: {sum(cell.good for cell in seen)} of {len(seen)} right, median "
            f"{statistics.median(times):.2f} s, worst {max(times):.2f} s"
        )
    print(f"silence {SILENCE:g} s; {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
