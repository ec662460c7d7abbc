"""What the documentation says is run: its Python blocks at a tiny size, its command lines against the real options.

A block is run when a line ``<!-- test: NAME -->`` stands before it. The words are those of the reader; only sizes are
replaced, by the table ``SMALLER``, so that it takes seconds.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pretrain
import tiny
from pretrain import objectives
from pretrain.cli import main as cli
from pretrain.cli.arguments import read_settings, settings_class
from pretrain.finetuning.settings import TuneConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- test: ([\w-]+) -->\n```python\n(.*?)```", re.S)
FENCE = re.compile(r"```bash\n(.*?)```", re.S)
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
TINY = """
model: {family: gpt2, size: tiny}
train: {out: runs/books-gpt, limit: 3 steps, batch_rows: 2, eval_rows: 2}
"""


def blocks():
    for page in PAGES:
        for name, code in BLOCK.findall(page.read_text(encoding="utf-8")):
            yield pytest.param(page, name, code, id=f"{page.stem}-{name}")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory like a reader's: some books, and recipes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    for number in range(12):
        words = " ".join(
            f"Chapter {number}: the ship {i} sailed at dawn and came home." for i in range(30)
        )
        (tmp_path / "books" / f"{number}.txt").write_text(words)
    (tmp_path / "other.txt").write_text("The boat came home at night. " * 50)
    (tmp_path / "tiny.yaml").write_text(TINY)
    reviews = [f"a {w} film {n},{k}" for k, w in enumerate(("dull", "warm")) for n in range(30)]
    (tmp_path / "reviews.csv").write_text("review,stars\n" + "\n".join(reviews) + "\n")
    asked = [{"role": "user", "content": "What sails?"}, {"role": "assistant", "content": "A ship"}]
    chats = [
        json.dumps({"messages": [*asked, {**asked[0], "content": str(n)}, asked[1]]})
        for n in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats) + "\n")
    colours = np.random.default_rng(0).integers(0, 256, (24, 9, 9, 3), dtype=np.uint8)
    for k, colour in enumerate(colours):
        file = tmp_path / "photos" / ("cat", "dog")[k % 2] / f"{k // 2}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colour).save(file)
        file.with_suffix(".txt").write_text(f"the {file.parent.name} number {k // 2}")
        recording = tmp_path / "words" / ("yes", "no")[k % 2] / f"{k // 2}.wav"
        recording.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(recording), "wb") as out:
            out.setparams((1, 2, 8000, 0, "NONE", ""))
            out.writeframes(colour.tobytes() * 20)
    boxes = ["image,label,xmin,ymin,xmax,ymax"]
    for k in range(1, 11):
        mask = np.zeros((32, 32), np.uint8)
        mask[k : k + 12, 4:16] = 1
        for folder, array in (("images", mask * np.uint8(200)), ("masks", mask)):
            file = tmp_path / "cells" / folder / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(file)
        boxes.append(f"cells/images/{k}.png,cell,4,{k},16,{k + 12}")
    (tmp_path / "boxes.csv").write_text("\n".join(boxes))
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
    run(code, f"{page.name}: {name}", run_before(name))


def test_blocks_are_found():
    names = [param.values[1] for param in blocks()]
    assert {"readme", "quickstart", "objective"} <= set(names)


def test_unmarked_python_blocks_do_not_exist():
    """A Python block in the documentation is run; there is no other kind."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```python") == len(BLOCK.findall(text)), page.name


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
        # A directory never names code: who opens it names the class.
        objectives._OWN_TASKS.clear()
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
        objectives._OWN_TASKS.clear()
        for words in (
            ["predict", "runs/loud", "more.jsonl"],
            ["evaluate", "runs/loud", "--data", "more.jsonl"],
        ):
            assert cli.main(words) == 2
            assert cli.main([*words, "--task", named]) == 0
            objectives._OWN_TASKS.clear()
    finally:
        sys.path.remove(str(place))
        sys.modules.pop("shouting_of_the_guide", None)
    assert set(answer) == {"loudness"} and np.isfinite(answer["loudness"])
    assert np.isfinite(tuned.metrics["loss"])


def command_lines():
    for page in PAGES:
        for fence in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in fence.splitlines():
                for part in line.split("&&"):
                    words = shlex.split(part, comments=True)
                    if words and Path(words[0]).name == "pretrain":
                        yield pytest.param(words[1:], id=f"{page.stem}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", list(command_lines()))
def test_command_line_is_understood(words, monkeypatch, capsys):
    """The command exists and takes these options with these types; what it would do is replaced by nothing."""

    def check(arguments):
        if words[0] in ("train", "finetune"):
            vars(arguments).pop("config")  # the files of the documentation do not all exist
            read_settings(settings_class(words[0]), arguments)

    command = dataclasses.replace(cli.COMMANDS[words[0]], run=check)
    monkeypatch.setitem(cli.COMMANDS, words[0], command)
    assert cli.main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    shown = "\n".join(line for line in lines if not line.startswith("%"))  # comments of MyST
    for target in LINK.findall(shown):
        if "://" not in target:
            assert (page.parent / target).exists(), (
                f"{page.name} points to {target}, which is not there"
            )


def test_tests_that_are_named_exist():
    text = (ROOT / "docs" / "compared.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", text)
    assert len(named) > 10
    for path, name in named:
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


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
