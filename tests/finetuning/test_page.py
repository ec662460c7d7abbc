"""The report and the model card of a fine-tuning run: complete, escaped, self-contained, readable to the hub."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain
import tiny
from finetuning.conftest import QUICK, rows_of
from pretrain import finetune, report
from pretrain.cli import main as cli
from pretrain.data.tables import Table
from pretrain.errors import DataError
from pretrain.finetuning.card import base_model, model_card
from pretrain.finetuning.page import command, render, write_report
from pretrain.finetuning.result import Confusion, Errors
from pretrain.finetuning.settings import TuneConfig
from pretrain.inference.predict import task_of
from pretrain.models import build
from pretrain.training.state import Run

EVIL = "</pre></td></style><script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;`|*[a](b)\n# x\x00\ud800"
FIGURES = {"loss": 0.41, "accuracy": 0.875, "macro_f1": 0.8612, "mcc": 0.79, "targets": 240.0}


@dataclass
class Result:
    """What `pretrain.finetune` returns, as far as a report reads it."""

    task: Any
    run: Any
    settings: TuneConfig
    metrics: dict[str, float]
    test_metrics: dict[str, float] | None = None
    trivial: dict[str, float] = field(default_factory=dict)
    trivial_test: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    fingerprint: str = "ab" * 32
    comparison: Any = None
    matrix: Any = None
    mistakes: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    data: Any = field(
        default_factory=lambda: SimpleNamespace(
            train=Table("r", {"text": []}), valid=Table("r", {})
        )
    )

    def keep(self) -> None:
        """There is no run whose result could be written again."""

    def pictures(self, count: int) -> list[dict[str, Any]]:
        """The answers of texts are no pictures."""
        return []

    @property
    def monitor(self) -> str:
        return self.settings.train.monitor or str(self.task.metric)

    @property
    def model(self) -> Any:
        return self.task.model

    @property
    def labels(self) -> Any:
        return self.model.labels

    def confusion(self) -> Confusion:
        if self.matrix is None:
            raise DataError("no matrix")
        return Confusion(self.labels, self.matrix)

    def errors(self, count: int = 10) -> Errors:
        if not self.mistakes:
            raise DataError("no truth")
        return Errors(self.mistakes[:count])


def history() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(10, 260, 10):
        lines.append(
            {"step": step, "loss": 1.1 / (1 + step / 60) + 0.05 * (step % 30 == 0), "lr": 1e-4}
        )
        if step % 50 == 0:
            figures = {
                "loss": 1 / (1 + step / 90),
                "accuracy": 0.9 - 20 / step,
                "macro_f1": 0.88 - 21 / step,
            }
            lines.append({"step": step, "eval": figures | {"targets": 240.0}})
    return lines


def result(
    out: Path,
    labels: tuple[str, ...] = ("negative", "neutral", "positive"),
    text: str = "A film that takes its time and is worth it",
    family: str = "bert",
    **more: Any,
) -> Result:
    model = build(
        family, None, head="sequence-classification", labels=labels, tokenizer=tiny.tokenizer(), num_layers=1,
        hidden_size=16, num_heads=2, intermediate_size=32, max_positions=48,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint-200"
    run = Run(
        out,
        250,
        "limit",
        dict(FIGURES),
        history(),
        checkpoint=checkpoint,
        best=checkpoint,
        result=out / "model",
    )
    tuned = TuneConfig.load(
        {"task.name": "classification", "model.checkpoint": "runs/books-bert", "data.train": "reviews.csv",
         "train.out": str(out), "data.columns": {"text": "review", "label": "stars"}}
    )  # fmt: skip
    matrix = np.arange(1, len(labels) ** 2 + 1).reshape(len(labels), -1) + 70 * np.eye(
        len(labels), dtype=int
    )
    mistakes = [
        {"where": f"reviews.csv, line {i}", "text": f"{text}. " * (i % 4 + 1), "label": labels[0],
         "predicted": labels[-1], "score": 0.99 - i / 50}
        for i in range(2, 14)
    ]  # fmt: skip
    return Result(
        task_of(model), run, tuned, dict(FIGURES),
        trivial={"accuracy": 0.42, "macro_f1": 0.197},
        notes=["12 of 2,400 training rows (0.50%) exceed 48 tokens and are cut", "3 training rows recur in the test"],
        counts={"train": 2160, "valid": 240}, matrix=matrix, mistakes=mistakes,
        sources={"train": "reviews.csv", "valid": "10% of reviews.csv"}, **more,
    )  # fmt: skip


class Page(HTMLParser):
    VOID = {"meta", "rect", "line", "circle", "polyline", "polygon", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.stack, self.stack

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_self_contained(page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base"} & set(
        page.tags
    )
    for name, value in page.attributes:
        assert not name.startswith("on") and name not in {"src", "href", "srcset", "action"}
        if name != "xmlns":
            assert "//" not in (value or "")


# ------------------------------------------------------------------------------------------------- page


def test_report_says_everything(tmp_path: Path) -> None:
    found = result(tmp_path / "reviews-bert")
    found.comparison = SimpleNamespace(
        table=lambda: "pretrained 87.5\nscratch 61.0\n240 labels: pre-training helps",
        svg=lambda *size: '<svg xmlns="http://www.w3.org/2000/svg"><title>gain</title></svg>',
    )
    path = write_report(found)  # type: ignore[arg-type]
    assert path == tmp_path / "reviews-bert" / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join(page.text)
    for words in (
        "reviews-bert", "classification", "runs/books-bert", "0.875", "held-out accuracy", "accuracy of guessing",
        "0.42", "2,160", "reviews.csv, line 2", "worth it", "neutral", "precision", "support", "pre-training helps",
        "gain", "abababab", "exceed 48 tokens", "recur in the test", "text: review", "Did pre-training help?",
        "pretrain finetune --config", "model.predict(", "/model')", "loss (nats per target)",
    ):  # fmt: skip
        assert words in text, words
    assert page.tags.count("svg") >= 4
    check_self_contained(page)
    card = (path.parent / "README.md").read_text()
    assert card == found.model.card and card.startswith("---\n")


def test_report_of_little(tmp_path: Path) -> None:
    """A run without records, a task without classes: what is not there is left out."""
    found = result(tmp_path / "r")
    found.matrix, found.mistakes, found.trivial, found.metrics = None, [], {}, {}
    found.run.history, found.run.checkpoint = [], None
    text = render(found)  # type: ignore[arg-type]
    Page(text)
    assert "Worst mistakes" not in text and "Confus" not in text and "<svg" not in text
    path = write_report(found, tmp_path / "x.html")  # type: ignore[arg-type]
    assert path.exists() and "None were measured" in model_card(found)  # type: ignore[arg-type]


def test_everything_is_escaped(tmp_path: Path) -> None:
    found = result(tmp_path / "<script>x", labels=(EVIL, EVIL + "2", "<b>"), text=EVIL)
    found.notes, found.sources = [EVIL], {"train": EVIL, "valid": EVIL}
    found.fingerprint = EVIL
    found.settings.data.columns = {"text": EVIL}
    found.settings.model.checkpoint = EVIL
    found.comparison = SimpleNamespace(table=lambda: EVIL, svg=lambda *size: "")
    page = Page(render(found))  # type: ignore[arg-type]
    check_self_contained(page)
    assert any("<script>alert('x')</script>" in text for text in page.text)
    assert page.tags.count("style") - page.tags.count("svg") == 1
    assert write_report(found, tmp_path / "p.html").stat().st_size > 5000  # type: ignore[arg-type]


def test_the_command_repeats_it(tmp_path: Path) -> None:
    out = tmp_path / "a run; rm -rf $HOME"
    found = result(out)
    words = shlex.split(command(found))  # type: ignore[arg-type]
    assert words == [
        "pretrain", "finetune", "--config", str(out / "run.yaml"), "--train.out", f"{out}-again",
    ]  # fmt: skip
    found.settings.data.train, found.settings.data.test = "a DataFrame", "a list"
    code = command(found)  # type: ignore[arg-type]
    compile(code, "code", "eval")
    assert code.startswith("pretrain.finetune('runs/books-bert', rows, test=test_rows, config=")
    found.settings.model.checkpoint = "a model"
    assert command(found).startswith("pretrain.finetune(model, rows, ")  # type: ignore[arg-type]
    found.rates = {"lr": 0.02, "muon_lr": 0.001}
    assert command(found).endswith("-again', lr=0.02, muon_lr=0.001)")  # type: ignore[arg-type]


@pytest.mark.parametrize("search", ["compare", "sweep"])
def test_the_command_names_a_rate_that_was_chosen(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str
) -> None:
    """Without it the repeated run had the automatic rate, where a comparison had chosen another."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in rows_of(40)))
    more: dict[str, Any] = {"lr": "sweep", "lrs": [3e-2], "limit": "2 steps", "name": "muon"}
    more |= {"lr": "auto", "compare": "scratch", "seeds": 2} if search == "compare" else {}
    monkeypatch.setattr("pretrain.finetuning.compare._baselines", lambda *_: {})
    done = finetune(checkpoint, str(rows), "classification", out=out, **(QUICK | more))
    said = "the learning rate is 0.03, Muon lr 0.03, chosen on the held-out rows"
    assert said in (done.path / "README.md").read_text() and done.rates["lr"] == 3e-2
    # The automatic rate of the model is 2e-3, that of Muon in the settings as well.
    words = shlex.split(command(done))
    assert words[-4:] == ["--optim.lr", "0.03", "--optim.muon_lr", "0.03"]
    assert cli.main(words[1:]) == 0
    again, files = Path(words[words.index("--train.out") + 1]), "model/model.safetensors"
    assert (again / files).read_bytes() == (out / files).read_bytes()
    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "--optim.lr 0.03" in page and said in page


