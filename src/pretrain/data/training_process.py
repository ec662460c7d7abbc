"""Training of a tokenizer in a child process that can be interrupted at any moment.

The training function of the ``tokenizers`` library ignores signals until it has finished, which takes minutes on much
text.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import tokenizers

from pretrain.data.encoding import _receive, _send
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.data.tokenizer_build import train_backend
from pretrain.errors import DataError, PretrainError, TokenizerError

__all__ = ["serve", "stoppable", "train_apart"]

# Training on less text than this takes less time than starting a process.
_SMALL_CHARS = 500_000


def train_apart(texts: Sequence[str], kind: str, *, vocab_size: int, lowercase: bool) -> Tokenizer:
    """Train like :func:`pretrain.data.tokenizer.train_from_texts`, but stop immediately on an interrupt.

    Raises:
        TokenizerError: the kind is unknown, or the vocabulary is too small.
        DataError: the child process exited without a result.
    """
    if sum(map(len, texts)) < _SMALL_CHARS:
        return train_from_texts(texts, kind, vocab_size=vocab_size, lowercase=lowercase)
    code = "import sys; sys.path[:] = sys.argv[1:]; from pretrain.data.training_process import serve; serve()"
    # The child gets its own session, so that Ctrl-C in a terminal reaches only the parent, which then kills the child.
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(os.path.abspath, sys.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        with suppress(BrokenPipeError):
            options = {"kind": kind, "vocab_size": vocab_size, "lowercase": lowercase}
            _send(child.stdin, json.dumps([options, list(texts)]).encode())
        answer = json.loads(_receive(child.stdout))
    except (OSError, EOFError) as error:
        raise DataError(
            f"the process that trained the tokenizer ended unexpectedly (exit code {child.wait()}); often the system "
            "was out of memory. Give less text, or a smaller vocab_size."
        ) from error
    finally:
        child.kill()
        child.communicate()
    if "error" in answer:
        raise TokenizerError(answer["error"])
    return Tokenizer(tokenizers.Tokenizer.from_str(answer["backend"]), answer["roles"])


def serve() -> None:
    """Entry point of the child: train as requested on standard input, and exit when the parent exits."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    try:
        options, texts = json.loads(_receive(source))
        threading.Thread(target=_end_with_parent, args=(source,), daemon=True).start()
        try:
            backend, roles = train_backend(texts, **options)
            answer: dict[str, Any] = {"backend": backend.to_str(), "roles": roles}
        except PretrainError as error:
            answer = {"error": str(error)}
        _send(target, json.dumps(answer).encode())
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _end_with_parent(source: Any) -> None:
    source.read(1)  # returns when the pipe is closed
    os._exit(1)


@contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGTERM raise SystemExit(143), so that temporary files are cleaned up, unless a handler is set already."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
