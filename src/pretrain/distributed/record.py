"""Failure records: what is printed and written when a process of a run is lost, the same on all ranks.

Stacks name files relative to the import path and never by an absolute path, so that a record can be shared.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from pretrain.utils.files import printable, replace_file

__all__ = [
    "ENDED",
    "FILE",
    "Record",
    "is_waiting",
    "main_stack",
    "process_state",
    "say",
    "stack_of",
    "write",
]

FILE = "failure.json"
ENDED = "dead"
Record = dict[str, Any]

_FRAMES, _TEXT = 60, 12_000  # limits for one stack: frames, characters
_SHOWN = 8  # frames of this process's own stack on stderr
_REMEDIES = {
    "died": "It was killed or it crashed: see its own output, and `dmesg` of its host for the out-of-memory killer.",
    "silent": "Its process is stopped or dead, its host is off, or the network between the hosts is cut.",
    "hung": "Its stack shows where. If that work may take so long, raise parallel.timeout.",
    "raised": "This is the first failure; failures of other processes follow from it.",
}
# Matches the innermost Python line of a process that waits for others (the frames below it are C++).
_WAITS = re.compile(
    r"\.wait\(|\.(item|tolist|synchronize|backward)\(|all_reduce|all_gather|all_to_all|reduce_scatter|broadcast|"
    r"barrier|run_backward|\b(i?send|i?recv)\(|dist\.gather|dist\.scatter"
)


def main_stack() -> str:
    """Return the stack of the main thread, innermost frame last."""
    return stack_of(sys._current_frames().get(threading.main_thread().ident or 0))


def stack_of(innermost: FrameType | TracebackType | None) -> str:
    """Return a stack or a traceback as text: ``module/file.py:line function: source``, innermost frame last."""
    if innermost is None:
        return ""
    if isinstance(innermost, TracebackType):
        frames = traceback.extract_tb(innermost, limit=-_FRAMES)
    else:
        frames = traceback.extract_stack(innermost, limit=_FRAMES)
    lines = [
        f"{_module_path(frame.filename)}:{frame.lineno} {frame.name}: {(frame.line or '')[:160]}"
        for frame in frames
    ]
    return "\n".join(lines)[-_TEXT:]


def _module_path(file: str) -> str:
    if not os.path.isabs(file):
        return file
    roots = [root for root in map(os.path.abspath, filter(None, sys.path)) if root != os.sep]
    below = [file[len(root) + 1 :] for root in roots if file.startswith(root + os.sep)]
    return min(below, key=len) if below else os.path.basename(file)


def is_waiting(stack: str) -> bool:
    """Return whether a stack looks like that of a process that waits for others inside a collective.

    If the main thread waits for another thread of its process, see `main_stack`, the stack of that thread decides.
    """
    last = stack.rsplit("\n", 1)[-1]
    return "torch/distributed/" in last or _WAITS.search(last.partition(": ")[2]) is not None


def process_state(pid: int) -> str:
    """Return the state of a process of this host that does not run, e.g. "stopped by a signal"; "" otherwise.

    Other systems than Linux only report whether it has ended.
    """
    known = {
        "T": "stopped by a signal",
        "t": "stopped by a debugger",
        "D": "in uninterruptible input or output",
        "Z": ENDED,  # not yet collected by its parent
    }
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_text()
        return known.get(text.rpartition(")")[2].split()[0], "")
    try:
        os.kill(pid, 0)
    except OSError as error:
        return ENDED if isinstance(error, ProcessLookupError) else ""
    return ""


def say(record: Mapping[str, Any], rank: int, size: int, own: str, code: int) -> None:
    """Print the record to stderr: a sentence, the record in JSON (the same on all ranks), and this process's stack.

    The text goes to the file descriptor itself, because the hung main thread may hold the locks of Python's buffers.
    """
    others = "".join(f" Rank {one['rank']} too: {one['what']}." for one in record["also"])
    lines = [
        "",
        f"error: Rank {record['rank']} of {size} (host {record['host']}, process {record['pid']}) was lost in phase "
        f"{record['phase']!r} of step {record['step']}: {record['what']}.{others} {_REMEDIES[record['kind']]}",
        f"first failure: {json.dumps(record)}",
    ]
    stack = str(record.get("stack", ""))
    if stack:
        lines += [f"stack of rank {record['rank']}:", *(f"  {line}" for line in stack.split("\n"))]
    if own and record["rank"] != rank:
        lines += [f"rank {rank} was at:", *(f"  {line}" for line in own.split("\n")[-_SHOWN:])]
    lines.append(
        f"rank {rank} stops with exit code {code}. The same command again goes on from the last checkpoint."
    )
    data = ("\n".join(map(printable, lines)) + "\n").encode("utf-8", "replace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def write(run_dir: Path, record: Record, stacks: Mapping[int, str]) -> None:
    """Write the record atomically as ``failure.json``, unless that of this attempt has been written already.

    Args:
        run_dir: the run directory; it is not created.
        record: the failure record.
        stacks: stacks of the main threads by rank; equal ones are written once.
    """
    path = run_dir / FILE
    with contextlib.suppress(OSError, ValueError):
        if json.loads(path.read_bytes()[: 4 << 20]).get("run") == record.get("run"):
            return
    same = defaultdict(list)
    own = {record["rank"]: record["stack"]} if record.get("stack") else {}
    for rank, stack in sorted((dict(stacks) | own).items()):
        same[stack].append(rank)
    whole = record | {"stacks": [{"ranks": r, "stack": s.split("\n")} for s, r in same.items()]}
    text = json.dumps(_without_places(whole), indent=2, ensure_ascii=True)
    with contextlib.suppress(OSError):
        replace_file(path, f"{text}\n".encode())


def _without_places(value: Any) -> Any:
    """Reduce absolute paths inside texts to their last component."""
    if isinstance(value, str):
        return re.sub(r"(?<![\w./])(?:~?/|file:/)[^\s:,'\"]*/([^\s/:,'\"]+)", r"\1", value)
    if isinstance(value, Mapping):
        return {key: _without_places(one) for key, one in value.items()}
    return [_without_places(one) for one in value] if isinstance(value, list) else value
