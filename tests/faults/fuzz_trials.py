"""Input of unknown origin, mutated, through every reader: only a PretrainError may come out, and in bounded time.

    cd tests && python -m faults.fuzz_trials --count 50000

Each reader has a few valid inputs. They are changed as bytes (bits, cuts, copies, odd words spliced in) or as JSON (a
value anywhere becomes an odd one), and read. A failure prints its seed; ``--only READER --seed S --count 1`` does it
once more.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pretrain
from faults import products
from pretrain.checkpoint import load
from pretrain.checkpoint.manifest import read_manifest
from pretrain.cli.arguments import make_parser, read_settings
from pretrain.cli.main import COMMANDS
from pretrain.config import RunConfig
from pretrain.data.chat import ChatTemplate, to_conversations
from pretrain.data.shards import Prepared
from pretrain.data.tables import read_table
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import PretrainError
from pretrain.finetuning.rows import open_data
from pretrain.finetuning.settings import TuneConfig
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.objectives import task_class
from pretrain.report import render
from pretrain.training.logging import RunLog
from pretrain.utils.tensors import read_tensors

SECONDS = 20  # for one input, on a busy machine
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, 10**30, -0.5, 0.0, 1e308, 1e-320, math.nan, math.inf),
    *("", " ", "0", "-1", "nan", "1e5", "true", "null", "\x00", "\ud800", "\u202e", "é\u0301", "a" * 5000, "{{ x }}"),
    *("../../etc/passwd", "/dev/full", "hub:x/y", "%s", "<s>", "[MASK]", "\n", "\r", "\u2028", "'", '"', "\\"),
    *([], {}, [[]], [None], {"": {}}, {"a": [1, {"b": None}]}, [1, "a", None], [["a", "b"]], {"role": "user"}),
]  # fmt: skip
WORDS = [
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b"\t", b",", b";", b'"', b"'"),
    *(b"{", b"}", b"[", b"]", b":", b"&a ", b"*a", b"!!python/object:os.system", b"<<: ", b"- ", b"NaN", b"Infinity"),
    *(b"1e999", b"-1", b"99999999999999999999", b"null", b"{{", b"}}", b"{%", b"%}", b"{% for i in range(10**9) %}"),
    *(b"(?:a+)+$", b"\\u0000", b"\\ud800", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b"a" * 300, b"__class__", b"#"),
]  # fmt: skip


class Hang(BaseException):
    """An input took too long."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Raise ``Hang`` inside when the time is up."""

    fired = []

    def late(number: int, frame: Any) -> None:
        fired.append(True)
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    except BaseException:
        if fired:  # whatever a reader has made of it
            raise Hang from None
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut, doubled, or odd words put in."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, kind = rng.randrange(len(made) + 1), rng.randrange(6)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[at:at] = rng.choice(WORDS)
        elif kind == 2:
            del made[at : at + rng.choice((1, 2, 8, 64))]
        elif kind == 3:
            made[at:at] = made[at : at + rng.choice((1, 8, 64))]
        elif kind == 4:
            stop = at + rng.choice((1, 4, 16))
            made[at:stop] = rng.choice(WORDS)
        else:
            del made[at:]
    return bytes(made)


def odd(value: Any, rng: random.Random) -> Any:
    """JSON data in which one value, or one key, somewhere has become an odd one."""
    value = copy.deepcopy(value)
    if not isinstance(value, dict | list) or not value or rng.random() < 0.03:
        return copy.deepcopy(rng.choice(ODD))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, kind = rng.choice(keys), rng.random()
    if kind < 0.1:
        del value[key]
    elif kind < 0.2 and isinstance(value, dict):
        value[str(rng.choice(ODD))[:50]] = copy.deepcopy(rng.choice(ODD))
    elif kind < 0.3 and isinstance(value, list):
        value.insert(key, copy.deepcopy(rng.choice([*ODD, *value])))
    else:
        value[key] = odd(value[key], rng)
    return value


def as_json(value: Any, rng: random.Random) -> bytes:
    """Odd JSON, or mutated bytes of it."""
    if rng.random() < 0.3:
        return mutated(json.dumps(value, indent=1).encode(), rng)
    value = odd(value, rng)
    for _ in range(rng.choice((0, 0, 1, 3))):
        value = odd(value, rng) if value else value
    return json.dumps(value).encode()


