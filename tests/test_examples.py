"""The scripts and the notebook of examples/, run at a size of no use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
MAX_LINES = 60


def environment():
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "PRETRAIN_EXAMPLES_TINY": "1",
    }


def test_every_example_is_tested_and_short():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {"pretrain_gpt.py", "pretrain_bert.py"}
    assert {path.name for path in EXAMPLES.glob("*.ipynb")} == {"pretrain.ipynb"}
    for name in scripts:
        assert len((EXAMPLES / name).read_text().splitlines()) <= MAX_LINES, name


@pytest.mark.parametrize(
    ("script", "says"),
    [("pretrain_gpt.py", "qwen3"), ("pretrain_bert.py", "vectors (3,")],
)
def test_script(script, says, tmp_path):
    source = ROOT / "src" / "pretrain" / "*.py"
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, str(source), "--tiny", "--out", "runs/tiny"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert says in done.stdout + done.stderr
    assert (tmp_path / "runs" / "tiny" / "log.jsonl").is_file()
    newest = max((tmp_path / "runs" / "tiny").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert (newest / "manifest.json").is_file()


def test_notebook_is_stored_without_output():
    notebook = json.loads((EXAMPLES / "pretrain.ipynb").read_text())
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")


def test_notebook(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(EXAMPLES / "pretrain.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    shown = [
        output.get("data", {}).get("text/html", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    ]
    assert any("<svg" in html for html in shown), "the run shows no curve"
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
