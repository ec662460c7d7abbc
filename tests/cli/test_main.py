"""The command line: instant help, one-paragraph errors, exit codes, and each command on a tiny checkpoint."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import tiny
from pretrain import __main__ as started
from pretrain.cli import main as cli
from pretrain.config import RunConfig, fields, strict_yaml
from pretrain.errors import ConfigError, TrainingError
from pretrain.finetuning.settings import TuneConfig
from pretrain.models import build
from pretrain.training.trainer import Trainer
from pretrain.utils import strict_json

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
COMMANDS = [
    "quickstart",
    "prepare",
    "train",
    "lr-range",
    "finetune",
    "bench",
    "doctor",
    "slurm",
    "schema",
    "predict",
    "generate",
    "chat",
    "fill-mask",
    "embed",
    "search",
    "evaluate",
    "probe",
    "merge",
    "push",
    "export",
    "inspect",
    "report",
]


def shell(*words: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pretrain", *words],
        capture_output=True, text=True, input=stdin, env=ENV | env, cwd=ROOT, timeout=60,
    )  # fmt: skip


def fails(capsys: Any, *words: str) -> str:
    """The message of a command that must fail as a user's mistake."""
    assert cli.main(list(words)) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and "Traceback" not in shown.err
    assert shown.err.count("\n") == 1
    return str(shown.err)


@pytest.mark.parametrize(
    "words", ["lr-range --plot", "quickstart --out", "prepare x --out", "merge x --out"]
)
def test_an_empty_name_of_what_is_written_is_refused_first(words: str, capsys: Any) -> None:
    option = words.split()[-1]
    for given in ([*words.split(), ""], f"{words}=".split()):
        assert f"{option} is empty" in fails(capsys, *given)


# ----------------------------------------------------------------------------------------------- help


def test_help_imports_nothing_heavy() -> None:
    """So that it is there at once: torch alone takes seconds to import."""
    assert list(cli.COMMANDS) == COMMANDS
    for words in (["--help"], ["train", "--help"], ["generate", "-h"]):
        done = shell(*words)
        assert done.returncode == 0 and "usage: pretrain" in done.stdout and not done.stderr
    code = (
        "import sys; from pretrain.cli.main import main\n"
        f"for c in {COMMANDS!r}: main([c, '--help'])\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'datasets', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True, stdout=subprocess.DEVNULL)


def test_help_shows_every_command_and_every_setting(capsys: Any) -> None:
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in COMMANDS)
    for name, kind in (("train", RunConfig), ("finetune", TuneConfig)):
        assert cli.main([name, "--help", "all"]) == 0
        whole = capsys.readouterr().out
        text = " ".join(whole.split())
        for section, of in kind.SECTIONS.items():
            for field in fields(of):
                assert field.help and f"--{section}.{field.name}" in text
                if field.name != "class_path":
                    assert field.help.split(".")[0][:30] in text
        assert cli.main([name, "--help"]) == 0
        short = capsys.readouterr().out
        assert 10 <= short.count("\n  --") <= 15 and short.count("example:") == 1
        assert max(map(len, (whole + short).splitlines())) <= 84
        for option in ("--model", "--data", "--out", "--lr"):
            assert f"{option}, --" in short or f"{option}  " in short
        assert f"pretrain {name} --help all" in short
    assert "yes or no (default: no)" in whole and "one of adamw, muon" in whole
    assert "a whole number" in whole and " INT" not in whole
    for name in COMMANDS:
        assert cli.main([name, "-h"]) == 0
        assert cli.COMMANDS[name].example in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pretrain 0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_few_options(name: str, capsys: Any) -> None:
    assert cli.main([name, "--help"]) == 0
    shown = re.findall(r"^  (?! )(?!pretrain )", capsys.readouterr().out, flags=re.MULTILINE)
    assert 1 <= len(shown) <= 14


