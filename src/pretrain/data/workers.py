"""Child processes of ``prepare``: encoding on several cores, and tokenizer training that can be interrupted.

The children are plain ``python -c`` processes connected by pipes. Unlike those of ``multiprocessing`` they need no
import guard in the user's script, inherit no locks, and end when this process ends, even if it is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import numpy as np
import tokenizers

from pretrain.data.encoding import Encoded, FastEncoder
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.data.tokenizer_build import train_backend
from pretrain.errors import DataError, PretrainError, TokenizerError

__all__ = ["encode_batches", "train_apart"]

# Training on less text than this takes less time than starting a process.
_SMALL_CHARS = 500_000
Answer = Callable[[list[bytes]], Iterable[bytes]]
T = TypeVar("T")


class _Child:
    """A child process that answers messages, which are lists of bytes.

    Args:
        worker: name of the function of this module that is called with ``setting`` in the child and returns the
            function that answers messages.
        setting: its argument.
        advice: what to do if the process ends unexpectedly.
        environment: further environment variables.
    """

    def __init__(self, worker: str, setting: bytes, advice: str, **environment: str) -> None:
        self.name, self.advice = f"the process for {worker}", advice
        code = f"import sys; sys.path[:] = sys.argv[1:]; from pretrain.data import workers as w; w.serve(w.{worker})"
        # In a session of its own, so that Ctrl-C in a terminal reaches this process only, which then ends the child.
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(os.path.abspath, sys.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env={**os.environ, **environment},
        )  # fmt: skip
        self.send([setting])

    def send(self, message: Iterable[bytes]) -> None:
        """Send a message; `receive` reports a child that has ended."""
        with suppress(BrokenPipeError):
            _send(self.process.stdin, message)

    def receive(self) -> list[bytes]:
        """Return the answer to the last message.

        Raises:
            TokenizerError: the worker raised an error of this package.
            DataError: the process has ended.
        """
        try:
            error, *answer = _receive(self.process.stdout)
        except EOFError as failure:
            raise DataError(
                f"{self.name} ended unexpectedly (exit code {self.process.wait()}); often the system ran out of "
                f"memory. {self.advice}"
            ) from failure
        if error:
            raise TokenizerError(error.decode("utf-8"))
        return answer

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with suppress(BrokenPipeError):  # the child has not read all that was sent
            self.process.communicate()


def _send(stream: Any, message: Iterable[bytes]) -> None:
    parts = list(message)
    sizes = np.array([len(parts), *map(len, parts)], dtype="<i8")
    stream.write(sizes.tobytes() + b"".join(parts))
    stream.flush()


def _receive(stream: Any) -> list[bytes]:
    def read(size: int) -> bytes:
        data: bytes = stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    count = int.from_bytes(read(8), "little")
    return [read(size) for size in np.frombuffer(read(8 * count), dtype="<i8").tolist()]


def serve(worker: Callable[[bytes], Answer]) -> None:
    """Answer the messages on standard input until it is closed: the main loop of a child process.

    An answer begins with the message of an error of this package, or with an empty part.
    """
    with suppress(EOFError, BrokenPipeError):
        answer = worker(_receive(sys.stdin.buffer)[0])
        while True:
            message = _receive(sys.stdin.buffer)
            try:
                parts = [b"", *answer(message)]
            except PretrainError as error:
                parts = [str(error).encode("utf-8", "replace")]
            _send(sys.stdout.buffer, parts)


# ------------------------------------------------------------------------------------------------ encoding


def encode_batches(
    tokenizer: Tokenizer, batches: Iterable[T], texts: Callable[[T], list[str]], workers: int
) -> Generator[tuple[T, Encoded], None, None]:
    """Yield every batch, in order, with the concatenated ids of its texts and the number of ids of each.

    Special tokens spelt in a text are read as plain text. With less than two workers, this process encodes.
    """
    if workers < 2:
        encoder = FastEncoder(tokenizer.plain)
        for batch in batches:
            yield batch, encoder.encode(texts(batch))
        return
    setting = tokenizer.plain.to_str().encode()
    advice = "Finished work is kept: run the same command again, with fewer workers."
    one_core = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    # A child has one batch at a time, so that it never waits for its answer to be read while a message is written.
    waiting: deque[tuple[T, _Child]] = deque()

    def finish() -> tuple[T, Encoded]:
        batch, child = waiting.popleft()
        ids, lengths = child.receive()
        idle.append(child)
        return batch, (np.frombuffer(ids, dtype="<u4"), np.frombuffer(lengths, dtype="<i8"))

    with ExitStack() as stack:
        idle = [
            stack.enter_context(_Child("encoding", setting, advice, **one_core))
            for _ in range(workers)
        ]
        for batch in batches:
            if not idle:
                yield finish()
            waiting.append((batch, idle.pop()))
            waiting[-1][1].send(text.encode("utf-8") for text in texts(batch))
        while waiting:
            yield finish()


def encoding(setting: bytes) -> Answer:
    """Return the function of a child that encodes texts with the tokenizer whose file is ``setting``."""
    backend = tokenizers.Tokenizer.from_str(setting.decode())
    backend.encode_special_tokens = True
    encoder = FastEncoder(backend)

    def encode(texts: list[bytes]) -> Iterable[bytes]:
        ids, lengths = encoder.encode([text.decode("utf-8") for text in texts])
        return ids.astype("<u4").tobytes(), lengths.astype("<i8").tobytes()

    return encode


# ------------------------------------------------------------------------------------------------ training


def train_apart(texts: Sequence[str], kind: str, *, vocab_size: int, lowercase: bool) -> Tokenizer:
    """Train like :func:`pretrain.data.tokenizer.train_from_texts`, but stop immediately on an interrupt.

    The training function of the ``tokenizers`` library ignores signals until it has finished, which takes minutes on
    much text, so it runs in a child process.

    Raises:
        TokenizerError: the kind is unknown, or the vocabulary is too small.
        DataError: the child process ended without a result.
    """
    if sum(map(len, texts)) < _SMALL_CHARS:
        return train_from_texts(texts, kind, vocab_size=vocab_size, lowercase=lowercase)
    options = json.dumps({"kind": kind, "vocab_size": vocab_size, "lowercase": lowercase}).encode()
    with _Child("training", options, "Give less text, or a smaller vocab_size.") as child:
        child.send(text.encode("utf-8") for text in texts)
        backend, roles = child.receive()
    return Tokenizer(tokenizers.Tokenizer.from_str(backend.decode()), json.loads(roles))


def training(options: bytes) -> Answer:
    """Return the function of a child that trains a tokenizer on texts, and exits when its parent does."""

    def end_with_parent() -> None:
        sys.stdin.buffer.read(1)  # returns when the pipe is closed
        os._exit(1)

    def train(texts: list[bytes]) -> Iterable[bytes]:
        threading.Thread(target=end_with_parent, daemon=True).start()
        backend, roles = train_backend(
            [text.decode("utf-8") for text in texts], **json.loads(options)
        )
        return backend.to_str().encode(), json.dumps(roles).encode()

    return train