# ------------------------------------------------------------------------------------------------- card


def head_of(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return dict(yaml.safe_load(head))


def test_card_is_read_by_the_hub(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = model_card(result(tmp_path / "reviews-bert"))  # type: ignore[arg-type]
    head = head_of(card)
    assert head["library_name"] == "transformers" and "base_model" not in head
    assert head["pipeline_tag"] == "text-classification"
    assert head["tags"] == ["pretrain", "bert", "classification"]
    assert head["metrics"] == ["accuracy", "f1", "matthews_correlation"]
    assert not {"license", "language", "datasets"} & set(head)
    read = hub.ModelCard(card)
    found = {r.metric_name: r for r in read.data.eval_results}
    assert read.data.model_name == "reviews-bert"
    assert found["Accuracy"].metric_value == 0.875 and found["Macro F1"].metric_type == "f1"
    assert found["Accuracy"].task_type == "text-classification"
    assert (found["Accuracy"].dataset_name, found["Accuracy"].dataset_split) == (
        "reviews.csv",
        "validation",
    )
    assert "Loss" not in found
    for words in (
        "## Use", "from books-bert",
        "pretrain.load", 'pipeline("text-classification"', "| Accuracy | 0.875 | 0.42 |", "negative, neutral",
        "| train | reviews.csv | 2,160 |", "ab" * 32, "a little too good", "exceed 48 tokens", "48 tokens.",
    ):  # fmt: skip
        assert words in card, words


def test_card_with_test_rows_licence_and_adapter(tmp_path: Path) -> None:
    found = result(
        tmp_path / "r", test_metrics={"loss": 0.5, "accuracy": float("nan"), "macro_f1": 0.8}
    )
    found.counts["test"], found.sources["test"] = 100, "held.csv"
    found.model.extra_config["pretrain"] = {"license": "mit"}
    found.model.adapter = object()
    card = model_card(found)  # type: ignore[arg-type]
    head = head_of(card)
    assert head["license"] == "mit" and head["library_name"] == "peft"
    results = head["model-index"][0]["results"][0]
    assert results["dataset"] == {"type": "held", "name": "held.csv", "split": "test"}
    assert results["metrics"] == [{"type": "f1", "value": 0.8, "name": "Macro F1"}]
    assert "AutoPeftModelForSequenceClassification" in card and "looked at once" in card
    assert "pipeline(" not in card


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result(tmp_path_factory.mktemp("done"))


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_no_name_breaks_the_card(done: Result, name: str, label: str) -> None:
    found = done
    found.sources, found.notes = {"train": name, "valid": label}, [name]
    found.settings.model.checkpoint = label
    found.model.labels = (label, name, "c")
    head = head_of(model_card(found))  # type: ignore[arg-type]
    data = head["model-index"][0]["results"][0]["dataset"]
    assert data["name"] == name
    assert (
        head["base_model"] == base_model(label) if base_model(label) else "base_model" not in head
    )


def test_the_card_goes_with_the_saved_model(tmp_path: Path) -> None:
    """The directory holds the report's card under a manifest that agrees; a stale one is not written."""
    from pretrain.checkpoint import verify

    found = result(tmp_path / "run")
    found.model.extra_config["pretrain"] = {"fingerprint": found.fingerprint}
    write_report(found)  # type: ignore[arg-type]
    saved = found.model.save(tmp_path / "saved")
    assert (saved / "README.md").read_text() == model_card(found)  # type: ignore[arg-type]
    verify(saved)
    found.model.extra_config["pretrain"] = {
        "fingerprint": "cd" * 32
    }  # fine-tuned again, on other rows
    saved = found.model.save(tmp_path / "later")
    assert "model-index" not in (saved / "README.md").read_text()


# ------------------------------------------------------------------------------------------------ views


def test_confusion_against_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = ["a", "b", "c", "d"]
    truth, said = rng.integers(0, 4, 200), rng.integers(0, 3, 200)
    found = Confusion(labels, sklearn.confusion_matrix(truth, said, labels=range(4)))
    precision, recall, f1, support = sklearn.precision_recall_fscore_support(
        truth, said, labels=range(4), zero_division=0
    )
    rows = found.per_class()
    assert [row["label"] for row in rows] == labels
    np.testing.assert_allclose([r["precision"] for r in rows], precision)
    np.testing.assert_allclose([r["recall"] for r in rows], recall)
    np.testing.assert_allclose([r["f1"] for r in rows], f1)
    assert [r["support"] for r in rows] == support.tolist()


def test_confusion_is_shown() -> None:
    few = Confusion(["cat", "<dog>"], [[9, 1], [2, 1000]])
    lines = repr(few).splitlines()
    assert "1,009 of 1,012 right" in lines[0] and lines[2].split() == ["cat", "9", "1"]
    assert len({len(line) for line in lines[1:]}) == 1
    html = few._repr_html_()
    assert "&lt;dog&gt;" in html and "<dog>" not in html and "1,000" in html
    Page(html)
    many = Confusion(
        [f"intent {i}" for i in range(40)], np.eye(40, dtype=int) + np.eye(40, k=3, dtype=int) * 2
    )
    assert (
        "most confused" in repr(many)
        and "intent 0" in repr(many)
        and len(repr(many).splitlines()) == 17
    )
    Page(many._repr_html_())
    assert many.pairs(1) == [("intent 0", "intent 3", 2)]
    assert Confusion(["a", "b"], np.eye(2, dtype=int)).pairs() == []
    for wrong in (np.zeros((2, 3)), [[1, -1], [0, 0]]):
        with pytest.raises(DataError, match="confusion"):
            Confusion(["a", "b"], wrong)


def test_errors_are_shown() -> None:
    row = {
        "where": "r.csv, line 3",
        "text": EVIL,
        "label": "cat",
        "predicted": ["dog", "fox"],
        "score": 0.98765,
    }
    found = Errors([row, {**row, "text": "x " * 400, "predicted": []}])
    shown = repr(found)
    assert "r.csv, line 3: cat taken for dog, fox (0.988)" in shown and "taken for none" in shown
    assert "\x00" not in shown and max(map(len, shown.splitlines())) < 130
    html = found._repr_html_()
    check_self_contained(Page(html))
    assert len(found) == 2 and found[0] is row and isinstance(found[:1], Errors)
    assert repr(Errors([])) == "no mistakes" and Page(Errors([])._repr_html_())


def test_mistakes_of_questions_about_images_show_the_questions() -> None:
    row = {"where": "row 1", "text": "a.png | how many?", "label": "2", "predicted": "3"}
    image = {**row, "picture": "data:image/png;base64,AA", "score": None}
    asked = Errors([{**image, "beside": "how many?"}])
    heads = ["right", "predicted", "image", "text", "where"]
    assert re.findall(r"<th\b[^>]*>(.*?)</th>", asked.html()) == heads
    assert re.search("<td[^>]*>how many[?]</td>", asked.html())
    assert "2 taken for 3\n" in repr(asked)
    heads = ["right", "predicted", "score", "image", "where"]
    plain = Errors([{**image, "beside": "", "score": 0.5}]).html()
    assert re.findall(r"<th\b[^>]*>(.*?)</th>", plain) == heads
    text = re.findall(r"<th\b[^>]*>(.*?)</th>", Errors([{**row, "score": 0.5}]).html())
    assert text == ["right", "predicted", "score", "text", "where"]


# ------------------------------------------------------------------------------------------------ pretrain report


def test_the_command_never_puts_another_page_in_its_place(
    checkpoint: str, tmp_path: Path, capfd: Any
) -> None:
    """The page of a fine-tuning run was overwritten by one of pre-training, whose command trains something else."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in rows_of(32)))
    out = tmp_path / "clf"
    options = {**QUICK, "quiet": False, "valid": 0.25}
    tuned = finetune(checkpoint, str(rows), "classification", out=out, **options)
    page = out / "report.html"
    written = page.read_text("utf-8")
    assert f"report: {page}" in capfd.readouterr().err and "Confusion" in written
    assert tuned.run.report() == page and report.write(out) == page
    assert cli.main(["report", str(out)]) == 0 and capfd.readouterr().out == f"{page}\n"
    assert page.read_text("utf-8") == written
    page.unlink()  # as of a run that was killed
    with pytest.raises(DataError, match="is a fine-tuning run"):
        report.write(out)
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert cli.main(["report", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files, "it is read only"
    again = page.read_text("utf-8")
    assert "pretrain finetune --config" in again and "pretrain train" not in again
    assert again.startswith(written)
    page.write_text(again.replace(written, "as it was before"), "utf-8")
    assert cli.main(["report", str(out)]) == 0 and page.read_text("utf-8") == again, "it goes stale"
    page.unlink()
    rows.write_text(rows.read_text().replace("cat", "cow"))
    assert cli.main(["report", str(out)]) == 2 and "has changed since" in capfd.readouterr().err
    assert "pretrain finetune --config" in report.render(out)


def test_the_page_of_rows_in_memory_is_not_made_again(
    checkpoint: str, tmp_path: Path, capfd: Any
) -> None:
    out = tmp_path / "clf"
    tuned = finetune(checkpoint, rows_of(32), "classification", out=out, **QUICK)
    assert (out / "report.html").is_file() and "report:" not in capfd.readouterr().err
    (tuned.path / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 2 and "in memory" in capfd.readouterr().err


def test_the_page_of_a_model_in_memory_is_made_again_from_the_best_checkpoint(
    checkpoint: str, tmp_path: Path, capfd: Any
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in rows_of(32)))
    model = pretrain.load(checkpoint, quiet=True)
    for lora in (0, 2):
        out = tmp_path / f"clf-{lora}"
        finetune(model, str(rows), "classification", out=out, **QUICK, lora=lora or None)
        page = out / "report.html"
        written = page.read_text("utf-8")
        page.unlink()
        code = cli.main(["report", str(out)])
        if lora:  # an adapter is nothing without its model
            assert code == 2 and "in memory" in capfd.readouterr().err
        else:
            assert code == 0 and page.read_text("utf-8").startswith(written)
