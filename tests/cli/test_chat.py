"""The command ``chat`` in a terminal: what is answered, remembered, stopped and left."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import pretrain
import tiny
from inference import chatty
from pretrain.cli import main as cli
from pretrain.errors import Interrupted
from pretrain.inference.generate import generate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(chatty.talker().save(tmp_path_factory.mktemp("chat") / "model"))


def talk(patch: pytest.MonkeyPatch, folder: str, typed: str, *words: str) -> int:
    patch.setattr(sys, "stdin", io.StringIO(typed))
    return cli.main(["chat", folder, *words])


def test_a_conversation_is_remembered(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = chatty.say(monkeypatch, "one", "two", "three", "four")
    typed = "a\nb\\\nc\n/reset\nd\n\n/system be good\ne\n/exit\nf\n"
    assert talk(monkeypatch, folder, typed) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"
    assert chatty.texts(asked) == [
        "<user>a<assistant>",
        "<user>a<assistant>one<eos><user>b\nc<assistant>",
        "<user>d<assistant>",
        "<system>be good<user>d<assistant>three<eos><user>e<assistant>",
    ]


def test_commands_and_mistakes_are_said_and_not_answered(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = chatty.say(monkeypatch, "one")
    typed = "/help\n/rset\na <eos>\n/etc/hosts?\n" + "y" * 300
    assert talk(monkeypatch, folder, typed, "--system", "be good") == 0
    shown = capsys.readouterr()
    assert "/reset " in shown.out and shown.out.endswith("\none\n")
    assert "no command /rset" in shown.err and "'<eos>'" in shown.err and "Shorten" in shown.err
    assert "Traceback" not in shown.err
    assert chatty.texts(asked) == ["<system>be good<user>/etc/hosts?<assistant>"]


def test_a_line_that_is_no_text_ends_a_conversation_that_nobody_types(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = chatty.say(monkeypatch, "one")
    typed = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa\nb\\\nb\xff\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert cli.main(["chat", folder]) == 2
    shown = capsys.readouterr()
    assert shown.out == "one\n" and chatty.texts(asked) == ["<user>a<assistant>"]
    assert "error: Line 3 of standard input is not UTF-8: character 2" in shown.err


def test_what_is_cut_is_said(folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked = chatty.say(monkeypatch, "z" * 60)
    typed = "\n".join(f"{n} " + "x" * 40 for n in range(5))
    assert talk(monkeypatch, folder, typed, "--max_new_tokens", "50") == 0
    err = capsys.readouterr().err
    assert err.count("first turns of the conversation are left out") == 1
    assert err.count("--max_new_tokens is 50") == 5
    assert chatty.texts(asked)[4].startswith("<user>3 x")


def test_an_answer_is_printed_as_it_is_made_and_cannot_drive_the_terminal(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen: list[str] = []
    chatty.say(monkeypatch, "ab\x1b[2J\u202ec", before=lambda: seen.append(capsys.readouterr().out))
    assert talk(monkeypatch, folder, "hi\n") == 0
    assert seen[1:4] == ["a", "b", "\\x1b"] and "".join(seen) == "ab\\x1b[2J\\u202ec"


def test_control_c_stops_an_answer_and_leaves_at_the_prompt(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    steps = 0

    def third() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt

    asked = chatty.say(monkeypatch, "abcdef", "next", before=third)
    assert talk(monkeypatch, folder, "hi\nho\n") == 0
    assert capsys.readouterr().out == "ab\nnext\n"
    assert chatty.texts(asked)[1] == "<user>hi<assistant>ab<eos><user>ho<assistant>"

    def leave(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", leave)
    assert talk(monkeypatch, folder, "") == 0

    def terminate(*_: Any) -> str:
        raise Interrupted(143)

    monkeypatch.setattr("builtins.input", terminate)
    assert talk(monkeypatch, folder, "") == 143


def test_a_model_without_a_template_is_refused_or_continued_raw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = chatty.talker()
    assert model.tokenizer is not None
    model.tokenizer.chat_template = None
    path = str(model.save(tmp_path / "base"))
    assert talk(monkeypatch, path, "a\n") == 2
    err = capsys.readouterr().err
    assert "--task chat" in err and f"pretrain chat {path} --raw" in err
    words = ["--raw", "--seed", "1", "--max_new_tokens", "6"]
    assert talk(monkeypatch, path, "a\n/reset\n", *words) == 0
    shown = capsys.readouterr()
    from pretrain.printing import printable

    whole = generate(model, "a", seed=1, max_new_tokens=6)
    assert shown.out == printable(whole, lines=True) + "\n" and "--raw" in shown.err
    assert talk(monkeypatch, path, "a\n", "--raw", "--web") == 2
    assert talk(monkeypatch, path, "a\n", "--raw", "--temperature", "-1") == 2


def test_generate_streams_when_it_is_asked_to(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for words in (["a"], ["a", "--chat"], ["-", "--stop", "q"]):
        found = []
        for stream in ("true", "false"):
            chatty.say(monkeypatch, "é\tb\r\n\x1bc", "d")
            monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
            assert cli.main(["generate", folder, *words, "--stream", stream]) == 0
            found.append(capsys.readouterr().out)
        if words[0] == "a":
            assert found[0] == found[1] and "\\x1bc" in found[0]


@pytest.mark.slow
def test_a_terminal(folder: str) -> None:
    """A real one: the prompt, an answer, the next prompt, Ctrl-D."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    parent, child = pty.openpty()
    words = [sys.executable, "-m", "pretrain", "chat", folder, "--max_new_tokens", "200"]
    process = subprocess.Popen(
        [*words, "--seed", "0"], stdin=child, stdout=child, stderr=child, env=env, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(child)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen and time.monotonic() < end:
            seen += os.read(parent, 4096).decode(errors="replace")
        assert text in seen
        seen = seen.partition(text)[2]

    until("/help shows the commands")
    until("> ")
    os.write(parent, b"hello\n")
    until("hello\r\n")
    until("\n> ")
    os.write(parent, b"\x04")
    assert process.wait(60) == 0
    os.close(parent)


@pytest.mark.parametrize("option", [[], ["--raw"], ["--web", "--port", "0"]])
def test_a_model_that_cannot_speak_is_not_sent_to_training_on_conversations(
    option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    labels = {"head": "sequence-classification", "labels": ["a", "b"]}
    model = pretrain.build("bert", "tiny", tokenizer=tiny.tokenizer(), **labels)
    assert talk(monkeypatch, str(model.save(tmp_path / "model")), "a\n", *option) == 2
    err = capsys.readouterr().err
    assert "cannot continue text" in err and "finetune" not in err