@pytest.mark.parametrize("name", ["train", "lr-range", "bench"])
@pytest.mark.parametrize("words", ["--model gpt2:?", "--model.family gpt2 --model.size ?"])
def test_the_sizes_of_a_family(name: str, words: str, capsys: Any) -> None:
    assert cli.main([name, *words.split()]) == 0
    assert "layers x width" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["'trian'", "'train'"]),
        (["fill_mask", "x", "y"], ["'fill-mask'"]),
        (["train", "--optim.lrr", "3"], ["'optim.lrr'", "'optim.lr'"]),
        (["train", "--optim.lrr=3"], ["'optim.lrr'", "'optim.lr'"]),
        (["train", "--lrr", "3"], ["'lrr'", "'optim.lr'"]),
        (["train", "--optim.lr", "fast", "--batch_size", "3"], ["optim.lr", "a number"]),
        (["train", "--batch_size", "-1"], ["train.batch_rows", "between", "batch_size"]),
        (
            ["train", "--batch_size", "8", "--batch_rows", "8"],
            ["--batch_size and", "both train.batch_rows"],
        ),
        (
            ["train", "--lr", "1", "--optim.lr=2", "--show_config"],
            ["--lr and --optim.lr are both optim.lr"],
        ),
        (
            ["train", "--data", "a", "--data.train", "b", "--show_config"],
            ["--data and --data.train are both"],
        ),
        (
            ["bench", "--model", "gpt2:tiny", "--size", "small", "--show_config"],
            ["--model and --model.size are both"],
        ),
        (
            ["finetune", "--task", "chat", "--task.name", "chat", "--show_config"],
            ["--task and --task.name are both"],
        ),
        (
            ["finetune", "--columns.label", "a", "--data.columns.label", "b", "--show_config"],
            ["--columns.label and --data.columns.label are both data.columns.label"],
        ),
        (
            [
                "train",
                "--show_config",
                "--overrides",
                "{hidden_size: 64}",
                "--overrides.hidden_size",
                "32",
            ],
            ["--overrides and --overrides.hidden_size are both model.overrides.hidden_size"],
        ),
        (
            [
                "train",
                "--show_config",
                "--overrides.a.b",
                "1",
                "--model.overrides",
                "{c: 1, a: {b: 2}}",
            ],
            ["--overrides.a.b and --model.overrides are both model.overrides.a.b"],
        ),
        (
            ["train", "--show_config", "--overrides.a.b", "1", "--overrides.a", "2"],
            ["--overrides.a.b and --overrides.a are both model.overrides.a"],
        ),
        (
            ["predict", "x", "y.csv", "--columns.text", "a", "--columns", "{text: b}"],
            ["--columns.text and --columns are both columns.text"],
        ),
        (["train", "--gradient_accumulation_steps", "4"], ["train.micro_rows", "divided by 4"]),
        (["train", "--resume", "--out", "runs/x"], ["train.out", "resumes", "model.checkpoint"]),
        (["train", "--devicess", "2"], ["--devicess", "'--devices'"]),
        (["train", "--max_steps"], ["--max_steps", "value"]),
        (["train", "--optim.l", "3"], ["'optim.l'"]),
        (["train", "--optim.lr", "fast"], ["optim.lr", "a number", "'fast'"]),
        (["train", "--optim.lr", "nan"], ["optim.lr"]),
        (["train", "--optim.lr"], ["--optim.lr", "value"]),
        (["train", "--optim.lr", "-1", "--show_config"], ["optim.lr", "between"]),
        (["train", "--train.batch_rows", "1e3"], ["train.batch_rows", "whole number"]),
        (["train", "--optim.name", "adm"], ["optim.name", "'adamw'"]),
        (["train", "--train.loggers", "wandb"], ["train.loggers", "list"]),
        (["train", "--config", "nope.yaml", "--show_config"], ["nope.yaml"]),
        (["train", "stray"], ["stray"]),
        (["train", "--batch", "8"], ["Did you mean 'batch_size', which is 'train.batch_rows'?"]),
        (["train", "--dat", "8"], ["Did you mean 'data'?"]),
        (["train", "--conf", "c.yaml"], ["Did you mean '--config'?"]),
        (["train", "--foo", "8"], ["'foo' is not a setting. Known: data, model, objective"]),
        (
            ["train", "--crop", "1"],
            ["If it is an option of the objective, write objective.init_args.crop."],
        ),
        (
            ["finetune", "--task", "segmentation", "--flip"],
            ["'optim.clip'? If it is an option of the task, write task.options.flip."],
        ),
        (["train", "--top-crop", "1"], ["write objective.init_args.top_crop."]),
        (["train", "--optim.foo", "8"], ["'optim.foo'", "Known: optim.betas, optim.c"]),
        (["train", "--schedule", "cosine_with_restarts"], ["Did you mean 'cosine'?"]),
        (["finetune", "--optim.lrr", "3"], ["'optim.lrr'", "'optim.lr'"]),
        (["finetune", "--task", "summarization"], ["task.name", "chat", "response"]),
        (["finetune", "--save_steps", "3"], ["'save_steps'", "train.eval_every"]),
        (["finetune", "--comparee", "x"], ["--comparee", "compare"]),
        (
            ["finetune", "--model", "m", "--data", "d", "--task", "chat", "--compare", "x"],
            ["--compare scratch"],
        ),
        (["train", "--model", "nosuch"], ["--family package.module:Class."]),
        (["train", "--objective", "chat"], ["pretrain finetune --task chat"]),
        (["evaluate", "x", "--task", "retreival"], ["Did you mean 'retrieval'?"]),
        (["evaluate", "x", "--task", "foo"], ["minimal-pairs", "sts"]),
        (["export", "x", "--to", "onx"], ["Did you mean 'onnx'?"]),
        (["prepare", "pyproject.toml", "--valid", "last:2"], ["--valid last:2: the share"]),
        (["finetune", "--problem", "x"], ["an option of the task, write task.options.problem."]),
        (["finetune", "--seeds", "x"], ["--seeds", "whole number", "'x'"]),
        (["finetune", "--label_counts", "many"], ["--label_counts", "a list", "'many'"]),
        (["finetune", "--label_counts", "[5, x]"], ["--label_counts.1", "whole number", "'x'"]),
        (["finetune", "--model"], ["--model", "value"]),
        (["finetune", "--model", "--task", "chat"], ["--model", "value"]),
        (["finetune", "--method.lora", "1.5"], ["method.lora", "whole number"]),
        (["finetune", "--model", "x", "--data", "y"], ["task"]),
        (["finetune", "--config", "nope.yaml"], ["nope.yaml"]),
        (["predict", "x"], ["file"]),
        (["predict", "x", "y", "--columns", "text"], ["--columns", "a mapping", "'text'"]),
        (["predict", "x", "-y.csv"], ["-y.csv", "write --"]),
        (["merge", "x"], ["--out"]),
        (["doctor", "--timeout", "true"], ["--timeout", "a number", "True"]),
        (["predict", "x", "y.csv", "--colums.text", "a"], ["--colums.text", "columns"]),
        (["predict", "x", "/no/such.csv"], ["/no/such.csv"]),
        (["generate", "x"], ["prompt"]),
        (["generate", "x", "y", "--topk", "3"], ["--topk", "'--top_k'"]),
        (["generate", "x", "y", "--top_k", "3.5"], ["--top_k", "whole number", "3.5"]),
        (["generate", "x", "y", "--top_p", "most"], ["--top_p", "a number"]),
        (["inspect", "/no/such/run"], ["/no/such/run"]),
        (["report", "/no/such/run"], ["/no/such/run"]),
        (["prepare", "/no/such/file.txt", "--quiet"], ["/no/such/file.txt"]),
    ],
)
def test_mistakes_are_one_paragraph_with_the_name(
    words: list[str], parts: list[str], capsys: Any
) -> None:
    text = fails(capsys, *words)
    assert all(part in text for part in parts), text


