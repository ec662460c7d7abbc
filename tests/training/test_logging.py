"""log.jsonl survives kills and resumes; loggers are asked for by name; notebooks get a live view."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import struct
import sys
import threading
import time
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.cli.main import main
from pretrain.errors import ConfigError
from pretrain.printing import discard
from pretrain.training import live
from pretrain.training.launch import read_run
from pretrain.training.live import LiveView
from pretrain.training.logging import Journal, RunLog, make_loggers
from pretrain.training.progress import Progress
from pretrain.training.state import RunState
from pretrain.utils.files import note
from pretrain.utils.run_log import read_log
from tiny import Rows, objective, trainer


def test_resume_drops_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path, None)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / step})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # torn by a kill
    again = RunLog(path, 3)
    again.write({"step": 4, "loss": 0.25})
    again.close()
    assert [r["step"] for r in read_log(path)] == [1, 2, 3, 4]
    assert read_log(path)[2]["loss"] == 1 / 3, "a number lost bits"


def test_a_run_that_is_opened_says_that_its_log_was_changed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In place, so that its size is the same."""
    run = trainer(tmp_path / "run", objective(), Rows(8), limit="3 steps").fit()
    assert read_run(run.path).history == run.history and "damaged" not in capfd.readouterr().err
    path = run.path / "log.jsonl"
    found = re.search(rb'"loss": \d\.(\d)', path.read_bytes())
    assert found is not None
    with open(path, "r+b") as file:
        file.seek(found.start(1))
        file.write(b"1" if found[1] == b"0" else b"0")
    assert len(read_run(run.path).history) == len(run.history) - 1
    assert "log.jsonl is damaged and shown in part: 1 of" in capfd.readouterr().err


def test_a_fresh_run_starts_a_fresh_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n')
    RunLog(path, None).close()
    assert read_log(path) == []


def test_non_finite_numbers_are_written_as_text(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path, None)
    log.write({"step": 1, "loss": math.nan, "eval": {"loss": math.inf}})
    log.close()
    (line,) = path.read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict.pop("chain")
    assert strict == {"step": 1, "loss": "nan", "eval": {"loss": "inf"}}


def test_a_log_with_other_bytes_is_written_again(tmp_path: Path) -> None:
    path, other = tmp_path / "log.jsonl", tmp_path / "other"
    log = RunLog(path, None)
    log.write({"step": 1})
    text = path.read_bytes()
    for data in (text, text.replace(b"1", b"2"), text + b"\n", text[:-1], text * 99):
        other.write_bytes(data)
        other.rename(path)
        log.restore()
        kept = tmp_path / "log.damaged-1.jsonl"
        assert (kept.read_bytes() if kept.exists() else text) == data
        kept.unlink(missing_ok=True)
        assert path.read_bytes() == text
        log.write({"step": 1})
        text = path.read_bytes()
        assert len(read_log(path)) == len(log.records)
    log.close()


