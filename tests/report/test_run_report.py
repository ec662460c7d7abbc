"""The report and its pictures: self-contained, escaped, and robust against what a killed run leaves behind."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from pretrain import report
from pretrain.errors import DataError
from pretrain.report.history import number
from pretrain.report.run_report import machine_tiles, unfinished_tiles
from pretrain.utils.curves import Series, curve_svg, nice_ticks, thin
from pretrain.utils.html import figure

SVG = "{http://www.w3.org/2000/svg}"


def make_run(folder, *, steps=50, extra=(), torn=True):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"event": "start", "data": {"documents": 12, "tokens": 3456}})]
    for step in range(1, steps + 1):
        lines.append(
            json.dumps(
                {"step": step, "loss": 4 / step + 1, "lr": 1e-3 / step, "tokens": step * 128,
                 "tokens_per_second": 1000.0 + step, "grad_norm": 0.5, "mfu": 0.1}
            )
        )  # fmt: skip
        if step % 10 == 0:
            lines.append(
                json.dumps(
                    {
                        "step": step,
                        "eval": {"loss": 5 / step + 1, "accuracy": step / 100},
                        "samples": [f"text {step}"],
                    }
                )
            )
    lines += [json.dumps(record) for record in extra]
    text = "\n".join(lines) + "\n" + ('{"step": 51, "lo' if torn else "")
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    (folder / "run.yaml").write_text(
        "data:\n  train: books\nmodel:\n  family: gpt2\n  size: tiny\nobjective:\n  class_path: NextToken\n"
    )
    return folder


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains about tags that do not nest."""

    VOID = {"meta", "rect", "line", "circle", "polyline", "polygon", "br"}

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_says_everything(tmp_path):
    run = make_run(tmp_path / "books-gpt")
    (run / "checkpoint-50").mkdir()
    (run / "checkpoint-50" / "manifest.json").write_text("{}")
    (run / "checkpoint-60").mkdir()  # no manifest: it does not exist
    path = report.write(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join(page.text)
    for words in (
        "books-gpt", "gpt2 tiny", "NextToken", "Evaluations on held-out rows", "text 50", "3,456", "checkpoint-50",
        "pretrain train --config", "learning rate", "tokens per second", "best held-out loss, step 50", "1.1",
    ):  # fmt: skip
        assert words in text, words
    assert "checkpoint-60" not in text
    assert f"pretrain.load({str(run / 'checkpoint-50')!r})" in text, "the run has no result yet"
    assert page.tags.count("svg") >= 4


def test_the_code_opens_the_result_with_its_head(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("runs/books-gpt"))
    for name in ("checkpoint-50", "model"):
        (run / name).mkdir()
        (run / name / "manifest.json").write_text("{}")
        (run / name / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    text = " ".join(Page(report.render(run)).text)
    assert "pretrain.load('runs/books-gpt/model')" in text and str(tmp_path) not in text
    assert "AutoModelForCausalLM.from_pretrained('runs/books-gpt/model')" in text


def test_the_main_chart_is_drawn_for_narrow_pages_too(tmp_path):
    text = report.render(make_run(tmp_path / "run"))
    wide, narrow = text.index('<div class="wide"><svg'), text.index('<div class="narrow"><svg')
    assert 'viewBox="0 0 920 360"' in text[wide : wide + 200]
    assert 'viewBox="0 0 360 260"' in text[narrow : narrow + 200]
    assert "@media (max-width:600px){.pt .wide{display:none}.pt .narrow{display:block}" in text


def test_an_overfitted_run_is_remarked_on(tmp_path):
    rising = [{"step": 50 + k, "eval": {"loss": 2.0 + k}} for k in range(3)]
    remarked = report.render(make_run(tmp_path / "over", extra=rising))
    assert "the run overfitted: the held-out loss rose" in remarked
    assert "the run overfitted" not in report.render(make_run(tmp_path / "plain"))


def test_model_and_machine_are_shown_as_far_as_they_are_known():
    history = report.sort_records([{"step": 1, "loss": 1.0, "seconds": 3725.0}])
    facts = {"parameters": 1000, "trained": 10, "peak_memory": 3 * 2.0**29, "hardware": "<cpu>"}
    assert machine_tiles(history, facts) == [
        ("parameters", "1,000"),
        ("of these trained", "10"),
        ("time", "1:02:05"),
        ("peak memory of a process", "1.50 GiB"),
        ("hardware", "<cpu>"),
    ]
    assert machine_tiles(report.sort_records([]), {"parameters": "many"}) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.95, "0.9500"), (0.0, "0.0000"), (123.456, "123.4560"), (657.0, "657"), (3e-5, "3e-05"), (1.0, "1.0000")],
)  # fmt: skip
def test_figures_have_even_decimals(value, shown):
    assert figure(value) == shown