def test_what_a_model_is_not_for_is_told_in_commands(tmp_path: Path, capsys: Any) -> None:
    names = {"NextToken": "gpt2", "MaskedLM": "bert"}
    for kind, name in names.items():
        tiny.objective(kind).model.save(tmp_path / name)
    (tmp_path / "r.csv").write_text("text\na\n")
    for words, advised in (
        (["predict", "bert", "r.csv"], "pretrain fill-mask. To teach it one: pretrain finetune"),
        (["predict", "gpt2", "r.csv"], "pretrain generate, or pretrain chat"),
        (["merge", "bert", "--out", "m"], "nothing to merge"),
    ):
        placed = [
            str(tmp_path / word) if word in ("bert", "gpt2", "r.csv") else word for word in words
        ]
        assert cli.main(placed) == 2
        assert advised in capsys.readouterr().err


def test_debug_shows_where_the_error_was_raised() -> None:
    done = shell("train", "--optim.lrr", "3")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "\033" not in done.stderr
    done = shell("train", "--optim.lrr", "3", PRETRAIN_DEBUG="1")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_terminals_are_not_driven_by_file_names(capsys: Any) -> None:
    text = fails(capsys, "inspect", "\033[2Jevil\u202e")
    assert "\033" not in text and "\u202e" not in text and "\\x1b" in text


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for env, coloured in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        for key in ("NO_COLOR", "TERM"):
            monkeypatch.delenv(key, raising=False)
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        assert cli.main(["trian"]) == 2
        assert ("\033[31m" in terminal.getvalue()) == coloured
    monkeypatch.delenv("TERM")
    for width in (1, 8, 80):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr("pretrain.cli.main.columns", lambda stream, width=width: width)
        assert cli.main(["inspect", "a-path/" * 12]) == 2
        assert terminal.getvalue().startswith("\033[31merror:\033[0m")
        assert terminal.getvalue().count("error:") == 1


# ---------------------------------------------------------------------------------------------- train


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, leaf = name.rpartition(".")
    if parent in sys.modules:  # a package keeps its modules as attributes, too
        monkeypatch.setattr(sys.modules[parent], leaf, module, raising=False)


