"""A server for one model on this machine: a page to talk to it, and the chat-completions protocol of OpenAI.

It listens on the loopback interface, and answers one request after another. Requests that a web page of another origin
could cause are refused: by the names in Host (against DNS rebinding) and Origin, and by the type of the body.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import select
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote

from pretrain.config.check import check_value
from pretrain.data.chat import Message, as_messages
from pretrain.errors import CheckpointCorrupt, ConfigError, PretrainError, out_of_memory
from pretrain.inference.chat import Chat
from pretrain.inference.generate import Stream
from pretrain.utils.files import note
from pretrain.utils.html import Html, page
from pretrain.utils.strict_json import parse_json

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["Server", "listen", "serve"]

ADDRESS = "127.0.0.1"
_WAITING = 8  # requests that are answered or wait for it
_BODY_LIMIT = 8 << 20  # bytes
_DRAIN = 10.0  # seconds in which a client may send the rest of a refused request
_IDLE = 60.0  # seconds in which a client must read or write something

# Options of a request -> their types. Those in the second line are not of OpenAI's protocol.
_OPTIONS: dict[str, Any] = {
    "temperature": float, "top_p": float, "stop": str | list[str], "seed": int,
    "top_k": int, "min_p": float, "repetition_penalty": float,
}  # fmt: skip
_TEXTS = ("text", "input_text", "output_text")  # types of content parts
_LIMITS = ("max_completion_tokens", "max_tokens")
# Fields that do not change the answer.
_IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
)  # fmt: skip
# Fields of what this server does not do -> the values that ask for nothing.
_NEUTRAL: dict[str, Sequence[Any]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


def listen(port: int) -> socket.socket:
    """Return a socket that listens on a port of the loopback interface; 0 takes a free one.

    Raises:
        ConfigError: the port cannot be used.
    """
    try:
        return socket.create_server((ADDRESS, port))
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise ConfigError(
            f"The port {port} of this machine cannot be used: {reason}. Choose another one with --port; 0 takes a free "
            "one."
        ) from error


def serve(
    model: Model,
    name: str,
    listener: socket.socket,
    system: str = "",
    options: Mapping[str, Any] | None = None,
) -> None:
    """Serve a model until Ctrl-C.

    Args:
        model: a causal model with a chat template.
        name: id of the model in the protocol.
        listener: see `listen`.
        system: the system prompt that stands in the page at first.
        options: options of ``generate`` for what a request does not set; ``max_new_tokens`` is one of them.

    Raises:
        ConfigError: an option is out of range.
    """
    with Server(model, name, listener, system, options) as server:
        note(
            f"Talk to {name} at {server.url} - programs at {server.url}/v1 - Ctrl-C ends the server."
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt as interrupt:
            server.stop()
            note("The server has ended.")
            if type(interrupt) is not KeyboardInterrupt:  # a signal with an exit code of its own
                raise


class Server(ThreadingHTTPServer):
    """The server; see `serve` for the arguments.

    Attributes:
        chat: the conversations with the model; only the thread that holds ``turn`` uses it.
        turn: held while an answer is made.
        places: one for each request that is answered or waits for it.
        stopping: set when the server ends, which ends every answer.
    """

    daemon_threads = True

    def __init__(
        self,
        model: Model,
        name: str,
        listener: socket.socket,
        system: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.chat, self.name = Chat(model), name
        self.options = {"max_new_tokens": 512, **(options or {})}
        self.chat.answer([0], **self.options)  # checks the options
        self.turn, self.stopping = threading.Lock(), threading.Event()
        self.places = threading.BoundedSemaphore(_WAITING)
        self.created = int(time.time())
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.server_port = listener, listener.getsockname()[1]
        names = [f"{host}:{self.server_port}" for host in (ADDRESS, "localhost")]
        self.hosts = frozenset(names + [ADDRESS, "localhost"] * (self.server_port == 80))
        self.page, self.policy = _page(name, system, self.options)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}"

    def stop(self) -> None:
        """End the answer that is being made, and wait until it has ended."""
        self.stopping.set()
        with self.turn:
            pass


def _page(name: str, system: str, options: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return the page and its content security policy, which allows its own script and nothing else."""
    source = Path(__file__).with_name("chat.html").read_text(encoding="utf-8")
    shown = {key: options.get(key) for key in ("temperature", "top_p", "seed", "max_new_tokens")}
    setup = json.dumps({"model": name, "system": system, "options": shown}).replace("<", "\\u003c")
    script = re.findall("<script>(.*?)</script>", source, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    body = page(f"Chat with {name}", [Html(source.replace("SETUP", setup, 1))])
    return body.encode("utf-8", errors="replace"), policy


class _Refusal(Exception):
    """A request that is answered with an error object of OpenAI's protocol."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _ClientGone(Exception):
    """The client has closed the connection, or the server ends."""


@dataclass
class _Request:
    """A checked request for an answer."""

    messages: list[Message]
    stream: bool = False
    usage: bool = False
    shorten: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, given: Any, model: str) -> _Request:
        """Check the body of a request.

        Raises:
            _Refusal: a field is unknown, of the wrong type, or asks for what this server does not do.
        """
        if not isinstance(given, dict):
            raise _Refusal(400, "The body must be a JSON object.")
        given = {key: value for key, value in given.items() if value is not None}
        named = _take(given, "model", str, model)
        if named != model:
            raise _Refusal(
                404, f"The model {named!r} does not exist; this server has {model!r}.",
                param="model", code="model_not_found",
            )  # fmt: skip
        if not isinstance(given.get("messages"), list) or not given["messages"]:
            raise _Refusal(
                400, "messages must be a list of at least one message.", param="messages"
            )
        _refuse_other_parts(given["messages"])
        try:
            asked = cls(as_messages(given.pop("messages")))
        except PretrainError as error:
            raise _Refusal(400, str(error), param="messages") from None
        asked.stream = _take(given, "stream", bool, False)
        about = _take(given, "stream_options", dict[str, bool], None)
        if about is not None and not asked.stream:
            raise _Refusal(
                400, "stream_options is only allowed when stream is true.", param="stream_options"
            )
        asked.usage = (about or {}).get("include_usage", False)
        asked.shorten = (
            _take(given, "truncation", Literal["auto", "disabled"], "disabled") == "auto"
        )
        limits = [(key, _take(given, key, int, None)) for key in _LIMITS if key in given]
        if len(limits) > 1:
            raise _Refusal(400, f"Give one of {' and '.join(_LIMITS)}.", param="max_tokens")
        for key, number in limits:
            if number < 1:
                raise _Refusal(400, f"{key} is {number}; it must be at least 1.", param=key)
            asked.options["max_new_tokens"] = number
        for key, kind in _OPTIONS.items():
            if key in given:
                asked.options[key] = _take(given, key, kind, None)
        if "seed" in asked.options:
            asked.options["seed"] %= 1 << 63
        _refuse_others(given)
        return asked


def _take(given: dict[str, Any], key: str, kind: Any, default: Any) -> Any:
    try:
        return check_value(key, given.pop(key), kind) if key in given else default
    except ConfigError as error:
        raise _Refusal(400, str(error), param=key) from None


def _refuse_other_parts(messages: Sequence[Any]) -> None:
    """Refuse parts of messages that are no text, such as images."""
    for number, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, Mapping) else None
        for part in parts if isinstance(parts, list) else ():
            known = part if isinstance(part, Mapping) else {"text": part}
            kind, text = known.get("type", "text"), known.get("text")
            if kind not in _TEXTS or not isinstance(text, str):
                raise _Refusal(
                    400, f"messages[{number}] has a content part of the type {kind!r:.60} without a text, and this "
                    'server reads text alone. Send parts of the form {"type": "text", "text": "..."}.',
                    param="messages",
                )  # fmt: skip


def _refuse_others(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key in _NEUTRAL and value not in _NEUTRAL[key]:
            raise _Refusal(400, f"This server does not support {key}={value!r:.60}.", param=key)
        if key not in _NEUTRAL and key not in _IGNORED:
            raise _Refusal(400, f"Unrecognized request argument supplied: {key:.60}", param=key)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "pretrain", ""
    timeout = _IDLE
    streaming = False  # the head of a stream of events has been sent

    def do_GET(self) -> None:
        """Send the page or the model."""
        path = unquote(self.path.partition("?")[0])
        model = {
            "id": self.server.name,
            "object": "model",
            "created": self.server.created,
            "owned_by": "pretrain",
        }
        with self._answering():
            self._check_origin()
            if path == "/":
                self._send(200, self.server.page, "text/html; charset=utf-8")
            elif path == "/favicon.ico":
                self._send(204, b"", "image/x-icon")
            elif path == "/v1/models":
                self._send_json(200, {"object": "list", "data": [model]})
            elif path == f"/v1/models/{self.server.name}":
                self._send_json(200, model)
            elif path == "/v1/chat/completions":
                raise _Refusal(405, "Send a POST request to this address.")
            else:
                raise _Refusal(404, f"There is nothing at {path:.100}.", code="not_found")

    def do_POST(self) -> None:
        """Answer a conversation."""
        with self._answering():
            self._check_origin()
            if self.path.partition("?")[0] != "/v1/chat/completions":
                raise _Refusal(404, f"There is nothing at {self.path:.100}.", code="not_found")
            asked = _Request.read(self._body(), self.server.name)
            with self._turn():
                self._complete(asked)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn errors into answers."""
        try:
            yield
        except _Refusal as refusal:
            self._refuse(refusal)
        except PretrainError as error:
            self._refuse(_Refusal(400, str(error)))
        except (_ClientGone, ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            if not out_of_memory(error):
                self._refuse(_Refusal(500, "The server failed; its own output says how."))
                raise  # the server prints it and goes on
            self._refuse(_Refusal(503, "There is not enough memory for this conversation."))

    def _check_origin(self) -> None:
        """Refuse a request that a page of another server, or another name of this one, sent."""
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            raise _Refusal(403, "This server is only reached by the names of the own machine.")
        if origin is not None and origin.lower() not in {f"http://{h}" for h in self.server.hosts}:
            raise _Refusal(403, "This server answers no other web pages than its own.")

    def _refuse(self, refusal: _Refusal) -> None:
        self.close_connection = True  # the body may not have been read
        with contextlib.suppress(OSError):  # the client has gone
            if self.streaming:
                self._event(refusal.body)
            else:
                self._send_json(refusal.status, refusal.body)
            self._drain()

    def _drain(self) -> None:
        """Read and drop what a refused client still sends: closed before, the connection would drop the answer."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        end = time.monotonic() + _DRAIN
        while (left := end - time.monotonic()) > 0:
            self.connection.settimeout(left)
            if not self.connection.recv(1 << 16):
                return

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error that the HTTP parser found, in the same form as all others."""
        self._refuse(_Refusal(code, message or "The request is not understood."))

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") or not re.fullmatch("[0-9]{1,15}", length):
            raise _Refusal(411, "The request needs a Content-Length.")
        if int(length) > _BODY_LIMIT:
            raise _Refusal(413, f"The body is larger than {_BODY_LIMIT:,} bytes.")
        if self.headers.get_content_type() != "application/json":
            raise _Refusal(415, "The Content-Type must be application/json.")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise _ClientGone
        try:
            return parse_json(data, "body")
        except CheckpointCorrupt as error:
            raise _Refusal(
                400, f"The body is no valid JSON: expected {error.expected}, found {error.found}."
            ) from None

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for the model."""
        if not self.server.places.acquire(blocking=False):
            raise _Refusal(503, f"{_WAITING} requests wait already. Try again later.")
        try:
            while not self.server.turn.acquire(timeout=0.1):
                self._check_client()
            try:
                self._check_client()
                yield
            finally:
                self.server.turn.release()
        finally:
            self.server.places.release()

    def _check_client(self) -> None:
        """Raise `_ClientGone` if the client has closed its connection."""
        ready = select.poll()
        ready.register(self.connection, select.POLLIN)
        if self.server.stopping.is_set() or (
            ready.poll(0) and not self.connection.recv(1, socket.MSG_PEEK)
        ):
            raise _ClientGone

    def _complete(self, asked: _Request) -> None:
        chat, positions = self.server.chat, self.server.chat.model.backbone.max_length
        options = {**self.server.options, **asked.options}
        kept = asked.messages
        if asked.shorten:
            kept, ids = chat.fit(kept, options["max_new_tokens"])
        elif len(ids := chat.prompt(kept)) >= positions:
            raise _Refusal(
                400,
                f"This model reads {positions} tokens, answer included, but the messages have {len(ids)}. Shorten "
                'them, or set truncation to "auto", which leaves the first turns out.',
                param="messages",
                code="context_length_exceeded",
            )
        options["max_new_tokens"] = min(options["max_new_tokens"], positions - len(ids))
        answer = chat.answer(ids, **options)
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.server.name,
        }
        if left_out := len(asked.messages) - len(kept):
            head["messages_left_out"] = left_out
        try:
            (self._stream if asked.stream else self._whole)(asked, answer, head)
        finally:
            answer.close()

    def _whole(self, asked: _Request, answer: Stream, head: dict[str, Any]) -> None:
        for _ in answer:
            self._check_client()
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {
            "index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason,
        }  # fmt: skip
        self._send_json(
            200,
            {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)},
        )

    def _stream(self, asked: _Request, answer: Stream, head: dict[str, Any]) -> None:
        """Send the answer as server-sent events."""
        head |= {"object": "chat.completion.chunk"}

        def send(delta: dict[str, Any] | None, reason: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            body = {**head, "choices": [choice] if delta is not None else []}
            if asked.usage:
                body["usage"] = _usage(answer) if delta is None else None
            self._check_client()
            self._event(body)

        first = next(answer, "")  # before the status, which an error decides, too
        self.close_connection = True
        self._head(200, "text/event-stream; charset=utf-8", {"Connection": "close"})
        self.streaming = True
        send({"role": "assistant", "content": ""})
        if first:
            send({"content": first})
        for piece in answer:
            send({"content": piece})
        send({}, answer.finish_reason)
        if asked.usage:
            send(None)
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, body: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())

    def _send_json(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        more = {"Content-Length": str(len(body))}
        if self.close_connection:
            more["Connection"] = "close"
        self._head(status, kind, more)
        self.wfile.write(body)

    def _head(self, status: int, kind: str, more: Mapping[str, str]) -> None:
        self.send_response(status)
        fixed = {
            "Content-Type": kind,
            "Cache-Control": "no-store",
            "Content-Security-Policy": self.server.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for key, value in {**fixed, **more}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Print nothing: the terminal belongs to whoever started the server."""


def _usage(answer: Stream) -> dict[str, int]:
    made, read = answer.new_tokens, answer.prompt_tokens
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
