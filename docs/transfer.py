"""Did pre-training help? The experiments behind docs/transfer.md, by one protocol for all sets.

    python docs/transfer.py ag_news                 # 5 minutes of pre-training on the task's own text, then the arms
    python docs/transfer.py ag_news --wide 30       # 30 minutes on books, PEPs, blog posts, WikiText and that text

Data are looked for in PRETRAIN_TEST_DATA. One CPU thread, so that minutes are CPU minutes. Results go to
``--out`` as JSON and SVG; pre-training is kept there and not repeated.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pretrain

DATA = Path(os.environ.get("PRETRAIN_TEST_DATA", "../shared/data"))
COUNTS = {"ag_news": [100, 200, 1000], "pros_cons": [100, 200, 1000], "banking77": [231, 385, 1001]}
COUNTS["sms_spam"] = [100, 200, 500]
Rows = list[dict[str, str]]


def table(path: Path, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter=delimiter, quoting=quoting))


def labelled(name: str) -> tuple[Rows, Rows]:
    """Training and test rows of a set."""
    folder = DATA / name
    if name == "sms_spam":
        rows = table(folder / "sms.tsv", "\t", csv.QUOTE_NONE)
        found = [{"text": text, "label": label} for label, text in rows]
        return found[:4574], found[4574:]
    parts = []
    for part in ("train", "test"):
        rows = table(folder / f"{part}.csv")
        if name == "ag_news":
            parts.append([{"text": f"{a} {b}", "label": label} for label, a, b in rows])
        else:
            text, label = rows[0].index("text"), 1 - rows[0].index("text")
            parts.append([{"text": row[text], "label": row[label]} for row in rows[1:]])
    return parts[0], parts[1]


def wide_text() -> Iterator[str]:
    """General English: books, technical documents, blog posts, encyclopedia articles."""
    files = ("books/books.jsonl.gz", "python_peps/peps.jsonl.gz", "blog_18f/posts.jsonl.gz")
    for name in files:
        with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]
    for part in ("valid", "test"):
        text = (DATA / "wikitext2" / f"{part}.txt").read_text(encoding="utf-8")
        yield from (line for line in text.split("\n") if len(line) > 80)


def write(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def pre_train(name: str, train: Rows, out: Path, minutes: float, wide: bool) -> Path:
    """Masked-language-model pre-training on text without labels; test text stays out of it."""
    run = out / f"{name}-{'wide' if wide else 'own'}"
    sources = {str(write(out / f"{name}.jsonl", [row["text"] for row in train])): 1.0}
    if wide:
        # A seventh of what is read is the task's own text, a fiftieth of the whole: about ten passes over it.
        sources = dict.fromkeys(sources, 0.15)
        sources[str(write(out / "wide.jsonl", wide_text()))] = 0.85
    size = {"num_layers": 2, "hidden_size": 128, "num_heads": 4, "intermediate_size": 256}
    if wide:
        size = {"num_layers": 4, "hidden_size": 192, "num_heads": 6, "intermediate_size": 384}
    tokenizer = pretrain.train_tokenizer(
        list(sources), "wordpiece", vocab_size=8000 if wide else 6000, lowercase=True
    )
    tokenizer.save(out / f"{run.name}-tokenizer")
    pretrain.train(
        data={
            "train": sources,
            "tokenizer": str(out / f"{run.name}-tokenizer"),
            "row_length": 128,
        },
        model={
            "family": "modernbert",
            "size": "tiny",
            "overrides": {**size, "max_positions": 512, "classifier_pooling": "mean"},
        },
        objective={"class_path": "MaskedLM", "init_args": {"rate": 0.3}},
        optim={
            "lr": 2e-3,
            "schedule": "linear",
            "warmup": 0.05,
            "min_lr": 0.0,
            "weight_decay": 0.01,
        },
        train={
            "out": str(run),
            "limit": f"{minutes} minutes",
            "eval_every": "20%",
            "eval_rows": 200,
            "save_every": "0 steps",
        },
        parallel={"threads": 1},
    )
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(COUNTS))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--wide", type=float, default=0.0, help="minutes on general text instead")
    parser.add_argument("--counts", type=int, nargs="*")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = labelled(args.name)
    run = pre_train(args.name, train, args.out, args.wide or args.minutes, bool(args.wide))
    result = pretrain.finetune(
        run,
        train,
        task="classification",
        test=test,
        out=args.out / f"{run.name}-all",
        limit="250 steps",
        monitor="macro_f1" if args.name == "sms_spam" else "accuracy",
        lrs=[3e-4, 1e-3],
        threads=1,
        compare="scratch",
        label_counts=args.counts or COUNTS[args.name],
        seeds=5,
    )
    comparison = result.comparison
    (args.out / f"{run.name}.json").write_text(comparison.to_json(), encoding="utf-8")
    (args.out / f"{run.name}.svg").write_text(comparison.svg(), encoding="utf-8")
    print(comparison.table())


if __name__ == "__main__":
    main()
