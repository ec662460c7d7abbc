"""The scripts and the notebook of examples/, run at a size of no use."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

import pretrain
from tiny import TEXTS, objective

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
MAX_LINES = 60
NOTEBOOKS = ("pretrain.ipynb", "finetune.ipynb", "image_text.ipynb", "images.ipynb")


def environment():
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }


def test_every_example_is_tested_and_short():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {"pretrain_gpt.py", "pretrain_bert.py", "finetune.py"}
    assert {path.name for path in EXAMPLES.glob("*.ipynb")} == set(NOTEBOOKS)
    for name in scripts:
        assert len((EXAMPLES / name).read_text().splitlines()) <= MAX_LINES, name


def run_script(script, words, folder, monkeypatch):
    """Run a script in a folder, as a program but in this process, where everything is imported already."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *words])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.parametrize(
    ("script", "says"),
    [("pretrain_gpt.py", "qwen3"), ("pretrain_bert.py", "vectors (3,")],
)
def test_script(script, says, tmp_path, monkeypatch, capfd):
    source = ROOT / "src" / "pretrain" / "errors.py"
    run_script(script, [str(source), "--tiny", "--out", "runs/tiny"], tmp_path, monkeypatch)
    assert says in "".join(capfd.readouterr())
    assert (tmp_path / "runs" / "tiny" / "log.jsonl").is_file()
    newest = max((tmp_path / "runs" / "tiny").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert (newest / "manifest.json").is_file()


def test_finetune_script(tmp_path, monkeypatch, capfd):
    objective("MaskedLM").model.save(tmp_path / "bert")
    lines = [f"{text},{'<cat>' if ' cat ' in text else 'other'}" for text in TEXTS]
    (tmp_path / "rows.csv").write_text("\n".join(["comment,verdict", *lines]))
    words = "bert rows.csv --tiny --text comment --label verdict --out runs/tiny"
    run_script("finetune.py", words.split(), tmp_path, monkeypatch)
    out, err = capfd.readouterr()
    assert "gain per seed" in err and "Confusion of 2 classes" in out
    page = (tmp_path / "runs" / "tiny" / "report.html").read_text()
    assert "Did pre-training help?" in page and "&lt;cat&gt;" in page and "<cat>" not in page
    answer = pretrain.load(tmp_path / "runs" / "tiny" / "model").predict("the old cat sat")
    assert answer["label"] in ("<cat>", "other") and 0.5 <= answer["score"] <= 1


# What is replaced in the cells of a notebook before a test runs them: the budget of seconds instead of minutes.
SMALLER = {
    "pretrain.ipynb": {
        'source = "python"': 'source = pretrain.__path__[0] + "/errors.py"',
        "vocab_size=2048, row_length=256, valid=0.01": 'vocab_size=300, row_length=64, valid="last:0.2"',
        '"limit": "2 minutes"': '"limit": "8 steps", "log_every": 1',
        '"batch_rows": 16': '"batch_rows": 2',
        '"eval_every": "20%"': '"eval_every": "50%"',
        '"eval_rows": 32': '"eval_rows": 4',
    },
    "finetune.ipynb": {
        'pretrain.prepare("python", ': 'pretrain.prepare(pretrain.__path__[0] + "/errors.py", ',
        "vocab_size=2048, row_length=256, valid=0.01": 'vocab_size=300, row_length=64, valid="last:0.2"',
        '"limit": "2 minutes"': '"limit": "8 steps", "log_every": 1',
        '"batch_rows": 16': '"batch_rows": 2',
        '"eval_every": "20%"': '"eval_every": "50%"',
        '"eval_rows": 32': '"eval_rows": 4',
        "LINES, PIECES = 6, 6": "LINES, PIECES = 6, 3",
        'rglob("*.py"))': 'rglob("*.py"))[:12]',
        '{"epochs": 15}': '{"limit": "10 steps", "batch_rows": 8, "eval_every": "50%", "log_every": 1}',
    },
    "image_text.ipynb": {
        "COPIES = 16": "COPIES = 1",
        '"limit": "80 steps"': '"limit": "3 steps"',
        '"batch_rows": 64': '"batch_rows": 8',
        'find_spec("transformers")': 'find_spec("no_such_package")',  # takes seconds to import
    },
    "images.ipynb": {
        "COPIES = 500": "COPIES = 4",
        '"1000 steps"': '"3 steps"',
        "batch_rows=64": "batch_rows=8",
        '"10%"': '"50%"',
        "rows[:500], rows[500:]": "rows[:40], rows[40:]",
        "seeds=3": "seeds=2",
        '"100 steps"': '"2 steps"',
    },
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_with_the_outputs_of_one_run(name):
    notebook = json.loads((EXAMPLES / name).read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    text = json.dumps(notebook)
    assert "<svg" in text and "<iframe sandbox" in text, "no curve or no report"
    assert "environ" not in text and "TINY" not in text, "a switch for tests"
    assert not [place for place in ("/root/", "/home/", "/tmp/") if place in text]


def smaller(name):
    """Return the sources of the code cells of a notebook, at a size of no use."""
    cells = json.loads((EXAMPLES / name).read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for old, new in SMALLER[name].items():
        assert any(old in source for source in sources), f"{name} has no cell with {old}"
        sources = [source.replace(old, new) for source in sources]
    return sources


def run_notebook(name, folder, monkeypatch):
    """Execute a notebook in a folder, at a size of no use; the outputs of its cells, as they would be saved."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell, source in zip(code, smaller(name), strict=True):
        cell.source = source
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    red = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert not re.sub(r".*TqdmWarning.*\n.*\n", "", red), (
        "a red box"
    )  # of transformers, without ipywidgets
    return outputs


def shown(outputs):
    return [output.get("data", {}).get("text/html", "") for output in outputs]


def test_cells_of_the_pretraining_notebook(tmp_path, monkeypatch):
    """Without a kernel; what one shows is seen in the other notebook, and in this one if it is asked for."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for source in smaller("pretrain.ipynb"):
        exec(compile(source, "<cell>", "exec"), names)
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
    assert names["run"].step == 8


def test_cells_of_the_notebook_of_images_and_texts(tmp_path, monkeypatch):
    pytest.importorskip("IPython")
    monkeypatch.chdir(tmp_path)
    names = {}
    for source in smaller("image_text.ipynb"):
        exec(compile(source, "<cell>", "exec"), names)
    assert names["run"].step == 3 and len(names["answers"]) == 16
    assert (tmp_path / "runs" / "notebook-shapes" / "report.html").is_file()


def test_cells_of_the_notebook_of_images(tmp_path, monkeypatch):
    pytest.importorskip("IPython")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names = {}
    for source in smaller("images.ipynb"):
        exec(compile(source, "<cell>", "exec"), names)
    assert names["base"].run.step == 3 and len(names["right"]) == 40
    comparison = names["clf"].comparison
    assert comparison.counts == [50] and len(comparison.arms["scratch"][50]) == 2
    assert set(names["answers"][0]["label"]) <= set(names["STROKES"])
    assert (tmp_path / "runs" / "notebook-digits" / "report.html").is_file()
    assert (tmp_path / "digits" / "preprocessor_config.json").is_file()


@pytest.mark.slow
def test_pretraining_notebook(tmp_path, monkeypatch):
    pages = shown(run_notebook("pretrain.ipynb", tmp_path, monkeypatch))
    (run,) = [page for page in pages if 'class="pt view run"' in page]
    assert "<svg" in run, "no curve of the run"
    (live,) = [page for page in pages if 'class="pt view live"' in page]
    assert "step 8 of 8" in live and "done" in live
    assert "<svg" in live and live.count('<tr class="best">') == 1
    assert any("<iframe sandbox" in page for page in pages), "no report"
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()


def test_finetuning_notebook(tmp_path, monkeypatch):
    outputs = run_notebook("finetune.ipynb", tmp_path, monkeypatch)
    pages = shown(outputs)
    views = [page for page in pages if 'class="pt view live"' in page]
    assert len(views) == 3, "pre-training, fine-tuning and the adapter each have one live view"
    for live in views[1:]:
        assert "step 10 of 10" in live and "accuracy" in live and '<tr class="best">' in live
        assert "<script" not in live
    assert any('class="pt view overview"' in page for page in pages), "no overview of the rows"
    pictures = [output.get("data", {}).get("image/svg+xml", "") for output in outputs]
    assert any("of its row" in picture for picture in pictures), "no confusion matrix"
    assert any("held-out accuracy" in picture for picture in pictures)
    assert any("<iframe sandbox" in page for page in pages), "no report"
    text = "".join(output.get("text", "") for output in outputs)
    assert "Traceback" not in text and "parameters are trained" in text
    assert (tmp_path / "packages" / "config.json").is_file()
    assert (tmp_path / "runs" / "notebook-packages" / "report.html").is_file()
    assert list((tmp_path / "runs" / "notebook-adapter").glob("checkpoint-*/adapter_config.json"))


CELL = """
import pretrain
rows = [{"text": t, "label": "cat" if " cat " in t else "other"} for t in TEXTS]
clf = pretrain.finetune("bert", rows, "classification", valid=0.3, out="run", limit="200000 steps",
                        eval_every="3 steps", log_every=1, batch_rows=4, lr=1e-3)
print("stopped by", clf.run.stopped, "best", clf.run.best.name, "accuracy" in clf.metrics)
"""


@pytest.mark.slow
def test_an_interrupted_kernel_keeps_the_best_checkpoint(tmp_path, monkeypatch):
    """Kernel → Interrupt in the middle of training: the call returns with the best evaluation so far."""
    manager_of = pytest.importorskip("jupyter_client").manager
    pytest.importorskip("ipykernel")
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    objective("MaskedLM").model.save(tmp_path / "bert")
    manager, client = manager_of.start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    try:
        asked = client.execute(f"TEXTS = {TEXTS!r}\n{CELL}")
        best, printed, last, interrupted = False, "", "", False
        while True:
            message = client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                printed += content["text"]
            elif kind in ("display_data", "update_display_data"):
                last = content["data"].get("text/html", last)
                best = '<tr class="best">' in last
            elif kind == "error":
                pytest.fail("\n".join(content["traceback"]))
            elif kind == "status" and content["execution_state"] == "idle":
                break
            if best and not interrupted:
                manager.interrupt_kernel()
                interrupted = True
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert interrupted and "stopped by SIGINT best checkpoint-" in printed and "True" in printed
    assert "stopped" in last and '<tr class="best">' in last
    assert pretrain.load(tmp_path / "run", quiet=True).predict("the old cat")["label"]
