"""Plots and frames of a history, and a page as the value of a notebook cell."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pretrain.errors import ConfigError, DataError
from pretrain.finetuning.result import Confusion, Finetuned
from pretrain.report.history import frame_of, plot_history, sort_records
from pretrain.training.state import Run
from pretrain.utils.html import write_page

HISTORY = sort_records([
    {"step": 1, "loss": 3.0, "lr": 0.1},
    {"step": 2, "loss": "nan", "lr": 0.1, "unit": "patches"},
    {"step": 2, "eval": {"loss": 2.5, "accuracy": 0.5}},
    {"event": "skipped", "step": 2},
    {"step": 4, "eval": {"loss": 2.0, "accuracy": 0.75}},
])  # fmt: skip


def test_a_frame_has_one_row_per_step_with_the_figures_of_evaluations() -> None:
    frame = frame_of(HISTORY)
    assert frame["step"].tolist() == [1, 2, 4]
    assert frame["valid_accuracy"].tolist()[1:] == [0.5, 0.75]
    assert frame["loss"].isna().tolist() == [False, True, True]
    assert frame["unit"].tolist()[1] == "patches"
    assert len(frame_of(sort_records([]))) == 0


def test_a_plot_is_a_picture_that_can_be_saved(tmp_path: Path) -> None:
    plot = plot_history(HISTORY)
    assert plot._repr_svg_() == plot.svg and "save" in repr(plot)
    assert ET.parse(plot.save(tmp_path / "a.svg")).getroot().tag.endswith("svg")
    with pytest.raises(ConfigError, match=r"is empty or names a directory.*ends in .svg"):
        plot.save("")
    with pytest.raises(ConfigError, match=r"a.png must end in .svg"):
        plot.save(tmp_path / "a.png")
    with pytest.raises(DataError, match="a directory that does not exist"):
        plot.save(tmp_path / "no" / "a.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]
    assert "held-out accuracy" in plot_history(HISTORY, "accuracy").svg
    with pytest.raises(DataError, match="Did you mean 'accuracy'"):
        plot_history(HISTORY, "acuracy")


@pytest.mark.parametrize("classes", [2, 30])
def test_a_confusion_is_drawn_with_every_cell_and_escaped_names(classes: int) -> None:
    labels = [f"<{k}> of a long name" for k in range(classes)]
    matrix = [[9 if i == k else int(k == 0) for k in range(classes)] for i in range(classes)]
    root = ET.fromstring(Confusion(labels, matrix).plot().svg)
    titles = [title.text or "" for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == classes**2
    assert f"{labels[1]} as {labels[0]}: 1, 10.0% of its row" in titles


def test_a_written_page_is_a_path_that_a_notebook_shows(tmp_path: Path) -> None:
    path = write_page(tmp_path / "a.html", '<!doctype html><p title="\'">&amp;</p>')
    assert isinstance(path, Path) and path == tmp_path / "a.html" and str(path).endswith("a.html")
    shown = path._repr_html_()  # type: ignore[attr-defined]
    assert (
        "<iframe sandbox srcdoc=" in shown
        and "&lt;p title=&quot;&#x27;&quot;&gt;&amp;amp;" in shown
    )
    assert path.parent._repr_html_() is None  # type: ignore[attr-defined]


def test_a_run_and_a_result_draw_and_frame_their_history() -> None:
    pytest.importorskip("pandas")
    records = [*HISTORY.train, *HISTORY.evals]
    run = Run(Path("runs/x"), 4, "limit", {"loss": 2.0}, records)
    assert run.frame()["valid_accuracy"].tolist()[1:] == [0.5, 0.75]
    assert run.plot().svg == plot_history(HISTORY).svg
    assert "held-out accuracy" in run.plot("accuracy").svg
    result = object.__new__(Finetuned)
    result.run, result.trivial = run, {}
    assert result.frame().equals(run.frame()) and result.plot().svg == run.plot().svg
