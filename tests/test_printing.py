"""What is printed cannot drive a terminal: every code point, and every place that prints a stranger's text."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain import errors
from pretrain.printing import Console, printable, printable_pieces, wrapped
from pretrain.training.progress import Progress
from pretrain.utils.files import note

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
EVIL = "a\x1b[2J\x9b\r\x00 b\u202e\u200b\u2066\ufeff\u2028\ud800 c"


def hidden(text: str) -> list[str]:
    return [c for c in text if unicodedata.category(c) in HIDDEN]


def test_no_code_point_is_printed_that_cannot_be_seen() -> None:
    whole = "".join(map(chr, range(sys.maxunicode + 1)))
    kept = set(whole) - set(hidden(whole))
    for lines in (False, True):
        shown = set(printable(whole, lines=lines))
        assert kept <= shown and shown - kept <= ({"\n"} if lines else set())
    assert printable("a\r\nb\tc\u3000d\xa0é\n", lines=True) == "a\nb       c\u3000d\xa0é\n"
    assert printable("a\nb\tc\x1b\u202e") == "a b c\\x1b\\u202e"
    assert printable(printable(EVIL)) == printable(EVIL)


def test_what_prints_texts_of_others_prints_them_harmless(
    capsys: pytest.CaptureFixture[str],
) -> None:
    note(EVIL)
    screen = Progress()
    screen.write(EVIL)
    screen.close()
    shown = capsys.readouterr()
    # The progress bar begins its own lines with a carriage return; the text of others stands whole between them.
    pieces = [piece for piece in re.split(r"[\r\n]", shown.out + shown.err) if "[2J" in piece]
    assert [piece.strip() for piece in pieces] == [printable(EVIL)] * 2
    for name in errors.__all__:
        kind = getattr(errors, name)
        if not isinstance(kind, type) or not issubclass(kind, errors.PretrainError):
            continue  # a function, or the signal that ends a command, which has no text
        if kind not in (errors.CheckpointCorrupt, errors.RunLocked):
            assert str(kind(EVIL)) == printable(EVIL, lines=True)
    assert hidden(str(errors.CheckpointCorrupt(EVIL, EVIL, EVIL))) == []


@given(st.text("ab /-é", max_size=60), st.integers(1, 30))
def test_wrapping_changes_blanks_only(text: str, room: int) -> None:
    shown = wrapped(text, room)
    assert shown.split() == text.split()
    words = [len(word) for word in text.split()]
    fits = max(words, default=0) + 4 + len(text) - len(text.lstrip()) < room
    if fits and not text.startswith("    "):
        assert max(map(len, shown.split("\n"))) < room


def test_commands_are_not_wrapped() -> None:
    command = (
        "    pretrain finetune --model runs/gpt2-tiny-f87e5a0c --data labelled.csv --task TASK"
    )
    assert wrapped(command, 80) == wrapped(command, None) == command


@given(st.lists(st.text("a\t\r\n\x1b\u202e\ud800 é", max_size=5), max_size=8))
def test_pieces_are_printed_as_the_whole_text(pieces: list[str]) -> None:
    shown = list(printable_pieces(pieces))
    assert "".join(shown) == printable("".join(pieces), lines=True) and all(shown)


def test_a_console_prints_nothing_after_its_first_failure() -> None:
    class Pipe:
        written = ""
        fails = False

        def write(self, text: str) -> None:
            if self.fails:
                raise BrokenPipeError(32, "Broken pipe")
            self.written += text

        def flush(self) -> None: ...

    pipe = Pipe()
    screen = Console(pipe)  # type: ignore[arg-type]
    for fails in (False, True, False):
        pipe.fails = fails
        print("line", file=screen, flush=True)
    assert pipe.written == "line\n" and screen.lost == "Broken pipe"


def test_lines_that_were_lost_change_no_exit_code() -> None:
    code = "from pretrain.utils.files import note; note('a'); note('b')"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", code], stderr=full).returncode == 0


def test_what_passes_does_not_silence_a_console() -> None:
    class Slow(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise BlockingIOError(11, "not now")
            return super().write(text)

    screen = Console(slow := Slow())
    print("a", file=screen)
    slow.full = False
    print("b", file=screen)
    assert slow.getvalue() == "b\n" and not screen.lost
    raw = io.BytesIO()
    screen = Console(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    print("café", file=screen)
    print("c", file=copy.copy(screen))
    assert raw.getvalue() == b"caf\\xe9\nc\n" and not screen.lost
