"""The overview of the data as text and as HTML, and the package that can be called."""

from __future__ import annotations

import html.parser
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain.data
from pretrain.data.tables import read_table
from pretrain.finetuning.preview import Overview, _histogram

LENGTHS = [20] * 1000 + [60] * 197 + [200, 300, 4000]


def made(**other: object) -> Overview:
    options: dict[str, object] = {
        "task": "classification",
        "tokenizer": "runs/books-bert",
        "rows": {"training": 1080, "validation": 120},
        "classes": {"training": {"neg": 270, "pos": 810}, "validation": {"neg": 30, "pos": 90}},
        "lengths": LENGTHS,
        "max_length": 128,
        "cut": 3,
        "notes": ["columns not used: id"],
        "examples": [[("[CLS] ", False), ("A", False), (" film", False), (" pos", True)]],
    }
    return Overview("reviews.csv", **options | other)  # type: ignore[arg-type]


class Page(html.parser.HTMLParser):
    """Checks that tags close in order and collects text and marked text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.stack: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.marked = "", ""
        self.tags: Counter[str] = Counter()
        self.feed(source)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        assert not any(name.startswith("on") for name, _ in attrs)
        self.stack.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1][0] == "style":
            return
        self.text += data
        if any(attrs.get("class") == "token on" for _, attrs in self.stack):
            self.marked += data


def test_text() -> None:
    lines = repr(made()).splitlines()
    assert lines[:3] == [
        "reviews.csv",
        "1,080 training, 120 validation rows",
        "task classification · tokens of runs/books-bert",
    ]
    assert "lengths: median 20 tokens, 95 % of rows up to 60, longest 4,000" in lines
    assert "3 of 1,200 rows (0.25 %) exceed 128 tokens: cut" in lines
    assert "- columns not used: id" in lines
    assert lines[-1] == "  1  [CLS] A film« pos»"
    bars = [line for line in lines if "█" in line and "training" in line]
    assert bars[0].split()[0] == "pos" and "810 training (75 %)" in bars[0]
    assert "90 validation (75 %)" in bars[0] and bars[0].count("█") == 3 * bars[1].count("█") == 30
    assert repr(made(cut=1)).count("1 of 1,200 rows (0.08 %) exceeds 128 tokens: cut") == 1
    assert "no row exceeds 4,096 tokens" in repr(made(max_length=4096, cut=0))
    assert "split into windows" in repr(made(beyond="split into windows"))
    assert repr(Overview("a.csv")) == "a.csv"
    assert str(made()) == repr(made())


def test_colours_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" not in repr(made())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    shown = repr(made())
    assert "\x1b[1;32m pos\x1b[0m" in shown and "«" not in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in repr(made()) and "« pos»" in repr(made())


def test_what_comes_from_the_data_cannot_act() -> None:
    bad = '<script>alert("x")</script>\x1b[2J\u202e'
    shown = made(
        classes={"training": {bad: 3, "b": 1}}, notes=[bad], examples=[[(bad, False), (bad, True)]]
    )
    shown.name = shown.tokenizer = shown.beyond = bad
    shown.rows = {bad: 1}
    shown.classes[bad] = {"b": 1}
    text = repr(shown)
    assert "\x1b" not in text and "\u202e" not in text
    page = Page(shown._repr_html_())
    assert page.tags["script"] == 0 and page.text.count("alert") >= 6
    assert page.marked.startswith('<script>alert("x")')
    source = shown._repr_html_().replace('xmlns="http://www.w3.org/2000/svg"', "")
    for word in ("http://", "https://", "url(", "@import", "src="):
        assert word not in source


def test_html() -> None:
    source = made()._repr_html_()
    page = Page(source)
    assert page.marked == " pos" and page.tags["svg"] == 1
    for text in (
        "reviews.csv",
        "3 of 1,200 rows (0.25 %) exceed 128 tokens: cut",
        "limit 128",
        "810",
    ):
        assert text in page.text, text
    assert "prefers-color-scheme:dark" in source
    assert "width:100.0%" in source and "width:33.3%" in source
    assert Page(Overview("a.csv")._repr_html_()).text == "a.csv"


def test_many_classes_and_long_examples_are_cut_short() -> None:
    classes = {"training": {f"class {k}": 100 - k for k in range(90)}}
    assert "and 78 more classes of 11 to 88 rows each" in repr(made(classes=classes))
    assert (
        "and 66 more classes of 11 to 76 rows each"
        in Page(made(classes=classes)._repr_html_()).text
    )
    row = [(f"p{k} ", False) for k in range(500)] + [(f"a{k} ", True) for k in range(5)]
    shown = repr(made(examples=[row]))
    assert "p59  … 410 more tokens … p470" in shown and "«a0 a1 a2 a3 a4 »" in shown
    page = Page(made(examples=[row])._repr_html_())
    assert "410 more tokens" in page.text and page.marked == "a0 a1 a2 a3 a4 "
    wide = repr(made(classes={"training": {"日本語" * 20: 5, "b": 4}})).splitlines()
    bars = [line for line in wide if "█" in line and "training (" in line]
    assert "…" in bars[0] and bars[0].startswith("  日本語")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=50),
    st.none() | st.integers(1, 3000),
    st.integers(1, 60),
)
def test_histogram_counts_every_row(lengths: list[int], limit: int | None, bins: int) -> None:
    width, counts = _histogram(lengths, bins, limit)
    assert sum(counts) == len(lengths) and 1 <= len(counts) <= bins and width >= 1
    for k, count in enumerate(counts[:-1]):
        assert count == sum(k * width <= length < (k + 1) * width for length in lengths)
    Page(made(lengths=lengths, max_length=limit, cut=0)._repr_html_())
    assert repr(made(lengths=lengths, max_length=limit, cut=0))


def test_one_long_row_does_not_hide_the_others() -> None:
    width, counts = _histogram([*range(10, 60)] * 20 + [100_000], 40)
    assert width <= 2 and counts[-1] >= 1 and sum(count > 0 for count in counts) >= 25


def test_real_rows(data_sets: Path) -> None:
    news = read_table(data_sets / "ag_news/train.csv", columns=["label", "title", "text"])
    lengths = [len(text.split()) for text in news.columns["text"]]
    shown = made(
        rows={"training": len(news)},
        classes={"training": Counter(news.columns["label"])},
        lengths=lengths,
        examples=[
            [(word + " ", False) for word in text.split()] for text in news.columns["text"][:3]
        ],
    )
    assert "6,600 training rows" in repr(shown)
    page = Page(shown._repr_html_())
    assert len(shown._repr_html_()) < 60_000 and page.tags["rect"] > 10


def test_the_package_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(pretrain.data, types.ModuleType) and callable(pretrain.data)
    looked = types.ModuleType("pretrain.finetuning.preview")
    looked.look = lambda *args, **options: (args, options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pretrain.finetuning", types.ModuleType("pretrain.finetuning"))
    monkeypatch.setitem(sys.modules, "pretrain.finetuning.preview", looked)
    assert pretrain.data("a.csv", task="chat") == (("a.csv",), {"task": "chat"})


def test_tables_need_no_torch() -> None:
    code = (
        "import sys; import pretrain.data.labelled; "
        "heavy = {'torch', 'pandas', 'datasets', 'pyarrow', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2] / "src")
