"""Damage to every file that the product writes, one at a time: is it named, or is it provably not read?

    cd tests && python -m faults.damage_trials --count 5000 --large

A product is written once, and a reader's view of it is hashed: weights, settings, ids, rows, state, history. Then one
file is damaged (a bit flipped, cut, zeroed, bytes swapped or appended, removed, replaced by a file of the same name),
the reader looks again, and the file is mended. Another view with nothing said is silent damage: there must be none.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pretrain
from faults import products
from pretrain.checkpoint import load, read_training
from pretrain.checkpoint.best import rates_of_run
from pretrain.checkpoint.peers import SINGLE_PROCESS
from pretrain.checkpoint.sharded_loading import latest_on_all_ranks
from pretrain.config import RunConfig, check
from pretrain.data.shards import Prepared
from pretrain.errors import PretrainError
from pretrain.finetuning.settings import TuneConfig
from pretrain.report.history import read_history
from pretrain.training.resuming import check_same_run

OUTCOMES = (
    *("error", "named, same result", "named, other result", "same result", "SILENT", "CRASH"),
)
KINDS = ("bit", "cut", "zero", "swap", "append", "remove", "other file")


@dataclass
class Product:
    """A directory that is damaged, and what a reader gets from it.

    Attributes:
        root: of the files.
        view: hash of what is read.
        files: relative names that are damaged; None for all.
        share: of the trials.
    """

    root: Path
    view: Callable[[], str]
    files: list[str] | None = None
    share: float = 1.0


def digest(*parts: Any) -> str:
    """SHA-256 over anything that has bytes or a repr."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict):
            part = sorted(part.items())
        if hasattr(part, "numpy"):
            part = part.detach().cpu().contiguous().numpy()
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype} {part.shape}".encode())
            found.update(np.ascontiguousarray(part).view(np.uint8).data)
        elif isinstance(part, list | tuple):
            found.update(digest(*part).encode())
        else:
            found.update(repr(part).encode())
    return found.hexdigest()


def of_model(path: Path, *, named: bool = True) -> str:
    """What ``load`` gives; ``named`` with the name of the directory that it was found in."""
    model = load(path, quiet=True)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    block = model.extra_config.get("pretrain")
    words = [tokenizer.fingerprint, tokenizer.encode("sea ship"), tokenizer.chat_template]
    source = os.path.basename(model.source) if named and model.source else None
    return digest(
        dict(model.state_dict()), model.hf_config(), model.generation_config, words, block, source
    )


def of_training(path: Path) -> str:
    """What resuming gets."""
    state = read_training(path, quiet=True)
    return digest(state.tensors["optimizer"], state.state)


def of_run(run: Path, settings: Any) -> str:
    """What the same command again, loading, reporting and evaluating get from a run.

    A result that is not used leaves the same model in a checkpoint: its name is no part of what one gets.
    """
    check._named.clear()
    check_same_run(settings, run)
    newest = latest_on_all_ranks(run, SINGLE_PROCESS)
    assert newest is not None
    history = read_history(run)
    kinds = [history.train, history.evals, history.events]
    return digest(
        newest.name, of_training(newest), of_model(run, named=False), rates_of_run(run),
        json.dumps(kinds, sort_keys=True), type(settings).load(run / "run.yaml").to_dict(),
    )  # fmt: skip