def test_train_passes_the_file_with_what_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[RunConfig] = []

    def train(config: Any, *, devices: Any) -> Any:
        seen.append(config)
        return types.SimpleNamespace(exit_code=143)

    fake(monkeypatch, "pretrain.training.run", train=train)
    path = tmp_path / "c.yaml"
    path.write_text(
        "optim: {lr: 1, min_lr: 0.5}\nmodel: {overrides: {num_heads: 2, num_layers: 1}}\n"
    )
    base = tmp_path / "base.yaml"
    base.write_text("optim: {lr: 2, min_lr: 0.1}\ndata: {train: peps}\ntrain: {seed: 3}\n")
    words = f"train --config {base} --config {path} --data.train books --optim.lr 6e-4 --optim.betas [0.9,0.99]"
    words += " --objective.init_args.rate 0.2 --objective.class_path MaskedLM --model.overrides.num_layers 3"
    words += " --model.overrides.rope.type linear --model.overrides.rope.factor 2"
    words += (
        " --train.batch_rows 010 --data.separator on --parallel.compile=true --data.valid last:0.1"
    )
    assert cli.main(words.split()) == 143
    assert seen[0] == RunConfig.load(
        {
            "data": {"train": "books", "separator": "on", "valid": "last:0.1"},
            "optim": {"lr": 6e-4, "betas": (0.9, 0.99), "min_lr": 0.5},
            "objective": {"class_path": "MaskedLM", "init_args": {"rate": 0.2}},
            "model": {
                "overrides": {
                    "num_heads": 2,
                    "num_layers": 3,
                    "rope": {"type": "linear", "factor": 2},
                }
            },
            "train": {"batch_rows": 10, "seed": 3},
            "parallel": {"compile": True},
        }
    )


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (["={a: x}", ".b=y"], {"a": "x", "b": "y"}),
        ([".b=y", "={a: x}"], {"a": "x", "b": "y"}),
        (["={a: x}", "={b: y}"], {"a": "x", "b": "y"}),
        (["={a: x, b: y}", "={b: z}"], {"a": "x", "b": "z"}),
        ([".a=x", ".a=y"], {"a": "y"}),
        ([".a=x", "={}"], {"a": "x"}),
        (["={}"], {}),
        (["={a.csv: x}", "={b.csv: y}"], {"a.csv": "x", "b.csv": "y"}),
    ],
)
def test_items_of_mappings_are_kept_however_they_are_given(
    given: list[str], value: dict[str, str]
) -> None:
    from pretrain.cli.arguments import make_parser

    tried = set()
    for command, entry in cli.COMMANDS.items():
        parser = make_parser(command, entry.summary, entry.example, entry.options)
        places = ["x"] * sum(not e.names[0].startswith("-") and not e.nargs for e in parser.entries)
        places += [word for e in parser.entries if e.required for word in (e.names[0], "x")]
        for name in list(parser.mappings):
            found = vars(parser.parse([*places, *(f"{name}{word}" for word in given)]))
            assert found[parser.mappings[name][0]] == value, (command, name)
            tried.add(name)
    assert {"--overrides", "--data.columns", "--task.options", "--columns"} <= tried
    usual = make_parser("prepare", "", "", cli.COMMANDS["prepare"].options)
    words = ["--text", "{a.csv: x}", "--text={b.csv: y}"]
    assert usual.parse(words).text == {"a.csv": "x", "b.csv": "y"}
    assert usual.parse(["--text", "{a.csv: x}", "--text", "c"]).text == "c"


def test_items_of_mappings_inside_mappings_are_kept() -> None:
    from pretrain.cli.arguments import make_parser

    parser = make_parser("train", "", "", cli.COMMANDS["train"].options)
    words = ["--overrides={a: {b: 1}, d: 0}", "--model.overrides.a.c=2", "--overrides={d: {e: 3}}"]
    found = vars(parser.parse(words))["model.overrides"]
    assert found == {"a": {"b": 1, "c": 2}, "d": {"e": 3}}


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("data.train", "{a.txt: 2, b.txt: 1}", {"a.txt": 2, "b.txt": 1}),
        ("data.train", "[a.txt, b.txt]", ["a.txt", "b.txt"]),
        ("data.train", "*.txt", "*.txt"),
        ("data.text", "{a.csv: t}", {"a.csv": "t"}),
        ("data.text", "12", "12"),
        ("data.valid", "0.5", 0.5),
        ("data.valid", "books", "books"),
        ("data.separator", "#", "#"),
        ("data.separator", "---", "---"),
        ("data.separator", "null", None),
        ("data.separator", "'", "'"),
        ("data.workers", "null", None),
        ("model.checkpoint", "", ""),
        ("train.sample", "-1e-3", "-1e-3"),
        ("train.sample", "Once: upon", "Once: upon"),
        ("train.out", "010", "010"),
        ("train.loggers", "[]", []),
        ("parallel.activation_checkpointing", "true", "full"),
        ("parallel.compile", "yes", True),
        ("train.limit", "500", "500 steps"),
    ],
)
def test_text_stays_as_it_was_typed(option: str, text: str, value: Any, capsys: Any) -> None:
    for words in ([f"--{option}", text], [f"--{option}={text}"]):
        assert cli.main(["train", *words, "--show_config"]) == 0
        section, name = option.split(".")
        shown = strict_yaml.parse(capsys.readouterr().out)[0]
        assert shown[section][name] == value


