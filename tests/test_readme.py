"""What the documentation says is run: its Python blocks, at a tiny size; commands are in test_commands.py.

A block is run when a line ``<!-- test: NAME -->`` stands before it. The words are those of the reader; only sizes are
replaced, by the table ``SMALLER``, so that it takes seconds.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import pretrain
import tiny
from pretrain.cli import main as cli
from pretrain.finetuning.settings import TuneConfig
from pretrain.objectives import task_classes
from reader import PAGES, ROOT, add_model, fill

BLOCK = re.compile(r"<!-- test: ([\w-]+) -->\n```python\n(.*?)```", re.S)
NOT_RUN = re.compile(r"<!-- not run: ([^\n]*) -->\n```python\n(.*?)```", re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)\)")

SMALLER = {
    "row_length=512": "row_length=32, valid=0.2",
    '"size": "small"': '"size": "tiny"',
    '"limit": "30 minutes"': '"limit": "3 steps", "batch_rows": 2, "eval_rows": 2',
    'limit="200 steps"': 'limit="3 steps"',
    'limit="20 steps"': 'limit="2 steps"',
    'limit="1000 steps"': 'limit="3 steps", batch_rows=2',
    '"configs/books-gpt.yaml"': '"tiny.yaml"',
    '"runs/books-bert"': '"runs/books-gpt"',
    'task="classification", valid=0.2': 'task="classification", valid=0.2, limit="3 steps"',
    'label="stars", valid=0.2': 'label="stars", valid=0.2, limit="3 steps", out="runs/stars"',
    'task="chat", valid=0.2': 'task="chat", valid=0.2, limit="3 steps", out="runs/answers"',
}


def blocks():
    for page in PAGES:
        for name, code in BLOCK.findall(page.read_text(encoding="utf-8")):
            yield pytest.param(page, name, code, id=f"{page.stem}-{name}")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    return tmp_path


def smaller(code):
    lines = []
    for line in code.splitlines():
        line = line.replace("vocab_size=8192", "vocab_size=300")
        if "pretrain.prepare(" in line and "row_length" not in line:
            line = line.replace("vocab_size=300", "vocab_size=300, row_length=32, valid=0.2")
        for words, instead in SMALLER.items():
            line = line.replace(words, instead)
        lines.append(line)
    return "\n".join(lines)


def run(code, name, names=None):
    names = {"__name__": "__example__"} if names is None else names
    exec(compile(smaller(code), f"<{name}>", "exec"), names)
    return names


def run_before(name):
    """Blocks that go on where the README's first one ends, or need its run on the disk, get what the reader has."""
    if name not in {
        "transformers",
        "checkpoints",
        "finetune",
        "evaluation",
        "tutorial-labels",
        "tutorial-chat",
    }:
        return None
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return run(dict(BLOCK.findall(text))["readme"], "readme")


@pytest.mark.parametrize(("page", "name", "code"), list(blocks()))
def test_python_block_runs(page, name, code, place, request):
    if "transformers" in code:
        pytest.importorskip("transformers")
    if name == "hub":
        fake = request.getfixturevalue("hub")
        model = pretrain.build("gpt2", "tiny", tokenizer=tiny.tokenizer())
        commit = fake.add("org/name", model.save(place / "saved"))
        fake.repositories["org/name"].refs["v1.0"] = commit
    if name == "streaming":
        add_model(place, "runs/support")
    run(code, f"{page.name}: {name}", run_before(name))


def test_blocks_are_found():
    names = [param.values[1] for param in blocks()]
    assert {"readme", "quickstart", "objective"} <= set(names)