def test_unknown_and_missing_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tensorboard"):
        make_loggers(["tensorbord"], tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        make_loggers(["wandb"], tmp_path, {})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_tracked_loggers_get_training_and_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls: list[Any] = []
    fake = types.SimpleNamespace(
        init=lambda **kw: calls.append(("init", kw["name"])),
        log=lambda figures, step: calls.append((step, figures)),
        finish=lambda: calls.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, name, fake)  # type: ignore[arg-type]
    trainer(
        tmp_path, objective(), Rows(8), eval_rows=Rows(2, seed=1), limit="2 steps", loggers=[name]
    ).fit()
    assert calls[0] == ("init", tmp_path.name) and calls[-1] == ("finish", None)
    keys = {key for step, figures in calls[1:-1] for key in figures}
    assert {"train/loss", "train/lr", "train/tokens_per_second", "eval/loss"} <= keys
    assert [step for step, _ in calls[1:-1]] == [1, 2, 2]


def test_a_resumed_run_goes_on_in_its_run_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    calls: list[Any] = []
    fake = types.SimpleNamespace(
        init=lambda **kw: calls.append((kw.get("id"), kw.get("resume"))),
        log=lambda *_, **__: None,
        finish=list,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for out, limit in (
        ("a", "2 steps"),
        ("a", "3 steps"),
        ("a", "4 steps"),
        ("b", "2 steps"),
        ("c", "5 steps"),
    ):
        if out == "c":
            shutil.copytree(tmp_path / "a", tmp_path / "c")
        made = trainer(tmp_path / out, objective(), Rows(8), limit=limit, loggers=["wandb"])
        assert made.fit().step == int(limit[0])
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    trainer(tmp_path / "d", objective(), Rows(8), limit="2 steps", loggers=["wandb"]).fit()
    assert calls.pop() == (None, None)
    ids, ways = zip(*calls, strict=True)
    assert set(ways) == {"allow"} and ids[0] == ids[1] == ids[2] and len(set(ids[2:])) == 3


def test_tensorboard_hides_the_steps_that_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The events of a run that was killed after its checkpoint, beside which the same steps are drawn again."""
    opened: list[Any] = []
    writer = types.SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)
    fake = types.SimpleNamespace(
        SummaryWriter=lambda path, purge_step: opened.append((path, purge_step)) or writer
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setitem(sys.modules, "tensorboard", fake)
    events = str(tmp_path / "tensorboard")
    for limit in ("2 steps", "3 steps"):
        trainer(tmp_path, objective(), Rows(8), limit=limit, loggers=["tensorboard"]).fit()
    assert opened == [(events, 1), (events, 3)]


def test_every_line_has_what_the_report_reads(tmp_path: Path) -> None:
    trainer(tmp_path, objective(), Rows(8), eval_rows=Rows(2, seed=1), limit="3 steps").fit()
    lines = read_log(tmp_path / "log.jsonl")
    for line in lines:
        if "eval" in line:
            assert {"loss", "perplexity", "accuracy", "bits_per_byte", "targets"} <= line[
                "eval"
            ].keys()
        else:
            assert {
                "step",
                "loss",
                "lr",
                "tokens",
                "tokens_per_second",
                "mfu",
                "seconds",
            } <= line.keys()


def test_the_last_step_is_always_in_the_log(tmp_path: Path) -> None:
    trainer(tmp_path, objective(), Rows(8), limit="17 steps", log_every=10).fit()
    steps = [line["step"] for line in read_log(tmp_path / "log.jsonl") if "grad_norm" in line]
    assert steps == [*range(1, 11), 17]


@pytest.mark.parametrize("screen", ["full", "no reader", "closed", "none"])
def test_a_run_goes_on_when_its_lines_cannot_be_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: str
) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with open("/dev/full", "w") as full, os.fdopen(theirs, "w") as pipe, open(os.devnull) as closed:
        closed.close()
        streams = {"full": full, "no reader": pipe, "closed": closed, "none": None}
        monkeypatch.setattr(sys, "stderr", streams[screen])
        note("a note")
        run = trainer(
            tmp_path, objective(), Rows(8), eval_rows=Rows(2, seed=1), limit="3 steps"
        ).fit()
        for stream in (full, pipe):
            discard(stream)  # closing it would try again
    assert run.step == 3
    lost = [line["step"] for line in read_log(tmp_path / "log.jsonl") if "event" in line]
    assert lost == [1], "log.jsonl says once that the lines of the screen were lost"


# ------------------------------------------------------------------------------------------------ terminal


def drawn(monkeypatch: pytest.MonkeyPatch, columns: int, use: Any) -> list[str]:
    """What a terminal of so many columns receives, cut at carriage returns and line ends."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    received: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the end of a terminal
            while piece := os.read(ours, 4096):
                received.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(live, "_publisher", lambda: None)
        use()
    reader.join()
    os.close(ours)
    shown = b"".join(received).decode()
    return [piece for piece in re.split(r"[\r\n]+", shown) if piece.strip()]


@pytest.mark.parametrize(("columns", "lr"), [(80, False), (140, True)])
def test_loss_speed_and_time_left_fit_into_a_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: int, lr: bool
) -> None:
    figures = {"loss": 3.4567, "tokens/s": 1234567.0, "lr": 0.00031416}

    def use() -> None:
        screen = Progress()
        screen.show(12000, figures, 100000)
        time.sleep(0.05)
        screen.show(12001, figures, 100000)
        screen.write("a line that is longer than the terminal: " + "some words " * 20)
        screen.close()

    pieces = drawn(monkeypatch, columns, use)
    assert all(len(piece) < columns for piece in pieces)
    last = pieces[-1]
    assert "step 12,001/100,000" in last and "loss 3.457" in last and "1,234,567 tokens/s" in last
    assert re.search(r"\d:\d\d:\d\d left", last) and ("lr 0.0003142" in last) == lr
    assert "mfu" not in last


def test_what_is_said_after_the_last_step_stands_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def use() -> None:
        screen = Progress()
        for step in (1, 2):
            screen.show(step, {"loss": 1.0}, 2)
            screen.write(f"said after step {step}")
        screen.close()

    pieces = [piece.strip() for piece in drawn(monkeypatch, 80, use)]
    assert "step 2/2" in pieces[-2] and pieces[-1] == "said after step 2"


def test_notes_and_errors_are_wrapped_between_words_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [f"word{k}" for k in range(40)]
    path = "/a/folder/" + "x" * 60

    def use() -> None:
        note(" ".join([*words, path]))
        assert main(["inspect", path]) != 0

    pieces = drawn(monkeypatch, 50, use)
    assert all(len(piece) < 50 for piece in pieces if path not in piece and "error" not in piece)
    shown = " ".join(pieces).split()
    assert shown[: len(words)] == words and shown[len(words)] == path
    assert any("error:" in piece for piece in pieces)


def test_a_terminal_sees_each_step_of_the_start_up_and_a_log_file_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path, objective(), Rows(8), limit="2 steps")
    pieces = [piece.strip() for piece in drawn(monkeypatch, 80, run.fit)]
    steps = [piece for piece in pieces if piece.endswith(" ...")]
    assert "running the largest batch ..." in steps and "saving and reloading ..." in steps
    whole = " ".join(pieces)
    assert re.search(r"start-up: placing the model \d\.\d s, checking free space \d\.\d s", whole)
    assert "?step" not in whole and any("2/2" in piece for piece in pieces[-3:])
    monkeypatch.undo()
    trainer(tmp_path / "log", objective(), Rows(8), limit="2 steps").fit()
    said = capfd.readouterr().err
    assert "\r" not in said and "running the largest batch ...\n" in said


