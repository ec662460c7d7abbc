"""The commands of the documentation: those of the first pages and some others are run at a tiny size, all are parsed.

A line before each ``bash`` block says which: ``<!-- run -->``, ``<!-- ci: NAME -->`` (run by .ci/run), or
``<!-- not run: REASON -->``. The blocks of a page are run one after the other, as a reader types them; only sizes are
replaced, by ``SMALLER`` and ``MORE``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
import threading
import tomllib
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run as torchrun

from pretrain.cli import main as cli
from pretrain.cli.arguments import read_settings, settings_class
from pretrain.inference.serve import Server
from reader import PAGES, ROOT, add_model, fill

FENCE = re.compile(r"(?:<!-- (run|ci|not run)(?:: (.*?))? -->\n)?```bash\n(.*?)```", re.S)
FIRST = ["README", "quickstart", "tutorial-text", "tutorial-labels", "tutorial-chat"]
# What the reader of a page has already.
HAS = {
    "README": ["runs/photos-mae"],
    "tutorial-labels": ["runs/books-bert"],
    "tutorial-chat": ["runs/books-gpt"],
    "finetuning": ["runs/books-bert", "runs/support"],
    "evaluation": ["runs/sentences", "runs/books-gpt", "runs/photos-mae"],
    "audio": ["ast"],
    "images": ["vit-base"],
}
SMALLER = {
    "--model DIR --task chat": "--model runs/books-gpt --task chat",
    "--model DIR --task image-classification": "--model runs/photos-mae --task image-classification",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--web": "--web --port 0",
}
# Options that are added to a command; the last one of a name counts.
SHORT = "--train.limit '3 steps' --train.batch_rows 4"
MORE = {
    "prepare": "--vocab_size 300 --row_length 32 --valid 0.2",
    "train": f"{SHORT} --model.size tiny --train.eval_rows 2",
    "finetune": SHORT,
    "compare": "--seeds 2 --optim.lrs [1e-3]",
    "chat": "--max_new_tokens 8",
}
# Programs of others: they are named, and what they are given is theirs to check.
OTHERS = {"pytest", "ruff", "mypy", "sphinx-build", "sbatch"}


class Parsed(Exception):
    """A program has read its arguments, and is stopped before it does anything."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments


def blocks() -> Iterator[tuple[Path, str, str, str]]:
    """Page, kind, reason or name, and text of every block of commands."""
    for page in PAGES:
        for kind, reason, text in FENCE.findall(page.read_text(encoding="utf-8")):
            yield page, kind, reason, text


