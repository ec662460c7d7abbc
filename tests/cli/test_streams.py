"""The standard streams of a command: closed, full, without a reader, or in an encoding that cannot show everything."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main as cli

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
TINY = "--model gpt2:tiny --tokenizer char --row_length 16 --batch_rows 2 --limit 2 --hidden_size 16 --num_heads 2"


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which ``$P`` is the command line of this package."""
    env = ENV | {"P": f"{sys.executable} -m pretrain"}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=60
    )


def typed(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


def test_a_run_ends_without_a_reader_of_its_lines(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 20)
    train = f"$P train --data text.txt --out run {TINY} --valid 0.2"
    done = shell(f"({train}; echo $? > code) 2>&1 | true", tmp_path)
    assert (tmp_path / "code").read_text() == "0\n", done
    assert {"model", "report.html", "log.jsonl"} <= set(os.listdir(tmp_path / "run"))


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("$P nothing 2>&-", 2, ""),
        ("$P nothing 2>/dev/full", 2, ""),
        ("$P --version >&-", 2, "error: The output cannot be written"),
        ("$P generate run - <&-", 2, "error: Standard input holds no prompt"),
    ],
)
def test_a_closed_or_full_stream_is_no_traceback(
    tmp_path: Path, line: str, code: int, said: str
) -> None:
    done = shell(line, tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


@pytest.mark.parametrize("command", ["generate", "fill-mask"])
def test_input_that_is_no_text_is_named_by_its_line(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(sys, "stdin", typed(b"caf\xc3\xa9\n" * 5000 + b"caf\xe9 [MASK]\n"))
    assert cli.main([command, "nowhere", "-"]) == 2
    said = capsys.readouterr().err
    assert "Line 5001 of standard input is not UTF-8: character 4 is the byte 0xe9." in said


def test_a_byte_order_mark_is_no_part_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr(cli, "_dispatch", lambda _: found.extend(cli._prompts("-")) or 0)
    monkeypatch.setattr(sys, "stdin", typed(b"\xef\xbb\xbfThe king\r\n\xc3\xa9\n"))
    assert cli.main([]) == 0 and found == ["The king", "é"]


def test_output_that_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(cli, "_dispatch", lambda _: print("é → e") or 0)
    assert cli.main([]) == 0 and shown.getvalue() == b"\\xe9 \\u2192 e\n"