def test_samples_are_text_and_not_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"eval": {"loss": 1.0}, "samples": ["def a():\n\treturn 'é\x1b'"]}
    Progress().evaluation(record, RunState(step=3), " (best)")
    assert capsys.readouterr().err.splitlines() == [
        "step 3: validation: loss 1 (best)",
        "    def a():",
        "        return 'é\\x1b'",
    ]


def test_dear_evaluations_are_remarked_on_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"eval_rows": Rows(64, seed=1), "eval_every": "1 steps"}
    run = trainer(tmp_path, objective(), Rows(8), limit="6 steps", **options).fit()
    said = capsys.readouterr().err
    assert len([r for r in run.history if "eval" in r]) == 6
    assert (
        len(re.findall(r"evaluations take \d+% of the time: with a larger train\.eval_every", said))
        == 1
    )
    trainer(tmp_path / "one", objective(), Rows(8), limit="6 steps").fit()
    assert "evaluations take" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ live view


def view() -> tuple[LiveView, list[dict[str, str]]]:
    published: list[dict[str, str]] = []
    return LiveView(published.append), published


def evaluated(one: LiveView, step: int, best: int, monitor: str = "loss", **figures: float) -> None:
    state = RunState(step=step, best_step=best, monitor=monitor)
    one.evaluation({"step": step, "eval": figures, "seconds": 1.0}, state, "")


def cells(page: str) -> list[list[str]]:
    """Rows of the table; the page must be well-formed XML, so what is not escaped is found."""
    rows = ET.fromstring(page).iter("tr")
    return [["".join(cell.itertext()) for cell in row] for row in rows]


def test_the_live_view_marks_the_best_row_and_means_the_training_loss() -> None:
    one, published = view()
    for step, loss in ((1, 4.0), (2, 2.0), (3, 1.0), (4, 0.5)):
        one.show(step, {"loss": loss, "lr": 1e-3}, 8)
        if step % 2 == 0:
            accuracy = {2: 0.75, 4: 0.5}[step]
            evaluated(one, step, 2, "accuracy", loss=0.9, accuracy=accuracy, targets=7.0)
    one.write("a remark")
    page = published[-1]["text/html"]
    assert cells(page) == [
        ["step", "train loss", "accuracy", "held-out loss", "time", ""],
        ["2", "3.0000", "0.7500", "0.9000", "0:01", "best"],
        ["4", "0.7500", "0.5000", "0.9000", "0:01", ""],
    ]
    best = [row for row in ET.fromstring(page).iter("tr") if row.get("class") == "best"]
    assert len(best) == 1 and best[0][0].text == "2"
    assert page.count("<svg") == 2 and "held-out accuracy" in page and "a remark" in page
    assert "step 4 of 8" in page and "50%" in page
    one.close()
    assert "stopped" in published[-1]["text/html"]
    plain = published[-1]["text/plain"]
    assert [line.endswith("*") for line in plain.splitlines()] == [False, False, True, False, False]


def test_the_live_view_draws_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    one, published = view()
    for step in range(1, 301):  # ten seconds
        clock[0] += 1 / 30
        one.show(step, {"loss": 1 / step}, 300)
    assert 9 <= len(published) <= 12
    one.close()
    last = published[-1]["text/html"]
    assert "step 300 of 300" in last and "done" in last and "10 taken" in last


NOT_FINITE = [math.nan, math.inf, -math.inf]