# ------------------------------------------------------------------------------------------------ readers

Reader = Callable[[random.Random], None]


def readers(work: Path) -> dict[str, Reader]:
    """Name -> a function that makes one odd input and reads it."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        data = products.prepare(work)
        run = pretrain.train(products.settings(work)).path
    tokenizer = train_from_texts(products.texts(50), "bpe", vocab_size=270)
    model = build("gpt2", None, tokenizer=tokenizer, max_positions=32, **products.SIZES)
    masked = build("bert", None, tokenizer=tokenizer, max_positions=32, **products.SIZES)
    gpt, bert = model.save(work / "gpt"), masked.save(work / "bert")
    found: dict[str, Reader] = {
        **of_settings(work, run),
        **of_tables(work),
        **of_directories(work, gpt, bert, data, run),
        **of_labels(),
    }

    def prompts(rng: random.Random) -> None:
        given: Any = rng.choice(["sea ship", ["sea", "wind"], [1, 2, 3], [[1], [2, 3]], [""]])
        given = odd(given, rng) if rng.random() < 0.7 else given
        names = ["top_k", "top_p", "min_p", "seed", "stop", "temperature", "repetition_penalty"]
        options = {rng.choice(names): rng.choice(ODD)} if rng.random() < 0.5 else {}
        model.generate(given, max_new_tokens=1, **options)

    def fill(rng: random.Random) -> None:
        masked.fill_mask(
            odd(["sea [MASK] ship", "[MASK]"], rng), top_k=rng.choice([1, 3, 0, None, "x", 10**9])
        )

    def embed(rng: random.Random) -> None:
        masked.embed(odd(["sea ship", "wind"], rng))

    def template(rng: random.Random) -> None:
        source = b"{% for m in messages %}{{ m['role'] ~ ': ' ~ m.content | trim }}\n{% endfor %}{{ eos_token }}"
        text = mutated(source, rng).decode("utf-8", "replace")
        chat = ChatTemplate.of(tokenizer, text)
        chat.render([{"role": "user", "content": "sea"}, {"role": "assistant", "content": "ship"}])

    return found | {
        "prompts": prompts, "fill-mask texts": fill, "embed texts": embed, "chat template": template,
    }  # fmt: skip


def of_settings(work: Path, run: Path) -> dict[str, Reader]:
    """YAML, overrides, the command line."""
    config, place = (run / "run.yaml").read_bytes(), work / "c.yaml"
    tune = TuneConfig.load({"model": {"checkpoint": "x"}, "task": {"name": "classification"}})
    tune.save(work / "t.yaml")
    tuned, keys = (
        (work / "t.yaml").read_bytes(),
        list(RunConfig.load(run / "run.yaml").to_dict().items()),
    )
    train = COMMANDS["train"]
    parser = make_parser("train", train.summary, train.example, train.options)
    dotted = [f"{section}.{key}" for section, values in keys for key in values]

    def yaml(rng: random.Random) -> None:
        kind, source = rng.choice([(RunConfig, config), (TuneConfig, tuned)])
        place.write_bytes(mutated(source, rng))
        kind.load(place)

    def overrides(rng: random.Random) -> None:
        RunConfig.load(run / "run.yaml", {rng.choice(dotted): rng.choice(ODD)})

    def line(rng: random.Random) -> None:
        word = (
            str(rng.choice(ODD))
            if rng.random() < 0.7
            else mutated(b"[1, {a: b}]", rng).decode("latin-1")
        )
        key = (
            rng.choice(dotted)
            if rng.random() < 0.9
            else mutated(rng.choice(dotted).encode(), rng).decode("latin-1")
        )
        words = [f"--{key}", word.replace("\x00", "")]
        read_settings(RunConfig, parser.parse(words), train.options)

    return {"YAML": yaml, "overrides": overrides, "command line": line}


def of_tables(work: Path) -> dict[str, Reader]:
    """Files of rows, and rows of conversations."""
    rows = [{"text": f"sea {i}", "label": "ab"[i % 2], "n": i / 2} for i in range(6)]
    chat = {
        "messages": [
            {"role": "user", "content": "sea?"},
            {"role": "assistant", "content": "ship", "weight": 1},
        ]
    }
    sources = {
        "csv": b"text,label,n\n"
        + b"".join(f'"sea, {r["n"]}",{r["label"]},{r["n"]}\n'.encode() for r in rows),
        "tsv": b"text\tlabel\n" + b"".join(f"sea {r['n']}\t{r['label']}\n".encode() for r in rows),
        "jsonl": b"".join(json.dumps(r).encode() + b"\n" for r in rows),
        "conll": b"sea NN B-X\nship NN I-X\n\nwind NN O\nsalt NN O\n",
    }

    def of_file(kind: str) -> Reader:
        place = work / f"rows.{kind}"

        def read(rng: random.Random) -> None:
            place.write_bytes(mutated(sources[kind], rng))
            len(read_table(str(place)))

        return read

    def of_json(rng: random.Random) -> None:
        place = work / "rows.json"
        place.write_bytes(as_json(rng.choice([rows, {"data": rows}, {"text": ["a", "b"]}]), rng))
        len(read_table(str(place)))

    def rows_in_memory(rng: random.Random) -> None:
        len(read_table(odd(rng.choice([rows, {"text": ["a", "b"], "label": [1, 2]}]), rng)))

    def conversations(rng: random.Random) -> None:
        row = odd(chat, rng)
        to_conversations(row if isinstance(row, dict) else {"messages": row}, "row 1")

    found = {f"rows in {kind}": of_file(kind) for kind in sources}
    return {
        **found,
        "rows in json": of_json,
        "rows in memory": rows_in_memory,
        "chat rows": conversations,
    }


def of_directories(work: Path, gpt: Path, bert: Path, data: Path, run: Path) -> dict[str, Reader]:
    """The files of models, of prepared data and of runs."""
    foreign = work / "foreign"
    shutil.copytree(gpt, foreign)
    (foreign / "manifest.json").unlink()  # of somebody else: nothing says what it must be
    originals = {p.name: p.read_bytes() for p in foreign.iterdir()}
    configs = [json.loads((path / "config.json").read_bytes()) for path in (gpt, bert)]

    def in_foreign(name: str, change: Callable[[bytes, random.Random], bytes]) -> Reader:
        def read(rng: random.Random) -> None:
            (foreign / name).write_bytes(change(originals[name], rng))
            try:
                opened = load(foreign, quiet=True)
                if name == "generation_config.json":
                    opened.generate("sea", max_new_tokens=1)
            finally:
                (foreign / name).write_bytes(originals[name])

        return read

    def json_of(data: bytes, rng: random.Random) -> bytes:
        return as_json(json.loads(data), rng)

    def config(rng: random.Random) -> None:
        value = odd(rng.choice(configs), rng)
        if isinstance(value, dict):  # of a file nothing else gets so far
            Model.from_hf_config(value)

    def tokenizer(rng: random.Random) -> None:
        place = work / "tok"
        place.mkdir(exist_ok=True)
        (place / "tokenizer.json").write_bytes(json_of(originals["tokenizer.json"], rng))
        Tokenizer.from_directory(place).encode("sea ship é\u0301 \u202e")

    def header(rng: random.Random) -> None:
        whole = originals["model.safetensors"]
        size = int.from_bytes(whole[:8], "little")
        new = (
            mutated(whole[8 : 8 + size], rng)
            if rng.random() < 0.5
            else json_of(whole[8 : 8 + size], rng)
        )
        length = len(new) if rng.random() < 0.9 else rng.choice([0, 1, 2**63, 2**40, len(new) + 1])
        place = work / "w.safetensors"
        place.write_bytes(length.to_bytes(8, "little") + new + whole[8 + size :])
        read_tensors(place)

    def manifest(rng: random.Random) -> None:
        place = work / "m"
        place.mkdir(exist_ok=True)
        (place / "manifest.json").write_bytes(json_of((gpt / "manifest.json").read_bytes(), rng))
        read_manifest(place)

    kept = json.loads((data / "manifest.json").read_text())
    del kept["digest"]  # of somebody else, who leaves it away
    whole = json.dumps(kept).encode()

    def prepared(rng: random.Random) -> None:
        (data / "manifest.json").write_bytes(json_of(whole, rng))
        try:
            opened = Prepared.open(data)
            opened.table()
            opened.train[0]
        finally:
            (data / "manifest.json").write_bytes(whole)

    log = (run / "log.jsonl").read_bytes()
    plain = b"".join(line.split(b', "chain"')[0] + b"}\n" for line in log.splitlines())

    def history(rng: random.Random) -> None:
        new = mutated(rng.choice([log, plain]), rng)
        if rng.random() < 0.5:
            lines = [json.loads(line) for line in plain.splitlines()]
            lines = odd(lines, rng)
            lines = lines if isinstance(lines, list) else [lines]
            new = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        place = work / "r"
        place.mkdir(exist_ok=True)
        (place / "log.jsonl").write_bytes(new)
        if rng.random() < 0.1:
            render(place)
        RunLog(place / "log.jsonl", 4).close()
        for aside in place.glob("log.damaged-*"):
            aside.unlink()

    return {
        "config.json": config,
        "config.json in a directory": in_foreign("config.json", json_of),
        "generation_config.json": in_foreign("generation_config.json", json_of),
        "tokenizer_config.json": in_foreign("tokenizer_config.json", json_of),
        "tokenizer.json": tokenizer,
        "safetensors header": header,
        "manifest of a checkpoint": manifest,
        "manifest of prepared data": prepared,
        "log.jsonl": history,
    }


def of_labels() -> dict[str, Reader]:
    """Labels in odd forms, for the tasks that learn classes or numbers."""
    forms: list[Callable[[int], Any]] = [
        lambda i: "ab"[i % 2], lambda i: i % 2, lambda i: i / 4, lambda i: [i % 2, 1], lambda i: ["a", "b"][: i % 3],
        lambda i: "a,b", lambda i: f"{i % 3}", lambda i: bool(i % 2),
    ]  # fmt: skip
    names = ("classification", "regression", "token-classification", "embedding")

    def labels(rng: random.Random) -> None:
        form, name = rng.choice(forms), rng.choice(names)
        rows = [{"text": f"sea {i}", "label": form(i)} for i in range(8)]
        if name == "token-classification":
            rows = [{"tokens": ["sea", "ship"], "tags": ["O", form(i)]} for i in range(8)]
        elif name == "embedding":
            rows = [{"a": f"sea {i}", "b": "ship", "label": form(i)} for i in range(8)]
        settings = TuneConfig.load({"task": {"name": name}})
        open_data(settings, {"train": odd(rows, rng)}, task_class(name))

    return {"labels": labels}


# ------------------------------------------------------------------------------------------------ trials


def trials(
    count: int, seed: int, work: Path, only: str | None = None
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Reader -> outcome -> number, and the failures."""
    table: dict[str, Counter[str]] = {}
    failures: list[str] = []
    found = readers(work)
    chosen = {name: read for name, read in found.items() if only in (None, name)}
    each = max(1, -(-count // len(chosen)))
    for name, read in chosen.items():
        table[name] = Counter()
        for k in range(each):
            said = io.StringIO()
            with (
                contextlib.redirect_stderr(said),
                contextlib.redirect_stdout(said),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                try:
                    with in_time():
                        read(random.Random(f"{name}/{seed + k}"))
                    outcome = "read"
                except PretrainError:
                    outcome = "PretrainError"
                except KeyboardInterrupt:
                    raise
                except Hang:
                    outcome = "HANG"
                    failures.append(f"{name}, seed {seed + k}: more than {SECONDS} s")
                except BaseException:  # a panic of Rust is none of Exception
                    outcome = "CRASH"
                    failures.append(f"{name}, seed {seed + k}:\n{traceback.format_exc()[-1500:]}")
            table[name][outcome] += 1
    return table, failures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=None, help="name of one reader")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ["PRETRAIN_CACHE"] = f"{work}/cache"
        table, failures = trials(args.count, args.seed, Path(work), args.only)
    outcomes = ("read", "PretrainError", "HANG", "CRASH")
    print(f"| {'reader':<28} | " + " | ".join(outcomes) + " |")
    print("|" + " --- |" * (len(outcomes) + 1))
    for name, counts in [*table.items(), ("all", sum(table.values(), Counter()))]:
        print(f"| {name:<28} | " + " | ".join(f"{counts[o]:,}" for o in outcomes) + " |")
    for failure in failures[:40]:
        print(f"\n{failure}", file=sys.stderr)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