def test_show_config_is_a_file_that_gives_the_same_run(capsys: Any, tmp_path: Path) -> None:
    assert cli.main(["train", "--optim.lr", "2e-5", "--show_config"]) == 0
    path = tmp_path / "c.yaml"
    path.write_text(capsys.readouterr().out)
    assert RunConfig.load(path) == RunConfig.load({"optim.lr": 2e-5})


def test_finetune_passes_settings_and_the_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Any]] = []

    def finetune(**options: Any) -> Any:
        seen.append(options)
        run = types.SimpleNamespace(exit_code=0)
        return types.SimpleNamespace(run=run)

    fake(monkeypatch, "pretrain.finetuning.run", finetune=finetune)
    words = "finetune --config configs/classify.yaml --model runs/books-bert --data=reviews.csv --optim.lr 2e-5"
    words += " --data.columns.text review --task.options.class_weights balanced --method.lora 8"
    assert cli.main([*words.split(), "--compare", "scratch", "--label_counts", "[50, 200]"]) == 0
    config = seen[0].pop("config")
    assert seen[0] == {"compare": "scratch", "label_counts": [50, 200], "seeds": 5, "devices": 1}
    assert (config.model.checkpoint, config.data.train) == ("runs/books-bert", "reviews.csv")
    assert config.data.columns == {"text": "review"} and config.method.lora == 8
    assert config.task.name == "classification" and config.optim.lr == 2e-5
    assert config.task.options == {"label_smoothing": 0.05, "class_weights": "balanced"}
    assert config.optim.layer_decay == 0.9
    assert cli.main(["finetune", "--task", "regression", "--model", "m", "--data", "d"]) == 0
    assert seen[1]["config"].task.name == "regression" and seen[1]["compare"] is None


def test_show_config_of_finetune_reads_back(capsys: Any, tmp_path: Path) -> None:
    words = ["finetune", "--task", "chat", "--optim.lr", "2e-5", "--show_config"]
    assert cli.main(words) == 0
    path = tmp_path / "c.yaml"
    path.write_text(capsys.readouterr().out)
    assert TuneConfig.load(path) == TuneConfig.load({"task.name": "chat", "optim.lr": 2e-5})


def test_the_schema_describes_the_configs(capsys: Any) -> None:
    """What `load` reads, an editor accepts, and the other way round."""
    schemas = {}
    for name, kind in (("train", RunConfig), ("finetune", TuneConfig)):
        assert cli.main(["schema", name]) == 0
        schemas[name] = json.loads(capsys.readouterr().out)
        jsonschema.Draft7Validator.check_schema(schemas[name])
        jsonschema.validate(kind().to_dict(), schemas[name])
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        name = "finetune" if "pretrain finetune" in text else "train"
        jsonschema.validate(strict_yaml.parse(text)[0], schemas[name])
    for text, good in {
        "objective: MaskedLM": True,
        "optim.lr: 2e-5": True,
        "optim:": True,
        "parallel: {activation_checkpointing: true}": True,
        "data: {train: {a.txt: 2}, workers: null}": True,
        "data: {text: {a.csv: body}}": True,
        "optim: {betas: [0.9, 0.99]}": True,
        "optim: {betas: [0.9]}": False,
        "optim: {betas: [0.9, 1.5]}": False,
        "optim: {lrr: 3}": False,
        "optim: {lr: fast}": False,
        "optim: {lr: -1}": False,
        "optim: {name: adam}": False,
        "train: {batch_rows: 1.5}": False,
        "lr: 3": True,
        "batch_size: 8": True,
        "optim: {learning_rate: 1e-3}": True,
        "train: {learning_rate: 1e-3}": False,
        "resume: true": False,
        "model: gpt2:small": True,
        "parallel: cpu": False,
        "train: {limit: 500}": True,
        "train: {limit: true}": False,
    }.items():
        value = strict_yaml.parse(text)[0]
        assert jsonschema.Draft7Validator(schemas["train"]).is_valid(value) == good, text
        if good:
            RunConfig.load(value)
        else:
            with pytest.raises(ConfigError):
                RunConfig.load(value)
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schemas["train"]
    assert "train, finetune" in fails(capsys, "schema", "tune")