@given(
    names=st.lists(st.text(max_size=12), min_size=1, max_size=12, unique=True),
    values=st.lists(st.floats(-1e99, 1e99) | st.sampled_from(NOT_FINITE), min_size=1, max_size=40),
    said=st.text(max_size=50),
)
@settings(max_examples=30, deadline=None)
def test_the_live_view_is_well_formed_whatever_it_is_told(
    names: list[str], values: list[float], said: str
) -> None:
    one, published = view()
    record = {"samples": [said], "seconds": values[0], "step": 1}
    for step, value in enumerate(values, 1):
        one.show(step, {"loss": value, **dict.fromkeys(names, value)}, len(values))
        state = RunState(step=step, best_step=1, monitor=names[0])
        one.evaluation({**record, "eval": dict.fromkeys(names, value)}, state, "")
    one.write(said)
    one.close()
    assert f"step {len(values):,} of" in published[-1]["text/plain"], "it gave up drawing"
    rows = cells(published[-1]["text/html"])
    shown = min(len(values), 25)  # the newest, and the best one however old it is
    assert len(rows) == 1 + shown and rows[1][0] == "1"
    assert len({len(row) for row in rows}) == 1


def test_texts_in_the_live_view_are_escaped() -> None:
    one, published = view()
    evil = "<script>alert(1)</script>"
    one.show(1, {"loss": 1.0}, 2)
    state = RunState(step=1, best_step=1, monitor=evil)
    one.evaluation({"eval": {evil: 0.5}, "samples": [evil], "seconds": 1.0}, state, "")
    one.write(evil)
    page = published[-1]["text/html"]
    assert "<script" not in page and page.count("&lt;script&gt;") == 3


def test_a_notebook_that_refuses_to_draw_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(bundle: dict[str, str]) -> None:
        if "step 2" in bundle["text/plain"]:
            raise OSError("the socket is gone")

    monkeypatch.setattr(live, "_publisher", lambda: refuse)
    monkeypatch.setattr(live, "_INTERVAL", 0.0)
    monkeypatch.setattr(live, "_SHARE", 0.0)
    run = trainer(tmp_path, objective(), Rows(8), eval_rows=Rows(2, seed=1), limit="3 steps").fit()
    said = capsys.readouterr().err
    assert run.step == 3 and "the socket is gone" in said and "step 3: validation" in said


def test_a_resumed_run_shows_all_of_its_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[dict[str, str]] = []
    options: dict[str, Any] = {"eval_rows": Rows(4, seed=1), "eval_every": "4 steps"}
    monkeypatch.setattr(live, "_publisher", lambda: pages.append)
    trainer(tmp_path, objective(), Rows(8), **options, limit="8 steps").fit()
    assert [row[0] for row in cells(pages[-1]["text/html"])] == ["step", "4", "8"]
    assert "done at step 8" in pages[-1]["text/html"]
    trainer(tmp_path, objective(), Rows(8), **options, limit="16 steps").fit()
    assert [row[0] for row in cells(pages[-1]["text/html"])] == ["step", "4", "8", "12", "16"]
    trainer(tmp_path, objective(), Rows(8), **options, limit="16 steps").fit()
    assert "nothing left to do after step 16" in pages[-1]["text/html"]


def test_the_live_view_is_for_notebooks_that_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = live.open_screen()
    assert type(plain) is Progress
    plain.close()
    capfd.readouterr()  # the bar takes its leave when it is closed
    monkeypatch.setattr(live, "_publisher", lambda: pytest.fail("a quiet run draws"))
    quiet = trainer(tmp_path, objective(), Rows(8), limit="2 steps")
    quiet.quiet = True
    assert quiet.fit().step == 2 and capfd.readouterr().err == ""


@pytest.mark.parametrize(("unit", "said"), [("nats per target", {}), ("", {"loss_unit": ""})])
def test_the_log_says_the_unit_of_a_loss_that_is_no_likelihood(
    tmp_path: Path, unit: str, said: dict[str, str]
) -> None:
    goal = objective()
    goal.loss_unit = unit
    trainer(tmp_path, goal, Rows(8), limit="1 steps", log_every=1).fit()
    record = next(r for r in read_log(tmp_path / "log.jsonl") if "lr" in r)
    assert {key: value for key, value in record.items() if key == "loss_unit"} == said


def test_evaluations_are_placed_by_epochs_where_their_length_is_known(tmp_path: Path) -> None:
    journal = Journal(tmp_path, [], {}, quiet=True)
    journal.open_log(None)
    journal.epoch_rows = 40
    journal.evaluation(RunState(step=3, rows=60), {"loss": 1.0}, [], "")
    journal.close()
    (record,) = read_log(tmp_path / "log.jsonl")
    assert record["epoch"] == 1.5
    one, published = view()
    one.restore([record])
    one.close()
    assert cells(published[-1]["text/html"])[1][:2] == ["3", "1.50"]
