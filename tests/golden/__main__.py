"""Command line of the golden runs; started with ``src`` and ``tests`` on PYTHONPATH.

    python -m golden record before.json            # on the commit before a change: train all runs, record them
    python -m golden compare before.json           # on the commit after it, on the same machine: every byte
    python -m golden expect lejepa                 # write the part of expected.json on these runs, or all, anew
    python -m golden store FOLDER                  # write run directories like those in stored/

``record`` and ``compare`` take names of runs (see ``runs.py``) to leave the others out. ``compare`` trains again and
compares hashes of all tensors, every line of the logs, and every text file of the last checkpoint; it ends with 1 if
anything differs. ``tests/golden`` must be the same on both commits, and so must torch, the machine and the number of
threads.

``expect`` is for a change that is meant to change what runs do: run it, read ``git diff`` of expected.json, and say in
the commit why every change in it is wanted. ``stored/`` is never written again: what ``store`` writes is added under
another name when the format of directories changes, and the old ones must go on opening.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> int:
    """Run a command; the exit code."""
    parser = argparse.ArgumentParser("golden", description="Train golden runs and compare them.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("record", "train all runs and write what they leave"),
        ("compare", "train all runs and compare what they leave with a record, byte for byte"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("file", type=Path)
        command.add_argument("names", nargs="*", metavar="RUN", help="runs; all if none is named")
    command = commands.add_parser("expect", help="write expected.json anew")
    command.add_argument("names", nargs="*", metavar="RUN", help="runs; all if none is named")
    commands.add_parser("store", help="write run directories").add_argument("folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="golden-") as place:
        os.environ["PRETRAIN_CACHE"] = f"{place}/cache"
        os.environ["HF_HUB_OFFLINE"] = "1"
        if args.command == "store":
            from golden.stored_runs import store

            store(args.folder.absolute())
            return 0
        if args.command == "expect":
            from golden.compare import write_expected

            write_expected(_trained(Path(place), args.names))
            return 0
        if args.command == "record":
            found = {"machine": _machine(), "runs": _trained(Path(place), args.names)}
            args.file.write_text(json.dumps(found, indent=1), encoding="utf-8")
            print(f"{len(found['runs'])} runs recorded in {args.file}")
            return 0
        return _compare(Path(place), args.file, args.names)


def _compare(place: Path, file: Path, names: list[str]) -> int:
    from golden.compare import differences

    before = json.loads(file.read_text(encoding="utf-8"))
    if before["machine"] != _machine():
        print(f"{file} was recorded on another machine or by another torch: {before['machine']}")
        return 2
    runs = {name: run for name, run in before["runs"].items() if not names or name in names}
    if not runs or set(names) - set(runs):
        print(f"{file} does not hold all of: {', '.join(names) or 'any run'}")
        return 2
    found = _trained(place, list(runs))
    sentences = list(differences(runs, found))
    for sentence in sentences:
        print(sentence)
    print(f"{len(runs)} runs compared, {len(sentences)} differences")
    return 1 if sentences else 0


def _trained(place: Path, names: list[str]) -> dict[str, Any]:
    """Records of these runs, or of all."""
    from distributed.torchrun import launch
    from golden import runs

    chosen = names or list(runs.RUNS)
    if unknown := sorted(set(chosen) - set(runs.RUNS)):
        sys.exit(f"no run is called {', '.join(unknown)}; there are {', '.join(runs.RUNS)}")
    for name in chosen:
        print(name, flush=True)
        with contextlib.redirect_stderr(io.StringIO()):
            if runs.RUNS[name].processes == 1:
                runs.make(place, [name])
    runs.make(place, chosen, launch)
    return {name: runs.record(place, name) for name in chosen}


def _machine() -> dict[str, Any]:
    """What bytes may depend on besides the code."""
    import torch

    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