def test_unmarked_python_blocks_do_not_exist():
    """A Python block in the documentation is run, or says why not; none hides in a fence of another kind."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        left = NOT_RUN.findall(text)
        assert text.count("```python") == len(BLOCK.findall(text)) + len(left), page.name
        for reason, code in left:
            assert len(reason) > 10 and compile(code, page.name, "exec"), page.name
        for other in re.findall(r"```text\n(.*?)```", text, re.S):
            assert not re.search(r"^(from|import) \w|^\w+ = \w+\S*\(", other, re.M), other


def test_the_objective_of_the_guide_trains(place):
    """The class that CONTRIBUTING shows can be named by its path and trained."""
    import sys

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (place / "two_ahead_of_the_guide.py").write_text(dict(BLOCK.findall(text))["objective"])
    sys.path.insert(0, str(place))
    try:
        done = pretrain.train(
            data={"train": "books", "vocab_size": 300, "row_length": 32, "valid": 0.2},
            model={"family": "gpt2", "size": "tiny"},
            objective={"class_path": "two_ahead_of_the_guide.TokenAfterNext"},
            train={"limit": "2 steps", "batch_rows": 2, "eval_rows": 2, "out": "runs/ahead"},
        )
    finally:
        sys.path.remove(str(place))
        sys.modules.pop("two_ahead_of_the_guide", None)
    assert done.step == 2


def test_the_task_of_the_guide_trains(place):
    """The task that CONTRIBUTING shows can be named by its path, trained, and asked."""
    import sys

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (place / "shouting_of_the_guide.py").write_text(dict(BLOCK.findall(text))["task"])
    rows = [{"text": f"{'AH' * k}{'oh' * (9 - k)} sea", "volume": k / 9} for k in range(10)]
    rows += [
        {"text": f"{row['text']} of {n}", "volume": row["volume"]} for row in rows for n in range(3)
    ]
    tokenizer = pretrain.train_tokenizer("books", "wordpiece", vocab_size=300)
    model = pretrain.build("bert", "tiny", tokenizer=tokenizer)
    sys.path.insert(0, str(place))
    try:
        tuned = pretrain.finetune(
            model,
            rows,
            task="shouting_of_the_guide:Shouting",
            valid=0.2,
            limit="3 steps",
            out="runs/loud",
        )
        answer = tuned.predict("AHAHAH sea")
        wrong = [row["score"] for row in tuned.errors(100)]
        # A directory never names code: who opens it names the class.
        task_classes._OWN_TASKS.clear()
        loud = pretrain.load("runs/loud", quiet=True)
        with pytest.raises(
            pretrain.PretrainError, match="no task 'shouting'.*package.module:Class"
        ):
            loud.predict("AHAHAH sea")
        named = "shouting_of_the_guide:Shouting"
        assert loud.predict("AHAHAH sea", task=named)["loudness"] == pytest.approx(
            answer["loudness"], abs=1e-5
        )
        Path("more.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
        task_classes._OWN_TASKS.clear()
        for words in (
            ["predict", "runs/loud", "more.jsonl"],
            ["evaluate", "runs/loud", "--data", "more.jsonl"],
        ):
            assert cli.main(words) == 2
            assert cli.main([*words, "--task", named]) == 0
            task_classes._OWN_TASKS.clear()
    finally:
        sys.path.remove(str(place))
        sys.modules.pop("shouting_of_the_guide", None)
    assert set(answer) == {"loudness"} and np.isfinite(answer["loudness"])
    assert np.isfinite(tuned.metrics["loss"])
    assert len(wrong) == 8 and wrong == sorted(wrong, reverse=True) and wrong[0] > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    shown = "\n".join(line for line in lines if not line.startswith("%"))  # comments of MyST
    for target in LINK.findall(shown):
        if "://" not in target:
            assert (page.parent / target).exists(), (
                f"{page.name} points to {target}, which is not there"
            )


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "lab-log.md"],  # a log names what there was then
    ids=lambda page: page.name,
)
def test_tests_that_are_named_exist(page):
    for path, name in re.findall(r"\b(tests/[\w/]+(?:\.py)?)(?:::(\w+))?", page.read_text("utf-8")):
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_every_row_of_the_comparison_names_a_test_that_proves_it():
    """Not a file or a folder, but a test; and our cell says how many commands or lines it takes."""
    text = (ROOT / "docs" / "compared.md").read_text(encoding="utf-8")
    table = text.split("## First days")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    tasks = " ".join(row[0] for row in rows)
    for task in ("Hub", "GGUF", "ONNX", "retrieval", "harness", "size", "rate", "notebook", "talk"):
        assert task in tasks, task
    for row in rows:
        assert len(row) == 8 and all(cell.strip("| ") for cell in row), row
        assert re.fullmatch(r"(`tests/[\w/]+\.py::test_\w+`(, )?)+", row[2]), row
        assert re.match(r"\d (command|line)s?\b|nothing to do|the same command", row[1]), row


def test_the_front_page_shows_how_to_install_code_and_a_picture():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    begin, end = re.findall(r'^:(?:start-after|end-before): "(.*)"$', index, re.M)
    assert "```{include} ../README.md" in index
    front = readme.split(begin)[1].split(end)[0]
    assert (
        "pip install" in front and "pretrain.load(" in front and re.search(r"!\[.*\.svg\)", front)
    )


def test_recipes_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r"configs/[\w-]+\.yaml", page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{page.name} names {name}, which is not there"


def test_recipes_are_few_short_and_valid():
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert 0 < len(recipes) <= 15
    for path in recipes:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path.name
        tuned = "\ntask:" in path.read_text(encoding="utf-8")
        (TuneConfig if tuned else pretrain.RunConfig).load(path)


def test_tree_of_the_readme_is_the_tree():
    """Every path in it exists, and every module and folder of the package at its top is in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## The tree\n\n```text\n(.*?)```", text, re.S)
    assert tree
    inside, base = set(), ROOT
    for line in tree[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            base = ROOT / name if name.startswith("src") else ROOT
        path = base / name if line.startswith(" ") else ROOT / name
        assert path.exists(), f"the README's tree names {name}, which is not there"
        inside.add(name.rstrip("/"))
    package = ROOT / "src" / "pretrain"
    folders = {
        path.name for path in package.iterdir() if path.is_dir() and (path / "__init__.py").exists()
    }
    assert folders <= inside, folders - inside


def test_ci_runs_the_two_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    found = re.findall(r"<!-- ci: (\w+) -->\n```bash\n([^\n]+)\n```", readme)
    assert [name for name, _ in found] == ["quickstart", "tests"]
    for name, command in found:
        assert f"readme_command {name}" in script
        assert command.count("&&") >= 1
    assert found[0][1].startswith("python3 -m venv") and found[0][1].endswith("pretrain quickstart")
    assert 'pip install -c constraints.txt -e ".[test]"' in found[1][1] and "pytest" in found[1][1]


def test_extras_and_pins():
    """What the tests need is pinned, and every extra that the documentation names exists."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in lines
        if "==" in line and line[0] != "#"
    }
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + extras["test"] + extras["docs"] + extras["zst"]
    for requirement in needed:
        name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
        assert name == "pretrain" or name in pins, f"{name} has no pin in constraints.txt"
    for page in PAGES:
        for extra in re.findall(r"pretrain\[(\w+)\]", page.read_text(encoding="utf-8")):
            assert extra in extras
    from pretrain.training.logging import LOGGERS

    assert set(LOGGERS) <= set(extras)