def test_report_is_self_contained(tmp_path):
    page = Page(report.render(make_run(tmp_path / "run")))
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base"} & set(
        page.tags
    )
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        assert name not in {"src", "href", "xlink:href", "srcset", "action"}
        if name != "xmlns":
            assert "//" not in (value or ""), (name, value)
    assert "url(" not in report.render(tmp_path / "run") and "@import" not in report.render(
        tmp_path / "run"
    )


EVIL = "</pre></style><script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;\x00\ud800"


def test_everything_is_escaped(tmp_path):
    run = make_run(
        tmp_path / "<script>alert(1)<",
        extra=[
            {"step": "inf", "samples": ["x"]},
            {"step": 61, "loss": "nan", "tokens": "inf", "lr": None, "grad_norm": []},
            {"step": 60, "eval": {"loss": 1.0, EVIL: 2.0}, "samples": [EVIL, {"a": EVIL}]},
            {"event": EVIL, "note": EVIL, "data": {EVIL: EVIL, "sources": {EVIL: [EVIL]}}},
        ],
    )
    (run / "run.yaml").write_text(
        json.dumps({"data": {"train": EVIL[:-2]}, "model": {"family": EVIL[:-2]}})
    )
    page = Page(report.write(run).read_text(encoding="utf-8"))
    assert not {"script", "img"} & set(page.tags)
    assert "<script>alert('x')</script>" in "".join(page.text)


def test_killed_and_resumed_run(tmp_path):
    """A torn line is left out; steps that were taken again count once and the later record stands."""
    run = make_run(
        tmp_path, extra=[{"step": 49, "loss": 9.0, "lr": 0.1}, {"step": 50, "eval": {"loss": 7.0}}]
    )
    history = report.read_history(run)
    assert [r["step"] for r in history.train] == list(range(1, 51))
    assert dict(history.points("loss"))[49] == 9.0
    assert dict(history.eval_points())[50] == 7.0


def test_a_run_that_made_fewer_steps_than_planned_says_so(tmp_path):
    tile = ("of 1,200 planned steps made", "50")
    assert unfinished_tiles({"step": 50, "total_steps": 1200}) == [tile]
    for state in ({"step": 50, "total_steps": 50}, {"step": 50, "total_steps": 5}, {}, {"step": 1}):
        assert unfinished_tiles(state) == []
    options = {"limit": "8 steps", "eval_rows": tiny.Rows(4, seed=1), "eval_every": "1 steps"}
    task = tiny.trainer(
        tmp_path,
        tiny.objective(),
        tiny.Rows(12),
        optim={"lr": 3.0},
        patience=1,
        **options,
    )
    made = task.fit().step
    assert made < 8 and "of 8 planned steps made" in report.render(tmp_path)


def test_non_finite_losses_are_counted_and_leave_a_gap(tmp_path):
    run = make_run(
        tmp_path,
        extra=[
            {"step": 20, "loss": "nan"},
            {"step": 21, "loss": "inf"},
            {"step": 22, "loss": math.nan},
        ],
    )
    text = report.render(run)
    assert "steps with a non-finite loss" in text and "<b>3</b>" in text
    svg = ET.fromstring(report.loss_svg(report.read_history(run)))
    assert len([e for e in svg.iter(SVG + "polyline") if "s0" in e.attrib["class"]]) == 2


@pytest.mark.parametrize(
    ("said", "title"),
    [({}, "loss (nats per target)"), ({"loss_unit": ""}, "loss"), ({"loss_unit": "K"}, "loss (K)")],
)
def test_the_loss_has_the_unit_of_its_objective(tmp_path, said, title):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0} | said) + "\n")
    assert f">{title}<" in report.loss_svg(report.read_history(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"null\n[]\n3\n", b"\xff\xfe x", b'{"step": "x", "loss": {}}\n']
)
def test_empty_and_damaged_logs_still_give_a_page(tmp_path, content):
    (tmp_path / "log.jsonl").write_bytes(content)
    assert "nothing to draw yet" in report.render(tmp_path)


def test_numbers_beyond_every_float_still_give_a_page(tmp_path):
    run = make_run(tmp_path)
    huge = "9" * 400
    with open(run / "log.jsonl", "a") as file:
        file.write(f'{{"step": {huge}, "loss": 1.0, "tokens": {huge}}}\n')
        file.write(f'{{"step": 51, "loss": {huge}, "tokens": {huge}}}\n')
        file.write(f'{{"step": 51, "eval": {{"loss": {huge}}}}}\n')
        file.write(f'{{"step": 52, "samples": ["x"], "event": {huge}}}\n')
        file.write(f'{{"step": {huge}, "event": "end", "sample": "y"}}\n')
    assert math.isnan(number(int(huge))) and number(-(10**400), 1.0) == 1.0
    assert "Evaluations" in report.render(run)