def of_data(path: Path, verify: bool = False) -> str:
    """What training gets from prepared data: all rows in their order, and what the manifest says of them."""
    data = Prepared.open(path, verify=verify)
    parts: list[Any] = [data.tokenizer.fingerprint, json.dumps(data.manifest, sort_keys=True)]
    for rows in (data.train, data.valid):
        step = max(1, 1_000_000 // max(1, data.row_length))
        for start in range(0, len(rows), step):
            some = range(start, min(start + step, len(rows)))
            parts += (
                [list(map(rows.__getitem__, some))] if len(rows) < 2000 else [batch(rows, some)]
            )
    return digest(*parts)


def batch(rows: Any, some: range) -> Any:
    """Many rows at once."""
    return rows.take(list(some)) if hasattr(rows, "take") else [rows[i] for i in some]


def of_resumed_preparation(work: Path, left: Path, name: str) -> str:
    """What ``prepare`` makes of the leavings of a killed one."""
    import shutil

    place = work / name
    shutil.copytree(left, place, dirs_exist_ok=True)
    try:
        products.prepare(work, out="resumed")
        found = of_data(work / "resumed")
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(work / "resumed", ignore_errors=True)
    return found


def killed_preparation(work: Path) -> tuple[Path, str]:
    """The work directory of a ``prepare`` that ended after the first pass and a part of the second, and its name."""
    import shutil

    from pretrain.data import prepare as module

    before, kept = module.pack_split, work / "left"

    def die(*args: Any, **options: Any) -> Any:
        shutil.copytree(args[0], kept, dirs_exist_ok=True)
        (kept / "name").write_text(args[0].name)
        raise KeyboardInterrupt

    module.pack_split = die  # type: ignore[assignment]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            products.prepare(work, out="resumed")
    finally:
        module.pack_split = before
    name = (kept / "name").read_text()
    (kept / "name").unlink()
    (kept / "lock").unlink(missing_ok=True)
    shutil.rmtree(work / name, ignore_errors=True)
    return kept, name


def large_data(work: Path) -> Path:
    """Prepared data with a file of tokens above 64 MB."""
    draw = np.random.default_rng(0)
    source = work / "large.txt"
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", dtype=np.uint8)
    with open(source, "wb") as file:
        for _ in range(45):
            block = letters[draw.integers(0, len(letters), 800_000)].reshape(-1, 2000)
            file.writelines(line.tobytes() + b"\n" for line in block)
    options: dict[str, Any] = {"tokenizer": "char", "row_length": 512, "valid": 0.01, "workers": 1}
    pretrain.prepare(str(source), out=work / "large", separator="\n", quiet=True, **options)
    assert (work / "large" / "train.tokens.bin").stat().st_size > 64 << 20
    source.unlink()
    return work / "large"


# ------------------------------------------------------------------------------------------------ damage


@contextlib.contextmanager
def damaged(path: Path, kind: str, rng: random.Random) -> Iterator[str]:
    """The file with one damage, mended at the end; yields what was done, "" for nothing."""
    size = path.stat().st_size
    aside = path.with_name(f".{path.name}.whole")
    if size > 8 << 20 and kind in (
        "bit",
        "zero",
        "swap",
    ):  # in place: a copy would take most of the time
        path.chmod(0o644)  # the weights of a run that has ended are read-only
        with open(path, "r+b") as file:
            at, length = rng.randrange(size - 4096), 1 if kind == "bit" else rng.randint(2, 4096)
            file.seek(at)
            before = file.read(length)
            after = changed(before, kind, rng)
            file.seek(at)
            file.write(after)
        yield f"{kind} at {at}" if after != before else ""
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(before)
        return
    os.rename(path, aside)
    try:
        if kind == "remove":
            yield "removed"
            return
        data = aside.read_bytes()
        if kind == "other file":
            others = [
                p for p in path.parent.parent.glob(f"*/{path.name}") if p != path and p.is_file()
            ]
            new = rng.choice(others).read_bytes() if others else data
        elif kind == "cut":
            new = data[: rng.randrange(size)] if size else data
        elif kind == "append":
            new = data + bytes(rng.randrange(256) for _ in range(rng.choice((1, 1, 4, 64))))
        elif size:
            at = rng.randrange(size)
            length = 1 if kind == "bit" else rng.randint(1, min(4096, size - at))
            new = data[:at] + changed(data[at : at + length], kind, rng) + data[at + length :]
        else:
            new = data
        path.write_bytes(new)
        yield kind if new != data else ""
    finally:
        os.replace(aside, path)


def changed(data: bytes, kind: str, rng: random.Random) -> bytes:
    """A piece with a bit flipped, zeroed, or with its halves swapped."""
    if kind == "bit":
        return bytes([data[0] ^ (1 << rng.randrange(8))]) + data[1:]
    if kind == "zero":
        return bytes(len(data))
    half = len(data) // 2
    return data[half:] + data[:half]


def looked_at(product: Product) -> tuple[str, str]:
    """(view, what was said); the view of an error is its class."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            view = product.view()
        except PretrainError as error:
            view = f"error: {error}"
        except Exception:
            view = f"CRASH: {traceback.format_exc()}"
    return view, said.getvalue()


def make(work: Path, *, large: bool, made: dict[str, Path] | None = None) -> dict[str, Product]:
    """All products with their views; ``made`` are those of ``products.make``, if they are there already."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        made = made or products.make(work)
        left, name = killed_preparation(work)
    found = {}
    for key, kind in (("pretrained", RunConfig), ("tuned", TuneConfig), ("adapted", TuneConfig)):
        settings = kind.load(made[key] / "run.yaml")
        found[f"run of {key}"] = Product(made[key], lambda p=made[key], s=settings: of_run(p, s))
    for key in ("saved", "chat", "classifier", "adapter"):
        found[f"model directory: {key}"] = Product(made[key], lambda p=made[key]: of_model(p))
    found["prepared data"] = Product(made["data"], lambda: of_data(made["data"]))
    found["leavings of prepare"] = Product(
        left, lambda: of_resumed_preparation(work, left, name), share=0.3
    )
    if large:
        with contextlib.redirect_stderr(said):
            big = large_data(work)
        found["prepared data above 64 MB"] = Product(big, lambda: of_data(big), share=0.1)
    return found


def trials(
    count: int,
    seed: int,
    work: Path,
    *,
    large: bool = False,
    made: dict[str, Path] | None = None,
    only: str = "",
) -> dict[str, Counter[str]]:
    """Damage at random; product -> outcome -> number. Whatever is silent or crashes is printed."""
    found = make(work, large=large, made=made)
    found = {name: product for name, product in found.items() if only in name}
    rng, table = random.Random(seed), {name: Counter[str]() for name in found}
    whole = sum(product.share for product in found.values())
    for name, product in found.items():
        first, noise = looked_at(product)
        assert not first.startswith(("error", "CRASH")) and not noise, (name, first, noise)
        listed = sorted(
            p for p in product.root.rglob("*") if p.is_file() and not p.name.startswith(".")
        )
        for k in range(max(1, round(count * product.share / whole))):
            path, kind = listed[k % len(listed)], rng.choice(KINDS)
            with damaged(path, kind, rng) as what:
                view, said = looked_at(product) if what else (first, "")
            if not what:
                continue
            if view.startswith("error"):
                outcome = "error"
            elif view.startswith("CRASH"):
                outcome = "CRASH"
            elif said:
                outcome = "named, same result" if view == first else "named, other result"
            else:
                outcome = "same result" if view == first else "SILENT"
            table[name][outcome] += 1
            if outcome in ("SILENT", "CRASH"):
                place = path.relative_to(product.root)
                print(f"{outcome}: {name}: {place}: {what}\n{view[-1500:]}", file=sys.stderr)
            elif outcome == "same result":
                table["harmless by file"] = table.get("harmless by file", Counter())
                table["harmless by file"][path.name] += 1
    return table


def show(table: dict[str, Counter[str]]) -> str:
    """The table as text."""
    quiet = table.get("harmless by file", Counter())
    rows = {name: counts for name, counts in table.items() if name != "harmless by file"}
    lines = [f"| {'product':<28} | " + " | ".join(OUTCOMES) + " |"]
    lines.append("|" + " --- |" * (len(OUTCOMES) + 1))
    for name, counts in [*rows.items(), ("all", sum(rows.values(), Counter()))]:
        lines.append(f"| {name:<28} | " + " | ".join(f"{counts[o]:,}" for o in OUTCOMES) + " |")
    lines.append(f"same result, by file: {dict(quiet.most_common())}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", action="store_true", help="with prepared data above 64 MB")
    parser.add_argument("--only", default="", help="products whose name has this in it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ["PRETRAIN_CACHE"] = f"{work}/cache"
        table = trials(args.count, args.seed, Path(work), large=args.large, only=args.only)
    print(show(table))
    total = sum(table.values(), Counter())
    raise SystemExit(bool(total["SILENT"] + total["CRASH"]))


if __name__ == "__main__":
    main()
