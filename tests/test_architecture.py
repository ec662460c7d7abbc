"""The shape of the package, held by tests: import direction, sizes, forbidden calls, docstrings, cost of the import.

Run ``pytest -s tests/test_architecture.py`` to see the sizes.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from architecture import (
    FINE_TUNE,
    PRE_TRAIN,
    TEXTS,
    circle,
    delayed_imports,
    folder_graph,
    observed,
    set_on_trainers,
)

from pretrain.data.tokenizer import train_from_texts

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "pretrain"
MAX_FUNCTION_LINES = 80


def sources() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    """models/gpt2.py -> models.gpt2; nn/__init__.py -> nn; __init__.py -> __init__."""
    parts = list(path.relative_to(SRC).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def folder(name: str) -> str:
    """The folder of a module, or the module itself where it lies in none: models.gpt2 -> models; errors -> errors."""
    return name.split(".")[0]


def imports(path: Path, *, everywhere: bool) -> Iterator[tuple[str, int]]:
    """(module, line) of the imports of a file: those that run when it is loaded, or ``everywhere``.

    With ``everywhere`` also those inside functions and those for types only.
    """

    def visit(node: ast.AST) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.relative_to(ROOT)}:{node.lineno}: a relative import"
            base = node.module or ""
            for alias in node.names:
                inside = SRC.joinpath(*f"{base}.{alias.name}".split(".")[1:])
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                yield (
                    (f"{base}.{alias.name}" if base.startswith("pretrain") and is_module else base),
                    node.lineno,
                )
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body if everywhere else node.orelse:
                yield from visit(child)
        elif everywhere or not isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        ):
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    return visit(tree(path))


def test_folders_import_each_other_in_one_direction():
    """What imports a folder is imported by none of its imports: delayed and type-only imports are imports."""
    graph = folder_graph()
    inside = circle(graph)
    knot = [
        f"{name} -> {target} ({graph[name][target]})"
        for name in sorted(inside)
        for target in graph[name]
        if target in inside
    ]
    assert not inside, "these folders import each other in a circle:\n" + "\n".join(knot)


def test_the_ground_stays_small():
    """Whatever everybody imports imports almost nothing itself."""
    graph = folder_graph()
    assert not graph["printing"]
    assert set(graph["errors"]) <= {"printing"}
    assert set(graph["utils"]) <= {"errors", "printing"}
    assert set(graph["nn"]) <= {"errors", "utils"}
    assert set(graph["config"]) <= {"errors", "printing", "utils"}
    assert not set(graph["data"]) & {"nn", "models", "objectives", "training"}


def test_only_the_hub_finds_our_modules_by_name():
    """A path in a string is an import too: of families, objectives and public names, and of the methods of a model."""
    tables = {"__init__", "hub", "models", "objectives", "checkpoint"}
    wrong = []
    for path in sources():
        name = module_name(path)
        docs = {id(d) for d in docstrings(tree(path))}
        for node in ast.walk(tree(path)):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in docs
                and re.fullmatch(r"pretrain(\.\w+)+(:\w+)?", node.value)
                and SRC.joinpath(*node.value.split(":")[0].split(".")[1:])
                .with_suffix(".py")
                .is_file()
                and name not in tables
                and folder(node.value.removeprefix("pretrain.")) != folder(name)
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} names {node.value}")
    assert not wrong, "\n".join(wrong)


def test_functions_import_no_module_of_ours():
    """What only some runs need is named in the ``__init__`` of its folder, see `on_use`; hub.py and cli/ apart."""
    assert not delayed_imports()


def test_a_trainer_sets_its_own_attributes():
    """Whoever is given a trainer reads it: what it holds is decided in one file."""
    wrong = [f"{where} sets {name}" for name, where in set_on_trainers().items()]
    assert not wrong, "\n".join(wrong)


def family_names() -> set[str]:
    """Model types and class names in the visible table ``FAMILIES`` of models/__init__.py."""
    for node in tree(SRC / "models" / "__init__.py").body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "FAMILIES" for t in targets):
            table = ast.literal_eval(node.value)
            return set(table) | {value.split(":")[1] for value in table.values()}
    raise AssertionError("models/__init__.py has no table FAMILIES")


def test_training_names_no_family_and_no_objective():
    families = family_names()
    objectives = {p.stem for p in (SRC / "objectives").glob("*.py")} - {"__init__", "base"}
    classes = {
        node.name
        for p in (SRC / "objectives").glob("*.py")
        if p.stem in objectives
        for node in tree(p).body
        if isinstance(node, ast.ClassDef)
    }
    forbidden = (families | objectives | classes) - {"clip"}  # of gradients: optim.clip
    wrong = []
    for path in sorted((SRC / "training").rglob("*.py")):
        docs = {id(d) for d in docstrings(tree(path))}
        for node in ast.walk(tree(path)):
            words = set()
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in docs
            ):
                words = set(node.value.replace(".", " ").replace(":", " ").split())
            elif isinstance(node, ast.Name):
                words = {node.id}
            elif isinstance(node, ast.Attribute):
                words = set() if dotted(node).startswith(("nn.", "torch.")) else {node.attr}
            elif isinstance(node, ast.ImportFrom):
                words = set((node.module or "").split(".")) | {a.name for a in node.names}
            if words & forbidden:
                wrong.append(
                    f"{path.relative_to(ROOT)}:{node.lineno} names {sorted(words & forbidden)}"
                )
    assert not wrong, "\n".join(wrong)


def docstrings(node: ast.Module) -> Iterator[ast.Constant]:
    for child in ast.walk(node):
        body = getattr(child, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            yield first.value


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_nothing_executes_data():
    """No pickle in any disguise, no eval, no exec: files that are read never run."""
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    calls = {
        "eval", "exec", "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "os.system", "os.popen",
        "np.load", "numpy.load", "np.save", "numpy.save", "pd.read_pickle", "yaml.load", "yaml.unsafe_load",
        "yaml.full_load",
    }  # fmt: skip
    wrong = []
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                name = dotted(node.func)
                safe = name in {"np.load", "numpy.load"} and any(
                    k.arg == "allow_pickle"
                    and isinstance(k.value, ast.Constant)
                    and k.value.value is False
                    for k in node.keywords
                )
                shell = any(
                    k.arg == "shell"
                    and not (isinstance(k.value, ast.Constant) and k.value.value is False)
                    for k in node.keywords
                )
                if (name in calls and not safe) or shell:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {name}")
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = (
                    [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                )
                hit = {n.split(".")[0] for n in names} & modules
                if hit:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {sorted(hit)}")
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_are_imported_where_they_are_used():
    heavy = {
        "datasets",
        "huggingface_hub",
        "pyarrow",
        "pandas",
        "tensorboard",
        "wandb",
        "trackio",
        "IPython",
    }
    never = {"transformers", "peft", "accelerate"}
    wrong = []
    for path in sources():
        for full, line in imports(path, everywhere=True):
            if full.split(".")[0] in never:
                wrong.append(
                    f"{path.relative_to(ROOT)}:{line} imports {full}: it is for tests only"
                )
        for full, line in imports(path, everywhere=False):
            if full.split(".")[0] in heavy:
                wrong.append(
                    f"{path.relative_to(ROOT)}:{line} imports {full} when the module is loaded"
                )
    assert not wrong, "\n".join(wrong)


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    def visit(
        node: ast.AST, prefix: str
    ) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield (
                    prefix + child.name,
                    child,
                    (child.end_lineno or child.lineno) - child.lineno + 1,
                )
                yield from visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")
            else:
                yield from visit(child, prefix)

    return visit(tree(path), "")


def test_sizes():
    too_big = []
    total = 0
    longest = []
    print()
    for path in sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        total += lines
        worst = max(functions(path), key=lambda item: item[2], default=None)
        note = f"{worst[2]:4d} {worst[0]}" if worst else ""
        print(f"{lines:5d}  {path.relative_to(SRC)!s:34} longest function {note}")
        for name, _, size in functions(path):
            longest.append(size)
            if size > MAX_FUNCTION_LINES:
                too_big.append(
                    f"{path.relative_to(ROOT)}: {name} has {size} lines, at most {MAX_FUNCTION_LINES}"
                )
    print(f"{total:5d}  lines in {len(sources())} files, {len(longest)} functions")
    assert not too_big, "\n".join(too_big)


def methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    return (child for child in node.body if isinstance(child, ast.FunctionDef))


def test_public_things_have_docstrings():
    """Modules, public classes, functions and methods; an override is explained where the method was first declared."""
    plain = {"forward", "extra_repr", "main"}
    classes = {
        node.name: node
        for path in sources()
        for node in tree(path).body
        if isinstance(node, ast.ClassDef)
    }

    def explained_above(node: ast.ClassDef, name: str) -> bool:
        bases = [
            classes[b] for b in (dotted(base).split(".")[-1] for base in node.bases) if b in classes
        ]
        return any(
            any(m.name == name and ast.get_docstring(m) for m in methods(base))
            or explained_above(base, name)
            for base in bases
        )

    def excused(node: ast.ClassDef, method: ast.FunctionDef) -> bool:
        short = (method.end_lineno or 0) - method.lineno <= 4
        decorators = {dotted(d) for d in method.decorator_list}
        return (
            method.name.startswith("_")
            or method.name in plain
            or (short and bool(decorators & {"property", "overload"}))
            or explained_above(node, method.name)
        )

    missing = []
    for path in sources():
        where = path.relative_to(ROOT)
        if path.stat().st_size and not ast.get_docstring(tree(path)):
            missing.append(f"{where}: the module")
        for node in tree(path).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                missing.append(f"{where}:{node.lineno} {node.name}")
            if isinstance(node, ast.ClassDef) and "Protocol" not in {
                dotted(base) for base in node.bases
            }:
                missing += [
                    f"{where}:{method.lineno} {node.name}.{method.name}"
                    for method in methods(node)
                    if not excused(node, method) and not ast.get_docstring(method)
                ]
    assert not missing, "no docstring:\n" + "\n".join(missing)


def test_no_todo_without_an_issue():
    mark = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b(?!.*#\d)")
    wrong = []
    for path in sources():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if mark.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def python(code: str, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(SRC.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import pretrain",
        "import pretrain; pretrain.PretrainError; pretrain.RunConfig",
        "from pretrain.cli.main import main; main(['--help'])",
        "import pretrain.report.run_report",
    ],
)
def test_light_imports_stay_light(code):
    """Neither of them may load torch or one of the large libraries: that is most of a second each."""
    heavy = ("torch", "datasets", "transformers", "pyarrow", "pandas", "tokenizers", "numpy")
    out = python(f"{code}\nimport sys\nprint('HEAVY', [m for m in {heavy!r} if m in sys.modules])")
    assert out.splitlines()[-1] == "HEAVY []"


def test_a_model_is_saved_loaded_and_asked_without_the_compiler_of_torch(tmp_path: Path):
    """It takes as long to load as torch itself, and comes along unasked: with a draw or a join on the meta device."""
    code = (
        "import sys, pretrain\n"
        "from pretrain.data.tokenizer import train_from_texts\n"
        "tokenizer = train_from_texts(['the cat sat'] * 9, 'bpe', vocab_size=270)\n"
        "size = dict(num_layers=2, hidden_size=32, num_heads=2, max_positions=64)\n"
        "for family in ('gpt2', 'llama', 'bert'):\n"
        "    folder = sys.argv[1] + '/' + family\n"
        "    pretrain.build(family, tokenizer=tokenizer, **size).save(folder)\n"
        "    model = pretrain.load(folder, quiet=True)\n"
        "    model.embed(['the cat'])\n"
        "    if family != 'bert':\n"
        "        model.generate('the', max_new_tokens=4)\n"
        "print([m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules])"
    )
    assert python(code, str(tmp_path)).splitlines()[-1] == "[]"


def test_models_of_texts_load_nothing_of_images():
    code = (
        "import sys, pretrain.training.run, pretrain.checkpoint.loading\n"
        "from pretrain.models import build\n"
        "from pretrain.objectives import objective_class\n"
        "build('bert', 'tiny', device='meta'), build('gpt2', 'tiny', device='meta')\n"
        "objective_class('MaskedLM'), objective_class('NextToken')\n"
        "words = ('image', 'patches', 'pairs', 'contrastive', 'clip', 'siglip', 'resnet', '.vit')\n"
        "loaded = [m for m in sys.modules if m.startswith('pretrain.')]\n"
        "print([m for m in loaded if any(word in m for word in words)])"
    )
    assert python(code).splitlines()[-1] == "[]"


def test_a_run_of_one_process_loads_only_what_it_uses(tmp_path: Path):
    """No LoRA, no tables, nothing that only several processes need."""
    train_from_texts(TEXTS * 20, "wordpiece", vocab_size=60).save(tmp_path)
    files, _ = observed(PRE_TRAIN, str(tmp_path))
    loaded = {Path(file).relative_to(SRC).with_suffix("").as_posix() for file in files}
    assert "training/trainer" in loaded
    several = (
        "processes",
        "parallel_strategy",
        "tensor_parallel",
        "watchdog",
        "handshake",
        "store",
        "launch",
    )
    unused = {"data/table_readers", "data/tables", "checkpoint/adapter_files", "metrics"}
    unused |= {"checkpoint/loading", "checkpoint/download", "models/sentences", "utils/hub_files"}
    unused |= {"training/starting_model", "training/launch", "training/float8"}
    unused |= {f"distributed/{name}" for name in several}
    assert not loaded & unused
    assert not [
        name for name in loaded if name.startswith(("lora/", "finetuning/", "inference/predict"))
    ]


def test_fine_tuning_on_texts_loads_nothing_of_images(tmp_path: Path):
    """What only a task of images or audio needs is in that task."""
    train_from_texts(TEXTS * 20, "wordpiece", vocab_size=60).save(tmp_path)
    files, _ = observed(FINE_TUNE, str(tmp_path))
    loaded = [Path(file).relative_to(SRC).as_posix() for file in files]
    assert "finetuning/remarks.py" in loaded
    assert not [name for name in loaded if "image" in name or "audio" in name]
    unused = {"data/prepare.py", "data/chat.py", "inference/predict.py", "finetuning/compare.py"}
    assert not {*loaded} & unused


def test_everything_public_resolves_and_costs_little_more_than_torch():
    """All public names together may add only a little to what torch costs (measured as modules, not as seconds)."""
    code = (
        "import sys, torch, numpy, tokenizers, safetensors.torch\n"
        "before = set(sys.modules)\n"
        "import pretrain\n"
        "names = [n for n in pretrain.__all__ if getattr(pretrain, n, None) is None]\n"
        "new = {m for m in set(sys.modules) - before}\n"
        "print('MISSING', names)\n"
        "print('OTHERS', len({m for m in new if m.split('.')[0] != 'pretrain'}))\n"
        "print('HEAVY', [m for m in ('datasets', 'transformers', 'pyarrow', 'pandas') if m in new])"
    )
    lines = python(code).splitlines()[-3:]
    print("\n".join(lines))
    assert lines[0] == "MISSING []"
    assert lines[2] == "HEAVY []"
    assert (
        int(lines[1].split()[1]) < 30
    )  # small ones of the standard library; a new dependency has more


RUN = """
import sys
import numpy as np
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.models import build
from pretrain.objectives import build_objective
from pretrain.training.trainer import Trainer

shape = {"vocab_size": 32, "num_layers": 2, "hidden_size": 16, "num_heads": 2, "max_positions": 16}
for name in ("adamw", "muon"):
    train = TrainConfig(out=f"{sys.argv[1]}/{name}", limit="2 steps", batch_rows=4, precision="bf16")
    Trainer(
        build_objective("NextToken", {}, build("gpt2", None, **shape)),
        [{"input_ids": np.arange(16)} for _ in range(8)],
        quiet=True,
        optim=OptimConfig(name=name),
        train=train,
        parallel=ParallelConfig(device="cpu"),
    ).fit()
print([module for module in ("torch._dynamo", "sympy") if module in sys.modules])
"""


def test_a_run_of_eager_blocks_does_not_import_the_compiler(tmp_path: Path):
    """It takes a second, which is most of the time up to the first step of a small model."""
    assert python(RUN, str(tmp_path)).splitlines()[-1] == "[]"
