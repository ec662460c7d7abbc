"""JSON messages over TCP, one per line, for the watchdog: non-blocking, limited in size, and safe to parse."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from typing import Any

__all__ = ["FIRST", "Message", "Wire"]

Message = dict[str, Any]

_LINE = 256 << 10  # maximum bytes of a message
FIRST = 16 << 10  # maximum bytes of a message from a peer that has not shown the token yet
_WAITING = 4 << 20  # maximum bytes that are queued for a peer that does not read


class Wire:
    """A connection.

    Attributes:
        gone: why the connection has ended; "" while it is open.
        ended: the peer's process has certainly ended (its system closed the connection).
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock, self.gone, self.ended = sock, "", False
        self._in, self._out = bytearray(), bytearray()
        self._kept: list[Message] = []

    def fileno(self) -> int:
        """Return the file descriptor, for `selectors`."""
        return self.sock.fileno()

    def send(self, message: Message) -> None:
        """Queue a message and send as much as the system accepts without blocking."""
        line = json.dumps(message).encode("ascii") + b"\n"
        # A peer with a longer queue has been detected as silent long before.
        if len(self._out) + len(line) <= _WAITING:
            self._out += line
        self.flush()

    def flush(self) -> bool:
        """Send as much of the queue as the system accepts; return True if the queue is empty.

        A failure is not reported here but by ``receive``, after the messages that the peer has still sent.
        """
        while self._out:
            try:
                del self._out[: self.sock.send(self._out)]
            except BlockingIOError:
                return False
            except OSError:
                self._out.clear()
        return True

    def receive(self, limit: int = _LINE) -> list[Message]:
        """Return all complete messages that have arrived; sets ``gone`` at the end of the connection."""
        while not self.gone:
            try:
                data = self.sock.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                self.gone = f"its connection failed ({error.strerror or error})"
                self.ended = isinstance(error, ConnectionResetError | BrokenPipeError)
            else:
                self._in += data
                if not data:
                    self.gone, self.ended = "its connection was closed without a goodbye", True
                if len(self._in) > limit and b"\n" not in self._in[: limit + 1]:
                    self.gone = "it sends longer messages than agreed"
        *lines, rest = bytes(self._in).split(b"\n")
        self._in = bytearray(rest)
        found, self._kept = self._kept, []
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                self.gone = self.gone or "it sends what is no message"
                break
            found.append(message)
        return found

    def ask(self, seconds: float) -> Message | None:
        """Wait for one message; return None if none arrives in time. Further messages are kept for ``receive``."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            while True:
                found = self.receive(FIRST)
                self._kept = found[1:]
                left = deadline - time.monotonic()
                if found or self.gone or left <= 0:
                    return found[0] if found else None
                selector.select(left)

    def close(self) -> None:
        """Close the connection; a second call does nothing."""
        self.gone = self.gone or "closed"
        with contextlib.suppress(OSError):
            self.sock.close()