def test_damaged_settings_still_give_a_page(tmp_path):
    run = make_run(tmp_path)
    for content in (b"\xff\xff", b"a: [", b"- 1\n- 2\n", b"data: 3\nmodel: [1]\nobjective: x\n"):
        (run / "run.yaml").write_bytes(content)
        assert "Evaluations" in report.render(run)


def test_no_run_directory_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"no log\.jsonl"):
        report.write(tmp_path / "nothing")


def test_unwritable_target_is_a_sentence(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(DataError, match="Cannot write the report"):
        report.write(run, tmp_path / "no" / "such" / "folder.html")
    assert not list(run.glob(".*.tmp"))


def test_curve_is_well_formed_and_labelled():
    svg = ET.fromstring(
        curve_svg(
            [Series("a & b", [(0, 1), (1, 2)]), ("<c>", [(0, 3.0), (1, 2.5)])],
            title='loss "<&>"', x_label="step <", y_label="nats >", references={"baseline <b>": 6.5},
        )
    )  # fmt: skip
    texts = [e.text for e in svg.iter(SVG + "text")]
    assert {"a & b", "<c>", "step <", "nats >", "baseline <b> 6.5"} <= set(texts)
    assert svg.attrib["role"] == "img"
    assert len(list(svg.iter(SVG + "polyline"))) == 2


def test_curve_keeps_spikes_of_long_runs():
    points = [(float(i), 1.0) for i in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    text = curve_svg([Series("x", points)])
    assert len(text) < 60_000
    bands = [e.attrib["points"].split() for e in ET.fromstring(text).iter(SVG + "polygon")]
    top = min(float(pair.split(",")[1]) for band in bands for pair in band)
    assert top < 60  # the spike reaches the top of the picture


LITTLE = [[], [(1, math.nan)], [(1, 2)], [(1, 2), (1, 3)], [(1, 2), (2, 2)], [(5, 0), (6, 0)]]


@pytest.mark.parametrize("points", LITTLE)
def test_curve_of_little_data(points):
    ET.fromstring(curve_svg([Series("x", points)], title="t"))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12) | st.just(math.nan)), max_size=40
    )
)
def test_any_finite_points_stay_inside_the_picture(points):
    svg = ET.fromstring(curve_svg([Series("x", points, dots=True)], width=600, height=300))
    for element in svg.iter(SVG + "circle"):
        assert -1 <= float(element.attrib["cx"]) <= 601
        assert -1 <= float(element.attrib["cy"]) <= 301


def test_values_of_separate_things_are_not_joined_and_have_whole_ticks():
    points = [(number, number / 2) for number in range(1, 15)]
    svg = curve_svg([Series("x", points, dots=True, joined=False)])
    root = ET.fromstring(svg)
    assert not list(root.iter(SVG + "polyline"))
    assert len([c for c in root.iter(SVG + "circle") if "dot" in c.attrib["class"]]) == 14
    assert "2.5<" not in svg and "5.0<" not in svg


@settings(max_examples=300, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_cover_the_values(low, span):
    high = low + span
    ticks = nice_ticks(low, high)
    assert ticks == sorted(ticks) and 2 <= len(ticks) <= 14
    slack = (ticks[-1] - ticks[0]) * 1e-6 + 1e-9
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack


def test_thin_keeps_mean_and_extremes():
    assert thin([(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0)], 2) == [
        (1, 2.0, 1.0, 3.0),
        (3, 6.0, 5.0, 7.0),
    ]
    assert thin([(0, 1.0)], 10) == [(0, 1.0, 1.0, 1.0)]


def test_a_legend_that_does_not_fit_beside_the_title_stands_below_it():
    def heights(names: list[str], title: str) -> tuple[set[str], float]:
        svg = curve_svg([Series(name, [(0, 1), (1, 2)]) for name in names], title=title)
        texts = {text.text: text.get("y") for text in ET.fromstring(svg).iter() if text.text}
        lines = [one for one in ET.fromstring(svg).iter() if one.get("class") == "grid"]
        return {str(texts[name]) for name in names}, min(float(one.get("y1", 0)) for one in lines)

    beside, top = heights(["one", "two"], "a title")
    below, lower = heights([f"a long name of line {k}" for k in range(4)], "a title")
    assert beside == {"21"} and below == {"39"} and lower == top + 18


@pytest.mark.parametrize(
    ("points", "anchor"), [([(0, 0.0), (10, 5.5)], "start"), ([(0, 5.5), (10, 0.0)], "end")]
)
def test_the_label_of_a_reference_stands_where_no_curve_is(
    points: list[tuple[float, float]], anchor: str
) -> None:
    picture = curve_svg([("loss", points)], references={"baseline": 5.3})
    assert re.search(rf'text-anchor="{anchor}">baseline 5.3<', picture)