def commands(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield from filter(None, (part.strip() for part in line.split("&&")))


def split(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def test_every_block_is_run_or_says_why_not() -> None:
    kinds = [kind for _, kind, _, _ in blocks()]
    assert kinds.count("run") >= 20 and kinds.count("ci") == 2
    for page, kind, reason, text in blocks():
        assert kind, f"{page.name}: nothing says whether this is run:\n{text}"
        assert kind != "not run" or len(reason) > 10, f"{page.name}: no reason:\n{text}"
    left = [(page.stem, text) for page, kind, _, text in blocks() if kind == "not run"]
    here = [text for stem, text in left if stem in FIRST]
    first = next(text for page, kind, _, text in blocks() if kind == "ci")
    assert here == [first], "the first pages are run, all but the copy of what CI runs"


# ------------------------------------------------------------------------------------------------ run


def smaller(command: str) -> list[str]:
    for words, instead in SMALLER.items():
        command = command.replace(words, instead)
    words = split(command)
    name = words[words.index("pretrain") + 1] if "pretrain" in words else ""
    name = "" if name == "prepare" and "--size" in words else name  # images
    added = MORE.get(name, "") + (f" {MORE['compare']}" if "--compare" in words else "")
    return words + split(added)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setattr(Server, "serve_forever", serve_one)
    fill(tmp_path)
    return tmp_path


def serve_one(server: Server) -> None:
    """Serve like a reader who looks at the page once and presses Ctrl-C."""
    thread = threading.Thread(target=ThreadingHTTPServer.serve_forever, args=(server, 0.01))
    thread.start()
    try:
        with urllib.request.urlopen(server.url, timeout=20) as page:
            assert page.status == 200 and b"<html" in page.read()
    finally:
        server.shutdown()
        thread.join()
    raise KeyboardInterrupt


def type_in(command: str, patch: pytest.MonkeyPatch) -> None:
    """Run a command in this process, where everything is imported already; several processes are started for it."""
    words = smaller(command)
    patch.setattr(sys, "stdin", io.StringIO("What sails?\n"))
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        assert subprocess.run(words, timeout=300).returncode == 0, command
    else:
        assert words[0] == "pretrain", f"{command}: only our own commands are run here"
        assert cli.main(words[1:]) == 0, command


@pytest.mark.parametrize(
    "stem", dict.fromkeys(page.stem for page, kind, _, _ in blocks() if kind == "run")
)
def test_commands_of_a_page_run(stem: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HAS.get(stem, []):
        add_model(place, name)
    done = []
    for page, kind, _, text in blocks():
        if page.stem == stem and kind == "run":
            for command in commands(text):
                type_in(command, monkeypatch)
                done.append(command)
    assert done


# --------------------------------------------------------------------------------------------- parsed


def all_commands() -> Iterator[Any]:
    for page, _, _, text in blocks():
        for command in commands(text):
            if split(command):
                yield pytest.param(command, id=f"{page.stem}: {' '.join(split(command))[:60]}")


def check_ours(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """The command exists and takes these options with these types; what it would do is replaced by nothing."""

    def check(arguments: Any) -> None:
        if words[0] in ("train", "finetune"):
            vars(arguments).pop("config")  # the files of the documentation do not all exist
            read_settings(settings_class(words[0]), arguments, cli.COMMANDS[words[0]].options)

    assert words[0] in cli.COMMANDS, words[0]
    patch.setitem(cli.COMMANDS, words[0], dataclasses.replace(cli.COMMANDS[words[0]], run=check))
    assert cli.main(words) == 0


def check_torchrun(words: list[str], patch: pytest.MonkeyPatch) -> None:
    found = torchrun.get_args_parser().parse_args(words)
    assert found.module and found.training_script == "pretrain"
    check_ours(found.training_script_args, patch)


def check_pip(words: list[str]) -> None:
    """Files of constraints and extras exist."""
    assert words[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for option, value in zip(words, words[1:], strict=False):
        assert option != "-c" or (ROOT / value).is_file(), value
        if found := re.search(r"\[(\w+)\]$", value):
            assert found[1] in project["optional-dependencies"], value


def check_python(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """The module or script exists, and its parser takes the arguments."""
    read = argparse.ArgumentParser.parse_args

    def stop(self: Any, *given: Any, **options: Any) -> Any:
        raise Parsed(read(self, *given, **options))

    patch.chdir(ROOT)
    patch.syspath_prepend(ROOT)
    as_module = words[0] == "-m"
    name, given = (words[1], words[2:]) if as_module else (words[0], words[1:])
    spec = importlib.util.find_spec(name) if as_module else None
    assert spec is not None if as_module else (ROOT / name).is_file(), name
    if name == "venv":
        return
    if name == "pretrain.evaluation.harness":
        pytest.importorskip("lm_eval")  # its parser is that of the library
    if not as_module and "argparse" not in (ROOT / name).read_text(encoding="utf-8"):
        assert not given, f"{name} takes no arguments"
        return
    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    patch.setattr(sys, "argv", [name, *given])
    run = runpy.run_module if as_module else runpy.run_path
    with pytest.raises(Parsed) as parsed:
        run(name, run_name="__main__")
    if name == "tests.benchmarks":
        from tests.benchmarks.__main__ import ROWS

        sys.modules.pop(
            "tests.benchmarks.__main__"
        )  # runpy warns if it is there when it runs again
        assert set(getattr(parsed.value.arguments, "rows", [])) <= set(ROWS)


def check(command: str, patch: pytest.MonkeyPatch) -> None:
    words = split(command)
    match Path(words[0]).name:
        case "pretrain":
            check_ours(words[1:], patch)
        case "torchrun":
            check_torchrun(words[1:], patch)
        case "pip":
            check_pip(words[1:])
        case "python" | "python3":
            check_python(words[1:], patch)
        case name:
            assert name in OTHERS, f"{name} is not known here"


@pytest.mark.parametrize("command", list(all_commands()))
def test_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "pretrain train --no_such_option 3",
        "torchrun --nproc-per-node 2 -m pretrain trian",
        "torchrun --no-such-option 2 -m pretrain train",
        'pip install -e ".[no_such_extra]"',
        "pip install -c no-such-file.txt .",
        "python docs/no_such_script.py",
        "python docs/figures.py --no_such_option 3",
        "python docs/audio.py no-such-argument",
        "python -m tests.benchmarks no-such-row",
        "python -m no_such_module",
        "no-such-program --help",
    ],
)
def test_a_wrong_command_is_not_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check(command, monkeypatch)
