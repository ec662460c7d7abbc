"""How much of the code a reader meets: sizes, imports of a run, files of a step, circles between folders.

    python docs/architecture.py

Each run is made in a process of its own, on a few sentences, on the CPU. Lines are those of whole files.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import pretrain

SRC = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SRC / "pretrain"
TEXTS = [f"the {who} {does} the {what}" for who in ("cat", "dog", "man") for does in ("saw", "fed", "hid")
         for what in ("fish", "bird", "ball", "cake")]  # fmt: skip
# What a process of its own runs; OUT, TOKENIZER, TEXTS and the profiler are given.
PRE_TRAIN = """
open(OUT + "/text.txt", "w").write("\\n".join(TEXTS * 20))
pretrain.train(
    data={"train": OUT + "/text.txt", "tokenizer": TOKENIZER, "row_length": 32},
    model={"family": "bert", "size": "tiny", "overrides": {"hidden_size": 32, "num_heads": 2, "num_layers": 2}},
    objective={"class_path": "MaskedLM"},
    train={"out": OUT + "/run", "limit": "4 steps", "batch_rows": 4},
    parallel={"device": "cpu", "threads": 1},
)
"""
FINE_TUNE = """
model = pretrain.build("bert", "tiny", hidden_size=32, num_heads=2, num_layers=2,
                       tokenizer=pretrain.Tokenizer.from_directory(TOKENIZER))
model.save(OUT + "/model")
rows = [{"text": text, "label": text.split()[1]} for text in TEXTS]
pretrain.finetune(OUT + "/model", rows, task="classification", out=OUT + "/tuned", epochs=1, quiet=True)
"""
COUNT = """
import json, sys
import pretrain
OUT, TOKENIZER, TEXTS = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
step = set()
if {profile}:
    import threading
    from pretrain.training import schedule, trainer
    step.add(schedule.__file__)  # gives the step its learning rate
    def seen(frame, event, _):
        if event == "call":
            step.add(frame.f_code.co_filename)
    plain = trainer.take_step
    def profiled(*args, **options):
        sys.setprofile(seen)
        threading.setprofile(seen)
        try:
            return plain(*args, **options)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    trainer.take_step = profiled
{code}
files = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "pretrain" and getattr(m, "__file__", None)]
print("RESULT" + json.dumps([files, sorted(step)]))
"""


def lines(files: list[str] | list[Path]) -> int:
    """Lines of all files together."""
    return sum(len(Path(file).read_text(encoding="utf-8").splitlines()) for file in files)


def observed(code: str, tokenizer: str, *, profile: bool = False) -> tuple[list[str], list[str]]:
    """Our files that a run imports, and those in which its steps run code."""
    with tempfile.TemporaryDirectory() as folder:
        whole = COUNT.replace("{profile}", str(profile)).replace("{code}", code)
        done = subprocess.run(
            [sys.executable, "-c", whole, folder, tokenizer, json.dumps(TEXTS)],
            env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    files, step = json.loads(done.stdout.rpartition("RESULT")[2])
    return files, [file for file in step if file.startswith(str(PACKAGE))]


def folder_graph() -> dict[str, dict[str, str]]:
    """Folder, or module that lies in none -> those that it imports, wherever in the file -> one line that does so."""
    graph: dict[str, dict[str, str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        edges = graph.setdefault(own, {})
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for part in {name.split(".")[1] for name in names if name.startswith("pretrain.")}:
                is_ours = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
                if is_ours and part != own:
                    edges.setdefault(part, f"{path.relative_to(SRC.parent)}:{node.lineno}")
    return graph


def circle(graph: Mapping[str, Collection[str]]) -> set[str]:
    """Folders that import each other, directly or by way of others."""
    left = {name: set(targets) for name, targets in graph.items()}
    while leaves := {name for name, targets in left.items() if not targets & set(left)}:
        left = {name: targets for name, targets in left.items() if name not in leaves}
    while roots := set(left) - set().union(*left.values()):
        left = {name: targets for name, targets in left.items() if name not in roots}
    return set(left)


def delayed_imports() -> list[str]:
    """Places outside hub.py and cli/ where a function imports a module of ours, most of them to start without torch."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE)
        if where.parts[0] in ("hub.py", "cli"):
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                if any(name.partition(".")[0] == "pretrain" for name in names):
                    found.append(f"{where}:{node.lineno}")
    return sorted(set(found))


def set_on_trainers() -> dict[str, str]:
    """What modules set on a Trainer that they are given -> one line that does so."""
    found: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign):
                targets = node.targets
            elif isinstance(node, ast.AnnAssign | ast.AugAssign):
                targets = [node.target]
            for item in (item for target in targets for item in ast.walk(target)):
                if not isinstance(item, ast.Attribute):
                    continue
                if ast.unparse(item).startswith(("trainer.", "setup.")):
                    found[ast.unparse(item)] = f"{path.relative_to(SRC.parent)}:{node.lineno}"
    return found


def main() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("\n".join(TEXTS * 20), encoding="utf-8")
        tokenizer = pretrain.train_tokenizer(str(text), "wordpiece", vocab_size=60)
        tokenizer.save(Path(folder, "tokenizer"))
        bert, step = observed(PRE_TRAIN, f"{folder}/tokenizer", profile=True)
        tuned, _ = observed(FINE_TUNE, f"{folder}/tokenizer")
    rows = [
        ("lines / files in src", f"{lines(files):,} / {len(files)}"),
        ("imported by a one-process BERT run", f"{len(bert)} files / {lines(bert):,} lines"),
        ("files / lines in which a BERT step runs code", f"{len(step)} / {lines(step):,}"),
        ("imported by a fine-tuning run", f"{len(tuned)} / {lines(tuned):,}"),
        ("folders in a circle, delayed imports counted", str(len(circle(folder_graph())))),
        ("own imports inside functions, hub.py and cli/ apart", str(len(delayed_imports()))),
        ("attributes of Trainer set from outside", str(len(set_on_trainers()))),
    ]
    print("| figure | now |\n|---|---|")
    for name, figure in rows:
        print(f"| {name} | {figure} |")
    if "-v" in sys.argv:
        for title, some in (("BERT run", bert), ("step", step)):
            print(f"\n{title}:")
            for file in sorted(some):
                print(f"  {lines([file]):5d} {Path(file).relative_to(PACKAGE)}")


if __name__ == "__main__":
    main()