def test_exit_codes_of_interruptions(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def train(error: BaseException) -> Any:
        def run(*_: Any, **__: Any) -> None:
            raise error

        return run

    fake(monkeypatch, "pretrain.training.run", train=train(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    fake(monkeypatch, "pretrain.training.run", train=train(TrainingError("rows ran out.")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "error: rows ran out.\n"
    fake(monkeypatch, "pretrain.training.run", train=train(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        cli.main(["train"])


def long_run(folder: Path) -> list[str]:
    """The words of a run into ``folder / "run"`` that only a signal ends."""
    text = folder / "text.txt"
    text.write_text("\n".join(tiny.TEXTS * 20))
    words = f"train --data.train {text} --data.valid 0 --data.tokenizer char --data.row_length 32 --model.size tiny"
    words += f" --data.cache {folder / 'cache'} --data.workers 1 --train.out {folder / 'run'} --train.limit 100000"
    words += " --train.batch_rows 2 --train.log_every 1 --parallel.device cpu --model.overrides.num_layers 1"
    return words.split()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_run_and_sets_the_exit_code(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trainer._after_step

    def after(run: Trainer, record: dict[str, Any]) -> None:
        plain(run, record)
        signal.raise_signal(number)

    monkeypatch.setattr(Trainer, "_after_step", after)
    assert cli.main(long_run(tmp_path)) == code
    assert list((tmp_path / "run").glob("checkpoint-1/manifest.json"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_torch_is_imported_ends_the_command(tmp_path: Path, name: str) -> None:
    """Whatever the modules that are being imported do with its exception."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import signal, contextlib\nwith contextlib.suppress(BaseException):\n"
        f"    signal.raise_signal(signal.{name})\nprint('went on')\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT / 'src'}"
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "train", "--data.train", "x"],
        env=ENV | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    code = 128 + getattr(signal, name)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "interrupted.\n")


def test_ctrl_c_while_the_command_line_is_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class Stopping:
        def find_spec(self, name: str, *rest: Any) -> None:
            if name == "pretrain.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "pretrain.cli.main")
    monkeypatch.delattr(started.cli, "main")
    monkeypatch.setattr(sys, "meta_path", [Stopping(), *sys.meta_path])
    assert started.main() == 130
    assert capsys.readouterr().err == "interrupted.\n"


def test_a_signal_during_the_start_up_of_a_run_says_that_nothing_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Trainer, "probe", lambda run: signal.raise_signal(signal.SIGTERM))
    assert cli.main(long_run(tmp_path)) == 143
    said = capsys.readouterr().err
    assert "interrupted. No step was" in said and "step 1 " not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_gets_a_signal_saves_and_ends_with_its_code(
    number: int, code: int, tmp_path: Path
) -> None:
    out, arguments = tmp_path / "run", long_run(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain", *arguments],
        env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log = out / "log.jsonl"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and '"grad_norm"' in log.read_text():
            break
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output[-2000:]
    assert list(out.glob("checkpoint-*/manifest.json")) and "Traceback" not in output


# ------------------------------------------------------------------------------------- with checkpoints


@cache
def saved(kind: str, folder: str) -> str:
    """A tiny checkpoint directory."""
    family = {"gpt": "gpt2", "bert": "bert"}[kind]
    model = build(
        family, "tiny", tokenizer=tiny.tokenizer(), num_layers=1, hidden_size=16, num_heads=2,
        max_positions=32, initializer_range=0.5,
    )  # fmt: skip
    return str(model.save(Path(folder) / kind))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


def test_generate(folder: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved("gpt", folder)
    assert cli.main(["generate", path, "the red cat", "--max_new_tokens", "5", "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("the red cat") and first.count("the red cat") == 1
    words = [
        "generate",
        path,
        "-",
        "--max_new_tokens",
        "5",
        "--temperature",
        "0",
        "--stop",
        "[xyz, q]",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the red cat\n\na dog\n"))
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("the red cat") and lines[1].startswith("a dog")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "Standard input" in fails(capsys, *words)


def test_predict(capsys: Any, tmp_path: Path) -> None:
    model = build(
        "bert", None, head="sequence-classification", labels=["cat", "dog"], tokenizer=tiny.tokenizer(),
        num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32, max_positions=32,
    )  # fmt: skip
    path = str(model.save(tmp_path / "model"))
    rows = tmp_path / "rows.csv"
    rows.write_text("said,n\nthe red cat,1\nthe old dog,2\n")
    out = tmp_path / "out.jsonl"
    words = ["predict", path, str(rows), "--out", str(out), "--columns.text", "said", "--quiet"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{out}\n"
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["n"] for row in found] == ["1", "2"]
    assert {row["predicted_label"] for row in found} <= {"cat", "dog"}
    assert "'said'" in fails(capsys, *words[:5], "--quiet")


def test_notes_are_one_line_without_the_code(folder: str, capsys: Any) -> None:
    assert cli.main(["generate", saved("gpt", folder), "a", "--max_new_tokens", "100"]) == 0
    noted = capsys.readouterr().err
    assert "1 of 1 texts ended early" in noted and ".py" not in noted


def test_fill_mask(folder: str, capsys: Any) -> None:
    path = saved("bert", folder)
    for mask in ("[MASK]", "<mask>"):
        assert cli.main(["fill-mask", path, f"the {mask} cat", "--top_k", "3"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 and 0 <= float(lines[0].split()[0]) <= 1 and "cat" in lines[0]
    assert cli.main(["fill-mask", path, "the [MASK] cat [MASK]", "--top_k", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_wrong_command_for_a_model_names_the_right_one(folder: str, capsys: Any) -> None:
    path = saved("bert", folder)
    assert cli.main(["generate", path, "the"]) == 2
    assert "pretrain fill-mask" in capsys.readouterr().err
    path = saved("gpt", folder)
    assert cli.main(["fill-mask", path, "the [MASK]"]) == 2
    assert "pretrain generate" in capsys.readouterr().err


def test_inspect(folder: str, capsys: Any) -> None:
    path = saved("gpt", folder)
    assert cli.main(["inspect", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "gpt2" and found["parameters"] > 0 and found["manifest"] == "holds"
    assert cli.main(["inspect", path]) == 0
    assert "gpt2" in capsys.readouterr().out


def test_inspect_of_a_broken_checkpoint_shows_it_and_fails(
    folder: str, capsys: Any, tmp_path: Path
) -> None:
    for damage, key in (("README.md", "manifest"), ("config.json", "problem")):
        path = shutil.copytree(saved("gpt", folder), tmp_path / damage)
        os.truncate(path / damage, 3)
        assert cli.main(["inspect", str(path), "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["manifest"].startswith("broken: ") and damage in found[key]
        assert cli.main(["inspect", str(path)]) == 1
        assert "broken: " in capsys.readouterr().out


def test_terminals_are_not_driven_by_a_checkpoint(folder: str, capsys: Any, tmp_path: Path) -> None:
    path = shutil.copytree(saved("gpt", folder), tmp_path / "m")
    (path / "manifest.json").unlink()
    config = json.loads((path / "config.json").read_text())
    evil = "evil\033[2J\u202e\nfake"
    config |= {"model_type": evil, "architectures": [evil], "pretrain": {"objective": evil}}
    config["vocab_size"] = config["pretrain"]["tokens_seen"] = [evil]
    (path / "config.json").write_text(json.dumps(config))
    cli.main(["inspect", str(path)])
    shown = capsys.readouterr().out
    assert "evil\\x1b[2J\\u202e fake" in shown and "\033" not in shown and "\u202e" not in shown
    cli.main(["inspect", str(path), "--json"])
    assert "\033" not in capsys.readouterr().out


def test_thin_commands_call_one_function(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def record(name: str, answer: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen[name] = (args, options)
            return answer

        return call

    fake(
        monkeypatch, "pretrain.cli.quickstart", quickstart=record("quickstart", {"exit_code": 130})
    )
    fake(
        monkeypatch,
        "pretrain.report",
        write=record("report", tmp_path / "report.html"),
        fine_tuned=lambda run: False,
    )
    fake(
        monkeypatch,
        "pretrain.evaluation",
        evaluate=record("evaluate", {"loss": 1.25, "targets": 12345.0}),
    )
    prepared = types.SimpleNamespace(path=tmp_path / "data")
    fake(monkeypatch, "pretrain.data.prepare", prepare=record("prepare", prepared))
    assert cli.main(["quickstart", "--minutes", "2"]) == 130
    assert seen["quickstart"][1] == {"out": "runs/quickstart", "minutes": 2.0, "seed": 0}
    assert cli.main(["report", "runs/x"]) == 0
    assert seen["report"][0] == ("runs/x",)
    assert cli.main(["evaluate", "runs/x", "--data", "data/y"]) == 0
    given = {"data": "data/y", "columns": {}, "base": None, "objective": None, "batch_rows": None}
    given |= {"device": "auto", "task": None, "separator": None, "encoding": None}
    assert seen["evaluate"] == (("runs/x",), given)
    assert "1.2500" in capsys.readouterr().out
    assert cli.main(["evaluate", "runs/x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == 1.25
    assert (
        cli.main(["prepare", "a/*.txt", "b", "--out", "data/b", "--vocab_size", "500", "--quiet"])
        == 0
    )
    args, options = seen["prepare"]
    assert (
        args == (["a/*.txt", "b"],) and options["out"] == "data/b" and options["vocab_size"] == 500
    )
    assert options["quiet"] is True and options["valid"] == 0.01
    cli.main(["prepare", "a.txt", "--valid", "last:0.1"])
    assert seen["prepare"][0] == ("a.txt",) and seen["prepare"][1]["valid"] == "last:0.1"


def test_figures_that_do_not_exist_are_null_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    figures = {"spearman": math.nan, "each": [{"f1": -math.inf}, 0.5]}
    fake(monkeypatch, "pretrain.evaluation", evaluate=lambda *args, **options: figures)
    assert cli.main(["evaluate", "runs/x", "--json"]) == 0
    found = strict_json.parse_json(capsys.readouterr().out.encode(), "output")
    assert found == {"spearman": None, "each": [{"f1": None}, 0.5]}
    assert cli.main(["evaluate", "runs/x"]) == 0
    assert "nan" in capsys.readouterr().out


def test_options_of_commands_are_those_of_the_functions() -> None:
    """The thin commands drift from the functions they call only on purpose."""
    import inspect

    from pretrain.data.prepare import prepare
    from pretrain.inference.generate import generate

    def options(command: str) -> dict[str, Any]:
        from pretrain.cli.arguments import make_parser

        entry = cli.COMMANDS[command]
        parser = make_parser(command, entry.summary, entry.example, entry.options)
        assert set(entry.common.split()) <= {
            name for shown in parser.entries for name in shown.names
        }
        return {a.dest: a.default for a in parser._actions if a.option_strings and a.dest != "help"}

    for command, function, left_out in (
        ("generate", generate, {"use_cache"}),
        ("prepare", prepare, {"cache_dir"}),
    ):
        parameters = inspect.signature(function).parameters.values()
        keyword = {p.name: p.default for p in parameters if p.default is not p.empty}
        given = options(command)
        given.pop("config", None)  # in place of all others
        given.pop("chat", None)  # calls another function
        given.pop("family", None)  # of the checkpoint, which the command loads
        assert set(given) == set(keyword) - left_out
        for name, default in given.items():
            assert default == keyword[name] or (default in ([], None) and not keyword[name]), name


def test_a_reader_that_leaves_is_no_error(folder: str) -> None:
    words = [sys.executable, "-m", "pretrain", "train", "--show_config"]
    process = subprocess.Popen(words, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 0 and process.stderr.read() == b""


def test_a_full_device_and_a_full_memory_are_sentences(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pretrain", "--version"],
            env=ENV, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: The output cannot be written")
    assert done.stderr.count("\n") == 1

    def fail(arguments: Any) -> int:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert "not enough memory" in fails(capsys, "predict")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_command_as_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, code: int
) -> None:
    """What a command has begun is cleared away: here the temporary file of its answers."""
    import signal

    from pretrain.data.row_writer import RowWriter

    def answer(arguments: Any) -> int:
        with RowWriter(tmp_path / "answers.csv", ["text"]) as output:
            output.write({"text": "a"}, {"label": "b"})
            assert len(list(tmp_path.iterdir())) == 1
            signal.raise_signal(getattr(signal, name))
        return 0

    before = signal.getsignal(getattr(signal, name))
    monkeypatch.setattr(cli, "_dispatch", answer)
    assert cli.main(["predict"]) == code
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(getattr(signal, name)) is before


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        ("SIGTERM", "SIGTERM", 143),
        ("SIGINT", "SIGINT", 130),
        ("SIGINT", "SIGTERM", 130),
        ("SIGHUP", "SIGTERM", 129),
    ],
)
def test_a_second_signal_does_not_end_the_clean_up_of_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: str, second: str, code: int
) -> None:
    """A terminal and a scheduler may both send one; much later a second one of the same kind ends the process."""
    from pretrain.data.row_writer import RowWriter

    ends: list[int] = []
    unlink, complain = os.unlink, cli._complain

    def removed(path: Any) -> None:
        signal.raise_signal(getattr(signal, second))
        unlink(path)

    def said(*words: str) -> None:
        signal.raise_signal(getattr(signal, second))
        complain(*words)

    def answer(arguments: Any) -> int:
        with RowWriter(tmp_path / "answers.csv", ["text"]) as output:
            output.write({"text": "a"}, {"label": "b"})
            monkeypatch.setattr(os, "unlink", removed)
            signal.raise_signal(getattr(signal, first))
        return 0

    monkeypatch.setattr(cli, "_dispatch", answer)
    monkeypatch.setattr(cli, "_complain", said)
    assert cli.main(["predict"]) == code
    assert list(tmp_path.iterdir()) == []

    def again(arguments: Any) -> int:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(getattr(signal, first))
        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", lambda number, handler: ends.append(handler))
            patch.setattr(signal, "raise_signal", ends.append)
            os.kill(os.getpid(), getattr(signal, first))
            time.sleep(0.01)
        return 0

    monkeypatch.setattr(cli, "_dispatch", again)
    monkeypatch.setattr(cli, "_complain", complain)
    monkeypatch.setattr(cli, "_SAME_REQUEST", 0.0)
    assert cli.main(["predict"]) == code
    assert ends == ([] if first == "SIGINT" else [signal.SIG_DFL, getattr(signal, first)])


def test_prepare_by_a_config_does_what_it_says_or_refuses(tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three. " * 200)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{train: {text}, vocab_size: 280, row_length: 32, cache: {tmp_path / 'cache'}}}\n"
    )
    for words in (["--out", str(tmp_path / "other")], ["--vocab_size", "300"], ["--valid", "0.3"]):
        assert words[0] in fails(capsys, "prepare", "--config", str(config), *words)
    assert "either sources" in fails(capsys, "prepare", str(text), "--config", str(config))
    assert cli.main(["prepare", "--config", str(config), "--quiet"]) == 0
    assert tmp_path / "cache" in Path(capsys.readouterr().out.strip()).parents
    config.write_text("data: {source: images, source_args: {train: photos}}\n")
    assert "no text is to be prepared" in fails(capsys, "prepare", "--config", str(config))
