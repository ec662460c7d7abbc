"""The server: the chat-completions protocol, who may ask, one answer at a time, and the page."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from inference import chatty
from pretrain.errors import ConfigError
from pretrain.inference import serve as serving
from pretrain.inference.serve import Server, listen

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(chatty.talker(), "tiny", listen(0), options={"max_new_tokens": 60}) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.stop()
        made.shutdown()
        thread.join(10)


def ask(
    server: Server,
    body: Any = None,
    path: str = "/v1/chat/completions",
    method: str = "",
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    names = {"Content-Type": "application/json"} if data is not None else {}
    names |= {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(method or ("GET" if data is None else "POST"), path, data, names)
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    connection.close()
    return found


def refused(
    server: Server, status: int, body: Any = None, *args: Any, **headers: str
) -> dict[str, Any]:
    """The error object of a request that must be refused."""
    code, _, data = ask(server, body, *args, **headers)
    error = json.loads(data)["error"]
    assert code == status and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return dict(error)


# ------------------------------------------------------------------------------------------ the protocol


def test_an_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = chatty.say(monkeypatch, "good day")
    status, headers, data = ask(server, {"model": "tiny", "messages": HELLO, "user": "me", "n": 1})
    found = json.loads(data)
    assert status == 200 and headers["content-type"] == "application/json"
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    assert found["model"] == "tiny" and "messages_left_out" not in found
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "good day", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt, made = len(asked[0]), len("good day") + 1
    assert found["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
    }
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    for limit in ("max_tokens", "max_completion_tokens"):
        cut = json.loads(ask(server, {**body, limit: 3})[2])["choices"][0]
        assert cut["message"]["content"] == "goo" and cut["finish_reason"] == "length"
    stopped = json.loads(ask(server, {**body, "stop": ["x", "d d"]})[2])["choices"][0]
    assert stopped["message"]["content"] == "goo" and stopped["finish_reason"] == "stop"
    assert chatty.texts(asked)[-1] == "<user>hi<assistant>"


def test_a_streamed_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    chatty.say(monkeypatch, "wie schön\n\n日")
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    status, headers, data = ask(server, body)
    assert status == 200 and headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, end, rest = data.decode().split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    *said, usage = chunks
    deltas = [chunk["choices"][0]["delta"] for chunk in said]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    pieces = [delta["content"] for delta in deltas[1:-1]]
    assert "".join(pieces) == "wie schön\n\n日" and len(pieces) > 5
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in said]
    assert reasons == [None] * (len(said) - 1) + ["stop"]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 16
    assert all(chunk["usage"] is None for chunk in said)


def test_requests_decide_and_options_are_the_defaults(server: Server) -> None:
    def content(**options: Any) -> str:
        body = {"messages": HELLO, "max_tokens": 12, **options}
        return str(json.loads(ask(server, body)[2])["choices"][0]["message"]["content"])

    assert content(temperature=1, seed=5) == content(temperature=1, seed=5) != content(seed=6)
    assert content(seed=-1) == content(seed=(1 << 63) - 1)
    greedy = content()
    assert content(temperature=0, top_p=0.5) == greedy != content(temperature=1.5, seed=1)
    whole = server.chat.answer(server.chat.prompt(HELLO), max_new_tokens=12)
    assert "".join(whole) == greedy


def test_models(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = json.loads(ask(server, None, "/v1/models")[2])
    assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == ["tiny"]
    assert json.loads(ask(server, None, "/v1/models/tiny")[2]) == listed["data"][0]
    refused(server, 404, None, "/v1/models/other")
    monkeypatch.setattr(server, "name", "mein Schiff/größer")
    found = json.loads(ask(server, None, f"/v1/models/{quote(server.name, safe='')}")[2])
    assert found["id"] == server.name


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt-5"}, 404, "model"),
        ({"model": 3}, 400, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "<eos>"}]}, 400, None),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": True}, 400, "temperature"),
        ({"temperature": -1}, 400, None),
        ({"top_p": 2}, 400, None),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 1.5}, 400, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, 400, "max_tokens"),
        ({"stop": [1]}, 400, "stop"),
        ({"seed": "x"}, 400, "seed"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"n": 2}, 400, "n"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"max_token": 3}, 400, "max_token"),
        ({"truncation": "foo"}, 400, "truncation"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_fields_are_named(server: Server, change: Any, status: int, param: Any) -> None:
    error = refused(server, status, {"messages": HELLO, **change})
    assert error["param"] == param and error["message"]


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "a"}}, {"type": "text"}, 3]
)
def test_parts_that_are_no_text_are_refused_in_words_of_the_protocol(
    server: Server, part: Any
) -> None:
    messages = [*HELLO, {"role": "user", "content": [{"type": "text", "text": "see"}, part]}]
    error = refused(server, 400, {"messages": messages})
    assert error["param"] == "messages" and f"messages[{len(HELLO)}]" in error["message"]
    assert "reads text alone" in error["message"] and "train" not in error["message"]


def test_a_refused_body_is_read_so_that_the_answer_arrives(server: Server) -> None:
    """A connection that is closed with unread data drops the answer, which the client has not read yet."""
    body = json.dumps({"messages": HELLO, "user": "x" * (24 << 20)}).encode()
    refused(server, 413, body)
    refused(server, 415, body[: 7 << 20], Content_Type="text/plain")
    refused(server, 404, body, "/v1/embeddings")


def test_wrong_requests_are_refused(server: Server) -> None:
    for body in (b"", b"{", b"[]", b"\xff", b'{"a": NaN}', b"[" * 10_000, b'{"a":1,"a":1}'):
        refused(server, 400, body)
    refused(server, 404, HELLO, "/v1/embeddings")
    refused(server, 404, None, "/etc/passwd")
    refused(server, 405, None, "/v1/chat/completions")
    refused(server, 501, None, "/", "DELETE")
    refused(server, 415, {"messages": HELLO}, Content_Type="text/plain")
    refused(server, 413, None, "/v1/chat/completions", "POST", Content_Length=str(1 << 40))
    refused(server, 411, None, "/v1/chat/completions", "POST", Transfer_Encoding="chunked")
    refused(server, 411, None, "/v1/chat/completions", "POST", Content_Length="-5")


def test_only_this_machine_and_this_page_may_ask(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    body, port = {"messages": HELLO, "max_tokens": 1}, server.server_port
    for host in (f"evil.example:{port}", "127.0.0.1:1", f"127.0.0.1.evil.example:{port}", ""):
        refused(server, 403, None, "/", Host=host)
        refused(server, 403, body, Host=host)
    for origin in (
        "http://evil.example",
        "null",
        f"https://127.0.0.1:{port}",
        "http://127.0.0.1:1",
    ):
        refused(server, 403, body, Origin=origin)
    for host in (f"127.0.0.1:{port}", f"LOCALHOST:{port}"):
        assert ask(server, body, Host=host, Origin=f"http://{host}")[0] == 200
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert "Traceback" not in capfd.readouterr().err


def test_a_conversation_that_is_too_long_is_refused_or_shortened(server: Server) -> None:
    turns = [{"role": r, "content": "x" * 40} for r in ("user", "assistant") * 4]
    body = {"messages": [*turns, *HELLO], "max_tokens": 2}
    error = refused(server, 400, body)
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    shortened = json.loads(ask(server, {**body, "truncation": "auto"})[2])
    assert shortened["messages_left_out"] == 4
    assert "Shorten" in refused(server, 400, {"messages": [{"role": "user", "content": "x" * 300}],
                                              "truncation": "auto"})["message"]  # fmt: skip


def test_an_error_in_the_middle_of_an_answer_is_sent(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(99))

    def fail() -> None:
        if next(steps) == 3:
            raise ConfigError("The settings forbid every token.")

    chatty.say(monkeypatch, "abcdef", before=fail)
    data = ask(server, {"messages": HELLO, "stream": True})[2].decode()
    last = data.strip().split("\n\n")[-1]
    assert "forbid" in json.loads(last.removeprefix("data: "))["error"]["message"]


# ------------------------------------------------------------------------------------------ one at a time


def hold(patch: pytest.MonkeyPatch, text: str) -> tuple[threading.Event, list[int]]:
    """Let the answer wait for an event at its third token; the tokens that were made are counted."""
    go, made = threading.Event(), [0]

    def before() -> None:
        made[0] += 1
        if made[0] == 3:
            go.wait(20)

    chatty.say(patch, text, before=before)
    return go, made


def wait_for(what: Any) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_answers_are_made_one_after_another_and_too_many_are_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, made = hold(monkeypatch, "abcd")
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(server, {"messages": HELLO})[0]))
        for _ in range(serving._WAITING)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: made[0] == 3 and server.places._value == 0)
    assert "wait already" in refused(server, 503, {"messages": HELLO})["message"]
    assert ask(server, None, "/v1/models")[0] == 200 and made[0] == 3
    go.set()
    for thread in threads:
        thread.join(20)
    assert found == [200] * serving._WAITING
    wait_for(lambda: server.places._value == serving._WAITING)


def test_a_client_that_leaves_ends_its_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (True, False):
        with monkeypatch.context() as patch:
            go, made = hold(patch, "abcdefghijkl")
            body = json.dumps({"messages": HELLO, "stream": stream}).encode()
            client = socket.create_connection(("127.0.0.1", server.server_port))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            wait_for(lambda: made[0] == 3)  # noqa: B023
            client.close()
            go.set()
            wait_for(lambda: server.places._value == serving._WAITING)
            assert made[0] <= 5


def test_the_end_of_the_server_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    go, made = hold(monkeypatch, "abcdefghijkl")
    with Server(chatty.talker(), "tiny", listen(0)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        body = json.dumps({"messages": HELLO, "stream": True})
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        wait_for(lambda: made[0] == 3)
        server.stopping.set()
        go.set()
        server.stop()
        assert made[0] <= 5 and b"[DONE]" not in connection.getresponse().read()
        server.shutdown()
        thread.join(10)


def test_what_cannot_be_served_is_named(server: Server) -> None:
    with pytest.raises(ConfigError, match=r"port \d+ .*Address already in use.*--port"):
        listen(server.server_port)
    with pytest.raises(ConfigError, match="port 99999"):
        listen(99999)
    with pytest.raises(ConfigError, match="temperature"):
        Server(chatty.talker(), "tiny", listen(0), options={"temperature": -1})


# ------------------------------------------------------------------------------------------ the page


def test_the_page_is_one_file_and_trusts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(chatty.talker(), "a</script><b>&", listen(0), "be </script> good") as server:
        text, policy = server.page.decode(), server.policy
    assert text.count("</script>") == 2 and "<b>&" not in text
    assert "http://" not in text and "https://" not in text and "innerHTML" not in text
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "script-src 'sha256-" in policy and "frame-ancestors 'none'" in policy


def test_the_page_is_sent_with_its_policy(server: Server) -> None:
    status, headers, data = ask(server, None, "/?x=1")
    assert status == 200 and data == server.page and headers["content-type"].startswith("text/html")
    assert headers["content-security-policy"] == server.policy
    assert ask(server, None, "/favicon.ico")[0] == 204


def test_the_openai_client(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    openai = pytest.importorskip("openai")
    chatty.say(monkeypatch, "good day")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO}
    answer = client.chat.completions.create(**options, temperature=0.5, seed=1)
    assert answer.choices[0].message.content == "good day"
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens == 9
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, max_completion_tokens=6, stream_options={"include_usage": True}
        )
    )
    said = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in said) == "good d"
    assert said[-1].finish_reason == "length" and chunks[-1].usage.completion_tokens == 6
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**options, n=2)
    assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x" * 400}]
        )
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    folder = str(chatty.talker().save(tmp_path / "model"))
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pretrain", "chat", folder, "--web", "--port", "0"]
    for number, code in ((signal.SIGINT, 0), (signal.SIGTERM, 143)):
        process = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        told = next(line for line in lines if "Talk to model at" in line)
        port = int(told.split("http://127.0.0.1:")[1].split()[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().status == 200
        process.send_signal(number)
        assert process.wait(30) == code
        assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_the_page_in_a_browser(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask, read the streamed answer, stop one, set a limit, read an error, begin anew."""
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser_path is None:
        pytest.skip("there is no chromium")
    evil = "<img src=x onerror=alert(1)>\u202e\x1b[2J"
    go, made = hold(monkeypatch, evil)
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=arguments)
        page = browser.new_page(viewport={"width": 400, "height": 700})
        page.set_default_timeout(30_000)
        problems: list[str] = []
        requested: set[str] = set()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: requested.add(request.url))
        page.goto(server.url)
        send = page.locator("#send")
        page.fill("#text", "first")
        page.keyboard.press("Enter")
        page.locator(".assistant", has_text="<i").wait_for()  # streamed: the third token waits
        assert send.inner_text() == "Stop" and made[0] == 3
        send.click()
        page.locator(".note", has_text="Stopped").wait_for()
        go.set()
        wait_for(lambda: server.places._value == serving._WAITING)
        assert made[0] <= 6
        page.fill("#text", "second")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("line")
        send.click()
        page.locator("#send", has_text="Send").wait_for()
        shown = page.locator(".assistant").nth(1)
        assert shown.text_content() == evil and page.locator("#log img").count() == 0
        assert page.locator(".user").nth(1).text_content() == "second\nline"
        page.click("#toggle")
        page.fill("#max_tokens", "0")
        page.fill("#text", "third")
        page.keyboard.press("Enter")
        page.locator(".error", has_text="max_tokens").wait_for()
        assert page.input_value("#text") == "third"
        page.fill("#max_tokens", "2")
        page.keyboard.press("Tab")
        page.click("#send")
        page.locator(".note", has_text="cut").wait_for()
        page.click("#reset")
        assert page.locator(".user").count() == 0
        width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert width <= 0 and problems == []
        assert requested == {f"{server.url}/", f"{server.url}/v1/chat/completions"}
        browser.close()
